# SPDX-License-Identifier: Apache-2.0
"""The base class of every actor: one task, one mailbox, one private state.

A subclass holds state in its own attributes, marks its handlers with `@handles(MessageType)`, and gives nothing
mutable of its own to anybody. It must never be called from outside: others hold a `Ref`.

Two things deadlock and are the author's to avoid: a cycle of actors that *ask* each other (deadlines end it), and a
cycle that *sends* through full blocking mailboxes (use `send_nowait`, or another policy, on one of the edges).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, TypeVar

import attrs
import trio

from ._exit import ExitReason, Normal
from ._handlers import build_table, find_handler
from ._incarnation import Incarnation
from ._mailbox import Policy
from ._messages import Down, Exit
from ._ref import Ref
from ._reply import Reply
from ._tree import ActorSnapshot
from .errors import InternalError, MailboxFull, UnknownMessage

__all__ = ["Actor", "ActorSpec", "shielded"]

A = TypeVar("A", bound="Actor")


def shielded(seconds: float) -> trio.CancelScope:
    """A cancel scope for cleanup: what runs in it is not cancelled from outside, but cut off after that long.

    For `finally` blocks of background tasks. Whoever waits for the actor's end waits for this.
    """
    return trio.CancelScope(shield=True, deadline=trio.current_time() + seconds)


class Actor:
    """Subclass it, give it handlers, and let a supervisor start it.

    Class attributes a subclass may set:
        mailbox_capacity: messages that may wait.
        mailbox_policy: what a full mailbox does to one more.
        cleanup_seconds: how long `stopped()` may take before it is cut off.
        trap_exit: whether the end of a linked actor comes as an `Exit` message instead of ending this one.
        stuck_after_seconds: how long a handler may take before the detector reports it, `math.inf` for
            one that may wait long; None: as the system's detector is set.
        stop_ends_start: whether `started()` hears a stop request and ends what it has begun in good order. Where not, it
            is cancelled.

    What ends an actor: `stop()` in a handler, a stop request, an error (of a handler, a hook or a background task),
    or a kill. Whichever it is, its background tasks have ended and `stopped()` has run before anybody is told.
    """

    mailbox_capacity: ClassVar[int] = 256
    mailbox_policy: ClassVar[Policy] = Policy.BLOCK
    cleanup_seconds: ClassVar[float] = 5.0
    stuck_after_seconds: ClassVar[float | None] = None
    stop_ends_start: ClassVar[bool] = False
    trap_exit = False  # an instance may set its own

    _handler_names: ClassVar[dict[type, str]] = {}
    _accepted_types: ClassVar[dict[type, bool]] = {}

    # Both are set by bind, before started().
    __life: Incarnation | None = None
    __nursery: trio.Nursery | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._handler_names = build_table(cls)
        cls._accepted_types = {}

    # -- hooks

    async def started(self) -> None:
        """Set up. The starter waits for it, and messages wait in the mailbox.

        Return soon: a supervisor starts its children one after the other. An error means the start failed.
        """

    async def stopping(self, reason: ExitReason) -> None:
        """Wind down in order, with background tasks still alive. Only on `stop()` and stop requests.

        May take as long as the child's shutdown time allows; it is cancelled when that is over.
        """

    async def stopped(self, reason: ExitReason) -> None:
        """Release what must be released. Runs at every end, also after a kill or a failed `started()`.

        Background tasks have ended. Shielded from cancellation, and cut off after `cleanup_seconds`.
        """

    # -- what an actor can do, from its handlers, hooks and background tasks

    @property
    def name(self) -> str:
        """The registered name, the same in every life."""
        return self.life.name

    @property
    def subject(self) -> Mapping[str, object]:
        """What its log lines are about, as far as it knows now: ``vm`` and ``session``."""
        return {}

    @property
    def ref(self) -> Ref[Any]:
        """The address of this actor."""
        return Ref(self.life.system, self.life.name)

    @property
    def nursery(self) -> trio.Nursery:
        """Background tasks live here. An error in one ends the actor; the actor's end cancels them all."""
        if self.__nursery is None:
            raise InternalError(f"{type(self).__name__} is not running")
        return self.__nursery

    def find(self, name: str) -> Ref[Any]:
        """The address of whoever holds a name, now or later."""
        return Ref(self.life.system, name)

    def stop(self, reason: ExitReason | None = None) -> None:
        """End after the present handler, with `Normal()` unless told otherwise."""
        self.life.request_stop(Normal() if reason is None else reason)

    def monitor(self, target: Ref[Any]) -> int:
        """Have exactly one `Down` sent here when the target's present life ends; at once if it has none.

        Returns:
            The number that the `Down` will carry; give it to `demonitor` to change your mind.

        Raises:
            UnknownMessage: this class has no handler for `Down`.
        """
        if not self.accepts(Down):
            raise UnknownMessage(f"{type(self).__name__} monitors others but has no handler for Down")
        return self.life.monitor(target.name)

    def demonitor(self, monitor: int, *, flush: bool = False) -> None:
        """Stop watching. A `Down` that has been sent already still arrives, unless `flush` takes it back."""
        self.life.demonitor(monitor, flush=flush)

    def link(self, target: Ref[Any]) -> None:
        """Tie this life to the target's present life, both ways; linking twice is linking once.

        When one ends, the other is cancelled and ends too (its cleanup still runs): as `Killed`, or `Shutdown` where
        the first shut down; a `Normal` end is no reason. One that traps exits gets an `Exit` message
        instead, whatever the reason. A target that does not live counts as one that ended abnormally.
        A restart is not linked again. To learn of an end without sharing it, monitor.

        Raises:
            UnknownMessage: this actor traps exits and has no handler for `Exit`.
        """
        if self.trap_exit and not self.accepts(Exit):
            raise UnknownMessage(f"{type(self).__name__} traps exits but has no handler for Exit")
        self.life.link(target.name)

    def unlink(self, target: Ref[Any]) -> None:
        """Untie, from whichever side. An `Exit` that has been sent already still arrives."""
        self.life.unlink(target.name)

    def take_reply(self) -> Reply[Any] | None:
        """Take over the answer to the request at hand, to settle it after the handler has returned.

        None where the message was sent and not asked. An actor that ends with replies unsettled fails them
        with `ActorGone`.
        """
        return self.life.take_reply()

    def interruptible(self) -> AbstractContextManager[trio.CancelScope]:
        """A cancel scope that a stop request cancels: for waiting in a handler without being deaf to it."""
        return self.life.interruptible()

    def send_after(self, seconds: float, message: object) -> trio.CancelScope:
        """Send a message to this actor later, waiting for room. Cancel the returned scope to call it off."""
        scope = trio.CancelScope()
        self.nursery.start_soon(self.__send_later, seconds, message, scope)
        return scope

    def send_every(self, seconds: float, message: object) -> trio.CancelScope:
        """Send a message to this actor now and then every so often, never more than one waiting at a time.

        Ticks that fall due while one still waits are skipped. Cancel the returned scope to end it.
        """
        if seconds <= 0:
            raise ValueError(f"seconds between ticks must be above 0, got {seconds}")
        scope = trio.CancelScope()
        self.nursery.start_soon(self.__tick, seconds, message, scope)
        return scope

    async def __send_later(self, seconds: float, message: object, scope: trio.CancelScope) -> None:
        with scope:
            await trio.sleep(seconds)
            await self.life.deliver_own(message)

    async def __tick(self, seconds: float, message: object, scope: trio.CancelScope) -> None:
        with scope:
            due = trio.current_time()
            while True:
                taken = trio.Event()
                try:
                    if not self.life.deliver_nowait(message, on_taken=taken.set):
                        return
                    await taken.wait()
                except MailboxFull:
                    # The actor is behind; one more tick would not help it.
                    await trio.lowlevel.checkpoint()
                behind = trio.current_time() - due
                due += seconds * (1 + int(behind // seconds))
                await trio.sleep_until(due)

    # -- for the runtime and for supervisors

    @property
    def life(self) -> Incarnation:
        """The runtime's side of this actor."""
        if self.__life is None:
            raise InternalError(f"{type(self).__name__} is not running")
        return self.__life

    def bind(self, life: Incarnation, nursery: trio.Nursery) -> None:
        """Called once by the runtime, before `started()`."""
        if self.__life is not None:
            raise InternalError(f"one instance of {type(self).__name__} was started twice; make a new one")
        self.__life = life
        self.__nursery = nursery

    @classmethod
    def accepts(cls, message_type: type) -> bool:
        """Whether this class handles messages of that type."""
        known = cls._accepted_types.get(message_type)
        if known is None:
            known = find_handler(cls._handler_names, message_type) is not None
            cls._accepted_types[message_type] = known
        return known

    def handler_for(self, message_type: type) -> Callable[[Any], Awaitable[Any] | Any]:
        """The bound method that handles a type."""
        name = find_handler(self._handler_names, message_type)
        if name is None:
            raise UnknownMessage(f"{type(self).__name__} has no handler for {message_type.__name__}")
        handler: Callable[[Any], Awaitable[Any] | Any] = getattr(self, name)
        return handler

    def children_snapshots(self) -> tuple[ActorSnapshot, ...]:
        """Those under this actor; a supervisor adds the ones that do not live now."""
        return tuple(child.snapshot() for child in self.life.children.values())


@attrs.frozen
class ActorSpec:
    """How to make a top-level actor: a name, and a factory that is called once for each life."""

    name: str
    create: Callable[[], Actor]
