# SPDX-License-Identifier: Apache-2.0
"""The scheduler actor carries decisions out: grants, hand-overs, changes of place, and its own restart."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import trio

from vgpu.actors import Actor, ActorSpec, ActorSystem, Ref, handles, open_system
from vgpu.actors.messages import (
    Demand,
    GrantLease,
    LeaseEnded,
    ScheduleState,
    SessionClosed,
    SessionId,
    SessionOpened,
    SetPool,
    SetVm,
)
from vgpu.actors.scheduler import Scheduler
from vgpu.actors.testing import Probe, open_probe
from vgpu.gpu.turn import Hands, SharedTurn, turn_path

A, B = SessionId(1), SessionId(2)
BOUND = 500_000


async def open_two(scheduler: Ref[Any], first: Probe, second: Probe) -> None:
    """Sessions A and B of two VMs of equal weight."""
    await scheduler.send(SessionOpened(A, 50, first.ref, vm="a"))
    await scheduler.send(SessionOpened(B, 50, second.ref, vm="b"))


async def next_grant(probe: Probe) -> GrantLease:
    with trio.fail_after(60):
        grant = await probe.receive()
    assert isinstance(grant, GrantLease)
    return grant


async def pools_of(scheduler: Ref[Any]) -> Any:
    """The hierarchy as an administrator sees it."""
    return (await scheduler.ask(ScheduleState()))["pools"]


def scheduler_of(system: ActorSystem) -> Ref[Any]:
    return system.ref("scheduler")


async def test_alone_open_ended_then_quanta_when_another_comes() -> None:
    async with (
        open_system(ActorSpec("scheduler", Scheduler)) as system,
        open_probe(system) as first,
        open_probe(system) as second,
    ):
        scheduler = scheduler_of(system)
        await open_two(scheduler, first, second)
        await scheduler.send(Demand(A))
        opened = await next_grant(first)
        assert (opened.deadline_ns, opened.slice_ns, opened.in_flight_ns) == (0, 0, BOUND)
        await scheduler.send(Demand(B))
        ends = await next_grant(first)
        assert ends.token == opened.token
        assert ends.deadline_ns > 0
        named = await next_grant(second)
        assert (named.deadline_ns, named.slice_ns) == (0, 2_000_000)
        await scheduler.send(LeaseEnded(A, 1_000_000, wants_more=True, token=opened.token))
        assert (await next_grant(first)).slice_ns == 6_000_000  # both are busy, and nobody else is there
        await scheduler.send(SessionClosed(B))
        assert (await next_grant(first)).deadline_ns == 0
        state = await scheduler.ask(ScheduleState())
        assert (state["holder"], state["waiting"]) == (A, [])
        assert state["used_ns"] == {1: 1_000_000}


async def test_a_holder_that_stays_silent_does_not_stop_the_others() -> None:
    make = partial(Scheduler, quantum_ns=1_000_000)
    async with (
        open_system(ActorSpec("scheduler", make)) as system,
        open_probe(system) as first,
        open_probe(system) as second,
    ):
        scheduler = scheduler_of(system)
        await open_two(scheduler, first, second)
        await scheduler.send(Demand(A))
        await scheduler.send(Demand(B))
        with trio.fail_after(60):
            while (await scheduler.ask(ScheduleState()))["holder"] != B:
                await trio.sleep(0.005)


async def test_a_new_scheduler_takes_sessions_as_they_announce_themselves(tmp_path: Path) -> None:
    """Who holds the device is in the word; who that is, the sessions say."""
    path = turn_path(tmp_path, 0)
    word = SharedTurn(path)
    assert word.swap(Hands(), Hands(7, 8))
    async with (
        open_system(ActorSpec("scheduler", partial(Scheduler, turn_path=path))) as system,
        open_probe(system) as first,
        open_probe(system) as second,
    ):
        scheduler = scheduler_of(system)
        await scheduler.send(SessionOpened(A, 50, first.ref, holding=True, token=7))
        await scheduler.send(SessionOpened(B, 50, second.ref, holding=True, token=8))
        ends = await next_grant(first)
        while not ends.deadline_ns:
            ends = await next_grant(first)
        named = await next_grant(second)
        assert ends.token == 7
        assert word.load() == Hands(7, named.token)
        # The worker hands over by itself; the report comes afterwards and changes nothing about that.
        assert word.swap(Hands(7, named.token), Hands(named.token, 0))
        await scheduler.send(LeaseEnded(A, 1_000_000, wants_more=False, token=7, held_ns=1_000_000))
        while (await scheduler.ask(ScheduleState()))["holder"] != B:
            await trio.lowlevel.checkpoint()
        assert word.load() == Hands(named.token, 0)
    word.close()


class Deaf(Actor):
    """An executor whose worker does not take what it is sent: its first message is never done with."""

    mailbox_capacity = 2

    @handles(GrantLease)
    async def grant(self, message: GrantLease) -> None:
        await trio.sleep_forever()


async def test_an_executor_that_is_stuck_holds_nobody_up() -> None:
    """It has every lease told it until its mailbox is full; the scheduler goes on, and tells it the newest later."""
    async with (
        open_system(ActorSpec("scheduler", partial(Scheduler, quantum_ns=1_000_000))) as system,
        open_probe(system) as second,
    ):
        deaf = await system.spawn(ActorSpec("deaf", Deaf))
        scheduler = scheduler_of(system)
        await scheduler.send(SessionOpened(A, 50, deaf, vm="a"))
        await scheduler.send(SessionOpened(B, 50, second.ref, vm="b"))
        for _ in range(20):  # each is told again what it has
            await scheduler.send(Demand(A))
        with trio.fail_after(60):
            assert (await scheduler.ask(ScheduleState()))["holder"] == A
            await scheduler.send(Demand(B))
            await next_grant(second)
            # Passed over, as any holder that does not let go.
            while (await scheduler.ask(ScheduleState()))["holder"] != B:
                await trio.sleep(0.005)
        deaf.kill()


async def test_places_change_while_sessions_run() -> None:
    async with (
        open_system(ActorSpec("scheduler", Scheduler)) as system,
        open_probe(system) as first,
        open_probe(system) as second,
    ):
        scheduler = scheduler_of(system)
        await open_two(scheduler, first, second)
        await scheduler.send(SetVm("a", "gold", "high", 80))
        await scheduler.send(SetPool("gold", 300))
        await scheduler.send(SetVm("b", "gold", "urgent", 80))  # dropped
        await scheduler.send(SetPool("gold", 0))  # dropped
        pools = await pools_of(scheduler)
        assert pools["gold"]["weight"] == 300
        assert pools["gold"]["vms"]["a"]["priority"] == "high"
        assert pools["gold"]["vms"]["a"]["configured_share"] == 0.75
        assert pools["default"]["vms"]["b"]["configured_share"] == 0.25
        # A session that only announces itself again does not undo it; a new one brings what the ledger says now.
        await scheduler.send(SessionClosed(A))
        await scheduler.send(SessionOpened(A, 50, first.ref, vm="a"))
        assert (await pools_of(scheduler))["gold"]["vms"]["a"]["weight"] == 80
        await scheduler.send(SessionClosed(A))
        await scheduler.send(SessionOpened(A, 20, first.ref, vm="a", pool="gold", is_new=True))
        assert (await pools_of(scheduler))["gold"]["vms"]["a"]["weight"] == 20
