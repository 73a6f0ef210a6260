# SPDX-License-Identifier: Apache-2.0
"""Standby leases and stretched quanta: what they speed up, and that they change nobody's share."""

from __future__ import annotations

import attrs
import pytest

from vgpu.gpu.schedule import Grant, Schedule, SessionId, Tuning
from vgpu.gpu.simulate import Load, Outcome, Scenario, simulate
from vgpu.gpu.turn import HIGH_TOKEN, STANDBY_TOKEN, Hands, LocalTurn

US, MS, SECOND = 1_000, 1_000_000, 1_000_000_000
A, B, U = SessionId(1), SessionId(2), SessionId(3)


class World:
    """Busy sessions A and B of medium VMs, and U of a high one, which has used a lease and is idle."""

    def __init__(self, *, has_b: bool = True) -> None:
        self.turn = LocalTurn()
        self.schedule = Schedule(2 * MS, 20 * MS, SECOND, self.turn)
        self.told: dict[SessionId, Grant] = {}
        for session, vm, priority in ((A, "a", "medium"), (B, "b", "medium"), (U, "u", "high")):
            if session == B and not has_b:
                continue
            self.tell(self.schedule.set_vm(vm, "default", priority, 50, 0))  # type: ignore[arg-type]
            self.schedule.open(session, vm)
        self.tell(self.schedule.demand(U, 0))
        self.turn.pass_on(self.told[U].token)
        self.tell(self.schedule.ended(U, 0, 0, wants_more=False, token=self.told[U].token, held_ns=0))
        self.tell(self.schedule.demand(A, 0))
        if has_b:
            self.tell(self.schedule.demand(B, 0))

    def tell(self, grants: list[Grant]) -> None:
        self.told.update({grant.session: grant for grant in grants})


def test_an_idle_high_session_has_a_standby_lease_of_one_quantum() -> None:
    world = World()
    grant = world.told[U]
    assert grant.standby
    assert (grant.slice_ns, grant.deadline_ns) == (2 * MS, 0)
    assert grant.token & (HIGH_TOKEN | STANDBY_TOKEN) == HIGH_TOKEN | STANDBY_TOKEN
    assert grant.token not in (world.turn.hands.holder, world.turn.hands.next)
    assert (world.schedule.holder, world.schedule.follower) == (A, B)
    assert world.schedule.waiting() == [B]
    # Others get none, and what they have queued is less than it is without a high session.
    assert not world.told[A].token & HIGH_TOKEN
    assert world.told[A].in_flight_ns == world.told[B].in_flight_ns == 2 * MS // 16


def test_a_standby_lease_is_seen_in_the_word_and_charged() -> None:
    world = World()
    schedule, token = world.schedule, world.told[U].token
    displaced = world.turn.hands.next
    assert world.turn.take(token)
    world.tell(schedule.demand(U, MS))
    assert (schedule.holder, schedule.follower) == (A, U)
    assert world.told[A].deadline_ns == MS  # said as well: its worker may be asleep
    world.turn.pass_on(world.told[A].token)
    world.tell(schedule.ended(A, MS, MS, wants_more=True, token=world.told[A].token, held_ns=MS))
    assert schedule.holder == U
    # Whoever was displaced waits on, by another token.
    assert set(schedule.waiting()) == {A, B}
    assert displaced not in (world.turn.hands.holder, world.turn.hands.next)
    assert schedule.follower is not None
    world.turn.pass_on(token)
    world.tell(schedule.ended(U, MS, 2 * MS, wants_more=False, token=token, held_ns=MS))
    states = {state.vm: state for state in schedule.vm_states(2 * MS)}
    assert states["u"].used_ns == MS
    assert states["u"].ahead_ns == pytest.approx(MS, rel=0.01)
    # One use: the next one is another one.
    assert world.told[U].standby
    assert world.told[U].token != token


def test_a_standby_lease_that_nobody_saw_begin_or_end_is_charged_too() -> None:
    world = World(has_b=False)
    schedule, token = world.schedule, world.told[U].token
    holder = world.told[A].token
    assert world.turn.hands == Hands(holder, 0)
    assert world.turn.take(token)
    world.turn.pass_on(holder)
    world.turn.pass_on(token)
    world.tell(schedule.ended(U, MS, 5 * MS, wants_more=False, token=token, held_ns=MS))
    world.tell(schedule.ended(A, 4 * MS, 5 * MS, wants_more=True, token=holder, held_ns=4 * MS))
    assert schedule.holder == A
    assert schedule.used_ns(U) == MS
    assert world.told[U].standby


def test_who_was_alone_until_a_standby_lease_began_has_run_up_no_debt() -> None:
    world = World(has_b=False)
    schedule, token, holder = world.schedule, world.told[U].token, world.told[A].token
    now = 10 * SECOND
    world.turn.take(token)
    world.turn.pass_on(holder)  # before anybody heard
    world.tell(schedule.ended(A, now, now, wants_more=True, token=holder, held_ns=now))
    assert schedule.holder == U
    states = {state.vm: state for state in schedule.vm_states(now)}
    assert states["a"].ahead_ns <= 2 * MS


def test_no_standby_lease_for_who_is_as_far_ahead_as_it_may_be() -> None:
    world = World()
    schedule, used = world.schedule, 100 * MS
    token = world.told[U].token
    world.turn.take(token)
    world.turn.pass_on(world.turn.hands.holder)
    world.tell(schedule.demand(U, MS))
    world.turn.pass_on(token)
    world.told.pop(U)
    world.tell(schedule.ended(U, used, MS + used, wants_more=False, token=token, held_ns=used))
    assert U not in world.told
    # It gets one again when the others have caught up.
    now = MS + used
    for _ in range(400):
        holder = schedule.holder
        assert holder in (A, B)
        now += 2 * MS
        world.turn.pass_on(world.turn.hands.holder)
        token = world.told[holder].token
        world.tell(schedule.ended(holder, 2 * MS, now, wants_more=True, token=token, held_ns=2 * MS))
        if U in world.told:
            break
    assert world.told[U].standby
    assert now > 50 * MS


def test_who_owed_too_much_gets_a_standby_lease_while_another_is_alone() -> None:
    """Nothing is heard of a session that has the device alone: the schedule asks to be looked at by itself."""
    schedule = Schedule()
    for session, vm in ((SessionId(1), "u"), (SessionId(2), "g")):
        schedule.set_vm(vm, "default", "medium", 50, 0)
        schedule.open(session, vm)
    (first,) = schedule.demand(SessionId(1), 0)
    schedule.demand(SessionId(2), 10 * MS)
    schedule.decide(30 * MS)  # passed over, and billed for all the time that it had the device
    schedule.ended(SessionId(1), 0, 40 * MS, wants_more=False, token=first.token, held_ns=480 * MS)
    given = schedule.set_vm("u", "default", "high", 50, 41 * MS)
    now = 41 * MS
    while not any(grant.standby for grant in given) and now < 10 * SECOND:
        due = schedule.next_event_ns()
        assert due is not None
        now = max(now, due)
        given = schedule.decide(now)
    assert [grant.session for grant in given if grant.standby] == [1]


def test_a_standby_lease_taken_while_another_one_was_on_its_way() -> None:
    """The worker had taken the turn before it read that it is named by another token: it is told which one counts."""
    world = World()
    schedule, token = world.schedule, world.told[U].token
    world.tell(schedule.demand(U, MS))  # it asked, and was named
    named = world.told[U].token
    assert (schedule.follower, named) != (U, token)
    assert world.turn.hands.next == named
    assert world.turn.swap(world.turn.hands, Hands(world.turn.hands.holder, token))
    world.tell(schedule.decide(MS + 1))
    assert world.told[U].token == token
    assert not world.told[U].standby
    assert schedule.follower == U


def test_a_standby_lease_taken_while_another_one_came_and_was_taken_back() -> None:
    """The worker goes by what it was told last. Told nothing more, it would hold a lease that it knows nothing of, for ever."""
    world = World()
    schedule, token = world.schedule, world.told[U].token
    world.tell(schedule.demand(U, 10))  # sent before the standby lease arrived
    other = world.told[U].token
    assert world.turn.hands.next == other != token
    w = SessionId(4)
    world.tell(schedule.set_vm("w", "default", "high", 5, 20))
    schedule.open(w, "w")
    world.tell(schedule.demand(w, 20))  # goes before it
    assert (schedule.follower, world.turn.hands.next) == (w, world.told[w].token)
    assert world.turn.take(token)
    world.turn.pass_on(world.told[A].token)
    world.tell(schedule.ended(A, MS, MS, wants_more=True, token=world.told[A].token, held_ns=MS))
    assert schedule.holder == U
    assert world.told[U].token == token
    assert not world.told[U].standby
    # It has declined the other one, and asks; the answer is what it has.
    world.told.pop(U)
    world.tell(schedule.ended(U, 0, MS + 10, wants_more=True, token=other, held_ns=0))
    world.tell(schedule.demand(U, MS + 20))
    assert schedule.holder == U
    world.turn.pass_on(token)
    world.tell(schedule.ended(U, MS, 2 * MS, wants_more=False, token=token, held_ns=MS))
    assert schedule.holder != U


def test_who_asks_for_a_lease_has_none_that_it_could_report() -> None:
    """However a session came to be owed for: it is not left waiting."""
    world = World()
    schedule, now = world.schedule, 50 * MS
    first = world.told[A]
    world.tell(schedule.decide(now))
    assert schedule.holder != A  # passed over
    schedule._told[A] = first.token + 1
    world.tell(schedule.demand(A, now))
    assert A in schedule.waiting() or schedule.follower == A


def test_a_worker_that_does_not_know_standby_leases_is_not_given_them_for_ever() -> None:
    """One of an earlier version declines it like any lease. It is asked by messages, as before."""
    world = World()
    schedule = world.schedule
    for _ in range(3):
        token = world.told.pop(U).token
        world.tell(schedule.ended(U, 0, MS, wants_more=False, token=token, held_ns=0))
    world.tell(schedule.decide(2 * MS))
    assert U not in world.told
    world.tell(schedule.demand(U, 3 * MS))
    assert not world.told[U].standby
    assert schedule.follower == U


def test_a_session_that_goes_takes_its_standby_lease_along() -> None:
    world = World()
    assert world.turn.take(world.told[U].token)
    world.tell(world.schedule.close(U, MS))
    assert world.turn.hands.next not in (0, world.told[U].token)
    assert world.schedule.follower == B


def urgent(scenario: Scenario, vm: str = "u") -> tuple[Outcome, int]:
    outcome = simulate(attrs.evolve(scenario, message_ns=400 * US, switch_ns=70 * US))
    return outcome, outcome.latency_percentile_ns(vm, 99)


@pytest.mark.parametrize("neighbours", [1, 3])
def test_an_arrival_does_not_wait_for_messages(neighbours: int) -> None:
    load = Load("u", 50, priority="high", kernel_ns=100 * US, period_ns=10 * MS, work_ns=MS, is_regular=True)
    others = tuple(Load(f"g{i}", 50, kernel_ns=20 * US) for i in range(neighbours))
    scenario = Scenario((load, *others), 4 * SECOND)
    _, alone = urgent(attrs.evolve(scenario, loads=(load,)))
    _, asked = urgent(attrs.evolve(scenario, tuning=Tuning(standby=False, guarded_parts=4)))
    outcome, taken = urgent(scenario)
    assert asked > 1.5 * alone
    assert taken <= 1.3 * alone
    # What it did not use is shared by the others as before.
    rest = [outcome.service_ns[load.vm] for load in others]
    assert max(rest) <= 1.02 * min(rest)


def test_a_flood_of_short_requests_gets_its_share_and_ten_quanta() -> None:
    """However many of its requests a high VM sends, and however short: standby leases are no way around its share."""
    flood = Load("u", 1, priority="high", kernel_ns=50 * US, period_ns=MS, work_ns=2 * MS, is_regular=True)
    greedy = tuple(Load(f"g{i}", 100, kernel_ns=100 * US) for i in range(2))
    outcome, _ = urgent(Scenario((flood, *greedy), 4 * SECOND))
    due = outcome.configured["u"] * sum(outcome.service_ns.values())
    assert outcome.configured["u"] < 0.02
    assert outcome.service_ns["u"] <= due + 11 * 2 * MS + 2 * MS


def test_quanta_are_stretched_among_busy_equals_and_no_longer() -> None:
    turn = LocalTurn()
    schedule = Schedule(2 * MS, 20 * MS, SECOND, turn)
    told: dict[SessionId, Grant] = {}

    def tell(grants: list[Grant]) -> None:
        told.update({grant.session: grant for grant in grants})

    for session in (A, B, U):
        schedule.open(session, f"vm {session}")
    tell(schedule.demand(A, 0))
    tell(schedule.demand(B, 0))
    assert told[B].slice_ns == 2 * MS  # it was idle a moment ago
    turn.pass_on(told[A].token)
    tell(schedule.ended(A, 2 * MS, 2 * MS, wants_more=True, token=told[A].token, held_ns=2 * MS))
    assert told[A].slice_ns == 6 * MS
    # Somebody comes who was idle: the lease that has begun ends with its present quantum.
    turn.pass_on(told[B].token)
    tell(schedule.ended(B, 2 * MS, 4 * MS, wants_more=True, token=told[B].token, held_ns=2 * MS))
    assert schedule.holder == A
    tell(schedule.demand(U, 5 * MS))
    assert told[A].deadline_ns == 6 * MS
    # And one of another class among the sessions: no stretching at all.
    tell(schedule.set_vm(f"vm {U}", "default", "high", 50, 5 * MS))
    assert schedule.follower == U
    assert told[U].slice_ns == 2 * MS


def test_stretching_is_bounded_by_the_round() -> None:
    """What it saves, and that with many VMs nobody waits longer for it."""

    def run(count: int, stretch: int) -> Outcome:
        loads = tuple(Load(f"v{i}", 50, kernel_ns=100 * US) for i in range(count))
        tuning = Tuning(stretch=stretch)
        return simulate(Scenario(loads, 4 * SECOND, message_ns=200 * US, switch_ns=70 * US, tuning=tuning))

    assert run(3, 1).busy < 0.982
    assert run(3, 3).busy >= 0.988
    for count in (3, 6, 12):
        outcome = run(count, 3)
        assert outcome.jain >= 0.999
        assert max(outcome.longest_wait_ns(vm) for vm in outcome.vms) <= max(24, count * 2) * MS * 1.4
    assert run(12, 3).longest_lease_ns == run(12, 1).longest_lease_ns
