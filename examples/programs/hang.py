# SPDX-License-Identifier: Apache-2.0
"""A program with a kernel that hangs: launches it, waits for it, and prints what CUDA says, how many seconds after the launch,
and what it says afterwards.

It does end, after twenty seconds by the GPU's own clock, so that a real card is not left with it whatever goes wrong. That is
far behind the deadlines that the examples give their VMs, and nobody looks at the program before.
"""

from __future__ import annotations

import ctypes
import time

from cuda import Gpu

HANGS_SECONDS = 20.0


def main() -> int:
    """Always 0: an error is what is expected here."""
    gpu = Gpu()
    gpu.spin(0)  # the first launch of a kernel compiles it
    gpu.synchronize()
    print("launching", flush=True)
    began = time.monotonic()
    gpu.spin(HANGS_SECONDS)
    code = gpu.status("cuCtxSynchronize")
    print("synchronize", code, round(time.monotonic() - began, 3), flush=True)
    address = ctypes.c_uint64()
    print("allocate", gpu.status("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(4096)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
