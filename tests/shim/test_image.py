# SPDX-License-Identifier: Apache-2.0
"""How long is an image of which only the first byte is known? Every shape, every truncation, a page that ends with it.

Each image is put so that it ends where a page that cannot be read begins: one byte too far is a crash, in a child.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

HERE = Path(__file__).parent
NONE, FATBIN, ELF, ARCHIVE, PTX = range(5)
INVALID_VALUE, INVALID_IMAGE = 1, 200
UNKNOWN = 2**64 - 1
PAGE = mmap.PAGESIZE

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("image") / "probe.so"
    command = ["gcc", "-std=gnu11", "-D_GNU_SOURCE", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra"]
    subprocess.run([*command, str(HERE / "c" / "image_probe.c"), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.probe_kind.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint64)]
    loaded.probe_describe.argtypes = [
        ctypes.c_void_p,
        *[ctypes.POINTER(ctypes.c_uint32)] * 2,
        ctypes.c_void_p,
    ]
    return loaded


class Guarded:
    """Bytes that end where a page without access begins."""

    def __init__(self, content: bytes) -> None:
        pages = (len(content) + PAGE - 1) // PAGE
        self.size = (pages + 1) * PAGE
        base = libc.mmap(
            None, self.size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
        )
        assert base not in (None, 2**64 - 1)
        self.base = base
        self.address = base + pages * PAGE - len(content)
        ctypes.memmove(self.address, content, len(content))
        assert libc.mprotect(base + pages * PAGE, PAGE, 0) == 0

    def __enter__(self) -> int:
        return int(self.address)

    def __exit__(self, *_: object) -> None:
        libc.munmap(self.base, self.size)


def in_child(check: Callable[[], None]) -> None:
    """Run where a crash is only a child's crash."""
    child = os.fork()
    if child == 0:
        try:
            check()
        except BaseException as error:  # noqa: BLE001 - the child must end here, whatever it was
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"child ended with {status:#x}"


def kind_of(probe: ctypes.CDLL, content: bytes, limit: int | None = None) -> tuple[int, int]:
    length = ctypes.c_uint64()
    with Guarded(content) as address:
        found = probe.probe_kind(address, len(content) if limit is None else limit, ctypes.byref(length))
    return found, length.value


def fatbin(payload: bytes = b"p" * 100, magic: int = 0xBA55ED50, header: int = 16) -> bytes:
    return struct.pack("<IHHQ", magic, 1, header, len(payload)) + b"\0" * (header - 16) + payload


def elf(
    *,
    sections: int = 3,
    segments: int = 2,
    programs_last: bool = True,
    nobits: bool = True,
    extended: bool = False,
) -> bytes:
    """A cubin's shape: header, contents, section headers, and the program headers last."""
    content = b"c" * 200
    at = 64 + len(content)
    section_offset = at if sections else 0
    program_offset = at + 64 * sections
    if not programs_last:
        program_offset, section_offset = at, at + 56 * segments if sections else 0
    headers = b""
    for index in range(sections):
        kind, offset, size = (0, 0, 0) if index == 0 else (1, 64, 100)
        if index == 2 and nobits:
            kind, offset, size = 8, 64, 1 << 30  # takes no bytes of the file
        if index == 0 and extended:
            size = sections
        headers += struct.pack("<IIQQQQIIQQ", 0, kind, 0, 0, offset, size, 0, 0, 0, 0)
    programs = b"".join(struct.pack("<IIQQQQQQ", 1, 5, 64, 0, 0, 200, 200, 4) for _ in range(segments))
    identity = b"\x7fELF\x02\x01\x01\x33\x07" + b"\0" * 7
    head = identity + struct.pack(
        "<HHIQQQIHHHHHH", 2, 190, 1, 0, program_offset if segments else 0, section_offset, 0, 64, 56 if segments else 0,
        segments, 64 if sections else 0, 0 if extended else sections, 0,
    )  # fmt: skip
    tables = headers + programs if programs_last else programs + headers
    return head + content + tables


def archive(*members: bytes) -> bytes:
    out = b"!<arch>\n"
    for number, member in enumerate(members):
        out += (
            f"m{number}/".ljust(16).encode()
            + b"0".ljust(12)
            + b"0".ljust(6)
            + b"0".ljust(6)
            + b"644".ljust(8)
        )
        out += str(len(member)).ljust(10).encode() + b"`\n" + member + (b"\n" if len(member) % 2 else b"")
    return out


PTX_TEXT = b"\n  // white space and a comment first\n.version 7.0\n.target sm_52\n.entry k() { ret; }\n\0"
IMAGES = {
    "fatbin": (fatbin(), FATBIN),
    "fatbin, old magic": (fatbin(magic=0x1EE55A01), FATBIN),
    "fatbin with a longer header": (fatbin(header=32), FATBIN),
    "empty fatbin": (fatbin(b""), FATBIN),
    "fatbin of more than a page": (fatbin(os.urandom(3 * PAGE)), FATBIN),
    "cubin, program headers last": (elf(), ELF),
    "cubin, section headers last": (elf(programs_last=False), ELF),
    "cubin without program headers": (elf(segments=0), ELF),
    "ELF without sections": (elf(sections=0), ELF),
    "section count in section 0": (elf(extended=True), ELF),
    "PTX": (PTX_TEXT, PTX),
    "one letter": (b"x\0", PTX),
    "text beyond ASCII": ("// héllo\n\0".encode(), PTX),
}


@pytest.mark.parametrize("name", IMAGES)
def test_the_length_is_all_of_it(probe: ctypes.CDLL, name: str) -> None:
    content, kind = IMAGES[name]
    in_child(lambda: _equal(kind_of(probe, content, UNKNOWN), (kind, len(content))))
    # What follows an image is none of its bytes. (An archive ends at the first byte that is no header.)
    assert kind_of(probe, content + b"\xff" * 70, UNKNOWN) == (kind, len(content))


def _equal(found: object, expected: object) -> None:
    assert found == expected, f"{found} is not {expected}"


@pytest.mark.parametrize("name", IMAGES)
def test_every_truncation_is_noticed(probe: ctypes.CDLL, name: str) -> None:
    content, _ = IMAGES[name]

    def cut() -> None:
        step = 1 if len(content) < 2000 else 97
        for length in range(0, len(content), step):
            _equal(kind_of(probe, content[:length])[0], NONE)

    in_child(cut)


def test_archives(probe: ctypes.CDLL) -> None:
    whole = archive(b"even", b"odd", b"", b"x" * 5000)
    assert kind_of(probe, whole) == (ARCHIVE, len(whole))
    assert kind_of(probe, whole + b"\0" * 100) == (ARCHIVE, len(whole))
    shorter = archive(b"even")
    in_child(lambda: _equal(kind_of(probe, whole[: len(shorter)]), (ARCHIVE, len(shorter))))

    def cut() -> None:
        for length in range(len(whole)):
            _equal(kind_of(probe, whole[:length])[0] in (NONE, ARCHIVE), True)

    in_child(cut)
    assert kind_of(probe, b"!<arch>\n")[0] == NONE


DAMAGED = {
    "nothing": b"\0",
    "control characters": b"\x01\x02\x03\x04\0",
    "fatbin header of 8 bytes": struct.pack("<IHHQ", 0xBA55ED50, 1, 8, 4) + b"abcd",
    "fatbin longer than the world": struct.pack("<IHHQ", 0xBA55ED50, 1, 16, 2**63),
    "32-bit ELF": b"\x7fELF\x01\x01" + b"\0" * 58,
    "big-endian ELF": b"\x7fELF\x02\x02" + b"\0" * 58,
    "sections of 8 bytes": elf().replace(struct.pack("<HHH", 64, 3, 0), struct.pack("<HHH", 8, 3, 0)),
    "a wrapper is no image": struct.pack("<IIQQ", 0x466243B1, 1, 0, 0),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged(probe: ctypes.CDLL, name: str) -> None:
    in_child(lambda: _equal(kind_of(probe, DAMAGED[name])[0], NONE))


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(IMAGES)), seed=st.integers(0, 2**32))
def test_changed_bytes_never_read_past_the_limit(probe: ctypes.CDLL, name: str, seed: int) -> None:
    chance = random.Random(seed)
    content = bytearray(IMAGES[name][0])

    def bend() -> None:
        for _ in range(40):
            content[chance.randrange(len(content))] = chance.choice(
                [0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)]
            )
            kind, length = kind_of(probe, bytes(content))
            _equal(kind == NONE or length <= len(content), True)

    in_child(bend)


# ---- wrappers: pointers to fatbins, taken apart by the guest ----


def describe(probe: ctypes.CDLL, address: int | None) -> tuple[int, int, list[int]]:
    wrapper, parts = ctypes.c_uint32(), ctypes.c_uint32()
    lengths = (ctypes.c_uint64 * 8)()
    status = probe.probe_describe(address, ctypes.byref(wrapper), ctypes.byref(parts), lengths)
    return status, wrapper.value, list(lengths[: parts.value])


def wrapped(
    probe: ctypes.CDLL, version: int, parts: list[bytes], *, listed: bool = True
) -> tuple[int, int, list[int]]:
    guarded = [Guarded(part) for part in parts]
    pointers = Guarded(b"".join(g.address.to_bytes(8, "little") for g in guarded[1:]) + bytes(8))
    head = struct.pack(
        "<IIQQ", 0x466243B1, version, guarded[0].address if guarded else 0, pointers.address if listed else 0
    )
    with Guarded(head) as address, pointers:
        result = describe(probe, address)
    for one in guarded:
        one.__exit__()
    return result


def test_wrappers(probe: ctypes.CDLL) -> None:
    first, second, third = fatbin(b"1" * 40), fatbin(b"2" * 5000), fatbin(b"")
    assert wrapped(probe, 1, [first], listed=False) == (0, 1, [len(first)])
    assert wrapped(probe, 1, [first]) == (0, 1, [len(first)])  # version 1: the field is a name, not a list
    assert wrapped(probe, 2, [first], listed=False) == (0, 2, [len(first)])
    assert wrapped(probe, 2, [first]) == (0, 2, [len(first)])
    assert wrapped(probe, 2, [first, second, third]) == (0, 2, [len(first), len(second), len(third)])
    assert wrapped(probe, 1, [elf()], listed=False) == (0, 1, [len(elf())])
    assert wrapped(probe, 3, [first])[0] == INVALID_IMAGE
    assert wrapped(probe, 1, [], listed=False)[0] == INVALID_IMAGE
    assert wrapped(probe, 1, [b"\x01\x02\x03\0"], listed=False)[0] == INVALID_IMAGE
    assert wrapped(probe, 2, [first, b"\x01\0"])[0] == INVALID_IMAGE


def test_bare_pointers(probe: ctypes.CDLL) -> None:
    assert describe(probe, None)[0] == INVALID_VALUE
    for content, _ in IMAGES.values():
        with Guarded(content) as address:
            assert describe(probe, address) == (0, 0, [len(content)])
    for content in (b"\0", b"\x01\0"):
        with Guarded(content) as address:
            assert describe(probe, address)[0] == INVALID_IMAGE
