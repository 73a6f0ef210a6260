# SPDX-License-Identifier: Apache-2.0
"""The flight recorder of a worker, as the mediator reads it: the last calls of a session, also after SIGKILL.

The memory (``struct vgpu_flight`` of ``wire.h``, behind the grant page) is the worker's to write and no guest's to see.
It digests what guests send, though, so nothing in it is taken for granted. Reading neither waits nor fails on
what is in it.
"""

from __future__ import annotations

import os
import struct

import attrs

from vgpu.transport._generated_calls import CallId
from vgpu.transport.text import printable

__all__ = ["FLIGHT_SIZE", "Flight", "FlightCall", "read_flight"]

OFFSET = 4096
FLIGHT_SIZE = 53248
MAGIC = 0x31544847494C4656
ENTRIES = NAMES = 256
UNFINISHED = 0xFFFFFFFF
_HEAD = struct.Struct("<QQI")
_HEAD_SIZE = 64
_ENTRY = struct.Struct("<IIQQ5Q")
_NAME_SIZE = 128
_NAMES_AT = _HEAD_SIZE + ENTRIES * _ENTRY.size
_SUSPECT_AT = _NAMES_AT + NAMES * _NAME_SIZE
_CALLS = {int(call): call.name for call in CallId}


@attrs.frozen
class FlightCall:
    """A call: ``status`` is None while it was being replayed. A launch has kernel (perhaps "?"), grid and block."""

    call: str
    sequence: int
    began_ns: int
    status: int | None
    kernel: str = ""
    grid: tuple[int, ...] = ()
    block: tuple[int, ...] = ()


@attrs.frozen
class Flight:
    """``taken``: calls in all; ``calls``: the last of them, oldest first; ``suspect``: the launch the device is at."""

    taken: int
    fatal_signal: int
    calls: tuple[FlightCall, ...]
    suspect: FlightCall | None

    @property
    def stuck_launch(self) -> FlightCall | None:
        """The launch that does not end, as far as that is known."""
        if self.calls and self.calls[-1].status is None and self.calls[-1].kernel:
            return self.calls[-1]
        return self.suspect


def read_flight(grant_fd: int) -> Flight | None:
    """What the worker wrote down; None where its file has no recorder."""
    data = os.pread(grant_fd, FLIGHT_SIZE, OFFSET)
    if len(data) < FLIGHT_SIZE:
        return None
    magic, taken, fatal_signal = _HEAD.unpack_from(data)
    if magic != MAGIC:
        return None
    known = min(taken, ENTRIES)
    first = taken - known
    calls = tuple(_call(data, _HEAD_SIZE + (first + i) % ENTRIES * _ENTRY.size) for i in range(known))
    suspect = _call(data, _SUSPECT_AT)
    return Flight(taken, fatal_signal, calls, suspect if suspect.kernel else None)


def _call(data: bytes, at: int) -> FlightCall:
    call, status, sequence, began_ns, *arguments = _ENTRY.unpack_from(data, at)
    done = None if status == UNFINISHED else status
    name = _CALLS.get(call, f"call {call}")
    if call == CallId.cuGraphLaunch:
        return FlightCall(name, sequence, began_ns, done, "(graph)")
    if call != CallId.wireLaunch:
        return FlightCall(name, sequence, began_ns, done)
    shape = struct.unpack("<6I", struct.pack("<3Q", *arguments[1:4]))
    return FlightCall(
        "cuLaunchKernel", sequence, began_ns, done, _name(data, arguments[0]), shape[:3], shape[3:]
    )


def _name(data: bytes, function: int) -> str:
    slot = function * 0x9E3779B97F4A7C15 % (1 << 64) >> 56
    at = _NAMES_AT + slot * _NAME_SIZE
    if int.from_bytes(data[at : at + 8], "little") != function:
        return "?"
    # The guest's word, out of its module: it is kept and shown.
    return printable(data[at + 8 : at + _NAME_SIZE].split(b"\0", 1)[0].decode("utf-8", "replace")) or "?"
