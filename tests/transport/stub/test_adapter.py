# SPDX-License-Identifier: Apache-2.0
"""What takes too long in a real process: the same adapter in this one, with shorter times and narrower limits."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from tests.transport.stub.world import SLOTS, FakeWorker, Guest, heard, until
from vgpu.transport.stub import core, process
from vgpu.transport.stub import messages as m
from vgpu.transport.stub.directory import Directory
from vgpu.transport.stub.launch import open_device_link
from vgpu.transport.testing import QemuClient
from vgpu.transport.vfio_user.device import MIN_BAR1, GpuDevice, SharedMemory, cut_bar1
from vgpu.transport.vfio_user.pci import Variant
from vgpu.transport.vfio_user.registers import Registers, SlotState

T = TypeVar("T")


@asynccontextmanager
async def adapter(folder: Path) -> AsyncIterator[process.DeviceProcess]:
    registers = Registers(cut_bar1(MIN_BAR1, SLOTS))
    with SharedMemory(MIN_BAR1) as memory, closing(Directory(memory.descriptor, registers)) as directory:
        one = process.make_process("vm1", GpuDevice.assemble(registers, memory, Variant.EXPRESS), directory)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.run, folder / "vfio", folder / "device")
            await until((folder / "device").exists)
            yield one
            nursery.cancel_scope.cancel()


async def aside(play: Callable[[], T]) -> T:
    """Blocking play, in a thread: QEMU is served by this one."""
    with trio.fail_after(60):
        return await trio.to_thread.run_sync(play)


async def test_a_worker_that_does_not_leave_is_killed_when_no_mediator_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(core, "KILL_SECONDS", 0.1)
    async with adapter(tmp_path) as one:
        with QemuClient.connect(tmp_path / "vfio") as qemu:
            guest = Guest(qemu)
            await aside(qemu.boot)
            link = await open_device_link(tmp_path / "device")
            await aside(lambda: guest.claim(0))
            await heard(link, m.Claim)
            worker = FakeWorker.start(link.bar1_fd, 0, "stay")
            grant = m.Grant(0, 77, 31, 0x2000_0000_0000, worker.process.pid)
            await link.send(m.command_line(grant), [worker.lifeline, worker.pidfd])
            await heard(link, m.Granted)
            await aside(lambda: guest.release(0))
            await heard(link, m.Released)
            await trio.sleep(0.3)
            assert worker.process.poll() is None, "the mediator's to kill"
            await link.aclose()
            assert await aside(lambda: worker.process.wait(60)) == -9
            await until(lambda: guest.state(0) is SlotState.FREE)
            assert guest.memory(0) == bytes(len(guest.memory(0)))
            worker.end()
        assert "slot 0: its worker did not leave" in caplog.text
        assert one.device.registers.state(0) is SlotState.FREE


async def test_a_mediator_that_does_not_read_is_hung_up_on_and_qemu_does_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process, "OUTBOX_LINES", 4)
    async with adapter(tmp_path) as one:
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            deaf.connect(str(tmp_path / "device"))
            await until(lambda: one._mediator is not None)
            with trio.fail_after(60):
                for _ in range(5000):
                    if one._mediator is None:
                        break
                    one._client(True)
                    await trio.lowlevel.checkpoint()
        assert "hung up on a mediator that has not read 4 lines" in caplog.text

        def boots() -> None:
            with QemuClient.connect(tmp_path / "vfio") as qemu:
                qemu.boot()

        await aside(boots)
        link = await open_device_link(tmp_path / "device")
        assert link.described.slots == ()
        await link.aclose()


async def test_a_slot_whose_memory_cannot_be_given_back_stays_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(self: SharedMemory, offset: int, count: int) -> None:
        raise OSError(28, "no")

    monkeypatch.setattr(SharedMemory, "discard", fails)
    async with adapter(tmp_path) as one:
        with QemuClient.connect(tmp_path / "vfio") as qemu:
            guest = Guest(qemu)
            await aside(qemu.boot)
            await aside(lambda: guest.claim(0))
            await aside(lambda: guest.release(0))
            await until(lambda: "slot 0 stays closed" in caplog.text)
            assert guest.state(0) is SlotState.RELEASING
            await aside(lambda: guest.claim(0))
            assert one.device.registers.state(0) is SlotState.RELEASING
