# SPDX-License-Identifier: Apache-2.0
"""Recorders as tracers: what they write down, their bounds, and that they keep no message."""

from __future__ import annotations

import gc
import json
import time
import weakref
from typing import Any

import attrs
import trio
import trio.testing

from vgpu.actors import Actor, ActorSpec, ActorSystem, Request, handles, open_system
from vgpu.actors.messages import LeaseEnded, SessionId, SessionOpened
from vgpu.actors.recorder import ActivityTracer, BothTracers, Recorder


@attrs.frozen(weakref_slot=True)
class Note:
    number: int = 0


@attrs.frozen
class Pause(Request[None]):
    seconds: float


class Reader(Actor):
    @handles(Note)
    def note(self, message: Note) -> None: ...

    @handles(Pause)
    async def pause(self, message: Pause) -> None:
        await trio.sleep(message.seconds)

    @handles(SessionOpened)
    def opened(self, message: SessionOpened) -> None: ...

    @handles(LeaseEnded)
    def ended(self, message: LeaseEnded) -> None: ...


def rows(recorder: Recorder, limit: int = 1000) -> list[list[Any]]:
    return [json.loads(line) for line in recorder.fetch(limit).splitlines()]


async def settle(system: ActorSystem) -> None:
    """Everything sent so far has been handled."""
    await system.ref("reader").ask(Pause(0))


async def test_events_are_rows_on_the_monotonic_clock() -> None:
    async with open_system() as system:
        recorder = Recorder(100)
        system.set_tracer(recorder)
        before = time.monotonic_ns()
        reader = await system.spawn(ActorSpec("reader", Reader))
        await reader.send(Note(7))
        await trio.testing.wait_all_tasks_blocked()  # or the next one is sent before this one is handled
        await settle(system)
        reader.stop()
        await reader.wait_exit()
        system.dead_letter("reader", Note(8))
        found = rows(recorder)
        after = time.monotonic_ns()
    assert [row[0] for row in found] == [
        "spawned", "sent", "received", "handled", "sent", "received", "handled", "exited", "dead_letter",
    ]  # fmt: skip
    times = [row[1] for row in found]
    assert times == sorted(times)
    assert before - 100_000 <= times[0]
    assert times[-1] <= after + 100_000
    sent, received = found[1], found[2]
    assert (sent[2:5], sent[6:]) == (["reader", None, "Note"], [1, None])
    assert received[2:4] == ["reader", "Note"]
    assert received[4] == sent[5]  # one message
    assert 0 <= received[5] < 1_000_000_000
    assert found[-2][2:6] == ["reader", found[0][3], "Shutdown", found[-2][5]]


async def test_it_ends_at_its_limit_and_the_oldest_give_way() -> None:
    async with open_system() as system:
        recorder = Recorder(limit=20, capacity=8)
        system.set_tracer(recorder)
        reader = await system.spawn(ActorSpec("reader", Reader))
        for number in range(3):
            await reader.send(Note(number))
        await settle(system)
        assert (recorder.seen, recorder.is_full, recorder.waiting, recorder.dropped) == (13, False, 8, 5)
        assert len(rows(recorder, 3)) == 3
        for number in range(20):
            await reader.send(Note(number))
        await settle(system)
        assert (recorder.seen, recorder.is_full) == (20, True)
        assert recorder.waiting == 8
        assert recorder.dropped == 20 - 3 - 8
        assert system.tracer is not None  # nothing raised


async def test_a_message_is_not_kept() -> None:
    async with open_system() as system:
        recorder = Recorder(100)
        system.set_tracer(recorder)
        reader = await system.spawn(ActorSpec("reader", Reader))
        note = Note(1)
        gone = weakref.ref(note)
        await reader.send(note)
        del note
        await settle(system)
        gc.collect()
        assert gone() is None
        assert recorder.waiting > 3


async def test_sessions_and_leases_have_their_numbers() -> None:
    opened: list[SessionOpened] = []
    async with open_system() as system:
        recorder = Recorder(100, opened.append)
        system.set_tracer(recorder)
        reader = await system.spawn(ActorSpec("reader", Reader))
        await reader.send(SessionOpened(SessionId(4), 70, reader, vm="red"))
        await reader.send(LeaseEnded(SessionId(4), 1_000, True, 9, 2_000))
        await settle(system)
        details = {row[4]: row[7] for row in rows(recorder) if row[0] == "sent" and row[7]}
    assert [(o.session, o.vm) for o in opened] == [(4, "red")]
    assert details["SessionOpened"] == {
        "session": 4, "vm": "red", "pool": "default", "executor": "reader", "weight": 70, "holding": False,
    }  # fmt: skip
    assert details["LeaseEnded"] == {
        "session": 4, "gpu_ns": 1_000, "held_ns": 2_000, "token": 9, "wants_more": True,
    }  # fmt: skip


async def test_activity_adds_up_and_counts_the_handler_at_hand(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_system() as system:
        activity, recorder = ActivityTracer(limit=1), Recorder(100)
        system.set_tracer(BothTracers([recorder, activity]))
        reader = await system.spawn(ActorSpec("reader", Reader))
        other = await system.spawn(ActorSpec("other", Reader))
        await reader.ask(Pause(2))
        await other.ask(Pause(1))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader.ask, Pause(3))
            await trio.sleep(0.5)
            nursery.start_soon(reader.ask, Pause(1))
            await trio.sleep(1.5)
            assert activity.totals() == {
                "reader": {"messages": 2, "busy_ns": 4_000_000_000, "waited_ns": 0}
            }  # the limit leaves the other one out
        assert activity.totals() == {
            "reader": {"messages": 3, "busy_ns": 6_000_000_000, "waited_ns": 2_500_000_000}
        }
        reader.kill()
        await reader.wait_exit()
        assert activity.totals()["reader"]["busy_ns"] == 6_000_000_000
        assert recorder.seen > 10
