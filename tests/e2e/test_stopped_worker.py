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

from tests.e2e.mediator import Guest, is_alive, wait_until
from tests.e2e.steady import Steady, ends_well, goes_on
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


def stop(mediator: DeviceMediator, guest: Guest) -> int:
    """Stop the worker of a guest; its process."""
    pid = mediator.worker_of(guest)
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: is_stopped(pid), 60, "the worker is stopped")
    return pid


def test_a_worker_stopped_between_calls_is_ended_after_the_deadline(
    mediator: DeviceMediator, steady: Steady
) -> None:
    guest, neighbour = steady.begin_together(mediator, "red", "blue")
    worker, began = stop(mediator, guest), time.monotonic()
    assert int(guest.until("error", 60).split()[1]) == UNKNOWN
    assert time.monotonic() - began >= DEADLINE
    assert guest.line(60) == f"then {UNKNOWN}"  # it stays
    assert guest.finish()[0] == 3
    wait_until(lambda: not is_alive(worker), 60, "the worker is gone")
    goes_on(neighbour)
    ends_well(neighbour)
    wait_until(lambda: len(mediator.ask("faults")) == 1, 60, "the fault is kept")
    (fault,) = mediator.ask("faults")
    assert (fault["vm"], fault["kind"], fault["error"]) == ("red", "stopped", UNKNOWN)
    assert fault["what"] == f"the worker was stopped (SIGSTOP), and may be for {DEADLINE:g} s"
    steady.run(mediator, "red")


def test_an_idle_worker_that_is_stopped_is_found_too_and_never_counts_for_quarantine(
    mediator: DeviceMediator, driver_program: Build
) -> None:
    """Nothing waits in its ring: its program learns it when it calls again."""
    for count in range(1, 5):
        guest = mediator.begin(driver_program("idle"), vm="red")
        guest.until("idle")
        worker, began = stop(mediator, guest), time.monotonic()
        wait_until(lambda worker=worker: not is_alive(worker), 60, "the worker is gone")  # type: ignore[misc]
        assert time.monotonic() - began >= DEADLINE
        guest.say()
        assert guest.line(60) == f"called {UNKNOWN}"
        assert guest.finish()[0] == 0
        wait_until(lambda count=count: len(mediator.ask("faults")) == count, 60, "the fault is kept")  # type: ignore[misc]
    assert {fault["kind"] for fault in mediator.ask("faults")} == {"stopped"}
    assert mediator.ask("quarantines") == []


def test_a_worker_that_goes_on_in_time_has_lost_nothing(mediator: DeviceMediator, steady: Steady) -> None:
    """Each stop is shorter than the deadline, all of them together are longer."""
    guest = steady.begin(mediator, "red")

    def resumes(before: int) -> None:
        wait_until(lambda: mediator.session_of(guest)["grant"]["records"] > before, 60, "it goes on")

    for _ in range(4):
        worker = stop(mediator, guest)
        records = mediator.session_of(guest)["grant"]["records"]
        time.sleep(0.4 * DEADLINE)
        os.kill(worker, signal.SIGCONT)
        resumes(records)
    goes_on(guest, 5)
    ends_well(guest)
    assert mediator.ask("faults") == []


def test_a_kernel_is_not_charged_with_the_time_its_worker_was_stopped(
    mediator: DeviceMediator, driver_program: Build, kernels: Path
) -> None:
    """A kernel that hangs has its whole deadline after the worker goes on, and no more than that."""
    guest = mediator.begin(driver_program("spin"), kernels, vm="red")
    guest.until("launching")
    wait_until(lambda: mediator.session_of(guest)["grant"]["current_call"] != 0, 60, "the kernel runs")
    worker = stop(mediator, guest)
    time.sleep(0.8 * DEADLINE)
    os.kill(worker, signal.SIGCONT)
    went_on = time.monotonic()
    assert guest.until("synchronize", 60) == f"synchronize {LAUNCH_TIMEOUT}"
    assert time.monotonic() - went_on >= 0.9 * DEADLINE
    assert guest.finish()[0] == 0
    (fault,) = mediator.ask("faults")
    assert fault["kind"] == "hang"


def test_a_warm_worker_that_is_stopped_is_replaced(mediator: DeviceMediator, steady: Steady) -> None:
    first = steady.begin(mediator, "red")
    sockets = mediator.run_dir / "workers"
    wait_until(
        lambda: len(list(sockets.glob("*.sock"))) == len(mediator.workers()) == 2, 30, "a worker is warm"
    )
    (warm,) = set(mediator.workers()) - {mediator.worker_of(first)}
    time.sleep(1)  # its socket is there before it is warm
    os.kill(warm, signal.SIGSTOP)
    steady.run(mediator, "red")
    ends_well(first)
    # At once, as it is found when it is taken; had it not been warm yet, when a start takes too long.
    wait_until(lambda: not is_alive(warm), WARM_SECONDS + 15, "the stopped one is gone")


def test_a_worker_that_is_stopped_while_the_mediator_starts_is_adopted_when_it_goes_on(
    mediator: DeviceMediator, steady: Steady
) -> None:
    guest = steady.begin(mediator, "blue")
    worker = stop(mediator, guest)
    mediator.kill()
    mediator.start()
    assert mediator.sessions() == []
    os.kill(worker, signal.SIGCONT)
    wait_until(lambda: len(mediator.sessions()) == 1, 60, "the session is adopted")
    goes_on(guest)
    ends_well(guest)
