# SPDX-License-Identifier: Apache-2.0
"""One connection actor per VM: takes its guest processes in and gets each a session.

A guest's socket lives in a task of this actor. Its end says that the guest process is gone; the worker
sees the same on the session's lifeline, so a connection actor that dies takes no session with it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
from collections.abc import Mapping

import attrs
import trio

from vgpu.gpu.control import rights
from vgpu.transport.attach import FLAG_DEVICE_PAGE, FLAG_PROBE, Hello, Status, Welcome

from . import Actor, ActorError, Ref, StartChild, handles
from .executor import Quarantined, TooManySessions
from .fault_messages import GetQuarantine
from .messages import Attach, Attachment, DriverVersion, EnsureVm, GuestLeft, OpenPage, SessionRequest
from .page_lease import PageLease
from .placement import choose_gpu, pool_of
from .start_bucket import StartBucket, StartRate

_log = logging.getLogger("vgpu.connection")

# What a guest is told to wait before it asks again when no session could be had.
RETRY_MILLISECONDS = 200
START_SECONDS = 60.0
PAGE_SECONDS = 10.0


@attrs.frozen
class GuestArrived:
    """From the listener: a guest process with a valid HELLO. This actor owns the socket from now on."""

    hello: Hello
    stream: trio.SocketStream
    pid: int
    uid: int


def send_with_descriptors(sock: socket.socket, data: bytes, descriptors: list[int]) -> None:
    """One message with descriptors attached. The socket must have room; small messages always do."""
    sent = sock.sendmsg([data], rights(descriptors))
    if sent != len(data):
        raise OSError(f"{sent} of {len(data)} bytes sent with descriptors")


@attrs.define(eq=False)
class Connection(Actor):
    """Guests of one VM. Sessions are children of the executors supervisor, not of this actor."""

    vm: str
    executors: tuple[str, ...]  # supervisors, one for each GPU
    starts: StartRate = attrs.field(factory=StartRate)
    _bucket: StartBucket = attrs.field(init=False)
    _serial: int = 0

    def __attrs_post_init__(self) -> None:
        self._bucket = StartBucket(self.starts)

    @property
    def subject(self) -> Mapping[str, object]:
        """The VM."""
        return {"vm": self.vm}

    @handles(GuestArrived)
    def arrived(self, message: GuestArrived) -> None:
        self.nursery.start_soon(self._serve, message)

    async def _serve(self, guest: GuestArrived) -> None:
        async with guest.stream:
            try:
                if guest.hello.flags & FLAG_PROBE:
                    await self._answer_probe(guest)
                    return
                if guest.hello.flags & FLAG_DEVICE_PAGE:
                    await self._lend_page(guest)
                    return
                executor = await self._welcome(guest)
                if executor is None:
                    return
                with contextlib.suppress(trio.BrokenResourceError):
                    # Nothing is expected on this socket any more; bytes that come are dropped, the end matters.
                    while await guest.stream.receive_some(4096):
                        pass
                executor.notify(GuestLeft())
            except (OSError, trio.BrokenResourceError) as error:
                _log.info("guest pid %d of %s went away while attaching: %s", guest.pid, self.vm, error)

    async def _answer_probe(self, guest: GuestArrived) -> None:
        pool = self.find(pool_of(self.executors[0]))
        try:
            version = await pool.ask(DriverVersion(), timeout_seconds=START_SECONDS)
        except ActorError as error:
            _log.warning("no worker can say what driver this is: %s", error)
            await guest.stream.send_all(Welcome(Status.NO_DEVICE).encode())
            return
        await guest.stream.send_all(Welcome(Status.WELCOME, driver_version=version).encode())

    async def _lend_page(self, guest: GuestArrived) -> None:
        try:
            lease = await self.find("mediator/telemetry").ask(OpenPage(self.vm), timeout_seconds=PAGE_SECONDS)
        except ActorError as error:
            _log.warning("no device page for pid %d of %s: %s", guest.pid, self.vm, error)
            await guest.stream.send_all(Welcome(Status.NO_DEVICE).encode())
            return
        try:
            self._send_page(guest, lease)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end_with, lease, nursery.cancel_scope)
                with contextlib.suppress(trio.BrokenResourceError):
                    while await guest.stream.receive_some(4096):
                        pass
                nursery.cancel_scope.cancel()
        finally:
            lease.release()

    @staticmethod
    async def _end_with(lease: PageLease, scope: trio.CancelScope) -> None:
        """A page that nobody writes any more looks alive; a connection that ends has its reader ask for another."""
        await lease.ended.wait()
        scope.cancel()

    @staticmethod
    def _send_page(guest: GuestArrived, lease: PageLease) -> None:
        welcome = Welcome(Status.WELCOME, driver_version=lease.driver_version)
        with socket.socket(fileno=os.dup(guest.stream.socket.fileno())) as raw:
            send_with_descriptors(raw, welcome.encode(), [lease.descriptor])

    async def _welcome(self, guest: GuestArrived) -> Ref[object] | None:
        while True:
            wait = self._bucket.take(trio.current_time())
            if wait:
                # Before anything is asked of anybody: this is what keeps a loop of programs from the ledger and the workers.
                _log.debug("pid %d of %s waits: it starts too many sessions", guest.pid, self.vm)
                milliseconds = max(RETRY_MILLISECONDS, math.ceil(wait * 1000))
                await guest.stream.send_all(Welcome(Status.BUSY, milliseconds).encode())
                if not await self._another_hello(guest):
                    return None
                continue
            try:
                record = await self.find("mediator/ledger").ask(GetQuarantine(self.vm))
                if record is not None:
                    raise Quarantined(f"it is quarantined: {record.reason}")
                vm = await self.find("mediator/ledger").ask(EnsureVm(self.vm))
                request = SessionRequest(vm, guest.pid, guest.hello.program)
                supervisor = self.find(await choose_gpu(self, self.executors))
                executor = await supervisor.ask(StartChild((request,)), timeout_seconds=START_SECONDS)
                attachment = await executor.ask(Attach(), timeout_seconds=START_SECONDS)
            except (TooManySessions, Quarantined) as error:
                _log.warning("no session for pid %d of %s: %s", guest.pid, self.vm, error)
                await guest.stream.send_all(Welcome(Status.REFUSED).encode())
                return None
            except ActorError as error:
                _log.warning("no session for pid %d of %s: %s", guest.pid, self.vm, error)
                await guest.stream.send_all(Welcome(Status.BUSY, RETRY_MILLISECONDS).encode())
                # The guest repeats its HELLO on this connection; its content was checked once already.
                if not await self._another_hello(guest):
                    return None
                continue
            self._send_attachment(guest, attachment)
            return executor

    async def _another_hello(self, guest: GuestArrived) -> bool:
        wanted = len(guest.hello.encode())
        while wanted:
            got = await guest.stream.receive_some(wanted)
            if not got:
                return False
            wanted -= len(got)
        return True

    def _send_attachment(self, guest: GuestArrived, attachment: Attachment) -> None:
        welcome = Welcome(
            Status.WELCOME,
            session_id=attachment.session,
            segment_size=attachment.segment_size,
            worker_address=attachment.worker_address,
        )
        with contextlib.ExitStack() as owned:
            owned.callback(attachment.close)
            raw = socket.socket(fileno=os.dup(guest.stream.socket.fileno()))
            owned.callback(raw.close)
            send_with_descriptors(raw, welcome.encode(), [attachment.segment_fd, attachment.lifeline_fd])
