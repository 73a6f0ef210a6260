# SPDX-License-Identifier: Apache-2.0
"""Every message by bytes: the layouts QEMU uses, both ways, and every limit."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from vgpu.transport.errors import LocalProtocolError, RemoteProtocolError
from vgpu.transport.vfio_user import messages as m

# value, its bytes as they lie on the wire (written by hand from the protocol), decoder
CASES: list[tuple[object, bytes, Callable[[bytes], object]]] = [
    (
        m.Header(0x1234, m.Command.REGION_READ, 32, 0x10),
        struct.pack("<HHIII", 0x1234, 9, 32, 0x10, 0),
        m.Header.decode,
    ),
    (m.Version(0, 0, {"a": 1}), b'\0\0\0\0{"capabilities":{"a":1}}\0', m.Version.decode),
    (
        m.DmaMap(0xC0000, 0x20000, 3, 0x1000),
        struct.pack("<IIQQQ", 32, 3, 0x1000, 0xC0000, 0x20000),
        m.DmaMap.decode,
    ),
    (m.DmaUnmap(0xC0000, 0x20000), struct.pack("<IIQQ", 24, 0, 0xC0000, 0x20000), m.DmaUnmap.decode),
    (m.DeviceInfo(3, 9, 5), struct.pack("<IIII", 16, 3, 9, 5), m.DeviceInfo.decode),
    (
        m.RegionInfo(1, 1 << 28, 0xF, 0, ((0, 1 << 28),), argsz=64),
        struct.pack("<IIIIQQ", 64, 0xF, 1, 32, 1 << 28, 0)
        + struct.pack("<HHIIIQQ", 1, 1, 0, 1, 0, 0, 1 << 28),
        m.RegionInfo.decode,
    ),
    (m.RegionInfo(0, 16384, 3), struct.pack("<IIIIQQ", 32, 3, 0, 0, 16384, 0), m.RegionInfo.decode),
    (m.IrqInfo(3, 1, 1), struct.pack("<IIII", 16, 1, 3, 1), m.IrqInfo.decode),
    (m.SetIrqs(3, 0, 1, 0x24), struct.pack("<IIIII", 20, 0x24, 3, 0, 1), m.SetIrqs.decode),
    (m.SetIrqs(2, 0, 0, 0x21), struct.pack("<IIIII", 20, 0x21, 2, 0, 0), m.SetIrqs.decode),
    (m.RegionAccess(7, 0x40, 4), struct.pack("<QII", 0x40, 7, 4), m.RegionAccess.decode_bare),
]
NAMES = [type(value).__name__ for value, _, _ in CASES]


@pytest.mark.parametrize(("value", "wire", "decode"), CASES, ids=NAMES)
def test_both_ways(value: object, wire: bytes, decode: Callable[[bytes], object]) -> None:
    assert value.encode() == wire  # type: ignore[attr-defined]
    assert decode(wire) == value


@pytest.mark.parametrize(("value", "wire", "decode"), CASES, ids=NAMES)
def test_a_shorter_or_longer_payload_is_refused(
    value: object, wire: bytes, decode: Callable[[bytes], object]
) -> None:
    for cut in range(len(wire)):
        if isinstance(value, m.Version) and cut == 4:
            continue  # the JSON may be missing
        with pytest.raises(RemoteProtocolError):
            decode(wire[:cut])
    with pytest.raises(RemoteProtocolError):
        decode(wire + b"x")


def test_data_follows_an_access() -> None:
    access = m.RegionAccess(0, 8, 3)
    assert m.RegionAccess.decode_with_data(access.encode(b"abc")) == (access, b"abc")
    for data in (b"", b"ab", b"abcd"):
        with pytest.raises(RemoteProtocolError):
            m.RegionAccess.decode_with_data(access.encode(data))


def test_a_region_without_room_for_its_areas_says_how_much_it_needs() -> None:
    info = m.RegionInfo(1, 4096, 7, 0, ((0, 4096),))
    short = m.RegionInfo.decode(info.encode(room=32))
    assert (short.argsz, short.areas, short.flags) == (64, (), 7)
    assert len(info.encode(room=63)) == 32
    assert len(info.encode(room=64)) == 64


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<HHIII", 0, 1, 15, 0, 0),
        struct.pack("<HHIII", 0, 1, m.MAX_MESSAGE_BYTES + 1, 0, 0),
        struct.pack("<HHIII", 0, 1, 16, 2, 0),
        struct.pack("<HHIII", 0, 1, 16, 0x40, 0),
    ],
)
def test_header_limits(header: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        m.Header.decode(header)


def test_the_largest_message_fits() -> None:
    assert m.Header.decode(m.Header(0, 10, m.MAX_MESSAGE_BYTES).encode()).size == m.MAX_MESSAGE_BYTES


@pytest.mark.parametrize(
    "text",
    [
        b"{}",  # no NUL
        b"[]\0",
        b'{"capabilities":3}\0',
        b"\xff\0",
        b"[" * 4000 + b"\0",
        b"{" + b" " * m.MAX_VERSION_BYTES + b"}\0",
    ],
)
def test_version_limits(text: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        m.Version.decode(b"\0\0\0\0" + text)


@pytest.mark.parametrize(
    ("decode", "wire"),
    [
        (m.DmaMap.decode, struct.pack("<IIQQQ", 31, 3, 0, 0, 4096)),
        (m.DmaMap.decode, struct.pack("<IIQQQ", 32, 4, 0, 0, 4096)),
        (m.DmaMap.decode, struct.pack("<IIQQQ", 32, 3, 0, 0, 0)),
        (m.DmaMap.decode, struct.pack("<IIQQQ", 32, 3, 0, (1 << 64) - 4096, 8192)),
        (m.DmaMap.decode, struct.pack("<IIQQQ", 32, 3, (1 << 64) - 4096, 0, 8192)),
        (m.DmaUnmap.decode, struct.pack("<IIQQ", 24, 1, 0, 4096)),
        (m.DmaUnmap.decode, struct.pack("<IIQQ", 24, 0, 0, 0)),
        (m.DmaUnmap.decode, struct.pack("<IIQQ", 24, 0, (1 << 64) - 1, 2)),
        (m.DeviceInfo.decode, struct.pack("<IIII", 15, 0, 0, 0)),
        (m.IrqInfo.decode, struct.pack("<IIII", 15, 0, 0, 0)),
        (m.RegionInfo.decode, struct.pack("<IIIIQQ", 31, 0, 0, 0, 0, 0)),
        (
            m.RegionInfo.decode,
            struct.pack("<IIIIQQHHIII", 999, 8, 0, 32, 0, 0, 1, 1, 0, 17, 0) + bytes(17 * 16),
        ),
        (m.RegionInfo.decode, struct.pack("<IIIIQQHHIII", 999, 8, 0, 32, 0, 0, 2, 1, 0, 0, 0)),
        (m.RegionInfo.decode, struct.pack("<IIIIQQ", 64, 8, 0, 0, 0, 0)),
        (m.SetIrqs.decode, struct.pack("<IIIII", 20, 0x25, 0, 0, 0)),
        (m.SetIrqs.decode, struct.pack("<IIIII", 20, 0x20, 0, 0, 0)),
        (m.SetIrqs.decode, struct.pack("<IIIII", 20, 0x22, 0, 0, 2) + b"x"),
        (m.RegionAccess.decode_bare, struct.pack("<QII", 0, 0, 0)),
        (m.RegionAccess.decode_bare, struct.pack("<QII", 0, 0, m.MAX_DATA_BYTES + 1)),
    ],
)
def test_content_limits(decode: Callable[[bytes], object], wire: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(wire)


@pytest.mark.parametrize(("size", "sound"), [(31, False), (32, True), (64, True), (304, True), (305, False)])
def test_a_question_about_a_region_may_be_as_long_as_the_longest_answer(size: int, sound: bool) -> None:
    wire = struct.pack("<IIIIQQ", 64, 0xF, 1, 0, 4096, 0).ljust(size, b"\1")[:size]
    if sound:
        assert m.RegionInfo.decode_request(wire) == m.RegionInfo(1, argsz=64)
    else:
        with pytest.raises(RemoteProtocolError):
            m.RegionInfo.decode_request(wire)


def test_our_own_mistakes_are_local() -> None:
    with pytest.raises(LocalProtocolError):
        m.Header(1 << 16, 1, 16).encode()
    with pytest.raises(LocalProtocolError):
        m.RegionInfo(1, 4096, 7, 0, ((0, 4096),) * (m.MAX_SPARSE_AREAS + 1)).encode()
