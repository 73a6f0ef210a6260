# SPDX-License-Identifier: Apache-2.0
"""Hooks that see what actors do, for the tracing tool and for tests.

Off, they cost one `is None` check at each place. On, a tracer is called synchronously in the task that acts, so it
must be quick and must not wait. It can never change what the system does: a tracer that raises is taken off,
the failure is logged, and the actors go on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, final

from ._exit import ExitReason

if TYPE_CHECKING:
    from ._incarnation import Incarnation

__all__ = [
    "GuardedTracer",
    "Tracer",
    "current_actor_name",
    "current_incarnation",
    "current_subject",
    "subject_of",
]

_log = logging.getLogger("vgpu.actors")

# Set in the task of each actor and inherited by its background tasks. Only tracing reads it.
current_incarnation: ContextVar[Incarnation | None] = ContextVar("current_incarnation", default=None)


def current_actor_name() -> str | None:
    """The name of the actor in whose task, or background task, this runs; None outside of actors."""
    life = current_incarnation.get()
    return None if life is None else life.name


def current_subject() -> dict[str, object]:
    """``actor``, and ``vm`` and ``session`` as that actor knows them, for whoever writes a log; empty outside of actors."""
    return subject_of(current_incarnation.get())


def subject_of(life: Incarnation | None) -> dict[str, object]:
    """The same of any actor; empty for none."""
    return {} if life is None else {"actor": life.name, **life.actor.subject}


class Tracer:
    """Override what you want to see; everything else is ignored. Times are trio's clock, in seconds."""

    def spawned(self, now: float, name: str, serial: int, parent: str | None) -> None:
        """An actor came to life. `serial` tells the lives of one name apart."""

    def exited(self, now: float, name: str, serial: int, reason: ExitReason) -> None:
        """An actor's life ended."""

    def restarting(self, now: float, supervisor: str, name: str, attempt: int) -> None:
        """A supervisor is about to start a child again; `attempt` counts its restarts."""

    def sent(self, now: float, sender: str | None, target: str, message: object, depth: int) -> None:
        """A mailbox accepted a message; `depth` is its data depth after that."""

    def received(self, now: float, name: str, message: object, waited_seconds: float | None) -> None:
        """A handler begins. `waited_seconds` is None for messages sent before tracing was on."""

    def handled(self, now: float, name: str, message: object) -> None:
        """A handler returned."""

    def dead_letter(self, now: float, target: str, message: object) -> None:
        """A message had nobody to go to."""


@final
class GuardedTracer(Tracer):
    """Passes calls on to another tracer until that raises, then calls `detach` and is silent."""

    def __init__(self, inner: Tracer, detach: Callable[[], None]) -> None:
        self._inner: Tracer | None = inner
        self._detach = detach

    @property
    def inner(self) -> Tracer | None:
        """The tracer behind the guard, None once it has failed."""
        return self._inner

    def _call(self, hook: str, *args: object) -> None:
        if self._inner is None:
            return
        try:
            getattr(self._inner, hook)(*args)
        except Exception:  # noqa: BLE001 - see _failed
            self._failed(hook)

    def _failed(self, hook: str) -> None:
        # A tracer is not part of the system it watches: the actor at hand must not pay for its bug.
        self._inner = None
        self._detach()
        _log.exception("the tracer failed in %s and was taken off", hook)

    def spawned(self, now: float, name: str, serial: int, parent: str | None) -> None:
        self._call("spawned", now, name, serial, parent)

    def exited(self, now: float, name: str, serial: int, reason: ExitReason) -> None:
        self._call("exited", now, name, serial, reason)

    def restarting(self, now: float, supervisor: str, name: str, attempt: int) -> None:
        self._call("restarting", now, supervisor, name, attempt)

    def sent(self, now: float, sender: str | None, target: str, message: object, depth: int) -> None:
        # This one and the next two are called for every message: without the detour through _call.
        if self._inner is not None:
            try:
                self._inner.sent(now, sender, target, message, depth)
            except Exception:  # noqa: BLE001 - see _failed
                self._failed("sent")

    def received(self, now: float, name: str, message: object, waited_seconds: float | None) -> None:
        if self._inner is not None:
            try:
                self._inner.received(now, name, message, waited_seconds)
            except Exception:  # noqa: BLE001 - see _failed
                self._failed("received")

    def handled(self, now: float, name: str, message: object) -> None:
        if self._inner is not None:
            try:
                self._inner.handled(now, name, message)
            except Exception:  # noqa: BLE001 - see _failed
                self._failed("handled")

    def dead_letter(self, now: float, target: str, message: object) -> None:
        self._call("dead_letter", now, target, message)
