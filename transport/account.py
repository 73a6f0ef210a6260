# SPDX-License-Identifier: Apache-2.0
"""The account of a VM as Python sees it: its limits, and what its sessions hold (struct vgpu_account in ``wire.h``).

One file for each VM, ``accounts/NAME.account`` in the run directory; the mediator and the VM's workers map it, guests never.
It outlives the mediator, as the workers do. The mediator writes the limits and claims and clears entries; all else is the
workers', in C. Only one thread of one process may claim. Nothing here waits.
"""

from __future__ import annotations

import contextlib
import enum
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs

ACCOUNT_MAGIC: Final = 0x544E434355504756
ACCOUNT_FILE_SIZE: Final = 32768
ENTRIES: Final = 254
OFFSETS: Final = {
    "magic": 0,
    "limit": 8,
    "is_limited": 40,
    "entry_top": 44,
    "calls_per_second": 48,
    "bytes_per_second": 64,
    "queue_depth": 72,
    "calls_ns": 128,
    "bytes_ns": 192,
    "entry": 256,
}
ENTRY_SIZE: Final = 128
ENTRY_OFFSETS: Final = {
    "session_id": 0,
    "used": 8,
    "asking": 40,
    "refused": 72,
    "queued": 104,
    "worker_pid": 108,
    "held_back": 112,
    "held_back_ns": 120,
}
# A debt of bytes that lies further ahead was made under another clock: the host has restarted.
LONGEST_DEBT_NS: Final = 600_000_000_000


class Resource(enum.IntEnum):
    """What a VM's sessions hold together, and may hold; a place in ``limit``, ``used`` and ``refused``."""

    MEMORY = 0
    ARENA = 1
    MODULES = 2
    HANDLES = 3


@attrs.frozen
class Limits:
    """What a VM may do; 0 is no limit."""

    memory_bytes: int = 0
    arena_bytes: int = 0
    modules: int = 0
    handles: int = 0
    calls_per_second: int = 0
    bytes_per_second: int = 0
    queue_depth: int = 0


@attrs.frozen
class Holding:
    """One session's entry at a moment. ``used`` and ``refused`` by Resource."""

    entry: int
    session_id: int
    worker_pid: int
    used: tuple[int, ...]
    refused: tuple[int, ...]
    held_back: int
    held_back_ns: int


class AccountFull(Exception):
    """Every entry is taken: the VM has as many sessions as there can be."""


def account_path(run_dir: Path, vm: str) -> Path:
    """Where a VM's account lies. Names of VMs have no slash; one may be all dots."""
    return run_dir / "accounts" / f"{vm}.account"


def open_account_file(path: Path) -> int:
    """A descriptor of the file, made if need be. It only ever grows, to its one size.

    Raises:
        OSError: it cannot be had.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if os.fstat(descriptor).st_size < ACCOUNT_FILE_SIZE:
            os.ftruncate(descriptor, ACCOUNT_FILE_SIZE)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class Account:
    """A mapped account. Owns the mapping until ``close``; may be closed twice."""

    def __init__(self, path: Path) -> None:
        """Map the file, making it if need be.

        Raises:
            OSError: it cannot be had.
        """
        descriptor = open_account_file(path)
        try:
            self._map = mmap.mmap(descriptor, ACCOUNT_FILE_SIZE)
        finally:
            os.close(descriptor)
        self._words = memoryview(self._map).cast("I")
        self._quads = memoryview(self._map).cast("Q")

    def close(self) -> None:
        """Unmap. It must not be used afterwards."""
        self._words.release()
        self._quads.release()
        self._map.close()

    def _get(self, offset: int) -> int:
        return int(self._quads[offset // 8])

    def _set(self, offset: int, value: int) -> None:
        self._quads[offset // 8] = value

    # -- limits

    @property
    def is_new(self) -> bool:
        """Has nobody written limits yet?"""
        return self._get(OFFSETS["magic"]) != ACCOUNT_MAGIC

    def set_limits(self, limits: Limits) -> None:
        """Write the limits; they hold for what the sessions do next. What they hold already stays theirs."""
        quotas = (limits.memory_bytes, limits.arena_bytes, limits.modules, limits.handles)
        for resource, limit in zip(Resource, quotas, strict=True):
            self._set(OFFSETS["limit"] + 8 * resource, limit)
        rates = (limits.calls_per_second, limits.bytes_per_second, limits.queue_depth)
        for name, rate in zip(("calls_per_second", "bytes_per_second", "queue_depth"), rates, strict=True):
            self._set(OFFSETS[name], rate)
        self._words[OFFSETS["is_limited"] // 4] = int(any(rates))
        self._set(OFFSETS["magic"], ACCOUNT_MAGIC)

    def limits(self) -> Limits:
        """The limits as they are."""
        quotas = [self._get(OFFSETS["limit"] + 8 * resource) for resource in Resource]
        rates = [self._get(OFFSETS[n]) for n in ("calls_per_second", "bytes_per_second", "queue_depth")]
        return Limits(*quotas, *rates)

    def forgive(self) -> None:
        """Forget a debt that cannot be one. To be called when a mediator starts."""
        if self._get(OFFSETS["bytes_ns"]) > time.monotonic_ns() + LONGEST_DEBT_NS:
            self._set(OFFSETS["bytes_ns"], 0)

    # -- entries

    def _entry(self, entry: int, name: str) -> int:
        return OFFSETS["entry"] + entry * ENTRY_SIZE + ENTRY_OFFSETS[name]

    def _top(self) -> int:
        return min(int(self._words[OFFSETS["entry_top"] // 4]), ENTRIES)

    def claim(self, session: int, worker_pid: int) -> int:
        """An entry for a session: the one it has, else a free one.

        Raises:
            AccountFull: there is none.
        """
        free = -1
        for entry in range(ENTRIES):
            owner = self._get(self._entry(entry, "session_id"))
            if owner == session:
                return entry
            if owner == 0 and free < 0:
                free = entry
        if free < 0:
            raise AccountFull(f"{ENTRIES} sessions")
        self.clear(free)
        self._words[self._entry(free, "worker_pid") // 4] = worker_pid
        self._set(self._entry(free, "session_id"), session)
        if free >= self._top():
            self._words[OFFSETS["entry_top"] // 4] = free + 1
        return free

    def clear(self, entry: int) -> None:
        """Give back what the entry's session held. Its worker must be gone, or be one that never began."""
        start = OFFSETS["entry"] + entry * ENTRY_SIZE
        for offset in range(start, start + ENTRY_SIZE, 8):
            self._set(offset, 0)

    def clear_session(self, session: int) -> None:
        """The same by number; nothing happens where it has none."""
        for holding in self.holdings():
            if holding.session_id == session:
                self.clear(holding.entry)

    def holdings(self) -> Iterator[Holding]:
        """What the sessions hold, each field read once."""
        for entry in range(self._top()):
            session = self._get(self._entry(entry, "session_id"))
            if session == 0:
                continue
            used, refused = (
                tuple(self._get(self._entry(entry, name) + 8 * resource) for resource in Resource)
                for name in ("used", "refused")
            )
            yield Holding(
                entry,
                session,
                int(self._words[self._entry(entry, "worker_pid") // 4]),
                used,
                refused,
                self._get(self._entry(entry, "held_back")),
                self._get(self._entry(entry, "held_back_ns")),
            )

    def used(self, resource: Resource) -> int:
        """What all sessions hold together."""
        return sum(holding.used[resource] for holding in self.holdings())


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Account]:
    """An account, mapped while the block runs. Raises as ``Account`` does."""
    account = Account(path)
    try:
        yield account
    finally:
        account.close()
