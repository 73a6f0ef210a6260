# SPDX-License-Identifier: Apache-2.0
"""Actors that tests of supervisors start, crash and stop, and a diary of what happened to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import trio

from vgpu.actors import Actor, ExitReason, Normal, Ref, Request, handles
from vgpu.supervision import ChildSpec


@attrs.frozen
class Crash:
    """Raise in the handler."""

    text: str = "boom"


@attrs.frozen
class Finish:
    """End normally."""


@attrs.frozen
class Hang:
    """Never return from the handler."""


@attrs.frozen
class Count(Request[int]):
    """How many messages this life has handled."""


@attrs.define(eq=False)
class Diary:
    """What happened, in order, as (what, child id). Shared by the workers of one test."""

    lines: list[tuple[str, str]] = attrs.Factory(list)
    # Ids whose next starts fail, and how often.
    failures: dict[str, int] = attrs.Factory(dict)

    def worker(self, child_id: str, **fields: object) -> ChildSpec:
        """A child spec for a worker that writes here."""
        return ChildSpec(child_id, Worker, (self, child_id), **fields)  # type: ignore[arg-type]

    def take(self) -> list[tuple[str, str]]:
        """What was written since the last call."""
        taken, self.lines = self.lines, []
        return taken

    def of(self, what: str) -> list[str]:
        """The ids of all lines of one sort."""
        return [child_id for kind, child_id in self.lines if kind == what]


async def end_child(ref: Ref[Any], how: str) -> None:
    """End it by such a reason, named by its class."""
    if how == "Killed":
        ref.kill()
    elif how == "Shutdown":
        ref.stop()
    else:
        await ref.send(Crash() if how == "Crashed" else Finish())


class Mortal(Actor):
    """Crashes and ends on request."""

    @handles(Crash)
    def crash(self, message: Crash) -> None:
        raise ValueError(message.text)

    @handles(Finish)
    def finish(self, _: Finish) -> None:
        self.stop(Normal())


class Worker(Mortal):
    """Starts, counts, crashes, ends and hangs on request."""

    cleanup_seconds = 2.0

    def __init__(self, diary: Diary, label: str, on_stop: Callable[[], None] | None = None) -> None:
        self.diary = diary
        self.label = label
        self.handled = 0
        self._on_stop = on_stop

    async def started(self) -> None:
        if self.diary.failures.get(self.label, 0) > 0:
            self.diary.failures[self.label] -= 1
            self.diary.lines.append(("fail", self.label))
            raise RuntimeError(f"{self.label} cannot start")
        self.diary.lines.append(("start", self.label))

    async def stopped(self, reason: ExitReason) -> None:
        if self._on_stop is not None:
            self._on_stop()
        self.diary.lines.append((f"stop {type(reason).__name__}", self.label))

    @handles(Hang)
    async def hang(self, _: Hang) -> None:
        await trio.sleep_forever()

    @handles(Count)
    def count(self, _: Count) -> int:
        self.handled += 1
        return self.handled
