# SPDX-License-Identifier: Apache-2.0
"""Draw the figures of docs/scheduling.md from the simulator.

    python tools/schedule_figures.py [--out docs/figures]

Needs matplotlib, which nothing else here does. Deterministic: the same code draws the same curves.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "src"))

import attrs

from vgpu.gpu.simulate import Load, Outcome, Scenario, simulate

US, MS, SECOND = 1_000, 1_000_000, 1_000_000_000


def real(scenario: Scenario) -> Scenario:
    """With messages of the control plane and the device between two contexts as measured on an H200."""
    return attrs.evolve(scenario, message_ns=200 * US, switch_ns=70 * US)


def shares(axes: Any) -> None:
    """Shares over time, unequal kernels."""
    loads = (
        Load("a: 60, 1 ms kernels", 60, "p", kernel_ns=MS),
        Load("b: 40, 20 µs kernels", 40, "p", kernel_ns=20 * US),
    )
    late = Load("c: other pool, from 1 s", 10, "q", kernel_ns=100 * US, start_ns=SECOND)
    outcome = simulate(real(Scenario((*loads, late), 3 * SECOND, {"p": 50, "q": 50}, sample_ns=50 * MS)))
    window = 4
    for vm in outcome.vms:
        points = []
        for (_, before, _), (time, after, _) in zip(outcome.samples, outcome.samples[window:], strict=False):
            total = sum(after.values()) - sum(before.values())
            points.append((time / SECOND, (after[vm] - before[vm]) / total))
        axes.plot(*zip(*points, strict=True), label=vm)
    axes.set(
        xlabel="seconds", ylabel="share of GPU time", title="Two pools 50/50, 60/40 within one", ylim=(0, 1)
    )
    axes.legend(fontsize=7)


def lag(axes: Any) -> None:
    """Behind the ideal, with its bound."""
    loads = tuple(
        Load(f"weight {w}, {k // US} µs", w, kernel_ns=k)
        for w, k in ((70, MS), (20, 20 * US), (10, 300 * US))
    )
    outcome = simulate(Scenario(loads, SECOND // 2, sample_ns=MS))
    for vm in outcome.vms:
        axes.plot(
            [t / MS for t, _, _ in outcome.samples],
            [(f[vm] - g[vm]) / MS for _, g, f in outcome.samples],
            label=vm,
        )
    unit = (outcome.scenario.quantum_ns + outcome.longest_overrun_ns) / MS
    bound = max((1 - p) * unit + p * unit * 2 for p in outcome.configured.values())
    axes.axhline(bound, color="black", linestyle=":", label="largest of the bounds")
    axes.set(xlabel="milliseconds", ylabel="ms behind GPS", title="Lag behind the ideal", xlim=(0, 200))
    axes.set_ylim(top=bound * 1.5)  # room for the legend above the line
    axes.legend(fontsize=7, ncol=2)


def waits(axes: Any) -> None:
    """Waits for a lease as VMs become many."""
    counts = (2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
    outcomes = [
        simulate(
            real(
                Scenario(
                    tuple(Load(f"v{i}", kernel_ns=100 * US) for i in range(n)), 10 * SECOND, sample_ns=SECOND
                )
            )
        )
        for n in counts
    ]
    curves: tuple[tuple[str, Callable[[Any], float]], ...] = (
        ("longest", lambda o: max(o.longest_wait_ns(v) for v in o.vms)),
        ("P99", lambda o: max(o.wait_percentile_ns(v, 99) for v in o.vms)),
        ("one round of quanta", lambda o: (len(o.vms) - 1) * o.scenario.quantum_ns),
    )
    for label, value in curves:
        style = ":" if label.startswith("one") else "-"
        axes.plot(counts, [value(o) / MS for o in outcomes], style, label=label)
    axes.set(
        xlabel="VMs, all busy, equal weights",
        ylabel="ms",
        xscale="log",
        yscale="log",
        title="Wait for a lease",
    )
    axes.legend(fontsize=7)


def urgent(axes: Any) -> None:
    """What a VM's requests take beside greedy ones, by its priority."""

    def run(priority: Any, greedy: int) -> Outcome:
        one = Load(
            "u",
            50,
            priority=priority,
            kernel_ns=200 * US,
            period_ns=80 * MS,
            work_ns=10 * MS,
            is_regular=True,
        )
        others = tuple(Load(f"g{i}", 50, kernel_ns=200 * US) for i in range(greedy))
        return simulate(real(Scenario((one, *others), 8 * SECOND)))

    counts = (0, 1, 2, 3, 4, 5)
    for priority in ("high", "medium", "low"):
        axes.plot(
            counts, [run(priority, n).latency_percentile_ns("u", 99) / MS for n in counts], label=priority
        )
    axes.set(
        xlabel="greedy medium VMs beside it",
        ylabel="P99, ms",
        title="10 ms requests, 12.5 % load",
        yscale="log",
    )
    axes.legend(fontsize=7)


def main() -> int:
    """Draw them all."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "schedule"
    from matplotlib import pyplot

    parser = argparse.ArgumentParser(description="figures of docs/scheduling.md")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for draw in (shares, lag, waits, urgent):
        figure, axes = pyplot.subplots(figsize=(5.2, 3.4))
        draw(axes)
        axes.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(options.out / f"schedule-{draw.__name__}.svg", metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
