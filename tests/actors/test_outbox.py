# SPDX-License-Identifier: Apache-2.0
"""Nothing that was handed to the outbox is lost, whatever the ledger or the outbox does meanwhile, and a fault is kept once."""

from __future__ import annotations

import sqlite3
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from vgpu.actors import Actor, ActorSystem, Refused, handles, open_system
from vgpu.actors.fault_book import NotQuarantined
from vgpu.actors.fault_messages import FaultKept, GetQuarantine, Keep
from vgpu.actors.ledger import CannotWrite, Ledger, LedgerFile
from vgpu.actors.ledger_health import CheckOutbox
from vgpu.actors.messages import RecordEnd, RecordFault, RecordStart, SessionId, SessionInfo, SessionSample
from vgpu.actors.outbox import Outbox
from vgpu.supervision import ChildSpec, SupervisorSpec


def info(session: int, vm: str = "vm1") -> SessionInfo:
    return SessionInfo(SessionId(session), vm, 42, "ollama", "w1", 43)


def ending(session: int) -> RecordEnd:
    return RecordEnd(SessionSample(info(session), 1, {"records": 7}, {}, {}, "guest ended"))


def tree(path: Path) -> SupervisorSpec:
    children = (ChildSpec("ledger", Ledger, (path,)), ChildSpec("outbox", Outbox, (deque(),)))
    return SupervisorSpec("mediator", children, intensity=50)


def rows(path: Path) -> list[tuple[int, str]]:
    with sqlite3.connect(path) as database:
        query = "SELECT session, reason FROM sessions WHERE ended IS NOT NULL ORDER BY session"
        return database.execute(query).fetchall()


async def keep(system: ActorSystem, record: RecordStart | RecordEnd | RecordFault) -> None:
    await system.ref("mediator/outbox").ask(Keep(record), wait_for_name=True)


async def test_ends_and_faults_arrive_while_the_ledger_is_killed_again_and_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    async with open_system(tree(path)) as system:
        for session in range(1, 31):
            await keep(system, RecordStart(info(session)))
            if session % 3 == 0:
                system.ref("mediator/ledger").kill("a test")
            await keep(system, RecordFault(info(session), 702, "hung", "hang"))
            await keep(system, ending(session))
            if session % 10 == 0:
                system.ref("mediator/outbox").kill("a test")
        with trio.fail_after(60):
            while len(rows(path)) < 30:
                await trio.sleep(0.02)
    assert rows(path) == [(session, "guest ended") for session in range(1, 31)]
    file = LedgerFile(path)
    assert [fault["session"] for fault in file.faults(100)] == list(range(30, 0, -1))
    file.close()


async def test_what_waits_gets_there_when_all_is_stopped(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    async with open_system(tree(path)) as system:
        for session in range(1, 21):
            await keep(system, RecordStart(info(session)))
            await keep(system, ending(session))
    assert len(rows(path)) == 20


@attrs.define(eq=False)
class FullDisk(Actor):
    """A ledger that cannot write for a while."""

    taken: list[object]
    refusals: int = 3

    @handles(RecordEnd)
    def record_end(self, message: RecordEnd) -> None:
        self._take(message)

    @handles(RecordFault)
    def record_fault(self, message: RecordFault) -> bool:
        self._take(message)
        return True

    def _take(self, message: object) -> None:
        self.refusals -= 1
        if self.refusals >= 0:
            raise Refused(CannotWrite("database or disk is full"))
        self.taken.append(message)


@attrs.define(eq=False)
class Judge(Actor):
    """Hears of faults."""

    heard: list[str]

    @handles(FaultKept)
    def kept(self, message: FaultKept) -> None:
        self.heard.append(message.vm)


async def test_a_full_disk_is_waited_for_in_order(autojump_clock: trio.testing.MockClock) -> None:
    taken: list[object] = []
    heard: list[str] = []
    spec = SupervisorSpec(
        "mediator",
        (
            ChildSpec("ledger", partial(FullDisk, taken)),
            ChildSpec("quarantine", partial(Judge, heard)),
            ChildSpec("outbox", Outbox, (deque(),)),
        ),
    )
    records: list[Any] = [ending(1), RecordFault(info(1), 702, "hung", "hang"), ending(2)]
    async with open_system(spec) as system:
        for record in records:
            await keep(system, record)
        await trio.sleep(30)
        assert taken == records
        assert heard == ["vm1"]
    assert system.ref("mediator/ledger").is_alive is False


def test_a_fault_is_kept_once_and_a_quarantine_is_ended_once(tmp_path: Path) -> None:
    file = LedgerFile(tmp_path / "ledger.sqlite")
    hang = RecordFault(info(1), 702, "hung", "hang", '{"kernel": "k"}', 100.0)
    assert file.book.record(hang)
    assert not file.book.record(hang)
    assert file.book.record(attrs.evolve(hang, kind="crash"))
    assert file.faults(10)[1]["details"] == {"kernel": "k"}
    assert file.book.times(("hang",), 0) == (("vm1", 100.0),)
    first = file.book.begin("vm1", "watchdog", "so many")
    assert file.book.begin("vm1", "root", "once more") == first
    assert file.book.in_force("vm1") == first
    assert file.book.end("vm1", "root").ended_by == "root"
    with pytest.raises(NotQuarantined):
        file.book.end("vm1", "root")
    assert file.book.in_force("vm1") is None
    assert file.book.times(("hang",), 0) == ()  # those before its end count no more
    file.close()


async def test_the_ledger_says_who_is_quarantined(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    file = LedgerFile(path)
    file.book.begin("vm1", "root", "why not")
    file.close()
    async with open_system(tree(path)) as system:
        found = await system.ref("mediator/ledger").ask(GetQuarantine("vm1"))
        assert found is not None
        assert found.reason == "why not"
        assert await system.ref("mediator/ledger").ask(GetQuarantine("vm2")) is None


async def test_a_record_that_can_never_be_kept_does_not_hold_up_the_others(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    async with open_system(tree(path)) as system:
        await keep(system, RecordStart(attrs.evolve(info(1), program="\udcff")))
        await keep(system, RecordStart(info(2)))
        await keep(system, ending(2))
        with trio.fail_after(60):
            while [session for session, _ in rows(path)] != [2]:
                await trio.sleep(0.02)
        health = await system.ref("mediator/outbox").ask(CheckOutbox())
        assert (health.waiting, health.lost) == (0, 1)
