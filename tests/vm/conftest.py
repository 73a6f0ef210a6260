# SPDX-License-Identifier: Apache-2.0
"""Everything in this folder that boots a machine carries the mark ``vm``; machines are shared where tests allow it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vm.device import DeviceProcess
from tests.vm.guest import GuestMachine
from tests.vm.host import Host
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


@pytest.fixture(scope="session")
def host() -> Iterator[Host]:
    """A mediator with two VMs. Tests may kill its processes, and leave it as they found it."""
    with Host({"alpha": Variant.CONVENTIONAL, "beta": Variant.EXPRESS}) as running:
        yield running


@pytest.fixture(scope="session")
def alpha(host: Host) -> Iterator[GuestMachine]:
    """A machine ``pc`` with everything installed by the installer."""
    with GuestMachine(host, "alpha") as machine:
        yield machine


@pytest.fixture(scope="session")
def beta(host: Host) -> Iterator[GuestMachine]:
    """A second machine on the same GPU: ``q35``, its device a PCI Express endpoint."""
    with GuestMachine(host, "beta", chipset="q35") as machine:
        yield machine


@pytest.fixture(autouse=True)
def _tidy(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a failed test has left running must not disturb the next one on the same machine."""
    shared = {"bare_machine", "express_machine", "alpha", "beta"} & set(request.fixturenames)
    machines: list[Machine] = [request.getfixturevalue(name) for name in sorted(shared)]
    yield
    for machine in machines:
        machine.tidy()
