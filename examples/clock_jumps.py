#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The wall clock jumps by hours and years, twenty times a second: leases, watchdog and sessions do not care.

Everything is timed by CLOCK_MONOTONIC; the wall clock is only written down. A library preloaded into the mediator and its
workers makes CLOCK_REALTIME jump, and the ledger's times show that it did.
"""

from __future__ import annotations

import time

from _support import Example, build, main, wait_until

DEADLINE = 2.0
ROUNDS = 2


def body(example: Example) -> None:
    with example.folder() as folder:
        preload = build("preload/clock_jumps.c", folder)
        with example.host(preload=preload) as host:
            host.admin("register-vm", "--vm-name=hangs", "--no-device", f"--watchdog={DEADLINE:g}s")
            with example.neighbours(host, 2) as neighbours:
                for _ in range(ROUNDS):
                    guest = host.begin("hang.py", vm="hangs")
                    example.hung("the program of a hung kernel", guest, DEADLINE)
                    guest.finish()
                    example.goes_on(neighbours)
                wait_until(lambda: len(host.ask("faults")) == ROUNDS, "the faults are written down")
                times = [fault["at"] for fault in host.ask("faults")]
                wrong = max(abs(at - time.time()) for at in times)
                example.fact(
                    wrong > 60, f"the clock did jump: a fault is written down {wrong / 3600:.0f} hours off"
                )


if __name__ == "__main__":
    raise SystemExit(main(__doc__, body))
