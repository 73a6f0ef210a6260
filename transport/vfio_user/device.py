# SPDX-License-Identifier: Apache-2.0
"""The device behind the protocol: configuration space, BAR0 registers and BAR1 memory as vfio regions.

``Device`` is all that ``server.py`` asks for, so a test can serve something else. ``GpuDevice`` is the virtual GPU.
Its methods return at once: whatever takes time is an event that somebody else acts on. ``SharedMemory`` is BAR1: a
memfd that cannot change its size, sparse until written, lent to QEMU and to workers as a descriptor.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Protocol, Self

import attrs

from .machine import Region
from .messages import IRQ_FLAG_EVENTFD, IrqInfo, RegionFlag
from .pci import ConfigurationSpace, Variant
from .registers import Geometry, RegisterEvent, Registers

REGION_BAR0: Final = 0
REGION_BAR1: Final = 1
REGION_CONFIGURATION: Final = 7
REGION_COUNT: Final = 9
IRQ_ERROR: Final = 3
IRQ_COUNT: Final = 5

MIN_BAR1: Final = 16 << 20
MAX_BAR1: Final = 64 << 30
DEFAULT_BAR1: Final = 256 << 20
FIRST_SLOT: Final = 64 << 10
SLOT_ALIGNMENT: Final = 64 << 10

# Python has no fallocate that punches holes.
_FALLOCATE = ctypes.CDLL(None, use_errno=True).fallocate
_FALLOCATE.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_KEEP_SIZE: Final = 0x1
_PUNCH_HOLE: Final = 0x2


class Device(Protocol):
    """What the server needs of a device. Nothing here may wait: QEMU's processors stand still meanwhile."""

    @property
    def regions(self) -> Sequence[Region]:
        """By index."""

    @property
    def irqs(self) -> Sequence[IrqInfo]:
        """By index."""

    def read(self, region: int, offset: int, count: int) -> bytes:
        """``count`` bytes; the range lies within the region."""

    def write(self, region: int, offset: int, data: bytes) -> Sequence[RegisterEvent]:
        """Take the bytes; the range lies within the region. What follows for the host."""

    def reset(self) -> Sequence[RegisterEvent]:
        """Back to power-on. What follows for the host."""


def cut_bar1(size: int = DEFAULT_BAR1, slot_count: int = 8) -> Geometry:
    """Equal slots in a BAR1 of ``size`` bytes, a power of two from 16 MiB to 64 GiB.

    Raises:
        ValueError: the size is not one of these, or so many slots do not fit.
    """
    if size & (size - 1) or not MIN_BAR1 <= size <= MAX_BAR1:
        raise ValueError(f"BAR1 of {size} bytes is not a power of two from {MIN_BAR1} to {MAX_BAR1}")
    room = (size - FIRST_SLOT) // max(slot_count, 1)
    return Geometry(size, slot_count, FIRST_SLOT, room - room % SLOT_ALIGNMENT)


class SharedMemory:
    """BAR1's memory. Owns its descriptor; ``close`` (or the with block) gives it back, twice is harmless.

    Raises OSError if the kernel gives no memfd.
    """

    def __init__(self, size: int, name: str = "vgpu-bar1") -> None:
        self.size = size
        self._descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._descriptor, size)
            # Nobody whom it is lent to can shrink it under somebody else's mapping.
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, seals)
        except BaseException:
            self.close()
            raise

    @property
    def descriptor(self) -> int:
        """Lent; do not close."""
        return self._descriptor

    def read(self, offset: int, count: int) -> bytes:
        """A copy of ``count`` bytes."""
        return os.pread(self._descriptor, count, offset)

    def write(self, offset: int, data: bytes) -> None:
        """Store ``data``."""
        os.pwrite(self._descriptor, data, offset)

    def discard(self, offset: int, count: int) -> None:
        """Give whole pages back to the host; they read as zeros then, also in mappings of others.

        Takes a while for gigabytes, without the interpreter's lock: call it in a thread.

        Raises:
            OSError: they could not be given back.
        """
        if _FALLOCATE(self._descriptor, _KEEP_SIZE | _PUNCH_HOLE, offset, count):
            number = ctypes.get_errno()
            raise OSError(number, f"giving back {count:#x} bytes at {offset:#x}: {os.strerror(number)}")

    def close(self) -> None:
        """Give the descriptor back; mappings made of it stay."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@attrs.define
class GpuDevice:
    """The virtual GPU. The memory is borrowed and must be as large as the registers' geometry says."""

    registers: Registers
    memory: SharedMemory
    configuration: ConfigurationSpace = attrs.field(factory=ConfigurationSpace)
    # Accesses to BARs that came here instead of to memory: each stops a processor of the guest for a while.
    trapped_reads: int = attrs.field(default=0, init=False)
    trapped_writes: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        if self.memory.size != self.registers.geometry.bar1_size:
            raise ValueError(f"BAR1 has {self.memory.size} bytes, not {self.registers.geometry.bar1_size}")

    @classmethod
    def assemble(cls, registers: Registers, memory: SharedMemory, variant: Variant) -> GpuDevice:
        """The device in one of the two PCI variants."""
        sizes = (registers.geometry.bar0_size, memory.size)
        return cls(registers, memory, ConfigurationSpace(variant, sizes))

    @property
    def regions(self) -> Sequence[Region]:
        """BAR0 trapped, BAR1 mappable, configuration space; the others have size 0."""
        access = RegionFlag.READ | RegionFlag.WRITE
        size = self.memory.size
        present = {
            REGION_BAR0: Region(REGION_BAR0, self.registers.geometry.bar0_size, access),
            REGION_BAR1: Region(
                REGION_BAR1, size, access | RegionFlag.MMAP, ((0, size),), self.memory.descriptor
            ),
            REGION_CONFIGURATION: Region(REGION_CONFIGURATION, self.configuration.size, access),
        }
        return [present.get(index, Region(index)) for index in range(REGION_COUNT)]

    @property
    def irqs(self) -> Sequence[IrqInfo]:
        """No interrupts. QEMU asks for an error notice and warns without one; it is accepted and never raised."""
        return [
            IrqInfo(index, 1, IRQ_FLAG_EVENTFD) if index == IRQ_ERROR else IrqInfo(index)
            for index in range(IRQ_COUNT)
        ]

    def read(self, region: int, offset: int, count: int) -> bytes:
        """What the guest reads of a region. Ranges outside BAR1 or of an absent region read as ones."""
        self.trapped_reads += region != REGION_CONFIGURATION
        if region == REGION_BAR0:
            return self.registers.read(offset, count)
        if region == REGION_BAR1:
            return self.memory.read(offset, count).ljust(count, b"\xff")
        if region == REGION_CONFIGURATION:
            return self.configuration.read(offset, count)
        return b"\xff" * count

    def write(self, region: int, offset: int, data: bytes) -> Sequence[RegisterEvent]:
        """What the guest writes. A function-level reset happens here and now."""
        self.trapped_writes += region != REGION_CONFIGURATION
        if region == REGION_BAR0:
            return self.registers.write(offset, data)
        if region == REGION_BAR1 and offset + len(data) <= self.memory.size:
            self.memory.write(offset, data)
        elif region == REGION_CONFIGURATION and self.configuration.write(offset, data):
            return self.reset()
        return []

    def reset(self) -> Sequence[RegisterEvent]:
        """Configuration space at power-on, every session asked to end. BAR1 is cleaned by whoever frees slots."""
        self.configuration.reset()
        return self.registers.reset()
