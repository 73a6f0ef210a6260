# SPDX-License-Identifier: Apache-2.0
"""The ledger: what it keeps outlives the process that wrote it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest

from vgpu.actors import ActorSpec, Request, open_system
from vgpu.actors.fault_messages import (
    BeginQuarantine,
    EndQuarantine,
    FaultTimes,
    GetQuarantine,
    ListQuarantines,
    QuarantineRule,
    SetRule,
)
from vgpu.actors.ledger import CannotKeep, Ledger, LedgerFile, NoSuchVm, VmExists
from vgpu.actors.messages import (
    EnsureVm,
    GetVm,
    ListFaults,
    ListVms,
    NextSession,
    PoolRecord,
    RecordEnd,
    RecordFault,
    RecordStart,
    RemoveVm,
    SavePool,
    SaveVm,
    SessionId,
    SessionInfo,
    SessionSample,
    UpdateVm,
    VmRecord,
)


def info(session: int) -> SessionInfo:
    return SessionInfo(SessionId(session), "vm1", 42, "ollama", "w1", 43)


async def test_vms_sessions_and_faults_are_kept_across_lives(tmp_path: Path) -> None:
    path = tmp_path / "state" / "ledger.sqlite"
    async with open_system(ActorSpec("ledger", lambda: Ledger(path))) as system:
        ledger = system.ref("ledger")
        vm = await ledger.ask(EnsureVm("vm1"))
        assert (vm.name, vm.weight, vm.ad_hoc) == ("vm1", 50, True)
        session = await ledger.ask(NextSession())
        await ledger.send(RecordStart(info(session)))
        await ledger.send(RecordFault(info(session), 702, "no progress"))
        await ledger.send(RecordEnd(SessionSample(info(session), 1, {"records": 7}, {}, {}, "guest ended")))
        assert len(await ledger.ask(ListFaults())) == 1
    async with open_system(ActorSpec("ledger", lambda: Ledger(path))) as system:
        ledger = system.ref("ledger")
        assert [vm.name for vm in await ledger.ask(ListVms())] == ["vm1"]
        fault = (await ledger.ask(ListFaults()))[0]
        assert (fault["error"], fault["vm"], fault["what"]) == (702, "vm1", "no progress")
        assert await ledger.ask(NextSession()) > session
    row = sqlite3.connect(path).execute(
        "SELECT vm, reason, counters FROM sessions WHERE session = ?", (session,)
    )
    vm_name, reason, counters = row.fetchone()
    assert (vm_name, reason) == ("vm1", "guest ended")
    assert '"records": 7' in counters


def test_asking_twice_for_a_vm_changes_nothing(tmp_path: Path) -> None:
    file = LedgerFile(tmp_path / "ledger.sqlite")
    first = file.ensure_vm("a")
    assert file.ensure_vm("a") == first
    assert len(file.vms()) == 1
    file.close()


def test_a_registered_vm_is_kept_as_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    vm = VmRecord(
        "a",
        pool="B",
        priority="high",
        weight=80,
        memory_limit_bytes=20 << 30,
        watchdog_seconds=5.5,
        rate=200,
        queue_depth=100,
        bar1_bytes=1 << 30,
        slots=4,
        variant="express",
        address="0x7",
    )
    file = LedgerFile(path)
    file.ensure_vm("a")  # it came by itself once; now it is registered
    assert file.save_vm(vm) == vm
    with pytest.raises(VmExists, match="'a'"):
        file.save_vm(attrs.evolve(vm, weight=1))
    file.close()
    file = LedgerFile(path)
    assert file.vms() == (vm,)
    assert file.ensure_vm("a") == vm
    assert (file.get_vm("a"), file.get_vm("b")) == (vm, None)
    by_itself = file.ensure_vm("b")
    with pytest.raises(NoSuchVm):
        file.remove_vm("c")
    assert file.remove_vm("a") == vm
    assert [row.name for row in file.vms()] == ["b"]
    assert file.remove_vm("b") == by_itself
    assert file.vms() == ()
    file.close()


FIRST_SCHEMA = """
CREATE TABLE vms (
    name TEXT PRIMARY KEY, pool TEXT NOT NULL, priority TEXT NOT NULL, weight INTEGER NOT NULL,
    memory_limit_bytes INTEGER NOT NULL, watchdog_seconds REAL NOT NULL, ad_hoc INTEGER NOT NULL
) STRICT;
CREATE TABLE sessions (
    session INTEGER PRIMARY KEY AUTOINCREMENT, vm TEXT NOT NULL, guest_pid INTEGER, program TEXT,
    worker TEXT, worker_pid INTEGER, began REAL, ended REAL, reason TEXT, counters TEXT
) STRICT;
CREATE TABLE faults (
    fault INTEGER PRIMARY KEY AUTOINCREMENT, session INTEGER NOT NULL, vm TEXT NOT NULL, guest_pid INTEGER,
    program TEXT, error INTEGER NOT NULL, what TEXT NOT NULL, at REAL NOT NULL
) STRICT;
INSERT INTO vms VALUES ('old', 'A', 'high', 80, 5, 12.5, 0);
INSERT INTO sessions (session, vm) VALUES (41, 'old');
PRAGMA user_version = 1;
"""


def test_a_file_of_the_first_schema_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    database = sqlite3.connect(path)
    database.executescript(FIRST_SCHEMA)
    database.close()
    for _ in range(2):
        file = LedgerFile(path)
        assert file.vms() == (VmRecord("old", "A", "high", 80, 5, 12.5),)
        assert file.vms()[0].bar1_bytes == 0  # what had no device gets none
        assert file.next_session() > 41
        file.close()


async def test_registering_over_the_actor(tmp_path: Path) -> None:
    async with open_system(ActorSpec("ledger", lambda: Ledger(tmp_path / "ledger.sqlite"))) as system:
        ledger = system.ref("ledger")
        vm = VmRecord("a", bar1_bytes=1 << 28)
        assert await ledger.ask(SaveVm(vm)) == vm
        with pytest.raises(VmExists):
            await ledger.ask(SaveVm(vm))
        assert await ledger.ask(GetVm("a")) == vm
        assert await ledger.ask(RemoveVm("a")) == vm
        with pytest.raises(NoSuchVm):
            await ledger.ask(RemoveVm("a"))


async def test_no_request_ends_the_ledger(tmp_path: Path) -> None:
    """Whatever a request contains, whoever asked is told, and the next one is answered by the same life."""
    bad = "\udcff"
    huge = 1 << 70
    async with open_system(ActorSpec("ledger", lambda: Ledger(tmp_path / "ledger.sqlite"))) as system:
        ledger = system.ref("ledger")
        requests: list[Request[Any]] = [
            EnsureVm(bad),
            GetVm(bad),
            SaveVm(VmRecord("a", pool=bad)),
            SaveVm(VmRecord("a", rate=huge)),
            RemoveVm(bad),
            UpdateVm(VmRecord(bad)),
            SavePool(PoolRecord(bad), is_new=True),
            SavePool(PoolRecord("b", huge), is_new=True),
            RecordStart(attrs.evolve(info(1), program=bad)),
            RecordEnd(SessionSample(info(huge), 1, {}, {}, {}, "guest ended")),
            RecordFault(info(1), huge, "no progress"),
            RecordFault(info(1), 702, bad),
            BeginQuarantine("a", "me", bad),
            BeginQuarantine("a", "me", {}),  # type: ignore[arg-type]
            EndQuarantine(bad, "me"),
            GetQuarantine(bad),
            FaultTimes((bad,), 0.0),
            ListFaults(huge),
            ListQuarantines(limit=huge),
            SetRule(bad, QuarantineRule(1, 1.0)),
            SetRule("a", QuarantineRule(huge, 1.0)),
        ]
        for request in requests:
            if isinstance(request, (GetVm, RemoveVm, UpdateVm)):
                # Looked for among those there are, and not found.
                with contextlib.suppress(NoSuchVm):
                    assert await ledger.ask(request) is None
                continue
            with pytest.raises(CannotKeep):
                await ledger.ask(request)
        assert (await ledger.ask(EnsureVm("a"))).name == "a"
        assert [vm.name for vm in await ledger.ask(ListVms())] == ["a"]


def test_the_ledger_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "a" / "state" / "ledger.sqlite"
    before = os.umask(0)
    try:
        ledger = LedgerFile(path)
        ledger.ensure_vm("a")
        modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
        ledger.close()
    finally:
        os.umask(before)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert modes == {"ledger.sqlite": 0o600, "ledger.sqlite-wal": 0o600, "ledger.sqlite-shm": 0o600}


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    program = (
        "import os, signal, sys; from pathlib import Path; from vgpu.actors.ledger import LedgerFile;"
        f"f = LedgerFile(Path({str(path)!r})); f.ensure_vm('kept'); print(f.next_session(), flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -9
    file = LedgerFile(path)
    assert [vm.name for vm in file.vms()] == ["kept"]
    assert file.next_session() > int(done.stdout)
    file.close()


def test_a_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(RuntimeError, match="schema 99"):
        LedgerFile(path)


def test_faults_are_looked_for_before_they_are_cut_off(tmp_path: Path) -> None:
    """A VM's few faults, and an old one, lie behind thousands of another's."""
    ledger = LedgerFile(tmp_path / "ledger.sqlite")
    fault = RecordFault(SessionInfo(SessionId(1), "quiet", 2, "p", "w", 3), 719, "once")
    assert ledger.book.record(fault)
    for number in range(2, 1203):
        info = SessionInfo(SessionId(number), "noisy", 2, "p", "w", 3)
        assert ledger.book.record(RecordFault(info, 719, "again"))
    book = ledger.book
    assert [row["vm"] for row in book.faults(1)] == ["noisy"]
    assert [row["what"] for row in book.faults(1, "quiet")] == ["once"]
    assert [row["what"] for row in book.faults(1, None, 1)] == ["once"]
    assert len(book.faults(1000, "noisy")) == 1000
    assert book.faults(100, "noisy", 1) == ()
    assert book.faults(100, "nobody") == ()
    ledger.close()
