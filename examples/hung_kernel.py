#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A kernel that never ends, beside a healthy VM: the watchdog ends its worker, its program is told, nobody else notices.

The VM's deadline is two seconds here, so that you need not wait for the thirty that are the default.
"""

from __future__ import annotations

from _support import LAUNCH_TIMEOUT, Example, is_alive, main, wait_until

DEADLINE = 2.0


def body(example: Example) -> None:
    with example.host() as host:
        host.admin("register-vm", "--vm-name=hangs", "--no-device", f"--watchdog={DEADLINE:g}s")
        with example.neighbours(host, 2) as neighbours:
            guest = host.begin("hang.py", vm="hangs")
            guest.until("launching")
            worker = host.worker_of(guest)
            example.say(f"VM hangs launches a kernel that never ends; its deadline is {DEADLINE:g} s")
            example.hung("its program", guest, DEADLINE)
            again = int(guest.until("allocate").split()[1])
            example.fact(again == LAUNCH_TIMEOUT, f"and the error stays ({again})")
            wait_until(lambda: not is_alive(worker), "the worker is gone")
            example.fact(True, "the worker with the kernel is gone")
            # It is kept after the program was told.
            wait_until(lambda: host.ask("faults") != [], "the ledger has the fault")
            (fault,) = host.ask("faults")
            example.fact(
                fault["vm"] == "hangs", f"the ledger has the fault: {fault['error']} {fault['what']}"
            )
            example.goes_on(neighbours)
            successor = host.begin("neighbour.py", vm="hangs")
            successor.until("turn")
            example.settle("the VM's next program", successor)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, body))
