# SPDX-License-Identifier: Apache-2.0
"""Heartbeats and deadlines, told the time by the test."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgpu.supervision import Deadlines, Health, HealthChange, HeartbeatLimits, Heartbeats, Overdue

LIMITS = HeartbeatLimits(late_seconds=2, missing_seconds=5, dead_seconds=10)


def test_silence_gets_worse_step_by_step_and_is_told_once() -> None:
    hearts: Heartbeats[str] = Heartbeats()
    hearts.watch("a", LIMITS, 100.0)
    told = [(now, change.before, change.after) for now in range(100, 120) for change in hearts.check(now)]
    assert told == [
        (102, Health.HEALTHY, Health.LATE),
        (105, Health.LATE, Health.MISSING),
        (110, Health.MISSING, Health.DEAD),
    ]


def test_a_long_gap_between_checks_tells_the_worst_only() -> None:
    hearts: Heartbeats[str] = Heartbeats()
    hearts.watch("a", LIMITS, 0)
    assert hearts.check(7) == (HealthChange("a", Health.HEALTHY, Health.MISSING, 7),)
    assert hearts.check(7) == ()


def test_the_longest_silent_comes_first() -> None:
    hearts: Heartbeats[str] = Heartbeats()
    hearts.watch("young", LIMITS, 3)
    hearts.watch("old", LIMITS, 0)
    assert [change.key for change in hearts.check(6)] == ["old", "young"]


def test_a_beat_recovers_and_says_so() -> None:
    hearts: Heartbeats[str] = Heartbeats()
    hearts.watch("a", LIMITS, 0)
    assert hearts.beat("a", 1) is None
    hearts.check(4)
    assert hearts.health("a") is Health.LATE
    assert hearts.beat("a", 4.5) == HealthChange("a", Health.LATE, Health.HEALTHY, 3.5)
    assert hearts.check(6) == ()


def test_the_dead_stay_dead_until_watched_anew() -> None:
    hearts: Heartbeats[str] = Heartbeats()
    hearts.watch("a", LIMITS, 0)
    hearts.check(10)
    assert hearts.beat("a", 11) is None
    assert hearts.health("a") is Health.DEAD
    assert hearts.next_check() is None
    hearts.watch("a", LIMITS, 20)
    assert hearts.health("a") is Health.HEALTHY


def test_strangers_do_not_matter() -> None:
    hearts: Heartbeats[str] = Heartbeats()
    assert hearts.beat("nobody", 1) is None
    assert hearts.health("nobody") is None
    assert not hearts.forget("nobody")
    hearts.watch("a", LIMITS, 0)
    assert hearts.forget("a")
    assert hearts.check(100) == ()
    assert hearts.next_check() is None


def test_a_clock_that_steps_back_stands_still() -> None:
    hearts: Heartbeats[str] = Heartbeats()
    hearts.watch("a", LIMITS, 10)
    assert hearts.beat("a", 3) is None
    assert hearts.check(5) == ()
    assert hearts.next_check() == 12


@pytest.mark.parametrize("limits", [(0, 1, 2), (2, 1, 3), (1, 3, 2), (-1, 1, 2)])
def test_limits_must_be_in_order(limits: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="need 0 < late_seconds <= missing_seconds <= dead_seconds, got"):
        HeartbeatLimits(*limits)


@given(
    st.lists(
        st.tuples(st.sampled_from(["beat", "check", "jump"]), st.floats(0, 20, allow_nan=False)), max_size=40
    )
)
def test_next_check_is_when_there_is_news_and_not_before(steps: list[tuple[str, float]]) -> None:
    hearts: Heartbeats[str] = Heartbeats()
    now = 0.0
    last_beat = 0.0
    hearts.watch("a", LIMITS, now)
    for what, gap in steps:
        due = hearts.next_check()
        if what == "jump" and due is not None and due > now:
            # Nothing just before; something exactly then: a loop that sleeps until then never spins.
            assert hearts.check(now + (due - now) * 0.99) == ()
            now = due
            assert len(hearts.check(now)) == 1
            continue
        now += gap
        if what == "beat":
            was_dead = hearts.health("a") is Health.DEAD
            hearts.beat("a", now)
            last_beat = last_beat if was_dead else now
        else:
            changes = hearts.check(now)
            assert bool(changes) == (due is not None and now >= due)
            assert hearts.health("a") == LIMITS.judge(last_beat, now)


def test_a_deadline_is_told_once() -> None:
    deadlines: Deadlines[int] = Deadlines()
    deadlines.begin(1, now=0, seconds=10)
    deadlines.begin(2, now=1, seconds=5)
    assert deadlines.next_check() == 6
    assert deadlines.check(5.9) == ()
    assert deadlines.check(20) == (Overdue(2, 1, 6), Overdue(1, 0, 10))
    assert deadlines.check(30) == ()
    assert deadlines.next_check() is None
    assert deadlines.end(1)
    assert not deadlines.end(1)


def test_what_ends_in_time_is_not_told() -> None:
    deadlines: Deadlines[int] = Deadlines()
    deadlines.begin(1, now=0, seconds=10)
    assert deadlines.end(1)
    assert deadlines.check(100) == ()


def test_beginning_again_replaces() -> None:
    deadlines: Deadlines[int] = Deadlines()
    deadlines.begin(1, now=0, seconds=10)
    assert deadlines.check(10) == (Overdue(1, 0, 10),)
    deadlines.begin(1, now=20, seconds=10)
    assert deadlines.check(25) == ()
    assert deadlines.check(30) == (Overdue(1, 20, 30),)


def test_a_deadline_lies_ahead() -> None:
    with pytest.raises(ValueError, match="above 0 seconds away, got 0"):
        Deadlines[int]().begin(1, now=0, seconds=0)
