# SPDX-License-Identifier: Apache-2.0
"""The answer to one ask: a slot written once, by the actor or on its behalf, and awaited by the asker.

An asker that gives up abandons its slot; what is written afterwards is dropped and counted as a late reply.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Generic, TypeVar, cast, final

import trio

from .errors import ActorError

__all__ = ["Reply"]

R = TypeVar("R")


class _State(enum.Enum):
    PENDING = "pending"
    ANSWERED = "answered"
    REFUSED = "refused"
    ABANDONED = "abandoned"
    # The target ended first. Its handler or a background task may still try to answer: that is late, no bug.
    ORPHANED = "orphaned"
    # The target ended with the request still in its mailbox.
    UNREAD = "unread"


@final
class Reply(Generic[R]):
    """Answer it once, with `answer` or `refuse`, from any task of the system. Never blocks."""

    def __init__(self, on_late: Callable[[], None]) -> None:
        self._on_late = on_late
        self._state = _State.PENDING
        self._value: R | None = None
        self._error: Exception | None = None
        self._settled = trio.Event()

    @property
    def is_awaited(self) -> bool:
        """Whether an answer would still reach the asker. Worth a look before expensive work."""
        return self._state is _State.PENDING

    @property
    def is_unread(self) -> bool:
        """Whether the target ended before it had begun to handle the request."""
        return self._state is _State.UNREAD

    def answer(self, value: R) -> bool:
        """Give the asker its answer.

        Returns:
            False where the asker no longer waits; the answer is then dropped and counted.

        Raises:
            ActorError: this reply was answered or refused before.
        """
        if not self._settle(_State.ANSWERED):
            return False
        self._value = value
        return True

    def refuse(self, error: Exception) -> bool:
        """Raise `error` from the asker's `ask`. Returns and raises as `answer` does."""
        if not self._settle(_State.REFUSED):
            return False
        self._error = error
        return True

    def orphan(self, error: Exception) -> None:
        """Fail the ask because its target ended. Does nothing to a settled reply."""
        if self._state is _State.PENDING:
            self._settle(_State.ORPHANED)
            self._error = error

    def return_unread(self) -> None:
        """Tell the asker that no handler has seen the request. Does nothing to a settled reply."""
        if self._state is _State.PENDING:
            self._settle(_State.UNREAD)

    def abandon(self) -> None:
        """The asker stops waiting. Does nothing to a settled reply."""
        if self._state is _State.PENDING:
            self._state = _State.ABANDONED

    async def wait(self) -> None:
        """Wait until there is something to `take`. Cancellation leaves the reply as it is."""
        await self._settled.wait()

    def take(self) -> R:
        """Return the answer, or raise what it was refused with. Only after `wait` returned."""
        if self._error is not None:
            raise self._error
        return cast(R, self._value)

    def _settle(self, state: _State) -> bool:
        if self._state in (_State.ANSWERED, _State.REFUSED):
            raise ActorError("this request was answered before")
        if self._state is not _State.PENDING:
            self._on_late()
            return False
        self._state = state
        self._settled.set()
        return True
