#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A VM that launches as fast as it can, beside others: calls buy no GPU time, and an administrator can slow them to a rate.

The flooder never waits for an answer, so its calls fill its ring; from then on it goes as fast as its share of the GPU
lets it, and later as fast as the rate that it is given while it runs. Its launches are a chain of which a lost, doubled or
overtaken one would change the result.
"""

from __future__ import annotations

import time

from _support import Example, Guest, Host, NotSo, main

# How often the flood launches at the most: several times what it gets done before it has a rate. The rest lies in its ring.
LAUNCHES = {"software": 20_000, "nvidia": 1 << 30}
# A kernel on so many words takes a hundred times as long as one of the flood.
LONG_WORDS = {"software": 1 << 17, "nvidia": 1 << 26}
SECONDS = 2.0
RATE = 400  # calls a second, a tenth of what it gets done
RATE_SECONDS = 3.0  # so that the burst of one second, which is its own, is the smaller part


def gpu_seconds(host: Host) -> dict[str, float]:
    """GPU time of each VM's living sessions so far."""
    return {s["info"]["vm"]: s["grant"]["gpu_ns"] / 1e9 for s in host.sessions()}


def its_share(example: Example, host: Host, flood: Guest, steady: Guest) -> None:
    """Beside a VM with few long kernels."""
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


def its_rate(example: Example, host: Host, flood: Guest) -> None:
    """An administrator gives the VM a rate while it floods."""
    example.say(host.admin("set-rate-limit", "--vm-name=floods", f"--rate={RATE}"))
    example.held_to_rate(host, flood, "floods", RATE, RATE_SECONDS)


def body(example: Example) -> None:
    with example.host() as host, example.neighbours(host, pause_ms=2000) as neighbours:
        host.admin("register-vm", "--vm-name=floods", "--no-device")
        steady = host.begin("flood.py", "600", str(1 << 30), str(LONG_WORDS[host.gpu]), vm="long-kernels")
        flood = host.begin("flood.py", "600", str(LAUNCHES[host.gpu]), vm="floods")
        for guest in (steady, flood):
            guest.until("flooding")
        its_share(example, host, flood, steady)
        example.goes_on(neighbours)
        steady.kill()
        its_rate(example, host, flood)
        example.goes_on(neighbours)
        # Without a rate again: thousands of its calls lie in its ring, and each of them shall be done.
        done = example.end_of_flood(host, flood, "floods")
        example.fact(
            done["is_right"],
            f"the flooder: {done['launches']} launches in {done['seconds']:g} s, none lost, none overtaken",
        )


if __name__ == "__main__":
    raise SystemExit(main(__doc__, body))
