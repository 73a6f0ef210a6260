# SPDX-License-Identifier: Apache-2.0
"""The software GPU's address space: which device addresses are live, and the host bytes behind them.

Here because every copy, every kernel access and every pointer query of the software GPU asks the same question, "is
this address backed, and by what?", and must get the same answer. It must never hand out a byte that no live
allocation, window or mapping covers, and never touch host memory for an address it has not checked.

Layout of device addresses (constants below): the heap, virtual reservations, and windows wherever their owner puts
them. An address space holds *backings* (an array of host bytes that stands at a device address) and *ranges* (the parts
of a backing that are live). The heap is one backing with a range per allocation; a window is one of each; a virtual
reservation is one backing whose mapped pieces are ranges. Ranges never overlap.

    AddressError
    ├── IllegalAddress      CUDA error 700
    └── MisalignedAddress   CUDA error 716
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import threading
from collections.abc import Iterator
from typing import Any, Final, Literal

import attrs
import numpy as np
import numpy.typing as npt

from .physical import MAP_FIXED, MAP_NORESERVE, PAGE, PhysicalAllocation, map_memory, unmap_memory

__all__ = [
    "PAGE",
    "AddressError",
    "AddressSpace",
    "IllegalAddress",
    "MisalignedAddress",
    "PhysicalAllocation",
]

Bytes = npt.NDArray[np.uint8]
Lanes = npt.NDArray[Any]

HEAP_BASE: Final = 0x0700_0000_0000
RESERVATION_BASE: Final = 0x0A00_0000_0000
RESERVATION_LIMIT: Final = 0x2000_0000_0000
DEFAULT_CAPACITY: Final = 4 << 30
_RELEASE_FROM: Final = 1 << 20  # frees of at least this size give their pages back to the host
_WINDOW_ALIGNMENT: Final = 16  # a 16-byte vector access must be as aligned in the buffer as on the device

_UNSIGNED: Final[dict[int, np.dtype[Any]]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.uint16),
    4: np.dtype(np.uint32),
    8: np.dtype(np.uint64),
}


class AddressError(Exception):
    """A device access that the hardware would answer with a fault."""

    def __init__(self, address: int, size: int, is_write: bool, what: str) -> None:
        super().__init__(f"{what} {'write' if is_write else 'read'} of {size} bytes at {address:#x}")
        self.address = address
        self.size = size
        self.is_write = is_write


class IllegalAddress(AddressError):
    """No live allocation, window or mapping covers the access (CUDA error 700)."""

    def __init__(self, address: int, size: int = 1, is_write: bool = False) -> None:
        super().__init__(address, size, is_write, "illegal")


class MisalignedAddress(AddressError):
    """The address is not a multiple of the access size (CUDA error 716)."""

    def __init__(self, address: int, size: int = 1, is_write: bool = False) -> None:
        super().__init__(address, size, is_write, "misaligned")


@attrs.define(eq=False)
class Backing:
    """Host bytes that stand at a device address; typed views of them are made once."""

    base: int
    buffer: Bytes
    _views: dict[int, Lanes] = attrs.Factory(dict)

    def elements(self, size: int) -> Lanes:
        """The whole buffer as unsigned integers of `size` bytes (a tail shorter than one is left out)."""
        view = self._views.get(size)
        if view is None:
            usable = self.buffer.size - self.buffer.size % size
            view = self._views[size] = self.buffer[:usable].view(_UNSIGNED[size])
        return view


@attrs.define(eq=False)
class _Reservation:
    backing: Backing
    host: int
    size: int


@attrs.define(eq=False)
class _Range:
    base: int
    size: int
    backing: Backing
    kind: Literal["heap", "window", "mapping"]
    writable: bool = True
    readable: bool = True

    @property
    def end(self) -> int:
        return self.base + self.size


@attrs.define(eq=False)
class _Tables:
    """The ranges as arrays, for questions about many addresses at once."""

    starts: npt.NDArray[np.uint64]
    ends: npt.NDArray[np.uint64]
    backing_of: npt.NDArray[np.int64]
    backings: list[Backing]


class AddressSpace:
    """One GPU's memory as its kernels and copies see it. Safe to use from several threads."""

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        self.capacity = capacity
        # Bytes of the heap given out, and of physical allocations made through `create_physical`.
        # Invariant: used == sum(size of heap ranges) + sum(size of live physical allocations) <= capacity
        self.used = 0
        self._lock = threading.RLock()
        self._heap_map = mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        self._heap = Backing(HEAP_BASE, np.frombuffer(self._heap_map, dtype=np.uint8))
        # Invariant: _starts is sorted and _ranges[i].base == _starts[i]; ranges do not overlap.
        self._starts: list[int] = []
        self._ranges: list[_Range] = []
        self._tables: _Tables | None = None
        # Free parts of the heap: sorted, not adjacent to each other.
        self._holes: list[tuple[int, int]] = [(HEAP_BASE, capacity)]
        self._reservations: dict[int, _Reservation] = {}

    # --- ranges -----------------------------------------------------------------------------------------------------

    def _insert(self, new: _Range) -> None:
        position = bisect.bisect_right(self._starts, new.base)
        if position and self._ranges[position - 1].end > new.base:
            raise ValueError(f"{new.base:#x} is already in use")
        if position < len(self._ranges) and self._ranges[position].base < new.end:
            raise ValueError(f"{self._ranges[position].base:#x} is already in use")
        self._starts.insert(position, new.base)
        self._ranges.insert(position, new)
        self._tables = None

    def _remove(self, base: int, kind: str) -> _Range:
        position = bisect.bisect_left(self._starts, base)
        if (
            position == len(self._starts)
            or self._starts[position] != base
            or self._ranges[position].kind != kind
        ):
            raise KeyError(base)
        del self._starts[position]
        self._tables = None
        return self._ranges.pop(position)

    def _range_at(self, address: int) -> _Range | None:
        position = bisect.bisect_right(self._starts, address) - 1
        if position < 0:
            return None
        found = self._ranges[position]
        return found if address < found.end else None

    def find(self, address: int) -> tuple[int, int] | None:
        """(base, size) of the allocation, window or mapping that holds `address`."""
        with self._lock:
            found = self._range_at(address)
            return (found.base, found.size) if found is not None else None

    # --- windows ----------------------------------------------------------------------------------------------------

    def map_window(self, base: int, buffer: Bytes) -> None:
        """Let `buffer` (one-dimensional uint8, kept alive by us until unmapped) stand at device address `base`.

        Raises: ValueError where the addresses are in use, the base is not a multiple of 16, or the buffer is unfit.
        """
        if buffer.dtype != np.uint8 or buffer.ndim != 1 or buffer.size == 0 or not buffer.flags.c_contiguous:
            raise ValueError("a window needs a one-dimensional, contiguous, non-empty uint8 array")
        if base % _WINDOW_ALIGNMENT or base <= 0:
            raise ValueError(f"window base {base:#x} is not a positive multiple of {_WINDOW_ALIGNMENT}")
        with self._lock:
            self._insert(
                _Range(base, buffer.size, Backing(base, buffer), "window", bool(buffer.flags.writeable))
            )

    def unmap_window(self, base: int) -> None:
        """Raises: KeyError where no window begins at `base`."""
        with self._lock:
            self._remove(base, "window")

    # --- heap -------------------------------------------------------------------------------------------------------

    def allocate(self, size: int, alignment: int = 256) -> int:
        """A device address for `size` bytes (their contents are whatever was there).

        Raises: MemoryError where the capacity is used up; ValueError for a size or an alignment that makes no sense.
        """
        if size <= 0 or alignment <= 0 or alignment & (alignment - 1):
            raise ValueError(f"cannot allocate {size} bytes aligned to {alignment}")
        alignment = max(alignment, _WINDOW_ALIGNMENT)
        with self._lock:
            if size > self.capacity - self.used:
                raise MemoryError(f"{size} bytes wanted, {self.capacity - self.used} of {self.capacity} free")
            for position, (start, length) in enumerate(self._holes):
                base = -(-start // alignment) * alignment
                if base + size <= start + length:
                    rest = [(start, base - start), (base + size, start + length - base - size)]
                    self._holes[position : position + 1] = [hole for hole in rest if hole[1]]
                    self._insert(_Range(base, size, self._heap, "heap"))
                    self.used += size
                    return base
            raise MemoryError(f"{size} bytes wanted, no hole of that size is left")

    def free(self, address: int) -> None:
        """Raises: KeyError for an address that is not the base of a live heap allocation."""
        with self._lock:
            freed = self._remove(address, "heap")
            self.used -= freed.size
            if freed.size >= _RELEASE_FROM:
                first = -(-(freed.base - HEAP_BASE) // mmap.PAGESIZE) * mmap.PAGESIZE
                last = (freed.end - HEAP_BASE) // mmap.PAGESIZE * mmap.PAGESIZE
                self._heap_map.madvise(mmap.MADV_DONTNEED, first, last - first)
            position = bisect.bisect_left(self._holes, (freed.base, 0))
            start, length = freed.base, freed.size
            if position < len(self._holes) and self._holes[position][0] == freed.end:
                length += self._holes.pop(position)[1]
            if position and sum(self._holes[position - 1]) == start:
                position -= 1
                before = self._holes.pop(position)
                start, length = before[0], length + before[1]
            self._holes.insert(position, (start, length))

    # --- virtual memory management ----------------------------------------------------------------------------------

    def create_physical(self, size: int) -> PhysicalAllocation:
        """Memory that counts against the capacity until `release_physical`. Raises: MemoryError, ValueError."""
        with self._lock:
            if size > self.capacity - self.used:
                raise MemoryError(f"{size} bytes wanted, {self.capacity - self.used} of {self.capacity} free")
            physical = PhysicalAllocation.create(size)
            self.used += size
            return physical

    def release_physical(self, physical: PhysicalAllocation) -> None:
        """The creator's reference ends; mappings keep the bytes. Raises: KeyError where it has ended before."""
        with self._lock:
            if physical.descriptor < 0:
                raise KeyError("physical allocation already released")
            physical.close()
            self.used -= physical.size

    def reserve(self, size: int, alignment: int = 0, fixed: int = 0) -> int:
        """Addresses without memory (cuMemAddressReserve); `fixed` is a wish, kept where those addresses are free.

        Raises: ValueError for sizes that are not multiples of PAGE; MemoryError where no room is left.
        """
        alignment = max(alignment, PAGE)
        if size <= 0 or size % PAGE or alignment & (alignment - 1):
            raise ValueError(f"cannot reserve {size} bytes aligned to {alignment}: not a multiple of {PAGE}")
        with self._lock:
            base = fixed if fixed and fixed % alignment == 0 and self._is_unreserved(fixed, size) else 0
            if not base:
                base = -(-RESERVATION_BASE // alignment) * alignment
                for taken in sorted(self._reservations):
                    if base + size <= taken:
                        break
                    base = max(base, -(-(taken + self._reservations[taken].size) // alignment) * alignment)
            if base + size > RESERVATION_LIMIT:
                raise MemoryError(f"no room to reserve {size} bytes")
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
            host = map_memory(0, size, 0, flags, -1)
            # SAFETY: the mapping of `size` bytes at `host` lives until `release`, which drops the backing first; only
            # the parts covered by a range, which are mapped readable and writable, are ever touched.
            memory = (ctypes.c_uint8 * size).from_address(host)
            buffer: Bytes = np.frombuffer(memoryview(memory).cast("B"), dtype=np.uint8)
            self._reservations[base] = _Reservation(Backing(base, buffer), host, size)
            return base

    def _is_unreserved(self, base: int, size: int) -> bool:
        if not RESERVATION_BASE <= base <= base + size <= RESERVATION_LIMIT:
            return False
        return all(
            base + size <= start or start + old.size <= base for start, old in self._reservations.items()
        )

    def release(self, base: int, size: int | None = None) -> None:
        """End a reservation, of that size where one is given.

        Raises: KeyError where none begins at `base`; ValueError for another size, or while memory is mapped in it.
        """
        with self._lock:
            reservation = self._reservations[base]
            if size is not None and size != reservation.size:
                raise ValueError(f"the reservation at {base:#x} has {reservation.size} bytes, not {size}")
            if any(r.kind == "mapping" and r.backing is reservation.backing for r in self._ranges):
                raise ValueError(f"memory is still mapped in the reservation at {base:#x}")
            del self._reservations[base]
            unmap_memory(reservation.host, reservation.size)

    def map(self, address: int, physical: PhysicalAllocation) -> None:
        """Put a whole physical allocation at `address`, inside one reservation; no access until `set_access`.

        Raises: KeyError outside reservations or for a released handle; ValueError where something is mapped there.
        """
        with self._lock:
            if physical.descriptor < 0 or address % PAGE:
                raise KeyError(address)
            for base, reservation in self._reservations.items():
                if base <= address and address + physical.size <= base + reservation.size:
                    break
            else:
                raise KeyError(address)
            self._insert(
                _Range(address, physical.size, reservation.backing, "mapping", writable=False, readable=False)
            )
            map_memory(
                reservation.host + address - base,
                physical.size,
                mmap.PROT_READ | mmap.PROT_WRITE,
                mmap.MAP_SHARED | MAP_FIXED,
                physical.descriptor,
            )

    def unmap(self, address: int) -> None:
        """Take the mapping that begins at `address` away. Raises: KeyError where none does."""
        with self._lock:
            gone = self._remove(address, "mapping")
            for base, reservation in self._reservations.items():
                if gone.backing is reservation.backing:
                    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
                    map_memory(reservation.host + address - base, gone.size, 0, flags, -1)

    def unmap_range(self, address: int, size: int) -> None:
        """Take all mappings in [address, address + size) away, of which there may be none.

        Raises: KeyError where the range is empty, leaves its reservation, or cuts through a mapping.
        """
        with self._lock:
            end = address + size
            reserved = any(base <= address and end <= base + r.size for base, r in self._reservations.items())
            inside = [r for r in self._ranges if r.base < end and address < r.end]
            if size <= 0 or not reserved or any(r.base < address or r.end > end for r in inside):
                raise KeyError(address)
            for piece in inside:
                self.unmap(piece.base)

    def set_access(self, address: int, size: int, *, readable: bool, writable: bool) -> None:
        """Access rights of the mappings that make up [address, address + size). Raises: KeyError where one is missing."""
        with self._lock:
            position = bisect.bisect_left(self._starts, address)
            chosen: list[_Range] = []
            reached = address
            while reached < address + size:
                if position == len(self._ranges) or self._starts[position] != reached:
                    raise KeyError(reached)
                piece = self._ranges[position]
                if piece.kind != "mapping":
                    raise KeyError(reached)
                chosen.append(piece)
                reached = piece.end
                position += 1
            for piece in chosen:
                piece.readable, piece.writable = readable, writable
            self._tables = None

    # --- bytes ------------------------------------------------------------------------------------------------------

    def view(self, address: int, size: int, is_write: bool = False) -> Bytes:
        """The live bytes themselves, no copy. Valid until the allocation is freed. Raises: IllegalAddress."""
        with self._lock:
            first = self._range_at(address) if address >= 0 else None
            if first is None or size < 0:
                raise IllegalAddress(address, size, is_write)
            piece, end = first, address + size
            while True:
                if not (piece.writable if is_write else piece.readable):
                    raise IllegalAddress(max(address, piece.base), size, is_write)
                if end <= piece.end:
                    break
                # Mapped pieces of one reservation lie side by side; two heap allocations are not one.
                following = self._range_at(piece.end) if piece.kind == "mapping" else None
                if following is None or following.backing is not piece.backing:
                    raise IllegalAddress(piece.end, end - piece.end, is_write)
                piece = following
            offset = address - first.backing.base
            return first.backing.buffer[offset : offset + size]

    def read(self, address: int, size: int) -> bytes:
        """Raises: IllegalAddress."""
        return self.view(address, size).tobytes() if size else b""

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Raises: IllegalAddress."""
        source = np.frombuffer(data, dtype=np.uint8)
        if source.size:
            self.view(address, source.size, is_write=True)[:] = source

    # --- lanes ------------------------------------------------------------------------------------------------------

    def locate(
        self, addresses: npt.NDArray[np.uint64], element: int, width: int, is_write: bool
    ) -> Iterator[tuple[npt.NDArray[np.int64] | None, Lanes, npt.NDArray[np.int64]]]:
        """Where the accesses of many lanes go: (which lanes, array of unsigned `element`s, index of each one's first).

        Each access is `width` bytes (a power of two, a multiple of `element`) and must be aligned to it. "Which lanes" is
        None for all. One item per backing: almost always a single one. Everything is checked before the first item.
        Raises: IllegalAddress, MisalignedAddress.
        """
        lowest, highest = int(addresses.min()), int(addresses.max())
        mask = np.uint64(width - 1)
        if width > 1 and int(np.bitwise_or.reduce(addresses) & mask):
            raise MisalignedAddress(int(addresses[(addresses & mask) != 0][0]), width, is_write)
        with self._lock:
            found = self._range_at(lowest)
            if found is not None and highest + width <= found.end:
                if not (found.writable if is_write else found.readable):
                    raise IllegalAddress(lowest, width, is_write)
                return iter([self._item(None, found.backing, addresses, element)])
            tables = self._tables
            if tables is None:
                tables = self._tables = self._build_tables()
        if not tables.starts.size:
            raise IllegalAddress(lowest, width, is_write)
        which = np.searchsorted(tables.starts, addresses, side="right") - 1
        outside = (
            (which < 0) | (addresses > tables.ends[which] - np.uint64(width)) | (tables.ends[which] < width)
        )
        if outside.any():
            raise IllegalAddress(int(addresses[outside][0]), width, is_write)
        with self._lock:
            for position in np.unique(which):
                piece = self._range_at(int(tables.starts[position]))
                if piece is None or not (piece.writable if is_write else piece.readable):
                    raise IllegalAddress(int(addresses[which == position][0]), width, is_write)
        owners = tables.backing_of[which]
        distinct = np.unique(owners)
        if distinct.size == 1:
            return iter([self._item(None, tables.backings[int(distinct[0])], addresses, element)])
        items = []
        for owner in distinct:
            lanes = np.flatnonzero(owners == owner)
            items.append(self._item(lanes, tables.backings[int(owner)], addresses[lanes], element))
        return iter(items)

    @staticmethod
    def _item(
        lanes: npt.NDArray[np.int64] | None, backing: Backing, addresses: npt.NDArray[np.uint64], element: int
    ) -> tuple[npt.NDArray[np.int64] | None, Lanes, npt.NDArray[np.int64]]:
        offsets = (addresses - np.uint64(backing.base)).view(np.int64)
        if element > 1:
            offsets = offsets >> (element.bit_length() - 1)
        return lanes, backing.elements(element), offsets

    def _build_tables(self) -> _Tables:
        backings: list[Backing] = []
        numbers: dict[int, int] = {}
        owners = []
        for piece in self._ranges:
            number = numbers.setdefault(id(piece.backing), len(backings))
            if number == len(backings):
                backings.append(piece.backing)
            owners.append(number)
        return _Tables(
            np.array(self._starts, dtype=np.uint64),
            np.array([piece.end for piece in self._ranges], dtype=np.uint64),
            np.array(owners, dtype=np.int64),
            backings,
        )
