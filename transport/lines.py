# SPDX-License-Identifier: Apache-2.0
"""JSON objects, one per line, descriptors beside them: how the processes of one host talk.

docs/wire.md sections 4 (workers) and 5 (devices) list the objects. ``LineProtocol`` is the pure core: bytes and
descriptors in, messages out. ``line_link.py`` puts it on trio; a worker uses it with plain sockets, because
nothing may stand between it and a guest that has died.

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

from .errors import LocalProtocolError, RemoteProtocolError

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
                close_all(owned)
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
        close_all(self._descriptors)
        self._descriptors.clear()


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors that are the caller's."""
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
