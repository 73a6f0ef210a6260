# SPDX-License-Identifier: Apache-2.0
"""What ``unregister-vm`` ends: the VM's programs, with a device or without, and its limits only after them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.mediator import is_alive, wait_until
from tests.e2e.test_limits import MIB, Build, Teller, change, refusal
from tests.e2e.vm_device import DeviceMediator

DEVICE_UNAVAILABLE = 46


@pytest.fixture(scope="module")
def mediator() -> Iterator[DeviceMediator]:
    with DeviceMediator() as running:
        yield running


def names(mediator: DeviceMediator) -> list[str]:
    return [vm["name"] for vm in mediator.ask("vms")]


def error_of(teller: Teller) -> int:
    """What its next call returns, which ends the program."""
    teller.guest.say("info")
    _, lines = teller.guest.finish()
    return int(lines[0].rpartition(": ")[2])


def test_the_programs_of_a_vm_without_a_device_end_with_it(
    mediator: DeviceMediator, driver_program: Build
) -> None:
    change(mediator, "register_vm", vm_name="tenant", memory_limit_bytes=64 * MIB, bar1_bytes=0)
    tenant = Teller(mediator, driver_program, "tenant")
    neighbour = Teller(mediator, driver_program, "neighbour")
    worker = mediator.worker_of(tenant.guest)
    assert change(mediator, "unregister_vm", vm_name="tenant") == {"vm": "tenant", "was_connected": False}
    # At once, and not some time later: its limits are gone now.
    assert not is_alive(worker)
    assert [s["info"]["vm"] for s in mediator.sessions()] == ["neighbour"]
    assert "tenant" not in names(mediator)
    (ended,) = [s for s in mediator.ask("sessions") if s["info"]["vm"] == "tenant"]
    assert ended["ended"] == "the VM was unregistered"
    shown = mediator.ask("metrics")
    assert 'vm="neighbour"' in str(shown)
    assert 'vm="tenant"' not in str(shown)
    assert error_of(tenant) == DEVICE_UNAVAILABLE
    assert neighbour.tell("info")[0] == 0
    assert neighbour.guest.finish()[0] == 0


def test_a_vm_that_came_by_itself_is_forgotten_too(mediator: DeviceMediator, driver_program: Build) -> None:
    visitor = Teller(mediator, driver_program, "visitor")
    assert "visitor" in names(mediator)
    change(mediator, "change_vm", vm_name="visitor", weight=7)
    change(mediator, "unregister_vm", vm_name="visitor")
    assert "visitor" not in names(mediator)
    assert error_of(visitor) == DEVICE_UNAVAILABLE
    assert "no VM 'visitor' is registered" in refusal(mediator, "unregister_vm", vm_name="visitor")
    again = Teller(mediator, driver_program, "visitor")
    (vm,) = [vm for vm in mediator.ask("vms") if vm["name"] == "visitor"]
    assert (vm["weight"], vm["ad_hoc"]) == (50, True)
    assert again.guest.finish()[0] == 0
    wait_until(lambda: not mediator.sessions(), 60, "all have ended")
