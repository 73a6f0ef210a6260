# SPDX-License-Identifier: Apache-2.0
"""A guest made of Python: maps a segment and writes records, right ones and wrong ones.

Only for tests. Stores through memoryviews are single aligned stores, which x86-64 keeps in order.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vgpu.gpu._replay import ffi, lib
from vgpu.transport._generated_calls import CallId
from vgpu.transport.account import open_account_file
from vgpu.transport.layout import DEVICE_PAGE_SIZE, GrantPage
from vgpu.transport.wire import FLAG_REPLY, CallHeader, Result

HERE = Path(__file__).parent
PAGE = DEVICE_PAGE_SIZE
TAIL, HEARTBEAT, WAITERS = PAGE + 128, PAGE + 192, PAGE + 204
HEAD, DOORBELL = PAGE + 256, PAGE + 320
STATE, STICKY, DEFERRED, BUSY, BUSY_RETRY, WAKE = (PAGE + 384 + n for n in (0, 4, 8, 12, 16, 24))
LOST = PAGE + 412
CALLBACK_WAKE, CALLBACKS = PAGE + 448, PAGE + 512
READY, CLOSED, DEAD = 1, 2, 3
SLOT_ADDRESS = 0x2100_0000_0000
CONTEXT = 1 << 42 | 1 << 28 | 1 << 4


def build_fake_driver(folder: Path, source: str = "fake_driver.c", *options: str) -> Path:
    """Compile one of the fakes beside this file; the path of a library that answers as libcuda does."""
    library = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-fvisibility=hidden", "-O1", "-pthread", *options]
    subprocess.run([*command, str(HERE / source), "-o", str(library)], check=True)
    return library


def until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Wait until the condition holds; False if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


class Guest:
    """The guest's side of one session."""

    def __init__(self, segment_fd: int, lifeline: socket.socket, offset: int = 0, size: int = 0) -> None:
        """``offset`` and ``size``: the segment is a slot of a BAR1."""
        self.lifeline = lifeline
        self._mapping = mmap.mmap(segment_fd, size or os.fstat(segment_fd).st_size - offset, offset=offset)
        self._look(memoryview(self._mapping))

    def _look(self, segment: memoryview) -> None:
        """Take the segment for what its session page says it is."""
        self.map = segment
        self._u32 = segment.cast("I")
        self._u64 = segment.cast("Q")
        self.ring, self.ring_size, self.slots, counts, self.fences, self.arena, self.arena_size = (
            struct.unpack_from("<7Q", segment, PAGE + 32)
        )
        self.slot_count, self.fence_count = counts & 0xFFFFFFFF, counts >> 32
        self.tail = 0
        self.sequence = 0

    def close(self) -> None:
        self._unlook()
        self._mapping.close()

    def _unlook(self) -> None:
        for view in (self._u32, self._u64, self.map):
            view.release()

    def u32(self, offset: int) -> int:
        return int(self._u32[offset // 4])

    def set_u32(self, offset: int, value: int) -> None:
        self._u32[offset // 4] = value

    def u64(self, offset: int) -> int:
        return int(self._u64[offset // 8])

    def set_u64(self, offset: int, value: int) -> None:
        self._u64[offset // 8] = value

    def fence(self, index: int) -> int:
        return self.u64(self.fences + 8 * index)

    def write(self, raw: bytes) -> None:
        """Put bytes into the ring at the tail, without publishing them."""
        at = self.ring + self.tail % self.ring_size
        self.map[at : at + len(raw)] = raw
        self.tail += len(raw)

    def publish(self, tail: int | None = None) -> None:
        self.set_u64(TAIL, self.tail if tail is None else tail)
        if self.u32(DOORBELL):
            self.set_u32(DOORBELL, 0)
            self.ring_bell()

    def ring_bell(self) -> None:
        """Wake the worker. A guest in a VM does it another way."""
        assert self.lifeline.send(b"\1") == 1

    def put(self, call: int, *arguments: int, payload: bytes = b"", flags: int = 0, slot: int = 0) -> int:
        """Write a right record (and a pad before it where it would wrap); its sequence number."""
        header = CallHeader(call, arguments, flags, len(payload), self.sequence, slot)
        size = header.record_size
        # That of a dead reader stays full.
        until(lambda: self.tail + 2 * size - self.u64(HEAD) <= self.ring_size, 5)
        to_end = self.ring_size - self.tail % self.ring_size
        if to_end != size and to_end < size + 80:
            self.write(CallHeader(CallId.wirePad, payload_length=to_end - 80).encode() + bytes(to_end - 80))
        self.write((header.encode() + payload).ljust(size, b"\0"))
        self.sequence += 1
        return self.sequence - 1

    def send(self, call: int, *arguments: int, payload: bytes = b"") -> None:
        """One record, nobody waits."""
        self.put(call, *arguments, payload=payload)
        self.publish()

    def ask(
        self, call: int, *arguments: int, payload: bytes = b"", slot: int = 0, seconds: float = 60.0
    ) -> Result:
        """One round trip."""
        at = self.slots + slot * 4096
        self.set_u32(at, ~self.sequence & 0xFFFFFFFF)
        expected = self.put(call, *arguments, payload=payload, flags=FLAG_REPLY, slot=slot)
        self.publish()
        if not until(lambda: self.u32(at) == expected, seconds):
            raise TimeoutError(f"no answer to call {call}")
        # The worker counts a record after it has answered it, and stores the head after that: whoever reads counters now finds it.
        until(lambda: self.u64(HEAD) == self.tail, 5)
        return Result.decode(bytes(self.map[at : at + 40]))

    def retain(self) -> None:
        """The primary context, as every program begins."""
        assert self.ask(CallId.wirePrimaryRetain, CONTEXT, 0).status == 0


def options(**changes: int) -> Any:
    """Replay options for tests: small, mapped anywhere."""
    values = {
        "address": 0,
        "arena_size": 4 << 20,
        "arena_registered": 2 << 20,
        "ring_size": 64 << 10,
        "slot_count": 8,
        "fence_count": 64,
        "spin_ns": 4000,
    }
    return ffi.new("struct vgpu_replay_options *", {**values, **changes})


class Replayed:
    """A replay in this process, its thread, its grant page and its guest."""

    def __init__(
        self,
        library: Path,
        *,
        memory_limit: int = 0,
        leased: bool = True,
        slot: tuple[int, int, int] | None = None,
        slot_registered: int = 0,
        account: tuple[Path, int] | None = None,
        nvml: bool = False,
        **changes: int,
    ) -> None:
        """``slot``: a descriptor of a BAR1, and offset and size of a slot in it; replay there. ``account``: the VM's, and the
        session's entry in it. ``nvml``: the library is also the one to ask what the process holds."""
        self._library = ctypes.CDLL(str(library))
        self.replay = lib.vgpu_replay_new()
        if slot is not None:
            changes.setdefault("address", SLOT_ADDRESS)  # room for a slot larger than the first segment
        layout = options(**changes)
        size = lib.vgpu_segment_size(layout)
        assert size
        self.segment_fd, self.grant_fd = os.memfd_create("segment"), os.memfd_create("grant")
        os.ftruncate(self.segment_fd, size)
        os.ftruncate(self.grant_fd, lib.VGPU_GRANT_FILE_SIZE)
        self.driver = lib.vgpu_replay_driver(self.replay)
        wrong = lib.vgpu_driver_open(self.driver, os.fsencode(library))
        assert wrong == ffi.NULL, ffi.string(wrong)
        assert not nvml or lib.vgpu_replay_use_nvml(self.replay, os.fsencode(library)) == 0
        assert lib.vgpu_replay_map(self.replay, self.segment_fd, self.grant_fd, layout) == 0
        step = ffi.new("const char **")
        status = lib.vgpu_replay_warm(self.replay, 0, 0, b"1.2.3", step)
        assert status == 0, ffi.string(step[0])
        self.grant = GrantPage(self.grant_fd)
        ours, theirs = socket.socketpair()
        self._ours = ours
        if slot is None:
            self.guest = Guest(self.segment_fd, theirs)
        else:
            status = lib.vgpu_replay_rebase(self.replay, *slot, slot_registered, step)
            assert status == 0, ffi.string(step[0])
            self.guest = Guest(slot[0], theirs, *slot[1:])
        if account is not None:
            account_fd = open_account_file(account[0])
            assert lib.vgpu_replay_share_account(self.replay, account_fd, account[1]) == 0
            os.close(account_fd)
        lib.vgpu_replay_assign(self.replay, ours.fileno(), 7, memory_limit)
        if leased:
            self.grant.grant(deadline_ns=0)
        self.ended: int | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self.ended = lib.vgpu_replay_run(self.replay)

    def kick(self) -> None:
        lib.vgpu_replay_kick(self.replay)

    def events(self) -> int:
        return lib.vgpu_replay_events(self.replay) & 0xFF

    def joined(self, seconds: float = 60.0) -> int | None:
        """Wait for run() to return; why it did."""
        self.thread.join(seconds)
        return self.ended

    def close(self) -> None:
        lib.vgpu_replay_stop(self.replay)
        self.thread.join(60)
        assert not self.thread.is_alive()
        # The driver's threads look whether the session has ended; a worker process simply goes, and they with it.
        assert until(lambda: self._library.fakeHostCalls() == 0)
        self._library.fakeForgetWrites(ctypes.c_ulong(self.thread.ident or 0))
        self.guest.close()
        self.guest.lifeline.close()
        self._ours.close()
        self.grant.close()
        os.close(self.segment_fd)
        os.close(self.grant_fd)
        lib.vgpu_replay_free(self.replay)


@contextmanager
def replayed(library: Path, **how: Any) -> Iterator[Replayed]:
    """A running replay over the fake driver."""
    session = Replayed(library, **how)
    try:
        yield session
    finally:
        session.close()


def used(session: Replayed) -> int:
    """Bytes of device memory that the session is charged with."""
    return session.grant.get("memory_used_bytes")
