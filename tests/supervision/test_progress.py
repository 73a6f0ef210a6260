# SPDX-License-Identifier: Apache-2.0
"""Hangs are told from long queues, and nothing that a guest can make up counts as progress."""

from __future__ import annotations

import attrs
from hypothesis import given
from hypothesis import strategies as st

from vgpu.supervision._progress import PATIENCE, STOPPED, Hang, Progress, ProgressWatch

S = 1_000_000_000


def look(watch: ProgressWatch, reading: Progress, begin: int, end: int, step: int = S // 10) -> list[int]:
    """Show it the same reading again and again; the times at which that was a hang."""
    return [now for now in range(begin, end + 1, step) if watch.observe(reading, now) is not None]


def test_a_kernel_past_its_deadline_is_a_hang() -> None:
    watch = ProgressWatch(30 * S)
    for second in (100, 129):
        reading = Progress(oldest_mark_ns=100 * S, last_mark_ns=99 * S, looked_ns=second * S)
        assert watch.observe(reading, second * S) is None
        assert watch.due() == 130 * S
    reading = Progress(oldest_mark_ns=100 * S, last_mark_ns=99 * S, looked_ns=130 * S)
    assert watch.observe(reading, 130 * S) == Hang("a kernel", 100 * S)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=40), st.integers(1, 60))
def test_polling_is_no_progress(polls: list[int], deadline: int) -> None:
    """However many calls are consumed and fences forged, a hung kernel is found at its deadline and not before."""
    watch = ProgressWatch(deadline * S)
    made = 0
    for step, count in enumerate(polls):
        made += count
        now = 100 * S + step * S
        reading = Progress(made, step % 2 == 0, 100 * S, 50 * S, now, fences_done=made, oldest_fence_ns=now)
        hang = watch.observe(reading, now)
        assert (hang is not None) == (step >= deadline)


def test_nothing_awaited_is_never_a_hang() -> None:
    watch = ProgressWatch(30 * S)
    idle = Progress(records=10, fences_done=3, looked_ns=90 * S, last_mark_ns=90 * S)
    assert all(watch.observe(idle, t * S) is None for t in range(100, 1000, 10))
    assert watch.due() is None


@given(st.lists(st.floats(0.01, 0.95), min_size=1, max_size=60))
def test_a_queue_whose_kernels_keep_their_deadline_is_not_hung(gaps: list[float]) -> None:
    watch = ProgressWatch(10 * S)
    last = 100 * S
    for gap in gaps:
        now = last + int(gap * 10 * S)
        assert watch.observe(Progress(5, False, last, last, now), now) is None
        last = now


def test_a_stream_without_progress_is_found_though_others_get_on() -> None:
    watch = ProgressWatch(2 * S)
    for now in range(100 * S, (100 + 2 * PATIENCE) * S, S // 10):
        assert watch.observe(Progress(0, False, 100 * S, now, now), now) is None
    now = (100 + 2 * PATIENCE) * S
    assert watch.observe(Progress(0, False, 100 * S, now, now), now) == Hang("a kernel", 100 * S)


def test_a_call_is_judged_from_when_it_was_first_seen() -> None:
    watch = ProgressWatch(2 * S)
    assert watch.observe(Progress(records=7), 10 * S) is None
    assert watch.observe(Progress(records=7, in_call=True), 11 * S) is None
    assert watch.due() == 13 * S
    assert look(watch, Progress(records=7, in_call=True), 11 * S, 13 * S - 1) == []
    assert watch.observe(Progress(records=7, in_call=True), 13 * S) == Hang("a call", 11 * S)


def test_many_calls_one_after_the_other_are_no_hang() -> None:
    watch = ProgressWatch(2 * S)
    assert all(watch.observe(Progress(records=n, in_call=True), n * S) is None for n in range(100))


def test_what_the_device_did_during_a_call_is_not_held_against_it() -> None:
    """The worker cannot look while it compiles: what it saw last is old, not what is so now."""
    watch = ProgressWatch(30 * S)
    before = Progress(7, True, oldest_mark_ns=100 * S, last_mark_ns=100 * S, looked_ns=101 * S)
    assert all(watch.observe(before, t * S) is None for t in range(120, 149))


def test_fences_are_judged_only_where_there_are_no_marks() -> None:
    watch = ProgressWatch(5 * S)
    stuck = Progress(fences_done=3, oldest_fence_ns=100 * S)
    assert look(watch, stuck, 101 * S, 106 * S) == [106 * S]
    marked = ProgressWatch(5 * S)
    assert all(marked.observe(attrs.evolve(stuck, looked_ns=1), t * S) is None for t in range(100, 150))


def test_a_stopped_worker_has_the_deadline_to_go_on() -> None:
    watch = ProgressWatch(2 * S)
    assert watch.observe(Progress(7), 99 * S) is None
    stopped = Progress(7, is_stopped=True)
    assert look(watch, stopped, 100 * S, 102 * S - 1) == []
    assert (watch.is_stopped, watch.due()) == (True, 102 * S)
    assert watch.observe(stopped, 102 * S) == Hang(STOPPED, 100 * S)


def test_a_worker_that_went_on_for_a_moment_begins_anew() -> None:
    watch = ProgressWatch(2 * S)
    assert look(watch, Progress(7, is_stopped=True), 100 * S, 101 * S) == []
    assert look(watch, Progress(8, is_stopped=True), 101 * S, 103 * S - 1) == []
    assert watch.observe(Progress(8, is_stopped=True), 103 * S) is not None


def test_what_a_stopped_worker_had_begun_has_its_whole_deadline_again() -> None:
    """Its call, and its kernel: it may have ended long ago, and nobody could look."""
    call = ProgressWatch(2 * S)
    assert look(call, Progress(7, True), 100 * S, 101 * S) == []
    assert look(call, Progress(7, True, is_stopped=True), 101 * S, 102 * S) == []
    assert look(call, Progress(7, True), 102 * S + S // 10, 105 * S)[0] == 104 * S + S // 10
    kernel = ProgressWatch(2 * S)
    begun = Progress(7, oldest_mark_ns=100 * S, looked_ns=100 * S)
    assert look(kernel, begun, 100 * S, 101 * S) == []
    assert look(kernel, attrs.evolve(begun, is_stopped=True), 101 * S, 102 * S) == []
    found = [
        now
        for now in range(103 * S, 106 * S, S // 10)
        if kernel.observe(attrs.evolve(begun, looked_ns=now), now)
    ]
    assert found[0] == 105 * S


def test_a_call_without_a_processor_is_given_more_time_but_not_for_ever() -> None:
    """Half of the time it has none: twice the deadline. Always: the patience there is."""
    half = ProgressWatch(2 * S)
    times = range(100 * S, 110 * S, S // 10)
    found = [
        now for now in times if half.observe(Progress(7, True, starved_ns=5 * S + (now - 100 * S) // 2), now)
    ]
    assert found[0] == 104 * S
    none = ProgressWatch(2 * S)
    found = [now for now in times if none.observe(Progress(7, True, starved_ns=5 * S + now - 100 * S), now)]
    assert found[0] == (100 + 2 * PATIENCE) * S


def test_what_nobody_saw_counts_for_little() -> None:
    """The whole host stood still, or the mediator did: whoever was in a call then could not get on, or nobody knows."""
    watch = ProgressWatch(20 * S)
    assert look(watch, Progress(7, True), 100 * S, 105 * S) == []
    assert watch.observe(Progress(7, True), 1000 * S) is None
    assert look(watch, Progress(7, True), 1000 * S, 1020 * S)[0] == 1010 * S
