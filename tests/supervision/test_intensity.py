# SPDX-License-Identifier: Apache-2.0
"""The restart window, by rows and against the plainest model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgpu.supervision import IntensityWindow


@pytest.mark.parametrize(
    ("intensity", "period", "times", "allowed"),
    [
        (1, 5, [0, 1], [True, False]),
        (1, 5, [0, 5], [True, False]),
        (1, 5, [0, 5.1], [True, True]),
        (0, 5, [0], [False]),
        (3, 10, [0, 1, 2, 3], [True, True, True, False]),
        (3, 10, [0, 4, 8, 12, 16, 20], [True] * 6),
        (3, 10, [0, 4, 8, 9], [True, True, True, False]),
        # A clock that steps back stands still.
        (1, 5, [10, 2, 15.5], [True, False, True]),
    ],
)
def test_rows(intensity: int, period: float, times: list[float], allowed: list[bool]) -> None:
    window = IntensityWindow(intensity, period)
    assert [window.record(time) for time in times] == allowed


@given(
    intensity=st.integers(0, 5),
    period=st.integers(1, 20),
    gaps=st.lists(st.integers(0, 15), max_size=40),
)
def test_against_counting(intensity: int, period: int, gaps: list[int]) -> None:
    window = IntensityWindow(intensity, period)
    now = 0
    times: list[int] = []
    for gap in gaps:
        now += gap
        times.append(now)
        recent = [time for time in times if now - time <= period]
        assert window.record(now) is (len(recent) <= intensity)
