# SPDX-License-Identifier: Apache-2.0
"""Pages of shared memory as Python sees them: named fields over a mapping.

Offsets repeat ``wire.h``; tests/transport/test_layout.py compiles a C program that prints the header's
own offsets and compares. Each field is one aligned load or store (memoryview items are copied whole),
so a field is never seen half written. Nothing here waits.
"""

from __future__ import annotations

import mmap
from typing import Final

GRANT_PAGE_SIZE = 4096
GRANT_MAGIC = 0x544E415247555047
DEVICE_PAGE_SIZE = 16384
SESSION_PAGE_SIZE = 32768
SEGMENT_MAGIC = 0x31555047565F5356

# name: (offset, memoryview format)
GRANT_FIELDS: Final[dict[str, tuple[int, str]]] = {
    "magic": (0, "Q"),
    "session_id": (8, "Q"),
    "epoch": (64, "Q"),
    "deadline_ns": (72, "Q"),
    "credits": (80, "q"),
    "granted": (88, "I"),
    "preempt": (92, "I"),
    "memory_limit_bytes": (96, "Q"),
    "retry_hint_ns": (104, "Q"),
    "seen_epoch": (128, "Q"),
    "demand": (136, "I"),
    "current_call": (140, "I"),
    "records": (144, "Q"),
    "current_since_ns": (152, "Q"),
    "async_records": (160, "Q"),
    "reply_records": (168, "Q"),
    "fence_records": (176, "Q"),
    "doorbells": (184, "Q"),
    "replay_errors": (192, "Q"),
    "protocol_errors": (200, "Q"),
    "launches": (208, "Q"),
    "bytes_to_device": (216, "Q"),
    "bytes_from_device": (224, "Q"),
    "gpu_ns": (232, "Q"),
    "fences_issued": (240, "Q"),
    "fences_done": (248, "Q"),
    "oldest_fence_ns": (256, "Q"),
    "memory_used_bytes": (264, "Q"),
    "memory_peak_bytes": (272, "Q"),
    "last_error": (280, "I"),
    "worker_pid": (284, "I"),
}

# Offsets within a segment (the device page comes first, then the session page).
SESSION_FIELDS: Final[dict[str, tuple[int, str]]] = {
    "magic": (0, "Q"),
    "session_id": (16, "Q"),
    "tail": (128, "Q"),
    "head": (256, "Q"),
    "state": (384, "I"),
    "sticky_error": (388, "I"),
    "deferred_error": (392, "I"),
    "busy": (396, "I"),
    "wake": (408, "I"),
    "device_lost": (412, "I"),
    "local_calls": (4608, "Q"),
    "async_calls": (4616, "Q"),
    "fence_calls": (4624, "Q"),
    "reply_calls": (4632, "Q"),
    "refused_calls": (4640, "Q"),
}
REFUSED_OFFSET = 4648
REFUSED_NAMES = 1024


class Page:
    """Fields of one mapped page, read and written by name.

    Owns the mapping: ``close`` releases it. A page may be closed twice.
    """

    def __init__(self, fd: int, size: int, fields: dict[str, tuple[int, str]], *, offset: int = 0) -> None:
        self._map = mmap.mmap(fd, size, offset=offset)
        self._views = {f: memoryview(self._map).cast(f) for f in ("I", "q", "Q")}
        self._fields = fields
        self._size = {"I": 4, "q": 8, "Q": 8}

    def get(self, name: str) -> int:
        """One field's value now."""
        offset, kind = self._fields[name]
        return int(self._views[kind][offset // self._size[kind]])

    def set(self, name: str, value: int) -> None:
        """Store one field. x86-64 keeps stores in order, so the field stored last publishes the others."""
        offset, kind = self._fields[name]
        self._views[kind][offset // self._size[kind]] = value

    def snapshot(self) -> dict[str, int]:
        """All fields, each read once."""
        return {name: self.get(name) for name in self._fields}

    def words(self, offset: int, count: int) -> list[int]:
        """``count`` 32-bit words from byte ``offset``."""
        view = self._views["I"]
        return [int(view[offset // 4 + i]) for i in range(count)]

    def close(self) -> None:
        """Unmap. The fields must not be used afterwards."""
        for view in self._views.values():
            view.release()
        self._views = {}
        self._map.close()


class GrantPage(Page):
    """The page between mediator and worker that carries a session's lease and its progress."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, GRANT_PAGE_SIZE, GRANT_FIELDS)

    def grant(self, *, deadline_ns: int, credits: int = -1) -> int:
        """Write a lease and publish it. deadline_ns is CLOCK_MONOTONIC, 0 open-ended. Returns its epoch."""
        self.set("deadline_ns", deadline_ns)
        self.set("credits", credits)
        self.set("preempt", 0)
        self.set("granted", 1)
        return self._publish()

    def revoke(self) -> int:
        """Ask the worker to stop at its next record. Returns the epoch of the request."""
        self.set("preempt", 1)
        self.set("granted", 0)
        return self._publish()

    def _publish(self) -> int:
        epoch = self.get("epoch") + 1
        self.set("epoch", epoch)
        return epoch


class SessionPage(Page):
    """The session page inside a segment, as the mediator sees it. Everything the guest wrote is hostile."""

    def __init__(self, segment_fd: int) -> None:
        super().__init__(segment_fd, SESSION_PAGE_SIZE, SESSION_FIELDS, offset=DEVICE_PAGE_SIZE)

    def refused(self) -> dict[int, int]:
        """Calls the guest says it refused, by call id; for metrics only."""
        counts = self.words(REFUSED_OFFSET, REFUSED_NAMES)
        return {index: count for index, count in enumerate(counts) if count}
