#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The mediator is killed (SIGKILL) under load and started again: sessions live on, in the same workers.

Between the two there is no mediator at all. Programs go on under the leases they have; a program that comes meanwhile sees
no GPU, as on a machine that has none, and one that comes afterwards is let in.
"""

from __future__ import annotations

from _support import Example, Guest, Host, is_alive, main, wait_until

ROUNDS = 2


def places(host: Host, guests: list[Guest]) -> dict[int, tuple[int, int]]:
    """Session and worker of each program."""
    infos = [host.session_of(guest)["info"] for guest in guests]
    return {info["guest_pid"]: (info["session"], info["worker_pid"]) for info in infos}


def body(example: Example) -> None:
    with example.host() as host, example.neighbours(host, 2) as neighbours:
        before = places(host, neighbours)
        for _ in range(ROUNDS):
            host.kill()
            example.say("the mediator is killed")
            example.fact(
                all(is_alive(worker) for _, worker in before.values()), "all workers live without a mediator"
            )
            late = host.begin("neighbour.py", vm="late")
            _, last = late.finish()
            example.fact("error 100" in last, "a program that comes now sees CUDA_ERROR_NO_DEVICE, at once")
            took = host.start()
            example.say(f"a new one answers after {took:.1f} s")
            wait_until(lambda: len(host.sessions()) == len(neighbours), "all sessions are adopted")
            example.fact(places(host, neighbours) == before, "it has the same sessions, in the same workers")
            example.goes_on(neighbours, 10)
        newcomer = host.begin("neighbour.py", vm="newcomer")
        newcomer.until("turn")
        example.settle("a newcomer", newcomer)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, body))
