# SPDX-License-Identifier: Apache-2.0
"""The system: who owns the top-level actors, their names, their counters, and their ordered end.

`open_system` runs actors in tasks that an outside cancellation does not reach, so that a block that is cancelled
still stops its tree in order. It is the only place that starts actors without a supervisor above them.
"""

from __future__ import annotations

import logging
import math
import reprlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol, final

import attrs
import trio

from ._actor import Actor
from ._exit import ASKED, AUTO_SHUTDOWN, Crashed, ExitReason, Killed, NoActor, Normal, Shutdown
from ._incarnation import Incarnation
from ._ref import Ref
from ._registry import Registry
from ._stuck import StuckDetector, StuckHandler
from ._trace import GuardedTracer, Tracer, current_actor_name
from ._tree import ActorSnapshot
from .errors import ActorError, InternalError, NameTaken, StartFailed, SystemFailed

__all__ = ["ActorSystem", "DeadLetter", "Startable", "SystemStatistics", "open_system"]

_log = logging.getLogger("vgpu.actors")

# Enough for an administrator to see what has been going wrong lately.
REMEMBERED_DEAD_LETTERS = 64
REMEMBERED_REPORTS = 256
REMEMBERED_STUCK_HANDLERS = 64

Reporter = Callable[[object], None]


class Startable(Protocol):
    """What can stand at the top: an `ActorSpec` or a supervisor's spec."""

    @property
    def name(self) -> str: ...

    @property
    def create(self) -> Callable[[], Actor]: ...


@attrs.frozen
class DeadLetter:
    """A message that had nobody to go to, or was still unread when its target ended.

    Described and not kept: a message may hold a socket that nobody would close while it is remembered here.
    """

    time: float
    """Trio's clock, in seconds."""
    target: str
    message_type: str
    text: str
    """The message's fields, each cut short."""
    sender: str | None = None
    """The actor that sent it, where that is known: not for what was found unread in a mailbox."""


@attrs.frozen
class SystemStatistics:
    """Counters since the system opened."""

    alive: int
    spawned: int
    normal: int
    shut_down: int
    crashed: int
    killed: int
    restarts: int
    dead_letters: int
    dead_letters_by_type: dict[str, int]
    late_replies: int
    unheard_refusals: int
    """Requests refused that were sent, not asked."""
    moot_notices: int
    """Messages by `Ref.notify` whose target's end made them moot."""
    drops: int
    """Messages thrown out by the drop-oldest policy, over all mailboxes that ever were."""
    stuck_handlers: int
    """What the stuck-handler detector has reported."""
    cleanup_overruns: int
    """Times `stopped()` was cut off."""


@final
class ActorSystem:
    """Everything the actors of one tree have in common. Made by `open_system`."""

    def __init__(
        self, tracer: Tracer | None, reporter: Reporter | None, shutdown_seconds: float = math.inf
    ) -> None:
        self.registry = Registry()
        # Read at every hook; None is the usual case and all that it costs then.
        self.tracer: GuardedTracer | None = None
        self.set_tracer(tracer)
        self._reporter = reporter
        self._shutdown_seconds = shutdown_seconds
        self._reports: deque[object] = deque(maxlen=REMEMBERED_REPORTS)
        # Set by the first stop or kill: from then on the end of the root is what was wanted.
        self.is_stopping = False
        self._nursery: trio.Nursery | None = None
        # Top-level lives in start order.
        self._top: list[Incarnation] = []
        self._serial = 0
        self._alive = 0
        self._spawned = 0
        self._ends: Counter[str] = Counter()
        self._restarts = 0
        self._dead_letters: Counter[str] = Counter()
        self._recent_dead_letters: deque[DeadLetter] = deque(maxlen=REMEMBERED_DEAD_LETTERS)
        self._late_replies = 0
        self._unheard_refusals = 0
        self._moot_notices = 0
        self._drops = 0
        self._detector: StuckDetector | None = None
        self._stuck_handlers: deque[StuckHandler] = deque(maxlen=REMEMBERED_STUCK_HANDLERS)
        self._stuck_total = 0
        self._cleanup_overruns = 0

    # -- for everybody

    def ref(self, name: str) -> Ref[Any]:
        """The address of whoever holds a name, now or later."""
        return Ref(self, name)

    async def spawn(self, spec: Startable) -> Ref[Any]:
        """Start an actor at the top with no supervisor above it; returns once its `started()` has.

        If it crashes, that is logged and nothing else happens. If this is cancelled, it has ended, a supervisor
        with what is up below it in order. For tools and tests.

        Raises:
            StartFailed: it did not come up.
            NameTaken: its name is held.
        """
        life = await self._start_top(spec)
        return Ref(self, life.name)

    def tree(self) -> tuple[ActorSnapshot, ...]:
        """A snapshot of all actors, the top ones in start order."""
        return tuple(life.snapshot() for life in self._top)

    def statistics(self) -> SystemStatistics:
        """Return the counters as they are now."""
        return SystemStatistics(
            alive=self._alive,
            spawned=self._spawned,
            normal=self._ends["Normal"],
            shut_down=self._ends["Shutdown"],
            crashed=self._ends["Crashed"],
            killed=self._ends["Killed"],
            restarts=self._restarts,
            dead_letters=self._dead_letters.total(),
            dead_letters_by_type=dict(self._dead_letters),
            late_replies=self._late_replies,
            unheard_refusals=self._unheard_refusals,
            moot_notices=self._moot_notices,
            drops=self._drops,
            stuck_handlers=self._stuck_total,
            cleanup_overruns=self._cleanup_overruns,
        )

    def recent_dead_letters(self) -> tuple[DeadLetter, ...]:
        """The last ones, oldest first."""
        return tuple(self._recent_dead_letters)

    def recent_reports(self) -> tuple[object, ...]:
        """What supervisors reported lately, oldest first."""
        return tuple(self._reports)

    def recent_stuck_handlers(self) -> tuple[StuckHandler, ...]:
        """What the detector reported lately, oldest first."""
        return tuple(self._stuck_handlers)

    def watch_handlers(self, threshold_seconds: float | None) -> None:
        """Put the stuck-handler detector on, or with None take it off. Off, it costs nothing.

        It reports, once each, a step of any task that holds the event loop for longer than the threshold, and
        a message that an actor has been handling for longer (see `Actor.stuck_after_seconds`).
        """
        if self._nursery is None:
            raise InternalError("the system is not open")
        if self._detector is not None:
            self._detector.close()
            self._detector = None
        if threshold_seconds is not None:
            self._detector = StuckDetector(threshold_seconds, self.registry.lives, self._note_stuck)
            self._detector.open(self._nursery)

    def _note_stuck(self, stuck: StuckHandler) -> None:
        self._stuck_total += 1
        self._stuck_handlers.append(stuck)
        self.report(stuck)

    def set_tracer(self, tracer: Tracer | None) -> None:
        """Put a tracer on, or with None take it off. Takes effect at the next hook."""
        self.tracer = None if tracer is None else GuardedTracer(tracer, lambda: self.set_tracer(None))

    def report(self, report: object) -> None:
        """Publish a structured report; its `str()` is for people. Kept, and given to the reporter or the log.

        Where it has a `subject`, that says whom the line of the log is about (see `Actor.subject`).
        """
        self._reports.append(report)
        if self._reporter is None:
            about = getattr(report, "subject", {})
            _log.error("%s", report, extra={field: about.get(field) for field in ("actor", "vm", "session")})
            return
        try:
            self._reporter(report)
        except Exception:  # noqa: BLE001 - a supervisor must not end because its report could not be written
            _log.exception("the reporter failed on: %s", report)

    def kill(self, cause: str = "system killed") -> None:
        """End everything without grace; cleanups still run. Does not wait."""
        self.is_stopping = True
        for life in reversed(self._top):
            life.kill(cause)

    async def stop(self, timeout_seconds: float = math.inf) -> None:
        """Stop the top-level actors in reverse start order, each with all below it; then nothing lives.

        What has not ended when the time is over is killed. If cancelled, whatever was not reached goes on.
        """
        self.is_stopping = True
        with trio.move_on_after(timeout_seconds):
            while self._top:
                life = self._top[-1]
                life.request_stop(Shutdown("system stop"))
                await life.wait_exited()
        self.kill("system stop took too long")
        while self._top:
            await self._top[-1].wait_exited()
        await trio.lowlevel.checkpoint()

    # -- for the runtime and for supervisors

    def next_serial(self) -> int:
        """A number that this system has not used yet."""
        self._serial += 1
        return self._serial

    def life_began(self, life: Incarnation, parent: str | None) -> None:
        """Count and trace a birth."""
        self._alive += 1
        self._spawned += 1
        if self.tracer is not None:
            self.tracer.spawned(trio.current_time(), life.name, life.serial, parent)

    def life_ended(self, life: Incarnation, reason: ExitReason) -> None:
        """Count and trace a death."""
        self._alive -= 1
        self._ends[type(reason).__name__] += 1
        if life in self._top:
            self._top.remove(life)
            if isinstance(reason, Crashed):
                _log.error("top-level actor %s crashed", life.name, exc_info=reason.error)
        if self.tracer is not None:
            self.tracer.exited(trio.current_time(), life.name, life.serial, reason)

    def child_restarting(self, supervisor: str, name: str, attempt: int) -> None:
        """Count and trace a restart."""
        self._restarts += 1
        if self.tracer is not None:
            self.tracer.restarting(trio.current_time(), supervisor, name, attempt)

    def dead_letter(self, target: str, message: object) -> None:
        """Count, remember and trace a message nobody will read."""
        kind = type(message).__name__
        self._dead_letters[kind] += 1
        sender = current_actor_name()
        self._recent_dead_letters.append(
            DeadLetter(
                trio.current_time(), target, kind, _describe(message), sender if sender != target else None
            )
        )
        if self.tracer is not None:
            self.tracer.dead_letter(trio.current_time(), target, message)

    def count_late_reply(self) -> None:
        """Count an answer whose asker had gone."""
        self._late_replies += 1

    def count_unheard_refusal(self) -> None:
        """Count a refusal that nobody waited for."""
        self._unheard_refusals += 1

    def count_moot_notice(self) -> None:
        """Count a notice whose target had ended."""
        self._moot_notices += 1

    def count_drop(self) -> None:
        """Count a message that a mailbox dropped for a newer one."""
        self._drops += 1

    def count_cleanup_overrun(self) -> None:
        """Count a `stopped()` that was cut off."""
        self._cleanup_overruns += 1

    def new_life(
        self,
        name: str,
        create: Callable[[], Actor],
        *,
        parent: Incarnation | None = None,
        is_supervised: bool = False,
        restarts: int = 0,
        last_exit: ExitReason | None = None,
    ) -> Incarnation:
        """Make an actor, and the life for it that whoever starts it runs by ``nursery.start(life.run)``.

        Raises:
            StartFailed: the factory raised.
        """
        try:
            actor = create()
        except Exception as error:
            # Building the actor is part of starting it: whoever starts it decides, as for an error in started().
            raise StartFailed(name, Crashed(error)) from error
        return Incarnation(
            self,
            name,
            actor,
            parent=parent,
            is_supervised=is_supervised,
            restarts=restarts,
            last_exit=last_exit,
        )

    async def _start_top(self, spec: Startable) -> Incarnation:
        """Start an actor at the top; if cancelled, it has ended by then, in order if it can."""
        if self._nursery is None:
            raise InternalError("the system is not open")
        nursery, life = self._nursery, self.new_life(spec.name, spec.create)
        is_over = trio.Event()
        is_up = False
        failure: ActorError | None = None

        async def start() -> None:
            nonlocal failure, is_up
            try:
                await nursery.start(life.run)
                is_up = True
            except (StartFailed, NameTaken) as error:
                failure = error
            finally:
                is_over.set()

        # In a task of its own, where whoever waits here may be cancelled and what is up already is not.
        nursery.start_soon(start)
        try:
            await is_over.wait()
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await self._break_off(life, is_over)
            raise
        if failure is not None:
            raise failure
        if not is_up:
            # The system was closed meanwhile.
            raise StartFailed(life.name, life.reason or Killed())
        if life.is_alive:
            self._top.append(life)
        return life

    async def _break_off(self, life: Incarnation, is_over: trio.Event) -> None:
        """End a top-level life whose start is not over, or only just."""

        async def wait() -> None:
            await is_over.wait()
            # One that came up all the same has to end as well; one that has no task never began, its name being taken.
            if life.task is not None:
                await life.wait_exited()

        if life.actor.stop_ends_start:
            life.request_stop(Shutdown("system stop"))
            with trio.move_on_after(self._shutdown_seconds):
                await wait()
        life.kill()
        await wait()

    async def _hold_nursery(self, *, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        """Keep the nursery of top-level actors out of reach of outside cancellation."""
        with trio.CancelScope(shield=True) as scope:
            async with trio.open_nursery() as self._nursery:
                task_status.started(scope)
                await trio.sleep_forever()


@asynccontextmanager
async def open_system(
    root: Startable | None = None,
    *,
    tracer: Tracer | None = None,
    reporter: Reporter | None = None,
    shutdown_seconds: float = math.inf,
    stuck_seconds: float | None = None,
) -> AsyncIterator[ActorSystem]:
    """Start a tree of actors, run the block, stop the tree in order.

    However the block ends (normally, with an error, cancelled), the tree is stopped in reverse start order,
    shielded, before this returns. If the root ends by itself while the block runs, the block is cancelled and
    `SystemFailed` is raised; where the root ended `Normal()`, was asked to, or shut itself down (auto_shutdown), the block goes on
    (wait for that with `system.ref(root.name).wait_exit()`).

    Args:
        root: spec of the top supervisor or actor; None for an empty system.
        tracer: sees spawns, exits, restarts and messages; can be changed later.
        reporter: gets supervisors' reports; None logs them.
        shutdown_seconds: after that long the stop becomes a kill, also that of a root which is still coming up.
        stuck_seconds: threshold of the stuck-handler detector; None leaves it off.

    Raises:
        StartFailed: the root did not start; everything it had started is stopped again.
        SystemFailed: see above.
    """
    system = ActorSystem(tracer, reporter, shutdown_seconds)
    failed: ExitReason | None = None
    raised: BaseException | None = None
    try:
        async with trio.open_nursery() as outer:
            holder: trio.CancelScope = await outer.start(system._hold_nursery)
            try:
                if stuck_seconds is not None:
                    system.watch_handlers(stuck_seconds)
                with trio.CancelScope() as block:
                    if root is not None:
                        life = await system._start_top(root)

                        def root_ended(reason: ExitReason) -> None:
                            nonlocal failed
                            if not system.is_stopping and not _is_quiet(reason):
                                failed = reason
                                block.cancel()

                        if life.is_alive:
                            life.add_monitor(system.next_serial(), root_ended)
                        else:
                            root_ended(life.reason or NoActor())
                    yield system
            finally:
                with trio.CancelScope(shield=True):
                    await system.stop(shutdown_seconds)
                    system.watch_handlers(None)
                holder.cancel()
    except BaseExceptionGroup as group:
        # The nursery is our own affair: hand on what the block raised as it was raised.
        raised = group.exceptions[0] if len(group.exceptions) == 1 else group
    if raised is not None:
        raise raised from raised.__cause__
    if failed is not None and root is not None:
        raise SystemFailed(root.name, failed)


def _describe(message: object) -> str:
    """A message's fields, each cut short by reprlib, which also survives a repr that raises."""
    kind = type(message)
    if not attrs.has(kind):
        return reprlib.repr(message)
    fields = attrs.fields(kind)
    return ", ".join(f"{field.name}={reprlib.repr(getattr(message, field.name))}" for field in fields)


def _is_quiet(reason: ExitReason) -> bool:
    """Whether a root that ended by itself did what it was meant to."""
    return isinstance(reason, Normal) or reason in (ASKED, AUTO_SHUTDOWN)
