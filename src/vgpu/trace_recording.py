# SPDX-License-Identifier: Apache-2.0
"""A raw recording: what ``vgpu-trace record`` fetches, line by line, and how it is read again. docs/tracing.md: the format.

The first line is the head, the last one the end; between them are arrays: events of actors, and pieces of workers' traces.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

import attrs

from vgpu.admin_client import AdminClient, RequestRefused
from vgpu.gpu.trace import EVENT_SIZE, TraceEvent, decode_events

FORMAT = 1
POLL_SECONDS = 0.1
# Whatever the mediator does: no recording is fetched for longer than its time and this.
GRACE_SECONDS = 30.0

# Columns of each kind of event, after its name and its time.
COLUMNS: dict[str, tuple[str, ...]] = {
    "spawned": ("name", "serial", "parent"),
    "exited": ("name", "serial", "reason", "text"),
    "restarting": ("name", "supervisor", "attempt"),
    "sent": ("name", "sender", "type", "message", "depth", "detail"),
    "received": ("name", "type", "message", "waited_ns"),
    "handled": ("name",),
    "dead_letter": ("name", "type"),
}


class BadRecording(ValueError):
    """It is no recording, or none that this version knows; the message names the line."""


@attrs.frozen
class ActorEvent:
    """One event of an actor; ``values`` has the columns of its kind."""

    kind: str
    at_ns: int
    values: dict[str, Any]

    @property
    def name(self) -> str:
        """The actor it is about."""
        return str(self.values["name"])


@attrs.define
class Recording:
    """All of it, in memory."""

    head: dict[str, Any]
    events: list[ActorEvent] = attrs.Factory(list)
    workers: dict[int, list[TraceEvent]] = attrs.Factory(dict)
    end: dict[str, Any] = attrs.Factory(dict)


def fetch_recording(
    client: AdminClient,
    out: TextIO,
    *,
    seconds: float,
    events: int,
    worker_events: int,
    vm: str | None,
    report: Callable[[dict[str, Any]], None] = lambda status: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Record, writing raw lines to ``out``; blocks until the recording has ended. Returns its last status.

    Args:
        report: hears how far it is, several times a second.
        stop: asked as often; true ends the recording early.

    Raises:
        RequestRefused: somebody else records.
        NoMediator: it ended.
    """
    parameters: dict[str, Any] = {"seconds": seconds, "events": events, "worker_events": worker_events}
    if vm is not None:
        parameters["vm"] = vm
    out.write(json.dumps(client.ask("trace.start", **parameters)) + "\n")
    deadline = time.monotonic() + seconds + GRACE_SECONDS
    is_stopped = False
    while True:
        if not is_stopped and stop():
            client.ask("trace.stop")
            is_stopped = True
        answer = client.ask("trace.fetch")
        if answer["rows"]:
            out.write(answer["rows"] + "\n")
        out.writelines(
            json.dumps(["worker", int(session), piece]) + "\n" for session, piece in answer["workers"].items()
        )
        status = {k: v for k, v in answer.items() if k not in ("rows", "workers", "left", "done")}
        report(status)
        if answer["done"] or time.monotonic() > deadline:
            break
        if not answer["left"]:
            time.sleep(POLL_SECONDS)
    out.write(json.dumps({"end": status}) + "\n")
    return status


def read_recording(lines: Iterable[str]) -> Recording:
    """Read raw lines. A recording that was cut off is read as far as it goes.

    Raises:
        BadRecording: see there.
    """
    numbered = enumerate(lines, 1)
    head = _parse(*next(numbered, (1, "")))
    if not isinstance(head, dict) or head.get("vgpu_trace") != FORMAT:
        raise BadRecording("line 1: not the head of a recording of this version")
    recording = Recording(head)
    for number, line in numbered:
        if not line.endswith("\n"):
            break  # cut off while it was written
        value = _parse(number, line)
        if isinstance(value, dict) and "end" in value:
            recording.end = value["end"]
        elif isinstance(value, list) and value[:1] == ["worker"]:
            session, events = _worker_piece(number, value)
            recording.workers.setdefault(session, []).extend(events)
        else:
            recording.events.append(_event(number, value))
    return recording


def _parse(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        raise BadRecording(f"line {number}: no JSON") from None


def _worker_piece(number: int, value: list[Any]) -> tuple[int, Iterator[TraceEvent]]:
    try:
        _, session, piece = value
        data = base64.b64decode(piece, validate=True)
        return int(session), decode_events(data[: len(data) // EVENT_SIZE * EVENT_SIZE])
    except (ValueError, TypeError, binascii.Error):
        raise BadRecording(f"line {number}: not a piece of a worker's trace") from None


def _event(number: int, value: Any) -> ActorEvent:
    columns = (
        COLUMNS.get(value[0]) if isinstance(value, list) and value and isinstance(value[0], str) else None
    )
    if columns is None or len(value) != len(columns) + 2 or type(value[1]) is not int:
        raise BadRecording(f"line {number}: not an event")
    return ActorEvent(value[0], value[1], dict(zip(columns, value[2:], strict=True)))


__all__ = ["ActorEvent", "BadRecording", "Recording", "RequestRefused", "fetch_recording", "read_recording"]
