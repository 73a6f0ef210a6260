# SPDX-License-Identifier: Apache-2.0
"""Reading and writing the C arguments of driver calls: plain host addresses of this process.

The driver's entries get every pointer as a number. Their callers are the worker's own replay handlers,
which pass addresses of their own variables, so these are trusted; nothing from a guest comes here unchecked.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any


def put_u64(address: int, value: int) -> None:
    """Store 8 bytes; a null address is skipped (an optional result)."""
    if address:
        ctypes.c_uint64.from_address(address).value = value & (1 << 64) - 1


def put_i32(address: int, value: int) -> None:
    """Store 4 bytes; a null address is skipped."""
    if address:
        ctypes.c_int32.from_address(address).value = value


def put_bytes(address: int, data: bytes) -> None:
    """Store bytes."""
    ctypes.memmove(address, data, len(data))


def get_u64(address: int) -> int:
    """Load 8 bytes."""
    return int(ctypes.c_uint64.from_address(address).value)


def get_bytes(address: int, size: int) -> bytes:
    """Load ``size`` bytes."""
    return ctypes.string_at(address, size)


def get_text(address: int) -> str:
    """Load a NUL-terminated string."""
    return ctypes.string_at(address).decode("utf-8", "replace")


def get_u64_list(address: int, count: int) -> list[int]:
    """Load ``count`` 8-byte words."""
    return list(struct.unpack(f"<{count}Q", ctypes.string_at(address, 8 * count))) if count else []


def unpack(layout: str, address: int) -> tuple[Any, ...]:
    """Load a C struct by its ``struct`` layout."""
    return struct.unpack(layout, ctypes.string_at(address, struct.calcsize(layout)))
