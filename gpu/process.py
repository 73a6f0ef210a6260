# SPDX-License-Identifier: Apache-2.0
"""Start and stop worker processes from trio.

A worker is spawned (a fresh interpreter, never a fork of this one) in a session of its own, so that a
signal meant for the mediator does not reach it, and is reached over its socket afterwards, by us or by our successor.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import attrs
import trio

from vgpu.transport.errors import RemoteProtocolError

from .control import open_worker_link

WARM_SECONDS = 60.0
LOOK_SECONDS = 0.01
LOG_TAIL_BYTES = 2000


class WorkerNotStarted(OSError):
    """The worker ended, or did not answer in time; the message has the end of its log."""


@attrs.frozen
class WorkerOptions:
    """What every worker of one GPU is started with."""

    run_dir: Path
    gpu: str  # "nvidia" or "software"
    device: int = 0
    library: Path | None = None
    arena_bytes: int | None = None
    registered_bytes: int | None = None
    spin_us: int | None = None
    address: int | None = None
    turn: Path | None = None  # the GPU's turn word, where it is not the run directory's by device number

    def command(self, worker: str) -> list[str]:
        """The command line of a worker of that name."""
        words = [sys.executable, "-P", "-m", "vgpu.gpu.worker"]
        words += [
            "--run-dir",
            str(self.run_dir),
            "--id",
            worker,
            "--gpu",
            self.gpu,
            "--device",
            str(self.device),
        ]
        for option, value in (
            ("--library", self.library),
            ("--arena-bytes", self.arena_bytes),
            ("--registered-bytes", self.registered_bytes),
            ("--spin-us", self.spin_us),
            ("--address", self.address),
            ("--turn", self.turn),
        ):
            if value is not None:
                words += [option, str(value)]
        return words

    def socket_path(self, worker: str) -> Path:
        """Where a worker of that name listens."""
        return self.run_dir / "workers" / f"{worker}.sock"


@attrs.define(eq=False)
class WorkerProcess:
    """A worker that is our child. Dropping this object does not end it."""

    _process: trio.Process

    @property
    def pid(self) -> int:
        """Its process id, valid until ``wait`` has returned."""
        return self._process.pid

    async def wait(self) -> int:
        """Wait until it ends and reap it; its exit status. Cancellation leaves it alone."""
        return await self._process.wait()

    def kill(self) -> None:
        """SIGKILL: the GPU is free within a tenth of a second. Nothing happens if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()


async def start_worker(
    options: WorkerOptions, worker: str, *, timeout_seconds: float = WARM_SECONDS
) -> tuple[WorkerProcess, str]:
    """Start a worker and wait until it is warm; the process, and the path of its socket.

    Cancelled or failed, it leaves no process behind.

    Raises:
        WorkerNotStarted: it ended, or was not warm in time.
    """
    folder = options.run_dir / "workers"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = folder / f"{worker}.log"
    path = options.socket_path(worker)
    with log.open("wb") as output:
        process = WorkerProcess(
            await trio.lowlevel.open_process(
                options.command(worker),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        )
    try:
        with trio.move_on_after(timeout_seconds):
            while not await _answers(path):
                if process._process.poll() is not None:
                    raise WorkerNotStarted(
                        f"worker {worker} ended with {process._process.poll()}: {_tail(log)}"
                    )
                await trio.sleep(LOOK_SECONDS)
            return process, str(path)
        raise WorkerNotStarted(f"worker {worker} was not warm in {timeout_seconds} s: {_tail(log)}")
    except BaseException:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        path.unlink(missing_ok=True)
        raise


async def _answers(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        link = await open_worker_link(str(path))
    except (OSError, RemoteProtocolError):
        return False
    await link.aclose()
    return True


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_TAIL_BYTES))
        return file.read().decode("utf-8", "replace").strip()
