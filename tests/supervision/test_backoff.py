# SPDX-License-Identifier: Apache-2.0
"""Back-off: bounds of the delays, the same delays from the same seed, and when to give up."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import tenacity
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from vgpu.supervision import Backoff, WaitJittered

ERROR = RuntimeError("no")


def _delays(backoff: Backoff, count: int) -> list[float | None]:
    schedule = backoff.begin(0.0)
    return [schedule.failed(0.0, ERROR) for _ in range(count)]


def test_without_jitter_the_delays_double_up_to_the_limit() -> None:
    wait = WaitJittered(Random(1), initial_seconds=0.1, maximum_seconds=1.0, jitter=0)
    assert _delays(Backoff(wait), 6) == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])


@given(
    seed=st.integers(),
    initial=st.floats(0.001, 10),
    times=st.floats(1, 1000),
    factor=st.floats(1, 10),
    jitter=st.floats(0, 1),
)
def test_every_delay_is_within_its_bounds(
    seed: int, initial: float, times: float, factor: float, jitter: float
) -> None:
    def make() -> Backoff:
        wait = WaitJittered(
            Random(seed),
            initial_seconds=initial,
            maximum_seconds=initial * times,
            factor=factor,
            jitter=jitter,
        )
        return Backoff(wait, tenacity.stop_never)

    delays = _delays(make(), 100)
    for number, delay in enumerate(delays):
        ceiling = min(initial * times, initial * factor ** min(number, 64))
        assert delay is not None
        assert ceiling * (1 - jitter) * 0.999 <= delay <= ceiling * 1.001
    # A seeded generator makes it repeatable.
    assert _delays(make(), 100) == delays


def test_attempts_run_out() -> None:
    backoff = Backoff(WaitJittered(Random(1)), tenacity.stop_after_attempt(3))
    delays = _delays(backoff, 3)
    assert delays[2] is None
    assert None not in delays[:2]


def test_time_runs_out_on_the_clock_that_is_passed_in() -> None:
    schedule = Backoff(WaitJittered(Random(1)), tenacity.stop_after_delay(10)).begin(1000.0)
    assert schedule.failed(1001.0, ERROR) is not None
    assert schedule.failed(1009.0, ERROR) is not None
    assert schedule.failures == 2
    assert schedule.failed(1010.0, ERROR) is None


def test_any_tenacity_wait_will_do() -> None:
    backoff = Backoff(tenacity.wait_fixed(2) + tenacity.wait_fixed(1), tenacity.stop_never)
    assert _delays(backoff, 2) == [3, 3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"initial_seconds": 0}, "got 0 and 10.0"),
        ({"initial_seconds": 2, "maximum_seconds": 1}, "got 2 and 1"),
        ({"factor": 0.5}, "factor must be at least 1, got 0.5"),
        ({"jitter": 1.5}, "jitter must be from 0 to 1, got 1.5"),
    ],
)
def test_wrong_fields(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WaitJittered(Random(1), **fields)


async def test_clients_repeat_on_trios_clock(autojump_clock: MockClock) -> None:
    tries = 0

    async def flaky() -> str:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise ConnectionError("not yet")
        return "there"

    wait = WaitJittered(Random(1), initial_seconds=1, maximum_seconds=100, jitter=0)
    began = trio.current_time()
    assert await Backoff(wait).retrying(ConnectionError)(flaky) == "there"
    assert trio.current_time() - began == pytest.approx(1 + 2 + 4)


async def test_clients_get_the_last_error(autojump_clock: MockClock) -> None:
    async def never() -> None:
        raise ConnectionError("never")

    async def other() -> None:
        raise KeyError("not ours")

    backoff = Backoff(WaitJittered(Random(1)), tenacity.stop_after_attempt(2))
    with pytest.raises(ConnectionError, match="never"):
        await backoff.retrying(ConnectionError)(never)
    with pytest.raises(KeyError):
        await backoff.retrying(ConnectionError)(other)


@pytest.mark.parametrize("value", [-1, float("inf"), float("nan"), True, "1", None])
def test_reset_after_is_checked(value: Any) -> None:
    with pytest.raises(ValueError, match="reset_after_seconds must be a number of seconds from 0, got"):
        Backoff(reset_after_seconds=value)
