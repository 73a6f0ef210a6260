# SPDX-License-Identifier: Apache-2.0
"""Is a session hung? A pure core over readings of its counters.

What counts as getting on is what its guest cannot make up. For the device: marks that it sets itself behind launches,
in memory of the worker's. For a call in the driver: that another one is in its place. Calls that are consumed tell
nothing of the device, for a program that polls a hung kernel makes many; fences tell little, for their words
are the guest's to write, and they are looked at only where a device sets no marks.

A session that has work on the device is hung when no mark of it has been set for as long as the deadline. One whose other streams
get on is given several deadlines: kernels may wait for those of another stream. A long queue of short
kernels sets marks all the time. Calls that wait for a lease are on nobody's way and are not looked at.

Only time counts in which the session could have got on. A worker that a signal has stopped is told apart: it is given the deadline
to go on, and then what it had begun has the whole deadline again. While it is in a call, time that its thread was ready and
had no processor does not count, up to some deadlines. And where the watchdog itself did not look for long, as on a host that stood
still, what it did not see counts for a quarter of the deadline at most. (Times without a processor between two looks at the device
are the worker's to leave out: gpu/replay/pulse.c.)

Times are nanoseconds of one monotonic clock; nothing here reads a clock.
"""

from __future__ import annotations

import attrs

__all__ = ["PATIENCE", "STOPPED", "Hang", "Progress", "ProgressWatch"]

# Deadlines that a stream without progress is given while others of its session get on, and a call without a processor.
PATIENCE = 4
# Of a deadline: what goes by unseen between two readings counts for so much at most.
UNSEEN = 0.25
STOPPED = "a stopped worker"


@attrs.frozen
class Progress:
    """A reading. Times are 0 where there is nothing to tell; ``oldest_mark_ns`` and ``last_mark_ns`` are as of ``looked_ns``."""

    records: int = 0
    in_call: bool = False  # a call is in the driver after so many records
    oldest_mark_ns: int = 0  # a stream with work has not got on since
    last_mark_ns: int = 0  # any stream got on then
    looked_ns: int = 0
    fences_done: int = 0
    oldest_fence_ns: int = 0
    is_stopped: bool = False  # the worker, by a signal
    starved_ns: int = 0  # its thread was ready to run and had no processor; told while it is in a call


@attrs.frozen
class Hang:
    """A verdict: ``what`` does not end ("a kernel", "a call", STOPPED), and since when."""

    what: str
    since_ns: int


@attrs.define(eq=False)
class ProgressWatch:
    """One session's judge. Feed it readings; it says when something has taken longer than the deadline."""

    deadline_ns: int
    _last: Progress | None = None
    _seen_ns: int = 0  # the last reading
    _call_ns: int = 0  # the call in the driver has been there when first seen at
    _call_starved_ns: int = 0  # what starved_ns was then
    _fence_ns: int = 0  # a fence was last seen to be done at
    _stopped_ns: int = 0  # the worker has been stopped when first seen at
    _resumed_ns: int = 0  # it was last seen to go on at

    @property
    def is_stopped(self) -> bool:
        """Was the worker stopped at the last reading?"""
        return self._last is not None and self._last.is_stopped

    def observe(self, progress: Progress, now: int) -> Hang | None:
        """Take a reading at ``now``; the hang, once there is one."""
        last, self._last = self._last, progress
        unseen = now - self._seen_ns - int(UNSEEN * self.deadline_ns)
        self._seen_ns = now
        if last is not None and unseen > 0:
            self._call_ns += unseen
            self._fence_ns += unseen
            self._stopped_ns += unseen
        if progress.is_stopped:
            # Other records: it went on for a moment, between two readings.
            if last is None or not last.is_stopped or last.records != progress.records:
                self._stopped_ns = now
            return next(
                (hang for hang, _, allowed in self._waits(progress) if now - hang.since_ns >= allowed), None
            )
        goes_on = last is not None and last.is_stopped
        if goes_on:
            self._resumed_ns = now
        if last is None or goes_on or not last.in_call or last.records != progress.records:
            self._call_ns, self._call_starved_ns = now, progress.starved_ns
        if last is None or goes_on or last.fences_done != progress.fences_done:
            self._fence_ns = now
        for hang, at, allowed in self._waits(progress):
            if (at or now) - hang.since_ns >= allowed:
                return hang
        return None

    def due(self) -> int | None:
        """The earliest time at which a reading like the last one would be a hang; None: never."""
        if self._last is None:
            return None
        return min((hang.since_ns + allowed for hang, _, allowed in self._waits(self._last)), default=None)

    def _waits(self, progress: Progress) -> list[tuple[Hang, int, int]]:
        """What is being waited for, as of when (0: now), and how long it may take."""
        if progress.is_stopped:
            return [(Hang(STOPPED, self._stopped_ns), 0, self.deadline_ns)]
        found = []
        if progress.in_call:
            starved = max(progress.starved_ns - self._call_starved_ns, 0)
            allowed = min(self.deadline_ns + starved, PATIENCE * self.deadline_ns)
            found.append((Hang("a call", self._call_ns), 0, allowed))
        if progress.oldest_mark_ns:
            # As of the last look: while the worker is in a call it does not look, and that call is judged instead.
            since = max(progress.oldest_mark_ns, progress.last_mark_ns, self._resumed_ns)
            longest = max(progress.oldest_mark_ns, self._resumed_ns)
            looked = progress.looked_ns
            found.append((Hang("a kernel", since), looked, self.deadline_ns))
            found.append((Hang("a kernel", longest), looked, PATIENCE * self.deadline_ns))
        if progress.oldest_fence_ns and not progress.looked_ns and not progress.in_call:
            since = max(progress.oldest_fence_ns, self._fence_ns)
            found.append((Hang("a kernel", since), 0, self.deadline_ns))
        return found
