# SPDX-License-Identifier: Apache-2.0
"""When a VM has made too many faults: the window against a model, and a clock that jumps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vgpu.actors.fault_messages import QuarantineRule
from vgpu.supervision._quarantine import reached

RULE = QuarantineRule(3, 600.0)


def test_the_third_fault_in_ten_minutes() -> None:
    assert reached(RULE, [0, 300], 300) == 0
    assert reached(RULE, [0, 300, 599], 599) == 3
    assert reached(RULE, [0, 300, 600], 600) == 0  # the first is ten minutes ago


def test_no_faults_is_never() -> None:
    assert reached(QuarantineRule(0, 600.0), [1.0] * 100, 1.0) == 0


def test_a_clock_that_was_set_back() -> None:
    assert reached(RULE, [100, 200, 300], 150) == 3
    assert reached(RULE, [10_000, 10_001, 10_002], 150) == 0  # nobody knows when that was


@given(
    st.lists(st.integers(0, 5000), max_size=30),
    st.integers(1, 6),
    st.integers(1, 2000),
)
def test_judged_at_each_fault_it_is_reached_exactly_when_a_window_holds_so_many(
    times: list[int], faults: int, seconds: int
) -> None:
    times.sort()
    rule = QuarantineRule(faults, float(seconds))
    judged = [reached(rule, times[: n + 1], now) > 0 for n, now in enumerate(times)]
    model = [sum(now - seconds < at for at in times[: n + 1]) >= faults for n, now in enumerate(times)]
    assert judged == model
