# SPDX-License-Identifier: Apache-2.0
"""What a device process decides: who has a slot, from the claim until its memory is clean again.

    claim --> told to the mediator --> grant: READY        release --> lifeline ends --> worker gone --> zeroed --> FREE

Pure: events of the registers, messages, ends of processes and the time come in; ``effects`` go out, in order. It reads
shared memory through ``Peek``, and everything there is hostile. Its one promise: a slot is never FREE while a process
of the host may still write into it, and never with a byte of its last owner.

It must never wait for the mediator with anything but a claim. Times are seconds of a clock that does not jump.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Final, Protocol

import attrs

from vgpu.transport.errors import RemoteProtocolError
from vgpu.transport.text import printable
from vgpu.transport.vfio_user.pci import Variant
from vgpu.transport.vfio_user.registers import (
    CallSubmitted,
    ClaimAsked,
    DeviceStatus,
    DoorbellRung,
    RegisterEvent,
    Registers,
    ReleaseAsked,
    SlotState,
)

from .effects import (
    CancelCall,
    CloseDescriptors,
    Effect,
    EndLifeline,
    KillWorker,
    Leave,
    MarkDead,
    RingDoorbell,
    Say,
    StartCall,
    WatchWorker,
    WriteHead,
    WriteSlot,
    ZeroSlot,
)
from .messages import (
    Claim,
    Client,
    Command,
    Counters,
    Ending,
    Event,
    Freed,
    Grant,
    Granted,
    Hello,
    Refuse,
    Released,
    SlotReport,
    Status,
    Stop,
    Withdrawn,
)
from .silence import Silence

# Whoever killed a worker may be writing into the session page why; then "unknown error" would be a lie.
GRACE_SECONDS: Final = 0.05
# A worker whose lifeline ended leaves within a tenth of a second unless something is wrong with it.
KILL_SECONDS: Final = 5.0
# A mediator answers every claim; what it prepares for one, a worker among it, it may wait for a minute.
ANSWER_SECONDS: Final = 90.0
# The worker of a mediator that hung up before it answered loses its lifeline with it, and leaves.
ORPHAN_SECONDS: Final = 10.0
SAMPLE_SECONDS: Final = 1.0
ABANDONED_SECONDS: Final = 600.0
PROGRAM_LENGTH: Final = 63


class Peek(Protocol):
    """What the core reads elsewhere. Each returns at once; what guests write there may be anything."""

    def program(self, slot: int) -> bytes:
        """``guest_program`` in the directory."""

    def heartbeat(self, slot: int) -> int:
        """``heartbeat`` in the session page of the slot."""

    def accesses(self) -> tuple[int, int]:
        """Trapped reads and writes so far."""


@attrs.define(eq=False)
class _Tenancy:
    """Who has a slot, from claim to free."""

    told: bool = False  # a mediator knows of the claim and has not answered: a worker may be filling the slot
    session: int = 0
    lifeline: int = -1
    process: int = -1
    # Invariant: a worker runs <=> process >= 0, and then lifeline >= 0.
    deadline: float = inf  # of what is waited for in this state; ``_overdue`` says what it is

    @property
    def worker_runs(self) -> bool:
        return self.process >= 0


@attrs.define(eq=False)
class Core:
    """One VM's device. The registers are shared with whoever serves QEMU, which changes them before it calls here."""

    vm: str
    pid: int
    variant: Variant
    registers: Registers
    peek: Peek
    _now: float
    _mediator: bool = attrs.field(default=False, init=False)
    _client: bool = attrs.field(default=False, init=False)
    _tenancies: dict[int, _Tenancy] = attrs.field(factory=dict, init=False)
    _effects: list[Effect] = attrs.field(factory=list, init=False)
    _head: WriteHead | None = attrs.field(default=None, init=False)
    _silence: Silence = attrs.field(init=False)
    _claims: int = attrs.field(default=0, init=False)
    _doorbells: int = attrs.field(default=0, init=False)
    _counters: Counters | None = attrs.field(default=None, init=False)  # as said last
    _sampled: float = attrs.field(init=False)
    _abandoned: float = attrs.field(init=False)  # since when neither mediator nor QEMU is there

    def __attrs_post_init__(self) -> None:
        self._sampled = self._abandoned = self._now
        self._silence = Silence(self._now)

    # ---- what happens ------------------------------------------------------------------------------------------

    def start(self) -> list[Effect]:
        """First of all: the directory as it is at power-on."""
        for slot in range(self.registers.geometry.slot_count):
            self._show(slot)
        return self._drain()

    def guest_did(self, events: Sequence[RegisterEvent], now: float) -> list[Effect]:
        """The guest wrote or was reset; the registers show it already."""
        for event in events:
            if isinstance(event, ClaimAsked):
                self._claimed(event)
            elif isinstance(event, ReleaseAsked):
                self._release(event.slot, Ending.RESET if event.by_reset else Ending.GUEST, now)
            elif isinstance(event, DoorbellRung):
                self._doorbells += 1
                self._ring(event.slot)
            elif isinstance(event, CallSubmitted):
                self._effects.append(StartCall(event.slot, event.header, event.payload))
        return self._drain()

    def client(self, connected: bool, now: float) -> list[Effect]:
        """A QEMU came or went; when it went, the reset it means has been told before."""
        self._client = connected
        self._abandoned = now
        self._say(Client(connected))
        return self._drain()

    def mediator_connected(self, now: float) -> list[Effect]:
        """A mediator is there; if there was one, this replaces it. Answers with the hello and the claims that wait."""
        if self._mediator:
            self._mediator_left(now)
        self._mediator = True
        self._counters = None
        reports = tuple(
            SlotReport(slot, view.state, view.token, view.pid, view.session)
            for slot, view in ((slot, self.registers.view(slot)) for slot in sorted(self._tenancies))
        )
        geometry = self.registers.geometry
        self._say(
            Hello(
                self.vm,
                self.pid,
                geometry.bar1_size,
                geometry.slot_count,
                geometry.first_slot,
                geometry.slot_size,
                self.variant,
                self._client,
                reports,
                self.registers.layout_version,
                self.registers.table_hash,
            )
        )
        for report in reports:
            if report.state is SlotState.PENDING:
                self._tell(report.slot)
        return self._drain()

    def mediator_gone(self, now: float) -> list[Effect]:
        """The mediator's connection ended. Everything goes on; claims wait."""
        self._mediator_left(now)
        return self._drain()

    def command(self, command: Command, descriptors: tuple[int, ...], now: float) -> list[Effect]:
        """The mediator said something. Takes the descriptors over.

        Raises:
            RemoteProtocolError: it speaks of a slot that there is not; nothing has happened, the descriptors are the
                caller's still.
        """
        if isinstance(command, Grant | Refuse) and command.slot >= self.registers.geometry.slot_count:
            raise RemoteProtocolError(f"the mediator speaks of slot {command.slot}")
        if isinstance(command, Grant):
            self._grant(command, descriptors, now)
        elif isinstance(command, Refuse):
            self._refuse(command)
        elif isinstance(command, Status):
            self._status(DeviceStatus.HOST_PRESENT, command.present)
            self._status(DeviceStatus.QUARANTINED, command.quarantined)
            self.registers.driver_version = command.driver_version
        elif isinstance(command, Stop):
            self._effects.append(Leave("told to stop"))
        return self._drain()

    def worker_gone(self, slot: int, process: int, now: float) -> list[Effect]:
        """The process of this pidfd has ended: it cannot write into the slot any more."""
        tenancy = self._tenancies.get(slot)
        if tenancy is None or tenancy.process != process:
            return []
        self._effects.append(CloseDescriptors((tenancy.lifeline, tenancy.process)))
        tenancy.lifeline = tenancy.process = -1
        if self.registers.state(slot) is SlotState.RELEASING:
            self._zero(slot, tenancy)
        else:
            tenancy.deadline = now + GRACE_SECONDS
        return self._drain()

    def zeroed(self, slot: int) -> list[Effect]:
        """The slot's memory has been given back."""
        del self._tenancies[slot]
        self.registers.free(slot)
        self._show(slot)
        self._say(Freed(slot))
        return self._drain()

    def ring(self, slot: int) -> list[Effect]:
        """Whoever pushed a record on the guest's behalf wants the worker to look."""
        self._ring(slot)
        return self._drain()

    def tick(self, now: float) -> list[Effect]:
        """Time has passed. Call it at ``next_deadline`` and at least every second."""
        for slot, tenancy in list(self._tenancies.items()):
            if tenancy.deadline <= now:
                self._overdue(slot, tenancy, now)
        if now - self._sampled >= SAMPLE_SECONDS:
            self._sample(now)
        if not (self._mediator or self._client) and now - self._abandoned >= ABANDONED_SECONDS:
            self._effects.append(Leave("no mediator and no QEMU for ten minutes"))
        return self._drain()

    def next_deadline(self) -> float:
        """When ``tick`` has something to do that cannot wait for the next second; infinity if nothing."""
        return min((tenancy.deadline for tenancy in self._tenancies.values()), default=inf)

    def is_ready(self, slot: int) -> bool:
        """Whether the slot has a session, as far as is known."""
        return self.registers.state(slot) is SlotState.READY

    # ---- claims ------------------------------------------------------------------------------------------------

    def _claimed(self, event: ClaimAsked) -> None:
        self._claims += 1
        self._tenancies[event.slot] = _Tenancy()
        self._show(event.slot)
        if self._mediator:
            self._tell(event.slot)

    def _tell(self, slot: int) -> None:
        token, pid = self.registers.owner(slot)
        self._tenancies[slot].told = True
        self._say(Claim(slot, token, pid, _program(self.peek.program(slot))))

    def _grant(self, grant: Grant, descriptors: tuple[int, ...], now: float) -> None:
        lifeline, process = descriptors
        slot = grant.slot
        tenancy = self._tenancies.get(slot)
        if self.registers.grant(slot, grant.token, grant.session, grant.worker_address):
            assert tenancy is not None  # a PENDING slot has an owner
            tenancy.told, tenancy.session = False, grant.session
            tenancy.lifeline, tenancy.process = lifeline, process
            self._silence.watch(slot)
            self._show(slot)
            self._say(Granted(slot, grant.session))
            self._effects.append(WatchWorker(slot, process))
            return
        self._effects.append(EndLifeline(lifeline))
        self._say(Withdrawn(slot, grant.session))
        if tenancy is not None and self._awaits_answer(slot, tenancy, grant.token):
            # Its worker is in the slot already, so the slot is not free before it has left.
            tenancy.told = False
            tenancy.lifeline, tenancy.process = lifeline, process
            tenancy.deadline = now + KILL_SECONDS
            self._effects.append(WatchWorker(slot, process))
        else:
            self._effects.append(CloseDescriptors(descriptors))

    def _refuse(self, refuse: Refuse) -> None:
        slot = refuse.slot
        tenancy = self._tenancies.get(slot)
        if self.registers.refuse(slot, refuse.token, refuse.status, refuse.retry_milliseconds):
            assert tenancy is not None
            tenancy.told = False
            self._show(slot)
        elif tenancy is not None and self._awaits_answer(slot, tenancy, refuse.token):
            self._zero(slot, tenancy)

    def _awaits_answer(self, slot: int, tenancy: _Tenancy, token: int) -> bool:
        view = self.registers.view(slot)
        return tenancy.told and view.state is SlotState.RELEASING and view.token == token

    # ---- ends --------------------------------------------------------------------------------------------------

    def _release(self, slot: int, by: Ending, now: float) -> None:
        """The slot became RELEASING."""
        tenancy = self._tenancies[slot]
        self._silence.forget(slot)
        self._effects.append(CancelCall(slot))
        self._show(slot)
        if tenancy.session and not tenancy.worker_runs:
            by = Ending.WORKER
        self._say(Released(slot, tenancy.session, by))
        if tenancy.worker_runs:
            tenancy.deadline = now + KILL_SECONDS
            self._effects.append(EndLifeline(tenancy.lifeline))
        elif tenancy.told:
            tenancy.deadline = now + (ANSWER_SECONDS if self._mediator else ORPHAN_SECONDS)
        else:
            self._zero(slot, tenancy)

    def _overdue(self, slot: int, tenancy: _Tenancy, now: float) -> None:
        tenancy.deadline = inf
        if self.registers.state(slot) is SlotState.READY:
            # The worker's end is old enough: nobody else says why.
            self._effects.append(MarkDead(slot))
            self.registers.end(slot)
            self._silence.forget(slot)
            self._show(slot)
        elif tenancy.worker_runs:
            # With a mediator it is the mediator's to kill; look again in case that goes away.
            tenancy.deadline = now + SAMPLE_SECONDS
            if not self._mediator:
                self._effects.append(KillWorker(slot, tenancy.process))
        else:
            self._zero(slot, tenancy)

    def _zero(self, slot: int, tenancy: _Tenancy) -> None:
        tenancy.deadline = inf
        tenancy.told = False  # an answer comes too late now
        self._effects.append(ZeroSlot(slot))

    def _mediator_left(self, now: float) -> None:
        self._mediator = False
        self._abandoned = now
        self._status(DeviceStatus.HOST_PRESENT, False)
        for slot, tenancy in self._tenancies.items():
            if tenancy.told and self.registers.state(slot) is SlotState.RELEASING:
                tenancy.deadline = min(tenancy.deadline, now + ORPHAN_SECONDS)

    # ---- every second ------------------------------------------------------------------------------------------

    def _sample(self, now: float) -> None:
        self._sampled = now
        reads, writes = self.peek.accesses()
        refused = self.registers.offences.total()
        counters = Counters(reads, writes, refused, self._claims, self._doorbells)
        if self._mediator and counters != self._counters:
            self._counters = counters
            self._say(counters)
        states = [self.registers.state(slot) for slot in range(self.registers.geometry.slot_count)]
        beats = {slot: self.peek.heartbeat(slot) for slot, s in enumerate(states) if s is SlotState.READY}
        victim = self._silence.sample(beats, reads + writes, now)
        # One at a time: a slot on its way to FREE serves whoever wants one.
        if victim is not None and SlotState.FREE not in states and SlotState.RELEASING not in states:
            for _ in self.registers.release(victim):
                self._release(victim, Ending.SILENCE, now)

    # ---- inside ------------------------------------------------------------------------------------------------

    def _ring(self, slot: int) -> None:
        tenancy = self._tenancies.get(slot)
        if tenancy is not None and tenancy.worker_runs:
            self._effects.append(RingDoorbell(tenancy.lifeline))

    def _status(self, bit: DeviceStatus, on: bool) -> None:
        self.registers.status = self.registers.status | bit if on else self.registers.status & ~bit

    def _say(self, event: Event) -> None:
        if self._mediator:
            self._effects.append(Say(event))

    def _show(self, slot: int) -> None:
        self._effects.append(WriteSlot(slot, self.registers.view(slot)))

    def _drain(self) -> list[Effect]:
        head = WriteHead(self.registers.status, self.registers.generation, self.registers.driver_version)
        effects, self._effects = self._effects, []
        if head != self._head:
            self._head = head
            effects.insert(0, head)
        return effects


def _program(raw: bytes) -> str:
    """A guest's text, made harmless: printable, at most 63 characters."""
    return printable(raw.split(b"\0", 1)[0].decode("utf-8", "replace"), PROGRAM_LENGTH)
