# SPDX-License-Identifier: Apache-2.0
"""The ledger: what it keeps outlives the process that wrote it."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from vgpu.actors import ActorSpec, open_system
from vgpu.actors.ledger import Ledger, LedgerFile
from vgpu.actors.messages import (
    EnsureVm,
    ListFaults,
    ListVms,
    NextSession,
    RecordEnd,
    RecordFault,
    RecordStart,
    SessionId,
    SessionInfo,
    SessionSample,
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
