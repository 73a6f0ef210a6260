# SPDX-License-Identifier: Apache-2.0
"""Call headers and results as bytes: the Python half of ``wire.h``.

Pure: bytes in, values out. The same golden vectors (tests/data/golden_wire.json) are read by this
module's tests and by a C program that includes ``wire.h``. See docs/wire.md section 2.
"""

from __future__ import annotations

import struct

import attrs

# Public here: a client that writes records by hand needs the calls' numbers and the table that they are from.
from ._generated_calls import TABLE_HASH as TABLE_HASH  # noqa: PLC0414 - exported
from ._generated_calls import CallId as CallId  # noqa: PLC0414
from .errors import LocalProtocolError, RemoteProtocolError

CALL_HEADER_SIZE = 80
RESULT_SIZE = 40
RECORD_ALIGNMENT = 16
CALL_ARGUMENTS = 8
RESULT_VALUES = 4
FLAG_REPLY = 0x0001
# Largest payload a record carries; more goes through the arena.
INLINE_LIMIT = 65536

_CALL = struct.Struct("<HHIIHH8Q")
_RESULT = struct.Struct("<IHH4Q")
assert _CALL.size == CALL_HEADER_SIZE
assert _RESULT.size == RESULT_SIZE


def _check(name: str, value: int, bits: int) -> None:
    if not 0 <= value < 1 << bits:
        raise LocalProtocolError(f"{name} is {value}, must fit {bits} unsigned bits")


@attrs.frozen
class CallHeader:
    """One call: id, flags, payload length in bytes, sequence, completion slot, eight arguments."""

    call: int
    arguments: tuple[int, ...] = (0,) * CALL_ARGUMENTS
    flags: int = 0
    payload_length: int = 0
    sequence: int = 0
    slot: int = 0

    def encode(self) -> bytes:
        """The 80 bytes.

        Raises:
            LocalProtocolError: a field does not fit, or there are more than eight arguments.
        """
        if len(self.arguments) > CALL_ARGUMENTS:
            raise LocalProtocolError(f"{len(self.arguments)} arguments, at most {CALL_ARGUMENTS}")
        for name, value, bits in (
            ("call", self.call, 16),
            ("flags", self.flags, 16),
            ("payload_length", self.payload_length, 32),
            ("sequence", self.sequence, 32),
            ("slot", self.slot, 16),
        ):
            _check(name, value, bits)
        for index, value in enumerate(self.arguments):
            _check(f"argument {index}", value, 64)
        padded = self.arguments + (0,) * (CALL_ARGUMENTS - len(self.arguments))
        return _CALL.pack(self.call, self.flags, self.payload_length, self.sequence, self.slot, 0, *padded)

    @classmethod
    def decode(cls, data: bytes | memoryview) -> CallHeader:
        """Read a header from the first 80 bytes; what follows is not looked at.

        Raises:
            RemoteProtocolError: fewer than 80 bytes, or the reserved field is not zero.
        """
        if len(data) < CALL_HEADER_SIZE:
            raise RemoteProtocolError(f"call header is {len(data)} bytes, expected {CALL_HEADER_SIZE}")
        call, flags, length, sequence, slot, reserved, *arguments = _CALL.unpack_from(data)
        if reserved:
            raise RemoteProtocolError(f"reserved field of a call header is {reserved}, expected 0")
        return cls(call, tuple(arguments), flags, length, sequence, slot)

    @property
    def record_size(self) -> int:
        """Bytes the record takes in the ring: header, payload, padding to 16."""
        return -(-(CALL_HEADER_SIZE + self.payload_length) // RECORD_ALIGNMENT) * RECORD_ALIGNMENT


@attrs.frozen
class Result:
    """One answer: sequence of its call, CUresult, bytes of reply payload, four values."""

    sequence: int
    status: int = 0
    payload_length: int = 0
    values: tuple[int, ...] = (0,) * RESULT_VALUES

    def encode(self) -> bytes:
        """The 40 bytes.

        Raises:
            LocalProtocolError: a field does not fit, or there are more than four values.
        """
        if len(self.values) > RESULT_VALUES:
            raise LocalProtocolError(f"{len(self.values)} values, at most {RESULT_VALUES}")
        for name, value, bits in (
            ("sequence", self.sequence, 32),
            ("status", self.status, 16),
            ("payload_length", self.payload_length, 16),
        ):
            _check(name, value, bits)
        for index, value in enumerate(self.values):
            _check(f"value {index}", value, 64)
        padded = self.values + (0,) * (RESULT_VALUES - len(self.values))
        return _RESULT.pack(self.sequence, self.status, self.payload_length, *padded)

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Result:
        """Read a result from the first 40 bytes.

        Raises:
            RemoteProtocolError: fewer than 40 bytes.
        """
        if len(data) < RESULT_SIZE:
            raise RemoteProtocolError(f"result is {len(data)} bytes, expected {RESULT_SIZE}")
        sequence, status, length, *values = _RESULT.unpack_from(data)
        return cls(sequence, status, length, tuple(values))
