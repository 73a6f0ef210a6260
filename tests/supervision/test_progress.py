# SPDX-License-Identifier: Apache-2.0
"""Hangs are told from long queues."""

from __future__ import annotations

from vgpu.supervision._progress import Progress, ProgressWatch

S = 1_000_000_000


def test_a_kernel_past_its_deadline_is_a_hang() -> None:
    watch = ProgressWatch(30 * S)
    stuck = Progress(records=10, fences_done=3, launches=5, waiting_since_ns=100 * S)
    assert not watch.observe(stuck, 100 * S)
    assert not watch.observe(stuck, 129 * S)
    assert watch.observe(stuck, 131 * S)


def test_nothing_awaited_is_never_a_hang() -> None:
    watch = ProgressWatch(30 * S)
    idle = Progress(records=10, fences_done=3, launches=5, waiting_since_ns=0)
    assert not any(watch.observe(idle, t * S) for t in range(100, 1000, 10))


def test_a_long_queue_of_short_kernels_moves_and_is_not_a_hang() -> None:
    watch = ProgressWatch(30 * S)
    for step in range(100):
        reading = Progress(records=step, fences_done=0, launches=step, waiting_since_ns=100 * S)
        assert not watch.observe(reading, (100 + step) * S)


def test_a_short_deadline_is_kept() -> None:
    watch = ProgressWatch(S // 2)
    stuck = Progress(records=1, fences_done=0, launches=1, waiting_since_ns=10 * S)
    assert not watch.observe(stuck, 10 * S)
    assert not watch.observe(stuck, 10 * S + S // 4)
    assert watch.observe(stuck, 10 * S + S * 6 // 10)


def test_an_old_wait_seen_for_the_first_time_is_given_a_moment() -> None:
    # After a restart of the watchdog: the wait is older than the deadline, but it may just be finishing.
    watch = ProgressWatch(30 * S)
    stuck = Progress(records=1, fences_done=0, launches=1, waiting_since_ns=10 * S)
    assert not watch.observe(stuck, 100 * S)
    assert watch.observe(stuck, 101 * S)
