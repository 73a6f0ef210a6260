# SPDX-License-Identifier: Apache-2.0
"""Replaying in a slot of a VM's BAR1: the parts of every size, the same address, and nothing outside the slot."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gpu.replay.guest import (
    CALLBACKS,
    PAGE,
    READY,
    STATE,
    Replayed,
    build_fake_driver,
    options,
    replayed,
    until,
)
from vgpu.gpu._replay import ffi, lib
from vgpu.transport._generated_calls import CallId

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
MARKS_BYTES = 4096  # of the pulse: the device sets marks there behind launches
PAGES = 48 * KIB  # device page and session page
FIRST_SLOT = 64 * KIB
REGISTERED = 1010
POSTED, DONE = 1, 3


def parts(size: int, registered: int = 64 * MIB) -> tuple[int, int, int, int, int, int]:
    """Ring, slots, fences, and where the arena is, how long, and how much of it is registered at once."""
    layout = options(arena_registered=registered)
    arena = lib.vgpu_slot_layout(size, layout)
    return (
        layout.ring_size,
        layout.slot_count,
        layout.fence_count,
        arena,
        layout.arena_size,
        layout.arena_registered,
    )


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (MIB, (256 * KIB, 64, 1024, 576 * KIB, 448 * KIB, 448 * KIB)),
        (2 * MIB - 64 * KIB, (256 * KIB, 64, 1024, 576 * KIB, 1408 * KIB, 1408 * KIB)),  # 16 MiB, 8 slots
        (4 * MIB - 64 * KIB, (512 * KIB, 64, 1024, 832 * KIB, 3200 * KIB, 3200 * KIB)),
        (16 * MIB - 64 * KIB, (2 * MIB, 64, 1024, 2368 * KIB, 13952 * KIB, 13952 * KIB)),
        (16 * MIB, (4 * MIB, 256, 8192, 5248 * KIB, 11136 * KIB, 11136 * KIB)),
        (32 * MIB - 64 * KIB, (4 * MIB, 256, 8192, 5248 * KIB, 27456 * KIB, 27456 * KIB)),  # the default
        (8 * GIB, (4 * MIB, 256, 8192, 5248 * KIB, 8 * GIB - 5248 * KIB, 64 * MIB)),
    ],
)
def test_parts(size: int, expected: tuple[int, ...]) -> None:
    assert parts(size) == expected


@pytest.mark.parametrize("size", [0, 64 * KIB, MIB - 64 * KIB, 2 * MIB + 4096, (1 << 44) + 64 * KIB, 1 << 63])
def test_sizes_that_are_no_slots(size: int) -> None:
    assert parts(size)[3] == 0


@given(st.integers(16, 1 << 20).map(lambda n: n * 64 * KIB), st.integers(0, GIB))
def test_parts_of_every_size(size: int, registered: int) -> None:
    ring, slots, fences, arena, arena_size, known = parts(size, registered)
    assert ring & (ring - 1) == 0
    assert PAGES + ring + slots * 4096 + fences * 8 <= arena
    assert arena % (64 * KIB) == 0
    assert arena + arena_size == size
    assert known == min(registered, arena_size)
    assert arena_size >= 448 * KIB
    # Any record of the largest payload finds room in an empty ring, wherever the ring stands.
    assert ring >= 2 * (65536 + 96)


class Bar1:
    """Three slots, the outer two full of a pattern that nobody may touch."""

    def __init__(self, slot_size: int) -> None:
        self.fd = os.memfd_create("bar1")
        self.slot_size = slot_size
        self.size = FIRST_SLOT + 3 * slot_size
        os.ftruncate(self.fd, self.size)
        self.before = os.urandom(4096) * ((FIRST_SLOT + slot_size) // 4096)
        self.after = os.urandom(4096) * (slot_size // 4096)
        os.pwrite(self.fd, self.before, 0)
        os.pwrite(self.fd, self.after, self.end)

    @property
    def slot(self) -> tuple[int, int, int]:
        return self.fd, FIRST_SLOT + self.slot_size, self.slot_size

    @property
    def end(self) -> int:
        return FIRST_SLOT + 2 * self.slot_size

    def neighbours_are_untouched(self) -> bool:
        before = os.pread(self.fd, len(self.before), 0)
        after = os.pread(self.fd, len(self.after), self.end)
        return before == self.before and after == self.after


@pytest.fixture(params=[2 * MIB - 64 * KIB, 16 * MIB])
def bar1(request: pytest.FixtureRequest) -> Iterator[Bar1]:
    memory = Bar1(request.param)
    yield memory
    os.close(memory.fd)


def registered_bytes(session: Replayed) -> int:
    return session.guest.ask(CallId.cuCtxGetLimit, REGISTERED).values[0]


def test_a_session_in_a_slot(fake_driver: Path, bar1: Bar1) -> None:
    with replayed(fake_driver, memory_limit=MIB, slot=bar1.slot, slot_registered=512 * KIB) as session:
        guest = session.guest
        own = os.pread(session.segment_fd, 16384, 0)
        assert own[16:20] == b"Fake"
        copied = bytes(guest.map[:16384])
        assert copied[:304] == own[:304]
        assert int.from_bytes(copied[304:312], "little") == MIB  # the quota, in the copy alone
        assert copied[312:1792] == own[312:1792]
        assert guest.u64(PAGE + 24) == bar1.slot_size
        assert lib.vgpu_replay_mapped(session.replay) == bar1.slot_size
        assert guest.u64(PAGE + 96) == lib.vgpu_replay_address(session.replay)
        assert guest.u32(STATE) == READY
        assert (guest.arena, guest.arena_size) == parts(bar1.slot_size)[3:5]
        assert guest.u64(PAGE + 88) == 512 * KIB
        guest.retain()
        assert guest.ask(CallId.cuCtxSetLimit, 2, 5).status == 0
        # The whole slot is used: every ring byte, the last slot, the last fence, the end of the arena.
        for _ in range(2 * guest.ring_size // 60000):
            guest.send(CallId.cuCtxSetLimit, 3, 1, payload=bytes(60000))
        assert guest.ask(CallId.cuCtxGetLimit, 2, slot=guest.slot_count - 1).values[0] == 5
        last = guest.fence_count - 1
        guest.send(CallId.wireFence, 0, last, 77)
        assert until(lambda: guest.fence(last) == 77)
        before = registered_bytes(session)
        rest = guest.arena_size - 512 * KIB
        assert guest.ask(CallId.wireArenaRegister, 512 * KIB, rest).status == 0
        assert registered_bytes(session) == before + rest
        assert guest.ask(CallId.wireArenaRegister, guest.arena_size, 4096).status != 0
        assert bar1.neighbours_are_untouched()
    assert bar1.neighbours_are_untouched()


def test_what_was_registered_is_given_back(tmp_path: Path, bar1: Bar1) -> None:
    """The memory of the segment that was left is the driver's no more; of the slot it knows what was asked for."""
    library = build_fake_driver(tmp_path)  # one that remembers nothing of other tests
    with replayed(library, slot=bar1.slot) as session:
        session.guest.retain()
        assert registered_bytes(session) == parts(bar1.slot_size)[3] + MARKS_BYTES


def test_a_guest_that_was_there_before(fake_driver: Path, bar1: Bar1) -> None:
    """What a slot holds when it is taken counts for nothing: not a ring position, not an error, not a fence."""
    os.pwrite(bar1.fd, b"\xff" * bar1.slot_size, bar1.slot[1])
    with replayed(fake_driver, slot=bar1.slot) as session:
        guest = session.guest
        assert guest.fence(5) == 0
        guest.retain()
        assert guest.ask(CallId.cuCtxSetLimit, 2, 5).status == 0
        assert guest.u32(STATE) == READY


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (FIRST_SLOT + 4096, 2 * MIB),
        (FIRST_SLOT, 2 * MIB + 4096),
        (FIRST_SLOT, 4 * MIB),
        (8 * MIB, 2 * MIB),
        ((1 << 64) - 64 * KIB, 2 * MIB),
        (FIRST_SLOT, (1 << 64) - 64 * KIB),
    ],
)
def test_places_that_are_refused(fake_driver: Path, offset: int, size: int) -> None:
    """Refused before anything is left behind: the replay still has its own segment."""
    memory = os.memfd_create("bar1")
    os.ftruncate(memory, 4 * MIB)
    with replayed(fake_driver) as session:
        step = ffi.new("const char **")
        assert lib.vgpu_replay_rebase(session.replay, memory, offset, size, 0, step) == -22
        session.guest.retain()
    os.close(memory)


def test_a_host_function_ends_without_a_futex(fake_driver: Path, bar1: Bar1) -> None:
    """A guest in a VM stores DONE and can wake nobody: the worker sees it by itself, and soon."""
    with replayed(fake_driver, slot=bar1.slot) as session:
        guest = session.guest
        guest.retain()
        took = []
        for _ in range(15):
            began = time.monotonic()
            guest.send(CallId.wireHostFunction, 0, 0x1234, 0x5678, 1)
            assert until(lambda: guest.u32(CALLBACKS) == POSTED)
            guest.set_u32(CALLBACKS, DONE)
            assert until(lambda: guest.u32(CALLBACKS) == 0)
            took.append(time.monotonic() - began)
        assert statistics.median(took) < 0.05  # 0.1 s and more with the naps of a local session
