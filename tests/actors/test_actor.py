# SPDX-License-Identifier: Apache-2.0
"""One actor's life: hooks, handlers, background tasks, timers, cleanup, and every way to end."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from vgpu.actors import (
    Actor,
    ActorError,
    ActorSpec,
    ActorState,
    Crashed,
    ExitReason,
    InternalError,
    Killed,
    MailboxFull,
    NameTaken,
    Normal,
    Policy,
    Request,
    Shutdown,
    StartFailed,
    UnknownMessage,
    handles,
    open_system,
    shielded,
)


@attrs.frozen
class Do:
    """Run something inside the actor."""

    what: Callable[[Play], object]


@attrs.frozen
class Note:
    text: str


@attrs.frozen
class LoudNote(Note):
    pass


@attrs.frozen
class Notes(Request[list[str]]):
    pass


class Play(Actor):
    """Writes down what happens to it, in a list the test holds."""

    cleanup_seconds = 3.0

    def __init__(self, log: list[str], **hooks: Callable[[Play], object]) -> None:
        self.log = log
        self.hooks = hooks

    async def _hook(self, name: str) -> None:
        hook = self.hooks.get(name)
        if hook is not None:
            result = hook(self)
            if inspect.isawaitable(result):
                await result

    async def started(self) -> None:
        self.log.append("started")
        await self._hook("started")

    async def stopping(self, reason: ExitReason) -> None:
        self.log.append("stopping")
        await self._hook("stopping")

    async def stopped(self, reason: ExitReason) -> None:
        self.log.append(f"stopped: {reason}")
        await self._hook("stopped")

    @handles(Do)
    async def do(self, message: Do) -> None:
        result = message.what(self)
        if inspect.isawaitable(result):
            await result

    @handles(Note)
    def note(self, message: Note) -> None:
        self.log.append(message.text)

    @handles(Notes)
    async def notes(self, _: Notes) -> list[str]:
        return list(self.log)


def play(log: list[str], **hooks: Callable[[Play], object]) -> ActorSpec:
    return ActorSpec("play", lambda: Play(log, **hooks))


async def forever(_: Play) -> None:
    await trio.sleep_forever()


def pause(seconds: float) -> Callable[[Play], object]:
    async def wait(_: Play) -> None:
        await trio.sleep(seconds)

    return wait


def fail(_: object) -> object:
    raise ValueError("boom")


async def test_handlers_by_type_sync_async_and_inherited() -> None:
    async with open_system(play([])) as system:
        ref = system.ref("play")
        await ref.send(Note("a"))
        await ref.send(LoudNote("b"))
        assert await ref.ask(Notes()) == ["started", "a", "b"]


async def test_an_undeclared_message_is_the_senders_error() -> None:
    @attrs.frozen
    class Stranger:
        pass

    async with open_system(play([])) as system:
        ref = system.ref("play")
        with pytest.raises(UnknownMessage, match="Play 'play' has no handler for Stranger"):
            await ref.send(Stranger())
        with pytest.raises(UnknownMessage):
            ref.send_nowait(Stranger())
        assert await ref.ask(Notes()) == ["started"]


def test_messages_must_be_frozen_attrs_classes() -> None:
    @attrs.define
    class Mutable:
        value: int = 0

    class Plain:
        pass

    for wrong in (Mutable, Plain, dict):
        with pytest.raises(TypeError, match="messages are frozen attrs classes"):
            handles(wrong)


def test_two_handlers_for_one_type_are_refused() -> None:
    with pytest.raises(TypeError, match="handles Note twice: first and second"):

        class Confused(Actor):
            @handles(Note)
            def first(self, message: Note) -> None: ...

            @handles(Note)
            def second(self, message: Note) -> None: ...


async def test_a_subclass_overrides_a_handler() -> None:
    class Quiet(Play):
        @handles(Note)
        def other(self, message: Note) -> None:
            self.log.append("quiet")

    log: list[str] = []
    async with open_system(ActorSpec("play", lambda: Quiet(log))) as system:
        await system.ref("play").send(Note("a"))
        assert await system.ref("play").ask(Notes()) == ["started", "quiet"]


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        (lambda actor: actor.stop(), Normal()),
        (lambda actor: actor.stop(Shutdown("enough")), Shutdown("enough")),
        (lambda actor: actor.life.kill("test"), Killed("test")),
    ],
)
async def test_ends_from_inside(what: Callable[[Play], object], expected: ExitReason) -> None:
    log: list[str] = []
    async with open_system() as system:
        ref = await system.spawn(play(log))
        await ref.send(Do(what))
        assert await ref.wait_exit() == expected
        assert not ref.is_alive
    assert log[-1] == f"stopped: {expected}"
    assert ("stopping" in log) == (not isinstance(expected, Killed))


async def test_a_stop_request_overtakes_a_full_mailbox() -> None:
    class Small(Play):
        mailbox_capacity = 2

    log: list[str] = []
    gate = trio.Event()
    async with open_system() as system:
        ref = await system.spawn(ActorSpec("play", lambda: Small(log)))
        await ref.send(Do(lambda _: gate.wait()))
        await wait_all_tasks_blocked()
        await ref.send(Note("never read"))
        await ref.send(Note("never read"))
        ref.stop()
        ref.stop(Normal())
        gate.set()
        assert await ref.wait_exit() == Shutdown("asked")
        assert system.statistics().dead_letters == 2
        assert system.statistics().dead_letters_by_type == {"Note": 2}
        assert [letter.target for letter in system.recent_dead_letters()] == ["play", "play"]
    assert log == ["started", "stopping", "stopped: shutdown (asked)"]


async def test_a_crash_in_a_handler_is_the_exit_reason() -> None:
    log: list[str] = []
    async with open_system() as system:
        ref = await system.spawn(play(log))
        await ref.send(Do(fail))
        reason = await ref.wait_exit()
        assert isinstance(reason, Crashed)
        assert isinstance(reason.error, ValueError)
        assert system.statistics().crashed == 1
    assert log == ["started", "stopped: crashed: ValueError: boom"]


async def test_a_crash_in_a_background_task_ends_the_actor() -> None:
    async def background() -> None:
        await trio.lowlevel.checkpoint()
        raise KeyError("lost")

    log: list[str] = []
    async with open_system() as system:
        ref = await system.spawn(play(log))
        await ref.send(Do(lambda actor: actor.nursery.start_soon(background)))
        reason = await ref.wait_exit()
        # Not wrapped in the nursery's group: one error is one error.
        assert isinstance(reason, Crashed)
        assert isinstance(reason.error, KeyError)


async def test_two_errors_at_once_are_both_kept() -> None:
    async def background() -> None:
        raise KeyError("one")

    def two(actor: Play) -> object:
        actor.nursery.start_soon(background)
        actor.nursery.start_soon(background)
        return None

    async with open_system() as system:
        ref = await system.spawn(play([]))
        await ref.send(Do(two))
        reason = await ref.wait_exit()
        assert isinstance(reason, Crashed)
        assert isinstance(reason.error, ExceptionGroup)
        assert len(reason.error.exceptions) == 2


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_background_tasks_clean_up_before_the_end_is_told(how: str, autojump_clock: MockClock) -> None:
    """The executor's case: a task owns a process, and must be able to wait for its end even when killed."""
    log: list[str] = []

    async def owns_a_process() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with shielded(2.0):
                await trio.sleep(1)
                log.append("process ended")

    async with open_system() as system:
        ref = await system.spawn(play(log, started=lambda actor: actor.nursery.start_soon(owns_a_process)))
        await wait_all_tasks_blocked()
        began = trio.current_time()
        ref.stop() if how == "stop" else ref.kill("test")
        await ref.wait_exit()
        assert trio.current_time() - began == pytest.approx(1)
    assert log[-2] == "process ended"
    assert log[-1].startswith("stopped: ")


async def test_a_background_cleanup_is_cut_off(autojump_clock: MockClock) -> None:
    async def stubborn() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with shielded(2.0):
                await trio.sleep_forever()

    async with open_system() as system:
        ref = await system.spawn(play([], started=lambda actor: actor.nursery.start_soon(stubborn)))
        await wait_all_tasks_blocked()
        began = trio.current_time()
        ref.kill()
        assert await ref.wait_exit() == Killed()
        assert trio.current_time() - began == pytest.approx(2)


async def test_stopping_runs_with_background_tasks_alive() -> None:
    states: list[bool] = []

    async def background(ended: trio.Event) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    ended = trio.Event()
    async with open_system() as system:
        ref = await system.spawn(
            play(
                [],
                started=lambda actor: actor.nursery.start_soon(background, ended),
                stopping=lambda _: states.append(ended.is_set()),
                stopped=lambda _: states.append(ended.is_set()),
            )
        )
        await wait_all_tasks_blocked()
        ref.stop()
        await ref.wait_exit()
    assert states == [False, True]


async def test_cleanup_is_shielded_and_limited(autojump_clock: MockClock) -> None:
    log: list[str] = []
    async with open_system() as system:
        ref = await system.spawn(play(log, stopped=forever))
        began = trio.current_time()
        ref.kill()
        assert await ref.wait_exit() == Killed()
        assert trio.current_time() - began == pytest.approx(Play.cleanup_seconds)
        assert system.statistics().cleanup_overruns == 1


async def test_cleanup_that_raises_makes_an_orderly_end_a_crash() -> None:
    async with open_system() as system:
        ref = await system.spawn(play([], stopped=fail))
        ref.stop()
        reason = await ref.wait_exit()
        assert isinstance(reason, Crashed)
        assert str(reason) == "crashed: ValueError: boom"


async def test_cleanup_that_raises_after_a_crash_is_added_to_it() -> None:
    def lose(_: Play) -> object:
        raise KeyError("first")

    async with open_system() as system:
        ref = await system.spawn(play([], stopped=fail))
        await ref.send(Do(lose))
        reason = await ref.wait_exit()
        assert isinstance(reason, Crashed)
        assert isinstance(reason.error, KeyError)
        assert reason.error.__notes__ == ["while stopped() raised ValueError: boom"]


async def test_a_start_that_raises() -> None:
    log: list[str] = []
    async with open_system() as system:
        with pytest.raises(StartFailed, match="'play' did not start: crashed: ValueError: boom") as caught:
            await system.spawn(play(log, started=fail))
        assert isinstance(caught.value.__cause__, ValueError)
        assert not system.ref("play").is_alive
        assert system.statistics().alive == 0
    assert log == ["started", "stopped: crashed: ValueError: boom"]


async def test_a_factory_that_raises() -> None:
    def create() -> Actor:
        raise OSError("no device")

    async with open_system() as system:
        with pytest.raises(StartFailed, match="no device"):
            await system.spawn(ActorSpec("play", create))


async def test_a_cancelled_start_leaves_nothing() -> None:
    log: list[str] = []
    async with open_system() as system:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(system.spawn, play(log, started=forever))
                await wait_all_tasks_blocked()
                assert system.ref("play").is_alive
                scope.cancel()
        assert scope.cancelled_caught
        assert not system.ref("play").is_alive
        assert system.statistics().alive == 0
    assert log == ["started", "stopped: killed"]


async def test_a_kill_during_the_start() -> None:
    async with open_system() as system, trio.open_nursery() as nursery:

        async def start() -> None:
            with pytest.raises(StartFailed, match="killed"):
                await system.spawn(play([], started=forever))

        nursery.start_soon(start)
        await wait_all_tasks_blocked()
        system.ref("play").kill()


async def test_messages_wait_while_the_actor_starts() -> None:
    gate = trio.Event()
    log: list[str] = []
    async with open_system() as system, trio.open_nursery() as nursery:
        nursery.start_soon(system.spawn, play(log, started=lambda _: gate.wait()))
        await wait_all_tasks_blocked()
        await system.ref("play").send(Note("early"))
        assert log == ["started"]
        gate.set()
        assert await system.ref("play").ask(Notes()) == ["started", "early"]


async def test_two_living_actors_cannot_share_a_name() -> None:
    async with open_system(play([])) as system:
        with pytest.raises(NameTaken, match="'play' is held"):
            await system.spawn(play([]))
        assert system.ref("play").is_alive


async def test_one_instance_lives_once() -> None:
    actor = Play([])
    async with open_system() as system:
        await system.spawn(ActorSpec("one", lambda: actor))
        with pytest.raises(StartFailed) as caught:
            await system.spawn(ActorSpec("two", lambda: actor))
        assert isinstance(caught.value.__cause__, InternalError)


def test_an_actor_that_does_not_run_says_so() -> None:
    with pytest.raises(InternalError, match="Play is not running"):
        Play([]).name  # noqa: B018 - the property is what is tested
    with pytest.raises(InternalError, match="Play is not running"):
        Play([]).nursery  # noqa: B018


async def test_send_after_and_calling_it_off(autojump_clock: MockClock) -> None:
    log: list[str] = []
    scopes: list[trio.CancelScope] = []

    def set_timers(actor: Play) -> None:
        actor.send_after(2, Note("two"))
        actor.send_after(1, Note("one"))
        scopes.append(actor.send_after(3, Note("three")))

    async with open_system(play(log)) as system:
        await system.ref("play").send(Do(set_timers))
        await trio.sleep(2.5)
        assert log == ["started", "one", "two"]
        scopes[0].cancel()
        await trio.sleep(2)
        assert log == ["started", "one", "two"]


async def test_a_timer_waits_for_room_in_a_refusing_mailbox(autojump_clock: MockClock) -> None:
    class Refusing(Play):
        mailbox_capacity = 1
        mailbox_policy = Policy.FAIL

    log: list[str] = []
    async with open_system(ActorSpec("play", lambda: Refusing(log))) as system:
        ref = system.ref("play")
        await ref.send(Do(lambda actor: actor.send_after(1, Note("timer"))))
        await wait_all_tasks_blocked()
        await ref.send(Do(pause(5)))
        await wait_all_tasks_blocked()
        await ref.send(Note("full"))
        with pytest.raises(MailboxFull):
            await ref.send(Note("refused"))
        await trio.sleep(6)
        assert log == ["started", "full", "timer"]


async def test_send_every_never_piles_up(autojump_clock: MockClock) -> None:
    log: list[str] = []
    async with open_system(play(log)) as system:
        ref = system.ref("play")
        await ref.send(Do(lambda actor: actor.send_every(1, Note("tick"))))
        await trio.sleep(3.5)
        assert log.count("tick") == 4
        # Busy for ten seconds: one tick waits, nine are skipped, and the rhythm is kept.
        await ref.send(Do(pause(10)))
        await trio.sleep(10.1)
        assert log.count("tick") == 5
        await trio.sleep(1)
        assert log.count("tick") == 6


async def test_send_every_needs_a_period() -> None:
    async with open_system() as system:
        ref = await system.spawn(play([]))
        await ref.send(Do(lambda actor: actor.send_every(0, Note("tick"))))
        assert (
            str(await ref.wait_exit()) == "crashed: ValueError: seconds between ticks must be above 0, got 0"
        )


async def test_interruptible_waiting_ends_with_a_stop_request() -> None:
    log: list[str] = []

    async def wait(actor: Play) -> None:
        with actor.interruptible() as scope:
            await trio.sleep_forever()
        log.append(f"interrupted: {scope.cancelled_caught}")

    async with open_system() as system:
        ref = await system.spawn(play(log))
        await ref.send(Do(wait))
        await wait_all_tasks_blocked()
        ref.stop()
        assert await ref.wait_exit() == Shutdown("asked")
    assert "interrupted: True" in log


async def test_an_actor_is_told_of_certain_deadlocks() -> None:
    class Tiny(Play):
        mailbox_capacity = 1

    errors: list[Exception] = []

    async def both(actor: Play) -> None:
        with pytest.raises(ActorError, match="asks itself") as asked:
            await actor.ref.ask(Notes())
        errors.append(asked.value)
        await actor.ref.send(Note("fits"))
        with pytest.raises(MailboxFull, match="its own full mailbox") as sent:
            await actor.ref.send(Note("does not"))
        errors.append(sent.value)

    async with open_system(ActorSpec("play", lambda: Tiny([]))) as system:
        await system.ref("play").send(Do(both))
        await wait_all_tasks_blocked()
        assert await system.ref("play").ask(Notes()) == ["started", "fits"]
    assert len(errors) == 2


async def test_a_snapshot_shows_state_and_mailbox() -> None:
    gate = trio.Event()
    async with open_system(play([])) as system:
        ref = system.ref("play")
        await ref.send(Do(lambda _: gate.wait()))
        await wait_all_tasks_blocked()
        await ref.send(Note("a"))
        (node,) = system.tree()
        assert (node.name, node.kind, node.state) == ("play", "Play", ActorState.RUNNING)
        assert node.mailbox is not None
        assert (node.mailbox.depth, node.mailbox.capacity, node.restarts) == (1, 256, 0)
        gate.set()
