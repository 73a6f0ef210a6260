# SPDX-License-Identifier: Apache-2.0
"""An address: what one actor may know of another.

It holds a name and looks its holder up each time, so it outlives the target and finds the successor after a restart.
It is immutable, hashable, and may be put into messages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar, final

import trio

from ._exit import ASKED, ExitReason
from ._messages import Request
from ._reply import Reply
from .errors import ActorGone, AskTimeout

if TYPE_CHECKING:
    from ._incarnation import Incarnation
    from ._system import ActorSystem

__all__ = ["DEFAULT_ASK_SECONDS", "Ref"]

M_contra = TypeVar("M_contra", contravariant=True)
R = TypeVar("R")

# Long enough for an actor that is busy, short enough that a cycle of asks shows itself.
DEFAULT_ASK_SECONDS = 5.0


@final
class Ref(Generic[M_contra]):
    """The address of an actor that takes messages of type `M_contra` (a union, as a rule)."""

    __slots__ = ("_name", "_system")

    def __init__(self, system: ActorSystem, name: str) -> None:
        self._system = system
        self._name = name

    @property
    def name(self) -> str:
        """The name that is looked up."""
        return self._name

    @property
    def is_alive(self) -> bool:
        """Whether somebody holds the name at this moment."""
        return self._system.registry.find(self._name) is not None

    async def send(self, message: M_contra) -> bool:
        """Put a message in the target's mailbox; waits only for room, and only with the block policy.

        Always a checkpoint. If cancelled, the message was not sent.

        Returns:
            Whether a living actor's mailbox took it (not: whether it will be handled). Where nobody was there,
            it is counted as a dead letter.

        Raises:
            MailboxFull: the target's policy is to fail, or an actor sends to its own full mailbox.
            UnknownMessage: the target has no handler for it.
        """
        life = self._system.registry.find(self._name)
        if life is None:
            await trio.lowlevel.checkpoint()
        elif await life.deliver(message):
            return True
        self._system.dead_letter(self._name, message)
        return False

    def send_nowait(self, message: M_contra) -> bool:
        """As `send`, but never waits: a full mailbox raises `MailboxFull` unless it drops its oldest."""
        life = self._system.registry.find(self._name)
        if life is not None and life.deliver_nowait(message):
            return True
        self._system.dead_letter(self._name, message)
        return False

    def notify(self, message: M_contra) -> bool:
        """As `send_nowait`, for what only matters while the target lives: its end makes the message moot.

        Told to nobody, or unread when the target ends, it is counted as such and is no dead letter. For news that
        races with the target's own end, such as "your guest has left".
        """
        life = self._system.registry.find(self._name)
        if life is not None and life.deliver_nowait(message, is_notice=True):
            return True
        self._system.count_moot_notice()
        return False

    async def ask(
        self,
        request: Request[R],
        *,
        timeout_seconds: float = DEFAULT_ASK_SECONDS,
        wait_for_name: bool = False,
    ) -> R:
        """Send a request and wait for its answer.

        While a supervisor is restarting the target, waits for the successor; a request that the target had not
        begun to handle when it ended goes to the successor too. If cancelled, or late, the target may still handle
        the request; its answer is then dropped and counted.

        Args:
            request: what to ask.
            timeout_seconds: for all of it, waiting for room in the mailbox included.
            wait_for_name: also wait where nobody is known to be coming back under that name.

        Raises:
            AskTimeout: no answer in time.
            ActorGone: there is no such actor, or it ended while it handled the request or owed the answer.
            UnknownMessage: the target has no handler for it.
            MailboxFull: the mailbox refused the request or dropped it for newer messages.
            Exception: what the handler refused the request with (`raise Refused(error)`).
        """
        with trio.move_on_after(timeout_seconds):
            while True:
                life = await self._find_or_wait(wait_for_name)
                life.check_asker()
                reply: Reply[R] = Reply(self._system.count_late_reply)
                try:
                    is_accepted = await life.deliver(request, reply)
                    if is_accepted:
                        await reply.wait()
                finally:
                    reply.abandon()
                    life.forget_ask(reply)
                if is_accepted and not reply.is_unread:
                    return reply.take()
                # The target ended with the request unread. No handler has seen it, so its successor may.
        raise AskTimeout(self._name, request, timeout_seconds)

    def stop(self, reason: ExitReason | None = None) -> None:
        """Ask the present life to end after the message at hand; overtakes all data. Does not wait.

        A supervised actor's supervisor decides by the reason whether another life follows.
        """
        life = self._system.registry.find(self._name)
        if life is not None:
            life.request_stop(ASKED if reason is None else reason)

    def kill(self, cause: str = "") -> None:
        """Cancel the present life without grace; its cleanup still runs. Does not wait."""
        life = self._system.registry.find(self._name)
        if life is not None:
            life.kill(cause)

    async def wait_exit(self) -> ExitReason:
        """Wait for the end of the present life and return why; at once where there is none."""
        life = self._system.registry.find(self._name)
        if life is None:
            await trio.lowlevel.checkpoint()
            return self._system.registry.last_exit(self._name)
        return await life.wait_exited()

    async def wait_alive(self) -> None:
        """Wait until somebody holds the name. Its `started()` may still be running."""
        while self._system.registry.find(self._name) is None:
            await self._system.registry.wait_changed(self._name)
        await trio.lowlevel.checkpoint()

    async def _find_or_wait(self, wait_for_name: bool) -> Incarnation:
        registry = self._system.registry
        while True:
            life = registry.find(self._name)
            if life is not None:
                return life
            if not (wait_for_name or registry.is_expected(self._name)):
                await trio.lowlevel.checkpoint()
                raise ActorGone(self._name, registry.last_exit(self._name))
            await registry.wait_changed(self._name)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ref):
            return NotImplemented
        return self._system is other._system and self._name == other._name

    def __hash__(self) -> int:
        return hash((id(self._system), self._name))

    def __repr__(self) -> str:
        return f"<Ref {self._name!r}>"
