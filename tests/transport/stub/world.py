# SPDX-License-Identifier: Apache-2.0
"""A device process as it really runs, and everybody around it: QEMU, guests, a mediator, workers."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import attrs
import trio

from vgpu.transport.layout import (
    DEVICE_PAGE_SIZE,
    DIRECTORY_FIELDS,
    DIRECTORY_HEAD_SIZE,
    DIRECTORY_OFFSET,
    DIRECTORY_PROGRAM,
    DIRECTORY_SLOT_FIELDS,
    DIRECTORY_SLOT_SIZE,
    SESSION_FIELDS,
)
from vgpu.transport.stub import messages as m
from vgpu.transport.stub.launch import (
    DeviceLink,
    device_socket_path,
    open_device_link,
    stub_command,
    vfio_socket_path,
)
from vgpu.transport.testing import QemuClient
from vgpu.transport.vfio_user.device import MIN_BAR1, cut_bar1
from vgpu.transport.vfio_user.pci import Variant
from vgpu.transport.vfio_user.registers import PAGE, SlotRegister, SlotState

SLOTS = 2
GEOMETRY = cut_bar1(MIN_BAR1, SLOTS)
PATTERN = 0xA5
E = TypeVar("E", bound=m.Event)

# argv: lifeline, BAR1, offset, size, "leave", "stay" or "told" (leaves when byte 65537 is set). Writes into the slot as long as
# it lives; counts doorbells.
WORKER = """
import mmap, select, socket, sys, time
lifeline, bar1, offset, size, manner = *map(int, sys.argv[1:5]), sys.argv[5]
line = socket.socket(fileno=lifeline)
slot = mmap.mmap(bar1, size, offset=offset)
ended, until = False, 0.0
while not ended or time.monotonic() < until or manner == "stay" or manner == "told" and not slot[65537]:
    slot[:4096] = slot[-4096:] = b"\\xa5" * 4096
    if not ended and select.select([line], [], [], 0.002)[0]:
        data = line.recv(64)
        slot[65536] = (slot[65536] + len(data)) % 256
        ended, until = not data, time.monotonic() + 0.1
"""


@attrs.define(eq=False)
class FakeWorker:
    """A process that maps a slot and holds the far end of a lifeline."""

    process: subprocess.Popen[bytes]
    lifeline: int
    pidfd: int

    @classmethod
    def start(cls, bar1: int, slot: int, manner: str = "leave") -> FakeWorker:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with its:
            numbers = (its.fileno(), bar1, GEOMETRY.slot_offset(slot), GEOMETRY.slot_size)
            command = [sys.executable, "-S", "-E", "-c", WORKER, *map(str, numbers), manner]
            process = subprocess.Popen(command, pass_fds=(its.fileno(), bar1))
        return cls(process, ours.detach(), os.pidfd_open(process.pid))

    def close(self) -> None:
        """Close our descriptors; the device has its own by now."""
        for descriptor in (self.lifeline, self.pidfd):
            if descriptor >= 0:
                os.close(descriptor)
        self.lifeline = self.pidfd = -1

    def end(self) -> None:
        self.close()
        self.process.kill()
        self.process.wait()


@attrs.define(eq=False)
class Guest:
    """One VM's view: registers through QEMU, BAR1 mapped."""

    qemu: QemuClient

    def directory(self, field: str, slot: int | None = None) -> int:
        if slot is None:
            offset, kind = DIRECTORY_FIELDS[field]
        else:
            offset, kind = DIRECTORY_SLOT_FIELDS[field]
            offset += DIRECTORY_HEAD_SIZE + slot * DIRECTORY_SLOT_SIZE
        at = DIRECTORY_OFFSET + offset
        size = struct.calcsize(kind)
        return int.from_bytes(self.qemu.maps[1][at : at + size], "little")

    def state(self, slot: int) -> SlotState:
        return SlotState(self.directory("state", slot))

    def session(self, field: str, slot: int) -> int:
        offset, kind = SESSION_FIELDS[field]
        at = GEOMETRY.slot_offset(slot) + DEVICE_PAGE_SIZE + offset
        return int.from_bytes(self.qemu.maps[1][at : at + struct.calcsize(kind)], "little")

    def claim(self, slot: int, token: int = 77, pid: int = 5, program: bytes = b"") -> None:
        offset, size = DIRECTORY_PROGRAM
        at = DIRECTORY_OFFSET + DIRECTORY_HEAD_SIZE + slot * DIRECTORY_SLOT_SIZE + offset
        self.qemu.maps[1][at : at + size] = program.ljust(size, b"\0")
        self.write(slot, SlotRegister.OWNER, pid << 32 | token, 8)

    def write(self, slot: int, register: int, value: int, count: int = 4) -> None:
        assert self.qemu.write(0, PAGE * (slot + 1) + register, value, count) == 0

    def read(self, slot: int, register: int, count: int = 4) -> int:
        return self.qemu.read(0, PAGE * (slot + 1) + register, count)

    def tell_to_leave(self, slot: int) -> None:
        """To a worker that waits to be told."""
        self.qemu.maps[1][GEOMETRY.slot_offset(slot) + 65537] = 1

    def memory(self, slot: int) -> bytes:
        start = GEOMETRY.slot_offset(slot)
        return self.qemu.maps[1][start : start + GEOMETRY.slot_size]

    def release(self, slot: int, token: int = 77) -> None:
        self.write(slot, SlotRegister.RELEASE, token)


@attrs.define(eq=False)
class World:
    """One VM's device process and who is around it. Everything started here ends here."""

    run_dir: Path
    vm: str = "vm1"
    variant: Variant = Variant.CONVENTIONAL
    process: subprocess.Popen[bytes] | None = None
    workers: list[FakeWorker] = attrs.field(factory=list)
    links: list[DeviceLink] = attrs.field(factory=list)
    clients: list[QemuClient] = attrs.field(factory=list)

    def command(self) -> list[str]:
        return stub_command(self.run_dir, self.vm, bar1_bytes=MIN_BAR1, slots=SLOTS, variant=self.variant)

    @property
    def log_path(self) -> Path:
        return self.run_dir / f"{self.vm}.log"

    def spawn(self) -> None:
        """Start the process; it listens when ``device_socket_path`` exists."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(self.command(), stdout=log, stderr=log)

    async def start(self) -> None:
        self.spawn()
        await until(device_socket_path(self.run_dir, self.vm).exists)

    def boot(self) -> Guest:
        client = QemuClient.connect(vfio_socket_path(self.run_dir, self.vm))
        self.clients.append(client)
        client.boot()
        return Guest(client)

    async def link(self) -> DeviceLink:
        link = await open_device_link(device_socket_path(self.run_dir, self.vm))
        self.links.append(link)
        return link

    async def grant(
        self, link: DeviceLink, claim: m.Claim, session: int, manner: str = "leave"
    ) -> FakeWorker:
        """Start a worker for the claim and say so. Does not wait for the device's answer."""
        worker = FakeWorker.start(link.bar1_fd, claim.slot, manner)
        self.workers.append(worker)
        await until(lambda: os.pread(link.bar1_fd, 1, GEOMETRY.slot_offset(claim.slot)) == bytes([PATTERN]))
        message = m.Grant(claim.slot, claim.token, session, 0x2000_0000_0000, worker.process.pid)
        await link.send(m.command_line(message), [worker.lifeline, worker.pidfd])
        worker.close()
        return worker

    async def own(self, guest: Guest, link: DeviceLink, slot: int, session: int) -> FakeWorker:
        """A session, from claim to READY."""
        guest.claim(slot)
        worker = await self.grant(link, await heard(link, m.Claim), session)
        assert await heard(link, m.Granted) == m.Granted(slot, session)
        assert guest.state(slot) is SlotState.READY
        return worker

    def end(self) -> None:
        for client in self.clients:
            client.close()
        for worker in self.workers:
            worker.end()
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)

    def descriptors(self) -> int:
        assert self.process is not None
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


async def until(met: Callable[[], bool], seconds: float = 60.0) -> None:
    """Look every few milliseconds: what is waited for happens in another process."""
    with trio.fail_after(seconds):
        while not met():
            await trio.sleep(0.003)


def until_sync(met: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.003)


async def next_event(link: DeviceLink) -> m.Event | None:
    """The device's next word that is no counters; None when it hung up."""
    with trio.fail_after(60):
        while True:
            message, descriptors = await link.receive()
            assert not descriptors
            if message is None:
                return None
            event = m.read_event(message)
            assert event is not None
            if not isinstance(event, m.Counters):
                return event


async def heard(link: DeviceLink, kind: type[E]) -> E:
    """The next event of that kind; others of ``Client`` are passed over, anything else is a surprise."""
    while True:
        event = await next_event(link)
        if isinstance(event, kind):
            return event
        assert isinstance(event, m.Client), event


@asynccontextmanager
async def world(
    run_dir: Path, vm: str = "vm1", variant: Variant = Variant.CONVENTIONAL
) -> AsyncIterator[World]:
    """A device process that listens."""
    one = World(run_dir, vm, variant)
    try:
        await one.start()
        yield one
    finally:
        one.end()
        for link in one.links:
            with trio.CancelScope(shield=True):
                await link.aclose()
