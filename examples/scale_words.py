#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A Python program of CUDA's driver API, with ctypes alone: ``vgpu-run python3 examples/scale_words.py``.

It knows nothing of virtual GPUs and finds ``libcuda.so.1`` as any program does. Multiplies numbers on the GPU and checks
each one.
"""

from __future__ import annotations

import sys
from array import array
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "programs"))
from cuda import Gpu

COUNT = 4096


def main() -> int:
    """0 if all numbers are right."""
    gpu = Gpu()
    memory = gpu.allocate(4 * COUNT)
    gpu.upload(memory, array("I", range(COUNT)))
    gpu.mul_add(memory, COUNT, 7, 11)
    got = gpu.download(memory, COUNT)
    gpu.free(memory)
    wrong = sum(value != 7 * index + 11 for index, value in enumerate(got))
    print(f"{COUNT} numbers, {wrong} wrong, {gpu.calls} calls")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
