#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A storm of BUSY: programs over their rate, and more that knock while no worker can be had; each gets what is its own in the end.

BUSY means "later": the guest library waits and goes on by itself. No call is lost, doubled or overtaken by it, and no
program is told.
"""

from __future__ import annotations

import json
import time
from functools import partial

from _in_process import mediator_here
from _support import Example, Guest, Host, main, wait_until

from vgpu.gpu.process import WorkerOptions, start_worker

RATE = 400  # calls a second, burst one second
LAUNCHES = 1000
LIMITED = 2
KNOCKING = 4


def limited(example: Example, host: Host) -> None:
    """VMs that send as fast as they can, and may send 400 calls a second each."""
    for number in range(LIMITED):
        host.admin(
            "register-vm", f"--vm-name=limited-{number}", "--no-device", f"--rate={RATE}", "--queue-depth=64"
        )
    floods = [host.begin("flood.py", "20", str(LAUNCHES), vm=f"limited-{n}") for n in range(LIMITED)]
    for flood in floods:
        flood.until("flooding")
    held_back = False
    while any(flood.process.poll() is None for flood in floods):
        held_back = held_back or any(
            s["guest"]["busy"] for s in host.sessions() if s["info"]["vm"].startswith("limited")
        )
        time.sleep(0.05)
        if all(flood.lines[-1:] and flood.lines[-1].startswith("{") for flood in floods):
            break
    example.fact(
        held_back,
        f"{LIMITED} VMs flood, with a rate of {RATE} calls a second each: BUSY was seen in their sessions",
    )
    for number, flood in enumerate(floods):
        status, last = flood.finish_by_itself(60)
        done = json.loads(last)
        most = RATE * (done["seconds"] + 1.5)
        example.fact(
            status == 0 and done["is_right"] and done["launches"] <= most,
            f"limited-{number}: {done['launches']} launches in {done['seconds']:g} s, none lost, none overtaken",
        )


class Workers:
    """Starts workers, or fails to."""

    def __init__(self, host: Host) -> None:
        self.is_broken = False
        self._start = partial(start_worker, WorkerOptions(host.run_dir, host.gpu))

    async def __call__(self, worker: str):  # type: ignore[no-untyped-def]  # as start_worker
        if self.is_broken:
            raise OSError("no more processes")
        return await self._start(worker)


def told(host: Host) -> int:
    """How often somebody was told BUSY for want of a worker."""
    return host.log.read_text().count("no session for")


def knocking(example: Example, host: Host, workers: Workers, neighbours: list[Guest]) -> None:
    """Programs come while no worker can be started."""
    workers.is_broken = True
    used_up = host.begin("neighbour.py", vm="used-up")  # takes the warm worker
    used_up.until("turn")
    guests = [host.begin("neighbour.py", vm=f"knocks-{n % 2}") for n in range(KNOCKING)]
    example.say(f"no worker can be started; {KNOCKING} programs come")
    wait_until(lambda: told(host) >= 2 * KNOCKING, "they are told BUSY, again and again")
    waiting = sum(g.process.poll() is None and g.turn() == 0 for g in guests)
    example.fact(waiting == KNOCKING, f"{waiting} wait; they were told BUSY {told(host)} times")
    example.goes_on(neighbours)
    workers.is_broken = False
    began = time.monotonic()
    for guest in guests:
        guest.until("turn", 60)
    example.say(f"workers can be started again: all were in after {time.monotonic() - began:.1f} s")
    example.settle("the one that was in", used_up)
    done = [(guest.finish(), guest) for guest in guests]
    good = [
        last for (status, last), _ in done if status == 0 and '"failed": 0' in last and '"wrong": 0' in last
    ]
    calls = sum(json.loads(last)["calls"] for last in good)
    example.fact(
        len(good) == KNOCKING, f"{len(good)} of {KNOCKING} computed: {calls} calls, 0 lost, 0 wrong sums"
    )


def body(example: Example) -> None:
    with example.host(start=False) as host:
        workers = Workers(host)
        with mediator_here(host, workers), example.neighbours(host) as neighbours:
            limited(example, host)
            knocking(example, host, workers, neighbours)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, body))
