# SPDX-License-Identifier: Apache-2.0
"""Where tracing is switched on and off: what ``admin.sock`` offers to ``vgpu-trace``.

    trace.start     begin a recording, for the connection that asks; one at a time
    trace.fetch     what was recorded since the last fetch, in pieces
    trace.stop      end it; what is left can still be fetched
    trace.status    is somebody recording
    trace.activity  counters of every actor; counting goes on for ten seconds after each question

Everything ends by itself: a recording at its number of events, its seconds, or with the connection that began it; the
counters when nobody asks any longer. Off, the only thing left is the branch at each hook.

A plain object and no actor: it belongs to the admin actor, runs its tasks there and ends with it.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import attrs
import trio

from vgpu.gpu.trace import EVENT_SIZE, TraceReader

from . import ActorError, ActorSystem, Ref, Tracer, WhichChildren
from .messages import Sample, SessionOpened, TraceWorker
from .recorder import ActivityTracer, BothTracers, Recorder
from .vm_settings import BadVm

_log = logging.getLogger("vgpu.trace")

FORMAT = 1
MOST_EVENTS = 5_000_000
MOST_SECONDS = 3600.0
FETCH_EVENTS = 1000
FETCH_WORKER_EVENTS = 8192
WORKER_SECONDS = 2.0
# Past this an ended recording that nobody fetches gives way to the next.
FORGOTTEN_SECONDS = 10.0
ACTIVITY_SECONDS = 10.0

Parameters = Mapping[str, Any]


class CannotTrace(ActorError):
    """There is a recording already, or none; the message says what to do."""


@attrs.define(eq=False)
class _Recording:
    peer: object
    vm: str | None
    worker_events: int
    recorder: Recorder
    started_ns: int
    deadline_ns: int
    scope: trio.CancelScope = attrs.Factory(trio.CancelScope)
    readers: dict[int, TraceReader] = attrs.Factory(dict)
    executors: dict[int, Ref[Any]] = attrs.Factory(dict)
    refused: dict[int, str] = attrs.Factory(dict)
    ended: str = ""
    workers_ended: bool = False
    fetched_at: float = attrs.Factory(trio.current_time)


@attrs.define(eq=False)
class TraceDesk:
    """The tracing of one mediator; see the head of this file."""

    system: ActorSystem
    nursery: trio.Nursery
    find: Callable[[str], Ref[Any]]
    gpus: tuple[str, ...]
    version: str = ""
    _recording: _Recording | None = None
    _activity: ActivityTracer | None = None
    _activity_until: float = 0.0
    _installed: Tracer | None = None

    def methods(self, peer: object) -> dict[str, Callable[[Parameters], Awaitable[Any]]]:
        """What one connection may ask; recordings it begins end with it (`peer_left`)."""

        async def start(parameters: Parameters) -> Any:
            return await self._start(parameters, peer)

        async def fetch(parameters: Parameters) -> Any:
            return self._fetch(peer)

        async def stop(parameters: Parameters) -> Any:
            self._own(peer)
            self._end("stopped")
            return self._status()

        async def status(parameters: Parameters) -> Any:
            return self._status()

        async def activity(parameters: Parameters) -> Any:
            return self._count()

        return {
            "trace.start": start,
            "trace.fetch": fetch,
            "trace.stop": stop,
            "trace.status": status,
            "trace.activity": activity,
        }

    def peer_left(self, peer: object) -> None:
        """A connection ended, and with it what it recorded."""
        if self._recording is not None and self._recording.peer is peer:
            self._end("its client went")
            self._forget()

    def close(self) -> None:
        """Take everything off. Workers end their traces by their limits, or when their link does."""
        if self._recording is not None:
            self._recording.ended = self._recording.ended or "the admin actor ended"
            self._forget()
        self._activity = None
        self._install()

    # -- which tracer is on

    def _install(self) -> None:
        """Put on what is wanted now. A tracer that somebody else has put on is left alone."""
        wanted: list[Tracer] = []
        if self._recording is not None and not self._recording.ended:
            wanted.append(self._recording.recorder)
        if self._activity is not None:
            wanted.append(self._activity)
        if self._is_foreign():
            return
        self._installed = None if not wanted else wanted[0] if len(wanted) == 1 else BothTracers(wanted)
        self.system.set_tracer(self._installed)

    def _is_foreign(self) -> bool:
        guard = self.system.tracer
        return guard is not None and guard.inner is not None and guard.inner is not self._installed

    # -- recording

    async def _start(self, parameters: Parameters, peer: object) -> Any:
        events = _number(parameters, "events", 200_000, MOST_EVENTS)
        worker_events = _number(parameters, "worker_events", 200_000, MOST_EVENTS)
        seconds = parameters.get("seconds", 10)
        if type(seconds) not in (int, float) or not 0 < seconds <= MOST_SECONDS or math.isnan(seconds):
            raise BadVm(f"seconds is {seconds!r}, expected a number up to {MOST_SECONDS:g}")
        vm = parameters.get("vm")
        if vm is not None and not isinstance(vm, str):
            raise BadVm(f"vm is {vm!r}, expected a VM's name")
        self._check_free()
        now = time.monotonic_ns()
        recorder = Recorder(events, self._session_opened)
        recording = _Recording(peer, vm, worker_events, recorder, now, now + round(seconds * 1e9))
        self._recording = recording
        actors = [
            (node.name, node.kind, node.state.value, node.serial, node.restarts)
            for top in self.system.tree()
            for node in top.walk()
        ]
        self._install()
        self.nursery.start_soon(self._end_in_time, recording, float(seconds))
        sessions = await self._sessions(recording)
        return {
            "vgpu_trace": FORMAT,
            "version": self.version,
            "clock": "CLOCK_MONOTONIC",
            "started_ns": now,
            "pid": os.getpid(),
            "vm": vm,
            "limits": {"events": events, "seconds": seconds, "worker_events": worker_events},
            "actors": [list(row) for row in actors],
            "sessions": sessions,
        }

    def _check_free(self) -> None:
        if self._is_foreign():
            raise CannotTrace("this mediator's actors are being traced by something else")
        recording = self._recording
        if recording is None:
            return
        if recording.ended and trio.current_time() - recording.fetched_at > FORGOTTEN_SECONDS:
            self._forget()
            return
        left = max(recording.deadline_ns - time.monotonic_ns(), 0) / 1e9
        when = "is being fetched" if recording.ended else f"ends in {left:.0f} s at the latest"
        raise CannotTrace(f"a recording is under way, which {when}; there can be one at a time")

    async def _sessions(self, recording: _Recording) -> list[dict[str, object]]:
        """The sessions there are; the wanted VM's workers begin to write."""
        found: list[dict[str, object]] = []
        for gpu in self.gpus:
            for child in await self.find(f"{gpu}/executors").ask(WhichChildren()):
                executor = self.find(child.name)
                try:
                    sample = await executor.ask(Sample(), timeout_seconds=1)
                except ActorError:
                    continue  # just beginning, or ending
                info, grant = sample.info, sample.grant
                token = grant["token"]
                holding = bool(grant["granted"]) and (token == 0 or token != grant["ended_token"])
                found.append(
                    {
                        "session": int(info.session),
                        "vm": info.vm,
                        "program": info.program,
                        "worker_pid": info.worker_pid,
                        "executor": child.name,
                        "holding": holding,
                    }
                )
                if recording.vm is not None and info.vm == recording.vm:
                    await self._trace_session(recording, int(info.session), executor)
        return found

    def _session_opened(self, opened: SessionOpened) -> None:
        recording = self._recording
        if recording is not None and recording.vm is not None and opened.vm == recording.vm:
            self.nursery.start_soon(
                self._trace_session, recording, int(opened.session), self.find(opened.executor.name)
            )

    async def _trace_session(self, recording: _Recording, session: int, executor: Ref[Any]) -> None:
        if session in recording.executors or recording.ended:
            return
        recording.executors[session] = executor
        try:
            descriptor = await executor.ask(
                TraceWorker(recording.worker_events), timeout_seconds=WORKER_SECONDS
            )
            reader = TraceReader(descriptor)
        except (ActorError, OSError, ValueError) as error:
            recording.refused[session] = str(error)
            return
        if recording is not self._recording:
            reader.close()
            return
        recording.readers[session] = reader

    async def _end_in_time(self, recording: _Recording, seconds: float) -> None:
        with recording.scope:
            deadline = trio.current_time() + seconds
            # Woken now and then: nobody tells that the number of events is reached.
            while trio.current_time() < deadline and not recording.recorder.is_full:
                await trio.sleep(min(0.2, max(deadline - trio.current_time(), 0)))
        if not recording.ended and recording is self._recording:
            self._end("events" if recording.recorder.is_full else "seconds")

    def _end(self, why: str) -> None:
        recording = self._recording
        if recording is None or recording.ended:
            return
        recording.ended = why
        recording.scope.cancel()
        self._install()
        self.nursery.start_soon(self._end_workers, recording)

    async def _end_workers(self, recording: _Recording) -> None:
        async def end(executor: Ref[Any]) -> None:
            with contextlib.suppress(ActorError):  # one that has gone took its trace with it
                os.close(await executor.ask(TraceWorker(0), timeout_seconds=WORKER_SECONDS))

        async with trio.open_nursery() as nursery:
            for executor in recording.executors.values():
                nursery.start_soon(end, executor)
        recording.workers_ended = True

    def _forget(self) -> None:
        if self._recording is not None:
            self._recording.scope.cancel()
            for reader in self._recording.readers.values():
                reader.close()
            self._recording = None
        self._install()

    def _own(self, peer: object) -> _Recording:
        if self._recording is None or self._recording.peer is not peer:
            raise CannotTrace("this connection has no recording; trace.start begins one")
        return self._recording

    def _fetch(self, peer: object) -> Any:
        recording = self._own(peer)
        recording.fetched_at = trio.current_time()
        if recording.recorder.is_full and not recording.ended:
            self._end("events")
        rows = recording.recorder.fetch(FETCH_EVENTS)
        left = recording.recorder.waiting
        workers = {}
        for session, reader in recording.readers.items():
            data = reader.take(FETCH_WORKER_EVENTS)
            left += len(data) // EVENT_SIZE == FETCH_WORKER_EVENTS
            if data:
                workers[str(session)] = base64.b64encode(data).decode()
        is_done = bool(recording.ended) and recording.workers_ended and left == 0
        answer = {"rows": rows, "workers": workers, "left": left, "done": is_done, **self._status()}
        if is_done:
            self._forget()
        return answer

    def _status(self) -> dict[str, object]:
        recording = self._recording
        if recording is None:
            return {"recording": False}
        return {
            "recording": not recording.ended,
            "ended": recording.ended,
            "vm": recording.vm,
            "started_ns": recording.started_ns,
            "events": recording.recorder.seen,
            "dropped": recording.recorder.dropped,
            "worker_lost": sum(reader.lost for reader in recording.readers.values()),
            "worker_missed": sum(reader.missed for reader in recording.readers.values()),
            "sessions": sorted(recording.readers),
            "refused": {str(session): why for session, why in recording.refused.items()},
        }

    # -- counting

    def _count(self) -> Any:
        if self._is_foreign():
            raise CannotTrace("this mediator's actors are being traced by something else")
        self._activity_until = trio.current_time() + ACTIVITY_SECONDS
        if self._activity is None:
            self._activity = ActivityTracer()
            self._install()
            self.nursery.start_soon(self._stop_counting)
        return {"now_ns": time.monotonic_ns(), "actors": self._activity.totals()}

    async def _stop_counting(self) -> None:
        while trio.current_time() < self._activity_until:
            await trio.sleep_until(self._activity_until)
        self._activity = None
        self._install()


def _number(parameters: Parameters, name: str, default: int, most: int) -> int:
    value = parameters.get(name, default)
    if type(value) is not int or not 1 <= value <= most:
        raise BadVm(f"{name} is {value!r}, expected a number from 1 to {most}")
    return value
