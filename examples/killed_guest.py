#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Programs are killed (SIGKILL) in the middle of copying: their workers and their GPU memory are gone within two seconds."""

from __future__ import annotations

import time

from _support import Example, is_alive, main, wait_until

PROMISED_SECONDS = 2.0
ROUNDS = 3


def body(example: Example) -> None:
    with example.host() as host, example.neighbours(host) as neighbours:
        before = len(host.sessions())
        for number in range(ROUNDS):
            guest = host.begin("copies.py", vm="victim")
            guest.until("copying")
            worker = host.worker_of(guest)

            def moved(worker: int = worker) -> int:
                return sum(
                    s["grant"]["bytes_to_device"] + s["grant"]["bytes_from_device"]
                    for s in host.sessions()
                    if s["info"]["worker_pid"] == worker
                )

            wait_until(lambda moved=moved: moved() > 0, "bytes move")  # type: ignore[misc]
            time.sleep(0.013 * number)  # at another moment of the copy each time
            bytes_moved = moved()
            guest.kill()
            gone = wait_until(lambda worker=worker: not is_alive(worker), "the worker is gone")  # type: ignore[misc]
            example.fact(
                gone < PROMISED_SECONDS,
                f"killed after {bytes_moved >> 20} MiB: its worker was gone after {gone * 1000:.0f} ms",
            )
            wait_until(lambda: len(host.sessions()) == before, "its session has ended")
            example.goes_on(neighbours)
        used = sum(s["grant"]["memory_used_bytes"] for s in host.sessions() if s["info"]["vm"] == "victim")
        example.fact(used == 0, f"{used} bytes of GPU memory are left of them")


if __name__ == "__main__":
    raise SystemExit(main(__doc__, body))
