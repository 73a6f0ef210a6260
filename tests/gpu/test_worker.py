# SPDX-License-Identifier: Apache-2.0
"""The worker as a process: warm start, assignment, adoption by a second mediator, and every way it ends."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

from tests.gpu.replay.guest import (
    CLOSED,
    CONTEXT,
    DEAD,
    DEFERRED,
    LOST,
    STATE,
    STICKY,
    Guest,
    build_fake_driver,
)
from vgpu.gpu.control import WorkerLink, open_worker_link
from vgpu.gpu.driver import NVML
from vgpu.gpu.process import WorkerNotStarted, WorkerOptions, WorkerProcess, start_worker
from vgpu.transport._generated_calls import CallId
from vgpu.transport.layout import GrantPage, SessionPage
from vgpu.transport.vfio_user.device import SharedMemory, cut_bar1

MIB = 1 << 20
GONE_SECONDS = 30.0


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_driver(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def options(tmp_path: Path, library: Path) -> WorkerOptions:
    return WorkerOptions(tmp_path, "nvidia", library=library, arena_bytes=8 * MIB, registered_bytes=2 * MIB)


@attrs.define(eq=False)
class Assigned:
    process: WorkerProcess
    path: str
    link: WorkerLink
    grant: GrantPage
    guest: Guest

    async def gone(self) -> int:
        with trio.fail_after(GONE_SECONDS):
            return await self.process.wait()


@attrs.frozen
class Slot:
    """A slot of a VM's BAR1."""

    bar1_fd: int
    offset: int
    size: int

    @property
    def words(self) -> dict[str, int]:
        return {"segment_offset": self.offset, "segment_size": self.size}


@pytest.fixture
def slot() -> Iterator[Slot]:
    """The second of eight in a BAR1 of 16 MiB."""
    geometry = cut_bar1(16 * MIB, 8)
    with SharedMemory(16 * MIB) as bar1:
        yield Slot(bar1.descriptor, geometry.first_slot + geometry.slot_size, geometry.slot_size)


@asynccontextmanager
async def assigned(
    options: WorkerOptions, *, leased: bool = True, slot: Slot | None = None
) -> AsyncIterator[Assigned]:
    """A worker with a guest, as the executor makes one."""
    process, path = await start_worker(options, "w1")
    link = await open_worker_link(path)
    ours, theirs = socket.socketpair()
    try:
        await link.send(
            {
                "do": "assign",
                "session": 9,
                "vm": "red",
                "memory_limit": 3 << 30,
                "weight": 7,
                **(slot.words if slot else {}),
            },
            [theirs.fileno(), *([slot.bar1_fd] if slot else [])],
        )
        theirs.close()
        assert (await link.receive())[0] == {"event": "assigned", "session": 9}
        grant = GrantPage(link.grant_fd)
        guest = Guest(slot.bar1_fd, ours, slot.offset, slot.size) if slot else Guest(link.segment_fd, ours)
        if leased:
            grant.grant(deadline_ns=0)
            await link.send({"do": "kick"})
        yield Assigned(process, path, link, grant, guest)
        guest.close()
        grant.close()
    finally:
        ours.close()
        process.kill()
        await link.aclose()
        await process.wait()


async def in_thread(guest: Guest, call: int, *arguments: int) -> int:
    result = await trio.to_thread.run_sync(lambda: guest.ask(call, *arguments))
    return result.status


async def test_hello_describes_a_warm_worker(options: WorkerOptions) -> None:
    with trio.fail_after(60):
        process, path = await start_worker(options, "w1")
        link = await open_worker_link(path)
        hello = link.hello
        assert (hello["worker"], hello["pid"], hello["state"]) == ("w1", process.pid, "warm")
        assert (hello["session"], hello["vm"]) == (None, None)
        assert hello["device"] == {
            "name": "Fake",
            "uuid": "GPU-abababab-abab-abab-abab-abababababab",
            "driver_version": 13000,
            "memory_bytes": 8 << 30,
            "gpu_fences": True,
        }
        assert hello["worker_address"] == 0x2000_0000_0000
        assert hello["segment_size"] == os.fstat(link.segment_fd).st_size
        with pytest.raises(OSError, match="not permitted"):
            os.ftruncate(link.segment_fd, 4096)  # sealed
        assert os.stat(path).st_mode & 0o777 == 0o600
        await link.send({"do": "stop"})
        assert await link.receive() == (None, [])
        assert await process.wait() == 0
        assert not Path(path).exists()
        await link.aclose()


async def test_it_asks_the_management_library_beside_the_driver(
    options: WorkerOptions, tmp_path: Path
) -> None:
    """Two small arrays share a unit of the driver's; who is not told that would charge each with one."""
    library = build_fake_driver(tmp_path, "fake_memory.c", "-DFAKE_UNITS")
    (library.parent / NVML).symlink_to(library)  # the fake is both
    async with assigned(attrs.evolve(options, library=library)) as worker:
        assert await in_thread(worker.guest, CallId.wirePrimaryRetain, CONTEXT, 0) == 0
        for _ in range(2):
            assert await in_thread(worker.guest, CallId.cuArray3DCreate_v2, 64, 64, 0, 1, 1, 0) == 0
        assert worker.grant.get("memory_used_bytes") == 2 * MIB


async def test_device_page(options: WorkerOptions) -> None:
    async with assigned(options) as worker:
        page = mmap.mmap(worker.link.segment_fd, 16384)
        assert page[16:20] == b"Fake"

        def word(at: int, size: int = 4) -> int:
            return int.from_bytes(page[at : at + size], "little", signed=True)

        assert (word(288), word(292), word(296), word(300)) == (0, 0x1A, 0, 0)
        assert word(304, 8) == 3 << 30  # the quota is what the guest sees as the card's memory
        assert word(316) == 66  # one entry for two multiprocessors
        gpc, index = page[320:386], page[576:642]
        assert list(gpc) == [i % 8 for i in range(66)]
        assert list(index) == [i // 8 for i in range(66)]
        assert (word(832), word(836)) == (0, -5)
        assert (word(840, 8), word(848, 8)) == (2 * MIB, 4 * MIB)
        valid, values = 936, 1096
        assert list(page[valid : valid + 4]) == [0, 1, 1, 1]
        assert word(values + 4 * 75) == 9
        assert page[valid + 125] == 1
        assert word(values + 4 * 125) == 0  # no inter-process events through a VM's border
        assert page[valid + 150] == 0
        page.close()


async def test_mmap_base_is_kept_away_from_where_guests_have_their_libraries(options: WorkerOptions) -> None:
    with trio.fail_after(60):
        process, _ = await start_worker(options, "w1")
        lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        libraries = [int(line.split("-")[0], 16) for line in lines if "libc.so.6" in line]
        assert libraries
        assert all(address < 0x7F00_0000_0000 for address in libraries)
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        soft = next(line for line in limits.splitlines() if line.startswith("Max stack")).split()[3]
        assert soft == str(8 * MIB)
        process.kill()
        await process.wait()


async def test_guest_calls_are_replayed(options: WorkerOptions) -> None:
    async with assigned(options) as worker:
        assert await in_thread(worker.guest, CallId.wirePrimaryRetain, CONTEXT) == 0
        assert await in_thread(worker.guest, CallId.cuCtxSetLimit, 2, 5) == 0
        assert worker.grant.get("records") == 2
        assert worker.grant.get("worker_pid") == worker.process.pid


@pytest.mark.parametrize("in_a_call", [False, True])
async def test_worker_leaves_when_its_guest_dies(options: WorkerOptions, in_a_call: bool) -> None:
    async with assigned(options) as worker:
        assert await in_thread(worker.guest, CallId.wirePrimaryRetain, CONTEXT) == 0
        if in_a_call:
            worker.guest.send(CallId.cuCtxSetLimit, 1000, 60_000)  # the driver call takes a minute
            while worker.grant.get("current_call") != CallId.cuCtxSetLimit:
                await trio.sleep(0.001)
        worker.guest.lifeline.close()
        assert await worker.gone() == 0
        assert not Path(worker.path).exists()
        assert not Path(worker.path).with_suffix(".log").exists()  # nothing was said, nothing is left
        assert (await worker.link.receive())[0] == {"event": "guest-gone"}


async def test_goodbye_ends_the_worker(options: WorkerOptions) -> None:
    async with assigned(options) as worker:
        worker.guest.send(CallId.wireGoodbye)
        assert await worker.gone() == 0


async def test_garbage_ends_the_worker_and_tells_the_guest(options: WorkerOptions) -> None:
    async with assigned(options) as worker:
        worker.guest.publish(24)
        assert await worker.gone() == 0
        assert (worker.guest.u32(STATE), worker.guest.u32(STICKY)) == (DEAD, 1)
        assert worker.grant.get("protocol_errors") == 1


async def test_session_survives_its_mediator_and_is_adopted(options: WorkerOptions) -> None:
    async with assigned(options) as worker:
        assert await in_thread(worker.guest, CallId.wirePrimaryRetain, CONTEXT) == 0
        await worker.link.aclose()  # the mediator dies
        assert await in_thread(worker.guest, CallId.cuCtxSetLimit, 2, 5) == 0
        with trio.fail_after(60):
            successor = await open_worker_link(worker.path)
        hello = successor.hello
        assert (hello["state"], hello["session"], hello["vm"], hello["weight"]) == ("assigned", 9, "red", 7)
        grant = GrantPage(successor.grant_fd)
        assert grant.get("records") == 2
        grant.revoke()
        await successor.send({"do": "kick"})
        with trio.fail_after(60):
            assert (await successor.receive())[0] == {"event": "idle", "epoch": 2}
            worker.guest.send(CallId.cuCtxSetLimit, 2, 6)
            assert (await successor.receive())[0] == {"event": "demand", "epoch": 2}
        # A third mediator learns of the wish that nobody granted.
        third = await open_worker_link(worker.path)
        with trio.fail_after(60):
            assert (await third.receive())[0] == {"event": "demand", "epoch": 2}
            assert await successor.receive() == (None, [])
        grant.grant(deadline_ns=0)
        await third.send({"do": "kick"})
        assert await in_thread(worker.guest, CallId.cuCtxGetLimit, 2) == 0
        assert worker.guest.u32(DEFERRED) == 0
        grant.close()
        await successor.aclose()
        await third.aclose()


async def test_fault_is_reported(options: WorkerOptions) -> None:
    async with assigned(options) as worker:
        assert await in_thread(worker.guest, CallId.wirePrimaryRetain, CONTEXT) == 0
        assert await in_thread(worker.guest, CallId.cuCtxSetLimit, 1002, 1) == 0
        await in_thread(worker.guest, CallId.cuStreamCopyAttributes, 0, 0)
        with trio.fail_after(60):
            event = (await worker.link.receive())[0]
        assert event is not None
        assert (event["event"], event["error"]) == ("fault", 700)
        assert worker.guest.u32(STICKY) == 700


async def test_termination_tells_the_guest(options: WorkerOptions) -> None:
    async with assigned(options) as worker:
        os.kill(worker.process.pid, signal.SIGTERM)
        assert await worker.gone() == 0
        assert (worker.guest.u32(STATE), worker.guest.u32(STICKY)) == (DEAD, 46)


async def test_second_assignment_is_refused(options: WorkerOptions) -> None:
    async with assigned(options) as worker:
        ours, theirs = socket.socketpair()
        await worker.link.send({"do": "assign", "session": 10, "vm": "blue"}, [theirs.fileno()])
        theirs.close()
        with trio.fail_after(60):
            assert await trio.to_thread.run_sync(lambda: ours.recv(1)) == b""  # closed, not kept
        ours.close()
        assert await in_thread(worker.guest, CallId.cuCtxGetLimit, 2) == 0


async def test_a_session_in_a_slot_is_adopted_with_it(options: WorkerOptions, slot: Slot) -> None:
    async with assigned(options, slot=slot) as worker:
        guest = worker.guest
        assert bytes(guest.map[16:20]) == b"Fake"
        assert guest.u64(304) == 3 << 30
        assert await in_thread(guest, CallId.wirePrimaryRetain, CONTEXT) == 0
        assert await in_thread(guest, CallId.cuCtxSetLimit, 2, 5) == 0
        assert worker.grant.get("records") == 2
        await worker.link.aclose()
        with trio.fail_after(60):
            successor = await open_worker_link(worker.path)
        hello = successor.hello
        assert (hello["state"], hello["session"], hello["worker_address"]) == (
            "assigned",
            9,
            0x2000_0000_0000,
        )
        assert (hello["segment_offset"], hello["segment_size"]) == (slot.offset, slot.size)
        assert os.fstat(successor.segment_fd).st_ino == os.fstat(slot.bar1_fd).st_ino
        page = SessionPage(successor.segment_fd, hello["segment_offset"])
        assert page.get("session_id") == 9
        page.close()
        maps = Path(f"/proc/{worker.process.pid}/maps").read_text()
        assert "vgpu-segment" not in maps  # what it had before is given back
        os.kill(worker.process.pid, signal.SIGTERM)
        assert await worker.gone() == 0
        assert (guest.u32(STATE), guest.u32(STICKY)) == (DEAD, 46)
        others = os.pread(slot.bar1_fd, slot.offset, 0) + os.pread(
            slot.bar1_fd, 16 * MIB, slot.offset + slot.size
        )
        assert not any(others)
        await successor.aclose()


async def test_lifeline_end_ends_a_worker_in_a_slot(options: WorkerOptions, slot: Slot) -> None:
    """The VM's device has gone: its guest is there still, and reads what became of the device."""
    async with assigned(options, slot=slot) as worker:
        assert await in_thread(worker.guest, CallId.wirePrimaryRetain, CONTEXT) == 0
        worker.guest.lifeline.close()
        assert await worker.gone() == 0
        assert (worker.guest.u32(STATE), worker.guest.u32(STICKY), worker.guest.u32(LOST)) == (DEAD, 46, 1)


async def test_goodbye_from_a_slot_loses_no_device(options: WorkerOptions, slot: Slot) -> None:
    async with assigned(options, slot=slot) as worker:
        worker.guest.send(CallId.wireGoodbye)
        assert await worker.gone() == 0
        assert (worker.guest.u32(STATE), worker.guest.u32(STICKY), worker.guest.u32(LOST)) == (CLOSED, 0, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"segment_offset": 4096},
        {"segment_size": 64 << 10},
        {"segment_offset": 16 * MIB},
        {"segment_size": 1 << 43},
        {"unsealed": True},
    ],
)
async def test_a_slot_that_cannot_be_ends_the_worker(
    options: WorkerOptions, slot: Slot, change: dict[str, int]
) -> None:
    """There is no way back to the segment it had; whoever assigned it sees it go, and nobody was told otherwise."""
    process, path = await start_worker(options, "w1")
    link = await open_worker_link(path)
    ours, theirs = socket.socketpair()
    unsealed = os.memfd_create("bar1", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 16 * MIB)
    bar1 = unsealed if change.pop("unsealed", False) else slot.bar1_fd
    with trio.fail_after(60):
        await link.send(
            {"do": "assign", "session": 9, "vm": "red", **slot.words, **change}, [theirs.fileno(), bar1]
        )
        theirs.close()
        assert await link.receive() == (None, [])
        assert await process.wait() == 0
        assert await trio.to_thread.run_sync(lambda: ours.recv(1)) == b""
    assert "not assigned: " in Path(path).with_suffix(".log").read_text()
    assert not any(os.pread(slot.bar1_fd, 16 * MIB, 0))
    ours.close()
    os.close(unsealed)
    await link.aclose()


@pytest.mark.parametrize(
    "words", [{"segment_offset": 65536}, {"segment_offset": "0", "segment_size": 1 << 20}]
)
async def test_half_a_slot_is_no_assignment(
    options: WorkerOptions, slot: Slot, words: dict[str, object]
) -> None:
    process, path = await start_worker(options, "w1")
    link = await open_worker_link(path)
    ours, theirs = socket.socketpair()
    with trio.fail_after(60):
        message = {"do": "assign", "session": 9, "vm": "red", **words}
        await link.send(message, [theirs.fileno(), slot.bar1_fd])
        theirs.close()
        assert await trio.to_thread.run_sync(lambda: ours.recv(1)) == b""  # closed, not kept
        await link.send({"do": "stop"})
        assert await link.receive() == (None, [])
        assert await process.wait() == 0
    ours.close()
    await link.aclose()


async def test_garbage_from_a_mediator_ends_its_connection_only(options: WorkerOptions) -> None:
    async with assigned(options) as worker:
        with trio.fail_after(60):
            rude = await trio.open_unix_socket(worker.path)
            await rude.send_all(b"garbage\n")
            while await rude.receive_some(65536):
                pass
            await rude.aclose()
        assert await in_thread(worker.guest, CallId.cuCtxGetLimit, 2) == 0


async def test_worker_that_cannot_start_says_why(options: WorkerOptions, tmp_path: Path) -> None:
    with trio.fail_after(60):
        with pytest.raises(WorkerNotStarted, match="is not a file"):
            await start_worker(attrs.evolve(options, library=tmp_path / "none"), "w1")
        with pytest.raises(WorkerNotStarted, match="cuDeviceGet: CUDA_ERROR_INVALID_DEVICE"):
            await start_worker(attrs.evolve(options, device=5), "w2")
        with pytest.raises(WorkerNotStarted, match="2 MiB"):
            await start_worker(attrs.evolve(options, arena_bytes=12345), "w3")


def command_lines() -> Iterator[list[bytes]]:
    """Of every process of the machine; many of them end while this looks."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_bytes().split(b"\0")


async def test_cancelled_start_leaves_no_process(options: WorkerOptions) -> None:
    name = f"w9-{os.getpid()}"  # nobody else's, whatever runs beside this
    with trio.move_on_after(0.05) as scope:
        await start_worker(options, name)
    assert scope.cancelled_caught
    assert not any(name.encode() in words for words in command_lines())
