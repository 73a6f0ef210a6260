# SPDX-License-Identifier: Apache-2.0
"""Draw a piece of a trace as a picture, for documents: python tools/draw_trace.py TRACE.json OUT.svg [--start MS] [--length MS]

What Perfetto shows, without a browser: a row for each thread, its slices, arrows from where messages were sent to where they
were handled. Needs matplotlib, which is no dependency of the project. ``--start`` is counted from the recording's own.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
from pathlib import Path
from typing import Any

Event = dict[str, Any]
Thread = tuple[int, int]
COLOURS = (
    *("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c"),
    *("#b8a13a", "#3f9aa8", "#2f4b7c", "#7a9a01", "#a05195", "#5f6b6d"),
)
MOST_ARROWS = 400


def slices_of(events: list[Event]) -> dict[Thread, list[tuple[float, float, str]]]:
    """Begin, length and name of every slice, by thread; pairs of B and E are slices as X is, and so are fences."""
    found: dict[Thread, list[tuple[float, float, str]]] = {}
    begun: dict[Any, list[Event]] = {}
    for event in events:
        thread = (event["pid"], event["tid"])
        key = thread if event["ph"] in "BE" else (event["pid"], str(event.get("id2")), event["name"])
        if event["ph"] == "X":
            found.setdefault(thread, []).append((event["ts"], event["dur"], event["name"]))
        elif event["ph"] in "Bb":
            begun.setdefault(key, []).append(event)
        elif event["ph"] in "Ee" and begun.get(key):
            begin = begun[key].pop()
            name = "fence" if event["ph"] == "e" else begin["name"]
            found.setdefault(thread, []).append((begin["ts"], event["ts"] - begin["ts"], name))
    return found


def draw(trace: Event, out: Path, start_ms: float, length_ms: float) -> None:
    """Draw the piece."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    events = trace["traceEvents"]
    zero = float(trace["otherData"]["started_ns"]) / 1e3 + start_ms * 1e3
    until = zero + length_ms * 1e3
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    shown = {
        thread: [s for s in slices if s[0] < until and s[0] + s[1] > zero]
        for thread, slices in slices_of(events).items()
    }
    rows = [thread for thread in threads if shown.get(thread)]
    place = {thread: len(rows) - 1 - index for index, thread in enumerate(rows)}
    # A message has one colour where it is sent and where it is handled.
    names = sorted({name.removeprefix("send ") for thread in rows for _, _, name in shown[thread]})
    colour = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    figure, axes = pyplot.subplots(figsize=(13, 0.42 * len(rows) + 1.8))
    for thread in rows:
        for begin, length, name in shown[thread]:
            left, right = max(begin, zero), min(begin + length, until)
            at = (left - zero) / 1e3
            width = max((right - left) / 1e3, length_ms / 1500)
            axes.barh(
                place[thread],
                width,
                left=at,
                height=0.7,
                color=colour[name.removeprefix("send ")],
                linewidth=0,
            )
            if width > length_ms * 0.0075 * len(name):
                axes.text(
                    at + width / 2, place[thread], name, ha="center", va="center", fontsize=6.5, color="white"
                )
    sent = {e["id"]: e for e in events if e["ph"] == "s"}
    arrows = [
        (sent[e["id"]], e)
        for e in events
        if e["ph"] == "f" and e["id"] in sent and zero <= sent[e["id"]]["ts"] and e["ts"] <= until
    ]
    for begin, end in arrows[:MOST_ARROWS]:
        ends = [(e["ts"] - zero) / 1e3 for e in (begin, end)]
        heights = [place[(e["pid"], e["tid"])] for e in (begin, end)]
        style = {"arrowstyle": "->", "color": "#333333", "linewidth": 0.6, "alpha": 0.7}
        axes.annotate("", xy=(ends[1], heights[1]), xytext=(ends[0], heights[0]), arrowprops=style)
    axes.set_yticks([place[thread] for thread in rows])
    mediator = events[0]["pid"]
    labels = [
        threads[t].removeprefix("mediator/") if t[0] == mediator else f"{processes[t[0]]}: {threads[t]}"
        for t in rows
    ]
    axes.set_yticklabels(labels, fontsize=7)
    axes.set_xlim(0, length_ms)
    axes.set_xlabel(f"milliseconds, from {start_ms:g} ms after the recording began", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", linewidth=0.3)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour[name]) for name in names]
    place_below = {
        "loc": "upper center",
        "bbox_to_anchor": (0.4, -0.5 / (0.42 * len(rows) + 1)),
        "frameon": False,
    }
    axes.legend(handles, names, ncol=7, fontsize=7, **place_below)
    # Where one process ends and the next begins.
    for above, below in itertools.pairwise(rows):
        if above[0] != below[0]:
            axes.axhline(place[above] - 0.5, color="#999999", linewidth=0.6, linestyle=":")
    axes.margins(y=0.01)
    figure.tight_layout()
    # A picture that is text (.svg) is the same for the same trace, and has no folder or date of the machine in it.
    matplotlib.rcParams["svg.hashsalt"] = "vgpu"
    matplotlib.rcParams["svg.fonttype"] = "none"
    metadata = {"Date": None, "Creator": None} if out.suffix == ".svg" else {"Software": None}
    figure.savefig(out, dpi=110, metadata=metadata, bbox_inches="tight")


def main() -> int:
    """Read, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=float, default=0.0, metavar="MS")
    parser.add_argument("--length", type=float, default=20.0, metavar="MS")
    options = parser.parse_args()
    draw(json.loads(options.trace.read_text()), options.out, options.start, options.length)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
