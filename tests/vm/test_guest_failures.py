# SPDX-License-Identifier: Apache-2.0
"""What processes in a VM see when something dies: themselves, their VM, the mediator, the device, QEMU."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.mediator import is_alive, wait_until
from tests.vm.guest import GuestMachine, last_turn
from tests.vm.machine import Machine
from tests.vm.remote import Process

pytestmark = pytest.mark.vm

DEVICE_UNAVAILABLE = 46
GONE_SECONDS = 30.0  # mostly 3: the agent looks once a second, and then the worker has two
PAUSE_SECONDS = 20.0  # what is promised, one, is for measurements to show: docs/measurements/

Build = Callable[[str], Path]


def begin(machine: GuestMachine, program: Path, kernels: Path, turn: int = 3) -> Process:
    """The program ``steady``, when it has computed for a few turns."""
    process = machine.spawn([program, kernels])
    process.until(f"turn {turn}")
    return process


def goes_on(process: Process, turns: int = 10, seconds: float = 60) -> None:
    """It computes that many more turns."""
    goal = last_turn(process) + turns
    deadline = time.monotonic() + seconds
    while int(process.until("turn", seconds).split()[1]) < goal:
        assert time.monotonic() < deadline, f"{process} has not come to turn {goal}"


def finish(process: Process) -> None:
    """It ends well."""
    process.close_input()
    result = process.wait()
    assert (result.status, result.lines[-1].split()[0]) == (0, "done"), result


def test_a_killed_process_frees_its_slot(alpha: GuestMachine, driver_program: Build, kernels: Path) -> None:
    alpha.host.wait_idle("alpha")
    process = begin(alpha, driver_program("steady"), kernels)
    neighbour = begin(alpha, driver_program("steady"), kernels)
    worker = alpha.worker_of(process)
    process.kill()
    wait_until(lambda: not is_alive(worker), GONE_SECONDS, "the worker of the dead process is gone")
    wait_until(lambda: alpha.host.device("alpha")["claimed"] == 1, GONE_SECONDS, "its slot is free")
    goes_on(neighbour)
    finish(neighbour)


def test_a_process_killed_while_its_kernel_never_ends(
    alpha: GuestMachine, driver_program: Build, kernels: Path
) -> None:
    process = alpha.spawn([driver_program("spin"), kernels])
    process.until("launching")
    worker = alpha.worker_of(process)
    process.kill()
    wait_until(lambda: not is_alive(worker), GONE_SECONDS, "the worker of the hung kernel is gone")
    alpha.host.wait_idle("alpha")


def test_without_an_agent_the_next_process_frees_the_slot(
    alpha: GuestMachine, driver_program: Build, kernels: Path
) -> None:
    """A guest where only the libraries are installed loses no slots either."""
    assert alpha.guest_agent is not None
    alpha.guest_agent.kill()
    try:
        dead = begin(alpha, driver_program("steady"), kernels)
        worker = alpha.worker_of(dead)
        dead.kill()
        other = begin(alpha, driver_program("steady"), kernels)
        # It looks now and then, and believes in a death after three heartbeats that did not come.
        wait_until(lambda: not is_alive(worker), 60, "another process has released the dead one's slot")
        finish(other)
    finally:
        alpha.start_agent()
    alpha.host.wait_idle("alpha")


def test_a_killed_worker_is_an_error_and_no_hang(
    alpha: GuestMachine, driver_program: Build, kernels: Path
) -> None:
    process = begin(alpha, driver_program("steady"), kernels)
    worker = alpha.worker_of(process)
    alpha.host.kill_worker(worker)
    code = int(process.until("error", 60).split()[1])
    assert code != 0
    assert process.line() == f"then {code}"
    assert process.wait().status == 3
    finish(begin(alpha, driver_program("steady"), kernels))
    alpha.host.wait_idle("alpha")


def test_the_mediator_is_killed_and_started_again(
    alpha: GuestMachine, driver_program: Build, kernels: Path, record_property: Callable[[str, object], None]
) -> None:
    """A program computes through it without an error; the longest time between two turns is bounded."""
    process = begin(alpha, driver_program("paced"), kernels)
    worker = alpha.worker_of(process)
    session = alpha.host.session_in("alpha", process)["info"]["session"]
    alpha.host.kill()
    time.sleep(0.5)
    goes_on(process)
    alpha.host.start()
    goes_on(process)
    found = alpha.host.session_in("alpha", process)["info"]
    assert (found["session"], found["worker_pid"]) == (session, worker)
    finish(process)
    longest = max(float(line.split()[2]) for line in process.output().splitlines() if line.startswith("turn"))
    record_property("longest_turn_seconds", longest)
    print(f"longest turn across a mediator restart: {longest:.3f} s")
    assert longest < PAUSE_SECONDS
    alpha.host.wait_idle("alpha")


def test_a_claim_waits_for_the_mediator(alpha: GuestMachine, driver_program: Build, kernels: Path) -> None:
    """A program that starts while there is none is served by the next."""
    alpha.host.kill()
    process = alpha.spawn([driver_program("driver"), kernels])
    time.sleep(1)
    alpha.host.start()
    assert process.wait().lines[-1] == "done"
    alpha.host.wait_idle("alpha")


def test_the_guest_reboots(alpha: GuestMachine, driver_program: Build, kernels: Path) -> None:
    """Sessions end with it, and the next boot finds a clean device."""
    process = begin(alpha, driver_program("steady"), kernels)
    worker = alpha.worker_of(process)
    alpha.reboot()
    assert not is_alive(worker)
    alpha.host.wait_idle("alpha")
    alpha.install()
    assert alpha.run([driver_program("driver"), kernels]).lines[-1] == "done"


def test_the_device_process_is_killed(
    alpha: GuestMachine, beta: GuestMachine, driver_program: Build, kernels: Path
) -> None:
    """Its programs are told; plugged again, it serves new ones. The other VM notices nothing."""
    process = alpha.spawn([driver_program("step"), kernels])
    assert process.line() == "turn 1"
    neighbour = begin(beta, driver_program("steady"), kernels)
    alpha.host.kill_device("alpha")
    process.say()
    assert process.line() == f"error {DEVICE_UNAVAILABLE}"
    assert process.line() == f"then {DEVICE_UNAVAILABLE}"
    assert process.wait().status == 3
    words = alpha.run([driver_program("init")]).stdout.split()
    assert words[0] != "0"
    alpha.replug()
    finish(begin(alpha, driver_program("steady"), kernels))
    goes_on(neighbour)
    finish(neighbour)


def test_the_device_process_is_killed_while_it_is_asked(
    alpha: GuestMachine, driver_program: Build, kernels: Path
) -> None:
    """The program rings all the time, so a request is under way at the kill; QEMU would end, or stand still for a minute."""
    process = begin(alpha, driver_program("steady"), kernels)
    began = time.monotonic()
    alpha.host.kill_device("alpha")
    assert process.until("error", 60).split()[1] == str(DEVICE_UNAVAILABLE)
    assert process.wait().status == 3
    assert time.monotonic() - began < 20
    assert alpha.is_running()
    alpha.replug()
    finish(begin(alpha, driver_program("steady"), kernels))
    alpha.host.wait_idle("alpha")


def test_the_device_is_unplugged_under_a_running_program(
    alpha: GuestMachine, driver_program: Build, kernels: Path
) -> None:
    """An error it can handle, never a signal."""
    process = begin(alpha, driver_program("steady"), kernels)
    alpha.unplug()
    assert process.until("error", 60).split()[1] == str(DEVICE_UNAVAILABLE)
    result = process.wait()
    assert result.status == 3, result
    alpha.wait_device(present=False)
    assert alpha.run([driver_program("init")]).stdout.split()[0] != "0"
    alpha.plug(alpha.host.socket("alpha"))
    alpha.wait_device(present=True)
    finish(begin(alpha, driver_program("steady"), kernels))
    alpha.host.wait_idle("alpha")


def test_a_vm_that_vanishes_leaves_nothing(alpha: GuestMachine, driver_program: Build, kernels: Path) -> None:
    """SIGKILL to QEMU; a new machine on the same device computes."""
    process = begin(alpha, driver_program("steady"), kernels)
    worker = alpha.worker_of(process)
    alpha.kill()
    wait_until(lambda: not is_alive(worker), GONE_SECONDS, "the worker is gone")
    alpha.host.wait_idle("alpha")
    assert process.wait(60).status == -signal.SIGKILL
    alpha.tidy()
    finish(begin(alpha, driver_program("steady"), kernels))


def test_two_machines_compute_at_once(
    alpha: GuestMachine, beta: GuestMachine, driver_program: Build, kernels: Path
) -> None:
    """Two VMs, of two chipsets, two programs in each, one GPU."""
    machines: list[Machine] = [alpha, alpha, beta, beta]
    processes = [machine.spawn([driver_program("steady"), kernels]) for machine in machines]
    for process in processes:
        process.until("turn 5", 120)
    assert {s["info"]["vm"] for s in alpha.host.sessions()} == {"alpha", "beta"}
    for process in processes:
        goes_on(process, 10, 120)
    for process in processes:
        finish(process)
    for vm in ("alpha", "beta"):
        alpha.host.wait_idle(vm)
