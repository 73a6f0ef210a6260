# SPDX-License-Identifier: Apache-2.0
"""What a guest's own kernel makes of the device, on both chipsets, and the device coming and going under it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.vm.device import DeviceProcess
from tests.vm.machine import Gpu, Machine
from vgpu.transport.vfio_user.device import DEFAULT_BAR1

pytestmark = pytest.mark.vm

PROGRAM = Path(__file__).resolve().parent / "programs" / "pci.py"
CONVENTIONAL, EXPRESS = "0000:00:05.0", "0000:01:00.0"
MAGIC = b"VGPU".hex()


def look(machine: Machine, address: str) -> dict[str, Any]:
    """What PCI shows there."""
    shown: dict[str, Any] = json.loads(machine.run([sys.executable, PROGRAM, address]).stdout)
    return shown


def check_identity(shown: dict[str, Any]) -> None:
    assert (shown["vendor"], shown["device"], shown["class"], shown["revision"]) == (
        "0x10de",
        "0x2331",
        "0x030200",
        "0xa1",
    )
    assert (shown["subsystem_vendor"], shown["subsystem_device"]) == ("0x10de", "0x16c1")
    assert shown["driver"] is None
    registers, memory = shown["bars"]
    assert registers["begins"] == MAGIC
    assert not registers["prefetchable"]
    assert (memory["size"], memory["prefetchable"]) == (DEFAULT_BAR1, True)


def test_a_conventional_device(bare_machine: Machine) -> None:
    shown = look(bare_machine, CONVENTIONAL)
    check_identity(shown)
    assert (shown["current_link_speed"], shown["reset"]) == (None, False)


def test_a_pci_express_endpoint(express_machine: Machine) -> None:
    shown = look(express_machine, EXPRESS)
    check_identity(shown)
    assert (shown["current_link_speed"], shown["current_link_width"]) == ("32.0 GT/s PCIe", "16")
    assert shown["reset"]
    assert "flr" in shown["reset_method"]


def test_a_function_level_reset_leaves_it_usable(express_machine: Machine) -> None:
    express_machine.run(f"echo 1 >/sys/bus/pci/devices/{EXPRESS}/reset")
    check_identity(look(express_machine, EXPRESS))


def test_it_is_there_again_after_a_reboot(bare_machine: Machine) -> None:
    bare_machine.reboot()
    check_identity(look(bare_machine, CONVENTIONAL))


def wait_for_device(machine: Machine, address: str, present: bool) -> None:
    test = f"[ {'' if present else '!'} -e /sys/bus/pci/devices/{address} ]"
    machine.run(f"for i in $(seq 100); do {test} && exit 0; sleep 0.1; done; exit 1")


def test_unplug_and_plug(bare_machine: Machine, bare_device: DeviceProcess) -> None:
    bare_machine.unplug()
    wait_for_device(bare_machine, CONVENTIONAL, present=False)
    bare_machine.plug(bare_device.socket)
    wait_for_device(bare_machine, CONVENTIONAL, present=True)
    check_identity(look(bare_machine, CONVENTIONAL))


def test_a_device_that_was_killed_reads_as_ones_until_it_is_plugged_again(
    bare_machine: Machine, bare_device: DeviceProcess
) -> None:
    bare_device.kill()
    assert look(bare_machine, CONVENTIONAL)["bars"][0]["begins"] == "ffffffff"
    bare_device.start()
    bare_machine.unplug()
    wait_for_device(bare_machine, CONVENTIONAL, present=False)
    bare_machine.plug(Gpu(bare_device.socket))
    wait_for_device(bare_machine, CONVENTIONAL, present=True)
    check_identity(look(bare_machine, CONVENTIONAL))
