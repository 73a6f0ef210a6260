# SPDX-License-Identifier: Apache-2.0
"""A recording as Chrome trace JSON, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

A process for the mediator, with a thread for each actor; one for each traced worker, with threads for the replay loop, the
GPU and the leases. A slice on an actor's thread is a message being handled; an arrow leads to it from where it was
sent; a counter shows each mailbox. Everything is on one clock, CLOCK_MONOTONIC, so that what stands above one another happened
at one time.

Pure: a recording in, a JSON value out. What began before the recording, or did not end in it, is cut at its edges.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import attrs

from vgpu.gpu.trace import TraceEvent, TraceKind, call_name
from vgpu.trace_recording import ActorEvent, Recording

OUTSIDE = "(outside of actors)"
# A slice for what has no length of its own, so that an arrow has something to begin at.
SEND_NS = 200
REPLAY_THREAD, GPU_THREAD, FENCE_THREAD, HELD_THREAD, GRANTED_THREAD = 1, 2, 3, 4, 5
_THREADS = {
    REPLAY_THREAD: "replay loop",
    GPU_THREAD: "GPU",
    FENCE_THREAD: "fences",
    HELD_THREAD: "lease, as the worker held it",
    GRANTED_THREAD: "lease, as the mediator granted it",
}

Event = dict[str, Any]
SECOND = 10**9


def convert(recording: Recording) -> dict[str, Any]:
    """The trace; ``traceEvents`` is sorted by time, with the names of processes and threads first."""
    return _Converter(recording).run()


def _us(ns: int) -> float:
    return ns / 1000


@attrs.define
class _Open:
    """A message being handled."""

    begin_ns: int
    type: str


@attrs.define
class _Converter:
    recording: Recording
    names: list[Event] = attrs.Factory(list)
    out: list[tuple[int, Event]] = attrs.Factory(list)  # with its time
    threads: dict[tuple[int, str], int] = attrs.Factory(dict)
    handling: dict[str, _Open] = attrs.Factory(dict)
    unread: dict[tuple[str, int], deque[tuple[int, int]]] = attrs.Factory(dict)  # flow and when it was sent
    depth: dict[str, int] = attrs.Factory(dict)
    leases: dict[str, int] = attrs.Factory(dict)  # executor: since
    sessions: dict[str, dict[str, Any]] = attrs.Factory(dict)  # by executor
    flows: int = 0

    @property
    def pid(self) -> int:
        return int(self.recording.head["pid"])

    def run(self) -> dict[str, Any]:
        head = self.recording.head
        began, ended = self._edges()
        self._name("process_name", self.pid, 0, f"mediator {head.get('version', '')}".strip())
        for session in head.get("sessions", []):
            self._know(session)
            if session["holding"]:
                self.leases[session["executor"]] = began
        self._find_sessions()
        for actor in head.get("actors", []):
            self._thread(str(actor[0]))
        for event in self.recording.events:
            getattr(self, f"_on_{event.kind}")(event)
        for name in list(self.handling):
            self._end_slice(name, ended, {"ends": "after the recording"})
        for executor in list(self.leases):
            self._end_lease(executor, ended, {"ends": "after the recording"})
        for session, events in self.recording.workers.items():
            self._worker(session, events)
        # What happened at one time stays in the order in which it was written down.
        self.out.sort(key=lambda row: row[0])
        # Viewers count in floating microseconds, which since the boot of a host that has long been up are too coarse for
        # slices that end in the nanosecond in which the next begins.
        zero = min([began, *(at_ns for at_ns, _ in self.out)]) // SECOND * SECOND
        return {
            "traceEvents": self.names + [{**event, "ts": _us(at_ns - zero)} for at_ns, event in self.out],
            "displayTimeUnit": "ns",
            "otherData": {
                "clock": "CLOCK_MONOTONIC",
                "zero_ns": str(zero),
                "started_ns": str(head["started_ns"]),
                "version": str(head.get("version", "")),
                "vm": str(head.get("vm") or ""),
                "end": {key: str(value) for key, value in self.recording.end.items()},
            },
        }

    def _edges(self) -> tuple[int, int]:
        began = int(self.recording.head["started_ns"])
        last = max((event.at_ns for event in self.recording.events), default=began)
        return began, max(last, began)

    # -- writing

    def _put(self, at_ns: int, event: Event) -> None:
        self.out.append((at_ns, event))

    def _name(self, what: str, pid: int, thread: int, name: str) -> None:
        self.names.append({"ph": "M", "name": what, "pid": pid, "tid": thread, "args": {"name": name}})

    def _thread(self, name: str) -> int:
        thread = self.threads.get((self.pid, name))
        if thread is None:
            thread = self.threads[(self.pid, name)] = len(self.threads) + 1
            self._name("thread_name", self.pid, thread, name)
        return thread

    def _instant(self, event: ActorEvent, name: str, **details: Any) -> None:
        self._put(
            event.at_ns,
            {
                "ph": "i",
                "s": "t",
                "cat": event.kind,
                "name": name,
                "pid": self.pid,
                "tid": self._thread(event.name),
                "args": details,
            },
        )

    def _count(self, at_ns: int, name: str, depth: int) -> None:
        if self.depth.get(name) != depth:
            self.depth[name] = depth
            self._put(
                at_ns,
                {
                    "ph": "C",
                    "name": f"mailbox {name}",
                    "pid": self.pid,
                    "tid": 0,
                    "args": {"messages": depth},
                },
            )

    # -- actors

    def _on_spawned(self, event: ActorEvent) -> None:
        self._instant(event, "spawned", serial=event.values["serial"], parent=event.values["parent"])

    def _on_exited(self, event: ActorEvent) -> None:
        self._end_slice(event.name, event.at_ns, {"ends": "with the actor"})
        self._end_lease(event.name, event.at_ns, {"ends": "with the executor"})
        self._count(event.at_ns, event.name, 0)
        text = event.values["text"]
        self._instant(event, f"exited: {event.values['reason']}", text=text, serial=event.values["serial"])

    def _on_restarting(self, event: ActorEvent) -> None:
        self._instant(event, "restarted", attempt=event.values["attempt"], by=event.values["supervisor"])

    def _on_dead_letter(self, event: ActorEvent) -> None:
        self._instant(event, f"dead letter: {event.values['type']}")

    def _on_sent(self, event: ActorEvent) -> None:
        values = event.values
        detail = values["detail"] or {}
        self.flows += 1
        self._arrow(event, values["sender"])
        queue = self.unread.setdefault((event.name, values["message"]), deque())
        queue.append((self.flows, event.at_ns))
        self._count(event.at_ns, event.name, int(values["depth"]))
        if values["type"] == "LeaseEnded":
            self._end_lease(str(values["sender"]), event.at_ns, detail)

    def _arrow(self, event: ActorEvent, sender: str | None) -> None:
        """Begin an arrow, in the slice that sends, or in a small one of its own."""
        name = sender or OUTSIDE
        if sender is None or sender not in self.handling:
            name = OUTSIDE if sender is None else f"{sender} (its tasks)"
            send = {"ph": "X", "cat": "send", "name": f"send {event.values['type']}", "dur": _us(SEND_NS)}
            self._put(event.at_ns, {**send, "pid": self.pid, "tid": self._thread(name), "args": {}})
        flow = {"ph": "s", "cat": "message", "name": event.values["type"], "id": self.flows}
        self._put(event.at_ns, {**flow, "pid": self.pid, "tid": self._thread(name)})

    def _on_received(self, event: ActorEvent) -> None:
        values = event.values
        self._end_slice(event.name, event.at_ns, {"ends": "refused"})
        self.handling[event.name] = _Open(event.at_ns, values["type"])
        waited = values["waited_ns"]
        place = {"pid": self.pid, "tid": self._thread(event.name)}
        arguments = {} if waited is None else {"waited_us": _us(waited)}
        begin = {"ph": "B", "cat": "handler", "name": values["type"], **place, "args": arguments}
        self._put(event.at_ns, begin)
        queue = self.unread.get((event.name, values["message"]))
        if queue:
            flow, _ = queue.popleft()
            arrow = {"ph": "f", "bp": "e", "cat": "message", "name": values["type"], "id": flow}
            self._put(event.at_ns, {**arrow, **place})
        if event.name in self.depth:
            self._count(event.at_ns, event.name, max(self.depth[event.name] - 1, 0))
        if values["type"] == "GrantLease":
            self.leases.setdefault(event.name, event.at_ns)

    def _on_handled(self, event: ActorEvent) -> None:
        self._end_slice(event.name, event.at_ns, {})

    def _end_slice(self, name: str, at_ns: int, details: Event) -> None:
        handled = self.handling.pop(name, None)
        if handled is not None:
            self._put(
                at_ns,
                {
                    "ph": "E",
                    "name": handled.type,
                    "pid": self.pid,
                    "tid": self._thread(name),
                    "args": details,
                },
            )

    # -- sessions

    def _find_sessions(self) -> None:
        """Those that opened during the recording: who they are is said in two messages."""
        opened: list[dict[str, Any]] = []
        described: dict[int, dict[str, Any]] = {}
        for event in self.recording.events:
            if event.kind == "sent" and event.values["detail"]:
                if event.values["type"] == "SessionOpened":
                    opened.append(event.values["detail"])
                elif event.values["type"] == "RecordStart":
                    described[int(event.values["detail"]["session"])] = event.values["detail"]
        for session in opened:
            self._know({**described.get(int(session["session"]), {}), **session})

    def _know(self, session: dict[str, Any]) -> None:
        executor = str(session["executor"])
        if executor in self.sessions:
            return
        self.sessions[executor] = session
        pid = self._worker_pid(session)
        label = f"session {session['session']} of {session['vm']}"
        self._name("process_name", pid, 0, f"worker, {label}")
        for thread, name in _THREADS.items():
            self._name("thread_name", pid, thread, name)

    def _worker_pid(self, session: dict[str, Any]) -> int:
        # Where the recording ended before it was said which process it is: a number that no process has.
        return int(session.get("worker_pid") or (1 << 22) + int(session["session"]))

    def _slice(self, pid: int, thread: int, name: str, begin_ns: int, end_ns: int, details: Event) -> None:
        length = {"ph": "X", "cat": "worker", "name": name, "dur": _us(end_ns - begin_ns)}
        self._put(begin_ns, {**length, "pid": pid, "tid": thread, "args": details})

    def _end_lease(self, executor: str, at_ns: int, details: Event) -> None:
        begin = self.leases.pop(executor, None)
        session = self.sessions.get(executor)
        if begin is not None and session is not None:
            pid = self._worker_pid(session)
            self._slice(pid, GRANTED_THREAD, "lease", begin, max(at_ns, begin), details)

    def _worker(self, session: int, events: list[TraceEvent]) -> None:
        known = [found for found in self.sessions.values() if int(found["session"]) == session]
        if not known:
            known = [
                {"session": session, "vm": self.recording.head.get("vm") or "?", "executor": f"#{session}"}
            ]
            self._know(known[0])
        pid = self._worker_pid(known[0])
        began, _ = self._edges()
        for event in _merged(events):
            if event.end_ns < began:
                continue
            at = (max(event.begin_ns, began), event.end_ns)
            if event.kind is TraceKind.CALL:
                stream = {"stream": hex(event.detail)} if event.detail else {}
                self._slice(pid, REPLAY_THREAD, call_name(event.call), *at, stream)
            elif event.kind is TraceKind.STARVED:
                self._slice(pid, REPLAY_THREAD, "waits for a lease", *at, {})
            elif event.kind is TraceKind.BUSY:
                self._slice(pid, GPU_THREAD, "busy", *at, {})
            elif event.kind is TraceKind.LEASE:
                self._slice(pid, HELD_THREAD, "lease", *at, {"token": event.detail})
            else:
                self._fence(pid, event, *at)

    def _fence(self, pid: int, event: TraceEvent, begin_ns: int, end_ns: int) -> None:
        """Fences of several streams overlap: a slice each, on a row of its own where it must."""
        self.flows += 1
        fence = {
            "cat": "fence",
            "name": f"fence {event.call}",
            "id2": {
                "local": f"{self.flows:#x}"
            },  # an "id" would be the whole trace's, outside of the session's process
            "pid": pid,
            "tid": FENCE_THREAD,
        }
        self._put(begin_ns, {"ph": "b", **fence, "args": {"value": event.detail}})
        self._put(end_ns, {"ph": "e", **fence, "args": {}})


def _merged(events: list[TraceEvent]) -> Iterator[TraceEvent]:
    """The worker cuts a long busy time in pieces that touch: they are one again."""
    busy: TraceEvent | None = None
    for event in events:
        if event.kind is not TraceKind.BUSY:
            yield event
        elif busy is not None and event.begin_ns == busy.end_ns:
            busy = attrs.evolve(busy, end_ns=event.end_ns)
        else:
            if busy is not None:
                yield busy
            busy = event
    if busy is not None:
        yield busy
