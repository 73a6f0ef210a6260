#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Workers are killed (SIGKILL) and stopped (SIGSTOP) under load: at most their own program suffers, nobody else notices.

A killed worker's program gets an error at once. A stopped worker loses the GPU, which it was computing on, and its program
waits: until the worker continues, and then nothing was lost; or until an administrator ends the session.
"""

from __future__ import annotations

import os
import signal
import time

from _support import Example, Guest, Host, is_alive, main, wait_until

ROUNDS = 3
STOPPED_SECONDS = 1.0


def told(example: Example, guest: Guest, began: float, what: str) -> None:
    """Its program gets an error, and had no wrong number before."""
    status, last = guest.finish_by_itself()
    took = time.monotonic() - began
    is_so = status == 1 and '"failed": 1' in last and '"wrong": 0' in last
    example.fact(is_so, f"{what}: its program got an error after {took:.2f} s, and no wrong number")


def killed(example: Example, host: Host) -> None:
    guest = host.begin("neighbour.py", vm="victim")
    guest.until("turn")
    worker, began = host.worker_of(guest), time.monotonic()
    os.kill(worker, signal.SIGKILL)
    told(example, guest, began, "SIGKILL to a worker")


def stopped(example: Example, host: Host, neighbours: list[Guest]) -> None:
    guest = host.begin("neighbour.py", vm="victim")
    guest.until("turn")
    worker = host.worker_of(guest)
    os.kill(worker, signal.SIGSTOP)
    time.sleep(STOPPED_SECONDS)
    turn, others = guest.turn(), [n.turn() for n in neighbours]
    example.goes_on(neighbours, 10)
    example.fact(guest.turn() == turn, f"SIGSTOP to a worker: its program waits after turn {turn}")
    example.fact(
        all(n.turn() > before for n, before in zip(neighbours, others, strict=True)),
        "while the neighbour computes on: the GPU was taken from it",
    )
    os.kill(worker, signal.SIGCONT)
    example.goes_on([guest], 10)
    os.kill(worker, signal.SIGSTOP)
    session, began = host.session_of(guest)["info"]["session"], time.monotonic()
    example.say(host.admin("kill-session", str(session)))
    told(example, guest, began, "SIGCONT lets it go on; stopped again and its session ended")
    wait_until(lambda: not is_alive(worker), "the worker is gone")
    example.fact(True, "a stopped worker is gone, too, when its session is ended")


def body(example: Example) -> None:
    with example.host() as host, example.neighbours(host) as neighbours:
        for _ in range(ROUNDS):
            killed(example, host)
            example.goes_on(neighbours)
        stopped(example, host, neighbours)
        successor = host.begin("neighbour.py", vm="victim")
        successor.until("turn")
        example.settle("the VM's next program", successor)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, body))
