# SPDX-License-Identifier: Apache-2.0
"""A host for guest programs in tests: accepts guests as a mediator does and hands each a worker process.

No actors, no scheduling: every session gets an open-ended lease. What is under test is the guest library, the
wire and the worker; the device is whatever library the caller names (a fake one) or the software GPU.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

from vgpu.gpu.control import ANCILLARY_SIZE, LineProtocol, rights, take_rights
from vgpu.transport._generated_calls import TABLE_HASH
from vgpu.transport.layout import GrantPage, SessionPage

HELLO, WELCOME = 0x48504756, 0x57504756
PROBE = 1
START_SECONDS = 60


class Session:
    """One worker, and the pages of the guest it serves."""

    def __init__(
        self,
        worker: subprocess.Popen[bytes],
        link: socket.socket,
        hello: dict[str, Any],
        descriptors: list[int],
    ) -> None:
        self.worker = worker
        self.link = link
        self.hello = hello
        self.segment_fd, self.grant_fd = descriptors
        self.grant = GrantPage(self.grant_fd)
        self.page = SessionPage(self.segment_fd)

    def close(self) -> None:
        self.worker.kill()
        self.worker.wait()
        self.link.close()
        self.grant.close()
        self.page.close()
        os.close(self.segment_fd)
        os.close(self.grant_fd)


class SessionHost:
    """Listens in ``run_dir``; use as a context manager. ``sessions`` grows by one for each guest that attaches."""

    def __init__(self, run_dir: Path, *worker_options: str, memory_limit: int = 0) -> None:
        self.run_dir = run_dir
        self.options = worker_options
        self.memory_limit = memory_limit
        self.sessions: list[Session] = []
        self._guests: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._listener.bind(str(self.run_dir / "mediator.sock"))
        self._listener.listen(8)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(60)
        self._listener.close()
        for guest in self._guests:
            guest.close()
        for session in self.sessions:
            session.close()

    def environment(self, library_folder: Path) -> dict[str, str]:
        """What a guest program needs to find its library and this host."""
        return {**os.environ, "VGPU_RUN_DIR": str(self.run_dir), "LD_LIBRARY_PATH": str(library_folder)}

    def _accept(self) -> None:
        while True:
            try:
                guest, _ = self._listener.accept()
            except OSError:
                return
            self._guests.append(guest)
            self._welcome(guest)

    def _welcome(self, guest: socket.socket) -> None:
        hello = guest.recv(256, socket.MSG_WAITALL)
        if len(hello) < 256:
            return
        magic, layout, table, pid, flags = struct.unpack_from("<IIQII", hello)
        assert (magic, layout, table) == (HELLO, 1, TABLE_HASH)
        if flags & PROBE:
            guest.sendall(struct.pack("<IIIIQQQ", WELCOME, 1, 0, 0, 0, 0, 0).ljust(64, b"\0"))
            return
        session = self._start()
        ours, theirs = socket.socketpair()
        number = len(self.sessions) + 1
        session.grant.grant(deadline_ns=0)
        assign = {
            "do": "assign",
            "session": number,
            "vm": "test",
            "memory_limit": self.memory_limit,
            "guest_pid": pid,
        }
        line = LineProtocol().encode(assign, 1)
        session.link.sendmsg([line], rights([theirs.fileno()]))
        self.sessions.append(session)
        welcome = struct.pack(
            "<IIIIQQQ",
            WELCOME,
            1,
            0,
            0,
            number,
            session.hello["segment_size"],
            session.hello["worker_address"],
        )
        guest.sendmsg([welcome.ljust(64, b"\0")], rights([session.segment_fd, ours.fileno()]))
        ours.close()
        theirs.close()

    def _start(self) -> Session:
        name = f"w{len(self.sessions)}"
        command = [
            sys.executable,
            "-P",
            "-m",
            "vgpu.gpu.worker",
            "--run-dir",
            str(self.run_dir),
            "--id",
            name,
        ]
        with (self.run_dir / f"{name}.log").open("wb") as log:
            worker = subprocess.Popen(
                [*command, *self.options], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        path = self.run_dir / "workers" / f"{name}.sock"
        deadline = time.monotonic() + START_SECONDS
        while not path.exists():
            if worker.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"worker did not start: {(self.run_dir / f'{name}.log').read_text()}")
            time.sleep(0.005)
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.connect(str(path))
        protocol = LineProtocol()
        messages: list[tuple[dict[str, Any], list[int]]] = []
        while not messages:
            data, ancillary, _, _ = link.recvmsg(65536, ANCILLARY_SIZE)
            messages = protocol.receive_data(data, take_rights(ancillary))
        hello, descriptors = messages[0]
        return Session(worker, link, hello, descriptors)
