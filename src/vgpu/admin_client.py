# SPDX-License-Identifier: Apache-2.0
"""Ask a running mediator over ``admin.sock``: JSON-RPC 2.0, one object per line. Blocks; for command lines.

Some answers take long, and a mediator that is stopped or stuck gives none. To tell the two apart it is asked something simple on
another connection when an answer is late: one that answers that is at work and is waited for.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# Registering a VM starts its device, which is what takes longest.
ANSWER_SECONDS = 60.0
# So long nothing is said; then the mediator is looked at, again and again.
QUIET_SECONDS = 2.0
PROBE_SECONDS = 1.0
# A mediator that answers nothing at all is given up after this.
MUTE_SECONDS = 10.0
INVALID_PARAMETERS = -32602
RESTART = "systemctl restart vgpu-mediator (programs in VMs go on meanwhile)"


def _report(text: str) -> None:
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr, flush=True)


class NoMediator(Exception):
    """Nobody answers there; the message says where, and what to do."""


class RequestRefused(Exception):
    """The mediator says no, and why. ``is_wrong_use``: it was asked something that cannot be meant."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.is_wrong_use = code == INVALID_PARAMETERS


class AdminClient:
    """One connection. Closing it takes nothing back."""

    def __init__(self, run_dir: Path, report: Callable[[str], None] = _report) -> None:
        """Connect. ``report``: hears that the mediator does not answer, while it is still waited for.

        Raises:
            NoMediator: no mediator serves that directory, or it is not ours to ask.
        """
        self._run_dir = run_dir
        self._path = run_dir / "admin.sock"
        self._report = report
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(QUIET_SECONDS)
        try:
            self._socket.connect(str(self._path))
        except PermissionError:
            self._socket.close()
            raise NoMediator(
                f"the mediator at {run_dir} belongs to another user; run this as that user"
            ) from None
        except (BlockingIOError, TimeoutError):
            # Others wait for it already, as many as may.
            self._socket.close()
            raise NoMediator(f"the mediator at {run_dir} does not answer anybody; {RESTART}") from None
        except OSError:
            self._socket.close()
            raise NoMediator(
                f"no mediator at {run_dir}; start run-mediator, or say where it is with --run-dir or VGPU_RUN_DIR"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def ask(self, method: str, **parameters: Any) -> Any:
        """The result of one method.

        Raises:
            RequestRefused: the mediator refused.
            NoMediator: it ended, answered nothing at all for ten seconds, or not this in a minute.
        """
        request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": parameters}
        try:
            self._socket.settimeout(MUTE_SECONDS)
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            data = bytearray()
            while not data.endswith(b"\n"):
                more = self._receive()
                if not more:
                    raise ConnectionResetError
                data += more
        except TimeoutError:
            raise NoMediator(f"the mediator at {self._run_dir} does not answer: {self._why_mute()}") from None
        except OSError:
            raise NoMediator(f"the mediator at {self._path} ended before it had answered") from None
        answer = json.loads(data)
        if "error" in answer:
            raise RequestRefused(answer["error"]["message"], answer["error"]["code"])
        return answer["result"]

    def _receive(self) -> bytes:
        """What comes next.

        Raises:
            TimeoutError: nothing, for too long.
        """
        began = heard = time.monotonic()
        is_told = False
        self._socket.settimeout(QUIET_SECONDS)
        while True:
            try:
                return self._socket.recv(1 << 16)
            except TimeoutError:
                pass
            if self._is_alive():
                heard = time.monotonic()
            elif not is_told:
                is_told = True
                self._report(f"the mediator at {self._run_dir} does not answer; waiting for it")
            now = time.monotonic()
            if now - heard > MUTE_SECONDS - QUIET_SECONDS or now - began > ANSWER_SECONDS:
                raise TimeoutError

    def _is_alive(self) -> bool:
        """Does it answer a question that needs nobody else in it? Any answer will do, that there is no such question, too."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(PROBE_SECONDS)
            probe.connect(str(self._path))
            probe.sendall(b'{"jsonrpc": "2.0", "id": 1, "method": "are you there", "params": {}}\n')
            return bool(probe.recv(1))
        return False

    def _why_mute(self) -> str:
        """What is to be seen of it from outside, and what to do."""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid = int(struct.unpack("3i", credentials)[0])
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] if pid else ""
        except (OSError, IndexError):
            state = ""
        if state in ("T", "t"):
            remedy = f"kill -CONT {pid} lets it go on" if state == "T" else "a debugger holds it"
            return f"its process {pid} is stopped; {remedy}"
        return f"its process {pid or '(unknown)'} is stuck or has too much to do; see its log, or {RESTART}"
