# SPDX-License-Identifier: Apache-2.0
"""The process that holds QEMU's connection when the device process dies, so that the VM does not die with it.

    device process --socket pair, and a journal in shared memory--> keeper

The device process hands over a copy of each connection it accepts, and notes in the journal which request it is at. When
it ends, in whatever way, the keeper answers for it (``vfio_user/last_words.py``) until QEMU hangs up, which it does when
the device is unplugged or the VM ends. The guest meanwhile sees a device that has fallen off the bus.

The keeper does nothing else and imports next to nothing. It must never answer while the device process lives.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

from vgpu.transport.errors import RemoteProtocolError
from vgpu.transport.vfio_user.last_words import JOURNAL_BYTES, Journal, LastWords

log = logging.getLogger(__name__)

_KEEP, _FORGET = b"keep", b"forget"
_SEND_SECONDS: Final = 10.0


class Keeper:
    """The device process's side. A keeper that has died is done without: the device goes on."""

    def __init__(self, link: socket.socket, journal: Journal, process: subprocess.Popen[bytes]) -> None:
        self._link = link
        self._journal = journal
        self.process = process

    def begins(self, descriptor: int) -> None:
        """A client is being served; the descriptor stays the caller's."""
        self._journal.answered()
        self._tell(_KEEP, [descriptor])

    def heard(self, data: bytes) -> None:
        """These bytes of a request have been read."""
        self._journal.heard(data)

    def answered(self) -> None:
        """Nothing that has been read waits for an answer."""
        self._journal.answered()

    def ends(self) -> None:
        """The client has gone by itself."""
        self._tell(_FORGET)

    def _tell(self, word: bytes, descriptors: Sequence[int] = ()) -> None:
        try:
            socket.send_fds(self._link, [word], list(descriptors))
        except OSError as error:
            log.warning("the keeper is gone: %s", error)

    def close(self) -> None:
        """Let the keeper believe that the device process has ended. The end of the process does the same."""
        self._link.close()


def start_keeper() -> Keeper:
    """Start the process, which lives until we have ended and the last client too.

    Raises:
        OSError: it cannot be started.
    """
    memory = os.memfd_create("vgpu-journal", os.MFD_CLOEXEC)
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        os.ftruncate(memory, JOURNAL_BYTES)
        journal = Journal(memoryview(mmap.mmap(memory, JOURNAL_BYTES)))
        with its:
            command = [sys.executable, "-P", "-m", "vgpu.transport.stub.keeper"]
            process = subprocess.Popen(
                [*command, str(its.fileno()), str(memory)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(its.fileno(), memory), start_new_session=True,
            )  # fmt: skip
    except BaseException:
        ours.close()
        raise
    finally:
        os.close(memory)
    return Keeper(ours, journal, process)


# -- in the keeper


def watch(link: socket.socket) -> socket.socket | None:
    """Hold what the device process hands over until it ends; what is held then."""
    held: socket.socket | None = None
    while True:
        word, descriptors, _, _ = socket.recv_fds(link, 16, 1)
        if not word:  # the device process has ended
            return held
        if held is not None:
            held.close()
        held = socket.socket(fileno=descriptors[0]) if word == _KEEP else None


def answer_for_the_dead(client: socket.socket, words: LastWords) -> None:
    """Answer until the client hangs up or cannot be understood."""
    client.settimeout(None)
    try:
        answers = words.receive_data(b"")
        while True:
            if answers:
                client.settimeout(_SEND_SECONDS)
                client.sendall(answers)
                client.settimeout(None)
            # Descriptors that come with a request are closed by the kernel, since nobody asks for them.
            data = client.recv(65536)
            if not data:
                return
            answers = words.receive_data(data)
    except (OSError, RemoteProtocolError):
        return


def main(arguments: Sequence[str]) -> int:
    """Keeper of the device process at the other end of the descriptors given: its socket, its journal."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # what ends the device process must not end this one
    link, memory = int(arguments[0]), int(arguments[1])
    with mmap.mmap(memory, JOURNAL_BYTES) as mapping, memoryview(mapping) as view:
        with socket.socket(fileno=link) as line:
            client = watch(line)
        if client is not None:
            with contextlib.closing(client):
                answer_for_the_dead(client, LastWords(*Journal(view).read()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
