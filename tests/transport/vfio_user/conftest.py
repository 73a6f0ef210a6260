# SPDX-License-Identifier: Apache-2.0
"""A device of 16 MiB with two slots, and the number of open descriptors, which must not grow."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from vgpu.transport.vfio_user.device import MIN_BAR1, GpuDevice, SharedMemory, cut_bar1
from vgpu.transport.vfio_user.pci import Variant
from vgpu.transport.vfio_user.registers import Registers


@pytest.fixture
def registers() -> Registers:
    return Registers(cut_bar1(MIN_BAR1, 2), driver_version=13000, table_hash=0x1122334455667788)


@pytest.fixture
def device(registers: Registers) -> Iterator[GpuDevice]:
    with SharedMemory(MIN_BAR1) as memory:
        yield GpuDevice.assemble(registers, memory, Variant.EXPRESS)


@pytest.fixture(autouse=True)
def _no_descriptor_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests without an event loop of their own end with as many descriptors as they began with."""
    if "device" in request.fixturenames:
        request.getfixturevalue("device")
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before
