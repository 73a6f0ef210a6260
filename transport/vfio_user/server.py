# SPDX-License-Identifier: Apache-2.0
"""The device on a unix socket: a thin trio adapter around ``machine.ServerMachine``.

QEMU's virtual processor stands still from the moment it asks until it is answered, and an answer that comes late
kills the link for good, so everything is answered before the next byte is read and nothing else is done here. What
follows for the host is handed to a callback that must return at once (put it into a channel).

One client at a time, one after the other for as long as the server lives: QEMU never reconnects, but a new QEMU does
connect, and device and BAR1 stay as they are between clients (a client that ends resets the device).
"""

from __future__ import annotations

import array
import logging
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, Protocol

import attrs
import trio

from vgpu.transport.errors import RemoteProtocolError

from .device import Device
from .machine import Event, Refused, RegionRead, RegionWrite, Reply, ResetAsked, ServerMachine
from .messages import MAX_DESCRIPTORS
from .registers import RegisterEvent

log = logging.getLogger(__name__)

_RECEIVE_BYTES: Final = 65536
_DESCRIPTOR_SPACE: Final = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
# A QEMU that is started again may connect before the end of its predecessor's connection has been read.
_PREDECESSOR_SECONDS: Final = 1.0


def _no_events(events: Sequence[RegisterEvent]) -> None:
    """For a device that nobody listens to."""


def _no_client(connected: bool) -> None:
    """For a device that does not mind who is there."""


class Witness(Protocol):
    """Somebody who is told how far each client has been served. Its methods return at once and do not raise."""

    def begins(self, descriptor: int) -> None:
        """A client is being served; the descriptor stays the server's."""

    def heard(self, data: bytes) -> None:
        """These bytes of one request have been read."""

    def answered(self) -> None:
        """Nothing that has been read waits for an answer."""

    def ends(self) -> None:
        """The client has gone by itself."""


class _NoWitness:
    """For a server whose clients can live with its sudden end."""

    def begins(self, descriptor: int) -> None: ...

    def heard(self, data: bytes) -> None: ...

    def answered(self) -> None: ...

    def ends(self) -> None: ...


@attrs.define
class DeviceServer:
    """Serves one device.

    ``on_events`` gets what the guest's accesses mean for the host, often nothing: after each write and reset, and before
    the guest is answered. ``on_client`` hears of a client that comes, and that has gone. Neither may wait or raise.
    """

    device: Device
    on_events: Callable[[Sequence[RegisterEvent]], None] = _no_events
    on_client: Callable[[bool], None] = _no_client
    witness: Witness = attrs.field(factory=_NoWitness)
    clients: int = attrs.field(default=0, init=False)
    refused_clients: int = attrs.field(default=0, init=False)
    protocol_errors: int = attrs.field(default=0, init=False)
    refusals: int = attrs.field(default=0, init=False)
    _idle: trio.Lock = attrs.field(factory=trio.Lock, init=False)

    async def serve(
        self,
        path: Path,
        group: int | None = None,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Listen at ``path`` and serve until cancelled; a socket file left there is replaced.

        This user may connect, and with ``group`` its members.

        Cancelling closes the connection and removes the file; the device keeps its state. QEMU then reads ones.

        Raises:
            OSError: the path cannot be bound.
        """
        path.unlink(missing_ok=True)
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
            await listener.bind(str(path))
            try:
                if group is None:
                    path.chmod(0o600)
                else:
                    os.chown(path, -1, group)
                    path.chmod(0o660)
                listener.listen(4)
                async with trio.open_nursery() as nursery:
                    task_status.started()
                    while True:
                        connection, _ = await listener.accept()
                        nursery.start_soon(self._admit, connection)
            finally:
                path.unlink(missing_ok=True)

    async def _admit(self, connection: trio.socket.SocketType) -> None:
        with connection:
            with trio.move_on_after(_PREDECESSOR_SECONDS):
                await self._idle.acquire()
            if self._idle.statistics().owner is not trio.lowlevel.current_task():
                self.refused_clients += 1
                log.warning("a second client was turned away")
                return
            try:
                await self.serve_connection(connection)
            finally:
                self._idle.release()

    async def serve_connection(self, connection: trio.socket.SocketType) -> None:
        """Speak with one client until it leaves or breaks the rules, then reset the device. Does not close.

        Cancelling leaves the device as it is.
        """
        self.clients += 1
        machine = ServerMachine(self.device.regions, self.device.irqs)
        self.on_client(True)
        self.witness.begins(connection.fileno())
        try:
            while await self._exchange(connection, machine):
                pass
        except RemoteProtocolError as error:
            self.protocol_errors += 1
            log.warning("the client broke the protocol: %s", error)
        except OSError as error:
            log.info("the client is gone: %s", error)
        finally:
            self.refusals += machine.refusals.total()
            machine.close()
        self.witness.ends()
        self.on_events(self.device.reset())
        self.on_client(False)

    async def _exchange(self, connection: trio.socket.SocketType, machine: ServerMachine) -> bool:
        """Read once, act, answer. False: the client closed."""
        data, descriptors = await _receive(connection, min(machine.bytes_wanted, _RECEIVE_BYTES))
        self.witness.heard(data)
        events = machine.receive_data(data, descriptors)
        self.act(machine, events)
        for reply in machine.data_to_send():
            await _send(connection, reply)
        if machine.is_between_messages:
            self.witness.answered()
        return bool(data)

    def act(self, machine: ServerMachine, events: Iterable[Event]) -> None:
        """Do to the device what the client asked, and put the answers into the machine."""
        for event in events:
            if isinstance(event, RegionRead):
                machine.answer_read(event, self.device.read(event.region, event.offset, event.count))
            elif isinstance(event, RegionWrite):
                follows = self.device.write(event.region, event.offset, event.data)
                machine.answer_write(event)
                self.on_events(follows)
            elif isinstance(event, ResetAsked):
                self.on_events(self.device.reset())
                machine.answer_reset(event)
            elif isinstance(event, Refused):
                log.debug("command %d refused with errno %d: %s", event.command, event.error, event.why)


async def _receive(connection: trio.socket.SocketType, count: int) -> tuple[bytes, list[int]]:
    """At most ``count`` bytes, and the descriptors that came with them, which the caller owns."""
    data, ancillary, flags, _ = await connection.recvmsg(count, _DESCRIPTOR_SPACE, socket.MSG_CMSG_CLOEXEC)
    received = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received.frombytes(content[: len(content) - len(content) % received.itemsize])
    if flags & socket.MSG_CTRUNC:
        # The kernel has closed those that did not fit; without them the message means nothing.
        for descriptor in received:
            os.close(descriptor)
        raise RemoteProtocolError(f"a message came with more than {MAX_DESCRIPTORS} descriptors")
    return data, list(received)


async def _send(connection: trio.socket.SocketType, reply: Reply) -> None:
    """All bytes; the descriptors go with the first, in the same call as the whole header."""
    rights = array.array("i", reply.descriptors)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
    sent = await connection.sendmsg([reply.data], ancillary)
    while sent < len(reply.data):
        sent += await connection.send(reply.data[sent:])
