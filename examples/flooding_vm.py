#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A VM that launches as fast as it can beside one that computes: it gets its share and no more, and nothing is lost.

The flooder never waits for an answer, so its calls fill its ring; from then on it goes as fast as its share of the GPU
lets it. Its launches are a chain of which a lost, doubled or overtaken one would change the result.
"""

from __future__ import annotations

import json
import time

from _support import Example, Host, main

SECONDS = 1.2
LEAST_SHARE = 0.3  # of the neighbour's own half; it is not always hungry, so it need not take all of it


def gpu_seconds(host: Host) -> dict[str, float]:
    """GPU time of each VM's living sessions so far."""
    return {s["info"]["vm"]: s["grant"]["gpu_ns"] / 1e9 for s in host.sessions()}


def body(example: Example) -> None:
    with example.host() as host, example.neighbours(host, pause_ms=1000) as (neighbour,):
        began, first = time.monotonic(), neighbour.turn()
        time.sleep(1)
        alone = (neighbour.turn() - first) / (time.monotonic() - began)
        flood = host.begin("flood.py", f"{SECONDS:g}", vm="floods")
        flood.until("flooding")
        before, began, first = gpu_seconds(host), time.monotonic(), neighbour.turn()
        time.sleep(SECONDS - 0.2)
        after, seconds = gpu_seconds(host), time.monotonic() - began
        beside = (neighbour.turn() - first) / seconds
        used = {vm: after[vm] - before.get(vm, 0) for vm in after}
        example.say(f"the neighbour: {alone:.0f} turns a second alone, {beside:.0f} beside the flood")
        share = used["neighbour-1"] / max(sum(used.values()), 1e-9)
        example.fact(
            beside > alone * 0.5 * LEAST_SHARE,
            f"it keeps {beside / alone:.0%} of its speed, and {share:.0%} of the GPU time",
        )
        status, last = flood.finish_by_itself(60)
        done = json.loads(last)
        example.fact(
            status == 0 and done["is_right"],
            f"the flooder: {done['launches']} launches in {done['seconds']:g} s, none lost, none overtaken",
        )


if __name__ == "__main__":
    raise SystemExit(main(__doc__, body))
