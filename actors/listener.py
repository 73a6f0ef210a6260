# SPDX-License-Identifier: Apache-2.0
"""The listener: accepts guest processes on ``mediator.sock`` and hands each to its VM's connection actor.

Reads exactly one HELLO with a time limit and checks it; what it does not understand it answers and hangs
up. The kernel's peer credentials say who is asking.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
from typing import ClassVar

import attrs
import trio

from vgpu.transport._generated_calls import TABLE_HASH
from vgpu.transport.attach import HELLO_SIZE, LAYOUT_VERSION, Hello, Status, Welcome
from vgpu.transport.errors import RemoteProtocolError
from vgpu.transport.names import BadName

from . import ActorError, StartChild
from .connection import GuestArrived
from .unix_listener import UnixListener

_log = logging.getLogger("vgpu.listener")

HELLO_SECONDS = 5.0
# Guests that have connected and not yet said HELLO; more wait in the kernel's queue.
GREETING_LIMIT = 64


def peer_credentials(sock: trio.socket.SocketType) -> tuple[int, int]:
    """(pid, uid) of the process at the other end, from the kernel."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _gid = struct.unpack("3i", raw)
    return pid, uid


def vm_name_for(hello: Hello, uid: int, owner: int) -> str:
    """The VM a local process belongs to. Credentials decide: only root and the mediator's own user may name one
    (``owner``); everybody else is a VM of their own, whatever their HELLO says."""
    is_trusted = uid in (0, owner)
    return hello.vm if hello.vm and is_trusted else f"local-{uid}"


@attrs.define(eq=False)
class Listener(UnixListener):
    """Owns ``mediator.sock``."""

    socket_mode: ClassVar[int] = 0o666

    connections: str
    _starting: trio.Lock = attrs.Factory(trio.Lock)
    _greeting: trio.CapacityLimiter = attrs.Factory(lambda: trio.CapacityLimiter(GREETING_LIMIT))

    async def serve(self, stream: trio.SocketStream) -> None:
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
        except BadName as error:
            _log.warning("guest pid %d uid %d is refused: %s", pid, uid, error)
            with contextlib.suppress(OSError, trio.BrokenResourceError):
                await stream.send_all(Welcome(Status.REFUSED).encode())
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
