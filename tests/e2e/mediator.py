# SPDX-License-Identifier: Apache-2.0
"""A mediator in a process of its own, and the guests that run against it: on the software GPU, unless told otherwise.

Everything a test may ask or do from outside: run a program as a guest, look at the sessions through ``admin.sock``,
kill any of the processes. Nothing is mocked; what stands between the program and its results is the whole system.

With ``VGPU_TEST_GPU=nvidia`` the same tests run on the machine's own GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

START_SECONDS = 60.0
GUEST_SECONDS = 100.0
LINE_SECONDS = 30.0
GPU = os.environ.get("VGPU_TEST_GPU", "software")
PROGRAMS = Path(__file__).resolve().parent / "programs"

Word = str | Path


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Look until it is so.

    Raises:
        AssertionError: it was not so in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not so within {seconds:g} s: {what}")
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Is there a process of that number that has not ended? A zombie has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # the second: it ended between opening and reading
        return False
    return state not in "ZX"


class Guest:
    """A guest program in the background: its lines can be waited for."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []

    def line(self, seconds: float = LINE_SECONDS) -> str:
        """Its next line of output; waits.

        Raises:
            AssertionError: it ended or was silent for too long.
        """
        assert self.process.stdout is not None
        timer = _killer(self.process, seconds)
        line = self.process.stdout.readline()
        timer()
        assert line, f"the guest ended with {self.process.poll()} after {self.lines[-3:]}: {self.errors()}"
        self.lines.append(line.rstrip("\n"))
        return self.lines[-1]

    def until(self, word: str, seconds: float = LINE_SECONDS) -> str:
        """Read lines up to the first that begins with ``word``."""
        while not (line := self.line(seconds)).startswith(word):
            pass
        return line

    def say(self, text: str = "go") -> None:
        """Send it a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def finish(self, seconds: float = GUEST_SECONDS) -> tuple[int, list[str]]:
        """Close its input, wait for its end; its exit status and the rest of its lines."""
        out, _ = self.process.communicate(timeout=seconds)
        rest = out.splitlines()
        self.lines += rest
        return self.process.returncode, rest

    def errors(self) -> str:
        """What it has written to its standard error, once it has ended."""
        assert self.process.stderr is not None
        return self.process.stderr.read() if self.process.poll() is not None else "(still running)"

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()


def _killer(process: subprocess.Popen[str], seconds: float) -> Callable[[], None]:
    """Kill a process that is silent for too long, so that reading from it ends."""
    import threading

    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    return timer.cancel


class Mediator:
    """``run-mediator`` in a short-named directory (socket paths are limited to 107 bytes)."""

    def __init__(self, *, watchdog_seconds: float | None = None, options: Sequence[str] = ()) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vgpu-", dir="/tmp"))
        self.run_dir, self.state_dir = self.folder / "run", self.folder / "state"
        self.log = self.folder / "mediator.log"
        self._options = list(options)
        self._guests: list[Guest] = []
        self._process: subprocess.Popen[bytes] | None = None
        if watchdog_seconds is not None:
            self._register("impatient", watchdog_seconds)

    def _register(self, vm: str, watchdog_seconds: float) -> None:
        """A VM with a watchdog of its own, written while nobody else has the ledger open."""
        import sqlite3

        from vgpu.actors.ledger import LedgerFile

        path = self.state_dir / "ledger.sqlite"
        ledger = LedgerFile(path)
        ledger.ensure_vm(vm)
        ledger.close()
        with contextlib.closing(sqlite3.connect(path)) as database, database:
            database.execute(
                "UPDATE vms SET watchdog_seconds = ?, ad_hoc = 0 WHERE name = ?", (watchdog_seconds, vm)
            )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        for guest in self._guests:
            if guest.process.poll() is None:
                guest.process.kill()
            with contextlib.suppress(ValueError):  # its pipes may be closed already
                guest.process.communicate()
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- the daemon

    def start(self) -> None:
        """Start it and wait until it is ready."""
        command = [sys.executable, "-P", "-m", "vgpu.mediator_main", "--gpu", GPU, *self._options]
        command += ["--run-dir", str(self.run_dir), "--state-dir", str(self.state_dir)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **SMALL}
            )
        try:
            wait_until(self._is_ready, START_SECONDS, "the mediator is ready")
        except BaseException:
            self.stop()
            raise

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"the mediator ended: {self.log.read_text()}"
        with contextlib.suppress(OSError):
            return bool(self.ask("health")["ok"])
        return False

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL the daemon alone."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """End it and every worker."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for pid in self.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # -- looking

    def ask(self, method: str) -> Any:
        """One JSON-RPC question on ``admin.sock``."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(60)
            link.connect(str(self.run_dir / "admin.sock"))
            link.sendall(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method}).encode() + b"\n")
            data = b""
            while not data.endswith(b"\n"):
                more = link.recv(1 << 16)
                if not more:
                    raise ConnectionResetError("the mediator hung up")
                data += more
        answer = json.loads(data)
        assert "result" in answer, answer
        return answer["result"]

    def sessions(self) -> list[dict[str, Any]]:
        """Samples of the living sessions."""
        return [sample for sample in self.ask("sessions") if not sample["ended"]]

    def session_of(self, guest: Guest) -> dict[str, Any]:
        """The living session of a guest."""
        (found,) = [s for s in self.sessions() if s["info"]["guest_pid"] == guest.process.pid]
        return found

    def worker_of(self, guest: Guest) -> int:
        """The worker process of a guest's living session."""
        return int(self.session_of(guest)["info"]["worker_pid"])

    def workers(self) -> list[int]:
        """Worker processes of this mediator and of its predecessors that live."""
        marker = str(self.run_dir).encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if b"vgpu.gpu.worker" in words and marker in words and is_alive(int(entry.name)):
                    found.append(int(entry.name))
        return found

    # -- guests

    def environment(self, vm: str | None = None, **extra: str) -> dict[str, str]:
        """The environment of a guest, as ``vgpu-run`` makes it."""
        from vgpu.run_main import guest_environment

        base = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "VGPU_"))}
        base["CUDA_CACHE_PATH"] = str(self.folder / "jit")
        return guest_environment({**base, **extra}, vm, self.run_dir)

    def run(self, *command: Word, vm: str | None = None, **environment: str) -> list[str]:
        """Run a program to its end as a guest; its lines. It must succeed and write nothing to standard error."""
        words = [sys.executable, "-P", "-m", "vgpu.run_main", "--run-dir", str(self.run_dir)]
        words += ["--vm", vm] if vm else []
        done = subprocess.run(
            [*words, "--", *map(str, command)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=GUEST_SECONDS, check=False,
            env={**self._plain(), "CUDA_CACHE_PATH": str(self.folder / "jit"), **environment},
        )  # fmt: skip
        assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.logs()}"
        assert done.stderr == ""
        return done.stdout.splitlines()

    @staticmethod
    def _plain() -> Mapping[str, str]:
        return {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "VGPU_"))}

    def begin(self, *command: Word, vm: str | None = None, **environment: str) -> Guest:
        """Start a program as a guest in the background."""
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=self.environment(vm, **environment),
        )  # fmt: skip
        guest = Guest(process)
        self._guests.append(guest)
        return guest

    def logs(self) -> str:
        """The ends of all logs, for a failed assertion."""
        return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in self._log_files())

    def _log_files(self) -> Iterator[Path]:
        yield self.log
        yield from sorted((self.run_dir / "workers").glob("*.log"))


# A device that leaves room for several on a small machine.
SMALL = {"VGPU_SOFTWARE_MEMORY": str(1 << 30)}
