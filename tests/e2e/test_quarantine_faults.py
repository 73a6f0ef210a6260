# SPDX-License-Identifier: Apache-2.0
"""Quarantine for what is no hang: garbage in the ring, and workers that crash. It survives the mediator, ends when an administrator
says so, and shows in what the VM's guests read. What was done to a VM from outside never counts."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.mediator import Guest, is_alive, wait_until
from tests.e2e.steady import Steady, ends_well, goes_on
from tests.e2e.test_device_page import Page, page_of
from tests.e2e.test_watchdog import DEVICE_UNAVAILABLE, admin, first_word
from tests.e2e.vm_device import DeviceMediator, VirtualMachine, VmGuest
from tests.gpu.replay.guest import DEAD, STATE, STICKY
from vgpu.shim.locate import library_directory
from vgpu.transport.attach import Status
from vgpu.transport.layout import DEVICE_FIELDS, STATE_QUARANTINED
from vgpu.transport.vfio_user.registers import DeviceStatus, SlotState

Build = Callable[[str], Path]

MIB = 1 << 20
INVALID_VALUE = 1
NVML = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).nvmlInit_v2())"
NVML_OK, NVML_NO_PERMISSION = 0, 4


@pytest.fixture
def mediator() -> Iterator[DeviceMediator]:
    with DeviceMediator() as running:
        yield running


def nvml_init(mediator: DeviceMediator, vm: str) -> int:
    """What NVML says to a new process of the VM."""
    done = subprocess.run(
        [sys.executable, "-c", NVML, library_directory() / "libnvidia-ml.so.1"],
        env=mediator.environment(vm), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return int(done.stdout)


def end_worker(mediator: DeviceMediator, guest: Guest, number: signal.Signals) -> None:
    """Have the worker of a guest die of a signal; returns when its program knows."""
    worker = mediator.worker_of(guest)
    os.kill(worker, number)
    assert int(guest.until("error", 60).split()[1]) != 0
    guest.finish()
    wait_until(lambda: not is_alive(worker), 60, "the worker is gone")


def says_quarantined(page: Page) -> None:
    wait_until(lambda: page["device_state"] & STATE_QUARANTINED != 0, 60, "its page says so")


def has_faults(mediator: DeviceMediator, count: int) -> None:
    wait_until(lambda: len(mediator.ask("faults")) == count, 60, f"{count} faults are kept")


def is_dead(guest: VmGuest) -> None:
    wait_until(lambda: guest.u32(STATE) == DEAD, 60, "the session is ended")


def is_refused(vm: VirtualMachine, number: int) -> None:
    wait_until(lambda: vm.state(number) is SlotState.REFUSED, 60, "a claim is refused")


def test_workers_that_crash_quarantine_their_vm(
    mediator: DeviceMediator, driver_program: Build, steady: Steady
) -> None:
    neighbour = steady.begin(mediator, "blue")
    for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS):
        assert mediator.ask("quarantines") == []
        end_worker(mediator, steady.begin(mediator, "red"), number)
    wait_until(lambda: len(mediator.ask("quarantines")) == 1, 60, "the VM is quarantined")
    (record,) = mediator.ask("quarantines")
    assert (record["vm"], record["by"], record["reason"]) == ("red", "watchdog", "3 faults within 600 s")
    assert {fault["kind"] for fault in mediator.ask("faults")} == {"crash"}
    for _ in range(2):
        assert first_word(mediator, driver_program("init"), "red") == DEVICE_UNAVAILABLE
        with page_of(mediator, "red") as page, page_of(mediator, "blue") as other:
            says_quarantined(page)
            assert other["device_state"] & STATE_QUARANTINED == 0
        assert nvml_init(mediator, "red") == NVML_NO_PERMISSION
        assert nvml_init(mediator, "blue") == NVML_OK
        mediator.kill()
        mediator.start()
    admin(mediator, "clear-quarantine", "--vm-name=red")
    with page_of(mediator, "red") as page:
        wait_until(lambda: page["device_state"] & STATE_QUARANTINED == 0, 60, "its page says no more of it")
    assert nvml_init(mediator, "red") == NVML_OK
    steady.run(mediator, "red")
    goes_on(neighbour, 5)
    ends_well(neighbour)


def test_garbage_in_the_ring_quarantines_the_vm(mediator: DeviceMediator) -> None:
    answer = mediator.call("register_vm", vm_name="red", bar1_bytes=64 * MIB, slots=8)
    with VirtualMachine(Path(answer["result"]["device"]["socket"])) as vm:
        wait_until(lambda: vm.head("status") & DeviceStatus.HOST_PRESENT != 0, 60, "the host is present")
        bystander = VmGuest(vm, 7, 0x99, 99)
        bystander.retain()
        for number in range(3):
            assert mediator.ask("quarantines") == []
            guest = VmGuest(vm, number, 0xA0 + number, 100 + number)
            guest.retain()
            guest.write(b"\xa5" * 4096)
            guest.publish()
            guest.ring_bell()
            is_dead(guest)
            assert guest.u32(STICKY) == INVALID_VALUE
            has_faults(mediator, number + 1)
        assert {fault["kind"] for fault in mediator.ask("faults")} == {"protocol"}
        wait_until(lambda: bystander.u32(STATE) == DEAD, 60, "the VM's other sessions are ended")
        assert bystander.u32(STICKY) == DEVICE_UNAVAILABLE
        for number in (4, 5):  # also by the next mediator
            wait_until(lambda: vm.head("status") & DeviceStatus.QUARANTINED != 0, 60, "STATUS says so")
            wait_until(lambda: device_state(vm) & STATE_QUARANTINED != 0, 60, "the page says so")
            refused = object.__new__(VmGuest)
            refused.claim(vm, number, 0xB0 + number, 200, "late")
            is_refused(vm, number)
            assert vm.slot(number, "refusal") == Status.REFUSED
            mediator.kill()
            mediator.start()
        mediator.call("clear_quarantine", vm_name="red")
        wait_until(lambda: vm.head("status") == DeviceStatus.HOST_PRESENT, 60, "STATUS says no more of it")
        wait_until(lambda: device_state(vm) & STATE_QUARANTINED == 0, 60, "nor does the page")
        again = VmGuest(vm, 6, 0xC0, 300)
        again.retain()
        assert again.counted(7) == 7
        again.release()


def device_state(vm: VirtualMachine) -> int:
    """What the device page in BAR1 says of how the VM is treated."""
    offset, kind = DEVICE_FIELDS["device_state"]
    return int(struct.unpack_from(f"<{kind}", vm.memory, offset)[0])


def test_workers_that_are_ended_from_outside_never_count(
    mediator: DeviceMediator, driver_program: Build
) -> None:
    for count in range(1, 5):
        guest = mediator.begin(driver_program("idle"), vm="red")
        guest.until("idle")
        os.kill(mediator.worker_of(guest), signal.SIGKILL)
        has_faults(mediator, count)
        guest.say()
        assert guest.line(60) != "called 0"
        guest.finish()
    assert {fault["kind"] for fault in mediator.ask("faults")} == {"killed"}
    assert mediator.ask("quarantines") == []
    assert first_word(mediator, driver_program("init"), "red") == 0


def test_a_program_that_crashes_its_worker_and_leaves_is_counted_too(
    mediator: DeviceMediator, driver_program: Build
) -> None:
    """The end of the program and that of its worker are heard of in any order."""
    for count in range(1, 4):
        guest = mediator.begin(driver_program("idle"), vm="red")
        guest.until("idle")
        worker = mediator.worker_of(guest)
        os.kill(mediator.pid, signal.SIGSTOP)  # so that it finds both ends at once
        try:
            os.kill(worker, signal.SIGSEGV)
            wait_until(lambda: not is_alive(worker), 60, "the worker is gone")  # noqa: B023
            guest.kill()
        finally:
            os.kill(mediator.pid, signal.SIGCONT)
        has_faults(mediator, count)
    assert {fault["kind"] for fault in mediator.ask("faults")} == {"crash"}
    wait_until(lambda: len(mediator.ask("quarantines")) == 1, 60, "the VM is quarantined")
