# SPDX-License-Identifier: Apache-2.0
"""Test helpers of this room: a client that speaks vfio-user as QEMU 11.1 does, over any blocking unix socket.

    with QemuClient.connect(path) as qemu:
        qemu.boot()
        value = qemu.read(0, 0x0, 4)

It sends what QEMU sends, in QEMU's order, and checks every reply as strictly as QEMU does: id, command, length, error.
Blocking on purpose: run it in a thread beside a trio server.
"""

from __future__ import annotations

import array
import json
import mmap
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

import attrs

from .errors import RemoteProtocolError
from .vfio_user.messages import (
    HEADER_SIZE,
    Command,
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    Header,
    IrqFlag,
    IrqInfo,
    MessageFlag,
    RegionAccess,
    RegionInfo,
    SetIrqs,
    Version,
)

QEMU_CAPABILITIES: dict[str, object] = {
    "pgsizes": 4096,
    "max_msg_fds": 16,
    "max_dma_maps": 65535,
    "max_data_xfer_size": 1048576,
    "migration": {"pgsize": 4096, "max_bitmap_size": 256 << 20},
    "write_multiple": True,
}
CONFIGURATION = 7


@attrs.frozen
class Answer:
    """A reply: the errno (0: none), the payload, and descriptors that the caller owns."""

    error: int
    payload: bytes
    descriptors: tuple[int, ...] = ()

    def close(self) -> None:
        """Close the descriptors."""
        for descriptor in self.descriptors:
            os.close(descriptor)


class QemuClient:
    """One connection as QEMU makes it. Owns the socket, BAR mappings and what it was sent."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.regions: dict[int, RegionInfo] = {}
        self.maps: dict[int, mmap.mmap] = {}
        self.device: DeviceInfo | None = None
        self.configuration = b""
        self._next_id = 0

    @classmethod
    def connect(cls, path: Path, seconds: float = 10.0) -> Self:
        """Connect to a listening server; every later call waits at most ``seconds``."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(seconds)
            connection.connect(str(path))
        except BaseException:
            connection.close()
            raise
        return cls(connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap and hang up, as a QEMU that exits."""
        for mapping in self.maps.values():
            mapping.close()
        self.maps.clear()
        self.connection.close()

    # ---- messages ----------------------------------------------------------------------------------------------

    def send(
        self, command: int, payload: bytes = b"", descriptors: tuple[int, ...] = (), flags: int = 0
    ) -> Header:
        """Send one message in one call and do not wait."""
        header = Header(self._next_id, command, HEADER_SIZE + len(payload), flags)
        self._next_id = (self._next_id + 1) & 0xFFFF
        rights = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        )
        self.connection.sendmsg([header.encode() + payload], rights)
        return header

    def receive(self, asked: Header) -> Answer:
        """The next reply, which must be the one to ``asked``.

        Raises:
            RemoteProtocolError: it is not, or the server hung up.
        """
        # A header that comes in two pieces is fatal to QEMU, so it is to this client.
        data, ancillary, _, _ = self.connection.recvmsg(HEADER_SIZE, socket.CMSG_SPACE(16 * 4))
        descriptors = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(content)
        header = Header.decode(data)
        payload = b""
        while len(payload) < header.size - HEADER_SIZE:
            piece = self.connection.recv(header.size - HEADER_SIZE - len(payload))
            if not piece:
                raise RemoteProtocolError("the server hung up within a reply")
            payload += piece
        if (header.message_id, header.command) != (asked.message_id, asked.command) or not header.is_reply:
            raise RemoteProtocolError(f"expected the reply to {asked}, got {header}")
        error = header.error if header.flags & MessageFlag.ERROR else 0
        return Answer(error, payload, tuple(descriptors))

    def ask(self, command: int, payload: bytes = b"", descriptors: tuple[int, ...] = ()) -> Answer:
        """Send and wait for the reply."""
        return self.receive(self.send(command, payload, descriptors))

    def ask_well(self, command: int, payload: bytes = b"", descriptors: tuple[int, ...] = ()) -> bytes:
        """Like ``ask`` where only success will do.

        Raises:
            RemoteProtocolError: an errno came back.
        """
        answer = self.ask(command, payload, descriptors)
        if answer.error:
            answer.close()
            raise RemoteProtocolError(f"{Command(command).name}: {os.strerror(answer.error)}")
        return answer.payload

    # ---- what QEMU does ----------------------------------------------------------------------------------------

    def negotiate(self) -> Version:
        """VERSION, with QEMU's capabilities, padded to the length of QEMU's own."""
        text = json.dumps({"capabilities": QEMU_CAPABILITIES}).encode()
        question = b"\0\0\0\0" + text.ljust(209) + b"\0"
        payload = self.ask_well(Command.VERSION, question)
        if len(payload) > len(question):
            raise RemoteProtocolError("the reply to VERSION is longer than the question")
        return Version.decode(payload)

    def map_dma(self, windows: list[DmaMap], descriptor: int | None = None) -> None:
        """DMA_MAPs one after the other without waiting, then all their replies."""
        lent = () if descriptor is None else (descriptor,)
        asked = [self.send(Command.DMA_MAP, window.encode(), lent) for window in windows]
        for header in asked:
            if self.receive(header).error:
                raise RemoteProtocolError("DMA_MAP was refused")

    def unmap_dma(self, windows: list[DmaMap]) -> None:
        """DMA_UNMAPs one after the other without waiting, then all their replies, which echo the question."""
        asked = [(w, self.send(Command.DMA_UNMAP, DmaUnmap(w.address, w.size).encode())) for w in windows]
        for window, header in asked:
            answer = self.receive(header)
            if answer.error or answer.payload != DmaUnmap(window.address, window.size).encode():
                raise RemoteProtocolError("DMA_UNMAP was refused or not echoed")

    def region_info(self, index: int) -> RegionInfo:
        """GET_REGION_INFO, a second time with more room if the reply says so; maps what may be mapped."""
        asked = RegionInfo(index)
        answer = self.ask(Command.GET_REGION_INFO, asked.encode_request())
        info = RegionInfo.decode(answer.payload)
        if info.argsz > asked.argsz:
            answer.close()
            answer = self.ask(Command.GET_REGION_INFO, RegionInfo(index, argsz=info.argsz).encode_request())
            info = RegionInfo.decode(answer.payload)
        if answer.error:
            raise RemoteProtocolError(f"region {index}: {os.strerror(answer.error)}")
        for offset, size in info.areas[:1]:
            self.maps[index] = mmap.mmap(answer.descriptors[0], size, offset=info.offset + offset)
        answer.close()
        self.regions[index] = info
        return info

    def boot(self, *, guest_memory: int | None = None) -> None:
        """From VERSION to the first RESET, as QEMU at the start of a machine."""
        self.negotiate()
        self.map_dma(
            [DmaMap(0, 0xA0000), DmaMap(0xC0000, 0x20000), DmaMap(0x100000, 0x1FF00000)], guest_memory
        )
        self.device = DeviceInfo.decode(self.ask_well(Command.GET_INFO, DeviceInfo(0, 0, 0).encode()))
        for index in (0, 1, 2, 3, 4, 5, CONFIGURATION):
            self.region_info(index)
        self.configuration = self.read_bytes(CONFIGURATION, 0, self.regions[CONFIGURATION].size)
        for index in (3, 2):
            info = IrqInfo.decode(self.ask_well(Command.GET_IRQ_INFO, IrqInfo(index).encode()))
            if info.count:
                self._wire(index)
        for _ in range(3):
            self.reset()

    def _wire(self, index: int) -> None:
        notice = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            flags = IrqFlag.DATA_EVENTFD | IrqFlag.ACTION_TRIGGER
            self.ask_well(Command.SET_IRQS, SetIrqs(index, 0, 1, flags).encode(), (notice,))
        finally:
            os.close(notice)

    def reset(self) -> None:
        """One RESET."""
        self.ask_well(Command.RESET)

    def reboot(self) -> None:
        """What a guest's reboot does to the device: memory windows go and come, and RESET several times."""
        windows = [DmaMap(0xC0000, 0x20000), DmaMap(0x100000, 0x1FF00000)]
        self.unmap_dma(windows)
        for _ in range(5):
            self.reset()
        self.map_dma(windows)

    def read_bytes(self, region: int, offset: int, count: int) -> bytes:
        """REGION_READ; all ones if it is refused, as QEMU hands to the guest."""
        answer = self.ask(Command.REGION_READ, RegionAccess(region, offset, count).encode())
        if answer.error:
            return b"\xff" * count
        return RegionAccess.decode_with_data(answer.payload)[1]

    def read(self, region: int, offset: int, count: int = 4) -> int:
        """A little-endian number."""
        return int.from_bytes(self.read_bytes(region, offset, count), "little")

    def write(self, region: int, offset: int, value: int, count: int = 4) -> int:
        """REGION_WRITE of a little-endian number. The errno, 0 for none."""
        body = RegionAccess(region, offset, count).encode(value.to_bytes(count, "little"))
        return self.ask(Command.REGION_WRITE, body).error
