# SPDX-License-Identifier: Apache-2.0
"""BAR0: how a guest process finds out what the device is, claims a session, rings, and releases it.

Normative prose: docs/registers.md. Page 0 says what the device is; page 1 + n belongs to slot n, a window of BAR1
that one guest process may own. There is no driver in the guest to arbitrate, so each write must be whole in itself:
a claim is one 8-byte store that only a free slot takes; the same register and the directory in BAR1 say who won.

    writes of the guest -> events for the host     ClaimAsked, ReleaseAsked, DoorbellRung, CallSubmitted
    decisions of the host -> registers             grant, refuse, end, release, free, complete_call

Pure state: no clock, no memory of BAR1, no socket. Whatever a guest does is answered: a read that is not allowed gives
all ones, a write that is not allowed does nothing, both are counted by kind. Never an exception, and never more than a
page of state per slot. Guest processes of one VM are not protected from each other here; the token guards
against mistakes, and lets one process release what a dead one left behind.
"""

from __future__ import annotations

import enum
import struct
from collections import Counter
from typing import Final

import attrs

from vgpu.transport.errors import LocalProtocolError

MAGIC: Final = 0x55504756  # "VGPU"
INTERFACE_VERSION: Final = 0x00010000
PAGE: Final = 4096
MAX_SLOTS: Final = 127
NO_SLOT: Final = 0xFFFFFFFF

_ONES: Final = 0xFFFFFFFF
CALL_HEADER_SIZE: Final = 80
CALL_RESULT_SIZE: Final = 40
CALL_DATA_OFFSET: Final = 0x400
CALL_DATA_SIZE: Final = PAGE - CALL_DATA_OFFSET


class DeviceRegister(enum.IntEnum):
    """Page 0. All read-only."""

    MAGIC = 0x00
    INTERFACE_VERSION = 0x04
    LAYOUT_VERSION = 0x08
    STATUS = 0x0C
    SLOT_COUNT = 0x10
    FREE_SLOT = 0x14
    DRIVER_VERSION = 0x18
    REFUSED_ACCESSES = 0x1C
    BAR1_SIZE = 0x20
    FIRST_SLOT = 0x28
    SLOT_SIZE = 0x30
    TABLE_HASH = 0x38
    GENERATION = 0x40


class SlotRegister(enum.IntEnum):
    """Pages 1 to SLOT_COUNT, offsets within the page."""

    OWNER = 0x00
    STATE = 0x08
    SLOT = 0x0C
    RELEASE = 0x10
    DOORBELL = 0x14
    REFUSAL = 0x18
    RETRY_MILLISECONDS = 0x1C
    SESSION = 0x20
    WORKER_ADDRESS = 0x28
    CALL_HEADER = 0x100
    CALL_SUBMIT = 0x160
    CALL_STATE = 0x164
    CALL_RESULT_LENGTH = 0x168
    CALL_RESULT = 0x180


class DeviceStatus(enum.IntFlag):
    """Bits of STATUS."""

    HOST_PRESENT = 0x1
    QUARANTINED = 0x2


class SlotState(enum.IntEnum):
    """STATE of a slot."""

    FREE = 0
    PENDING = 1
    READY = 2
    REFUSED = 3
    DEAD = 4
    RELEASING = 5


class CallState(enum.IntEnum):
    """CALL_STATE of a slot."""

    IDLE = 0
    BUSY = 1
    DONE = 2


class Offence(enum.Enum):
    """What an access can be refused for; the keys of ``Registers.offences``."""

    WIDTH = "width"
    ALIGNMENT = "alignment"
    RANGE = "range"
    READ_ONLY = "read_only"
    TOKEN = "token"
    STATE = "state"


@attrs.frozen
class ClaimAsked:
    """A process wants slot ``slot``. Answer with ``grant`` or ``refuse`` whenever it is decided."""

    slot: int
    token: int
    pid: int


@attrs.frozen
class ReleaseAsked:
    """The session of ``slot`` is to end: by its owner, by a process that found it dead, or by a reset.

    Answer with ``free`` when nothing uses the slot's part of BAR1 any more.
    """

    slot: int
    by_reset: bool = False


@attrs.frozen
class DoorbellRung:
    """The worker of ``slot`` asked to be told of new records, and there are some."""

    slot: int


@attrs.frozen
class CallSubmitted:
    """A call through registers: header as in wire.h, payload of the length it says. Answer with ``complete_call``."""

    slot: int
    header: bytes
    payload: bytes


RegisterEvent = ClaimAsked | ReleaseAsked | DoorbellRung | CallSubmitted


@attrs.frozen
class Geometry:
    """How BAR1 is cut: a device page at 0, then equal slots. Bytes.

    Raises ValueError if the slots do not lie in pages within the BAR, or are more than MAX_SLOTS.
    """

    bar1_size: int
    slot_count: int
    first_slot: int
    slot_size: int

    def __attrs_post_init__(self) -> None:
        if not 1 <= self.slot_count <= MAX_SLOTS:
            raise ValueError(f"{self.slot_count} slots, 1 to {MAX_SLOTS} are possible")
        if self.first_slot % PAGE or self.slot_size % PAGE or self.slot_size <= 0 or self.first_slot < PAGE:
            raise ValueError(
                f"slots of {self.slot_size:#x} bytes from {self.first_slot:#x} are not whole pages"
            )
        if self.first_slot + self.slot_count * self.slot_size > self.bar1_size:
            raise ValueError(
                f"{self.slot_count} slots of {self.slot_size:#x} bytes exceed {self.bar1_size:#x}"
            )

    def slot_offset(self, slot: int) -> int:
        """Where slot ``slot`` begins in BAR1."""
        return self.first_slot + slot * self.slot_size

    @property
    def bar0_size(self) -> int:
        """Bytes of BAR0: a power of two with room for page 0 and a page per slot, at least 16 KiB."""
        return max(4 * PAGE, 1 << ((self.slot_count + 1) * PAGE - 1).bit_length())


@attrs.frozen
class SlotView:
    """What the registers of a slot say, for whoever shows the same elsewhere."""

    state: SlotState
    token: int
    pid: int
    refusal: int
    retry_milliseconds: int
    session: int
    worker_address: int


@attrs.define
class _Slot:
    state: SlotState = SlotState.FREE
    token: int = 0
    pid: int = 0
    refusal: int = 0
    retry_milliseconds: int = 0
    session: int = 0
    worker_address: int = 0
    call_state: CallState = CallState.IDLE
    header: bytearray = attrs.field(factory=lambda: bytearray(CALL_HEADER_SIZE))
    result: bytes = bytes(CALL_RESULT_SIZE)
    result_length: int = 0
    data: bytearray = attrs.field(factory=lambda: bytearray(CALL_DATA_SIZE))


@attrs.define
class Registers:
    """The register file of one device. Identification is given once; ``status`` is the host's to change."""

    geometry: Geometry
    layout_version: int = 1
    driver_version: int = 0
    table_hash: int = 0
    status: DeviceStatus = DeviceStatus(0)  # noqa: RUF009 - an enum member, not a mutable value
    generation: int = 0
    offences: Counter[Offence] = attrs.field(factory=Counter, init=False)
    _slots: list[_Slot] = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._slots = [_Slot() for _ in range(self.geometry.slot_count)]

    # ---- the guest's side --------------------------------------------------------------------------------------

    def read(self, offset: int, count: int) -> bytes:
        """What the guest reads. Refused: ``count`` bytes of ones."""
        page, within = divmod(offset, PAGE)
        if not self._sound(offset, count):
            return b"\xff" * count
        if page > 0 and within >= CALL_DATA_OFFSET:
            start = within - CALL_DATA_OFFSET
            return bytes(self._slots[page - 1].data[start : start + count])
        image = self._device_image() if page == 0 else self._slot_image(page - 1)
        if count < 4 or within + count > len(image):
            self.offences[Offence.WIDTH if count < 4 else Offence.RANGE] += 1
            return b"\xff" * count
        return image[within : within + count]

    def write(self, offset: int, data: bytes) -> list[RegisterEvent]:
        """What the guest writes. Refused: nothing happens but the count."""
        if not self._sound(offset, len(data)):
            return []
        page, within = divmod(offset, PAGE)
        if page == 0:
            return self._refuse(Offence.READ_ONLY)
        index, slot = page - 1, self._slots[page - 1]
        if within >= CALL_DATA_OFFSET:
            return self._store_call(slot, slot.data, within - CALL_DATA_OFFSET, data)
        if SlotRegister.CALL_HEADER <= within < SlotRegister.CALL_HEADER + CALL_HEADER_SIZE:
            return self._store_call(slot, slot.header, within - SlotRegister.CALL_HEADER, data)
        if within == SlotRegister.OWNER:
            return self._claim(index, slot, data)
        if within not in (SlotRegister.RELEASE, SlotRegister.DOORBELL, SlotRegister.CALL_SUBMIT):
            return self._refuse(Offence.READ_ONLY)
        if len(data) != 4:
            return self._refuse(Offence.WIDTH)
        value = int.from_bytes(data, "little")
        if within == SlotRegister.RELEASE:
            return self._release(index, slot, value)
        if within == SlotRegister.DOORBELL:
            if slot.state is not SlotState.READY:
                return self._refuse(Offence.STATE)
            return [DoorbellRung(index)]
        return self._submit(index, slot, value)

    def reset(self) -> list[RegisterEvent]:
        """The machine, the bus or the function was reset: every owner is gone.

        Owned slots stay RELEASING until the host frees them, so a guest that boots again cannot get memory that
        the old session's worker still writes.
        """
        self.generation = (self.generation + 1) & 0xFFFFFFFF
        events: list[RegisterEvent] = []
        for index, slot in enumerate(self._slots):
            if slot.state not in (SlotState.FREE, SlotState.RELEASING):
                self._start_release(slot)
                events.append(ReleaseAsked(index, by_reset=True))
        return events

    # ---- the host's side ---------------------------------------------------------------------------------------

    def state(self, slot: int) -> SlotState:
        """State of a slot.

        Raises:
            LocalProtocolError: there is no such slot.
        """
        return self._at(slot).state

    def owner(self, slot: int) -> tuple[int, int]:
        """Token and process id of a slot's owner; (0, 0) when free."""
        at = self._at(slot)
        return at.token, at.pid

    def view(self, slot: int) -> SlotView:
        """All that STATE, OWNER and the registers behind them say now."""
        at = self._at(slot)
        return SlotView(
            *(at.state, at.token, at.pid, at.refusal, at.retry_milliseconds, at.session, at.worker_address)
        )

    def grant(self, slot: int, token: int, session: int, worker_address: int) -> bool:
        """The claim is granted: the slot's part of BAR1 holds a segment.

        False: the claim went away meanwhile (released, reset, claimed anew); undo what was prepared for it.
        """
        at = self._at(slot)
        if at.state is not SlotState.PENDING or at.token != token:
            return False
        at.state, at.session, at.worker_address = SlotState.READY, session, worker_address
        return True

    def refuse(self, slot: int, token: int, status: int, retry_milliseconds: int = 0) -> bool:
        """The claim is refused, with a status of WELCOME. The owner reads it and releases. False as in ``grant``."""
        at = self._at(slot)
        if at.state is not SlotState.PENDING or at.token != token:
            return False
        at.state, at.refusal, at.retry_milliseconds = SlotState.REFUSED, status, retry_milliseconds
        return True

    def end(self, slot: int) -> None:
        """The host ended the session. The owner sees DEAD and releases. Nothing happens if it is not READY."""
        at = self._at(slot)
        if at.state is SlotState.READY:
            at.state = SlotState.DEAD

    def release(self, slot: int) -> list[RegisterEvent]:
        """The host takes the slot back, as if its owner had released it. No event if nobody owns it any more."""
        at = self._at(slot)
        if at.state in (SlotState.FREE, SlotState.RELEASING):
            return []
        self._start_release(at)
        return [ReleaseAsked(slot)]

    def free(self, slot: int) -> None:
        """Nothing of the host uses the slot any more; the next claim may have it.

        Raises:
            LocalProtocolError: the slot is owned and nobody asked for its release.
        """
        if self._at(slot).state not in (SlotState.RELEASING, SlotState.FREE):
            raise LocalProtocolError(f"slot {slot} is {self._at(slot).state.name} and cannot be freed")
        self._slots[slot] = _Slot()

    def complete_call(self, slot: int, result: bytes, payload: bytes = b"") -> bool:
        """Answer a call made through registers. False: the slot was released meanwhile.

        Raises:
            LocalProtocolError: the result is not 40 bytes, or the payload does not fit.
        """
        at = self._at(slot)
        if len(result) != CALL_RESULT_SIZE or len(payload) > CALL_DATA_SIZE:
            raise LocalProtocolError(f"result of {len(result)} bytes with {len(payload)} of payload")
        if at.call_state is not CallState.BUSY:
            return False
        at.result, at.result_length = bytes(result), len(payload)
        at.data[: len(payload)] = payload
        at.call_state = CallState.DONE
        return True

    # ---- inside ------------------------------------------------------------------------------------------------

    def _at(self, slot: int) -> _Slot:
        if not 0 <= slot < len(self._slots):
            raise LocalProtocolError(f"no slot {slot}")
        return self._slots[slot]

    def _refuse(self, offence: Offence) -> list[RegisterEvent]:
        self.offences[offence] += 1
        return []

    def _sound(self, offset: int, count: int) -> bool:
        if count not in (1, 2, 4, 8):
            self.offences[Offence.WIDTH] += 1
        elif offset % count:
            self.offences[Offence.ALIGNMENT] += 1
        elif offset < 0 or offset + count > (len(self._slots) + 1) * PAGE:
            self.offences[Offence.RANGE] += 1
        else:
            return True
        return False

    def _device_image(self) -> bytes:
        free = next((i for i, s in enumerate(self._slots) if s.state is SlotState.FREE), NO_SLOT)
        refused = min(sum(self.offences.values()), 0xFFFFFFFF)
        g = self.geometry
        return struct.pack(
            "<8I4QII",
            *(MAGIC, INTERFACE_VERSION, self.layout_version, self.status),
            *(g.slot_count, free, self.driver_version, refused),
            *(g.bar1_size, g.first_slot, g.slot_size, self.table_hash),
            *(self.generation, 0),
        )

    def _slot_image(self, index: int) -> bytes:
        s = self._slots[index]
        head = struct.pack(
            "<IIIIIIIIQQ",
            *(s.token, s.pid, s.state, index, 0, 0, s.refusal, s.retry_milliseconds),
            *(s.session, s.worker_address),
        ).ljust(SlotRegister.CALL_HEADER, b"\0")
        call = bytes(s.header).ljust(SlotRegister.CALL_SUBMIT - SlotRegister.CALL_HEADER, b"\0")
        call += struct.pack("<III", 0, s.call_state, s.result_length)
        image = head + call.ljust(SlotRegister.CALL_RESULT - SlotRegister.CALL_HEADER, b"\0")
        return image + s.result

    def _claim(self, index: int, slot: _Slot, data: bytes) -> list[RegisterEvent]:
        if len(data) != 8:
            return self._refuse(Offence.WIDTH)
        token, pid = struct.unpack("<II", data)
        # A guest reads ones where a device has gone, and could not tell such a token from that.
        if token in (0, _ONES):
            return self._refuse(Offence.TOKEN)
        if slot.state is not SlotState.FREE:
            return []  # a race that somebody else won; reading OWNER says so
        slot.state, slot.token, slot.pid = SlotState.PENDING, token, pid
        return [ClaimAsked(index, token, pid)]

    def _release(self, index: int, slot: _Slot, token: int) -> list[RegisterEvent]:
        if slot.state in (SlotState.FREE, SlotState.RELEASING):
            return self._refuse(Offence.STATE)
        if token != slot.token:
            return self._refuse(Offence.TOKEN)
        self._start_release(slot)
        return [ReleaseAsked(index)]

    def _start_release(self, slot: _Slot) -> None:
        slot.state, slot.call_state = SlotState.RELEASING, CallState.IDLE

    def _store_call(self, slot: _Slot, into: bytearray, start: int, data: bytes) -> list[RegisterEvent]:
        if slot.state is not SlotState.READY or slot.call_state is CallState.BUSY:
            return self._refuse(Offence.STATE)
        into[start : start + len(data)] = data
        return []

    def _submit(self, index: int, slot: _Slot, token: int) -> list[RegisterEvent]:
        if slot.state is not SlotState.READY or slot.call_state is CallState.BUSY:
            return self._refuse(Offence.STATE)
        if token != slot.token:
            return self._refuse(Offence.TOKEN)
        (length,) = struct.unpack_from("<I", slot.header, 4)
        if length > CALL_DATA_SIZE:
            return self._refuse(Offence.RANGE)
        slot.call_state = CallState.BUSY
        return [CallSubmitted(index, bytes(slot.header), bytes(slot.data[:length]))]
