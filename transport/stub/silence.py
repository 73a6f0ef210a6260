# SPDX-License-Identifier: Apache-2.0
"""How long a session has been silent, as the VM counts time: for guests that have no agent to release what the dead hold.

A session's heartbeat that stands still says nothing while the whole VM stands still (paused, starved), so its
silence is counted only in seconds near a sign of life: another heartbeat that moved, or a trapped access. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import attrs

SILENCE_SECONDS: Final = 60.0
# How long a sign of life counts. Heartbeats are further apart than samples are.
LIFE_SECONDS: Final = 10.0
# Two samples further apart than this: it was us who stood still.
STEP_SECONDS: Final = 2.0


@attrs.define
class _Heard:
    beat: int | None = None  # as seen last
    seconds: float = 0.0  # of silence since it moved


@attrs.define(eq=False)
class Silence:
    """Of all READY sessions of a device."""

    _sampled: float
    _heard: dict[int, _Heard] = attrs.field(factory=dict, init=False)
    _accesses: int = attrs.field(default=0, init=False)
    _alive: float = attrs.field(default=float("-inf"), init=False)

    def watch(self, slot: int) -> None:
        """A session begins there."""
        self._heard[slot] = _Heard()

    def forget(self, slot: int) -> None:
        """No session is there any more."""
        self._heard.pop(slot, None)

    def sample(self, beats: Mapping[int, int], accesses: int, now: float) -> int | None:
        """Heartbeats by slot and trapped accesses, as they are now. The slot silent longest, if for too long."""
        elapsed, self._sampled = min(now - self._sampled, STEP_SECONDS), now
        moved = [slot for slot, heard in self._heard.items() if slot in beats and beats[slot] != heard.beat]
        if moved or accesses != self._accesses:
            self._alive = now
        self._accesses = accesses
        for slot, heard in self._heard.items():
            if slot in moved:
                heard.beat, heard.seconds = beats[slot], 0.0
            elif now - self._alive <= LIFE_SECONDS:
                heard.seconds += elapsed
        victim = max(self._heard, key=lambda slot: self._heard[slot].seconds, default=None)
        return victim if victim is not None and self._heard[victim].seconds >= SILENCE_SECONDS else None
