# SPDX-License-Identifier: Apache-2.0
"""The stuck-handler detector: what it reports, how often, with what, and that it is gone when it is off."""

from __future__ import annotations

import logging
import math
import threading
import time

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from vgpu.actors import Actor, ActorSpec, StuckHandler, StuckKind, handles, open_system
from vgpu.actors._stuck import StuckDetector


@attrs.frozen
class Sleep:
    seconds: float


@attrs.frozen
class Patient:
    seconds: float


@attrs.frozen
class Hold:
    pass


class Sleeper(Actor):
    def __init__(self, hold: object = None) -> None:
        self._hold = hold

    @handles(Sleep)
    async def sleep(self, message: Sleep) -> None:
        await self.deeper(message.seconds)

    async def deeper(self, seconds: float) -> None:
        await trio.sleep(seconds)

    @handles(Hold)
    def hold(self, _: Hold) -> None:
        assert callable(self._hold)
        self._hold()


SLEEPER = ActorSpec("sleeper", Sleeper)


def quiet(report: object) -> None:
    pass


async def test_a_message_that_takes_too_long_is_reported_once_with_where_it_waits(
    autojump_clock: MockClock,
) -> None:
    reports: list[object] = []
    async with open_system(SLEEPER, reporter=reports.append, stuck_seconds=2) as system:
        ref = system.ref("sleeper")
        began = trio.current_time()
        await ref.send(Sleep(1.4))
        await ref.send(Sleep(30))
        await ref.send(Sleep(1.4))
        await trio.sleep(60)
        (found,) = system.recent_stuck_handlers()
        assert reports == [found]
        assert system.statistics().stuck_handlers == 1
        assert (found.kind, found.actor, found.message_type) == (StuckKind.SLOW_MESSAGE, "sleeper", "Sleep")
        # Seen at the latest one look after it began, told at the latest one look after the threshold.
        assert 2 <= found.seconds <= 2.5
        assert 1.4 + 2 <= found.time - began <= 1.4 + 3
        assert any("in deeper" in line for line in found.stack)
        assert str(found).startswith("actor sleeper (Sleep) has been handling one message for 2.")


async def test_two_slow_messages_of_one_type_are_two(autojump_clock: MockClock) -> None:
    async with open_system(SLEEPER, reporter=quiet, stuck_seconds=2) as system:
        for _ in range(2):
            await system.ref("sleeper").send(Sleep(10))
        await trio.sleep(60)
        assert system.statistics().stuck_handlers == 2


@pytest.mark.parametrize(("limit", "expected"), [(math.inf, 0), (20, 0), (5, 1)])
async def test_an_actor_may_have_its_own_limit(
    limit: float, expected: int, autojump_clock: MockClock
) -> None:
    class Slow(Sleeper):
        stuck_after_seconds = limit

    async with open_system(ActorSpec("slow", Slow), reporter=quiet, stuck_seconds=2) as system:
        await system.ref("slow").send(Sleep(10))
        await trio.sleep(60)
        assert system.statistics().stuck_handlers == expected


async def test_a_step_that_holds_the_loop_is_reported_with_its_stack(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The clock is the test's, and the thread's look is made by the handler itself: nothing here is timed."""
    now = 0.0
    found: list[StuckHandler] = []
    said_meanwhile: list[str] = []

    def hold_the_loop() -> None:
        nonlocal now
        now += 0.9
        detector.look_at_loop()
        assert caplog.messages == []
        now += 2
        looker = threading.Thread(target=detector.look_at_loop)
        looker.start()
        looker.join()
        said_meanwhile.extend(caplog.messages)
        now += 4
        detector.look_at_loop()

    async with open_system() as system:
        detector = StuckDetector(1.0, system.registry.lives, found.append, lambda: now)
        trio.lowlevel.add_instrument(detector)
        try:
            ref = await system.spawn(ActorSpec("sleeper", lambda: Sleeper(hold_the_loop)))
            await ref.send(Hold())
            await wait_all_tasks_blocked()
        finally:
            trio.lowlevel.remove_instrument(detector)
    (one,) = found
    assert (one.kind, one.actor, one.message_type) == (StuckKind.HELD_LOOP, "sleeper", "Hold")
    assert one.seconds == pytest.approx(6.9)
    assert any("in hold_the_loop" in line for line in one.stack)
    assert any("in _receive_until_stopped" in line for line in one.stack)
    # A loop that is held for ever would never come to report it, so the thread says it at once, and only once.
    assert len(said_meanwhile) == len(caplog.messages) == 1
    assert said_meanwhile[0].startswith("so far: actor sleeper (Hold) held the event loop for 2.9")


async def test_a_background_task_and_a_task_of_nobody_are_named_as_such() -> None:
    now = 0.0
    found: list[StuckHandler] = []

    def hold_the_loop() -> None:
        nonlocal now
        now += 2

    class Busy(Actor):
        async def started(self) -> None:
            self.nursery.start_soon(self.work)

        async def work(self) -> None:
            hold_the_loop()

    async with open_system() as system:
        detector = StuckDetector(1.0, system.registry.lives, found.append, lambda: now)
        trio.lowlevel.add_instrument(detector)
        try:
            await system.spawn(ActorSpec("busy", Busy))
            await wait_all_tasks_blocked()
            hold_the_loop()
            await trio.lowlevel.checkpoint()
        finally:
            trio.lowlevel.remove_instrument(detector)
    assert [(one.actor, one.message_type) for one in found] == [("busy", None), (None, None)]
    assert found[0].task.endswith("Busy.work")
    assert str(found[1]).startswith("task ")
    # Nobody looked while it ran.
    assert found[0].stack == ()


async def test_the_thread_looks_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    """The one test here in real time: a handler holds the loop until the thread has spoken."""

    def hold_until_noticed() -> None:
        give_up = time.monotonic() + 20
        while not caplog.messages and time.monotonic() < give_up:
            time.sleep(0.001)

    with caplog.at_level(logging.ERROR, "vgpu.actors"):
        async with open_system(reporter=quiet, stuck_seconds=0.02) as system:
            ref = await system.spawn(ActorSpec("sleeper", lambda: Sleeper(hold_until_noticed)))
            await ref.send(Hold())
            await wait_all_tasks_blocked()
            found = [one for one in system.recent_stuck_handlers() if one.message_type == "Hold"]
    assert [one.kind for one in found] == [StuckKind.HELD_LOOP]
    assert any("in hold_until_noticed" in line for line in found[0].stack)


async def test_off_there_is_nothing_left_of_it(autojump_clock: MockClock) -> None:
    def threads() -> list[threading.Thread]:
        return [one for one in threading.enumerate() if one.name == "stuck-handler detector"]

    def tasks() -> int:
        return trio.lowlevel.current_statistics().tasks_living

    async with open_system(SLEEPER, reporter=quiet) as system:
        before = tasks()
        for thread in threads():  # of the test before; nobody waits for it
            thread.join(60)
        assert threads() == []
        system.watch_handlers(0.01)
        system.watch_handlers(0.01)  # the first of them goes
        await wait_all_tasks_blocked()
        assert tasks() == before + 1
        system.watch_handlers(None)
        await wait_all_tasks_blocked()
        assert tasks() == before
        for thread in threads():
            thread.join(60)
        assert threads() == []
        await system.ref("sleeper").send(Sleep(1000))
        await trio.sleep(2000)
        assert system.statistics().stuck_handlers == 0


@pytest.mark.parametrize("threshold", [0, -1, math.inf, math.nan])
async def test_the_threshold_is_checked(threshold: float) -> None:
    async with open_system() as system:
        with pytest.raises(ValueError, match="threshold must be above 0 seconds and finite"):
            system.watch_handlers(threshold)
