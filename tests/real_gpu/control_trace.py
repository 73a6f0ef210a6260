# SPDX-License-Identifier: Apache-2.0
"""Step ``trace`` of ``control.py``: launches a second and the time of a small wait, while ``vgpu-trace record`` runs and while not.

One program, in turns: off, on, off, on. A turn's recording is a command of its own, begun before the turn and ended after it.
Where there are processors enough, the program's thread and the worker's replay loop each have one of their own, and everything
else the rest: a new process would else have them moved about, which costs more on a shared host than what is measured.
What "off" costs over a build without any hook is not seen here; bench/trace_cost.py measures that.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.e2e.mediator import wait_until
from vgpu.gpu.trace import EVENT_SIZE

from .control_host import Findings, Host, Scene, open_host, put_apart, spread

COST = 0.05
RECORD_SECONDS = 60
WORKER_EVENTS = 5_000_000  # more than a turn has, so that all of it is recorded


def measure(scene: Scene, found: Findings) -> None:
    """Each recording between two turns without one."""
    with open_host(scene, warm=1) as host, tempfile.TemporaryDirectory(prefix="vgpu-control-") as folder:
        load = host.load(scene, "traced")
        host.settle()
        seconds, count = scene.long(0.6, 0.3), scene.pick(4000, 200)
        load.ask("launch", scene.long(0.5))
        (session,) = host.of_vm("traced")
        places = put_apart([load.pid], [session["info"]["worker_pid"]], [host.pid])
        found.put("processors", places)
        turns: list[dict[str, Any]] = []

        def turn(is_on: bool) -> None:
            launches, taken = load.ask("launch", seconds)
            median, late = load.ask("sync", count)
            rate = launches / (taken / 1e9)
            turns.append(
                {"on": is_on, "launches_per_second": rate, "sync_ns_median": median, "sync_ns_p99": late}
            )
            found.put("turns", turns)

        recorded: list[int] = []
        lost: list[int] = []
        turn(False)
        for number in range(scene.times(16, 3)):
            out = Path(folder) / f"{number}.jsonl"
            with _recording(host, out, places):
                turn(True)
                status = host.ask("trace.status")
                lost.append(status["worker_lost"] + status["worker_missed"])
            recorded.append(_events(out))
            turn(False)
        found.put("events_in_each_recording", recorded)
        found.put("events_lost_in_each_recording", lost)
        _compare(turns, found)
        found.judge("every recording has calls in it", min(recorded) > 0)


def _compare(turns: list[dict[str, Any]], found: Findings) -> None:
    """A turn with a recording against the two around it; those two against each other are the noise."""
    for kind, is_rate in (("launches_per_second", True), ("sync_ns_median", False)):
        costs, noise = [], []
        for number in range(1, len(turns), 2):
            before, on, after = (turns[number + k][kind] for k in (-1, 0, 1))
            off = (before + after) / 2
            costs.append(off / on - 1 if is_rate else on / off - 1)
            noise.append(abs(after - before) / off)
        found.put(
            kind,
            {
                "off": spread([t[kind] for t in turns if not t["on"]]),
                "on": spread([t[kind] for t in turns if t["on"]]),
                "cost_on": spread(costs),
                "noise_between_turns_off": spread(noise),
            },
        )
        found.judge(f"{kind}: on costs at most 5 %", statistics.median(costs) <= COST, of_speed=True)


@contextlib.contextmanager
def _recording(host: Host, out: Path, places: dict[str, list[int]] | None) -> Iterator[None]:
    command = [sys.executable, "-P", "-m", "vgpu.trace_main", "--run-dir", str(host.run_dir), "record"]
    command += [
        f"--seconds={RECORD_SECONDS}",
        "--vm=traced",
        f"--worker-events={WORKER_EVENTS}",
        "--raw",
        "-o",
        str(out),
    ]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ
    )
    if places is not None:
        os.sched_setaffinity(process.pid, places["all else"])
    try:
        wait_until(lambda: _is_recording(host), 20, "it records")
        yield
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 0, said.decode()[-500:]
    finally:
        process.kill()
        process.wait()


def _is_recording(host: Host) -> bool:
    status = host.ask("trace.status")
    return bool(status["recording"] and status["sessions"])


def _events(out: Path) -> int:
    """How many events of the worker a raw recording has."""
    count = 0
    with out.open() as lines:
        for line in lines:
            what = json.loads(line)
            if isinstance(what, list) and what[0] == "worker":
                count += len(base64.b64decode(what[2])) // EVENT_SIZE
    return count
