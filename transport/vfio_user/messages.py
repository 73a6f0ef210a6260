# SPDX-License-Identifier: Apache-2.0
"""Messages of the vfio-user protocol, version 0.0, as far as QEMU speaks it (docs/vfio-user.md).

Pure: bytes in, values out, both directions. Every decoder checks the length of what it was given and
raises RemoteProtocolError; every encoder checks our own values and raises LocalProtocolError. What a
message means in which state is ``machine.py``; nothing here remembers anything or holds a descriptor.
"""

from __future__ import annotations

import enum
import json
import struct
from typing import Final

import attrs

from vgpu.transport.errors import LocalProtocolError, RemoteProtocolError

HEADER_SIZE: Final = 16
MAX_DATA_BYTES: Final = 1 << 20
# A REGION_WRITE of the largest size: header, its own 16 bytes, the data.
MAX_MESSAGE_BYTES: Final = HEADER_SIZE + 16 + MAX_DATA_BYTES
MAX_VERSION_BYTES: Final = 4096
MAX_DESCRIPTORS: Final = 8
MAX_SPARSE_AREAS: Final = 16
PAGE_SIZE: Final = 4096

_HEADER = struct.Struct("<HHIII")
_VERSION = struct.Struct("<HH")
_DMA_MAP = struct.Struct("<IIQQQ")
_DMA_UNMAP = struct.Struct("<IIQQ")
_INFO = struct.Struct("<IIII")
_REGION_INFO = struct.Struct("<IIIIQQ")
_SET_IRQS = struct.Struct("<IIIII")
_REGION_ACCESS = struct.Struct("<QII")
_CAPABILITY = struct.Struct("<HHIII")
_AREA = struct.Struct("<QQ")

MAX_REGION_INFO_BYTES: Final = _REGION_INFO.size + _CAPABILITY.size + MAX_SPARSE_AREAS * _AREA.size


class Command(enum.IntEnum):
    """Every command of the protocol; machine.py says which are served."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    GET_INFO = 4
    GET_REGION_INFO = 5
    GET_REGION_IO_FDS = 6
    GET_IRQ_INFO = 7
    SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIGRATION_DATA_READ = 17
    MIGRATION_DATA_WRITE = 18


class MessageFlag(enum.IntFlag):
    """Flags of the header. Bits 0 to 3 are the type: 0 a command, 1 a reply."""

    REPLY = 0x1
    NO_REPLY = 0x10
    ERROR = 0x20


TYPE_MASK: Final = 0xF
# A plain number: the complement of an IntFlag leaves out the bits that have no name.
KNOWN_FLAGS: Final = 0x3F


class RegionFlag(enum.IntFlag):
    """What may be done with a region."""

    READ = 0x1
    WRITE = 0x2
    MMAP = 0x4
    CAPABILITIES = 0x8


class DmaFlag(enum.IntFlag):
    """What the device may do with a window of guest memory."""

    READ = 0x1
    WRITE = 0x2


UNMAP_ALL: Final = 0x2


class IrqFlag(enum.IntFlag):
    """Flags of SET_IRQS: one data bit and one action bit."""

    DATA_NONE = 0x1
    DATA_BOOL = 0x2
    DATA_EVENTFD = 0x4
    ACTION_MASK = 0x8
    ACTION_UNMASK = 0x10
    ACTION_TRIGGER = 0x20


DEVICE_FLAG_RESET: Final = 0x1
DEVICE_FLAG_PCI: Final = 0x2
IRQ_FLAG_EVENTFD: Final = 0x1
SPARSE_MMAP_CAPABILITY: Final = 1


def _need(data: bytes, size: int, what: str, *, exact: bool = True) -> None:
    if len(data) < size or (exact and len(data) != size):
        raise RemoteProtocolError(f"{what} has {len(data)} bytes of payload, expected {size}")


def _pack(layout: struct.Struct, *values: int) -> bytes:
    try:
        return layout.pack(*values)
    except struct.error as error:
        raise LocalProtocolError(f"{values} do not fit {layout.format}: {error}") from None


@attrs.frozen
class Header:
    """The 16 bytes before every message. ``size`` counts them too."""

    message_id: int
    command: int
    size: int
    flags: int = 0
    error: int = 0

    def encode(self) -> bytes:
        """The 16 bytes.

        Raises:
            LocalProtocolError: a number does not fit its field.
        """
        return _pack(_HEADER, self.message_id, self.command, self.size, self.flags, self.error)

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """Read a header and hold it to the limits.

        Raises:
            RemoteProtocolError: not 16 bytes, size out of range, unknown flags or type.
        """
        _need(data, HEADER_SIZE, "header")
        header = cls(*_HEADER.unpack(data))
        if not HEADER_SIZE <= header.size <= MAX_MESSAGE_BYTES:
            raise RemoteProtocolError(f"message size {header.size} is outside 16..{MAX_MESSAGE_BYTES}")
        if header.flags & ~KNOWN_FLAGS or header.flags & TYPE_MASK > MessageFlag.REPLY:
            raise RemoteProtocolError(f"message has unknown flags {header.flags:#x}")
        return header

    @property
    def is_reply(self) -> bool:
        return bool(self.flags & MessageFlag.REPLY)

    @property
    def wants_reply(self) -> bool:
        return not self.flags & MessageFlag.NO_REPLY


@attrs.frozen
class Version:
    """First message of either side: protocol version and a JSON object of capabilities."""

    major: int
    minor: int
    capabilities: dict[str, object] = attrs.field(factory=dict)

    def encode(self) -> bytes:
        """Payload: two numbers, JSON, NUL."""
        text = json.dumps({"capabilities": self.capabilities}, separators=(",", ":")).encode()
        return _pack(_VERSION, self.major, self.minor) + text + b"\0"

    @classmethod
    def decode(cls, data: bytes) -> Version:
        """Read the payload. The JSON may be missing; unknown keys are kept and ignored.

        Raises:
            RemoteProtocolError: too short, too long, not JSON, not an object, no NUL at the end.
        """
        _need(data, _VERSION.size, "VERSION", exact=False)
        if len(data) > MAX_VERSION_BYTES:
            raise RemoteProtocolError(f"VERSION has {len(data)} bytes, at most {MAX_VERSION_BYTES}")
        major, minor = _VERSION.unpack_from(data)
        text = data[_VERSION.size :]
        if not text:
            return cls(major, minor)
        if text[-1:] != b"\0":
            raise RemoteProtocolError("VERSION's JSON does not end with NUL")
        try:
            # RecursionError: thousands of opening brackets.
            said = json.loads(text[:-1].decode())
        except (ValueError, RecursionError):
            raise RemoteProtocolError("VERSION's JSON cannot be read") from None
        capabilities = said.get("capabilities", {}) if isinstance(said, dict) else None
        if not isinstance(capabilities, dict):
            raise RemoteProtocolError("VERSION's JSON is not an object of objects")
        return cls(major, minor, capabilities)


@attrs.frozen
class DmaMap:
    """A window of guest memory appears at ``address``; a descriptor may come with it."""

    address: int
    size: int
    flags: int = DmaFlag.READ | DmaFlag.WRITE
    offset: int = 0

    def encode(self) -> bytes:
        """The 32 bytes."""
        return _pack(_DMA_MAP, _DMA_MAP.size, self.flags, self.offset, self.address, self.size)

    @classmethod
    def decode(cls, data: bytes) -> DmaMap:
        """Read and check the 32 bytes.

        Raises:
            RemoteProtocolError: wrong length, unknown flags, empty, or past the end of the address space.
        """
        _need(data, _DMA_MAP.size, "DMA_MAP")
        argsz, flags, offset, address, size = _DMA_MAP.unpack(data)
        if argsz < _DMA_MAP.size or flags & ~0x3:
            raise RemoteProtocolError(f"DMA_MAP has argsz {argsz}, flags {flags:#x}")
        if size == 0 or address + size > 1 << 64 or offset + size > 1 << 64:
            raise RemoteProtocolError(f"DMA_MAP of {size:#x} bytes at {address:#x}, offset {offset:#x}")
        return cls(address, size, flags, offset)


@attrs.frozen
class DmaUnmap:
    """Windows within ``size`` bytes from ``address`` disappear; with flag UNMAP_ALL every window does."""

    address: int
    size: int
    flags: int = 0

    def encode(self) -> bytes:
        """The 24 bytes; request and reply alike."""
        return _pack(_DMA_UNMAP, _DMA_UNMAP.size, self.flags, self.address, self.size)

    @classmethod
    def decode(cls, data: bytes) -> DmaUnmap:
        """Read and check the 24 bytes.

        Raises:
            RemoteProtocolError: wrong length, unknown flags, or past the end of the address space.
        """
        _need(data, _DMA_UNMAP.size, "DMA_UNMAP")
        argsz, flags, address, size = _DMA_UNMAP.unpack(data)
        if argsz < _DMA_UNMAP.size or flags & ~UNMAP_ALL:
            raise RemoteProtocolError(f"DMA_UNMAP has argsz {argsz}, flags {flags:#x}")
        if address + size > 1 << 64 or (size == 0 and not flags & UNMAP_ALL):
            raise RemoteProtocolError(f"DMA_UNMAP of {size:#x} bytes at {address:#x}")
        return cls(address, size, flags)


@attrs.frozen
class DeviceInfo:
    """How many regions and interrupt kinds the device has."""

    flags: int
    region_count: int
    irq_count: int

    def encode(self) -> bytes:
        """The 16 bytes."""
        return _pack(_INFO, _INFO.size, self.flags, self.region_count, self.irq_count)

    @classmethod
    def decode(cls, data: bytes) -> DeviceInfo:
        """Read the 16 bytes.

        Raises:
            RemoteProtocolError: wrong length or argsz.
        """
        _need(data, _INFO.size, "GET_INFO")
        argsz, flags, regions, irqs = _INFO.unpack(data)
        if argsz < _INFO.size:
            raise RemoteProtocolError(f"GET_INFO has argsz {argsz}")
        return cls(flags, regions, irqs)


@attrs.frozen
class RegionInfo:
    """One region: its size, what may be done with it, which parts may be mapped.

    ``argsz``: in a request the room the asker has for the whole payload, in a reply what it takes.
    """

    index: int
    size: int = 0
    flags: int = 0
    offset: int = 0
    areas: tuple[tuple[int, int], ...] = ()
    argsz: int = _REGION_INFO.size

    @property
    def payload_size(self) -> int:
        """Bytes of the whole answer, with the capability."""
        return _REGION_INFO.size + (_CAPABILITY.size + _AREA.size * len(self.areas) if self.areas else 0)

    def encode(self, room: int | None = None) -> bytes:
        """The answer. If it needs more than ``room`` bytes: only the 32-byte structure, saying how many.

        Raises:
            LocalProtocolError: too many areas, or a number does not fit.
        """
        if len(self.areas) > MAX_SPARSE_AREAS:
            raise LocalProtocolError(f"region {self.index} has {len(self.areas)} areas")
        whole = self.payload_size
        fits = bool(self.areas) and (room is None or room >= whole)
        # QEMU refuses an answer that says CAPABILITIES and has none, so the short one does not say it.
        flags = self.flags & ~int(RegionFlag.CAPABILITIES) | (RegionFlag.CAPABILITIES if fits else 0)
        head = _pack(
            _REGION_INFO, whole, flags, self.index, _REGION_INFO.size if fits else 0, self.size, self.offset
        )
        if not fits:
            return head
        capability = _pack(_CAPABILITY, SPARSE_MMAP_CAPABILITY, 1, 0, len(self.areas), 0)
        return head + capability + b"".join(_pack(_AREA, *area) for area in self.areas)

    def encode_request(self) -> bytes:
        """What a client sends: argsz and index, zeros up to argsz, as QEMU does."""
        return _pack(_REGION_INFO, self.argsz, 0, self.index, 0, 0, 0).ljust(self.argsz, b"\0")

    @classmethod
    def decode_request(cls, data: bytes) -> RegionInfo:
        """Read a request: only index and argsz matter.

        QEMU sends the buffer that it wants filled, so its second question is as long as the answer.

        Raises:
            RemoteProtocolError: too short, longer than any answer, or argsz too small.
        """
        _need(data, _REGION_INFO.size, "GET_REGION_INFO", exact=False)
        argsz, _, index, *_ = _REGION_INFO.unpack_from(data)
        if argsz < _REGION_INFO.size or len(data) > MAX_REGION_INFO_BYTES:
            raise RemoteProtocolError(f"GET_REGION_INFO has argsz {argsz}, {len(data)} bytes of payload")
        return cls(index, argsz=argsz)

    @classmethod
    def decode(cls, data: bytes) -> RegionInfo:
        """Read an answer.

        Raises:
            RemoteProtocolError: too short, argsz too small, or a capability that is not what it says.
        """
        _need(data, _REGION_INFO.size, "GET_REGION_INFO", exact=False)
        argsz, flags, index, capability, size, offset = _REGION_INFO.unpack_from(data)
        if argsz < _REGION_INFO.size:
            raise RemoteProtocolError(f"GET_REGION_INFO has argsz {argsz}")
        areas: tuple[tuple[int, int], ...] = ()
        if bool(flags & RegionFlag.CAPABILITIES) != bool(capability):
            raise RemoteProtocolError(f"GET_REGION_INFO has flags {flags:#x}, capability at {capability}")
        if capability:
            if capability != _REGION_INFO.size or len(data) < capability + _CAPABILITY.size:
                raise RemoteProtocolError(f"GET_REGION_INFO has a capability at {capability}")
            kind, version, following, count, _ = _CAPABILITY.unpack_from(data, capability)
            if (kind, version, following) != (SPARSE_MMAP_CAPABILITY, 1, 0) or count > MAX_SPARSE_AREAS:
                raise RemoteProtocolError(f"GET_REGION_INFO has capability {kind} with {count} areas")
            start = capability + _CAPABILITY.size
            _need(data, start + count * _AREA.size, "GET_REGION_INFO")
            areas = tuple(_AREA.iter_unpack(data[start:]))
        elif len(data) != _REGION_INFO.size:
            raise RemoteProtocolError(f"GET_REGION_INFO has {len(data)} bytes of payload")
        return cls(index, size, flags, offset, areas, argsz)


@attrs.frozen
class IrqInfo:
    """One kind of interrupt: how many the device has."""

    index: int
    count: int = 0
    flags: int = 0

    def encode(self) -> bytes:
        """The 16 bytes; request and reply alike."""
        return _pack(_INFO, _INFO.size, self.flags, self.index, self.count)

    @classmethod
    def decode(cls, data: bytes) -> IrqInfo:
        """Read the 16 bytes.

        Raises:
            RemoteProtocolError: wrong length or argsz.
        """
        _need(data, _INFO.size, "GET_IRQ_INFO")
        argsz, flags, index, count = _INFO.unpack(data)
        if argsz < _INFO.size:
            raise RemoteProtocolError(f"GET_IRQ_INFO has argsz {argsz}")
        return cls(index, count, flags)


@attrs.frozen
class SetIrqs:
    """Wire, unwire, mask or trigger interrupts; eventfds travel beside the bytes."""

    index: int
    start: int
    count: int
    flags: int
    data: bytes = b""

    def encode(self) -> bytes:
        """The 20 bytes and the data."""
        argsz = _SET_IRQS.size + len(self.data)
        return _pack(_SET_IRQS, argsz, self.flags, self.index, self.start, self.count) + self.data

    @classmethod
    def decode(cls, data: bytes) -> SetIrqs:
        """Read and check: one data bit, one action bit, data of the right length.

        Raises:
            RemoteProtocolError: any of these is not so.
        """
        _need(data, _SET_IRQS.size, "SET_IRQS", exact=False)
        argsz, flags, index, start, count = _SET_IRQS.unpack_from(data)
        rest = data[_SET_IRQS.size :]
        kind, action = flags & 0x7, flags & 0x38
        single = kind in (1, 2, 4) and action in (8, 16, 32)
        if argsz < _SET_IRQS.size or not single or flags & ~0x3F:
            raise RemoteProtocolError(f"SET_IRQS has argsz {argsz}, flags {flags:#x}")
        if len(rest) != (count if kind == IrqFlag.DATA_BOOL else 0):
            raise RemoteProtocolError(f"SET_IRQS for {count} has {len(rest)} bytes of data")
        return cls(index, start, count, flags, rest)


@attrs.frozen
class RegionAccess:
    """Head of a REGION_READ or REGION_WRITE, and of the answer: ``count`` bytes at ``offset``."""

    region: int
    offset: int
    count: int

    def encode(self, data: bytes = b"") -> bytes:
        """The 16 bytes and the data."""
        return _pack(_REGION_ACCESS, self.offset, self.region, self.count) + data

    @classmethod
    def _read(cls, data: bytes, what: str) -> RegionAccess:
        _need(data, _REGION_ACCESS.size, what, exact=False)
        offset, region, count = _REGION_ACCESS.unpack_from(data)
        if not 0 < count <= MAX_DATA_BYTES:
            raise RemoteProtocolError(f"{what} of {count} bytes, at most {MAX_DATA_BYTES}")
        return cls(region, offset, count)

    @classmethod
    def decode_bare(cls, data: bytes, what: str = "REGION_READ") -> RegionAccess:
        """Read one that carries no data: a read's request, a write's answer.

        Raises:
            RemoteProtocolError: wrong length, or a count outside 1..MAX_DATA_BYTES.
        """
        access = cls._read(data, what)
        _need(data, _REGION_ACCESS.size, what)
        return access

    @classmethod
    def decode_with_data(cls, data: bytes, what: str = "REGION_WRITE") -> tuple[RegionAccess, bytes]:
        """Read one that carries ``count`` bytes: a write's request, a read's answer.

        Raises:
            RemoteProtocolError: the data is not as long as it says, or the count is out of range.
        """
        access = cls._read(data, what)
        _need(data, _REGION_ACCESS.size + access.count, what)
        return access, data[_REGION_ACCESS.size :]
