# SPDX-License-Identifier: Apache-2.0
"""A host for tests of the guest library: a mediator's socket, a segment, and a replay loop in plain Python.

Why it exists: the guest core must be seen to survive what a real worker rarely does (full rings, late answers, a
death between two bytes), on a machine without a GPU and without the worker's code. It keeps the wire's rules
strictly: a record that breaks one is written to ``problems``, which every test checks to be empty.

It must never be used outside tests; `vgpu.gpu.worker` is the real thing.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import socket
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import attrs

from vgpu.transport._generated_calls import TABLE_HASH, CallId
from vgpu.transport.attach import HELLO_SIZE, Hello
from vgpu.transport.layout import DEVICE_PAGE_SIZE, SEGMENT_MAGIC, SESSION_PAGE_SIZE
from vgpu.transport.wire import CALL_HEADER_SIZE, FLAG_REPLY, INLINE_LIMIT, CallHeader

SLOT_SIZE = 4096
SLOT_PAYLOAD = 64
READY, CLOSED, DEAD = 1, 2, 3
SESSION = DEVICE_PAGE_SIZE
# Offsets within the device page and the session page (transport/wire.h).
DEVICE = {"driver_version": 12, "name": 16, "uuid": 272, "pci": 288, "memory": 304, "priorities": 832}
ATTRIBUTE_VALID, ATTRIBUTE, ATTRIBUTES = 936, 1096, 160
TAIL, WAITERS, HEAD, DOORBELL = SESSION + 128, SESSION + 204, SESSION + 256, SESSION + 320
STATE, STICKY, DEFERRED, BUSY, RETRY = (SESSION + 384 + offset for offset in (0, 4, 8, 12, 16))
WAKE, LOST = SESSION + 408, SESSION + 412
UUID = bytes.fromhex("b19598fbac3f010f1c1be5a23a7b38d4")
NAME = "Software GPU for tests"
FUTEX_SYSCALL, FUTEX_WAKE = 202, 1

Answer = tuple[int, Sequence[int], bytes]
Responder = Callable[[CallHeader, bytes], Answer]


def store(memory: mmap.mmap, at: int, kind: str, value: int) -> None:
    """One store into memory that others look at. struct.pack_into would be two, of zeros and then of the value: a session whose
    state is zero has lost its device, a slot whose state is zero is free, and a fence that is zero has gone back."""
    {"I": ctypes.c_uint32, "Q": ctypes.c_uint64}[kind].from_buffer(memory, at).value = value


def echo(call: CallHeader, payload: bytes) -> Answer:
    """Success, the first four arguments, and the payload (as far as a slot holds it)."""
    return 0, call.arguments[:4], payload[: SLOT_SIZE - SLOT_PAYLOAD]


@attrs.define(eq=False)
class FakeHost:
    """One mediator and, for each guest that attaches, one session replayed by a thread.

    Use as a context manager. ``run_dir`` gets ``mediator.sock``.
    """

    run_dir: Path
    responder: Responder = echo
    ring_size: int = 1 << 20
    slot_count: int = 256
    fence_count: int = 1024
    arena_size: int = 1 << 20
    worker_address: int = 0x3000_0000_0000
    driver_version: int = 13000
    status: int = 0  # of WELCOME
    busy_times: int = 0  # BUSY answers before the real one
    spin: bool = False  # never sleep on the doorbell
    keep_records: bool = True
    sessions: list[Session] = attrs.field(factory=list)
    hellos: list[Hello] = attrs.field(factory=list)
    problems: list[str] = attrs.field(factory=list)
    attributes: dict[int, int] = attrs.field(
        factory=lambda: {1: 1024, 10: 32, 16: 132, 33: 6, 34: 7, 50: 1, 75: 9, 76: 0}
    )
    _threads: list[threading.Thread] = attrs.field(factory=list)
    _listener: socket.socket | None = None
    _stop: threading.Event = attrs.field(factory=threading.Event)
    paused: threading.Event = attrs.field(factory=threading.Event)  # consume nothing
    hold_answers: threading.Event = attrs.field(
        factory=threading.Event
    )  # consume, and keep replies in Session.held

    def __enter__(self) -> Self:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.run_dir / "mediator.sock"))
        self._listener.listen(16)
        self._listener.settimeout(0.05)
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self.paused.clear()
        for session in list(self.sessions):
            # What a guest that has ended sent last is still replayed, however long that takes.
            session.done.wait(60 if session.guest_has_ended() else 2)
            session.end(DEAD)
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        assert self._listener is not None
        self._listener.close()
        for session in self.sessions:
            session.close()

    @property
    def session(self) -> Session:
        """The only session there has been."""
        assert len(self.sessions) == 1, f"{len(self.sessions)} sessions"
        return self.sessions[0]

    def _start(self, function: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        assert self._listener is not None
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listener.accept()
                self._start(self._greet, connection)

    def _welcome(self, status: int, session: Session | None) -> bytes:
        size = session.size if session else 0
        address = self.worker_address if session else 0
        body = struct.pack("<IIIIQQQI", 0x57504756, 1, status, 20, 7, size, address, self.driver_version)
        return body.ljust(64, b"\0")

    def _greet(self, connection: socket.socket) -> None:
        connection.settimeout(0.05)
        data = b""
        with connection:
            while not self._stop.is_set():
                try:
                    more = connection.recv(4096)
                except TimeoutError:
                    continue
                except ConnectionError:
                    return
                if not more:
                    return
                data += more
                while len(data) >= HELLO_SIZE:
                    hello, data = Hello.decode(data[:HELLO_SIZE]), data[HELLO_SIZE:]
                    self._answer(connection, hello)

    def _answer(self, connection: socket.socket, hello: Hello) -> None:
        self.hellos.append(hello)
        if hello.table_hash != TABLE_HASH:
            self.problems.append("HELLO carries another call table's hash")
        if self.busy_times > 0:
            self.busy_times -= 1
            connection.sendall(self._welcome(1, None))
            return
        if self.status != 0 or hello.flags & 1:
            connection.sendall(self._welcome(self.status, None))
            return
        session = Session(self)
        self.sessions.append(session)
        socket.send_fds(connection, [self._welcome(0, session)], [session.segment, session.far_end.fileno()])
        session.far_end.close()
        self._start(session.replay)


class Session:
    """A segment and the loop that replays its ring. Everything the guest did is kept in ``records``.

    The segment is a memfd of its own, or lies at ``offset`` in the file ``within`` (a slot of a VM's BAR1).
    """

    def __init__(self, host: FakeHost, *, within: int | None = None, offset: int = 0) -> None:
        self.host = host
        self.records: list[tuple[CallHeader, bytes]] = []
        self.calls: Counter[str] = Counter()
        self.doorbells = 0
        self.pads = 0
        self.held: list[CallHeader] = []
        self.ended = threading.Event()
        self.done = threading.Event()
        self.expected_sequence = 0
        self.ring = DEVICE_PAGE_SIZE + SESSION_PAGE_SIZE
        self.slots = self.ring + host.ring_size
        self.fences = self.slots + host.slot_count * SLOT_SIZE
        self.arena = (self.fences + host.fence_count * 8 + 4095) & ~4095
        self.size = self.arena + host.arena_size
        if within is None:
            self.segment = os.memfd_create("segment", os.MFD_CLOEXEC)
            os.ftruncate(self.segment, self.size)
        else:
            self.segment = os.dup(within)
        self.memory = mmap.mmap(self.segment, self.size, offset=offset)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.near_end, self.far_end = socket.socketpair()
        self.near_end.setblocking(False)
        self._fill()

    def _fill(self) -> None:
        host, memory = self.host, self.memory
        struct.pack_into("<QII", memory, 0, SEGMENT_MAGIC, 1, host.driver_version)
        struct.pack_into("256s", memory, DEVICE["name"], NAME.encode())
        struct.pack_into("16s", memory, DEVICE["uuid"], UUID)
        struct.pack_into("<iiii", memory, DEVICE["pci"], 1, 6, 7, 0)
        struct.pack_into("<Q", memory, DEVICE["memory"], 20 << 30)
        struct.pack_into("<ii", memory, DEVICE["priorities"], 0, -5)
        for number, value in host.attributes.items():
            memory[ATTRIBUTE_VALID + number] = 1
            struct.pack_into("<i", memory, ATTRIBUTE + 4 * number, value)
        struct.pack_into("<QIIQQ", memory, SESSION, SEGMENT_MAGIC, 1, 0, 7, self.size)
        struct.pack_into(
            "<QQQII",
            memory,
            SESSION + 32,
            self.ring,
            host.ring_size,
            self.slots,
            host.slot_count,
            host.fence_count,
        )
        struct.pack_into(
            "<QQQQQ", memory, SESSION + 64, self.fences, self.arena, host.arena_size, 0, host.worker_address
        )
        self.store(STATE, READY)

    # ---- words of the segment ----

    def load(self, offset: int) -> int:
        return int(struct.unpack_from("<I", self.memory, offset)[0])

    def load64(self, offset: int) -> int:
        return int(struct.unpack_from("<Q", self.memory, offset)[0])

    def store(self, offset: int, value: int) -> None:
        store(self.memory, offset, "I", value)

    def store64(self, offset: int, value: int) -> None:
        store(self.memory, offset, "Q", value)

    def fence(self, index: int, value: int) -> None:
        """Store a fence word, as the GPU would: nobody is woken."""
        self.store64(self.fences + 8 * index, value)

    def wake(self) -> None:
        """Wake whoever sleeps on the session's futex word."""
        self.store(WAKE, (self.load(WAKE) + 1) & 0xFFFFFFFF)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall(
            FUTEX_SYSCALL, ctypes.c_void_p(self.address + WAKE), FUTEX_WAKE, 2**31 - 1, None, None, 0
        )

    def end(self, state: int, sticky: int = 0) -> None:
        """End the session in good order: reason, state, wake."""
        if self.ended.is_set():
            return
        self.ended.set()
        if sticky:
            self.store(STICKY, sticky)
        if self.load(STATE) == READY:
            self.store(STATE, state)
        self.wake()

    def vanish(self) -> None:
        """Die as a killed worker does: the lifeline ends, nothing is written, nobody is woken."""
        self.ended.set()
        self.near_end.close()

    def guest_has_ended(self) -> bool:
        """Its end of the lifeline is closed, whatever it wrote into it before."""
        if self.near_end.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(self.near_end, select.POLLRDHUP)
        return bool(poll.poll(0))

    def close(self) -> None:
        self.near_end.close()
        os.close(self.segment)

    # ---- the loop ----

    def _take(self, head: int, tail: int) -> int:
        """Replay the record at ``head``; its size."""
        offset = head % self.host.ring_size
        to_end = self.host.ring_size - offset
        if to_end < CALL_HEADER_SIZE:
            raise ValueError(f"{to_end} bytes to the ring's end are less than a header")
        raw = bytes(self.memory[self.ring + offset : self.ring + offset + CALL_HEADER_SIZE])
        call = CallHeader.decode(raw)
        size = (CALL_HEADER_SIZE + call.payload_length + 15) & ~15
        if size > to_end or size > tail - head:
            raise ValueError(f"record of {size} bytes, {to_end} to the end, {tail - head} produced")
        if call.sequence != self.expected_sequence & 0xFFFFFFFF:
            raise ValueError(f"sequence {call.sequence}, expected {self.expected_sequence}")
        self.expected_sequence += 1
        if call.call == CallId.wirePad:
            if size != to_end or call.flags:
                raise ValueError("a pad that does not reach the ring's end")
            self.pads += 1
            return size
        if call.payload_length > INLINE_LIMIT:
            raise ValueError(f"payload of {call.payload_length} bytes")
        start = self.ring + offset + CALL_HEADER_SIZE
        payload = bytes(self.memory[start : start + call.payload_length])
        self._replay_one(call, payload)
        return size

    def _replay_one(self, call: CallHeader, payload: bytes) -> None:
        if self.host.keep_records:
            self.records.append((call, payload))
        self.calls[CallId(call.call).name] += 1
        if call.call == CallId.wireFenceContext:
            self.fence(call.arguments[0], call.arguments[1])
        elif call.call in (CallId.wireFence, CallId.wireFenceEvent):
            self.fence(call.arguments[1], call.arguments[2])
        elif call.call == CallId.wireGoodbye:
            self.end(CLOSED)
        if call.flags & FLAG_REPLY:
            if self.host.hold_answers.is_set():
                self.held.append(call)
            else:
                self.answer(call, payload)
        elif self.load(WAITERS):
            self.wake()

    def answer(self, call: CallHeader, payload: bytes = b"") -> None:
        """Put the responder's answer into the call's slot."""
        status, values, reply = self.host.responder(call, payload)
        if call.slot >= self.host.slot_count:
            raise ValueError(f"slot {call.slot}")
        slot = self.slots + call.slot * SLOT_SIZE
        if self.load(slot) == call.sequence:
            raise ValueError("the slot already held the sequence of the call")
        self.memory[slot + SLOT_PAYLOAD : slot + SLOT_PAYLOAD + len(reply)] = reply
        padded = (*values, 0, 0, 0, 0)[:4]
        struct.pack_into("<HHQQQQ", self.memory, slot + 4, status, len(reply), *padded)
        self.store(slot, call.sequence)
        if self.load(WAITERS):
            self.wake()

    def replay(self) -> None:
        """Until the session ends or the guest is gone."""
        head = 0
        try:
            while not self.ended.is_set():
                tail = self.load64(TAIL)
                if tail - head > self.host.ring_size:
                    raise ValueError(f"tail {tail} is more than a ring before head {head}")
                if tail == head or self.host.paused.is_set():
                    if not self._idle(head):
                        return
                    continue
                head += self._take(head, tail)
                self.store64(HEAD, head)
        except ValueError as error:
            self.host.problems.append(str(error))
            self.end(DEAD, 1)
        finally:
            self.done.set()

    def _idle(self, head: int) -> bool:
        """Wait for a doorbell; False when the guest is gone and left nothing."""
        if self.host.spin or self.host.paused.is_set():
            time.sleep(0.0005)
        else:
            self.store(DOORBELL, 1)
            if self.load64(TAIL) != head:
                return True
        try:
            if not select.select([self.near_end], [], [], 0.0 if self.host.spin else 0.02)[0]:
                return True
            got = self.near_end.recv(64)
        except (BlockingIOError, ValueError, OSError):
            return not self.ended.is_set()
        self.doorbells += len(got)
        # What a guest sent last is replayed, too, but by a host that is paused.
        return bool(got) or (self.load64(TAIL) != head and not self.host.paused.is_set())


@contextlib.contextmanager
def short_folder():  # type: ignore[no-untyped-def]
    """A folder whose path is short enough for a unix socket's name."""
    with tempfile.TemporaryDirectory(prefix="vgpu-", dir="/tmp") as folder:
        yield Path(folder)
