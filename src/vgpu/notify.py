# SPDX-License-Identifier: Apache-2.0
"""What systemd is told of the mediator (sd_notify protocol), where it asked.

READY, RELOADING and STOPPING when that is so, and WATCHDOG for as long as the event loop gets round: a mediator that hangs is
ended and started again, and its sessions go on meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping

import trio

# What is said once is waited with until there is room for it, as sd_notify does, but not for ever: a READY that is lost leaves the
# service starting, or reloading, until systemd gives it up.
ROOM_SECONDS = 5.0


def notify(*lines: str, room_seconds: float = ROOM_SECONDS) -> None:
    """Say it, if anybody listens; whether anybody hears is not our affair. ``room_seconds``: how long a full queue is waited for."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(room_seconds)
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        sock.send("\n".join(lines).encode())


def notify_reloading() -> None:
    """A reload begins; READY ends it."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def watchdog_seconds(environment: Mapping[str, str], pid: int) -> float | None:
    """How often this process is to say that it lives, half of what systemd waits for; None where it need not."""
    microseconds, who = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", str(pid))
    if not (microseconds.isascii() and microseconds.isdigit() and int(microseconds)) or who != str(pid):
        return None
    return int(microseconds) / 2e6


async def keep_watchdog() -> None:
    """Say that this lives, until cancelled; returns at once where nobody wants to hear it."""
    seconds = watchdog_seconds(os.environ, os.getpid())
    while seconds is not None:
        notify("WATCHDOG=1", room_seconds=0)  # the next beat says the same
        await trio.sleep(seconds)
