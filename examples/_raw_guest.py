# SPDX-License-Identifier: Apache-2.0
"""A guest without the library: says HELLO, maps its segment and writes records by hand, right ones and wrong ones.

docs/wire.md says what all of this means. Stores through memoryviews are single aligned stores, which x86-64 keeps in order.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import time
from pathlib import Path
from typing import Self

from _support import NotSo

from vgpu.transport.attach import WELCOME_SIZE, Hello, Status, Welcome
from vgpu.transport.layout import DEVICE_PAGE_SIZE as PAGE
from vgpu.transport.lines import ANCILLARY_SIZE, take_rights
from vgpu.transport.wire import FLAG_REPLY, TABLE_HASH, CallHeader, CallId, Result

HEAD, DOORBELL, STATE, STICKY, TAIL = PAGE + 256, PAGE + 320, PAGE + 384, PAGE + 388, PAGE + 128
READY, DEAD = 1, 3
INVALID_VALUE = 1  # CUDA_ERROR_INVALID_VALUE
SLOT_SIZE = 4096
CONTEXT = 1 << 42 | 1 << 28 | 1 << 4  # a handle of a context, as guests number them
ATTACH_SECONDS = 60.0
ANSWER_SECONDS = 60.0


class SessionDead(Exception):
    """The host ended the session; ``code`` is the error it left for the program."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the session is dead, error {code}")
        self.code = code


class RawGuest:
    """One session. Closing it is a guest's end."""

    def __init__(self, run_dir: Path, vm: str) -> None:
        """Attach.

        Raises:
            NotSo: no session could be had.
        """
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(ATTACH_SECONDS)
        self.socket.connect(str(run_dir / "mediator.sock"))
        hello = Hello(os.getpid(), TABLE_HASH, vm=vm, program="raw").encode()
        deadline = time.monotonic() + ATTACH_SECONDS
        while True:
            self.socket.sendall(hello)
            data, ancillary, _, _ = self.socket.recvmsg(WELCOME_SIZE, ANCILLARY_SIZE)
            welcome = Welcome.decode(data)
            if welcome.status is not Status.BUSY or time.monotonic() > deadline:
                break
            time.sleep(welcome.retry_milliseconds / 1000)
        if welcome.status is not Status.WELCOME:
            raise NotSo(f"the mediator answered {welcome.status.name}")
        segment, lifeline = take_rights(ancillary)
        self.session = welcome.session_id
        self.lifeline = socket.socket(fileno=lifeline)
        self.map = mmap.mmap(segment, welcome.segment_size)
        os.close(segment)
        self.look(memoryview(self.map))

    def look(self, segment: memoryview) -> None:
        """Take the segment for what its session page says it is."""
        self.bytes = segment
        self._u32, self._u64 = segment.cast("I"), segment.cast("Q")
        self.ring, self.ring_size, self.slots, _, self.fences, self.arena, _ = struct.unpack_from(
            "<7Q", segment, PAGE + 32
        )
        self.tail = self.sequence = 0

    def __enter__(self) -> Self:
        return self

    def unlook(self) -> None:
        """Let go of the segment."""
        for view in (self._u32, self._u64, self.bytes):
            view.release()

    def __exit__(self, *_: object) -> None:
        self.unlook()
        self.map.close()
        self.lifeline.close()
        self.socket.close()

    def u32(self, offset: int) -> int:
        """A word of the segment."""
        return int(self._u32[offset // 4])

    def u64(self, offset: int) -> int:
        """A double word of the segment."""
        return int(self._u64[offset // 8])

    @property
    def is_dead(self) -> bool:
        """Has the host ended this session?"""
        return self.u32(STATE) == DEAD

    @property
    def sticky(self) -> int:
        """The error that every later call of the program would get."""
        return self.u32(STICKY)

    def put(self, record: bytes) -> int:
        """Write bytes at the tail without publishing them; their offset in the segment."""
        at: int = self.ring + self.tail % self.ring_size
        if at + len(record) > self.ring + self.ring_size:
            raise ValueError("the ring's end is near; this guest writes no padding")
        self.bytes[at : at + len(record)] = record
        self.tail += len(record)
        return at

    def publish(self, tail: int | None = None) -> None:
        """Let the worker see it."""
        self._u64[TAIL // 8] = self.tail if tail is None else tail
        if self.u32(DOORBELL):
            self._u32[DOORBELL // 4] = 0
            self.ring_bell()

    def ring_bell(self) -> None:
        """Wake the worker. One that has gone does not mind."""
        with contextlib.suppress(OSError):
            self.lifeline.send(b"\1", socket.MSG_NOSIGNAL)

    def record(
        self, call: int, *arguments: int, payload: bytes = b"", flags: int = 0, slot: int = 0
    ) -> bytes:
        """A well-formed record with the next sequence number."""
        header = CallHeader(call, arguments, flags, len(payload), self.sequence, slot)
        self.sequence += 1
        return (header.encode() + payload).ljust(header.record_size, b"\0")

    def ask(self, call: int, *arguments: int, payload: bytes = b"", slot: int = 0) -> Result:
        """One round trip.

        Raises:
            SessionDead: the host ended the session instead.
        """
        self._u32[(self.slots + slot * SLOT_SIZE) // 4] = ~self.sequence & 0xFFFFFFFF
        expected = self.sequence
        self.put(self.record(call, *arguments, payload=payload, flags=FLAG_REPLY, slot=slot))
        self.publish()
        return self.answer(expected, (slot,))

    def answer(self, sequence: int, slots: tuple[int, ...]) -> Result:
        """Wait for the answer in one of these slots."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            for slot in slots:
                at = self.slots + slot * SLOT_SIZE
                if self.u32(at) == sequence:
                    return Result.decode(bytes(self.bytes[at : at + 40]))
            if self.is_dead:
                raise SessionDead(self.sticky)
            if time.monotonic() > deadline:
                raise NotSo(f"no answer to record {sequence}")
            os.sched_yield()

    def expect(self, sequence: int, slots: tuple[int, ...]) -> None:
        """Forget what these slots hold, before the record of that number is published."""
        for slot in slots:
            self._u32[(self.slots + slot * SLOT_SIZE) // 4] = ~sequence & 0xFFFFFFFF

    def retain(self) -> None:
        """The primary context, as every program begins."""
        status = self.ask(CallId.wirePrimaryRetain, CONTEXT, 0).status
        if status:
            raise NotSo(f"no context: error {status}")

    def allocate(self, size: int) -> int:
        """Device memory."""
        result = self.ask(CallId.cuMemAlloc_v2, size)
        if result.status:
            raise NotSo(f"no memory: error {result.status}")
        return int(result.values[0])
