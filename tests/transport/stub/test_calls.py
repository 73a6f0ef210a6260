# SPDX-License-Identifier: Apache-2.0
"""Calls through registers: carried through a ring by the device process, for guests that cannot map BAR1."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.transport.stub.world import GEOMETRY, Guest, until, world
from vgpu.transport.layout import DEVICE_PAGE_SIZE
from vgpu.transport.ring import FIELDS
from vgpu.transport.stub.calls import carry_call
from vgpu.transport.vfio_user.device import MIN_BAR1, SharedMemory
from vgpu.transport.vfio_user.registers import CallState, SlotRegister
from vgpu.transport.wire import CALL_HEADER_SIZE, FLAG_REPLY, CallHeader, Result

# The fake worker of ``world`` scribbles over the first page and counts doorbells at 64 KiB.
RING, SIZE, SLOTS, COUNT = 1 << 17, 8192, 1 << 18, 4


class Replayer:
    """The worker's side of a ring, in a slot of a BAR1."""

    def __init__(self, bar1: int, slot: int = 0) -> None:
        self.map = mmap.mmap(bar1, GEOMETRY.slot_size, offset=GEOMETRY.slot_offset(slot))
        for name, value in (
            ("ring_offset", RING),
            ("ring_size", SIZE),
            ("slots_offset", SLOTS),
            ("slot_count", COUNT),
            ("state", 1),
        ):
            self.set(name, value)

    def set(self, name: str, value: int) -> None:
        offset, size = FIELDS[name]
        at = DEVICE_PAGE_SIZE + offset
        self.map[at : at + size] = value.to_bytes(size, "little")

    def get(self, name: str) -> int:
        offset, size = FIELDS[name]
        at = DEVICE_PAGE_SIZE + offset
        return int.from_bytes(self.map[at : at + size], "little")

    def take(self) -> tuple[CallHeader, bytes] | None:
        head = self.get("head")
        if head == self.get("tail"):
            return None
        at = RING + head % SIZE
        header = CallHeader.decode(self.map[at : at + CALL_HEADER_SIZE])
        payload = self.map[at + CALL_HEADER_SIZE : at + CALL_HEADER_SIZE + header.payload_length]
        self.set("head", head + header.record_size)
        return header, payload

    def answer(self, header: CallHeader, payload: bytes) -> None:
        at = SLOTS + header.slot * 4096
        self.map[at + 64 : at + 64 + len(payload)] = payload
        result = Result(header.sequence, 700, len(payload), (11, 12, 13, 14)).encode()
        self.map[at + 4 : at + 40] = result[4:]
        self.map[at : at + 4] = result[:4]


def submit(guest: Guest, header: CallHeader, payload: bytes = b"") -> None:
    raw = header.encode() + payload.ljust(-(-len(payload) // 8) * 8, b"\0")
    for at in range(0, len(raw), 8):
        register = SlotRegister.CALL_HEADER + at if at < 80 else 0x400 + at - 80
        guest.write(0, register, int.from_bytes(raw[at : at + 8], "little"), 8)
    guest.write(0, SlotRegister.CALL_SUBMIT, 77)


def result(guest: Guest) -> Result:
    raw = b"".join(
        guest.qemu.read_bytes(0, 0x1000 + SlotRegister.CALL_RESULT + at, 8) for at in range(0, 40, 8)
    )
    return Result.decode(raw)


def done(guest: Guest) -> Callable[[], bool]:
    return lambda: guest.read(0, SlotRegister.CALL_STATE) == CallState.DONE


async def test_calls_through_registers(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        guest, link = w.boot(), await w.link()
        worker = await w.own(guest, link, 0, 31)
        replayer = Replayer(link.bar1_fd)
        replayer.set("doorbell_wanted", 1)

        # With an answer, the worker asleep.
        header = CallHeader(300, (1, 2, 3), FLAG_REPLY, 3001, 9, 2)
        payload = bytes(range(256)) * 11 + bytes(185)
        submit(guest, header, payload)
        assert guest.read(0, SlotRegister.CALL_STATE) == CallState.BUSY
        await until(lambda: replayer.map[65536] == 1)
        assert replayer.get("doorbell_wanted") == 0
        taken = replayer.take()
        assert taken == (CallHeader(300, (1, 2, 3, 0, 0, 0, 0, 0), FLAG_REPLY, 3001, 9, 2), payload)
        assert guest.read(0, SlotRegister.CALL_STATE) == CallState.BUSY
        replayer.answer(taken[0], b"the answer" * 400)
        await until(done(guest))
        assert result(guest) == Result(9, 700, 4000, (11, 12, 13, 14)), "its length is told whole"
        assert guest.read(0, SlotRegister.CALL_RESULT_LENGTH) == 3072
        assert guest.qemu.read_bytes(0, 0x1400, 8) == b"the answ"

        # Without one: done as soon as it stands in the ring.
        submit(guest, CallHeader(301, sequence=10))
        await until(done(guest))
        assert result(guest) == Result(10)
        assert replayer.take() == (CallHeader(301, sequence=10), b"")

        # A slot that is not there, a header that is none, a ring that is none.
        submit(guest, CallHeader(302, (), FLAG_REPLY, 0, 11, COUNT))
        await until(done(guest))
        assert result(guest) == Result(11, 1)
        guest.write(0, SlotRegister.CALL_HEADER + 12, 0xFFFF0000)
        guest.write(0, SlotRegister.CALL_SUBMIT, 77)
        await until(done(guest))
        assert result(guest) == Result(11, 1)
        replayer.set("ring_size", 77)
        submit(guest, CallHeader(303, sequence=12))
        await until(done(guest))
        assert result(guest) == Result(12, 1)
        replayer.set("ring_size", SIZE)

        # The worker dies over it.
        replayer.set("sticky_error", 702)
        submit(guest, CallHeader(304, (), FLAG_REPLY, 0, 13))
        await until(lambda: replayer.take() is not None)
        assert guest.read(0, SlotRegister.CALL_STATE) == CallState.BUSY
        worker.process.kill()
        await until(done(guest))
        assert result(guest) == Result(13, 702)
        assert "Traceback" not in w.log_path.read_text()


async def test_a_release_forgets_the_call(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        guest, link = w.boot(), await w.link()
        await w.own(guest, link, 0, 31)
        replayer = Replayer(link.bar1_fd)
        submit(guest, CallHeader(300, (), FLAG_REPLY, 0, 9))
        await until(lambda: replayer.take() is not None)
        guest.release(0)
        await until(lambda: guest.state(0) == 0)
        assert guest.memory(0) == bytes(GEOMETRY.slot_size)
        assert guest.read(0, SlotRegister.CALL_STATE) == CallState.IDLE


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    with SharedMemory(MIN_BAR1) as one:
        yield one


async def carry(memory: SharedMemory, header: CallHeader, lives: Callable[[], bool] = lambda: True) -> Result:
    answer, payload = await carry_call(
        memory.descriptor,
        GEOMETRY.slot_offset(0),
        GEOMETRY.slot_size,
        header.encode(),
        b"",
        ring=lambda: None,
        lives=lives,
    )
    assert payload == b""
    return answer


async def test_a_call_without_an_answer_ends_after_a_minute(
    memory: SharedMemory, autojump_clock: trio.testing.MockClock
) -> None:
    Replayer(memory.descriptor)
    begin = trio.current_time()
    assert await carry(memory, CallHeader(5, (), FLAG_REPLY, 0, 7)) == Result(7, 909)
    assert trio.current_time() - begin == pytest.approx(60, abs=0.1)


async def test_a_call_waits_for_room(memory: SharedMemory, autojump_clock: trio.testing.MockClock) -> None:
    replayer = Replayer(memory.descriptor)
    replayer.set("tail", SIZE)

    async def make_room() -> None:
        await trio.sleep(3)
        replayer.set("head", SIZE)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(make_room)
        assert await carry(memory, CallHeader(5, sequence=7)) == Result(7)
    assert trio.current_time() >= 3
    assert replayer.take() == (CallHeader(5, sequence=7), b"")


async def test_a_call_to_a_slot_without_a_worker_is_answered(memory: SharedMemory) -> None:
    Replayer(memory.descriptor)
    assert await carry(memory, CallHeader(5, (), FLAG_REPLY, 0, 7), lives=lambda: False) == Result(7, 999)


async def test_a_call_cancelled_at_once_leaves_no_trace(memory: SharedMemory) -> None:
    replayer = Replayer(memory.descriptor)
    with trio.CancelScope() as scope:
        scope.cancel()
        await carry(memory, CallHeader(5, sequence=7))
    assert replayer.get("tail") == 0
