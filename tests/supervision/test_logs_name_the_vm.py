# SPDX-License-Identifier: Apache-2.0
"""What quarantine, watchdog and supervisors write about a VM or a session says in its fields whom it is about."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.supervision.workers import Crash
from vgpu.actors import Actor, ActorSpec, Refused, Request, handles, open_system
from vgpu.actors.fault_messages import (
    BeginQuarantine,
    ClearQuarantine,
    EndQuarantine,
    FaultKept,
    FaultTimes,
    GetRules,
    ListQuarantines,
    MeasureProgress,
    QuarantineRecord,
    QuarantineRule,
    SessionProgress,
)
from vgpu.actors.ledger import CannotWrite
from vgpu.actors.messages import SessionId, Watch
from vgpu.logs import make_handler
from vgpu.supervision import ChildSpec, SupervisorSpec
from vgpu.supervision.quarantine import QuarantineKeeper
from vgpu.supervision.watchdog import Watchdog

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """What the log has, each line as an object."""
    stream = io.StringIO()
    handler = make_handler("json", stream, {})
    log = logging.getLogger("vgpu")
    log.addHandler(handler)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    log.removeHandler(handler)


@attrs.frozen
class Fail(Request[None]):
    """To the ledger below: from now on."""


@attrs.define(eq=False)
class Ledger(Actor):
    """One in which red has made three faults."""

    in_force: tuple[QuarantineRecord, ...] = ()
    fails: bool = False

    @handles(ListQuarantines)
    def list_quarantines(self, message: ListQuarantines) -> tuple[QuarantineRecord, ...]:
        return self.in_force

    @handles(GetRules)
    def rules(self, message: GetRules) -> Mapping[str, QuarantineRule]:
        if self.fails:
            raise Refused(CannotWrite("the disk is full"))
        return {"red": QuarantineRule(3, 1e12)}

    @handles(FaultTimes)
    def times(self, message: FaultTimes) -> tuple[tuple[str, float], ...]:
        return (("red", 1.0), ("red", 2.0), ("red", 3.0), ("blue", 3.0))

    @handles(BeginQuarantine)
    def begin(self, message: BeginQuarantine) -> QuarantineRecord:
        self.in_force = (QuarantineRecord(message.vm, message.by, message.reason, 3.0),)
        return self.in_force[0]

    @handles(EndQuarantine)
    def end(self, message: EndQuarantine) -> QuarantineRecord:
        (record,), self.in_force = self.in_force, ()
        return record

    @handles(Fail)
    def fail(self, message: Fail) -> None:
        self.fails = True


async def test_quarantine(lines: Lines) -> None:
    async with open_system() as system:
        ledger = await system.spawn(ActorSpec("mediator/ledger", Ledger))
        keeper = await system.spawn(ActorSpec("mediator/quarantine", lambda: QuarantineKeeper(())))
        await wait_all_tasks_blocked()
        await keeper.ask(ClearQuarantine("red", "test"))
        await ledger.ask(Fail())
        await keeper.send(FaultKept("red"))
        await wait_all_tasks_blocked()
    began, over, unsure = lines()
    assert began["message"].startswith("red is quarantined by watchdog: 3 faults within")
    assert over["message"] == "the quarantine of red is over, says test"
    assert unsure["message"] == "cannot judge red yet: the disk is full"
    assert {(line["actor"], line["vm"]) for line in lines()} == {("mediator/quarantine", "red")}


@attrs.define(eq=False)
class Stopped(Actor):
    """An executor whose worker has been stopped."""

    @handles(MeasureProgress)
    def measure(self, message: MeasureProgress) -> SessionProgress:
        return SessionProgress(1, 0, 0, 0, 0, 0, 0, 1e6, is_stopped=True)


async def test_watchdog(lines: Lines, autojump_clock: MockClock) -> None:
    async with open_system() as system:
        executor = await system.spawn(ActorSpec("executor", Stopped))
        watchdog = await system.spawn(ActorSpec("watchdog", Watchdog))
        await watchdog.send(Watch(SessionId(7), executor, "red"))
        await trio.sleep(1)
    (line,) = lines()
    assert line["message"] == "the worker of session 7 is stopped, and may be for 1e+06 s"
    assert (line["actor"], line["vm"], line["session"]) == ("watchdog", "red", 7)


@attrs.define(eq=False)
class Tenant(Actor):
    """Knows whom it works for."""

    @property
    def subject(self) -> Mapping[str, object]:
        return {"vm": "red", "session": 7}

    @handles(Crash)
    def crash(self, message: Crash) -> None:
        raise ValueError("as told")


async def test_a_crash_is_logged_with_whom_it_befell(lines: Lines) -> None:
    async with open_system(SupervisorSpec("top", [ChildSpec("tenant", Tenant)])) as system:
        await system.ref("top/tenant").send(Crash())
        await wait_all_tasks_blocked()
    (line,) = lines()
    assert "ValueError: as told" in line["message"]
    assert (line["actor"], line["vm"], line["session"]) == ("top", "red", 7)
