# SPDX-License-Identifier: Apache-2.0
"""The token bucket of session starts: never more than its rate and burst, and never less for who keeps to it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vgpu.actors.start_bucket import StartBucket, StartRate


def test_a_burst_and_then_the_rate() -> None:
    bucket = StartBucket(StartRate(2.0, 3))
    assert [bucket.take(10.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert bucket.take(10.25) == 0.25
    assert bucket.take(10.5) == 0.0
    assert bucket.take(10.5) == 0.5
    assert [bucket.take(1000.0) for _ in range(4)] == [
        0.0,
        0.0,
        0.0,
        0.5,
    ]  # a long rest fills it, and no more


def test_no_rate_is_no_limit() -> None:
    bucket = StartBucket(StartRate(0.0, 1))
    assert all(bucket.take(1.0) == 0.0 for _ in range(1000))


@given(
    st.lists(st.floats(0, 5, allow_nan=False), min_size=1, max_size=200),
    st.integers(1, 20),
    st.floats(0.5, 50),
)
def test_in_any_time_no_more_than_rate_and_burst(pauses: list[float], burst: int, rate: float) -> None:
    bucket, now, granted = StartBucket(StartRate(rate, burst)), 0.0, []
    for pause in pauses:
        now += pause
        wait = bucket.take(now)
        assert wait >= 0.0
        if wait == 0.0:
            granted.append(now)
        else:
            assert wait <= 1 / rate + 1e-9
    for first in range(len(granted)):
        for last in range(first, len(granted)):
            assert last - first + 1 <= burst + rate * (granted[last] - granted[first]) + 1e-6
