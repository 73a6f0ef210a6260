# SPDX-License-Identifier: Apache-2.0
"""The core by events: claims, grants, every kind of end, mediators that come and go, silence, counters."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transport.stub.conftest import SLOTS, Bench
from vgpu.transport.errors import RemoteProtocolError
from vgpu.transport.stub import core
from vgpu.transport.stub import effects as do
from vgpu.transport.stub.messages import (
    Claim,
    Client,
    Counters,
    Ending,
    Freed,
    Granted,
    Hello,
    Refuse,
    Released,
    SlotReport,
    Status,
    Stop,
    Withdrawn,
)
from vgpu.transport.vfio_user.pci import Variant
from vgpu.transport.vfio_user.registers import DeviceStatus, SlotRegister, SlotState


def test_a_claim_is_told_granted_released_and_freed(bench: Bench) -> None:
    bench.connect()
    geometry = bench.registers.geometry
    assert bench.said() == [
        Hello(
            *("vm1", 4711, geometry.bar1_size, SLOTS, geometry.first_slot, geometry.slot_size),
            *(Variant.EXPRESS, False, (), 1, 0x1234),
        )
    ]
    bench.peek.programs[0] = b"oll\nama\xff\0left over"
    bench.claim(pid=5)
    assert bench.state() is SlotState.PENDING, "shown before the guest's store is answered"
    assert bench.said() == [Claim(0, 77, 5, "oll?ama�")]
    bench.grant()
    assert bench.state() is SlotState.READY
    assert bench.take() == [do.Say(Granted(0, 9)), do.WatchWorker(0, 102)]
    view = bench.shown[0]
    assert (view.token, view.pid, view.session, view.worker_address) == (77, 5, 9, 0x2000_0000_0000)
    bench.write(0, SlotRegister.DOORBELL, 1)
    assert bench.take() == [do.RingDoorbell(101)]

    bench.release()
    assert bench.state() is SlotState.RELEASING
    assert bench.take() == [do.Say(Released(0, 9, Ending.GUEST)), do.EndLifeline(101)]
    bench.sleep(1)
    assert [e for e in bench.take() if not isinstance(e, do.Say)] == [], "the worker may still write"
    bench.worker_gone()
    assert bench.take() == [do.CloseDescriptors((101, 102)), do.ZeroSlot(0)]
    assert bench.state() is SlotState.RELEASING
    bench.zeroed()
    assert bench.said() == [Freed(0)]
    assert bench.state() is SlotState.FREE
    assert bench.shown[0].token == bench.shown[0].session == 0
    bench.claim(token=78)
    assert bench.said() == [Claim(0, 78, 5, "oll?ama�")]


def test_claims_wait_for_a_mediator_and_are_told_to_the_next(bench: Bench) -> None:
    bench.claim(0)
    bench.claim(2, token=5)
    assert bench.take() == []
    bench.connect()
    hello, *claims = bench.said()
    assert isinstance(hello, Hello)
    assert hello.slots == (
        SlotReport(0, SlotState.PENDING, 77, 5, 0),
        SlotReport(2, SlotState.PENDING, 5, 5, 0),
    )
    assert claims == [Claim(0, 77, 5, ""), Claim(2, 5, 5, "")]
    bench.did(bench.core.mediator_gone(bench.now))
    bench.connect()
    assert bench.said()[1:] == claims


def test_a_mediator_dies_sessions_go_on_and_its_successor_finds_them(bench: Bench) -> None:
    bench.connect()
    bench.command(Status(True, False, 13000))
    assert bench.head == do.WriteHead(DeviceStatus.HOST_PRESENT, 0, 13000)
    bench.own(1)
    bench.take()
    bench.did(bench.core.mediator_gone(bench.now))
    assert bench.head == do.WriteHead(DeviceStatus(0), 0, 13000)
    assert bench.state(1) is SlotState.READY
    bench.write(1, SlotRegister.DOORBELL, 1)
    assert bench.take() == [do.RingDoorbell(101)]
    bench.connect()
    [hello] = bench.said()
    assert isinstance(hello, Hello)
    assert hello.slots == (SlotReport(1, SlotState.READY, 77, 5, 10),)
    bench.command(Status(True, True, 13000))
    assert bench.head == do.WriteHead(DeviceStatus.HOST_PRESENT | DeviceStatus.QUARANTINED, 0, 13000)


def test_a_newer_mediator_replaces_one_that_is_there(bench: Bench) -> None:
    bench.connect()
    bench.command(Status(True, False, 13000))
    bench.take()
    bench.connect()
    assert bench.head is not None
    assert bench.head.status == DeviceStatus(0), "the new one has not said yet that it is ready"
    assert isinstance(bench.said()[0], Hello)


def test_a_refusal_is_shown_and_released(bench: Bench) -> None:
    bench.connect()
    bench.claim()
    bench.command(Refuse(0, 77, 1, 250))
    assert bench.state() is SlotState.REFUSED
    assert (bench.shown[0].refusal, bench.shown[0].retry_milliseconds) == (1, 250)
    bench.take()
    bench.release()
    assert bench.take() == [do.Say(Released(0, 0, Ending.GUEST)), do.ZeroSlot(0)]


def test_a_claim_nobody_heard_of_is_freed_at_once(bench: Bench) -> None:
    bench.claim()
    bench.release()
    assert bench.take() == [do.ZeroSlot(0)]


def test_a_claim_that_went_away_keeps_its_slot_until_it_is_answered(bench: Bench) -> None:
    bench.connect()
    bench.claim()
    bench.release()
    assert bench.said()[1:] == [Claim(0, 77, 5, ""), Released(0, 0, Ending.GUEST)]
    bench.sleep(core.ANSWER_SECONDS - 1)
    bench.take()
    bench.grant(session=9)
    assert bench.take() == [
        do.EndLifeline(101),
        do.Say(Withdrawn(0, 9)),
        do.WatchWorker(0, 102),
    ]
    assert bench.state() is SlotState.RELEASING, "the worker is in the slot still"
    bench.worker_gone()
    assert bench.take() == [do.CloseDescriptors((101, 102)), do.ZeroSlot(0)]
    bench.zeroed()
    assert bench.state() is SlotState.FREE


def test_a_refusal_of_a_claim_that_went_away_frees_its_slot(bench: Bench) -> None:
    bench.connect()
    bench.claim()
    bench.release()
    bench.take()
    bench.command(Refuse(0, 12345, 3, 0))
    assert bench.take() == [], "that is another claim"
    bench.command(Refuse(0, 77, 3, 0))
    assert bench.take() == [do.ZeroSlot(0)]
    bench.command(Refuse(0, 77, 3, 0))
    assert bench.take() == [], "and that was said already"


@pytest.mark.parametrize("mediator_stays", [True, False])
def test_an_answer_that_does_not_come_is_not_waited_for_for_ever(bench: Bench, mediator_stays: bool) -> None:
    bench.connect()
    bench.claim()
    bench.release()
    if not mediator_stays:
        bench.did(bench.core.mediator_gone(bench.now))
    bench.sleep((core.ANSWER_SECONDS if mediator_stays else core.ORPHAN_SECONDS) - 0.1)
    assert bench.of(do.ZeroSlot) == []
    bench.sleep(0.2)
    assert bench.of(do.ZeroSlot) == [do.ZeroSlot(0)]
    bench.zeroed()
    bench.claim(token=78)
    bench.take()
    bench.grant(token=77)
    assert bench.take() == [
        do.EndLifeline(101),
        *([do.Say(Withdrawn(0, 9))] if mediator_stays else []),
        do.CloseDescriptors((101, 102)),
    ]
    assert bench.state() is SlotState.PENDING


def test_a_claim_released_without_its_mediator_keeps_its_slot_for_a_while_too(bench: Bench) -> None:
    bench.connect()
    bench.claim()
    bench.did(bench.core.mediator_gone(bench.now))
    bench.release()
    bench.connect()
    bench.sleep(core.ORPHAN_SECONDS - 0.1)
    assert bench.of(do.ZeroSlot) == []
    bench.sleep(0.2)
    assert bench.of(do.ZeroSlot) == [do.ZeroSlot(0)]


def test_a_worker_that_ends_leaves_a_moment_to_say_why_then_the_session_is_dead(bench: Bench) -> None:
    bench.connect()
    bench.own()
    bench.take()
    bench.worker_gone()
    assert bench.take() == [do.CloseDescriptors((101, 102))]
    assert bench.state() is SlotState.READY
    bench.sleep(core.GRACE_SECONDS / 2)
    assert bench.of(do.MarkDead) == []
    bench.sleep(core.GRACE_SECONDS)
    assert bench.take() == [do.MarkDead(0)]
    assert bench.state() is SlotState.DEAD
    bench.write(0, SlotRegister.DOORBELL, 1)
    assert bench.take() == []
    bench.release()
    assert bench.take() == [do.Say(Released(0, 9, Ending.WORKER)), do.ZeroSlot(0)]


def test_a_release_in_that_moment_needs_no_mark(bench: Bench) -> None:
    bench.connect()
    bench.own()
    bench.worker_gone()
    bench.release()
    bench.zeroed()
    bench.claim(token=78)
    bench.sleep(1)
    assert bench.of(do.MarkDead) == []
    assert bench.state() is SlotState.PENDING


def test_a_worker_that_does_not_leave_is_killed_only_if_no_mediator_can(bench: Bench) -> None:
    bench.connect()
    bench.own()
    bench.release()
    bench.sleep(core.KILL_SECONDS * 3)
    assert bench.of(do.KillWorker) == []
    bench.did(bench.core.mediator_gone(bench.now))
    bench.sleep(1.1)
    assert bench.of(do.KillWorker) == [do.KillWorker(0, 102)]
    assert bench.of(do.ZeroSlot) == []
    bench.worker_gone()
    assert bench.of(do.ZeroSlot) == [do.ZeroSlot(0)]


def test_without_a_mediator_a_worker_has_five_seconds(bench: Bench) -> None:
    bench.connect()
    bench.own()
    bench.did(bench.core.mediator_gone(bench.now))
    bench.release()
    bench.sleep(core.KILL_SECONDS - 0.1)
    assert bench.of(do.KillWorker) == []
    bench.sleep(0.2)
    assert bench.of(do.KillWorker) == [do.KillWorker(0, 102)]


def test_a_reset_ends_every_session_and_each_slot_waits_for_its_own_worker(bench: Bench) -> None:
    bench.connect()
    bench.own(0, (101, 102))
    bench.own(1, (201, 202))
    bench.claim(2)
    bench.take()
    bench.reset()
    assert bench.head is not None
    assert bench.head.generation == 1
    assert bench.said() == [
        Released(0, 9, Ending.RESET),
        Released(1, 10, Ending.RESET),
        Released(2, 0, Ending.RESET),
    ]
    bench.worker_gone(1, 202)
    assert bench.of(do.ZeroSlot) == [do.ZeroSlot(1)]
    bench.zeroed(1)
    assert [bench.state(slot) for slot in range(4)] == [
        *(SlotState.RELEASING, SlotState.FREE, SlotState.RELEASING, SlotState.FREE)
    ]


def test_a_reset_of_an_empty_device_still_shows_in_the_directory(bench: Bench) -> None:
    bench.reset()
    assert bench.take() == []
    assert bench.head is not None
    assert bench.head.generation == 1


def test_the_end_of_another_process_means_nothing(bench: Bench) -> None:
    bench.connect()
    bench.own()
    bench.take()
    bench.worker_gone(0, 999)
    bench.worker_gone(3, 102)
    bench.sleep(0.5)
    assert bench.take() == []
    assert bench.state() is SlotState.READY


def test_a_slot_that_is_not_there_is_the_mediators_fault(bench: Bench) -> None:
    bench.connect()
    bench.take()
    with pytest.raises(RemoteProtocolError, match="slot 4"):
        bench.grant(SLOTS)
    with pytest.raises(RemoteProtocolError, match="slot 4294967295"):
        bench.command(Refuse(0xFFFFFFFF, 1, 1))
    assert bench.take() == []


def test_it_leaves_when_told_to_and_when_nobody_was_there_for_ten_minutes(bench: Bench) -> None:
    bench.command(Stop())
    assert bench.take() == [do.Leave("told to stop")]
    bench.did(bench.core.client(True, bench.now))
    bench.sleep(1000, step=10)
    assert bench.take() == []
    bench.did(bench.core.client(False, bench.now))
    bench.sleep(core.ABANDONED_SECONDS - 10, step=10)
    bench.connect()
    bench.sleep(1000, step=10)
    assert bench.of(do.Leave) == []
    bench.did(bench.core.mediator_gone(bench.now))
    bench.sleep(core.ABANDONED_SECONDS - 10, step=10)
    assert bench.of(do.Leave) == []
    bench.sleep(10, step=10)
    assert len(bench.of(do.Leave)) == 1


def test_counters_are_told_once_a_second_while_they_change(bench: Bench) -> None:
    bench.connect()
    bench.claim()
    bench.claim()  # lost: a claim all the same to whoever counts stores, but the slot has an owner
    bench.grant()
    bench.write(0, SlotRegister.DOORBELL, 1)
    bench.write(0, SlotRegister.STATE, 1)
    bench.peek.reads = 3
    bench.take()
    bench.sleep(5)
    assert bench.said() == [Counters(3, 4, 1, 1, 1)]
    bench.peek.reads = 4
    bench.sleep(5)
    assert bench.said() == [Counters(4, 4, 1, 1, 1)]
    bench.connect()
    bench.take()
    bench.sleep(2)
    assert bench.said() == [Counters(4, 4, 1, 1, 1)], "a new mediator has not heard them"


def test_clients_are_told(bench: Bench) -> None:
    bench.connect()
    bench.take()
    bench.did(bench.core.client(True, bench.now))
    assert bench.said() == [Client(True)]
    bench.connect()
    [hello] = bench.said()
    assert isinstance(hello, Hello)
    assert hello.connected


def test_a_call_is_started_with_what_the_guest_wrote_and_cancelled_by_a_release(bench: Bench) -> None:
    bench.connect()
    bench.own()
    bench.write(0, SlotRegister.CALL_HEADER + 4, 8)
    bench.write(0, 0x400, 0x1122334455667788, 8)
    bench.write(0, SlotRegister.CALL_SUBMIT, 77)
    [call] = bench.of(do.StartCall)
    assert (call.slot, call.header[4:8], len(call.header)) == (0, b"\x08\0\0\0", 80)
    assert call.payload == bytes.fromhex("8877665544332211")
    assert bench.core.is_ready(0)
    bench.release()
    assert bench.of(do.CancelCall) == [do.CancelCall(0)]
    assert not bench.core.is_ready(0)


# ---- silence ---------------------------------------------------------------------------------------------------


def full(bench: Bench) -> None:
    bench.connect()
    for slot in range(SLOTS):
        bench.own(slot, (slot * 2 + 100, slot * 2 + 101))
    bench.sleep(1)
    bench.take()


def live(bench: Bench, seconds: int, *slots: int) -> None:
    """The heartbeats of these slots move, the others' do not."""
    for _ in range(seconds):
        for slot in slots:
            bench.peek.beats[slot] = bench.peek.beats.get(slot, 0) + 1
        bench.sleep(1)


def test_the_longest_silent_session_gives_way_when_no_slot_is_free(bench: Bench) -> None:
    full(bench)
    live(bench, 5, 0, 1, 3)
    live(bench, 54, 0, 3)
    assert bench.of(do.EndLifeline) == []
    live(bench, 2, 0, 3)
    assert bench.of(do.EndLifeline) == [do.EndLifeline(104)]
    assert Released(2, 11, Ending.SILENCE) in bench.said()
    assert bench.state(2) is SlotState.RELEASING
    live(bench, 30, 0, 3)
    assert bench.of(do.EndLifeline) == [], "one on its way is enough"
    bench.worker_gone(2, 105)
    bench.zeroed(2)
    live(bench, 30, 0, 3)
    assert bench.of(do.EndLifeline) == [], "and so is a free one"
    bench.claim(2)
    live(bench, 2, 0, 3)
    assert bench.of(do.EndLifeline) == [do.EndLifeline(102)]


def test_silence_does_not_matter_while_a_slot_is_free(bench: Bench) -> None:
    bench.connect()
    for slot in range(SLOTS - 1):
        bench.own(slot, (slot * 2 + 100, slot * 2 + 101))
    live(bench, 300, 0)
    assert bench.of(do.EndLifeline) == []


def test_a_vm_that_stands_still_loses_nothing(bench: Bench) -> None:
    full(bench)
    live(bench, 30, 0, 1, 2, 3)
    bench.sleep(100_000, step=100)
    assert bench.of(do.EndLifeline) == []
    # It goes on: one heartbeat comes before the others, which had no time to move.
    live(bench, 3, 0)
    live(bench, 120, 0, 1, 2, 3)
    assert bench.of(do.EndLifeline) == []


def test_a_trapped_access_is_a_sign_of_life_too(bench: Bench) -> None:
    full(bench)
    for _ in range(60):
        bench.peek.reads += 1
        bench.sleep(1)
    assert len(bench.of(do.EndLifeline)) == 1


def test_a_new_session_has_its_minute(bench: Bench) -> None:
    full(bench)
    live(bench, 50, 0, 1, 2)
    bench.release(3)
    bench.worker_gone(3, 107)
    bench.zeroed(3)
    bench.claim(3)
    bench.grant(3, session=99, fds=(300, 301))
    bench.effects.clear()
    live(bench, 55, 0, 1, 2)
    assert bench.of(do.EndLifeline) == []
    live(bench, 10, 0, 1, 2)
    assert bench.of(do.EndLifeline) == [do.EndLifeline(300)]


# ---- the promise -----------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *("claim", "release", "reset", "grant", "refuse", "gone", "zeroed", "sleep", "connect"),
                "disconnect",
            ]
        ),
        st.integers(0, 1),
        st.integers(1, 6),
    ),
    min_size=30,
    max_size=80,
)


@given(STEPS)
@settings(deadline=None, max_examples=150)
def test_a_slot_is_never_free_while_a_worker_may_write_into_it(steps: list[tuple[str, int, int]]) -> None:
    """Any order of events: descriptors are closed once, a FREE slot was zeroed after its last worker's end."""
    bench = Bench()
    fds = 100
    alive: dict[int, int] = {}  # pidfd -> slot, of workers that the core watches
    clean = dict.fromkeys(range(SLOTS), True)
    zeroing: set[int] = set()
    closed: list[int] = []
    given: list[int] = []
    bench.connect()
    connected = True
    for what, slot, number in steps:
        # Mostly the token that fits: of the owner, or of a claim that went away.
        token = bench.registers.owner(slot)[0] if number > 1 else 99
        state = bench.registers.state(slot)
        if what == "claim":
            bench.claim(slot, token=number)
        elif what == "release":
            bench.release(slot, token=token)
        elif what == "reset":
            bench.reset()
        elif what == "grant" and connected:
            fds += 2
            given += [fds, fds + 1]
            bench.grant(slot, token=token, session=fds, fds=(fds, fds + 1))
        elif what == "refuse" and connected:
            bench.command(Refuse(slot, token, 3))
        elif what == "gone":
            for process in [p for p, s in alive.items() if s == slot][:1]:
                del alive[process]
                bench.worker_gone(slot, process)
        elif what == "zeroed" and slot in zeroing:
            zeroing.discard(slot)
            clean[slot] = True
            bench.zeroed(slot)
        elif what == "sleep":
            bench.sleep(number * 20)
        elif what == "connect":
            bench.connect()
            connected = True
        elif what == "disconnect" and connected:
            bench.did(bench.core.mediator_gone(bench.now))
            connected = False
        for effect in bench.take():
            if isinstance(effect, do.WatchWorker):
                assert effect.process not in alive
                alive[effect.process] = effect.slot
            elif isinstance(effect, do.ZeroSlot):
                assert effect.slot not in alive.values()
                assert effect.slot not in zeroing
                zeroing.add(effect.slot)
            elif isinstance(effect, do.CloseDescriptors):
                closed += effect.descriptors
        if state is not SlotState.FREE:
            clean[slot] = clean[slot] and bench.registers.state(slot) is SlotState.FREE
        for index in range(SLOTS):
            if bench.state(index) is not SlotState.FREE:
                clean[index] = False
            assert bench.registers.state(index) is not SlotState.FREE or clean[index]
            assert bench.registers.state(index) is not SlotState.FREE or index not in alive.values()
    # Descriptors that are not closed belong to workers that live.
    assert len(closed) == len(set(closed))
    assert set(given) - set(closed) == {p for p in alive} | {p - 1 for p in alive}
