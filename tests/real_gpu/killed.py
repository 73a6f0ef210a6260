# SPDX-License-Identifier: Apache-2.0
"""A process killed with SIGKILL in the middle of a call: its GPU memory and its worker must be gone in two seconds."""

from __future__ import annotations

import contextlib
import importlib
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import sides
from bench.sides import NATIVE, Mediator, SideError

LIMIT_SECONDS = 2.0
HELD_BYTES = 8 << 30


class GpuMemory:
    """Bytes in use on GPU 0 and who holds them, from NVML; a program's own view would be the shim's."""

    def __init__(self) -> None:
        self._nvml: Any = importlib.import_module(
            "pynvml"
        )  # not a dependency: only a machine with a GPU has it
        self._nvml.nvmlInit()
        self._gpu = self._nvml.nvmlDeviceGetHandleByIndex(0)

    def used(self) -> int:
        """Bytes in use by everybody."""
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._gpu).used)

    def holders(self) -> dict[int, int]:
        """Process id -> bytes, where the machine tells."""
        with contextlib.suppress(self._nvml.NVMLError):
            running = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._gpu)
            return {one.pid: int(one.usedGpuMemory or 0) for one in running}
        return {}


def _wait_for_ready(process: subprocess.Popen[str], limit_seconds: float) -> None:
    assert process.stdout is not None
    timer = time.monotonic() + limit_seconds
    line = process.stdout.readline()
    if line.strip() != "READY" or time.monotonic() > timer:
        raise SideError(f"the program said {line!r} and not READY")


def record(
    side: str, compile_cuda: Callable[[str, Path, str, str], Path], build: Path, mediator: Mediator | None
) -> dict[str, Any]:
    """Start it, let it get into the endless kernel's wait, kill it, and measure what stays for how long."""
    result: dict[str, Any] = {"name": f"killed in mid-call, {side}", "passed": False}
    try:
        memory = GpuMemory()
        program = compile_cuda("spin_forever", build, "static", "sass")
        environment = sides.native_environment()
        if side != NATIVE:
            assert mediator is not None
            environment = mediator.environment()
        before = memory.used()
        workers_before = set(mediator.processes()) if mediator else set()
        process = subprocess.Popen(
            [str(program)], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        try:
            _wait_for_ready(process, 60)
            time.sleep(0.3)  # well inside the wait for a kernel that never ends
            during, holders = memory.used(), memory.holders()
            workers = set(mediator.processes()) if mediator else set()
            process.send_signal(signal.SIGKILL)
            killed = time.monotonic()
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if during - before < HELD_BYTES:
            raise SideError(f"the program held {(during - before) >> 20} MiB only")
        # Another warm worker may have come up meanwhile, with a context of its own: allow for 1 GiB.
        free_after = None
        while time.monotonic() - killed < 10:
            if memory.used() - before < 1 << 30:
                free_after = time.monotonic() - killed
                break
            time.sleep(0.005)
        gone_after = None
        if mediator is not None and side != NATIVE:
            large = {pid for pid, size in holders.items() if size > HELD_BYTES}
            result["worker_known_by"] = "NVML" if large else "the set of processes"
            while gone_after is None and time.monotonic() - killed < 10:
                living = set(mediator.processes())
                if not (large & living) and (large or (workers | workers_before) - living):
                    gone_after = time.monotonic() - killed
                time.sleep(0.005)
            result["worker_gone_seconds"] = gone_after
        result["memory_free_seconds"] = free_after
        result["held_mib"] = (during - before) >> 20
        result["passed"] = free_after is not None and free_after < LIMIT_SECONDS
        if side != NATIVE:
            result["passed"] = result["passed"] and gone_after is not None and gone_after < LIMIT_SECONDS
    except (SideError, ImportError, OSError) as error:
        result["skipped"] = str(error)[-600:]
    return result
