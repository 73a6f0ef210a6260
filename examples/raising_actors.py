#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Every actor of the mediator raises, one after the other, under load: supervisors restart them, programs do not notice.

An executor is the exception that is meant: it owns one worker, and its end is that session's end.
"""

from __future__ import annotations

import time

from _in_process import InjectedFault, mediator_here
from _support import Example, main, wait_until

from vgpu.actors import Crashed

# A supervisor gives up when ten of its children end within ten seconds; here every failure is ours.
RESTARTS = 9
PERIOD_SECONDS = 10.5


class Pace:
    """Keeps the failures below one supervisor as rare as it accepts."""

    def __init__(self) -> None:
        self._last: dict[str, list[float]] = {}

    def wait(self, name: str) -> None:
        """Return when one more may be."""
        times = self._last.setdefault(name.rpartition("/")[0], [])
        if len(times) >= RESTARTS:
            time.sleep(max(0.0, times[-RESTARTS] + PERIOD_SECONDS - time.monotonic()))
        times.append(time.monotonic())


def body(example: Example) -> None:
    with (
        example.host(start=False) as host,
        mediator_here(host) as mediator,
        example.neighbours(host, 2) as neighbours,
    ):
        before = {s["info"]["session"] for s in host.sessions()}
        pace = Pace()
        for name in [name for name in mediator.actors() if "/executors/" not in name]:
            pace.wait(name)
            reason = mediator.make_raise(name)
            is_ours = isinstance(reason, Crashed) and isinstance(reason.error, InjectedFault)
            example.goes_on(neighbours)
            example.fact(is_ours, f"{name} raised, was restarted, and the neighbours computed on")
        wait_until(lambda: len(host.sessions()) == len(before), "the sessions are known again")
        example.fact(
            {s["info"]["session"] for s in host.sessions()} == before,
            "all sessions are the same as before",
        )

        victim = host.begin("neighbour.py", vm="victim")
        victim.until("turn")
        session = host.session_of(victim)["info"]["session"]
        executors = [name for name in mediator.actors() if "/executors/" in name]
        mediator.make_raise(max(executors, key=lambda name: int(name.rpartition("-")[2])), comes_back=False)
        status, last = victim.finish_by_itself()
        example.fact(
            status == 1 and '"failed": 1' in last and '"wrong": 0' in last,
            f"the executor of session {session} raised: its program got an error, and no wrong number",
        )
        example.goes_on(neighbours)
        newcomer = host.begin("neighbour.py", vm="victim")
        newcomer.until("turn")
        example.settle("a newcomer", newcomer)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, body))
