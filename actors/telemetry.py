# SPDX-License-Identifier: Apache-2.0
"""Telemetry: what every session has done so far, living and lately ended.

Holds the list of sessions for whoever asks (admin tool, metrics, demo) and reads counters from the
executors only when asked: nothing runs per call, and nothing runs while nobody looks.
"""

from __future__ import annotations

from collections import deque

import attrs

from vgpu.gpu.schedule import SessionId

from . import Actor, ActorGone, AskTimeout, Ref, handles
from .messages import ListSessions, Sample, SessionSample, Unwatch, Watch

# Enough to see what a busy host has been doing; older sessions are in the ledger.
REMEMBERED_SESSIONS = 256


@attrs.define(eq=False)
class Telemetry(Actor):
    """Sessions by number, and the last counters of those that ended."""

    _living: dict[SessionId, Ref[object]] = attrs.Factory(dict)
    _ended: deque[SessionSample] = attrs.Factory(lambda: deque(maxlen=REMEMBERED_SESSIONS))

    @handles(Watch)
    def watch(self, message: Watch) -> None:
        self._living[message.session] = message.executor

    @handles(Unwatch)
    def unwatch(self, message: Unwatch) -> None:
        if self._living.pop(message.sample.info.session, None) is not None:
            self._ended.append(message.sample)

    @handles(ListSessions)
    async def list_sessions(self, message: ListSessions) -> tuple[SessionSample, ...]:
        samples = list(self._ended)
        for _session, executor in sorted(self._living.items()):
            try:
                samples.append(await executor.ask(Sample(), timeout_seconds=1))
            except (ActorGone, AskTimeout):
                # It is just ending; its last counters arrive with Unwatch.
                continue
        return tuple(samples)
