# SPDX-License-Identifier: Apache-2.0
"""A client that is not QEMU: it asks for version 0.1, for every region, and sizes BARs by writing ones, as the PCI standard
has it. That is what Cloud Hypervisor's client does; no Cloud Hypervisor runs here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio

from vgpu.transport.testing import CONFIGURATION, QemuClient
from vgpu.transport.vfio_user.device import REGION_COUNT, GpuDevice
from vgpu.transport.vfio_user.messages import Command, DeviceInfo, IrqInfo, Version
from vgpu.transport.vfio_user.pci import ConfigurationSpace, Variant
from vgpu.transport.vfio_user.server import DeviceServer

ONES = 0xFFFFFFFF


def size_of(client: QemuClient, register: int) -> int:
    """The size of a memory BAR, found as firmware finds it; what stood there is put back."""
    before = client.read(CONFIGURATION, register)
    is_wide = before & 0x6 == 0x4
    answers = []
    for at in (register, register + 4)[: 2 if is_wide else 1]:
        kept = client.read(CONFIGURATION, at)
        assert client.write(CONFIGURATION, at, ONES) == 0
        answers.append(client.read(CONFIGURATION, at))
        assert client.write(CONFIGURATION, at, kept) == 0
    low, high = answers[0] & ~0xF, answers[1] if is_wide else ONES
    return ((high << 32 | low) ^ 0xFFFFFFFFFFFFFFFF) + 1 if low or is_wide else 0


async def test_a_client_that_sizes_bars_itself(device: GpuDevice, tmp_path: Path) -> None:
    path = tmp_path / "gpu.sock"

    def play() -> None:
        with QemuClient.connect(path) as client:
            asked = {"max_msg_fds": 1, "max_data_xfer_size": 1 << 20, "migration": {"pgsize": 4096}}
            text = json.dumps({"capabilities": asked}, separators=(",", ":")).encode() + b"\0"
            answer = Version.decode(client.ask_well(Command.VERSION, b"\0\0\1\0" + text))
            assert (answer.major, answer.minor) == (0, 0)
            info = DeviceInfo.decode(client.ask_well(Command.GET_INFO, DeviceInfo(0, 0, 0).encode()))
            assert info == DeviceInfo(3, REGION_COUNT, 5)
            regions = [client.region_info(index) for index in range(REGION_COUNT)]
            for index in range(3):  # INTx, MSI, MSI-X: none, so it need not emulate any
                irq = IrqInfo.decode(client.ask_well(Command.GET_IRQ_INFO, IrqInfo(index).encode()))
                assert irq.count == 0
            assert size_of(client, 0x10) == regions[0].size
            assert size_of(client, 0x14) == regions[1].size
            assert [size_of(client, at) for at in (0x1C, 0x20, 0x24)] == [0, 0, 0]
            assert client.read(CONFIGURATION, 0x30) == 0
            # It gives the BARs addresses and switches them on; the device keeps both.
            client.write(CONFIGURATION, 0x10, 0xE0000000)
            client.write(CONFIGURATION, 0x14, 0x1000000C)
            client.write(CONFIGURATION, 0x18, 0x40)
            client.write(CONFIGURATION, 0x04, 0x6, 2)
            assert [client.read(CONFIGURATION, at) for at in (0x10, 0x14, 0x18)] == [
                0xE0000000,
                0x1000000C,
                0x40,
            ]
            client.reset()
            assert [client.read(CONFIGURATION, at) for at in (0x10, 0x14, 0x18)] == [0, 0xC, 0]

    async with trio.open_nursery() as nursery:
        await nursery.start(DeviceServer(device).serve, path)
        with trio.fail_after(60):
            await trio.to_thread.run_sync(play)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("size", [16 << 20, 256 << 20, 4 << 30, 64 << 30])
def test_the_size_of_any_bar1_can_be_read(size: int) -> None:
    space = ConfigurationSpace(Variant.CONVENTIONAL, (1 << 14, size))
    space.write(0x10, b"\xff" * 12)
    assert int.from_bytes(space.read(0x10, 4), "little") == 0xFFFFC000
    assert (int.from_bytes(space.read(0x14, 8), "little") & ~0xF) + size == 1 << 64
    assert space.read(0x14, 1)[0] & 0xF == 0xC
