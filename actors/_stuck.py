# SPDX-License-Identifier: Apache-2.0
"""Finds handlers that are stuck: those that hold the event loop, and those that wait for too long.

Two questions, two observers. *Who holds the loop?* is asked by a trio instrument, which notes when each task step
begins, and by a thread, because while the loop is held nothing of trio's runs: the thread takes the stack that
the loop's thread has at that moment and logs it at once. *Which message takes too long?* is asked by a task that
looks a few times in each threshold at the message every actor is handling, and takes the stack of the awaits.

On, it costs two clock readings a task step. Off, there is no instrument, no thread and no task, and nothing in an
actor's path knows of it. It must never change what it watches: it reads, and reports once each.
"""

from __future__ import annotations

import enum
import logging
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, final

import attrs
import trio

from ._trace import current_incarnation, subject_of

if TYPE_CHECKING:
    from ._incarnation import Envelope, Incarnation

__all__ = ["StuckDetector", "StuckHandler", "StuckKind"]

_log = logging.getLogger("vgpu.actors")

# How often in one threshold the observers look: what is stuck is seen at the latest that fraction late.
LOOKS = 4


class StuckKind(enum.Enum):
    """In which way it is stuck."""

    HELD_LOOP = "held the event loop"
    SLOW_MESSAGE = "has been handling one message"


@attrs.frozen
class StuckHandler:
    """One finding; `str()` renders it."""

    time: float
    """Trio's clock, in seconds, when it was reported."""
    kind: StuckKind
    actor: str | None
    """None for a task that belongs to no actor."""
    task: str
    message_type: str | None
    """None where no message was being handled (a background task, or a hook), or where nobody looked in time."""
    seconds: float
    """How long the loop was held in all; how long the message had been handled so far."""
    stack: tuple[str, ...]
    """Where it was, outermost call first; empty where the step ended before anybody could look."""
    subject: Mapping[str, object] = attrs.field(factory=dict, eq=False)
    """Whom it is about, for the log: the actor, and what VM and session that knows."""

    def __str__(self) -> str:
        who = f"actor {self.actor}" if self.actor is not None else f"task {self.task}"
        what = f" ({self.message_type})" if self.message_type is not None else ""
        lines = [f"{who}{what} {self.kind.value} for {self.seconds:.3f} s"]
        lines += [f"  {line}" for entry in self.stack for line in entry.rstrip().splitlines()]
        return "\n".join(lines)


@attrs.define(eq=False)
class _Step:
    """A task step that runs now. The stack is written by the watching thread, if it comes to look in time."""

    task: trio.lowlevel.Task
    began: float
    stack: tuple[str, ...] | None = None
    # As the stack: when the step has ended the message is no longer at hand.
    message_type: str | None = None


@attrs.define(eq=False)
class _Handling:
    """A message in the hands of one life, since it was first seen there."""

    envelope: Envelope
    since: float
    is_told: bool = False


@final
class StuckDetector(trio.abc.Instrument):
    """Made by `ActorSystem.watch_handlers`, open until `close`.

    Args:
        threshold_seconds: what is longer is reported.
        lives: those who live now.
        report: told of each finding, in the event loop's thread.
        clock: seconds, for the steps; their length is real time whatever trio's clock is.
    """

    def __init__(
        self,
        threshold_seconds: float,
        lives: Callable[[], Iterable[Incarnation]],
        report: Callable[[StuckHandler], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not 0 < threshold_seconds < math.inf:
            raise ValueError(f"the threshold must be above 0 seconds and finite, got {threshold_seconds}")
        self._threshold = threshold_seconds
        self._lives = lives
        self._report = report
        self._clock = clock
        # Written by the loop's thread, read by the watching one: a whole step, or None.
        self._step: _Step | None = None
        self._loop_thread = threading.get_ident()
        self._closing = threading.Event()
        self._scope = trio.CancelScope()
        self._handled: dict[int, _Handling] = {}

    def open(self, nursery: trio.Nursery) -> None:
        """Begin to watch this thread's event loop."""
        trio.lowlevel.add_instrument(self)
        nursery.start_soon(self._watch_messages, name="stuck-handler detector")
        threading.Thread(target=self._watch_loop, name="stuck-handler detector", daemon=True).start()

    def close(self) -> None:
        """Stop watching. Does not wait: the thread ends within a fraction of the threshold."""
        self._closing.set()
        self._scope.cancel()
        trio.lowlevel.remove_instrument(self)
        self._step = None

    # -- who holds the loop

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._step = _Step(task, self._clock())

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        step, self._step = self._step, None
        # None in the very step that put the detector on.
        if step is not None:
            seconds = self._clock() - step.began
            if seconds > self._threshold:
                self._report(self._held(step, seconds, trio.current_time()))

    def look_at_loop(self) -> None:
        """Take the stack of a step that is too long already. From any thread; here, the watching one's."""
        step = self._step
        if step is None or step.stack is not None:
            return
        seconds = self._clock() - step.began
        if seconds <= self._threshold:
            return
        frame = sys._current_frames().get(self._loop_thread)
        stack = tuple(traceback.format_stack(frame))
        life = step.task.context.get(current_incarnation)
        # The message at hand is no affair of the actor's background tasks.
        envelope = life.current if life is not None and life.task is step.task else None
        if self._step is step:
            step.message_type = None if envelope is None else type(envelope.message).__name__
            step.stack = stack
            # Now, and not when the step has ended: it may never end.
            found = self._held(step, seconds, math.nan)
            _log.error("so far: %s", found, extra=dict(found.subject))

    def _watch_loop(self) -> None:
        while not self._closing.wait(self._threshold / LOOKS):
            self.look_at_loop()

    @staticmethod
    def _held(step: _Step, seconds: float, now: float) -> StuckHandler:
        life = step.task.context.get(current_incarnation)
        return StuckHandler(
            now,
            StuckKind.HELD_LOOP,
            None if life is None else life.name,
            step.task.name,
            step.message_type,
            seconds,
            step.stack or (),
            subject_of(life),
        )

    # -- which message takes too long

    async def _watch_messages(self) -> None:
        with self._scope:
            while True:
                self.look_at_messages(trio.current_time())
                await trio.sleep(self._threshold / LOOKS)

    def look_at_messages(self, now: float) -> None:
        """Report each message that has been handled for too long and was not reported yet."""
        seen: dict[int, _Handling] = {}
        for life in self._lives():
            envelope = life.current
            if envelope is None:
                continue
            handling = self._handled.get(life.serial)
            if handling is None or handling.envelope is not envelope:
                handling = _Handling(envelope, now)
            seen[life.serial] = handling
            limit = life.actor.stuck_after_seconds
            limit = self._threshold if limit is None else limit
            if not handling.is_told and now - handling.since >= limit and life.task is not None:
                handling.is_told = True
                self._report(
                    StuckHandler(
                        now,
                        StuckKind.SLOW_MESSAGE,
                        life.name,
                        life.task.name,
                        type(envelope.message).__name__,
                        now - handling.since,
                        _await_stack(life.task),
                        subject_of(life),
                    )
                )
        self._handled = seen


def _await_stack(task: trio.lowlevel.Task) -> tuple[str, ...]:
    """Where a task that does not run is waiting, outermost call first."""
    return tuple(traceback.StackSummary.extract(iter(task.iter_await_frames())).format())
