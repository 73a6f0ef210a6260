# SPDX-License-Identifier: Apache-2.0
"""Everything in this folder that boots a machine carries the mark ``vm``; machines are shared where tests allow it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vm.device import DeviceProcess
from tests.vm.machine import Machine
from vgpu.transport.vfio_user.pci import Variant


@pytest.fixture(scope="session")
def bare_device() -> Iterator[DeviceProcess]:
    """A conventional device without a mediator."""
    with DeviceProcess() as device:
        yield device


@pytest.fixture(scope="session")
def bare_machine(bare_device: DeviceProcess) -> Iterator[Machine]:
    """A machine ``pc`` with that device; tests may reboot it and plug the device, and leave it as they found it."""
    with Machine([bare_device.socket], name="bare") as machine:
        yield machine


@pytest.fixture(scope="session")
def express_machine() -> Iterator[Machine]:
    """A machine ``q35`` whose device is a PCI Express endpoint, without a mediator."""
    with (
        DeviceProcess("express", variant=Variant.EXPRESS) as device,
        Machine([device.socket], chipset="q35", name="express") as machine,
    ):
        yield machine
