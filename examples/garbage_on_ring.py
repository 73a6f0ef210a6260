#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Garbage on the ring: a guest without our library writes noise and forged records; its own session ends or refuses, no other.

Records that break a rule of docs/wire.md end the session with CUDA_ERROR_INVALID_VALUE. Records that are well-formed and ask
for something wild are answered with an error, and the session lives.
"""

from __future__ import annotations

import random

from _raw_guest import INVALID_VALUE, RawGuest, SessionDead
from _support import Example, Host, main, wait_until

from vgpu.transport.wire import FLAG_REPLY, CallHeader, CallId

WILD_SESSIONS = 3
WILD_CALLS = 300
FAULTS = 3  # that quarantine a VM


def header(**changes: int) -> bytes:
    return CallHeader(changes.pop("call", CallId.cuCtxGetLimit), **changes).encode()  # type: ignore[arg-type]


def broken(noise: random.Random) -> dict[str, tuple[bytes, int | None]]:
    """What is written, and the tail that is claimed, where it is not the right one."""
    reserved = bytearray(header())
    reserved[14] = 1
    return {
        "noise for a header": (noise.randbytes(4096), None),
        "a payload of 4 GiB": (header(payload_length=0xFFFFFFF0), None),
        "a payload beyond the tail": (header(payload_length=160), None),
        "a slot past the last": (header(flags=FLAG_REPLY, slot=0xFFFF), None),
        "unknown flags": (header(flags=0xFFF0), None),
        "reserved bytes set": (bytes(reserved), None),
        "a tail far ahead": (header(), 1 << 60),
        "a tail between records": (header(), 81),
    }


def ends(host: Host, vm: str, data: bytes, tail: int | None) -> tuple[bool, int]:
    """Is the session over, and with which error?"""
    with RawGuest(host.run_dir, vm) as guest:
        guest.put(data)
        guest.publish(tail)
        guest.ring_bell()
        wait_until(lambda: guest.is_dead, "the session is ended")
        return guest.is_dead, guest.sticky


def wild_calls(example: Example, host: Host, noise: random.Random) -> None:
    """Well-formed records of every kind with arguments that mean nothing, one session after the other."""
    # Left out: goodbye, which ends a session as it should, and a callback, which this guest has no thread to run.
    calls = [c for c in CallId if c.name not in ("wirePad", "wireGoodbye", "wireHostFunction")]
    refused = answered = 0
    used = set()
    for _ in range(WILD_SESSIONS):
        with RawGuest(host.run_dir, "hostile") as guest:
            guest.retain()
            address = guest.allocate(4096)
            for _ in range(WILD_CALLS):
                common = (0, 1, address, 1 << 47, (1 << 64) - 1)
                arguments = [noise.choice((*common, noise.getrandbits(64))) for _ in range(8)]
                call, payload = noise.choice(calls), noise.randbytes(noise.choice((0, 8, 64, 1024)))
                try:
                    status = guest.ask(call, *arguments, payload=payload).status
                except SessionDead as dead:
                    example.fact(False, f"{call.name}{arguments} ended its session with error {dead.code}")
                    break
                answered += 1
                refused += status != 0
                used.add(call)
    example.fact(
        answered == WILD_SESSIONS * WILD_CALLS,
        f"{answered} forged calls of {len(used)} kinds were answered, {refused} of them with an error; no worker died",
    )


def body(example: Example) -> None:
    noise = random.Random(21)
    with example.host() as host, example.neighbours(host) as neighbours:
        for number, (what, (data, tail)) in enumerate(broken(noise).items()):
            # A VM that does so three times is quarantined, so others take turns.
            is_dead, code = ends(host, f"hostile-{number // FAULTS}", data, tail)
            example.fact(is_dead and code == INVALID_VALUE, f"{what}: that session ended, with error {code}")
        wait_until(lambda: "hostile-0" in host.admin("list-quarantines"), "a VM that did so is quarantined")
        example.fact(True, f"a VM that did so {FAULTS} times is quarantined")
        wild_calls(example, host, noise)
        reasons = {
            s["ended"] for s in host.ask("sessions") if s["ended"] and s["info"]["vm"].startswith("hostile")
        }
        example.say(f"the mediator says why: {', '.join(sorted(reasons))}")
        example.goes_on(neighbours)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, body))
