# SPDX-License-Identifier: Apache-2.0
"""Host memory for the software GPU, mapped by hand: physical allocations, and mmap with the flags Python has no names for.

Here because a physical allocation (cuMemCreate) must appear at several device addresses at once, with bytes side by side
for copies, which takes MAP_FIXED over a reservation.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

import attrs

PAGE: Final = 2 << 20  # granularity of physical allocations and of reservations, as on NVIDIA devices
MAP_FIXED: Final = 0x10
MAP_NORESERVE: Final = 0x4000  # the mmap module has no name for it before Python 3.13
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def map_memory(hint: int, size: int, protection: int, flags: int, descriptor: int) -> int:
    address = _libc.mmap(hint or None, size, protection, flags, descriptor, 0)
    if address is None or address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise MemoryError(f"mmap of {size} bytes: {os.strerror(number)}")
    return int(address)


def unmap_memory(address: int, size: int) -> None:
    _libc.munmap(address, size)


@attrs.define(eq=False)
class PhysicalAllocation:
    """Memory without an address (cuMemCreate). It may be mapped at several addresses, and dies with the last of them.

    `close` gives up the creator's reference; the pages live on while mapped.
    """

    size: int
    descriptor: int

    @classmethod
    def create(cls, size: int) -> PhysicalAllocation:
        """Raises: ValueError where `size` is not a positive multiple of PAGE."""
        if size <= 0 or size % PAGE:
            raise ValueError(f"physical size is {size} bytes, expected a positive multiple of {PAGE}")
        descriptor = os.memfd_create("vgpu-physical", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size)
        return cls(size, descriptor)

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
