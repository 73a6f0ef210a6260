# SPDX-License-Identifier: Apache-2.0
"""The scheduler actor carries decisions out: grants, revocations, and its own restart."""

from __future__ import annotations

import trio

from vgpu.actors import ActorSpec, open_system
from vgpu.actors.messages import (
    Demand,
    GrantLease,
    LeaseEnded,
    RevokeLease,
    ScheduleState,
    SessionClosed,
    SessionId,
    SessionOpened,
)
from vgpu.actors.scheduler import Scheduler
from vgpu.actors.testing import open_probe

A, B = SessionId(1), SessionId(2)


async def test_alone_open_ended_then_quanta_when_another_comes() -> None:
    async with open_system(ActorSpec("scheduler", Scheduler)) as system:
        scheduler = system.ref("scheduler")
        async with open_probe(system) as first, open_probe(system) as second:
            await scheduler.send(SessionOpened(A, 50, first.ref))
            await scheduler.send(SessionOpened(B, 50, second.ref))
            await scheduler.send(Demand(A))
            assert await first.receive() == GrantLease(0)
            await scheduler.send(Demand(B))
            assert await first.receive() == RevokeLease()
            await scheduler.send(LeaseEnded(A, 1_000_000, wants_more=True))
            grant = await second.receive()
            assert isinstance(grant, GrantLease)
            assert grant.deadline_ns > 0
            await scheduler.send(SessionClosed(B))
            assert await first.receive() == GrantLease(0)
            state = await scheduler.ask(ScheduleState())
            assert (state["holder"], state["waiting"]) == (A, [])
            assert state["used_ns"] == {1: 1_000_000}


async def test_a_holder_that_stays_silent_does_not_stop_the_others() -> None:
    async with open_system(ActorSpec("scheduler", lambda: Scheduler(quantum_ns=1_000_000))) as system:
        scheduler = system.ref("scheduler")
        async with open_probe(system) as first, open_probe(system) as second:
            await scheduler.send(SessionOpened(A, 50, first.ref))
            await scheduler.send(SessionOpened(B, 50, second.ref))
            await scheduler.send(Demand(A))
            await first.receive()
            await scheduler.send(Demand(B))
            assert await first.receive() == RevokeLease()
            with trio.fail_after(5):
                assert isinstance(await second.receive(), GrantLease)


async def test_a_new_scheduler_takes_sessions_as_they_announce_themselves() -> None:
    async with open_system(ActorSpec("scheduler", Scheduler)) as system:
        scheduler = system.ref("scheduler")
        async with open_probe(system) as first, open_probe(system) as second:
            await scheduler.send(SessionOpened(A, 50, first.ref, holding=True))
            await scheduler.send(SessionOpened(B, 50, second.ref))
            await scheduler.send(Demand(B))
            assert await first.receive() == RevokeLease()
