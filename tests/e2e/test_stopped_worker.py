# SPDX-License-Identifier: Apache-2.0
"""Workers that somebody stops (SIGSTOP): found whatever they were doing, given their VM's deadline to go on, then ended. Nobody else
notices; and what a worker could not do while it was stopped is not held against it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.mediator import is_alive, wait_until
from tests.e2e.vm_device import DeviceMediator
from vgpu.actors.worker_look import is_stopped
from vgpu.gpu.process import WARM_SECONDS

UNKNOWN, LAUNCH_TIMEOUT = 999, 702
DEADLINE = 1.5

Build = Callable[[str], Path]


@pytest.fixture
def mediator() -> Iterator[DeviceMediator]:
    with DeviceMediator() as running:
        running.call("register_vm", vm_name="red", watchdog_seconds=DEADLINE)
        yield running


def stop(mediator: DeviceMediator, session: dict[str, object]) -> int:
    """Stop the worker of a session; its process."""
    info = session["info"]
    assert isinstance(info, dict)
    pid = int(info["worker_pid"])
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: is_stopped(pid), 60, "the worker is stopped")
    return pid


def test_a_worker_stopped_between_calls_is_ended_after_the_deadline(
    mediator: DeviceMediator, driver_program: Build, kernels: Path
) -> None:
    neighbour = mediator.begin(driver_program("steady"), kernels, vm="blue")
    guest = mediator.begin(driver_program("steady"), kernels, vm="red")
    neighbour.until("turn 3")
    guest.until("turn 3")
    worker, began = stop(mediator, mediator.session_of(guest)), time.monotonic()
    assert int(guest.until("error", 60).split()[1]) == UNKNOWN
    assert time.monotonic() - began >= DEADLINE
    assert guest.line(60) == f"then {UNKNOWN}"  # it stays
    assert guest.finish()[0] == 3
    wait_until(lambda: not is_alive(worker), 60, "the worker is gone")
    turn = int(neighbour.until("turn").split()[1])
    neighbour.until(f"turn {turn + 10}")
    assert neighbour.finish()[0] == 0
    wait_until(lambda: len(mediator.ask("faults")) == 1, 60, "the fault is kept")
    (fault,) = mediator.ask("faults")
    assert (fault["vm"], fault["kind"], fault["error"]) == ("red", "stopped", UNKNOWN)
    assert fault["what"] == f"the worker was stopped (SIGSTOP), and may be for {DEADLINE:g} s"
    again = mediator.begin(driver_program("steady"), kernels, vm="red")
    again.until("turn 3")
    assert again.finish()[0] == 0


def test_an_idle_worker_that_is_stopped_is_found_too_and_never_counts_for_quarantine(
    mediator: DeviceMediator, driver_program: Build
) -> None:
    """Nothing waits in its ring: its program learns it when it calls again."""
    for count in range(1, 5):
        guest = mediator.begin(driver_program("idle"), vm="red")
        guest.until("idle")
        worker, began = stop(mediator, mediator.session_of(guest)), time.monotonic()
        wait_until(lambda worker=worker: not is_alive(worker), 60, "the worker is gone")  # type: ignore[misc]
        assert time.monotonic() - began >= DEADLINE
        guest.say()
        assert guest.line(60) == f"called {UNKNOWN}"
        assert guest.finish()[0] == 0
        wait_until(lambda count=count: len(mediator.ask("faults")) == count, 60, "the fault is kept")  # type: ignore[misc]
    assert {fault["kind"] for fault in mediator.ask("faults")} == {"stopped"}
    assert mediator.ask("quarantines") == []


def test_a_worker_that_goes_on_in_time_has_lost_nothing(
    mediator: DeviceMediator, driver_program: Build, kernels: Path
) -> None:
    """Each stop is shorter than the deadline, all of them together are longer."""
    guest = mediator.begin(driver_program("steady"), kernels, vm="red")
    guest.until("turn 3")

    def resumes(before: int) -> None:
        wait_until(lambda: mediator.session_of(guest)["grant"]["records"] > before, 60, "it goes on")

    for _ in range(4):
        worker = stop(mediator, mediator.session_of(guest))
        records = mediator.session_of(guest)["grant"]["records"]
        time.sleep(0.4 * DEADLINE)
        os.kill(worker, signal.SIGCONT)
        resumes(records)
    turn = int(guest.until("turn").split()[1])
    guest.until(f"turn {turn + 5}")
    assert guest.finish()[0] == 0
    assert mediator.ask("faults") == []


def test_a_kernel_is_not_charged_with_the_time_its_worker_was_stopped(
    mediator: DeviceMediator, driver_program: Build, kernels: Path
) -> None:
    """A kernel that hangs has its whole deadline after the worker goes on, and no more than that."""
    guest = mediator.begin(driver_program("spin"), kernels, vm="red")
    guest.until("launching")
    wait_until(lambda: mediator.session_of(guest)["grant"]["current_call"] != 0, 60, "the kernel runs")
    worker = stop(mediator, mediator.session_of(guest))
    time.sleep(0.8 * DEADLINE)
    os.kill(worker, signal.SIGCONT)
    went_on = time.monotonic()
    assert guest.until("synchronize", 60) == f"synchronize {LAUNCH_TIMEOUT}"
    assert time.monotonic() - went_on >= 0.9 * DEADLINE
    assert guest.finish()[0] == 0
    (fault,) = mediator.ask("faults")
    assert fault["kind"] == "hang"


def test_a_warm_worker_that_is_stopped_is_replaced(
    mediator: DeviceMediator, driver_program: Build, kernels: Path
) -> None:
    first = mediator.begin(driver_program("steady"), kernels, vm="red")
    first.until("turn 3")
    sockets = mediator.run_dir / "workers"
    wait_until(
        lambda: len(list(sockets.glob("*.sock"))) == len(mediator.workers()) == 2, 30, "a worker is warm"
    )
    (warm,) = set(mediator.workers()) - {mediator.session_of(first)["info"]["worker_pid"]}
    time.sleep(1)  # its socket is there before it is warm
    os.kill(warm, signal.SIGSTOP)
    guest = mediator.begin(driver_program("steady"), kernels, vm="red")
    guest.until("turn 3")
    assert guest.finish()[0] == 0
    assert first.finish()[0] == 0
    # At once, as it is found when it is taken; had it not been warm yet, when a start takes too long.
    wait_until(lambda: not is_alive(warm), WARM_SECONDS + 15, "the stopped one is gone")


def test_a_worker_that_is_stopped_while_the_mediator_starts_is_adopted_when_it_goes_on(
    mediator: DeviceMediator, driver_program: Build, kernels: Path
) -> None:
    guest = mediator.begin(driver_program("steady"), kernels, vm="blue")
    guest.until("turn 3")
    worker = stop(mediator, mediator.session_of(guest))
    mediator.kill()
    mediator.start()
    assert mediator.sessions() == []
    os.kill(worker, signal.SIGCONT)
    wait_until(lambda: len(mediator.sessions()) == 1, 60, "the session is adopted")
    turn = int(guest.until("turn").split()[1])
    guest.until(f"turn {turn + 10}")
    assert guest.finish()[0] == 0
