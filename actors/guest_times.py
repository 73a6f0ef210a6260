# SPDX-License-Identifier: Apache-2.0
"""Where a program's threads spend their time, as its guest library says, made fit to be shown.

A guest writes ticks of its own counter, and what it takes a second for (``struct vgpu_guest_times`` in ``wire.h``). It may
write anything. Out of here come nanoseconds that never fall, never rise faster than ``THREADS`` threads could spend time, and
fit 64 bits. They are for people to look at: nothing may be decided, limited or charged by them. Values in, values out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import attrs

# Names in a sample's ``guest``, and in totals of a VM.
GUEST_TIMES: Final = (
    "encode_ns",
    "copy_ns",
    "sync_ns",
    "answer_wait_ns",
    "room_wait_ns",
    "held_sync_ns",
    "held_ring_ns",
    "held_ns",
    "ring_wait_ns",
)
GUEST_COUNTS: Final = ("sync_waits", "answer_waits", "room_waits", "encode_samples")

# More than any program has that waits for one GPU; an honest guest is far from it.
THREADS: Final = 1024
# Counters of processors tick at some billions a second; others are not believed.
TICKS_PER_SECOND: Final = range(1_000_000, 100_000_000_000)
LARGEST: Final = (1 << 63) - 1
# The word with the ticks, and the number that is made of it.
_TICKS: Final = {
    "encode_ticks": "encode_ns",
    "copy_ticks": "copy_ns",
    "sync_ticks": "sync_ns",
    "answer_ticks": "answer_wait_ns",
    "room_ticks": "room_wait_ns",
    "held_sync_ticks": "held_sync_ns",
    "held_ring_ticks": "held_ring_ns",
}


@attrs.define(eq=False)
class GuestTimes:
    """One session's numbers. ``since_ns``: it cannot have spent time before that (CLOCK_MONOTONIC)."""

    since_ns: int
    _shown: dict[str, int] = attrs.field(factory=lambda: dict.fromkeys((*GUEST_TIMES, *GUEST_COUNTS), 0))

    def take(self, words: Mapping[str, int], answered_ns: int, now_ns: int) -> dict[str, int]:
        """What to show for these ``words`` of the guest, read now.

        ``answered_ns`` is the worker's: how long it took over records whose caller waits. What else a caller waited, and what
        others waited for room, is ring wait, unless the host held the session back.
        """
        limit = min(max(now_ns - self.since_ns, 0) * THREADS, LARGEST)
        rate = words["ticks_per_second"]
        if rate in TICKS_PER_SECOND:
            for word, name in _TICKS.items():
                self._raise(name, words[word] * 1_000_000_000 // rate, limit)
        for name in GUEST_COUNTS:
            self._raise(name, words[name], LARGEST)
        shown = self._shown
        waited = shown["answer_wait_ns"] + shown["room_wait_ns"]
        self._raise("held_ns", shown["held_sync_ns"] + shown["held_ring_ns"], limit)
        self._raise("ring_wait_ns", waited - shown["held_ring_ns"] - answered_ns, limit)
        return dict(shown)

    def _raise(self, name: str, value: int, limit: int) -> None:
        # Invariant: what is shown never falls.
        self._shown[name] = max(self._shown[name], min(value, limit))
