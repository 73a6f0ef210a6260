# SPDX-License-Identifier: Apache-2.0
"""A VM without a VM: QEMU's part is played by ``QemuClient``, the guest process by Python.

``VirtualMachine`` connects to a VM's device as QEMU does and maps BAR1. ``VmGuest`` is a process in it: it claims a slot
through BAR0, watches the directory, and speaks with its worker through the slot, as the guest library does.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from pathlib import Path
from typing import Any, Self

from tests.e2e.mediator import Mediator, is_alive, wait_until
from tests.gpu.replay.guest import Guest
from vgpu.transport._generated_calls import CallId
from vgpu.transport.layout import (
    DIRECTORY_FIELDS,
    DIRECTORY_HEAD_SIZE,
    DIRECTORY_OFFSET,
    DIRECTORY_PROGRAM,
    DIRECTORY_SLOT_FIELDS,
    DIRECTORY_SLOT_SIZE,
)
from vgpu.transport.testing import QemuClient
from vgpu.transport.vfio_user.registers import PAGE, SlotRegister, SlotState

BAR0, BAR1 = 0, 1
READY_SECONDS = 30.0


class DeviceMediator(Mediator):
    """A mediator whose VMs have devices: asks with parameters, and ends the devices it leaves."""

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One JSON-RPC question; the whole answer."""
        request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": parameters}
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(60)
            link.connect(str(self.run_dir / "admin.sock"))
            link.sendall(json.dumps(request).encode() + b"\n")
            data = b""
            while not data.endswith(b"\n"):
                more = link.recv(1 << 16)
                if not more:
                    raise ConnectionResetError("the mediator hung up")
                data += more
        answer: dict[str, Any] = json.loads(data)
        return answer

    def device(self, vm: str) -> dict[str, Any]:
        """The state of a VM's device."""
        (found,) = [state for state in self.ask("devices") if state["vm"] == vm]
        return dict(found)

    def worker_of_session(self, session: int) -> int:
        """The worker process of a living session, whose program may be in a VM: process numbers say nothing there."""
        (pid,) = [s["info"]["worker_pid"] for s in self.sessions() if s["info"]["session"] == session]
        return int(pid)

    def stop(self) -> None:
        """End mediator, workers and devices."""
        super().stop()
        for pid in self.device_processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)

    def device_processes(self) -> list[int]:
        """Device processes of this mediator and of its predecessors that live."""
        marker = str(self.run_dir).encode()
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
                if b"vgpu.transport.stub" in words and marker in words and is_alive(int(entry.name)):
                    found.append(int(entry.name))
        return found


class VirtualMachine:
    """A booted machine with the device: BAR0 by messages, BAR1 mapped."""

    def __init__(self, socket_path: Path) -> None:
        self.qemu = QemuClient.connect(socket_path)
        self.qemu.boot()
        self.memory = self.qemu.maps[BAR1]
        self.guests: list[VmGuest] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for guest in self.guests:
            guest.close()
        self.qemu.close()

    def head(self, name: str) -> int:
        """A field of the directory's head."""
        return self._load(DIRECTORY_OFFSET, DIRECTORY_FIELDS[name])

    def slot(self, number: int, name: str) -> int:
        """A field of a slot's entry."""
        entry = DIRECTORY_OFFSET + DIRECTORY_HEAD_SIZE + number * DIRECTORY_SLOT_SIZE
        return self._load(entry, DIRECTORY_SLOT_FIELDS[name])

    def state(self, number: int) -> SlotState:
        return SlotState(self.slot(number, "state"))

    def write_program(self, number: int, program: str) -> None:
        """What a claimant says of itself."""
        at = DIRECTORY_OFFSET + DIRECTORY_HEAD_SIZE + number * DIRECTORY_SLOT_SIZE + DIRECTORY_PROGRAM[0]
        self.memory[at : at + DIRECTORY_PROGRAM[1]] = program.encode().ljust(DIRECTORY_PROGRAM[1], b"\0")

    def _load(self, base: int, field: tuple[int, str]) -> int:
        return int(struct.unpack_from(f"<{field[1]}", self.memory, base + field[0])[0])


class VmGuest(Guest):
    """A guest process: what it claims, it has until ``release``."""

    fence_value = 0

    def __init__(self, vm: VirtualMachine, number: int, token: int, pid: int, program: str = "test") -> None:
        """Claim slot ``number`` and wait for its session.

        Raises:
            AssertionError: no session came of it.
        """
        self.claim(vm, number, token, pid, program)
        self.take()

    def claim(self, vm: VirtualMachine, number: int, token: int, pid: int, program: str) -> None:
        """Ask for the slot."""
        self.vm, self.number, self.token = vm, number, token
        self._page = (1 + number) * PAGE
        wait_until(lambda: vm.state(number) is SlotState.FREE, READY_SECONDS, f"slot {number} is free")
        vm.write_program(number, program)
        assert vm.qemu.write(BAR0, self._page + SlotRegister.OWNER, token | pid << 32, 8) == 0

    def take(self) -> None:
        """Wait for the session, and map it."""
        vm, number, token = self.vm, self.number, self.token
        wait_until(lambda: vm.state(number) is not SlotState.PENDING, READY_SECONDS, "the claim is answered")
        assert (vm.state(number), vm.slot(number, "token")) == (SlotState.READY, token)
        self.session = vm.slot(number, "session_id")
        self.worker_address = vm.slot(number, "worker_address")
        size = vm.head("slot_size")
        begin = vm.head("first_slot") + number * size
        self._look(memoryview(vm.memory)[begin : begin + size])
        vm.guests.append(self)

    def ring_bell(self) -> None:
        self.vm.qemu.write(BAR0, self._page + SlotRegister.DOORBELL, 1)

    def counted(self, value: int) -> int:
        """A round trip through the GPU: store ``value`` in device memory, and read it back."""
        address = self.ask(CallId.cuMemAlloc_v2, 4096).values[0]
        self.send(CallId.wireCopyInline, address, 8, 0, payload=struct.pack("<Q", value))
        reply = self.arena + 4096
        self.fence_value += 1
        self.send(CallId.wireCopyFromDevice, reply, address, 8, 0, 1, self.fence_value)
        wait_until(lambda: self.fence(1) >= self.fence_value, READY_SECONDS, "the copy has arrived")
        self.send(CallId.wireMemoryFree, address)
        return self.u64(reply)

    def release(self) -> None:
        """As a process that ends in order does."""
        assert self.vm.qemu.write(BAR0, self._page + SlotRegister.RELEASE, self.token) == 0

    def close(self) -> None:
        """Forget the mapping, as a process that is killed: nothing is released. May be called twice."""
        self._unlook()
