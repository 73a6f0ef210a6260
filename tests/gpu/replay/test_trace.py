# SPDX-License-Identifier: Apache-2.0
"""A session's trace: what the replay thread writes, what the reader takes, and where a session's time goes."""

from __future__ import annotations

import os
import struct
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.gpu.replay.guest import BUSY, Replayed, replayed, until
from tests.gpu.replay.test_loop import DEVICE_BUSY, SLEEP, make_busy, tell
from vgpu.gpu._replay import lib
from vgpu.gpu.trace import (
    CAPACITY,
    EVENT,
    EVENT_SIZE,
    FILE_SIZE,
    HEAD_SIZE,
    MAGIC,
    TraceEvent,
    TraceKind,
    TraceReader,
)
from vgpu.gpu.trace import decode_events as decode
from vgpu.transport._generated_calls import CallId


@pytest.fixture
def session(fake_driver: Path) -> Iterator[Replayed]:
    with replayed(fake_driver) as running:
        running.guest.retain()
        yield running


@pytest.fixture
def reader(session: Replayed) -> Iterator[TraceReader]:
    trace_fd = os.memfd_create("trace")
    os.ftruncate(trace_fd, FILE_SIZE)
    assert lib.vgpu_replay_trace_map(session.replay, trace_fd) == 0
    reader = TraceReader(trace_fd)
    yield reader
    reader.close()


def test_layout_is_that_of_the_header() -> None:
    assert FILE_SIZE == lib.VGPU_TRACE_FILE_SIZE
    assert EVENT_SIZE == 32


def test_calls_are_traced_in_order_while_it_is_on(session: Replayed, reader: TraceReader) -> None:
    assert reader.take(100) == b""
    tell(session, 2, 1)
    assert reader.take(100) == b""
    lib.vgpu_replay_trace(session.replay, 100)
    before = time.monotonic_ns()
    tell(session, 2, 1)
    tell(session, SLEEP, 20)  # the call takes 20 ms
    session.guest.send(CallId.cuStreamCopyAttributes, 0, 0)
    tell(session, 2, 2)
    events = [e for e in decode(reader.take(100)) if e.kind is TraceKind.CALL]
    after = time.monotonic_ns()
    limit = int(CallId.cuCtxSetLimit)
    assert [e.call for e in events] == [limit, limit, int(CallId.cuStreamCopyAttributes), limit]
    times = [t for e in events for t in (e.begin_ns, e.end_ns)]
    assert times == sorted(times)
    assert before <= times[0]
    assert times[-1] <= after
    assert events[1].end_ns - events[1].begin_ns >= 20_000_000
    lib.vgpu_replay_trace(session.replay, 0)
    tell(session, 2, 3)
    assert reader.take(100) == b""


def test_calls_one_after_another_share_a_moment(session: Replayed, reader: TraceReader) -> None:
    """A call begins when the one before it ended, if it came at once; else when it was taken."""
    guest = session.guest
    lib.vgpu_replay_trace(session.replay, 100)
    tell(session, 2, 1)
    time.sleep(0.03)
    for value in range(10):
        guest.put(CallId.cuCtxSetLimit, 2, value)
    guest.publish()
    tell(session, 2, 1)
    events = [e for e in decode(reader.take(100)) if e.kind is TraceKind.CALL]
    assert len(events) == 12
    assert events[1].begin_ns - events[0].end_ns > 20_000_000
    assert all(a.end_ns == b.begin_ns for a, b in pairwise(events[1:11]))


def test_a_trace_ends_at_its_number_of_events(session: Replayed, reader: TraceReader) -> None:
    lib.vgpu_replay_trace(session.replay, 3)
    for _ in range(10):
        tell(session, 2, 1)
    assert len(list(decode(reader.take(100)))) == 3
    assert until(lambda: reader.missed >= 7)
    lib.vgpu_replay_trace(session.replay, 2)
    for _ in range(10):
        tell(session, 2, 1)
    assert len(list(decode(reader.take(100)))) == 2
    assert reader.lost == 0


def test_device_work_is_a_busy_slice(session: Replayed, reader: TraceReader) -> None:
    lib.vgpu_replay_trace(session.replay, 10_000)
    began_ns = time.monotonic_ns()
    make_busy(session, 200)
    busy: list[TraceEvent] = []

    def traced_ns() -> int:
        busy.extend(e for e in decode(reader.take(10_000)) if e.kind is TraceKind.BUSY)
        return sum(e.end_ns - e.begin_ns for e in busy)

    def is_over() -> bool:
        seen = traced_ns()
        time.sleep(0.1)
        return traced_ns() == seen

    assert until(lambda: traced_ns() > 100_000_000)
    assert until(is_over)
    assert traced_ns() <= time.monotonic_ns() - began_ns
    assert all(a.end_ns == b.begin_ns for a, b in pairwise(busy))


def test_time_is_told_apart(session: Replayed) -> None:
    grant = session.grant
    began_ns = time.monotonic_ns()
    tell(session, 2, 1)  # what came before it is counted now
    before = grant.snapshot()

    def counted(name: str) -> int:
        return grant.get(name) - before[name]

    tell(session, SLEEP, 50)
    make_busy(session, 300)
    assert until(lambda: counted("gpu_wait_ns") > 50_000_000)
    assert counted("replay_ns") >= 50_000_000
    assert counted("lease_wait_ns") == 0
    grant.revoke()
    session.kick()
    session.guest.send(CallId.cuCtxSetLimit, 2, 1)
    assert until(lambda: session.guest.u32(BUSY) == 1)
    time.sleep(0.2)
    grant.grant(deadline_ns=0)
    session.kick()
    tell(session, 2, 1)
    assert counted("lease_wait_ns") >= 100_000_000
    # No moment is counted twice.
    names = ("replay_ns", "gpu_wait_ns", "lease_wait_ns")
    assert sum(map(counted, names)) <= time.monotonic_ns() - began_ns
    time.sleep(0.2)
    after, asked_ns = grant.snapshot(), time.monotonic_ns()
    tell(session, 2, 1)
    # Nothing asked and nothing at work is the guest's own time: no counter of ours rises.
    assert grant.get("gpu_wait_ns") == after["gpu_wait_ns"]
    assert grant.get("replay_ns") - after["replay_ns"] <= time.monotonic_ns() - asked_ns


def test_waiting_for_a_lease_is_traced(session: Replayed, reader: TraceReader) -> None:
    lib.vgpu_replay_trace(session.replay, 100)
    session.grant.revoke()
    session.kick()
    session.guest.send(CallId.cuCtxSetLimit, 2, 1)
    assert until(lambda: session.guest.u32(BUSY) == 1)
    time.sleep(0.1)
    session.grant.grant(deadline_ns=0)
    session.kick()
    tell(session, DEVICE_BUSY, 0)
    events = list(decode(reader.take(100)))
    kinds = Counter(e.kind for e in events)
    assert (kinds[TraceKind.STARVED], kinds[TraceKind.CALL]) == (1, 2)
    starved = next(e for e in events if e.kind is TraceKind.STARVED)
    assert starved.end_ns - starved.begin_ns >= 50_000_000


# -- the reader, against a writer of any kind


class Writer:
    """The worker's side of the memory."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("trace")
        os.ftruncate(self.descriptor, FILE_SIZE)
        self.word(0, MAGIC)
        self.head = 0

    def word(self, at: int, value: int) -> None:
        os.pwrite(self.descriptor, struct.pack("<Q", value), at)

    def write(self, count: int) -> None:
        for n in range(self.head, self.head + count):
            os.pwrite(
                self.descriptor, EVENT.pack(n + 1, n + 1, 0, 1, 0), HEAD_SIZE + n % CAPACITY * EVENT_SIZE
            )
        self.head += count
        self.word(128, self.head)

    def reader(self) -> TraceReader:
        return TraceReader(os.dup(self.descriptor))


def numbers(data: bytes) -> list[int]:
    return [e.begin_ns - 1 for e in decode(data)]


def test_a_slow_reader_loses_the_oldest_and_knows() -> None:
    writer = Writer()
    reader = writer.reader()
    writer.write(5)
    assert numbers(reader.take(3)) == [0, 1, 2]
    assert numbers(reader.take(3)) == [3, 4]
    writer.write(CAPACITY + 10)
    left = numbers(reader.take(CAPACITY * 2))
    assert left == list(range(16, CAPACITY + 15))
    assert reader.lost == 11
    reader.close()
    reader.close()
    os.close(writer.descriptor)


def test_a_writer_that_lies_harms_nobody() -> None:
    writer = Writer()
    reader = writer.reader()
    for head in (1 << 63, 5, (1 << 64) - 1, 0):
        writer.word(128, head)
        assert len(reader.take(1000)) <= 1000 * EVENT_SIZE
    assert (
        list(decode(EVENT.pack(5, 4, 0, 1, 0) + EVENT.pack(1, 2, 0, 77, 0) + EVENT.pack(0, 2, 0, 1, 0))) == []
    )
    reader.close()
    writer.word(0, 0)
    with pytest.raises(ValueError, match="does not begin as one"):
        writer.reader()
    os.ftruncate(writer.descriptor, 4096)
    with pytest.raises(ValueError, match="too short"):
        writer.reader()
    os.close(writer.descriptor)
