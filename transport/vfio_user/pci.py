# SPDX-License-Identifier: Apache-2.0
"""Configuration space of the virtual GPU: what lspci reads, and the few bits that a guest may change.

Two variants: a conventional device (256 bytes) for QEMU's ``pc`` machine, and a PCI Express endpoint (4096
bytes, function-level reset, link as a real card's) behind a root port of ``q35``. Pure: reads and writes in,
bytes and "reset me" out. Every byte has a mask of writable bits; what the mask does not name ignores writes, the
expansion ROM among them. BARs can be sized as the standard says, by writing ones and reading what stayed: QEMU does
not need it, Cloud Hypervisor does. There is no interrupt of any kind: a pending INTx would switch the mappings of the
BARs off, MSI-X makes unplugging abort QEMU.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

import attrs

VENDOR: Final = 0x10DE
DEVICE: Final = 0x2331
SUBSYSTEM: Final = 0x16C1
REVISION: Final = 0xA1
CLASS: Final = 0x030200  # 3D controller

CONVENTIONAL_SIZE: Final = 256
EXPRESS_SIZE: Final = 4096

COMMAND: Final = 0x04
BAR0: Final = 0x10
BAR1: Final = 0x14
POWER: Final = 0x40
EXPRESS: Final = 0x60
# NVIDIA cards switch their audio function on with bit 25 here, and Linux does so on every NVIDIA endpoint.
AUDIO_SWITCH: Final = 0x488

_BAR_MEMORY_64_PREFETCHABLE: Final = 0xC
_BAR_TYPE_BITS: Final = 0xF
_COMMAND_BITS: Final = 0x0546  # memory, bus master, parity, SERR, INTx off; no I/O ports
_STATUS_CAPABILITIES: Final = 0x0010
_RESET_FUNCTION: Final = 0x8000


class Variant(enum.Enum):
    """Which kind of PCI device this is."""

    CONVENTIONAL = "conventional"
    EXPRESS = "express"


@attrs.define
class ConfigurationSpace:
    """The bytes of configuration space. ``size`` is also that of vfio region 7.

    ``bar_sizes``: of BAR0 and BAR1, powers of two; 0 for one that cannot be sized.
    """

    variant: Variant = Variant.CONVENTIONAL
    bar_sizes: tuple[int, int] = (0, 0)
    _values: bytearray = attrs.field(init=False, factory=bytearray, repr=False)
    _writable: bytearray = attrs.field(init=False, factory=bytearray, repr=False)

    def __attrs_post_init__(self) -> None:
        self.reset()

    @property
    def size(self) -> int:
        """Bytes: 256 or 4096."""
        return EXPRESS_SIZE if self.variant is Variant.EXPRESS else CONVENTIONAL_SIZE

    def reset(self) -> None:
        """Back to what the device says at power-on."""
        self._values = bytearray(self.size)
        self._writable = bytearray(self.size)
        self._put("<HH", 0x00, VENDOR, DEVICE)
        self._put("<HH", COMMAND, 0, _STATUS_CAPABILITIES)
        self._put("<I", 0x08, CLASS << 8 | REVISION)
        self._put("<II", BAR1, _BAR_MEMORY_64_PREFETCHABLE, 0)
        self._put("<HH", 0x2C, VENDOR, SUBSYSTEM)
        self._put("<B", 0x34, POWER)
        bar0, bar1 = (-size & ~_BAR_TYPE_BITS if size else 0 for size in self.bar_sizes)
        self._allow("<I", BAR0, bar0 & 0xFFFFFFFF)
        self._allow("<Q", BAR1, bar1 & 0xFFFFFFFFFFFFFFFF)
        self._allow("<H", COMMAND, _COMMAND_BITS)
        self._allow("<BB", 0x0C, 0xFF, 0xFF)  # cache line, latency: scratch by the standard
        self._allow("<B", 0x3C, 0xFF)  # interrupt line: the firmware's note to itself
        express = self.variant is Variant.EXPRESS
        # Version 3, no D1 or D2, no PME; PMCSR keeps its state over D3hot.
        self._put("<BBHHH", POWER, 0x01, EXPRESS if express else 0, 0x0003, 0x0008, 0)
        if express:
            self._put_express()

    def _put_express(self) -> None:
        # Endpoint, version 2; FLR, role-based errors, 256-byte payloads; 32 GT/s x16 both possible and in use.
        self._put("<BBHI", EXPRESS, 0x10, 0, 0x0002, 0x10008001)
        self._put("<HHI", EXPRESS + 0x08, 0x2910, 0, 0x00000D05)
        self._put("<HH", EXPRESS + 0x10, 0, 0x1105)
        self._put("<IHH", EXPRESS + 0x2C, 0x3E, 0x0005, 0)
        self._allow("<H", EXPRESS + 0x08, 0x7FFF)
        self._allow("<H", EXPRESS + 0x10, 0x00C3)
        self._allow("<H", EXPRESS + 0x30, 0x000F)
        self._allow("<I", AUDIO_SWITCH, 1 << 25)

    def _put(self, layout: str, offset: int, *values: int) -> None:
        struct.pack_into(layout, self._values, offset, *values)

    def _allow(self, layout: str, offset: int, *masks: int) -> None:
        struct.pack_into(layout, self._writable, offset, *masks)

    def read(self, offset: int, count: int) -> bytes:
        """``count`` bytes; outside the space all ones, as a bus reads where nobody answers."""
        if offset < 0 or count < 0:
            raise ValueError(f"read of {count} at {offset}")
        return bytes(self._values[offset : offset + count]).ljust(count, b"\xff")

    def write(self, offset: int, data: bytes) -> bool:
        """Store the writable bits. True: the guest asked for a function-level reset; call ``reset`` on the device.

        The bit that asks is never stored. Bytes outside the space are dropped.
        """
        asked = False
        for address, value in enumerate(data, offset):
            if not 0 <= address < self.size:
                continue
            if self.variant is Variant.EXPRESS and address == EXPRESS + 0x09:
                asked = asked or bool(value & _RESET_FUNCTION >> 8)
            if address == POWER + 4:
                # Only D0 and D3hot exist; a write of another state is dropped.
                if value & 3 in (0, 3):
                    self._values[address] = self._values[address] & ~3 | value & 3
                continue
            mask = self._writable[address]
            self._values[address] = self._values[address] & ~mask | value & mask
        return asked

    @property
    def memory_enabled(self) -> bool:
        """Whether the guest switched the decoding of the BARs on."""
        return bool(self._values[COMMAND] & 0x2)
