# SPDX-License-Identifier: Apache-2.0
"""Ask a running mediator over ``admin.sock``: JSON-RPC 2.0, one object per line. Blocks; for command lines."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# Registering a VM starts its device, which is what takes longest.
ANSWER_SECONDS = 60.0
INVALID_PARAMETERS = -32602


class NoMediator(Exception):
    """Nobody answers there; the message says where, and what to do."""


class RequestRefused(Exception):
    """The mediator says no, and why. ``is_wrong_use``: it was asked something that cannot be meant."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.is_wrong_use = code == INVALID_PARAMETERS


class AdminClient:
    """One connection. Closing it takes nothing back."""

    def __init__(self, run_dir: Path) -> None:
        """Connect.

        Raises:
            NoMediator: no mediator serves that directory, or it is not ours to ask.
        """
        self._path = run_dir / "admin.sock"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(ANSWER_SECONDS)
        try:
            self._socket.connect(str(self._path))
        except PermissionError:
            self._socket.close()
            raise NoMediator(
                f"the mediator at {run_dir} belongs to another user; run this as that user"
            ) from None
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
            NoMediator: it did not answer in a minute, or ended.
        """
        request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": parameters}
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            data = bytearray()
            while not data.endswith(b"\n"):
                more = self._socket.recv(1 << 16)
                if not more:
                    raise ConnectionResetError
                data += more
        except TimeoutError:
            raise NoMediator(f"the mediator at {self._path} does not answer") from None
        except OSError:
            raise NoMediator(f"the mediator at {self._path} ended before it had answered") from None
        answer = json.loads(data)
        if "error" in answer:
            raise RequestRefused(answer["error"]["message"], answer["error"]["code"])
        return answer["result"]
