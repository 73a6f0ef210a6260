# SPDX-License-Identifier: Apache-2.0
"""The mediator's actors behind a VM's device are killed one by one: sessions go on, and claims are answered again."""

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
from tests.e2e.mediator import SMALL
from tests.e2e.vm_device import DeviceMediator, VirtualMachine, VmGuest
from vgpu.actors import ActorSystem
from vgpu.actors.fleet import CannotRegister
from vgpu.actors.ledger import NoSuchVm, VmExists
from vgpu.actors.messages import (
    DeviceState,
    ListDevices,
    ListSessions,
    RegisterVm,
    SessionSample,
    UnregisterVm,
    VmRecord,
)
from vgpu.gpu.process import WorkerOptions, start_worker
from vgpu.mediator import GpuPlan, MediatorPlan, open_mediator

# A mediator leaves its processes to its successor, so Python finds some that nobody waited for.
pytestmark = pytest.mark.filterwarnings(
    "ignore:subprocess .* is still running:ResourceWarning", "ignore:unclosed file:ResourceWarning"
)

VM = VmRecord("red", bar1_bytes=16 << 20, slots=4)
TEST_SECONDS = 240.0
T = TypeVar("T")


async def in_thread(function: Callable[..., T], *arguments: object) -> T:
    """Play the VM without holding the mediator up."""
    return await trio.to_thread.run_sync(partial(function, *arguments), abandon_on_cancel=True)


@attrs.define(eq=False)
class Running:
    """A mediator in this process, and a VM with a session."""

    system: ActorSystem
    device: DeviceState
    vm: VirtualMachine
    guest: VmGuest

    async def device_now(self) -> DeviceState:
        """The device's state, once it runs (again)."""
        while True:
            (state,) = await self.system.ref("mediator/fleet").ask(ListDevices(), timeout_seconds=10)
            if state.running:
                return state
            await trio.sleep(0.02)


@asynccontextmanager
async def mediator(outside: DeviceMediator) -> AsyncIterator[ActorSystem]:
    start = partial(start_worker, WorkerOptions(outside.run_dir, e2e.GPU))
    plan = MediatorPlan(outside.run_dir, outside.state_dir, (GpuPlan(0, start),))
    with trio.fail_after(TEST_SECONDS):
        async with open_mediator(plan) as system:
            yield system


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> DeviceMediator:
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    return DeviceMediator()


@pytest.fixture
async def running(outside: DeviceMediator) -> AsyncIterator[Running]:
    try:
        async with mediator(outside) as system:
            device = await system.ref("mediator/fleet").ask(RegisterVm(VM), timeout_seconds=40)
            assert device is not None
            vm = await in_thread(VirtualMachine, Path(device.socket))
            guest = await in_thread(VmGuest, vm, 0, 1, 10)
            await in_thread(guest.retain)
            yield Running(system, device, vm, guest)
            vm.__exit__()
    finally:
        outside.__exit__()
        gc.collect()


NAMES = (
    "mediator/devices/red",
    "mediator/devices",
    "mediator/fleet",
    "mediator/telemetry",
    "mediator/ledger",
)


async def test_actors_are_killed(running: Running) -> None:
    """One mediator for all: each is killed where the ones before it were killed already."""
    (before,) = await running.system.ref("mediator/telemetry").ask(ListSessions())
    for turn, name in enumerate(NAMES):
        actor = running.system.ref(name)
        actor.kill("test")
        await actor.wait_exit()
        assert await in_thread(running.guest.counted, turn) == turn
        await actor.wait_alive()
        late = await in_thread(VmGuest, running.vm, 2, 100 + turn, 11)
        await in_thread(late.retain)
        assert await in_thread(late.counted, 7) == 7
        await in_thread(late.release)
        assert (await running.device_now()).pid == running.device.pid
    assert await in_thread(running.guest.counted, 9) == 9
    while len(living := [s for s in await _sessions(running.system) if not s.ended]) != 1:
        await trio.sleep(0.02)
    assert living[0].info == before.info


async def _sessions(system: ActorSystem) -> tuple[SessionSample, ...]:
    found: tuple[SessionSample, ...] = await system.ref("mediator/telemetry").ask(ListSessions())
    return found


async def test_the_fleet_starts_who_is_registered(outside: DeviceMediator) -> None:
    """A mediator that starts anew has its VMs' devices, and no more of them than before."""
    limits = VmRecord("limits")
    try:
        async with mediator(outside) as system:
            fleet = system.ref("mediator/fleet")
            first = await fleet.ask(RegisterVm(VM), timeout_seconds=40)
            assert first is not None
            assert first.running
            assert await fleet.ask(RegisterVm(limits)) is None
            with pytest.raises(VmExists):
                await fleet.ask(RegisterVm(VM))
            with pytest.raises(CannotRegister, match="path of the VM's socket is too long"):
                await fleet.ask(RegisterVm(attrs.evolve(VM, name="x" * 107)))
        async with mediator(outside) as system:
            fleet = system.ref("mediator/fleet")
            while not (states := await fleet.ask(ListDevices()))[0].running:
                await trio.sleep(0.02)
            assert [(state.vm, state.pid) for state in states] == [("red", first.pid)]
            assert await fleet.ask(UnregisterVm("red"), timeout_seconds=20) is False
            assert await fleet.ask(UnregisterVm("limits")) is False
            with pytest.raises(NoSuchVm):
                await fleet.ask(UnregisterVm("red"))
            assert await fleet.ask(ListDevices()) == ()
            assert outside.device_processes() == []
    finally:
        outside.__exit__()
        gc.collect()
