# SPDX-License-Identifier: Apache-2.0
"""The replay loop against a guest that does wrong: every rule of the ring broken, one at a time and at random.

What must hold: no crash, the loop ends with the session dead or goes on answering, and never touches what the
record did not pay for.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gpu.replay.guest import (
    CONTEXT,
    DEAD,
    HEAD,
    READY,
    STATE,
    STICKY,
    Guest,
    Replayed,
    replayed,
    until,
)
from vgpu.gpu._replay import lib
from vgpu.gpu.errors import Result as Code
from vgpu.transport._generated_calls import CallId
from vgpu.transport.wire import FLAG_REPLY, INLINE_LIMIT, CallHeader

SCRIBBLE = 1003


def raw(
    call: int = CallId.cuCtxGetLimit,
    *,
    flags: int = 0,
    length: int = 0,
    slot: int = 0,
    reserved: int = 0,
    arguments: tuple[int, ...] = (),
) -> bytearray:
    header = bytearray(CallHeader(call, arguments, flags, length, 0, slot).encode())
    header[14:16] = reserved.to_bytes(2, "little")
    return header


def dead(session: Replayed) -> None:
    assert session.joined() == lib.VGPU_RUN_PROTOCOL
    assert session.guest.u32(STATE) == DEAD
    assert session.guest.u32(STICKY) == Code.INVALID_VALUE
    assert session.grant.get("protocol_errors") == 1
    assert session.grant.get("records") == 0


BROKEN_RECORDS = {
    "reserved field": raw(reserved=1),
    "unknown flag": raw(flags=2),
    "slot past the last": raw(flags=FLAG_REPLY, slot=8),
    "payload longer than what was produced": raw(length=1),
    "payload longer than the ring": raw(length=1 << 20),
    "longest length": raw(length=0xFFFFFFFF),
    "pad that does not reach the end": raw(CallId.wirePad, length=16) + bytes(16),
    "pad that wants an answer": raw(CallId.wirePad, flags=FLAG_REPLY, length=(64 << 10) - 80)
    + bytes((64 << 10) - 80),
    "half a header": bytearray(64),
    "sixteen bytes": bytearray(16),
}


@pytest.mark.parametrize("what", BROKEN_RECORDS)
def test_broken_record_ends_the_session(fake_driver: Path, what: str) -> None:
    with replayed(fake_driver) as session:
        session.guest.write(bytes(BROKEN_RECORDS[what]))
        session.guest.publish()
        dead(session)


@pytest.mark.parametrize("tail", [8, 1, (64 << 10) + 16, 1 << 63, 2**64 - 16, 2**64 - 1])
def test_impossible_tail_ends_the_session(fake_driver: Path, tail: int) -> None:
    with replayed(fake_driver) as session:
        session.guest.publish(tail)
        dead(session)


def test_payload_over_the_inline_limit_ends_the_session(fake_driver: Path) -> None:
    with replayed(fake_driver, ring_size=256 << 10) as session:
        size = INLINE_LIMIT + 16
        session.guest.write(bytes(raw(length=size)) + bytes(size))
        session.guest.publish()
        dead(session)


def test_record_that_would_wrap_ends_the_session(fake_driver: Path) -> None:
    with replayed(fake_driver) as session:
        guest = session.guest
        while guest.ring_size - guest.tail > 160:
            guest.send(CallId.wireSetContext, CONTEXT, payload=bytes(48))
        assert until(lambda: guest.u64(HEAD) == guest.tail)
        rest = guest.ring_size - guest.tail
        at = guest.ring + guest.tail
        guest.map[at : at + 80] = bytes(raw(length=rest))
        guest.publish(guest.tail + rest + 80)
        assert session.joined() == lib.VGPU_RUN_PROTOCOL
        assert guest.u32(STATE) == DEAD


def test_record_changed_under_the_handler_counts_as_it_was_checked(fake_driver: Path) -> None:
    """The handler (told by the fake driver's scribbling limit) overwrites its own header in the ring."""
    with replayed(fake_driver) as session:
        guest = session.guest
        guest.retain()
        worker_address = lib.vgpu_replay_address(session.replay)
        here = worker_address + guest.ring + guest.tail % guest.ring_size
        assert guest.ask(CallId.cuCtxSetLimit, SCRIBBLE, here, slot=3).status == 0
        assert until(lambda: guest.u64(HEAD) == guest.tail)
        at = guest.ring + (guest.tail - 80) % guest.ring_size
        assert guest.map[at : at + 80] == b"\xff" * 80
        assert guest.ask(CallId.cuCtxGetLimit, 3, slot=4).status == 0
        assert guest.u32(STATE) == READY


def test_guest_that_rewrites_records_all_the_time_never_crashes_the_worker(fake_driver: Path) -> None:
    """A second thread flips bytes of the ring while records are replayed; only this session may suffer."""
    for seed in range(5):
        with replayed(fake_driver) as session:
            guest = session.guest
            guest.retain()
            chance = random.Random(seed)
            stop = threading.Event()

            def flip(
                guest: Guest = guest, chance: random.Random = chance, stop: threading.Event = stop
            ) -> None:
                while not stop.is_set():
                    at = guest.ring + chance.randrange(guest.ring_size // 16) * 16 + chance.randrange(16)
                    guest.map[at] = chance.randrange(256)

            flipper = threading.Thread(target=flip)
            flipper.start()
            deadline = time.monotonic() + 0.3
            with contextlib.suppress(TimeoutError, BrokenPipeError, ConnectionResetError):
                while session.ended is None and time.monotonic() < deadline:
                    guest.put(CallId.wireFence, CONTEXT, 1, 1, payload=bytes(64))
                    guest.publish()
                    if guest.tail - guest.u64(HEAD) > guest.ring_size // 2:
                        time.sleep(0.001)
            stop.set()
            flipper.join()
            assert guest.u32(STATE) in (READY, DEAD)


# Every handle-shaped value there is to forge, and the numbers next to every limit.
NUMBERS = st.one_of(
    st.sampled_from(
        [
            0,
            1,
            2,
            7,
            8,
            63,
            64,
            65,
            CONTEXT,
            CONTEXT + 16,
            1 << 32,
            (1 << 32) - 1,
            1 << 47,
            1 << 63,
            2**64 - 1,
        ]
    ),
    st.builds(
        lambda kind, generation, index: kind << 42 | generation << 28 | index << 4,
        st.integers(0, 18),
        st.integers(0, 3),
        st.sampled_from([0, 1, 2, 255, 256, (1 << 23) - 1, 1 << 23, (1 << 23) + 1, (1 << 24) - 1]),
    ),
    st.integers(0, 2**64 - 1).filter(lambda n: not 1000 <= n <= 1010),
)
# Calls of this file's subject: what the loop, contexts, fences, arena and callbacks answer themselves.
OWN_CALLS = st.sampled_from(
    [
        CallId.wireSetContext,
        CallId.wireFence,
        CallId.wireFenceContext,
        CallId.wireFenceEvent,
        CallId.wireArenaRegister,
        CallId.wireArenaUnregister,
        CallId.wirePrimaryRetain,
        CallId.wirePrimaryReset,
        CallId.wireContextCreate,
        CallId.wireContextDestroy,
        CallId.wireHostFunction,
        CallId.cuCtxSetLimit,
        CallId.cuCtxGetLimit,
        CallId.cuDevicePrimaryCtxRelease_v2,
    ]
)
RECORDS = st.tuples(
    st.one_of(OWN_CALLS, st.integers(1, 700)),
    st.lists(NUMBERS, max_size=8).map(tuple),
    st.binary(max_size=200),
    st.booleans(),
    st.integers(0, 7),
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(RECORDS, min_size=1, max_size=30))
def test_well_formed_nonsense_is_answered(
    fake_driver: Path, records: list[tuple[int, tuple[int, ...], bytes, bool, int]]
) -> None:
    """Right records with wrong contents: each is answered, and the session lives (unless it said goodbye)."""
    with replayed(fake_driver) as session:
        guest = session.guest
        guest.retain()
        for call, arguments, payload, wants_reply, slot in records:
            if call == CallId.wireGoodbye:
                continue
            if wants_reply:
                status = guest.ask(call, *arguments, payload=payload, slot=slot).status
                assert status == 0 or status in Code.__members__.values()
            else:
                guest.send(call, *arguments, payload=payload)
        assert guest.ask(CallId.wirePrimaryRetain, CONTEXT, 0).status in (0, Code.INVALID_VALUE)
        assert guest.u32(STATE) == READY
        assert guest.u32(STICKY) == 0


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(min_size=16, max_size=2048), tail=st.integers(1, 64).map(lambda n: n * 16))
def test_noise_in_the_ring_never_crashes(fake_driver: Path, noise: bytes, tail: int) -> None:
    with replayed(fake_driver) as session:
        guest = session.guest
        guest.map[guest.ring : guest.ring + len(noise)] = noise
        guest.publish(tail)
        assert until(lambda: session.ended is not None or guest.u64(HEAD) == tail)
        assert guest.u64(HEAD) <= tail
        assert guest.u32(STATE) == (READY if session.ended is None else DEAD)
