# SPDX-License-Identifier: Apache-2.0
"""Every error the actor runtime raises, in one tree.

    ActorError
    ├── ActorGone            the target is not there, or ended before it answered
    ├── AskTimeout           the deadline of an ask passed
    ├── MailboxFull          the mailbox refuses (policy), or waiting would wait for oneself
    ├── MailboxClosed        the owner of the mailbox has ended
    ├── UnknownMessage       that actor has no handler for that message type (a bug of the sender)
    ├── NameTaken            two living actors may not have one name
    ├── StartFailed          an actor ended before it was started
    ├── SystemFailed         the root of a system ended although nobody asked it to
    └── InternalError        an invariant of the runtime is void: a bug here
    Refused                  raised by a handler: answer this request with an error, and go on

Nothing here is ever swallowed by the runtime except `Refused`; whatever else a handler raises ends its actor.
"""

from __future__ import annotations

from ._exit import ExitReason

__all__ = [
    "ActorError",
    "ActorGone",
    "AskTimeout",
    "InternalError",
    "MailboxClosed",
    "MailboxFull",
    "NameTaken",
    "Refused",
    "StartFailed",
    "SystemFailed",
    "UnknownMessage",
]


class ActorError(Exception):
    """Base of what the actor runtime raises."""


class ActorGone(ActorError):
    """The target of an ask is not alive. A restart may bring it back: asking again is sensible.

    Attributes:
        name: the target's name.
        reason: why it ended, `NoActor()` where nothing of that name is known.
    """

    def __init__(self, name: str, reason: ExitReason) -> None:
        super().__init__(f"actor {name!r} is gone: {reason}")
        self.name = name
        self.reason = reason


class AskTimeout(ActorError):
    """No answer came in time. Whether the request was or will be handled is unknown."""

    def __init__(self, name: str, request: object, timeout_seconds: float) -> None:
        super().__init__(f"actor {name!r} did not answer {type(request).__name__} in {timeout_seconds} s")
        self.name = name
        self.timeout_seconds = timeout_seconds


class MailboxFull(ActorError):
    """The message was not accepted; nothing was changed."""


class MailboxClosed(ActorError):
    """The mailbox's owner has ended; the message was not accepted."""


class UnknownMessage(ActorError, TypeError):
    """The target declares no handler for this type. Raised at the sender, whose bug it is."""


class NameTaken(ActorError):
    """A living actor holds this name already."""


class StartFailed(ActorError):
    """An actor ended before it had started; `reason` says why, `__cause__` holds the error if there was one."""

    def __init__(self, name: str, reason: ExitReason) -> None:
        super().__init__(f"actor {name!r} did not start: {reason}")
        self.name = name
        self.reason = reason


class SystemFailed(ActorError):
    """The root actor ended on its own (an escalation reached the top)."""

    def __init__(self, name: str, reason: ExitReason) -> None:
        super().__init__(f"root actor {name!r} ended: {reason}")
        self.name = name
        self.reason = reason


class InternalError(ActorError):
    """An invariant of the runtime does not hold. Please report it."""


class Refused(Exception):
    """Raise it in a handler to answer the current request with `error`, without ending the actor.

    The asker sees `error` raised from its `ask`. Where the message was only sent, nobody waits for the
    answer, and the refusal is counted and dropped.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(f"request refused: {error}")
        self.error = error
