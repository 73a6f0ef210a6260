# SPDX-License-Identifier: Apache-2.0
"""The replay loop against a guest that does right: records, answers, fences, waking, faults, leases, callbacks."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu.replay.guest import (
    BUSY,
    BUSY_RETRY,
    CALLBACK_WAKE,
    CALLBACKS,
    CLOSED,
    CONTEXT,
    DEAD,
    DEFERRED,
    HEAD,
    READY,
    STATE,
    STICKY,
    WAITERS,
    WAKE,
    Replayed,
    replayed,
    until,
)
from vgpu.gpu._replay import lib
from vgpu.gpu.errors import Result as Code
from vgpu.transport._generated_calls import CallId

SLEEP, DEVICE_BUSY, FAULT, SCRIBBLE, FAIL = range(1000, 1005)
CALLS, REGISTERED = 1006, 1010
DEMAND, IDLE, FAULTED, ENDED = 1, 2, 4, 8
POSTED, DONE = 1, 3


@pytest.fixture
def session(fake_driver: Path) -> Iterator[Replayed]:
    with replayed(fake_driver) as running:
        running.guest.retain()
        yield running


def tell(session: Replayed, limit: int, value: int) -> None:
    """One of the fake driver's own limits."""
    assert session.guest.ask(CallId.cuCtxSetLimit, limit, value).status == 0


def make_busy(session: Replayed, milliseconds: int) -> None:
    """The device has work on the legacy stream for so long."""
    tell(session, DEVICE_BUSY, milliseconds)
    # Any handler that asks for a stream marks it as holding work; this one does nothing else in the fake.
    session.guest.ask(CallId.cuStreamCopyAttributes, 0, 0)


def told(session: Replayed) -> int:
    """The next events. The worker writes down what has come about, and tells of it afterwards."""
    found = [0]

    def look() -> bool:
        found[0] = session.events()
        return found[0] != 0

    assert until(look)
    return found[0]


def test_reply_carries_status_values_and_sequence(session: Replayed) -> None:
    guest = session.guest
    result = guest.ask(CallId.cuCtxSetLimit, 3, 12345, slot=5)
    assert (result.status, result.values[0]) == (0, 12345)
    assert guest.ask(CallId.cuCtxGetLimit, 3).values[0] == 12345
    assert guest.ask(CallId.cuCtxGetLimit, 99).status == Code.UNSUPPORTED_LIMIT
    assert guest.u32(DEFERRED) == 0  # errors of replies are not deferred


def test_calls_without_handler_are_refused(session: Replayed) -> None:
    assert session.guest.ask(CallId.cuTexRefCreate).status == Code.NOT_SUPPORTED
    assert session.guest.ask(60000).status == Code.INVALID_VALUE
    assert session.grant.get("protocol_errors") == 1
    assert session.guest.u32(STATE) == READY


def test_failed_async_call_is_deferred_and_the_first_wins(session: Replayed) -> None:
    guest = session.guest
    guest.send(CallId.cuCtxSetLimit, FAIL, 2)
    guest.send(CallId.cuCtxSetLimit, FAIL, 1)
    guest.ask(CallId.cuCtxGetLimit, 0)
    assert guest.u32(DEFERRED) == 2
    assert session.grant.get("replay_errors") == 2


def test_ring_wraps_with_padding(session: Replayed) -> None:
    guest = session.guest
    for turn in range(400):
        guest.put(CallId.wireSetContext, CONTEXT, payload=bytes(turn * 37 % 5000))
        guest.publish()
    assert guest.ask(CallId.cuCtxGetLimit, 0).status == 0
    assert guest.tail > 10 * guest.ring_size
    assert until(lambda: guest.u64(HEAD) == guest.tail)
    assert session.grant.get("records") == 402
    assert session.grant.get("async_records") == 400
    assert session.grant.get("reply_records") == 2
    assert guest.u32(DEFERRED) == 0


def test_record_that_ends_exactly_at_the_end_of_the_ring(session: Replayed) -> None:
    guest = session.guest
    for _ in range(3):
        while (to_end := guest.ring_size - guest.tail % guest.ring_size) > 20000:
            guest.send(CallId.wireSetContext, CONTEXT, payload=bytes(10000))
        guest.send(CallId.wireSetContext, CONTEXT, payload=bytes(to_end - 80))
        assert guest.tail % guest.ring_size == 0
        assert guest.ask(CallId.cuCtxGetLimit, 0).status == 0
    assert guest.u32(DEFERRED) == 0


def test_doorbell_wakes_a_sleeping_worker(session: Replayed) -> None:
    time.sleep(0.05)  # it spins for 4 us
    before = session.grant.get("doorbells")
    assert session.guest.ask(CallId.cuCtxGetLimit, 0).status == 0
    assert until(lambda: session.grant.get("doorbells") == before + 1)


@pytest.mark.parametrize("gpu_writes", [True, False])
@pytest.mark.parametrize("whole_context", [True, False])
def test_fence_comes_when_the_work_is_done(
    fake_driver: Path, monkeypatch: pytest.MonkeyPatch, gpu_writes: bool, whole_context: bool
) -> None:
    if not gpu_writes:
        monkeypatch.setenv("FAKE_NO_WRITES", "1")
    with replayed(fake_driver) as session:
        guest = session.guest
        guest.retain()
        make_busy(session, 500)  # long enough to look at what must not be yet, on a busy machine too
        if whole_context:
            guest.send(CallId.wireFenceContext, 3, 41)
        else:
            guest.send(CallId.wireFence, 0, 3, 41)
        assert guest.ask(CallId.cuCtxGetLimit, 0).status == 0  # the ring goes on meanwhile
        assert guest.fence(3) == 0
        assert session.grant.get("fences_issued") == 1
        assert session.grant.get("oldest_fence_ns") > 0
        assert until(lambda: guest.fence(3) == 41)
        assert until(lambda: session.grant.get("fences_done") == 1)
        assert until(lambda: session.grant.get("oldest_fence_ns") == 0)
        assert 250_000_000 < session.grant.get("gpu_ns") < 10_000_000_000


def test_context_fence_over_an_idle_device_is_immediate(session: Replayed) -> None:
    guest = session.guest
    calls = guest.ask(CallId.cuCtxGetLimit, CALLS).values[0]
    guest.send(CallId.wireFenceContext, 5, 9)
    guest.send(CallId.wireFence, 0, 6, 9)
    assert guest.ask(CallId.cuCtxGetLimit, CALLS).values[0] == calls
    assert (guest.fence(5), guest.fence(6)) == (9, 9)


@pytest.mark.parametrize("arguments", [(0, 64, 1), (0, 1 << 32, 1), (12345, 3, 1), (1, 3, 1)])
def test_fence_with_wrong_stream_or_word(session: Replayed, arguments: tuple[int, int, int]) -> None:
    session.guest.send(CallId.wireFence, *arguments)
    session.guest.ask(CallId.cuCtxGetLimit, 0)
    expected = Code.INVALID_VALUE if arguments[0] == 0 else Code.INVALID_HANDLE
    assert session.guest.u32(DEFERRED) == expected
    if arguments[1] < 64:
        assert (
            session.guest.fence(arguments[1]) == arguments[2]
        )  # whoever waits is let go, and finds the error


def test_sleeping_waiter_is_woken_by_a_gpu_written_fence(session: Replayed) -> None:
    guest = session.guest
    make_busy(session, 60)
    guest.send(CallId.wireFence, 0, 3, 1)
    guest.set_u32(WAITERS, 1)
    before = guest.u32(WAKE)
    assert until(lambda: guest.fence(3) == 1)
    assert until(lambda: guest.u32(WAKE) != before)
    guest.set_u32(WAITERS, 0)


def test_nobody_is_woken_while_nobody_sleeps(session: Replayed) -> None:
    before = session.guest.u32(WAKE)
    for _ in range(50):
        session.guest.ask(CallId.cuCtxGetLimit, 0)
    assert session.guest.u32(WAKE) == before


def test_fault_becomes_sticky_though_its_fence_never_comes(session: Replayed) -> None:
    guest = session.guest
    before = guest.u32(WAKE)
    tell(session, FAULT, 50)
    guest.ask(CallId.cuStreamCopyAttributes, 0, 0)
    guest.send(CallId.wireFence, 0, 3, 1)
    assert until(lambda: guest.u32(STICKY) == Code.ILLEGAL_ADDRESS)
    assert until(lambda: guest.u32(WAKE) != before)
    assert guest.fence(3) == 0
    assert guest.u32(STATE) == READY
    assert guest.ask(CallId.cuCtxGetLimit, 0).status == Code.ILLEGAL_ADDRESS
    assert until(lambda: bool(session.events() & FAULTED))
    assert lib.vgpu_replay_error(session.replay) == Code.ILLEGAL_ADDRESS
    assert session.grant.get("last_error") == Code.ILLEGAL_ADDRESS


def test_no_fence_passes_behind_a_fault_that_the_driver_knows_already(session: Replayed) -> None:
    """The submission itself is refused then; whoever waits finds the error, and never the fence without it."""
    guest = session.guest
    make_busy(session, 500)
    # All in one go: nothing looks at the device between the fault and the fence.
    guest.put(CallId.cuCtxSetLimit, FAULT, 0)
    guest.put(CallId.wireFence, 0, 3, 1)
    guest.publish()
    assert until(lambda: guest.u32(STICKY) == Code.ILLEGAL_ADDRESS)
    assert not until(lambda: guest.fence(3) != 0, 0.05)


def test_forged_sticky_error_does_not_fool_the_worker(session: Replayed) -> None:
    session.guest.set_u32(STICKY, 700)
    assert session.guest.ask(CallId.cuCtxGetLimit, 0).status == 0


# ---- the lease


def test_without_a_lease_nothing_is_consumed_and_nothing_is_lost(fake_driver: Path) -> None:
    with replayed(fake_driver, leased=False) as session:
        session.grant.set("retry_hint_ns", 777)
        guest = session.guest
        guest.send(CallId.wirePrimaryRetain, CONTEXT, 0)
        assert until(lambda: guest.u32(BUSY) == 1)
        assert guest.u64(BUSY_RETRY) == 777
        assert until(lambda: session.grant.get("demand") == 1)
        assert until(lambda: bool(session.events() & DEMAND))  # is told after it is written down
        time.sleep(0.02)
        assert guest.u64(HEAD) == 0
        session.grant.grant(deadline_ns=0)
        session.kick()
        assert until(lambda: guest.u64(HEAD) == guest.tail)
        assert guest.u32(BUSY) == 0
        assert session.grant.get("demand") == 0
        assert session.grant.get("seen_epoch") == session.grant.get("epoch")


def test_revocation_stops_at_the_next_record_and_is_reported(session: Replayed) -> None:
    guest = session.guest
    session.events()
    epoch = session.grant.revoke()
    session.kick()
    assert until(lambda: session.grant.get("seen_epoch") == epoch)
    assert until(lambda: bool(session.events() & IDLE))
    guest.send(CallId.wireSetContext, CONTEXT)
    assert until(lambda: guest.u32(BUSY) == 1)
    assert told(session) == DEMAND
    session.grant.grant(deadline_ns=0)
    session.kick()
    assert guest.ask(CallId.cuCtxGetLimit, 0).status == 0


def test_a_lease_that_ends_with_work_in_flight_is_reported_when_that_is_done(session: Replayed) -> None:
    guest = session.guest
    began = time.monotonic()
    make_busy(session, 500)
    session.events()
    session.grant.revoke()
    session.kick()
    guest.send(CallId.wireSetContext, CONTEXT)
    assert until(lambda: session.grant.get("demand") == 1)
    assert time.monotonic() - began > 0.5
    assert told(session) == DEMAND
    assert session.grant.get("gpu_ns") > 250_000_000


def test_grant_and_revocation_that_come_together_are_reported(session: Replayed) -> None:
    """The worker may sleep through a lease; its end is reported all the same, or nobody would get the GPU again."""
    guest = session.guest
    session.grant.revoke()
    session.kick()
    guest.send(CallId.wireSetContext, CONTEXT)
    assert until(lambda: bool(session.events() & DEMAND))
    for _ in range(3):
        session.grant.grant(deadline_ns=0)
        session.grant.revoke()
        session.kick()
        assert until(lambda: bool(session.events() & DEMAND))


def test_credits_bound_the_records_of_a_lease(session: Replayed) -> None:
    guest = session.guest
    session.grant.grant(deadline_ns=0, credits=5)
    records = session.grant.get("records")
    for _ in range(8):
        guest.put(CallId.wireSetContext, CONTEXT)
    guest.publish()
    assert until(lambda: session.grant.get("demand") == 1)
    assert session.grant.get("records") == records + 5
    session.grant.grant(deadline_ns=0, credits=5)
    session.kick()
    assert until(lambda: session.grant.get("records") == records + 8)


def test_lease_with_deadline_ends_by_itself(session: Replayed) -> None:
    guest = session.guest
    session.grant.grant(deadline_ns=time.monotonic_ns() + 50_000_000)
    session.kick()
    session.events()
    stop = threading.Event()

    def produce() -> None:
        while not stop.is_set():
            if guest.tail - guest.u64(HEAD) < guest.ring_size // 2:
                guest.send(CallId.wireSetContext, CONTEXT)
            else:  # the worker lags; it must still find records when the lease ends
                time.sleep(0.0005)

    producer = threading.Thread(target=produce)
    producer.start()
    try:
        assert until(lambda: session.grant.get("demand") == 1)
    finally:
        stop.set()
        producer.join()
    assert guest.u64(HEAD) < guest.tail


def test_lease_with_deadline_is_given_back_when_idle(session: Replayed) -> None:
    session.events()
    session.grant.grant(deadline_ns=time.monotonic_ns() + 10_000_000_000)
    session.kick()
    assert until(lambda: bool(session.events() & IDLE), 60)


# ---- contexts


def test_contexts_come_and_go(session: Replayed) -> None:
    guest = session.guest
    other = CONTEXT + 0x10
    assert guest.ask(CallId.wireContextCreate, other, 0).status == 0
    assert guest.ask(CallId.wireContextCreate, other, 0).status == Code.INVALID_VALUE
    guest.send(CallId.wireSetContext, CONTEXT)
    guest.send(CallId.wireSetContext, other)
    guest.ask(CallId.cuCtxGetLimit, 0)
    assert guest.u32(DEFERRED) == 0
    assert guest.ask(CallId.wireContextDestroy, other).status == 0
    assert guest.ask(CallId.wireContextDestroy, other).status == Code.INVALID_HANDLE
    assert guest.ask(CallId.wireContextDestroy, CONTEXT).status == Code.INVALID_CONTEXT
    guest.send(CallId.wireSetContext, other)
    assert guest.ask(CallId.cuCtxSetLimit, 1, 1).status == 0  # the primary one is current again
    assert guest.u32(DEFERRED) == Code.INVALID_CONTEXT


def test_primary_context_can_be_reset_and_retained_again(session: Replayed) -> None:
    guest = session.guest
    for _ in range(3):
        guest.send(CallId.wirePrimaryReset, CONTEXT)
        guest.retain()
        assert guest.ask(CallId.cuCtxSetLimit, 1, 1).status == 0
        guest.send(CallId.wireFenceContext, 3, 1)
    guest.ask(CallId.cuCtxGetLimit, 0)
    assert guest.u32(DEFERRED) == 0


@pytest.mark.parametrize("order", ["before", "after"])
def test_fences_of_a_context_that_outlives_the_primary_one(session: Replayed, order: str) -> None:
    """The segment is registered with the driver in some context, and the driver forgets it with that one: there is always another."""
    guest = session.guest
    other, third = CONTEXT + 0x10, CONTEXT + 0x20
    registered = guest.ask(CallId.cuCtxGetLimit, REGISTERED).values[0]
    if order == "before":
        assert guest.ask(CallId.wireContextCreate, other, 0).status == 0
    guest.send(CallId.wirePrimaryReset, CONTEXT)
    if order == "after":
        assert guest.ask(CallId.wireContextCreate, other, 0).status == 0

    def fence(context: int, value: int) -> None:
        guest.send(CallId.wireSetContext, context)
        make_busy(session, 30)
        guest.send(CallId.wireFence, 0, 3, value)
        assert until(lambda: guest.fence(3) == value)
        assert guest.ask(CallId.cuCtxGetLimit, REGISTERED).values[0] == registered

    fence(other, 1)
    assert guest.ask(CallId.wireContextCreate, third, 0).status == 0
    assert guest.ask(CallId.wireContextDestroy, other).status == 0
    fence(third, 2)
    guest.retain()
    assert guest.ask(CallId.wireContextDestroy, third).status == 0
    fence(CONTEXT, 3)
    assert guest.u32(DEFERRED) == 0


def test_a_registering_context_ends_when_the_others_have_finished(session: Replayed) -> None:
    """Their work may use what is registered in it."""
    guest = session.guest
    other = CONTEXT + 0x10
    assert guest.ask(CallId.wireContextCreate, other, 0).status == 0
    make_busy(session, 100)
    guest.send(CallId.wireFence, 0, 3, 1)
    guest.send(CallId.wirePrimaryReset, CONTEXT)
    assert guest.ask(CallId.cuCtxGetLimit, 0).status == 0
    assert guest.fence(3) == 1
    assert guest.u32(DEFERRED) == 0


# ---- the arena


def test_arena_registration_grows_shrinks_and_refuses(session: Replayed) -> None:
    guest = session.guest
    step = 1 << 20
    register, unregister = CallId.wireArenaRegister, CallId.wireArenaUnregister
    assert guest.arena_size == 4 * step
    assert guest.ask(register, 2 * step, step).status == 0
    assert guest.ask(register, 2 * step, step).status == Code.HOST_MEMORY_ALREADY_REGISTERED
    assert guest.ask(register, 0, step).status == Code.HOST_MEMORY_ALREADY_REGISTERED
    for wrong in (
        (3 * step, 2 * step),
        (3 * step + 1, 4096),
        (3 * step, 0),
        (1 << 63, 1 << 63),
        (4096, 2**64 - 4096),
    ):
        assert guest.ask(register, *wrong).status == Code.INVALID_VALUE
    assert guest.ask(unregister, 2 * step, step).status == 0
    assert guest.ask(unregister, 2 * step, step).status == Code.HOST_MEMORY_NOT_REGISTERED
    assert guest.ask(unregister, 0, 2 * step).status == Code.HOST_MEMORY_NOT_REGISTERED


# ---- host functions


def test_host_function_runs_in_the_guest(session: Replayed) -> None:
    guest = session.guest
    before = guest.u32(CALLBACK_WAKE)
    guest.send(CallId.wireHostFunction, 0, 0x1234, 0x5678, 1)
    assert until(lambda: guest.u32(CALLBACKS) == POSTED)
    assert guest.u32(CALLBACK_WAKE) == before + 1
    assert guest.u32(CALLBACKS + 4) == 1
    assert (guest.u64(CALLBACKS + 8), guest.u64(CALLBACKS + 16)) == (0x1234, 0x5678)
    guest.set_u32(CALLBACKS, DONE)
    assert until(lambda: guest.u32(CALLBACKS) == 0, 60)


def test_more_host_functions_than_entries_wait_their_turn(session: Replayed) -> None:
    guest = session.guest
    for number in range(70):
        guest.send(CallId.wireHostFunction, 0, number + 1, 0, 0)
    seen: set[int] = set()

    def run_some() -> bool:
        for entry in range(64):
            at = CALLBACKS + 64 * entry
            if guest.u32(at) == POSTED:
                seen.add(guest.u64(at + 8))
                guest.set_u32(at, DONE)
        return len(seen) == 70

    assert until(run_some)
    assert seen == set(range(1, 71))


def test_host_function_gives_up_when_the_session_ends(fake_driver: Path) -> None:
    with replayed(fake_driver) as session:
        guest = session.guest
        guest.retain()
        guest.send(CallId.wireHostFunction, 0, 1, 0, 0)
        assert until(lambda: guest.u32(CALLBACKS) == POSTED)
        guest.lifeline.close()
        assert session.joined() == lib.VGPU_RUN_GUEST_GONE
    # close() has seen that no thread is in the function any more.


# ---- the end


def test_goodbye_closes(session: Replayed) -> None:
    session.guest.send(CallId.wireGoodbye)
    assert session.joined() == lib.VGPU_RUN_CLOSED
    assert session.guest.u32(STATE) == CLOSED
    assert session.events() & ENDED


def test_lifeline_end_ends_the_loop(session: Replayed) -> None:
    session.guest.lifeline.close()
    assert session.joined() == lib.VGPU_RUN_GUEST_GONE


def test_stop_ends_the_loop(session: Replayed) -> None:
    lib.vgpu_replay_stop(session.replay)
    assert session.joined() == lib.VGPU_RUN_STOPPED
    assert session.guest.u32(STATE) == DEAD
