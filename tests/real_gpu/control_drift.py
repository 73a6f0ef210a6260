# SPDX-License-Identifier: Apache-2.0
"""Step ``drift`` of ``control.py``: GPU time as it is charged, against what NVML says of the card.

A program keeps the GPU busy, then leaves it alone. Meanwhile the workers' own count (``gpu_ns``, by the host's clock)
is compared with NVML's utilisation over the same time, and with what the mediator itself says of the drift (docs/scheduling.md,
Drift): it measures that once a second and only while somebody looks, so the metrics are read all the while. The busy stretch begins
and ends in the middle of the work, where NVML's late sampling does not matter. Then two programs share it, and what their leases were
charged is compared with what the device's own clock says of them.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from .control_host import Findings, Host, Load, Scene, open_host

LOOK_SECONDS = 0.1
METRICS_SECONDS = 1.0
DRIFT = 0.1


def measure(scene: Scene, found: Findings) -> None:
    """Busy, then idle."""
    with open_host(scene, warm=1) as host:
        load = host.load(scene, "busy")
        host.settle()
        iterations, batch = scene.pick(20_000, 100), scene.pick(4, 1)
        seconds = scene.long(5.0, 1.0)
        load.ask("greedy", scene.long(1.0), iterations, batch)
        load.say("greedy", seconds + 2.0, iterations, batch)
        host.ask("gpu_time")  # from here on counted time and NVML's are looked at, once a second
        time.sleep(1.2)  # NVML tells of the last second
        busy = _watched(host, load, seconds)
        found.put("busy", busy)
        found.judge("the drift is a metric", busy["drift_metric"] is not None)
        drift = busy["drift_metric"]
        found.judge("the drift is at most a tenth", drift is not None and abs(drift) <= DRIFT, of_speed=True)
        load.answer(seconds + 30)
        found.put("idle", _watched(host, load, scene.long(2.0, 0.5)))
        _timed(scene, found, host, [load, host.load(scene, "other")])


def _timed(scene: Scene, found: Findings, host: Host, loads: list[Load]) -> None:
    """Both at once: leases by the clock that they are charged by, and by the device's."""
    names = ("timed_leases", "timed_charged_ns", "timed_device_ns")

    def told() -> list[dict[str, int]]:
        return [{n: int(host.session_of(load.guest)["grant"][n]) for n in names} for load in loads]

    before = told()
    seconds, (iterations, batch) = scene.long(4.0, 1.0), (scene.pick(20_000, 100), scene.pick(4, 1))
    for load in loads:
        load.say("greedy", seconds, iterations, batch)
    for load in loads:
        load.answer(seconds + 30)
    rises = [{n: then[n] - first[n] for n in names} for first, then in zip(before, told(), strict=True)]
    ratios = [r["timed_device_ns"] / r["timed_charged_ns"] if r["timed_charged_ns"] else None for r in rises]
    found.put("shared", {"seconds": seconds, "sessions": rises, "device_of_charged": ratios})
    found.judge("leases are timed by the device's clock", all(r["timed_leases"] > 0 for r in rises))
    near = all(ratio is not None and 0.9 <= ratio <= 1.01 for ratio in ratios)
    found.judge("the device's clock agrees to a tenth", near, of_speed=True)


def _watched(host: Host, load: Load, seconds: float) -> dict[str, Any]:
    """Both sides over so many seconds; drift metrics at their end."""

    def charged() -> tuple[float, int]:
        return time.monotonic(), int(host.session_of(load.guest)["grant"]["gpu_ns"])

    host.metrics()  # from now on it is measured
    first = charged()
    looked = first[0]
    seen: list[float] = []
    while (now := time.monotonic()) < first[0] + seconds:
        percent = host.ask("gpu").get("gpu_utilization_percent")
        if isinstance(percent, int | float):
            seen.append(float(percent) / 100)
        if now > looked + METRICS_SECONDS:
            host.metrics()
            looked = now
        time.sleep(LOOK_SECONDS)
    last = charged()
    ours = (last[1] - first[1]) / 1e9 / (last[0] - first[0])
    theirs = statistics.mean(seen) if seen else None
    lines = [line.rsplit(" ", 1) for line in host.metrics().splitlines() if line.startswith("vgpu_gpu_time_")]
    exported = {name: float(value) for name, value in lines}
    drifts = [value for name, value in exported.items() if "drift" in name and 'window="10s"' in name]
    return {
        "seconds": last[0] - first[0],
        "charged_ratio": ours,
        "nvml_ratio": theirs,
        "difference": None if theirs is None else ours - theirs,
        "exported": exported,
        "drift_metric": drifts[0] if drifts else None,
    }
