# SPDX-License-Identifier: Apache-2.0
"""The system as a whole: opening, failing, stopping in order, names, tracing, snapshots."""

from __future__ import annotations

import logging

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from vgpu.actors import (
    ASKED,
    Actor,
    ActorSnapshot,
    ActorSpec,
    ActorState,
    Crashed,
    ExitReason,
    InternalError,
    Killed,
    NoActor,
    Normal,
    Request,
    Shutdown,
    SystemFailed,
    Tracer,
    handles,
    open_system,
    render_tree,
)
from vgpu.actors._registry import REMEMBERED_EXITS, Registry
from vgpu.actors.testing import RecordingTracer, open_probe


@attrs.frozen
class Ping(Request[str]):
    pass


@attrs.frozen
class End:
    reason: ExitReason


@attrs.frozen
class Break:
    pass


@attrs.frozen
class Forward:
    to: str


class Plain(Actor):
    def __init__(self, ends: list[str] | None = None, stop_seconds: float = 0) -> None:
        self.ends = [] if ends is None else ends
        self.stop_seconds = stop_seconds

    async def stopping(self, reason: ExitReason) -> None:
        await trio.sleep(self.stop_seconds)

    async def stopped(self, reason: ExitReason) -> None:
        self.ends.append(self.name)

    @handles(Ping)
    def ping(self, _: Ping) -> str:
        return "pong"

    @handles(End)
    def end(self, message: End) -> None:
        self.stop(message.reason)

    @handles(Break)
    def break_(self, _: Break) -> None:
        raise OSError("broken")

    @handles(Forward)
    async def forward(self, message: Forward) -> None:
        await self.find(message.to).send(End(Normal()))


def plain(name: str, ends: list[str] | None = None, stop_seconds: float = 0) -> ActorSpec:
    return ActorSpec(name, lambda: Plain(ends, stop_seconds))


async def test_top_level_actors_stop_in_reverse_order() -> None:
    ends: list[str] = []
    async with open_system(plain("root", ends)) as system:
        await system.spawn(plain("a", ends))
        await system.spawn(plain("b", ends))
        assert [node.name for node in system.tree()] == ["root", "a", "b"]
    assert ends == ["b", "a", "root"]
    assert system.statistics().alive == 0
    assert system.tree() == ()


async def test_the_blocks_error_comes_out_as_it_is_after_the_stop() -> None:
    ends: list[str] = []
    cause = OSError("cause")
    with pytest.raises(KeyError) as caught:
        async with open_system(plain("root", ends)):
            raise KeyError("mine") from cause
    assert caught.value.__cause__ is cause
    assert ends == ["root"]


async def test_a_cancelled_block_stops_gracefully(autojump_clock: MockClock) -> None:
    ends: list[str] = []
    began = trio.current_time()
    with trio.move_on_after(1) as scope:
        async with open_system(plain("root", ends, stop_seconds=3)) as system:
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert trio.current_time() - began == pytest.approx(4)
    assert ends == ["root"]
    assert system.statistics().shut_down == 1


async def test_a_stop_that_takes_too_long_becomes_a_kill(autojump_clock: MockClock) -> None:
    ends: list[str] = []
    began = trio.current_time()
    async with open_system(plain("root", ends, stop_seconds=100), shutdown_seconds=2) as system:
        pass
    assert trio.current_time() - began == pytest.approx(2)
    assert ends == ["root"]
    assert system.statistics().killed == 1


async def test_kill_ends_everything_at_once(autojump_clock: MockClock) -> None:
    began = trio.current_time()
    async with open_system(plain("root", stop_seconds=100)) as system:
        system.kill()
        assert isinstance(await system.ref("root").wait_exit(), Killed)
    assert trio.current_time() == began


@pytest.mark.parametrize("message", [Break(), End(Shutdown("gave up"))])
async def test_a_root_that_ends_by_itself_ends_the_block(message: object) -> None:
    with pytest.raises(SystemFailed, match="root actor 'root' ended") as caught:  # noqa: PT012
        async with open_system(plain("root")) as system:
            await system.ref("root").send(message)
            await trio.sleep_forever()
    assert isinstance(caught.value.reason, Crashed | Shutdown)


@pytest.mark.parametrize("message", [End(Normal()), End(Shutdown("auto_shutdown")), None])
async def test_a_root_that_has_finished_or_was_asked_does_not(message: End | None) -> None:
    async with open_system(plain("root")) as system:
        ref = system.ref("root")
        if message is None:
            ref.stop()
        else:
            await ref.send(message)
        assert await ref.wait_exit() == (ASKED if message is None else message.reason)
        await trio.lowlevel.checkpoint()
        await system.spawn(plain("another"))


async def test_an_unsupervised_crash_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with open_system() as system:
        ref = await system.spawn(plain("lone"))
        await ref.send(Break())
        await ref.wait_exit()
        assert system.tree() == ()
    assert "top-level actor lone crashed" in caplog.text
    assert "OSError: broken" in caplog.text


async def test_a_closed_system_starts_nothing() -> None:
    async with open_system() as system:
        pass
    with pytest.raises((InternalError, RuntimeError)):
        await system.spawn(plain("late"))


# -- reports


async def test_reports_are_kept_and_given_to_the_reporter() -> None:
    got: list[object] = []
    async with open_system(reporter=got.append) as system:
        system.report("one")
        system.report("two")
        assert system.recent_reports() == ("one", "two")
    assert got == ["one", "two"]


async def test_without_a_reporter_reports_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with open_system() as system:
        system.report("something broke")
    assert caplog.record_tuples == [("vgpu.actors", logging.ERROR, "something broke")]


async def test_a_reporter_that_fails_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: object) -> None:
        raise OSError("disk full")

    async with open_system(reporter=broken) as system:
        system.report("something broke")
        assert system.recent_reports() == ("something broke",)
    assert "the reporter failed on: something broke" in caplog.text


# -- tracing


async def test_a_tracer_sees_a_whole_life() -> None:
    tracer = RecordingTracer()
    async with open_system(plain("root"), tracer=tracer) as system:
        await system.spawn(plain("other"))
        assert await system.ref("root").ask(Ping()) == "pong"
        await system.ref("root").send(Forward("other"))
        await system.ref("other").wait_exit()
        await system.ref("other").send(Break())
    assert tracer.events == [
        ("spawned", "root", None),
        ("spawned", "other", None),
        ("sent", "root", (None, Ping())),
        ("received", "root", Ping()),
        ("handled", "root", Ping()),
        ("sent", "root", (None, Forward("other"))),
        ("received", "root", Forward("other")),
        # Who sent it is known.
        ("sent", "other", ("root", End(Normal()))),
        *_either(
            tracer,
            ("handled", "root", Forward("other")),
            ("received", "other", End(Normal())),
            ("handled", "other", End(Normal())),
        ),
        ("exited", "other", Normal()),
        ("dead_letter", "other", Break()),
        ("exited", "root", Shutdown("system stop")),
    ]
    assert tracer.of("spawned") == [("root", None), ("other", None)]


def _either(tracer: RecordingTracer, *events: tuple[str, str, object]) -> list[tuple[str, str, object]]:
    """Events of two actors whose order trio does not promise, in the order they had."""
    return sorted(events, key=tracer.events.index)


async def test_tracing_is_switched_while_running() -> None:
    tracer = RecordingTracer()
    async with open_system(plain("root")) as system:
        ref = system.ref("root")
        await ref.ask(Ping())
        system.set_tracer(tracer)
        await ref.ask(Ping())
        await wait_all_tasks_blocked()
        system.set_tracer(None)
        assert system.tracer is None
        await ref.ask(Ping())
    assert [what for what, _, _ in tracer.events] == ["sent", "received", "handled"]


async def test_waiting_time_is_known_only_for_what_was_sent_with_tracing_on(
    autojump_clock: MockClock,
) -> None:
    waits: list[float | None] = []

    class Waits(Tracer):
        def received(self, now: float, name: str, message: object, waited_seconds: float | None) -> None:
            waits.append(waited_seconds)

    async with open_system(plain("root")) as system:
        ref = system.ref("root")
        ref.send_nowait(Forward("nobody"))
        system.set_tracer(Waits())
        ref.send_nowait(Forward("nobody"))
        await wait_all_tasks_blocked()
    assert waits[0] is None
    assert waits[1] is not None
    assert waits[1] >= 0


async def test_a_tracer_that_fails_is_taken_off(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Tracer):
        def received(self, now: float, name: str, message: object, waited_seconds: float | None) -> None:
            raise ZeroDivisionError

    async with open_system(plain("root"), tracer=Broken()) as system:
        guard = system.tracer
        assert guard is not None
        assert await system.ref("root").ask(Ping()) == "pong"
        assert system.tracer is None
        assert guard.inner is None
        assert await system.ref("root").ask(Ping()) == "pong"
    assert "the tracer failed in received and was taken off" in caplog.text


# -- names


async def test_names_and_last_exits_are_bounded() -> None:
    async with open_system() as system:
        registry = system.registry
        for number in range(REMEMBERED_EXITS + 5):
            ref = await system.spawn(plain(f"actor-{number}"))
            ref.stop()
            await ref.wait_exit()
        assert registry.names() == ()
        assert registry.last_exit("actor-4") == NoActor()
        assert registry.last_exit("actor-5") == ASKED
        assert len(registry._exits) == REMEMBERED_EXITS


async def test_waiting_for_a_name_leaves_nothing_when_cancelled() -> None:
    registry = Registry()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(registry.wait_changed, "a")
        nursery.start_soon(registry.wait_changed, "a")
        await wait_all_tasks_blocked()
        assert len(registry._changes) == 1
        nursery.cancel_scope.cancel()
    assert registry._changes == {}


# -- snapshots


def test_a_tree_is_drawn() -> None:
    def node(name: str, *children: ActorSnapshot) -> ActorSnapshot:
        return ActorSnapshot(name, "Plain", ActorState.RUNNING, None, 0, 1, 0.0, None, children)

    tree = node("top", node("a", node("a1")), node("b"))
    assert [line.split(" [")[0] for line in render_tree((tree,)).splitlines()] == [
        "top",
        "├── a",
        "│   └── a1",
        "└── b",
    ]
    assert [found.name for found in tree.walk()] == ["top", "a", "a1", "b"]
    assert tree.find("a1") is tree.children[0].children[0]
    assert tree.find("nobody") is None


# -- the public test tools


async def test_a_probe_stands_for_any_actor() -> None:
    async with open_system() as system, open_probe(system, "server") as probe, trio.open_nursery() as nursery:
        answers: list[str] = []

        async def ask() -> None:
            answers.append(await probe.ref.ask(Ping()))

        nursery.start_soon(ask)
        request, reply = await probe.receive_request()
        assert request == Ping()
        reply.answer("from the test")
        await wait_all_tasks_blocked()
        assert answers == ["from the test"]
        await probe.ref.send(Break())
        with pytest.raises(AssertionError, match=r"expected Ping, got Break\(\)"):
            await probe.expect(Ping)
        await probe.ref.send(Break())
        with pytest.raises(AssertionError, match="was sent, not asked"):
            await probe.receive_request()
        await probe.ref.send(Break())
        with pytest.raises(AssertionError, match="expected no message"):
            await probe.expect_nothing()
        await probe.expect_nothing()


async def test_a_probe_does_not_wait_for_ever(autojump_clock: MockClock) -> None:
    async with open_system() as system, open_probe(system) as probe:
        with pytest.raises(AssertionError, match="no message came in 5"):
            await probe.receive()
