# SPDX-License-Identifier: Apache-2.0
"""Who may use the GPU next: a pure fair-queuing core over sessions.

Start-time fair queuing (P. Goyal, H. M. Vin, H. Cheng, "Start-time Fair Queuing", SIGCOMM 1996),
charged in *measured GPU nanoseconds* after the fact: a session's start tag is the later of the virtual
time and its last finish tag, the smallest start tag is served next, and service advances the finish tag
by used / weight. So a session that was idle comes back neither punished nor with credit saved up.

Leases: a session alone holds an open-ended one (no deadline, nothing to renew). As soon as another
wants the GPU the open lease is revoked and quanta begin. A holder that does not report the end of its
lease in time (a long kernel cannot be interrupted) is *overrun*: others go on beside it, the hardware
slices between them, and what it used is charged when it reports.

No clock, no trio, no shared memory here: ``now`` is an argument (nanoseconds, any monotonic origin) and
decisions are values for the caller to carry out.
"""

from __future__ import annotations

from typing import NewType

import attrs

SessionId = NewType("SessionId", int)

DEFAULT_QUANTUM_NS = 2_000_000
# A lease may end this much after its deadline before its holder counts as overrun: one long kernel.
DEFAULT_GRACE_NS = 20_000_000


@attrs.frozen
class Grant:
    """Give this session the GPU. deadline_ns 0: open-ended."""

    session: SessionId
    deadline_ns: int


@attrs.frozen
class Revoke:
    """Ask this session to stop at its next call and report."""

    session: SessionId


Decision = Grant | Revoke


@attrs.define(eq=False)
class _Entity:
    weight: int
    start_tag: float = 0.0
    finish_tag: float = 0.0
    # Records wait in its ring.
    # Invariant: wanting implies not holding.
    wanting: bool = False
    # Position among equals: who asked first is served first.
    ticket: int = 0
    granted_ns: int = 0
    used_ns: int = 0


@attrs.define(eq=False)
class _Lease:
    session: SessionId
    # When its holder owes a report; None: open-ended.
    deadline_ns: int | None = None
    # It began open-ended: what was used before the deadline (the revocation) was nobody's loss.
    was_open: bool = False

    def billable_ns(self, used_ns: int, now: int) -> int:
        """Of what was used, what counts against the holder."""
        if not self.was_open:
            return used_ns
        return 0 if self.deadline_ns is None else min(used_ns, max(now - self.deadline_ns, 0))

    def as_grant(self) -> Grant:
        return Grant(self.session, self.deadline_ns or 0)


class FairQueue:
    """The scheduler's state for one GPU."""

    def __init__(self, quantum_ns: int = DEFAULT_QUANTUM_NS, grace_ns: int = DEFAULT_GRACE_NS) -> None:
        if quantum_ns <= 0 or grace_ns <= 0:
            raise ValueError(f"quantum {quantum_ns} ns and grace {grace_ns} ns must be positive")
        self._quantum_ns = quantum_ns
        self._grace_ns = grace_ns
        self._entities: dict[SessionId, _Entity] = {}
        self._lease: _Lease | None = None
        # Sessions whose lease ran over; they hold nothing, but have not reported yet.
        self._overrun: dict[SessionId, _Lease] = {}
        self._virtual_time = 0.0
        self._tickets = 0

    @property
    def holder(self) -> SessionId | None:
        """Who holds the lease, if anybody."""
        return self._lease.session if self._lease else None

    def used_ns(self, session: SessionId) -> int:
        """GPU nanoseconds charged to the session so far."""
        return self._entities[session].used_ns

    def waiting(self) -> list[SessionId]:
        """Sessions that want the GPU and do not hold it, next to be served first."""
        order = [(e.start_tag, e.ticket, s) for s, e in self._entities.items() if e.wanting]
        return [session for _, _, session in sorted(order)]

    def add(self, session: SessionId, weight: int = 50) -> None:
        """A session came. Weight 1 to 1000.

        Raises:
            ValueError: the session is known, or the weight out of range.
        """
        if session in self._entities:
            raise ValueError(f"session {session} is known already")
        if not 1 <= weight <= 1000:
            raise ValueError(f"weight {weight} is not in 1..1000")
        self._entities[session] = _Entity(weight, finish_tag=self._virtual_time)

    def remove(self, session: SessionId, now: int) -> list[Decision]:
        """A session went, in whatever state. Unknown sessions are ignored."""
        self._entities.pop(session, None)
        self._overrun.pop(session, None)
        if self._lease and self._lease.session == session:
            self._lease = None
        return self.decide(now)

    def adopt(self, session: SessionId, *, holding: bool) -> None:
        """After a restart of the scheduler: a session says what it has. At most one lease is kept."""
        if holding and self._lease is None:
            self._lease = _Lease(session)

    def set_weight(self, session: SessionId, weight: int) -> None:
        """From the next charge on."""
        if not 1 <= weight <= 1000:
            raise ValueError(f"weight {weight} is not in 1..1000")
        self._entities[session].weight = weight

    def demand(self, session: SessionId, now: int) -> list[Decision]:
        """A session without a lease has records to replay."""
        entity = self._entities.get(session)
        if entity is None:
            return []
        if self._lease and self._lease.session == session:
            # It looked before the grant arrived, or lost it in a restart: say it again.
            return [self._lease.as_grant()]
        if not entity.wanting:
            entity.wanting = True
            entity.start_tag = max(self._virtual_time, entity.finish_tag)
            self._tickets += 1
            entity.ticket = self._tickets
        return self.decide(now)

    def ended(self, session: SessionId, used_ns: int, now: int, *, wants_more: bool) -> list[Decision]:
        """A session's lease is over (deadline, revocation, or nothing left to do): charge it.

        Args:
            used_ns: GPU nanoseconds since its last report.
            wants_more: records still wait in its ring.
        """
        entity = self._entities.get(session)
        if entity is None:
            return self.decide(now)
        lease = self._overrun.pop(session, None)
        if self._lease and self._lease.session == session:
            lease = self._lease
        self.charge(session, used_ns, lease.billable_ns(used_ns, now) if lease else used_ns)
        if self._lease and self._lease.session == session:
            self._lease = None
        if wants_more:
            entity.wanting = False
            return self.demand(session, now)
        return self.decide(now)

    def charge(self, session: SessionId, used_ns: int, billable_ns: int | None = None) -> None:
        """Account GPU time without ending the lease; ``billable_ns`` of it (all, unless given) delays its next turn."""
        entity = self._entities.get(session)
        if entity is None or used_ns <= 0:
            return
        entity.used_ns += used_ns
        billable = used_ns if billable_ns is None else billable_ns
        entity.finish_tag = max(entity.finish_tag, entity.start_tag) + billable / entity.weight

    def next_event_ns(self) -> int | None:
        """When ``decide`` should be called again if nothing else happens, or None."""
        if self._lease and self._lease.deadline_ns is not None and self.waiting():
            return self._lease.deadline_ns + self._grace_ns
        return None

    def decide(self, now: int) -> list[Decision]:
        """What to do now. Calling it again without news gives nothing new."""
        waiting = self.waiting()
        lease = self._lease
        if lease is not None:
            if not waiting:
                return []
            if lease.deadline_ns is None:
                # From here the holder owes a report, like one whose quantum ends now.
                lease.deadline_ns = now
                holder = self._entities.get(lease.session)
                if holder is not None:
                    # Alone it ran up no debt: its bill so far does not count against newcomers.
                    holder.finish_tag = max(
                        self._virtual_time, min(holder.finish_tag, self._least_tag(waiting))
                    )
                return [Revoke(lease.session)]
            if now < lease.deadline_ns + self._grace_ns:
                return []
            self._overrun[lease.session] = lease
            self._lease = None
        if not waiting:
            return []
        chosen = waiting[0]
        entity = self._entities[chosen]
        entity.wanting = False
        entity.granted_ns = now
        self._virtual_time = max(self._virtual_time, entity.start_tag)
        alone = len(waiting) == 1 and not self._overrun
        self._lease = _Lease(chosen, None if alone else now + self._quantum_ns, was_open=alone)
        return [self._lease.as_grant()]

    def _least_tag(self, waiting: list[SessionId]) -> float:
        return min(self._entities[s].start_tag for s in waiting)
