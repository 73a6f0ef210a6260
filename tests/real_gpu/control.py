# SPDX-License-Identifier: Apache-2.0
"""The control plane on a real GPU, in one short run: ``python -m tests.real_gpu.control [--gpu software] [--only STEP...]``.

    limits    a flooding VM slows to its calls/s and bytes/s; a neighbour's throughput
    changes   weight, priority, pool, rate, quota of running VMs: from the command to the effect
    quota     one number for what is charged, enforced, shown and taken by the driver
    faults    illegal address, killed worker, guest, VM and device, garbage in the ring, hung kernels up to quarantine
    alone     what scheduler, limits and flight recorder cost a VM that is alone
    trace     what recording costs a program
    drift     GPU time as it is charged against NVML's utilisation

Each step has a mediator of its own and a time limit, and fails alone. The record (JSON) is written after every finding. ``kept`` in
it says which promises were seen to hold; nothing is left out when they do not. Exit status 0: all steps ran and all was
kept; 1: not so. On the software GPU only what does not depend on speed means anything.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(folder) for folder in (ROOT, ROOT / "src") if str(folder) not in sys.path]

from bench import sides

from tests.real_gpu import (
    control_alone,
    control_changes,
    control_drift,
    control_faults,
    control_limits,
    control_quota,
    control_trace,
)
from tests.real_gpu.control_host import Findings, Scene, compiled, without_paths

# In order of importance, with what each may take at --seconds 10.
STEPS: dict[str, tuple[Callable[[Scene, Findings], None], float]] = {
    "limits": (control_limits.measure, 75.0),
    "changes": (control_changes.measure, 40.0),
    "quota": (control_quota.measure, 30.0),
    "faults": (control_faults.measure, 60.0),
    "alone": (control_alone.measure, 45.0),
    "trace": (control_trace.measure, 30.0),
    "drift": (control_drift.measure, 20.0),
}
LEAST_SECONDS = 5.0  # of a budget, below which a step is not begun
LEAST_LIMIT_SECONDS = 60.0  # where less is measured, mediators and guests still take their time to start


class OutOfTime(Exception):
    """A step took longer than it may."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise ``OutOfTime`` in the block when so much time has gone by, whatever it waits for."""

    def ring(*_: object) -> None:
        raise OutOfTime(f"not done within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_step(name: str, scene: Scene, findings: Findings, limit: float) -> None:
    """One step; whatever happens in it is in its findings and nowhere else."""
    measure, _ = STEPS[name]
    began = time.monotonic()
    try:
        with limited(limit):
            measure(scene, findings)
    except Exception as error:  # noqa: BLE001 - the other steps are to run
        places = traceback.extract_tb(error.__traceback__)
        where = [f"{Path(place.filename).name}:{place.lineno}" for place in places][-4:]
        words = without_paths(f"{type(error).__name__}: {error}")[-1500:]
        findings.put("trouble", {"what": words, "where": where})
    findings.put("took_seconds", round(time.monotonic() - began, 2))


def broken(values: Any, path: str = "") -> list[str]:
    """Names of promises that were not kept, and of steps in trouble."""
    if not isinstance(values, dict):
        return []
    found = [f"{path}: {name}" for name, good in values.get("kept", {}).items() if not good]
    found += [f"{path}: trouble"] if "trouble" in values else []
    for name, value in values.items():
        found += broken(value, f"{path}/{name}" if path else name)
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", choices=["nvidia", "software"], default="nvidia")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="the longest flood; all else in proportion"
    )
    parser.add_argument(
        "--budget", type=float, help="seconds for everything; a step that would begin later is left out"
    )
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS), metavar="STEP")
    parser.add_argument("--commit", help="what the record shall say; git is asked otherwise")
    parser.add_argument("--out", type=Path, default=Path("control.json"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps."""
    options = parse(arguments)
    began = time.monotonic()
    record: dict[str, Any] = {
        "what": "control plane",
        "device": options.gpu,
        "machine": {**sides.machine_facts(options.commit), "architecture": platform.machine()},
        "settings": {"seconds": options.seconds, "steps": options.only},
        "steps": {},
    }
    unfinished = options.out.with_name(options.out.name + ".new")

    def save() -> None:
        record["seconds"] = round(time.monotonic() - began, 1)
        unfinished.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        os.replace(unfinished, options.out)

    save()
    with compiled() as program:
        scene = Scene(options.gpu, options.seconds / 10, program)
        for name in (name for name in STEPS if name in options.only):
            limit = max(STEPS[name][1] * scene.scale, LEAST_LIMIT_SECONDS)
            left = limit if options.budget is None else options.budget - (time.monotonic() - began)
            values = record["steps"].setdefault(name, {})
            if left < min(limit, LEAST_SECONDS):
                values["trouble"] = {"what": "left out: no time is left", "where": []}
                save()
                continue
            run_step(name, scene, Findings(values, save, scene.is_real), min(limit, left))
            print(f"{name}: {values['took_seconds']} s; not kept: {broken(values) or 'nothing'}", flush=True)
    missed = broken(record["steps"])
    record["not_kept"] = missed
    save()
    print(f"{record['seconds']} s in all; not kept: {', '.join(missed) or 'nothing'}")
    return 1 if missed else 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"the guest program cannot be compiled: {error.stderr.decode()[-1000:]}") from None
