# SPDX-License-Identifier: Apache-2.0
"""Ways to hold more of the card than the account says, tried one by one; and memory that honest programs must not lose by them.

Contexts whose handles are used again, pools that are destroyed or grow for a request that is refused, and limits that
the driver turns into device memory.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.gpu.replay.guest import Guest, build_fake_driver, replayed, until
from vgpu.gpu.errors import Result as Code
from vgpu.transport._generated_calls import CallId

MIB = 1 << 20
QUOTA = 100 * MIB
# Of cuCtxSetLimit and cuCtxGetLimit: fake_driver.c, fake_memory.c.
DEVICE_BUSY, IN_USE, WAITED = 1001, 1008, 1009
HEAP_SIZE = 2
RELEASE_THRESHOLD, RESERVED_NOW = 4, 5  # the second cannot be set but here: the pool's next piece is so large
FIRST, SECOND, THIRD = (1 << 42 | 1 << 28 | number << 4 for number in (1, 8, 9))
POOL = 11 << 42 | 1 << 28 | 1 << 4
STREAM = 2 << 42 | 1 << 28 | 1 << 4
PHYSICAL = 13 << 42 | 1 << 28 | 1 << 4
POOL_PROPERTIES = b"\1\0\0\0\0\0\0\0\1\0\0\0".ljust(88, b"\0")
PHYSICAL_PROPERTIES = struct.pack("<iiii", 1, 0, 1, 0).ljust(32, b"\0")


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_driver(tmp_path_factory.mktemp("memory"), "fake_memory.c")


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A driver that takes device memory in units of 2 MiB, as a real one does."""
    return build_fake_driver(tmp_path_factory.mktemp("units"), "fake_memory.c", "-DFAKE_UNITS")


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_driver(tmp_path_factory.mktemp("pools"), "fake_pools.c")


def on_the_card(guest: Guest) -> int:
    """Bytes the driver has given away."""
    return guest.ask(CallId.cuCtxGetLimit, IN_USE).values[0]


def make_pool(guest: Guest) -> None:
    assert guest.ask(CallId.cuMemPoolCreate, POOL, payload=POOL_PROPERTIES).status == 0


# ---- contexts


def test_memory_is_its_contexts_whatever_that_is_called(memory: Path) -> None:
    """The primary context is renamed, and another one gets the old name and ends: what the first holds still counts."""
    with replayed(memory, memory_limit=QUOTA) as session:
        guest = session.guest
        before = on_the_card(guest)
        for _ in range(5):
            assert guest.ask(CallId.wirePrimaryRetain, FIRST, 0).status == 0
            guest.ask(CallId.cuMemAlloc_v2, 80 * MIB)
            assert guest.ask(CallId.wirePrimaryRetain, SECOND, 0).status == 0
            assert guest.ask(CallId.wireContextCreate, FIRST, 0).status == 0
            assert guest.ask(CallId.wireContextDestroy, FIRST).status == 0
        assert on_the_card(guest) - before <= QUOTA


def test_memory_in_a_primary_context_whose_retain_failed(memory: Path) -> None:
    with replayed(memory, memory_limit=QUOTA) as session:
        guest = session.guest
        guest.retain()
        assert guest.ask(CallId.wireContextCreate, SECOND, 0).status == 0
        assert guest.ask(CallId.wirePrimaryReset).status == 0
        assert guest.ask(CallId.wireContextCreate, THIRD, 0).status == 0
        assert guest.ask(CallId.wireSetContext, SECOND).status == 0
        assert (
            guest.ask(CallId.wirePrimaryRetain, SECOND, 0).status == Code.INVALID_VALUE
        )  # that name is taken
        assert guest.ask(CallId.cuMemAlloc_v2, 80 * MIB).status == 0  # in the primary context
        assert guest.ask(CallId.wireContextDestroy, SECOND).status == 0
        assert guest.ask(CallId.cuMemAlloc_v2, 80 * MIB).status == Code.OUT_OF_MEMORY


def test_memory_of_a_context_used_after_the_primary_one_ended(memory: Path) -> None:
    """As when another thread calls cuDevicePrimaryCtxRelease."""
    with replayed(memory, memory_limit=QUOTA) as session:
        guest = session.guest
        guest.retain()
        assert guest.ask(CallId.wireContextCreate, SECOND, 0).status == 0
        assert guest.ask(CallId.wirePrimaryReset).status == 0
        assert guest.ask(CallId.wireSetContext, SECOND).status == 0
        assert guest.ask(CallId.cuMemAlloc_v2, 80 * MIB).status == 0
        assert guest.ask(CallId.wireContextDestroy, SECOND).status == 0
        assert session.grant.get("memory_used_bytes") == 0


# ---- pools


def test_a_destroyed_pool_counts_with_what_it_holds(memory: Path) -> None:
    """Its last allocation keeps the whole piece of the card that it lies in."""
    with replayed(memory, memory_limit=QUOTA) as session:
        guest = session.guest
        guest.retain()
        make_pool(guest)
        assert guest.ask(CallId.cuMemPoolSetAttribute, POOL, RESERVED_NOW, 32 * MIB).status == 0
        address = guest.ask(CallId.cuMemAllocFromPoolAsync, 4096, POOL, 0).values[0]
        assert session.grant.get("memory_used_bytes") == 32 * MIB
        assert guest.ask(CallId.cuMemPoolDestroy, POOL).status == 0
        assert session.grant.get("memory_used_bytes") == 32 * MIB
        assert guest.ask(CallId.cuMemFreeAsync, address, 0).status == 0
        assert session.grant.get("memory_used_bytes") == 0


def test_an_empty_pool_that_is_destroyed_counts_nothing(memory: Path) -> None:
    with replayed(memory, memory_limit=QUOTA) as session:
        guest = session.guest
        guest.retain()
        for _ in range(3):
            make_pool(guest)
            assert guest.ask(CallId.cuMemPoolSetAttribute, POOL, RELEASE_THRESHOLD, 1 << 40).status == 0
            address = guest.ask(CallId.cuMemAllocFromPoolAsync, 40 * MIB, POOL, 0).values[0]
            assert guest.ask(CallId.cuMemFreeAsync, address, 0).status == 0
            assert guest.ask(CallId.cuMemPoolDestroy, POOL).status == 0
            assert session.grant.get("memory_used_bytes") == 0


def test_what_a_pool_took_for_a_refusal_and_cannot_give_back_counts(pools: Path) -> None:
    """The device is busy, so nothing that was refused can be given back: it must not be had again and again."""
    with replayed(pools, memory_limit=31 * MIB) as session:
        guest = session.guest
        guest.retain()
        make_pool(guest)
        assert guest.ask(CallId.cuCtxSetLimit, DEVICE_BUSY, 30_000).status == 0
        for _ in range(20):
            answer = guest.ask(CallId.cuMemAllocFromPoolAsync, 31 * MIB, POOL, 0)
            assert answer.status == Code.OUT_OF_MEMORY
        assert guest.ask(CallId.cuMemPoolGetAttribute, POOL, RESERVED_NOW).values[0] <= 32 * MIB
        assert session.grant.get("memory_used_bytes") == 32 * MIB
        assert guest.ask(CallId.cuMemGetInfo_v2).values[0] == 0
        assert guest.ask(CallId.cuCtxGetLimit, WAITED).values[0] == 0  # the worker never waits for the device
        assert guest.ask(CallId.cuCtxSetLimit, DEVICE_BUSY, 0).status == 0
        # Nobody has to ask for it, or to wait.
        assert until(lambda: session.grant.get("memory_used_bytes") == 0)
        assert guest.ask(CallId.cuMemGetInfo_v2).values[0] == 31 * MIB


def test_what_was_freed_in_a_stream_that_is_destroyed_goes_back(pools: Path) -> None:
    with replayed(pools, memory_limit=QUOTA) as session:
        guest = session.guest
        guest.retain()
        make_pool(guest)
        for _ in range(5):
            assert guest.ask(CallId.cuStreamCreateWithPriority, STREAM, 0, 0).status == 0
            address = guest.ask(CallId.cuMemAllocFromPoolAsync, 80 * MIB, POOL, STREAM).values[0]
            assert session.grant.get("memory_used_bytes") == 96 * MIB
            assert guest.ask(CallId.cuMemFreeAsync, address, STREAM).status == 0
            assert session.grant.get("memory_used_bytes") == 96 * MIB
            assert guest.ask(CallId.cuStreamDestroy_v2, STREAM).status == 0
            assert session.grant.get("memory_used_bytes") == 0


def test_streams_destroyed_while_the_device_is_busy_give_back_what_was_freed_in_them(pools: Path) -> None:
    with replayed(pools, memory_limit=QUOTA) as session:
        guest = session.guest
        guest.retain()
        make_pool(guest)
        assert guest.ask(CallId.cuCtxSetLimit, DEVICE_BUSY, 60_000).status == 0
        for _ in range(50):
            assert guest.ask(CallId.cuStreamCreateWithPriority, STREAM, 0, 0).status == 0
            address = guest.ask(CallId.cuMemAllocFromPoolAsync, 80 * MIB, POOL, STREAM).values[0]
            assert guest.ask(CallId.cuMemFreeAsync, address, STREAM).status == 0
            assert guest.ask(CallId.cuStreamDestroy_v2, STREAM).status == 0
        assert guest.ask(CallId.cuCtxSetLimit, DEVICE_BUSY, 0).status == 0
        assert until(lambda: session.grant.get("memory_used_bytes") == 0)


def test_a_program_that_trims_its_pool_finds_it_empty_and_pays_no_more(pools: Path) -> None:
    """As natively: freed, waited for, trimmed; whatever the release threshold is."""
    with replayed(pools, memory_limit=QUOTA) as session:
        guest = session.guest
        guest.retain()
        make_pool(guest)
        assert guest.ask(CallId.cuMemPoolSetAttribute, POOL, RELEASE_THRESHOLD, 1 << 40).status == 0
        assert guest.ask(CallId.cuStreamCreateWithPriority, STREAM, 0, 0).status == 0
        for value in range(1, 6):
            address = guest.ask(CallId.cuMemAllocFromPoolAsync, 80 * MIB, POOL, STREAM).values[0]
            guest.send(CallId.cuMemFreeAsync, address, STREAM)
            guest.send(CallId.wireFence, STREAM, 3, value)
            guest.send(CallId.cuMemPoolTrimTo, POOL, 0)
            assert guest.ask(CallId.cuMemPoolGetAttribute, POOL, RESERVED_NOW).values[0] == 0
            assert session.grant.get("memory_used_bytes") == 0


def test_room_is_made_by_what_another_stream_freed(pools: Path) -> None:
    """The program waits for nothing; what its stream has come to by then can be had by others."""
    with replayed(pools, memory_limit=QUOTA) as session:
        guest = session.guest
        guest.retain()
        make_pool(guest)
        assert guest.ask(CallId.cuStreamCreateWithPriority, STREAM, 0, 0).status == 0
        for _ in range(5):
            address = guest.ask(CallId.cuMemAllocFromPoolAsync, 80 * MIB, POOL, STREAM).values[0]
            assert guest.ask(CallId.cuMemFreeAsync, address, STREAM).status == 0
            other = guest.ask(CallId.cuMemAlloc_v2, 80 * MIB)
            assert other.status == 0
            assert guest.ask(CallId.wireMemoryFree, other.values[0]).status == 0
        assert guest.ask(CallId.cuCtxGetLimit, WAITED).values[0] == 0


@pytest.mark.parametrize("what", ["physical memory", "a small block"])
def test_pools_let_go_of_what_they_keep_when_others_want_it(units: Path, what: str) -> None:
    with replayed(units, memory_limit=32 * MIB) as session:
        guest = session.guest
        guest.retain()
        make_pool(guest)
        assert guest.ask(CallId.cuMemPoolSetAttribute, POOL, RELEASE_THRESHOLD, 1 << 40).status == 0
        address = guest.ask(CallId.cuMemAllocFromPoolAsync, 4 * MIB, POOL, 0).values[0]
        assert guest.ask(CallId.cuMemPoolSetAttribute, POOL, RESERVED_NOW, 32 * MIB).status == 0
        assert guest.ask(CallId.cuMemFreeAsync, address, 0).status == 0
        guest.ask(CallId.cuMemGetInfo_v2)
        assert session.grant.get("memory_used_bytes") == 32 * MIB
        if what == "physical memory":
            asked = guest.ask(CallId.cuMemCreate, PHYSICAL, 4 * MIB, 0, payload=PHYSICAL_PROPERTIES)
        else:
            asked = guest.ask(CallId.cuMemAlloc_v2, 4096)
        assert asked.status == 0


# ---- limits that are memory


def test_a_heap_that_a_program_makes_larger_counts(memory: Path) -> None:
    with replayed(memory, memory_limit=QUOTA) as session:
        guest = session.guest
        guest.retain()
        before = guest.ask(CallId.cuCtxGetLimit, HEAP_SIZE).values[0]
        assert guest.ask(CallId.cuCtxSetLimit, HEAP_SIZE, 60 << 30).status == Code.OUT_OF_MEMORY
        assert session.grant.get("memory_used_bytes") == 0
        assert guest.ask(CallId.wireContextCreate, SECOND, 0).status == 0
        assert guest.ask(CallId.cuCtxSetLimit, HEAP_SIZE, before + 60 * MIB).status == 0
        assert session.grant.get("memory_used_bytes") == 60 * MIB
        assert guest.ask(CallId.cuMemAlloc_v2, 60 * MIB).status == Code.OUT_OF_MEMORY
        assert guest.ask(CallId.cuCtxSetLimit, HEAP_SIZE, before + 20 * MIB).status == 0
        assert session.grant.get("memory_used_bytes") == 20 * MIB
        assert guest.ask(CallId.wireContextDestroy, SECOND).status == 0
        assert session.grant.get("memory_used_bytes") == 0
