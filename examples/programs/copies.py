# SPDX-License-Identifier: Apache-2.0
"""A program that copies 32 MiB to the device and back, again and again, until somebody kills it."""

from __future__ import annotations

from array import array

from cuda import Gpu

WORDS = 8 << 20


def main() -> int:
    """Does not return; a failed call raises."""
    gpu = Gpu()
    memory = gpu.allocate(4 * WORDS)
    words = array("I", bytes(4 * WORDS))
    print("copying", flush=True)
    while True:
        gpu.upload(memory, words)
        words = gpu.download(memory, WORDS)


if __name__ == "__main__":
    raise SystemExit(main())
