# SPDX-License-Identifier: Apache-2.0
"""The two sides of every comparison: the same program natively, and remoted under a mediator started here.

Native means the library path as it is, so the machine's own libcuda. Remoted means the environment that
``vgpu-run`` makes, and nothing else: our libcuda first on the library path, and where the sockets are.
Used by the bench and by tests/real_gpu. It must never let a remoted program reach the real driver by accident,
so it looks in the environment it made for the library a program would get.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

ROOT = Path(__file__).resolve().parent.parent
READY_SECONDS = 90.0
NATIVE, REMOTED = "native", "remoted"


class SideError(Exception):
    """A side could not be set up, or a program failed on it; the message holds its last words."""


def has_nvidia_gpu() -> bool:
    """Whether this machine has an NVIDIA driver."""
    return Path("/dev/nvidiactl").exists()


@attrs.frozen
class Outcome:
    """One run of one program."""

    status: int
    output: str
    errors: str
    seconds: float

    def last_words(self, count: int = 1500) -> str:
        """The end of what it said, for a report."""
        return (self.errors.strip() or self.output.strip())[-count:]

    def json_line(self) -> dict[str, Any]:
        """The last line of its output that is a JSON object.

        Raises:
            SideError: it failed, or printed none.
        """
        if self.status != 0:
            raise SideError(f"exit status {self.status}: {self.last_words()}")
        for line in reversed(self.output.splitlines()):
            if line.startswith("{"):
                found = json.loads(line)
                assert isinstance(found, dict)
                return found
        raise SideError(f"no JSON line in the output: {self.last_words()}")


def run_program(
    command: Sequence[str | Path],
    environment: Mapping[str, str],
    timeout_seconds: float,
    folder: Path | None = None,
) -> Outcome:
    """Run a program to its end, or kill it and what it started after the time limit (status -9)."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            status = -9
            errors.write(f"\nkilled after {timeout_seconds:g} s")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = time.monotonic() - began
        output.seek(0)
        errors.seek(0)
        return Outcome(status, output.read(), errors.read(), seconds)


def native_environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a native run: the one we were given, minus anything of ours."""
    environment = dict(os.environ if base is None else base)
    for name in ("VGPU_RUN_DIR", "VGPU_VM", "PYTHONPATH"):
        environment.pop(name, None)
    if os.environ.get("VGPU_PROGRAM_PYTHONPATH"):  # packages that both sides' programs need
        environment["PYTHONPATH"] = os.environ["VGPU_PROGRAM_PYTHONPATH"]
    return environment


def remoted_environment(run_dir: Path, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """What ``vgpu-run`` would give a program."""
    sys.path.insert(0, str(ROOT / "src"))
    try:
        from vgpu.run_main import guest_environment
    finally:
        sys.path.remove(str(ROOT / "src"))
    environment = guest_environment(native_environment(base), None, run_dir)
    first = Path(environment["LD_LIBRARY_PATH"].split(":")[0])
    if not (first / "libcuda.so.1").resolve().is_relative_to(ROOT):
        raise SideError(f"{first} holds no libcuda.so.1 of ours")
    return environment


def fresh_caches(environment: dict[str, str], folder: Path) -> dict[str, str]:
    """The same environment with empty compile caches in ``folder``, so that neither side lives off the other's."""
    folder.mkdir(parents=True, exist_ok=True)
    places = {
        "CUDA_CACHE_PATH": "cuda",
        "TRITON_CACHE_DIR": "triton",
        "CUPY_CACHE_DIR": "cupy",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "NUMBA_CACHE_DIR": "numba",
    }
    return environment | {name: str(folder / place) for name, place in places.items()}


# ---- the mediator -------------------------------------------------------------------------------------------------


def descendants(root: int) -> dict[int, str]:
    """Process id -> command line of every living process below ``root``."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                if fields[0] != "Z":
                    parents[int(entry.name)] = int(fields[1])
    found: dict[int, str] = {}
    frontier = {root}
    while frontier:
        frontier = {pid for pid, parent in parents.items() if parent in frontier and pid not in found}
        for pid in frontier:
            with contextlib.suppress(OSError):
                found[pid] = (
                    Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
    return found


@attrs.define(eq=False)
class Mediator:
    """A running ``run-mediator``, its run directory and what it wrote."""

    run_dir: Path
    log: Path
    process: subprocess.Popen[bytes]
    ready_seconds: float
    gpu: str

    def environment(self) -> dict[str, str]:
        """The environment of a remoted program."""
        return remoted_environment(self.run_dir)

    def processes(self) -> dict[int, str]:
        """Everything below the mediator."""
        return descendants(self.process.pid)

    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None

    def log_tail(self, count: int = 2000) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-count:] if self.log.exists() else ""


@contextlib.contextmanager
def open_mediator(gpu: str, keep_log: Path | None = None) -> Iterator[Mediator]:
    """Start ``run-mediator`` in a directory of its own, wait until it is ready, and stop it again at the end.

    Raises:
        SideError: it ended or was not ready in time; the message holds the end of its log.
    """
    folder = Path(tempfile.mkdtemp(prefix="vgpu-bench-"))
    run_dir, log = folder / "run", keep_log or folder / "mediator.log"
    run_dir.mkdir(mode=0o700)
    environment = dict(os.environ)
    paths = [str(ROOT / "src"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = ":".join(path for path in paths if path)
    environment["PYTHONUNBUFFERED"] = "1"
    command = [sys.executable, "-P", "-m", "vgpu.mediator_main", "--gpu", gpu]
    command += ["--run-dir", str(run_dir), "--state-dir", str(folder / "state")]
    began = time.monotonic()
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
        )
    started: dict[int, str] = {}
    try:
        while not (run_dir / "mediator.sock").exists():
            if process.poll() is not None or time.monotonic() - began > READY_SECONDS:
                said = log.read_text(errors="replace")[-2000:]
                raise SideError(f"run-mediator is not ready (exit status {process.poll()}): {said}")
            time.sleep(0.02)
        mediator = Mediator(run_dir, log, process, time.monotonic() - began, gpu)
        yield mediator
    finally:
        started |= descendants(process.pid)
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pid, command_line in started.items():  # what outlived it was started by us, so we end it
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode() == command_line:
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


# ---- what the record says of the machine --------------------------------------------------------------------------


def _said_by(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def machine_facts(commit: str | None = None) -> dict[str, Any]:
    """Machine, GPU, driver, date, commit and Python, for the head of a record."""
    cpu = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    gpu = _said_by(
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,pcie.link.gen.current",
        "--format=csv,noheader",
    )
    fields = [field.strip() for field in gpu.splitlines()[0].split(",")] if gpu else []
    described = commit or os.environ.get("VGPU_COMMIT") or _said_by("git", "rev-parse", "HEAD")
    if not commit and described and _said_by("git", "status", "--porcelain", "--untracked-files=no"):
        described += " with changes"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": described or "unknown",
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "gpu": fields[0] if fields else None,
        "driver": fields[1] if len(fields) > 1 else None,
        "gpu_memory": fields[2] if len(fields) > 2 else None,
    }
