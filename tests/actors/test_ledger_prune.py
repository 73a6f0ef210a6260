# SPDX-License-Identifier: Apache-2.0
"""What the ledger lets go of, and what it never does."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import pytest
import trio

from vgpu.actors import ActorSpec, open_system
from vgpu.actors.fault_messages import QuarantineRule, SetRule
from vgpu.actors.ledger import Ledger, LedgerFile
from vgpu.actors.ledger_prune import Keeping, prune
from vgpu.actors.messages import (
    CountFaults,
    EnsureVm,
    FaultCount,
    NextSession,
    RecordFault,
    SessionId,
    SessionInfo,
)

DAY = 86400.0
NOW = 1_000_000_000.0


@pytest.fixture
def db(tmp_path: Path) -> sqlite3.Connection:
    path = tmp_path / "ledger.sqlite"
    LedgerFile(path).close()
    return sqlite3.connect(path, isolation_level=None)


def session(db: sqlite3.Connection, began: float | None, ended: float | None, vm: str = "a") -> int:
    number = db.execute(
        "INSERT INTO sessions (vm, began, ended) VALUES (?, ?, ?)", (vm, began, ended)
    ).lastrowid
    assert number is not None
    return number


def fault(
    db: sqlite3.Connection, at: float, vm: str = "a", kind: str = "kernel", of: int = 0, error: int = 700
) -> int:
    number = db.execute(
        "INSERT INTO faults (session, vm, error, what, at, kind) VALUES (?, ?, ?, '', ?, ?)",
        (of, vm, error, at, kind),
    ).lastrowid
    assert number is not None
    return number


def all_of(db: sqlite3.Connection, keeping: Keeping, batch: int = 200) -> int:
    """Batches until there is nothing more."""
    total = 0
    while gone := prune(db, keeping, NOW, batch):
        assert gone <= 2 * batch
        total += gone
    return total


def left(db: sqlite3.Connection, table: str) -> list[int]:
    return [row[0] for row in db.execute(f"SELECT {table} FROM {table}s ORDER BY {table}")]


def test_old_sessions_go_and_living_ones_stay(db: sqlite3.Connection) -> None:
    old = [session(db, NOW - 99 * DAY, NOW - 31 * DAY) for _ in range(5)]
    kept = [session(db, NOW - 99 * DAY, NOW - 29 * DAY), session(db, NOW - 99 * DAY, None)]
    assert all_of(db, Keeping(), batch=2) == len(old)
    assert left(db, "session") == kept
    # And the numbers are never given out again.
    db.execute("DELETE FROM sessions")
    assert session(db, None, None) > kept[-1]


def test_the_oldest_of_too_many_sessions_go(db: sqlite3.Connection) -> None:
    alive = session(db, NOW, None)
    numbers = [session(db, NOW, NOW) for _ in range(30)]
    assert all_of(db, Keeping(sessions=10), batch=7) == 20
    assert left(db, "session") == [alive, *numbers[-10:]]


def test_numbers_that_were_never_used_go_but_not_the_newest(db: sqlite3.Connection) -> None:
    numbers = [session(db, None, None) for _ in range(1003)]
    assert all_of(db, Keeping()) == 3
    assert left(db, "session") == numbers[3:]


def test_faults_go_by_age_and_by_number(db: sqlite3.Connection) -> None:
    fault(db, NOW - 31 * DAY, "b")
    mine = [fault(db, NOW - DAY) for _ in range(12)]
    theirs = [fault(db, NOW - DAY, "b") for _ in range(4)]
    assert all_of(db, Keeping(faults_per_vm=10), batch=2) == 3
    assert left(db, "fault") == mine[2:] + theirs
    assert all_of(db, Keeping(faults=5)) == 9
    assert left(db, "fault") == [mine[-1], *theirs]


def test_what_a_quarantine_counts_stays(db: sqlite3.Connection) -> None:
    counted = [fault(db, NOW - 100, kind="hang") for _ in range(3)]
    fault(db, NOW - 700, kind="hang")  # before the window
    fault(db, NOW - 100, kind="kernel")  # not counted
    future = fault(db, NOW + 100, kind="crash")  # of a clock that was set back
    none = Keeping(faults=0, faults_per_vm=0, days=1e-6)
    assert all_of(db, none) == 2
    assert left(db, "fault") == [*counted, future]
    # A VM's own rule may look further back, and rules do not ask for more than a thousand.
    db.execute("DELETE FROM faults")
    db.execute("INSERT INTO quarantine_rules VALUES ('a', 3, 7200.0)")
    numbers = [fault(db, NOW - 7000, kind="hang") for _ in range(1100)]
    assert all_of(db, none) == 100
    assert left(db, "fault") == numbers[100:]


def test_faults_of_a_session_that_lives_stay(db: sqlite3.Connection) -> None:
    """Who adopts the session notes them again, and would count them as new."""
    alive, ended = session(db, NOW, None), session(db, NOW, NOW)
    kept = fault(db, NOW - 99 * DAY, of=alive)
    fault(db, NOW - 99 * DAY, of=ended)
    assert all_of(db, Keeping()) == 1
    assert left(db, "fault") == [kept]


async def test_the_actor_prunes_by_itself_and_counters_do_not_fall(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    LedgerFile(path).close()
    database = sqlite3.connect(path)
    with database:
        for _ in range(450):
            fault(database, time.time() - 99 * DAY, error=700)
        fault(database, time.time(), error=700)
        fault(database, time.time(), "b", error=702)
    async with open_system(ActorSpec("ledger", lambda: Ledger(path))) as system:
        ledger = system.ref("ledger")
        with trio.fail_after(60):
            while database.execute("SELECT count(*) FROM faults").fetchone()[0] > 2:
                # Others are answered in between.
                await ledger.ask(EnsureVm("a"))
                await trio.sleep(0.02)
        assert await ledger.ask(CountFaults()) == (FaultCount("a", 700, 451), FaultCount("b", 702, 1))
        await ledger.ask(SetRule("a", QuarantineRule(1, 5.0)))
        number = await ledger.ask(NextSession())
        await ledger.ask(RecordFault(SessionInfo(SessionId(number), "a", 1, "x", "w", 2), 700, "again"))
        assert (await ledger.ask(CountFaults()))[0] == FaultCount("a", 700, 452)
    database.close()
