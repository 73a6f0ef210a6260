# SPDX-License-Identifier: Apache-2.0
"""Step ``limits`` of ``control.py``: a flooding VM slows to its rate, loses nothing, and its neighbour does not notice.

The flood is as long as the rate allows in the time wanted, and a second more, for a bucket that has rested holds a second's
worth. So what the flooder did beyond that, over the time it took by its own clock, is the rate it got. The mediator's count of
replayed calls over the middle of the flood is a second witness that knows nothing of bursts. The neighbour's turns a second are
compared between windows beside the flood and windows beside the same VM with nothing to do, in turns.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from .control_host import MIB, Findings, Host, Load, Scene, open_host, spread

RATE_ERROR, NEIGHBOUR_LOSS = 0.05, 0.04
BURST_SECONDS = 1.0
SETTLE_SECONDS = 0.3


def measure(scene: Scene, found: Findings) -> None:
    """Calls a second, then bytes a second."""
    with open_host(scene) as host:
        host.change("register_vm", vm_name="flooder", bar1_bytes=0)
        flooder, neighbour = host.load(scene, "flooder"), host.load(scene, "neighbour")
        host.settle()
        iterations = scene.pick(2000, 2)
        neighbour.rate(scene.long(1.0), iterations)  # a GPU that has rested is slow at first
        for rate, share in ((scene.pick(1000, 200), 1.0), (scene.pick(200, 50), 1.0)):
            part = found.child(f"{rate} calls/s")
            host.change("change_vm", vm_name="flooder", rate=rate)
            flood = _calls(flooder, rate)
            _one(scene, host, neighbour, iterations, flood, rate, "records", share, part)
        host.change("change_vm", vm_name="flooder", rate=0)
        speed, piece = scene.pick(256, 8) * MIB, scene.pick(1024, 128) << 10
        part = found.child(f"{speed // MIB} MiB/s")
        host.change("change_vm", vm_name="flooder", bytes_per_second=speed)
        flood = _bytes(flooder, speed, piece)
        _one(scene, host, neighbour, iterations, flood, speed, "bytes_to_device", 1.0, part)


class _Flood:
    """A flood of so many seconds: begun, and what came of it."""

    def __init__(self, load: Load, rate: float, unit: int, words: str) -> None:
        self.load, self.rate, self.unit, self.words = load, rate, unit, words
        self.amount = 0
        self.seconds = 0.0

    def begin(self, seconds: float) -> None:
        count = max(round(self.rate * (seconds + BURST_SECONDS) / self.unit), 4)
        self.amount, self.seconds = count * self.unit, seconds
        self.load.say(self.words, *([self.unit] if self.unit > 1 else []), count)

    def end(self) -> tuple[float, bool]:
        """Achieved rate beyond the burst, and whether all of it is there in order."""
        done, taken, is_right = self.load.answer(4 * self.seconds + 30)
        return (done * 1.0 - self.rate * BURST_SECONDS) / (taken / 1e9), bool(is_right)


def _calls(load: Load, rate: float) -> _Flood:
    return _Flood(load, rate, 1, "flood")


def _bytes(load: Load, rate: float, piece: int) -> _Flood:
    return _Flood(load, rate, piece, "copies")


def _one(
    scene: Scene,
    host: Host,
    neighbour: Load,
    iterations: int,
    flood: _Flood,
    rate: float,
    counter: str,
    share: float,
    part: Findings,
) -> None:
    """One limit: idle, long flood, idle, short flood, idle, short flood, idle."""
    window = scene.long(1.6 * share, 0.4)
    idle, beside = [], []
    time.sleep(BURST_SECONDS)  # the bucket is full again

    def look() -> tuple[float, int]:
        (sample,) = host.of_vm("flooder")
        return time.monotonic(), int(sample["grant"][counter])

    idle.append(neighbour.rate(max(window, BURST_SECONDS), iterations))
    long = scene.long(10.0 * share, 1.5)
    flood.begin(long)
    neighbour.say("turns", long - SETTLE_SECONDS, iterations)
    time.sleep(SETTLE_SECONDS)
    first = look()
    time.sleep(long - 2 * SETTLE_SECONDS - 0.2)
    second = look()
    turns, _, failed, wrong, longest, taken = neighbour.answer(long + 30)
    achieved, is_right = flood.end()
    witnessed = (second[1] - first[1]) / (second[0] - first[0])
    beside.append(turns / (taken / 1e9))
    part.put("seconds", long)
    part.put("achieved", achieved)
    part.put("error", achieved / rate - 1)
    part.put("achieved_by_the_workers_count", witnessed)
    part.put("error_by_the_workers_count", witnessed / rate - 1)
    part.put("nothing_lost_or_reordered", is_right)
    part.put("neighbours_longest_turn_ms", longest / 1e6)
    part.judge("rate within 5 %", abs(achieved / rate - 1) <= RATE_ERROR)
    part.judge("nothing lost or reordered", is_right)
    part.judge("neighbour lost no call", (failed, wrong) == (0, 0))
    for _ in range(scene.times(2 if share > 0.5 else 1)):
        idle.append(neighbour.rate(max(window, BURST_SECONDS), iterations))
        flood.begin(window + 2 * SETTLE_SECONDS)
        time.sleep(SETTLE_SECONDS)
        beside.append(neighbour.rate(window, iterations))
        is_right = flood.end()[1] and is_right
    idle.append(neighbour.rate(max(window, BURST_SECONDS), iterations))
    part.put("neighbour", _compared(idle, beside))
    part.judge("nothing lost or reordered", is_right)
    part.judge(
        "neighbour loses at most 4 %", _compared(idle, beside)["loss"] <= NEIGHBOUR_LOSS, of_speed=True
    )


def _compared(idle: list[float], beside: list[float]) -> dict[str, Any]:
    """Turns a second; each window beside the flood against the mean of the idle ones around it."""
    losses = [
        1 - with_flood / statistics.mean(idle[n : n + 2])
        for n, with_flood in enumerate(beside)
    ]  # fmt: skip
    return {
        "turns_per_second_beside_an_idle_vm": spread(idle),
        "turns_per_second_beside_the_flood": spread(beside),
        "loss": statistics.median(losses),
        "losses": [round(loss, 5) for loss in losses],
    }
