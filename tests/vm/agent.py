# SPDX-License-Identifier: Apache-2.0
"""The first process of a test VM: runs what the host asks for and says what became of it.

It speaks JSON, one object per line, over a virtio port; ``tests/vm/machine.py`` is the other end. Several commands run
at once. It is run by whatever Python the host's root file system holds, without the project and without site
packages, and as process 1 it also buries orphans.

    host -> guest   {"do":"run","id":N,"command":[...],"environment":{...},"folder":PATH,"user":N,"groups":[N...]}
                    {"do":"input","id":N,"data":TEXT}   {"do":"close","id":N}   {"do":"signal","id":N,"number":N}
                    {"do":"reboot"}   {"do":"halt"}
    guest -> host   {"is":"ready","seconds":F}   {"is":"started","id":N,"pid":N}   {"is":"failed","id":N,"why":TEXT}
                    {"is":"output","id":N,"stream":1|2,"data":TEXT}   {"is":"ended","id":N,"status":N}

Data crosses as text with one character per byte. A status below 0 is a signal's number.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
from typing import Any

_CHUNK = 16384
_REBOOT, _POWER_OFF = 0x01234567, 0x4321FEDC


class Agent:
    """Serves one port until the machine ends."""

    def __init__(self, port: int, wakeup: int) -> None:
        self._port = port
        self._selector = selectors.DefaultSelector()
        self._selector.register(port, selectors.EVENT_READ, self._read_port)
        self._selector.register(wakeup, selectors.EVENT_READ, lambda: self._bury(wakeup))
        self._partial = b""
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def serve(self) -> None:
        with open("/proc/uptime") as file:
            uptime = float(file.read().split()[0])
        # The empty line ends whatever a reboot cut short.
        os.write(self._port, b"\n")
        self._say({"is": "ready", "seconds": uptime})
        while True:
            for key, _ in self._selector.select():
                key.data()

    def _say(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self._port, data) :]

    def _read_port(self) -> None:
        data = os.read(self._port, 65536)
        if not data:  # the host's end is closed; poll would say so for ever
            signal.sigtimedwait([], 0.05)
            return
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in filter(None, lines):
            self._obey(json.loads(line))

    def _obey(self, message: dict[str, Any]) -> None:
        do, process = message["do"], self._running.get(message.get("id", -1))
        if do == "run":
            self._run(message)
        elif do in ("reboot", "halt"):
            os.sync()
            ctypes.CDLL(None).reboot(ctypes.c_int(_REBOOT if do == "reboot" else _POWER_OFF))
        elif process is None:
            pass  # it ended while the host was writing
        elif do == "signal":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, message["number"])
        elif process.stdin is not None and not process.stdin.closed:
            try:
                if do == "input":
                    process.stdin.write(message["data"].encode("latin-1"))
                    process.stdin.flush()
                else:
                    process.stdin.close()
            except BrokenPipeError:
                process.stdin.close()

    def _run(self, message: dict[str, Any]) -> None:
        number = message["id"]
        user, groups = message.get("user"), message.get("groups", [])
        try:
            process = subprocess.Popen(
                message["command"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=message.get("folder", "/"),
                env={**os.environ, **message.get("environment", {})},
                start_new_session=True,
                user=user,
                group=user,
                extra_groups=groups if user is not None else None,
            )
        except (OSError, subprocess.SubprocessError) as error:
            self._say({"is": "failed", "id": number, "why": str(error)})
            return
        self._running[number] = process
        self._say({"is": "started", "id": number, "pid": process.pid})
        for stream, pipe in ((1, process.stdout), (2, process.stderr)):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(
                pipe,
                selectors.EVENT_READ,
                lambda stream=stream, pipe=pipe: self._pass_on(number, stream, pipe),
            )

    def _pass_on(self, number: int, stream: int, pipe: Any) -> bool:
        """Send what a pipe holds; whether there may be more."""
        if pipe.closed:
            return False
        try:
            data = os.read(pipe.fileno(), _CHUNK)
        except BlockingIOError:
            return False
        if data:
            self._say({"is": "output", "id": number, "stream": stream, "data": data.decode("latin-1")})
            return True
        self._selector.unregister(pipe)
        pipe.close()
        return False

    def _bury(self, wakeup: int) -> None:
        os.read(wakeup, 4096)
        for number, process in list(self._running.items()):
            if process.poll() is not None:
                del self._running[number]
                for stream, pipe in ((1, process.stdout), (2, process.stderr)):
                    while self._pass_on(number, stream, pipe):
                        pass
                    # A child that lives on may hold the other end; the command itself is done.
                    if pipe is not None and not pipe.closed:
                        self._selector.unregister(pipe)
                        pipe.close()
                if process.stdin is not None:
                    with contextlib.suppress(BrokenPipeError):
                        process.stdin.close()
                self._say({"is": "ended", "id": number, "status": process.returncode})
        ours = {process.pid for process in self._running.values()}
        while True:
            try:
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if dead is None or dead.si_pid in ours:  # the next SIGCHLD or poll takes ours
                return
            os.waitpid(dead.si_pid, 0)


def main() -> None:
    """Process 1: never returns."""
    signal.signal(signal.SIGCHLD, lambda *_: None)
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    Agent(os.open(sys.argv[1], os.O_RDWR | os.O_CLOEXEC), read).serve()


if __name__ == "__main__":
    main()
