# SPDX-License-Identifier: Apache-2.0
"""Links: ends that are shared, ends that are trapped, and what a link is not."""

from __future__ import annotations

import math

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from vgpu.actors import (
    Actor,
    ActorSpec,
    ActorSystem,
    Crashed,
    Exit,
    ExitReason,
    Killed,
    NoActor,
    Normal,
    Ref,
    Request,
    Shutdown,
    StartFailed,
    UnknownMessage,
    handles,
    open_system,
)


@attrs.frozen
class End:
    reason: ExitReason | None  # None: raise


@attrs.frozen
class LinkTo(Request[None]):
    name: str


@attrs.frozen
class UnlinkFrom(Request[None]):
    name: str


@attrs.frozen
class Wait:
    pass


class Member(Actor):
    def __init__(self, *, trap: bool = False) -> None:
        self.trap_exit = trap
        self.exits: list[Exit] = []
        self.ended: ExitReason | None = None

    @handles(LinkTo)
    def link_to(self, message: LinkTo) -> None:
        self.link(self.find(message.name))

    @handles(UnlinkFrom)
    def unlink_from(self, message: UnlinkFrom) -> None:
        self.unlink(self.find(message.name))

    @handles(End)
    def end(self, message: End) -> None:
        if message.reason is None:
            raise ValueError("boom")
        self.stop(message.reason)

    @handles(Wait)
    async def wait(self, _: Wait) -> None:
        await trio.sleep(math.inf)

    @handles(Exit)
    def exited(self, message: Exit) -> None:
        self.exits.append(message)

    async def stopped(self, reason: ExitReason) -> None:
        self.ended = reason


async def add(system: ActorSystem, name: str, *, trap: bool = False) -> tuple[Ref[object], Member]:
    member = Member(trap=trap)
    return await system.spawn(ActorSpec(name, lambda: member)), member


@pytest.mark.parametrize("linked_by", ["a", "b"])
@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (None, Killed("linked to a: crashed: ValueError: boom")),
        (Killed("x"), Killed("linked to a: killed (x)")),
        (Shutdown("x"), Shutdown("linked to a: shutdown (x)")),
        (Normal(), None),
    ],
)
async def test_an_end_is_shared_with_the_linked(
    linked_by: str, end: ExitReason | None, expected: ExitReason | None
) -> None:
    async with open_system() as system:
        a, _ = await add(system, "a")
        b, member = await add(system, "b")
        await system.ref(linked_by).ask(LinkTo("b" if linked_by == "a" else "a"))
        await a.send(End(end))
        await wait_all_tasks_blocked()
        assert not a.is_alive
        assert member.ended == expected
        assert b.is_alive is (expected is None)


async def test_a_shared_end_interrupts_a_handler_and_still_cleans_up() -> None:
    async with open_system() as system:
        a, _ = await add(system, "a")
        b, member = await add(system, "b")
        await a.ask(LinkTo("b"))
        await b.send(Wait())
        a.kill("now")
        assert await b.wait_exit() == Killed("linked to a: killed (now)")
        assert member.ended == Killed("linked to a: killed (now)")


@pytest.mark.parametrize("end", [None, Killed("x"), Shutdown("x"), Normal()])
async def test_whoever_traps_exits_is_told_every_end_once_and_lives_on(end: ExitReason | None) -> None:
    async with open_system() as system:
        a, _ = await add(system, "a")
        b, member = await add(system, "b", trap=True)
        await b.ask(LinkTo("a"))
        await a.ask(LinkTo("b"))  # one link, however often and from whichever side
        await a.send(End(end))
        reason = await a.wait_exit()
        await wait_all_tasks_blocked()
        assert member.exits == [Exit("a", reason)]
        assert isinstance(reason, Crashed) if end is None else reason == end
        assert b.is_alive


async def test_an_exit_overtakes_data() -> None:
    order: list[str] = []

    class Trapping(Member):
        @handles(End)
        def note(self, _: End) -> None:
            order.append("data")

        @handles(Exit)
        def trapped(self, _: Exit) -> None:
            order.append("exit")

        @handles(Wait)
        async def hold(self, _: Wait) -> None:
            await trio.lowlevel.checkpoint()

    async with open_system() as system:
        a, _ = await add(system, "a")
        trapping = Trapping(trap=True)
        b = await system.spawn(ActorSpec("b", lambda: trapping))
        await b.ask(LinkTo("a"))
        b.send_nowait(Wait())
        b.send_nowait(End(None))
        a.kill()
        await wait_all_tasks_blocked()
        assert order == ["exit", "data"]


async def test_linking_to_nobody_is_linking_to_one_that_ended_abnormally() -> None:
    async with open_system() as system:
        a, member = await add(system, "a", trap=True)
        await a.ask(LinkTo("nobody"))
        await wait_all_tasks_blocked()
        assert member.exits == [Exit("nobody", NoActor())]
        b, other = await add(system, "b")
        await b.send(LinkTo("nobody"))
        assert await b.wait_exit() == Killed("linked to nobody: no such actor")
        assert other.ended is not None


async def test_a_link_to_oneself_is_none() -> None:
    async with open_system() as system:
        a, member = await add(system, "a", trap=True)
        await a.ask(LinkTo("a"))
        await a.send(End(Normal()))
        await a.wait_exit()
        assert member.exits == []


@pytest.mark.parametrize("by", ["a", "b"])
async def test_what_is_unlinked_shares_nothing(by: str) -> None:
    async with open_system() as system:
        a, _ = await add(system, "a")
        b, _ = await add(system, "b")
        await a.ask(LinkTo("b"))
        await system.ref(by).ask(UnlinkFrom("b" if by == "a" else "a"))
        await b.ask(UnlinkFrom("nobody"))
        a.kill()
        await a.wait_exit()
        await wait_all_tasks_blocked()
        assert b.is_alive


async def test_the_next_life_of_a_name_is_not_linked() -> None:
    async with open_system() as system:
        a, _ = await add(system, "a")
        b, member = await add(system, "b", trap=True)
        await b.ask(LinkTo("a"))
        a.kill("first")
        await a.wait_exit()
        a, _ = await add(system, "a")
        a.kill("second")
        await a.wait_exit()
        await wait_all_tasks_blocked()
        assert [one.reason for one in member.exits] == [Killed("first")]


async def test_links_may_be_made_while_starting() -> None:
    class Early(Actor):
        async def started(self) -> None:
            self.link(self.find("nobody"))
            await trio.sleep(math.inf)

    async with open_system() as system:
        with pytest.raises(StartFailed, match="linked to nobody"):
            await system.spawn(ActorSpec("early", Early))


async def test_trapping_needs_a_handler() -> None:
    class Deaf(Actor):
        trap_exit = True

        async def started(self) -> None:
            self.link(self.find("a"))

    async with open_system() as system:
        await add(system, "a")
        with pytest.raises(StartFailed) as caught:
            await system.spawn(ActorSpec("deaf", Deaf))
        assert isinstance(caught.value.__cause__, UnknownMessage)


@given(
    traps=st.lists(st.booleans(), min_size=2, max_size=6),
    links=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12),
    first=st.integers(0, 5),
    end=st.sampled_from([None, Killed("x"), Shutdown("x"), Normal()]),
)
def test_an_end_reaches_whoever_is_connected_but_not_past_traps(
    traps: list[bool], links: list[tuple[int, int]], first: int, end: ExitReason | None
) -> None:
    size = len(traps)
    first %= size
    pairs = {frozenset((a % size, b % size)) for a, b in links if a % size != b % size}
    neighbours = {i: {j for pair in pairs if i in pair for j in pair if j != i} for i in range(size)}
    # The model: a flood fill from the first that ends, which traps (and a normal end) stop.
    gone, wave = {first}, [first]
    told: dict[int, set[int]] = {i: set() for i in range(size)}
    while wave:
        one = wave.pop()
        for other in neighbours[one] - gone:
            if traps[other]:
                told[other].add(one)
            elif not isinstance(end, Normal):
                gone.add(other)
                wave.append(other)

    async def scenario() -> None:
        async with open_system() as system:
            members = [(await add(system, str(i), trap=trap))[1] for i, trap in enumerate(traps)]
            for a, b in links:
                await system.ref(str(a % size)).ask(LinkTo(str(b % size)))
            await system.ref(str(first)).send(End(end))
            await wait_all_tasks_blocked()
            assert {i for i in range(size) if not system.ref(str(i)).is_alive} == gone
            for i, member in enumerate(members):
                if i not in gone:
                    assert sorted(int(one.name) for one in member.exits) == sorted(told[i])
                    life = member.life
                    assert {int(other.name) for other in life._links.values()} == neighbours[i] - gone

    trio.run(scenario, clock=MockClock(autojump_threshold=0))
