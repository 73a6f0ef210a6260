# SPDX-License-Identifier: Apache-2.0
"""What the actors that own a unix socket have in common: bind, accept, hand over, remove.

A subclass says what to do with a connection (``serve``). Running out of descriptors is waited out; any other
failure to accept ends the actor, and its supervisor makes another.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from pathlib import Path
from typing import ClassVar

import attrs
import trio

from . import Actor, ExitReason

_log = logging.getLogger("vgpu.listener")

BACKLOG = 256
# How long to wait when the process has no descriptor left for one more peer.
EXHAUSTED_SECONDS = 0.1


async def is_listened_on(path: Path) -> bool:
    """Does a living process accept connections at that socket?"""
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            await probe.connect(str(path))
        except OSError:
            return False
    return True


async def open_unix_listener(path: Path, mode: int) -> trio.socket.SocketType:
    """Bind and listen at ``path``, replacing a socket nobody listens on any more.

    Raises:
        OSError: EADDRINUSE when a living process listens there.
    """
    if path.exists():
        if await is_listened_on(path):
            raise OSError(errno.EADDRINUSE, f"another mediator listens on {path}")
        path.unlink()
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o777 & ~mode)
    try:
        await sock.bind(str(path))
    finally:
        os.umask(previous)
    sock.listen(BACKLOG)
    return sock


@attrs.define(eq=False)
class UnixListener(Actor):
    """Owns the socket at ``path`` for one life of the actor; ``serve`` gets each connection and owns it."""

    # Permission bits of the socket: who may connect.
    socket_mode: ClassVar[int] = 0o600

    path: Path
    _sock: trio.socket.SocketType | None = attrs.field(default=None, init=False)

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection, in a task of its own; an error that gets out ends the actor."""
        raise NotImplementedError

    async def started(self) -> None:
        self._sock = await open_unix_listener(self.path, self.socket_mode)
        self.nursery.start_soon(self._accept)

    async def stopped(self, reason: ExitReason) -> None:
        if self._sock is not None:
            self._sock.close()
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()

    async def _accept(self) -> None:
        assert self._sock is not None
        while True:
            try:
                sock, _ = await self._sock.accept()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED):
                    raise
                _log.error("cannot accept a peer at %s: %s", self.path, error)
                await trio.sleep(EXHAUSTED_SECONDS)
                continue
            self.nursery.start_soon(self.serve, trio.SocketStream(sock))
