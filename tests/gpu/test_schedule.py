# SPDX-License-Identifier: Apache-2.0
"""The fair-queuing core: leases, shares, returning sessions, overruns."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vgpu.gpu.schedule import FairQueue, Grant, Revoke, SessionId

A, B, C = SessionId(1), SessionId(2), SessionId(3)
MS = 1_000_000


def queue(**weights: int) -> FairQueue:
    made = FairQueue(quantum_ns=2 * MS, grace_ns=20 * MS)
    for session, weight in zip((A, B, C), weights.values(), strict=False):
        made.add(session, weight)
    return made


def simulate(fair: FairQueue, sessions: dict[SessionId, int], total_ns: int) -> dict[SessionId, int]:
    """Always-busy sessions whose kernels take the given ns; a quantum ends at the first kernel end after it."""
    used = dict.fromkeys(sessions, 0)
    now = 0
    decisions = [d for s in sessions for d in fair.demand(s, now)]
    while now < total_ns:
        grant = None
        for decision in decisions:
            if isinstance(decision, Revoke):
                decisions = fair.ended(decision.session, 0, now, wants_more=True)
                grant = next((d for d in decisions if isinstance(d, Grant)), None)
                break
            grant = decision
        assert grant is not None, f"nobody runs at {now}"
        kernel = sessions[grant.session]
        slice_ns = -(-max(grant.deadline_ns - now, 1) // kernel) * kernel if grant.deadline_ns else kernel
        now += slice_ns
        used[grant.session] += slice_ns
        decisions = fair.ended(grant.session, slice_ns, now, wants_more=True)
    return used


def test_alone_gets_an_open_lease_and_keeps_it() -> None:
    fair = queue(a=50)
    assert fair.demand(A, 10) == [Grant(A, 0)]
    assert fair.decide(10**12) == []
    assert fair.next_event_ns() is None


def test_a_second_session_revokes_the_open_lease_and_quanta_begin() -> None:
    fair = queue(a=50, b=50)
    fair.demand(A, 0)
    assert fair.demand(B, 5 * MS) == [Revoke(A)]
    assert fair.decide(6 * MS) == []
    assert fair.ended(A, 1 * MS, 6 * MS, wants_more=True) == [Grant(B, 8 * MS)]
    assert fair.ended(B, 2 * MS, 8 * MS, wants_more=False) == [Grant(A, 0)]


def test_a_holder_that_does_not_report_is_overrun_and_others_go_on() -> None:
    fair = queue(a=50, b=50)
    fair.demand(A, 0)
    fair.demand(B, 0)
    assert fair.next_event_ns() == 20 * MS
    assert fair.decide(19 * MS) == []
    assert fair.decide(20 * MS) == [Grant(B, 22 * MS)]
    # The late report charges A and lets it queue again.
    assert fair.ended(A, 25 * MS, 25 * MS, wants_more=True) == []
    assert fair.used_ns(A) == 25 * MS
    assert fair.waiting() == [A]


@pytest.mark.parametrize(
    ("weights", "kernels"),
    [((75, 25), (1 * MS, 1 * MS)), ((90, 10), (1 * MS, 20_000)), ((50, 50), (20_000, 1 * MS))],
)
def test_shares_follow_weights_whatever_the_kernel_lengths(
    weights: tuple[int, int], kernels: tuple[int, int]
) -> None:
    fair = queue(a=weights[0], b=weights[1])
    used = simulate(fair, {A: kernels[0], B: kernels[1]}, 4_000 * MS)
    share = used[A] / sum(used.values())
    assert share == pytest.approx(weights[0] / sum(weights), abs=0.01)


def test_a_returning_session_has_no_credit() -> None:
    fair = queue(a=50, b=50)
    simulate(fair, {A: MS}, 1000 * MS)
    # B was away for a second of virtual time; from now on they share evenly.
    used = simulate(fair, {A: MS, B: MS}, 400 * MS)
    assert used[A] == pytest.approx(used[B], rel=0.05)


def test_running_alone_leaves_no_debt() -> None:
    fair = queue(a=50, b=50)
    fair.demand(A, 0)
    fair.charge(A, 3600 * 1000 * MS)
    used = simulate(fair, {B: MS, A: MS}, 400 * MS)
    assert used[A] == pytest.approx(used[B], rel=0.05)


def test_the_bill_of_an_open_lease_reported_at_its_end_is_no_debt_either() -> None:
    fair = queue(a=50, b=50)
    now = 3600 * 1000 * MS
    fair.demand(A, 0)
    assert fair.demand(B, now) == [Revoke(A)]
    # An hour of GPU time, of which one millisecond was after B had asked.
    fair.ended(A, now, now + MS, wants_more=False)
    assert fair.used_ns(A) == now
    used = simulate(fair, {B: MS, A: MS}, 400 * MS)
    assert used[A] == pytest.approx(used[B], rel=0.05)


def test_removal_of_the_holder_serves_the_next() -> None:
    fair = queue(a=50, b=50)
    fair.demand(A, 0)
    fair.demand(B, 0)
    assert fair.remove(A, 1) == [Grant(B, 0)]
    assert fair.remove(A, 1) == []


def test_bad_weights_are_refused() -> None:
    fair = queue(a=50)
    with pytest.raises(ValueError, match="known already"):
        fair.add(A)
    with pytest.raises(ValueError, match=r"1\.\.1000"):
        fair.set_weight(A, 1001)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["demand", "ended", "remove", "decide"]), st.integers(1, 3), st.integers(0, 30)
        ),
        max_size=60,
    )
)
def test_any_order_of_events_keeps_one_holder_and_starves_nobody(steps: list[tuple[str, int, int]]) -> None:
    fair = queue(a=10, b=50, c=200)
    now = 0
    known = {A, B, C}
    for event, number, wait in steps:
        now += wait * MS
        session = SessionId(number)
        if event == "demand":
            fair.demand(session, now)
        elif event == "ended":
            fair.ended(session, wait * MS, now, wants_more=bool(wait % 2))
        elif event == "remove":
            fair.remove(session, now)
            known.discard(session)
        else:
            fair.decide(now)
        assert fair.holder is None or fair.holder in known
        assert fair.holder not in fair.waiting()
    # Everybody who waits is served in bounded time once holders report.
    for _ in range(100):
        if not fair.waiting():
            break
        now += 30 * MS
        fair.decide(now)
        if fair.holder is not None:
            fair.ended(fair.holder, MS, now, wants_more=False)
    assert fair.waiting() == []
