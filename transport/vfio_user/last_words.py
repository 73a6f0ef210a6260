# SPDX-License-Identifier: Apache-2.0
"""What QEMU is told when the process that was the device has died: every request is answered, none is carried out.

QEMU 11.1 takes the end of its connection badly. If a request was unread then, it aborts, and the VM with it; if one was
unanswered, the whole VM stands still until ``x-msg-timeout`` has passed. So somebody holds on to the connection of a
device that has died (``stub/keeper.py``) and answers in its stead: reads and writes with an error, which the guest sees
as ones and as nothing; what QEMU needs to take the device out (reset, interrupts off, memory unmapped) with success.

Pure: bytes in, bytes out. What the dead one was reading comes from its :class:`Journal`.
"""

from __future__ import annotations

import errno
import struct
from typing import Final

from vgpu.transport.errors import RemoteProtocolError

from .messages import HEADER_SIZE, MAX_MESSAGE_BYTES, TYPE_MASK, Command, MessageFlag

JOURNAL_BYTES: Final = 512
_LENGTH: Final = struct.Struct("<I")
_HEADER: Final = struct.Struct("<HHIII")
# Answered with success: a header alone.
_GRANTED: Final = frozenset({Command.DMA_MAP, Command.SET_IRQS, Command.RESET})


class Journal:
    """The request that is being read or carried out, in memory that outlives the writer.

    A count of bytes, then the first of them. The count is written last, so a writer that is killed leaves either the
    state before or the state after.
    """

    def __init__(self, memory: memoryview) -> None:
        if len(memory) < JOURNAL_BYTES:
            raise ValueError(f"a journal of {len(memory)} bytes, {JOURNAL_BYTES} are needed")
        self._memory = memory

    def heard(self, data: bytes) -> None:
        """These bytes have been read; no two requests' at once."""
        (count,) = _LENGTH.unpack_from(self._memory)
        room = data[: max(0, JOURNAL_BYTES - _LENGTH.size - count)]
        at = _LENGTH.size + count
        if room:
            self._memory[at : at + len(room)] = room
        _LENGTH.pack_into(self._memory, 0, count + len(data))

    def answered(self) -> None:
        """The request has been answered, as far as it wanted an answer."""
        _LENGTH.pack_into(self._memory, 0, 0)

    def read(self) -> tuple[bytes, int]:
        """The first bytes of an unanswered request, and how many of it have been read altogether."""
        (count,) = _LENGTH.unpack_from(self._memory)
        return bytes(self._memory[_LENGTH.size : _LENGTH.size + count][: JOURNAL_BYTES - _LENGTH.size]), count


class LastWords:
    """Answers a stream of requests, the first of which may have been read in part: see :meth:`Journal.read`."""

    def __init__(self, begun: bytes = b"", heard: int = 0) -> None:
        self._buffer = bytearray(begun)
        # Bytes of the first request that were read and are not in the buffer. They follow those that are.
        self._missing = heard - len(begun)

    def receive_data(self, data: bytes) -> bytes:
        """Take what QEMU has sent; the answers to what is complete.

        Raises:
            RemoteProtocolError: no request looks like that, so nothing after it can be understood either.
        """
        self._buffer += data
        answers = bytearray()
        while len(self._buffer) >= HEADER_SIZE:
            number, command, size, flags, _ = _HEADER.unpack_from(self._buffer)
            if not HEADER_SIZE <= size <= MAX_MESSAGE_BYTES or flags & TYPE_MASK:
                raise RemoteProtocolError(f"a request of {size} bytes with flags {flags:#x}")
            if len(self._buffer) + self._missing < size:
                break
            payload = bytes(self._buffer[HEADER_SIZE : size - self._missing])
            del self._buffer[: size - self._missing]
            if not flags & MessageFlag.NO_REPLY:
                answers += _answer(number, command, payload if not self._missing else None)
            self._missing = 0
        return bytes(answers)


def _answer(number: int, command: int, payload: bytes | None) -> bytes:
    """The reply; ``payload`` is None where not all of it is known."""
    if command in _GRANTED:
        return _HEADER.pack(number, command, HEADER_SIZE, MessageFlag.REPLY, 0)
    if command == Command.DMA_UNMAP and payload is not None:
        return _HEADER.pack(number, command, HEADER_SIZE + len(payload), MessageFlag.REPLY, 0) + payload
    return _HEADER.pack(number, command, HEADER_SIZE, MessageFlag.REPLY | MessageFlag.ERROR, errno.EIO)
