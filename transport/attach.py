# SPDX-License-Identifier: Apache-2.0
"""HELLO and WELCOME: how a guest process asks for a session (docs/wire.md section 1).

Pure: bytes in, values out. Descriptors travel beside the bytes and are the adapter's business. Both
messages have a fixed size, so a reader never needs to trust a length.
"""

from __future__ import annotations

import enum
import struct

import attrs

from .errors import LocalProtocolError, RemoteProtocolError
from .names import NAME_RULE, BadName, is_name
from .text import printable

LAYOUT_VERSION = 1
HELLO_SIZE = 256
WELCOME_SIZE = 64
HELLO_MAGIC = 0x48504756
WELCOME_MAGIC = 0x57504756
NAME_SIZE = 64

_HELLO = struct.Struct("<IIQII64s64s")
_WELCOME = struct.Struct("<IIIIQQQI")
# HELLO flag: the guest wants to know the driver version and nothing else; no session is made.
FLAG_PROBE = 0x1
# HELLO flag: the guest wants to read its VM's device page (NVML); one descriptor comes back, and no session is made.
FLAG_DEVICE_PAGE = 0x2


class Status(enum.IntEnum):
    """How a HELLO was answered."""

    WELCOME = 0
    BUSY = 1
    NO_DEVICE = 2
    REFUSED = 3
    VERSION_MISMATCH = 4


def _vm_name(raw: bytes) -> str:
    """The VM that a guest says it is of, or nothing. Not made fit where it is none: that would be another VM's name."""
    text = raw.split(b"\0", 1)[0]
    name = text.decode("ascii", "replace")
    if name and not is_name(name):
        raise BadName(f"the vm name in HELLO is {text!r}, expected {NAME_RULE}")
    return name


def _padded(text: str, what: str) -> bytes:
    raw = text.encode()
    if len(raw) >= NAME_SIZE or b"\0" in raw:
        raise LocalProtocolError(f"{what} is {len(raw)} bytes, at most {NAME_SIZE - 1} and no NUL")
    return raw


def _program(raw: bytes) -> str:
    """A guest's name for its program: shown and kept, so made harmless. It may have been cut in mid-letter."""
    return printable(raw.split(b"\0", 1)[0].decode("utf-8", "replace"))


@attrs.frozen
class Hello:
    """A guest process asks for a session. Nothing in it is believed but the layout version."""

    pid: int
    table_hash: int
    vm: str = ""
    program: str = ""
    flags: int = 0
    layout_version: int = LAYOUT_VERSION

    def encode(self) -> bytes:
        """The 256 bytes.

        Raises:
            LocalProtocolError: a name is too long.
        """
        body = _HELLO.pack(
            HELLO_MAGIC,
            self.layout_version,
            self.table_hash,
            self.pid,
            self.flags,
            _padded(self.vm, "vm name"),
            _padded(self.program, "program name"),
        )
        return body.ljust(HELLO_SIZE, b"\0")

    @classmethod
    def decode(cls, data: bytes) -> Hello:
        """Read a whole HELLO.

        Raises:
            RemoteProtocolError: wrong size or wrong magic.
            BadName: no VM may be called so.
        """
        if len(data) != HELLO_SIZE:
            raise RemoteProtocolError(f"HELLO is {len(data)} bytes, expected {HELLO_SIZE}")
        magic, version, table_hash, pid, flags, vm, program = _HELLO.unpack_from(data)
        if magic != HELLO_MAGIC:
            raise RemoteProtocolError(f"HELLO begins with {magic:#x}, expected {HELLO_MAGIC:#x}")
        return cls(pid, table_hash, _vm_name(vm), _program(program), flags, version)


@attrs.frozen
class Welcome:
    """The mediator's answer. With status WELCOME two descriptors follow: segment and lifeline; to a probe none."""

    status: Status
    retry_milliseconds: int = 0
    session_id: int = 0
    segment_size: int = 0
    worker_address: int = 0
    # As cuDriverGetVersion gives it; answered to a probe.
    driver_version: int = 0

    def encode(self) -> bytes:
        """The 64 bytes."""
        body = _WELCOME.pack(
            WELCOME_MAGIC,
            LAYOUT_VERSION,
            self.status,
            self.retry_milliseconds,
            self.session_id,
            self.segment_size,
            self.worker_address,
            self.driver_version,
        )
        return body.ljust(WELCOME_SIZE, b"\0")

    @classmethod
    def decode(cls, data: bytes) -> Welcome:
        """Read a whole WELCOME.

        Raises:
            RemoteProtocolError: wrong size, wrong magic or version, or an unknown status.
        """
        if len(data) != WELCOME_SIZE:
            raise RemoteProtocolError(f"WELCOME is {len(data)} bytes, expected {WELCOME_SIZE}")
        magic, version, status, retry, session, size, address, driver = _WELCOME.unpack_from(data)
        if magic != WELCOME_MAGIC or version != LAYOUT_VERSION:
            raise RemoteProtocolError(f"WELCOME has magic {magic:#x}, layout version {version}")
        try:
            known = Status(status)
        except ValueError:
            raise RemoteProtocolError(f"WELCOME has unknown status {status}") from None
        return cls(known, retry, session, size, address, driver)
