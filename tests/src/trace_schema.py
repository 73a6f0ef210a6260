# SPDX-License-Identifier: Apache-2.0
"""What a Chrome trace must be for a viewer to show all of it: every rule that is broken, in words."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

PHASES = {"M", "B", "E", "X", "i", "C", "s", "f", "b", "e"}
Thread = tuple[int, int]


def problems(trace: dict[str, Any]) -> list[str]:
    """Sentences, none for a sound trace."""
    found: list[str] = []
    open_slices: dict[Thread, list[str]] = defaultdict(list)
    covered: dict[Thread, list[tuple[float, float]]] = defaultdict(list)
    began: dict[Thread, list[float]] = defaultdict(list)
    named: set[Thread] = set()
    flows: dict[int, str] = {}
    awaited: Counter[tuple[Any, ...]] = Counter()
    bindings: list[tuple[Thread, float, str]] = []
    last = 0.0
    for index, event in enumerate(trace["traceEvents"]):
        where = f"event {index} ({event.get('ph')} {event.get('name')})"
        if event.get("ph") not in PHASES:
            found.append(f"{where}: no such phase")
            continue
        if not isinstance(event.get("pid"), int) or not isinstance(event.get("tid"), int):
            found.append(f"{where}: pid and tid must be numbers")
            continue
        thread = (event["pid"], event["tid"])
        phase = event["ph"]
        if phase == "M":
            named.add(thread)
            continue
        if not isinstance(event.get("ts"), (int, float)) or event["ts"] < last:
            found.append(f"{where}: not in the order of time")
        last = event["ts"]
        if phase == "B":
            open_slices[thread].append(event["name"])
            began[thread].append(event["ts"])
        elif phase == "E":
            if not open_slices[thread]:
                found.append(f"{where}: ends a slice that never began")
                continue
            open_slices[thread].pop()
            covered[thread].append((began[thread].pop(), event["ts"]))
        elif phase == "X":
            if event["dur"] < 0:
                found.append(f"{where}: a length below 0")
            covered[thread].append((event["ts"], round(event["ts"] + event["dur"], 3)))
        elif phase == "s":
            if event["id"] in flows:
                found.append(f"{where}: flow {event['id']} begins twice")
            flows[event["id"]] = event["name"]
            bindings.append((thread, event["ts"], where))
        elif phase == "f":
            if flows.get(event["id"]) != event["name"]:
                found.append(f"{where}: a flow that never began, or another one")
            bindings.append((thread, event["ts"], where))
        elif phase == "b":
            awaited[(event["cat"], event["pid"], event["id2"]["local"], event["name"])] += 1
        elif phase == "e":
            awaited[(event["cat"], event["pid"], event["id2"]["local"], event["name"])] -= 1
        elif phase == "C" and not all(isinstance(v, (int, float)) for v in event["args"].values()):
            found.append(f"{where}: a counter that is no number")
        if phase != "C" and thread not in named:
            found.append(f"{where}: a thread without a name")
    found += [f"thread {t}: {names} never end" for t, names in open_slices.items() if names]
    found += [f"{key} begins and ends {count} times apart" for key, count in awaited.items() if count]
    for thread, at, where in bindings:
        if not any(begin <= at <= end for begin, end in covered[thread]):
            found.append(f"{where}: an arrow without a slice")
    for thread, slices in covered.items():
        found += [f"thread {thread}: {text}" for text in _crossings(slices)]
    return found


def _crossings(slices: list[tuple[float, float]]) -> list[str]:
    """Slices of one thread lie beside or within each other."""
    found = []
    stack: list[float] = []
    for begin, end in sorted(slices, key=lambda s: (s[0], -s[1])):
        while stack and stack[-1] <= begin:
            stack.pop()
        if stack and end > stack[-1]:
            found.append(f"slice {begin} to {end} crosses one that ends at {stack[-1]}")
        stack.append(end)
    return found
