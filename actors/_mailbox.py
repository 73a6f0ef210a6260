# SPDX-License-Identifier: Apache-2.0
"""A bounded inbox with two lanes: what one actor receives from.

Like a trio memory channel (bounded, first in first out, blocked senders served in order, nothing lost to
cancellation) with three differences. There is a *system lane* that overtakes the data lane, so that a stop
request reaches an actor whose mailbox is full. A full data lane follows a policy: block the sender, refuse, or
drop the oldest. And closing hands back what was not read, so that the owner can count it as dead letters.

It must never lose an item without counting it, and never hold more than `capacity` data items. The system lane
has no bound: only the runtime writes to it (stop requests, one `Down` a monitor).
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar, final

import attrs
import trio

from .errors import InternalError, MailboxClosed, MailboxFull

__all__ = ["Mailbox", "MailboxStatistics", "Policy"]

T = TypeVar("T")


class Policy(enum.Enum):
    """What a full mailbox does to one more message."""

    BLOCK = "block"
    FAIL = "fail"
    DROP_OLDEST = "drop-oldest"


@attrs.frozen
class MailboxStatistics:
    """A snapshot of one mailbox. Counters run from the start of the actor's present life."""

    capacity: int
    depth: int
    """Data items waiting to be received."""
    system_depth: int
    """System items waiting to be received."""
    high_water: int
    """The largest `depth` seen."""
    accepted: int
    """Data items taken in."""
    received: int
    """Data items given to the owner."""
    dropped: int
    """Data items thrown out by the drop-oldest policy."""
    refused: int
    """Sends turned away because the mailbox was full."""
    tasks_waiting_send: int
    """Senders blocked at this moment."""


@attrs.define(eq=False)
class _Waiting(Generic[T]):
    """One blocked sender. `accepted` tells the sender, once woken, whether its item went in."""

    task: trio.lowlevel.Task
    item: T
    accepted: bool = False


@final
class Mailbox(Generic[T]):
    """One receiver, any number of senders, `capacity` data items.

    Invariant: senders wait only while the data lane is full, so `not _senders or len(_data) == capacity`.
    Invariant: accepted == received + dropped + len(_data), until the mailbox is closed.

    Args:
        capacity: how many data items may wait, at least 1.
        policy: what happens to one more.
        on_drop: called with each item the drop-oldest policy throws out; must not raise.
    """

    def __init__(
        self,
        capacity: int,
        policy: Policy = Policy.BLOCK,
        on_drop: Callable[[T], None] | None = None,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"mailbox capacity must be at least 1, got {capacity}")
        self._capacity = capacity
        self.policy = policy
        self._on_drop = on_drop
        self._data: deque[T] = deque()
        self._system: deque[T] = deque()
        self._senders: deque[_Waiting[T]] = deque()
        # The task parked in receive(), None while nobody waits.
        self._receiver: trio.lowlevel.Task | None = None
        self._closed = False
        self._high_water = 0
        self._accepted = 0
        self._received = 0
        self._dropped = 0
        self._refused = 0

    @property
    def depth(self) -> int:
        """Data items waiting now."""
        return len(self._data)

    @property
    def is_full(self) -> bool:
        """Whether one more data item would meet the policy."""
        return len(self._data) >= self._capacity

    def statistics(self) -> MailboxStatistics:
        """Return the counters as they are now."""
        return MailboxStatistics(
            capacity=self._capacity,
            depth=len(self._data),
            system_depth=len(self._system),
            high_water=self._high_water,
            accepted=self._accepted,
            received=self._received,
            dropped=self._dropped,
            refused=self._refused,
            tasks_waiting_send=len(self._senders),
        )

    def send_nowait(self, item: T) -> None:
        """Put an item in the data lane without waiting.

        Raises:
            MailboxFull: it is full and the policy is not drop-oldest.
            MailboxClosed: the owner has ended.
        """
        if not self._offer(item):
            self._refused += 1
            raise MailboxFull(f"mailbox holds {len(self._data)} messages, its limit")

    async def send(self, item: T, *, always_wait: bool = False) -> None:
        """Put an item in the data lane; with the block policy, or if told to, wait for room.

        Always a checkpoint. If cancelled, the item was not accepted.

        Raises:
            MailboxFull: it is full and the policy is to fail (never with `always_wait`).
            MailboxClosed: the owner has ended, perhaps while we waited.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.policy is not Policy.BLOCK and not always_wait:
            self.send_nowait(item)
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        if self._offer(item):
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        waiting = _Waiting(trio.lowlevel.current_task(), item)
        self._senders.append(waiting)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._senders.remove(waiting)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        if not waiting.accepted:
            raise MailboxClosed("the mailbox closed while the sender waited for room")

    def send_system(self, item: T) -> None:
        """Put an item in the system lane, ahead of all data. Never waits, never refuses for want of room.

        Raises:
            MailboxClosed: the owner has ended.
        """
        if self._closed:
            raise MailboxClosed("the mailbox is closed")
        self._system.append(item)
        self._wake_receiver()

    def discard_system(self, is_unwanted: Callable[[T], bool]) -> None:
        """Take unwanted items out of the system lane again."""
        self._system = deque(item for item in self._system if not is_unwanted(item))

    async def receive(self) -> T:
        """Wait for the next item: the oldest of the system lane, else the oldest of the data lane.

        Always a checkpoint. If cancelled, no item was taken.

        Raises:
            MailboxClosed: the mailbox is closed.
            InternalError: two tasks receive at once.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._system or self._data:
            await trio.lowlevel.cancel_shielded_checkpoint()
        # A loop, for what it was woken for may have been discarded before it ran.
        while not (self._system or self._data or self._closed):
            if self._receiver is not None:
                raise InternalError("two tasks receive from one mailbox")
            self._receiver = trio.lowlevel.current_task()

            def abort(_: object) -> trio.lowlevel.Abort:
                self._receiver = None
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)
        if self._system:
            return self._system.popleft()
        if not self._data:
            raise MailboxClosed("the mailbox is closed")
        item = self._data.popleft()
        self._received += 1
        if self._senders:
            waiting = self._senders.popleft()
            self._accept(waiting.item)
            waiting.accepted = True
            trio.lowlevel.reschedule(waiting.task)
        return item

    def close(self) -> list[T]:
        """Refuse everything from now on; wake blocked senders with `MailboxClosed`. Idempotent.

        Returns:
            Data items accepted and never received, oldest first. Items of the system lane are meant for a
            living owner only and are forgotten.
        """
        self._closed = True
        left = list(self._data)
        self._data.clear()
        self._system.clear()
        while self._senders:
            trio.lowlevel.reschedule(self._senders.popleft().task)
        self._wake_receiver()
        return left

    def _offer(self, item: T) -> bool:
        """Take the item if there is, or can be made, room for it."""
        if self._closed:
            raise MailboxClosed("the mailbox is closed")
        if len(self._data) >= self._capacity:
            if self.policy is not Policy.DROP_OLDEST:
                return False
            oldest = self._data.popleft()
            self._dropped += 1
            if self._on_drop is not None:
                self._on_drop(oldest)
        self._accept(item)
        self._wake_receiver()
        return True

    def _accept(self, item: T) -> None:
        assert len(self._data) < self._capacity
        self._data.append(item)
        self._accepted += 1
        self._high_water = max(self._high_water, len(self._data))

    def _wake_receiver(self) -> None:
        if self._receiver is not None:
            trio.lowlevel.reschedule(self._receiver)
            self._receiver = None
