# SPDX-License-Identifier: Apache-2.0
"""Counted GPU time against the card's own utilisation, as Prometheus metrics. Windows in, families out.

What NVML does not say has no series: a drift of 0 would be a claim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from prometheus_client.core import GaugeMetricFamily, Metric

from vgpu.gpu.drift import GpuTimeWindow

# Name without prefix, field of GpuTimeWindow, help.
GAUGES: Final = (
    (
        "counted_ratio",
        "counted_ratio",
        "Part of the window with work on the device, as workers count it, summed over sessions.",
    ),
    ("nvml_ratio", "nvml_ratio", "Part of the window in which any kernel ran on the card, as NVML says."),
    (
        "nvml_workers_ratio",
        "workers_ratio",
        "Part of the card's multiprocessor time that our workers used, as NVML says.",
    ),
    (
        "drift_ratio",
        "drift_ratio",
        "Counted (at most 1) less what NVML says, as parts of the window; none where NVML says nothing.",
    ),
)


def gpu_time_families(windows: Mapping[str, tuple[GpuTimeWindow, ...]]) -> Iterator[Metric]:
    """Families by GPU and window (``10s``, ``60s``)."""
    for name, field, text in GAUGES:
        family = GaugeMetricFamily(f"vgpu_gpu_time_{name}", text, labels=("gpu", "window"))
        for gpu, found in windows.items():
            for window in found:
                value = getattr(window, field)
                if value is not None:
                    family.add_metric((gpu, f"{window.seconds:g}s"), value)
        yield family
