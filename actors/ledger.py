# SPDX-License-Identifier: Apache-2.0
"""The ledger: what must outlive the mediator, in one SQLite file with one writer.

VMs, session numbers, sessions that ran and faults. Other actors ask or tell it; nobody else opens the
file. Writes happen in a worker thread, one at a time, and are committed (WAL) before a request is
answered. It never decides anything.
"""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path
from typing import TypeVar

import attrs
import trio

from vgpu.gpu.schedule import SessionId

from . import Actor, ExitReason, handles
from .messages import (
    CountFaults,
    EnsureVm,
    FaultCount,
    ListFaults,
    ListVms,
    NextSession,
    RecordEnd,
    RecordFault,
    RecordStart,
    VmRecord,
)

T = TypeVar("T")

SCHEMA_VERSION = 1
_SCHEMA = """
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
"""


class LedgerFile:
    """The SQLite file, synchronous. Used by the ledger actor in a thread, and by tests directly."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            self._db.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")
        elif version != SCHEMA_VERSION:
            raise RuntimeError(f"{path} has schema {version}; this program knows {SCHEMA_VERSION}")

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def ensure_vm(self, name: str) -> VmRecord:
        """The VM's row, made with default limits where there is none."""
        self._db.execute(
            "INSERT OR IGNORE INTO vms VALUES (?, 'default', 'medium', 50, 0, 30.0, 1)",
            (name,),
        )
        return next(vm for vm in self.vms() if vm.name == name)

    def vms(self) -> tuple[VmRecord, ...]:
        """All rows, by name."""
        rows = self._db.execute(
            "SELECT name, pool, priority, weight, memory_limit_bytes, watchdog_seconds, ad_hoc FROM vms ORDER BY name"
        )
        return tuple(
            VmRecord(name, pool, priority, weight, memory, watchdog, ad_hoc=bool(ad_hoc))
            for name, pool, priority, weight, memory, watchdog, ad_hoc in rows
        )

    def next_session(self) -> SessionId:
        """Reserve a session number."""
        cursor = self._db.execute("INSERT INTO sessions (vm) VALUES ('')")
        assert cursor.lastrowid is not None
        return SessionId(cursor.lastrowid)

    def start(self, message: RecordStart) -> None:
        """Fill in a session's row."""
        info = message.info
        self._db.execute(
            "INSERT INTO sessions (session, vm, guest_pid, program, worker, worker_pid, began) VALUES (?,?,?,?,?,?,?)"
            " ON CONFLICT (session) DO UPDATE SET vm=excluded.vm, guest_pid=excluded.guest_pid,"
            " program=excluded.program, worker=excluded.worker, worker_pid=excluded.worker_pid,"
            " began=coalesce(began, excluded.began)",
            (info.session, info.vm, info.guest_pid, info.program, info.worker, info.worker_pid, time.time()),
        )

    def end(self, message: RecordEnd) -> None:
        """Close a session's row with its last counters."""
        sample = message.sample
        counters = json.dumps({"grant": sample.grant, "guest": sample.guest, "refused": sample.refused})
        self._db.execute(
            "UPDATE sessions SET ended = ?, reason = ?, counters = ? WHERE session = ?",
            (time.time(), sample.ended, counters, sample.info.session),
        )

    def fault(self, message: RecordFault) -> None:
        """Keep a fault."""
        info = message.info
        self._db.execute(
            "INSERT INTO faults (session, vm, guest_pid, program, error, what, at) VALUES (?,?,?,?,?,?,?)",
            (info.session, info.vm, info.guest_pid, info.program, message.error, message.what, time.time()),
        )

    def faults(self, limit: int) -> tuple[dict[str, object], ...]:
        """The last faults, newest first."""
        cursor = self._db.execute("SELECT * FROM faults ORDER BY fault DESC LIMIT ?", (limit,))
        names = [column[0] for column in cursor.description]
        return tuple(dict(zip(names, row, strict=True)) for row in cursor)

    def count_faults(self) -> tuple[FaultCount, ...]:
        """All faults, by VM and error."""
        rows = self._db.execute(
            "SELECT vm, error, count(*) FROM faults GROUP BY vm, error ORDER BY vm, error"
        )
        return tuple(FaultCount(vm, error, count) for vm, error, count in rows)


@attrs.define(eq=False)
class Ledger(Actor):
    """The only writer of the ledger file. A request is answered once it is on disk."""

    path: Path
    _file: LedgerFile | None = None

    async def started(self) -> None:
        self._file = await trio.to_thread.run_sync(LedgerFile, self.path)

    async def stopped(self, reason: ExitReason) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def _open(self) -> LedgerFile:
        assert self._file is not None
        return self._file

    @handles(EnsureVm)
    async def ensure_vm(self, message: EnsureVm) -> VmRecord:
        return await trio.to_thread.run_sync(self._open.ensure_vm, message.name)

    @handles(ListVms)
    async def list_vms(self, message: ListVms) -> tuple[VmRecord, ...]:
        return await trio.to_thread.run_sync(self._open.vms)

    @handles(NextSession)
    async def next_session(self, message: NextSession) -> SessionId:
        return await trio.to_thread.run_sync(self._open.next_session)

    @handles(RecordStart)
    async def record_start(self, message: RecordStart) -> None:
        await trio.to_thread.run_sync(self._open.start, message)

    @handles(RecordEnd)
    async def record_end(self, message: RecordEnd) -> None:
        await trio.to_thread.run_sync(self._open.end, message)

    @handles(RecordFault)
    async def record_fault(self, message: RecordFault) -> None:
        await trio.to_thread.run_sync(self._open.fault, message)

    @handles(ListFaults)
    async def list_faults(self, message: ListFaults) -> tuple[dict[str, object], ...]:
        return await trio.to_thread.run_sync(self._open.faults, message.limit)

    @handles(CountFaults)
    async def count_faults(self, message: CountFaults) -> tuple[FaultCount, ...]:
        return await trio.to_thread.run_sync(self._open.count_faults)
