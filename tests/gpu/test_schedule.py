# SPDX-License-Identifier: Apache-2.0
"""Leases over the fair tree: alone, contended, handed over, overrun, withdrawn, adopted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vgpu.gpu.hierarchy import Priority, check_priority
from vgpu.gpu.schedule import Grant, Schedule, SessionId, Tuning
from vgpu.gpu.turn import TOKEN_LIMIT, Hands, LocalTurn

A, B, C = SessionId(1), SessionId(2), SessionId(3)
MS = 1_000_000
BOUND = MS // 2  # work in flight
GUARDED = MS // 8  # while somebody of a higher class might come


class World:
    """A schedule, its turn word, and sessions a, b, c of VMs of the same names."""

    def __init__(self, tuning: Tuning | None = None, **weights: int) -> None:
        self.turn = LocalTurn()
        tuning = Tuning(stretch=1, standby=False) if tuning is None else tuning
        self.schedule = Schedule(2 * MS, 20 * MS, 100 * MS, self.turn, tuning=tuning)
        for number, (vm, weight) in enumerate(weights.items(), 1):
            self.schedule.set_vm(vm, "default", "medium", weight, 0)
            self.schedule.open(SessionId(number), vm)

    @property
    def hands(self) -> tuple[int, int]:
        return self.turn.hands.holder, self.turn.hands.next


def test_alone_gets_an_open_lease_and_keeps_it() -> None:
    world = World(a=50)
    assert world.schedule.demand(A, 10) == [Grant(A, 2)]
    assert world.hands == (2, 0)
    assert world.schedule.decide(10**12) == []
    assert world.schedule.next_event_ns() is None


def test_work_in_flight_is_bounded_as_soon_as_somebody_might_come() -> None:
    world = World(a=50)
    world.schedule.demand(A, 10)
    world.schedule.open(B, "b")
    assert world.schedule.decide(20) == [Grant(A, 2, in_flight_ns=BOUND)]
    assert world.schedule.close(B, 30) == [Grant(A, 2)]


def test_a_second_session_ends_the_open_lease_and_quanta_begin() -> None:
    world = World(a=50, b=50)
    (first,) = world.schedule.demand(A, 0)
    ended, follows = world.schedule.demand(B, 5 * MS)
    assert ended == Grant(A, first.token, deadline_ns=5 * MS, in_flight_ns=BOUND)
    assert follows == Grant(B, follows.token, slice_ns=2 * MS, in_flight_ns=BOUND)
    assert world.hands == (first.token, follows.token)
    assert world.schedule.decide(6 * MS) == []
    # The worker hands over, then reports; A is named again while B runs.
    world.turn.pass_on(first.token)
    (again,) = world.schedule.ended(A, 6 * MS, 6 * MS, wants_more=True, token=first.token)
    assert again.session == A
    assert world.schedule.holder == B
    assert world.hands == (follows.token, again.token)
    # B has nothing more: A is alone again as soon as that is known.
    world.turn.pass_on(follows.token)
    assert world.schedule.ended(B, 2 * MS, 8 * MS, wants_more=False, token=follows.token) == [
        Grant(A, again.token, in_flight_ns=BOUND)
    ]


def test_a_newcomer_lets_the_holder_finish_its_first_quantum() -> None:
    world = World(a=50, b=50)
    (first,) = world.schedule.demand(A, 0)
    ended, _ = world.schedule.demand(B, 1 * MS)
    assert ended == Grant(A, first.token, deadline_ns=3 * MS, in_flight_ns=BOUND)


def test_a_higher_class_does_not_wait_for_the_quantum() -> None:
    world = World(a=50, b=50)
    world.schedule.set_vm("b", "default", "high", 50, 0)
    (first,) = world.schedule.demand(A, 0)
    ended, follows = world.schedule.demand(B, 1 * MS)
    assert ended == Grant(A, first.token, deadline_ns=1 * MS, in_flight_ns=GUARDED)
    assert follows.session == B


def test_a_higher_class_may_be_ahead_of_its_share_by_a_bounded_amount() -> None:
    """It is served at once until it has used ten quanta more than its due, and then waits for its turn like others."""
    world = World(a=1000, b=1)
    world.schedule.set_vm("b", "default", "high", 1, 0)
    now, preempted = 0, 0
    world.schedule.demand(A, now)
    for _ in range(40):
        now += MS // 2
        grants = world.schedule.demand(B, now)
        holder = world.turn.hands.holder
        if Grant(A, holder, deadline_ns=now, in_flight_ns=GUARDED) not in grants:
            break
        preempted += 1
        world.turn.pass_on(holder)
        world.schedule.ended(A, MS // 2, now, wants_more=True, token=holder)
        now += MS
        holder = world.turn.hands.holder
        world.turn.pass_on(holder)
        world.schedule.ended(B, MS, now, wants_more=False, token=holder)
    assert 15 <= preempted <= 25


def test_a_holder_that_does_not_hand_over_is_passed_over_and_pays_later() -> None:
    world = World(a=50, b=50)
    world.schedule.demand(A, 0)
    world.schedule.demand(B, 0)
    first, follows = world.hands
    due = world.schedule.next_event_ns()
    assert due == 22 * MS
    assert world.schedule.decide(21 * MS) == []
    world.schedule.decide(22 * MS)
    assert world.schedule.holder == B
    assert world.hands == (follows, 0)
    # The late report charges A and lets it queue again.
    world.turn.pass_on(first)
    assert world.hands == (follows, 0)
    world.schedule.ended(A, 25 * MS, 25 * MS, wants_more=True, token=first)
    assert world.schedule.used_ns(A) == 25 * MS
    assert world.schedule.waiting() == [A]
    # B is owed what A used: its lease is as long as that.
    (grant,) = world.schedule.decide(25 * MS) or [Grant(B, follows, deadline_ns=0)]
    assert grant.session in (A, B)


def test_a_follower_that_is_gone_is_named_no_more() -> None:
    world = World(a=50, b=50, c=50)
    world.schedule.demand(A, 0)
    world.schedule.demand(B, 0)
    (_, follows) = world.hands
    world.schedule.demand(C, 0)
    (named,) = [g for g in world.schedule.close(B, 1) if g.session == C]
    assert world.turn.hands.next == named.token != follows
    world.schedule.close(C, 2)
    assert world.turn.hands.next == 0


def test_a_follower_that_has_nothing_to_do_declines() -> None:
    world = World(a=50, b=50)
    (first,) = world.schedule.demand(A, 0)
    _, follows = world.schedule.demand(B, 5 * MS)
    assert world.schedule.ended(B, 0, 5 * MS, wants_more=False, token=follows.token, held_ns=0) == [
        Grant(A, first.token, in_flight_ns=BOUND)
    ]
    assert world.hands == (first.token, 0)


def test_removal_of_the_holder_serves_the_next() -> None:
    world = World(a=50, b=50)
    world.schedule.demand(A, 0)
    world.schedule.demand(B, 0)
    _, follows = world.hands
    grants = world.schedule.close(A, 1)
    assert world.hands == (follows, 0)
    assert grants[-1] == Grant(B, follows)
    assert world.schedule.close(A, 1) == []


def test_a_successor_takes_the_lease_that_is_running() -> None:
    turn = LocalTurn(Hands(77, 78))
    schedule = Schedule(2 * MS, 20 * MS, 100 * MS, turn, first_token=500)
    schedule.open(B, "b")
    assert schedule.demand(B, 0) == []  # somebody has the device; who, is not known yet
    schedule.open(A, "a")
    grants = schedule.adopt(A, 77, MS)
    assert schedule.holder == A
    assert {g.session for g in grants} == {A, B}
    assert turn.hands == Hands(77, grants[-1].token)


def test_a_holder_that_no_successor_hears_of_is_passed_over() -> None:
    turn = LocalTurn(Hands(77, 0))
    schedule = Schedule(2 * MS, 20 * MS, 100 * MS, turn, first_token=500)
    schedule.open(B, "b")
    schedule.demand(B, 0)
    assert schedule.next_event_ns() == 20 * MS
    (grant,) = schedule.decide(20 * MS)
    assert (grant.session, turn.hands) == (B, Hands(grant.token, 0))


def test_a_lease_that_never_began_becomes_a_wish_at_the_successor() -> None:
    turn = LocalTurn()
    schedule = Schedule(2 * MS, 20 * MS, 100 * MS, turn, first_token=500)
    schedule.open(A, "a")
    (grant,) = schedule.adopt(A, 12, 0)
    assert grant == Grant(A, 501)


def test_tokens_wrap_without_ever_being_nobody() -> None:
    turn = LocalTurn()
    schedule = Schedule(turn=turn, first_token=TOKEN_LIMIT - 2)
    schedule.open(A, "a")
    tokens = []
    for now in range(3):
        (grant,) = schedule.demand(A, now)
        tokens.append(grant.token)
        schedule.ended(A, 1, now, wants_more=False, token=grant.token)
    assert tokens == [TOKEN_LIMIT - 1, 1, 2]


def test_bad_values_are_refused() -> None:
    world = World(a=50)
    with pytest.raises(ValueError, match="known already"):
        world.schedule.open(A, "a")
    with pytest.raises(ValueError, match=r"1\.\.1000"):
        world.schedule.set_vm("a", "default", "medium", 1001, 0)
    with pytest.raises(ValueError, match=r"1\.\.1000"):
        world.schedule.set_pool("x", 0, 0)
    with pytest.raises(ValueError, match="none of high, medium, low"):
        check_priority("urgent")


def test_what_an_administrator_sees() -> None:
    world = World(a=75, b=25)
    world.schedule.set_pool("default", 60, 0)
    world.schedule.set_vm("c", "other", "high", 10, 0)
    world.schedule.open(C, "c")
    world.schedule.set_pool("other", 40, 0)
    first = world.schedule.demand(A, 0)[0]
    world.schedule.demand(B, MS)
    world.turn.pass_on(first.token)
    world.schedule.ended(A, 3 * MS, 3 * MS, wants_more=False, token=first.token)
    a, b, c = world.schedule.vm_states(4 * MS)
    assert [v.configured_share for v in (a, b, c)] == pytest.approx([0.45, 0.15, 0.4])
    assert (a.used_ns, a.leases, b.leases, b.longest_wait_ns) == (3 * MS, 1, 1, 2 * MS)
    assert (a.achieved_share, b.achieved_share) == (0.75, 0.25)
    assert sum(b.waits) == 1
    assert b.waits[3] == 1


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["demand", "ended", "remove", "decide", "pass", "place", "take"]),
            st.integers(1, 3),
            st.integers(0, 30),
        ),
        max_size=80,
    )
)
def test_any_order_of_events_keeps_one_holder_and_starves_nobody(steps: list[tuple[str, int, int]]) -> None:
    world = World(Tuning(), a=10, b=50, c=200)
    schedule, turn, now = world.schedule, world.turn, 0
    tokens: dict[SessionId, int] = {}
    standby: dict[SessionId, int] = {}
    known = {A, B, C}

    def told(grants: list[Grant]) -> None:
        tokens.update({g.session: g.token for g in grants})
        standby.update({g.session: g.token for g in grants if g.standby})

    for event, number, wait in steps:
        now += wait * MS
        session = SessionId(number)
        if event == "demand":
            told(schedule.demand(session, now))
        elif event == "ended":
            token = tokens.get(session, 0)
            if wait % 3:
                turn.pass_on(token)
            told(schedule.ended(session, wait * MS, now, wants_more=bool(wait % 2), token=token))
        elif event == "remove":
            told(schedule.close(session, now))
            known.discard(session)
        elif event == "pass":
            turn.pass_on(turn.hands.holder)
        elif event == "take" and tokens.get(session, 0) == standby.get(session) and session in known:
            # Once, as a worker does; sometimes the scheduler hears of it late, or it is over by then.
            if turn.take(standby.pop(session)) and wait % 2:
                told(schedule.demand(session, now))
            if wait % 5 == 0:
                turn.pass_on(turn.hands.holder)
        elif event == "place":
            priority: Priority = ("low", "medium", "high")[wait % 3]
            told(schedule.set_vm("abc"[number - 1], f"p{wait % 2}", priority, 1 + wait, now))
        else:
            told(schedule.decide(now))
        assert schedule.holder is None or schedule.holder in known
        assert schedule.holder not in schedule.waiting()
        assert set(schedule.waiting()) <= known
    # Everybody who waits is served in bounded time, also when holders never report.
    for _ in range(400):
        if not schedule.waiting():
            break
        now += 30 * MS
        told(schedule.decide(now))
        if schedule.holder is not None:
            holder = schedule.holder
            turn.pass_on(tokens[holder])
            told(schedule.ended(holder, MS, now, wants_more=False, token=tokens[holder]))
    assert schedule.waiting() == []
    tree = schedule.hierarchy.tree
    assert not any(tree.root.waiting)
