# SPDX-License-Identifier: Apache-2.0
"""A VM without a VM: QEMU's part is played by a client that speaks its protocol, and the program in the VM is a thread of ours.

``VirtualMachine`` boots with a VM's device and maps its BAR1. A program in it claims a slot through BAR0 and speaks with its
worker through the slot (docs/registers.md, docs/wire.md section 5); what it stores in device memory it reads back and checks.
"""

from __future__ import annotations

import struct
import threading
import time
from pathlib import Path
from typing import Self

from _raw_guest import RawGuest, SessionDead
from _support import NotSo, wait_until

from vgpu.transport.attach import Status
from vgpu.transport.layout import (
    DIRECTORY_FIELDS,
    DIRECTORY_HEAD_SIZE,
    DIRECTORY_OFFSET,
    DIRECTORY_SLOT_FIELDS,
    DIRECTORY_SLOT_SIZE,
)
from vgpu.transport.testing import QemuClient
from vgpu.transport.vfio_user.registers import PAGE, SlotRegister, SlotState
from vgpu.transport.wire import CallHeader, CallId

BAR0, BAR1 = 0, 1
HEADER_SIZE = 80
PID = 77  # of the program, as its VM numbers it
NUMBER_BYTES = 8
FENCE = 1
CLAIM_SECONDS = TURN_SECONDS = 60.0
NAP_SECONDS = 0.002


class VirtualMachine:
    """A booted machine: BAR0 by messages, by one thread at a time, and BAR1 mapped."""

    def __init__(self, socket_path: Path) -> None:
        self._qemu = QemuClient.connect(socket_path)
        self._lock = threading.Lock()
        self._qemu.boot()
        self.memory = self._qemu.maps[BAR1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._qemu.close()

    def write(self, slot: int, register: SlotRegister, value: int, count: int = 4) -> None:
        """Store to a register of a slot."""
        with self._lock:
            error = self._qemu.write(BAR0, (1 + slot) * PAGE + register, value, count)
        if error:
            raise NotSo(f"slot {slot}: {register.name} is refused, errno {error}")

    def head(self, name: str) -> int:
        """A field of the directory's head."""
        return self._load(DIRECTORY_OFFSET, DIRECTORY_FIELDS[name])

    def slot(self, number: int, name: str) -> int:
        """A field of a slot's entry in it."""
        entry = DIRECTORY_OFFSET + DIRECTORY_HEAD_SIZE + number * DIRECTORY_SLOT_SIZE
        return self._load(entry, DIRECTORY_SLOT_FIELDS[name])

    def _load(self, base: int, field: tuple[int, str]) -> int:
        return int(struct.unpack_from(f"<{field[1]}", self.memory, base + field[0])[0])


class SlotGuest(RawGuest):
    """A program's session in a slot. Closing it releases the slot."""

    def __init__(self, vm: VirtualMachine, number: int, token: int) -> None:
        """Claim the slot.

        Raises:
            NotSo: no session came of it.
        """
        self.vm, self.number, self.token = vm, number, token
        deadline = time.monotonic() + CLAIM_SECONDS
        while not self._claim():
            refusal = Status(vm.slot(number, "refusal"))
            if refusal is not Status.BUSY or time.monotonic() > deadline:
                raise NotSo(f"the claim of slot {number} was refused: {refusal.name}")
            pause = vm.slot(number, "retry_milliseconds") / 1000
            vm.write(number, SlotRegister.RELEASE, token)
            time.sleep(pause)
        self.session = vm.slot(number, "session_id")
        size = vm.head("slot_size")
        begin = vm.head("first_slot") + number * size
        self.look(memoryview(vm.memory)[begin : begin + size])
        self.retain()
        self.address = self.allocate(4096)
        self.turns = 0

    def _claim(self) -> bool:
        """Ask for the slot once, as its owner; is there a session?"""

        def state() -> int:
            return self.vm.slot(self.number, "state")

        wait_until(lambda: state() == SlotState.FREE, f"slot {self.number} is free")
        self.vm.write(self.number, SlotRegister.OWNER, self.token | PID << 32, 8)
        wait_until(lambda: state() not in (SlotState.FREE, SlotState.PENDING), "the claim is answered")
        return (state(), self.vm.slot(self.number, "token")) == (SlotState.READY, self.token)

    def __exit__(self, *_: object) -> None:
        self.unlook()
        self.vm.write(self.number, SlotRegister.RELEASE, self.token)

    def ring_bell(self) -> None:
        self.vm.write(self.number, SlotRegister.DOORBELL, 1)

    def put(self, record: bytes) -> int:
        to_end = self.ring_size - self.tail % self.ring_size
        if to_end != len(record) and to_end < len(record) + HEADER_SIZE:
            pad = CallHeader(CallId.wirePad, payload_length=to_end - HEADER_SIZE)
            super().put(pad.encode() + bytes(to_end - HEADER_SIZE))
        return super().put(record)

    def turn(self) -> bool:
        """Store a number in device memory and read it back; is it the same?

        Raises:
            SessionDead: the host ended the session instead.
            NotSo: it did not come back.
        """
        self.turns += 1
        number = struct.pack("<Q", self.turns * 0x9E3779B97F4A7C15 % (1 << 64))
        reply = self.arena + 4096
        self.put(self.record(CallId.wireCopyInline, self.address, NUMBER_BYTES, 0, payload=number))
        copy = (reply, self.address, NUMBER_BYTES, 0, FENCE, self.turns)
        self.put(self.record(CallId.wireCopyFromDevice, *copy))
        self.publish()
        deadline = time.monotonic() + TURN_SECONDS
        while self.u64(self.fences + 8 * FENCE) < self.turns:
            if self.is_dead:
                raise SessionDead(self.sticky)
            if time.monotonic() > deadline:
                raise NotSo(f"number {self.turns} did not come back")
            time.sleep(NAP_SECONDS)  # a thread that spins would take the mediator's processor
        return bytes(self.bytes[reply : reply + NUMBER_BYTES]) == number


class VmProgram:
    """A program in the VM that goes on while the block runs; nothing of it may be lost."""

    def __init__(self, guest: SlotGuest) -> None:
        self.guest = guest
        self.turns = self.wrong = 0
        self.failure = ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.is_set():
            try:
                self.wrong += not self.guest.turn()
            except (SessionDead, NotSo, OSError) as error:
                self.failure = str(error)
                return
            self.turns += 1

    def goes_on(self, turns: int = 3) -> None:
        """Wait until it has done a few more turns.

        Raises:
            NotSo: it does not.
        """
        wanted = self.turns + turns
        wait_until(
            lambda: bool(self.turns >= wanted or self.failure), "the program in the VM goes on", TURN_SECONDS
        )
        if self.failure:
            raise NotSo(f"the program in the VM: {self.failure}")
