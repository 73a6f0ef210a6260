# SPDX-License-Identifier: Apache-2.0
"""What the caller of ``cuLaunchKernel`` pays, with two builds of the guest library: nanoseconds and instructions of a launch.

    python bench/enqueue_cost.py BEFORE AFTER [--repetitions N] [--instructions] [--out FILE]

BEFORE and AFTER are folders with a ``libcuda.so.1`` (``tools/build_native.py`` leaves one in ``build/native``; a git worktree
makes another). Both run against this checkout's mediator, on the software GPU. The worker is stopped before the launches, so
that nothing but the caller's own work is seen, and the ring takes them all. The builds take turns; a run's time is the
fastest of its batches, for others on the machine only ever make one slower. ``--instructions`` counts them with valgrind.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.append(str(ROOT))

from bench.sides import machine_facts

from tests.e2e.mediator import Guest, Mediator

BATCHES, LAUNCHES = 4, 10000  # 96 bytes each in a ring of 4 MiB; some calls are measured in every batch
BATCHES_COUNTED = 2


def build(folder: Path, library: Path) -> Path:
    """The program, linked with one of the libraries; which one it loads is for the environment to say."""
    out = folder / "enqueue_cost"
    source = ROOT / "bench" / "c" / "enqueue_cost.c"
    subprocess.run(
        ["gcc", "-std=gnu11", "-O2", "-Wall", "-Werror", source, "-o", out, library / "libcuda.so.1"],
        check=True,
    )
    return out


def run(mediator: Mediator, words: list[str], library: Path) -> tuple[list[float], str]:
    """One run: nanoseconds of a launch by batch, and what it wrote to standard error."""
    environment = mediator.environment()
    environment["LD_LIBRARY_PATH"] = str(library)
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    guest = Guest(process)
    try:
        guest.until("ready")
        worker = mediator.session_of(guest)["info"]["worker_pid"]
        os.kill(worker, signal.SIGSTOP)
        try:
            guest.say()
            times = [float(word) for word in guest.line().split()]
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=30)
        finally:
            os.kill(worker, signal.SIGKILL)  # what is in the ring is not to be computed
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    return times, errors


def instructions(mediator: Mediator, program: Path, library: Path, folder: Path) -> float:
    """Instructions of a launch, the loop around it included."""
    out = folder / "callgrind.out"
    words = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--toggle-collect=launch_batch"]
    run(mediator, [*words, str(program), str(BATCHES_COUNTED), str(LAUNCHES)], library)
    found = re.search(r"^(?:summary|totals): (\d+)", out.read_text(), re.MULTILINE)
    if found is None:
        sys.exit("enqueue_cost: valgrind counted nothing")
    return int(found[1]) / (BATCHES_COUNTED * LAUNCHES)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--instructions", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    libraries = {"before": options.before.resolve(), "after": options.after.resolve()}
    times: dict[str, list[float]] = {name: [] for name in libraries}
    counted: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name, Mediator() as mediator:
        program = build(Path(name), libraries["before"])
        for turn in range(options.repetitions):
            for build_name in sorted(libraries, reverse=turn % 2 == 0):
                measured, _ = run(
                    mediator, [str(program), str(BATCHES), str(LAUNCHES)], libraries[build_name]
                )
                times[build_name].append(min(measured))
        if options.instructions:
            for build_name, library in libraries.items():
                counted[build_name] = instructions(mediator, program, library, Path(name))
    differences = [after - before for before, after in zip(times["before"], times["after"], strict=True)]
    result = {
        "machine": machine_facts(),
        "launch_ns": {name: statistics.median(values) for name, values in times.items()},
        "fastest_ns": {name: min(values) for name, values in times.items()},
        "difference_ns": {"median": statistics.median(differences), "all": sorted(differences)},
        "instructions": counted,
    }
    print(json.dumps(result, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
