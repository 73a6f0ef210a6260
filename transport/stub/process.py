# SPDX-License-Identifier: Apache-2.0
"""The device process on trio: the core between QEMU's socket, the mediator's socket, BAR1 and the clock.

What the core decides is done at once and in order (``_perform``), while QEMU waits for its answer: stores into the
directory, a byte on a lifeline. Whatever may take time runs beside it: lines to the mediator, giving memory back, calls
through registers. Nothing here waits for anybody before it answers QEMU.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import stat
import struct
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import attrs
import trio

from vgpu.transport.errors import RemoteProtocolError
from vgpu.transport.layout import DEVICE_PAGE_SIZE, SESSION_FIELDS, SessionPage
from vgpu.transport.line_link import LineLink
from vgpu.transport.lines import close_all
from vgpu.transport.vfio_user.device import GpuDevice
from vgpu.transport.vfio_user.registers import RegisterEvent
from vgpu.transport.vfio_user.server import DeviceServer

from . import effects as do
from .calls import UNKNOWN, carry_call
from .core import Core
from .directory import Directory
from .keeper import Keeper
from .messages import DESCRIPTORS, Event, Grant, event_line, read_command

log = logging.getLogger(__name__)

BEAT_SECONDS: Final = 0.25
# Lines that a mediator has not read. One that is so far behind is as good as gone.
OUTBOX_LINES: Final = 1024
SESSION_DEAD: Final = 3


@attrs.frozen
class SharedPeek:
    """What the core reads of shared memory and of the device."""

    device: GpuDevice
    directory: Directory

    def program(self, slot: int) -> bytes:
        """As the claimant wrote it."""
        return self.directory.program(slot)

    def heartbeat(self, slot: int) -> int:
        """As the guest wrote it."""
        at = (
            self.device.registers.geometry.slot_offset(slot)
            + DEVICE_PAGE_SIZE
            + SESSION_FIELDS["heartbeat"][0]
        )
        return int.from_bytes(self.device.memory.read(at, 8), "little")

    def accesses(self) -> tuple[int, int]:
        """Trapped reads and writes."""
        return self.device.trapped_reads, self.device.trapped_writes


@attrs.define(eq=False)
class _Mediator:
    """The connection to the mediator: whose it is, and what it has not been sent yet."""

    link: LineLink
    scope: trio.CancelScope
    outbox: trio.MemorySendChannel[Event]


@attrs.define(eq=False)
class DeviceProcess:
    """One device, from start to leave. Borrows memory, registers and directory."""

    core: Core
    device: GpuDevice
    directory: Directory
    keeper: Keeper | None = None
    server: DeviceServer = attrs.field(init=False)
    _nursery: trio.Nursery = attrs.field(init=False)
    _mediator: _Mediator | None = attrs.field(default=None, init=False)
    _calls: dict[int, trio.CancelScope] = attrs.field(factory=dict, init=False)
    _planned: float = attrs.field(default=0.0, init=False)  # when the clock looks next
    _sooner: trio.Event = attrs.field(factory=trio.Event, init=False)

    def __attrs_post_init__(self) -> None:
        self.server = DeviceServer(self.device, self._guest_did, self._client)
        if self.keeper is not None:
            self.server.witness = self.keeper

    async def run(self, vfio_socket: Path, device_socket: Path, group: int | None = None) -> None:
        """Serve until told to leave, by the mediator, by SIGTERM, or because nobody needs the device any more.

        QEMUs of this user may connect, and with ``group`` those of its members. The device's socket appears last. Both are removed at the end; workers are left to notice the end of
        their lifelines, which end with the process.

        Raises:
            OSError: a socket cannot be made.
        """
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._perform(self.core.start())
                await nursery.start(self.server.serve, vfio_socket, group)
                nursery.start_soon(self._run_clock)
                nursery.start_soon(self._leave_on, signals)
                with _listen(device_socket) as listener:
                    try:
                        log.info("serves %s and %s", vfio_socket, device_socket)
                        await self._admit_mediators(listener)
                    finally:
                        device_socket.unlink(missing_ok=True)

    async def _leave_on(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            self._leave(signal.Signals(number).name)

    def _leave(self, why: str) -> None:
        log.info("leaves: %s", why)
        self._nursery.cancel_scope.cancel()

    # ---- what comes in -----------------------------------------------------------------------------------------

    def _guest_did(self, events: Sequence[RegisterEvent]) -> None:
        self._perform(self.core.guest_did(events, trio.current_time()))

    def _client(self, connected: bool) -> None:
        log.info("a QEMU %s", "came" if connected else "went")
        self._perform(self.core.client(connected, trio.current_time()))

    async def _run_clock(self) -> None:
        beat = trio.current_time()
        while True:
            now = trio.current_time()
            if now >= beat:
                self.directory.beat()
                beat = now + BEAT_SECONDS
            self._perform(self.core.tick(now))
            self._planned = min(beat, self.core.next_deadline())
            self._sooner = trio.Event()
            with trio.move_on_at(self._planned):
                await self._sooner.wait()

    async def _admit_mediators(self, listener: trio.socket.SocketType) -> None:
        while True:
            connection, _ = await listener.accept()
            if _is_ours(connection):
                self._nursery.start_soon(self._serve_mediator, connection)
            else:
                log.warning("somebody else's process wanted to be the mediator")
                connection.close()

    async def _serve_mediator(self, connection: trio.socket.SocketType) -> None:
        link = LineLink("the mediator", connection)
        send, receive = trio.open_memory_channel[Event](OUTBOX_LINES)
        mediator = _Mediator(link, trio.CancelScope(), send)
        if self._mediator is not None:
            self._mediator.scope.cancel()
        self._mediator = mediator
        self._perform(self.core.mediator_connected(trio.current_time()))
        try:
            with mediator.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._speak, link, receive)
                    await self._listen_to(link)
                    nursery.cancel_scope.cancel()
        finally:
            link.close()
            if self._mediator is mediator:
                self._mediator = None
                self._perform(self.core.mediator_gone(trio.current_time()))

    async def _speak(self, link: LineLink, outbox: trio.MemoryReceiveChannel[Event]) -> None:
        async for event in outbox:
            lent = [self.device.memory.descriptor] * DESCRIPTORS.get(type(event), 0)
            try:
                await link.send(event_line(event), lent)
            except trio.BrokenResourceError:
                return  # whoever listens to it notices too

    async def _listen_to(self, link: LineLink) -> None:
        """Obey until the mediator hangs up or says what cannot be understood."""
        while True:
            try:
                message, descriptors = await link.receive()
                if message is None:
                    return
                try:
                    command = read_command(message, len(descriptors))
                    if command is None:
                        log.info("the mediator said what this device does not know: %s", str(message)[:80])
                        close_all(descriptors)
                        continue
                    if isinstance(command, Grant):
                        _check_worker(*descriptors)
                    self._perform(self.core.command(command, tuple(descriptors), trio.current_time()))
                except RemoteProtocolError:
                    close_all(descriptors)
                    raise
            except RemoteProtocolError as error:
                log.warning("hung up on the mediator: %s", error)
                return

    # ---- what goes out -----------------------------------------------------------------------------------------

    def _perform(self, effects: Iterable[do.Effect]) -> None:
        for effect in effects:
            self._do(effect)
        if self.core.next_deadline() < self._planned:
            self._sooner.set()

    def _do(self, effect: do.Effect) -> None:
        match effect:
            case do.Say(event):
                self._say(event)
            case do.WriteHead():
                self.directory.write_head(effect)
            case do.WriteSlot(slot, view):
                self.directory.write_slot(slot, view)
            case do.RingDoorbell(lifeline):
                _ring(lifeline)
            case do.EndLifeline(lifeline):
                _end(lifeline)
            case do.CloseDescriptors(descriptors):
                close_all(descriptors)
            case do.WatchWorker(slot, process):
                self._nursery.start_soon(self._watch, slot, process)
            case do.KillWorker(slot, process):
                log.warning("slot %d: its worker did not leave and nobody ended it: killed", slot)
                _kill(process)
            case do.MarkDead(slot):
                self._mark_dead(slot)
            case do.ZeroSlot(slot):
                self._nursery.start_soon(self._zero, slot)
            case do.StartCall(slot, header, payload):
                self._calls[slot] = trio.CancelScope()
                self._nursery.start_soon(self._call, slot, header, payload, self._calls[slot])
            case do.CancelCall(slot):
                if slot in self._calls:
                    self._calls[slot].cancel()
            case do.Leave(why):
                self._leave(why)

    def _say(self, event: Event) -> None:
        if self._mediator is None:
            return
        try:
            self._mediator.outbox.send_nowait(event)
        except trio.WouldBlock:
            log.warning("hung up on a mediator that has not read %d lines", OUTBOX_LINES)
            self._mediator.scope.cancel()
        except trio.BrokenResourceError:
            pass  # it has gone, and its task is about to say so

    def _mark_dead(self, slot: int) -> None:
        log.info("slot %d: its worker ended", slot)
        page = SessionPage(self.device.memory.descriptor, self.device.registers.geometry.slot_offset(slot))
        try:
            if not page.get("sticky_error"):
                page.set("sticky_error", UNKNOWN)
            page.set("state", SESSION_DEAD)
        finally:
            page.close()

    async def _watch(self, slot: int, process: int) -> None:
        await trio.lowlevel.wait_readable(process)
        self._perform(self.core.worker_gone(slot, process, trio.current_time()))

    async def _zero(self, slot: int) -> None:
        geometry = self.device.registers.geometry
        discard = partial(self.device.memory.discard, geometry.slot_offset(slot), geometry.slot_size)
        try:
            await trio.to_thread.run_sync(discard, abandon_on_cancel=True)
        except OSError as error:
            # Better one slot less than one with somebody's memory in it.
            log.error("slot %d stays closed: %s", slot, error)
            return
        self._perform(self.core.zeroed(slot))

    async def _call(self, slot: int, header: bytes, payload: bytes, scope: trio.CancelScope) -> None:
        geometry = self.device.registers.geometry
        with scope:
            result, data = await carry_call(
                self.device.memory.descriptor,
                geometry.slot_offset(slot),
                geometry.slot_size,
                header,
                payload,
                ring=lambda: self._perform(self.core.ring(slot)),
                lives=lambda: self.core.is_ready(slot),
            )
            # No wait since the answer, so the call is still this one.
            del self._calls[slot]
            self.device.registers.complete_call(slot, result.encode(), data)


def make_process(
    vm: str, device: GpuDevice, directory: Directory, keeper: Keeper | None = None
) -> DeviceProcess:
    """Put the pieces together; call it within trio, whose clock the core begins with."""
    core = Core(
        vm,
        os.getpid(),
        device.configuration.variant,
        device.registers,
        SharedPeek(device, directory),
        trio.current_time(),
    )
    return DeviceProcess(core, device, directory, keeper)


def _listen(path: Path) -> trio.socket.SocketType:
    """A listening socket that appears under its name when it listens, for this user only."""
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.unlink(missing_ok=True)
    plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        plain.bind(str(unfinished))
        unfinished.chmod(0o600)
        plain.listen(4)
        unfinished.rename(path)
    except BaseException:
        plain.close()
        raise
    return trio.socket.from_stdlib_socket(plain)


def _is_ours(connection: trio.socket.SocketType) -> bool:
    size = struct.calcsize("iII")
    _, uid, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return uid in (0, os.getuid())


def _check_worker(lifeline: int, process: int) -> None:
    """Raises RemoteProtocolError if these cannot be a lifeline and the pidfd of a process that we may end."""
    if not stat.S_ISSOCK(os.fstat(lifeline).st_mode):
        raise RemoteProtocolError("a grant came with a lifeline that is no socket")
    try:
        signal.pidfd_send_signal(process, 0)
    except ProcessLookupError:
        pass  # it has ended already, which the watch will find
    except OSError as error:
        raise RemoteProtocolError(f"a grant came with no pidfd of a worker: {error}") from error


def _ring(lifeline: int) -> None:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=lifeline)
    try:
        line.send(b"\1", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError:
        pass  # full: it has been rung; broken: the worker is gone, which is noticed elsewhere
    finally:
        line.detach()


def _end(lifeline: int) -> None:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=lifeline)
    try:
        line.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the worker is gone
    finally:
        line.detach()


def _kill(process: int) -> None:
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
    except OSError as error:
        log.info("it ended by itself: %s", error)
