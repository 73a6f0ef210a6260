# SPDX-License-Identifier: Apache-2.0
"""Step ``drift`` of ``control.py``: GPU time as it is charged, against what NVML says of the card.

A program keeps the GPU busy, then leaves it alone. Meanwhile the workers' own count (``gpu_ns``, from events around their work)
is compared with NVML's utilisation over the same time, and whatever the mediator exports under the name of drift is written down.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from .control_host import Findings, Host, Load, Scene, open_host

LOOK_SECONDS = 0.1


def measure(scene: Scene, found: Findings) -> None:
    """Busy, then idle."""
    with open_host(scene, warm=1) as host:
        load = host.load(scene, "busy")
        host.settle()
        iterations, batch = scene.pick(20_000, 100), scene.pick(4, 1)
        seconds = scene.long(5.0, 1.0)
        load.ask("greedy", scene.long(1.0), iterations, batch)
        load.say("greedy", seconds + 2.0, iterations, batch)
        time.sleep(1.2)  # NVML tells of the last second
        busy = _watched(host, load, seconds)
        found.put("busy", busy)
        found.judge("the drift is a metric", busy["is_exported"])
        load.answer(seconds + 30)
        found.put("idle", _watched(host, load, scene.long(2.0, 0.5)))


def _watched(host: Host, load: Load, seconds: float) -> dict[str, Any]:
    """Both sides over so many seconds; drift metrics at their end."""

    def charged() -> tuple[float, int]:
        return time.monotonic(), int(host.session_of(load.guest)["grant"]["gpu_ns"])

    first = charged()
    seen: list[float] = []
    while time.monotonic() < first[0] + seconds:
        ratio = host.ask("gpu").get("gpu_utilization_percent")
        if isinstance(ratio, int | float):
            seen.append(float(ratio) / 100)
        time.sleep(LOOK_SECONDS)
    last = charged()
    ours = (last[1] - first[1]) / 1e9 / (last[0] - first[0])
    theirs = statistics.mean(seen) if seen else None
    exported = [line for line in host.metrics().splitlines() if "drift" in line and not line.startswith("#")]
    return {
        "seconds": last[0] - first[0],
        "charged_ratio": ours,
        "nvml_ratio": theirs,
        "difference": None if theirs is None else ours - theirs,
        "exported_metrics": exported,
        "is_exported": bool(exported),
    }
