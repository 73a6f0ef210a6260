# SPDX-License-Identifier: Apache-2.0
"""Telemetry: what every session has done so far, living and lately ended.

Holds the list of sessions for whoever asks (admin tool, metrics, demo) and reads counters from the
executors only when asked: nothing runs per call, and nothing runs while nobody looks.
"""

from __future__ import annotations

from collections import Counter, deque

import attrs

from vgpu.gpu.schedule import SessionId

from . import Actor, ActorGone, AskTimeout, Ref, handles
from .messages import (
    EndedTotals,
    ListSessions,
    Sample,
    SessionSample,
    SessionSurvey,
    Survey,
    Unwatch,
    Watch,
)

# Enough to see what a busy host has been doing; older sessions are in the ledger.
REMEMBERED_SESSIONS = 256

# Counters of the grant page that only rise, so that adding them up over sessions means something.
CUMULATIVE = (
    "records",
    "async_records",
    "reply_records",
    "fence_records",
    "doorbells",
    "replay_errors",
    "protocol_errors",
    "launches",
    "bytes_to_device",
    "bytes_from_device",
    "gpu_ns",
    "fences_issued",
    "fences_done",
)


@attrs.define(eq=False)
class _Totals:
    """Sums over the ended sessions of one VM."""

    sessions: int = 0
    grant: Counter[str] = attrs.Factory(Counter)
    refused: Counter[str] = attrs.Factory(Counter)

    def add(self, sample: SessionSample) -> None:
        self.sessions += 1
        for name in CUMULATIVE:
            self.grant[name] += sample.grant.get(name, 0)
        self.refused.update(sample.refused)


@attrs.define(eq=False)
class Telemetry(Actor):
    """Sessions by number, and the last counters of those that ended."""

    _living: dict[SessionId, Ref[object]] = attrs.Factory(dict)
    # A session that does not answer counts as it last did: a sum over sessions must not fall.
    _last: dict[SessionId, SessionSample] = attrs.Factory(dict)
    _ended: deque[SessionSample] = attrs.Factory(lambda: deque(maxlen=REMEMBERED_SESSIONS))
    _totals: dict[str, _Totals] = attrs.Factory(dict)

    @handles(Watch)
    def watch(self, message: Watch) -> None:
        self._living[message.session] = message.executor

    @handles(Unwatch)
    def unwatch(self, message: Unwatch) -> None:
        info = message.sample.info
        self._last.pop(info.session, None)
        if self._living.pop(info.session, None) is not None:
            self._ended.append(message.sample)
            self._totals.setdefault(info.vm, _Totals()).add(message.sample)

    @handles(ListSessions)
    async def list_sessions(self, message: ListSessions) -> tuple[SessionSample, ...]:
        answered = await self._look()
        return (*self._ended, *(self._last[session] for session in answered))

    @handles(Survey)
    async def survey(self, message: Survey) -> SessionSurvey:
        await self._look()
        living = tuple(self._last[session] for session in sorted(self._living) if session in self._last)
        ended = {
            vm: EndedTotals(t.sessions, dict(t.grant), dict(t.refused))
            for vm, t in sorted(self._totals.items())
        }
        return SessionSurvey(living, ended)

    async def _look(self) -> list[SessionId]:
        """Sample the living; those that answered. One that did not is just ending, and says so with Unwatch."""
        answered = []
        for session, executor in sorted(self._living.items()):
            try:
                self._last[session] = await executor.ask(Sample(), timeout_seconds=1)
            except (ActorGone, AskTimeout):
                continue
            answered.append(session)
        return answered
