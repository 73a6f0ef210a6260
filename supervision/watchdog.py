# SPDX-License-Identifier: Apache-2.0
"""The watchdog actor of one GPU: compares every session's progress with its deadline.

Deciding is ``_progress``; this actor reads the counters twice a second and tells the executor of a hung
session to end it with CUDA_ERROR_LAUNCH_TIMEOUT. Other sessions are not touched.
"""

from __future__ import annotations

import attrs

from vgpu.actors import Actor, ActorGone, AskTimeout, Ref, handles
from vgpu.actors.messages import Fault, Sample, SessionId, SessionSample, Unwatch, Watch

from ._progress import Progress, ProgressWatch

CUDA_ERROR_LAUNCH_TIMEOUT = 702
CHECK_SECONDS = 0.25


@attrs.frozen
class Check:
    """Look at everybody now."""


def progress_of(sample: SessionSample) -> Progress:
    """What of a session's counters tells that it gets on."""
    grant = sample.grant
    waits = [grant["oldest_fence_ns"], grant["current_since_ns"] if grant["current_call"] else 0]
    return Progress(
        grant["records"], grant["fences_done"], grant["launches"], min((w for w in waits if w), default=0)
    )


@attrs.define(eq=False)
class Watchdog(Actor):
    """Ends hung sessions."""

    _watched: dict[SessionId, tuple[Ref[object], ProgressWatch | None]] = attrs.Factory(dict)

    async def started(self) -> None:
        self.send_every(CHECK_SECONDS, Check())

    @handles(Watch)
    def watch(self, message: Watch) -> None:
        self._watched[message.session] = (message.executor, None)

    @handles(Unwatch)
    def unwatch(self, message: Unwatch) -> None:
        self._watched.pop(message.sample.info.session, None)

    @handles(Check)
    async def check(self, message: Check) -> None:
        for session, (executor, watch) in list(self._watched.items()):
            try:
                sample = await executor.ask(Sample(), timeout_seconds=1)
            except (ActorGone, AskTimeout):
                continue
            if watch is None:
                watch = ProgressWatch(int(sample.info.watchdog_seconds * 1e9))
                self._watched[session] = (executor, watch)
            if watch.observe(progress_of(sample), sample.taken_ns):
                seconds = sample.info.watchdog_seconds
                executor.send_nowait(
                    Fault(CUDA_ERROR_LAUNCH_TIMEOUT, f"no progress for more than {seconds:g} s")
                )
                self._watched.pop(session, None)
