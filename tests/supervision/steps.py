# SPDX-License-Identifier: Apache-2.0
"""One trio run, driven in steps from code that is not async: what a rule-based state machine needs.

Trio runs as a guest of a queue that is only emptied while a step runs. Between steps nothing moves, not even the
autojump clock: the task that waits for steps is always ready to run, and a loop with a ready task never jumps.
"""

from __future__ import annotations

import queue
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

import outcome
import trio
from trio.testing import MockClock

from vgpu.actors import ActorSystem, open_system

T = TypeVar("T")

Job = Callable[[ActorSystem], Awaitable[Any]]


class Steps:
    """An open, empty actor system on a clock that jumps; `close` it."""

    def __init__(self) -> None:
        self._ready: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._job: Job | None = None
        self._result: outcome.Outcome[Any] | None = None
        self._end: outcome.Outcome[None] | None = None
        self._is_closing = False
        trio.lowlevel.start_guest_run(
            self._main,
            run_sync_soon_threadsafe=self._ready.put,
            done_callback=self._ended,
            host_uses_signal_set_wakeup_fd=False,
            clock=MockClock(autojump_threshold=0),
        )

    def run(self, step: Callable[[ActorSystem], Awaitable[T]]) -> T:
        """Run one step to its end, and return what it returns or raise what it raises."""
        self._job, self._result = step, None
        while self._result is None:
            assert self._end is None, self._end
            self._ready.get()()
        return cast(T, self._result.unwrap())

    def close(self) -> None:
        """Stop the system and end the run."""
        self._is_closing = True
        while self._end is None:
            self._ready.get()()
        self._end.unwrap()

    def _ended(self, end: outcome.Outcome[None]) -> None:
        self._end = end

    async def _main(self) -> None:
        async with open_system(reporter=lambda _: None) as system:
            while not self._is_closing:
                job, self._job = self._job, None
                if job is not None:
                    self._result = await outcome.acapture(job, system)
                await trio.lowlevel.checkpoint()
