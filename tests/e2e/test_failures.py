# SPDX-License-Identifier: Apache-2.0
"""What happens to programs when processes die and kernels hang: the failure matrix, row by row, with real kills."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.mediator import Mediator, is_alive, wait_until
from tests.e2e.steady import Steady, ends_well, goes_on

LAUNCH_TIMEOUT = 702
GONE_SECONDS = 20.0  # two are promised, on a host with a free processor: see tests/real_gpu/killed.py

Build = Callable[[str], Path]


@pytest.fixture
def impatient() -> Iterator[Mediator]:
    """A mediator with a VM ``impatient`` whose kernels may take two seconds."""
    with Mediator(watchdog_seconds=2.0) as running:
        yield running


def test_guest_killed_in_mid_call(own_mediator: Mediator, driver_program: Build, kernels: Path) -> None:
    """SIGKILL while a kernel that never ends runs for it: the worker goes too, at once."""
    guest = own_mediator.begin(driver_program("spin"), kernels)
    guest.until("launching")
    worker = own_mediator.worker_of(guest)

    def is_busy() -> bool:
        """On the software GPU the worker is inside the call; on a real one a fence waits behind the kernel."""
        grant = own_mediator.session_of(guest)["grant"]
        return bool(grant["current_call"] or grant["oldest_fence_ns"])

    wait_until(is_busy, 60, "the kernel runs")
    guest.kill()
    wait_until(lambda: not is_alive(worker), GONE_SECONDS, "the worker of a dead guest is gone")
    wait_until(lambda: own_mediator.sessions() == [], GONE_SECONDS, "its session has ended")
    assert own_mediator.ask("health")["ok"]


def test_guests_killed_while_busy(own_mediator: Mediator, steady: Steady) -> None:
    """Several at once, at moments nobody chose; a neighbour does not notice."""
    neighbour = steady.begin(own_mediator)
    victims = steady.begin_together(own_mediator, None, None, None)
    workers = [own_mediator.worker_of(victim) for victim in victims]
    for victim in victims:
        victim.process.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    wait_until(lambda: not any(map(is_alive, workers)), GONE_SECONDS, "workers of dead guests are gone")
    assert time.monotonic() - killed < GONE_SECONDS
    goes_on(neighbour, 20)
    ends_well(neighbour)


def test_guest_that_leaves_without_a_word(own_mediator: Mediator, steady: Steady) -> None:
    """``_exit`` without freeing anything, as crashing programs do."""
    guest = steady.begin(own_mediator)
    worker = own_mediator.worker_of(guest)
    guest.process.send_signal(signal.SIGSEGV)
    guest.process.wait(60)
    wait_until(lambda: not is_alive(worker), GONE_SECONDS, "the worker is gone")


def test_worker_killed(own_mediator: Mediator, steady: Steady) -> None:
    """Its program gets an error that stays, and never hangs; the neighbour computes on."""
    guest, neighbour = steady.begin_together(own_mediator, None, None)
    os.kill(own_mediator.worker_of(guest), signal.SIGKILL)
    begun = time.monotonic()
    words = guest.until("error", 60).split()
    assert time.monotonic() - begun < 30
    code = int(words[1])
    assert code != 0
    assert guest.line(60) == f"then {code}"
    assert guest.finish()[0] == 3
    goes_on(neighbour, 20)
    ends_well(neighbour)
    wait_until(lambda: own_mediator.sessions() == [], 60, "both sessions have ended")
    steady.run(own_mediator)


def test_worker_killed_while_the_guest_waits(
    own_mediator: Mediator, driver_program: Build, kernels: Path
) -> None:
    """The same in the middle of a synchronize that would never have returned."""
    guest = own_mediator.begin(driver_program("spin"), kernels)
    guest.until("launching")
    time.sleep(0.5)
    os.kill(own_mediator.worker_of(guest), signal.SIGKILL)
    status, lines = guest.finish(60)
    codes = [int(line.split()[1]) for line in lines]
    assert status == 0
    assert len(codes) == 3
    assert 0 not in codes


def test_hung_kernel(impatient: Mediator, driver_program: Build, kernels: Path, steady: Steady) -> None:
    """A kernel that never ends is ended after its VM's deadline; the program is told so and can live on."""
    neighbour = steady.begin(impatient)
    # That it is not told before its deadline either is looked at in test_watchdog.py, by a program that has a clock.
    guest = impatient.begin(driver_program("spin"), kernels, vm="impatient")
    guest.until("launching")
    worker = impatient.worker_of(guest)
    assert guest.until("synchronize", 60) == f"synchronize {LAUNCH_TIMEOUT}"
    assert guest.line() == f"allocate {LAUNCH_TIMEOUT}"
    assert guest.line() == f"synchronize {LAUNCH_TIMEOUT}"
    assert guest.finish()[0] == 0
    wait_until(lambda: not is_alive(worker), GONE_SECONDS, "the worker of the hung kernel is gone")
    goes_on(neighbour)
    ends_well(neighbour)
    steady.run(impatient, "impatient")
    wait_until(lambda: impatient.ask("faults") != [], 60, "the fault is kept")
    (fault,) = impatient.ask("faults")
    assert fault["error"] == LAUNCH_TIMEOUT
    assert fault["vm"] == "impatient"


def test_mediator_killed_and_started_again(own_mediator: Mediator, steady: Steady) -> None:
    """Programs compute on; the next mediator finds their sessions."""
    guests = steady.begin_together(own_mediator, None, None)
    before = {
        own_mediator.session_of(g)["info"]["session"]: own_mediator.session_of(g)["info"] for g in guests
    }
    own_mediator.kill()
    for worker in before.values():
        assert is_alive(worker["worker_pid"])
    own_mediator.start()
    wait_until(lambda: len(own_mediator.sessions()) == 2, 60, "both sessions are adopted")
    after = {
        own_mediator.session_of(g)["info"]["session"]: own_mediator.session_of(g)["info"] for g in guests
    }
    assert {n: i["worker_pid"] for n, i in after.items()} == {n: i["worker_pid"] for n, i in before.items()}
    for guest in guests:
        goes_on(guest, 50)
        ends_well(guest)
    wait_until(lambda: own_mediator.sessions() == [], 60, "adopted sessions end like others")
    steady.run(own_mediator)


def test_warm_workers_that_are_too_many_are_ended(steady: Steady) -> None:
    """The next mediator wants fewer than it finds; the one that it keeps serves."""
    with Mediator(options=["--warm-workers", "3"]) as mediator:
        wait_until(
            lambda: len(list((mediator.run_dir / "workers").glob("*.sock"))) == 3, 60, "three are warm"
        )
        found = set(mediator.workers())
        assert len(found) == 3
        mediator.kill()
        mediator._options = ["--warm-workers", "1"]
        mediator.start()
        wait_until(lambda: len(mediator.workers()) == 1, 60, "two have ended")
        assert set(mediator.workers()) < found
        guest = steady.begin(mediator)
        assert mediator.worker_of(guest) in found
        ends_well(guest)


def test_guest_killed_while_there_is_no_mediator(own_mediator: Mediator, steady: Steady) -> None:
    """A worker belongs to its guest: it leaves with it, whether or not anybody watches."""
    guest = steady.begin(own_mediator)
    worker = own_mediator.worker_of(guest)
    own_mediator.kill()
    guest.kill()
    wait_until(lambda: not is_alive(worker), GONE_SECONDS, "the worker is gone")
    own_mediator.start()
    assert own_mediator.sessions() == []


def test_stopping_the_mediator_ends_sessions(own_mediator: Mediator, steady: Steady) -> None:
    """Stopped on purpose, it leaves no process behind, and programs are told."""
    guest = steady.begin(own_mediator)
    workers = own_mediator.workers()
    assert len(workers) >= 2  # the guest's, and a warm one
    os.kill(own_mediator.pid, signal.SIGINT)
    assert int(guest.until("error", 60).split()[1]) != 0
    wait_until(lambda: not any(map(is_alive, workers)), 60, "all workers are gone")


def test_sigterm_lets_sessions_finish(own_mediator: Mediator, driver_program: Build, steady: Steady) -> None:
    """Drained: who is in may finish, nobody new comes in, then the mediator ends by itself."""
    guest = steady.begin(own_mediator)
    os.kill(own_mediator.pid, signal.SIGTERM)
    goes_on(guest, 30)
    late = subprocess.run(
        [driver_program("init")], env=own_mediator.environment(), capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip
    assert (late.stdout.split()[0], late.stderr) == ("100", "")
    ends_well(guest)
    wait_until(lambda: not is_alive(own_mediator.pid), 60, "the mediator has ended")


def test_without_a_mediator(tmp_path: Path, driver_program: Build) -> None:
    """As on a machine without a GPU: CUDA_ERROR_NO_DEVICE, and not a word."""
    from vgpu.run_main import guest_environment

    for folder in (tmp_path, tmp_path / "absent"):
        environment = guest_environment(dict(os.environ), None, folder)
        done = subprocess.run(
            [driver_program("init")], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        codes = done.stdout.split()
        assert codes[0] == "100"
        assert codes[1] != "0"


def test_without_a_mediator_a_runtime_program_sees_no_device(
    tmp_path: Path, compile_cuda: Callable[..., Path]
) -> None:
    from tests.e2e.mediator import PROGRAMS
    from vgpu.run_main import guest_environment

    environment = guest_environment(dict(os.environ), None, tmp_path)
    program = compile_cuda(PROGRAMS / "count.cu")
    done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == '{"devices": 0, "status": 100}\n'
