# SPDX-License-Identifier: Apache-2.0
"""The supervisor at work, clause by clause, with real actors. docs/supervision.md names these tests."""

from __future__ import annotations

from random import Random
from typing import Any

import attrs
import pytest
import tenacity
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.supervision.workers import Count, Crash, Diary, Finish, Hang, Worker
from vgpu.actors import (
    Actor,
    ActorGone,
    ActorSnapshot,
    ActorState,
    ActorSystem,
    ChildCounts,
    ChildInfo,
    CountChildren,
    Crashed,
    DeleteChild,
    ExitReason,
    Killed,
    Normal,
    Ref,
    RestartChild,
    Shutdown,
    StartChild,
    StartFailed,
    SystemFailed,
    TerminateChild,
    WhichChildren,
    handles,
)
from vgpu.actors.testing import RecordingTracer
from vgpu.supervision import (
    AddChild,
    AutoShutdown,
    Backoff,
    ChildError,
    ChildSpec,
    CrashReport,
    GetChildSpec,
    ReportContext,
    Restart,
    ShutdownMode,
    SpecError,
    Strategy,
    Supervisor,
    SupervisorSpec,
    WaitJittered,
    open_system,
)

P, T, X = Restart.PERMANENT, Restart.TRANSIENT, Restart.TEMPORARY


def quiet(_: object) -> None:
    """A reporter for tests that look at other things."""


def fixed(seconds: float, tries: int = 10) -> Backoff:
    wait = WaitJittered(Random(7), initial_seconds=seconds, maximum_seconds=seconds, factor=1, jitter=0)
    return Backoff(wait, tenacity.stop_after_attempt(tries))


def reports(system: ActorSystem) -> list[tuple[ReportContext, str]]:
    found = system.recent_reports()
    return [(report.context, report.child_id) for report in found if isinstance(report, CrashReport)]


# -- order and strategies


async def test_children_start_left_to_right_and_stop_right_to_left() -> None:
    diary = Diary()
    async with open_system(SupervisorSpec("top", [diary.worker(i) for i in "abc"])):
        assert diary.take() == [("start", "a"), ("start", "b"), ("start", "c")]
    assert diary.take() == [("stop Shutdown", i) for i in "cba"]


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
    async with open_system(spec, reporter=quiet) as system:
        diary.take()
        await system.ref("top/b").send(Crash())
        await wait_all_tasks_blocked()
        assert diary.take() == expected
        assert all(system.ref(f"top/{i}").is_alive for i in "abc")


@pytest.mark.parametrize(
    ("restart", "message", "is_back"),
    [(P, Crash(), 1), (P, Finish(), 1), (T, Crash(), 1), (T, Finish(), 0), (X, Crash(), 0), (X, Finish(), 0)],
)
async def test_restart_type(restart: Restart, message: object, is_back: int) -> None:
    diary = Diary()
    async with open_system(
        SupervisorSpec("top", [diary.worker("a", restart=restart)]), reporter=quiet
    ) as system:
        await system.ref("top/a").send(message)
        await wait_all_tasks_blocked()
        assert diary.of("start") == ["a"] * (1 + is_back)
        assert system.ref("top/a").is_alive is bool(is_back)
        # A temporary child's spec goes with it; a transient one's stays and can be restarted.
        specs = (await system.ref("top").ask(CountChildren())).specs
        assert specs == (0 if restart is X else 1)
        assert system.statistics().restarts == is_back


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_ends_from_outside_are_ends(how: str) -> None:
    diary = Diary()
    async with open_system(SupervisorSpec("top", [diary.worker("a", restart=T)]), reporter=quiet) as system:
        ref = system.ref("top/a")
        ref.kill() if how == "kill" else ref.stop()
        await wait_all_tasks_blocked()
        assert ref.is_alive is (how == "kill")


# -- references and restarts


async def test_a_ref_finds_the_successor() -> None:
    diary = Diary()
    async with open_system(SupervisorSpec("top", [diary.worker("a")]), reporter=quiet) as system:
        ref = system.ref("top/a")
        assert await ref.ask(Count()) == 1
        assert await ref.ask(Count()) == 2
        await ref.send(Crash())
        await wait_all_tasks_blocked()
        assert await ref.ask(Count()) == 1


async def test_an_ask_waits_while_the_target_is_being_restarted(autojump_clock: MockClock) -> None:
    diary = Diary()
    spec = SupervisorSpec("top", [diary.worker("a")], intensity=9, backoff=fixed(2))
    async with open_system(spec, reporter=quiet) as system:
        diary.failures["a"] = 1
        ref = system.ref("top/a")
        await ref.send(Crash())
        await wait_all_tasks_blocked()
        assert not ref.is_alive
        began = trio.current_time()
        assert await ref.ask(Count()) == 1
        assert trio.current_time() - began == pytest.approx(2)


async def test_a_request_that_was_not_begun_goes_to_the_successor(autojump_clock: MockClock) -> None:
    diary = Diary()
    spec = SupervisorSpec("top", [diary.worker("a")], intensity=9, backoff=fixed(2))
    async with open_system(spec, reporter=quiet) as system:
        ref = system.ref("top/a")
        assert await ref.ask(Count()) == 1
        diary.failures["a"] = 2
        ref.send_nowait(Crash())
        # Behind the crash in the mailbox, then in that of a life that does not come up.
        assert await ref.ask(Count(), timeout_seconds=60) == 1
        assert diary.of("start") == ["a", "a"]
        # A message that was only sent has no one to tell: it is a dead letter.
        ref.send_nowait(Crash())
        ref.send_nowait(Finish())
        await trio.sleep(1)
        assert system.statistics().dead_letters_by_type == {"Finish": 1}


async def test_an_ask_ends_when_the_supervisor_gives_up(autojump_clock: MockClock) -> None:
    diary = Diary()
    inner = SupervisorSpec("inner", [diary.worker("a")], intensity=9, backoff=fixed(2, tries=2), restart=X)
    async with open_system(SupervisorSpec("top", [inner]), reporter=quiet) as system:
        diary.failures["a"] = 9
        await system.ref("top/inner/a").send(Crash())
        await wait_all_tasks_blocked()
        began = trio.current_time()
        with pytest.raises(ActorGone):
            await system.ref("top/inner/a").ask(Count(), timeout_seconds=100)
        assert trio.current_time() - began == pytest.approx(2)


async def test_names_may_be_given() -> None:
    diary = Diary()
    async with open_system(
        SupervisorSpec("top", [diary.worker("a", name="ledger")]), reporter=quiet
    ) as system:
        assert await system.ref("ledger").ask(Count()) == 1
        await system.ref("ledger").send(Crash())
        await wait_all_tasks_blocked()
        assert await system.ref("ledger").ask(Count()) == 1


async def test_a_name_that_is_taken_fails_the_start() -> None:
    diary = Diary()
    spec = SupervisorSpec("top", [diary.worker("a", name="x"), diary.worker("b", name="x")])
    with pytest.raises(StartFailed, match="held by a living actor"):
        async with open_system(spec, reporter=quiet):
            raise AssertionError("the block must not run")


# -- intensity and escalation


async def test_intensity_escalates_to_the_root(autojump_clock: MockClock) -> None:
    diary = Diary()
    spec = SupervisorSpec("top", [diary.worker("a")], intensity=1, period_seconds=5)
    with pytest.raises(SystemFailed, match="restart intensity exceeded"):  # noqa: PT012 - the block is what fails
        async with open_system(spec, reporter=quiet) as system:
            await system.ref("top/a").send(Crash())
            await trio.sleep(1)
            await system.ref("top/a").send(Crash())
            await trio.sleep_forever()
    assert diary.of("start") == ["a", "a"]
    assert reports(system)[-1] == (ReportContext.INTENSITY_EXCEEDED, "a")


async def test_restarts_spread_out_go_on_for_ever(autojump_clock: MockClock) -> None:
    diary = Diary()
    spec = SupervisorSpec("top", [diary.worker("a")], intensity=1, period_seconds=5)
    async with open_system(spec, reporter=quiet) as system:
        for _ in range(20):
            await system.ref("top/a").send(Crash())
            await trio.sleep(6)
        assert diary.of("start") == ["a"] * 21
        assert system.statistics().restarts == 20
        assert system.tree()[0].children[0].restarts == 20


async def test_escalation_stops_at_the_first_who_can_restart() -> None:
    diary = Diary()
    inner = SupervisorSpec("inner", [diary.worker(i) for i in "ab"], intensity=0)
    outer = SupervisorSpec("outer", [diary.worker("before"), inner, diary.worker("after")])
    async with open_system(outer, reporter=quiet) as system:
        diary.take()
        await system.ref("outer/inner/a").send(Crash())
        await wait_all_tasks_blocked()
        # The inner supervisor stops its children and itself; the outer one starts it again, and it them.
        assert diary.take() == [
            ("stop Crashed", "a"),
            ("stop Shutdown", "b"),
            ("start", "a"),
            ("start", "b"),
        ]
        node = system.tree()[0].find("outer/inner")
        assert node is not None
        assert node.restarts == 1
        assert isinstance(node.last_exit, Shutdown)
        assert await system.ref("outer/inner/a").ask(Count()) == 1


async def test_a_transient_supervisor_that_gave_up_is_not_restarted() -> None:
    # As in OTP: it ends with `shutdown`, which is no abnormal end.
    diary = Diary()
    inner = SupervisorSpec("inner", [diary.worker("a")], intensity=0, restart=T)
    async with open_system(SupervisorSpec("outer", [inner]), reporter=quiet) as system:
        await system.ref("outer/inner/a").send(Crash())
        await wait_all_tasks_blocked()
        assert not system.ref("outer/inner").is_alive
        assert system.ref("outer").is_alive


# -- restarts that fail


async def test_a_failed_restart_is_tried_again_with_backoff(autojump_clock: MockClock) -> None:
    diary = Diary()
    wait = WaitJittered(Random(7), initial_seconds=1, maximum_seconds=60, jitter=0)
    spec = SupervisorSpec("top", [diary.worker("a")], intensity=9, backoff=Backoff(wait))
    async with open_system(spec, reporter=quiet) as system:
        diary.failures["a"] = 3
        began = trio.current_time()
        await system.ref("top/a").send(Crash())
        await system.ref("top/a").wait_exit()
        # At once, then after 1, 2 and 4 seconds.
        await system.ref("top/a").ask(Count(), timeout_seconds=60)
        assert trio.current_time() - began == pytest.approx(7)
        assert diary.of("fail") == ["a"] * 3
        retries = [r.retry_in_seconds for r in system.recent_reports() if isinstance(r, CrashReport)]
        assert retries == [None, 1, 2, 4]
        # The next failure begins a new count.
        diary.failures["a"] = 1
        began = trio.current_time()
        await system.ref("top/a").send(Crash())
        await system.ref("top/a").wait_exit()
        await system.ref("top/a").ask(Count())
        assert trio.current_time() - began == pytest.approx(1)


async def test_jitter_comes_from_the_generator_that_was_passed_in(autojump_clock: MockClock) -> None:
    async def delays(seed: int) -> list[float | None]:
        diary = Diary()
        backoff = Backoff(WaitJittered(Random(seed), jitter=1))
        spec = SupervisorSpec("top", [diary.worker("a")], intensity=99, backoff=backoff)
        async with open_system(spec, reporter=quiet) as system:
            diary.failures["a"] = 5
            await system.ref("top/a").send(Crash())
            await trio.sleep(60)
            assert system.ref("top/a").is_alive
            return [r.retry_in_seconds for r in system.recent_reports() if isinstance(r, CrashReport)]

    first = await delays(1)
    assert len(first) == 6
    assert await delays(1) == first
    assert await delays(2) != first


async def test_every_try_counts_for_the_intensity(autojump_clock: MockClock) -> None:
    diary = Diary()
    spec = SupervisorSpec("top", [diary.worker("a")], intensity=2, period_seconds=60, backoff=fixed(1))
    with pytest.raises(SystemFailed, match="intensity"):  # noqa: PT012
        async with open_system(spec, reporter=quiet) as system:
            diary.failures["a"] = 99
            await system.ref("top/a").send(Crash())
            await trio.sleep_forever()
    assert diary.of("fail") == ["a", "a"]


async def test_retries_may_run_out(autojump_clock: MockClock) -> None:
    diary = Diary()
    spec = SupervisorSpec("top", [diary.worker("a")], intensity=99, backoff=fixed(1, tries=3))
    with pytest.raises(SystemFailed, match="retries exhausted"):  # noqa: PT012
        async with open_system(spec, reporter=quiet) as system:
            diary.failures["a"] = 99
            await system.ref("top/a").send(Crash())
            await trio.sleep_forever()
    assert diary.of("fail") == ["a"] * 3
    assert reports(system)[-1] == (ReportContext.RETRIES_EXHAUSTED, "a")


async def test_a_child_that_ends_too_soon_after_a_restart_waits_longer_each_time(
    autojump_clock: MockClock,
) -> None:
    diary = Diary()
    wait = WaitJittered(Random(7), initial_seconds=1, maximum_seconds=60, jitter=0)
    backoff = Backoff(wait, reset_after_seconds=10)
    async with open_system(
        SupervisorSpec("top", [diary.worker("a")], intensity=99, backoff=backoff), reporter=quiet
    ) as system:
        ref = system.ref("top/a")

        async def seconds_down() -> float:
            await ref.send(Crash())
            await ref.wait_exit()
            began = trio.current_time()
            await ref.ask(Count(), timeout_seconds=60)
            return trio.current_time() - began

        # The first restart is at once, as in OTP; what follows in less than ten seconds is the same trouble.
        assert [await seconds_down() for _ in range(4)] == [0, 1, 2, 4]
        # Nor is a start that fails on the way a new beginning.
        diary.failures["a"] = 1
        assert await seconds_down() == 8 + 16
        await trio.sleep(9.75)
        assert await seconds_down() == 32
        await trio.sleep(10)
        assert [await seconds_down() for _ in range(2)] == [0, 1]
        retries = [r.retry_in_seconds for r in system.recent_reports() if isinstance(r, CrashReport)]
        assert retries == [None, 1, 2, 4, 8, 16, 32, None, 1]


async def test_a_child_that_never_recovers_is_given_up(autojump_clock: MockClock) -> None:
    diary = Diary()
    backoff = attrs.evolve(fixed(1, tries=3), reset_after_seconds=10)
    with pytest.raises(SystemFailed, match="retries exhausted"):  # noqa: PT012
        async with open_system(
            SupervisorSpec("top", [diary.worker("a")], intensity=99, backoff=backoff), reporter=quiet
        ) as system:
            while True:
                await system.ref("top/a").send(Crash())
                await trio.sleep(2)
    assert diary.of("start") == ["a"] * 4


async def test_a_group_is_down_while_its_first_waits(autojump_clock: MockClock) -> None:
    diary = Diary()
    spec = SupervisorSpec(
        "top",
        [diary.worker("a"), diary.worker("b"), diary.worker("c"), diary.worker("d", restart=X)],
        Strategy.REST_FOR_ONE,
        intensity=99,
        backoff=attrs.evolve(fixed(5), reset_after_seconds=100),
    )
    async with open_system(spec, reporter=quiet) as system:
        top = system.ref("top")
        await system.ref("top/b").send(Crash())
        await trio.sleep(1)
        diary.take()
        await system.ref("top/b").send(Crash())
        await trio.sleep(1)
        assert diary.take() == [("stop Crashed", "b"), ("stop Shutdown", "c")]
        states = {info.id: info.state for info in await top.ask(WhichChildren())}
        assert states == {"a": "running", "b": "restarting", "c": "restarting"}
        await trio.sleep(5)
        assert diary.take() == [("start", "b"), ("start", "c")]
        # Whoever terminates the one that waits has the others back at once.
        await system.ref("top/b").send(Crash())
        await trio.sleep(1)
        await top.ask(TerminateChild("b"))
        assert diary.take() == [("stop Crashed", "b"), ("stop Shutdown", "c"), ("start", "c")]
        # And a shutdown is heard while one waits.
        await top.ask(RestartChild("b"))
        for _ in range(2):
            await system.ref("top/b").send(Crash())
            await trio.sleep(1)
        assert not system.ref("top/b").is_alive
        began = trio.current_time()
    assert trio.current_time() == began
    assert diary.take()[-1] == ("stop Shutdown", "a")


async def test_not_deaf_to_shutdown_between_tries(autojump_clock: MockClock) -> None:
    diary = Diary()
    spec = SupervisorSpec("top", [diary.worker(i) for i in "ab"], intensity=99, backoff=fixed(1000))
    async with open_system(spec, reporter=quiet) as system:
        diary.failures["b"] = 99
        await system.ref("top/b").send(Crash())
        await wait_all_tasks_blocked()
        assert [node.state for node in system.tree()[0].children] == [
            ActorState.RUNNING,
            ActorState.RESTARTING,
        ]
        # Nor to anything else.
        assert (await system.ref("top").ask(CountChildren())).active == 1
        began = trio.current_time()
    assert trio.current_time() == began
    assert diary.lines[-1] == ("stop Shutdown", "a")


class SlowStart(Actor):
    """Takes long to start from its second life on."""

    lives = 0

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        type(self).lives += 1

    async def started(self) -> None:
        if type(self).lives > 1:
            await trio.sleep(self.seconds)

    @handles(Crash)
    def crash(self, message: Crash) -> None:
        raise ValueError(message.text)


async def test_not_deaf_to_shutdown_during_a_slow_start(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlowStart, "lives", 0)
    spec = SupervisorSpec("top", [ChildSpec("a", SlowStart, (1000,), start_timeout_seconds=5000)])
    async with open_system(spec, reporter=quiet) as system:
        await system.ref("top/a").send(Crash())
        await wait_all_tasks_blocked()
        assert system.tree()[0].children[0].state is ActorState.STARTING
        began = trio.current_time()
    assert trio.current_time() == began
    assert system.statistics().alive == 0


class NeverUp(Worker):
    """Does not come out of its start."""

    async def started(self) -> None:
        self.diary.lines.append(("begin", self.label))
        await trio.sleep_forever()


def never_up(diary: Diary, child_id: str) -> ChildSpec:
    return ChildSpec(child_id, NeverUp, (diary, child_id), start_timeout_seconds=5000)


@pytest.mark.parametrize("ends_by", ["the block", "a stop", "its own supervisor"])
async def test_an_end_while_a_start_is_under_way(ends_by: str, autojump_clock: MockClock) -> None:
    """Whoever asked is told, the one that was starting is cut off, and those beside it stop as at any other time."""
    diary = Diary()
    inner = SupervisorSpec("inner", [diary.worker(i) for i in "ab"], restart=X)
    refused: list[str] = []

    async def add(system: ActorSystem, request: AddChild) -> None:
        # Behind the first one, which is being started, the second waits unread.
        with pytest.raises((StartFailed, ActorGone)) as failure:
            await system.ref("top/inner").ask(request, timeout_seconds=1000)
        refused.append(type(failure.value).__name__)

    async with (
        trio.open_nursery() as nursery,
        open_system(SupervisorSpec("top", [inner]), reporter=quiet) as system,
    ):
        for child in (never_up(diary, "c"), diary.worker("d")):
            nursery.start_soon(add, system, AddChild(child))
            await wait_all_tasks_blocked()
        assert diary.take() == [("start", "a"), ("start", "b"), ("begin", "c")]
        began = trio.current_time()
        if ends_by == "a stop":
            system.ref("top/inner").stop()
        elif ends_by == "its own supervisor":
            await system.ref("top").ask(TerminateChild("inner"))
        if ends_by != "the block":
            await wait_all_tasks_blocked()
            assert system.registry.names() == ("top",)
    assert trio.current_time() == began
    assert diary.lines == [("stop Killed", "c"), ("stop Shutdown", "b"), ("stop Shutdown", "a")]
    assert refused == ["StartFailed", "ActorGone"]
    assert system.statistics().alive == 0


async def test_an_end_while_a_tree_is_coming_up(autojump_clock: MockClock) -> None:
    """The first start of a supervisor is broken off too, and what is up already in it ends in order; more of this is
    in test_broken_off_starts.py."""
    diary = Diary()
    inner = SupervisorSpec("inner", [diary.worker("b"), never_up(diary, "c"), diary.worker("d")])
    async with open_system(SupervisorSpec("top", [diary.worker("a")]), reporter=quiet) as system:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_fails_to_add, system, inner.as_child())
            await wait_all_tasks_blocked()
            assert diary.take() == [("start", "a"), ("start", "b"), ("begin", "c")]
            began = trio.current_time()
            system.ref("top").stop()
        await wait_all_tasks_blocked()
        assert trio.current_time() == began
        assert system.registry.names() == ()
    assert diary.lines == [("stop Killed", "c"), ("stop Shutdown", "b"), ("stop Shutdown", "a")]


async def test_an_end_while_a_dynamic_child_starts(autojump_clock: MockClock) -> None:
    diary = Diary()
    template = ChildSpec("session", _one_of, (diary,), start_timeout_seconds=5000)
    spec = SupervisorSpec("top", [template], Strategy.SIMPLE_ONE_FOR_ONE)
    async with open_system(spec, reporter=quiet) as system:
        await system.ref("top").ask(StartChild((Worker, "x")))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_fails_to_start, system, StartChild((NeverUp, "y")))
            await wait_all_tasks_blocked()
            assert diary.take() == [("start", "x"), ("begin", "y")]
            began = trio.current_time()
            system.ref("top").stop()
        await wait_all_tasks_blocked()
        assert trio.current_time() == began
    assert diary.lines == [("stop Killed", "y"), ("stop Shutdown", "x")]


def _one_of(diary: Diary, kind: type[Worker], label: str) -> Actor:
    return kind(diary, label)


async def _fails_to_add(system: ActorSystem, spec: ChildSpec) -> None:
    with pytest.raises(StartFailed, match="the supervisor is stopping"):
        await system.ref("top").ask(AddChild(spec), timeout_seconds=1000)


async def _fails_to_start(system: ActorSystem, request: StartChild) -> None:
    with pytest.raises(StartFailed, match="the supervisor is stopping"):
        await system.ref("top").ask(request, timeout_seconds=1000)


async def test_a_start_may_not_take_for_ever(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlowStart, "lives", 1)
    spec = SupervisorSpec("top", [ChildSpec("a", SlowStart, (1000,), start_timeout_seconds=3)])
    began = trio.current_time()
    with pytest.raises(StartFailed, match="not started in 3 s"):
        async with open_system(spec, reporter=quiet):
            raise AssertionError("the block must not run")
    assert trio.current_time() - began == pytest.approx(3)


async def test_a_failing_first_start_stops_what_was_started() -> None:
    diary = Diary(failures={"c": 1})
    with pytest.raises(StartFailed):
        async with open_system(SupervisorSpec("top", [diary.worker(i) for i in "abcd"]), reporter=quiet):
            raise AssertionError("the block must not run")
    assert diary.take() == [
        ("start", "a"),
        ("start", "b"),
        ("fail", "c"),
        ("stop Crashed", "c"),
        ("stop Shutdown", "b"),
        ("stop Shutdown", "a"),
    ]


async def test_a_failed_restart_of_a_group_is_tried_as_a_group(autojump_clock: MockClock) -> None:
    diary = Diary()
    spec = SupervisorSpec(
        "top",
        [diary.worker(i) for i in "abc"],
        Strategy.ONE_FOR_ALL,
        intensity=9,
        backoff=fixed(1),
    )
    async with open_system(spec, reporter=quiet) as system:
        diary.failures["b"] = 1
        diary.take()
        await system.ref("top/a").send(Crash())
        await wait_all_tasks_blocked()
        assert diary.take() == [
            ("stop Crashed", "a"),
            ("stop Shutdown", "c"),
            ("stop Shutdown", "b"),
            ("start", "a"),
            ("fail", "b"),
            ("stop Crashed", "b"),
        ]
        states = [node.state for node in system.tree()[0].children]
        assert states == [ActorState.RUNNING, ActorState.RESTARTING, ActorState.RESTARTING]
        await trio.sleep(1.5)
        assert diary.take() == [("stop Shutdown", "a"), ("start", "a"), ("start", "b"), ("start", "c")]


async def test_a_pending_try_is_called_off_when_a_sibling_restarts_the_group(
    autojump_clock: MockClock,
) -> None:
    diary = Diary()
    spec = SupervisorSpec(
        "top", [diary.worker(i) for i in "ab"], Strategy.REST_FOR_ONE, intensity=9, backoff=fixed(10)
    )
    async with open_system(spec, reporter=quiet) as system:
        diary.failures["b"] = 1
        await system.ref("top/b").send(Crash())
        await trio.sleep(5)
        await system.ref("top/a").send(Crash())
        await trio.sleep(1)
        assert await system.ref("top/b").ask(Count()) == 1
        await trio.sleep(60)
        # The old timer did not start it a second time.
        assert await system.ref("top/b").ask(Count()) == 2


async def test_a_child_that_waits_for_its_next_try_does_not_start_before_those_it_needs(
    autojump_clock: MockClock,
) -> None:
    diary = Diary()
    spec = SupervisorSpec(
        "top", [diary.worker(i) for i in "ab"], Strategy.REST_FOR_ONE, intensity=9, backoff=fixed(10)
    )
    async with open_system(spec, reporter=quiet) as system:
        diary.failures.update(a=1, b=1)
        await system.ref("top/b").send(Crash())
        await trio.sleep(5)
        diary.take()
        await system.ref("top/a").send(Crash())
        await trio.sleep(30)
        assert diary.take() == [
            ("stop Crashed", "a"),
            ("fail", "a"),
            ("stop Crashed", "a"),
            ("start", "a"),
            ("start", "b"),
        ]


# -- ways of stopping


@pytest.mark.parametrize(
    ("shutdown", "seconds", "reason"),
    [(ShutdownMode.BRUTAL_KILL, 0, "Killed"), (3, 3, "Killed"), (0, 0, "Killed")],
)
async def test_a_child_that_does_not_stop_is_killed(
    shutdown: float | ShutdownMode, seconds: float, reason: str, autojump_clock: MockClock
) -> None:
    diary = Diary()
    async with open_system(
        SupervisorSpec("top", [diary.worker("a", shutdown=shutdown)]), reporter=quiet
    ) as system:
        await system.ref("top/a").send(Hang())
        await wait_all_tasks_blocked()
        began = trio.current_time()
    assert trio.current_time() - began == pytest.approx(seconds)
    assert diary.lines[-1] == (f"stop {reason}", "a")
    # To be killed is an error unless it was the way agreed on.
    expected = [] if shutdown is ShutdownMode.BRUTAL_KILL else [(ReportContext.SHUTDOWN_ERROR, "a")]
    assert reports(system) == expected


async def test_infinity_waits(autojump_clock: MockClock) -> None:
    class Slow(Worker):
        async def stopping(self, reason: ExitReason) -> None:
            await trio.sleep(10_000)

    diary = Diary()
    spec = SupervisorSpec("top", [ChildSpec("a", Slow, (diary, "a"), shutdown=ShutdownMode.INFINITY)])
    async with open_system(spec, reporter=quiet):
        began = trio.current_time()
    assert trio.current_time() - began == pytest.approx(10_000)
    assert diary.lines[-1] == ("stop Shutdown", "a")


async def test_an_unexpected_end_during_shutdown_is_reported() -> None:
    class Bad(Worker):
        async def stopping(self, reason: ExitReason) -> None:
            raise OSError("disk full")

    diary = Diary()
    spec = SupervisorSpec("top", [ChildSpec("a", Bad, (diary, "a")), diary.worker("b")])
    async with open_system(spec, reporter=quiet) as system:
        pass
    assert reports(system) == [(ReportContext.SHUTDOWN_ERROR, "a")]
    assert [what for what, _ in diary.lines][-2:] == ["stop Shutdown", "stop Crashed"]


async def test_a_cancelled_block_stops_in_order() -> None:
    diary = Diary()
    with trio.CancelScope() as scope:
        async with open_system(SupervisorSpec("top", [diary.worker(i) for i in "ab"])):
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert diary.take()[2:] == [("stop Shutdown", "b"), ("stop Shutdown", "a")]


async def test_nested_supervisors_stop_depth_first_in_reverse() -> None:
    diary = Diary()
    spec = SupervisorSpec(
        "top",
        [
            diary.worker("a"),
            SupervisorSpec("inner", [diary.worker("b"), diary.worker("c")]),
            diary.worker("d"),
        ],
    )
    async with open_system(spec):
        assert diary.of("start") == ["a", "b", "c", "d"]
    assert diary.of("stop Shutdown") == ["d", "c", "b", "a"]


async def test_a_killed_supervisor_takes_its_children_along() -> None:
    diary = Diary()
    inner = SupervisorSpec("inner", [diary.worker("a"), diary.worker("b")])
    async with open_system(SupervisorSpec("top", [inner]), reporter=quiet) as system:
        system.ref("top/inner").kill("test")
        await wait_all_tasks_blocked()
        assert sorted(diary.of("stop Killed")) == ["a", "b"]
        # And its own supervisor brings it, and so them, back.
        assert diary.of("start") == ["a", "b", "a", "b"]
        assert await system.ref("top/inner/a").ask(Count()) == 1


async def test_a_killed_tree_leaves_no_name_expected() -> None:
    diary = Diary()
    inner = SupervisorSpec("inner", [diary.worker("a")], restart=X)
    async with open_system(SupervisorSpec("top", [inner]), reporter=quiet) as system:
        system.ref("top/inner").kill()
        await wait_all_tasks_blocked()
        with pytest.raises(ActorGone, match="killed"):
            await system.ref("top/inner/a").ask(Count())
        assert not system.registry.is_expected("top/inner")
        assert not system.registry.is_expected("top/inner/a")


# -- auto_shutdown


@pytest.mark.parametrize(
    ("auto_shutdown", "finishing", "ends"),
    [
        (AutoShutdown.ANY_SIGNIFICANT, "a", True),
        (AutoShutdown.ALL_SIGNIFICANT, "a", False),
        (AutoShutdown.ALL_SIGNIFICANT, "ab", True),
        (AutoShutdown.ANY_SIGNIFICANT, "c", False),
    ],
)
async def test_auto_shutdown(auto_shutdown: AutoShutdown, finishing: str, ends: bool) -> None:
    diary = Diary()
    inner = SupervisorSpec(
        "inner",
        [
            diary.worker("a", restart=T, significant=True),
            diary.worker("b", restart=T, significant=True),
            diary.worker("c", restart=T),
        ],
        auto_shutdown=auto_shutdown,
        restart=T,
    )
    async with open_system(SupervisorSpec("top", [inner]), reporter=quiet) as system:
        for child_id in finishing:
            await system.ref(f"top/inner/{child_id}").send(Finish())
            await wait_all_tasks_blocked()
        assert system.ref("top/inner").is_alive is not ends
        if ends:
            assert not system.ref("top/inner/c").is_alive
            assert system.registry.last_exit("top/inner") == Shutdown("auto_shutdown")


async def test_terminating_a_significant_child_by_hand_is_no_auto_shutdown() -> None:
    diary = Diary()
    spec = SupervisorSpec(
        "top",
        [diary.worker("a", restart=T, significant=True)],
        auto_shutdown=AutoShutdown.ANY_SIGNIFICANT,
    )
    async with open_system(spec, reporter=quiet) as system:
        await system.ref("top").ask(TerminateChild("a"))
        await wait_all_tasks_blocked()
        assert system.ref("top").is_alive


# -- children by hand


async def test_a_childs_spec_can_be_had() -> None:
    diary = Diary()
    spec = SupervisorSpec("top", [diary.worker("a", restart=T)])
    async with open_system(spec, reporter=quiet) as system:
        assert await system.ref("top").ask(GetChildSpec("a")) == spec.children[0]
        with pytest.raises(ChildError, match="no child 'b'"):
            await system.ref("top").ask(GetChildSpec("b"))


async def test_terminate_restart_delete() -> None:
    diary = Diary()
    async with open_system(SupervisorSpec("top", [diary.worker("a")]), reporter=quiet) as system:
        top = system.ref("top")
        with pytest.raises(ChildError, match="child 'a' is running"):
            await top.ask(DeleteChild("a"))
        with pytest.raises(ChildError, match="child 'a' is running"):
            await top.ask(RestartChild("a"))
        await top.ask(TerminateChild("a"))
        await top.ask(TerminateChild("a"))
        assert await top.ask(CountChildren()) == ChildCounts(specs=1, active=0, supervisors=0, workers=1)
        with pytest.raises(ActorGone):
            await system.ref("top/a").ask(Count())
        ref = await top.ask(RestartChild("a"))
        assert await ref.ask(Count()) == 1
        await top.ask(TerminateChild("a"))
        await top.ask(DeleteChild("a"))
        for request in (TerminateChild("a"), RestartChild("a"), DeleteChild("a")):
            with pytest.raises(ChildError, match="there is no child 'a'"):
                await top.ask(request)
        assert system.statistics().restarts == 0


async def test_a_child_restarted_by_hand_may_fail_to() -> None:
    diary = Diary()
    async with open_system(SupervisorSpec("top", [diary.worker("a")]), reporter=quiet) as system:
        await system.ref("top").ask(TerminateChild("a"))
        diary.failures["a"] = 1
        with pytest.raises(StartFailed, match="a cannot start"):
            await system.ref("top").ask(RestartChild("a"))
        assert system.tree()[0].children[0].state is ActorState.STOPPED
        await system.ref("top").ask(RestartChild("a"))


async def test_a_terminated_child_comes_back_with_its_group() -> None:
    # As in OTP: "the child process can later be restarted by the supervisor".
    diary = Diary()
    spec = SupervisorSpec("top", [diary.worker(i) for i in "ab"], Strategy.ONE_FOR_ALL)
    async with open_system(spec, reporter=quiet) as system:
        await system.ref("top").ask(TerminateChild("b"))
        await system.ref("top/a").send(Crash())
        await wait_all_tasks_blocked()
        assert system.ref("top/b").is_alive


async def test_terminating_a_child_that_waits_for_its_next_try(autojump_clock: MockClock) -> None:
    diary = Diary()
    spec = SupervisorSpec(
        "top", [diary.worker(i) for i in "abc"], Strategy.REST_FOR_ONE, intensity=9, backoff=fixed(5)
    )
    async with open_system(spec, reporter=quiet) as system:
        diary.failures["b"] = 9
        await system.ref("top/b").send(Crash())
        await wait_all_tasks_blocked()
        await system.ref("top").ask(TerminateChild("b"))
        states = [node.state for node in system.tree()[0].children]
        # c was down for the sake of b only.
        assert states == [ActorState.RUNNING, ActorState.STOPPED, ActorState.RUNNING]
        await trio.sleep(60)
        assert diary.of("fail") == ["b"]
        assert await system.ref("top/c").ask(Count()) == 1


async def test_add_child() -> None:
    diary = Diary()
    async with open_system(SupervisorSpec("top", [diary.worker("a")]), reporter=quiet) as system:
        top = system.ref("top")
        ref = await top.ask(AddChild(diary.worker("b")))
        assert ref.name == "top/b"
        assert [info.id for info in await top.ask(WhichChildren())] == ["a", "b"]
        with pytest.raises(ChildError, match="there is a child 'b' already"):
            await top.ask(AddChild(diary.worker("b")))
        diary.failures["c"] = 1
        with pytest.raises(StartFailed, match="c cannot start"):
            await top.ask(AddChild(diary.worker("c")))
        with pytest.raises(SpecError, match="'d' is significant"):
            await top.ask(AddChild(diary.worker("d", restart=T, significant=True)))
        with pytest.raises(ChildError, match="use AddChild"):
            await top.ask(StartChild())
        assert [info.id for info in await top.ask(WhichChildren())] == ["a", "b"]
        inner = await top.ask(AddChild(SupervisorSpec("inner", [diary.worker("e")]).as_child()))
        assert (await top.ask(WhichChildren()))[2] == ChildInfo("inner", "top/inner", "running", True, 0)
        assert await top.ask(CountChildren()) == ChildCounts(specs=3, active=3, supervisors=1, workers=2)
        assert inner.is_alive
    assert diary.of("stop Shutdown") == ["e", "b", "a"]


# -- dynamic children


class Session(Worker):
    """A worker whose label is the argument of its start."""


def sessions(diary: Diary, restart: Restart = X, **fields: Any) -> SupervisorSpec:
    template = ChildSpec("session", Session, (diary,), restart=restart)
    return SupervisorSpec("sessions", [template], Strategy.SIMPLE_ONE_FOR_ONE, **fields)


async def test_dynamic_children() -> None:
    diary = Diary()
    async with open_system(sessions(diary), reporter=quiet) as system:
        assert diary.take() == []
        top = system.ref("sessions")
        one = await top.ask(StartChild(("x",)))
        two = await top.ask(StartChild(("y",), id="second"))
        assert (one.name, two.name) == ("sessions/session-1", "sessions/second")
        assert diary.of("start") == ["x", "y"]
        with pytest.raises(ChildError, match="'second' already"):
            await top.ask(StartChild(("z",), id="second"))
        with pytest.raises(SpecError, match="id must be"):
            await top.ask(StartChild(("z",), id="a/b"))
        with pytest.raises(ChildError, match="use StartChild"):
            await top.ask(AddChild(diary.worker("z")))
        await top.ask(TerminateChild("second"))
        assert not two.is_alive
        assert one.is_alive
        await one.send(Finish())
        await wait_all_tasks_blocked()
        assert await top.ask(CountChildren()) == ChildCounts(specs=0, active=0, supervisors=0, workers=0)
        diary.failures["bad"] = 1
        with pytest.raises(StartFailed, match="bad cannot start"):
            await top.ask(StartChild(("bad",)))
        assert system.ref("sessions").is_alive
        assert system.tree()[0].children == ()


async def test_a_dynamic_child_is_restarted_with_its_arguments() -> None:
    diary = Diary()
    async with open_system(sessions(diary, restart=T), reporter=quiet) as system:
        refs: list[Ref[Any]] = [await system.ref("sessions").ask(StartChild((label,))) for label in "xy"]
        await refs[0].send(Crash())
        await wait_all_tasks_blocked()
        assert diary.of("start") == ["x", "y", "x"]
        assert await refs[0].ask(Count()) == 1
        await refs[0].send(Finish())
        await wait_all_tasks_blocked()
        # A dynamic child that has ended for good is forgotten.
        assert [info.name for info in await system.ref("sessions").ask(WhichChildren())] == [refs[1].name]


async def test_what_simple_one_for_one_forbids(autojump_clock: MockClock) -> None:
    diary = Diary()
    async with open_system(sessions(diary, P, intensity=9, backoff=fixed(5)), reporter=quiet) as system:
        top = system.ref("sessions")
        for label in "xy":
            await top.ask(StartChild((label,), id=label))
        diary.failures["y"] = 1
        await system.ref("sessions/y").send(Crash())
        await wait_all_tasks_blocked()
        diary.take()
        before = await top.ask(WhichChildren())
        assert [info.state for info in before] == ["running", "restarting"]
        # As in OTP, whatever the child does; there is none that has ended and is still known.
        for child_id, why in (("x", "is running"), ("y", "is restarting"), ("session", "there is no child")):
            for request in (RestartChild(child_id), DeleteChild(child_id)):
                with pytest.raises(ChildError, match=why):
                    await top.ask(request)
        for spec in (diary.worker("z"), SupervisorSpec("inner", [diary.worker("z")]).as_child()):
            with pytest.raises(ChildError, match="use StartChild"):
                await top.ask(AddChild(spec))
        assert await top.ask(WhichChildren()) == before
        assert diary.lines == []
        # The one that waits for its next try is forgotten when it is terminated: not even then is it for RestartChild.
        await top.ask(TerminateChild("y"))
        with pytest.raises(ChildError, match="there is no child 'y'"):
            await top.ask(RestartChild("y"))
        await trio.sleep(60)
        assert diary.lines == []
        assert await system.ref("sessions/x").ask(Count()) == 1


async def test_dynamic_children_stop_together(autojump_clock: MockClock) -> None:
    diary = Diary()
    async with open_system(sessions(diary), reporter=quiet) as system:
        for number in range(10):
            ref = await system.ref("sessions").ask(StartChild((str(number),)))
            await ref.send(Hang())
        await wait_all_tasks_blocked()
        began = trio.current_time()
    # Each is given five seconds, all at the same time.
    assert trio.current_time() - began == pytest.approx(5)
    assert len(diary.of("stop Killed")) == 10


# -- reports, traces, snapshots


async def test_a_crash_is_reported_with_all_its_facts() -> None:
    diary = Diary()
    got: list[object] = []
    async with open_system(SupervisorSpec("top", [diary.worker("a")]), reporter=got.append) as system:
        await system.ref("top/a").send(Crash("the text"))
        await wait_all_tasks_blocked()
    (report,) = got
    assert isinstance(report, CrashReport)
    assert attrs.evolve(report, time=0, reason=Normal()) == CrashReport(
        0, "top", ReportContext.CHILD_TERMINATED, Normal(), "a", "top/a", P, 5.0, 0
    )
    assert isinstance(report.reason, Crashed)
    text = str(report)
    assert text.startswith("supervisor top: child_terminated\n")
    assert "top/a (id a, permanent, shutdown 5.0 s)" in text
    assert "ValueError: the text" in text
    assert "workers.py" in text


@pytest.mark.parametrize(
    ("restart", "message", "is_reported"),
    [(P, Finish(), True), (T, Finish(), False), (X, Finish(), False), (X, Crash(), True)],
)
async def test_which_ends_are_reported(restart: Restart, message: object, is_reported: bool) -> None:
    diary = Diary()
    async with open_system(
        SupervisorSpec("top", [diary.worker("a", restart=restart)]), reporter=quiet
    ) as system:
        await system.ref("top/a").send(message)
        await wait_all_tasks_blocked()
        assert reports(system) == [(ReportContext.CHILD_TERMINATED, "a")] * is_reported


async def test_restarts_are_traced() -> None:
    tracer = RecordingTracer()
    spec = SupervisorSpec("top", [Diary().worker("a")])
    async with open_system(spec, reporter=quiet, tracer=tracer) as system:
        await system.ref("top/a").send(Crash())
        await wait_all_tasks_blocked()
    assert tracer.of("restarting") == [("top/a", 1)]
    assert tracer.of("spawned") == [("top", None), ("top/a", "top"), ("top/a", "top")]


async def test_the_tree_shows_children_alive_and_not() -> None:
    diary = Diary()
    spec = SupervisorSpec("top", [diary.worker("a", restart=T), SupervisorSpec("inner", [diary.worker("b")])])
    async with open_system(spec, reporter=quiet) as system:
        await system.ref("top/a").send(Finish())
        await wait_all_tasks_blocked()
        (top,) = system.tree()

        def brief(node: ActorSnapshot) -> tuple[str, str, str, list[Any]]:
            return (node.name, node.kind, node.state.value, [brief(child) for child in node.children])

        assert brief(top) == (
            "top",
            "Supervisor",
            "running",
            [
                ("top/a", "Worker", "stopped", []),
                ("top/inner", "Supervisor", "running", [("top/inner/b", "Worker", "running", [])]),
            ],
        )
        assert top.children[0].last_exit == Normal()
        assert top.children[0].mailbox is None
        await system.ref("top").ask(TerminateChild("inner"))
        assert system.tree()[0].children[1].kind == Supervisor.__name__


# -- everything at once


@settings(max_examples=60, deadline=None)
@given(
    strategy=st.sampled_from([Strategy.ONE_FOR_ONE, Strategy.ONE_FOR_ALL, Strategy.REST_FOR_ONE]),
    restarts=st.lists(st.sampled_from(Restart), min_size=1, max_size=4),
    steps=st.lists(
        st.tuples(
            st.integers(0, 3),
            st.sampled_from([Crash(), Finish(), "kill", "stop", "terminate", "restart", "fail next", "wait"]),
        ),
        max_size=15,
    ),
    ends_by_cancel=st.booleans(),
    intensity=st.sampled_from([2, 10_000]),
    is_nested=st.booleans(),
)
def test_whatever_happens(
    strategy: Strategy,
    restarts: list[Restart],
    steps: list[tuple[int, object]],
    ends_by_cancel: bool,
    intensity: int,
    is_nested: bool,
) -> None:
    """Any order of misfortunes: permanent children are always back, nobody lives twice, nothing is left over."""
    diary = Diary()
    ids = "abcd"[: len(restarts)]
    inner = SupervisorSpec(
        "inner",
        [diary.worker(i, restart=restart) for i, restart in zip(ids, restarts, strict=True)],
        strategy,
        intensity=intensity,
        backoff=fixed(1, tries=10_000),
    )
    # With a supervisor above, giving up is no end but a fresh start.
    spec = SupervisorSpec("top", [inner], intensity=10_000) if is_nested else inner
    path = "top/inner" if is_nested else "inner"
    terminated: set[str] = set()

    async def step(system: ActorSystem, child_id: str, what: object) -> None:
        ref = system.ref(f"{path}/{child_id}")
        if what == "kill":
            ref.kill()
        elif what == "stop":
            ref.stop()
        elif what == "fail next":
            diary.failures[child_id] = 2
        elif what == "wait":
            await trio.sleep(10)
        elif what in ("terminate", "restart"):
            request = TerminateChild(child_id) if what == "terminate" else RestartChild(child_id)
            try:
                await system.ref(path).ask(request)
            except (ChildError, StartFailed, ActorGone):
                return
            if what == "terminate":
                terminated.add(child_id)
        else:
            await ref.send(what)

    def check_at_rest(system: ActorSystem) -> None:
        node = next(node for node in system.tree()[0].walk() if node.name == path)
        alive = {child.name: child.state for child in node.children}
        for child_id, restart in zip(ids, restarts, strict=True):
            if restart is P and child_id not in terminated:
                assert alive[f"{path}/{child_id}"] is ActorState.RUNNING
        assert ActorState.RESTARTING not in alive.values()
        assert ActorState.STARTING not in alive.values()
        running = [name for name, state in alive.items() if state is ActorState.RUNNING]
        assert set(system.registry.names()) == {spec.name, path, *running}
        assert system.statistics().alive == len(system.registry.names())

    async def scenario() -> None:
        systems: list[ActorSystem] = []
        with trio.CancelScope() as scope:
            try:
                async with open_system(spec, reporter=quiet) as system:
                    systems.append(system)
                    for number, what in steps:
                        await step(system, ids[number % len(ids)], what)
                    await trio.sleep(60)
                    check_at_rest(system)
                    if ends_by_cancel:
                        scope.cancel()
            except SystemFailed:
                assert not is_nested
                assert intensity == 2
        (system,) = systems
        statistics = system.statistics()
        assert statistics.alive == 0
        ends = statistics.normal + statistics.shut_down + statistics.crashed + statistics.killed
        assert statistics.spawned == ends
        assert system.registry.names() == ()
        assert not any(system.registry.is_expected(f"{path}/{child_id}") for child_id in ids)
        assert not system.registry.is_expected(path)
        # In the diary, too, every life that began has ended, and never two of one id at once.
        living: set[str] = set()
        for what, child_id in diary.lines:
            if what == "start":
                assert child_id not in living
                living.add(child_id)
            elif what.startswith("stop"):
                living.discard(child_id)
        assert living == set()

    trio.run(scenario, clock=MockClock(autojump_threshold=0))


def test_killed_is_what_a_kill_is_called() -> None:
    assert str(Killed("brutal_kill")) == "killed (brutal_kill)"
