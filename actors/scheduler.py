# SPDX-License-Identifier: Apache-2.0
"""The scheduler actor of one GPU: carries the fair-queuing core's decisions to the executors.

All deciding is ``vgpu.gpu.schedule``; this actor brings it the clock and messages, and sends what it
decides. If it dies, sessions keep the lease they have and announce themselves to its successor.
"""

from __future__ import annotations

import time

import attrs
import trio

from vgpu.gpu.schedule import DEFAULT_QUANTUM_NS, Decision, FairQueue, Grant, SessionId

from . import Actor, Ref, handles
from .messages import (
    Demand,
    GrantLease,
    LeaseEnded,
    RevokeLease,
    ScheduleState,
    SessionClosed,
    SessionOpened,
)


@attrs.frozen
class Expire:
    """A holder's time to report is over."""


@attrs.define(eq=False)
class Scheduler(Actor):
    """Leases for one GPU."""

    quantum_ns: int = DEFAULT_QUANTUM_NS
    _queue: FairQueue = attrs.field(init=False)
    _executors: dict[SessionId, Ref[object]] = attrs.Factory(dict)
    _timer: trio.CancelScope | None = None

    def __attrs_post_init__(self) -> None:
        self._queue = FairQueue(self.quantum_ns)

    @handles(SessionOpened)
    def opened(self, message: SessionOpened) -> None:
        if message.session not in self._executors:
            self._queue.add(message.session, message.weight)
        self._executors[message.session] = message.executor
        self._queue.adopt(message.session, holding=message.holding)

    @handles(SessionClosed)
    async def closed(self, message: SessionClosed) -> None:
        self._executors.pop(message.session, None)
        await self._carry_out(self._queue.remove(message.session, time.monotonic_ns()))

    @handles(Demand)
    async def demand(self, message: Demand) -> None:
        await self._carry_out(self._queue.demand(message.session, time.monotonic_ns()))

    @handles(LeaseEnded)
    async def ended(self, message: LeaseEnded) -> None:
        now = time.monotonic_ns()
        decisions = self._queue.ended(message.session, message.used_ns, now, wants_more=message.wants_more)
        await self._carry_out(decisions)

    @handles(Expire)
    async def expire(self, message: Expire) -> None:
        await self._carry_out(self._queue.decide(time.monotonic_ns()))

    @handles(ScheduleState)
    def state(self, message: ScheduleState) -> dict[str, object]:
        return {
            "holder": self._queue.holder,
            "waiting": list(self._queue.waiting()),
            "used_ns": {int(s): self._queue.used_ns(s) for s in self._executors},
        }

    async def _carry_out(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            executor = self._executors.get(decision.session)
            if executor is None:
                continue
            if isinstance(decision, Grant):
                executor.send_nowait(GrantLease(decision.deadline_ns))
            else:
                executor.send_nowait(RevokeLease())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self._queue.next_event_ns()
        if due is not None:
            wait = max(due - time.monotonic_ns(), 0) / 1e9
            self._timer = self.send_after(wait, Expire())
