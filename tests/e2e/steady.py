# SPDX-License-Identifier: Apache-2.0
"""The guest that most tests of failures have, as victim or as neighbour: programs/steady.c, which computes and checks its
results, turn after turn, until its input ends or a call fails. Nothing in here is about what is done to it."""

from __future__ import annotations

from pathlib import Path

import attrs

from tests.e2e.mediator import Guest, Mediator


@attrs.frozen
class Steady:
    """The program, compiled; the fixture ``steady`` has it."""

    program: Path
    kernels: Path

    def begin(self, mediator: Mediator, vm: str | None = None) -> Guest:
        """One that is at work: it has a session and has finished a few turns."""
        return self.begin_together(mediator, vm)[0]

    def begin_together(self, mediator: Mediator, *vms: str | None) -> list[Guest]:
        """One for each VM named, which start at the same time: all are at work, and little of the first lies in its pipe."""
        guests = [mediator.begin(self.program, self.kernels, vm=vm) for vm in vms]
        for guest in guests:
            guest.until("turn 3")
        return guests

    def run(self, mediator: Mediator, vm: str | None = None) -> None:
        """Have one come, compute and end, which shows that the VM is served."""
        ends_well(self.begin(mediator, vm))


def goes_on(guest: Guest, turns: int = 10) -> None:
    """It computes on: so many turns follow on its next one.

    What it wrote before counts, too. Ask for more turns than lie in the pipe where that matters.
    """
    turn = int(guest.until("turn").split()[1])
    guest.until(f"turn {turn + turns}")


def ends_well(guest: Guest) -> None:
    """Its input ends, and then it does; no call of it has failed."""
    status, lines = guest.finish()
    assert (status, lines[-1].split()[0]) == (0, "done")
