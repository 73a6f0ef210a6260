# SPDX-License-Identifier: Apache-2.0
"""What the ledger lets go of: ended sessions and faults that are old, or more than are wanted. SQL, synchronous.

Used by ``LedgerFile`` alone, a small batch at a time, so that nobody who has something to write waits long. Never let go of: a
session that lives, or may; a fault of such a session, which a mediator that adopts it would note again; a fault that may still
count towards a quarantine. What goes is counted by VM and error, so that the counters of faults never fall.
"""

from __future__ import annotations

import sqlite3

import attrs

from .fault_messages import COUNTED, QuarantineRule

# A step of the ledger's schema.
STEP = """
CREATE TABLE faults_gone (
    vm TEXT NOT NULL, error INTEGER NOT NULL, count INTEGER NOT NULL, PRIMARY KEY (vm, error)
) STRICT;
"""
BATCH = 200
# As many faults as a quarantine's rule can ask for; more of a VM's cannot make a difference.
MOST_COUNTED = 1000
# Numbers that were reserved for a session which never began; the newest may be about to.
RESERVED_KEPT = 1000


@attrs.frozen
class Keeping:
    """How long, and how many. ``window_seconds``, ``kinds``: which faults the mediator's own rule of quarantine counts."""

    days: float = 30.0
    sessions: int = 10_000
    faults_per_vm: int = 1000
    faults: int = 20_000
    window_seconds: float = QuarantineRule().seconds
    kinds: tuple[str, ...] = COUNTED


def prune(db: sqlite3.Connection, keeping: Keeping, now: float, batch: int = BATCH) -> int:
    """Let go of at most so many sessions, and so many faults; how many there were. 0: nothing is too old or too much.

    One transaction. Raises what SQLite does, and has then changed nothing.
    """
    old = now - keeping.days * 86400
    db.execute("BEGIN IMMEDIATE")
    try:
        gone = _sessions(db, keeping, old, batch) + _faults(db, keeping, old, now, batch)
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    return gone


def _sessions(db: sqlite3.Connection, keeping: Keeping, old: float, batch: int) -> int:
    row = db.execute(
        "SELECT session FROM sessions WHERE ended IS NOT NULL ORDER BY session DESC LIMIT 1 OFFSET ?",
        (keeping.sessions,),
    ).fetchone()
    newest = db.execute("SELECT coalesce(max(session), 0) FROM sessions").fetchone()[0]
    return db.execute(
        "DELETE FROM sessions WHERE session IN (SELECT session FROM sessions WHERE"
        " (ended IS NOT NULL AND (session <= ? OR ended < ?)) OR (began IS NULL AND session <= ?)"
        " ORDER BY session LIMIT ?)",
        (row[0] if row else 0, old, newest - RESERVED_KEPT, batch),
    ).rowcount


def _faults(db: sqlite3.Connection, keeping: Keeping, old: float, now: float, batch: int) -> int:
    longest = db.execute("SELECT max(seconds) FROM quarantine_rules").fetchone()[0] or 0.0
    window = max(longest, keeping.window_seconds)
    counts = f"kind IN ({', '.join('?' * len(keeping.kinds))})"
    limits = (old, keeping.faults_per_vm, keeping.faults)
    numbers = [
        row[0]
        for row in db.execute(
            "SELECT fault FROM (SELECT fault, session, at,"
            f" {counts} AS counts,"
            f" row_number() OVER (PARTITION BY vm, {counts} ORDER BY fault DESC) AS of_sort,"
            " row_number() OVER (PARTITION BY vm ORDER BY fault DESC) AS of_vm,"
            " row_number() OVER (ORDER BY fault DESC) AS of_all FROM faults)"
            " WHERE (at < ? OR of_vm > ? OR of_all > ?)"
            " AND NOT (counts AND of_sort <= ? AND at >= ?)"
            " AND session NOT IN (SELECT session FROM sessions WHERE ended IS NULL AND began IS NOT NULL)"
            " ORDER BY fault LIMIT ?",
            (*keeping.kinds, *keeping.kinds, *limits, MOST_COUNTED, now - window, batch),
        )
    ]
    marks = ", ".join("?" * len(numbers))
    db.execute(
        "INSERT INTO faults_gone (vm, error, count)"
        f" SELECT vm, error, count(*) FROM faults WHERE fault IN ({marks}) GROUP BY vm, error"
        " ON CONFLICT (vm, error) DO UPDATE SET count = count + excluded.count",
        numbers,
    )
    return db.execute(f"DELETE FROM faults WHERE fault IN ({marks})", numbers).rowcount
