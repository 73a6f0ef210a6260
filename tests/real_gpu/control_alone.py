# SPDX-License-Identifier: Apache-2.0
"""Step ``alone`` of ``control.py``: what scheduler, limits and flight recorder cost a VM that nobody contends with.

There is no switch for them, so the same program runs beside itself on hosts that lack them, in turns of a quarter of a second:

- *whole*: a mediator with all its actors;
- *bare*: a worker alone under a lease that never ends (``control_bare.py``): no scheduler, account, watchdog, telemetry;
- *bare again*: a second one of these, for by how much two processes of one kind differ;
- *no recorder*: bare, and its worker compiled from the same sources without the flight recorder's stores.

Compared are launches a second and the time of an empty kernel with its wait, each turn with those beside it; a cost is the
median of what single rounds say. Only one program runs at a time, all of them on one processor and their workers on another.
A shared machine moves single rounds by more than what is asked about, so the judgement is whether a cost can be told from half a percent,
and from what two of a kind differ by: it can where the whole interval that the true median lies in, with 95 % confidence, is above both
(order statistics).
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.e2e.mediator import Guest
from vgpu.run_main import guest_environment

from .control_host import (
    Findings,
    Load,
    Scene,
    busiest_descendant,
    open_host,
    put_apart,
    spread,
    without_paths,
)

ROOT = Path(__file__).resolve().parents[2]
COST = 0.005
BUILD_SECONDS = 100.0
SOURCES = ("CMakeLists.txt", "actors", "gpu", "shim", "src", "supervision", "tools", "transport")
WITHOUT_RECORDER = """
#define replay_flight_begin(flight, call, now) ((void)(flight))
#define replay_flight_end(flight, status) ((void)(flight))
"""


def measure(scene: Scene, found: Findings) -> None:
    """Rounds over all of them."""
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(open_host(scene, warm=1))
        loads, servers = {"whole": host.load(scene, "alone")}, []
        for name in ("bare", "bare again"):
            loads[name], server = stack.enter_context(_bare(scene, ROOT / "src"))
            servers.append(server)
        try:
            copy = stack.enter_context(_without_recorder())
            loads["no recorder"], server = stack.enter_context(_bare(scene, copy))
            servers.append(server)
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            words = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
            found.put("no recorder", f"not measured: {without_paths(str(words))[-600:]}")
        host.settle()
        samples: dict[str, dict[str, list[float]]] = {
            name: {"launches_per_second": [], "sync_ns_median": [], "sync_ns_p99": []} for name in loads
        }
        seconds, count = scene.long(0.25, 0.1), scene.pick(4000, 200)
        for load in loads.values():
            load.ask("launch", scene.long(0.5))
        (session,) = host.of_vm("alone")
        workers = [session["info"]["worker_pid"], *map(busiest_descendant, servers)]
        found.put("processors", put_apart([load.pid for load in loads.values()], workers, [host.pid]))
        for number in range(scene.times(40, 2)):
            for name in list(loads) if number % 2 == 0 else reversed(loads):
                launches, taken = loads[name].ask("launch", seconds)
                median, late = loads[name].ask("sync", count)
                samples[name]["launches_per_second"].append(launches / (taken / 1e9))
                samples[name]["sync_ns_median"].append(median)
                samples[name]["sync_ns_p99"].append(late)
        found.put(
            "samples", {name: {k: spread(v) for k, v in kinds.items()} for name, kinds in samples.items()}
        )
        pairs = (
            ("whole", "bare"),
            ("bare again", "bare"),
            ("bare", "no recorder"),
            ("whole", "no recorder"),
        )
        for one, other in pairs:
            if one in samples and other in samples:
                costs = cost(samples[one], samples[other])
                found.put(f"{one} over {other}", costs)
        words = "no recorder" if "no recorder" in samples else "bare"
        for kind, values in found.values[f"whole over {words}"].items():
            among_like = abs(found.values["bare again over bare"][kind]["median"])
            found.judge(
                f"{kind} not measurably over 0.5 % of {words}",
                values["interval"][0] <= max(COST, among_like),
                of_speed=True,
            )


def cost(one: dict[str, list[float]], other: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """By how much the first is slower than the second, as a part of the second, round by round."""
    rates = zip(one["launches_per_second"], other["launches_per_second"], strict=True)
    waits = zip(one["sync_ns_median"], other["sync_ns_median"], strict=True)
    found = {}
    for name, parts in (("launch", [b / a - 1 for a, b in rates]), ("sync", [a / b - 1 for a, b in waits])):
        quarters = statistics.quantiles(parts, n=4) if len(parts) > 1 else [parts[0]] * 3
        found[name] = {
            "median": statistics.median(parts),
            "quartiles": [quarters[0], quarters[2]],
            "interval": interval_of_median(parts),
        }
    return found


def interval_of_median(values: list[float], confidence: float = 0.95) -> list[float]:
    """Between which two values the median of what they were drawn from lies, with that confidence at least.

    Order statistics: the binomial distribution of how many lie below it (Conover, Practical Nonparametric Statistics, 3.2).
    """
    ordered, count = sorted(values), len(values)
    below, outside = 0, 0.0
    for number in range(count // 2):
        outside += 2 * math.comb(count, number) / 2**count
        if outside > 1 - confidence:
            break
        below = number + 1
    return [ordered[max(below - 1, 0)], ordered[count - max(below, 1)]]


@contextlib.contextmanager
def _bare(scene: Scene, sources: Path) -> Iterator[tuple[Load, int]]:
    """The guest of a host without a control plane, whose worker is of these sources, and the host's process number."""
    with tempfile.TemporaryDirectory(prefix="vgpu-", dir="/tmp") as folder:
        run_dir = Path(folder) / "run"
        paths = [str(sources), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": ":".join(path for path in paths if path)}
        environment["VGPU_SOFTWARE_MEMORY"] = str(1 << 30)
        command = [sys.executable, "-P", "-m", "tests.real_gpu.control_bare", "--run-dir", str(run_dir)]
        server = subprocess.Popen(
            [*command, "--gpu", scene.gpu],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        guest: subprocess.Popen[str] | None = None
        try:
            assert Guest(server).line(60) == "ready"
            base = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA_", "VGPU_"))}
            guest = subprocess.Popen(
                [str(scene.program)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=guest_environment(base, "bare", run_dir),
            )
            yield Load(Guest(guest)), server.pid
        finally:
            if guest is not None:  # its end is its worker's
                guest.kill()
                guest.communicate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(3)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.communicate()


@contextlib.contextmanager
def _without_recorder() -> Iterator[Path]:
    """The folder of a package whose worker has no flight recorder.

    Raises:
        subprocess.SubprocessError: it cannot be built.
    """
    with tempfile.TemporaryDirectory(prefix="vgpu-control-") as folder:
        copy = Path(folder)
        leave = shutil.ignore_patterns("__pycache__", "*.so", "*.so.1", "build")
        for name in SOURCES:
            place = ROOT / name
            if place.is_dir():
                shutil.copytree(place, copy / name, symlinks=True, ignore=leave)
            else:
                shutil.copy(place, copy / name)
        header = copy / "gpu" / "replay" / "flight.h"
        header.write_text(header.read_text() + WITHOUT_RECORDER)
        subprocess.run(
            [sys.executable, str(copy / "tools" / "build_native.py"), "--only", "_replay"],
            check=True, capture_output=True, text=True, timeout=BUILD_SECONDS,
        )  # fmt: skip
        yield copy / "src"
