# SPDX-License-Identifier: Apache-2.0
"""Tracers for people: one that writes down every event, within bounds, and one that only adds up.

Both are called in the task of whoever acts, so they do next to nothing: an event is one tuple in a ring, put into words
when somebody fetches it. A message is never kept, for it may hold a descriptor that its receiver closes; what is
kept of it is its type, its identity while it lives, and for a few types (leases, sessions) some numbers.

Must never: grow beyond its bounds; keep a message alive; raise because of a message it does not know.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import attrs
import trio

from . import ExitReason, Tracer
from .messages import (
    Demand,
    Fault,
    GrantLease,
    LeaseEnded,
    RecordStart,
    RevokeLease,
    SessionClosed,
    SessionOpened,
    Unwatch,
)

__all__ = ["ActivityTracer", "ActorActivity", "BothTracers", "Recorder", "clock_offset_ns"]

# Enough for a second of a very busy mediator; whoever records fetches several times a second.
RING_EVENTS = 65536
CLOCK_READINGS = 9

Row = tuple[Any, ...]
# Made once: json.dumps with separators makes one for every call.
_encode = json.JSONEncoder(separators=(",", ":")).encode


def clock_offset_ns() -> int:
    """What to add to trio's clock, in nanoseconds, to have CLOCK_MONOTONIC.

    Both run at one rate where trio's clock is the usual one; the number differs from process to process.
    """
    # Of several readings the one that was interrupted least.
    readings = []
    for _ in range(CLOCK_READINGS):
        before = time.monotonic_ns()
        now = trio.current_time()
        after = time.monotonic_ns()
        readings.append((after - before, (before + after) // 2 - round(now * 1e9)))
    return min(readings)[1]


_DETAILS: dict[type, Callable[[Any], dict[str, object]]] = {
    GrantLease: lambda m: {
        "token": m.token,
        "deadline_ns": m.deadline_ns,
        "slice_ns": m.slice_ns,
        "in_flight_ns": m.in_flight_ns,
    },
    RevokeLease: lambda m: {},
    LeaseEnded: lambda m: {
        "session": int(m.session),
        "gpu_ns": m.used_ns,
        "held_ns": m.held_ns,
        "token": m.token,
        "wants_more": m.wants_more,
    },
    Demand: lambda m: {"session": int(m.session)},
    SessionOpened: lambda m: {
        "session": int(m.session),
        "vm": m.vm,
        "pool": m.pool,
        "executor": m.executor.name,
        "weight": m.weight,
        "holding": m.holding,
    },
    RecordStart: lambda m: {
        "session": int(m.info.session),
        "vm": m.info.vm,
        "program": m.info.program,
        "worker_pid": m.info.worker_pid,
    },
    SessionClosed: lambda m: {"session": int(m.session)},
    Unwatch: lambda m: {"session": int(m.sample.info.session), "ended": m.sample.ended},
    Fault: lambda m: {"error": m.error, "what": m.what},
}


class Recorder(Tracer):
    """Writes events into a ring until it has seen ``limit`` of them. The oldest give way to newer ones, and are counted.

    Args:
        limit: events to see at most; then `is_full` and nothing costs anything any more but a comparison.
        on_session: called with each session that opens, in the task of who announced it; must not wait.
    """

    def __init__(
        self,
        limit: int,
        on_session: Callable[[SessionOpened], None] | None = None,
        capacity: int = RING_EVENTS,
    ) -> None:
        self._limit = self._left = limit
        self._ring: deque[Row] = deque(maxlen=capacity)
        self._append = self._ring.append
        self._taken = 0
        self._on_session = on_session
        self._offset_ns = clock_offset_ns()

    @property
    def seen(self) -> int:
        """Events so far."""
        return self._limit - self._left

    @property
    def dropped(self) -> int:
        """Events that gave way to newer ones before they were fetched."""
        return self.seen - self._taken - len(self._ring)

    @property
    def is_full(self) -> bool:
        """Whether as many events as allowed were seen."""
        return self._left <= 0

    @property
    def waiting(self) -> int:
        """Events to be fetched."""
        return len(self._ring)

    def _put(self, row: Row) -> None:
        if self._left > 0:
            self._left -= 1
            self._append(row)

    def fetch(self, limit: int) -> str:
        """The oldest events, taken out: JSON arrays, one a line; docs/tracing.md has their columns."""
        ring = self._ring
        offset = self._offset_ns
        rows = [ring.popleft() for _ in range(min(limit, len(ring)))]
        self._taken += len(rows)
        return "\n".join(_words(row, offset) for row in rows)

    # -- hooks; the three of every message do themselves what _put does

    def spawned(self, now: float, name: str, serial: int, parent: str | None) -> None:
        self._put(("spawned", now, name, serial, parent))

    def exited(self, now: float, name: str, serial: int, reason: ExitReason) -> None:
        self._put(("exited", now, name, serial, type(reason).__name__, str(reason)[:200]))

    def restarting(self, now: float, supervisor: str, name: str, attempt: int) -> None:
        self._put(("restarting", now, name, supervisor, attempt))

    def sent(self, now: float, sender: str | None, target: str, message: object, depth: int) -> None:
        if self._left <= 0:
            return
        self._left -= 1
        kind = type(message)
        detail = _DETAILS[kind](message) if kind in _DETAILS else None
        self._append(("sent", now, target, sender, kind, id(message), depth, detail))
        if kind is SessionOpened and self._on_session is not None:
            assert isinstance(message, SessionOpened)
            self._on_session(message)

    def received(self, now: float, name: str, message: object, waited_seconds: float | None) -> None:
        if self._left > 0:
            self._left -= 1
            self._append(("received", now, name, type(message), id(message), waited_seconds))

    def handled(self, now: float, name: str, message: object) -> None:
        if self._left > 0:
            self._left -= 1
            self._append(("handled", now, name))

    def dead_letter(self, now: float, target: str, message: object) -> None:
        self._put(("dead_letter", now, target, type(message)))


def _words(row: Row, offset_ns: int) -> str:
    what, now, *rest = row
    values: list[object] = [what, round(now * 1e9) + offset_ns]
    for value in rest:
        if isinstance(value, type):
            values.append(value.__name__)
        elif isinstance(value, float):  # the only one there is: how long a message waited
            values.append(round(value * 1e9))
        else:
            values.append(value)
    return _encode(values)


@attrs.define
class ActorActivity:
    """What one name did since somebody began to look. Times are in nanoseconds."""

    messages: int = 0
    busy_ns: int = 0
    """In handlers, what they wait for included."""
    waited_ns: int = 0
    """What its messages waited in the mailbox."""
    since: float | None = None
    """Trio's clock when the handler at hand began."""


class ActivityTracer(Tracer):
    """Adds up per name; bounded, for names beyond ``limit`` are left out."""

    def __init__(self, limit: int = 10_000) -> None:
        self._actors: dict[str, ActorActivity] = {}
        self._limit = limit

    def totals(self) -> dict[str, dict[str, int]]:
        """Counters by name; a handler that runs now counts up to now."""
        now = trio.current_time()
        return {
            name: {
                "messages": activity.messages,
                "busy_ns": activity.busy_ns
                + (0 if activity.since is None else round((now - activity.since) * 1e9)),
                "waited_ns": activity.waited_ns,
            }
            for name, activity in self._actors.items()
        }

    def received(self, now: float, name: str, message: object, waited_seconds: float | None) -> None:
        activity = self._actors.get(name)
        if activity is None:
            if len(self._actors) >= self._limit:
                return
            activity = self._actors[name] = ActorActivity()
        activity.messages += 1
        activity.since = now
        if waited_seconds is not None:
            activity.waited_ns += round(waited_seconds * 1e9)

    def handled(self, now: float, name: str, message: object) -> None:
        activity = self._actors.get(name)
        if activity is not None and activity.since is not None:
            activity.busy_ns += round((now - activity.since) * 1e9)
            activity.since = None

    def exited(self, now: float, name: str, serial: int, reason: ExitReason) -> None:
        activity = self._actors.get(name)
        if activity is not None:
            activity.since = None


class BothTracers(Tracer):
    """Hands every hook to several tracers."""

    def __init__(self, tracers: Iterable[Tracer]) -> None:
        self._tracers = tuple(tracers)

    def spawned(self, now: float, name: str, serial: int, parent: str | None) -> None:
        for tracer in self._tracers:
            tracer.spawned(now, name, serial, parent)

    def exited(self, now: float, name: str, serial: int, reason: ExitReason) -> None:
        for tracer in self._tracers:
            tracer.exited(now, name, serial, reason)

    def restarting(self, now: float, supervisor: str, name: str, attempt: int) -> None:
        for tracer in self._tracers:
            tracer.restarting(now, supervisor, name, attempt)

    def sent(self, now: float, sender: str | None, target: str, message: object, depth: int) -> None:
        for tracer in self._tracers:
            tracer.sent(now, sender, target, message, depth)

    def received(self, now: float, name: str, message: object, waited_seconds: float | None) -> None:
        for tracer in self._tracers:
            tracer.received(now, name, message, waited_seconds)

    def handled(self, now: float, name: str, message: object) -> None:
        for tracer in self._tracers:
            tracer.handled(now, name, message)

    def dead_letter(self, now: float, target: str, message: object) -> None:
        for tracer in self._tracers:
            tracer.dead_letter(now, target, message)
