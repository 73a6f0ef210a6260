# SPDX-License-Identifier: Apache-2.0
"""The control socket between mediator and worker: JSON objects, one per line, descriptors beside them.

docs/wire.md section 4 lists the objects. ``LineProtocol`` is the pure core: bytes and descriptors in,
messages out. ``WorkerLink`` is the mediator's end on trio; the worker's end (``gpu/worker.py``) uses the core
with plain sockets, because nothing may stand between it and a guest that has died.

A line that carries descriptors says how many (``"descriptors": 2``). Descriptors that arrive are owned by
the core until a message hands them out; ``close`` closes what was never asked for.
"""

from __future__ import annotations

import array
import json
import os
import socket
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import attrs
import trio

from vgpu.transport.errors import LocalProtocolError, RemoteProtocolError

# A line is a few hundred bytes; this bounds what a broken peer can make us keep.
LINE_LIMIT = 65536
DESCRIPTORS_PER_MESSAGE = 4

Message = dict[str, Any]


@attrs.define(eq=False)
class LineProtocol:
    """One direction-less end of the conversation. No socket, no waiting."""

    _buffer: bytearray = attrs.Factory(bytearray)
    _descriptors: deque[int] = attrs.Factory(deque)

    def encode(self, message: Message, descriptors: int = 0) -> bytes:
        """The line for a message that goes out together with that many descriptors.

        Raises:
            LocalProtocolError: too long, too many descriptors, or not JSON.
        """
        if descriptors > DESCRIPTORS_PER_MESSAGE:
            raise LocalProtocolError(
                f"{descriptors} descriptors on one line, at most {DESCRIPTORS_PER_MESSAGE}"
            )
        body = dict(message)
        if descriptors:
            body["descriptors"] = descriptors
        try:
            line = json.dumps(body, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise LocalProtocolError(f"not JSON: {error}") from error
        if len(line) > LINE_LIMIT:
            raise LocalProtocolError(f"line is {len(line)} bytes, limit {LINE_LIMIT}")
        return line

    def receive_data(self, data: bytes, descriptors: Iterable[int] = ()) -> list[tuple[Message, list[int]]]:
        """Take what one recvmsg returned; the messages completed by it, with the descriptors they own now.

        Raises:
            RemoteProtocolError: a line too long, not a JSON object, or short of descriptors. Everything
                still owned is closed; this end is of no further use.
        """
        self._descriptors.extend(descriptors)
        self._buffer += data
        messages: list[tuple[Message, list[int]]] = []
        try:
            while (end := self._buffer.find(b"\n")) >= 0:
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                messages.append(self._decode(line))
            if len(self._buffer) > LINE_LIMIT:
                raise RemoteProtocolError(
                    f"line has {len(self._buffer)} bytes and no end, limit {LINE_LIMIT}"
                )
            if len(self._descriptors) > DESCRIPTORS_PER_MESSAGE:
                raise RemoteProtocolError(f"{len(self._descriptors)} descriptors that no line mentions")
        except RemoteProtocolError:
            for _, owned in messages:
                _close_all(owned)
            self.close()
            raise
        return messages

    def _decode(self, line: bytes) -> tuple[Message, list[int]]:
        if len(line) >= LINE_LIMIT:
            raise RemoteProtocolError(f"line is {len(line)} bytes, limit {LINE_LIMIT}")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RemoteProtocolError(f"line is not JSON: {line[:40]!r}") from error
        if not isinstance(message, dict):
            raise RemoteProtocolError(f"line is not an object: {line[:40]!r}")
        count = message.pop("descriptors", 0)
        if type(count) is not int or not 0 <= count <= len(self._descriptors):
            raise RemoteProtocolError(f"line speaks of {count!r} descriptors, {len(self._descriptors)} came")
        return message, [self._descriptors.popleft() for _ in range(count)]

    def close(self) -> None:
        """Close the descriptors that no message took. May be called twice."""
        _close_all(self._descriptors)
        self._descriptors.clear()


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def rights(descriptors: Sequence[int]) -> list[tuple[int, int, bytes]]:
    """Ancillary data for sendmsg that passes the descriptors."""
    if not descriptors:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors).tobytes())]


def take_rights(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """Descriptors that a recvmsg brought; they are the caller's now."""
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


ANCILLARY_SIZE = socket.CMSG_SPACE(DESCRIPTORS_PER_MESSAGE * array.array("i").itemsize)


@attrs.define(eq=False)
class WorkerLink:
    """The mediator's connection to one worker. Owns the socket and the descriptors of the hello.

    ``segment_fd`` and ``grant_fd`` stay valid until ``aclose``; dup them to keep them longer.
    """

    hello: Message
    segment_fd: int
    grant_fd: int
    _socket: trio.socket.SocketType
    _protocol: LineProtocol
    _received: deque[tuple[Message, list[int]]] = attrs.Factory(deque)
    _sending: trio.Lock = attrs.Factory(trio.Lock)

    async def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send one line; the descriptors stay the caller's. Cancelled half-way, the link is of no further use.

        Raises:
            trio.BrokenResourceError: the worker is gone.
        """
        line = self._protocol.encode(message, len(descriptors))
        async with self._sending:
            try:
                sent = await self._socket.sendmsg([line], rights(descriptors))
                while sent < len(line):
                    sent += await self._socket.send(line[sent:])
            except OSError as error:
                raise trio.BrokenResourceError(f"worker {self.hello.get('worker')}: {error}") from error

    async def receive(self) -> tuple[Message | None, list[int]]:
        """The worker's next line and the descriptors on it, now the caller's; (None, []) when it has gone.

        One task at a time. Cancellation loses nothing.

        Raises:
            RemoteProtocolError: the worker sent garbage.
        """
        while not self._received:
            got = await _receive(self._socket, self._protocol)
            if got is None:
                return None, []
            self._received.extend(got)
        await trio.lowlevel.checkpoint()
        return self._received.popleft()

    async def aclose(self) -> None:
        """Close socket and descriptors. The worker goes on without us. May be called twice."""
        self._socket.close()
        self._protocol.close()
        while self._received:
            _close_all(self._received.popleft()[1])
        for descriptor in (self.segment_fd, self.grant_fd):
            if descriptor >= 0:
                os.close(descriptor)
        self.segment_fd = self.grant_fd = -1
        await trio.lowlevel.checkpoint()


async def _receive(
    connection: trio.socket.SocketType, protocol: LineProtocol
) -> list[tuple[Message, list[int]]] | None:
    try:
        data, ancillary, _, _ = await connection.recvmsg(LINE_LIMIT, ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC)
    except OSError:
        return None
    found = take_rights(ancillary)
    if not data:
        _close_all(found)
        return None
    return protocol.receive_data(data, found)


async def open_worker_link(socket_path: str) -> WorkerLink:
    """Connect to a worker and read its hello.

    Raises:
        OSError: nobody listens there, or it hung up before its hello.
        RemoteProtocolError: what came first was no hello with two descriptors.
    """
    connection = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    protocol = LineProtocol()
    received: deque[tuple[Message, list[int]]] = deque()
    try:
        await connection.connect(socket_path)
        while not received:
            got = await _receive(connection, protocol)
            if got is None:
                raise ConnectionResetError(f"{socket_path}: hung up before its hello")
            received.extend(got)
        hello, descriptors = received.popleft()
        if hello.get("event") != "hello" or len(descriptors) != 2:
            _close_all(descriptors)
            raise RemoteProtocolError(
                f"{socket_path}: expected hello with 2 descriptors, got {hello.get('event')!r} with {len(descriptors)}"
            )
    except BaseException:
        connection.close()
        protocol.close()
        for _, owned in received:
            _close_all(owned)
        raise
    return WorkerLink(hello, descriptors[0], descriptors[1], connection, protocol, received)
