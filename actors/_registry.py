# SPDX-License-Identifier: Apache-2.0
"""Names of living actors: how a reference finds its target, again and again.

A name is free, *held* by a living actor, or *expected*: its holder has ended and its supervisor has not yet
decided. An ask to an expected name waits for the successor (within its deadline); an ask to a free one fails at
once. The last exits are remembered, bounded, so that a monitor set on a dead actor can tell why it died.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, final

import trio

from ._exit import ExitReason, NoActor
from .errors import NameTaken

if TYPE_CHECKING:
    from ._incarnation import Incarnation

__all__ = ["REMEMBERED_EXITS", "Registry"]

# Enough to answer for every session of a busy host that ended in the last minutes; each entry is a name and a value.
REMEMBERED_EXITS = 1024


@final
class Registry:
    """Maps names to lives. No name is ever both held and expected."""

    def __init__(self) -> None:
        self._held: dict[str, Incarnation] = {}
        self._expected: set[str] = set()
        self._exits: OrderedDict[str, ExitReason] = OrderedDict()
        # Woken, and replaced, whenever a name changes its state; only names somebody waits for have one.
        self._changes: dict[str, trio.Event] = {}

    def register(self, name: str, life: Incarnation) -> None:
        """Give the name to a life.

        Raises:
            NameTaken: another life holds it.
        """
        holder = self._held.get(name)
        if holder is not None:
            raise NameTaken(f"the name {name!r} is held by a living actor (serial {holder.serial})")
        self._held[name] = life
        self._expected.discard(name)
        self._changed(name)

    def release(self, name: str, life: Incarnation, reason: ExitReason, *, expected: bool) -> None:
        """Take the name from a life that ended; do nothing if it is not the holder."""
        if self._held.get(name) is not life:
            return
        del self._held[name]
        if expected:
            self._expected.add(name)
        self._exits[name] = reason
        self._exits.move_to_end(name)
        while len(self._exits) > REMEMBERED_EXITS:
            self._exits.popitem(last=False)
        self._changed(name)

    def forget(self, name: str) -> None:
        """Nobody will take this name again soon: waiters are told. A held name is left alone."""
        if name in self._expected:
            self._expected.discard(name)
            self._changed(name)

    def find(self, name: str) -> Incarnation | None:
        """The living holder of a name, or None."""
        return self._held.get(name)

    def is_expected(self, name: str) -> bool:
        """Whether a supervisor may bring this name back."""
        return name in self._expected

    def last_exit(self, name: str) -> ExitReason:
        """Why the last holder ended; `NoActor()` where that is not known."""
        return self._exits.get(name, NoActor())

    def names(self) -> tuple[str, ...]:
        """Names of the living, sorted."""
        return tuple(sorted(self._held))

    def lives(self) -> tuple[Incarnation, ...]:
        """All who hold a name."""
        return tuple(self._held.values())

    async def wait_changed(self, name: str) -> None:
        """Wait until the name is taken, released or forgotten. Leaves nothing behind when cancelled."""
        event = self._changes.setdefault(name, trio.Event())
        try:
            await event.wait()
        finally:
            if event.statistics().tasks_waiting == 0 and self._changes.get(name) is event:
                del self._changes[name]

    def _changed(self, name: str) -> None:
        event = self._changes.pop(name, None)
        if event is not None:
            event.set()
