# SPDX-License-Identifier: Apache-2.0
"""What a device process and the mediator say to each other: docs/wire.md section 5 as classes.

``event_line`` and ``command_line`` turn a message into the JSON object; ``read_event`` and ``read_command`` check one that
came and turn it back. Descriptors travel beside it; ``Grant`` and ``Hello`` say how many. Both ends may be of
different ages, for the device outlives the mediator: fields that are not known are passed over, and an object that is not
known reads as None.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Annotated, Any, Final, TypeVar, get_args, get_origin

import attrs

from vgpu.transport.errors import RemoteProtocolError
from vgpu.transport.lines import Message
from vgpu.transport.vfio_user.pci import Variant
from vgpu.transport.vfio_user.registers import SlotState

TEXT_LIMIT: Final = 256
# Numbers with the bits they must fit.
U32 = Annotated[int, 32]
U64 = Annotated[int, 64]
T = TypeVar("T", bound=attrs.AttrsInstance)


class Ending(enum.Enum):
    """What ended the session of a slot."""

    GUEST = "guest"  # its owner, or a process of the VM that found the owner dead
    RESET = "reset"  # of the machine or the function; also a QEMU that went away
    WORKER = "worker"  # which went first; the owner has let go now
    SILENCE = "silence"  # no heartbeat for a minute, and no other slot to be had


@attrs.frozen
class SlotReport:
    """A slot that is not FREE, in a hello. token, pid: the owner's. session: 0 until granted."""

    slot: U32
    state: SlotState
    token: U32
    pid: U32
    session: U64


@attrs.frozen
class Hello:
    """First line of a device, with the descriptor of its BAR1. Sizes in bytes; ``connected``: a QEMU is there."""

    vm: str
    pid: U32
    bar1_size: U64
    slot_count: U32
    first_slot: U64
    slot_size: U64
    variant: Variant
    connected: bool
    slots: tuple[SlotReport, ...]
    layout_version: U32 = 0
    table_hash: U64 = 0


@attrs.frozen
class Claim:
    """A guest process wants a slot. Every claim is answered, by Grant or Refuse, even if it was Released meanwhile."""

    slot: U32
    token: U32
    pid: U32
    program: str


@attrs.frozen
class Granted:
    """The guest may use the slot now."""

    slot: U32
    session: U64


@attrs.frozen
class Withdrawn:
    """A Grant came for a claim that had gone; its lifeline has been ended."""

    slot: U32
    session: U64


@attrs.frozen
class Released:
    """The slot's session ends: the lifeline has been ended. session 0: it was a claim still."""

    slot: U32
    session: U64
    by: Ending


@attrs.frozen
class Freed:
    """No process of the host has the slot any more, its memory is given back, it can be claimed."""

    slot: U32


@attrs.frozen
class Client:
    """A QEMU came or went."""

    connected: bool


@attrs.frozen
class Counters:
    """Since the device's process began: trapped reads and writes of BARs, those refused, claims, doorbells."""

    reads: U64
    writes: U64
    refused: U64
    claims: U64
    doorbells: U64


@attrs.frozen
class Grant:
    """A worker replays in the slot. Two descriptors: our end of its lifeline, and a pidfd of it."""

    slot: U32
    token: U32
    session: U64
    worker_address: U64
    worker_pid: U32


@attrs.frozen
class Refuse:
    """No session for this claim, and no worker uses the slot. status: as in WELCOME."""

    slot: U32
    token: U32
    status: U32
    retry_milliseconds: U32 = 0


@attrs.frozen
class Status:
    """What the guest reads in STATUS and DRIVER_VERSION."""

    present: bool
    quarantined: bool
    driver_version: U32


@attrs.frozen
class Stop:
    """The VM is unregistered: leave at once."""


Event = Hello | Claim | Granted | Withdrawn | Released | Freed | Client | Counters
Command = Grant | Refuse | Status | Stop

EVENTS: Final[Mapping[str, type[Event]]] = {
    "hello": Hello,
    "claim": Claim,
    "granted": Granted,
    "withdrawn": Withdrawn,
    "released": Released,
    "freed": Freed,
    "client": Client,
    "counters": Counters,
}
COMMANDS: Final[Mapping[str, type[Command]]] = {
    "grant": Grant,
    "refuse": Refuse,
    "status": Status,
    "stop": Stop,
}
# Descriptors that go with a message; the others carry none.
DESCRIPTORS: Final[Mapping[type[attrs.AttrsInstance], int]] = {Hello: 1, Grant: 2}


def event_line(event: Event) -> Message:
    """The JSON object of what a device says."""
    return {"event": _name(EVENTS, event), **_write(event)}


def command_line(command: Command) -> Message:
    """The JSON object of what the mediator says."""
    return {"do": _name(COMMANDS, command), **_write(command)}


def read_event(message: Message, descriptors: int = 0) -> Event | None:
    """What a device said; None for something of a later version.

    Raises:
        RemoteProtocolError: a field is missing or wrong, or not so many descriptors belong to it.
    """
    return _read(EVENTS, message.get("event"), message, descriptors)


def read_command(message: Message, descriptors: int = 0) -> Command | None:
    """What the mediator said; None and Raises as in ``read_event``."""
    return _read(COMMANDS, message.get("do"), message, descriptors)


def _name(table: Mapping[str, type[Any]], message: object) -> str:
    return next(name for name, kind in table.items() if kind is type(message))


def _read(table: Mapping[str, type[T]], name: object, message: Message, descriptors: int) -> T | None:
    if not isinstance(name, str):
        raise RemoteProtocolError(f"a line that says nothing: {str(message)[:80]}")
    kind = table.get(name)
    if kind is None:
        return None
    wanted = DESCRIPTORS.get(kind, 0)
    if descriptors != wanted:
        raise RemoteProtocolError(f"{name} came with {descriptors} descriptors, expected {wanted}")
    return _build(kind, message, name)


def _write(message: Any) -> Message:
    return {field.name: _plain(getattr(message, field.name)) for field in attrs.fields(type(message))}


def _plain(value: object) -> object:
    if isinstance(value, SlotState):
        return value.name
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple):
        return [_write(item) for item in value]
    return value


def _build(kind: type[T], message: Message, where: str) -> T:
    values: dict[str, object] = {}
    for field in attrs.fields(attrs.resolve_types(kind, include_extras=True)):
        if field.name in message:
            values[field.name] = _checked(field.type, message[field.name], f"{where}.{field.name}")
        elif field.default is attrs.NOTHING:
            raise RemoteProtocolError(f"{where} has no {field.name}")
    return kind(**values)


def _checked(kind: Any, value: object, where: str) -> object:
    if get_origin(kind) is Annotated:
        if type(value) is int and 0 <= value < 1 << get_args(kind)[1]:
            return value
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is str:
        if isinstance(value, str) and len(value) <= TEXT_LIMIT:
            return value
    elif kind is SlotState:
        if isinstance(value, str) and value in SlotState.__members__:
            return SlotState[value]
    elif isinstance(kind, type) and issubclass(kind, enum.Enum):
        if value in [member.value for member in kind]:
            return kind(value)
    elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return tuple(_build(SlotReport, item, where) for item in value)
    raise RemoteProtocolError(f"{where} is {str(value)[:40]!r}")
