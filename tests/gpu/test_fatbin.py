# SPDX-License-Identifier: Apache-2.0
"""Fatbins: built here byte by byte, and by nvcc where there is one."""

from __future__ import annotations

import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from vgpu.gpu.software.fatbin import (
    FLAG_ARCHITECTURE_SPECIFIC,
    FLAG_LZ4,
    FLAG_OLD_COMPRESSION,
    FLAG_ZSTD,
    KIND_ELF,
    KIND_PTX,
    MAXIMUM_TEXT,
    ImageError,
    MalformedImage,
    NoUsableImage,
    decompress_lz4,
    entries,
    select_ptx,
)


def entry(
    kind: int,
    architecture: int,
    data: bytes,
    flags: int = 0x11,
    payload: bytes | None = None,
    extra: int = 8,
    announced: int | None = None,
) -> bytes:
    stored = data if payload is None else payload
    padded = stored + bytes(-len(stored) % 8)
    compressed = 0 if payload is None else len(stored)
    size = 64 + extra
    uncompressed = announced if announced is not None else len(data) if payload is not None else 0
    option = 0x40 if kind == KIND_PTX else 0
    header = struct.pack(
        "<HHIQIIHHIIIQQQ",
        kind,
        0x101,
        size,
        len(padded),
        compressed,
        option,
        0,
        8,
        architecture,
        0,
        0,
        flags,
        0,
        uncompressed,
    )
    return header + bytes(extra) + padded


def fatbin(*parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def ptx(architecture: int) -> bytes:
    return f".version 8.0\n.target sm_{architecture}\n.address_size 64\n".encode() + b"\0"


def lz4_literals(data: bytes) -> bytes:
    """A block without copies."""
    out = bytearray()
    count = len(data)
    out.append(min(count, 15) << 4)
    if count >= 15:
        count -= 15
        while count >= 255:
            out.append(255)
            count -= 255
        out.append(count)
    return bytes(out) + data


@pytest.mark.parametrize(
    ("capability", "chosen"),
    [((7, 5), 75), ((7, 9), 75), ((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((12, 0), 90)],
)
def test_newest_ptx_not_newer_than_the_device(capability: tuple[int, int], chosen: int) -> None:
    image = fatbin(
        entry(KIND_ELF, 80, b"\x7fELF..."),
        entry(KIND_PTX, 90, ptx(90)),
        entry(KIND_PTX, 75, ptx(75)),
        entry(KIND_PTX, 80, ptx(80)),
    )
    assert f"sm_{chosen}" in select_ptx(image, capability)
    assert [e.architecture for e in entries(image)] == [80, 90, 75, 80]


def test_oldest_newer_ptx_where_all_is_newer() -> None:
    """Libraries hold machine code for several devices and PTX for the newest: CuPy's CUB module does."""
    image = fatbin(
        entry(KIND_ELF, 75, b"\x7fELF..."),
        entry(KIND_PTX, 120, ptx(120)),
        entry(KIND_PTX, 90, ptx(90), 0x11 | FLAG_ARCHITECTURE_SPECIFIC),
        entry(KIND_PTX, 100, ptx(100)),
    )
    assert "sm_100" in select_ptx(image, (7, 5))


def test_architecture_specific_code_only_for_its_architecture() -> None:
    image = fatbin(
        entry(KIND_PTX, 80, ptx(80)), entry(KIND_PTX, 90, ptx(90), 0x11 | FLAG_ARCHITECTURE_SPECIFIC)
    )
    assert "sm_90" in select_ptx(image, (9, 0))
    assert "sm_80" in select_ptx(image, (10, 0))


@pytest.mark.parametrize("flag", [FLAG_ZSTD, FLAG_LZ4])
def test_compressed_entries(flag: int) -> None:
    text = ptx(75) + b"// " + b"abc" * 1000
    text = text.replace(b"\0", b"\n") + b"\0"
    payload = zstandard.compress(text) if flag == FLAG_ZSTD else lz4_literals(text)
    image = fatbin(entry(KIND_PTX, 75, text, 0x11 | flag, payload))
    assert select_ptx(image, (7, 5)).encode() + b"\0" == text


def test_old_compression_is_refused() -> None:
    image = fatbin(entry(KIND_PTX, 75, ptx(75), 0x11 | FLAG_OLD_COMPRESSION))
    with pytest.raises(MalformedImage, match="old toolkits"):
        select_ptx(image, (7, 5))


def test_without_usable_ptx_it_says_what_there_is() -> None:
    specific = entry(KIND_PTX, 90, ptx(90), 0x11 | FLAG_ARCHITECTURE_SPECIFIC)
    image = fatbin(entry(KIND_ELF, 90, b"\x7fELF"), specific)
    with pytest.raises(NoUsableImage, match="elf sm_90, ptx sm_90"):
        select_ptx(image, (8, 0))
    with pytest.raises(NoUsableImage, match="machine code"):
        select_ptx(b"\x7fELF" + bytes(100), (8, 0))


def test_plain_text_with_and_without_nul() -> None:
    assert select_ptx(ptx(75), (8, 0)) == select_ptx(ptx(75)[:-1], (8, 0)) == ptx(75)[:-1].decode()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "empty"),
        (b"\0\0\0", "empty"),
        (b"\xff\xfe\x01", "neither a known container nor text"),
        (fatbin(entry(KIND_PTX, 75, ptx(75)))[:12], "12 bytes are no fatbin header"),
        (fatbin(entry(KIND_PTX, 75, ptx(75)))[:-8], "in an image of"),
        (fatbin(b"\1" * 40), "40 bytes are left"),
        (
            fatbin(entry(KIND_PTX, 75, ptx(75)).replace(struct.pack("<I", 72), struct.pack("<I", 5000))),
            "header of 5000",
        ),
        (fatbin(entry(KIND_PTX, 75, b"x", 0x11 | FLAG_ZSTD, b"garbage")), "ptx sm_75"),
        (
            fatbin(entry(KIND_PTX, 75, b"x" * 100, 0x11 | FLAG_ZSTD, zstandard.compress(b"x" * 99))),
            "99 bytes, 100 announced",
        ),
        (
            fatbin(entry(KIND_PTX, 75, b"x", 0x11 | FLAG_ZSTD, zstandard.compress(bytes(10**7)))),
            "2 bytes, 1 announced",
        ),
        (fatbin(entry(KIND_PTX, 75, b"", 0x11 | FLAG_LZ4, b"\0", announced=MAXIMUM_TEXT + 1)), "limit"),
    ],
)
def test_malformed_images(image: bytes, message: str) -> None:
    with pytest.raises(MalformedImage, match=message):
        select_ptx(image, (7, 5))


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (b"\x30abc", b"abc"),
        (b"\x3aabc\x03\x00\x10z", b"abc" + b"abcabcabcabcab" + b"z"),  # a copy longer than its offset repeats
        (b"\x44abcd\x04\x00\x00", b"abcdabcdabcd"),
        (b"\x1fa\x01\x00\xff\x00\x10b", b"a" * (1 + 15 + 255 + 4) + b"b"),
        (lz4_literals(b"q" * 700), b"q" * 700),
    ],
)
def test_lz4_blocks(block: bytes, expected: bytes) -> None:
    assert decompress_lz4(block, len(expected)) == expected


@pytest.mark.parametrize(
    "block",
    [b"\x40abc", b"\xf0", b"\x10a\x05\x00", b"\x10a\x00\x00", b"\x1fa\x01\x00\xff", b"\x10a\x01", b"\x30abc"],
)
def test_lz4_damage(block: bytes) -> None:
    with pytest.raises(MalformedImage):
        decompress_lz4(block, 2)


@given(st.binary(max_size=200))
def test_no_bytes_crash_it(data: bytes) -> None:
    for image in (data, fatbin(data), data[:16].ljust(16, b"\0") + data):
        try:
            text = select_ptx(image, (9, 0))
        except ImageError:
            continue
        assert isinstance(text, str)
