# SPDX-License-Identifier: Apache-2.0
"""The mediator's end of the control socket between mediator and worker: JSON lines, descriptors beside them.

docs/wire.md section 4 lists the objects. The lines themselves are ``transport/lines.py``, named here again for those
who speak with workers; the worker's end (``gpu/worker.py``) uses them with plain sockets, because nothing may stand
between it and a guest that has died.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import attrs
import trio

from vgpu.transport.line_link import LineLink, open_line_link
from vgpu.transport.lines import (
    ANCILLARY_SIZE,
    DESCRIPTORS_PER_MESSAGE,
    LINE_LIMIT,
    LineProtocol,
    Message,
    rights,
    take_rights,
)

__all__ = [
    "ANCILLARY_SIZE",
    "DESCRIPTORS_PER_MESSAGE",
    "LINE_LIMIT",
    "LineProtocol",
    "Message",
    "WorkerLink",
    "open_worker_link",
    "rights",
    "take_rights",
]


@attrs.define(eq=False)
class WorkerLink:
    """The mediator's connection to one worker. Owns the socket and the descriptors of the hello.

    ``segment_fd`` and ``grant_fd`` stay valid until ``aclose``; dup them to keep them longer.
    """

    hello: Message
    segment_fd: int
    grant_fd: int
    _link: LineLink

    async def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send one line; the descriptors stay the caller's. Cancelled half-way, the link is of no further use.

        Raises:
            trio.BrokenResourceError: the worker is gone.
        """
        await self._link.send(message, descriptors)

    async def receive(self) -> tuple[Message | None, list[int]]:
        """The worker's next line and the descriptors on it, now the caller's; (None, []) when it has gone.

        One task at a time. Cancellation loses nothing.

        Raises:
            RemoteProtocolError: the worker sent garbage.
        """
        return await self._link.receive()

    def move_segment(self, descriptor: int) -> None:
        """The worker replays in another file now, as it was told to. The descriptor is the link's, the old one closed."""
        os.close(self.segment_fd)
        self.segment_fd = descriptor

    async def aclose(self) -> None:
        """Close socket and descriptors. The worker goes on without us. May be called twice."""
        self._link.close()
        for descriptor in (self.segment_fd, self.grant_fd):
            if descriptor >= 0:
                os.close(descriptor)
        self.segment_fd = self.grant_fd = -1
        await trio.lowlevel.checkpoint()


async def open_worker_link(socket_path: str) -> WorkerLink:
    """Connect to a worker and read its hello.

    Raises:
        OSError: nobody listens there, or it hung up before its hello.
        RemoteProtocolError: what came first was no hello with two descriptors.
    """
    link, hello, (segment, grant) = await open_line_link(socket_path, 2)
    return WorkerLink(hello, segment, grant, link)
