#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A header that changes after it was checked (double fetch): a second process of the guest rewrites records while they are read.

The worker copies a header out of shared memory once and checks the copy. Were a field read again after its check, a length
or an address could be anything by then. Two processes play the guest: one submits, the other never stops flipping the
fields of the record at hand between right and wrong ones.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

from _raw_guest import INVALID_VALUE, RawGuest, SessionDead
from _support import Example, Host, NotSo, main

from vgpu.transport.wire import FLAG_REPLY, CallId

# Of the header: call u16 at 0, flags u16 at 2, payload_length u32 at 4, slot u16 at 12, arguments from 16 on.
PAYLOAD_LENGTH, SLOT, ARGUMENT = 4, 12, 16
PAYLOAD = 16
TURNS = 500
PATIENCE = 30.0
"""Seconds after which right values only, or wrong ones only, mean that there was no race at all."""
FATAL_SESSIONS = 3
FATAL_TURNS = 100
PATTERN = bytes(range(1, PAYLOAD + 1))


@contextmanager
def flipper(guest: RawGuest, where: mmap.mmap, fields: list[tuple[int, int, int, int]]) -> Iterator[None]:
    """Another process that writes wrong, then right, into each field of the record at ``where``.

    ``fields``: offset in the header, bytes, right value, wrong value.
    """
    pid = os.fork()
    if pid == 0:
        position = memoryview(where).cast("Q")
        views = {2: guest.bytes.cast("H"), 4: guest.bytes.cast("I"), 8: guest.bytes.cast("Q")}
        flips = 0
        while True:
            at = position[0]
            if not at:
                os.sched_yield()
                continue
            for offset, size, right, wrong in fields:
                index, view = (at + offset) // size, views[size]
                view[index] = wrong
                view[index] = right
            flips += len(fields)
            position[1] = flips
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def flips_of(where: mmap.mmap) -> int:
    """How many fields the flipper has rewritten so far."""
    flips: int = struct.unpack_from("<Q", where, 8)[0]
    return flips


def submit(guest: RawGuest, where: mmap.mmap, address: int) -> int:
    """One copy of 16 bytes to the device, while its header changes; the status it is answered with."""
    sequence = guest.sequence
    guest.expect(sequence, (0, 1))
    record = guest.record(CallId.wireCopyInline, address, PAYLOAD, 0, payload=PATTERN, flags=FLAG_REPLY)
    before = flips_of(where)
    where[:8] = struct.pack("<Q", guest.put(record))
    # Published only once it is being rewritten: where processors are few, worker and flipper take turns on one of them.
    while flips_of(where) == before:
        os.sched_yield()
    guest.publish()
    try:
        return guest.answer(sequence, (0, 1)).status
    finally:
        where[:8] = bytes(8)


def changing(example: Example, host: Host) -> None:
    """Every value is one that a record may have, so the session must live through all of it."""
    with RawGuest(host.run_dir, "hostile") as guest, mmap.mmap(-1, 4096) as where:
        guest.retain()
        address = guest.allocate(4096)
        fields = [
            (ARGUMENT, 8, address, 0xDEAD0000),
            (ARGUMENT + 8, 8, PAYLOAD, 1 << 40),
            (SLOT, 2, 0, 1),
        ]
        statuses: dict[int, int] = {}
        with flipper(guest, where, fields):
            turns, end = 0, time.monotonic() + PATIENCE
            while turns < TURNS or (len(statuses) < 2 and time.monotonic() < end):
                status = submit(guest, where, address)
                statuses[status] = statuses.get(status, 0) + 1
                turns += 1
            flips = flips_of(where)
        seen = ", ".join(f"{count} with {status}" for status, count in sorted(statuses.items()))
        example.fact(
            sum(statuses.values()) == turns,
            f"{turns} copies under {flips} flips of address, size and slot: answered {seen}",
        )
        example.fact(len(statuses) > 1, "right and wrong values were both caught: the race was on")
        example.fact(not guest.is_dead, "the session lives, and its worker with it")


def forbidden(example: Example, host: Host) -> None:
    """The wrong length breaks a rule of the ring: the session may end, with that error and no other."""
    ends = answered = 0
    for _ in range(FATAL_SESSIONS):
        with RawGuest(host.run_dir, "hostile") as guest, mmap.mmap(-1, 4096) as where:
            guest.retain()
            address = guest.allocate(4096)
            try:
                with flipper(guest, where, [(PAYLOAD_LENGTH, 4, PAYLOAD, 0xFFFFFFF0)]):
                    for _ in range(FATAL_TURNS):
                        submit(guest, where, address)
                        answered += 1
            except SessionDead as dead:
                ends += 1
                if dead.code != INVALID_VALUE:
                    raise NotSo(f"the session ended with error {dead.code}") from None
    example.fact(
        True,
        f"lengths that flip to 4 GiB: {answered} answered, {ends} of {FATAL_SESSIONS} sessions ended with error 1",
    )


def body(example: Example) -> None:
    with example.host() as host, example.neighbours(host) as neighbours:
        changing(example, host)
        forbidden(example, host)
        example.goes_on(neighbours)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, body))
