#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A VM that launches as fast as it can, beside one with long kernels and one that computes: calls buy no GPU time.

The flooder never waits for an answer, so its calls fill its ring; from then on it goes as fast as its share of the GPU
lets it. Its launches are a chain of which a lost, doubled or overtaken one would change the result.
"""

from __future__ import annotations

import json
import signal
import time

from _support import Example, Host, NotSo, main

# How often the flood launches at the most: several times what it gets done while it is looked at.
LAUNCHES = {"software": 20_000, "nvidia": 1 << 30}
# A kernel on so many words takes a hundred times as long as one of the flood.
LONG_WORDS = {"software": 1 << 17, "nvidia": 1 << 26}
SECONDS = 2.0


def gpu_seconds(host: Host) -> dict[str, float]:
    """GPU time of each VM's living sessions so far."""
    return {s["info"]["vm"]: s["grant"]["gpu_ns"] / 1e9 for s in host.sessions()}


def body(example: Example) -> None:
    with example.host() as host, example.neighbours(host, pause_ms=2000) as neighbours:
        steady = host.begin("flood.py", "60", str(1 << 30), str(LONG_WORDS[host.gpu]), vm="long-kernels")
        flood = host.begin("flood.py", "60", str(LAUNCHES[host.gpu]), vm="floods")
        for guest in (steady, flood):
            guest.until("flooding")
        time.sleep(0.5)
        before = gpu_seconds(host)
        time.sleep(SECONDS)
        after = gpu_seconds(host)
        used = {vm: after[vm] - before[vm] for vm in before if vm in after}
        if not {"floods", "long-kernels"} <= used.keys():
            raise NotSo(f"one of them has ended already: {flood.lines[-1:]} {steady.lines[-1:]}")
        share = used["floods"] / max(used["floods"] + used["long-kernels"], 1e-9)
        example.say("GPU time: " + ", ".join(f"{vm} {seconds:.2f} s" for vm, seconds in sorted(used.items())))
        example.fact(
            share < 0.75,
            f"of equal weights, the flood has {share:.0%} and the VM with few long kernels the rest",
        )
        example.goes_on(neighbours)
        steady.kill()
        flood.process.send_signal(signal.SIGTERM)  # it launches no more; what it has launched is done first
        status, last = flood.finish_by_itself(60)
        done = json.loads(last)
        example.fact(
            status == 0 and done["is_right"],
            f"the flooder: {done['launches']} launches in {done['seconds']:g} s, none lost, none overtaken",
        )


if __name__ == "__main__":
    raise SystemExit(main(__doc__, body))
