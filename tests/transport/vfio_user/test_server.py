# SPDX-License-Identifier: Apache-2.0
"""The server on a real socket, spoken to as QEMU speaks: boot, storms, resets, reboot, clients that come and go."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from vgpu.transport.errors import RemoteProtocolError
from vgpu.transport.testing import QemuClient
from vgpu.transport.vfio_user import messages as m
from vgpu.transport.vfio_user.device import GpuDevice
from vgpu.transport.vfio_user.registers import ClaimAsked, RegisterEvent, ReleaseAsked
from vgpu.transport.vfio_user.server import DeviceServer

SLOT = 0x1000


@asynccontextmanager
async def serving(device: GpuDevice, path: Path, heard: list[RegisterEvent]) -> AsyncIterator[DeviceServer]:
    def hear(events: Sequence[RegisterEvent]) -> None:
        heard.extend(events)

    server = DeviceServer(device, hear)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path)
        yield server
        nursery.cancel_scope.cancel()


async def in_thread(play: Callable[[], None]) -> None:
    with trio.fail_after(60):
        await trio.to_thread.run_sync(play)


async def test_a_machine_boots_runs_and_reboots(device: GpuDevice, tmp_path: Path) -> None:
    path, heard = tmp_path / "gpu.sock", []  # type: Path, list[RegisterEvent]
    memory = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(memory, 1 << 20)

    def play() -> None:
        with QemuClient.connect(path) as qemu:
            qemu.boot(guest_memory=memory)
            assert qemu.device == m.DeviceInfo(3, 9, 5)
            assert qemu.configuration[:4] == b"\xde\x10\x31\x23"
            assert qemu.regions[1].areas == ((0, 16 << 20),)
            qemu.write(7, 0x04, 0x0006, 2)
            assert qemu.read(7, 0x04, 2) == 6
            assert qemu.read_bytes(0, 0, 4) == b"VGPU"
            # BAR1 is the same memory for the guest, for trapped accesses and for the host.
            qemu.maps[1][4096:4101] = b"guest"
            assert device.memory.read(4096, 5) == b"guest"
            assert qemu.read_bytes(1, 4096, 5) == b"guest"
            qemu.write(1, 8192, 0x1122, 2)
            assert qemu.maps[1][8192:8194] == b"\x22\x11"
            assert qemu.write(0, SLOT, 99 << 32 | 7, 8) == 0
            assert qemu.read(0, SLOT, 8) == 99 << 32 | 7
            storm = [m.DmaMap(i << 20, 1 << 20) for i in range(512, 1012)]
            qemu.map_dma(storm[:60])
            qemu.unmap_dma(storm[:60])
            qemu.reboot()
            assert qemu.read(7, 0x04, 2) == 0
            assert qemu.read_bytes(0, 0, 4) == b"VGPU"
            assert qemu.read(0, 0x1000000, 4) == 0xFFFFFFFF, "refused, as QEMU tells the guest"

    async with serving(device, path, heard) as server:
        await in_thread(play)
    os.close(memory)
    assert heard == [ClaimAsked(0, 7, 99), ReleaseAsked(0, by_reset=True)]
    assert (server.clients, server.protocol_errors, server.refusals) == (1, 0, 1)
    assert not path.exists()


async def test_function_level_reset_ends_sessions(device: GpuDevice, tmp_path: Path) -> None:
    path, heard = tmp_path / "gpu.sock", []  # type: Path, list[RegisterEvent]

    def play() -> None:
        with QemuClient.connect(path) as qemu:
            qemu.boot()
            qemu.write(0, SLOT, 1 << 32 | 7, 8)
            qemu.write(7, 0x68, 0xA910, 2)
            assert qemu.read(7, 0x68, 2) == 0x2910

    async with serving(device, path, heard):
        await in_thread(play)
        assert heard == [ClaimAsked(0, 7, 1), ReleaseAsked(0, by_reset=True)]


async def test_clients_come_one_after_the_other_and_memory_stays(device: GpuDevice, tmp_path: Path) -> None:
    path, heard = tmp_path / "gpu.sock", []  # type: Path, list[RegisterEvent]

    def play() -> None:
        for turn in range(5):
            with QemuClient.connect(path) as qemu:
                qemu.boot()
                assert qemu.maps[1][0] == turn
                qemu.maps[1][0] = turn + 1
                qemu.write(0, SLOT, turn << 32 | 7, 8)

    async with serving(device, path, heard) as server:
        await in_thread(play)
        assert server.clients == 5
        assert [type(event) for event in heard[:2]] == [ClaimAsked, ReleaseAsked]
    # A slot stays taken until the host frees it, so only the first claim was one.
    assert len(heard) == 2


async def test_a_second_client_is_turned_away(device: GpuDevice, tmp_path: Path) -> None:
    path = tmp_path / "gpu.sock"

    def play() -> None:
        with QemuClient.connect(path) as first:
            first.boot()
            with QemuClient.connect(path) as second, pytest.raises((RemoteProtocolError, OSError)):
                second.negotiate()
            assert first.read_bytes(0, 0, 4) == b"VGPU"

    async with serving(device, path, []) as server:
        await in_thread(play)
        assert (server.clients, server.refused_clients) == (1, 1)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<HHIII", 0, 4, 32, 0, 0) + bytes(16),
        struct.pack("<HHIII", 0, 1, 0, 0, 0),
        struct.pack("<HHIII", 0, 1, 1 << 31, 0, 0),
    ],
)
async def test_a_client_that_breaks_the_rules_is_cut_off_and_the_next_is_served(
    device: GpuDevice, tmp_path: Path, data: bytes
) -> None:
    path = tmp_path / "gpu.sock"

    def play() -> None:
        with socket.socket(socket.AF_UNIX) as bad:
            bad.settimeout(60)
            bad.connect(str(path))
            socket.send_fds(bad, [data], [0, 1, 2])
            with suppress(ConnectionResetError):
                assert bad.recv(1) == b""
        with QemuClient.connect(path) as qemu:
            qemu.boot()

    async with serving(device, path, []) as server:
        await in_thread(play)
        assert (server.clients, server.protocol_errors) == (2, 1)


async def test_limit_of_descriptors_in_one_message(device: GpuDevice, tmp_path: Path) -> None:
    path = tmp_path / "gpu.sock"

    def play() -> None:
        with QemuClient.connect(path) as qemu:
            qemu.negotiate()
            with pytest.raises((RemoteProtocolError, OSError)):
                qemu.ask(m.Command.DMA_MAP, m.DmaMap(0, 4096).encode(), (0,) * (m.MAX_DESCRIPTORS + 4))

    async with serving(device, path, []) as server:
        await in_thread(play)
        assert server.protocol_errors == 1
