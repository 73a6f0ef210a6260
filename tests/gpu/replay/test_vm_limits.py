# SPDX-License-Identifier: Apache-2.0
"""A VM's limits as its workers keep them: buckets, the queue, quotas; one session and several at once."""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu.replay.guest import (
    BUSY,
    BUSY_RETRY,
    DEFERRED,
    DOORBELL,
    HEAD,
    Replayed,
    build_fake_driver,
    replayed,
    until,
)
from vgpu.gpu._replay import lib
from vgpu.gpu.errors import Result as Code
from vgpu.transport._generated_calls import CallId
from vgpu.transport.account import Account, AccountFull, Limits, Resource
from vgpu.transport.wire import FLAG_REPLY

MIB = 1 << 20
LIMIT_IN_USE, DEVICE_BUSY = 1008, 1001
# A test that counts over time says how much too late or too many it takes: a machine may be busy, never fast.
SECONDS = 1.5
POOL = 11 << 42 | 1 << 28 | 1 << 4


@pytest.fixture(scope="module")
def memory_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_driver(tmp_path_factory.mktemp("memory"), "fake_memory.c")


@pytest.fixture
def account(tmp_path: Path) -> Iterator[Account]:
    opened = Account(tmp_path / "vm.account")
    yield opened
    opened.close()


@contextlib.contextmanager
def session_of(account: Account, library: Path, path: Path, number: int, **how: object) -> Iterator[Replayed]:
    """A session of the VM whose account that is."""
    entry = account.claim(number, os.getpid())
    with replayed(library, account=(path, entry), **how) as running:
        running.guest.retain()
        yield running


@pytest.fixture
def pair(account: Account, memory_driver: Path, tmp_path: Path) -> Iterator[tuple[Replayed, Replayed]]:
    path = tmp_path / "vm.account"
    with (
        session_of(account, memory_driver, path, 1) as one,
        session_of(account, memory_driver, path, 2) as two,
    ):
        yield one, two


def flood(session: Replayed, count: int) -> None:
    """So many calls that nobody waits for; fewer than the ring holds."""
    for number in range(count):
        session.guest.put(CallId.cuCtxSetLimit, 3, number)
    session.guest.publish()


def records(session: Replayed) -> int:
    return session.grant.get("records")


# -- rates


def test_a_flooder_gets_its_burst_and_then_its_rate(account: Account, pair: tuple[Replayed, ...]) -> None:
    session = pair[0]
    account.set_limits(Limits(calls_per_second=100))
    began, before = time.monotonic(), records(session)
    flood(session, 600)
    guest = session.guest
    assert until(lambda: guest.u32(BUSY) == 1)
    assert 0 < guest.u64(BUSY_RETRY) <= 50_000_000
    time.sleep(SECONDS)
    taken = records(session) - before
    assert taken <= 100 + 100 * (time.monotonic() - began) + 1

    # Nobody knocks: the worker wakes by itself. It may be late, and then takes what has come together.
    assert until(lambda: records(session) - before >= 100 + 95 * (time.monotonic() - began) - 10, 4)
    assert guest.u32(DEFERRED) == 0
    account.set_limits(Limits())
    assert until(lambda: records(session) - before == 600, 60)  # nothing was lost
    assert guest.u64(HEAD) == guest.tail
    assert guest.ask(CallId.cuCtxGetLimit, 3).values[0] == 599  # the last is the last
    assert guest.u32(BUSY) == 0
    holding = next(h for h in account.holdings() if h.session_id == 1)
    assert holding.held_back > 10
    assert holding.held_back_ns > 0.9 * SECONDS * 1e9


def test_a_flooder_comes_in_bursts(account: Account, pair: tuple[Replayed, ...]) -> None:
    """Each time it comes the device changes hands, so it comes twenty times a second at most, however slow its rate is."""
    session = pair[0]
    account.set_limits(Limits(calls_per_second=200))
    before = records(session)
    flood(session, 500)
    assert until(lambda: records(session) - before == 500)
    holding = next(h for h in account.holdings() if h.session_id == 1)
    # 200 went at once; of the others at least a twentieth of 200 each time it had been held back.
    assert 0 < holding.held_back <= 300 / (200 / 20) + 1


def test_sessions_share_one_bucket(account: Account, pair: tuple[Replayed, ...]) -> None:
    account.set_limits(Limits(calls_per_second=200))
    began, before = time.monotonic(), sum(map(records, pair))
    for session in pair:
        flood(session, 600)
    time.sleep(SECONDS)
    taken = sum(map(records, pair)) - before
    assert taken <= 200 + 200 * (time.monotonic() - began) + 2
    # Late workers take what has come together; the records last five seconds at this rate.
    assert until(lambda: sum(map(records, pair)) - before >= 200 + 190 * (time.monotonic() - began) - 10, 3)
    account.set_limits(Limits())
    assert until(lambda: sum(map(records, pair)) - before == 1200, 60)


def test_a_change_holds_at_once(account: Account, pair: tuple[Replayed, ...]) -> None:
    session = pair[0]
    account.set_limits(Limits(calls_per_second=1))
    began, before = time.monotonic(), records(session)
    flood(session, 300)
    assert until(lambda: session.guest.u32(BUSY) == 1)
    taken = records(session) - before
    assert 1 <= taken <= 1 + (time.monotonic() - began)
    changed = time.monotonic()
    account.set_limits(Limits(calls_per_second=1_000_000))
    assert until(lambda: records(session) - before == 300)
    assert time.monotonic() - changed < 10  # 299 s at the old rate


def test_what_was_drawn_in_advance_goes_back(account: Account, pair: tuple[Replayed, ...]) -> None:
    """A session that rests keeps nothing of the bucket from the others."""
    one, two = pair
    account.set_limits(Limits(calls_per_second=16384))  # batches of 64
    one.guest.ask(CallId.cuCtxGetLimit, 3)
    assert until(lambda: one.guest.u32(DOORBELL) == 1)
    level = account._get(128)
    two.guest.ask(CallId.cuCtxGetLimit, 3)
    assert until(lambda: two.guest.u32(DOORBELL) == 1)
    assert account._get(128) - level < 2_000_000_000


def test_bytes_may_be_owed(account: Account, pair: tuple[Replayed, ...]) -> None:
    """A copy larger than the burst goes through whole; the next one waits until it is paid for."""
    session = pair[0]
    guest = session.guest
    address = guest.ask(CallId.cuMemAlloc_v2, 2 * MIB).values[0]
    account.set_limits(Limits(bytes_per_second=2 * MIB))
    began = time.monotonic()
    for value in range(1, 5):
        guest.send(CallId.wireCopyToDevice, address, guest.arena, MIB, 0, 3, value)
    guest.send(CallId.cuCtxSetLimit, 3, 7)  # behind them, and not before them
    assert until(lambda: guest.fence(3) >= 3)
    assert until(lambda: guest.u32(BUSY) == 1 or guest.fence(3) == 4)
    fence = guest.fence(3)
    assert fence == 3 or time.monotonic() - began > 0.4
    assert guest.ask(CallId.cuCtxGetLimit, 3).values[0] == 7
    assert guest.fence(3) == 4
    # Two mebibytes are the burst, the third is owed: the fourth goes when that is paid, half a second later.
    assert time.monotonic() - began > 0.4


def test_a_queue_has_its_depth(account: Account, pair: tuple[Replayed, ...]) -> None:
    """Work that the device has not done holds back what comes after it, until it has."""
    session = pair[0]
    guest = session.guest
    began = time.monotonic()
    assert guest.ask(CallId.cuCtxSetLimit, DEVICE_BUSY, 1500).status == 0
    account.set_limits(Limits(queue_depth=10))
    before = records(session)
    for _ in range(50):
        guest.put(CallId.wireMemset, 0, 0, 0, 1, 0, 0, 0)
    guest.publish()
    assert until(lambda: guest.u32(BUSY) == 1)
    assert records(session) - before == 10
    time.sleep(0.1)
    assert records(session) - before == 10
    assert until(lambda: records(session) - before == 50)
    assert time.monotonic() - began > 1.5


def test_what_waits_for_a_later_record_is_not_stuck(account: Account, pair: tuple[Replayed, ...]) -> None:
    guest = pair[0].guest
    assert guest.ask(CallId.cuCtxSetLimit, DEVICE_BUSY, 2500).status == 0
    account.set_limits(Limits(queue_depth=1))
    before = records(pair[0])
    for _ in range(3):
        guest.put(CallId.wireMemset, 0, 0, 0, 1, 0, 0, 0)
    guest.publish()
    assert until(lambda: guest.u32(BUSY) == 1)
    assert records(pair[0]) - before == 1
    assert until(lambda: records(pair[0]) - before == 2, 60)  # one a second, although nothing has become done


def test_a_session_that_rests_leaves_the_queue(account: Account, pair: tuple[Replayed, ...]) -> None:
    """What it had queued is done, and it has nothing more to say: its places are the others'."""
    one, two = pair
    account.set_limits(Limits(queue_depth=8))
    assert one.guest.ask(CallId.cuCtxSetLimit, DEVICE_BUSY, 100).status == 0
    queue_memsets(one, 8)
    assert until(lambda: one.guest.u64(HEAD) == one.guest.tail)
    time.sleep(0.5)  # its work is done, and its worker has seen that
    assert two.guest.ask(CallId.cuCtxSetLimit, DEVICE_BUSY, 20_000).status == 0
    before = records(two)
    queue_memsets(two, 8)
    assert until(lambda: records(two) - before == 8, 15)  # and not only when the device is done with them
    account.set_limits(Limits())
    two.guest.ask(CallId.cuCtxSetLimit, DEVICE_BUSY, 0)


def queue_memsets(session: Replayed, count: int) -> None:
    for _ in range(count):
        session.guest.put(CallId.wireMemset, 0, 0, 0, 1, 0, 0, 0)
    session.guest.publish()


@pytest.mark.parametrize("how", ["plain", "answered", "by the address of the arena"])
def test_every_copy_is_paid_for(account: Account, pair: tuple[Replayed, ...], how: str) -> None:
    session = pair[0]
    guest = session.guest
    address = guest.ask(CallId.cuMemAlloc_v2, MIB).values[0]
    account.set_limits(Limits(bytes_per_second=MIB))
    began, before = time.monotonic(), records(session)
    arena = lib.vgpu_replay_address(session.replay) + guest.arena
    for _ in range(20):
        if how == "by the address of the arena":
            guest.put(CallId.wireCopyDevice, address, arena, MIB, 0)
        else:
            flags = FLAG_REPLY if how == "answered" else 0
            guest.put(CallId.wireCopyToDevice, address, guest.arena, MIB, 0, 0, 0, flags=flags, slot=1)
    guest.publish()
    time.sleep(1)
    taken = records(session) - before
    assert taken <= 2 + (time.monotonic() - began)
    account.set_limits(Limits())
    assert until(lambda: guest.u64(HEAD) == guest.tail)


# -- quotas


def test_a_quota_is_the_vms_to_the_byte(account: Account, pair: tuple[Replayed, ...]) -> None:
    one, two = pair
    account.set_limits(Limits(memory_bytes=10 * MIB))
    first = one.guest.ask(CallId.cuMemAlloc_v2, 6 * MIB)
    assert first.status == 0
    assert two.guest.ask(CallId.cuMemAlloc_v2, 4 * MIB + 1).status == Code.OUT_OF_MEMORY
    assert two.guest.ask(CallId.cuMemAlloc_v2, 4 * MIB).status == 0
    for session in pair:
        assert session.guest.ask(CallId.cuMemGetInfo_v2).values[:2] == (0, 10 * MIB)
        assert session.guest.ask(CallId.cuMemAlloc_v2, 1).status == Code.OUT_OF_MEMORY
    assert account.used(Resource.MEMORY) == 10 * MIB == sum(s.grant.get("memory_used_bytes") for s in pair)
    one.guest.send(CallId.wireMemoryFree, first.values[0])
    assert until(lambda: account.used(Resource.MEMORY) == 4 * MIB)
    assert two.guest.ask(CallId.cuMemGetInfo_v2).values[:2] == (6 * MIB, 10 * MIB)
    account.set_limits(Limits(memory_bytes=3 * MIB))  # less than there is: nothing is taken away
    assert two.guest.ask(CallId.cuMemGetInfo_v2).values[:2] == (0, 3 * MIB)
    assert two.guest.ask(CallId.cuMemAlloc_v2, 1).status == Code.OUT_OF_MEMORY
    account.set_limits(Limits())
    assert two.guest.ask(CallId.cuMemAlloc_v2, 20 * MIB).status == 0
    assert sum(h.refused[Resource.MEMORY] for h in account.holdings()) == 4


def test_the_dead_give_back(account: Account, pair: tuple[Replayed, ...]) -> None:
    one, two = pair
    account.set_limits(Limits(memory_bytes=10 * MIB))
    assert one.guest.ask(CallId.cuMemAlloc_v2, 10 * MIB).status == 0
    assert two.guest.ask(CallId.cuMemAlloc_v2, MIB).status == Code.OUT_OF_MEMORY
    account.clear_session(1)  # as its executor does
    assert two.guest.ask(CallId.cuMemAlloc_v2, 10 * MIB).status == 0


def test_racing_sessions_never_exceed(account: Account, pair: tuple[Replayed, ...]) -> None:
    """Both ask again and again for what only one can have; none is refused what there is room for."""
    account.set_limits(Limits(memory_bytes=64 * MIB))
    for session in pair:
        for _ in range(100):
            session.guest.put(CallId.cuMemAlloc_v2, MIB)
    for session in pair:
        session.guest.publish()
    most = 0
    while sum(s.grant.get("async_records") for s in pair) < 200:
        most = max(most, account.used(Resource.MEMORY))
    assert account.used(Resource.MEMORY) == 64 * MIB
    assert most <= 64 * MIB
    assert sum(h.refused[Resource.MEMORY] for h in account.holdings()) == 136


def test_a_pool_counts_with_what_it_keeps(account: Account, pair: tuple[Replayed, ...]) -> None:
    guest = pair[0].guest
    account.set_limits(Limits(memory_bytes=10 * MIB))
    properties = (b"\1\0\0\0\0\0\0\0\1\0\0\0").ljust(88, b"\0")
    assert guest.ask(CallId.cuMemPoolCreate, POOL, payload=properties).status == 0
    address = guest.ask(CallId.cuMemAllocFromPoolAsync, 4 * MIB, POOL, 0).values[0]
    assert account.used(Resource.MEMORY) == 4 * MIB
    assert guest.ask(CallId.cuMemPoolSetAttribute, POOL, 5, 8 * MIB).status == 0  # the fake: it holds so much
    assert guest.ask(CallId.cuMemGetInfo_v2).values[:2] == (2 * MIB, 10 * MIB)
    assert guest.ask(CallId.cuMemFreeAsync, address, 0).status == 0
    assert account.used(Resource.MEMORY) == 8 * MIB  # freed, and kept
    assert pair[1].guest.ask(CallId.cuMemAlloc_v2, 3 * MIB).status == Code.OUT_OF_MEMORY
    assert guest.ask(CallId.cuMemAlloc_v2, 3 * MIB).status == 0  # its own pool is told to let go
    assert account.used(Resource.MEMORY) == 3 * MIB
    assert guest.ask(CallId.cuMemPoolDestroy, POOL).status == 0
    assert account.used(Resource.MEMORY) == 3 * MIB


@pytest.mark.parametrize(("threshold", "kept"), [(0, 0), (6 * MIB, 6 * MIB), (1 << 40, 8 * MIB)])
def test_a_pool_lets_go_when_its_program_has_waited(
    account: Account, pair: tuple[Replayed, ...], threshold: int, kept: int
) -> None:
    """As the driver does when a program synchronizes: of what is beyond the pool's release threshold."""
    guest = pair[0].guest
    properties = (b"\1\0\0\0\0\0\0\0\1\0\0\0").ljust(88, b"\0")
    assert guest.ask(CallId.cuMemPoolCreate, POOL, payload=properties).status == 0
    assert guest.ask(CallId.cuMemPoolSetAttribute, POOL, 4, threshold).status == 0
    address = guest.ask(CallId.cuMemAllocFromPoolAsync, 4 * MIB, POOL, 0).values[0]
    assert guest.ask(CallId.cuMemPoolSetAttribute, POOL, 5, 8 * MIB).status == 0  # the fake: it holds so much
    assert guest.ask(CallId.cuMemFreeAsync, address, 0).status == 0
    assert account.used(Resource.MEMORY) == 8 * MIB
    guest.send(CallId.wireFenceContext, 3, 41)
    assert until(lambda: account.used(Resource.MEMORY) == kept)
    assert guest.ask(CallId.cuMemPoolGetAttribute, POOL, 5).values[0] == kept


def test_a_pool_gives_back_what_was_refused(account: Account, pair: tuple[Replayed, ...]) -> None:
    guest = pair[0].guest
    account.set_limits(Limits(memory_bytes=10 * MIB))
    properties = (b"\1\0\0\0\0\0\0\0\1\0\0\0").ljust(88, b"\0")
    assert guest.ask(CallId.cuMemPoolCreate, POOL, payload=properties).status == 0
    assert guest.ask(CallId.cuMemPoolSetAttribute, POOL, 4, 1 << 40).status == 0
    assert guest.ask(CallId.cuMemPoolSetAttribute, POOL, 5, 32 * MIB).status == 0  # the fake: its unit
    assert guest.ask(CallId.cuMemAllocFromPoolAsync, 4 * MIB, POOL, 0).status == Code.OUT_OF_MEMORY
    assert account.used(Resource.MEMORY) == 0
    assert guest.ask(CallId.cuMemPoolGetAttribute, POOL, 5).values[0] == 0


def test_handles_and_modules_have_an_end(account: Account, pair: tuple[Replayed, ...]) -> None:
    guest = pair[0].guest
    held = account.used(Resource.HANDLES)
    account.set_limits(Limits(handles=held + 3))
    events = [3 << 42 | 1 << 28 | (100 + n) << 4 for n in range(200)]
    made = 0
    for event in events:
        status = guest.ask(CallId.cuEventCreate, event, 0).status
        if status != 0:
            assert status == Code.OUT_OF_MEMORY
            break
        made += 1
    assert made < 200
    assert account.used(Resource.HANDLES) == held + 3
    assert guest.ask(CallId.cuEventDestroy_v2, events[0]).status == 0
    assert guest.ask(CallId.cuEventCreate, events[0], 0).status == 0  # room for one again
    (holding,) = [h for h in account.holdings() if h.session_id == 1]
    assert holding.refused[Resource.HANDLES] == 1


def test_textures_are_handles(account: Account, pair: tuple[Replayed, ...]) -> None:
    """They have no entry in a table of handles, and count as if they had."""
    guest = pair[0].guest
    held = account.used(Resource.HANDLES)
    account.set_limits(Limits(handles=held + 3))
    payload = struct.pack("<IxxxxQIIQ112x", 2, 0x1000, 0x20, 1, 1024) + bytes(104)
    values = []
    while (made := guest.ask(CallId.cuTexObjectCreate, 0, payload=payload)).status == 0:
        values.append(made.values[0])
    assert made.status == Code.OUT_OF_MEMORY
    assert len(values) < 200
    assert account.used(Resource.HANDLES) == held + 3
    assert guest.ask(CallId.cuTexObjectDestroy, values[0]).status == 0
    assert guest.ask(CallId.cuTexObjectCreate, 0, payload=payload).status == 0


def test_arena_that_is_registered_has_an_end(account: Account, pair: tuple[Replayed, ...]) -> None:
    guest = pair[0].guest
    account.set_limits(Limits(arena_bytes=MIB))
    assert guest.ask(CallId.wireArenaRegister, 2 * MIB, 2 * MIB).status == Code.OUT_OF_MEMORY
    assert guest.ask(CallId.wireArenaRegister, 2 * MIB, MIB).status == 0
    assert pair[1].guest.ask(CallId.wireArenaRegister, 2 * MIB, 4096).status == Code.OUT_OF_MEMORY
    assert guest.ask(CallId.wireArenaUnregister, 2 * MIB, MIB).status == 0
    assert account.used(Resource.ARENA) == 0


def test_small_allocations_share_a_unit(tmp_path: Path, account: Account) -> None:
    """A driver that takes memory in units of two mebibytes: two small blocks of one unit cost one unit, not two."""
    library = build_fake_driver(tmp_path, "fake_memory.c", "-DFAKE_UNITS")
    with session_of(account, library, tmp_path / "vm.account", 1) as session:
        guest = session.guest
        account.set_limits(Limits(memory_bytes=6 * MIB))
        small = [guest.ask(CallId.cuMemAlloc_v2, 1000) for _ in range(3)]
        assert [answer.status for answer in small] == [0, 0, 0]
        assert len({answer.values[0] // (2 * MIB) for answer in small}) == 1
        assert account.used(Resource.MEMORY) == 2 * MIB
        large = guest.ask(CallId.cuMemAlloc_v2, 3 * MIB)
        assert large.status == 0
        assert account.used(Resource.MEMORY) == 6 * MIB
        assert guest.ask(CallId.cuMemGetInfo_v2).values[:2] == (0, 6 * MIB)
        assert guest.ask(CallId.cuMemAlloc_v2, 1000).status == 0  # there is room in a unit it has
        assert guest.ask(CallId.cuMemAlloc_v2, 2 * MIB).status == Code.OUT_OF_MEMORY
        guest.ask(CallId.wireMemoryFree, large.values[0])
        assert account.used(Resource.MEMORY) == 2 * MIB
        for answer in small:
            guest.ask(CallId.wireMemoryFree, answer.values[0])
        assert account.used(Resource.MEMORY) == 2 * MIB  # the fourth is there still


# -- the file


def test_a_full_account_takes_no_more(account: Account) -> None:
    entries = [account.claim(number, 1) for number in range(1, 255)]
    assert entries == list(range(254))
    with pytest.raises(AccountFull):
        account.claim(255, 1)
    assert account.claim(7, 1) == 6  # one that is there
    account.clear(3)
    assert account.claim(255, 1) == 3
    assert len(list(account.holdings())) == 254


def test_limits_are_kept_in_the_file(tmp_path: Path, account: Account) -> None:
    assert account.is_new
    limits = Limits(1, 2, 3, 4, 5, 6, 7)
    account.set_limits(limits)
    again = Account(tmp_path / "vm.account")
    assert not again.is_new
    assert again.limits() == limits
    again.close()
