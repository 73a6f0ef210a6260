# SPDX-License-Identifier: Apache-2.0
"""A guest program that has nothing but BAR0: ``registers.py call`` computes through it, ``registers.py garbage N`` abuses it.

call       claims a slot, makes a context, asks for its memory, and releases the slot: one JSON object
garbage N  N accesses of every width to every place, values from everywhere: one JSON object
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import random
import struct
import sys
import time
from pathlib import Path
from typing import Any

from vgpu.transport._generated_calls import CallId
from vgpu.transport.vfio_user.registers import PAGE, CallState, DeviceRegister, SlotRegister, SlotState
from vgpu.transport.wire import FLAG_REPLY, CallHeader, Result

WIDTHS: dict[int, Any] = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}
CONTEXT = 1 << 42 | 1 << 28 | 1 << 4  # a handle as guests choose them: kind context, generation 1, index 1
WAIT_SECONDS = 60


class Bar0:
    """The device's registers, each access one load or store of its width."""

    def __init__(self) -> None:
        devices = Path("/sys/bus/pci/devices")
        (folder,) = (path for path in devices.iterdir() if (path / "device").read_text().strip() == "0x2331")
        self.descriptor = os.open(folder / "resource0", os.O_RDWR | os.O_SYNC | os.O_CLOEXEC)
        self.size = os.fstat(self.descriptor).st_size
        self._memory = mmap.mmap(self.descriptor, self.size)

    def read(self, offset: int, width: int = 4) -> int:
        return int(WIDTHS[width].from_buffer(self._memory, offset).value)

    def write(self, offset: int, value: int, width: int = 4) -> None:
        WIDTHS[width].from_buffer(self._memory, offset).value = value

    def lock(self, slot: int) -> None:
        """Say that the slot's owner lives, until this process does not."""
        fcntl.fcntl(
            self.descriptor, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, slot + 1, 1, 0)
        )


def wait_for(bar: Bar0, offset: int, value: int) -> int:
    """Read until it is so, or time is up; what was read last."""
    deadline = time.monotonic() + WAIT_SECONDS
    while (found := bar.read(offset)) != value and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def make_call(bar: Bar0, page: int, token: int, call: CallId, sequence: int, *arguments: int) -> Result:
    header = CallHeader(call, arguments, FLAG_REPLY, 0, sequence).encode()
    for at in range(0, len(header), 8):
        bar.write(page + SlotRegister.CALL_HEADER + at, int.from_bytes(header[at : at + 8], "little"), 8)
    bar.write(page + SlotRegister.CALL_SUBMIT, token)
    assert wait_for(bar, page + SlotRegister.CALL_STATE, CallState.DONE) == CallState.DONE
    words = (bar.read(page + SlotRegister.CALL_RESULT + at, 8) for at in range(0, 40, 8))
    return Result.decode(b"".join(word.to_bytes(8, "little") for word in words))


def compute() -> None:
    bar = Bar0()
    slot = bar.read(DeviceRegister.FREE_SLOT)
    page, token = PAGE * (1 + slot), random.randrange(1, 1 << 32)
    bar.lock(slot)
    bar.write(page + SlotRegister.OWNER, token | os.getpid() << 32, 8)
    assert bar.read(page + SlotRegister.OWNER, 8) & 0xFFFFFFFF == token
    state = wait_for(bar, page + SlotRegister.STATE, SlotState.READY)
    retained = make_call(bar, page, token, CallId.wirePrimaryRetain, 1, CONTEXT, 0)
    memory = make_call(bar, page, token, CallId.cuMemGetInfo_v2, 2)
    refused = make_call(bar, page, token, CallId.cuMemAlloc_v2, 3, 0)
    bar.write(page + SlotRegister.RELEASE, token)
    released = wait_for(bar, page + SlotRegister.STATE, SlotState.FREE) == SlotState.FREE
    print(
        json.dumps(
            {
                "state": SlotState(state).name,
                "statuses": [retained.status, memory.status, refused.status],
                "sequences": [retained.sequence, memory.sequence, refused.sequence],
                "memory": memory.values[:2],
                "released": released,
            }
        )
    )


def abuse(count: int) -> None:
    bar, chance = Bar0(), random.Random(20)
    named = [int(register) for register in SlotRegister] + [int(register) for register in DeviceRegister]
    interesting = (0, 1, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1)
    for _ in range(count):
        width = chance.choice((1, 2, 4, 8))
        offset = chance.choice(named) + PAGE * chance.randrange(bar.size // PAGE)
        if chance.random() < 0.5:
            offset = chance.randrange(bar.size - 8)
        offset = min(offset, bar.size - 8)
        value = chance.choice(interesting) if chance.random() < 0.5 else chance.getrandbits(64)
        if chance.random() < 0.3:
            bar.read(offset, width)
        else:
            bar.write(offset, value & (1 << 8 * width) - 1, width)
    print(json.dumps({"accesses": count, "magic": bar.read(0)}))


if sys.argv[1] == "call":
    compute()
else:
    abuse(int(sys.argv[2]))
