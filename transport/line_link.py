# SPDX-License-Identifier: Apache-2.0
"""A connection that speaks lines (``lines.py``) on trio: send one, receive one, hang up.

Both ends use it; whoever connects reads the other's hello first (``open_line_link``).
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Sequence

import attrs
import trio

from .errors import RemoteProtocolError
from .lines import ANCILLARY_SIZE, LINE_LIMIT, LineProtocol, Message, close_all, rights, take_rights


@attrs.define(eq=False)
class LineLink:
    """One connection. Owns the socket, and descriptors that came and were not handed out yet."""

    name: str  # of the peer, for messages of errors
    _socket: trio.socket.SocketType
    _protocol: LineProtocol = attrs.Factory(LineProtocol)
    _received: deque[tuple[Message, list[int]]] = attrs.Factory(deque)
    _sending: trio.Lock = attrs.Factory(trio.Lock)

    async def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send one line; the descriptors stay the caller's. Cancelled half-way, the link is of no further use.

        Raises:
            trio.BrokenResourceError: the peer is gone.
        """
        line = self._protocol.encode(message, len(descriptors))
        async with self._sending:
            try:
                sent = await self._socket.sendmsg([line], rights(descriptors))
                while sent < len(line):
                    sent += await self._socket.send(line[sent:])
            except OSError as error:
                raise trio.BrokenResourceError(f"{self.name}: {error}") from error

    async def receive(self) -> tuple[Message | None, list[int]]:
        """The peer's next line and the descriptors on it, now the caller's; (None, []) when it has gone.

        One task at a time. Cancellation loses nothing.

        Raises:
            RemoteProtocolError: the peer sent garbage.
        """
        while not self._received:
            got = await self._read()
            if got is None:
                return None, []
            self._received.extend(got)
        await trio.lowlevel.checkpoint()
        return self._received.popleft()

    async def _read(self) -> list[tuple[Message, list[int]]] | None:
        try:
            data, ancillary, flags, _ = await self._socket.recvmsg(
                LINE_LIMIT, ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            return None
        found = take_rights(ancillary)
        if not data:
            close_all(found)
            return None
        if flags & socket.MSG_CTRUNC:
            # The kernel has closed those that did not fit; without them no line means what it says.
            close_all(found)
            raise RemoteProtocolError(f"{self.name}: more descriptors than one message may carry")
        return self._protocol.receive_data(data, found)

    def close(self) -> None:
        """Hang up and close what was not handed out. May be called twice."""
        self._socket.close()
        self._protocol.close()
        while self._received:
            close_all(self._received.popleft()[1])


async def open_line_link(
    path: str | os.PathLike[str], descriptors: int
) -> tuple[LineLink, Message, list[int]]:
    """Connect, and read the peer's hello with that many descriptors, which are the caller's then.

    Raises:
        OSError: nobody listens there, or it hung up before its hello.
        RemoteProtocolError: what came first was no such hello.
    """
    link = LineLink(os.fspath(path), trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    try:
        await link._socket.connect(os.fspath(path))
        hello, given = await link.receive()
        if hello is None:
            raise ConnectionResetError(f"{link.name}: hung up before its hello")
        if hello.get("event") != "hello" or len(given) != descriptors:
            close_all(given)
            raise RemoteProtocolError(
                f"{link.name}: expected hello with {descriptors} descriptors,"
                f" got {hello.get('event')!r} with {len(given)}"
            )
    except BaseException:
        link.close()
        raise
    return link, hello, given
