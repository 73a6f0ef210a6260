# SPDX-License-Identifier: Apache-2.0
"""The ledger: what must outlive the mediator, in one SQLite file with one writer.

VMs, session numbers, sessions that ran and faults. Other actors ask or tell it; nobody else opens the
file. Writes happen in a worker thread, one at a time, and are committed (WAL) before a request is
answered. It never decides anything.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import attrs
import trio

from vgpu.gpu.schedule import SessionId

from . import Actor, ActorError, ExitReason, Refused, handles
from .fault_book import STEP as FAULTS_STEP
from .fault_book import FaultBook, NotQuarantined
from .fault_messages import (
    BeginQuarantine,
    EndQuarantine,
    FaultTimes,
    GetQuarantine,
    GetRules,
    ListQuarantines,
    QuarantineRecord,
    QuarantineRule,
    SetRule,
)
from .ledger_health import CheckLedger, LedgerHealth, check_ledger, closed_health, will_pass
from .ledger_prune import STEP as PRUNE_STEP
from .ledger_prune import Keeping, prune
from .messages import (
    CountFaults,
    EnsureVm,
    FaultCount,
    GetVm,
    ListFaults,
    ListPools,
    ListVms,
    NextSession,
    PoolRecord,
    RecordEnd,
    RecordFault,
    RecordStart,
    RemovePool,
    RemoveVm,
    SavePool,
    SaveVm,
    UpdateVm,
    VmRecord,
)

_log = logging.getLogger("vgpu.ledger")
T = TypeVar("T")

LOG_BYTES = 16 << 20
NAMES_SHOWN = 5  # in an error
# Between two tries to open a file that could not be opened for now.
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 5.0
SCHEMA_VERSION = 5
# Between two looks at what is too old or too much, and between two batches of it.
PRUNE_SECONDS = 60.0
PRUNE_AGAIN_SECONDS = 0.1
# Step n - 1 brings a file of version n - 1 to version n; a new one takes them all.
_STEPS = (
    """
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
""",
    """
ALTER TABLE vms ADD COLUMN rate INTEGER NOT NULL DEFAULT 0;
ALTER TABLE vms ADD COLUMN queue_depth INTEGER NOT NULL DEFAULT 0;
ALTER TABLE vms ADD COLUMN bar1_bytes INTEGER NOT NULL DEFAULT 0;
ALTER TABLE vms ADD COLUMN slots INTEGER NOT NULL DEFAULT 8;
ALTER TABLE vms ADD COLUMN variant TEXT NOT NULL DEFAULT 'conventional';
ALTER TABLE vms ADD COLUMN address TEXT NOT NULL DEFAULT '0x5';
""",
    """
ALTER TABLE vms ADD COLUMN bytes_per_second INTEGER NOT NULL DEFAULT 0;
ALTER TABLE vms ADD COLUMN session_limit INTEGER NOT NULL DEFAULT 64;
UPDATE vms SET session_limit = max(64, slots);
ALTER TABLE vms ADD COLUMN arena_limit_bytes INTEGER NOT NULL DEFAULT 68719476736;
ALTER TABLE vms ADD COLUMN module_limit INTEGER NOT NULL DEFAULT 65536;
ALTER TABLE vms ADD COLUMN handle_limit INTEGER NOT NULL DEFAULT 4194304;
CREATE TABLE pools (name TEXT PRIMARY KEY, weight INTEGER NOT NULL) STRICT;
INSERT INTO pools SELECT DISTINCT pool, 100 FROM vms UNION SELECT 'default', 100;
""",
    FAULTS_STEP,
    PRUNE_STEP,
)
# Columns of vms are fields of VmRecord, by the same names.
_VM_FIELDS = tuple(field.name for field in attrs.fields(VmRecord))


class VmExists(ActorError):
    """A VM of that name is registered already."""


class NoSuchVm(ActorError):
    """No VM of that name is registered."""


class PoolExists(ActorError):
    """A pool of that name is there already."""


class NoSuchPool(ActorError):
    """There is no pool of that name."""


class PoolInUse(ActorError):
    """The pool cannot be forgotten: VMs are in it, or it is the one that newcomers come into."""


class LedgerFile:
    """The SQLite file, synchronous. Used by the ledger actor in a thread, and by tests directly."""

    def __init__(self, path: Path) -> None:
        # Who computed what, and when, is nobody else's business. SQLite gives what it puts beside the file the same mode.
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._path = path
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            self._prepare(path)
        except BaseException:
            self._db.close()
            raise

    def _prepare(self, path: Path) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        # Every commit is synced: NORMAL would lose what was acknowledged last when the host loses its power.
        self._db.execute("PRAGMA synchronous = FULL")
        # A log that grew while the file could not be written gives its room back.
        self._db.execute(f"PRAGMA journal_size_limit = {LOG_BYTES}")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise RuntimeError(f"{path} has schema {version}; this program knows {SCHEMA_VERSION}")
        for number in range(version, SCHEMA_VERSION):
            self._db.executescript(f"BEGIN;{_STEPS[number]}PRAGMA user_version = {number + 1};COMMIT;")

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def check(self) -> LedgerHealth:
        """Can it be written now?"""
        return check_ledger(self._db, self._path)

    def ensure_vm(self, name: str) -> VmRecord:
        """The VM's row, made with default limits where there is none."""
        self._insert(VmRecord(name, ad_hoc=True), "OR IGNORE")
        return next(vm for vm in self.vms() if vm.name == name)

    def get_vm(self, name: str) -> VmRecord | None:
        """The VM's row, if there is one."""
        return next((vm for vm in self.vms() if vm.name == name), None)

    def save_vm(self, vm: VmRecord) -> VmRecord:
        """Register a VM.

        Raises:
            VmExists: it is registered; one that only came by itself gives way.
        """
        known = self.get_vm(vm.name)
        if known is not None and not known.ad_hoc:
            raise VmExists(f"VM {vm.name!r} is registered already; show-vm shows it")
        registered = attrs.evolve(vm, ad_hoc=False)
        self._insert(registered, "OR REPLACE")
        return registered

    def remove_vm(self, name: str) -> VmRecord:
        """Forget a VM, registered or come by itself.

        Raises:
            NoSuchVm: there is none of that name.
        """
        known = self.get_vm(name)
        if known is None:
            raise NoSuchVm(f"no VM {name!r} is registered; list-vms has those there are")
        self._db.execute("DELETE FROM vms WHERE name = ?", (name,))
        return known

    def update_vm(self, vm: VmRecord) -> VmRecord:
        """Replace the row of a VM that is known.

        Raises:
            NoSuchVm: it is not.
        """
        if self.get_vm(vm.name) is None:
            raise NoSuchVm(f"no VM {vm.name!r}; list-vms has those there are")
        self._insert(vm, "OR REPLACE")
        return vm

    def pools(self) -> tuple[PoolRecord, ...]:
        """All pools, by name."""
        return tuple(
            PoolRecord(*row) for row in self._db.execute("SELECT name, weight FROM pools ORDER BY name")
        )

    def save_pool(self, pool: PoolRecord, *, is_new: bool) -> PoolRecord:
        """Keep a pool.

        Raises:
            PoolExists: a new one, and it is there.
            NoSuchPool: no new one, and it is not.
        """
        is_known = any(known.name == pool.name for known in self.pools())
        if is_new and is_known:
            raise PoolExists(f"pool {pool.name!r} is there already; set-pool-weight changes it")
        if not is_new and not is_known:
            raise NoSuchPool(f"no pool {pool.name!r}; create-pool makes one, list-pools has those there are")
        self._db.execute(
            "INSERT OR REPLACE INTO pools (name, weight) VALUES (?, ?)", (pool.name, pool.weight)
        )
        return pool

    def remove_pool(self, name: str) -> PoolRecord:
        """Forget a pool.

        Raises:
            NoSuchPool: there is none of that name.
            PoolInUse: VMs are in it, or it is the default.
        """
        known = next((pool for pool in self.pools() if pool.name == name), None)
        if known is None:
            raise NoSuchPool(f"no pool {name!r}; list-pools has those there are")
        if name == VmRecord("any").pool:
            raise PoolInUse(f"pool {name!r} is where VMs are that nobody put into another; it stays")
        inside = [vm.name for vm in self.vms() if vm.pool == name]
        if inside:
            more = f" and {len(inside) - NAMES_SHOWN} more" if len(inside) > NAMES_SHOWN else ""
            raise PoolInUse(
                f"pool {name!r} has VMs in it ({', '.join(inside[:NAMES_SHOWN])}{more}); set-pool moves them"
            )
        self._db.execute("DELETE FROM pools WHERE name = ?", (name,))
        return known

    def _insert(self, vm: VmRecord, conflict: str) -> None:
        marks = ", ".join("?" * len(_VM_FIELDS))
        self._db.execute(
            f"INSERT {conflict} INTO vms ({', '.join(_VM_FIELDS)}) VALUES ({marks})", attrs.astuple(vm)
        )

    def vms(self) -> tuple[VmRecord, ...]:
        """All rows, by name."""
        rows = self._db.execute(f"SELECT {', '.join(_VM_FIELDS)} FROM vms ORDER BY name")
        values = (dict(zip(_VM_FIELDS, row, strict=True)) for row in rows)
        return tuple(VmRecord(**{**row, "ad_hoc": bool(row["ad_hoc"])}) for row in values)

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

    @property
    def book(self) -> FaultBook:
        """Faults and quarantines."""
        return FaultBook(self._db)

    def end_lost(self, is_alive: Callable[[str, int], bool]) -> int:
        """Close the rows of sessions whose worker has ended while nobody was there to note it; how many.

        is_alive: is there still a worker of that name and process id?
        """
        rows = self._db.execute(
            "SELECT session, worker, worker_pid FROM sessions WHERE ended IS NULL AND began IS NOT NULL"
        )
        lost = [session for session, worker, pid in rows.fetchall() if not is_alive(worker or "", pid or 0)]
        for session in lost:
            self._db.execute(
                "UPDATE sessions SET ended = ?, reason = ? WHERE session = ? AND ended IS NULL",
                (time.time(), "ended while there was no mediator", session),
            )
        return len(lost)

    def faults(self, limit: int) -> tuple[dict[str, object], ...]:
        """The last faults, newest first."""
        return self.book.faults(limit)

    def prune(self, keeping: Keeping) -> int:
        """Let go of a batch of what is too old or too much; how many rows. 0: there is no more."""
        return prune(self._db, keeping, time.time())

    def count_faults(self) -> tuple[FaultCount, ...]:
        """All faults that ever were, also those that the ledger has let go of, by VM and error."""
        rows = self._db.execute(
            "SELECT vm, error, sum(count) FROM (SELECT vm, error, count(*) AS count FROM faults GROUP BY vm, error"
            " UNION ALL SELECT vm, error, count FROM faults_gone) GROUP BY vm, error ORDER BY vm, error"
        )
        return tuple(FaultCount(vm, error, count) for vm, error, count in rows)


class CannotWrite(ActorError):
    """The ledger's file takes nothing at present; the message is SQLite's. Ask again later."""


class CannotKeep(ActorError):
    """The ledger cannot keep or look for such a thing, now or later; the message says why."""


# What a request can contain that a file cannot: halves of letters, numbers beyond 64 bits, values of another kind.
_BY_DATA = (
    ValueError,
    TypeError,
    OverflowError,
    sqlite3.DataError,
    sqlite3.IntegrityError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
)


async def _run(work: Callable[..., T], *what: object) -> T:
    """Run it in a thread. Neither a disk that is full nor a request that makes no sense ends the ledger: whoever asked is told."""
    try:
        return await trio.to_thread.run_sync(work, *what)
    except sqlite3.OperationalError as error:
        raise Refused(CannotWrite(str(error))) from error
    except _BY_DATA as error:
        _log.error("the ledger cannot do this: %s: %s", type(error).__name__, error)
        raise Refused(CannotKeep(f"the ledger cannot do this: {error}")) from error


def is_worker(name: str, pid: int) -> bool:
    """Is the process of that number a worker of that name, and alive?"""
    try:
        return name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


@attrs.frozen
class Prune:
    """To itself: let go of a batch of what is too old or too much."""


@attrs.define(eq=False)
class Ledger(Actor):
    """The only writer of the ledger file. A request is answered once it is on disk.

    A file that cannot be opened for now (its disk is full) does not keep it from starting: whoever asks is refused with CannotWrite, so
    that newcomers are told to come again, while it is tried again. Any other trouble with the file fails the start.
    """

    path: Path
    keeping: Keeping = attrs.field(factory=Keeping)
    _file: LedgerFile | None = None
    _trouble: str = ""

    async def started(self) -> None:
        self.send_after(PRUNE_AGAIN_SECONDS, Prune())
        if not await self._try_to_open():
            self.nursery.start_soon(self._open_later)

    async def _try_to_open(self) -> bool:
        """Raises what will not pass by itself."""
        try:
            await self._open_file()
        except (sqlite3.OperationalError, OSError) as error:
            if not will_pass(error, self.path):
                raise
            self._note(error)
            return False
        return True

    async def _open_file(self) -> None:
        file = await trio.to_thread.run_sync(LedgerFile, self.path)
        try:
            lost = await trio.to_thread.run_sync(file.end_lost, is_worker)
        except BaseException:
            file.close()
            raise
        self._file = file
        if lost:
            _log.warning("%d sessions ended while there was no mediator", lost)

    def _note(self, error: Exception) -> None:
        if self._trouble != str(error):
            self._trouble = str(error)
            _log.error("%s cannot be opened: %s; new sessions wait until it can", self.path, error)

    async def _open_later(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        await trio.sleep(pause)
        while not await self._try_to_open():
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            await trio.sleep(pause)
        _log.warning("%s is open again", self.path)
        self._trouble = ""

    async def stopped(self, reason: ExitReason) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def _open(self) -> LedgerFile:
        if self._file is None:
            raise Refused(CannotWrite(f"{self.path} cannot be opened: {self._trouble}"))
        return self._file

    @handles(Prune)
    async def prune(self, message: Prune) -> None:
        gone = 0
        try:
            gone = await _run(self._open.prune, self.keeping)
        finally:
            # In between come those who have something to write.
            self.send_after(PRUNE_AGAIN_SECONDS if gone else PRUNE_SECONDS, Prune())

    @handles(EnsureVm)
    async def ensure_vm(self, message: EnsureVm) -> VmRecord:
        return await _run(self._open.ensure_vm, message.name)

    @handles(GetVm)
    async def get_vm(self, message: GetVm) -> VmRecord | None:
        return await _run(self._open.get_vm, message.name)

    @handles(SaveVm)
    async def save_vm(self, message: SaveVm) -> VmRecord:
        try:
            return await _run(self._open.save_vm, message.vm)
        except VmExists as error:
            raise Refused(error) from error

    @handles(RemoveVm)
    async def remove_vm(self, message: RemoveVm) -> VmRecord:
        try:
            return await _run(self._open.remove_vm, message.name)
        except NoSuchVm as error:
            raise Refused(error) from error

    @handles(UpdateVm)
    async def update_vm(self, message: UpdateVm) -> VmRecord:
        try:
            return await _run(self._open.update_vm, message.vm)
        except NoSuchVm as error:
            raise Refused(error) from error

    @handles(ListPools)
    async def list_pools(self, message: ListPools) -> tuple[PoolRecord, ...]:
        return await _run(self._open.pools)

    @handles(SavePool)
    async def save_pool(self, message: SavePool) -> PoolRecord:
        save = partial(self._open.save_pool, message.pool, is_new=message.is_new)
        try:
            return await _run(save)
        except (PoolExists, NoSuchPool) as error:
            raise Refused(error) from error

    @handles(RemovePool)
    async def remove_pool(self, message: RemovePool) -> PoolRecord:
        try:
            return await _run(self._open.remove_pool, message.name)
        except (NoSuchPool, PoolInUse) as error:
            raise Refused(error) from error

    @handles(ListVms)
    async def list_vms(self, message: ListVms) -> tuple[VmRecord, ...]:
        return await _run(self._open.vms)

    @handles(NextSession)
    async def next_session(self, message: NextSession) -> SessionId:
        return await _run(self._open.next_session)

    @handles(RecordStart)
    async def record_start(self, message: RecordStart) -> None:
        await _run(self._open.start, message)

    @handles(RecordEnd)
    async def record_end(self, message: RecordEnd) -> None:
        await _run(self._open.end, message)

    @handles(RecordFault)
    async def record_fault(self, message: RecordFault) -> bool:
        return await _run(self._open.book.record, message)

    @handles(FaultTimes)
    async def fault_times(self, message: FaultTimes) -> tuple[tuple[str, float], ...]:
        return await _run(self._open.book.times, message.kinds, message.since)

    @handles(BeginQuarantine)
    async def begin_quarantine(self, message: BeginQuarantine) -> QuarantineRecord:
        return await _run(self._open.book.begin, message.vm, message.by, message.reason)

    @handles(EndQuarantine)
    async def end_quarantine(self, message: EndQuarantine) -> QuarantineRecord:
        try:
            return await _run(self._open.book.end, message.vm, message.by)
        except NotQuarantined as error:
            raise Refused(error) from error

    @handles(GetQuarantine)
    async def get_quarantine(self, message: GetQuarantine) -> QuarantineRecord | None:
        return await _run(self._open.book.in_force, message.vm)

    @handles(ListQuarantines)
    async def list_quarantines(self, message: ListQuarantines) -> tuple[QuarantineRecord, ...]:
        listed = partial(self._open.book.quarantines, message.limit, in_force=message.in_force)
        return await _run(listed)

    @handles(GetRules)
    async def rules(self, message: GetRules) -> dict[str, QuarantineRule]:
        return await _run(self._open.book.rules)

    @handles(SetRule)
    async def set_rule(self, message: SetRule) -> QuarantineRule | None:
        return await _run(self._open.book.set_rule, message.vm, message.rule)

    @handles(ListFaults)
    async def list_faults(self, message: ListFaults) -> tuple[dict[str, object], ...]:
        return await _run(self._open.book.faults, message.limit, message.vm, message.fault)

    @handles(CountFaults)
    async def count_faults(self, message: CountFaults) -> tuple[FaultCount, ...]:
        return await _run(self._open.count_faults)

    @handles(CheckLedger)
    async def check_health(self, message: CheckLedger) -> LedgerHealth:
        if self._file is None:
            return closed_health(self.path, self._trouble)
        return await _run(self._file.check)
