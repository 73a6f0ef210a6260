# SPDX-License-Identifier: Apache-2.0
"""An idle high-priority VM takes the device from a busy one through its standby lease, and the scheduler charges it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.e2e import mediator as e2e
from tests.e2e.mediator import SMALL, Guest, Mediator
from vgpu.actors.messages import ListSessions, ScheduleState, SessionSample, SetVm
from vgpu.gpu.process import WorkerOptions, start_worker
from vgpu.gpu.turn import HIGH_TOKEN, STANDBY_TOKEN
from vgpu.mediator import GpuPlan, MediatorPlan, open_mediator

SCHEDULER = "mediator/gpus/gpu0/scheduler"
STANDBY = 2  # in the grant page
TURNS = 3  # that ran under nothing else
LIMIT_SECONDS = 20.0

pytestmark = pytest.mark.filterwarnings(
    "ignore:subprocess .* is still running:ResourceWarning", "ignore:unclosed file:ResourceWarning"
)


def _drain(guest: Guest) -> None:
    assert guest.process.stdout is not None
    for _ in guest.process.stdout:
        pass


async def test_an_urgent_vm_takes_the_turn_by_itself(
    driver_program: Callable[[str], Path], kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    outside = Mediator()
    spawn = partial(start_worker, WorkerOptions(outside.run_dir, e2e.GPU))
    plan = MediatorPlan(outside.run_dir, outside.state_dir, (GpuPlan(0, spawn),))
    try:
        with trio.fail_after(120):
            async with open_mediator(plan) as system:

                async def page() -> SessionSample:
                    samples = await system.ref("mediator/telemetry").ask(ListSessions())
                    return next(s for s in samples if s.info.vm == "u" and not s.ended)

                async def armed(used: list[int]) -> int:
                    """The token of the urgent session's standby lease, once it has one that is not among these."""
                    with trio.fail_after(LIMIT_SECONDS):
                        while True:
                            grant = (await page()).grant
                            if grant["granted"] == STANDBY and grant["token"] not in used:
                                return grant["token"]
                            await trio.sleep(0.01)

                scheduler = system.ref(SCHEDULER)
                urgent = outside.begin(driver_program("step"), kernels, vm="u")
                await trio.to_thread.run_sync(urgent.until, "turn")
                greedy = outside.begin(driver_program("backlog"), kernels, "12", "66", vm="a")
                await trio.to_thread.run_sync(greedy.until, "turn")
                threading.Thread(target=_drain, args=(greedy,), daemon=True).start()
                await scheduler.send(SetVm("u", "default", "high", 50))
                await armed([])
                grant = (await page()).grant
                held, first = grant["held_ns"], grant["ended_token"]
                used: list[int] = []
                ran = 0
                # A turn is a launch and a copy: the second may come when the lease is over and no other is ready, and
                # then ends by a lease that was asked for. So some are looked at.
                while ran < TURNS:
                    token = await armed(used)
                    assert token & (HIGH_TOKEN | STANDBY_TOKEN) == HIGH_TOKEN | STANDBY_TOKEN
                    urgent.say()
                    await trio.to_thread.run_sync(urgent.until, "turn")
                    with trio.fail_after(LIMIT_SECONDS):
                        while (ended := (await page()).grant["ended_token"]) in (*used, first):
                            await trio.sleep(0.005)
                    ran += ended == token
                    used.append(token)
                    first = ended
                await armed(used)  # each was for one use
                assert (await page()).grant["held_ns"] > held
                pools = (await scheduler.ask(ScheduleState()))["pools"]
                assert isinstance(pools, dict)
                vm = pools["default"]["vms"]["u"]
                assert (vm["priority"], vm["waiting"]) == ("high", 0)
                assert vm["used_ns"] > 0
    finally:
        outside.__exit__()
        gc.collect()  # what is left of its workers is found here, and not in somebody else's test
