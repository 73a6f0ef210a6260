# SPDX-License-Identifier: Apache-2.0
"""The outbox: what must get into the ledger waits here until the ledger says that it has.

A session that ends has nobody left to try again, and the ledger may just be restarting or its disk be full. So who has
something to record hands it over and goes. Records go in the order they came. They live in a queue made with
the tree: a restart of this actor loses none; with the mediator they die, and what a dead mediator had not got
into the ledger its successor finds out (sessions without a worker, faults of sessions it adopts).
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque

import attrs
import trio

from . import Actor, ActorError, ExitReason, handles
from .fault_messages import FaultKept, Keep
from .ledger import CannotKeep
from .ledger_health import CheckOutbox, OutboxHealth
from .messages import RecordEnd, RecordFault, RecordStart

_log = logging.getLogger("vgpu.outbox")

LEDGER = "mediator/ledger"
QUARANTINE = "mediator/quarantine"
ASK_SECONDS = 10.0
LAST_SECONDS = 3.0
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 2.0
# Some hours of a busy host without a ledger. Then the oldest go, and the log says so.
LIMIT = 100_000

Record = RecordStart | RecordEnd | RecordFault


def _about(record: Record) -> dict[str, object]:
    """Whom a line of the log about it is about."""
    info = record.sample.info if isinstance(record, RecordEnd) else record.info
    return {"vm": info.vm, "session": info.session}


@attrs.define(eq=False)
class Outbox(Actor):
    """Records on their way to the ledger."""

    waiting: deque[Record]
    _wake: trio.Event = attrs.Factory(trio.Event)
    lost: int = 0

    async def stopped(self, reason: ExitReason) -> None:
        """The ledger is stopped after this actor: what sessions said as they were ended gets there still."""
        with trio.move_on_after(LAST_SECONDS), contextlib.suppress(ActorError):
            while self.waiting:
                with contextlib.suppress(CannotKeep):
                    await self.find(LEDGER).ask(self.waiting[0], timeout_seconds=LAST_SECONDS)
                self.waiting.popleft()

    async def started(self) -> None:
        self.nursery.start_soon(self._deliver)

    @handles(Keep)
    def keep(self, message: Keep) -> None:
        if len(self.waiting) >= LIMIT:
            oldest = self.waiting.popleft()
            self.lost += 1
            _log.error("the ledger takes nothing: %d records lost so far", self.lost, extra=_about(oldest))
        self.waiting.append(message.record)
        self._wake.set()

    @handles(CheckOutbox)
    def check(self, message: CheckOutbox) -> OutboxHealth:
        return OutboxHealth(len(self.waiting), self.lost)

    async def _deliver(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while True:
            if not self.waiting:
                self._wake = trio.Event()
                await self._wake.wait()
            record = self.waiting[0]
            try:
                await self.find(LEDGER).ask(record, timeout_seconds=ASK_SECONDS, wait_for_name=True)
            except CannotKeep as error:
                # It never will: what is behind it must not wait for it.
                self.lost += 1
                _log.error("a record is lost: %s", error, extra=_about(record))
                self._done(record)
                continue
            except ActorError as error:
                _log.warning("the ledger did not take a record yet: %s", error, extra=_about(record))
                await trio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                continue
            pause = FIRST_PAUSE_SECONDS
            self._done(record)
            if isinstance(record, RecordFault):
                # Also one that was known: who kept it may not have come to say so.
                self.find(QUARANTINE).notify(FaultKept(record.info.vm))

    def _done(self, record: Record) -> None:
        if self.waiting and self.waiting[0] is record:  # else it gave way meanwhile
            self.waiting.popleft()
