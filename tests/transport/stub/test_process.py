# SPDX-License-Identifier: Apache-2.0
"""The device process as it really runs, between QEMU, a mediator and worker processes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path

import pytest
import trio

from tests.transport.stub.world import (
    GEOMETRY,
    PATTERN,
    SLOTS,
    Guest,
    World,
    heard,
    next_event,
    until,
    world,
)
from vgpu.transport._generated_calls import TABLE_HASH
from vgpu.transport.layout import DIRECTORY_MAGIC, SessionPage
from vgpu.transport.stub import messages as m
from vgpu.transport.stub.launch import DeviceLink, device_socket_path, vfio_socket_path
from vgpu.transport.vfio_user.device import MIN_BAR1
from vgpu.transport.vfio_user.pci import Variant
from vgpu.transport.vfio_user.registers import INTERFACE_VERSION, SlotRegister, SlotState

ZEROS = bytes(GEOMETRY.slot_size)


async def test_the_directory_says_what_the_registers_say(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        guest = w.boot()
        assert {
            name: guest.directory(name)
            for name in (
                *("magic", "layout_version", "interface_version", "table_hash", "bar1_size"),
                *("first_slot", "slot_size", "slot_count", "status", "driver_version"),
            )
        } == {
            "magic": DIRECTORY_MAGIC,
            "layout_version": 1,
            "interface_version": INTERFACE_VERSION,
            "table_hash": TABLE_HASH,
            "bar1_size": MIN_BAR1,
            "first_slot": GEOMETRY.first_slot,
            "slot_size": GEOMETRY.slot_size,
            "slot_count": SLOTS,
            "status": 0,
            "driver_version": 0,
        }
        # QEMU resets three times as it boots.
        assert guest.directory("generation") == guest.qemu.read(0, 0x40) == 3
        link = await w.link()
        assert link.described == m.Hello(
            vm="vm1",
            pid=w.process.pid if w.process else 0,
            bar1_size=MIN_BAR1,
            slot_count=SLOTS,
            first_slot=GEOMETRY.first_slot,
            slot_size=GEOMETRY.slot_size,
            variant=Variant.CONVENTIONAL,
            connected=True,
            slots=(),
            layout_version=1,
            table_hash=TABLE_HASH,
        )
        assert os.fstat(link.bar1_fd).st_size == MIN_BAR1
        await link.send(m.command_line(m.Status(True, True, 13000)))
        await until(lambda: guest.directory("status") == 3)
        assert (guest.directory("driver_version"), guest.qemu.read(0, 0x18)) == (13000, 13000)
        beat, began = guest.directory("host_heartbeat"), trio.current_time()
        await trio.sleep(0.6)
        assert guest.directory("host_heartbeat") - beat <= 4 * (trio.current_time() - began) + 2
        await until(lambda: guest.directory("host_heartbeat") > beat)
        await link.aclose()
        await until(lambda: guest.directory("status") == 2)


async def test_a_session_from_claim_to_clean_memory(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        guest, link = w.boot(), await w.link()
        before = guest.qemu.read(0, 0x1C)
        guest.claim(1, token=0xDEADBEEF, pid=4242, program=b"python3\0")
        assert guest.state(1) is SlotState.PENDING, "as soon as the store has returned"
        assert (guest.directory("token", 1), guest.directory("pid", 1)) == (0xDEADBEEF, 4242)
        claim = await heard(link, m.Claim)
        assert claim == m.Claim(1, 0xDEADBEEF, 4242, "python3")
        worker = await w.grant(link, claim, 31, "told")
        await until(lambda: guest.state(1) is SlotState.READY)
        assert guest.directory("session_id", 1) == 31
        assert guest.directory("worker_address", 1) == 0x2000_0000_0000
        assert await next_event(link) == m.Granted(1, 31)
        guest.write(1, SlotRegister.DOORBELL, 1)
        guest.write(1, SlotRegister.DOORBELL, 1)
        await until(lambda: guest.memory(1)[65536] == 2)
        for _ in range(2000):
            guest.write(1, SlotRegister.DOORBELL, 1)  # a worker that lags is no reason to wait
        blocks = os.fstat(link.bar1_fd).st_blocks

        guest.release(1, token=0xDEADBEEF)
        assert guest.state(1) is SlotState.RELEASING
        assert await next_event(link) == m.Released(1, 31, m.Ending.GUEST)
        assert worker.process.poll() is None
        assert guest.memory(1)[0] == PATTERN, "the worker writes to the last moment"
        guest.tell_to_leave(1)
        assert await next_event(link) == m.Freed(1)
        assert worker.process.wait(60) == 0
        assert guest.state(1) is SlotState.FREE
        assert os.fstat(link.bar1_fd).st_blocks < blocks, "the memory went back to the host"
        assert guest.memory(1) == ZEROS
        assert guest.directory("token", 1) == guest.directory("session_id", 1) == 0

        guest.claim(1, token=5)
        assert (await heard(link, m.Claim)).token == 5
        assert guest.memory(1) == ZEROS
        assert guest.qemu.read(0, 0x1C) == before, "nothing was refused"


async def test_a_session_costs_few_trapped_accesses_and_they_are_counted(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        guest, link = w.boot(), await w.link()
        await w.own(guest, link, 0, 31)
        guest.write(0, SlotRegister.STATE, 1)  # refused
        guest.write(0, SlotRegister.DOORBELL, 1)
        guest.release(0)
        counters: list[m.Event | None] = []
        with trio.fail_after(60):
            while m.Counters(0, 4, 1, 1, 1) not in counters:
                message, _ = await link.receive()
                assert message is not None
                counters.append(m.read_event(message))


async def test_a_lost_race_for_a_slot(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        guest, link = w.boot(), await w.link()
        guest.claim(0, token=1)
        guest.claim(0, token=2)
        assert guest.directory("token", 0) == 1
        assert (await heard(link, m.Claim)).token == 1
        guest.claim(1, token=2)
        assert await heard(link, m.Claim) == m.Claim(1, 2, 5, "")


async def test_a_refusal_reaches_the_guest(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        guest, link = w.boot(), await w.link()
        guest.claim(0)
        await heard(link, m.Claim)
        await link.send(m.command_line(m.Refuse(0, 77, 1, 40)))
        await until(lambda: guest.state(0) is SlotState.REFUSED)
        assert (guest.directory("refusal", 0), guest.directory("retry_milliseconds", 0)) == (1, 40)
        guest.release(0)
        assert await next_event(link) == m.Released(0, 0, m.Ending.GUEST)
        assert await next_event(link) == m.Freed(0)


async def test_sessions_outlive_the_mediator_and_the_next_one_adopts_them(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        guest, link = w.boot(), await w.link()
        worker = await w.own(guest, link, 0, 31)
        await link.aclose()
        guest.claim(1, token=9)
        guest.write(0, SlotRegister.DOORBELL, 1)
        await until(lambda: guest.memory(0)[65536] == 1)
        assert (guest.state(0), guest.state(1)) == (SlotState.READY, SlotState.PENDING)

        successor = await w.link()
        assert successor.described.slots == (
            m.SlotReport(0, SlotState.READY, 77, 5, 31),
            m.SlotReport(1, SlotState.PENDING, 9, 5, 0),
        )
        await w.grant(successor, await heard(successor, m.Claim), 32)
        assert await next_event(successor) == m.Granted(1, 32)

        third = await w.link()
        assert await next_event(successor) is None, "the newest mediator is the one that lives"
        guest.release(0)
        assert await next_event(third) == m.Released(0, 31, m.Ending.GUEST)
        assert await next_event(third) == m.Freed(0)
        assert worker.process.wait(60) == 0
        assert guest.state(1) is SlotState.READY


async def test_a_release_without_a_mediator(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        guest, link = w.boot(), await w.link()
        await w.own(guest, link, 0, 31)
        await link.aclose()
        guest.release(0)
        await until(lambda: guest.state(0) is SlotState.FREE)
        assert guest.memory(0) == ZEROS
        assert (await w.link()).described.slots == ()


async def everything_ended(link: DeviceLink, w: World) -> None:
    ends = [await next_event(link) for _ in range(4)]
    assert ends[:2] == [m.Released(0, 31, m.Ending.RESET), m.Released(1, 32, m.Ending.RESET)]
    assert {e.slot for e in ends[2:] if isinstance(e, m.Freed)} == {0, 1}
    assert [worker.process.wait(60) for worker in w.workers] == [0, 0]


async def test_a_reset_of_the_machine(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        guest, link = w.boot(), await w.link()
        for slot in range(2):
            await w.own(guest, link, slot, 31 + slot)
        generation = guest.directory("generation")
        guest.qemu.reboot()
        assert guest.directory("generation") == generation + 5
        await everything_ended(link, w)
        assert guest.memory(0) == guest.memory(1) == ZEROS


async def test_a_reset_of_the_function(tmp_path: Path) -> None:
    async with world(tmp_path, variant=Variant.EXPRESS) as w:
        guest, link = w.boot(), await w.link()
        for slot in range(2):
            await w.own(guest, link, slot, 31 + slot)
        guest.qemu.write(7, 0x68, 0xA910, 2)
        assert {guest.state(0), guest.state(1)} == {SlotState.RELEASING}
        await everything_ended(link, w)


async def test_a_qemu_that_is_killed_and_the_next_one(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        guest, link = w.boot(), await w.link()
        assert link.described.connected
        for slot in range(2):
            await w.own(guest, link, slot, 31 + slot)
        guest.qemu.close()
        ends = [await next_event(link) for _ in range(5)]
        assert ends[:3] == [
            m.Released(0, 31, m.Ending.RESET),
            m.Released(1, 32, m.Ending.RESET),
            m.Client(False),
        ]
        again = w.boot()
        assert await next_event(link) == m.Client(True)
        assert again.memory(0) == again.memory(1) == ZEROS
        await w.own(again, link, 0, 33)


async def test_two_vms_know_nothing_of_each_other(tmp_path: Path) -> None:
    async with world(tmp_path, "one") as one, world(tmp_path, "two") as two:
        first, second = one.boot(), two.boot()
        link = await one.link()
        other = await two.link()
        await one.own(first, link, 0, 31)
        assert second.state(0) is SlotState.FREE
        second.claim(0, token=77)
        assert (await heard(other, m.Claim)).slot == 0
        second.release(0)
        await other.send(m.command_line(m.Refuse(0, 77, 3)))
        await until(lambda: second.state(0) is SlotState.FREE)
        assert first.state(0) is SlotState.READY
        assert second.memory(0) == ZEROS
        assert first.memory(0)[0] == PATTERN


async def dead(guest: Guest, slot: int) -> int:
    await until(lambda: guest.state(slot) is SlotState.DEAD)
    assert guest.session("state", slot) == 3
    return guest.session("sticky_error", slot)


async def test_a_worker_that_dies_takes_its_session_along(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        guest, link = w.boot(), await w.link()
        worker = await w.own(guest, link, 0, 31)
        worker.process.kill()
        assert await dead(guest, 0) == 999
        guest.release(0)
        assert await next_event(link) == m.Released(0, 31, m.Ending.WORKER)
        assert await next_event(link) == m.Freed(0)


async def test_whoever_killed_the_worker_may_say_why(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        guest, link = w.boot(), await w.link()
        worker = await w.own(guest, link, 1, 31)
        page = SessionPage(link.bar1_fd, GEOMETRY.slot_offset(1))
        assert w.process is not None
        # The device gives them a twentieth of a second; on a busy machine this test may need more.
        w.process.send_signal(signal.SIGSTOP)
        worker.process.kill()
        page.set("sticky_error", 702)
        w.process.send_signal(signal.SIGCONT)
        page.close()
        assert await dead(guest, 1) == 702


async def test_a_grant_for_a_claim_that_has_gone(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        guest, link = w.boot(), await w.link()
        guest.claim(0)
        claim = await heard(link, m.Claim)
        guest.release(0)
        assert await next_event(link) == m.Released(0, 0, m.Ending.GUEST)
        worker = await w.grant(link, claim, 31)
        assert await next_event(link) == m.Withdrawn(0, 31)
        assert guest.state(0) is SlotState.RELEASING
        assert await next_event(link) == m.Freed(0)
        assert worker.process.wait(60) == 0
        assert guest.memory(0) == ZEROS


async def test_one_process_per_vm_and_a_dead_one_is_no_obstacle(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        assert w.process is not None
        await w.link()
        done = await trio.run_process(w.command(), capture_stderr=True, check=False)
        assert done.returncode == 3
        assert f"process {w.process.pid} is the device of this VM already" in done.stderr.decode()
        w.boot().qemu.close()
        w.process.kill()
        w.process.wait()
        assert device_socket_path(tmp_path, "vm1").exists(), "left behind"
        device_socket_path(tmp_path, "vm1").unlink()
        await w.start()
        w.boot()
        assert (await w.link()).described.pid == w.process.pid


@pytest.mark.parametrize("how", ["stop", "SIGTERM"])
async def test_it_leaves_when_told_to(tmp_path: Path, how: str) -> None:
    async with world(tmp_path) as w:
        assert w.process is not None
        guest, link = w.boot(), await w.link()
        worker = await w.own(guest, link, 0, 31)
        if how == "stop":
            await link.send(m.command_line(m.Stop()))
        else:
            w.process.send_signal(signal.SIGTERM)
        assert await trio.to_thread.run_sync(w.process.wait, 60) == 0
        assert worker.process.wait(60) == 0, "its lifeline ended with the device"
        assert not vfio_socket_path(tmp_path, "vm1").exists()
        assert list((tmp_path / "devices").iterdir()) == []
        assert "leaves: " in w.log_path.read_text()


async def test_it_stands_alone_and_its_sockets_are_this_users(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        assert w.process is not None
        assert os.getsid(w.process.pid) == w.process.pid != os.getsid(0)
        for path in (vfio_socket_path(tmp_path, "vm1"), device_socket_path(tmp_path, "vm1")):
            assert path.stat().st_mode & 0o777 == 0o600
            assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "words",
    [
        ["--vm", "../x"],
        ["--vm", ""],
        ["--vm", "a/b"],
        ["--vm", "x" * 64],
        ["--vm", "a", "--bar1-bytes", "12345678"],
        ["--vm", "a", "--slots", "0"],
        ["--vm", "a", "--slots", "128"],
        ["--vm", "a", "--variant", "agp"],
    ],
)
def test_options_that_cannot_be(tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from vgpu.transport.stub.__main__ import main

    with pytest.raises(SystemExit) as refused:
        main(["--run-dir", str(tmp_path), *words])
    assert refused.value.code == 2
    assert "error:" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def says_nothing_more(connection: socket.socket) -> bool:
    """Whether the device hung up, after whatever it had to say."""
    connection.settimeout(60)
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize(
    ("line", "lent"),
    [
        (b"what?\n", 0),
        (b"[]\n", 0),
        (b'{"do":7}\n', 0),
        (b'{"do":"refuse","slot":99,"token":1,"status":3}\n', 0),
        (b'{"do":"stop","descriptors":1}\n', 0),
        (b'{"do":"stop","descriptors":1}\n', 1),
        (b'{"do":"grant","slot":0,"token":1,"session":1,"worker_address":1,"worker_pid":1}\n', 2),
        (
            b'{"do":"grant","slot":0,"token":1,"session":1,"worker_address":1,"worker_pid":1,"descriptors":2}\n',
            2,
        ),
        (
            b'{"do":"grant","slot":99,"token":1,"session":1,"worker_address":1,"worker_pid":1,"descriptors":2}\n',
            2,
        ),
        (b"x" * 70000, 0),
        (b"x", 5),
    ],
)
async def test_garbage_ends_that_connection_and_nothing_else(shared: World, line: bytes, lent: int) -> None:
    """The last two grants come with descriptors of /dev/null, which is no lifeline and no process."""
    before = shared.descriptors()
    guest = Guest(shared.clients[0])
    null = os.open(os.devnull, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(device_socket_path(shared.run_dir, "vm1")))
        socket.send_fds(connection, [line[:60000]], [null] * lent)
        if lent < 5 and len(line) > 60000:
            with contextlib.suppress(OSError):  # it may have hung up already
                connection.sendall(line[60000:])
        if line.startswith(b'{"do":"grant"') and b"descriptors" not in line:
            connection.shutdown(socket.SHUT_WR)
        assert says_nothing_more(connection)
    os.close(null)
    assert guest.qemu.read_bytes(0, 0, 4) == b"VGPU"
    link = await shared.link()
    assert link.described.connected
    await link.aclose()
    await until(lambda: shared.descriptors() == before)
