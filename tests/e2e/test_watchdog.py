# SPDX-License-Identifier: Apache-2.0
"""Hung kernels and quarantine with real processes: found in time whatever the program does, told to it, written down; the
neighbours notice nothing; and a VM that does it again and again is kept away until an administrator lets it in."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.mediator import Guest, is_alive, wait_until
from tests.e2e.steady import Steady, ends_well, goes_on
from tests.e2e.vm_device import DeviceMediator, VirtualMachine, VmGuest
from tests.gpu.replay.guest import DEAD, STATE, STICKY
from vgpu.supervision._progress import PATIENCE
from vgpu.transport.attach import Status
from vgpu.transport.vfio_user.registers import DeviceStatus, SlotState

LAUNCH_TIMEOUT, DEVICE_UNAVAILABLE = 702, 46
DEADLINE = 1.0
# Where it is to be told from what a program on a busy machine waits for a processor.
LONG_DEADLINE = 2.0
# The promise is deadline + 0.1 s where there is a processor for the worker (tests/gpu/replay/test_pulse.py holds it). The software GPU
# computes in the call, and what it waits for a processor on a busy machine is not charged, up to PATIENCE deadlines. What the program
# sees besides is the launch itself, and what the mediator and the program itself wait for a processor.
SLACK = 5.0
MIB = 1 << 20

Build = Callable[[str], Path]


@pytest.fixture
def mediator() -> Iterator[DeviceMediator]:
    with DeviceMediator() as running:
        yield running


def register(mediator: DeviceMediator, name: str, **how: object) -> Any:
    answer = mediator.call("register_vm", vm_name=name, **{"watchdog_seconds": DEADLINE, **how})
    return answer["result"]


def codes(lines: list[str]) -> list[int]:
    return [int(line.split()[1]) for line in lines]


def hang(mediator: DeviceMediator, program: Path, kernels: Path, vm: str, *how: str) -> tuple[int, float]:
    """Run a program that hangs, to its end; the error it saw, and seconds after its launch."""
    guest = mediator.begin(program, kernels, *how, vm=vm)
    guest.until("launching")
    words = guest.until("polled", 60).split()
    assert codes([guest.line(), guest.line()]) == [int(words[1])] * 2  # it stays
    assert guest.finish(60)[0] == 0
    return int(words[1]), float(words[2])


def _read(guest: Guest, lines: list[str]) -> None:
    assert guest.process.stdout is not None
    with guest.process.stdout as out:
        lines.extend(out)


def first_word(mediator: DeviceMediator, program: Path, vm: str) -> int:
    """What cuInit says to a new process of the VM."""
    done = subprocess.run(
        [program], env=mediator.environment(vm), capture_output=True, text=True, timeout=60, check=False
    )
    return int(done.stdout.split()[0])


def admin(mediator: DeviceMediator, *words: str) -> Any:
    command = [sys.executable, "-P", "-m", "vgpu.admin_main", "--run-dir", str(mediator.run_dir), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if "--json" in words else done.stdout


@pytest.mark.parametrize("how", ["stream", "event"])
def test_a_hung_kernel_is_found_while_its_program_polls(
    mediator: DeviceMediator, driver_program: Build, kernels: Path, steady: Steady, how: str
) -> None:
    register(mediator, "red", watchdog_seconds=LONG_DEADLINE)
    latest = PATIENCE * LONG_DEADLINE + SLACK
    neighbour = mediator.begin(driver_program("paced"), kernels, vm="blue")
    neighbour.until("turn 5")
    told: list[str] = []
    # All the while, so that it never waits for a reader, and what it said last is of the end.
    reader = threading.Thread(target=_read, args=(neighbour, told))
    reader.start()
    error, seconds = hang(mediator, driver_program("polls"), kernels, "red", how)
    assert error == LAUNCH_TIMEOUT
    assert LONG_DEADLINE <= seconds < latest
    steady.run(mediator, "red")
    assert neighbour.process.stdin is not None
    assert neighbour.process.stderr is not None
    neighbour.process.stdin.close()
    reader.join()
    assert neighbour.process.wait(60) == 0
    neighbour.process.stderr.close()
    assert told[-1].split()[0] == "done"
    turn, longest = told[-2].split()[1:]
    assert int(turn) > 5
    # It did not wait for the hung kernel.
    assert float(longest) < LONG_DEADLINE
    print(f"longest turn of the neighbour: {longest} s; found after {seconds} s of {LONG_DEADLINE} s")
    (fault,) = admin(mediator, "show-faults", "--json")
    assert (fault["vm"], fault["kind"], fault["error"]) == ("red", "hang", LAUNCH_TIMEOUT)
    assert fault["program"] == "polls"
    details = fault["details"]
    assert (details["kernel"], details["grid"], details["block"]) == ("spin", [2, 1, 1], [32, 1, 1])
    assert LONG_DEADLINE <= details["age_seconds"] < latest
    assert details["calls"][-1]["status"] is None
    assert len(details["calls"]) > 3
    text = admin(mediator, "show-faults")
    assert "spin 2x1x1 of 32x1x1" in text
    assert "not done" in text


def test_a_third_hang_quarantines_until_it_is_cleared(
    mediator: DeviceMediator, driver_program: Build, kernels: Path, steady: Steady
) -> None:
    register(mediator, "red", watchdog_seconds=0.3)
    neighbour = steady.begin(mediator, "blue")
    for _ in range(2):
        assert hang(mediator, driver_program("polls"), kernels, "red")[0] == LAUNCH_TIMEOUT
    assert mediator.ask("quarantines") == []
    bystander = steady.begin(mediator, "red")
    assert hang(mediator, driver_program("polls"), kernels, "red")[0] == LAUNCH_TIMEOUT
    wait_until(lambda: len(mediator.ask("quarantines")) == 1, 60, "the VM is quarantined")
    assert int(bystander.until("error", 60).split()[1]) == DEVICE_UNAVAILABLE
    (record,) = mediator.ask("quarantines")
    assert (record["vm"], record["by"], record["reason"]) == ("red", "watchdog", "3 faults within 600 s")
    assert first_word(mediator, driver_program("init"), "red") == DEVICE_UNAVAILABLE
    mediator.kill()
    mediator.start()
    assert first_word(mediator, driver_program("init"), "red") == DEVICE_UNAVAILABLE
    assert first_word(mediator, driver_program("init"), "blue") == 0
    assert "red may have the GPU again" in admin(mediator, "clear-quarantine", "--vm-name=red")
    steady.run(mediator, "red")
    mediator.kill()
    mediator.start()
    assert first_word(mediator, driver_program("init"), "red") == 0  # the three do not count again
    (record,) = mediator.call("quarantines", all=True)["result"]
    assert record["ended"] > record["began"]
    assert record["ended_by"]
    goes_on(neighbour, 5)
    ends_well(neighbour)


def test_an_administrator_quarantines(
    mediator: DeviceMediator, driver_program: Build, steady: Steady
) -> None:
    guest, neighbour = steady.begin_together(mediator, "red", "blue")
    admin(mediator, "quarantine", "--vm-name=red", "--reason=mines coins")
    assert int(guest.until("error", 60).split()[1]) == DEVICE_UNAVAILABLE
    assert first_word(mediator, driver_program("init"), "red") == DEVICE_UNAVAILABLE
    assert "mines coins" in admin(mediator, "list-quarantines")
    goes_on(neighbour, 5)
    ends_well(neighbour)
    wait_until(lambda: mediator.sessions() == [], 60, "no session is left")
    assert mediator.ask("faults") == []


def test_a_session_that_ends_without_a_mediator_is_closed_in_the_ledger(
    mediator: DeviceMediator, steady: Steady
) -> None:
    from vgpu.actors.ledger import LedgerFile

    guest = steady.begin(mediator)
    worker = mediator.worker_of(guest)
    mediator.kill()
    guest.kill()
    wait_until(lambda: not is_alive(worker), 60, "the worker is gone")
    mediator.start()
    assert mediator.sessions() == []
    mediator.stop()
    file = LedgerFile(mediator.state_dir / "ledger.sqlite")
    rows = file._db.execute("SELECT ended, reason FROM sessions WHERE began IS NOT NULL").fetchall()
    file.close()
    ((ended, reason),) = rows
    assert time.time() - ended < 60
    assert reason == "ended while there was no mediator"


def test_a_vm_that_is_quarantined_reads_so_in_its_device(mediator: DeviceMediator) -> None:
    path = Path(register(mediator, "red", bar1_bytes=64 * MIB, slots=4)["device"]["socket"])
    with VirtualMachine(path) as vm:
        wait_until(lambda: vm.head("status") & DeviceStatus.HOST_PRESENT != 0, 60, "the host is present")
        guest = VmGuest(vm, 0, 0xABCD, 321)
        guest.retain()
        mediator.call("quarantine", vm_name="red", reason="a test")
        wait_until(lambda: guest.u32(STATE) == DEAD, 60, "its session is ended")
        assert guest.u32(STICKY) == DEVICE_UNAVAILABLE
        wait_until(lambda: vm.head("status") & DeviceStatus.QUARANTINED != 0, 60, "STATUS says so")
        refused = object.__new__(VmGuest)
        refused.claim(vm, 1, 0xBCDE, 322, "late")
        wait_until(lambda: vm.state(1) is SlotState.REFUSED, 60, "a claim is refused")
        assert vm.slot(1, "refusal") == Status.REFUSED
        mediator.kill()
        mediator.start()
        both = DeviceStatus.HOST_PRESENT | DeviceStatus.QUARANTINED
        wait_until(lambda: vm.head("status") == both, 60, "the next mediator says so too")
        mediator.call("clear_quarantine", vm_name="red")
        wait_until(lambda: vm.head("status") == DeviceStatus.HOST_PRESENT, 60, "it is cleared")
        again = VmGuest(vm, 2, 0xCDEF, 323)
        again.retain()
        assert again.counted(7) == 7
        again.release()
