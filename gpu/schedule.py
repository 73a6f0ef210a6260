# SPDX-License-Identifier: Apache-2.0
"""Who may use the GPU, until when, and who is next: leases over a hierarchy of pools, VMs and sessions.

Order and shares are ``fair.py`` (hierarchical start-time fair queuing, charged in measured GPU nanoseconds); the numbers
and names of pools and VMs are ``hierarchy.py``; how the device changes hands without this code is ``turn.py``. This module
is what lies between: it turns "who is next" into leases.

- A session alone has an open-ended lease: no deadline, nothing to renew, no message while it lasts.
- When others wait, the holder's lease gets a deadline, some whole number of quanta from where it competes, and its
  follower is named in the turn word beforehand. As many quanta in a row as fair queuing would give one by one are one lease.
- What is charged is what was measured, when it is reported; until then an estimate stands for it. A kernel that runs
  past the deadline is paid for like any other, so unequal kernel lengths come out even.
- A holder that keeps the device for ``grace_ns`` past its deadline (a long kernel cannot be interrupted) is passed over:
  others go on beside it, the hardware slices between them, and it pays when it reports.
- A waiter of a higher class that fair queuing would choose now ends the holder's lease at once (preemption); every other
  waiter lets it finish its quantum.
- An idle session of the high class has a standby lease of one quantum, given beforehand while fair queuing would choose it:
  its worker takes the place behind a lower holder by itself, that one's worker yields, and this module sees it in the
  word and charges it. One use, then a new one has to be given; so it is never further ahead than the class may be, and a quantum.
- Among equals that never run out of work quanta are stretched, up to ``Tuning.stretch`` of them, as long as a round
  stays short: each change of hands costs. Whoever was idle ends that.

No clock, no trio, no shared memory here: ``now`` is an argument (nanoseconds, any monotonic origin), the turn word is a
``Turn``, and decisions are values for the caller to carry out.
"""

from __future__ import annotations

from typing import NewType

import attrs

from .fair import HIGH, Leaf
from .hierarchy import Hierarchy, Priority, Session, VmState
from .turn import HIGH_TOKEN, STANDBY_TOKEN, TOKEN_LIMIT, Hands, LocalTurn, Turn

SessionId = NewType("SessionId", int)

DEFAULT_QUANTUM_NS = 2_000_000
# A lease may end this much after its deadline before its holder is passed over: one long kernel.
DEFAULT_GRACE_NS = 20_000_000
# Who has waited for so long goes before who has not. Long enough that shares above 0.2 per cent never get near it.
DEFAULT_AGING_NS = 1_000_000_000
# The longest lease in quanta. Beyond it a holder is asked again; no weights of 1..1000 get near it.
LONGEST_LEASE = 1 << 16
# A worker that declines so many standby leases in a row gets no more.
DECLINES = 3
# An idle high session that owes more than its class may be ahead is looked at so often while another has the device alone.
ARM_NS = 100_000_000
# Rounds of deciding anew because a worker changed the word meanwhile.
ROUNDS = 16


@attrs.frozen
class Tuning:
    """What is traded for what; every value keeps the bounds, with the stretch in them. For measurements, and for tests.

    ``stretch``: quanta that a lease among busy equals has at most; 1: never more than one. ``round_ns``: it is no longer
    than so that a round of all who are busy takes that. ``standby``: high sessions may take the device beforehand.
    ``in_flight_parts``: work that a session may have queued on the device while others exist, in parts of a quantum;
    ``guarded_parts``: while there are others of a higher class.
    """

    stretch: int = 3
    round_ns: int = 24_000_000
    standby: bool = True
    in_flight_parts: int = 4
    guarded_parts: int = 16


@attrs.frozen
class Grant:
    """A session's lease as it is now: it may run while the turn word names its token as holder.

    It ends at ``deadline_ns``, or ``slice_ns`` after it began; 0 and 0: open-ended. ``in_flight_ns``: at most about so much
    work is to be queued on the device; 0: any. A grant of a token that the session has replaces what was said of it.
    ``standby``: the session may keep it while it is idle, and name it in the word itself when it is not any more.
    """

    session: SessionId
    token: int
    deadline_ns: int = 0
    slice_ns: int = 0
    in_flight_ns: int = 0
    standby: bool = False


@attrs.define(eq=False)
class _Lease:
    session: SessionId
    state: Session
    token: int
    began_ns: int = 0
    # From here on its use counts and its slices are measured: its beginning, or when the first competitor came.
    settled_ns: int = 0
    deadline_ns: int | None = None
    slice_ns: int = 0
    in_flight_ns: int = 0
    # Charged already, as an estimate.
    estimate_ns: int = 0
    # It was open-ended when the first competitor came: what it used before was nobody's loss.
    was_open: bool = False

    @property
    def leaf(self) -> Leaf:
        return self.state.leaf

    def grant(self) -> Grant:
        return Grant(self.session, self.token, self.deadline_ns or 0, 0, self.in_flight_ns)


class Schedule:
    """The scheduler's state for one GPU."""

    def __init__(
        self,
        quantum_ns: int = DEFAULT_QUANTUM_NS,
        grace_ns: int = DEFAULT_GRACE_NS,
        aging_ns: int = DEFAULT_AGING_NS,
        turn: Turn | None = None,
        first_token: int = 1,
        tuning: Tuning | None = None,
    ) -> None:
        if quantum_ns <= 0 or grace_ns <= 0 or aging_ns <= 0:
            raise ValueError(
                f"quantum {quantum_ns}, grace {grace_ns} and aging {aging_ns} ns must be positive"
            )
        self.quantum_ns = quantum_ns
        self.grace_ns = grace_ns
        self.tuning = tuning if tuning is not None else Tuning()
        self.hierarchy = Hierarchy(quantum_ns, aging_ns)
        self._tree = self.hierarchy.tree
        self._turn = turn if turn is not None else LocalTurn()
        self._token = first_token % TOKEN_LIMIT
        self._sessions: dict[SessionId, Session] = {}
        # Invariant: the holder is in service in the tree, and nobody else.
        self._lease: _Lease | None = None
        # Named in the word as next. Its leaf still waits in the tree.
        self._next: _Lease | None = None
        # Leases that are over and not reported yet, or passed over.
        self._owed: dict[SessionId, _Lease] = {}
        # A holder that nobody here gave the lease, and since when it is known.
        self._stranger: tuple[int, int] | None = None
        self._grants: dict[SessionId, Grant] = {}
        # Standby leases that may still be taken, by token and by session; high sessions that are idle and have none.
        self._standby: dict[int, _Lease] = {}
        self._armed: dict[SessionId, int] = {}
        self._unarmed: set[SessionId] = set()
        # How often in a row they declined one: workers of an earlier version do not know such leases.
        self._declined: dict[SessionId, int] = {}
        # The token that each session was told last: of two that were on their way the worker goes by the second.
        self._told: dict[SessionId, int] = {}
        # Sessions that came out of idleness and have not been served since.
        self._fresh: set[SessionId] = set()
        # Open sessions by class.
        self._ranks = [0, 0, 0]

    # -- looking

    @property
    def holder(self) -> SessionId | None:
        """Who holds the lease, as far as is known."""
        return self._lease.session if self._lease else None

    @property
    def follower(self) -> SessionId | None:
        """Who is named as the next one."""
        return self._next.session if self._next else None

    @property
    def sessions(self) -> dict[SessionId, Session]:
        """The sessions that are open. Not to be changed."""
        return self._sessions

    def waiting(self) -> list[SessionId]:
        """Sessions that want the GPU and do not hold it, longest wait first."""
        waiting = [(s.leaf.waiting_since, number) for number, s in self._sessions.items() if s.leaf.wants]
        return [number for _, number in sorted(waiting)]

    def used_ns(self, session: SessionId) -> int:
        """GPU nanoseconds the session has reported."""
        return self._sessions[session].used_ns

    def next_event_ns(self) -> int | None:
        """When ``decide`` should be called again if nothing else happens, or None."""
        if not self._tree.root.is_waiting:
            lease = self._lease
            if lease is None or lease.deadline_ns is not None or not self._unarmed or not self._gives_standby:
                return None
            return lease.settled_ns + ARM_NS
        times = [self._tree.next_aging_ns()]
        if self._lease is not None and self._lease.deadline_ns is not None:
            times.append(self._lease.deadline_ns + self.grace_ns)
        if self._stranger is not None:
            times.append(self._stranger[1] + self.grace_ns)
        return min((t for t in times if t is not None), default=None)

    # -- what is configured

    def set_pool(self, pool: str, weight: int, now: int) -> list[Grant]:
        """A pool's weight, 1 to 1000, from now on. Raises ValueError."""
        self.hierarchy.set_pool(pool, weight)
        return self.decide(now)

    def set_vm(self, vm: str, pool: str, priority: Priority, weight: int, now: int) -> list[Grant]:
        """A VM's place, from now on; its sessions keep what they have. Raises ValueError."""
        known = self.hierarchy.vms.get(vm)
        was = known.priority if known is not None else priority
        self.hierarchy.set_vm(vm, pool, priority, weight)
        if was != priority:
            self._count_ranks()
        return self.decide(now)

    # -- sessions

    def open(self, session: SessionId, vm: str) -> None:
        """A session of a VM came. An unknown VM gets the default pool, priority and weight.

        Raises:
            ValueError: the session is known.
        """
        if session in self._sessions:
            raise ValueError(f"session {session} is known already")
        self._sessions[session] = state = self.hierarchy.open_session(vm, str(session))
        self._ranks[state.leaf.rank] += 1
        self._unarmed.add(session)

    def adopt(self, session: SessionId, token: int, now: int) -> list[Grant]:
        """A session says that it has a lease with this token, from an earlier scheduler or this one."""
        state = self._sessions.get(session)
        if state is None or self._find(session) is not None:
            return []
        if self._lease is None and token and self._turn.load().holder == token:
            self._stranger = None
            self._enter(_Lease(session, state, token), now)
        else:
            # What it has will never begin, or is over already.
            self._want(state, now)
        return self.decide(now)

    def close(self, session: SessionId, now: int) -> list[Grant]:
        """A session went, in whatever state. Unknown sessions are ignored."""
        self._observe(now)
        lease = self._find(session)
        if lease is not None:
            self._take_back(lease, now)
        self._owed.pop(session, None)
        self._disarm(session)
        self._declined.pop(session, None)
        self._told.pop(session, None)
        self._fresh.discard(session)
        state = self._sessions.pop(session, None)
        if state is not None:
            self._tree.forget(state.leaf)
            self.hierarchy.close_session(state)
            self._ranks[state.leaf.rank] -= 1
        return self.decide(now)

    def demand(self, session: SessionId, now: int) -> list[Grant]:
        """A session without a lease has records to replay."""
        state = self._sessions.get(session)
        if state is None:
            return []
        self._observe(now)
        lease, owed = self._find(session), self._owed.get(session)
        is_told = lease is not None and self._last_told(session) == lease.token
        if lease is not None and lease is not owed:
            # It looked before the grant arrived: say it again. A standby lease it has taken by itself.
            if not is_told or (owed is None and not lease.token & STANDBY_TOKEN):
                self._say(lease)
        elif lease is None or not is_told:
            # What it owes a report of it either never had, or bills with the next one.
            self._owed.pop(session, None)
            if not state.leaf.wants:
                self._fresh.add(session)
            self._want(state, now)
        return self.decide(now)

    def ended(
        self,
        session: SessionId,
        used_ns: int,
        now: int,
        *,
        wants_more: bool,
        token: int = 0,
        held_ns: int | None = None,
    ) -> list[Grant]:
        """A session's lease is over and its work is done: settle the bill.

        Args:
            used_ns: GPU nanoseconds since its last report, for the statistics.
            held_ns: nanoseconds that the device was its alone, which is what it pays: its work, and the gaps in which
                nobody else might work. Without it ``used_ns`` is charged.
            token: of the lease that ended; 0: whichever it has.
            wants_more: records still wait in its ring.
        """
        state = self._sessions.get(session)
        if state is None:
            return self.decide(now)
        self._observe(now)
        if token and token == self._armed.get(session) and not (wants_more or held_ns):
            self._declined[session] = self._declined.get(session, 0) + 1
        self._disarm(session)
        lease = self._find(session)
        bill = used_ns if held_ns is None else held_ns
        if lease is not None and token in (0, lease.token):
            self._take_back(lease, now)
            self._owed.pop(session, None)
            if lease.was_open:
                bill = min(bill, max(now - lease.settled_ns, 0))
            bill -= lease.estimate_ns
        elif lease is not None and held_ns is None:
            bill = (
                0  # an older report of a session that has a newer lease; what was held is of that one alone
            )
        self._tree.charge(state.leaf, bill)
        self.hierarchy.account(state, used_ns, now)
        if self._find(session) is None:
            if wants_more:
                self._want(state, now)
            else:
                self._tree.unwant(state.leaf)
                self._fresh.discard(session)
                self._unarmed.add(session)
            self._tree.forget(state.leaf)
        return self.decide(now)

    # -- deciding

    def decide(self, now: int) -> list[Grant]:
        """What to tell whom now. Calling it again without news gives nothing new."""
        self._tree.age(now)
        for _ in range(ROUNDS):
            self._observe(now)
            if self._place(now):
                break
        if self._unarmed:
            self._arm(now)
        grants = list(self._grants.values())
        self._grants.clear()
        self._told.update((grant.session, grant.token) for grant in grants)
        return grants

    def _place(self, now: int) -> bool:
        """Make holder and follower what they should be. False: the word changed meanwhile."""
        if self._lease is None and not self._begin_first(now):
            return False
        lease = self._lease
        if lease is None:
            return True
        lease_bound = self._bound(lease)
        if not self._tree.root.is_waiting:
            changed = lease.deadline_ns is not None or lease.in_flight_ns != lease_bound
            lease.deadline_ns, lease.in_flight_ns = None, lease_bound
            if changed:
                self._say(lease)
            return True
        if lease.deadline_ns is not None and now >= lease.deadline_ns + self.grace_ns:
            hands = self._turn.load()
            if hands.holder == lease.token and self._turn.swap(hands, Hands(hands.next, 0)):
                self._leave(now, passed_over=True)
            return False  # the next round sees who has it now
        deadline, follower = self._plan(lease, now)
        if deadline != lease.deadline_ns or lease.in_flight_ns != lease_bound:
            lease.deadline_ns, lease.in_flight_ns = deadline, lease_bound
            self._say(lease)
        return self._name(lease, follower)

    def _begin_first(self, now: int) -> bool:
        """Nobody has the device: give it to who is next. False: somebody has it after all."""
        hands = self._turn.load()
        if hands.holder and self._tree.root.is_waiting:
            if self._stranger is None or self._stranger[0] != hands.holder:
                self._stranger = (hands.holder, now)
            if now < self._stranger[1] + self.grace_ns:
                return True  # its session will announce itself
        leaf = self._tree.choose()
        if leaf is None:
            return True
        lease = self._new_lease(leaf)
        if not self._turn.swap(hands, Hands(lease.token, 0)):
            return False
        self._stranger = None
        self._enter(lease, now)
        self._say(lease)
        return True

    def _plan(self, lease: _Lease, now: int) -> tuple[int, Leaf | None]:
        """When the holder's lease should end, and who follows."""
        quantum, leaf = self._quantum(), lease.leaf
        elapsed = max(now - lease.settled_ns, 0)
        rival = self._tree.choose(elapsed + 1)
        if lease.deadline_ns is not None and lease.deadline_ns <= now:
            # It is ending; only who follows may change still.
            return lease.deadline_ns, rival if rival is not leaf else self._tree.choose(
                LONGEST_LEASE * quantum
            )
        if rival is not leaf and rival is not None:
            has_had_one = now - lease.began_ns >= self.quantum_ns
            if rival.rank > leaf.rank or (has_had_one and elapsed == 0):
                return max(now, 1), rival  # 0 would be no deadline
        least = max(-(-elapsed // quantum), 1)
        # The first number of quanta after which somebody else would be chosen: doubling, then halving.
        high = least
        while self._tree.choose(high * quantum) is leaf and high < LONGEST_LEASE:
            high *= 2
        low = max(high // 2, least)
        while low < high:
            middle = (low + high) // 2
            if self._tree.choose(middle * quantum) is leaf:
                low = middle + 1
            else:
                high = middle
        follower = self._tree.choose(high * quantum)
        return lease.settled_ns + high * quantum, follower

    def _name(self, lease: _Lease, follower: Leaf | None) -> bool:
        """Name the follower in the word. False: the holder has passed it on meanwhile."""
        named = self._next
        if follower is lease.leaf:
            follower = None  # nobody else in sight; the holder is asked again at the end
        if (named.leaf if named else None) is follower:
            return True
        chosen = self._new_lease(follower) if follower is not None else None
        if chosen is not None:
            chosen.slice_ns, chosen.in_flight_ns = self._quantum(), self._bound(chosen)
        before = self._turn.load()
        desired = Hands(lease.token, chosen.token if chosen else 0)
        if before.holder != lease.token or not self._turn.swap(before, desired):
            return False
        self._next = chosen
        if named is not None:
            self._grants.pop(named.session, None)
        if chosen is not None:
            self._say(chosen)
        return True

    # -- standby

    @property
    def _gives_standby(self) -> bool:
        return self.tuning.standby and len(self._sessions) > 1

    def _arm(self, now: int) -> None:
        """Give standby leases to idle high sessions that fair queuing would choose, had they something to do."""
        if not self._gives_standby:
            return
        self._settle_open(now)  # else whoever owes would owe for as long as another has the device alone
        for session in sorted(self._unarmed):
            state = self._sessions.get(session)
            if (
                state is None
                or self._declined.get(session, 0) >= DECLINES
                or state.leaf.rank != HIGH
                or state.leaf.is_busy
                or self._find(session) is not None
            ):
                self._unarmed.discard(session)
            elif self._would_be_chosen(state.leaf, now):
                self._unarmed.discard(session)
                lease = self._new_lease(state.leaf, STANDBY_TOKEN)
                lease.slice_ns, lease.in_flight_ns = self.quantum_ns, self._bound(lease)
                self._standby[lease.token] = lease
                self._armed[session] = lease.token
                self._grants[session] = Grant(
                    session, lease.token, 0, lease.slice_ns, lease.in_flight_ns, standby=True
                )

    def _would_be_chosen(self, leaf: Leaf, now: int) -> bool:
        elapsed = max(now - self._lease.settled_ns, 0) if self._lease is not None else 0
        if self._lease is not None and self._lease.deadline_ns is None:
            elapsed = 0  # no debt is run up alone
        self._tree.want(leaf, now)
        chosen = self._tree.choose(elapsed + 1)
        self._tree.unwant(leaf)
        return chosen is leaf

    def _disarm(self, session: SessionId) -> None:
        """Its standby lease is used, or cannot be any more."""
        self._unarmed.discard(session)
        token = self._armed.pop(session, 0)
        self._standby.pop(token, None)

    def _taken(self, token: int) -> _Lease | None:
        """The standby lease of that token, which its session has taken."""
        lease = self._standby.get(token)
        if lease is None:
            return None
        self._disarm(lease.session)
        self._declined.pop(lease.session, None)
        if self._last_told(lease.session) != lease.token:
            # It was given another one meanwhile, which may even have been taken back since: this one is the one that counts.
            self._grants[lease.session] = Grant(
                lease.session, lease.token, 0, lease.slice_ns, lease.in_flight_ns
            )
        return lease

    def _last_told(self, session: SessionId) -> int:
        grant = self._grants.get(session)
        return grant.token if grant is not None else self._told.get(session, 0)

    def _displace(self) -> None:
        """Who was named has lost that place to a standby lease. It waits on; its token is never named again."""
        named, self._next = self._next, None
        if named is not None:
            grant = self._grants.get(named.session)
            if grant is not None and grant.token == named.token:
                del self._grants[named.session]

    # -- inside

    def _want(self, state: Session, now: int) -> None:
        self._settle_open(now)
        self._tree.want(state.leaf, now)

    def _settle_open(self, now: int) -> None:
        lease = self._lease
        if lease is not None and lease.deadline_ns is None:
            # Alone it ran up no debt: virtual time went along with it.
            self._tree.charge(lease.leaf, max(now - lease.settled_ns, 0))
            self._tree.renew(lease.leaf)
            lease.settled_ns = now
            lease.was_open = True

    def _count_ranks(self) -> None:
        self._ranks = [0, 0, 0]
        for session, state in self._sessions.items():
            self._ranks[state.leaf.rank] += 1
            if state.leaf.rank == HIGH and session not in self._armed:
                self._unarmed.add(session)

    def _quantum(self) -> int:
        """How long a lease is now: stretched among equals of which none was idle."""
        busy = sum(self._tree.root.waiting) + 1
        if self._fresh or max(self._ranks) < len(self._sessions):
            return self.quantum_ns
        stretch = min(self.tuning.stretch, self.tuning.round_ns // (busy * self.quantum_ns))
        return self.quantum_ns * max(stretch, 1)

    def _bound(self, lease: _Lease) -> int:
        """Work in flight: little while somebody might come who goes before."""
        if len(self._sessions) < 2:
            return 0
        is_guarded = any(self._ranks[lease.leaf.rank + 1 :])
        return self.quantum_ns // (self.tuning.guarded_parts if is_guarded else self.tuning.in_flight_parts)

    def _new_lease(self, leaf: Leaf, bits: int = 0) -> _Lease:
        session = SessionId(int(leaf.name))
        self._token = self._token % (TOKEN_LIMIT - 1) + 1
        if leaf.rank == HIGH:
            bits |= HIGH_TOKEN
        return _Lease(session, self._sessions[session], self._token | bits)

    def _say(self, lease: _Lease) -> None:
        if lease is self._next:
            self._grants[lease.session] = Grant(
                lease.session, lease.token, 0, lease.slice_ns, lease.in_flight_ns
            )
        else:
            self._grants[lease.session] = lease.grant()

    def _find(self, session: SessionId) -> _Lease | None:
        for lease in (self._lease, self._next):
            if lease is not None and lease.session == session:
                return lease
        return self._owed.get(session)

    def _observe(self, now: int) -> None:
        """Take note of what the workers have done with the word."""
        hands = self._turn.load()
        if self._lease is not None and hands.holder == self._lease.token:
            taken = self._taken(hands.next)
            if taken is not None:
                self._displace()
                self._next = taken
                self._want(taken.state, now)
            return
        if self._lease is not None:
            self._settle_open(now)
        taken = self._taken(hands.holder)
        if taken is not None:
            self._displace()
            self._want(taken.state, now)
            self._next = taken
        if self._lease is not None:
            self._leave(now)
        if self._next is not None:
            follower, self._next = self._next, None
            is_over = hands.holder != follower.token
            self._enter(follower, now)
            if is_over:  # begun and ended before anybody looked
                self._leave(now)
            else:
                # Its grant said so, counted from when it really began.
                follower.deadline_ns = now + follower.slice_ns
                # The word as it is: somebody may have taken the place behind it.
                taken = self._taken(hands.next)
                if taken is not None:
                    self._next = taken
                    self._want(taken.state, now)

    def _enter(self, lease: _Lease, now: int) -> None:
        """The lease begins."""
        assert self._lease is None
        if lease.leaf.wants:
            self.hierarchy.waited(lease.state, max(now - lease.leaf.waiting_since, 0))
        self._tree.serve(lease.leaf)
        self._fresh.discard(lease.session)
        lease.began_ns = lease.settled_ns = now
        self._lease = lease

    def _leave(self, now: int, *, passed_over: bool = False) -> None:
        """The holder has passed the device on, or was passed over; it owes a report."""
        lease, self._lease = self._lease, None
        assert lease is not None
        lease.estimate_ns = max(now - lease.settled_ns, 0)
        self._tree.charge(lease.leaf, lease.estimate_ns)
        if not passed_over:
            self._tree.linger(lease.leaf)
        self._tree.release(lease.leaf)
        self._owed[lease.session] = lease

    def _take_back(self, lease: _Lease, now: int) -> None:
        """A lease that its session has done with, or will never use: out of the word and out of service."""
        for _ in range(ROUNDS):
            hands = self._turn.load()
            if hands.holder == lease.token:
                desired = Hands(hands.next, 0)
            elif hands.next == lease.token:
                desired = Hands(hands.holder, 0)
            else:
                break
            if self._turn.swap(hands, desired):
                break
        if lease is self._next:
            # It never began.
            self._next = None
            self._grants.pop(lease.session, None)
            self._tree.unwant(lease.leaf)
            return
        self._observe(now)

    # -- for people

    def vm_states(self, now: int) -> list[VmState]:
        """What an administrator sees, by VM."""
        running = self._lease
        live = (running.state, max(now - running.settled_ns, 0)) if running else None
        return self.hierarchy.vm_states(now, live)
