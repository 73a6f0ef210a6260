# SPDX-License-Identifier: Apache-2.0
"""A program with a kernel that never ends: launches it, waits for it, and prints what CUDA says, now and afterwards."""

from __future__ import annotations

import ctypes

from cuda import Gpu


def main() -> int:
    """Always 0: an error is what is expected here."""
    gpu = Gpu()
    gpu.spin(False)  # the first launch of a kernel compiles it
    gpu.synchronize()
    print("launching", flush=True)
    gpu.spin(True)
    print("synchronize", gpu.status("cuCtxSynchronize"), flush=True)
    address = ctypes.c_uint64()
    print("allocate", gpu.status("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(4096)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
