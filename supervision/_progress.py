# SPDX-License-Identifier: Apache-2.0
"""Is a session hung? A pure core over two readings of its counters.

A session is hung when one thing it waits for has been outstanding longer than its deadline and nothing
at all has moved meanwhile: no fence finished, no call consumed. A long queue of short kernels moves, so
it is not hung. Times are nanoseconds of one monotonic clock; nothing here reads a clock.
"""

from __future__ import annotations

import attrs


@attrs.frozen
class Progress:
    """What is compared: everything that changes while a session gets on."""

    records: int
    fences_done: int
    launches: int
    # When the oldest unfinished fence was issued, or the call now in the driver was taken. 0: nothing is awaited.
    waiting_since_ns: int


@attrs.define(eq=False)
class ProgressWatch:
    """One session's judge. Feed it readings; it says when the deadline has passed without progress."""

    deadline_ns: int
    _last: Progress | None = None
    _moved_ns: int = 0

    def observe(self, progress: Progress, now: int) -> bool:
        """Take a reading at ``now``.

        Returns:
            True once the session has awaited the same thing for longer than the deadline.
        """
        if self._last is None or progress != self._last or progress.waiting_since_ns == 0:
            self._last = progress
            self._moved_ns = now
            return False
        since = max(progress.waiting_since_ns, self._moved_ns - self.deadline_ns)
        return now - since > self.deadline_ns and now - self._moved_ns >= min(self.deadline_ns, SETTLE_NS)


# A reading that has not changed for this long counts as standing still; shorter deadlines shorten it.
SETTLE_NS = 1_000_000_000
