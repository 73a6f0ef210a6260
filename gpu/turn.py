# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is on a GPU: one word, shared by the scheduler and all workers of that GPU.

The word holds two lease tokens: the holder's, who alone may put work on the device, and the next one's. A worker that
has ended its lease, and whose work is done, makes the next one the holder in one atomic step; so the device changes hands
within microseconds, without a message to anybody. Who is next was decided before, at leisure, by ``schedule.py``.

Why tokens and not sessions: a lease that was withdrawn can never begin, since its token is never named again.

``Turn`` is the contract, ``LocalTurn`` a word in this process (tests, the simulator), ``SharedTurn`` a mapped file in the
run directory, which outlives the mediator as its workers do. Docs: docs/wire.md section 3.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Protocol, final

import attrs

TURN_FILE_SIZE = 4096
TOKEN_LIMIT = 1 << 30
# Two bits of a token above its number. Of a session of high priority: its holder yields to nobody.
HIGH_TOKEN = 1 << 31
# Given to a high session beforehand: its worker names it as the next one by itself, and a lower holder then ends its lease.
STANDBY_TOKEN = 1 << 30


@attrs.frozen
class Hands:
    """The word: tokens of the holder and of the next one, 0 nobody."""

    holder: int = 0
    next: int = 0

    def pack(self) -> int:
        """As it is in memory: the holder in the low half."""
        return self.holder | self.next << 32

    @classmethod
    def unpack(cls, word: int) -> Hands:
        """The two halves of a word."""
        return cls(word & 0xFFFFFFFF, word >> 32)


class Turn(Protocol):
    """The word as the scheduler sees it."""

    def load(self) -> Hands:
        """What it is now."""

    def swap(self, expected: Hands, desired: Hands) -> bool:
        """Replace it if it is as expected; atomic."""


@final
@attrs.define(eq=False)
class LocalTurn:
    """A word that nobody else sees."""

    hands: Hands = attrs.Factory(Hands)

    def load(self) -> Hands:
        """What it is now."""
        return self.hands

    def swap(self, expected: Hands, desired: Hands) -> bool:
        """Replace it if it is as expected."""
        if self.hands != expected:
            return False
        self.hands = desired
        return True

    def pass_on(self, token: int) -> bool:
        """What a worker does at the end of its lease. False: it was not its turn."""
        return self.hands.holder == token and self.swap(self.hands, Hands(self.hands.next, 0))

    def take(self, token: int) -> bool:
        """What a worker with a standby lease does when it has something to do. False: it may not now (lease.c)."""
        hands = self.hands
        if token in (hands.holder, hands.next):
            return True
        if hands.holder & HIGH_TOKEN or hands.next & STANDBY_TOKEN:
            return False
        return self.swap(hands, Hands(hands.holder, token) if hands.holder else Hands(token, hands.next))

    def must_yield(self, token: int) -> bool:
        """Has somebody with a standby lease taken the place behind this holder, and may he?"""
        return not token & HIGH_TOKEN and self.hands.holder == token and bool(self.hands.next & STANDBY_TOKEN)


def turn_path(run_dir: Path, device: int) -> Path:
    """Where the word of a GPU lies."""
    return run_dir / f"gpu{device}.turn"


def open_turn_file(path: Path) -> int:
    """A descriptor of the file, made if need be. It only ever grows to its one size.

    Raises:
        OSError: it cannot be had.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if os.fstat(descriptor).st_size < TURN_FILE_SIZE:
            os.ftruncate(descriptor, TURN_FILE_SIZE)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@final
class SharedTurn:
    """The word in a file. Owns its mapping until ``close``; may be closed twice."""

    def __init__(self, path: Path) -> None:
        """Map the file, making it if need be.

        Raises:
            OSError: it cannot be had.
        """
        from ._replay import ffi, lib

        descriptor = open_turn_file(path)
        try:
            self._map = mmap.mmap(descriptor, TURN_FILE_SIZE)
        finally:
            os.close(descriptor)
        self._ffi, self._lib = ffi, lib
        self._memory = ffi.from_buffer("uint64_t[]", self._map, require_writable=True)

    def load(self) -> Hands:
        """What it is now."""
        return Hands.unpack(self._lib.vgpu_turn_load(self._memory))

    def swap(self, expected: Hands, desired: Hands) -> bool:
        """Replace it if it is as expected; atomic, also against the workers."""
        return bool(self._lib.vgpu_turn_swap(self._memory, expected.pack(), desired.pack()))

    def close(self) -> None:
        """Unmap. It must not be used afterwards."""
        self._ffi.release(self._memory)
        self._map.close()
