# SPDX-License-Identifier: Apache-2.0
"""What tests of actors need: a probe that stands for any actor, and a tracer that writes everything down.

Public on purpose: whoever writes actors on this runtime tests them with the same tools as the runtime itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar, final

import attrs
import trio
import trio.testing

from ._actor import Actor, ActorSpec
from ._exit import ExitReason
from ._ref import Ref
from ._reply import Reply
from ._system import ActorSystem
from ._trace import Tracer

__all__ = ["Probe", "RecordingTracer", "open_probe"]

T = TypeVar("T")

_numbers = itertools.count(1)


class _ProbeActor(Actor):
    """Takes every message and hands it to the test."""

    def __init__(self, inbox: trio.MemorySendChannel[tuple[Any, Reply[Any] | None]]) -> None:
        self._inbox = inbox

    @classmethod
    def accepts(cls, message_type: type) -> bool:
        return True

    def handler_for(self, message_type: type) -> Callable[[Any], Awaitable[Any] | Any]:
        return self._take

    def _take(self, message: Any) -> None:
        self._inbox.send_nowait((message, self.take_reply()))


@final
class Probe:
    """A stand-in actor under the test's control. Made by `open_probe`."""

    def __init__(self, actor: _ProbeActor, inbox: trio.MemoryReceiveChannel[Any]) -> None:
        self._actor = actor
        self._inbox = inbox

    @property
    def ref(self) -> Ref[Any]:
        """Give this to the actor under test."""
        return self._actor.ref

    def monitor(self, target: Ref[Any]) -> int:
        """Have the `Down` of a target sent to this probe."""
        return self._actor.monitor(target)

    async def receive(self, timeout_seconds: float = 5.0) -> Any:
        """The next message, whatever it is. A request is left unanswered: use `receive_request` for those."""
        message, _ = await self._next(timeout_seconds)
        return message

    async def receive_request(self, timeout_seconds: float = 5.0) -> tuple[Any, Reply[Any]]:
        """The next message, which must have been asked, and the reply to settle."""
        message, reply = await self._next(timeout_seconds)
        if reply is None:
            raise AssertionError(f"{message!r} was sent, not asked")
        return message, reply

    async def expect(self, message_type: type[T], timeout_seconds: float = 5.0) -> T:
        """The next message, which must be of that type."""
        message = await self.receive(timeout_seconds)
        if not isinstance(message, message_type):
            raise AssertionError(f"expected {message_type.__name__}, got {message!r}")  # noqa: TRY004 - a test's verdict
        return message

    async def expect_nothing(self) -> None:
        """Fail if there is a message once every task has come to rest. Not under an autojump clock's timers."""
        await trio.testing.wait_all_tasks_blocked()
        try:
            message, _ = self._inbox.receive_nowait()
        except trio.WouldBlock:
            return
        raise AssertionError(f"expected no message, got {message!r}")

    async def _next(self, timeout_seconds: float) -> tuple[Any, Reply[Any] | None]:
        with trio.move_on_after(timeout_seconds):
            pair: tuple[Any, Reply[Any] | None] = await self._inbox.receive()
            return pair
        raise AssertionError(f"no message came in {timeout_seconds} s")


@asynccontextmanager
async def open_probe(system: ActorSystem, name: str | None = None) -> AsyncIterator[Probe]:
    """Run a probe under a name for the length of the block."""
    outgoing, incoming = trio.open_memory_channel[tuple[Any, Reply[Any] | None]](math.inf)
    actor = _ProbeActor(outgoing)
    ref = await system.spawn(ActorSpec(name or f"probe-{next(_numbers)}", lambda: actor))
    try:
        yield Probe(actor, incoming)
    finally:
        ref.stop()
        with trio.CancelScope(shield=True):
            await ref.wait_exit()


@attrs.define(eq=False)
class RecordingTracer(Tracer):
    """Writes every hook down as (what, who, detail), in order."""

    events: list[tuple[str, str, object]] = attrs.Factory(list)

    def of(self, what: str) -> list[tuple[str, object]]:
        """(who, detail) of all events of one sort."""
        return [(who, detail) for kind, who, detail in self.events if kind == what]

    def spawned(self, now: float, name: str, serial: int, parent: str | None) -> None:
        self.events.append(("spawned", name, parent))

    def exited(self, now: float, name: str, serial: int, reason: ExitReason) -> None:
        self.events.append(("exited", name, reason))

    def restarting(self, now: float, supervisor: str, name: str, attempt: int) -> None:
        self.events.append(("restarting", name, attempt))

    def sent(self, now: float, sender: str | None, target: str, message: object, depth: int) -> None:
        self.events.append(("sent", target, (sender, message)))

    def received(self, now: float, name: str, message: object, waited_seconds: float | None) -> None:
        self.events.append(("received", name, message))

    def handled(self, now: float, name: str, message: object) -> None:
        self.events.append(("handled", name, message))

    def dead_letter(self, now: float, target: str, message: object) -> None:
        self.events.append(("dead_letter", target, message))
