# SPDX-License-Identifier: Apache-2.0
"""Trees whose start is broken off halfway: by a stop from above, by a limit, by a child that fails, by a kill.

Supervisors below supervisors, so that the one that is told is not the one whose child is starting. What is up ends in
reverse order and has its own time to; a kill waits for none of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from itertools import count

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from vgpu.actors import Actor, ActorSpec, ActorSystem, Crashed, ExitReason, NameTaken, Shutdown, StartFailed
from vgpu.supervision import (
    AddChild,
    ChildKind,
    ChildSpec,
    CrashReport,
    ReportContext,
    ShutdownMode,
    SupervisorSpec,
    open_system,
)

BRUTAL, INFINITY = ShutdownMode.BRUTAL_KILL, ShutdownMode.INFINITY
NEVER = math.inf
# When, what, who.
Line = tuple[float, str, str]


@attrs.frozen
class Leaf:
    """A worker: how long it takes to start and to stop, and how long it may for the latter."""

    start_seconds: float = 0.0
    stop_seconds: float = 0.0
    shutdown: float | ShutdownMode = 5.0
    fails: bool = False


Tree = list["Leaf | Tree"]


@attrs.define(eq=False)
class Story:
    """Who started and ended, and when, since its beginning."""

    began: float = attrs.Factory(trio.current_time)
    lines: list[Line] = attrs.Factory(list)

    def write(self, what: str, who: str) -> None:
        self.lines.append((trio.current_time() - self.began, what, who))

    def take(self) -> list[Line]:
        taken, self.lines = self.lines, []
        return taken


class Member(Actor):
    def __init__(self, story: Story, label: str, leaf: Leaf) -> None:
        self.story, self.label, self.leaf = story, label, leaf

    async def started(self) -> None:
        await trio.sleep(self.leaf.start_seconds)
        if self.leaf.fails:
            raise RuntimeError(f"{self.label} cannot start")
        self.story.write("start", self.label)

    async def stopping(self, reason: ExitReason) -> None:
        await trio.sleep(self.leaf.stop_seconds)

    async def stopped(self, reason: ExitReason) -> None:
        self.story.write(f"stop {type(reason).__name__}", self.label)


def tree_of(story: Story, tree: Tree, name: str = "top", numbers: count[int] | None = None) -> SupervisorSpec:
    """The specs; leaves are called by their place in the order of starts."""
    numbers = count() if numbers is None else numbers
    children: list[ChildSpec] = []
    for one in tree:
        label = str(next(numbers)) if isinstance(one, Leaf) else f"{len(children)}-of-{name}"
        if isinstance(one, Leaf):
            spec = ChildSpec(
                label, Member, (story, label, one), shutdown=one.shutdown, start_timeout_seconds=1000
            )
        else:
            spec = tree_of(story, one, label, numbers).as_child()
        children.append(spec)
    return SupervisorSpec(name, children)


def leaves_of(tree: Tree) -> list[Leaf]:
    return [leaf for one in tree for leaf in ([one] if isinstance(one, Leaf) else leaves_of(one))]


async def spawn(system: ActorSystem, spec: SupervisorSpec, failures: list[StartFailed]) -> None:
    with pytest.raises(StartFailed) as failure:
        await system.spawn(spec)
    failures.append(failure.value)


def reports(system: ActorSystem) -> list[tuple[ReportContext, str]]:
    found = system.recent_reports()
    return [(report.context, report.child_id) for report in found if isinstance(report, CrashReport)]


def assert_nothing_is_left(system: ActorSystem, *but: str) -> None:
    assert system.registry.names() == but
    assert system.statistics().alive == len(but)
    assert system.statistics().dead_letters == 0


# Three levels; the last starts for ever.
HALF_UP: Tree = [
    Leaf(),
    [Leaf(), [Leaf(), Leaf()], [Leaf(stop_seconds=2), Leaf(start_seconds=NEVER), Leaf()]],
    Leaf(),
]
IN_ORDER = [
    (1, "stop Killed", "5"),
    (3, "stop Shutdown", "4"),
    (3, "stop Shutdown", "3"),
    (3, "stop Shutdown", "2"),
    (3, "stop Shutdown", "1"),
    (3, "stop Shutdown", "0"),
]


@pytest.mark.parametrize("told", ["top", "top/1-of-top", "top/1-of-top/2-of-1-of-top"])
async def test_whoever_is_asked_to_stop_all_that_is_up_ends_in_order(
    told: str, autojump_clock: MockClock
) -> None:
    """A supervisor further down that is asked to stop has failed to start, and those above it break off, too."""
    story, failures = Story(), list[StartFailed]()
    async with open_system(reporter=lambda _: None) as system, trio.open_nursery() as nursery:
        nursery.start_soon(spawn, system, tree_of(story, HALF_UP), failures)
        await trio.sleep(1)
        assert [label for _, _, label in story.take()] == list("01234")
        system.ref(told).stop()
        await trio.sleep(2)
        await wait_all_tasks_blocked()
        assert story.take() == IN_ORDER
        assert_nothing_is_left(system)
        (failure,) = failures
        if told == "top":
            assert isinstance(failure.reason, Shutdown)
            assert reports(system) == []
            # Cut off was the one that was starting, and nobody crashed.
            statistics = system.statistics()
            assert (statistics.crashed, statistics.killed, statistics.shut_down) == (0, 1, 9)
        else:
            assert isinstance(failure.reason, Crashed)
            assert {context for context, _ in reports(system)} == {ReportContext.START_ERROR}


@pytest.mark.parametrize("told", ["top", "top/1-of-top", "top/1-of-top/2-of-1-of-top"])
@pytest.mark.parametrize("is_ending", [False, True])
async def test_a_kill_waits_for_nobody(told: str, is_ending: bool, autojump_clock: MockClock) -> None:
    """Neither while the tree comes up nor while what is up of it ends in order."""
    story, failures = Story(), list[StartFailed]()
    stubborn: Tree = [[Leaf(), [Leaf(), Leaf(0, NEVER, INFINITY), Leaf(NEVER)], Leaf()]]
    told = told.replace("1-of-top", "0-of-top").replace("2-of", "1-of")
    async with open_system(reporter=lambda _: None) as system, trio.open_nursery() as nursery:
        nursery.start_soon(spawn, system, tree_of(story, stubborn), failures)
        await trio.sleep(1)
        assert [label for _, _, label in story.take()] == list("012")
        if is_ending:
            system.ref("top").stop()
            await trio.sleep(1)
            assert story.take() == [(1, "stop Killed", "3")]
        system.ref(told).kill()
        await wait_all_tasks_blocked()
        assert trio.current_time() - story.began == 1 + is_ending
        assert_nothing_is_left(system)
        # Those below the one that was killed were killed; those beside it end as ever.
        killed = {label for _, what, label in story.lines if what == "stop Killed"}
        assert killed == set("012" if "/1-of" not in told else "12") | set("" if is_ending else "3")
        assert len(failures) == 1


@pytest.mark.parametrize(
    ("shutdown", "stop_seconds", "reason", "seconds"),
    [
        (BRUTAL, 2, "Killed", 0),
        (5, 2, "Shutdown", 2),
        (5, 8, "Killed", 5),
        (INFINITY, 8000, "Shutdown", 8000),
    ],
)
@pytest.mark.parametrize("ends_by", ["a stop", "the block", "a failure"])
async def test_each_child_has_the_time_its_own_spec_gives_it(
    ends_by: str,
    shutdown: float | ShutdownMode,
    stop_seconds: float,
    reason: str,
    seconds: float,
    autojump_clock: MockClock,
) -> None:
    story = Story()
    last = Leaf(1, fails=True) if ends_by == "a failure" else Leaf(NEVER)
    inner: Tree = [Leaf(), Leaf(0, stop_seconds, shutdown), last, Leaf()]
    async with (
        trio.open_nursery() as nursery,
        open_system(tree_of(story, [Leaf()]), reporter=lambda _: None) as system,
    ):
        spec = tree_of(story, inner, "inner", count(1))
        nursery.start_soon(_fails_to_add, system, spec.as_child())
        await trio.sleep(1)
        if ends_by == "a stop":
            system.ref("top").stop()
        elif ends_by == "a failure":
            await trio.sleep(seconds)
            await wait_all_tasks_blocked()
            assert_nothing_is_left(system, "top", "top/0")
    assert story.take()[3:] == [
        (1, "stop Crashed" if ends_by == "a failure" else "stop Killed", "3"),
        (1 + seconds, f"stop {reason}", "2"),
        (1 + seconds, "stop Shutdown", "1"),
        (1 + seconds, "stop Shutdown", "0"),
    ]
    assert_nothing_is_left(system)
    overdue = [(ReportContext.SHUTDOWN_ERROR, "2")] if shutdown == 5 and reason == "Killed" else []
    failed = [(ReportContext.START_ERROR, "3")] if ends_by == "a failure" else []
    assert reports(system) == [*failed, *overdue, (ReportContext.START_ERROR, "inner")]


async def _fails_to_add(system: ActorSystem, spec: ChildSpec) -> None:
    with pytest.raises(StartFailed):
        await system.ref("top").ask(AddChild(spec), timeout_seconds=100_000)


@pytest.mark.parametrize(
    ("shutdown", "kind", "seconds", "reason"),
    [
        (INFINITY, ChildKind.SUPERVISOR, 20, "Shutdown"),
        (INFINITY, ChildKind.WORKER, 20, "Shutdown"),
        (30, ChildKind.WORKER, 20, "Shutdown"),
        (3, ChildKind.WORKER, 3, "Killed"),
        (0, ChildKind.WORKER, 0, "Killed"),
        (BRUTAL, ChildKind.WORKER, 0, "Killed"),
    ],
)
@pytest.mark.parametrize("ends_by", ["a stop", "the time"])
async def test_what_a_supervisors_own_spec_allows_it_is_the_limit(
    ends_by: str,
    shutdown: float | ShutdownMode,
    kind: ChildKind,
    seconds: float,
    reason: str,
    autojump_clock: MockClock,
) -> None:
    """Also when it is given up because its start takes too long: it has failed then, in order."""
    story, failures = Story(), list[StartFailed]()
    inner = tree_of(story, [Leaf(0, 20, 100), Leaf(NEVER)], "inner")
    child = ChildSpec("inner", inner.create, shutdown=shutdown, kind=kind, start_timeout_seconds=4)
    async with open_system(reporter=lambda _: None) as system, trio.open_nursery() as nursery:
        nursery.start_soon(spawn, system, SupervisorSpec("top", [child]), failures)
        await trio.sleep(1)
        if ends_by == "a stop":
            system.ref("top").stop()
        await wait_all_tasks_blocked()
        await trio.sleep(100)
        ended_at = 1 if ends_by == "a stop" else 4
        # Where it has no time at all, both end in one moment.
        lines = sorted(story.take()[1:], key=lambda line: (line[0], -int(line[2])))
        assert lines == [(ended_at, "stop Killed", "1"), (ended_at + seconds, f"stop {reason}", "0")]
        assert_nothing_is_left(system)
        (failure,) = failures
        if ends_by == "the time":
            assert isinstance(failure.reason, Crashed)
            assert failure.reason.error.args == (
                "actor 'top/inner' did not start: killed (not started in 4 s)",
            )


async def test_a_stop_while_a_failed_start_is_being_cleared_away_changes_nothing(
    autojump_clock: MockClock,
) -> None:
    story, failures = Story(), list[StartFailed]()
    tree: Tree = [Leaf(0, 1), [Leaf(0, 3), Leaf(0, 3), Leaf(1, fails=True)]]
    async with open_system(reporter=lambda _: None) as system, trio.open_nursery() as nursery:
        nursery.start_soon(spawn, system, tree_of(story, tree), failures)
        await trio.sleep(2)
        system.ref("top").stop()
        await trio.sleep(100)
        assert story.take()[3:] == [
            (1, "stop Crashed", "3"),
            (4, "stop Shutdown", "2"),
            (7, "stop Shutdown", "1"),
            (8, "stop Shutdown", "0"),
        ]
        assert_nothing_is_left(system)
        # The error is what is told, not that somebody wanted it to end by then.
        assert isinstance(failures[0].reason, Crashed)
        assert reports(system) == [(ReportContext.START_ERROR, "3"), (ReportContext.START_ERROR, "1-of-top")]


async def test_nothing_is_started_any_more(autojump_clock: MockClock) -> None:
    """Not even to its first checkpoint: the stop falls between the starts of two children."""
    story, failures = Story(), list[StartFailed]()
    made: list[str] = []

    def make(label: str, then: Callable[[], None]) -> Actor:
        made.append(label)
        then()
        return Member(story, label, Leaf())

    async with open_system(reporter=lambda _: None) as system, trio.open_nursery() as nursery:
        children = [
            ChildSpec("a", make, ("a", lambda: system.ref("top").stop())),
            ChildSpec("b", make, ("b", lambda: None)),
        ]
        inner = SupervisorSpec("inner", children)
        nursery.start_soon(spawn, system, SupervisorSpec("top", [inner]), failures)
        await wait_all_tasks_blocked()
    assert made == ["a"]
    assert_nothing_is_left(system)


@pytest.mark.parametrize("is_open", [False, True])
async def test_whoever_opens_a_system_or_spawns_and_is_cancelled(
    is_open: bool, autojump_clock: MockClock
) -> None:
    """A root has nobody above it but whoever waits for it: what is up below it ends in order all the same."""
    story = Story()
    spec = tree_of(story, HALF_UP)
    async with open_system() as spawner:
        with trio.move_on_after(1) as scope:
            if is_open:
                async with open_system(spec):
                    raise AssertionError("the block must not run")
            else:
                await spawner.spawn(spec)
        assert scope.cancelled_caught
        assert story.take()[5:] == IN_ORDER
        assert_nothing_is_left(spawner)


@pytest.mark.parametrize(("seconds", "reason"), [(0, "Killed"), (3, "Killed"), (20, "Shutdown")])
async def test_the_root_has_the_time_that_the_system_has(
    seconds: float, reason: str, autojump_clock: MockClock
) -> None:
    story = Story()
    spec = tree_of(story, [[Leaf(0, 9, 100), Leaf(NEVER)]])
    with trio.move_on_after(1):
        async with open_system(spec, shutdown_seconds=seconds):
            raise AssertionError("the block must not run")
    lines = sorted(story.lines[1:], key=lambda line: (line[0], -int(line[2])))
    assert lines == [(1, "stop Killed", "1"), (1 + min(seconds, 9), f"stop {reason}", "0")]


async def test_a_root_that_is_no_supervisor_is_cut_off(autojump_clock: MockClock) -> None:
    story = Story()
    async with open_system() as system:
        with trio.move_on_after(1) as scope:
            await system.spawn(ActorSpec("0", lambda: Member(story, "0", Leaf(NEVER, NEVER))))
        assert scope.cancelled_caught
        assert story.lines == [(1, "stop Killed", "0")]
        assert_nothing_is_left(system)
        # Nor does a cancelled one disturb whoever has the name that it wanted.
        await system.spawn(ActorSpec("0", lambda: Member(story, "0", Leaf())))
        with trio.CancelScope() as scope:
            scope.cancel()
            await system.spawn(ActorSpec("0", lambda: Member(story, "0", Leaf())))
        assert scope.cancelled_caught
        with pytest.raises(NameTaken):
            await system.spawn(ActorSpec("0", lambda: Member(story, "0", Leaf())))
        assert_nothing_is_left(system, "0")


async def test_a_system_that_is_closed_meanwhile(autojump_clock: MockClock) -> None:
    """By somebody else than whoever waits for the start."""
    story, failures = Story(), list[StartFailed]()
    async with trio.open_nursery() as nursery:
        async with open_system() as system:
            nursery.start_soon(spawn, system, tree_of(story, [Leaf(), Leaf(NEVER)]), failures)
            await trio.sleep(1)
        assert_nothing_is_left(system)
    assert trio.current_time() - story.began == 1
    assert len(failures) == 1


@pytest.mark.parametrize("turns", range(8))
async def test_a_stop_in_the_moment_in_which_all_is_up(turns: int, autojump_clock: MockClock) -> None:
    """Whichever of the two is first, and trio draws lots for some of it: all end in order."""
    story = Story()

    async with open_system(reporter=lambda _: None) as system:

        async def stop() -> None:
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            system.ref("top").stop()

        async with trio.open_nursery() as nursery:

            class Last(Member):
                async def started(self) -> None:
                    await super().started()
                    nursery.start_soon(stop)

            inner = SupervisorSpec("inner", [ChildSpec("2", Last, (story, "2", Leaf()))])
            below = SupervisorSpec("below", [*tree_of(story, [Leaf(), Leaf(1)]).children, inner])
            # Where the stop came too late, it started and has stopped.
            with suppress(StartFailed):
                await system.spawn(SupervisorSpec("top", [below]))
        await wait_all_tasks_blocked()
        assert_nothing_is_left(system)
        assert reports(system) == []
    assert [line[1:] for line in story.lines] == [
        ("start", "0"),
        ("start", "1"),
        ("start", "2"),
        ("stop Shutdown", "2"),
        ("stop Shutdown", "1"),
        ("stop Shutdown", "0"),
    ]


# -- against a model


SECONDS = st.sampled_from([0.0, 0.25, 1.0, 2.0])
LEAVES = st.builds(
    Leaf,
    SECONDS,
    # Never equal to what a spec allows, as then either may be first.
    st.sampled_from([0.0, 0.5, 3.0, NEVER]),
    st.sampled_from([BRUTAL, 1.0, 5.0, INFINITY]),
    st.sampled_from([False] * 9 + [True]),
)
TREES = st.recursive(
    st.lists(LEAVES, min_size=1, max_size=3),
    lambda below: st.lists(LEAVES | below, min_size=1, max_size=3),
    max_leaves=4,
)


def expected(leaves: list[Leaf], stopped_at: float, killed_at: float) -> tuple[list[Line], list[Line]]:
    """What a tree of such leaves does; and, as nobody promises an order of those, whom the kill ends."""
    lines: list[Line] = []
    killed: list[Line] = []
    now = 0.0
    up: list[int] = []
    breaks = min(stopped_at, killed_at)
    for number, leaf in enumerate(leaves):
        if now + leaf.start_seconds > breaks:
            now = breaks
            (killed if killed_at <= stopped_at else lines).append((now, "stop Killed", str(number)))
            break
        now += leaf.start_seconds
        if leaf.fails:
            lines.append((now, "stop Crashed", str(number)))
            break
        lines.append((now, "start", str(number)))
        up.append(number)
    else:
        now = breaks
    for number in reversed(up):
        leaf = leaves[number]
        if isinstance(leaf.shutdown, ShutdownMode):
            allowed = 0.0 if leaf.shutdown is BRUTAL else NEVER
        else:
            allowed = leaf.shutdown
        is_overdue = leaf.stop_seconds > allowed or leaf.shutdown is BRUTAL
        ends = now + min(leaf.stop_seconds, allowed)
        if now >= killed_at or ends > killed_at:
            now = killed_at
            killed.append((now, "stop Killed", str(number)))
        else:
            now = ends
            lines.append((now, "stop Killed" if is_overdue else "stop Shutdown", str(number)))
    return lines, killed


@settings(max_examples=200, deadline=None)
@given(
    tree=TREES,
    # Odd eighths and sixteenths: never the moment in which something starts or has ended.
    stopped_at=st.integers(0, 40).map(lambda n: n / 4 + 0.125),
    killed_at=st.integers(0, 60).map(lambda n: n / 4 + 0.0625) | st.just(500.0),
)
def test_whatever_is_broken_off(tree: Tree, stopped_at: float, killed_at: float) -> None:
    """Any tree, at any moment of its start or afterwards, is asked to stop, and killed before or after that."""

    async def scenario() -> None:
        story = Story()
        async with open_system(reporter=lambda _: None) as system, trio.open_nursery() as nursery:

            async def run() -> None:
                with suppress(StartFailed):
                    await system.spawn(tree_of(story, tree))

            nursery.start_soon(run)
            for moment, what in sorted([(stopped_at, "stop"), (killed_at, "kill")]):
                await trio.sleep_until(story.began + moment)
                ref = system.ref("top")
                if what == "stop":
                    ref.stop()
                else:
                    ref.kill()
            await wait_all_tasks_blocked()
            assert_nothing_is_left(system)
        lines, killed = expected(leaves_of(tree), stopped_at, killed_at)
        assert story.lines[: len(lines)] == lines
        assert sorted(story.lines[len(lines) :]) == sorted(killed)

    trio.run(scenario, clock=MockClock(autojump_threshold=0))
