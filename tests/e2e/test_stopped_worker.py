# SPDX-License-Identifier: Apache-2.0
"""Workers that somebody stops (SIGSTOP): found whatever they were doing, given their VM's deadline to go on, then ended. Nobody else
notices; and what a worker could not do while it was stopped is not held against it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.mediator import Guest, is_alive, wait_until
from tests.e2e.steady import Steady, ends_well, goes_on
from tests.e2e.vm_device import DeviceMediator
from vgpu.actors.worker_look import is_stopped
from vgpu.gpu.process import WARM_SECONDS

UNKNOWN, LAUNCH_TIMEOUT = 999, 702
DEADLINE = 1.5
# Where a test must end a stop before the deadline.
LONG_DEADLINE = 5.0

Build = Callable[[str], Path]


@pytest.fixture
def mediator() -> Iterator[DeviceMediator]:
    with DeviceMediator() as running:
        running.call("register_vm", vm_name="red", watchdog_seconds=DEADLINE)
        yield running


def stop(mediator: DeviceMediator, guest: Guest) -> tuple[int, float]:
    """Stop the worker of a guest; its process, and a time before which nobody can have seen that."""
    pid = mediator.worker_of(guest)
    began = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: is_stopped(pid), 60, "the worker is stopped")
    return pid, began


def the_fault(mediator: DeviceMediator) -> dict[str, Any]:
    """The only one, once it is kept: the program is told before that."""
    wait_until(lambda: len(mediator.ask("faults")) == 1, 60, "the fault is kept")
    (fault,) = mediator.ask("faults")
    return dict(fault)


def test_a_worker_stopped_between_calls_is_ended_after_the_deadline(
    mediator: DeviceMediator, steady: Steady
) -> None:
    guest, neighbour = steady.begin_together(mediator, "red", "blue")
    worker, began = stop(mediator, guest)
    assert int(guest.until("error", 60).split()[1]) == UNKNOWN
    assert time.monotonic() - began >= DEADLINE
    assert guest.line(60) == f"then {UNKNOWN}"  # it stays
    assert guest.finish()[0] == 3
    wait_until(lambda: not is_alive(worker), 60, "the worker is gone")
    goes_on(neighbour)
    ends_well(neighbour)
    fault = the_fault(mediator)
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
        worker, began = stop(mediator, guest)
        wait_until(lambda worker=worker: not is_alive(worker), 60, "the worker is gone")  # type: ignore[misc]
        assert time.monotonic() - began >= DEADLINE
        guest.say()
        assert guest.line(60) == f"called {UNKNOWN}"
        assert guest.finish()[0] == 0
        wait_until(lambda count=count: len(mediator.ask("faults")) == count, 60, "the fault is kept")  # type: ignore[misc]
    assert {fault["kind"] for fault in mediator.ask("faults")} == {"stopped"}
    assert mediator.ask("quarantines") == []


def test_a_worker_that_goes_on_in_time_has_lost_nothing(mediator: DeviceMediator, steady: Steady) -> None:
    """Each stop is shorter than the deadline, and by seconds, for a busy machine; all of them together are longer."""
    mediator.call("change_vm", vm_name="red", watchdog_seconds=LONG_DEADLINE)
    guest = steady.begin(mediator, "red")

    def resumes(before: int) -> None:
        wait_until(lambda: mediator.session_of(guest)["grant"]["records"] > before, 60, "it goes on")

    for _ in range(6):
        worker, _ = stop(mediator, guest)
        records = mediator.session_of(guest)["grant"]["records"]
        time.sleep(0.2 * LONG_DEADLINE)
        os.kill(worker, signal.SIGCONT)
        resumes(records)
    goes_on(guest, 5)
    ends_well(guest)
    assert mediator.ask("faults") == []


def test_a_kernel_is_not_charged_with_the_time_its_worker_was_stopped(
    mediator: DeviceMediator, driver_program: Build, kernels: Path
) -> None:
    """A kernel that hangs has its whole deadline after the worker goes on."""
    mediator.call("change_vm", vm_name="red", watchdog_seconds=LONG_DEADLINE)
    guest = mediator.begin(driver_program("spin"), kernels, vm="red")
    guest.until("launching")
    wait_until(lambda: mediator.session_of(guest)["grant"]["current_call"] != 0, 60, "the kernel runs")
    worker, _ = stop(mediator, guest)
    wait_until(
        lambda: "is stopped, and may be for" in mediator.log.read_text(), 60, "the watchdog has seen it"
    )
    time.sleep(0.2 * LONG_DEADLINE)
    went_on = time.monotonic()
    os.kill(worker, signal.SIGCONT)
    assert guest.until("synchronize", 60) == f"synchronize {LAUNCH_TIMEOUT}"
    assert time.monotonic() - went_on >= LONG_DEADLINE
    assert guest.finish()[0] == 0
    assert the_fault(mediator)["kind"] == "hang"


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
    worker, _ = stop(mediator, guest)
    mediator.kill()
    mediator.start()
    assert mediator.sessions() == []
    os.kill(worker, signal.SIGCONT)
    wait_until(lambda: len(mediator.sessions()) == 1, 60, "the session is adopted")
    goes_on(guest)
    ends_well(guest)
