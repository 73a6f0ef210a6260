# SPDX-License-Identifier: Apache-2.0
"""Slots of a fake device that real workers replay: the guest library, the wire and the worker, with no VM between them."""

from __future__ import annotations

import socket
from pathlib import Path

import attrs

from tests.shim.fake_device import FakeDevice
from tests.shim.session_host import Session, SessionHost
from vgpu.gpu.control import ANCILLARY_SIZE, LineProtocol, rights
from vgpu.transport.layout import SessionPage


@attrs.define(eq=False)
class WorkerTenant:
    """A worker in a slot, and the end of its lifeline that the device's process holds."""

    worker: Session
    lifeline: socket.socket
    session_id: int
    worker_address: int

    def ring(self) -> None:
        self.lifeline.send(b"!")

    def end(self) -> None:
        self.lifeline.close()
        self.worker.worker.wait(60)


@attrs.define(eq=False)
class WorkerHost:
    """Grants slots to workers started with ``options``. Sessions and their grant pages stay open until ``close``."""

    folder: Path
    options: tuple[str, ...]
    memory_limit: int = 0
    sessions: list[Session] = attrs.field(factory=list)

    def __call__(self, device: FakeDevice, slot: int) -> WorkerTenant:
        starter = SessionHost(self.folder, *self.options)
        starter.sessions = self.sessions  # it counts them to name workers
        session = starter._start()
        starter._listener.close()
        session.page.close()
        session.page = SessionPage(device.memory_fd, device.slot_offset(slot))
        session.grant.grant(deadline_ns=0)
        ours, theirs = socket.socketpair()
        number = len(self.sessions) + 1
        assign = {
            "do": "assign",
            "session": number,
            "vm": "test",
            "memory_limit": self.memory_limit,
            "guest_pid": device.entry(slot, "pid"),
            "segment_offset": device.slot_offset(slot),
            "segment_size": device.slot_size,
        }
        line = LineProtocol().encode(assign, 2)
        session.link.sendmsg([line], rights([theirs.fileno(), device.memory_fd]))
        theirs.close()
        self.sessions.append(session)
        protocol = LineProtocol()
        events: list[str] = []
        while "assigned" not in events:
            data, _, _, _ = session.link.recvmsg(65536, ANCILLARY_SIZE)
            assert data, (self.folder / f"w{number - 1}.log").read_text()
            events += [message["event"] for message, _ in protocol.receive_data(data, [])]
        return WorkerTenant(session, ours, number, session.hello["worker_address"])

    def close(self) -> None:
        for session in self.sessions:
            session.close()
