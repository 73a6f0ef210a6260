# SPDX-License-Identifier: Apache-2.0
"""The scheduler actor of one GPU: carries the scheduling core's decisions to the executors.

All deciding is ``vgpu.gpu.schedule``; this actor brings it the clock, the GPU's turn word and messages, and sends what it
decides. If it dies, sessions keep the lease they have and announce themselves to its successor, which reads from
the turn word who has the device, and from the ledger where the VMs belong.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import trio

from vgpu.gpu.hierarchy import WAIT_BOUNDS_NS, VmState, check_priority
from vgpu.gpu.schedule import (
    DEFAULT_AGING_NS,
    DEFAULT_GRACE_NS,
    DEFAULT_QUANTUM_NS,
    Grant,
    Schedule,
    SessionId,
    Tuning,
)
from vgpu.gpu.turn import SharedTurn

from . import Actor, ActorError, ExitReason, MailboxFull, Ref, handles
from .messages import (
    Demand,
    GrantLease,
    LeaseEnded,
    ListPools,
    ListVms,
    ScheduleState,
    SessionClosed,
    SessionOpened,
    SetPool,
    SetVm,
)

_log = logging.getLogger("vgpu.scheduler")

LEDGER_SECONDS = 10.0
# When to try again to tell an executor that has too much to do to hear anything.
AGAIN_SECONDS = 0.005


@attrs.frozen
class SetQuantum:
    """The length of a lease while several sessions compete, from the next lease on.

    How far priorities may be ahead of their share stays as it was when this scheduler began: orders are kept by it.
    """

    quantum_ns: int


@attrs.frozen
class Expire:
    """Something is due: a holder's time to hand over is past, or somebody has waited for long."""


@attrs.frozen
class TellAgain:
    """Executors whose mailboxes were full may have room now."""


@attrs.define(eq=False)
class Scheduler(Actor):
    """Leases for one GPU. Without ``turn_path`` the turn word is this actor's own, and leases change hands by reports."""

    quantum_ns: int = DEFAULT_QUANTUM_NS
    turn_path: Path | None = None
    ledger: str = ""
    grace_ns: int = DEFAULT_GRACE_NS
    aging_ns: int = DEFAULT_AGING_NS
    tuning: Tuning = attrs.Factory(Tuning)
    _schedule: Schedule = attrs.field(init=False)
    _turn: SharedTurn | None = None
    _executors: dict[SessionId, Ref[object]] = attrs.Factory(dict)
    _untold: dict[SessionId, GrantLease] = attrs.Factory(dict)
    _timer: trio.CancelScope | None = None
    _due_ns: int | None = None

    def __attrs_post_init__(self) -> None:
        self._turn = SharedTurn(self.turn_path) if self.turn_path is not None else None
        # A predecessor's tokens are all below, for hours: they are given out less often than every 65 microseconds.
        token = time.monotonic_ns() >> 16
        self._schedule = Schedule(
            self.quantum_ns, self.grace_ns, self.aging_ns, self._turn, token, self.tuning
        )

    async def started(self) -> None:
        if self.ledger:
            self.nursery.start_soon(self._read_ledger)

    async def _read_ledger(self) -> None:
        """Where VMs belong, as it is registered; sessions that announce themselves may say what was."""
        try:
            pools = await self.find(self.ledger).ask(ListPools(), timeout_seconds=LEDGER_SECONDS)
            vms = await self.find(self.ledger).ask(ListVms(), timeout_seconds=LEDGER_SECONDS)
        except ActorError as error:
            _log.warning("VMs of the ledger are not known: %s", error)
            return
        for pool in pools:
            self.ref.send_nowait(SetPool(pool.name, pool.weight))
        for vm in vms:
            self.ref.send_nowait(SetVm(vm.name, vm.pool, vm.priority, vm.weight))

    async def stopped(self, reason: ExitReason) -> None:
        if self._turn is not None:
            self._turn.close()

    # -- what is configured

    @handles(SetVm)
    def set_vm(self, message: SetVm) -> None:
        self._place(message.vm, message.pool, message.priority, message.weight)

    def _place(self, vm: str, pool: str, priority: str, weight: int) -> None:
        now = time.monotonic_ns()
        self._configure(lambda: self._schedule.set_vm(vm, pool, check_priority(priority), weight, now))

    @handles(SetPool)
    def set_pool(self, message: SetPool) -> None:
        now = time.monotonic_ns()
        self._configure(lambda: self._schedule.set_pool(message.pool, message.weight, now))

    @handles(SetQuantum)
    def set_quantum(self, message: SetQuantum) -> None:
        self.quantum_ns = self._schedule.quantum_ns = message.quantum_ns

    def _configure(self, change: Callable[[], list[Grant]]) -> None:
        try:
            grants = change()
        except ValueError as error:
            _log.warning("not changed: %s", error)
            return
        self._carry_out(grants)

    # -- sessions

    @handles(SessionOpened)
    def opened(self, message: SessionOpened) -> None:
        now = time.monotonic_ns()
        self._executors[message.session] = message.executor
        if message.session not in self._schedule.sessions:
            vm = message.vm or f"session {message.session}"
            if message.is_new or vm not in self._schedule.hierarchy.vms:
                self._place(vm, message.pool, message.priority, message.weight)
            self._schedule.open(message.session, vm)
        if message.holding:
            self._carry_out(self._schedule.adopt(message.session, message.token, now))
        else:
            self._carry_out(self._schedule.decide(now))

    @handles(SessionClosed)
    def closed(self, message: SessionClosed) -> None:
        self._executors.pop(message.session, None)
        self._untold.pop(message.session, None)
        self._carry_out(self._schedule.close(message.session, time.monotonic_ns()))

    @handles(Demand)
    def demand(self, message: Demand) -> None:
        self._carry_out(self._schedule.demand(message.session, time.monotonic_ns()))

    @handles(LeaseEnded)
    def ended(self, message: LeaseEnded) -> None:
        grants = self._schedule.ended(
            message.session,
            message.used_ns,
            time.monotonic_ns(),
            wants_more=message.wants_more,
            token=message.token,
            held_ns=message.held_ns,
        )
        self._carry_out(grants)

    @handles(Expire)
    def expire(self, message: Expire) -> None:
        self._timer = self._due_ns = None
        self._carry_out(self._schedule.decide(time.monotonic_ns()))

    @handles(TellAgain)
    def tell_again(self, message: TellAgain) -> None:
        untold, self._untold = self._untold, {}
        for session, lease in untold.items():
            self._tell(session, lease)

    def _tell(self, session: SessionId, lease: GrantLease) -> None:
        """Never waits: an executor that is stuck holds up its own session and nobody else."""
        executor = self._executors.get(session)
        if executor is None:
            return
        was_told = not self._untold
        try:
            executor.notify(lease)
            self._untold.pop(session, None)
        except MailboxFull:
            self._untold[session] = lease  # the newest is all that counts
            if was_told:
                self.send_after(AGAIN_SECONDS, TellAgain())

    def _carry_out(self, grants: list[Grant]) -> None:
        for grant in grants:
            lease = GrantLease(
                grant.deadline_ns, grant.token, grant.slice_ns, grant.in_flight_ns, grant.standby
            )
            self._tell(grant.session, lease)
        due = self._schedule.next_event_ns()
        # A timer that is early costs one look; moving it at every event would cost more.
        if due is None or (self._timer is not None and self._due_ns is not None and self._due_ns <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._due_ns = due
        self._timer = self.send_after(max(due - time.monotonic_ns(), 0) / 1e9, Expire())

    # -- looking

    @handles(ScheduleState)
    def state(self, message: ScheduleState) -> dict[str, object]:
        now = time.monotonic_ns()
        schedule = self._schedule
        states = schedule.vm_states(now)
        return {
            "holder": schedule.holder,
            "next": schedule.follower,
            "waiting": list(schedule.waiting()),
            "used_ns": {int(s): schedule.used_ns(s) for s in self._executors if s in schedule.sessions},
            "quantum_ns": schedule.quantum_ns,
            "wait_bounds_ns": list(WAIT_BOUNDS_NS),
            "pools": _by_pool(states),
        }


def _by_pool(states: list[VmState]) -> dict[str, object]:
    pools: dict[str, dict[str, object]] = {}
    for state in states:
        pool = pools.setdefault(
            state.pool, {"weight": state.pool_weight, "ahead_ns": state.pool_ahead_ns, "vms": {}}
        )
        vms = pool["vms"]
        assert isinstance(vms, dict)
        fields = attrs.asdict(state)
        vms[state.vm] = {
            k: v for k, v in fields.items() if k not in ("vm", "pool", "pool_weight", "pool_ahead_ns")
        }
    return {name: pools[name] for name in sorted(pools)}
