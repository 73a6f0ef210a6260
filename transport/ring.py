# SPDX-License-Identifier: Apache-2.0
"""The guest's half of a submission ring, for calls that the host makes on a guest's behalf (docs/wire.md section 2).

Guests that map their segment have their own (shim/libcuda/ring.c). This one serves those that cannot: the device process
pushes what they wrote into registers. The segment belongs to a hostile guest all the while, so every number that is
read there is copied once and checked against the segment before it is used; what the guest spoils is its own session.
Pure: memory in, nothing waits. One producer at a time.
"""

from __future__ import annotations

from typing import Final

from .errors import RemoteProtocolError
from .layout import DEVICE_PAGE_SIZE, SESSION_PAGE_SIZE
from .wire import CALL_HEADER_SIZE, FLAG_REPLY, RECORD_ALIGNMENT, RESULT_SIZE, CallHeader, Result

SLOT_SIZE: Final = 4096
SLOT_PAYLOAD_OFFSET: Final = 64
SLOT_PAYLOAD_LIMIT: Final = SLOT_SIZE - SLOT_PAYLOAD_OFFSET
# Room for the largest record that comes through registers, and for the gap before it.
SMALLEST_RING: Final = 8192
FIRST_PART: Final = DEVICE_PAGE_SIZE + SESSION_PAGE_SIZE

# name: offset in the session page, bytes. tests/transport/test_ring.py holds them to wire.h.
FIELDS: Final[dict[str, tuple[int, int]]] = {
    "ring_offset": (32, 8),
    "ring_size": (40, 8),
    "slots_offset": (48, 8),
    "slot_count": (56, 4),
    "tail": (128, 8),
    "head": (256, 8),
    "doorbell_wanted": (320, 4),
    "state": (384, 4),
    "sticky_error": (388, 4),
}


class RingProducer:
    """Pushes records into a segment and takes their answers. Borrows the memory; ``close`` lets go of it.

    Raises:
        RemoteProtocolError: the session page describes no ring within the segment.
    """

    def __init__(self, segment: memoryview) -> None:
        self._bytes = segment
        self._words = segment.cast("I")
        self._longs = segment.cast("Q")
        self._ring = self._get("ring_offset")
        self._size = self._get("ring_size")
        self._slots = self._get("slots_offset")
        self._slot_count = self._get("slot_count")
        sound = (
            self._size >= SMALLEST_RING
            and self._size & (self._size - 1) == 0
            and self._ring % 64 == 0
            and FIRST_PART <= self._ring <= len(segment) - self._size
            and self._slots % 64 == 0
            and FIRST_PART <= self._slots <= len(segment) - self._slot_count * SLOT_SIZE
        )
        if not sound:
            self.close()
            raise RemoteProtocolError(
                f"a ring of {self._size:#x} bytes at {self._ring:#x}, {self._slot_count} slots at {self._slots:#x}"
                f" in a segment of {len(segment):#x}"
            )

    def close(self) -> None:
        """Let go of the memory. May be called twice."""
        self._words.release()
        self._longs.release()

    def try_push(self, header: CallHeader, payload: bytes) -> bool:
        """Put the record into the ring and publish it. False: there is no room now.

        Raises:
            RemoteProtocolError: the ring's counters are not those of a ring, or there is no such completion slot.
        """
        tail, head = self._get("tail"), self._get("head")
        used = (tail - head) % (1 << 64)
        if tail % RECORD_ALIGNMENT or used > self._size:
            raise RemoteProtocolError(f"a ring of {self._size:#x} bytes from {head:#x} to {tail:#x}")
        if header.flags & FLAG_REPLY and header.slot >= self._slot_count:
            raise RemoteProtocolError(f"no completion slot {header.slot} of {self._slot_count}")
        gap = self._gap_before(tail, header.record_size)
        if self._size - used < gap + header.record_size:
            return False
        if gap:
            self._put(
                tail, CallHeader(0, payload_length=gap - CALL_HEADER_SIZE, sequence=header.sequence), b""
            )
            tail += gap
        if header.flags & FLAG_REPLY:
            self._words[self._slot_at(header) // 4] = ~header.sequence & 0xFFFFFFFF
        self._put(tail, header, payload)
        # x86-64 keeps stores in order: the record is whole when the tail shows it.
        self._set("tail", (tail + header.record_size) % (1 << 64))
        return True

    def take_doorbell(self) -> bool:
        """Whether the worker wants to be woken; if so, whoever asked must do it."""
        wanted = self._get("doorbell_wanted") != 0
        if wanted:
            self._set("doorbell_wanted", 0)
        return wanted

    def answer(self, header: CallHeader, limit: int) -> tuple[Result, bytes] | None:
        """The answer to a record that asked for one, its payload cut at ``limit`` bytes; None: not yet."""
        at = self._slot_at(header)
        if self._words[at // 4] != header.sequence:
            return None
        result = Result.decode(bytes(self._bytes[at : at + RESULT_SIZE]))
        count = min(result.payload_length, SLOT_PAYLOAD_LIMIT, limit)
        payload = bytes(self._bytes[at + SLOT_PAYLOAD_OFFSET : at + SLOT_PAYLOAD_OFFSET + count])
        return result, payload

    def session_error(self) -> int | None:
        """CUresult of a session that has ended: None while it lives, 0 if nobody said why."""
        error, state = self._get("sticky_error"), self._get("state")
        return error & 0xFFFF if state > 1 else None

    def _slot_at(self, header: CallHeader) -> int:
        return self._slots + header.slot * SLOT_SIZE

    def _gap_before(self, position: int, size: int) -> int:
        """Bytes to skip: a record never wraps, and none leaves a rest too small for a header."""
        to_end = self._size - position % self._size
        return 0 if to_end == size or to_end >= size + CALL_HEADER_SIZE else to_end

    def _put(self, position: int, header: CallHeader, payload: bytes) -> None:
        at = self._ring + position % self._size
        self._bytes[at : at + CALL_HEADER_SIZE] = header.encode()
        at += CALL_HEADER_SIZE
        self._bytes[at : at + len(payload)] = payload

    def _get(self, name: str) -> int:
        offset, size = FIELDS[name]
        view = self._longs if size == 8 else self._words
        return int(view[(DEVICE_PAGE_SIZE + offset) // size])

    def _set(self, name: str, value: int) -> None:
        offset, size = FIELDS[name]
        view = self._longs if size == 8 else self._words
        view[(DEVICE_PAGE_SIZE + offset) // size] = value
