# SPDX-License-Identifier: Apache-2.0
"""QEMU's machine protocol, as much as a test needs: a command and its answer, and waiting for an event."""

from __future__ import annotations

import json
import socket
import time
from typing import Any


class QmpError(Exception):
    """QEMU refused a command; the message is QEMU's."""


class Qmp:
    """One connection, which it takes over. Not for several threads at once."""

    def __init__(self, link: socket.socket) -> None:
        self._socket = link
        self._socket.settimeout(60)
        self._buffer = b""
        self.events: list[dict[str, Any]] = []
        self._message()  # the greeting
        self.command("qmp_capabilities")

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _message(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionResetError("QEMU has ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def command(self, name: str, **arguments: Any) -> Any:
        """Its answer. Blocks for 30 seconds at most.

        Raises:
            QmpError: QEMU refused it.
            OSError: QEMU does not answer.
        """
        self._socket.settimeout(60)
        request = {
            "execute": name,
            "arguments": {key.replace("_", "-"): value for key, value in arguments.items()},
        }
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            message = self._message()
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise QmpError(f"{name}: {message['error']['desc']}")
            self.events.append(message)

    def wait_event(self, name: str, seconds: float, **data: Any) -> dict[str, Any]:
        """The first event of that name, with at least this data, that has come or comes in time; it is taken out.

        Raises:
            TimeoutError: it did not come.
        """
        deadline = time.monotonic() + seconds
        while True:
            for event in self.events:
                if event["event"] == name and data.items() <= event.get("data", {}).items():
                    self.events.remove(event)
                    return event
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"QEMU has not said {name} within {seconds:g} s")
            self._socket.settimeout(left)
            self.events.append(self._message())
