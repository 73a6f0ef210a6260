# SPDX-License-Identifier: Apache-2.0
"""Dynamic and stubborn children below a supervisor below another, against a plain model, with times.

`test_against_model.py` has the strategies, whose children stop when asked and know one supervisor. Here is what it leaves
out: simple_one_for_one, the three ways of stopping where children do not stop when asked, and an inner supervisor that
gives up and leaves the rest to the outer one. The diary has times, as how long a stop takes is what the ways differ in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter

import attrs
import tenacity
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from trio.testing import wait_all_tasks_blocked

from tests.supervision.model import Refuses
from tests.supervision.steps import Steps
from tests.supervision.test_against_model import ENDS, FAILS, TIMES, InTurn
from tests.supervision.workers import Mortal, end_child
from vgpu.actors import (
    ActorError,
    ActorSystem,
    DeleteChild,
    ExitReason,
    Request,
    RestartChild,
    StartChild,
    TerminateChild,
    WhichChildren,
)
from vgpu.supervision import (
    AddChild,
    Backoff,
    ChildError,
    ChildSpec,
    Restart,
    ShutdownMode,
    SpecError,
    Strategy,
    SupervisorSpec,
)

# When, what, who.
Line = tuple[float, str, str]
IDS = "abcd"
TOP, POOL = "top", "pool"
# How long a child takes to stop when asked; never equal to what a spec allows, as then either may be first.
STUBBORN = st.sampled_from([0.0, 0.0, 0.5, 3.0, math.inf])
ALLOWED = st.sampled_from([ShutdownMode.BRUTAL_KILL, 1.0, 5.0, ShutdownMode.INFINITY])
PATIENCE = 20.0
"""What stands for never where the spec has all the time there is."""
MEANWHILE = 0.25
WHICH = st.integers(0, 3)
PERIOD = 4.0


class Session(Mortal):
    """Writes when it starts and has ended, and takes its time to stop."""

    cleanup_seconds = 2.0

    def __init__(self, lines: list[Line], broken: dict[str, int], label: str, seconds: float = 0.0) -> None:
        self.lines, self.broken, self.label, self.seconds = lines, broken, label, seconds

    def write(self, what: str) -> None:
        self.lines.append((trio.current_time(), what, self.label))

    async def started(self) -> None:
        if self.broken.get(self.label, 0):
            self.broken[self.label] -= 1
            self.write("fail")
            raise RuntimeError(f"{self.label} cannot start")
        self.write("start")

    async def stopping(self, reason: ExitReason) -> None:
        if self.seconds:
            await trio.sleep(self.seconds)

    async def stopped(self, reason: ExitReason) -> None:
        self.write(f"stop {type(reason).__name__}")


# -- the model


@attrs.define(eq=False)
class Dynamic:
    """A dynamic child: it is there while it runs or is about to be restarted."""

    id: str
    label: str
    seconds: float
    restarts: int = 0
    # Failures not yet forgotten; None: none since the last recovery.
    failures: int | None = None
    up_since: float = 0.0
    # When it is tried again; None: it runs.
    due: float | None = None


@attrs.define(eq=False)
class Static:
    """A child of the outer supervisor."""

    id: str
    restart: Restart = Restart.PERMANENT
    is_running: bool = True
    restarts: int = 0


@attrs.define
class Window:
    """More than so many restarts in a period are too many."""

    intensity: int
    times: list[float] = attrs.Factory(list)

    def bears(self, now: float) -> bool:
        self.times.append(now)
        return sum(1 for time in self.times if time >= now - PERIOD) <= self.intensity


@attrs.define(eq=False)
class Model:
    """An outer supervisor, in it one of dynamic children and two plain ones. Times are the model's own."""

    strategy: Strategy
    outer_intensity: int
    inner_intensity: int
    pool_restart: Restart
    restart: Restart
    shutdown: float | ShutdownMode
    tries: int
    reset_after: float
    delay: Callable[[], float]
    now: float
    lines: list[Line]
    broken: dict[str, int] = attrs.Factory(dict)
    statics: list[Static] = attrs.Factory(list)
    dynamics: list[Dynamic] = attrs.Factory(list)
    outer: Window = attrs.field(init=False)
    inner: Window = attrs.field(init=False)
    number: int = 1
    is_over: bool = False

    def __attrs_post_init__(self) -> None:
        self.outer = Window(self.outer_intensity)
        for one in (Static("first"), Static(POOL, self.pool_restart), Static("last")):
            self.statics.append(one)
            self._up(one)

    # -- what may happen to it

    def start(self, child_id: str, label: str, seconds: float) -> str:
        self._need_pool()
        if not child_id:
            child_id, self.number = f"session-{self.number}", self.number + 1
        if any(one.id == child_id for one in self.dynamics):
            raise Refuses
        child = Dynamic(child_id, label, seconds)
        self.dynamics.append(child)
        if not self._dynamic_up(child):
            # A failed start leaves no spec.
            self.dynamics.remove(child)
            raise Refuses
        return child_id

    def terminate(self, child_id: str, victim: str | None) -> None:
        self._need_pool()
        child = next((one for one in self.dynamics if one.id == child_id), None)
        if child is None:
            raise Refuses
        self.dynamics.remove(child)
        if child.due is not None:
            return
        took, how = self.stop_of(child)
        killed = next((one for one in self.dynamics if one.id == victim and one.due is None), None)
        if killed is not None:
            self._line("stop Killed", killed.label, MEANWHILE)
        self._line(how, child.label, took)
        # Until then the supervisor heard of nothing: ends come first, then whatever became due.
        self.now += took
        if killed is not None:
            self._heard(killed, "Killed")
        self._try_what_is_due(self.now)

    def dynamic_ends(self, child_id: str, how: str) -> None:
        child = next(one for one in self.dynamics if one.id == child_id)
        self._line(f"stop {how}", child.label)
        self._heard(child, how)

    def static_crashes(self, child_id: str) -> None:
        child = self._static(child_id)
        self._line("stop Crashed", child.id)
        self._static_ended(child)

    def pool_ends(self, how: str, victim: str | None) -> None:
        """From outside: by a kill, which its children share, or asked to."""
        pool = self._static(POOL)
        self._pool_down(is_killed=how == "Killed", victim=victim)
        if pool.restart is Restart.PERMANENT or (pool.restart is Restart.TRANSIENT and how == "Killed"):
            self._static_ended(pool)
        elif pool.restart is Restart.TEMPORARY:
            self.statics.remove(pool)

    def pool_by_hand(self, what: str, victim: str | None = None) -> None:
        pool = next((one for one in self.statics if one.id == POOL), None)
        if what == "add":
            if pool is not None:
                raise Refuses
            self.statics.append(pool := Static(POOL, self.pool_restart))
            self._up(pool)
        elif pool is None:
            raise Refuses
        elif what == "terminate":
            self._down(pool, victim)
            if pool.restart is Restart.TEMPORARY:
                self.statics.remove(pool)
        elif pool.is_running:
            raise Refuses
        elif what == "restart":
            self._up(pool)
        else:
            self.statics.remove(pool)

    def time_passes(self, seconds: float) -> None:
        until = self.now + seconds
        self._try_what_is_due(until)
        self.now = max(self.now, until)

    def stop(self, victim: str | None = None) -> None:
        self.is_over = True
        for one in reversed(self.statics):
            self._down(one, victim)

    # -- the inner supervisor

    def _heard(self, child: Dynamic, how: str) -> None:
        is_abnormal = how in ("Crashed", "Killed")
        if self.restart is not Restart.PERMANENT and not (self.restart is Restart.TRANSIENT and is_abnormal):
            # Without a group to come back with it is forgotten for good, whatever its type.
            self.dynamics.remove(child)
            return
        if self.reset_after and child.failures is not None and self.now - child.up_since < self.reset_after:
            self._failed(child)
            return
        child.failures = 0 if self.reset_after else None
        self._dynamic_again(child)

    def _dynamic_again(self, child: Dynamic) -> None:
        if not self.inner.bears(self.now):
            self._pool_gives_up(child)
            return
        child.restarts += 1
        if not self._dynamic_up(child):
            self._failed(child)

    def _failed(self, child: Dynamic) -> None:
        child.failures = (child.failures or 0) + 1
        if child.failures >= self.tries:
            self._pool_gives_up(child)
        else:
            child.due = self.now + self.delay()

    def _dynamic_up(self, child: Dynamic) -> bool:
        child.due = None
        if self.broken.get(child.label, 0):
            self.broken[child.label] -= 1
            self._line("fail", child.label)
            self._line("stop Crashed", child.label)
            return False
        self._line("start", child.label)
        child.up_since = self.now
        if not self.reset_after:
            child.failures = None
        return True

    def _try_what_is_due(self, until: float) -> None:
        """Restart those whose time has come, the earliest first."""
        while waiting := [one for one in self.dynamics if one.due is not None and one.due <= until]:
            child = min(waiting, key=lambda one: one.due or 0.0)
            self.now = max(self.now, child.due or 0.0)
            child.due = None
            self._dynamic_again(child)

    def _pool_gives_up(self, last_straw: Dynamic) -> None:
        self.dynamics.remove(last_straw)
        pool = self._static(POOL)
        self._pool_down()
        # Its end is `Shutdown`: no abnormal one, so a transient one stays down.
        if pool.restart is Restart.PERMANENT:
            self._static_ended(pool)
        elif pool.restart is Restart.TEMPORARY:
            self.statics.remove(pool)

    def _pool_down(self, *, is_killed: bool = False, victim: str | None = None) -> None:
        """All dynamic children at the same time: it takes as long as the slowest."""
        began = self.now
        for one in self.dynamics:
            if one.due is not None:
                continue
            took, how = (0.0, "stop Killed") if is_killed else self.stop_of(one)
            if one.id == victim and took > MEANWHILE:
                took, how = MEANWHILE, "stop Killed"
            self.lines.append((began + took, how, one.label))
            self.now = max(self.now, began + took)
        self.dynamics.clear()
        self._static(POOL).is_running = False

    def stop_of(self, child: Dynamic) -> tuple[float, str]:
        """How long a stop takes, and what its end is called."""
        if self.shutdown is ShutdownMode.INFINITY:
            return min(child.seconds, PATIENCE), "stop Shutdown"
        if self.shutdown is ShutdownMode.BRUTAL_KILL:
            return 0.0, "stop Killed"
        assert isinstance(self.shutdown, float)
        if child.seconds > self.shutdown:
            return self.shutdown, "stop Killed"
        return child.seconds, "stop Shutdown"

    # -- the outer supervisor

    def _static_ended(self, child: Static) -> None:
        child.is_running = False
        if not self.outer.bears(self.now):
            self.stop()
            return
        index = self.statics.index(child)
        group = {
            Strategy.ONE_FOR_ONE: [child],
            Strategy.ONE_FOR_ALL: list(self.statics),
            Strategy.REST_FOR_ONE: self.statics[index:],
        }[self.strategy]
        for one in reversed(group):
            self._down(one)
        for one in group:
            if one is not child and one.restart is Restart.TEMPORARY:
                self.statics.remove(one)
            else:
                one.restarts += 1
                self._up(one)

    def _up(self, child: Static) -> None:
        child.is_running = True
        if child.id == POOL:
            # A new life knows nothing of the old one's children.
            self.inner, self.number = Window(self.inner_intensity), 1
        else:
            self._line("start", child.id)

    def _down(self, child: Static, victim: str | None = None) -> None:
        if not child.is_running:
            return
        if child.id == POOL:
            self._pool_down(victim=victim)
        else:
            self._line("stop Shutdown", child.id)
        child.is_running = False

    # -- small parts

    def _static(self, child_id: str) -> Static:
        return next(one for one in self.statics if one.id == child_id)

    @property
    def has_pool(self) -> bool:
        return any(one.id == POOL and one.is_running for one in self.statics)

    def _need_pool(self) -> None:
        if not self.has_pool:
            raise Refuses

    def _line(self, what: str, label: str, later: float = 0.0) -> None:
        self.lines.append((self.now + later, what, label))


def in_order(lines: list[Line]) -> list[Line]:
    """By time; ends of one moment by name, as nobody promises an order of those that stop at once."""

    def key(line: Line) -> tuple[float, bool]:
        return line[0], line[1].startswith("stop") and line[2] in IDS

    moments = [(is_end, list(lines)) for (_, is_end), lines in groupby(sorted(lines, key=itemgetter(0)), key)]
    return [line for is_end, found in moments for line in (sorted(found) if is_end else found)]


# -- the machine


class DynamicAgainstModel(RuleBasedStateMachine):
    """Every rule tells the model first, which says when all is over; the real one is looked at then."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Line] = []
        self.broken: dict[str, int] = {}
        self.expected: list[Line] = []
        self.delay = InTurn().next
        self.steps = Steps()
        self.model: Model | None = None

    def teardown(self) -> None:
        if self.model is not None and not self.model.is_over:
            self.model.stop()
        self.steps.close()
        assert in_order(self.lines) == in_order(self.expected)

    @initialize(
        strategy=st.sampled_from([Strategy.ONE_FOR_ONE, Strategy.ONE_FOR_ALL, Strategy.REST_FOR_ONE]),
        outer_intensity=st.sampled_from([1000, 3, 1000, 1, 1000, 0]),
        inner_intensity=st.sampled_from([1000, 3, 1, 0]),
        pool_restart=st.sampled_from([Restart.PERMANENT, *Restart]),
        restart=st.sampled_from(Restart),
        shutdown=ALLOWED,
        tries=st.sampled_from([1000, 3, 1000, 1]),
        reset_after=st.sampled_from([0.0, 4.0]),
    )
    def begin(
        self,
        strategy: Strategy,
        outer_intensity: int,
        inner_intensity: int,
        pool_restart: Restart,
        restart: Restart,
        shutdown: float | ShutdownMode,
        tries: int,
        reset_after: float,
    ) -> None:
        template = ChildSpec(
            "session", Session, (self.lines, self.broken), restart=restart, shutdown=shutdown
        )
        self.pool = SupervisorSpec(
            POOL,
            [template],
            Strategy.SIMPLE_ONE_FOR_ONE,
            inner_intensity,
            PERIOD,
            backoff=Backoff(InTurn(), tenacity.stop_after_attempt(tries), reset_after),
            restart=pool_restart,
        )
        first, last = (ChildSpec(i, Session, (self.lines, self.broken, i)) for i in ("first", "last"))
        self.spec = SupervisorSpec(TOP, [first, self.pool, last], strategy, outer_intensity, PERIOD)
        self.tries, self.reset_after = tries, reset_after
        self._spawn()

    def _spawn(self) -> None:
        async def spawn(system: ActorSystem) -> float:
            began = trio.current_time()
            await system.spawn(self.spec)
            return began

        self.broken.clear()
        template = self.pool.children[0]
        self.model = Model(
            self.spec.strategy,
            self.spec.intensity,
            self.pool.intensity,
            self.pool.restart,
            template.restart,
            template.shutdown,
            self.tries,
            self.reset_after,
            self.delay,
            self.steps.run(spawn),
            self.expected,
        )

    # -- what may happen

    @rule(children=st.lists(st.tuples(st.sampled_from(IDS), STUBBORN), min_size=1, max_size=3), fails=FAILS)
    def start(self, children: list[tuple[str, float]], fails: int) -> None:
        if not self._living().has_pool:
            self.bring_pool_back()
        for label, seconds in children:
            self._start(label, label, seconds)
        self._break(children[0][0], fails)
        self._start("", *children[0])

    def _start(self, child_id: str, label: str, seconds: float) -> None:
        model = self._living()
        if self.pool.children[0].shutdown is ShutdownMode.INFINITY:
            seconds = min(seconds, PATIENCE)
        self._ask(POOL, StartChild((label, seconds), child_id), lambda: model.start(child_id, label, seconds))

    @precondition(lambda self: self.model is not None and self.model.dynamics)
    @rule(which=WHICH, victim=WHICH, is_beset=st.booleans())
    def terminate(self, which: int, victim: int, is_beset: bool) -> None:
        """One is terminated; while the supervisor waits for a stubborn one, another may be killed."""
        model = self._living()
        child = model.dynamics[which % len(model.dynamics)]
        name = None
        if is_beset and child.due is None and model.stop_of(child)[0] > MEANWHILE:
            name = self._victim(victim, but=child)
        self._ask(POOL, TerminateChild(child.id), lambda: model.terminate(child.id, name), name)

    @precondition(lambda self: self.model is not None and self.model.dynamics)
    @rule(several=st.lists(st.tuples(WHICH, FAILS), min_size=1, max_size=4), seconds=TIMES)
    def crash(self, several: list[tuple[int, int]], seconds: float) -> None:
        for which, fails in several:
            self.dynamic_ends(which, "Crashed", fails)
            self.they_agree()
        self.time_passes(seconds)

    @precondition(lambda self: self.model is not None and self.model.dynamics)
    @rule(which=WHICH, how=ENDS, fails=FAILS)
    def dynamic_ends(self, which: int, how: str, fails: int) -> None:
        model = self._living()
        running = [one for one in model.dynamics if one.due is None]
        if not running:
            return
        child = running[which % len(running)]
        if how in ("Normal", "Shutdown") and child.seconds:
            # Asked by somebody who would not kill it, a stubborn one takes as long as it likes.
            how = "Killed"
        self._break(child.label, fails)

        async def end(system: ActorSystem) -> None:
            await end_child(system.ref(f"{TOP}/{POOL}/{child.id}"), how)

        with self._until_over(end):
            model.dynamic_ends(child.id, how)

    @precondition(lambda self: self.model is not None and self.model.dynamics)
    @rule(
        what=st.sampled_from(["first", "last", "pool Killed", "pool Shutdown", "terminate", "all"]),
        victim=WHICH,
        is_beset=st.booleans(),
    )
    def upheaval(self, what: str, victim: int, is_beset: bool) -> None:
        """The outer supervisor has to do something; while the inner one stops all it has, one of them may be killed."""
        model = self._living()
        is_by_itself = what in ("pool Shutdown", "terminate", "all")
        name = self._victim(victim) if is_beset and is_by_itself else None
        if what == "terminate":
            self._ask("", TerminateChild(POOL), lambda: model.pool_by_hand(what, name), name)
            return

        async def end(system: ActorSystem) -> None:
            if what == "all":
                system.ref(TOP).stop()
            elif what in ("first", "last"):
                await end_child(system.ref(f"{TOP}/{what}"), "Crashed")
            else:
                await end_child(system.ref(f"{TOP}/{POOL}"), what.removeprefix("pool "))
            await _kill_meanwhile(system, name)

        with self._until_over(end):
            if what == "all":
                model.stop(name)
            elif what in ("first", "last"):
                model.static_crashes(what)
            else:
                model.pool_ends(what.removeprefix("pool "), name)

    @rule(what=st.sampled_from(["restart", "add", "delete"]))
    def pool_by_hand(self, what: str) -> None:
        model = self._living()
        request: Request[object] = {
            "restart": RestartChild(POOL),
            "delete": DeleteChild(POOL),
            "add": AddChild(self.pool.as_child()),
        }[what]
        self._ask("", request, lambda: model.pool_by_hand(what))

    @precondition(lambda self: self.model is not None and not self.model.has_pool)
    @rule()
    def bring_pool_back(self) -> None:
        assert self.model is not None
        is_known = any(one.id == POOL for one in self._living().statics)
        self.pool_by_hand("restart" if is_known else "add")

    @rule(seconds=TIMES)
    def time_passes(self, seconds: float) -> None:
        async def sleep(_: ActorSystem) -> None:
            await trio.sleep(seconds)

        model = self._living()
        with self._until_over(sleep):
            model.time_passes(seconds)

    @rule(which=WHICH, what=st.sampled_from([RestartChild, DeleteChild, AddChild]))
    def forbidden(self, which: int, what: type) -> None:
        """simple_one_for_one takes none of these, whatever its children do."""
        model = self._living()
        child_id = model.dynamics[which % len(model.dynamics)].id if model.dynamics else "nobody"
        argument = ChildSpec("x", Session, (self.lines, self.broken, "x")) if what is AddChild else child_id

        def refuse() -> None:
            raise Refuses

        self._ask(POOL, what(argument), refuse)

    # -- what must then be so

    @invariant()
    def they_agree(self) -> None:
        if self.model is None:
            return
        model = self.model
        assert in_order(self.lines) == in_order(model.lines)
        now, statics, dynamics, names = self.steps.run(_look)
        assert now == model.now
        if model.is_over:
            assert (statics, dynamics, names) == (None, None, ())
            return
        assert statics == [
            (one.id, "running" if one.is_running else "stopped", one.restarts) for one in model.statics
        ]
        running = {f"{TOP}/{one.id}" for one in model.statics if one.is_running}
        if model.has_pool:
            assert dynamics == [
                (one.id, "running" if one.due is None else "restarting", one.restarts)
                for one in model.dynamics
            ]
            running |= {f"{TOP}/{POOL}/{one.id}" for one in model.dynamics if one.due is None}
        else:
            assert dynamics is None
            assert model.dynamics == []
        assert set(names) == {TOP} | running

    # -- small parts

    def _living(self) -> Model:
        """The model of a tree that lives; one that has ended is started again for that."""
        if self.model is None or self.model.is_over:
            self._spawn()
        assert self.model is not None
        return self.model

    def _break(self, label: str, times: int) -> None:
        if times:
            self._living().broken[label] = self.broken[label] = times

    def _victim(self, which: int, but: Dynamic | None = None) -> str | None:
        """Whom to kill while another (or all) is being stopped; None of those that would end in that moment anyway."""
        model = self._living()
        running = [one for one in model.dynamics if one.due is None and one is not but]
        if but is None:
            running = [one for one in running if model.stop_of(one)[0] > MEANWHILE]
        return running[which % len(running)].id if running else None

    @contextmanager
    def _until_over(self, step: Callable[[ActorSystem], object]) -> Iterator[None]:
        """What the model does in this block, the real one does in the time that the model took."""
        yield
        assert self.model is not None
        until = self.model.now

        async def do(system: ActorSystem) -> object:
            result = step(system)
            if hasattr(result, "__await__"):
                result = await result
            await trio.sleep_until(until)
            # What falls due at this very moment belongs to this step.
            await wait_all_tasks_blocked()
            return result

        self.result = self.steps.run(do)

    def _ask(
        self, whom: str, request: Request[object], model: Callable[[], object], victim: str | None = None
    ) -> None:
        async def ask(system: ActorSystem) -> bool:
            is_granted = False

            async def wait() -> None:
                nonlocal is_granted
                try:
                    ref = system.ref(f"{TOP}/{whom}" if whom else TOP)
                    await ref.ask(request, timeout_seconds=1000)
                except (ChildError, SpecError, ActorError):
                    return
                is_granted = True

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await _kill_meanwhile(system, victim)
            return is_granted

        is_refused = False
        with self._until_over(ask):
            try:
                model()
            except Refuses:
                is_refused = True
        assert self.result is not is_refused


async def _kill_meanwhile(system: ActorSystem, victim: str | None) -> None:
    if victim is not None:
        await trio.sleep(MEANWHILE)
        system.ref(f"{TOP}/{POOL}/{victim}").kill()


Children = list[tuple[str, str, int]] | None


async def _look(system: ActorSystem) -> tuple[float, Children, Children, tuple[str, ...]]:
    async def children(name: str) -> Children:
        ref = system.ref(name)
        if not ref.is_alive:
            return None
        return [(one.id, one.state, one.restarts) for one in await ref.ask(WhichChildren())]

    statics, dynamics = await children(TOP), await children(f"{TOP}/{POOL}")
    return trio.current_time(), statics, dynamics, system.registry.names()


TestDynamicAgainstModel = DynamicAgainstModel.TestCase
TestDynamicAgainstModel.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
