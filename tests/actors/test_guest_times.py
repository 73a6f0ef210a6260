# SPDX-License-Identifier: Apache-2.0
"""What a guest says of its time is shown within bounds, whatever it says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vgpu.actors.guest_times import GUEST_COUNTS, GUEST_TIMES, LARGEST, THREADS, GuestTimes
from vgpu.transport.layout import GUEST_TIME_FIELDS

BEGAN = 5_000_000_000
SECOND = 1_000_000_000
RATE = 2_500_000_000


def words(**given_words: int) -> dict[str, int]:
    return {name: given_words.get(name, 0) for name in GUEST_TIME_FIELDS}


def honest(**seconds: float) -> dict[str, int]:
    """Words of a guest with a counter of 2.5 GHz."""
    said = words(ticks_per_second=RATE)
    return said | {f"{name}_ticks": int(value * RATE) for name, value in seconds.items()}


def test_ticks_become_nanoseconds() -> None:
    shown = GuestTimes(BEGAN).take(
        honest(encode=0.5, copy=0.25, sync=2, answer=3, room=1, held_sync=0.5, held_ring=1.5),
        500_000_000,
        BEGAN + 4 * SECOND,
    )
    assert shown == {
        "encode_ns": 500_000_000,
        "copy_ns": 250_000_000,
        "sync_ns": 2 * SECOND,
        "answer_wait_ns": 3 * SECOND,
        "room_wait_ns": SECOND,
        "held_sync_ns": 500_000_000,
        "held_ring_ns": 1_500_000_000,
        "held_ns": 2 * SECOND,
        # Four seconds of waiting for the worker; held back in 1.5 of them, and 0.5 were its work.
        "ring_wait_ns": 2 * SECOND,
        **dict.fromkeys(GUEST_COUNTS, 0),
    }


def test_nothing_is_shown_before_the_guest_knows_its_clock() -> None:
    times = GuestTimes(BEGAN)
    assert not any(times.take(words(sync_ticks=10**9), 0, BEGAN + SECOND).values())
    assert times.take(honest(sync=0.5), 0, BEGAN + SECOND)["sync_ns"] == SECOND // 2


def test_ones_everywhere_are_no_more_than_threads_can_wait() -> None:
    shown = GuestTimes(BEGAN).take(dict.fromkeys(GUEST_TIME_FIELDS, 2**64 - 1), 0, BEGAN + SECOND)
    assert all(shown[name] == 0 for name in GUEST_TIMES)  # no processor ticks so fast
    shown = GuestTimes(BEGAN).take(
        dict.fromkeys(GUEST_TIME_FIELDS, 2**64 - 1) | {"ticks_per_second": RATE}, 0, BEGAN + SECOND
    )
    # Held back for all the time it waited: nothing is left for the ring, or all of what two waits may be.
    assert all(shown[name] <= THREADS * SECOND for name in GUEST_TIMES)
    assert shown["sync_ns"] == THREADS * SECOND
    assert all(shown[name] == LARGEST for name in GUEST_COUNTS)


def test_numbers_that_fall_are_shown_as_they_were() -> None:
    times = GuestTimes(BEGAN)
    before = times.take(honest(encode=0.5, sync=2, answer=3), 0, BEGAN + 4 * SECOND)
    assert times.take(honest(encode=0.1, sync=1), 0, BEGAN + 5 * SECOND) == before
    assert times.take(words(), 0, BEGAN + 5 * SECOND) == before  # a slot that is zeroed already
    # More is again more.
    assert times.take(honest(sync=3), 0, BEGAN + 6 * SECOND)["sync_ns"] == 3 * SECOND


def test_the_worker_took_longer_than_the_guest_waited() -> None:
    shown = GuestTimes(BEGAN).take(honest(answer=1), 2 * SECOND, BEGAN + 4 * SECOND)
    assert shown["ring_wait_ns"] == 0


said = st.fixed_dictionaries(
    {name: st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 2**33)) for name in GUEST_TIME_FIELDS}
)


@given(st.lists(st.tuples(said, st.integers(0, 2**63), st.integers(0, 2**40)), max_size=8))
def test_whatever_it_says_stays_within_bounds(looks: list[tuple[dict[str, int], int, int]]) -> None:
    times, now = GuestTimes(BEGAN), BEGAN
    last = dict.fromkeys((*GUEST_TIMES, *GUEST_COUNTS), 0)
    for heard, answered_ns, later in looks:
        now += later
        shown = times.take(heard, answered_ns, now)
        assert shown.keys() == last.keys()
        for name, value in shown.items():
            assert last[name] <= value <= LARGEST
        assert all(shown[name] <= (now - BEGAN) * THREADS for name in GUEST_TIMES)
        last = shown
