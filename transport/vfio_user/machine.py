# SPDX-License-Identifier: Apache-2.0
"""The server's half of a vfio-user connection, without a socket: bytes and descriptors in, events and replies out.

    machine = ServerMachine(regions, irqs)
    for event in machine.receive_data(data, descriptors): ...   # RegionRead, RegionWrite, ResetAsked want an answer
    machine.answer_read(event, data)
    for reply in machine.data_to_send(): ...                    # bytes, and descriptors that are only lent

What the protocol asks about the device's shape is answered here from the tables given at the start; what
touches the device becomes an event. All legal orders stand in TRANSITIONS and SERVED: before VERSION nothing
else is legal, after it everything is, in any order, as QEMU pipelines. A message whose frame is sound but whose
content is not, or that asks for what this device has not, is answered with an errno and counted; a broken frame
raises RemoteProtocolError and ends the connection.

Every descriptor given to ``receive_data`` is closed here. The device never reaches into guest memory and raises
no interrupt, so it keeps none: whoever breaks into the process finds no guest memory mapped but BAR1. This module
never waits, never opens anything, and never closes a descriptor of a region.
"""

from __future__ import annotations

import enum
import errno
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import attrs

from vgpu.transport.errors import LocalProtocolError, RemoteProtocolError

from .messages import (
    DEVICE_FLAG_PCI,
    DEVICE_FLAG_RESET,
    HEADER_SIZE,
    MAX_DATA_BYTES,
    MAX_DESCRIPTORS,
    PAGE_SIZE,
    UNMAP_ALL,
    Command,
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    Header,
    IrqFlag,
    IrqInfo,
    MessageFlag,
    RegionAccess,
    RegionFlag,
    RegionInfo,
    SetIrqs,
    Version,
)

# QEMU has one window per section of its memory map, a few dozen; the limit it may use is told in VERSION.
MAX_DMA_WINDOWS: Final = 4096
# Messages that wait for our own answer. The server answers each before it reads the next.
MAX_UNANSWERED: Final = 64


class State(enum.Enum):
    """Where a connection is."""

    NEGOTIATING = "negotiating"
    READY = "ready"
    CLOSED = "closed"


class Input(enum.Enum):
    """What can happen to a connection."""

    VERSION = "version"
    COMMAND = "command"
    BROKEN = "broken"
    END = "end"


# What is absent is a protocol error, and a protocol error is Input.BROKEN.
TRANSITIONS: Final[Mapping[tuple[State, Input], State]] = {
    (State.NEGOTIATING, Input.VERSION): State.READY,
    (State.NEGOTIATING, Input.BROKEN): State.CLOSED,
    (State.NEGOTIATING, Input.END): State.CLOSED,
    (State.READY, Input.COMMAND): State.READY,
    (State.READY, Input.BROKEN): State.CLOSED,
    (State.READY, Input.END): State.CLOSED,
    (State.CLOSED, Input.END): State.CLOSED,
}


@attrs.frozen
class Region:
    """A region as it is told to the client. The descriptor stays its owner's; it is sent, never closed."""

    index: int
    size: int = 0
    flags: int = 0  # of RegionFlag
    areas: tuple[tuple[int, int], ...] = ()
    descriptor: int | None = None
    descriptor_offset: int = 0

    def __attrs_post_init__(self) -> None:
        if bool(self.areas) != (self.descriptor is not None) or bool(self.areas) != bool(
            self.flags & RegionFlag.MMAP
        ):
            raise LocalProtocolError(f"region {self.index}: MMAP, areas and a descriptor go together")
        for offset, size in self.areas:
            if offset % PAGE_SIZE or size % PAGE_SIZE or not 0 < size <= self.size - offset:
                raise LocalProtocolError(f"region {self.index}: area of {size:#x} bytes at {offset:#x}")

    @property
    def info(self) -> RegionInfo:
        """What GET_REGION_INFO answers."""
        return RegionInfo(self.index, self.size, self.flags, self.descriptor_offset, self.areas)


@attrs.frozen
class Negotiated:
    """VERSION was exchanged."""

    capabilities: dict[str, object]


@attrs.frozen
class RegionRead:
    """Answer with ``answer_read`` or ``refuse``. The range lies within the region."""

    message_id: int
    region: int
    offset: int
    count: int
    wants_reply: bool = True


@attrs.frozen
class RegionWrite:
    """Answer with ``answer_write`` or ``refuse``. The range lies within the region."""

    message_id: int
    region: int
    offset: int
    data: bytes
    wants_reply: bool = True


@attrs.frozen
class ResetAsked:
    """Put the device into its first state, then ``answer_reset``."""

    message_id: int
    wants_reply: bool = True


@attrs.frozen
class DmaMapped:
    """A window of guest memory appeared; answered already, its descriptor closed."""

    address: int
    size: int


@attrs.frozen
class DmaUnmapped:
    """Windows disappeared; answered already."""

    address: int
    size: int


@attrs.frozen
class Refused:
    """A message was answered with an errno."""

    command: int
    error: int
    why: str


Event = Negotiated | RegionRead | RegionWrite | ResetAsked | DmaMapped | DmaUnmapped | Refused
Question = RegionRead | RegionWrite | ResetAsked


@attrs.frozen
class Reply:
    """Bytes to send, and descriptors to send with the first of them. They are lent: do not close them."""

    data: bytes
    descriptors: tuple[int, ...] = ()


@attrs.frozen
class _Refusal(Exception):
    error: int
    why: str


@attrs.define
class ServerMachine:
    """One connection. ``regions`` by index; ``irqs`` counts by index; the device is PCI and can be reset."""

    regions: Sequence[Region]
    irqs: Sequence[IrqInfo]
    state: State = attrs.field(default=State.NEGOTIATING, init=False)
    refusals: Counter[int] = attrs.field(factory=Counter, init=False)
    _buffer: bytearray = attrs.field(factory=bytearray, init=False)
    _descriptors: list[int] = attrs.field(factory=list, init=False)
    _replies: list[Reply] = attrs.field(factory=list, init=False)
    _unanswered: dict[int, Question] = attrs.field(factory=dict, init=False)
    _windows: dict[int, int] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        if [r.index for r in self.regions] != list(range(len(self.regions))):
            raise LocalProtocolError("regions must stand in the order of their indexes")

    @property
    def bytes_wanted(self) -> int:
        """How many bytes complete the header, or the message. A reader that takes more may give descriptors
        to the wrong message: the kernel hands over those of every message it reads across at once."""
        if len(self._buffer) < HEADER_SIZE:
            return HEADER_SIZE - len(self._buffer)
        return Header.decode(bytes(self._buffer[:HEADER_SIZE])).size - len(self._buffer)

    @property
    def is_between_messages(self) -> bool:
        """Has everything that was read been understood? Otherwise a message has begun and not ended."""
        return not self._buffer

    @property
    def dma_windows(self) -> dict[int, int]:
        """Guest address -> bytes of the windows that are mapped now."""
        return dict(self._windows)

    def receive_data(self, data: bytes, descriptors: Sequence[int] = ()) -> list[Event]:
        """Take bytes and the descriptors that came with them, which belong to the message the first byte is of.

        Empty data without descriptors says that the client closed. Takes all descriptors over, whatever happens.

        Raises:
            RemoteProtocolError: the frame is broken; the machine is CLOSED and holds nothing. What came before
                the broken message in the same call is lost with it; nobody is there to be answered.
            LocalProtocolError: called in state CLOSED.
        """
        self._descriptors += descriptors
        events: list[Event] = []
        try:
            if self.state is State.CLOSED:
                raise LocalProtocolError("receive_data on a closed connection")
            if not data and not descriptors:
                left = len(self._buffer)
                self.close()
                if left:
                    raise RemoteProtocolError(f"the client closed {left} bytes into a message")
                return []
            if len(self._descriptors) > MAX_DESCRIPTORS:
                raise RemoteProtocolError(f"a message came with more than {MAX_DESCRIPTORS} descriptors")
            self._buffer += data
            while (message := self._next_message()) is not None:
                event = self._serve(*message)
                self._close_descriptors()
                if event is not None:
                    events.append(event)
        except BaseException:
            self._enter(Input.BROKEN)
            raise
        return events

    def data_to_send(self) -> list[Reply]:
        """The replies since the last call, in order."""
        replies, self._replies = self._replies, []
        return replies

    def answer_read(self, event: RegionRead, data: bytes) -> None:
        """Reply with the bytes that were read.

        Raises:
            LocalProtocolError: not as many as asked for, or the event is not open.
        """
        if len(data) != event.count:
            raise LocalProtocolError(f"read of {event.count} bytes answered with {len(data)}")
        body = RegionAccess(event.region, event.offset, event.count).encode(data)
        self._settle(event, Command.REGION_READ, body)

    def answer_write(self, event: RegionWrite) -> None:
        """Reply that the bytes were taken.

        Raises:
            LocalProtocolError: the event is not open.
        """
        body = RegionAccess(event.region, event.offset, len(event.data)).encode()
        self._settle(event, Command.REGION_WRITE, body)

    def answer_reset(self, event: ResetAsked) -> None:
        """Reply that the device was reset.

        Raises:
            LocalProtocolError: the event is not open.
        """
        self._settle(event, Command.RESET, b"")

    def refuse(self, event: Question, error: int = errno.EIO) -> None:
        """Reply to any of the three with an errno.

        Raises:
            LocalProtocolError: the event is not open.
        """
        self._settle(event, _COMMAND_OF[type(event)], b"", error)

    def close(self) -> None:
        """Forget everything; close descriptors of a message that never became whole. May be called twice."""
        self._enter(Input.END)

    def _enter(self, what: Input) -> None:
        self.state = TRANSITIONS.get((self.state, what), State.CLOSED)
        if self.state is State.CLOSED:
            self._close_descriptors()
            self._buffer.clear()
            self._unanswered.clear()
            self._windows.clear()

    def _close_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _next_message(self) -> tuple[Header, bytes] | None:
        if len(self._buffer) < HEADER_SIZE:
            return None
        header = Header.decode(bytes(self._buffer[:HEADER_SIZE]))
        if len(self._buffer) < header.size:
            return None
        payload = bytes(self._buffer[HEADER_SIZE : header.size])
        del self._buffer[: header.size]
        return header, payload

    def _serve(self, header: Header, payload: bytes) -> Event | None:
        if header.is_reply or header.flags & MessageFlag.ERROR:
            raise RemoteProtocolError(f"message {header.message_id} is a reply, and nothing was asked")
        if self.state is State.NEGOTIATING:
            if header.command != Command.VERSION:
                raise RemoteProtocolError(f"command {header.command} before VERSION")
            event = self._version(header, payload)
            self._enter(Input.VERSION)
            return event
        self._enter(Input.COMMAND)
        if header.message_id in self._unanswered:
            raise RemoteProtocolError(f"message id {header.message_id} is used twice at a time")
        serve = SERVED.get(header.command)
        try:
            if serve is None:
                known = header.command in Command.__members__.values()
                raise _Refusal(errno.EOPNOTSUPP if known else errno.ENOSYS, "not served")
            return serve(self, header, payload)
        except RemoteProtocolError as error:
            # The frame was sound, so what follows can still be read.
            return self._refuse_message(header, errno.EINVAL, str(error))
        except _Refusal as refusal:
            return self._refuse_message(header, refusal.error, refusal.why)

    def _refuse_message(self, header: Header, error: int, why: str) -> Refused:
        self.refusals[error] += 1
        self._reply(header, b"", error=error)
        return Refused(header.command, error, why)

    def _reply(self, to: Header, body: bytes, descriptors: tuple[int, ...] = (), error: int = 0) -> None:
        if to.wants_reply:
            flags = MessageFlag.REPLY | (MessageFlag.ERROR if error else 0)
            head = Header(to.message_id, to.command, HEADER_SIZE + len(body), flags, error)
            self._replies.append(Reply(head.encode() + body, descriptors))

    def _settle(self, event: Question, command: Command, body: bytes, error: int = 0) -> None:
        if self.state is not State.READY:
            raise LocalProtocolError(f"answer to message {event.message_id} in state {self.state.value}")
        if not event.wants_reply:
            return
        if self._unanswered.get(event.message_id) is not event:
            raise LocalProtocolError(f"message {event.message_id} is not open")
        del self._unanswered[event.message_id]
        if error:
            self.refusals[error] += 1
        self._reply(Header(event.message_id, command, HEADER_SIZE), body, error=error)

    def _ask(self, event: Question) -> Question:
        if event.wants_reply:
            if len(self._unanswered) >= MAX_UNANSWERED:
                raise _Refusal(errno.EBUSY, f"more than {MAX_UNANSWERED} messages wait for an answer")
            self._unanswered[event.message_id] = event
        return event

    def _no_second_version(self, header: Header, payload: bytes) -> Event | None:
        raise _Refusal(errno.EINVAL, "VERSION for the second time")

    def _version(self, header: Header, payload: bytes) -> Event | None:
        theirs = Version.decode(payload)
        if theirs.major != 0:
            raise RemoteProtocolError(f"the client speaks version {theirs.major}.{theirs.minor}")
        ours: dict[str, object] = {
            "max_msg_fds": MAX_DESCRIPTORS,
            "max_data_xfer_size": MAX_DATA_BYTES,
        }
        body = Version(0, 0, ours).encode()
        if len(body) > len(payload):
            # QEMU reads the answer into the buffer of its question. Without JSON the protocol's defaults hold.
            body = body[:4]
        self._reply(header, body)
        return Negotiated(theirs.capabilities)

    def _dma_map(self, header: Header, payload: bytes) -> Event | None:
        window = DmaMap.decode(payload)
        if window.address not in self._windows and len(self._windows) >= MAX_DMA_WINDOWS:
            raise _Refusal(errno.ENOSPC, f"more than {MAX_DMA_WINDOWS} windows")
        self._windows[window.address] = window.size
        self._reply(header, b"")
        return DmaMapped(window.address, window.size)

    def _dma_unmap(self, header: Header, payload: bytes) -> Event | None:
        range_ = DmaUnmap.decode(payload)
        end = range_.address + range_.size
        everything = range_.flags & UNMAP_ALL
        gone = [a for a, n in self._windows.items() if everything or (a >= range_.address and a + n <= end)]
        if not gone and not everything:
            raise _Refusal(errno.ENOENT, f"no window within {range_.size:#x} bytes at {range_.address:#x}")
        for address in gone:
            del self._windows[address]
        self._reply(header, range_.encode())
        return DmaUnmapped(range_.address, range_.size)

    def _get_info(self, header: Header, payload: bytes) -> Event | None:
        DeviceInfo.decode(payload)
        flags = DEVICE_FLAG_RESET | DEVICE_FLAG_PCI
        self._reply(header, DeviceInfo(flags, len(self.regions), len(self.irqs)).encode())
        return None

    def _region(self, index: int) -> Region:
        if index >= len(self.regions):
            raise _Refusal(errno.EINVAL, f"no region {index}")
        return self.regions[index]

    def _get_region_info(self, header: Header, payload: bytes) -> Event | None:
        asked = RegionInfo.decode_request(payload)
        region = self._region(asked.index)
        body = region.info.encode(asked.argsz)
        whole = len(body) == region.info.payload_size
        lent = (region.descriptor,) if whole and region.descriptor is not None else ()
        self._reply(header, body, lent)
        return None

    def _get_irq_info(self, header: Header, payload: bytes) -> Event | None:
        asked = IrqInfo.decode(payload)
        if asked.index >= len(self.irqs):
            raise _Refusal(errno.EINVAL, f"no interrupt kind {asked.index}")
        self._reply(header, self.irqs[asked.index].encode())
        return None

    def _set_irqs(self, header: Header, payload: bytes) -> Event | None:
        asked = SetIrqs.decode(payload)
        if asked.index >= len(self.irqs) or asked.start + asked.count > self.irqs[asked.index].count:
            raise _Refusal(errno.EINVAL, f"no interrupts {asked.start}+{asked.count} of kind {asked.index}")
        given = len(self._descriptors)
        if given and (not asked.flags & IrqFlag.DATA_EVENTFD or given != asked.count):
            raise _Refusal(errno.EINVAL, f"{given} eventfds for {asked.count} interrupts")
        self._reply(header, b"")
        return None

    def _accessed(self, access: RegionAccess, needs: RegionFlag) -> None:
        region = self._region(access.region)
        if not region.flags & needs or access.offset + access.count > region.size:
            raise _Refusal(
                errno.EINVAL, f"{needs!r} of {access.count} at {access.offset:#x} of region {access.region}"
            )

    def _region_read(self, header: Header, payload: bytes) -> Event | None:
        access = RegionAccess.decode_bare(payload)
        self._accessed(access, RegionFlag.READ)
        return self._ask(
            RegionRead(header.message_id, access.region, access.offset, access.count, header.wants_reply)
        )

    def _region_write(self, header: Header, payload: bytes) -> Event | None:
        access, data = RegionAccess.decode_with_data(payload)
        self._accessed(access, RegionFlag.WRITE)
        return self._ask(
            RegionWrite(header.message_id, access.region, access.offset, data, header.wants_reply)
        )

    def _reset(self, header: Header, payload: bytes) -> Event | None:
        if payload:
            raise _Refusal(errno.EINVAL, f"RESET with {len(payload)} bytes of payload")
        return self._ask(ResetAsked(header.message_id, header.wants_reply))


_COMMAND_OF: Final[Mapping[type[Question], Command]] = {
    RegionRead: Command.REGION_READ,
    RegionWrite: Command.REGION_WRITE,
    ResetAsked: Command.RESET,
}

# What is answered in state READY. Commands of the protocol that are absent (migration among them) get
# EOPNOTSUPP, unknown numbers ENOSYS.
SERVED: Final[Mapping[int, Callable[[ServerMachine, Header, bytes], Event | None]]] = {
    Command.VERSION: ServerMachine._no_second_version,
    Command.DMA_MAP: ServerMachine._dma_map,
    Command.DMA_UNMAP: ServerMachine._dma_unmap,
    Command.GET_INFO: ServerMachine._get_info,
    Command.GET_REGION_INFO: ServerMachine._get_region_info,
    Command.GET_IRQ_INFO: ServerMachine._get_irq_info,
    Command.SET_IRQS: ServerMachine._set_irqs,
    Command.REGION_READ: ServerMachine._region_read,
    Command.REGION_WRITE: ServerMachine._region_write,
    Command.RESET: ServerMachine._reset,
}
