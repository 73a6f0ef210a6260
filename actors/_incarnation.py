# SPDX-License-Identifier: Apache-2.0
"""One life of one actor: a trio task that receives, handles, and ends for exactly one reason.

A restart is a new life under the same name with a new instance of the actor's class; nothing of the old one is
kept. This module holds the order of events at birth and at death, and nothing that is a decision:

    birth   register the name, `started()`, then the starter goes on
    life    receive, handle; background tasks run in the actor's nursery
    stop    (asked) `stopping()` with the background tasks still alive, then they are cancelled
    death   background tasks have ended, `stopped()` shielded and limited, mailbox closed, name released,
            asks failed, monitors and links told, in one go without a checkpoint

An error in a handler, a hook or a background task ends the life as `Crashed`; it never leaves the task. Only
what is not an `Exception` (cancellation, KeyboardInterrupt) goes on to whoever runs the nursery.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, final

import attrs
import trio

from ._exit import Crashed, ExitReason, Killed, NoActor, Normal, Shutdown
from ._mailbox import Mailbox, Policy
from ._messages import Down, Exit, StopRequest
from ._reply import Reply
from ._trace import current_actor_name, current_incarnation
from ._tree import ActorSnapshot, ActorState
from .errors import (
    ActorError,
    ActorGone,
    InternalError,
    MailboxClosed,
    MailboxFull,
    Refused,
    StartFailed,
    UnknownMessage,
)

if TYPE_CHECKING:
    from ._actor import Actor
    from ._system import ActorSystem

__all__ = ["Envelope", "Incarnation"]

_log = logging.getLogger("vgpu.actors")


@attrs.frozen(eq=False)
class Envelope:
    """A message on its way, with what the runtime needs to know of it."""

    message: object
    reply: Reply[Any] | None = None
    sent_at: float | None = None
    on_taken: Callable[[], None] | None = None
    # Matters to a living target only: unread, it is no dead letter.
    is_notice: bool = False


@final
class Incarnation:
    """The runtime's side of an actor. Actors see it only through their `Actor` base."""

    def __init__(
        self,
        system: ActorSystem,
        name: str,
        actor: Actor,
        *,
        parent: Incarnation | None = None,
        is_supervised: bool = False,
        restarts: int = 0,
        last_exit: ExitReason | None = None,
    ) -> None:
        self.system = system
        self.name = name
        self.actor = actor
        self.serial = system.next_serial()
        self.restarts = restarts
        self.state = ActorState.STARTING
        # None while alive. Set once, in _finish.
        self.reason: ExitReason | None = None
        # Lives of actors started by this one, in start order, ended ones excluded.
        self.children: dict[int, Incarnation] = {}
        self.mailbox: Mailbox[Envelope] = Mailbox(actor.mailbox_capacity, actor.mailbox_policy, self._dropped)
        # What the first stop request asked for; None: there was none.
        self.stop_reason: ExitReason | None = None
        self._parent = parent
        # A supervisor decides about the name after this life: until then it is expected back.
        self._is_supervised = is_supervised
        self._last_exit = last_exit
        self._born_at = trio.current_time()
        self._scope = trio.CancelScope()
        # What the end is called if the scope is cancelled; the first who cancels it says.
        self._killed_for: ExitReason | None = None
        self._task: trio.lowlevel.Task | None = None
        self._exited = trio.Event()
        # Who watches this life. Called with the reason at its end; keys are monitor numbers.
        self._monitors: dict[int, Callable[[ExitReason], None]] = {}
        # Whom this life watches: living targets by monitor number.
        self._watched: dict[int, Incarnation] = {}
        # Living lives that this one is linked to, by serial. Invariant: a in b._links exactly when b in a._links.
        self._links: dict[int, Incarnation] = {}
        # Replies of asks whose asker still waits; the asker takes its own out again.
        self._asked: set[Reply[Any]] = set()
        # Scopes that a stop request cancels: see Actor.interruptible.
        self._interruptible: list[trio.CancelScope] = []
        # The envelope being handled, None between messages.
        self._current: Envelope | None = None
        # Whether the handler at hand took the reply to settle it itself.
        self._is_reply_taken = False
        # From the moment a message was taken to its handler's end, waits included, over all that were handled.
        self.handler_seconds = 0.0

    @property
    def is_alive(self) -> bool:
        """Whether `reason` is still unknown."""
        return self.reason is None

    @property
    def stop_requested(self) -> bool:
        """Whether it has been asked to end."""
        return self.stop_reason is not None

    @property
    def current(self) -> Envelope | None:
        """What is being handled at this moment; a handler's every message has an envelope of its own."""
        return self._current

    @property
    def task(self) -> trio.lowlevel.Task | None:
        """The task that handles messages; None before its first step."""
        return self._task

    # -- what others do to this life

    async def deliver(self, message: object, reply: Reply[Any] | None = None) -> bool:
        """Put a message in the data lane as the mailbox's policy says; False where the actor has ended."""
        self._check_accepts(message)
        if (
            self.mailbox.policy is Policy.BLOCK
            and self.mailbox.is_full
            and self._task is trio.lowlevel.current_task()
        ):
            raise MailboxFull(f"actor {self.name!r} would wait for ever for room in its own full mailbox")
        if self.mailbox.is_full and self.mailbox.policy is Policy.BLOCK and self.is_alive:
            if self.system.tracer is not None:
                self._sent(message)
            try:
                await self.mailbox.send(self._envelope(message, reply))
            except MailboxClosed:
                return False
            return True
        # Put it in and trace it before anybody else runs, so that a trace shows it sent before it is received.
        await trio.lowlevel.checkpoint_if_cancelled()
        is_accepted = self.deliver_nowait(message, reply)
        await trio.lowlevel.cancel_shielded_checkpoint()
        return is_accepted

    async def deliver_own(self, message: object) -> None:
        """Put an actor's own timer message in its data lane, waiting for room whatever the policy.

        A timer that is lost, or that ends its actor because others fill the mailbox, would help nobody.
        """
        self._check_accepts(message)
        if self.system.tracer is not None:
            self._sent(message)
        with suppress(MailboxClosed):
            await self.mailbox.send(self._envelope(message, None), always_wait=True)

    def deliver_nowait(
        self,
        message: object,
        reply: Reply[Any] | None = None,
        on_taken: Callable[[], None] | None = None,
        *,
        is_notice: bool = False,
    ) -> bool:
        """As `deliver`, but a full mailbox raises `MailboxFull` at once."""
        self._check_accepts(message)
        try:
            self.mailbox.send_nowait(self._envelope(message, reply, on_taken, is_notice))
        except MailboxClosed:
            return False
        if self.system.tracer is not None:
            self._sent(message)
        return True

    def check_asker(self) -> None:
        """Refuse an ask that could only time out: the actor's own task asking itself."""
        if self._task is trio.lowlevel.current_task():
            raise ActorError(f"actor {self.name!r} asks itself in its own task and would wait for ever")

    def request_stop(self, reason: ExitReason) -> None:
        """Ask the actor to end after the message at hand. Later requests change nothing."""
        if self.stop_requested or not self.is_alive:
            return
        self.stop_reason = reason
        self.mailbox.send_system(Envelope(StopRequest(reason)))
        for scope in self._interruptible:
            scope.cancel()

    def kill(self, cause: str = "") -> None:
        """Cancel the actor's task and all it runs. Cleanup still happens, shielded and limited."""
        self._end_for(Killed(cause))

    def _end_for(self, reason: ExitReason) -> None:
        if self.is_alive:
            self._killed_for = self._killed_for or reason
            self._scope.cancel()

    def add_monitor(self, monitor: int, callback: Callable[[ExitReason], None]) -> None:
        """Call back once with the reason when this life ends; only for living ones."""
        if not self.is_alive:
            raise InternalError(f"monitor set on the ended actor {self.name!r}")
        self._monitors[monitor] = callback

    def remove_monitor(self, monitor: int) -> None:
        """Forget a monitor; nothing happens if it is unknown."""
        self._monitors.pop(monitor, None)

    async def wait_exited(self) -> ExitReason:
        """Wait for the end of this life and return its reason."""
        await self._exited.wait()
        if self.reason is None:
            raise InternalError(f"actor {self.name!r} exited without a reason")
        return self.reason

    def snapshot(self) -> ActorSnapshot:
        """Describe this life and what is under it."""
        return ActorSnapshot(
            name=self.name,
            kind=type(self.actor).__name__,
            state=self.state,
            mailbox=self.mailbox.statistics(),
            restarts=self.restarts,
            serial=self.serial,
            age_seconds=trio.current_time() - self._born_at,
            handler_seconds=self.handler_seconds,
            last_exit=self._last_exit,
            children=self.actor.children_snapshots(),
        )

    # -- what the actor itself does, through Actor

    def monitor(self, name: str) -> int:
        """Watch the present life of a name: one `Down` will come, at once where there is none."""
        target = self.system.registry.find(name)
        if target is not None:
            return self.watch(target)
        number = self.system.next_serial()
        self._receive_down(Down(number, name, self.system.registry.last_exit(name)))
        return number

    def watch(self, target: Incarnation) -> int:
        """Watch one life, living or ended."""
        number = self.system.next_serial()
        if target.reason is not None:
            self._receive_down(Down(number, target.name, target.reason))
        else:
            target.add_monitor(number, lambda reason: self._receive_down(Down(number, target.name, reason)))
            self._watched[number] = target
        return number

    def demonitor(self, monitor: int, *, flush: bool = False) -> None:
        """Stop watching. A `Down` that is in the mailbox already still comes, unless it is flushed."""
        target = self._watched.pop(monitor, None)
        if target is not None:
            target.remove_monitor(monitor)
        elif flush:
            self.mailbox.discard_system(
                lambda envelope: isinstance(envelope.message, Down) and envelope.message.monitor == monitor
            )

    def link(self, name: str) -> None:
        """Tie this life and the present life of a name together; at once the end of it where there is none."""
        target = self.system.registry.find(name)
        if target is None:
            self._linked_ended(name, NoActor())
        elif target is not self:
            self._links[target.serial] = target
            target._links[self.serial] = self

    def unlink(self, name: str) -> None:
        """Untie; nothing happens where there is no link."""
        for target in [target for target in self._links.values() if target.name == name]:
            del self._links[target.serial], target._links[self.serial]

    def _linked_ended(self, name: str, reason: ExitReason) -> None:
        if self.actor.trap_exit:
            self.mailbox.send_system(Envelope(Exit(name, reason)))
        elif isinstance(reason, Shutdown):
            self._end_for(Shutdown(f"linked to {name}: {reason}"))
        elif not isinstance(reason, Normal):
            self._end_for(Killed(f"linked to {name}: {reason}"))

    def _receive_down(self, down: Down) -> None:
        self._watched.pop(down.monitor, None)
        self.mailbox.send_system(Envelope(down))

    def take_reply(self) -> Reply[Any] | None:
        """Hand the current request's reply to the handler, which must settle it later."""
        envelope = self._current
        if envelope is None or self._is_reply_taken:
            raise InternalError(f"actor {self.name!r} takes a reply while it handles no message")
        self._is_reply_taken = True
        return envelope.reply

    @contextmanager
    def interruptible(self) -> Iterator[trio.CancelScope]:
        """A cancel scope that a stop request cancels."""
        with trio.CancelScope() as scope:
            if self.stop_requested:
                scope.cancel()
            self._interruptible.append(scope)
            try:
                yield scope
            finally:
                self._interruptible.remove(scope)

    async def end_as_asked(self) -> NoReturn:
        """For a `started()` that a stop request has interrupted: end here and now, for the reason of that request."""
        self._end_for(self.stop_reason or Killed())
        await trio.sleep_forever()
        raise InternalError(f"actor {self.name!r} lives on after its end")

    # -- the life itself

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Live. Meant for `nursery.start`, which returns once `started()` has, or if cancelled, once all has ended.

        Raises:
            StartFailed: `started()` raised, or the actor was stopped before it had returned.
            NameTaken: the name is held.
        """
        self.system.registry.register(self.name, self)
        self._task = trio.lowlevel.current_task()
        current_incarnation.set(self)
        if self._parent is not None:
            self._parent.children[self.serial] = self
        self.system.life_began(self, None if self._parent is None else self._parent.name)
        has_started = False
        ended_in_order: ExitReason | None = None
        crash: Exception | None = None
        outside: BaseException | None = None
        try:
            with self._scope:
                async with trio.open_nursery() as background:
                    self.actor.bind(self, background)
                    await self.actor.started()
                    self.state = ActorState.RUNNING
                    has_started = True
                    task_status.started()
                    reason = await self._receive_until_stopped()
                    self.state = ActorState.STOPPING
                    await self.actor.stopping(reason)
                    background.cancel_scope.cancel()
                ended_in_order = reason
        except BaseException as error:  # noqa: BLE001 - sorted below
            # Sorted here and not by `except*`: what is not ours must be raised again, but only after the cleanup.
            crash, outside = _sort(error)
        self.state = ActorState.STOPPING
        if crash is not None:
            why: ExitReason = Crashed(crash)
        else:
            why = ended_in_order or self._killed_for or Killed()
        try:
            why = await self._clean_up(why)
        finally:
            self._finish(why)
        if outside is not None:
            raise outside
        if not has_started:
            raise StartFailed(self.name, why) from (why.error if isinstance(why, Crashed) else None)

    async def _receive_until_stopped(self) -> ExitReason:
        handlers: dict[type, Callable[[Any], Any]] = {}
        system = self.system
        clock = time.perf_counter
        while True:
            envelope = await self.mailbox.receive()
            message = envelope.message
            if isinstance(message, StopRequest):
                return message.reason
            if envelope.on_taken is not None:
                envelope.on_taken()
            if system.tracer is not None:
                now = trio.current_time()
                waited = None if envelope.sent_at is None else now - envelope.sent_at
                system.tracer.received(now, self.name, message, waited)
            handler = handlers.get(type(message))
            if handler is None:
                handler = handlers[type(message)] = self.actor.handler_for(type(message))
            self._is_reply_taken = False
            self._current = envelope
            began = clock()
            try:
                value = handler(message)
                if inspect.isawaitable(value):
                    value = await value
            except Refused as refusal:
                self._refuse(envelope, refusal)
            else:
                if envelope.reply is not None and not self._is_reply_taken:
                    envelope.reply.answer(value)
            self._current = None
            self.handler_seconds += clock() - began
            if system.tracer is not None:
                system.tracer.handled(trio.current_time(), self.name, message)

    def _refuse(self, envelope: Envelope, refusal: Refused) -> None:
        if envelope.reply is None or self._is_reply_taken:
            self.system.count_unheard_refusal()
            _log.info("%s refused %s: %s", self.name, type(envelope.message).__name__, refusal.error)
        else:
            envelope.reply.refuse(refusal.error)

    async def _clean_up(self, why: ExitReason) -> ExitReason:
        """Run `stopped()`; an orderly end whose cleanup raises was no orderly end."""
        limit = self.actor.cleanup_seconds
        with trio.CancelScope(shield=True, deadline=trio.current_time() + limit) as scope:
            try:
                await self.actor.stopped(why)
            except Exception as error:  # noqa: BLE001 - an error in a hook is an exit reason
                if not isinstance(why, Crashed):
                    return Crashed(error)
                why.error.add_note(f"while stopped() raised {type(error).__name__}: {error}")
                _log.error("%s: stopped() raised after a crash", self.name, exc_info=error)
        if scope.cancelled_caught:
            self.system.count_cleanup_overrun()
            _log.error("%s: stopped() did not end in %s s and was cut off", self.name, limit)
        return why

    def _finish(self, why: ExitReason) -> None:
        """Make the end known, in one go: nobody can see half of it."""
        self.reason = why
        self.state = ActorState.EXITED
        if self._parent is not None:
            self._parent.children.pop(self.serial, None)
        self.system.registry.release(self.name, self, why, expected=self._is_supervised)
        for envelope in self.mailbox.close():
            if envelope.reply is not None:
                envelope.reply.return_unread()
            elif envelope.is_notice:
                self.system.count_moot_notice()
            else:
                self.system.dead_letter(self.name, envelope.message)
        for reply in self._asked:
            reply.orphan(ActorGone(self.name, why))
        self._asked.clear()
        while self._watched:
            number, target = self._watched.popitem()
            target.remove_monitor(number)
        monitors, self._monitors = self._monitors, {}
        for callback in monitors.values():
            callback(why)
        links, self._links = self._links, {}
        for other in links.values():
            del other._links[self.serial]
            other._linked_ended(self.name, why)
        self._exited.set()
        self.system.life_ended(self, why)

    # -- small parts

    def _check_accepts(self, message: object) -> None:
        if not self.actor.accepts(type(message)):
            raise UnknownMessage(
                f"{type(self.actor).__name__} {self.name!r} has no handler for {type(message).__name__}"
            )

    def _envelope(
        self,
        message: object,
        reply: Reply[Any] | None,
        on_taken: Callable[[], None] | None = None,
        is_notice: bool = False,
    ) -> Envelope:
        if reply is not None:
            self._asked.add(reply)
        sent_at = None if self.system.tracer is None else trio.current_time()
        return Envelope(message, reply, sent_at, on_taken, is_notice)

    def _sent(self, message: object) -> None:
        tracer = self.system.tracer
        if tracer is not None:
            tracer.sent(trio.current_time(), current_actor_name(), self.name, message, self.mailbox.depth)

    def forget_ask(self, reply: Reply[Any]) -> None:
        """The asker no longer waits, answered or not."""
        self._asked.discard(reply)

    def _dropped(self, envelope: Envelope) -> None:
        self.system.count_drop()
        if envelope.on_taken is not None:
            envelope.on_taken()
        if envelope.reply is not None:
            envelope.reply.orphan(MailboxFull(f"{self.name!r} dropped the request for newer messages"))


def _sort(error: BaseException) -> tuple[Exception | None, BaseException | None]:
    """Split what ended a life into the actor's own error and what belongs to whoever runs it."""
    if isinstance(error, Exception):
        return _unwrap(error), None
    if isinstance(error, BaseExceptionGroup):
        own, outside = error.split(Exception)
        return (None if own is None else _unwrap(own)), outside
    return None, error


def _unwrap(error: Exception) -> Exception:
    """The one error in a group of one, however deep."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
