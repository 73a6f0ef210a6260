# SPDX-License-Identifier: Apache-2.0
"""A mediator that drains lets nobody new in, and is administered like any other until its last session has ended."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import pytest

from tests.e2e.mediator import is_alive, wait_until
from tests.e2e.steady import Steady, ends_well
from tests.e2e.vm_device import DeviceMediator
from tests.src.test_admin import admin, answer
from vgpu.doctor import WARN


@pytest.fixture
def mediator() -> Iterator[DeviceMediator]:
    with DeviceMediator() as running:
        yield running


def test_an_administrator_sees_and_changes_all_that_is_left(mediator: DeviceMediator, steady: Steady) -> None:
    assert admin(mediator, "register-vm", "--vm-name=red", "--bar1=16MiB").returncode == 0
    assert admin(mediator, "register-vm", "--vm-name=blue", "--no-device").returncode == 0
    assert answer(mediator, "show-health")["draining"] is False
    guest = steady.begin(mediator, "blue")
    device = int(mediator.device("red")["pid"])
    os.kill(mediator.pid, signal.SIGTERM)
    wait_until(lambda: answer(mediator, "show-health")["draining"], 60, "it drains")
    wait_until(lambda: not mediator.device("red")["running"], 60, "devices are left to the next one")
    health = answer(mediator, "show-health")
    assert (health["ok"], health["sessions"], health["vm_devices_down"]) == (True, 1, ["red"])
    assert "next mediator" in mediator.device("red")["trouble"]
    # Everything that is asked, and every change that a running program may need.
    for words in (
        ["list-vms"], ["show-vm", "--vm-name=blue"], ["list-sessions"], ["list-pools"], ["top", "--once"],
        ["set-weight", "--vm-name=blue", "--weight=7"], ["set-rate-limit", "--vm-name=blue", "--rate=100000"],
        ["create-pool", "--pool=B", "--weight=3"], ["set-pool-weight", "--pool=B", "--weight=4"],
        ["set-pool", "--vm-name=blue", "--pool=B"], ["create-pool", "--pool=C"], ["delete-pool", "--pool=C"],
        ["register-vm", "--vm-name=green", "--no-device"], ["unregister-vm", "--vm-name=green"],
        ["show-metrics"],
    ):  # fmt: skip
        done = admin(mediator, *words)
        assert (done.returncode, done.stderr) == (0, ""), words
    assert 'vgpu_source_up{source="fleet"} 1.0' in admin(mediator, "show-metrics").stdout
    findings = json.loads(admin(mediator, "doctor", "--json").stdout)["findings"]
    (drains,) = [finding for finding in findings if finding["what"] == "mediator"]
    assert drains["level"] == WARN
    assert "drains" in drains["found"]
    # What would need a device is refused in words, and leaves nothing behind.
    for words in (["register-vm", "--vm-name=late", "--bar1=16MiB"], ["unregister-vm", "--vm-name=red"]):
        done = admin(mediator, *words)
        assert done.returncode == 1
        assert "is draining" in done.stderr, words
    assert [vm["vm"]["name"] for vm in answer(mediator, "list-vms")] == ["blue", "red"]
    assert is_alive(device)
    ends_well(guest)
    assert mediator._process is not None
    assert mediator._process.wait(60) == 0
    mediator.start()
    wait_until(lambda: mediator.device("red")["running"], 60, "the next one has the device")
    assert mediator.device("red")["pid"] == device
    assert answer(mediator, "show-vm", "--vm-name=blue")["vm"]["weight"] == 7
