# SPDX-License-Identifier: Apache-2.0
"""The host's end of the agent in a test VM (``tests/vm/agent.py`` has the protocol): commands and their output.

A thread reads what the guest says and sorts it; whoever waits sleeps on one condition. No trio here: a booted machine
is shared by many tests, each of which is a trio run of its own or none.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

COMMAND_SECONDS: Final = 120.0
LINE_SECONDS: Final = 60.0

Command = str | Sequence[str | Path]


@attrs.frozen
class Result:
    """What a command that ended left."""

    status: int  # below 0: the signal it died of
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[str]:
        """Of its standard output."""
        return self.stdout.splitlines()


class Process:
    """A command in the guest."""

    def __init__(self, agent: Agent, number: int, command: str) -> None:
        self._agent, self._number, self.command = agent, number, command
        self.pid: int | None = None
        self.status: int | None = None
        self.failure = ""
        self._data = {1: "", 2: ""}
        self._taken = {1: 0, 2: 0}  # characters that ``line`` or ``take_...`` has given out

    def __repr__(self) -> str:
        return f"<{self.command!r}: pid {self.pid}, status {self.status}>"

    def handle(self, message: dict[str, Any]) -> None:
        """Take in what the guest said about it; the agent's lock is held."""
        kind = message["is"]
        if kind == "started":
            self.pid = message["pid"]
        elif kind == "output":
            self._data[message["stream"]] += message["data"]
        elif kind == "ended":
            self.status = message["status"]
        elif kind == "failed":
            self.failure, self.status = message["why"], 127

    def lost(self) -> None:
        """The machine ended or began anew under it; the agent's lock is held."""
        if self.status is None:
            self.failure, self.status = "the machine ended", -signal.SIGKILL

    def output(self) -> str:
        """Its standard output so far."""
        return self._data[1].encode("latin-1").decode(errors="replace")

    def errors(self) -> str:
        """Its standard error so far."""
        return self._data[2].encode("latin-1").decode(errors="replace")

    def line(self, seconds: float = LINE_SECONDS) -> str:
        """Its next line of output; waits.

        Raises:
            AssertionError: it ended or was silent for too long.
        """

        def ready() -> bool:
            return "\n" in self._data[1][self._taken[1] :] or self.status is not None

        self._agent.wait(ready, seconds, lambda: f"a line of {self}\n{self.errors()}")
        line, newline, _ = self._data[1][self._taken[1] :].partition("\n")
        assert newline, (
            f"{self} ended without a further line: {self.failure}{self.output()[-1000:]}{self.errors()}"
        )
        self._taken[1] += len(line) + 1
        return line.encode("latin-1").decode(errors="replace")

    def until(self, word: str, seconds: float = LINE_SECONDS) -> str:
        """Read lines up to the first that begins with ``word``."""
        while not (line := self.line(seconds)).startswith(word):
            pass
        return line

    def take_output(self) -> bytes:
        """What it has written to its standard output since it was last asked; does not wait."""
        return self._take(1)

    def take_errors(self) -> bytes:
        """The same of its standard error."""
        return self._take(2)

    def _take(self, stream: int) -> bytes:
        text = self._data[stream][self._taken[stream] :]
        self._taken[stream] += len(text)
        return text.encode("latin-1")

    def wait_news(self, seconds: float) -> None:
        """Wait until something is heard of any command, that long at most."""
        self._agent.wait_change(seconds)

    def say(self, text: str = "go") -> None:
        """Send it a line."""
        self.write(f"{text}\n".encode())

    def write(self, data: bytes) -> None:
        """Send it input."""
        self._agent.send({"do": "input", "id": self._number, "data": data.decode("latin-1")})

    def close_input(self) -> None:
        """Its standard input ends here."""
        self._agent.send({"do": "close", "id": self._number})

    def signal(self, number: int) -> None:
        """Send a signal to it and to its children."""
        self._agent.send({"do": "signal", "id": self._number, "number": number})

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self.signal(signal.SIGKILL)
        self.wait(30)

    def wait(self, seconds: float = COMMAND_SECONDS) -> Result:
        """Wait for its end.

        Raises:
            AssertionError: it did not end in time; it has been killed.
        """
        try:
            self._agent.wait(
                lambda: self.status is not None,
                seconds,
                lambda: f"the end of {self}: {self.output()}{self.errors()}",
            )
        except AssertionError:
            self.signal(signal.SIGKILL)
            raise
        assert self.status is not None
        return Result(self.status, self.output(), self.errors() + self.failure)


class Agent:
    """The connection. ``boots`` counts how often a guest has said that it is ready."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._processes: dict[int, Process] = {}
        self._numbers = itertools.count(1)
        self.boots = 0
        self.boot_seconds = 0.0
        self.connected = True
        threading.Thread(target=self._listen, name="vm agent", daemon=True).start()

    def _listen(self) -> None:
        buffer = b""
        while True:
            try:
                data = self._link.recv(1 << 16)
            except OSError:
                data = b""
            *lines, buffer = (buffer + data).split(b"\n")
            with self._changed:
                for line in lines:
                    try:
                        message = json.loads(line)
                    except ValueError:
                        continue  # what a reboot cut short
                    self._sort(message)
                if not data:
                    self.connected = False
                    self._lose_all()
                self._changed.notify_all()
            if not data:
                return

    def _sort(self, message: dict[str, Any]) -> None:
        if message["is"] == "ready":
            self._lose_all()
            self.boots += 1
            self.boot_seconds = message["seconds"]
        elif (process := self._processes.get(message["id"])) is not None:
            process.handle(message)
            if process.status is not None:
                del self._processes[message["id"]]

    def _lose_all(self) -> None:
        for process in self._processes.values():
            process.lost()
        self._processes.clear()

    def wait(self, condition: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
        """Sleep until it is so.

        Raises:
            AssertionError: it was not so in time.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            while not condition():
                left = deadline - time.monotonic()
                assert left > 0, f"not so within {seconds:g} s: {what()}"
                self._changed.wait(min(left, 1.0))

    def wait_change(self, seconds: float) -> None:
        """Sleep until the guest says anything, that long at most."""
        with self._changed:
            self._changed.wait(seconds)

    def send(self, message: dict[str, Any]) -> None:
        """Send one object. A guest that has gone gets nothing."""
        with self._sending:
            try:
                self._link.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                return

    def spawn(
        self,
        command: Command,
        *,
        environment: Mapping[str, str] | None = None,
        folder: str | Path = "/",
        user: int | None = None,
        groups: Sequence[int] = (),
    ) -> Process:
        """Start a command: words, or a line for the shell. ``user``: run as that uid and gid, with these groups besides."""
        words = (
            ["/bin/sh", "-c", command] if isinstance(command, str) else [os.fspath(word) for word in command]
        )
        number = next(self._numbers)
        process = Process(self, number, command if isinstance(command, str) else shlex.join(words))
        with self._changed:
            if not self.connected:
                process.lost()
                return process
            self._processes[number] = process
        self.send(
            {
                "do": "run", "id": number, "command": words, "environment": dict(environment or {}),
                "folder": str(folder), "user": user, "groups": list(groups),
            }
        )  # fmt: skip
        return process

    def running(self) -> list[Process]:
        """The commands that have not ended."""
        with self._changed:
            return list(self._processes.values())

    def close(self) -> None:
        """Hang up."""
        self._link.close()
