# SPDX-License-Identifier: Apache-2.0
"""Rows of docs/failures.md that no other file here holds: kernels that fault, VMs that die with all they have, garbage in
one VM's ring beside another's work, workers that stop, and a scheduler that is gone again and again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.mediator import is_alive, wait_until
from tests.e2e.steady import Steady, ends_well, goes_on
from tests.e2e.vm_device import DeviceMediator, VirtualMachine, VmGuest
from tests.gpu.replay.guest import DEAD, STATE, STICKY
from vgpu.transport._generated_calls import CallId
from vgpu.transport.vfio_user.registers import SlotState

Build = Callable[[str], Path]

MIB = 1 << 20
GONE_SECONDS = 20.0
INVALID_VALUE, OUT_OF_MEMORY, ILLEGAL_ADDRESS, UNKNOWN = 1, 2, 700, 999


@pytest.fixture
def mediator() -> Iterator[DeviceMediator]:
    with DeviceMediator() as running:
        yield running


def device_of(mediator: DeviceMediator, vm: str, **how: object) -> Path:
    """Register a VM with a device; where its QEMU connects."""
    answer = mediator.call("register_vm", vm_name=vm, **{"bar1_bytes": 64 * MIB, "slots": 4, **how})
    return Path(answer["result"]["device"]["socket"])


def used_by(mediator: DeviceMediator, vm: str) -> int:
    """Bytes of the GPU's memory that the VM's account has on it, whichever sessions they were for."""
    (account,) = [a for a in mediator.ask("accounts") if a["vm"] == vm]
    return int(account["used"]["memory"])


def test_a_kernel_that_faults_ends_its_own_context_and_no_other(
    mediator: DeviceMediator, driver_program: Build, kernels: Path, steady: Steady
) -> None:
    """The same code as natively, from the next synchronization on and for ever; the VM's other program computes on."""
    sibling, neighbour = steady.begin_together(mediator, "red", "blue")
    guest = mediator.begin(driver_program("wild_store"), kernels, vm="red")
    guest.until("ready")
    guest.say()
    launched = int(guest.until("launch").split()[1])
    assert launched in (0, ILLEGAL_ADDRESS)  # the software GPU may have run it before the call returns
    for call in ("synchronize", "allocate", "again"):
        assert guest.until(call) == f"{call} {ILLEGAL_ADDRESS}"
    assert guest.finish()[0] == 0
    for other in (sibling, neighbour):
        goes_on(other)
        ends_well(other)
    wait_until(lambda: mediator.ask("faults") != [], 60, "the fault is written down")
    (fault,) = mediator.ask("faults")
    assert (fault["vm"], fault["kind"], fault["error"]) == ("red", "kernel", ILLEGAL_ADDRESS)
    assert mediator.ask("quarantines") == []
    steady.run(mediator, "red")


def test_a_vm_dies_with_all_its_sessions_and_their_memory(mediator: DeviceMediator) -> None:
    """QEMU is gone in mid-work: workers, slots and every byte are back in two seconds, and the next boot can have them all."""
    path, other = device_of(mediator, "red", memory_limit_bytes=256 * MIB), device_of(mediator, "blue")
    with VirtualMachine(other) as untouched:
        neighbour = VmGuest(untouched, 0, 1, 10)
        neighbour.retain()
        with VirtualMachine(path) as vm:
            guests = [VmGuest(vm, slot, slot + 1, 100 + slot) for slot in range(4)]
            for guest in guests:
                guest.retain()
                assert guest.ask(CallId.cuMemAlloc_v2, 64 * MIB).status == 0
            assert guests[0].ask(CallId.cuMemAlloc_v2, 1).status == OUT_OF_MEMORY
            workers = [mediator.worker_of_session(guest.session) for guest in guests]
            assert used_by(mediator, "red") == 256 * MIB
        died = (
            time.monotonic()
        )  # the with-block closed QEMU's connection, as the kernel does for a killed process

        def left() -> float:
            return died + GONE_SECONDS - time.monotonic()

        wait_until(lambda: not any(map(is_alive, workers)), left(), "all workers are gone")
        wait_until(lambda: used_by(mediator, "red") == 0, left(), "all memory is back")
        wait_until(lambda: len(mediator.sessions()) == 1, left(), "its sessions have ended")
        with VirtualMachine(path) as next_boot:
            heir = VmGuest(next_boot, 0, 9, 11)
            heir.retain()
            everything = heir.ask(CallId.cuMemAlloc_v2, 256 * MIB)
            assert everything.status == 0
            heir.send(CallId.wireMemoryFree, everything.values[0])
            assert heir.counted(5) == 5
            heir.close()
        assert neighbour.counted(10) == 10
        neighbour.close()


def test_garbage_in_the_ring_of_a_vm_ends_that_session_alone(mediator: DeviceMediator) -> None:
    """Noise where a record should be: INVALID_VALUE to the session whose ring it was; counted as the VM's doing."""
    path, other = device_of(mediator, "red"), device_of(mediator, "blue")
    with VirtualMachine(path) as vm, VirtualMachine(other) as untouched:
        guest, sibling = VmGuest(vm, 0, 1, 10), VmGuest(vm, 1, 2, 11)
        neighbour = VmGuest(untouched, 0, 1, 10)
        for one in (guest, sibling, neighbour):
            one.retain()
        worker = mediator.worker_of_session(guest.session)
        guest.write(b"\xa5" * 4096)
        guest.publish()
        guest.ring_bell()
        wait_until(lambda: guest.u32(STATE) == DEAD, 60, "the session is ended")
        assert guest.u32(STICKY) == INVALID_VALUE
        wait_until(lambda: not is_alive(worker), GONE_SECONDS, "its worker is gone")
        wait_until(lambda: vm.state(0) is SlotState.DEAD, 60, "its slot says so")
        assert (sibling.counted(3), neighbour.counted(4)) == (3, 4)
        wait_until(lambda: mediator.ask("faults") != [], 60, "the fault is written down")
        (fault,) = mediator.ask("faults")
        assert (fault["vm"], fault["kind"], fault["error"]) == ("red", "protocol", INVALID_VALUE)
        for one in (guest, sibling, neighbour):
            one.close()


def test_a_stopped_worker_holds_up_its_own_program_alone(mediator: DeviceMediator, steady: Steady) -> None:
    """SIGSTOP while two compete for the GPU: the neighbour gets it, and after SIGCONT nothing was lost."""
    guest, neighbour = steady.begin_together(mediator, "red", "blue")
    worker = mediator.worker_of(guest)
    os.kill(worker, signal.SIGSTOP)
    goes_on(neighbour, 200)  # more than lay in the pipe
    assert is_alive(worker)
    assert guest.process.poll() is None
    os.kill(worker, signal.SIGCONT)
    goes_on(guest, 200)
    for one in (guest, neighbour):
        ends_well(one)
    assert mediator.ask("faults") == []


def test_a_worker_that_crashes_is_its_own_programs_error(mediator: DeviceMediator, steady: Steady) -> None:
    """A signal of its own making: the program gets CUDA_ERROR_UNKNOWN at once and for ever, and the crash is written down."""
    guest, neighbour = steady.begin_together(mediator, "red", "blue")
    os.kill(mediator.worker_of(guest), signal.SIGSEGV)
    crashed = time.monotonic()
    assert guest.until("error").split()[1] == str(UNKNOWN)
    assert time.monotonic() - crashed < GONE_SECONDS
    assert guest.line() == f"then {UNKNOWN}"
    assert guest.finish()[0] == 3
    wait_until(lambda: mediator.ask("faults") != [], 60, "the fault is written down")
    (fault,) = mediator.ask("faults")
    assert (fault["vm"], fault["kind"]) == ("red", "crash")
    goes_on(neighbour)
    ends_well(neighbour)
    steady.run(mediator, "red")
