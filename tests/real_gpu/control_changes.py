# SPDX-License-Identifier: Apache-2.0
"""Step ``changes`` of ``control.py``: an administrator changes a running VM; how long until its programs have it otherwise?

Each time is from just before the command is sent to what a program itself saw, on the machine's one monotonic clock.

- A rate: the program launches and waits, over and over, and notes when each turn ended. Lifted: the first turn that was quicker than
  half of a limited one. Set: the beginning of the first pause that is half of a limited one or longer, so after the burst.
- A quota: the first cuMemGetInfo with the new total; the first allocation that is answered otherwise.
- Weight, priority, pool: two greedy programs note when each of their batches was done. Their shares before and long after a
  change are known afterwards; the effect is the end of the first 20 ms in which the share was nearer to the later
  one, and that stayed so on average of the two windows behind it. The window's own length is part of the time.
"""

from __future__ import annotations

import itertools
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from .control_host import MIB, Findings, Host, Load, Neighbour, Scene, open_host, spread

AT_ONCE_MS = 100.0
STEP_SECONDS = 0.002
SHIFT_AT_LEAST = 0.08

Change = tuple[str, dict[str, Any]]


def measure(scene: Scene, found: Findings) -> None:
    """Rate and quota, then shares; a neighbour computes all the while."""
    with open_host(scene) as host:
        host.change("create_pool", pool="large", weight=400)
        for vm in ("limited", "one", "two"):
            host.change("register_vm", vm_name=vm, bar1_bytes=0)
        limited, calm = host.load(scene, "limited"), host.load(scene, "calm")
        one, two = host.load(scene, "one"), host.load(scene, "two")
        host.settle()
        with Neighbour(calm, scene.pick(2000, 2), found):
            _rate(scene, host, limited, found.child("rate"))
            _quota(scene, host, limited, found)
            _shares(scene, host, one, two, found)
        longest = found.values["neighbour"].get("longest_turn_ms", float("inf"))
        found.judge("neighbour waits for no turn longer than 100 ms", longest <= AT_ONCE_MS, of_speed=True)


def _judge(found: Findings, times: list[float], wanted: int) -> None:
    found.put("milliseconds", spread(times))
    found.judge(
        "each within 100 ms", len(times) == wanted and max(times, default=0) <= AT_ONCE_MS, of_speed=True
    )


def _stamps(load: Load, seconds: float) -> list[int]:
    """What ``stamps`` and ``greedy`` print, as moments."""
    return list(itertools.accumulate(load.answer(seconds + 30)))


def _rate(scene: Scene, host: Host, load: Load, found: Findings) -> None:
    rate, between = scene.pick(100, 40), 0.5
    count = 2 * scene.times(5)
    seconds = between * (count + 1)
    load.say("stamps", seconds)
    sent: list[tuple[int, int]] = []
    for number in range(count):
        time.sleep(between)
        sent.append((time.monotonic_ns(), rate if number % 2 == 0 else 0))
        host.change("change_vm", vm_name="limited", rate=sent[-1][1])
    moments = _stamps(load, seconds)
    times: dict[str, list[float]] = {"set": [], "lifted": []}
    pairs = list(itertools.pairwise(moments))
    for number, (at, value) in enumerate(sent):
        end = sent[number + 1][0] if number + 1 < count else moments[-1]
        limited_from = at if value else sent[number - 1][0]
        gaps = [b - a for a, b in pairs if limited_from + 2e8 < b < limited_from + between * 1e9]
        if not gaps:
            continue
        half = statistics.median(gaps) / 2
        if value:
            seen = next((max(a, at) for a, b in pairs if at <= b <= end and b - max(a, at) >= half), None)
        else:
            seen = next((b for a, b in pairs if at <= b <= end and b - a < half), None)
        if seen is not None:
            times["set" if value else "lifted"].append((seen - at) / 1e6)
    found.put("limit_calls_per_second", rate)
    for name, values in times.items():
        _judge(found.child(name), values, count // 2)


def _quota(scene: Scene, host: Host, load: Load, found: Findings) -> None:
    small, large = 64 * MIB, 192 * MIB
    shown: list[float] = []
    enforced: list[float] = []
    host.change("change_vm", vm_name="limited", memory_limit_bytes=small)
    assert load.ask("total", small, 5)[0] > 0, "a quota is not shown within 5 s"
    count = 2 * scene.times(4)
    for what, times in (("total", shown), ("answer", enforced)):
        for number in range(count):
            quota = large if number % 2 == 0 else small
            load.say(
                *(
                    ("total", quota, 5)
                    if what == "total"
                    else ("answer", 128 * MIB, 0 if quota == large else 2, 5)
                )
            )
            time.sleep(0.05)  # it looks already
            at = time.monotonic_ns()
            host.change("change_vm", vm_name="limited", memory_limit_bytes=quota)
            (seen,) = load.answer()
            if seen:
                times.append((seen - at) / 1e6)
    _judge(found.child("quota shown"), shown, count)
    _judge(found.child("quota enforced"), enforced, count)
    host.change("change_vm", vm_name="limited", memory_limit_bytes=0)


def _shares(scene: Scene, host: Host, one: Load, two: Load, found: Findings) -> None:
    """Of two VMs that want all of the GPU, one is preferred and is not any more, in three ways."""
    window = 0.02 if scene.is_real else 0.1
    between = 0.6 if scene.is_real else 1.5
    ways: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "weight": ({"weight": 200}, {"weight": 50}),
        "priority": ({"priority": "high"}, {"priority": "low"}),
        "pool": ({"pool": "large"}, {"pool": "default"}),
    }
    # Kernels of some 20 us on a real GPU, so a batch of twelve is a quarter of a millisecond.
    words = ("greedy", 0, scene.pick(2000, 100), scene.pick(12, 1))
    for way, values in ways.items():
        count = 2 * scene.times(3)
        seconds = between * (count + 1)
        for load in (one, two):
            load.say(words[0], seconds, *words[2:])
        sent = []
        host.change("change_vm", vm_name="one", **values[1])
        for number in range(count):
            time.sleep(between)
            sent.append(time.monotonic_ns())
            host.change("change_vm", vm_name="one", **values[number % 2])
        ours, theirs = _stamps(one, seconds), _stamps(two, seconds)
        host.change("change_vm", vm_name="one", weight=50, priority="medium", pool="default")
        part = found.child(way)
        times, shifts = [], []
        share = _share_of(ours, theirs)
        for at in sent:
            before, after, took = effect(share, at, round(window * 1e9), round(between * 1e9))
            shifts.append([round(before, 3), round(after, 3)])
            if took is not None:
                times.append(took / 1e6)
        part.put("window_ms", window * 1e3)
        part.put("shares_before_and_after", shifts)
        _judge(part, times, count)


def _share_of(ours: list[int], theirs: list[int]) -> Callable[[int, int], float]:
    """What part of the batches done in [begin, end) are ours."""

    def share(begin: int, end: int) -> float:
        mine = bisect_left(ours, end) - bisect_left(ours, begin)
        other = bisect_left(theirs, end) - bisect_left(theirs, begin)
        return mine / max(mine + other, 1)

    return share


def effect(
    share: Callable[[int, int], float], at: int, window: int, between: int
) -> tuple[float, float, int | None]:
    """Shares before and long after ``at``, and nanoseconds from it to the effect; None: none is seen."""
    before = share(at - between // 2, at)
    after = share(at + between // 3, at + between)
    middle, rises = (before + after) / 2, after > before
    if abs(after - before) < SHIFT_AT_LEAST:
        return before, after, None
    step = round(STEP_SECONDS * 1e9)
    for begin in range(at, at + between - 3 * window, step):
        end = begin + window
        if (share(begin, end) > middle) is rises and (share(end, end + 2 * window) > middle) is rises:
            return before, after, end - at
    return before, after, None
