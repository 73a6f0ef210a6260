# SPDX-License-Identifier: Apache-2.0
"""How many restarts are too many: a sliding window, pure, with time as an argument."""

from __future__ import annotations

from collections import deque
from typing import final

__all__ = ["IntensityWindow"]


@final
class IntensityWindow:
    """Allows `intensity` restarts within any `period_seconds`; the next one is one too many.

    Invariant: nothing in `_times` is older than the period, as of the last record, and in order.
    """

    def __init__(self, intensity: int, period_seconds: float) -> None:
        self._intensity = intensity
        self._period = period_seconds
        self._times: deque[float] = deque()

    def record(self, now: float) -> bool:
        """Count a restart at `now` and say whether it may go ahead. A clock that steps back counts as standing."""
        if self._times:
            now = max(now, self._times[-1])
        self._times.append(now)
        while self._times[0] < now - self._period:
            self._times.popleft()
        return len(self._times) <= self._intensity
