# SPDX-License-Identifier: Apache-2.0
"""What a worker writes down of its session while somebody traces it: the reader of the ring in ``wire.h``.

The replay thread writes and never waits; who reads too slowly loses the oldest events and is told how many. The memory
is never a guest's, but the process that writes it digests what guests send, so that a reader takes nothing in it for granted.
"""

from __future__ import annotations

import enum
import mmap
import os
import struct
from collections.abc import Iterator

import attrs

from vgpu.transport._generated_calls import CallId

__all__ = ["EVENT_SIZE", "TraceEvent", "TraceKind", "TraceReader", "call_name", "decode_events"]

MAGIC = 0x4543415254555047
HEAD_SIZE = 4096
CAPACITY = 1 << 17
EVENT = struct.Struct("<QQQII")
EVENT_SIZE = EVENT.size
FILE_SIZE = HEAD_SIZE + CAPACITY * EVENT_SIZE
# The event after the newest may be half written.
UNSAFE = 1
_MAGIC_AT, _HEAD_AT, _MISSED_AT = 0, 128, 136

_NAMES = {int(call): call.name for call in CallId}


class TraceKind(enum.IntEnum):
    """As in ``wire.h``."""

    CALL = 1
    FENCE = 2
    BUSY = 3
    LEASE = 4
    STARVED = 5


@attrs.frozen
class TraceEvent:
    """One event; nanoseconds of CLOCK_MONOTONIC. What ``detail`` and ``call`` mean depends on the kind."""

    kind: TraceKind
    begin_ns: int
    end_ns: int
    call: int
    detail: int


def call_name(call: int) -> str:
    """The call's name in the table, for people."""
    return _NAMES.get(call, f"call {call}")


def decode_events(data: bytes) -> Iterator[TraceEvent]:
    """Events out of their bytes, a whole number of them. What is no event is left out."""
    known = {int(kind): kind for kind in TraceKind}
    for begin, end, detail, kind, call in EVENT.iter_unpack(data):
        if kind in known and 0 < begin <= end:
            yield TraceEvent(known[kind], begin, end, call, detail)


class TraceReader:
    """Takes what a worker writes, from the moment of its making. Owns the descriptor.

    Raises:
        ValueError: it is no trace.
    """

    def __init__(self, descriptor: int) -> None:
        try:
            if os.fstat(descriptor).st_size < FILE_SIZE:
                raise ValueError("the worker's trace is too short")
            self._map = mmap.mmap(descriptor, FILE_SIZE, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        self._view = memoryview(self._map).cast("Q")
        if self._word(_MAGIC_AT) != MAGIC:
            self.close()
            raise ValueError("the worker's trace does not begin as one")
        self._taken = self._word(_HEAD_AT)
        self._missed_before = self._word(_MISSED_AT)
        self.lost = 0
        """Events that were overwritten before they were taken."""

    def _word(self, at: int) -> int:
        return int(self._view[at // 8])

    @property
    def missed(self) -> int:
        """Events that came after the worker had written as many as it was told to."""
        return max(self._word(_MISSED_AT) - self._missed_before, 0)

    def take(self, limit: int) -> bytes:
        """The oldest events not taken yet, at most so many, as they lie there. Never waits."""
        head = self._word(_HEAD_AT)
        self._taken = min(
            self._taken, head
        )  # a head that went back is nobody's doing, and must not stop us for ever
        oldest = max(head + UNSAFE - CAPACITY, 0)
        if self._taken < oldest:
            self.lost += oldest - self._taken
            self._taken = oldest
        count = min(head - self._taken, limit)
        data = self._copy(self._taken, count)
        # What was overwritten while it was copied is not what it was.
        spoilt = min(max(self._word(_HEAD_AT) + UNSAFE - CAPACITY - self._taken, 0), count)
        self.lost += spoilt
        self._taken += count
        return data[spoilt * EVENT_SIZE :]

    def _copy(self, first: int, count: int) -> bytes:
        begin = first % CAPACITY
        till_end = min(count, CAPACITY - begin)
        at = HEAD_SIZE + begin * EVENT_SIZE
        data = self._map[at : at + till_end * EVENT_SIZE]
        return data + self._map[HEAD_SIZE : HEAD_SIZE + (count - till_end) * EVENT_SIZE]

    def close(self) -> None:
        """Give the mapping back. May be called twice."""
        if not self._map.closed:
            self._view.release()
            self._map.close()
