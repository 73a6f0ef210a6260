# SPDX-License-Identifier: Apache-2.0
"""GPU time as counted against NVML's: the windows and what they must not make up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vgpu.gpu.drift import DriftMeter, GpuTimeWindow

SECOND = 1_000_000_000
START = 50 * SECOND


def fed(*rows: tuple[float, dict[int, float], float | None]) -> tuple[DriftMeter, int]:
    """Looks at these seconds with these totals in seconds; the meter and the time of the last look."""
    meter = DriftMeter()
    now = START
    for at, totals, nvml in rows:
        now = START + int(at * SECOND)
        meter.look(now, {session: int(total * SECOND) for session, total in totals.items()}, nvml)
    return meter, now


def by_seconds(meter: DriftMeter, now: int) -> dict[float, GpuTimeWindow]:
    return {window.seconds: window for window in meter.windows(now)}


def steady(
    share: float, nvml: float | None, seconds: int
) -> Iterator[tuple[float, dict[int, float], float | None]]:
    return ((float(at), {1: share * at}, nvml) for at in range(seconds + 1))


def test_what_is_counted_rightly_has_no_drift() -> None:
    found = by_seconds(*fed(*steady(0.5, 0.5, 20)))
    assert set(found) == {10.0, 60.0}
    for window in found.values():
        assert window.counted_ratio == pytest.approx(0.5)
        assert window.nvml_ratio == pytest.approx(0.5)
        assert window.drift_ratio == pytest.approx(0.0)


@pytest.mark.parametrize(("ours", "theirs"), [(0.9, 0.6), (0.1, 0.8)])
def test_the_sign_says_who_counts_more(ours: float, theirs: float) -> None:
    for window in by_seconds(*fed(*steady(ours, theirs, 70))).values():
        assert window.drift_ratio == pytest.approx(ours - theirs)


def test_windows_slide() -> None:
    """Ten seconds of work, then none: the short window forgets it, the long one does not."""
    rows = [(float(at), {1: float(min(at, 10))}, 1.0 if 0 < at <= 10 else 0.0) for at in range(31)]
    found = by_seconds(*fed(*rows))
    assert found[10.0].counted_ratio == 0.0
    assert found[60.0].counted_ratio == pytest.approx(10 / 30)
    assert found[60.0].drift_ratio == pytest.approx(0.0)


def test_sessions_that_overlap_count_above_one_and_drift_from_one() -> None:
    rows = [(float(at), {1: 0.9 * at, 2: 0.9 * at}, 1.0) for at in range(12)]
    window = by_seconds(*fed(*rows))[10.0]
    assert window.counted_ratio == pytest.approx(1.8)
    assert window.drift_ratio == pytest.approx(0.0)


def test_what_nvml_does_not_say_is_not_made_up() -> None:
    window = by_seconds(*fed(*steady(0.5, None, 20)))[10.0]
    assert window.counted_ratio == pytest.approx(0.5)
    assert (window.nvml_ratio, window.workers_ratio, window.drift_ratio) == (None, None, None)


def test_only_the_time_of_which_nvml_speaks_is_compared() -> None:
    """Five seconds with NVML, five without: drift is that of the first."""
    rows: list[tuple[float, dict[int, float], float | None]] = [
        (float(at), {1: 0.5 * min(at, 5)}, 0.5 if at <= 5 else None) for at in range(11)
    ]
    window = by_seconds(*fed(*rows))[10.0]
    assert window.counted_ratio == pytest.approx(0.25)
    assert window.nvml_ratio == pytest.approx(0.5)
    assert window.drift_ratio == pytest.approx(0.0)


def test_a_pause_longer_than_nvml_remembers_is_compared_with_nothing() -> None:
    """Who scrapes every twenty seconds sees NVML's last second, not the twenty."""
    window = by_seconds(
        *fed((0, {1: 0.0}, 0.0), (20, {1: 10.0}, 1.0), (21, {1: 10.0}, 0.0), (22, {1: 10.0}, 0.0))
    )
    assert window[60.0].counted_ratio == pytest.approx(10 / 22)
    assert (window[60.0].nvml_ratio, window[60.0].drift_ratio) == (0.0, 0.0)


def test_little_time_says_nothing_and_old_looks_neither() -> None:
    meter, now = fed((0, {}, 0.5), (0.5, {}, 0.5))
    assert meter.windows(now) == ()
    meter, now = fed(*steady(0.5, 0.5, 20))
    assert [window.seconds for window in meter.windows(now + 15 * SECOND)] == [60.0]
    assert meter.windows(now + 100 * SECOND) == ()
    assert DriftMeter().windows(START) == ()


def test_a_session_that_comes_in_or_was_adopted_counts_for_no_more_than_the_time_since_the_last_look() -> (
    None
):
    rows = [(0.0, {}, 1.0), *((float(at), {7: 1000.0 + at}, 1.0) for at in range(1, 11))]
    assert by_seconds(*fed(*rows))[10.0].counted_ratio == pytest.approx(1.0)


def test_a_session_that_does_not_answer_once_is_counted_when_it_does() -> None:
    rows = [(float(at), {} if at == 5 else {1: 0.5 * at}, 0.5) for at in range(11)]
    assert by_seconds(*fed(*rows))[10.0].counted_ratio == pytest.approx(0.5)


def test_the_last_work_of_a_session_that_ended_is_counted_once() -> None:
    meter, now = fed(*((float(at), {1: float(at)}, 1.0) for at in range(9)))
    meter.ended(1, int(8.7 * SECOND), now + int(0.8 * SECOND))
    meter.look(now + 1 * SECOND, {}, 0.7)
    meter.look(now + 2 * SECOND, {}, 0.0)
    (short, _) = meter.windows(now + 2 * SECOND)
    assert short.counted_ratio == pytest.approx(8.7 / 10)
    assert short.drift_ratio == pytest.approx(0.0)


def test_a_session_that_began_and_ended_between_two_looks_is_counted() -> None:
    meter, now = fed((0, {}, 0.0))
    meter.ended(3, int(0.4 * SECOND), now + int(0.9 * SECOND))
    meter.look(now + 2 * SECOND, {}, 0.2)
    assert meter.windows(now + 2 * SECOND)[0].counted_ratio == pytest.approx(0.2)


def test_workers_are_shown_where_nvml_tells_processes_apart() -> None:
    meter = DriftMeter()
    for at in range(12):
        meter.look(START + at * SECOND, {1: at * SECOND}, 1.0, 0.3)
    assert meter.windows(START + 11 * SECOND)[0].workers_ratio == pytest.approx(0.3)
