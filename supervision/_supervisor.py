# SPDX-License-Identifier: Apache-2.0
"""The supervisor: an actor that starts children, learns of their ends, and carries out plans.

It decides nothing itself. `_plan` says who is stopped and started, `_intensity` whether that is too often,
`_backoff` when a failed restart is tried again, `_spec` was checked long before. What is here is the waiting: a
child's start can be interrupted by a stop request, and between tries of a failing restart the supervisor sits in
its mailbox like any actor, so it is never deaf to its own shutdown.

It must never start one name twice, never leave a child behind, and never let a child's error out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar, final

import attrs
import trio

from vgpu.actors import (
    AUTO_SHUTDOWN,
    Actor,
    ActorSnapshot,
    ActorState,
    ChildCounts,
    ChildInfo,
    CountChildren,
    Crashed,
    DeleteChild,
    Down,
    ExitReason,
    Incarnation,
    Killed,
    NameTaken,
    Normal,
    Ref,
    Refused,
    RestartChild,
    Shutdown,
    StartChild,
    StartFailed,
    TerminateChild,
    WhichChildren,
    handles,
)

from ._backoff import RetrySchedule
from ._intensity import IntensityWindow
from ._plan import ChildView, Plan, plan_exit, plan_restart
from ._report import CrashReport, ReportContext
from ._spec import (
    AddChild,
    ChildError,
    ChildKind,
    ChildSpec,
    GetChildSpec,
    Restart,
    ShutdownMode,
    SpecError,
    Strategy,
    SupervisorSpec,
)

__all__ = ["Supervisor"]

_STOP = Shutdown("supervisor")


@attrs.define(eq=False)
class _Child:
    """One child as its supervisor knows it.

    Invariant: state is RUNNING exactly when `life` is set; `monitor` is set with it.
    """

    spec: ChildSpec
    name: str
    # Made anew for each life.
    create: Callable[[], Actor]
    state: ActorState = ActorState.STOPPED
    life: Incarnation | None = None
    monitor: int = 0
    restarts: int = 0
    last_exit: ExitReason | None = None
    # Whom its present or last life was about, for the log.
    subject: Mapping[str, object] = attrs.Factory(dict)
    # Counts failures, from the first until the child has recovered (see Backoff.reset_after_seconds); while a try
    # is pending, `timer` is the wait for it.
    retry: RetrySchedule | None = None
    # When the present or last life was up.
    started_at: float = 0.0
    timer: trio.CancelScope | None = None
    # The number the timer's message carries; a message with another one is out of date.
    timer_number: int = 0

    def call_off_retry(self) -> None:
        """Forget a pending try; its message, if it is on its way, will find the number gone."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer = None
        self.timer_number = 0

    def view(self) -> ChildView:
        is_alive = self.life is not None and self.life.is_alive
        is_expected = self.state is ActorState.RESTARTING
        return ChildView(self.spec.id, self.spec.restart, is_alive, self.spec.significant, is_expected)


@attrs.frozen
class _TryAgain:
    """To itself, after a back-off: restart a child whose last restart failed."""

    child_id: str
    number: int


@final
class Supervisor(Actor):
    """Runs what a `SupervisorSpec` describes. Do not construct it: list the spec, or open a system with it.

    Takes `AddChild` or (simple_one_for_one) `StartChild`, `TerminateChild`, `RestartChild`, `DeleteChild`,
    `WhichChildren` and `CountChildren`, all asked. As in OTP it handles one thing at a time: an ask waits while
    another child starts or stops, and a child must not ask its own supervisor from its `started()`.
    """

    cleanup_seconds: ClassVar[float] = 1.0
    stop_ends_start: ClassVar[bool] = True
    # What it waits for, starts and stops of children, has limits of its own.
    stuck_after_seconds: ClassVar[float | None] = math.inf

    def __init__(self, spec: SupervisorSpec) -> None:
        self._spec = spec
        self._is_simple = spec.strategy is Strategy.SIMPLE_ONE_FOR_ONE
        self._window = IntensityWindow(spec.intensity, spec.period_seconds)
        # In start order.
        self._children: dict[str, _Child] = {}
        self._next_number = 1

    # -- hooks

    async def started(self) -> None:
        if self._is_simple:
            return
        for spec in self._spec.children:
            child = self._know(spec, ())
            try:
                await self._start(child)
            except StartFailed as error:
                is_asked = self.life.stop_requested and not isinstance(error.reason, Crashed)
                if not is_asked:
                    self._report(ReportContext.START_ERROR, child, error.reason)
                await self._stop_children(reversed(self._children.values()))
                if is_asked:
                    await self.life.end_as_asked()
                raise

    async def stopping(self, reason: ExitReason) -> None:
        if self._is_simple:
            # Dynamic children know no order among themselves: all at once, as slow as the slowest.
            async with trio.open_nursery() as nursery:
                for child in self._children.values():
                    nursery.start_soon(self._stop, child)
        else:
            await self._stop_children(reversed(self._children.values()))

    async def stopped(self, reason: ExitReason) -> None:
        for child in self._children.values():
            self.life.system.registry.forget(child.name)

    def children_snapshots(self) -> tuple[ActorSnapshot, ...]:
        return tuple(self._snapshot(child) for child in self._children.values())

    # -- ends of children

    @handles(Down)
    async def _child_ended(self, down: Down) -> None:
        child = next((child for child in self._children.values() if child.monitor == down.monitor), None)
        if child is None or child.life is None:
            # It was stopped by us, or replaced, after this Down had been sent.
            return
        self._note_end(child, down.reason)
        plan = plan_exit(
            self._spec.strategy, self._spec.auto_shutdown, self._views(), child.spec.id, down.reason
        )
        if plan.starts and self._is_too_soon(child):
            await self._hold_back(child, plan, down.reason)
            return
        if child.spec.restart is Restart.PERMANENT or not isinstance(down.reason, Normal | Shutdown):
            self._report(ReportContext.CHILD_TERMINATED, child, down.reason)
        if plan.starts:
            await self._restart(child, plan, down.reason)
            return
        self.life.system.registry.forget(child.name)
        self._forget(plan.forgets)
        if plan.shut_down:
            self.stop(AUTO_SHUTDOWN)

    @handles(_TryAgain)
    async def _try_again(self, message: _TryAgain) -> None:
        child = self._children.get(message.child_id)
        if child is None or child.timer_number != message.number:
            # Terminated, deleted or started otherwise while the timer ran.
            return
        child.call_off_retry()
        plan = plan_restart(self._spec.strategy, self._views(), child.spec.id)
        await self._restart(child, plan, child.last_exit or Normal())

    # -- requests

    @handles(StartChild)
    async def _start_dynamic(self, request: StartChild) -> Ref[Any]:
        if not self._is_simple:
            raise Refused(ChildError(f"{self.name}: StartChild is for simple_one_for_one; use AddChild"))
        child_id = request.id
        if not child_id:
            child_id = f"{self._spec.children[0].id}-{self._next_number}"
            self._next_number += 1
        try:
            spec = attrs.evolve(self._spec.children[0], id=child_id)
        except SpecError as error:
            raise Refused(error) from error
        return await self._start_new(spec, request.args)

    @handles(AddChild)
    async def _add_child(self, request: AddChild) -> Ref[Any]:
        if self._is_simple:
            raise Refused(ChildError(f"{self.name}: AddChild is not for simple_one_for_one; use StartChild"))
        try:
            self._spec.check_child(request.spec)
        except SpecError as error:
            raise Refused(error) from error
        return await self._start_new(request.spec, ())

    @handles(TerminateChild)
    async def _terminate_child(self, request: TerminateChild) -> None:
        child = self._find(request.id)
        is_waited_for = child.timer is not None
        await self._stop(child)
        if is_waited_for:
            # The rest of its group was down for its sake only.
            await self._start_group(
                [
                    other
                    for other in self._children.values()
                    if other.state is ActorState.RESTARTING and other.timer is None
                ]
            )
        if self._is_simple or child.spec.restart is Restart.TEMPORARY:
            self._forget((request.id,))

    @handles(RestartChild)
    async def _restart_child(self, request: RestartChild) -> Ref[Any]:
        child = self._find(request.id)
        if child.state is not ActorState.STOPPED:
            raise Refused(ChildError(f"{self.name}: child {request.id!r} is {child.state.value}"))
        try:
            await self._start(child)
        except StartFailed as error:
            self._settle_stopped(child)
            self._report(ReportContext.START_ERROR, child, error.reason)
            raise Refused(error) from error
        return Ref(self.life.system, child.name)

    @handles(DeleteChild)
    def _delete_child(self, request: DeleteChild) -> None:
        child = self._find(request.id)
        if child.state is not ActorState.STOPPED:
            raise Refused(ChildError(f"{self.name}: child {request.id!r} is {child.state.value}"))
        self._forget((request.id,))

    @handles(GetChildSpec)
    def _get_child_spec(self, request: GetChildSpec) -> ChildSpec:
        return self._find(request.id).spec

    @handles(WhichChildren)
    def _which_children(self, _: WhichChildren) -> tuple[ChildInfo, ...]:
        return tuple(
            ChildInfo(
                child.spec.id,
                child.name,
                child.state.value,
                child.spec.kind is ChildKind.SUPERVISOR,
                child.restarts,
            )
            for child in self._children.values()
        )

    @handles(CountChildren)
    def _count_children(self, _: CountChildren) -> ChildCounts:
        kinds = [child.spec.kind for child in self._children.values()]
        return ChildCounts(
            specs=len(kinds),
            active=sum(child.life is not None for child in self._children.values()),
            supervisors=kinds.count(ChildKind.SUPERVISOR),
            workers=kinds.count(ChildKind.WORKER),
        )

    # -- carrying out

    def _is_too_soon(self, child: _Child) -> bool:
        """Whether a child that ended had not recovered from its last failure. If it had, begins a new count."""
        reset_after = self._spec.backoff.reset_after_seconds
        if not reset_after or self.life.stop_requested:
            return False
        now = trio.current_time()
        if child.retry is not None and now - child.started_at < reset_after:
            return True
        child.retry = self._spec.backoff.begin(now)
        return False

    async def _hold_back(self, child: _Child, plan: Plan, reason: ExitReason) -> None:
        """Restart later a child that ended again too soon. Its group is stopped now: it should not go on without it."""
        for started in plan.starts:
            self._children[started].call_off_retry()
        if self._schedule_retry(child, reason, ReportContext.CHILD_TERMINATED):
            await self._take_down(plan)

    async def _take_down(self, plan: Plan) -> None:
        """Stop and forget as planned; all that the plan starts are expected back."""
        for started in plan.starts:
            one = self._children[started]
            if one.life is None:
                one.state = ActorState.RESTARTING
        await self._stop_children([self._children[stopped] for stopped in plan.stops], come_back=plan.starts)
        self._forget(plan.forgets)

    async def _restart(self, child: _Child, plan: Plan, reason: ExitReason) -> None:
        """Carry out a plan that has starts, unless that would be too often; a failure is tried again later."""
        if self.life.stop_requested:
            return
        if not self._window.record(trio.current_time()):
            self._give_up(ReportContext.INTENSITY_EXCEEDED, child, reason, "restart intensity exceeded")
            return
        # All of them are expected back from here on; a try that one of them waits for is part of this one now.
        for started in plan.starts:
            self._children[started].call_off_retry()
        await self._take_down(plan)
        await self._start_group([self._children[started] for started in plan.starts])

    async def _start_group(self, children: Iterable[_Child]) -> None:
        """Start again in order; the first that fails is tried again later, and the ones behind it wait for it."""
        for child in children:
            child.restarts += 1
            self.life.system.child_restarting(self.name, child.name, child.restarts)
            try:
                await self._start(child)
            except StartFailed as error:
                self._start_failed_again(child, error.reason)
                return
            if self.life.stop_requested:
                return

    def _start_failed_again(self, child: _Child, reason: ExitReason) -> None:
        if self.life.stop_requested:
            return
        child.last_exit = reason
        self._schedule_retry(child, reason, ReportContext.START_ERROR)

    def _schedule_retry(self, child: _Child, reason: ExitReason, context: ReportContext) -> bool:
        """Count a failure and set the timer for the next try; or give up, and return False."""
        now = trio.current_time()
        if child.retry is None:
            child.retry = self._spec.backoff.begin(now)
        error = reason.error if isinstance(reason, Crashed) else RuntimeError(str(reason))
        delay = child.retry.failed(now, error)
        self._report(context, child, reason, delay)
        if delay is None:
            self._give_up(ReportContext.RETRIES_EXHAUSTED, child, reason, "restart retries exhausted")
            return False
        child.state = ActorState.RESTARTING
        child.timer_number = self.life.system.next_serial()
        child.timer = self.send_after(delay, _TryAgain(child.spec.id, child.timer_number))
        return True

    async def _start_new(self, spec: ChildSpec, args: tuple[object, ...]) -> Ref[Any]:
        if spec.id in self._children:
            raise Refused(ChildError(f"{self.name}: there is a child {spec.id!r} already"))
        child = self._know(spec, args)
        try:
            await self._start(child)
        except StartFailed as error:
            self._forget((spec.id,))
            self._report(ReportContext.START_ERROR, child, error.reason)
            raise Refused(error) from error
        return Ref(self.life.system, child.name)

    def _know(self, spec: ChildSpec, args: tuple[object, ...]) -> _Child:
        child = _Child(spec, spec.name or f"{self.name}/{spec.id}", partial(spec.start, *spec.args, *args))
        self._children[spec.id] = child
        return child

    async def _start(self, child: _Child) -> None:
        """Start one child and watch it. A stop request to the supervisor interrupts this.

        Raises:
            StartFailed: for whatever reason the child does not live; nothing of it is left.
        """
        child.call_off_retry()
        child.state = ActorState.STARTING
        try:
            child.life = None if self.life.stop_requested else await self._bring_up(child)
        except NameTaken as error:
            child.state = ActorState.STOPPED
            raise StartFailed(child.name, Crashed(error)) from error
        except StartFailed:
            child.state = ActorState.STOPPED
            raise
        if child.life is None:
            child.state = ActorState.STOPPED
            limit = child.spec.start_timeout_seconds
            why = "the supervisor is stopping" if self.life.stop_requested else f"not started in {limit} s"
            raise StartFailed(child.name, Killed(why))
        child.state = ActorState.RUNNING
        child.started_at = trio.current_time()
        if not self._spec.backoff.reset_after_seconds:
            child.retry = None
        # By life and not by name: it may have ended already, and its name been taken.
        child.monitor = self.life.watch(child.life)

    async def _bring_up(self, child: _Child) -> Incarnation | None:
        """A new life that is up; None where its start was broken off, by a stop request or when its time was over."""
        life = self.life.system.new_life(
            child.name,
            child.create,
            parent=self.life,
            is_supervised=True,
            restarts=child.restarts,
            last_exit=child.last_exit,
        )
        if life.actor.stop_ends_start and child.spec.shutdown is not ShutdownMode.BRUTAL_KILL:
            return await self._bring_up_or_ask(life, child.spec)
        with self.interruptible() as scope:
            scope.deadline = trio.current_time() + child.spec.start_timeout_seconds
            await self.nursery.start(life.run)
            return life
        return None

    async def _bring_up_or_ask(self, life: Incarnation, spec: ChildSpec) -> Incarnation | None:
        """The same for a supervisor: it is asked to end and not cut off, so that its children do so in order."""
        is_broken_off = False

        async def break_off(until: trio.CancelScope) -> None:
            nonlocal is_broken_off
            with until:
                with self.interruptible() as scope:
                    scope.deadline = trio.current_time() + spec.start_timeout_seconds
                    await trio.sleep_forever()
                if life.state is not ActorState.STARTING:
                    return
                is_broken_off = True
                life.request_stop(_STOP)
                if not isinstance(spec.shutdown, ShutdownMode):
                    await trio.sleep(spec.shutdown)
                    life.kill(f"did not stop in {spec.shutdown} s")

        until_up = trio.CancelScope()
        self.nursery.start_soon(break_off, until_up)
        try:
            await self.nursery.start(life.run)
        except StartFailed as error:
            if is_broken_off and not isinstance(error.reason, Crashed):
                return None
            raise
        finally:
            until_up.cancel()
        return life

    async def _stop_children(self, children: Iterable[_Child], come_back: tuple[str, ...] = ()) -> None:
        for child in children:
            await self._stop(child, will_return=child.spec.id in come_back)

    async def _stop(self, child: _Child, *, will_return: bool = False) -> None:
        """Stop one child as its spec says, and report an end that was not the one asked for."""
        child.call_off_retry()
        life = child.life
        if life is not None:
            self.demonitor(child.monitor)
            shutdown = child.spec.shutdown
            expected: tuple[type, ...] = (Shutdown, Normal)
            if shutdown is ShutdownMode.BRUTAL_KILL:
                expected = (Shutdown, Normal, Killed)
                life.kill("brutal_kill")
            elif isinstance(shutdown, ShutdownMode):
                life.request_stop(_STOP)
            else:
                life.request_stop(_STOP)
                with trio.move_on_after(shutdown):
                    await life.wait_exited()
                life.kill(f"did not stop in {shutdown} s")
            reason = await life.wait_exited()
            if not isinstance(reason, expected):
                self._report(ReportContext.SHUTDOWN_ERROR, child, reason)
            self._note_end(child, reason)
        if will_return:
            child.state = ActorState.RESTARTING
        else:
            child.retry = None
            self._settle_stopped(child)

    # -- small parts

    def _settle_stopped(self, child: _Child) -> None:
        child.state = ActorState.STOPPED
        self.life.system.registry.forget(child.name)

    def _note_end(self, child: _Child, reason: ExitReason) -> None:
        if child.life is not None:
            child.subject = dict(child.life.actor.subject)
        child.life = None
        child.monitor = 0
        child.last_exit = reason
        child.state = ActorState.STOPPED

    def _give_up(self, context: ReportContext, child: _Child, reason: ExitReason, cause: str) -> None:
        self._report(context, child, reason)
        self.life.system.registry.forget(child.name)
        self.stop(Shutdown(cause))

    def _forget(self, ids: tuple[str, ...]) -> None:
        for child_id in ids:
            self.life.system.registry.forget(self._children.pop(child_id).name)

    def _find(self, child_id: str) -> _Child:
        child = self._children.get(child_id)
        if child is None:
            raise Refused(ChildError(f"{self.name}: there is no child {child_id!r}"))
        return child

    def _views(self) -> list[ChildView]:
        return [child.view() for child in self._children.values()]

    def _report(
        self, context: ReportContext, child: _Child, reason: ExitReason, retry_in: float | None = None
    ) -> None:
        self.life.system.report(
            CrashReport(
                time=trio.current_time(),
                supervisor=self.name,
                context=context,
                reason=reason,
                child_id=child.spec.id,
                child_name=child.name,
                restart=child.spec.restart,
                shutdown=child.spec.shutdown,
                restarts=child.restarts,
                retry_in_seconds=retry_in,
                subject=child.subject if child.life is None else child.life.actor.subject,
            )
        )

    def _snapshot(self, child: _Child) -> ActorSnapshot:
        if child.life is not None:
            return child.life.snapshot()
        return ActorSnapshot(
            name=child.name,
            kind=Supervisor.__name__
            if child.spec.kind is ChildKind.SUPERVISOR
            else getattr(child.spec.start, "__name__", "child"),
            state=child.state,
            mailbox=None,
            restarts=child.restarts,
            serial=0,
            age_seconds=0.0,
            last_exit=child.last_exit,
        )
