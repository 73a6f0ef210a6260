# SPDX-License-Identifier: Apache-2.0
"""Handlers of memory, streams and events, fed by a guest that says whatever it likes."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gpu.replay.guest import (
    CONTEXT,
    DEFERRED,
    READY,
    STATE,
    WAITERS,
    Replayed,
    build_fake_driver,
    replayed,
    until,
    used,
)
from vgpu.gpu.errors import Result as Code
from vgpu.transport._generated_calls import CallId

MIB = 1 << 20
UNIT = 2 * MIB
LIMIT_FAIL_COPY, LIMIT_IN_USE, LIMIT_BUSY = 1007, 1008, 1001


def handle(kind: int, index: int, generation: int = 1) -> int:
    return kind << 42 | generation << 28 | index << 4


STREAM, EVENT, MEMORY, POOL = (handle(kind, 1) for kind in (2, 3, 13, 11))


@pytest.fixture(scope="module")
def memory_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_driver(tmp_path_factory.mktemp("memory"), "fake_memory.c")


@pytest.fixture
def session(memory_driver: Path) -> Iterator[Replayed]:
    with replayed(memory_driver) as running:
        running.guest.retain()
        yield running
        assert running.guest.u32(STATE) == READY


@pytest.fixture(scope="module")
def long_session(memory_driver: Path) -> Iterator[Replayed]:
    with replayed(memory_driver) as running:
        running.guest.retain()
        yield running


def allocate(session: Replayed, size: int) -> int:
    result = session.guest.ask(CallId.cuMemAlloc_v2, size)
    assert result.status == 0
    return result.values[0]


def in_use(session: Replayed) -> int:
    return session.guest.ask(CallId.cuCtxGetLimit, LIMIT_IN_USE).values[0]


def test_bytes_go_down_and_come_back(session: Replayed) -> None:
    guest = session.guest
    address = allocate(session, 4096)
    guest.send(CallId.wireCopyInline, address, 5, 0, payload=b"hello")
    guest.map[guest.arena : guest.arena + 6] = b" world"
    guest.send(CallId.wireCopyToDevice, address + 5, guest.arena, 6, 0, 3, 1)
    guest.send(CallId.wireCopyDevice, address + 100, address, 11, 0)
    guest.send(CallId.wireMemset, address + 100, 0, ord("J"), 1, 1, 1, 0)
    guest.send(CallId.wireCopyFromDevice, guest.arena + 4096, address + 100, 11, 0, 4, 9)
    assert until(lambda: guest.fence(4) == 9)
    assert guest.fence(3) == 1
    assert bytes(guest.map[guest.arena + 4096 : guest.arena + 4107]) == b"Jello world"
    assert session.grant.get("bytes_to_device") == 11
    assert session.grant.get("bytes_from_device") == 11
    assert guest.u32(DEFERRED) == 0


def test_only_what_was_allocated_is_freed_and_once(session: Replayed) -> None:
    guest = session.guest
    before = in_use(session)  # the fake device is one for all sessions of this process
    address = allocate(session, 1000)
    assert guest.ask(CallId.wireMemoryFree, address + 4).status == Code.INVALID_VALUE
    assert guest.ask(CallId.wireMemoryFree, 0x1234).status == Code.INVALID_VALUE
    assert session.grant.get("memory_used_bytes") == 1000
    assert guest.ask(CallId.wireMemoryFree, address).status == 0
    assert session.grant.get("memory_used_bytes") == 0
    assert guest.ask(CallId.wireMemoryFree, address).status == Code.INVALID_VALUE
    assert in_use(session) == before


def test_arena_ranges_are_checked_and_the_waiter_is_released(session: Replayed) -> None:
    guest = session.guest
    address = allocate(session, 4 * MIB)
    registered = 2 * MIB
    wrong = [
        (0, 16),  # the device page
        (guest.ring, 16),
        (guest.arena - 1, 16),
        (guest.arena + registered - 8, 16),  # the end is not registered
        (guest.arena + registered, 16),
        (guest.arena + guest.arena_size, 1),
        (guest.arena, registered + 1),
        (guest.arena, (1 << 64) - 1),
        ((1 << 64) - 8, 16),
    ]
    for value, (offset, size) in enumerate(wrong, 1):
        guest.send(CallId.wireCopyToDevice, address, offset, size, 0, 5, value)
        guest.send(CallId.wireCopyFromDevice, offset, address, size, 0, 6, value)
        assert until(lambda: (guest.fence(5), guest.fence(6)) == (value, value))  # noqa: B023, (offset, size)
        assert guest.u32(DEFERRED) == Code.INVALID_VALUE
        guest.set_u32(DEFERRED, 0)
    assert guest.ask(CallId.wireCopyFromDevice, guest.arena, 0x1000, 16, 0, 0, 0).status == Code.INVALID_VALUE


def test_inline_size_is_what_came(session: Replayed) -> None:
    guest = session.guest
    address = allocate(session, 65536)
    assert guest.ask(CallId.wireCopyInline, address, 9, 0, payload=b"12345678").status == Code.INVALID_VALUE
    assert (
        guest.ask(CallId.wireCopyInline, address, 1 << 63, 0, payload=b"12345678").status
        == Code.INVALID_VALUE
    )
    assert guest.ask(CallId.wireCopyInline, address, 0, 0).status == 0
    assert guest.ask(CallId.wireCopyInline, address, 4, STREAM, payload=b"1234").status == Code.INVALID_HANDLE
    assert (
        guest.ask(CallId.wireCopyInline, address + 65533, 4, 0, payload=b"1234").status == Code.INVALID_VALUE
    )


BOX = struct.Struct("<4QI4xQQQQQQ4QI4xQQQQQQ3Q")
assert BOX.size == 200


def box(
    source: int, pitch: int, rows: int, destination: int, to_pitch: int, to_rows: int, *extent: int
) -> bytes:
    """A CUDA_MEMCPY3D whose addresses serve as host and as device ones."""
    side = (source, source, 0, 0, pitch, rows)
    other = (destination, destination, 0, 0, to_pitch, to_rows)
    return BOX.pack(0, 0, 0, 0, 0, *side, 0, 0, 0, 0, 0, *other, *extent)


def test_boxes_are_measured_before_the_driver_sees_them(session: Replayed) -> None:
    guest = session.guest
    address = allocate(session, MIB)
    start = guest.arena
    guest.map[start : start + 64] = bytes(range(64))
    good = box(start, 8, 4, address, 16, 8, 4, 3, 2)
    assert guest.ask(CallId.wireCopy3D, 0, 1, 7, 1, payload=good).status == 0
    assert guest.fence(7) == 1
    guest.send(CallId.wireCopyFromDevice, start + 4096, address, 256, 0, 8, 1)
    assert until(lambda: guest.fence(8) == 1)
    got = guest.map[start + 4096 : start + 4352]
    for z in range(2):
        for y in range(3):
            from_at, to_at = (z * 4 + y) * 8, (z * 8 + y) * 16
            assert bytes(got[to_at : to_at + 4]) == bytes(range(64))[from_at : from_at + 4]
    huge = (1 << 64) - 1
    wrong = [
        box(start, 8, 4, address, 16, 8, 0, 3, 2),
        box(start, 8, 4, address, 16, 8, 4, 0, 2),
        box(start, huge, 4, address, 16, 8, 4, 3, 2),
        box(start, 8, huge, address, 16, 8, 4, 3, 2),
        box(start, 8, 4, address, 16, 8, huge, 1, 1),
        box(start, 1 << 63, 4, address, 16, 8, 4, 3, 1),
        box(start, 1 << 20, 4, address, 16, 8, 4, 4, 1),  # the last row lies behind what is registered
        box(0, 8, 4, address, 16, 8, 4, 3, 2),
        # To a driver no pitch and no height are as much as the box needs: more than the last row is measured by.
        box(start, 0, 4, address, 16, 8, 4, 3, 1),
        box(start, 8, 0, address, 16, 8, 4, 3, 2),
        box(start, 8, 4, address, 0, 8, 4, 3, 1),
    ]
    for value, payload in enumerate(wrong, 2):
        assert guest.ask(CallId.wireCopy3D, 0, 1, 7, value, payload=payload).status == Code.INVALID_VALUE
        assert guest.fence(7) == value
    assert guest.ask(CallId.wireCopy3D, 0, 1, 7, 50, payload=good[:199]).status == Code.INVALID_VALUE
    assert guest.ask(CallId.wireCopy3D, STREAM, 1, 7, 51, payload=good).status == Code.INVALID_HANDLE


ARRAY_TO, ARRAY_FROM = 8, 4
FLOAT = 0x20


def array_box(
    array: int, at: tuple[int, int, int], host: int, pitch: int, rows: int, *extent: int, to: bool = True
) -> bytes:
    """A CUDA_MEMCPY3D between an array and the arena."""
    inside = (*at, 0, 0, 0, 0, array, 0, 0, 0)
    outside = (0, 0, 0, 0, 0, host, 0, 0, 0, pitch, rows)
    return BOX.pack(*((outside + inside) if to else (inside + outside)), *extent)


def test_arrays_are_charged_and_their_bounds_kept(memory_driver: Path) -> None:
    with replayed(memory_driver, memory_limit=100_000) as session:
        guest = session.guest
        guest.retain()
        before = in_use(session)
        made = guest.ask(CallId.cuArray3DCreate_v2, 20, 10, 4, FLOAT, 2, 0)
        assert made.status == 0
        array, size = made.values[0], 20 * 8 * 10 * 4
        assert session.grant.get("memory_used_bytes") == in_use(session) - before == size
        over = guest.ask(CallId.cuArray3DCreate_v2, 100_000 - size + 1, 0, 0, 1, 1, 0)
        assert over.status == Code.OUT_OF_MEMORY
        assert session.grant.get("memory_used_bytes") == in_use(session) - before == size
        start = guest.arena
        guest.map[start : start + size] = bytes(n % 251 for n in range(size))
        to, back = 2, start + 8192
        good = array_box(array, (0, 0, 0), start, 160, 10, 160, 10, 4)
        assert guest.ask(CallId.wireCopy3D, 0, 1 | ARRAY_TO, 7, 1, payload=good).status == 0
        out = array_box(array, (16, 2, 1), back, 40, 3, 40, 3, 2, to=False)
        assert guest.ask(CallId.wireCopy3D, 0, to | ARRAY_FROM, 7, 2, payload=out).status == 0
        for z in range(2):
            for y in range(3):
                at, expected = back + (z * 3 + y) * 40, ((z + 1) * 10 + y + 2) * 160 + 16
                assert bytes(guest.map[at : at + 40]) == bytes(
                    n % 251 for n in range(expected, expected + 40)
                )
        huge = (1 << 64) - 8
        outside = [
            ((8, 0, 0), (160, 10, 4)), ((0, 1, 0), (160, 10, 4)), ((0, 0, 1), (160, 10, 4)), ((0, 0, 0), (168, 1, 1)),
            ((huge, 0, 0), (16, 1, 1)), ((0, huge, 0), (8, 16, 1)), ((0, 0, huge), (8, 1, 16)), ((0, 0, 0), (huge, 1, 1)),
            ((4, 0, 0), (8, 1, 1)), ((0, 0, 0), (12, 1, 1)), ((0, 0, 0), (0, 1, 1)),
        ]  # fmt: skip
        for value, (at, extent) in enumerate(outside, 3):
            bad = array_box(array, at, start, 160, 10, *extent)
            status = guest.ask(CallId.wireCopy3D, 0, 1 | ARRAY_TO, 7, value, payload=bad).status
            assert status == Code.INVALID_VALUE, (at, extent)
            assert guest.fence(7) == value
        for value, (pitch, rows) in enumerate([(0, 10), (159, 10), (160, 0), (160, 9)], 30):
            bad = array_box(array, (0, 0, 0), start, pitch, rows, 160, 10, 2)
            status = guest.ask(CallId.wireCopy3D, 0, 1 | ARRAY_TO, 7, value, payload=bad).status
            assert status == Code.INVALID_VALUE, (pitch, rows)
        # Both an array and an address, an array of nobody, one's own under another kind, and one that is gone.
        assert guest.ask(CallId.wireCopy3D, 0, 3 | ARRAY_TO, 7, 50, payload=good).status == Code.INVALID_VALUE
        for forged in (array + 16, array + (1 << 28), MEMORY, 0, 64):
            bad = array_box(forged, (0, 0, 0), start, 160, 10, 160, 10, 4)
            status = guest.ask(CallId.wireCopy3D, 0, 1 | ARRAY_TO, 7, 51, payload=bad).status
            assert status == Code.INVALID_HANDLE
            assert guest.ask(CallId.cuArrayDestroy, forged).status == Code.INVALID_HANDLE
        assert guest.ask(CallId.cuArrayDestroy, array).status == 0
        assert guest.ask(CallId.cuArrayDestroy, array).status == Code.INVALID_HANDLE
        assert session.grant.get("memory_used_bytes") == in_use(session) - before == 0
        assert (
            guest.ask(CallId.wireCopy3D, 0, 1 | ARRAY_TO, 7, 60, payload=good).status == Code.INVALID_HANDLE
        )


@pytest.fixture
def units_driver(tmp_path: Path) -> Path:
    """A driver that takes memory in units of two mebibytes; nothing is in them yet."""
    return build_fake_driver(tmp_path, "fake_memory.c", "-DFAKE_UNITS")


def test_arrays_are_charged_by_what_the_driver_says_that_they_need(units_driver: Path) -> None:
    with replayed(units_driver, memory_limit=8 * UNIT) as session:
        guest = session.guest
        guest.retain()
        small = guest.ask(CallId.cuArray3DCreate_v2, 4, 4, 0, FLOAT, 1, 0)
        assert (small.status, session.grant.get("memory_used_bytes")) == (0, UNIT)
        # This driver's rows of 65 bytes take 128 each.
        tall = guest.ask(CallId.cuArray3DCreate_v2, 65, (4 * UNIT) // 128, 0, 1, 1, 0)
        assert (tall.status, session.grant.get("memory_used_bytes")) == (0, 5 * UNIT)
        over = guest.ask(CallId.cuArray3DCreate_v2, 64, 3 * UNIT // 64 + 1, 0, 1, 1, 0)
        assert (over.status, session.grant.get("memory_used_bytes")) == (Code.OUT_OF_MEMORY, 5 * UNIT)
        # What no driver makes is no matter of the quota.
        wide = guest.ask(CallId.cuArray3DCreate_v2, (1 << 20) + 1, 1 << 20, 0, 1, 1, 0)
        assert (wide.status, session.grant.get("memory_used_bytes")) == (Code.INVALID_VALUE, 5 * UNIT)
        for made in (small, tall):
            assert guest.ask(CallId.cuArrayDestroy, made.values[0]).status == 0
        assert session.grant.get("memory_used_bytes") == 0


@pytest.mark.parametrize("nvml", ["", "crowd"])
def test_small_arrays_share_units(units_driver: Path, monkeypatch: pytest.MonkeyPatch, nvml: str) -> None:
    """By what the process holds: the first of a unit costs it all, and the last one gives it back."""
    monkeypatch.setenv("FAKE_NVML", nvml)
    with replayed(units_driver, memory_limit=3 * UNIT, nvml=True) as session:
        guest = session.guest
        guest.retain()
        half = (1024, 1024, 0, 1, 1, 0)
        made = []
        for cost in (1, 1, 2, 2, 3, 3):  # the sixth fits though there is no room for another unit
            made.append(guest.ask(CallId.cuArray3DCreate_v2, *half))
            assert (made[-1].status, used(session)) == (0, cost * UNIT)
        assert guest.ask(CallId.cuArray3DCreate_v2, *half).status == Code.OUT_OF_MEMORY
        assert used(session) == 3 * UNIT
        for array, cost in zip(made, (3, 2, 2, 1, 1, 0), strict=True):
            assert guest.ask(CallId.cuArrayDestroy, array.values[0]).status == 0
            assert used(session) == cost * UNIT
        for _ in range(3):
            assert guest.ask(CallId.cuArray3DCreate_v2, *half).status == 0
        assert guest.ask(CallId.wirePrimaryReset, CONTEXT).status == 0
        assert used(session) == 0


@pytest.mark.parametrize("nvml", ["stranger", "stuck"])
def test_a_number_that_is_not_of_this_process_is_not_believed(
    units_driver: Path, monkeypatch: pytest.MonkeyPatch, nvml: str
) -> None:
    monkeypatch.setenv("FAKE_NVML", nvml)
    with replayed(units_driver, memory_limit=2 * UNIT, nvml=True) as session:
        guest = session.guest
        guest.retain()
        made = [guest.ask(CallId.cuArray3DCreate_v2, 4, 4, 0, FLOAT, 1, 0) for _ in range(3)]
        assert [answer.status for answer in made] == [0, 0, Code.OUT_OF_MEMORY]
        assert used(session) == 2 * UNIT
        assert guest.ask(CallId.cuArrayDestroy, made[0].values[0]).status == 0
        assert used(session) == UNIT


def test_sizes_of_arrays_do_not_overflow(session: Replayed) -> None:
    guest = session.guest
    huge = 1 << 62
    for size in [(huge, 0, 0), (huge, huge, 0), (1, huge, huge), (1 << 63, 1, 1), (0, 0, 0)]:
        assert guest.ask(CallId.cuArray3DCreate_v2, *size, FLOAT, 4, 0).status == Code.INVALID_VALUE
    assert guest.ask(CallId.cuArray3DCreate_v2, 4, 4, 0, FLOAT, 3, 0).status == Code.INVALID_VALUE
    for form, flags in [(0xB0, 0), (FLOAT, 0x40), (FLOAT, 0x80), (FLOAT, 1 << 31)]:
        made = guest.ask(CallId.cuArray3DCreate_v2, 4, 4, 0, form, 1, flags)
        assert made.status == Code.NOT_SUPPORTED
    assert session.grant.get("memory_used_bytes") == 0


def test_arrays_end_with_their_context(memory_driver: Path) -> None:
    with replayed(memory_driver, memory_limit=1 << 20) as session:
        guest = session.guest
        guest.retain()
        array = guest.ask(CallId.cuArray3DCreate_v2, 100, 0, 0, 1, 1, 0).values[0]
        assert session.grant.get("memory_used_bytes") == 100
        assert guest.ask(CallId.wirePrimaryReset, CONTEXT).status == 0
        assert session.grant.get("memory_used_bytes") == 0
        guest.retain()
        assert guest.ask(CallId.cuArrayDestroy, array).status == Code.INVALID_HANDLE


WITNESS = """
unsigned error_seen_with_fence(volatile unsigned long *fence, unsigned long value, volatile unsigned *error)
{
    while (__atomic_load_n(fence, __ATOMIC_ACQUIRE) != value)
        ;
    return *error;
}
"""


@pytest.fixture(scope="module")
def witness(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """A guest thread that looks as closely as a synchronous copy does; Python would be too late to see what is between."""
    library = tmp_path_factory.mktemp("witness") / "witness.so"
    command = ["gcc", "-shared", "-fPIC", "-O2", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=WITNESS, text=True, check=True)
    return ctypes.CDLL(str(library))


def test_failed_copy_releases_its_waiter_and_is_deferred(session: Replayed, witness: ctypes.CDLL) -> None:
    """Who sees the fence sees the error: a copy that failed must not look done."""
    guest = session.guest
    address = allocate(session, 4096)
    base = ctypes.addressof(ctypes.c_char.from_buffer(guest.map))
    where = ctypes.c_void_p(base + guest.fences + 2 * 8), ctypes.c_void_p(base + DEFERRED)
    guest.set_u32(WAITERS, 1)  # so the worker makes a system call once the fence is there
    with ThreadPoolExecutor(1) as pool:
        for value in range(1, 501):
            guest.ask(CallId.cuCtxSetLimit, LIMIT_FAIL_COPY, 0)
            guest.set_u32(DEFERRED, 0)
            seen = pool.submit(witness.error_seen_with_fence, where[0], ctypes.c_ulong(value), where[1])
            guest.send(CallId.wireCopyFromDevice, guest.arena, address, 16, 0, 2, value)
            assert seen.result() == 999
    guest.set_u32(DEFERRED, 0)
    guest.ask(CallId.cuCtxGetLimit, 0)
    assert guest.u32(DEFERRED) == 0  # told once: who has taken the error is not told of it again


def test_quota_is_charged_before_the_driver_is_asked(memory_driver: Path) -> None:
    with replayed(memory_driver, memory_limit=10 * MIB) as session:
        guest = session.guest
        guest.retain()
        first = allocate(session, 6 * MIB)
        before = in_use(session)
        assert guest.ask(CallId.cuMemAlloc_v2, 5 * MIB).status == Code.OUT_OF_MEMORY
        assert guest.ask(CallId.cuMemAlloc_v2, (1 << 64) - 1).status == Code.OUT_OF_MEMORY
        assert guest.ask(CallId.cuMemAllocPitch_v2, 1 << 40, 1 << 40, 4).status == Code.INVALID_VALUE
        assert guest.ask(CallId.cuMemAllocPitch_v2, (1 << 64) - 1, 1, 4).status == Code.INVALID_VALUE
        assert guest.ask(CallId.cuMemAllocAsync, 5 * MIB, 0).status == Code.OUT_OF_MEMORY
        assert in_use(session) == before
        assert guest.ask(CallId.cuMemGetInfo_v2).values[:2] == (4 * MIB, 10 * MIB)
        guest.send(CallId.wireMemoryFree, first)
        assert guest.ask(CallId.cuMemGetInfo_v2).values[:2] == (10 * MIB, 10 * MIB)


def test_memory_of_a_context_is_given_back_with_it(session: Replayed) -> None:
    guest = session.guest
    other = handle(1, 2)
    allocate(session, 100)
    assert guest.ask(CallId.wireContextCreate, other, 0).status == 0
    guest.send(CallId.wireSetContext, other)
    lost = allocate(session, 1000)
    assert session.grant.get("memory_used_bytes") == 1100
    assert guest.ask(CallId.wireContextDestroy, other).status == 0
    assert session.grant.get("memory_used_bytes") == 100
    assert guest.ask(CallId.wireMemoryFree, lost).status == Code.INVALID_VALUE


PROPERTIES = struct.pack(
    "<iiiiQQ", 1, 1, 1, 7, 0xDEAD, 0
)  # handle types, device and pointer are not the guest's to say


def test_physical_memory_lives_while_handle_or_mapping_does(session: Replayed) -> None:
    guest = session.guest
    before = in_use(session)
    start = guest.ask(CallId.cuMemAddressReserve, 4 * UNIT, 0, 0, 0).values[0]
    assert guest.ask(CallId.cuMemCreate, MEMORY, UNIT, 0, payload=PROPERTIES).status == 0
    assert guest.ask(CallId.cuMemCreate, MEMORY, UNIT, 0, payload=PROPERTIES).status == Code.INVALID_HANDLE
    assert session.grant.get("memory_used_bytes") == UNIT
    assert guest.ask(CallId.cuMemMap, start, UNIT, 0, MEMORY, 0).status == 0
    assert guest.ask(CallId.cuMemMap, start, UNIT, 0, MEMORY, 0).status == Code.INVALID_VALUE
    assert guest.ask(CallId.wireMemoryFree, start).status == Code.INVALID_VALUE
    assert guest.ask(CallId.cuMemFreeAsync, start, 0).status == Code.INVALID_VALUE
    assert guest.ask(CallId.cuMemRelease, MEMORY).status == 0
    assert guest.ask(CallId.cuMemRelease, MEMORY).status == Code.INVALID_VALUE
    assert guest.ask(CallId.cuMemMap, start + UNIT, UNIT, 0, MEMORY, 0).status == Code.INVALID_VALUE
    assert session.grant.get("memory_used_bytes") == UNIT
    assert guest.ask(CallId.cuMemRetainAllocationHandle, MEMORY, start + 5).status == 0
    assert guest.ask(CallId.cuMemRetainAllocationHandle, MEMORY, start + UNIT).status == Code.INVALID_VALUE
    assert guest.ask(CallId.cuMemUnmap, start, UNIT).status == 0
    assert session.grant.get("memory_used_bytes") == UNIT
    assert guest.ask(CallId.cuMemRelease, MEMORY).status == 0
    assert session.grant.get("memory_used_bytes") == 0
    assert in_use(session) == before
    assert guest.ask(CallId.cuMemRelease, MEMORY).status == Code.INVALID_VALUE
    assert guest.ask(CallId.cuMemAddressFree, start, 4 * UNIT).status == 0


def test_virtual_memory_refuses_short_and_long_payloads(session: Replayed) -> None:
    guest = session.guest
    assert (
        guest.ask(CallId.cuMemCreate, MEMORY, UNIT, 0, payload=PROPERTIES[:31]).status == Code.INVALID_VALUE
    )
    host = struct.pack("<iiiiQQ", 1, 0, 2, 0, 0, 0)
    assert guest.ask(CallId.cuMemCreate, MEMORY, UNIT, 0, payload=host).status == Code.NOT_SUPPORTED
    access = struct.pack("<iii", 1, 0, 3)
    assert guest.ask(CallId.cuMemSetAccess, 0, UNIT, 17, payload=access * 17).status == Code.INVALID_VALUE
    assert guest.ask(CallId.cuMemSetAccess, 0, UNIT, 2, payload=access).status == Code.INVALID_VALUE
    assert guest.ask(CallId.cuMemSetAccess, 0, UNIT, 0, payload=access).status == Code.INVALID_VALUE
    assert guest.ask(CallId.cuMemUnmap, (1 << 64) - UNIT, 2 * UNIT).status == Code.INVALID_VALUE
    assert guest.ask(CallId.cuMemRelease, handle(2, 1)).status == Code.INVALID_VALUE
    assert session.grant.get("memory_used_bytes") == 0


def test_pools(session: Replayed) -> None:
    guest = session.guest
    default = guest.ask(CallId.cuDeviceGetDefaultMemPool).values[0]
    assert guest.ask(CallId.cuDeviceGetDefaultMemPool).values[0] == default
    properties = struct.pack("<iiiiQQH54x", 1, 1, 1, 9, 0xDEAD, 0, 0)
    assert guest.ask(CallId.cuMemPoolCreate, POOL, payload=properties[:87]).status == Code.INVALID_VALUE
    assert guest.ask(CallId.cuMemPoolCreate, POOL, payload=properties).status == 0
    address = guest.ask(CallId.cuMemAllocFromPoolAsync, 500, POOL, 0).values[0]
    assert guest.ask(CallId.cuMemAllocFromPoolAsync, 500, STREAM, 0).status == Code.INVALID_HANDLE
    assert session.grant.get("memory_used_bytes") == 500
    assert guest.ask(CallId.cuMemPoolSetAttribute, POOL, 4, 77).status == 0
    assert guest.ask(CallId.cuMemPoolGetAttribute, POOL, 4).values[0] == 77
    assert guest.ask(CallId.cuMemPoolGetAttribute, POOL, 99).status == Code.INVALID_VALUE
    assert guest.ask(CallId.cuMemFreeAsync, address, 0).status == 0
    assert session.grant.get("memory_used_bytes") == 0
    assert guest.ask(CallId.cuMemPoolDestroy, POOL).status == 0
    assert guest.ask(CallId.cuMemPoolGetAttribute, POOL, 4).status == Code.INVALID_HANDLE


def test_streams_and_events_are_the_guests_and_checked(session: Replayed) -> None:
    guest = session.guest
    assert guest.ask(CallId.cuStreamCreateWithPriority, STREAM, 1, (1 << 64) - 3).status == 0
    assert guest.ask(CallId.cuStreamCreateWithPriority, STREAM, 1, 0).status == Code.INVALID_HANDLE  # taken
    assert (
        guest.ask(CallId.cuStreamCreateWithPriority, handle(2, 1 << 23), 0, 0).status == Code.INVALID_HANDLE
    )
    assert guest.ask(CallId.cuStreamCreateWithPriority, EVENT, 0, 0).status == Code.INVALID_HANDLE
    assert guest.ask(CallId.cuEventCreate, EVENT, 0).status == 0
    assert guest.ask(CallId.cuEventRecordWithFlags, EVENT, STREAM, 0).status == 0
    assert guest.ask(CallId.cuEventRecordWithFlags, STREAM, EVENT, 0).status == Code.INVALID_HANDLE
    assert guest.ask(CallId.cuStreamWaitEvent, STREAM, EVENT, 0).status == 0
    assert guest.ask(CallId.cuStreamWaitEvent, STREAM, handle(3, 1, 2), 0).status == Code.INVALID_HANDLE
    elapsed = guest.ask(CallId.cuEventElapsedTime_v2, EVENT, EVENT)
    assert (elapsed.status, struct.unpack("<f", struct.pack("<I", elapsed.values[0]))[0]) == (0, 1.5)
    assert guest.ask(CallId.cuEventSynchronize, EVENT).status == 0
    guest.ask(
        CallId.cuCtxSetLimit, LIMIT_BUSY, 1000
    )  # for as long as the next three calls take on a busy machine
    guest.send(CallId.cuEventRecordWithFlags, EVENT, STREAM, 0)
    assert guest.ask(CallId.cuEventSynchronize, EVENT).status == Code.NOT_READY  # it never waits
    assert guest.ask(CallId.cuStreamQuery, STREAM).status == Code.NOT_READY
    assert until(lambda: guest.ask(CallId.cuEventQuery, EVENT).status == 0)
    assert guest.ask(CallId.cuEventDestroy_v2, EVENT).status == 0
    assert guest.ask(CallId.cuEventDestroy_v2, EVENT).status == Code.INVALID_HANDLE
    assert guest.ask(CallId.cuStreamDestroy_v2, STREAM).status == 0
    assert guest.ask(CallId.cuStreamQuery, STREAM).status == Code.INVALID_HANDLE
    assert guest.ask(CallId.cuStreamDestroy_v2, 0).status == Code.INVALID_HANDLE


def test_fence_of_a_stream_without_new_work_does_not_wait_for_others(session: Replayed) -> None:
    guest = session.guest
    address = allocate(session, 64)
    other = handle(2, 2)
    for stream in (STREAM, other):
        guest.send(CallId.cuStreamCreateWithPriority, stream, 1, 0)
        guest.send(CallId.wireMemset, address, 0, 1, 1, 8, 1, stream)
    guest.send(CallId.wireFence, STREAM, 1, 1)
    assert until(lambda: guest.fence(1) == 1)
    guest.ask(CallId.cuCtxSetLimit, LIMIT_BUSY, 3000)
    guest.send(CallId.wireMemset, address, 0, 2, 1, 8, 1, other)
    guest.send(CallId.wireFence, STREAM, 1, 2)
    guest.send(CallId.wireFence, other, 2, 1)
    assert guest.ask(CallId.cuMemGetInfo_v2).status == 0  # both fences have been replayed
    assert (guest.fence(1), guest.fence(2)) == (2, 0)
    guest.send(CallId.wireMemset, address, 0, 3, 1, 8, 1, STREAM)  # and now it has work again
    guest.send(CallId.wireFence, STREAM, 1, 3)
    assert guest.ask(CallId.cuMemGetInfo_v2).status == 0
    assert guest.fence(1) == 2
    assert until(lambda: (guest.fence(1), guest.fence(2)) == (3, 1))


def test_batched_memory_operations_are_counted_and_known(session: Replayed) -> None:
    guest = session.guest
    address = allocate(session, 64)
    write = struct.pack("<IIQIIQQQ", 2, 0, address + 4, 0xABCD, 0, 0, 0, 0)
    assert len(write) == 48
    assert guest.ask(CallId.cuStreamBatchMemOp_v2, 0, 1, 0, payload=write).status == 0
    guest.send(CallId.wireCopyFromDevice, guest.arena, address, 8, 0, 3, 1)
    assert until(lambda: guest.fence(3) == 1)
    assert struct.unpack_from("<I", guest.map, guest.arena + 4)[0] == 0xABCD
    for count, payload in (
        (0, write),
        (2, write),
        (257, write * 257),
        (1 << 40, write),
        (1, bytes(48)),
        (1, b"\x63" + write[1:]),
    ):
        assert (
            guest.ask(CallId.cuStreamBatchMemOp_v2, 0, count, 0, payload=payload).status == Code.INVALID_VALUE
        )


MEMORY_CALLS = [
    CallId[name]
    for name in [
        "wireCopyInline",
        "wireCopyToDevice",
        "wireCopyFromDevice",
        "wireCopyDevice",
        "wireCopy3D",
        "cuArray3DCreate_v2",
        "cuArrayDestroy",
        "wireMemset",
        "wireMemoryFree",
        "cuMemAlloc_v2",
        "cuMemAllocPitch_v2",
        "cuMemGetInfo_v2",
        "cuMemGetAddressRange_v2",
        "cuMemAddressReserve",
        "cuMemAddressFree",
        "cuMemCreate",
        "cuMemRelease",
        "cuMemMap",
        "cuMemUnmap",
        "cuMemSetAccess",
        "cuMemGetAccess",
        "cuMemRetainAllocationHandle",
        "cuMemAllocAsync",
        "cuMemAllocFromPoolAsync",
        "cuMemFreeAsync",
        "cuMemPoolCreate",
        "cuMemPoolDestroy",
        "cuMemPoolSetAttribute",
        "cuMemPoolGetAttribute",
        "cuMemPoolSetAccess",
        "cuMemPoolGetAccess",
        "cuStreamCreateWithPriority",
        "cuStreamDestroy_v2",
        "cuStreamQuery",
        "cuStreamWaitEvent",
        "cuStreamGetAttribute",
        "cuStreamSetAttribute",
        "cuStreamBatchMemOp_v2",
        "cuEventCreate",
        "cuEventDestroy_v2",
        "cuEventRecordWithFlags",
        "cuEventQuery",
        "cuEventSynchronize",
        "cuEventElapsedTime_v2",
        "cuDeviceGetDefaultMemPool",
    ]
]
WORDS = st.one_of(
    st.integers(0, 8),
    st.sampled_from(
        [STREAM, EVENT, MEMORY, POOL, 64, 4096, UNIT, 1 << 31, 1 << 32, (1 << 64) - 1, (1 << 64) - 4096]
    ),
    st.integers(0, (1 << 64) - 1),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    call=st.sampled_from(MEMORY_CALLS),
    words=st.lists(WORDS, min_size=8, max_size=8),
    payload=st.binary(max_size=300),
)
def test_no_arguments_break_the_worker(
    long_session: Replayed, call: int, words: list[int], payload: bytes
) -> None:
    # The fake driver believes sizes of memsets it is given, as no test should fill 2**63 bytes.
    if call == CallId.wireMemset:
        words[4] %= 4096
        words[5] %= 64
    if call in (CallId.cuMemAddressReserve, CallId.cuMemCreate, CallId.cuMemAlloc_v2, CallId.cuMemAllocAsync):
        words[0] %= 1 << 24
    session = long_session
    session.guest.ask(call, *words, payload=payload)
    session.guest.set_u32(DEFERRED, 0)
    assert session.guest.u32(STATE) == READY
    assert session.guest.ask(CallId.cuMemGetInfo_v2).status == 0
