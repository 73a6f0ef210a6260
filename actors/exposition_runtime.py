# SPDX-License-Identifier: Apache-2.0
"""The mediator itself and its actors, as Prometheus metrics. Values in, families out.

Series per actor exist while the actor lives, and begin again at 0 with each of its lives, which Prometheus takes for a
restart of the counter. Their number is bounded by what lives: sessions, VMs and some dozen others.
"""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections.abc import Iterator
from typing import Final

import attrs
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from . import ActorSnapshot, SystemStatistics

# Upper bounds in seconds of how late the event loop was; a last bucket takes the rest.
LAG_BOUNDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


@attrs.define(eq=False)
class LoopLag:
    """How late a task ran that wanted to run at a certain moment, so far."""

    counts: list[int] = attrs.Factory(lambda: [0] * (len(LAG_BOUNDS) + 1))
    sum_seconds: float = 0.0
    last_seconds: float = 0.0

    def observe(self, seconds: float) -> None:
        """One more look."""
        self.last_seconds = max(seconds, 0.0)
        self.sum_seconds += self.last_seconds
        self.counts[bisect_left(LAG_BOUNDS, self.last_seconds)] += 1


def buckets(bounds: tuple[float, ...], counts: list[int]) -> list[tuple[str, float]]:
    """Cumulative buckets as Prometheus wants them, out of counts of each; the last count is of what was above all."""
    found, total = [], 0
    for bound, count in zip((*bounds, float("inf")), counts, strict=True):
        total += count
        found.append(("+Inf" if bound == float("inf") else repr(float(bound)), float(total)))
    return found


def mediator_families(
    describe: dict[str, object], uptime_seconds: float, lag: LoopLag, sources: dict[str, bool]
) -> Iterator[Metric]:
    """The process, and what of it answered."""
    version, gpu, library = (str(describe.get(key) or "") for key in ("version", "gpu", "library"))
    yield InfoMetricFamily(
        "vgpu_mediator", "This mediator.", {"version": version, "gpu": gpu, "library": library}
    )
    build = GaugeMetricFamily(
        "vgpu_build_info", "What runs; always 1.", labels=("version", "python", "layout", "calls")
    )
    layout, calls = (str(describe.get(key) or "") for key in ("layout", "calls"))
    build.add_metric((version, platform.python_version(), layout, calls), 1)
    yield build
    yield GaugeMetricFamily("vgpu_mediator_uptime_seconds", "Since the mediator began.", uptime_seconds)
    late = HistogramMetricFamily(
        "vgpu_mediator_loop_lag_seconds", "How late the event loop was, looked at four times a second."
    )
    late.add_metric((), buckets(LAG_BOUNDS, lag.counts), lag.sum_seconds)
    yield late
    up = GaugeMetricFamily(
        "vgpu_source_up", "Whether a part of this answer could be had.", labels=("source",)
    )
    for source, answered in sources.items():
        up.add_metric((source,), float(answered))
    yield up


def actor_families(statistics: SystemStatistics, tree: tuple[ActorSnapshot, ...]) -> Iterator[Metric]:
    """All actors together, and each of them."""
    yield GaugeMetricFamily("vgpu_actors_alive", "Actors that live.", statistics.alive)
    for name, value, text in (
        ("spawned", statistics.spawned, "Actors started."),
        ("crashed", statistics.crashed, "Actors that ended with an error."),
        ("restarts", statistics.restarts, "Actors started again by their supervisor."),
        ("dead_letters", statistics.dead_letters, "Messages that nobody read."),
        ("moot_notices", statistics.moot_notices, "Notices that came to nothing, as their target had ended."),
        ("drops", statistics.drops, "Messages that a full mailbox dropped for newer ones."),
        ("late_replies", statistics.late_replies, "Answers that came after the asker had gone."),
        ("stuck_handlers", statistics.stuck_handlers, "Handlers found stuck, while the detector is on."),
    ):
        yield CounterMetricFamily(f"vgpu_actors_{name}", text, value)
    letters = CounterMetricFamily(
        "vgpu_actors_dead_letters_by_type",
        "Messages that nobody read, by their type; none until the first.",
        labels=("message",),
    )
    for kind, count in sorted(statistics.dead_letters_by_type.items()):
        letters.add_metric((kind,), count)
    yield letters
    yield from _each_actor([node for top in tree for node in top.walk()])


def _each_actor(actors: list[ActorSnapshot]) -> Iterator[Metric]:
    names = ("actor", "kind")

    def counter(name: str, text: str) -> CounterMetricFamily:
        return CounterMetricFamily(f"vgpu_actor_{name}", text, labels=names)

    def gauge(name: str, text: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"vgpu_actor_{name}", text, labels=names)

    up = gauge("up", "Whether it runs: 0 while it begins, ends or is restarted.")
    restarts = counter("restarts", "Times it was started again.")
    messages = counter("messages", "Messages it took out of its mailbox, in this life.")
    seconds = counter("handler_seconds", "Time its handlers took, waits included, in this life.")
    dropped = counter("mailbox_dropped", "Messages its full mailbox dropped for newer ones, in this life.")
    refused = counter("mailbox_refused", "Messages turned away because its mailbox was full, in this life.")
    depth = gauge("mailbox_depth", "Messages that wait in its mailbox.")
    peak = gauge("mailbox_peak_depth", "The most that waited, in this life.")
    capacity = gauge("mailbox_capacity", "Messages its mailbox holds.")
    for actor in actors:
        labels = (actor.name, actor.kind)
        up.add_metric(labels, float(actor.state.value == "running"))
        restarts.add_metric(labels, actor.restarts)
        seconds.add_metric(labels, actor.handler_seconds)
        if actor.mailbox is not None:
            messages.add_metric(labels, actor.mailbox.received)
            dropped.add_metric(labels, actor.mailbox.dropped)
            refused.add_metric(labels, actor.mailbox.refused)
            depth.add_metric(labels, actor.mailbox.depth)
            peak.add_metric(labels, actor.mailbox.high_water)
            capacity.add_metric(labels, actor.mailbox.capacity)
    yield from (up, restarts, messages, seconds, dropped, refused, depth, peak, capacity)
