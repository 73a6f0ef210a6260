# SPDX-License-Identifier: Apache-2.0
"""What is measured, in which unit, and what was promised; and how samples become a row of the table. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from bench.sides import NATIVE, REMOTED


@attrs.frozen
class Metric:
    """One row. A target is either for the remoted value itself or for remoted divided by native."""

    name: str
    label: str
    unit: str
    at_most: float | None = None
    at_least: float | None = None
    ratio_at_most: float | None = None
    ratio_at_least: float | None = None

    def target(self) -> str:
        """The promise, in words."""
        for sign, value, kind in (
            ("≤", self.at_most, f" {self.unit}"),
            ("≥", self.at_least, f" {self.unit}"),
            ("≤", self.ratio_at_most, " × native"),
            ("≥", self.ratio_at_least, " × native"),
        ):
            if value is not None:
                return f"{sign} {value:g}{kind}"
        return ""

    def met(self, native: float | None, remoted: float | None) -> bool | None:
        """Whether the promise was kept; None without a promise or without what it needs."""
        if remoted is None:
            return None
        if self.at_most is not None:
            return remoted <= self.at_most
        if self.at_least is not None:
            return remoted >= self.at_least
        if not native:
            return None
        if self.ratio_at_most is not None:
            return remoted / native <= self.ratio_at_most
        if self.ratio_at_least is not None:
            return remoted / native >= self.ratio_at_least
        return None


def _copies() -> list[Metric]:
    rows = []
    for kind, sizes, promised, ratio in (
        ("pinned", (4, 16, 64, 256, 1024), 16, 0.985),
        ("pageable", (4, 64, 256, 1024), 64, 1.0),
    ):
        for size in sizes:
            for way, words in (("htod", "to the device"), ("dtoh", "from the device")):
                target = ratio if size >= promised else None
                label = f"{kind} copy {words}, {size} MiB"
                rows.append(Metric(f"{kind}_{way}_{size}mib_gbs", label, "GB/s", ratio_at_least=target))
    return rows


METRICS = [
    Metric("launch_ns_p50", "cuLaunchKernel, caller's time, p50", "ns", at_most=100),
    Metric("launch_ns_p99", "cuLaunchKernel, caller's time, p99", "ns", at_most=1000),
    Metric("sustained_launches_per_s", "sustained launches", "1/s", ratio_at_least=0.97),
    Metric("launch_sync_us_p50", "launch + stream synchronize, p50", "µs", ratio_at_most=1.05),
    Metric("launch_sync_us_p99", "launch + stream synchronize, p99", "µs"),
    Metric("launch_ctx_sync_us_p50", "launch + context synchronize, p50", "µs"),
    Metric("dtoh_4b_us_p50", "cuMemcpyDtoH of 4 bytes, p50", "µs", ratio_at_most=1.05),
    Metric("htod_4b_us_p50", "cuMemcpyHtoD of 4 bytes, p50", "µs"),
    Metric("event_sync_us_p50", "event record + synchronize, p50", "µs"),
    Metric("memset_async_ns_p50", "cuMemsetD8Async, caller's time, p50", "ns"),
    Metric("htod_async_64b_ns_p50", "cuMemcpyHtoDAsync of 64 pageable bytes, caller's time, p50", "ns"),
    Metric("htod_async_pinned_4k_ns_p50", "cuMemcpyHtoDAsync of 4 KiB pinned, caller's time, p50", "ns"),
    Metric("dtoh_async_pinned_4k_ns_p50", "cuMemcpyDtoHAsync of 4 KiB pinned, caller's time, p50", "ns"),
    Metric("event_record_ns_p50", "cuEventRecord, caller's time, p50", "ns"),
    *_copies(),
    Metric("local_ring_bytes", "ring bytes written by all the local queries below", "B", at_most=0),
    Metric("local_ctx_get_current_ns", "cuCtxGetCurrent", "ns"),
    Metric("local_ctx_get_device_ns", "cuCtxGetDevice", "ns"),
    Metric("local_device_get_attribute_ns", "cuDeviceGetAttribute", "ns"),
    Metric("local_primary_ctx_get_state_ns", "cuDevicePrimaryCtxGetState", "ns"),
    Metric("local_func_get_attribute_ns", "cuFuncGetAttribute", "ns"),
    Metric("stream_query_us_p50", "cuStreamQuery, idle stream (a round trip when remoted), p50", "µs"),
    Metric("alloc_free_us_p50", "cuMemAlloc + cuMemFree of 4 KiB, p50", "µs"),
    Metric("launch_record_bytes", "ring bytes of one launch with 16 bytes of parameters", "B"),
    Metric("start_to_first_result_ms", "process start to first result", "ms", ratio_at_most=1.3),
    Metric(
        "decode_tokens_per_s",
        "PyTorch eager greedy decode, Llama-shaped, fp16",
        "tokens/s",
        ratio_at_least=1.0,
    ),
    Metric("llama_1b_graphs_on", "llama.cpp decode, 1b q8_0, graphs on", "tokens/s", ratio_at_least=0.98),
    Metric("llama_1b_graphs_off", "llama.cpp decode, 1b q8_0, graphs off", "tokens/s", ratio_at_least=1.0),
    Metric("llama_tiny_graphs_on", "llama.cpp decode, tiny q8_0, graphs on", "tokens/s", ratio_at_least=0.90),
    Metric(
        "llama_tiny_graphs_off", "llama.cpp decode, tiny q8_0, graphs off", "tokens/s", ratio_at_least=1.0
    ),
    Metric("llama_1b_prompt", "llama.cpp prompt of 512 tokens, 1b q8_0, graphs on", "tokens/s"),
]


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Median, least, most and all samples, in the order in which they were taken."""
    return {
        "median": statistics.median(samples),
        "min": min(samples),
        "max": max(samples),
        "samples": [float(f"{value:.6g}") for value in samples],
    }


def rows(
    samples: Mapping[str, Mapping[str, Sequence[float]]], *, promised: bool = True
) -> dict[str, dict[str, Any]]:
    """Metric name -> what was measured on each side, the ratio, the promise and whether it was kept.

    ``samples`` is side -> metric name -> values. Metrics nobody measured are left out; a measured value without a row
    in METRICS is an error, or it would be lost silently.
    """
    known = {metric.name for metric in METRICS}
    found: dict[str, dict[str, Any]] = {}
    for metric in METRICS:
        row: dict[str, Any] = {"label": metric.label, "unit": metric.unit}
        for side in (NATIVE, REMOTED):
            if samples.get(side, {}).get(metric.name):
                row[side] = spread(samples[side][metric.name])
        if NATIVE not in row and REMOTED not in row:
            continue
        native = row[NATIVE]["median"] if NATIVE in row else None
        remoted = row[REMOTED]["median"] if REMOTED in row else None
        if native and remoted is not None:
            row["ratio"] = float(f"{remoted / native:.4g}")
        if metric.target() and (promised or metric.name == "local_ring_bytes"):
            row["target"], row["met"] = metric.target(), metric.met(native, remoted)
        found[metric.name] = row
    unknown = {name for side in samples.values() for name in side} - known
    # Quantiles come in pairs, and not every p99 has a row of its own.
    lost = {name for name in unknown if not name.endswith(("_p99", "_ms"))}
    if lost:
        raise ValueError(f"measured but without a row in METRICS: {', '.join(sorted(lost))}")
    return found


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _cell(row: Mapping[str, Any], side: str) -> str:
    if side not in row:
        return "-"
    of = row[side]
    return f"{_number(of['median'])} ({_number(of['min'])}..{_number(of['max'])})"


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows as text: median (least..most) of each side, ratio, promise, kept or not."""
    lines = [("", "unit", "native", "remoted", "ratio", "target", "")]
    for row in found.values():
        met = {True: "yes", False: "NO", None: ""}[row.get("met")]
        ratio = f"{row['ratio']:.3f}" if "ratio" in row else ""
        lines.append(
            (
                row["label"],
                row["unit"],
                _cell(row, NATIVE),
                _cell(row, REMOTED),
                ratio,
                row.get("target", ""),
                met,
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(7)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
