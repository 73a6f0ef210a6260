# SPDX-License-Identifier: Apache-2.0
"""GPU time as workers count it, against what the card says of itself: how far the two are apart, over sliding windows.

Shares are charged in time that workers measure by the host's clock, around their own work. Whether that is the card's time can only
be seen from outside, and NVML is outside: its utilisation is the part of its sample period (a sixth of a second to one second) in
which any kernel of anybody ran. So the two agree but for the windows' edges, while nobody else uses the card; see
docs/scheduling.md for when they cannot.

Pure: is told the time and reads no clock. It must never make up what NVML did not say: time between two looks that are too far
apart for its sample period to tell of is counted, and compared with nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Final

import attrs

WINDOW_SECONDS: Final = (10.0, 60.0)
# A look tells of the last second at most; after a longer pause nobody knows what was in between.
LONGEST_LOOK_NS: Final = 3_000_000_000
# Less than this is mostly edges.
LEAST_COMPARED_NS: Final = 1_000_000_000


@attrs.frozen
class GpuTimeWindow:
    """One window up to the last look; ratios are parts of the time that was looked at. None: nobody says.

    ``counted_ratio``: the sum over sessions, so above 1 where they overlapped. ``drift_ratio``: counted, at most 1, less
    ``nvml_ratio``, both over the time in which NVML said something. ``workers_ratio``: multiprocessors of the card that our
    worker processes used, where NVML tells processes apart.
    """

    seconds: float
    counted_ratio: float
    nvml_ratio: float | None = None
    workers_ratio: float | None = None
    drift_ratio: float | None = None


@attrs.frozen
class _Stretch:
    """Between two looks."""

    end_ns: int
    length_ns: int
    counted_ns: int
    nvml: float | None
    workers: float | None


@attrs.define(eq=False)
class DriftMeter:
    """One GPU."""

    window_seconds: tuple[float, ...] = WINDOW_SECONDS
    _stretches: deque[_Stretch] = attrs.Factory(deque)
    _totals: dict[int, int] = attrs.Factory(dict)  # GPU time of each session when it was last heard of
    _carried_ns: int = 0  # of sessions that ended since the last look
    _looked_ns: int | None = None

    def look(
        self, now_ns: int, totals: Mapping[int, int], nvml: float | None, workers: float | None = None
    ) -> None:
        """The GPU time of every session that answered, since it began, by its number, and what NVML says at that moment.

        One that is missing has not answered and is counted when it does; one that has ended is told by ``ended``.
        """
        before, self._looked_ns = self._looked_ns, now_ns
        elapsed = 0 if before is None else max(now_ns - before, 0)
        counted, self._carried_ns = self._carried_ns, 0
        for session, total in totals.items():
            counted += self._rise(session, total, elapsed)
            # An estimate of a call that went on may be taken back; it is not to be counted again.
            self._totals[session] = max(total, self._totals.get(session, 0))
        if not elapsed:
            return
        is_told = elapsed <= LONGEST_LOOK_NS
        self._stretches.append(
            _Stretch(now_ns, elapsed, counted, nvml if is_told else None, workers if is_told else None)
        )
        oldest = now_ns - int(max(self.window_seconds) * 1e9)
        while self._stretches[0].end_ns <= oldest:
            self._stretches.popleft()

    def ended(self, session: int, total: int, now_ns: int) -> None:
        """A session has ended with so much GPU time in all; what is new of it belongs to the next look."""
        if self._looked_ns is not None:
            self._carried_ns += self._rise(session, total, max(now_ns - self._looked_ns, 0))
        self._totals.pop(session, None)

    def _rise(self, session: int, total: int, elapsed_ns: int) -> int:
        known = self._totals.get(session)
        # One that is new here may have worked for long before: for another mediator, say.
        return min(total, elapsed_ns) if known is None else max(total - known, 0)

    def windows(self, now_ns: int) -> tuple[GpuTimeWindow, ...]:
        """The windows that have something to show; none where nobody looked for so long."""
        found = (self._window(seconds, now_ns) for seconds in self.window_seconds)
        return tuple(window for window in found if window is not None)

    def _window(self, seconds: float, now_ns: int) -> GpuTimeWindow | None:
        since = now_ns - int(seconds * 1e9)
        inside = [stretch for stretch in self._stretches if stretch.end_ns > since]
        length = sum(stretch.length_ns for stretch in inside)
        if length < LEAST_COMPARED_NS:
            return None
        counted = sum(stretch.counted_ns for stretch in inside) / length
        told = [stretch for stretch in inside if stretch.nvml is not None]
        compared = sum(stretch.length_ns for stretch in told)
        if compared < LEAST_COMPARED_NS:
            return GpuTimeWindow(seconds, counted)
        nvml = sum((stretch.nvml or 0.0) * stretch.length_ns for stretch in told) / compared
        ours = min(sum(stretch.counted_ns for stretch in told) / compared, 1.0)
        by_process = [stretch for stretch in told if stretch.workers is not None]
        named = sum(stretch.length_ns for stretch in by_process)
        workers = (
            sum((stretch.workers or 0.0) * stretch.length_ns for stretch in by_process) / named
            if named >= LEAST_COMPARED_NS
            else None
        )
        return GpuTimeWindow(seconds, counted, nvml, workers, ours - nvml)
