# SPDX-License-Identifier: Apache-2.0
"""Actors of a running mediator are killed one by one: programs do not notice, and newcomers are let in.

The mediator runs in the test's own process, so that its actors can be reached; workers and guests are processes as ever.
"""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import attrs
import pytest
import trio

from tests.e2e import mediator as e2e
from tests.e2e.mediator import SMALL, Guest, Mediator, is_alive
from vgpu.actors import ActorSystem, CountChildren, WhichChildren
from vgpu.actors.messages import ListSessions, Sample, SessionSample
from vgpu.actors.worker_pool import Process, Spawn
from vgpu.gpu.process import WorkerOptions, start_worker
from vgpu.mediator import GpuPlan, MediatorPlan, open_mediator

Build = Callable[[str], Path]
T = TypeVar("T")

GPU = "mediator/gpus/gpu0"
VM = "tenant"
TEST_SECONDS = 240.0
# Until a program has said its next line, whatever else the machine does.
LINE_SECONDS = 60.0

# A worker outlives the pool that started it, on purpose; what the pool had of it is dropped while it runs.
pytestmark = pytest.mark.filterwarnings(
    "ignore:subprocess .* is still running:ResourceWarning", "ignore:unclosed file:ResourceWarning"
)


@attrs.define
class Running:
    """A mediator in this process."""

    system: ActorSystem
    # Looks at and starts processes from outside; its own daemon is never started.
    outside: Mediator
    steady: Path
    kernels: Path

    async def begin(self) -> Guest:
        """A guest that computes and checks; it has a session and has finished a few turns."""
        guest = self.outside.begin(self.steady, self.kernels, vm=VM)
        await in_thread(guest.until, "turn 3", LINE_SECONDS)
        return guest

    async def sessions(self) -> list[SessionSample]:
        """The living ones, as telemetry knows them."""
        samples = await self.system.ref("mediator/telemetry").ask(ListSessions())
        return [sample for sample in samples if not sample.ended]

    async def session_of(self, guest: Guest) -> SessionSample:
        """The session of a guest; waits until telemetry lists it."""
        while True:
            for sample in await self.sessions():
                if sample.info.guest_pid == guest.process.pid:
                    return sample
            await trio.sleep(0.02)

    async def executor_of(self, guest: Guest) -> str:
        """The name of the actor that has the guest's worker."""
        wanted = (await self.session_of(guest)).info.session
        for child in await self.system.ref(f"{GPU}/executors").ask(WhichChildren()):
            if (await self.system.ref(child.name).ask(Sample())).info.session == wanted:
                return child.name
        raise AssertionError(f"no executor has session {wanted}")


async def in_thread(function: Callable[..., T], *arguments: object) -> T:
    """Wait for a guest without holding the mediator up."""
    return await trio.to_thread.run_sync(partial(function, *arguments), abandon_on_cancel=True)


async def goes_on(guest: Guest, turns: int = 20) -> None:
    """It computes on without an error: the next turns follow one another."""
    turn = int((await in_thread(guest.until, "turn", LINE_SECONDS)).split()[1])
    await in_thread(guest.until, f"turn {turn + turns}", LINE_SECONDS)


async def finish(guest: Guest) -> None:
    """It ends by itself, and no call of it failed."""
    status, _ = await in_thread(guest.finish)
    assert status == 0, guest.lines[-3:]
    assert guest.lines[-1].startswith("done")


@asynccontextmanager
async def running(build: Build, kernels: Path, spawn: Spawn | None = None) -> AsyncIterator[Running]:
    """A mediator, and at its end the certainty that no worker is left."""
    outside = Mediator()
    try:
        start = spawn or partial(start_worker, WorkerOptions(outside.run_dir, e2e.GPU))
        plan = MediatorPlan(outside.run_dir, outside.state_dir, (GpuPlan(0, start),))
        with trio.fail_after(TEST_SECONDS):
            async with open_mediator(plan) as system:
                yield Running(system, outside, build("steady"), kernels)
            # A process that was killed takes a moment to end.
            while outside.workers():
                await trio.sleep(0.02)
    finally:
        outside.__exit__()
        gc.collect()


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)


async def kill(system: ActorSystem, name: str) -> None:
    """Kill an actor; return when its successor lives."""
    before = system.ref(name)
    assert before.is_alive, f"there is no {name}"
    before.kill("test")
    await before.wait_exit()
    await before.wait_alive()


RESTARTED = (
    "mediator/ledger",
    "mediator/telemetry",
    f"{GPU}/scheduler",
    f"{GPU}/watchdog",
    f"{GPU}/workers",
    f"mediator/connections/{VM}",
    "mediator/listener",
    "mediator/admin",
)


@pytest.mark.parametrize("name", RESTARTED, ids=lambda name: name.rpartition("/")[2])
async def test_an_actor_is_killed(name: str, driver_program: Build, kernels: Path) -> None:
    """Nobody's session ends, telemetry still knows it, and a newcomer is let in."""
    async with running(driver_program, kernels) as mediator:
        guest, neighbour = await mediator.begin(), await mediator.begin()
        before = [(await mediator.session_of(g)).info for g in (guest, neighbour)]
        for _ in range(2):
            await kill(mediator.system, name)
            await goes_on(guest)
            await goes_on(neighbour)
        newcomer = await mediator.begin()
        assert [(await mediator.session_of(g)).info for g in (guest, neighbour)] == before
        assert (await mediator.session_of(newcomer)).info.vm == VM
        # One executor each: a successor must not adopt what a living actor has.
        assert (await mediator.system.ref(f"{GPU}/executors").ask(CountChildren())).active == 3
        for one in (guest, neighbour, newcomer):
            await goes_on(one)
            await finish(one)
        while await mediator.sessions():
            await trio.sleep(0.02)


async def test_an_executor_is_killed(driver_program: Build, kernels: Path) -> None:
    """Its worker ends with it; its program gets an error that stays, and another one goes on."""
    async with running(driver_program, kernels) as mediator:
        guest, neighbour = await mediator.begin(), await mediator.begin()
        worker = (await mediator.session_of(guest)).info.worker_pid
        mediator.system.ref(await mediator.executor_of(guest)).kill("test")
        code = int((await in_thread(guest.until, "error", LINE_SECONDS)).split()[1])
        assert code != 0
        assert await in_thread(guest.line, LINE_SECONDS) == f"then {code}"
        assert (await in_thread(guest.finish))[0] == 3
        while is_alive(worker):
            await trio.sleep(0.02)
        await goes_on(neighbour)
        newcomer = await mediator.begin()
        await finish(newcomer)
        await finish(neighbour)


async def test_a_guest_waits_until_workers_can_be_started(
    driver_program: Build, kernels: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told BUSY, and told so soon; it asks again, and gets its session once there is a worker."""
    tries = 0
    is_broken = True

    async def spawn(worker: str) -> tuple[Process, str]:
        nonlocal tries
        tries += 1
        if is_broken:
            raise OSError("no more processes")
        return await start_worker(options, worker)

    def told() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.getMessage().startswith("no session for")]

    async with running(driver_program, kernels, spawn) as mediator:
        options = WorkerOptions(mediator.outside.run_dir, e2e.GPU)
        guest = mediator.outside.begin(mediator.steady, mediator.kernels, vm=VM)
        with trio.fail_after(60):
            while len(told()) < 4:
                await trio.sleep(0.02)
        assert all("no more processes" in line for line in told())
        # Askers do not drive the tries: the pool has its own pace.
        assert tries <= 3
        # An executor that could not begin is gone.
        with trio.fail_after(60):
            while (await mediator.system.ref(f"{GPU}/executors").ask(CountChildren())).active:
                await trio.sleep(0.02)
        assert guest.process.poll() is None
        is_broken = False
        await in_thread(guest.until, "turn 3", LINE_SECONDS)
        await finish(guest)


async def test_a_connection_is_killed_while_its_guest_attaches(driver_program: Build, kernels: Path) -> None:
    """The guest asks again and gets a session; the one that nobody received ends, and its worker with it."""
    may_start = trio.Event()

    async def spawn(worker: str) -> tuple[Process, str]:
        await may_start.wait()
        return await start_worker(options, worker)

    async with running(driver_program, kernels, spawn) as mediator:
        options = WorkerOptions(mediator.outside.run_dir, e2e.GPU)
        executors = mediator.system.ref(f"{GPU}/executors")
        guest = mediator.outside.begin(mediator.steady, mediator.kernels, vm=VM)
        while not (await executors.ask(CountChildren())).active:
            await trio.sleep(0.01)
        await kill(mediator.system, f"mediator/connections/{VM}")
        while (await executors.ask(CountChildren())).active < 2:
            await trio.sleep(0.01)
        may_start.set()
        await in_thread(guest.until, "turn 3", LINE_SECONDS)
        with trio.fail_after(60):
            while (await executors.ask(CountChildren())).active > 1 or len(await mediator.sessions()) > 1:
                await trio.sleep(0.02)
            # Its worker, and the warm one.
            while len(mediator.outside.workers()) > 2:
                await trio.sleep(0.02)
        await goes_on(guest)
        assert (await mediator.session_of(guest)).info.vm == VM
        await finish(guest)
