# SPDX-License-Identifier: Apache-2.0
"""The planner: every clause as a row, and the rules that hold for all rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgpu.actors import Crashed, ExitReason, Killed, NoActor, Normal, Shutdown, is_abnormal
from vgpu.supervision import (
    AutoShutdown,
    ChildView,
    Plan,
    Restart,
    Strategy,
    plan_exit,
    plan_restart,
    should_restart,
)

P, T, X = Restart.PERMANENT, Restart.TRANSIENT, Restart.TEMPORARY
CRASH = Crashed(ValueError("boom"))
REASONS: list[ExitReason] = [Normal(), Shutdown("x"), CRASH, Killed(), NoActor()]


@pytest.mark.parametrize(
    ("restart", "reason", "expected"),
    [
        (P, Normal(), True),
        (P, Shutdown(), True),
        (P, CRASH, True),
        (P, Killed(), True),
        (T, Normal(), False),
        (T, Shutdown(), False),
        (T, Shutdown("with a cause"), False),
        (T, CRASH, True),
        (T, Killed(), True),
        (T, NoActor(), True),
        (X, Normal(), False),
        (X, CRASH, False),
        (X, Killed(), False),
    ],
)
def test_restart_types(restart: Restart, reason: ExitReason, expected: bool) -> None:
    assert should_restart(restart, reason) is expected


def _children(text: str) -> list[ChildView]:
    """'aP bT- cX' -> permanent a alive, transient b not alive, temporary c alive. '!' marks a significant child."""
    types = {"P": P, "T": T, "X": X}
    return [ChildView(word[0], types[word[1]], "-" not in word, "!" in word) for word in text.split()]


@pytest.mark.parametrize(
    ("strategy", "children", "ended", "reason", "stops", "forgets", "starts"),
    [
        (Strategy.ONE_FOR_ONE, "aP bP- cP", "b", CRASH, "", "", "b"),
        (Strategy.ONE_FOR_ONE, "aP bP- cP", "b", Normal(), "", "", "b"),
        (Strategy.ONE_FOR_ONE, "aP bT- cP", "b", Normal(), "", "", ""),
        (Strategy.ONE_FOR_ONE, "aP bT- cP", "b", CRASH, "", "", "b"),
        (Strategy.ONE_FOR_ONE, "aP bX- cP", "b", CRASH, "", "b", ""),
        (Strategy.REST_FOR_ONE, "aP bP- cP dP", "b", CRASH, "dc", "", "bcd"),
        (Strategy.REST_FOR_ONE, "aP bP cP dP-", "d", CRASH, "", "", "d"),
        (Strategy.REST_FOR_ONE, "aP- bP cP", "a", CRASH, "cb", "", "abc"),
        # Those who are down already are not stopped, but are started with the rest.
        (Strategy.REST_FOR_ONE, "aP- bT- cP", "a", CRASH, "c", "", "abc"),
        # A temporary sibling is stopped and does not come back.
        (Strategy.REST_FOR_ONE, "aP- bX cP", "a", CRASH, "cb", "b", "ac"),
        (Strategy.REST_FOR_ONE, "aP bX- cP", "b", CRASH, "", "b", ""),
        (Strategy.REST_FOR_ONE, "aP bT- cP", "b", Normal(), "", "", ""),
        (Strategy.ONE_FOR_ALL, "aP bP- cP", "b", CRASH, "ca", "", "abc"),
        (Strategy.ONE_FOR_ALL, "aX bP- cT-", "b", CRASH, "a", "a", "bc"),
        (Strategy.ONE_FOR_ALL, "aP bX- cP", "b", CRASH, "", "b", ""),
        (Strategy.SIMPLE_ONE_FOR_ONE, "aP bP- cP", "b", CRASH, "", "", "b"),
        (Strategy.SIMPLE_ONE_FOR_ONE, "aT bT- cT", "b", Normal(), "", "b", ""),
        (Strategy.SIMPLE_ONE_FOR_ONE, "aX bX- cX", "b", CRASH, "", "b", ""),
    ],
)
def test_plans(
    strategy: Strategy, children: str, ended: str, reason: ExitReason, stops: str, forgets: str, starts: str
) -> None:
    plan = plan_exit(strategy, AutoShutdown.NEVER, _children(children), ended, reason)
    assert plan == Plan(tuple(stops), tuple(forgets), tuple(starts))


@pytest.mark.parametrize(
    ("auto_shutdown", "children", "reason", "expected"),
    [
        (AutoShutdown.NEVER, "aT!- bT!", Normal(), False),
        (AutoShutdown.ANY_SIGNIFICANT, "aT!- bT!", Normal(), True),
        (AutoShutdown.ANY_SIGNIFICANT, "aT- bT!", Normal(), False),
        # Restarted, so it has not ended.
        (AutoShutdown.ANY_SIGNIFICANT, "aT!- bT!", CRASH, False),
        (AutoShutdown.ANY_SIGNIFICANT, "aX!- bT!", CRASH, True),
        (AutoShutdown.ALL_SIGNIFICANT, "aT!- bT!", Normal(), False),
        (AutoShutdown.ALL_SIGNIFICANT, "aT!- bT!-", Normal(), True),
        (AutoShutdown.ALL_SIGNIFICANT, "aT!- bT", Normal(), True),
        (AutoShutdown.ALL_SIGNIFICANT, "aT- bT!-", Normal(), False),
    ],
)
def test_auto_shutdown(
    auto_shutdown: AutoShutdown, children: str, reason: ExitReason, expected: bool
) -> None:
    plan = plan_exit(Strategy.ONE_FOR_ONE, auto_shutdown, _children(children), "a", reason)
    assert plan.shut_down is expected


_restarts = st.sampled_from(Restart)


@st.composite
def _families(draw: st.DrawFn) -> tuple[list[ChildView], str]:
    """Children in start order, one of which has just ended."""
    count = draw(st.integers(1, 6))
    ended = draw(st.integers(0, count - 1))
    views = [
        ChildView(
            "abcdef"[index],
            draw(_restarts),
            draw(st.booleans()) if index != ended else False,
            draw(st.booleans()),
        )
        for index in range(count)
    ]
    return views, views[ended].id


@given(
    strategy=st.sampled_from(Strategy),
    auto_shutdown=st.sampled_from(AutoShutdown),
    family=_families(),
    reason=st.sampled_from(REASONS),
)
def test_rules_of_every_plan(
    strategy: Strategy, auto_shutdown: AutoShutdown, family: tuple[list[ChildView], str], reason: ExitReason
) -> None:
    views, ended = family
    order = [view.id for view in views]
    by_id = {view.id: view for view in views}
    plan = plan_exit(strategy, auto_shutdown, views, ended, reason)

    # Starts in start order, stops in the reverse, each child once.
    assert list(plan.starts) == sorted(set(plan.starts), key=order.index)
    assert list(plan.stops) == sorted(set(plan.stops), key=order.index, reverse=True)
    # Only the living are stopped, and the ended one is not among them.
    assert all(by_id[one].is_alive for one in plan.stops)
    assert ended not in plan.stops
    # A restart is planned exactly when the ended child calls for it, and brings it back.
    assert bool(plan.starts) == should_restart(by_id[ended].restart, reason)
    assert not plan.starts or ended in plan.starts
    # Temporary children are never started; whoever is stopped is either started again or forgotten.
    assert all(by_id[one].restart is not X for one in plan.starts)
    assert set(plan.stops) <= set(plan.starts) | set(plan.forgets)
    assert not set(plan.starts) & set(plan.forgets)
    # Nobody is disturbed without a restart, nor outside of the strategy's reach.
    reach = {
        Strategy.ONE_FOR_ONE: {ended},
        Strategy.SIMPLE_ONE_FOR_ONE: {ended},
        Strategy.REST_FOR_ONE: set(order[order.index(ended) :]),
        Strategy.ONE_FOR_ALL: set(order),
    }[strategy]
    assert set(plan.stops) | set(plan.starts) | set(plan.forgets) <= (reach if plan.starts else {ended})
    # No two children start anew while one that was started after them keeps running (order is dependency).
    if plan.starts and strategy in (Strategy.REST_FOR_ONE, Strategy.ONE_FOR_ALL):
        later = set(order[order.index(ended) :])
        assert {one for one in later if by_id[one].is_alive} <= set(plan.stops)
    # The supervisor ends only by a significant child that stays ended.
    if plan.shut_down:
        assert not plan.starts
        assert by_id[ended].significant
        assert auto_shutdown is not AutoShutdown.NEVER


@given(strategy=st.sampled_from(Strategy), family=_families())
def test_trying_again_brings_everybody_back(strategy: Strategy, family: tuple[list[ChildView], str]) -> None:
    views, failed = family
    plan = plan_restart(strategy, views, failed)
    assert failed in plan.starts
    assert not plan.shut_down


def test_what_is_abnormal() -> None:
    assert [is_abnormal(reason) for reason in REASONS] == [False, False, True, True, True]


def test_a_significant_child_that_is_about_to_be_restarted_has_not_ended() -> None:
    def plan(*, is_expected: bool) -> Plan:
        children = [
            ChildView("a", Restart.TRANSIENT, is_alive=False, significant=True, is_expected=is_expected),
            ChildView("b", Restart.TRANSIENT, is_alive=False, significant=True),
        ]
        return plan_exit(Strategy.ONE_FOR_ONE, AutoShutdown.ALL_SIGNIFICANT, children, "b", Normal())

    assert plan(is_expected=False).shut_down
    assert not plan(is_expected=True).shut_down
