# SPDX-License-Identifier: Apache-2.0
"""The listener: accepts guest processes on ``mediator.sock`` and hands each to its VM's connection actor.

Reads exactly one HELLO with a time limit and checks it; what it does not understand it answers and hangs
up. The kernel's peer credentials say who is asking.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import struct
from pathlib import Path

import attrs
import trio

from vgpu.transport._generated_calls import TABLE_HASH
from vgpu.transport.attach import HELLO_SIZE, LAYOUT_VERSION, Hello, Status, Welcome
from vgpu.transport.errors import RemoteProtocolError

from . import Actor, ActorError, ExitReason, StartChild
from .connection import GuestArrived

_log = logging.getLogger("vgpu.listener")

HELLO_SECONDS = 5.0
# Guests that have connected and not yet said HELLO; more wait in the kernel's queue.
GREETING_LIMIT = 64
BACKLOG = 256


def peer_credentials(sock: trio.socket.SocketType) -> tuple[int, int]:
    """(pid, uid) of the process at the other end, from the kernel."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _gid = struct.unpack("3i", raw)
    return pid, uid


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


def vm_name_for(hello: Hello, uid: int, owner: int) -> str:
    """The VM a local process belongs to. Credentials decide: only root and the mediator's own user may name one
    (``owner``); everybody else is a VM of their own, whatever their HELLO says."""
    name = "".join(c for c in hello.vm if c.isalnum() or c in "-_.")
    is_trusted = uid in (0, owner)
    return name if name and name == hello.vm and is_trusted else f"local-{uid}"


@attrs.define(eq=False)
class Listener(Actor):
    """Owns ``mediator.sock``."""

    path: Path
    connections: str
    _sock: trio.socket.SocketType | None = None
    _starting: trio.Lock = attrs.Factory(trio.Lock)
    _greeting: trio.CapacityLimiter = attrs.Factory(lambda: trio.CapacityLimiter(GREETING_LIMIT))

    async def started(self) -> None:
        self._sock = await open_unix_listener(self.path, 0o666)
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
                _log.error("cannot accept a guest: %s", error)
                await trio.sleep(0.1)
                continue
            self.nursery.start_soon(self._greet, trio.SocketStream(sock))

    async def _greet(self, stream: trio.SocketStream) -> None:
        pid, uid = peer_credentials(stream.socket)
        try:
            async with self._greeting:
                with trio.fail_after(HELLO_SECONDS):
                    hello = Hello.decode(await self._read_hello(stream))
                if hello.layout_version != LAYOUT_VERSION or hello.table_hash != TABLE_HASH:
                    _log.warning("pid %d has a libcuda of another version; refused", pid)
                    await stream.send_all(Welcome(Status.VERSION_MISMATCH).encode())
                    await stream.aclose()
                    return
            name = vm_name_for(hello, uid, os.geteuid())
            supervisor = self.find(self.connections)
            child = self.find(f"{self.connections}/{name}")
            # One at a time: two guests of a new VM that arrive together must not both start its connection.
            async with self._starting:
                if not child.is_alive:
                    with contextlib.suppress(ActorError):
                        await supervisor.ask(StartChild((name,), id=name))
            if not await child.send(GuestArrived(hello, stream, pid, uid)):
                await stream.aclose()
        except (RemoteProtocolError, trio.TooSlowError, trio.BrokenResourceError, OSError) as error:
            _log.warning("guest pid %d uid %d hung up on: %s", pid, uid, error)
            await stream.aclose()
        except BaseException:
            # This actor is ending. A guest left on an open socket that nobody reads would wait for ever.
            stream.socket.close()
            raise

    @staticmethod
    async def _read_hello(stream: trio.SocketStream) -> bytes:
        data = b""
        while len(data) < HELLO_SIZE:
            more = await stream.receive_some(HELLO_SIZE - len(data))
            if not more:
                raise RemoteProtocolError(
                    f"connection ended after {len(data)} of {HELLO_SIZE} bytes of HELLO"
                )
            data += more
        return data
