# SPDX-License-Identifier: Apache-2.0
"""Addresses: asking with a deadline, late and deferred answers, refusals, dead letters, monitors."""

from __future__ import annotations

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from vgpu.actors import (
    Actor,
    ActorError,
    ActorGone,
    ActorSpec,
    AskTimeout,
    Crashed,
    Down,
    MailboxFull,
    NoActor,
    Normal,
    Policy,
    Ref,
    Refused,
    Reply,
    Request,
    Shutdown,
    UnknownMessage,
    handles,
    open_system,
)
from vgpu.actors.testing import open_probe


@attrs.frozen
class Double(Request[int]):
    number: int


@attrs.frozen
class Slow(Request[str]):
    seconds: float


@attrs.frozen
class Later(Request[str]):
    """Answered by `Release`."""


@attrs.frozen
class Release:
    text: str


@attrs.frozen
class Fail(Request[None]):
    pass


@attrs.frozen
class Quit:
    pass


class Server(Actor):
    def __init__(self) -> None:
        self.held: list[Reply[str]] = []
        self.answered: list[bool] = []

    @handles(Double)
    def double(self, request: Double) -> int:
        if request.number < 0:
            raise Refused(ValueError("negative"))
        return request.number * 2

    @handles(Slow)
    async def slow(self, request: Slow) -> str:
        await trio.sleep(request.seconds)
        return "done"

    @handles(Later)
    def later(self, _: Later) -> None:
        reply = self.take_reply()
        if reply is not None:
            self.held.append(reply)

    @handles(Release)
    def release(self, message: Release) -> None:
        self.answered.append(self.held.pop(0).answer(message.text))

    @handles(Fail)
    def fail(self, _: Fail) -> None:
        raise KeyError("broken")

    @handles(Quit)
    def quit(self, _: Quit) -> None:
        self.stop()


SERVER = ActorSpec("server", Server)


async def test_ask_returns_the_handlers_value() -> None:
    async with open_system(SERVER) as system:
        assert await system.ref("server").ask(Double(21)) == 42


async def test_a_refusal_reaches_the_asker_and_the_actor_goes_on() -> None:
    async with open_system(SERVER) as system:
        with pytest.raises(ValueError, match="negative"):
            await system.ref("server").ask(Double(-1))
        await system.ref("server").send(Double(-1))
        assert await system.ref("server").ask(Double(1)) == 2
        assert system.statistics().unheard_refusals == 1


async def test_a_late_reply_is_dropped_and_counted(autojump_clock: MockClock) -> None:
    async with open_system(SERVER) as system:
        began = trio.current_time()
        with pytest.raises(AskTimeout, match="'server' did not answer Slow in 2 s"):
            await system.ref("server").ask(Slow(10), timeout_seconds=2)
        assert trio.current_time() - began == pytest.approx(2)
        assert system.statistics().late_replies == 0
        await trio.sleep(9)
        assert system.statistics().late_replies == 1


async def test_a_cancelled_ask_is_abandoned(autojump_clock: MockClock) -> None:
    async with open_system(SERVER) as system:
        with trio.move_on_after(1) as scope:
            await system.ref("server").ask(Slow(3))
        assert scope.cancelled_caught
        await trio.sleep(5)
        assert system.statistics().late_replies == 1


async def test_the_deadline_covers_waiting_for_room(autojump_clock: MockClock) -> None:
    class Narrow(Server):
        mailbox_capacity = 1

    async with open_system(ActorSpec("server", Narrow)) as system:
        ref = system.ref("server")
        await ref.send(Slow(10))
        await wait_all_tasks_blocked()
        await ref.send(Slow(0))
        with pytest.raises(AskTimeout):
            await ref.ask(Double(1), timeout_seconds=1)
        assert await ref.ask(Double(1), timeout_seconds=20) == 2


async def test_an_answer_may_come_after_the_handler() -> None:
    async with open_system(SERVER) as system, trio.open_nursery() as nursery:
        ref = system.ref("server")
        answers: list[str] = []

        async def ask() -> None:
            answers.append(await ref.ask(Later()))

        nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        assert await ref.ask(Double(1)) == 2
        assert answers == []
        await ref.send(Release("now"))
        await wait_all_tasks_blocked()
        assert answers == ["now"]


async def test_answering_twice_is_an_error() -> None:
    late: list[None] = []
    reply: Reply[int] = Reply(lambda: late.append(None))
    assert reply.is_awaited
    assert reply.answer(1)
    assert not reply.is_awaited
    with pytest.raises(ActorError, match="answered before"):
        reply.answer(2)
    with pytest.raises(ActorError, match="answered before"):
        reply.refuse(ValueError())
    await reply.wait()
    assert reply.take() == 1
    assert late == []


@pytest.mark.parametrize("when", ["in the handler", "in the mailbox", "deferred"])
async def test_the_end_of_the_target_fails_its_asks(when: str) -> None:
    async with open_system() as system:
        ref = await system.spawn(SERVER)
        failures: list[ActorGone] = []

        async def ask(request: Request[object]) -> None:
            with pytest.raises(ActorGone) as caught:
                await ref.ask(request)
            failures.append(caught.value)

        async with trio.open_nursery() as nursery:
            if when == "in the handler":
                nursery.start_soon(ask, Fail())
            elif when == "in the mailbox":
                # Both are sent before the server runs again; the second is never handled.
                ref.send_nowait(Fail())
                nursery.start_soon(ask, Double(1))
            else:
                nursery.start_soon(ask, Later())
                await wait_all_tasks_blocked()
                await ref.send(Fail())
        assert len(failures) == 1
        assert isinstance(failures[0].reason, Crashed)
        assert isinstance(failures[0].reason.error, KeyError)


async def test_asking_nobody() -> None:
    async with open_system() as system:
        with pytest.raises(ActorGone, match="'nobody' is gone: no such actor"):
            await system.ref("nobody").ask(Double(1))
        ref = await system.spawn(SERVER)
        ref.stop()
        await ref.wait_exit()
        with pytest.raises(ActorGone, match="shutdown"):
            await ref.ask(Double(1))


async def test_asking_a_name_that_is_yet_to_come(autojump_clock: MockClock) -> None:
    async with open_system() as system, trio.open_nursery() as nursery:
        ref = system.ref("server")
        with pytest.raises(AskTimeout):
            await ref.ask(Double(1), timeout_seconds=1, wait_for_name=True)

        async def later() -> None:
            await trio.sleep(2)
            await system.spawn(SERVER)

        nursery.start_soon(later)
        assert await ref.ask(Double(4), wait_for_name=True) == 8
        await ref.wait_alive()


async def test_messages_to_nobody_are_dead_letters() -> None:
    async with open_system() as system:
        nobody = system.ref("nobody")
        assert not await nobody.send(Quit())
        assert not nobody.send_nowait(Release("x"))
        statistics = system.statistics()
        assert statistics.dead_letters == 2
        assert statistics.dead_letters_by_type == {"Quit": 1, "Release": 1}
        assert [(one.target, one.message_type, one.text) for one in system.recent_dead_letters()] == [
            ("nobody", "Quit", ""),
            ("nobody", "Release", "text='x'"),
        ]


async def test_a_dead_letter_names_its_sender_and_holds_nothing_of_the_message() -> None:
    @attrs.frozen
    class Heavy:
        load: object

    class Load:
        def __repr__(self) -> str:
            raise RuntimeError("no description")

    class Sender(Actor):
        @handles(Quit)
        async def quit(self, _: Quit) -> None:
            await self.find("nobody").send(Heavy(Load()))
            await self.find("nobody").send(Release("x" * 100_000))

    async with open_system() as system:
        ref = await system.spawn(ActorSpec("sender", Sender))
        await ref.send(Quit())
        await wait_all_tasks_blocked()
        heavy, long = system.recent_dead_letters()
        assert heavy.sender == long.sender == "sender"
        assert heavy.text.startswith("load=<Load instance at 0x")
        assert len(long.text) < 60


async def test_a_notice_that_its_targets_end_makes_moot_is_no_dead_letter() -> None:
    async with open_system() as system:
        ref = await system.spawn(SERVER)
        assert ref.notify(Quit())
        await ref.wait_exit()
        assert not ref.notify(Quit())
        ref = await system.spawn(SERVER)
        # The stop request overtakes it.
        assert ref.notify(Quit())
        ref.stop()
        await ref.wait_exit()
        statistics = system.statistics()
        assert (statistics.moot_notices, statistics.dead_letters) == (2, 0)


async def test_a_sender_blocked_at_a_dying_actor_is_told() -> None:
    class Narrow(Server):
        mailbox_capacity = 1

    async with open_system() as system, trio.open_nursery() as nursery:
        ref = await system.spawn(ActorSpec("server", Narrow))
        results: list[bool] = []

        async def send() -> None:
            results.append(await ref.send(Quit()))

        await ref.send(Slow(1e9))
        await wait_all_tasks_blocked()
        await ref.send(Quit())
        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        ref.kill()
        await wait_all_tasks_blocked()
        assert results == [False]
        assert system.statistics().dead_letters == 2


async def test_an_ask_dropped_for_newer_messages_fails() -> None:
    class Dropping(Server):
        mailbox_capacity = 1
        mailbox_policy = Policy.DROP_OLDEST

    async with open_system(ActorSpec("server", Dropping)) as system, trio.open_nursery() as nursery:
        ref = system.ref("server")
        await ref.send(Slow(1e9))
        await wait_all_tasks_blocked()

        async def ask() -> None:
            with pytest.raises(MailboxFull, match="dropped the request"):
                await ref.ask(Double(1))

        nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        assert await ref.send(Release("newer"))
        await wait_all_tasks_blocked()
        ref.kill()


async def test_refs_are_values() -> None:
    async with open_system(SERVER) as system, open_system() as other:
        assert system.ref("server") == system.ref("server")
        assert len({system.ref("server"), system.ref("server")}) == 1
        assert system.ref("server") != system.ref("else")
        assert system.ref("server") != other.ref("server")
        assert system.ref("server") != "server"
        assert repr(system.ref("server")) == "<Ref 'server'>"
        assert await other.ref("server").wait_exit() == NoActor()


# -- monitors


async def test_a_monitor_tells_once_with_the_reason() -> None:
    async with open_system() as system, open_probe(system) as probe:
        ref = await system.spawn(SERVER)
        one, two = probe.monitor(ref), probe.monitor(ref)
        await ref.send(Quit())
        downs = [await probe.expect(Down), await probe.expect(Down)]
        assert {down.monitor for down in downs} == {one, two}
        assert {(down.name, down.reason) for down in downs} == {("server", Normal())}
        # Another life under the name is another matter.
        await system.spawn(SERVER)
        ref.stop()
        await ref.wait_exit()
        await probe.expect_nothing()


async def test_monitoring_the_dead_and_the_unknown() -> None:
    async with open_system() as system, open_probe(system) as probe:
        ref = await system.spawn(SERVER)
        ref.stop()
        await ref.wait_exit()
        monitor = probe.monitor(ref)
        assert await probe.expect(Down) == Down(monitor, "server", Shutdown("asked"))
        monitor = probe.monitor(system.ref("nobody"))
        assert await probe.expect(Down) == Down(monitor, "nobody", NoActor())
        await probe.expect_nothing()


async def test_a_monitor_that_is_taken_off_stays_silent() -> None:
    class Watcher(Actor):
        def __init__(self, target: Ref[object]) -> None:
            self.target = target
            self.downs = 0

        async def started(self) -> None:
            self.demonitor(self.monitor(self.target))
            self.demonitor(12345)

        @handles(Down)
        def down(self, _: Down) -> None:
            self.downs += 1

    async with open_system() as system:
        ref = await system.spawn(SERVER)
        watcher = Watcher(ref)
        await system.spawn(ActorSpec("watcher", lambda: watcher))
        ref.kill()
        await ref.wait_exit()
        await wait_all_tasks_blocked()
        assert watcher.downs == 0


async def test_flushing_takes_back_a_down_that_was_sent() -> None:
    class Watcher(Actor):
        def __init__(self) -> None:
            self.downs: list[int] = []

        @handles(Double)
        def twice(self, _: Double) -> tuple[int, int]:
            # Both are dead: both Downs are in the mailbox before this returns.
            flushed, kept = self.monitor(self.find("a")), self.monitor(self.find("b"))
            self.demonitor(flushed, flush=True)
            self.demonitor(kept)
            return flushed, kept

        @handles(Down)
        def down(self, message: Down) -> None:
            self.downs.append(message.monitor)

    async with open_system() as system:
        watcher = Watcher()
        ref = await system.spawn(ActorSpec("watcher", lambda: watcher))
        answer: object = await ref.ask(Double(1))
        assert isinstance(answer, tuple)
        await wait_all_tasks_blocked()
        assert watcher.downs == [answer[1]]


async def test_a_watcher_that_ends_first_leaves_no_monitor_behind() -> None:
    async with open_system() as system:
        ref = await system.spawn(SERVER)
        async with open_probe(system) as probe:
            probe.monitor(ref)
            life = system.registry.find("server")
            assert life is not None
            assert len(life._monitors) == 1
        assert len(life._monitors) == 0


async def test_monitoring_needs_a_handler() -> None:
    class Deaf(Actor):
        async def started(self) -> None:
            self.monitor(self.find("server"))

    async with open_system(SERVER) as system:
        with pytest.raises(Exception, match="Deaf monitors others but has no handler for Down") as caught:
            await system.spawn(ActorSpec("deaf", Deaf))
        assert isinstance(caught.value.__cause__, UnknownMessage)
