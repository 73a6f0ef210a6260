# SPDX-License-Identifier: Apache-2.0
"""The ledger's pages about faults and quarantines: SQL over the ledger's connection, synchronous.

Used by ``LedgerFile`` alone. A fault is kept once: who sends it again because no answer came does not count it twice,
and neither does a mediator that adopts a session whose fault an earlier one had noted.
"""

from __future__ import annotations

import json
import sqlite3
import time

import attrs

from . import ActorError
from .fault_messages import QuarantineRecord, QuarantineRule
from .messages import RecordFault

# A step of the ledger's schema.
STEP = """
ALTER TABLE faults ADD COLUMN kind TEXT NOT NULL DEFAULT 'kernel';
ALTER TABLE faults ADD COLUMN details TEXT NOT NULL DEFAULT '{}';
ALTER TABLE faults ADD COLUMN once TEXT;
CREATE UNIQUE INDEX faults_once ON faults (once) WHERE once IS NOT NULL;
CREATE INDEX faults_at ON faults (at);
CREATE TABLE quarantines (
    quarantine INTEGER PRIMARY KEY AUTOINCREMENT, vm TEXT NOT NULL, "by" TEXT NOT NULL, reason TEXT NOT NULL,
    began REAL NOT NULL, ended REAL NOT NULL DEFAULT 0, ended_by TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE UNIQUE INDEX quarantines_in_force ON quarantines (vm) WHERE ended = 0;
CREATE TABLE quarantine_rules (vm TEXT PRIMARY KEY, faults INTEGER NOT NULL, seconds REAL NOT NULL) STRICT;
"""
_FIELDS = ", ".join(f'"{field.name}"' for field in attrs.fields(QuarantineRecord))


class NotQuarantined(ActorError):
    """The VM is in no quarantine."""


@attrs.frozen
class FaultBook:
    """Faults, quarantines and their rules."""

    db: sqlite3.Connection

    def record(self, message: RecordFault) -> bool:
        """Keep a fault; False: it is kept already."""
        info = message.info
        cursor = self.db.execute(
            "INSERT OR IGNORE INTO faults (session, vm, guest_pid, program, error, what, at, kind, details, once)"
            " VALUES (?,?,?,?,?,?,?,?,?,?)",
            (
                info.session,
                info.vm,
                info.guest_pid,
                info.program,
                message.error,
                message.what,
                message.at or time.time(),
                message.kind,
                message.details,
                f"{info.session}/{message.kind}/{message.error}",
            ),
        )
        return cursor.rowcount == 1

    def faults(
        self, limit: int, vm: str | None = None, fault: int | None = None
    ) -> tuple[dict[str, object], ...]:
        """The last faults, newest first: of all, of a VM, or the one of that number."""
        columns = "fault, session, vm, guest_pid, program, error, what, at, kind, details"
        cursor = self.db.execute(
            f"SELECT {columns} FROM faults WHERE (?1 IS NULL OR vm = ?1) AND (?2 IS NULL OR fault = ?2)"
            " ORDER BY fault DESC LIMIT ?3",
            (vm, fault, limit),
        )
        names = [column[0] for column in cursor.description]
        found = (dict(zip(names, row, strict=True)) for row in cursor)
        return tuple({**row, "details": json.loads(str(row["details"]))} for row in found)

    def times(self, kinds: tuple[str, ...], since: float) -> tuple[tuple[str, float], ...]:
        """VM and time of the faults of these kinds, oldest first, without those before a VM's last quarantine ended."""
        marks = ", ".join("?" * len(kinds))
        rows = self.db.execute(
            f"SELECT vm, at FROM faults WHERE kind IN ({marks}) AND at >= ? AND at > coalesce("
            "(SELECT max(ended) FROM quarantines WHERE quarantines.vm = faults.vm), 0) ORDER BY at, fault",
            (*kinds, since),
        )
        return tuple((str(vm), float(at)) for vm, at in rows)

    def begin(self, vm: str, by: str, reason: str) -> QuarantineRecord:
        """Begin a quarantine; the one in force where there is one."""
        self.db.execute(
            'INSERT OR IGNORE INTO quarantines (vm, "by", reason, began) VALUES (?, ?, ?, ?)',
            (vm, by, reason, time.time()),
        )
        found = self.in_force(vm)
        assert found is not None
        return found

    def end(self, vm: str, by: str) -> QuarantineRecord:
        """End the one in force.

        Raises:
            NotQuarantined: there is none.
        """
        found = self.in_force(vm)
        if found is None:
            raise NotQuarantined(f"VM {vm!r} is not quarantined")
        # Not before it began, whatever became of the clock: faults up to here do not count again.
        now = max(time.time(), found.began)
        newest = self.db.execute("SELECT max(at) FROM faults WHERE vm = ?", (vm,)).fetchone()[0]
        ended = max(now, newest or 0.0)
        self.db.execute(
            "UPDATE quarantines SET ended = ?, ended_by = ? WHERE vm = ? AND ended = 0", (ended, by, vm)
        )
        return attrs.evolve(found, ended=ended, ended_by=by)

    def in_force(self, vm: str) -> QuarantineRecord | None:
        """The VM's quarantine, if it is in one."""
        row = self.db.execute(
            f"SELECT {_FIELDS} FROM quarantines WHERE vm = ? AND ended = 0", (vm,)
        ).fetchone()
        return QuarantineRecord(*row) if row is not None else None

    def quarantines(self, limit: int, *, in_force: bool) -> tuple[QuarantineRecord, ...]:
        """Quarantines, newest first."""
        only = "WHERE ended = 0" if in_force else ""
        rows = self.db.execute(
            f"SELECT {_FIELDS} FROM quarantines {only} ORDER BY quarantine DESC LIMIT ?", (limit,)
        )
        return tuple(QuarantineRecord(*row) for row in rows)

    def rules(self) -> dict[str, QuarantineRule]:
        """Rules by VM."""
        rows = self.db.execute("SELECT vm, faults, seconds FROM quarantine_rules")
        return {str(vm): QuarantineRule(faults, seconds) for vm, faults, seconds in rows}

    def set_rule(self, vm: str, rule: QuarantineRule | None) -> QuarantineRule | None:
        """Keep or forget a VM's own rule."""
        self.db.execute("DELETE FROM quarantine_rules WHERE vm = ?", (vm,))
        if rule is not None:
            self.db.execute(
                "INSERT INTO quarantine_rules VALUES (?, ?, ?)", (vm, rule.faults, float(rule.seconds))
            )
        return rule
