# SPDX-License-Identifier: Apache-2.0
"""The supervisor at work: each strategy, restart type and way of stopping, with real actors."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.supervision.workers import Count, Crash, Diary, Finish
from vgpu.actors import Ref, StartChild, StartFailed, SystemFailed, TerminateChild
from vgpu.supervision import Restart, Strategy, SupervisorSpec, open_system


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (Strategy.ONE_FOR_ONE, [("stop Crashed", "b"), ("start", "b")]),
        (
            Strategy.REST_FOR_ONE,
            [("stop Crashed", "b"), ("stop Shutdown", "c"), ("start", "b"), ("start", "c")],
        ),
        (
            Strategy.ONE_FOR_ALL,
            [
                ("stop Crashed", "b"),
                ("stop Shutdown", "c"),
                ("stop Shutdown", "a"),
                ("start", "a"),
                ("start", "b"),
                ("start", "c"),
            ],
        ),
    ],
)
async def test_strategy(strategy: Strategy, expected: list[tuple[str, str]]) -> None:
    diary = Diary()
    spec = SupervisorSpec("top", [diary.worker(i) for i in "abc"], strategy)
    async with open_system(spec, reporter=lambda _: None) as system:
        assert diary.take() == [("start", "a"), ("start", "b"), ("start", "c")]
        await system.ref("top/b").send(Crash())
        await wait_all_tasks_blocked()
        assert diary.take() == expected
    assert diary.take() == [("stop Shutdown", i) for i in "cba"]


async def test_a_ref_finds_the_successor() -> None:
    diary = Diary()
    async with open_system(SupervisorSpec("top", [diary.worker("a")]), reporter=lambda _: None) as system:
        ref: Ref[Crash] = system.ref("top/a")
        assert await ref.ask(Count()) == 1
        assert await ref.ask(Count()) == 2
        await ref.send(Crash())
        # No waiting in between: the ask meets the mailbox of the dying, or the name that is expected back.
        await trio.testing.wait_all_tasks_blocked()
        assert await ref.ask(Count()) == 1


async def test_dynamic_children() -> None:
    diary = Diary()
    spec = SupervisorSpec(
        "top",
        [diary.worker("session", restart=Restart.TEMPORARY)],
        Strategy.SIMPLE_ONE_FOR_ONE,
    )
    async with open_system(spec, reporter=lambda _: None) as system:
        assert diary.take() == []
        top = system.ref("top")
        one = await top.ask(StartChild())
        two = await top.ask(StartChild(id="second"))
        assert (one.name, two.name) == ("top/session-1", "top/second")
        assert await two.ask(Count()) == 1
        await top.ask(TerminateChild("second"))
        assert not two.is_alive
        assert one.is_alive
        await one.send(Finish())
        await wait_all_tasks_blocked()
        assert system.tree()[0].children == ()


async def test_intensity_escalates_to_the_root(autojump_clock: MockClock) -> None:
    diary = Diary()
    spec = SupervisorSpec("top", [diary.worker("a")], intensity=1, period_seconds=5)
    with pytest.raises(SystemFailed, match="intensity"):  # noqa: PT012 - the block is what fails
        async with open_system(spec, reporter=lambda _: None) as system:
            await system.ref("top/a").send(Crash())
            await trio.sleep(1)
            await system.ref("top/a").send(Crash())
            await trio.sleep_forever()
    assert diary.of("start") == ["a", "a"]


async def test_a_failing_start_stops_what_was_started() -> None:
    diary = Diary(failures={"c": 1})
    with pytest.raises(StartFailed):
        async with open_system(
            SupervisorSpec("top", [diary.worker(i) for i in "abc"]), reporter=lambda _: None
        ):
            raise AssertionError("the block must not run")
    assert diary.take() == [
        ("start", "a"),
        ("start", "b"),
        ("fail", "c"),
        ("stop Crashed", "c"),
        ("stop Shutdown", "b"),
        ("stop Shutdown", "a"),
    ]


async def test_a_cancelled_block_stops_in_order() -> None:
    diary = Diary()
    with trio.CancelScope() as scope:
        async with open_system(SupervisorSpec("top", [diary.worker(i) for i in "ab"])):
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert diary.take()[2:] == [("stop Shutdown", "b"), ("stop Shutdown", "a")]
