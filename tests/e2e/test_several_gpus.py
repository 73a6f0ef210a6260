# SPDX-License-Identifier: Apache-2.0
"""One mediator, two GPUs (both software): sessions spread, each guest sees one GPU, and left workers find their own."""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.e2e.mediator import SMALL, is_alive
from vgpu.actors import ActorSystem
from vgpu.actors.gpu_time import MeasureGpuTime
from vgpu.actors.messages import ListSessions
from vgpu.actors.placement import least_used
from vgpu.actors.worker_look import is_stopped
from vgpu.actors.worker_pool import Spawn
from vgpu.gpu.drift import GpuTimeWindow
from vgpu.gpu.process import WorkerOptions, start_worker
from vgpu.gpu.turn import turn_path
from vgpu.holding import DirectoryTaken
from vgpu.mediator import GpuPlan, MediatorPlan, open_mediator
from vgpu.run_main import guest_environment

# A mediator leaves its workers to its successor, so Python finds processes that nobody waited for.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

# Opens a session, says how many GPUs it sees, and stays until its input ends.
GUEST = r"""
import ctypes, sys
cuda = ctypes.CDLL("libcuda.so.1")
count, context = ctypes.c_int(), ctypes.c_void_p()
assert cuda.cuInit(0) == 0
assert cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
sys.stdout.write(f"{count.value}\n")
sys.stdout.flush()
sys.stdin.read()
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short-named: socket paths are limited to 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="vgpu-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture(autouse=True)
def _small_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    yield
    gc.collect()  # those processes are found here, and not in somebody else's test


def plan(folder: Path, *devices: int) -> MediatorPlan:
    """Several GPUs, all of them the software one."""
    run_dir = folder / "run"

    def spawn(device: int) -> Spawn:
        # One software device stands for all of them; each has a turn word of its own.
        turn = turn_path(run_dir, device)
        return partial(start_worker, WorkerOptions(run_dir, "software", 0, turn=turn))

    return MediatorPlan(run_dir, folder / "state", tuple(GpuPlan(d, spawn(d)) for d in devices))


async def gpus_in_use(system: ActorSystem) -> list[str]:
    """The GPU prefix of each living session's worker, in session order."""
    sessions = await system.ref("mediator/telemetry").ask(ListSessions())
    return [s.info.worker.split("-")[0] for s in sessions if not s.ended]


async def begin_guest(nursery: trio.Nursery, run_dir: Path) -> trio.Process:
    """A guest that has a session."""
    environment = guest_environment(os.environ, "vm1", run_dir)
    run = partial(trio.run_process, stdin=-1, stdout=-1, check=False, env=environment)
    process: trio.Process = await nursery.start(run, [sys.executable, "-c", GUEST])
    assert process.stdout is not None
    with trio.fail_after(60):
        # A guest sees one GPU, however many the mediator shares.
        assert await process.stdout.receive_some(10) == b"1\n"
    return process


async def end_guest(process: trio.Process) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    await process.stdin.aclose()
    await process.stdout.aclose()
    with trio.fail_after(60):
        assert await process.wait() == 0


async def until_in_use(system: ActorSystem, expected: list[str]) -> None:
    with trio.fail_after(60):
        while await gpus_in_use(system) != expected:
            await trio.sleep(0.02)


async def test_a_new_session_goes_to_the_gpu_with_the_fewest(folder: Path) -> None:
    async with open_mediator(plan(folder, 0, 1)) as system, trio.open_nursery() as nursery:
        first = await begin_guest(nursery, folder / "run")
        second = await begin_guest(nursery, folder / "run")
        third = await begin_guest(nursery, folder / "run")
        assert await gpus_in_use(system) == ["software0", "software1", "software0"]
        await end_guest(first)
        await end_guest(third)
        await until_in_use(system, ["software1"])
        fourth = await begin_guest(nursery, folder / "run")
        assert await gpus_in_use(system) == ["software1", "software0"]
        await end_guest(second)
        await end_guest(fourth)
        await until_in_use(system, [])


async def test_warm_workers_left_by_a_killed_mediator_go_to_their_gpu_or_end(folder: Path) -> None:
    run_dir = folder / "run"
    left = {}
    for name, device in (("software0-a", 0), ("software1-b", 1), ("nvidia0-c", 0)):
        options = WorkerOptions(run_dir, "software", 0, turn=turn_path(run_dir, device))
        left[name] = await start_worker(options, name)
    pids = {name: process.pid for name, (process, _) in left.items()}
    # One that does not answer is of no GPU of this mediator either.
    os.kill(pids["nvidia0-c"], signal.SIGSTOP)
    with trio.fail_after(60):
        while not is_stopped(pids["nvidia0-c"]):
            await trio.sleep(0.01)
    async with open_mediator(plan(folder, 1)) as system, trio.open_nursery() as nursery:
        with trio.fail_after(60):
            await left["software0-a"][0].wait()
            await left["nvidia0-c"][0].wait()
        assert is_alive(pids["software1-b"])
        guest = await begin_guest(nursery, run_dir)
        (session,) = await system.ref("mediator/telemetry").ask(ListSessions())
        assert (session.info.worker, session.info.worker_pid) == ("software1-b", pids["software1-b"])
        await end_guest(guest)
        await left["software1-b"][0].wait()


async def test_a_second_mediator_touches_nothing_of_the_first(folder: Path) -> None:
    async with open_mediator(plan(folder, 0)) as system, trio.open_nursery() as nursery:
        guest = await begin_guest(nursery, folder / "run")
        with pytest.raises(DirectoryTaken, match=rf"another mediator \(process {os.getpid()}\) works with"):
            async with open_mediator(plan(folder, 1)):
                raise AssertionError("it started")
        assert await gpus_in_use(system) == ["software0"]
        await end_guest(guest)


@pytest.mark.parametrize(
    ("sessions", "chosen"),
    [
        ({"a": 0, "b": 0}, "a"),
        ({"a": 1, "b": 0}, "b"),
        ({"a": 2, "b": 2, "c": 1}, "c"),
        ({"b": 3, "a": 3}, "b"),
        ({"a": 5}, "a"),
    ],
)
def test_the_least_used_gpu(sessions: dict[str, int], chosen: str) -> None:
    assert least_used(sessions) == chosen


async def test_counted_gpu_time_is_compared_on_each(folder: Path) -> None:
    """Device pages show the first GPU alone; the others are looked at for this."""
    async with open_mediator(plan(folder, 0, 1)) as system:
        found: dict[str, tuple[GpuTimeWindow, ...]] = {}
        with trio.fail_after(60):
            while set(found) != {"0", "1"}:
                found = await system.ref("mediator/telemetry").ask(MeasureGpuTime(), timeout_seconds=10)
                await trio.sleep(0.1)
        for windows in found.values():
            assert [window.seconds for window in windows] == [10.0, 60.0]
            assert [(window.counted_ratio, window.drift_ratio) for window in windows] == [(0.0, 0.0)] * 2
