#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The ledger's disk is full: running programs do not notice, newcomers wait, and all goes on when there is room again.

A library that is preloaded into the mediator lets every write to the ledger fail as on a full disk (ENOSPC) while a file
exists.
"""

from __future__ import annotations

import time

from _support import Example, build, main, wait_until

FULL_SECONDS = 4.0


def body(example: Example) -> None:
    with example.folder() as folder:
        flag = folder / "full"
        preload = build("preload/full_disk.c", folder, "-ldl")
        settings = {"FULL_DISK_NAME": "ledger.sqlite", "FULL_DISK_WHILE": str(flag)}
        with (
            example.host(preload=preload, environment=settings) as host,
            example.neighbours(host) as neighbours,
        ):
            mediator, sessions = host.pid, len(host.sessions())
            leaver = host.begin("neighbour.py", vm="leaves")
            leaver.until("turn")
            flag.touch()
            example.say(f"the disk is full for {FULL_SECONDS:g} s; two programs come, and one that runs ends")
            began = time.monotonic()
            newcomers = [host.begin("neighbour.py", vm=f"late-{n}") for n in range(2)]
            time.sleep(FULL_SECONDS / 2)
            example.settle("a program that ends meanwhile", leaver)
            time.sleep(FULL_SECONDS / 2)
            example.fact(host.is_running and host.pid == mediator, "the mediator runs")
            example.fact(
                all(n.turn() == 0 and n.process.poll() is None for n in newcomers),
                "the newcomers wait: no session begins that the ledger does not have",
            )
            example.goes_on(neighbours)
            health = host.ask("health")
            example.fact(
                not health["ok"] and bool(health["trouble"]), f"show-health says so: {health['trouble'][0]}"
            )
            restarts = {actor["name"]: actor["restarts"] for actor in host.ask("tree")[0]["children"]}
            example.fact(
                restarts["mediator/ledger"] == 0,
                "the ledger's actor refuses what it cannot write, and lives on",
            )
            flag.unlink()
            waited = time.monotonic() - began
            for newcomer in newcomers:
                newcomer.until("turn")
            after = time.monotonic() - began - waited
            example.fact(True, f"with room again the newcomers were in after {after:.1f} s")
            for number, newcomer in enumerate(newcomers, 1):
                example.settle(f"newcomer {number}", newcomer)
            wait_until(lambda: len(host.sessions()) == sessions, "their sessions have ended")
            wait_until(lambda: host.ask("health")["ok"], "the ledger is well again")
            wait_until(lambda: not host.ask("health")["records_waiting"], "no record waits any more")
            health = host.ask("health")
            example.fact(
                health["records_lost"] == health["records_waiting"] == 0,
                "what was to be written then is written, all of it",
            )


if __name__ == "__main__":
    raise SystemExit(main(__doc__, body))
