# SPDX-License-Identifier: Apache-2.0
"""For the mediator: how a device process is started, where it listens, and a link to it on trio.

    process = await trio.lowlevel.open_process(stub_command(...), start_new_session=True, ...)
    link = await open_device_link(device_socket_path(run_dir, vm))
    await link.send(command_line(Status(True, False, 13000)))

The device's socket appears when it listens for QEMU too. This module starts nothing itself.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import attrs
import trio

from vgpu.transport.errors import RemoteProtocolError
from vgpu.transport.line_link import LineLink, open_line_link
from vgpu.transport.lines import Message
from vgpu.transport.vfio_user.device import DEFAULT_BAR1
from vgpu.transport.vfio_user.pci import Variant

from .messages import Hello, read_event

DEFAULT_SLOTS: Final = 8
# A unix socket's path has 107 bytes; this leaves some for the directory.
NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}")


def vfio_socket_path(run_dir: Path, vm: str) -> Path:
    """Where QEMU connects."""
    return run_dir / "vfio-user" / f"{vm}.sock"


def device_socket_path(run_dir: Path, vm: str) -> Path:
    """Where the mediator connects."""
    return run_dir / "devices" / f"{vm}.sock"


def stub_command(
    run_dir: Path,
    vm: str,
    *,
    bar1_bytes: int = DEFAULT_BAR1,
    slots: int = DEFAULT_SLOTS,
    variant: Variant | str = Variant.CONVENTIONAL,
    socket_group: str = "",
) -> list[str]:
    """The command line of a VM's device process. It says on stderr what it does, and leaves with 0 if told to.

    ``socket_group``: a group of this host whose members may connect a QEMU; "": its own user alone. Exit status 3: a living device process of that VM is there already; connect to that one.
    """
    return [
        *(sys.executable, "-P", "-m", "vgpu.transport.stub"),
        *("--run-dir", str(run_dir), "--vm", vm),
        *("--bar1-bytes", str(bar1_bytes), "--slots", str(slots), "--variant", Variant(variant).value),
        *(("--socket-group", socket_group) if socket_group else ()),
    ]


@attrs.define(eq=False)
class DeviceLink:
    """The mediator's connection to one device. Owns the socket and ``bar1_fd``, which is valid until ``aclose``."""

    hello: Message
    described: Hello  # the hello, checked
    bar1_fd: int
    _link: LineLink

    async def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send one line; the descriptors stay the caller's. Cancelled half-way, the link is of no further use.

        Raises:
            trio.BrokenResourceError: the device is gone.
        """
        await self._link.send(message, descriptors)

    async def receive(self) -> tuple[Message | None, list[int]]:
        """The device's next line (``messages.read_event`` checks it); (None, []) when it has gone.

        One task at a time. Cancellation loses nothing.

        Raises:
            RemoteProtocolError: the device sent garbage.
        """
        return await self._link.receive()

    async def aclose(self) -> None:
        """Close socket and descriptor. The device goes on without us. May be called twice."""
        self._link.close()
        if self.bar1_fd >= 0:
            os.close(self.bar1_fd)
        self.bar1_fd = -1
        await trio.lowlevel.checkpoint()


async def open_device_link(path: str | os.PathLike[str]) -> DeviceLink:
    """Connect to a device and read its hello; whoever was connected before is hung up on.

    Raises:
        OSError: nobody listens there, or it hung up before its hello.
        RemoteProtocolError: what came first was no hello with a BAR1.
    """
    link, hello, (bar1,) = await open_line_link(path, 1)
    try:
        described = read_event(hello, 1)
        if not isinstance(described, Hello):
            raise RemoteProtocolError(f"{link.name}: no hello")
    except BaseException:
        link.close()
        os.close(bar1)
        raise
    return DeviceLink(hello, described, bar1, link)
