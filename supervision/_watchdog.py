# SPDX-License-Identifier: Apache-2.0
"""Who has been silent for too long, and what has taken too long: two pure cores that are told the time.

`Heartbeats` judges by silence: a guest's shim, a stub, a worker that should be heard of regularly. `Deadlines`
judges by duration: a thing that began and must end. Neither reads a clock; `now` is seconds of any one monotonic
clock, and a `now` that steps back counts as standing still. Each change is told exactly once.
(Whether a session makes *progress* is another question; that core is `_progress`.)
"""

from __future__ import annotations

import enum
from collections.abc import Hashable
from typing import Generic, TypeVar, final

import attrs

__all__ = ["Deadlines", "Health", "HealthChange", "HeartbeatLimits", "Heartbeats", "Overdue"]

K = TypeVar("K", bound=Hashable)


class Health(enum.IntEnum):
    """How long something has been silent, in four steps; a larger one is worse."""

    HEALTHY = 0
    LATE = 1
    MISSING = 2
    DEAD = 3


def _in_order(limits: HeartbeatLimits, _: object, dead: float) -> None:
    if not 0 < limits.late_seconds <= limits.missing_seconds <= dead:
        raise ValueError(
            "need 0 < late_seconds <= missing_seconds <= dead_seconds, got "
            f"{limits.late_seconds}, {limits.missing_seconds}, {dead}"
        )


@attrs.frozen
class HeartbeatLimits:
    """After how many seconds of silence something is late, missing, dead."""

    late_seconds: float
    missing_seconds: float
    dead_seconds: float = attrs.field(validator=_in_order)

    def judge(self, last_beat: float, now: float) -> Health:
        """The verdict at `now`; a limit that is reached is passed."""
        # Compared as the times that next_check gives: their difference may be a rounding short of the limit.
        if now >= last_beat + self.dead_seconds:
            return Health.DEAD
        if now >= last_beat + self.missing_seconds:
            return Health.MISSING
        if now >= last_beat + self.late_seconds:
            return Health.LATE
        return Health.HEALTHY

    def next_limit(self, health: Health) -> float | None:
        """The silence at which that health gets worse; None for the dead."""
        return {
            Health.HEALTHY: self.late_seconds,
            Health.LATE: self.missing_seconds,
            Health.MISSING: self.dead_seconds,
            Health.DEAD: None,
        }[health]


@attrs.frozen
class HealthChange(Generic[K]):
    """A verdict that is not what it was."""

    key: K
    before: Health
    after: Health
    silent_seconds: float


@attrs.define(eq=False)
class _Watched:
    limits: HeartbeatLimits
    last_beat: float
    # What was last told; only check() and beat() change it.
    health: Health = Health.HEALTHY


@final
class Heartbeats(Generic[K]):
    """Watches any number of keys. Dead is final: only `watch` brings a dead key back."""

    def __init__(self) -> None:
        self._watched: dict[K, _Watched] = {}

    def watch(self, key: K, limits: HeartbeatLimits, now: float) -> None:
        """Begin, or begin anew, with a beat at `now`."""
        self._watched[key] = _Watched(limits, now)

    def forget(self, key: K) -> bool:
        """Stop watching; says whether the key was watched."""
        return self._watched.pop(key, None) is not None

    def beat(self, key: K, now: float) -> HealthChange[K] | None:
        """Note a sign of life. Returns the recovery if the key had been told late or missing.

        A beat of an unknown key or of a dead one changes nothing: it comes from somebody given up already.
        """
        watched = self._watched.get(key)
        if watched is None or watched.health is Health.DEAD:
            return None
        silent = max(0.0, now - watched.last_beat)
        before, watched.health = watched.health, Health.HEALTHY
        watched.last_beat = max(now, watched.last_beat)
        return None if before is Health.HEALTHY else HealthChange(key, before, Health.HEALTHY, silent)

    def check(self, now: float) -> tuple[HealthChange[K], ...]:
        """Every key whose health got worse since it was last told, the longest silent first."""
        changes = []
        for key, watched in self._watched.items():
            health = watched.limits.judge(watched.last_beat, now)
            if health > watched.health:
                changes.append(HealthChange(key, watched.health, health, now - watched.last_beat))
                watched.health = health
        changes.sort(key=lambda change: -change.silent_seconds)
        return tuple(changes)

    def health(self, key: K) -> Health | None:
        """What was last told of a key; None if it is not watched."""
        watched = self._watched.get(key)
        return None if watched is None else watched.health

    def next_check(self) -> float | None:
        """The earliest time at which `check` could have news; None while it cannot have any."""
        times = [
            watched.last_beat + limit
            for watched in self._watched.values()
            if (limit := watched.limits.next_limit(watched.health)) is not None
        ]
        return min(times, default=None)


@attrs.frozen
class Overdue(Generic[K]):
    """Something that began and has not ended in its time."""

    key: K
    began: float
    deadline: float


@final
class Deadlines(Generic[K]):
    """Things that run, each with the time by which it must have ended."""

    def __init__(self) -> None:
        self._running: dict[K, Overdue[K]] = {}
        # Told already. Always a subset of _running.
        self._told: set[K] = set()

    def begin(self, key: K, now: float, seconds: float) -> None:
        """Something begins; under a key that runs already, it replaces that."""
        if seconds <= 0:
            raise ValueError(f"a deadline must be above 0 seconds away, got {seconds}")
        self._running[key] = Overdue(key, now, now + seconds)
        self._told.discard(key)

    def end(self, key: K) -> bool:
        """It has ended; says whether it was running."""
        self._told.discard(key)
        return self._running.pop(key, None) is not None

    def check(self, now: float) -> tuple[Overdue[K], ...]:
        """What has become overdue since it was last asked, the earliest deadline first. A deadline reached is passed."""
        found = [
            overdue
            for key, overdue in self._running.items()
            if key not in self._told and now >= overdue.deadline
        ]
        self._told.update(overdue.key for overdue in found)
        return tuple(sorted(found, key=lambda overdue: overdue.deadline))

    def next_check(self) -> float | None:
        """The earliest deadline not yet told; None where there is none."""
        return min(
            (overdue.deadline for key, overdue in self._running.items() if key not in self._told),
            default=None,
        )
