# SPDX-License-Identifier: Apache-2.0
"""A real supervisor and the pure model side by side: the same events, the same diary, states and ends, at every step."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import tenacity
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tenacity.wait import wait_base
from trio.testing import wait_all_tasks_blocked

from tests.supervision.model import Model, ModelChild, Refuses
from tests.supervision.steps import Steps
from tests.supervision.workers import Diary, end_child
from vgpu.actors import (
    ActorError,
    ActorSystem,
    ChildInfo,
    DeleteChild,
    Request,
    RestartChild,
    Shutdown,
    TerminateChild,
    WhichChildren,
)
from vgpu.supervision import (
    AddChild,
    AutoShutdown,
    Backoff,
    ChildError,
    ChildSpec,
    Restart,
    SpecError,
    Strategy,
    SupervisorSpec,
)

IDS = "abcde"
# How many of the next starts of a child are made to fail.
FAILS = st.sampled_from([0, 0, 1, 2])
ENDS = st.sampled_from(["Crashed", "Killed", "Normal", "Shutdown"])
DELAY = 1.0
SMALLEST = 2.0**-10
# Quarters of seconds, so that sums are exact on both sides and limits are met to the point.
TIMES = st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.75, 4.0, 10.0])


class InTurn(wait_base):
    """Each delay a trifle longer than the one before, so that no two tries are due at the same time: trio, rightly,
    promises no order for those."""

    def __init__(self) -> None:
        self._turn = 0

    def next(self) -> float:
        self._turn += 1
        return DELAY + self._turn * SMALLEST

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        return self.next()


@st.composite
def kinds(draw: st.DrawFn) -> tuple[Restart, bool]:
    """A restart type and whether the child is significant."""
    restart = draw(st.sampled_from(Restart))
    return restart, restart is not Restart.PERMANENT and draw(st.booleans())


class SupervisorAgainstModel(RuleBasedStateMachine):
    """Every rule does one thing to both and lets the real one come to rest, without time passing."""

    def __init__(self) -> None:
        super().__init__()
        self.diary = Diary()
        self.steps = Steps()
        self.model: Model | None = None

    def teardown(self) -> None:
        if self.model is not None and self.model.ended is None:
            self.model.stop()
        self.steps.close()
        if self.model is not None:
            assert self.diary.lines == self.model.diary

    # -- beginning, and beginning again

    @initialize(
        strategy=st.sampled_from([Strategy.ONE_FOR_ONE, Strategy.ONE_FOR_ALL, Strategy.REST_FOR_ONE]),
        auto_shutdown=st.sampled_from(AutoShutdown),
        children=st.lists(kinds(), min_size=2, max_size=4),
        # More often than not it bears a lot, or the longer stories would never be told.
        intensity=st.sampled_from([1000, 3, 1000, 1, 1000, 0]),
        tries=st.sampled_from([1000, 3, 1]),
        reset_after=st.sampled_from([0.0, 4.0]),
    )
    def begin(
        self,
        strategy: Strategy,
        auto_shutdown: AutoShutdown,
        children: list[tuple[Restart, bool]],
        intensity: int,
        tries: int,
        reset_after: float,
    ) -> None:
        if auto_shutdown is AutoShutdown.NEVER:
            children = [(restart, False) for restart, _ in children]
        backoff = Backoff(InTurn(), tenacity.stop_after_attempt(tries), reset_after)
        self.spec = SupervisorSpec(
            "top",
            [
                self.diary.worker(i, restart=restart, significant=significant)
                for i, (restart, significant) in zip(IDS, children, strict=False)
            ],
            strategy,
            intensity,
            4.0,
            auto_shutdown,
            backoff,
        )
        self.kinds = children
        self.tries = tries
        self._spawn()

    def _spawn(self) -> None:
        async def spawn(system: ActorSystem) -> float:
            await system.spawn(self.spec)
            await wait_all_tasks_blocked()
            return trio.current_time()

        # A broken first start is another matter, and has a test of its own.
        self.diary.failures.clear()
        now = self.steps.run(spawn)
        before = self.model.diary if self.model is not None else []
        spec = self.spec
        self.model = Model(
            spec.strategy,
            spec.auto_shutdown,
            spec.intensity,
            spec.period_seconds,
            self.model.delay if self.model is not None else InTurn().next,
            self.tries,
            spec.backoff.reset_after_seconds,
            now,
        )
        self.model.diary = before
        self.model.start([ModelChild(i, *kind) for i, kind in zip(IDS, self.kinds, strict=False)])

    # -- what may happen

    @rule(which=st.integers(0, 4), fails=FAILS)
    def child_crashes(self, which: int, fails: int) -> None:
        self.child_ends(which, "Crashed", fails)

    @rule(which=st.integers(0, 4), how=ENDS, fails=FAILS)
    def child_ends(self, which: int, how: str, fails: int) -> None:
        model = self._living()
        running = [child.id for child in model.children if child.state == "running"]
        if not running:
            return
        child_id = running[which % len(running)]
        self._break(child_id, fails)

        async def end(system: ActorSystem) -> None:
            await end_child(system.ref(f"top/{child_id}"), how)
            await wait_all_tasks_blocked()

        self.steps.run(end)
        model.child_ends(child_id, how)

    @rule(seconds=TIMES)
    def time_passes(self, seconds: float) -> None:
        async def sleep(system: ActorSystem) -> None:
            await trio.sleep(seconds)
            # What falls due at this very moment belongs to this step.
            await wait_all_tasks_blocked()

        model = self._living()
        self.steps.run(sleep)
        model.time_passes(seconds)

    @rule(
        child_id=st.sampled_from(IDS), what=st.sampled_from(["terminate", "restart", "delete"]), fails=FAILS
    )
    def request(self, child_id: str, what: str, fails: int) -> None:
        model = self._living()
        self._break(child_id, fails)
        if what == "terminate":
            self._ask(TerminateChild(child_id), lambda: model.terminate(child_id))
        elif what == "restart":
            self._ask(RestartChild(child_id), lambda: model.restart_child(child_id))
        else:
            self._ask(DeleteChild(child_id), lambda: model.delete(child_id))

    @rule(child_id=st.sampled_from(IDS), kind=kinds(), fails=FAILS)
    def add(self, child_id: str, kind: tuple[Restart, bool], fails: int) -> None:
        model = self._living()
        self._break(child_id, fails)
        spec: ChildSpec = self.diary.worker(child_id, restart=kind[0], significant=kind[1])
        self._ask(AddChild(spec), lambda: model.add(ModelChild(child_id, *kind)))

    # -- what must then be so

    @invariant()
    def they_agree(self) -> None:
        if self.model is None:
            return
        model = self.model
        assert self.diary.lines == model.diary
        children, end, names = self.steps.run(_look)
        if model.ended is None:
            expected = [(c.id, c.state, c.restarts) for c in model.children]
            assert [(c.id, c.state, c.restarts) for c in children or ()] == expected
            running = {f"top/{c.id}" for c in model.children if c.state == "running"}
            assert set(names) == {"top"} | running
        else:
            assert children is None
            assert isinstance(end, Shutdown)
            assert end.cause == model.ended
            assert names == ()

    # -- small parts

    def _living(self) -> Model:
        """The model of a supervisor that lives; one that has ended is started again for that."""
        if self.model is None or self.model.ended is not None:
            self._spawn()
        assert self.model is not None
        return self.model

    def _break(self, child_id: str, times: int) -> None:
        """The next starts of an id fail; where it is already broken, and 0 is drawn, nothing changes."""
        if times:
            self._living().broken[child_id] = self.diary.failures[child_id] = times

    def _ask(self, request: Request[object], model: Callable[[], None]) -> None:
        async def ask(system: ActorSystem) -> bool:
            try:
                await system.ref("top").ask(request)
            except (ChildError, SpecError, ActorError):
                return False
            finally:
                await wait_all_tasks_blocked()
            return True

        is_granted = self.steps.run(ask)
        try:
            model()
        except Refuses:
            assert not is_granted
        else:
            assert is_granted


async def _look(system: ActorSystem) -> tuple[tuple[ChildInfo, ...] | None, object, tuple[str, ...]]:
    ref = system.ref("top")
    if not ref.is_alive:
        return None, await ref.wait_exit(), system.registry.names()
    return await ref.ask(WhichChildren()), None, system.registry.names()


TestSupervisorAgainstModel = SupervisorAgainstModel.TestCase
TestSupervisorAgainstModel.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_the_model_is_not_the_code_it_judges() -> None:
    """The model names nothing of the supervision room but the words of the specs."""
    from tests.supervision import model

    ours = {
        name for name, value in vars(model).items() if getattr(value, "__module__", "").startswith("vgpu")
    }
    assert ours == {AutoShutdown.__name__, Restart.__name__, Strategy.__name__}
    assert attrs.has(Model)
