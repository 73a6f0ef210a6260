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

from tests.e2e.mediator import Guest, Mediator, is_alive, wait_until

LAUNCH_TIMEOUT = 702
GONE_SECONDS = 20.0  # two are promised, on a host with a free processor: see tests/real_gpu/killed.py

Build = Callable[[str], Path]


@pytest.fixture
def impatient() -> Iterator[Mediator]:
    """A mediator with a VM ``impatient`` whose kernels may take two seconds."""
    with Mediator(watchdog_seconds=2.0) as running:
        yield running


def _worker_of(mediator: Mediator, guest: Guest) -> int:
    return int(mediator.session_of(guest)["info"]["worker_pid"])


def test_guest_killed_in_mid_call(own_mediator: Mediator, driver_program: Build, kernels: Path) -> None:
    """SIGKILL while a kernel that never ends runs for it: the worker goes too, at once."""
    guest = own_mediator.begin(driver_program("spin"), kernels)
    guest.until("launching")
    worker = _worker_of(own_mediator, guest)

    def is_busy() -> bool:
        """On the software GPU the worker is inside the call; on a real one a fence waits behind the kernel."""
        grant = own_mediator.session_of(guest)["grant"]
        return bool(grant["current_call"] or grant["oldest_fence_ns"])

    wait_until(is_busy, 60, "the kernel runs")
    guest.kill()
    wait_until(lambda: not is_alive(worker), GONE_SECONDS, "the worker of a dead guest is gone")
    wait_until(lambda: own_mediator.sessions() == [], GONE_SECONDS, "its session has ended")
    assert own_mediator.ask("health")["ok"]


def test_guests_killed_while_busy(own_mediator: Mediator, driver_program: Build, kernels: Path) -> None:
    """Several at once, at moments nobody chose; a neighbour does not notice."""
    neighbour = own_mediator.begin(driver_program("steady"), kernels)
    victims = [own_mediator.begin(driver_program("steady"), kernels) for _ in range(3)]
    for victim in victims:
        victim.until("turn 3")
    workers = [_worker_of(own_mediator, victim) for victim in victims]
    turn = int(neighbour.until("turn").split()[1])
    for victim in victims:
        victim.process.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    wait_until(lambda: not any(map(is_alive, workers)), GONE_SECONDS, "workers of dead guests are gone")
    assert time.monotonic() - killed < GONE_SECONDS
    neighbour.until(f"turn {turn + 20}")
    status, lines = neighbour.finish()
    assert (status, lines[-1].split()[0]) == (0, "done")


def test_guest_that_leaves_without_a_word(
    own_mediator: Mediator, driver_program: Build, kernels: Path
) -> None:
    """``_exit`` without freeing anything, as crashing programs do."""
    guest = own_mediator.begin(driver_program("steady"), kernels)
    guest.until("turn 2")
    worker = _worker_of(own_mediator, guest)
    guest.process.send_signal(signal.SIGSEGV)
    guest.process.wait(60)
    wait_until(lambda: not is_alive(worker), GONE_SECONDS, "the worker is gone")


def test_worker_killed(own_mediator: Mediator, driver_program: Build, kernels: Path) -> None:
    """Its program gets an error that stays, and never hangs; the neighbour computes on."""
    guest = own_mediator.begin(driver_program("steady"), kernels)
    neighbour = own_mediator.begin(driver_program("steady"), kernels)
    guest.until("turn 3")
    neighbour.until("turn 3")
    os.kill(_worker_of(own_mediator, guest), signal.SIGKILL)
    begun = time.monotonic()
    words = guest.until("error", 60).split()
    assert time.monotonic() - begun < 30
    code = int(words[1])
    assert code != 0
    assert guest.line(60) == f"then {code}"
    assert guest.finish()[0] == 3
    turn = int(neighbour.until("turn").split()[1])
    neighbour.until(f"turn {turn + 20}")
    assert neighbour.finish()[0] == 0
    wait_until(lambda: own_mediator.sessions() == [], 60, "both sessions have ended")
    again = own_mediator.begin(driver_program("steady"), kernels)
    again.until("turn 3")
    assert again.finish()[0] == 0


def test_worker_killed_while_the_guest_waits(
    own_mediator: Mediator, driver_program: Build, kernels: Path
) -> None:
    """The same in the middle of a synchronize that would never have returned."""
    guest = own_mediator.begin(driver_program("spin"), kernels)
    guest.until("launching")
    time.sleep(0.5)
    os.kill(_worker_of(own_mediator, guest), signal.SIGKILL)
    status, lines = guest.finish(60)
    codes = [int(line.split()[1]) for line in lines]
    assert status == 0
    assert len(codes) == 3
    assert 0 not in codes


def test_hung_kernel(impatient: Mediator, driver_program: Build, kernels: Path) -> None:
    """A kernel that never ends is ended after its VM's deadline; the program is told so and can live on."""
    neighbour = impatient.begin(driver_program("steady"), kernels)
    neighbour.until("turn 2")
    guest = impatient.begin(driver_program("spin"), kernels, vm="impatient")
    guest.until("launching")
    worker = _worker_of(impatient, guest)
    begun = time.monotonic()
    assert guest.until("synchronize", 60) == f"synchronize {LAUNCH_TIMEOUT}"
    assert time.monotonic() - begun > 1.5
    assert guest.line() == f"allocate {LAUNCH_TIMEOUT}"
    assert guest.line() == f"synchronize {LAUNCH_TIMEOUT}"
    assert guest.finish()[0] == 0
    wait_until(lambda: not is_alive(worker), GONE_SECONDS, "the worker of the hung kernel is gone")
    turn = int(neighbour.until("turn").split()[1])
    neighbour.until(f"turn {turn + 10}")
    assert neighbour.finish()[0] == 0
    again = impatient.begin(driver_program("steady"), kernels, vm="impatient")
    again.until("turn 3")
    assert again.finish()[0] == 0
    (fault,) = impatient.ask("faults")
    assert fault["error"] == LAUNCH_TIMEOUT
    assert fault["vm"] == "impatient"


def test_mediator_killed_and_started_again(
    own_mediator: Mediator, driver_program: Build, kernels: Path
) -> None:
    """Programs compute on; the next mediator finds their sessions."""
    guests = [own_mediator.begin(driver_program("steady"), kernels) for _ in range(2)]
    for guest in guests:
        guest.until("turn 3")
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
        turn = int(guest.until("turn").split()[1])
        guest.until(f"turn {turn + 50}")
        status, lines = guest.finish()
        assert (status, lines[-1].split()[0]) == (0, "done")
    wait_until(lambda: own_mediator.sessions() == [], 60, "adopted sessions end like others")
    fresh = own_mediator.begin(driver_program("steady"), kernels)
    fresh.until("turn 3")
    assert fresh.finish()[0] == 0


def test_warm_workers_that_are_too_many_are_ended(driver_program: Build, kernels: Path) -> None:
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
        guest = mediator.begin(driver_program("steady"), kernels)
        guest.until("turn 3")
        assert mediator.session_of(guest)["info"]["worker_pid"] in found
        assert guest.finish()[0] == 0


def test_guest_killed_while_there_is_no_mediator(
    own_mediator: Mediator, driver_program: Build, kernels: Path
) -> None:
    """A worker belongs to its guest: it leaves with it, whether or not anybody watches."""
    guest = own_mediator.begin(driver_program("steady"), kernels)
    guest.until("turn 3")
    worker = _worker_of(own_mediator, guest)
    own_mediator.kill()
    guest.kill()
    wait_until(lambda: not is_alive(worker), GONE_SECONDS, "the worker is gone")
    own_mediator.start()
    assert own_mediator.sessions() == []


def test_stopping_the_mediator_ends_sessions(
    own_mediator: Mediator, driver_program: Build, kernels: Path
) -> None:
    """Stopped on purpose, it leaves no process behind, and programs are told."""
    guest = own_mediator.begin(driver_program("steady"), kernels)
    guest.until("turn 3")
    workers = own_mediator.workers()
    assert len(workers) >= 2  # the guest's, and a warm one
    os.kill(own_mediator.pid, signal.SIGINT)
    assert int(guest.until("error", 60).split()[1]) != 0
    wait_until(lambda: not any(map(is_alive, workers)), 60, "all workers are gone")


def test_sigterm_lets_sessions_finish(own_mediator: Mediator, driver_program: Build, kernels: Path) -> None:
    """Drained: who is in may finish, nobody new comes in, then the mediator ends by itself."""
    guest = own_mediator.begin(driver_program("steady"), kernels)
    turn = int(guest.until("turn 3").split()[1])
    os.kill(own_mediator.pid, signal.SIGTERM)
    guest.until(f"turn {turn + 30}")
    late = subprocess.run(
        [driver_program("init")], env=own_mediator.environment(), capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip
    assert (late.stdout.split()[0], late.stderr) == ("100", "")
    assert guest.finish()[0] == 0
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
