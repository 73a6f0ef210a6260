#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The scheduler raises again and again while three VMs compete: leases are found again, nobody waits for ever or loses a call."""

from __future__ import annotations

import time

from _in_process import mediator_here
from _support import Example, main

ROUNDS = 6
BETWEEN_SECONDS = 0.6
SCHEDULER = "mediator/gpus/gpu0/scheduler"


def body(example: Example) -> None:
    with (
        example.host(start=False) as host,
        mediator_here(host) as mediator,
        example.neighbours(host, 3, pause_ms=3000) as neighbours,
    ):
        for number in range(ROUNDS):
            turns = [n.turn() for n in neighbours]
            mediator.make_raise(SCHEDULER)
            example.goes_on(neighbours)
            time.sleep(BETWEEN_SECONDS)
            gained = [n.turn() - before for n, before in zip(neighbours, turns, strict=True)]
            example.fact(all(gained), f"restart {number + 1}: the neighbours went on by {gained} turns")
        state = host.ask("schedule")[SCHEDULER]
        known = sum(vm["sessions"] for pool in state["pools"].values() for vm in pool["vms"].values())
        example.fact(known == len(neighbours), f"the scheduler knows {known} sessions")


if __name__ == "__main__":
    raise SystemExit(main(__doc__, body))
