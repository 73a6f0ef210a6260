# SPDX-License-Identifier: Apache-2.0
"""What QEMU hears of a device that has died: by bytes, cut everywhere, with and without a journal."""

from __future__ import annotations

import errno
import struct

import pytest

from vgpu.transport.errors import RemoteProtocolError
from vgpu.transport.vfio_user.last_words import JOURNAL_BYTES, Journal, LastWords
from vgpu.transport.vfio_user.messages import MAX_MESSAGE_BYTES, Command, MessageFlag

REPLY, ERROR = int(MessageFlag.REPLY), int(MessageFlag.REPLY | MessageFlag.ERROR)


def frame(number: int, command: int, payload: bytes = b"", flags: int = 0, error: int = 0) -> bytes:
    return struct.pack("<HHIII", number, command, 16 + len(payload), flags, error) + payload


READ = frame(7, Command.REGION_READ, bytes(16))
UNMAP = frame(9, Command.DMA_UNMAP, bytes(range(24)))
REQUESTS = READ + frame(8, Command.REGION_WRITE, bytes(20)) + UNMAP + frame(10, Command.RESET) + frame(11, 99)
ANSWERS = (
    frame(7, Command.REGION_READ, flags=ERROR, error=errno.EIO)
    + frame(8, Command.REGION_WRITE, flags=ERROR, error=errno.EIO)
    + frame(9, Command.DMA_UNMAP, bytes(range(24)), REPLY)
    + frame(10, Command.RESET, flags=REPLY)
    + frame(11, 99, flags=ERROR, error=errno.EIO)
)


def test_every_request_is_answered_however_it_is_cut() -> None:
    assert LastWords().receive_data(REQUESTS) == ANSWERS
    words = LastWords()
    assert b"".join(words.receive_data(bytes([byte])) for byte in REQUESTS) == ANSWERS


@pytest.mark.parametrize("read", range(len(READ) + 1))
def test_what_the_dead_one_had_read_is_answered_too(read: int) -> None:
    """Wherever it died: before, within and after reading the first request."""
    journal = Journal(memoryview(bytearray(JOURNAL_BYTES)))
    if read:
        journal.heard(READ[: min(read, 16)])
    if read > 16:
        journal.heard(READ[16:read])
    words = LastWords(*journal.read())
    assert words.receive_data(b"") + words.receive_data(REQUESTS[read:]) == ANSWERS


def test_an_answered_request_is_not_answered_again() -> None:
    journal = Journal(memoryview(bytearray(JOURNAL_BYTES)))
    journal.heard(READ)
    journal.answered()
    words = LastWords(*journal.read())
    assert words.receive_data(b"") == b""
    assert words.receive_data(REQUESTS[len(READ) :]) == ANSWERS[16:]


@pytest.mark.parametrize("read", [16, 17, JOURNAL_BYTES - 4, JOURNAL_BYTES, 5000, 9000])
def test_a_request_larger_than_the_journal(read: int) -> None:
    """Only its beginning is known, and how much of it is still to come."""
    large = frame(3, Command.REGION_WRITE, bytes(9000 - 16))
    journal = Journal(memoryview(bytearray(JOURNAL_BYTES)))
    journal.heard(large[:16])
    for at in range(16, read, 1000):
        journal.heard(large[at : min(read, at + 1000)])
    words = LastWords(*journal.read())
    expected = frame(3, Command.REGION_WRITE, flags=ERROR, error=errno.EIO) + ANSWERS
    assert words.receive_data(b"") + words.receive_data(large[read:] + REQUESTS) == expected


def test_a_request_that_wants_no_answer_gets_none() -> None:
    posted = frame(4, Command.REGION_WRITE, bytes(20), flags=MessageFlag.NO_REPLY)
    assert LastWords().receive_data(posted + REQUESTS) == ANSWERS


@pytest.mark.parametrize(
    "bad",
    [
        struct.pack("<HHIII", 1, 9, 15, 0, 0),
        struct.pack("<HHIII", 1, 9, MAX_MESSAGE_BYTES + 1, 0, 0),
        frame(1, Command.REGION_READ, flags=REPLY),
    ],
)
def test_what_cannot_be_a_request_ends_it(bad: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        LastWords().receive_data(bad)
