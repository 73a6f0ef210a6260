# SPDX-License-Identifier: Apache-2.0
"""Whether the ledger can be written now: found out by writing, and said in words that help.

The probe commits the file's own version number again. Nothing else tells for certain: a disk may have room for one more
page or not, be mounted read-only, or be over a quota.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import attrs
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from . import Request

_PASSING = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


@attrs.frozen
class LedgerHealth:
    """The ledger at this moment. ``trouble``: why it cannot be written, empty where it can."""

    path: str
    writable: bool
    trouble: str
    file_bytes: int
    wal_bytes: int
    free_bytes: int  # of its file system, for this process


@attrs.frozen
class CheckLedger(Request[LedgerHealth]):
    """To the ledger: try whether you can write. Answered also where it cannot."""


def check_ledger(database: sqlite3.Connection, path: Path) -> LedgerHealth:
    """Probe. Blocks for as long as a commit takes; raises nothing."""
    trouble = ""
    try:
        version = database.execute("PRAGMA user_version").fetchone()[0]
        database.execute(f"PRAGMA user_version = {int(version)}")
    except sqlite3.Error as error:
        trouble = str(error)
    return LedgerHealth(
        str(path), not trouble, trouble, _size(path), _size(path.with_name(f"{path.name}-wal")), _free(path)
    )


def closed_health(path: Path, trouble: str) -> LedgerHealth:
    """Of a ledger that could not be opened yet."""
    return LedgerHealth(
        str(path), False, trouble, _size(path), _size(path.with_name(f"{path.name}-wal")), _free(path)
    )


def will_pass(error: Exception, path: Path) -> bool:
    """Is it the kind of trouble that ends by itself or by somebody's making room, rather than a wrong file or a wrong place?"""
    if isinstance(error, sqlite3.OperationalError):
        kind = error.sqlite_errorcode & 0xFF
        # A file that is not there yet cannot be made, either, and that says no more than that it cannot be opened.
        return kind in _PASSING or (
            kind == sqlite3.SQLITE_CANTOPEN and path.parent.is_dir() and not _free(path)
        )
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _free(path: Path) -> int:
    try:
        found = os.statvfs(path.parent)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def ledger_families(health: LedgerHealth) -> Iterator[Metric]:
    """As Prometheus metrics."""
    yield GaugeMetricFamily(
        "vgpu_ledger_writable",
        "Whether the ledger could be written when this was asked; 0: records wait or are lost.",
        float(health.writable),
    )
    yield GaugeMetricFamily("vgpu_ledger_file_bytes", "Size of the ledger.", health.file_bytes)
    yield GaugeMetricFamily("vgpu_ledger_wal_bytes", "Size of its write-ahead log.", health.wal_bytes)
    yield GaugeMetricFamily("vgpu_ledger_free_bytes", "Room left on its file system.", health.free_bytes)


@attrs.frozen
class OutboxHealth:
    """Records on their way to the ledger: how many wait, and how many were lost since the mediator began."""

    waiting: int
    lost: int


@attrs.frozen
class CheckOutbox(Request[OutboxHealth]):
    """To the outbox: how it is."""


def outbox_families(health: OutboxHealth) -> Iterator[Metric]:
    """As Prometheus metrics."""
    yield GaugeMetricFamily("vgpu_ledger_waiting_records", "Records that wait to be written.", health.waiting)
    yield CounterMetricFamily(
        "vgpu_ledger_lost_records", "Records given up because too many waited.", health.lost
    )
