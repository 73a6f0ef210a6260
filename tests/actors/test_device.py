# SPDX-License-Identifier: Apache-2.0
"""The device actor against a device made of a socket: claims, refusals, hang-ups, and who gets descriptors."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from vgpu.actors import Actor, ActorSpec, ActorSystem, Reply, StartChild, handles, open_system
from vgpu.actors.device import AGAIN_SECONDS, Device, NoDevice
from vgpu.actors.device_start import DeviceNotStarted, OpenedDevice
from vgpu.actors.fault_messages import GetQuarantine
from vgpu.actors.messages import (
    Attach,
    AttachDevice,
    Attachment,
    AwaitDevice,
    DetachDevice,
    DriverVersion,
    EndDevice,
    GetVm,
    GuestLeft,
    SessionId,
    SessionRequest,
    ShowDevice,
    VmRecord,
)
from vgpu.actors.start_bucket import StartRate
from vgpu.actors.testing import Probe, open_probe
from vgpu.transport._generated_calls import TABLE_HASH
from vgpu.transport.attach import LAYOUT_VERSION, Status
from vgpu.transport.line_link import LineLink
from vgpu.transport.lines import Message
from vgpu.transport.stub.launch import open_device_link
from vgpu.transport.stub.messages import (
    Claim,
    Client,
    Ending,
    Event,
    Hello,
    Released,
    SlotReport,
    event_line,
)
from vgpu.transport.vfio_user.device import SharedMemory, cut_bar1
from vgpu.transport.vfio_user.pci import Variant
from vgpu.transport.vfio_user.registers import SlotState

MIB = 1 << 20
GEOMETRY = cut_bar1(16 * MIB, 4)
VM = VmRecord("red", bar1_bytes=16 * MIB, slots=4, memory_limit_bytes=5)
HELLO = Hello(
    "red",
    os.getpid(),
    GEOMETRY.bar1_size,
    GEOMETRY.slot_count,
    GEOMETRY.first_slot,
    GEOMETRY.slot_size,
    Variant.CONVENTIONAL,
    False,
    (),
    LAYOUT_VERSION,
    TABLE_HASH,
)
CLAIM = Claim(2, 77, 123, "ollama")


class Ledger(Actor):
    """Knows one VM, or none."""

    vm: VmRecord | None = VM

    @handles(GetVm)
    def get(self, message: GetVm) -> VmRecord | None:
        return self.vm

    @handles(GetQuarantine)
    def quarantine(self, message: GetQuarantine) -> None:
        """No VM here is quarantined."""


@attrs.define(eq=False)
class FakeExecutor(Actor):
    """Hands out what the test gives it, when the test says so."""

    outbox: Any
    ended: list[str]

    @handles(Attach)
    def attach(self, message: Attach) -> None:
        self.outbox.send_nowait(self.take_reply())

    @handles(GuestLeft)
    def left(self, message: GuestLeft) -> None:
        self.ended.append("guest left")

    async def stopped(self, reason: object) -> None:
        self.ended.append("stopped")


@attrs.define(eq=False)
class Executors(Actor):
    """The supervisor of one GPU's executors, as far as the device asks it."""

    system: list[ActorSystem]
    asked: list[SessionRequest]
    outbox: Any
    ended: list[str]

    @handles(StartChild)
    async def start(self, message: StartChild) -> object:
        (request,) = message.args
        assert isinstance(request, SessionRequest)
        self.asked.append(request)
        name = f"executor-{len(self.asked)}"
        return await self.system[0].spawn(ActorSpec(name, lambda: FakeExecutor(self.outbox, self.ended)))


@attrs.define(eq=False)
class FakeDevice:
    """The device process: listens, and says what the test tells it."""

    path: Path
    bar1: SharedMemory
    hello: Hello = HELLO
    link: LineLink | None = None
    said: list[tuple[Message, list[int]]] = attrs.Factory(list)
    is_broken: bool = False
    opened: int = 0
    stopped: list[str] = attrs.Factory(list)
    _server: trio.socket.SocketType | None = None

    async def open(self, vm: VmRecord) -> OpenedDevice:
        """As the starter: connects the actor to this device."""
        self.opened += 1
        if self.is_broken:
            raise DeviceNotStarted("it does not start")
        self.path.unlink(missing_ok=True)
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            await server.bind(str(self.path))
            server.listen(1)
            result: list[OpenedDevice] = []

            async def connect() -> None:
                result.append(OpenedDevice(await open_device_link(self.path)))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(connect)
                peer, _ = await server.accept()
                self.hang_up()
                self.link = LineLink("mediator", peer)
                await self.link.send(event_line(self.hello), [self.bar1.descriptor])
        return result[0]

    async def stop(self, vm: str) -> bool:
        self.stopped.append(vm)
        return self.hello.connected

    async def say(self, event: Event) -> None:
        assert self.link is not None
        await self.link.send(event_line(event))

    async def hear(self) -> tuple[Message, list[int]]:
        """The next line that is no status."""
        assert self.link is not None
        with trio.fail_after(60):
            while True:
                message, descriptors = await self.link.receive()
                assert message is not None, "the actor hung up"
                if message["do"] != "status":
                    return message, descriptors

    async def status(self) -> Message:
        assert self.link is not None
        with trio.fail_after(60):
            message, _ = await self.link.receive()
        assert message is not None
        assert message["do"] == "status"
        return message

    def hang_up(self) -> None:
        if self.link is not None:
            self.link.close()


@attrs.define(eq=False)
class World:
    """The actor under test and all it talks to."""

    system: ActorSystem
    device: FakeDevice
    ledger: Ledger
    telemetry: Probe
    pool: Probe
    asked: list[SessionRequest]
    attaching: trio.MemoryReceiveChannel[Reply[Attachment]]
    ended: list[str]

    @property
    def actor(self) -> Any:
        return self.system.ref("red")

    async def until_attached(self) -> int:
        """The descriptor that telemetry was lent."""
        message = await self.telemetry.expect(AttachDevice)
        assert message.vm == "red"
        return message.bar1_fd


@asynccontextmanager
async def world(
    tmp_path: Path, hello: Hello = HELLO, *, vm: VmRecord | None = VM, starts: StartRate | None = None
) -> AsyncIterator[World]:
    with SharedMemory(16 * MIB) as bar1:
        device = FakeDevice(tmp_path / "device.sock", bar1, hello)
        ledger = Ledger()
        ledger.vm = vm
        outgoing, incoming = trio.open_memory_channel[Reply[Attachment]](10)
        holder: list[ActorSystem] = []
        asked: list[SessionRequest] = []
        ended: list[str] = []
        async with AsyncExitStack() as stack:
            spec = ActorSpec("mediator/ledger", lambda: ledger)
            system = await stack.enter_async_context(open_system(spec))
            holder.append(system)
            telemetry = await stack.enter_async_context(open_probe(system, "mediator/telemetry"))
            pool = await stack.enter_async_context(open_probe(system, "gpu/workers"))
            await system.spawn(ActorSpec("gpu/executors", lambda: Executors(holder, asked, outgoing, ended)))
            await system.spawn(
                ActorSpec("red", lambda: Device(device, ("gpu/executors",), "red", starts or StartRate()))
            )
            it = World(system, device, ledger, telemetry, pool, asked, incoming, ended)
            if vm is not None:
                os.close(await it.until_attached())
            try:
                yield it
            finally:
                device.hang_up()


def attachment() -> tuple[Attachment, socket.socket]:
    """A session's descriptors, and the worker's end of its lifeline."""
    ours, theirs = socket.socketpair()
    pidfd = os.pidfd_open(os.getpid())
    return Attachment(
        SessionId(9), -1, ours.detach(), GEOMETRY.slot_size, 0x2000_0000_0000, 55, pidfd
    ), theirs


def is_over(lifeline: socket.socket) -> bool:
    lifeline.settimeout(60)
    return lifeline.recv(1) == b""


async def test_a_claim_is_granted(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await it.device.say(CLAIM)
        reply = await it.attaching.receive()
        (request,) = it.asked
        assert (request.vm, request.guest_pid, request.program) == (VM, 123, "ollama")
        assert request.slot is not None
        assert (request.slot.slot, request.slot.size) == (2, GEOMETRY.slot_size)
        assert request.slot.offset == GEOMETRY.first_slot + 2 * GEOMETRY.slot_size
        copy = request.slot.bar1.copy()
        assert os.fstat(copy).st_ino == os.fstat(it.device.bar1.descriptor).st_ino
        os.close(copy)
        given, worker_end = attachment()
        reply.answer(given)
        message, (lifeline, pidfd) = await it.device.hear()
        assert message == {
            "do": "grant", "slot": 2, "token": 77, "session": 9,
            "worker_address": 0x2000_0000_0000, "worker_pid": 55,
        }  # fmt: skip
        os.close(pidfd)
        os.close(lifeline)
        # The actor has kept no end of it: with the device's, it has ended.
        assert await trio.to_thread.run_sync(is_over, worker_end)
        state = await it.actor.ask(ShowDevice())
        assert (state.running, state.claimed, state.slots) == (True, 1, 4)
        await it.device.say(Released(2, 9, Ending.GUEST))
        while "guest left" not in it.ended:
            await trio.sleep(0.01)
        worker_end.close()


async def test_no_session_to_be_had(tmp_path: Path) -> None:
    """Refused when the executor, and with it whatever worker it had, is gone; not before."""
    async with world(tmp_path) as it:
        await it.device.say(CLAIM)
        reply = await it.attaching.receive()
        assert it.ended == []
        reply.refuse(NoDevice("no worker"))
        message, _ = await it.device.hear()
        assert it.ended == ["stopped"]
        assert message == {"do": "refuse", "slot": 2, "token": 77, "status": 1, "retry_milliseconds": 200}


@pytest.mark.parametrize(
    ("hello", "claim", "status"),
    [
        (attrs.evolve(HELLO, table_hash=1), CLAIM, Status.VERSION_MISMATCH),
        (attrs.evolve(HELLO, layout_version=0), CLAIM, Status.VERSION_MISMATCH),
        (HELLO, attrs.evolve(CLAIM, slot=4), Status.REFUSED),
    ],
)
async def test_claims_that_are_refused(tmp_path: Path, hello: Hello, claim: Claim, status: Status) -> None:
    async with world(tmp_path, hello) as it:
        await it.device.say(claim)
        message, _ = await it.device.hear()
        assert (message["do"], message["status"], message["retry_milliseconds"]) == ("refuse", status, 0)
        assert it.asked == []


async def test_a_vm_that_claims_faster_than_it_may(tmp_path: Path) -> None:
    """Nobody else hears of what is too much: no executor is started, and the claim may come again."""
    async with world(tmp_path, starts=StartRate(0.001, 2)) as it:
        for slot in (1, 2, 3):
            await it.device.say(attrs.evolve(CLAIM, slot=slot))
        message, _ = await it.device.hear()
        assert message == {
            "do": "refuse",
            "slot": 3,
            "token": 77,
            "status": Status.BUSY,
            "retry_milliseconds": 200,
        }
        for _ in range(2):
            (await it.attaching.receive()).refuse(NoDevice("no worker"))
            await it.device.hear()
        assert sorted(request.slot.slot for request in it.asked if request.slot) == [1, 2]


async def test_a_vm_that_is_not_registered_any_more(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.ledger.vm = None
        await it.device.say(CLAIM)
        message, _ = await it.device.hear()
        assert (message["do"], message["status"]) == ("refuse", Status.REFUSED)


async def test_claims_of_one_slot_wait_for_each_other(tmp_path: Path) -> None:
    """A claim that comes again after a hang-up must not find the worker of the first in its slot."""
    async with world(tmp_path) as it:
        await it.device.say(CLAIM)
        first = await it.attaching.receive()
        it.device.hang_up()
        while it.device.opened < 2:
            await trio.sleep(0.01)
        assert isinstance(await it.telemetry.receive(), DetachDevice)
        os.close(await it.until_attached())
        await it.device.say(CLAIM)
        await it.device.say(attrs.evolve(CLAIM, slot=3))
        other = await it.attaching.receive()  # another slot does not wait
        assert [request.slot.slot for request in it.asked if request.slot] == [2, 3]
        given, worker_end = attachment()
        first.answer(given)  # for a connection that is gone
        assert await trio.to_thread.run_sync(is_over, worker_end)
        second = await it.attaching.receive()
        assert it.ended == ["stopped"]
        assert [request.slot.slot for request in it.asked if request.slot] == [2, 3, 2]
        for reply in (other, second):
            given, end = attachment()
            reply.answer(given)
            message, descriptors = await it.device.hear()
            assert message["do"] == "grant"
            for descriptor in descriptors:
                os.close(descriptor)
            end.close()
        worker_end.close()


async def test_the_end_of_the_actor_ends_what_was_not_granted(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await it.device.say(CLAIM)
        await it.attaching.receive()
        it.actor.kill()
        await it.actor.wait_exit()
        assert it.ended == ["stopped"]


async def test_guests_are_told_the_driver_as_soon_as_it_is_known(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        request, reply = await it.pool.receive_request()
        assert isinstance(request, DriverVersion)
        reply.answer(13000)
        expected = {"do": "status", "present": True, "quarantined": False, "driver_version": 13000}
        assert await it.device.status() == expected


async def test_a_mediator_that_starts_anew_says_at_once_what_the_device_knows(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.device.bar1.write(16384 + 60, (12090).to_bytes(4, "little"))
        before = it.device.link
        it.device.hang_up()
        with trio.fail_after(60):
            while it.device.link is before:  # it is opened a while before there is a new one
                await trio.sleep(0.01)
        assert (await it.device.status())["driver_version"] == 12090


async def test_a_device_that_does_not_start_is_tried_again(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.device.is_broken = True
        it.device.hang_up()
        while it.device.opened < 3:
            await trio.sleep(0.01)
        state = await it.actor.ask(ShowDevice())
        assert (state.running, state.trouble) == (False, "it does not start")
        began = trio.current_time()
        it.device.is_broken = False
        while not (await it.actor.ask(ShowDevice())).running:
            await trio.sleep(0.01)
        assert trio.current_time() - began > AGAIN_SECONDS / 2


async def test_whoever_waits_for_a_device_hears_why_there_is_none(tmp_path: Path) -> None:
    async with world(tmp_path, vm=None) as it:
        state = await it.actor.ask(AwaitDevice())
        assert (state.running, state.trouble) == (False, "VM 'red' is not registered with a device")
        assert it.device.opened == 0


async def test_a_hello_of_living_slots_is_no_claim(tmp_path: Path) -> None:
    reports = (SlotReport(0, SlotState.READY, 1, 10, 5), SlotReport(1, SlotState.DEAD, 2, 11, 6))
    async with world(tmp_path, attrs.evolve(HELLO, slots=reports, connected=True)) as it:
        state = await it.actor.ask(AwaitDevice())
        assert (state.claimed, state.connected) == (2, True)
        assert it.asked == []
        await it.device.say(Client(False))
        while (await it.actor.ask(ShowDevice())).connected:
            await trio.sleep(0.01)


async def test_a_new_telemetry_is_lent_the_bar1_too(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.telemetry.ref.stop()
        await it.telemetry.ref.wait_exit()
        async with open_probe(it.system, "mediator/telemetry") as successor:
            os.close((await successor.expect(AttachDevice)).bar1_fd)
            await successor.expect_nothing()


async def test_an_unregistered_device_is_let_go_of_before_it_is_ended(tmp_path: Path) -> None:
    async with world(tmp_path, attrs.evolve(HELLO, connected=True)) as it:
        assert await it.actor.ask(EndDevice()) is True
        assert it.device.stopped == ["red"]
        assert isinstance(await it.telemetry.receive(), DetachDevice)
        await trio.sleep(2 * AGAIN_SECONDS)
        assert it.device.opened == 1


async def test_garbage_is_a_hang_up(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        assert it.device.link is not None
        await it.device.link.send({"event": "claim", "slot": -1})
        while it.device.opened < 2:
            await trio.sleep(0.01)
        assert isinstance(await it.telemetry.receive(), DetachDevice)
        os.close(await it.until_attached())
