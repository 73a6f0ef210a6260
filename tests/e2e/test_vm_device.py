# SPDX-License-Identifier: Apache-2.0
"""Sessions of VMs, end to end: mediator, device process, workers; only QEMU and the guest's kernel are played.

What a VM may count on: a session in a slot of its BAR1, found and used without an exit per call; a mediator that comes
and goes without being noticed; a device that comes back; slots that are given back however a guest ends.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.mediator import is_alive, wait_until
from tests.e2e.vm_device import DeviceMediator, VirtualMachine, VmGuest
from tests.gpu.replay.guest import DEAD, LOST, PAGE, READY, STATE, STICKY
from vgpu.gpu.software.attributes import NAME
from vgpu.transport.vfio_user.registers import DeviceStatus, SlotState

MIB = 1 << 20
GONE_SECONDS = 30.0


@pytest.fixture(scope="module")
def mediator() -> Iterator[DeviceMediator]:
    with DeviceMediator() as running:
        yield running


@pytest.fixture
def own_mediator() -> Iterator[DeviceMediator]:
    with DeviceMediator() as running:
        yield running


def register(mediator: DeviceMediator, name: str, **how: object) -> Path:
    """Register a VM with a device; where its QEMU connects."""
    answer = mediator.call("register_vm", vm_name=name, **{"bar1_bytes": 64 * MIB, "slots": 4, **how})
    device = answer["result"]["device"]
    assert device["running"], answer
    return Path(device["socket"])


def test_a_session_and_the_next_in_its_slot(mediator: DeviceMediator) -> None:
    path = register(mediator, "red", memory_limit_bytes=512 * MIB)
    with VirtualMachine(path) as vm:
        wait_until(lambda: vm.head("status") & DeviceStatus.HOST_PRESENT != 0, 60, "the host is present")
        assert vm.head("driver_version") == 13000
        before = vm.qemu.read(0, 0x1C)
        guest = VmGuest(vm, 1, 0xABCD, 321, "ollama")
        assert bytes(guest.map[16:272]).split(b"\0")[0].decode() == NAME
        assert guest.u64(304) == 512 * MIB
        assert guest.worker_address == guest.u64(PAGE + 96)
        guest.retain()
        assert guest.counted(0x1122334455667788) == 0x1122334455667788
        (sample,) = mediator.sessions()
        info = sample["info"]
        assert (info["vm"], info["guest_pid"], info["program"], info["slot"]) == ("red", 321, "ollama", 1)
        assert info["session"] == guest.session
        assert mediator.device("red")["connected"]
        assert vm.qemu.read(0, 0x1C) == before  # nothing it did was refused
        worker = mediator.worker_of_session(guest.session)
        guest.release()
        wait_until(lambda: vm.state(1) is SlotState.FREE, GONE_SECONDS, "the slot is given back")
        assert not is_alive(worker)
        assert not any(guest.map[PAGE : PAGE + 4096])
        guest.close()
        again = VmGuest(vm, 1, 0xBCDE, 322)
        assert again.session > guest.session
        again.retain()
        assert again.counted(5) == 5
        again.release()
        again.close()
    wait_until(lambda: mediator.sessions() == [], GONE_SECONDS, "no session is left")


def test_two_sessions_of_a_vm_and_one_of_another(mediator: DeviceMediator) -> None:
    first, second = register(mediator, "two-a"), register(mediator, "two-b", bar1_bytes=16 * MIB, slots=8)
    with VirtualMachine(first) as vm, VirtualMachine(second) as other:
        guests = [VmGuest(vm, 0, 1, 10), VmGuest(vm, 3, 2, 11), VmGuest(other, 7, 3, 10)]
        assert len({guest.session for guest in guests}) == 3
        assert guests[2].arena_size < 2 * MIB
        for guest in guests:
            guest.retain()
        for value in range(20):
            for index, guest in enumerate(guests):
                assert guest.counted(value << 8 | index) == value << 8 | index
        # A guest that dies is found dead by another one of its VM, which releases its slot for it.
        guests[0].close()
        guests[0].release()
        wait_until(lambda: vm.state(0) is SlotState.FREE, GONE_SECONDS, "the dead guest's slot is free")
        assert guests[1].counted(77) == 77
        # The machine is reset: every session of it ends, those of others go on.
        vm.qemu.reset()
        wait_until(lambda: vm.state(3) is SlotState.FREE, GONE_SECONDS, "the reset has freed the slot")
        assert guests[2].counted(78) == 78
        guests[1].close()
        guests[2].close()
    # A QEMU that ends is a reset too.
    wait_until(lambda: mediator.sessions() == [], GONE_SECONDS, "no session is left")


def test_a_session_outlives_the_mediator(own_mediator: DeviceMediator) -> None:
    mediator = own_mediator
    path = register(mediator, "red")
    with VirtualMachine(path) as vm:
        guest = VmGuest(vm, 0, 1, 10)
        guest.retain()
        worker = mediator.worker_of_session(guest.session)
        device = mediator.device("red")["pid"]
        mediator.kill()
        wait_until(lambda: not vm.head("status") & DeviceStatus.HOST_PRESENT, 60, "the host is away")
        assert guest.counted(1) == 1  # under the lease it has
        late = VmGuest.__new__(VmGuest)
        late.claim(vm, 2, 2, 11, "late")  # answered by the next one
        mediator.start()
        wait_until(lambda: bool(mediator.sessions()), 60, "the session is adopted")
        late.take()
        late.retain()
        assert (late.counted(2), guest.counted(3)) == (2, 3)
        assert {s["info"]["session"] for s in mediator.sessions()} == {guest.session, late.session}
        assert {s["info"]["slot"] for s in mediator.sessions()} == {0, 2}
        assert mediator.worker_of_session(guest.session) == worker
        assert (mediator.device("red")["pid"], mediator.device("red")["claimed"]) == (device, 2)
        assert vm.head("status") & DeviceStatus.HOST_PRESENT
        guest.release()
        wait_until(lambda: vm.state(0) is SlotState.FREE, GONE_SECONDS, "the slot is given back")
        assert late.counted(4) == 4
        guest.close()
        late.close()


def test_a_device_that_dies_comes_back(own_mediator: DeviceMediator) -> None:
    mediator = own_mediator
    path = register(mediator, "red")
    other = register(mediator, "blue")
    with VirtualMachine(path) as vm, VirtualMachine(other) as untouched:
        guest, neighbour = VmGuest(vm, 0, 1, 10), VmGuest(untouched, 0, 1, 10)
        guest.retain()
        neighbour.retain()
        worker = mediator.worker_of_session(guest.session)
        device = mediator.device("red")["pid"]
        os.kill(device, signal.SIGKILL)
        # BAR1 stays mapped in QEMU, so the guest reads in its session page what has happened.
        wait_until(lambda: guest.u32(STATE) == DEAD, GONE_SECONDS, "the guest is told")
        assert (guest.u32(STICKY), guest.u32(LOST)) == (46, 1)
        wait_until(lambda: not is_alive(worker), GONE_SECONDS, "its worker is gone")
        wait_until(lambda: mediator.device("red")["pid"] not in (0, device), 60, "the device runs again")
        with VirtualMachine(path) as replugged:
            successor = VmGuest(replugged, 0, 2, 12)
            successor.retain()
            assert successor.counted(9) == 9
            successor.close()
        assert neighbour.counted(10) == 10
        assert neighbour.u32(STATE) == READY
        guest.close()
        neighbour.close()


def test_sessions_are_ended_from_outside(mediator: DeviceMediator) -> None:
    path = register(mediator, "ended")
    with VirtualMachine(path) as vm:
        guest = VmGuest(vm, 0, 1, 10)
        guest.retain()
        assert mediator.call("kill_session", session=guest.session)["result"]["vm"] == "ended"
        wait_until(lambda: vm.state(0) is SlotState.DEAD, GONE_SECONDS, "the slot says so")
        assert (guest.u32(STATE), guest.u32(STICKY), guest.u32(LOST)) == (DEAD, 46, 0)
        assert "no session" in mediator.call("kill_session", session=guest.session)["error"]["message"]
        guest.release()
        wait_until(lambda: vm.state(0) is SlotState.FREE, GONE_SECONDS, "the slot is given back")
        guest.close()
        guest = VmGuest(vm, 0, 2, 10)
        guest.retain()
        worker = mediator.worker_of_session(guest.session)
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: vm.state(0) is SlotState.DEAD, GONE_SECONDS, "a crashed worker is noticed")
        assert guest.u32(STATE) == DEAD
        assert guest.u32(STICKY) != 0
        guest.close()
        other = VmGuest(vm, 1, 3, 10)
        other.retain()
        worker = mediator.worker_of_session(other.session)
        assert mediator.call("unregister_vm", vm_name="ended")["result"] == {
            "vm": "ended",
            "was_connected": True,
        }
        wait_until(lambda: not is_alive(worker), GONE_SECONDS, "its worker is gone")
        assert [d for d in mediator.ask("devices") if d["vm"] == "ended"] == []
        assert not path.exists()
        assert "no VM" in mediator.call("unregister_vm", vm_name="ended")["error"]["message"]
        other.close()
