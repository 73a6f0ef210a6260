# SPDX-License-Identifier: Apache-2.0
"""Device code containers: which PTX to run out of what a program hands to a module load function.

Takes the bytes (the caller has found out how long they are, and has followed a `__fatBinC_Wrapper_t` to its data) of a fatbin,
of PTX text or of an ELF cubin, and gives the best PTX for a compute capability. Machine code is of no use to a device that
executes PTX, so an image of cubins alone is refused. Every length comes from a guest: nothing is read past the image, and
nothing is decompressed past a limit.

A fatbin is a 16-byte header (magic 0xBA55ED50, version, header size, bytes that follow) and entries, each a header of at
least 64 bytes and a payload: PTX or ELF for one architecture, plain, LZ4 (a raw block) or zstd.

    ImageError
    ├── MalformedImage      not a container we can read (CUDA_ERROR_INVALID_IMAGE)
    └── NoUsableImage       readable, but without PTX this device can run (CUDA_ERROR_NO_BINARY_FOR_GPU)
"""

from __future__ import annotations

import struct
from typing import Final

import attrs
import zstandard

FATBIN_MAGIC: Final = 0xBA55ED50
ELF_MAGIC: Final = b"\x7fELF"
KIND_PTX: Final = 1
KIND_ELF: Final = 2
FLAG_OLD_COMPRESSION: Final = 0x1000
FLAG_LZ4: Final = 0x2000
FLAG_ZSTD: Final = 0x8000
FLAG_ARCHITECTURE_SPECIFIC: Final = 0x100000  # sm_90a and its like: for that architecture only
MAXIMUM_TEXT: Final = (
    256 << 20
)  # the largest PTX known is some tens of MB; a bomb must not fill the host's memory

_HEADER: Final = struct.Struct("<IHHQ")
_ENTRY: Final = struct.Struct("<HHIQIIHHIIIQQQ")


class ImageError(Exception):
    """Device code that cannot be loaded."""


class MalformedImage(ImageError):
    """The bytes are not a container or text that we can read."""


class NoUsableImage(ImageError):
    """Nothing in the image can run on this device; the message lists what there is."""


@attrs.frozen
class Entry:
    """One image of a fatbin. `architecture` is 75 for sm_75."""

    kind: int
    architecture: int
    flags: int
    payload: bytes = attrs.field(repr=False)
    uncompressed_size: int
    version: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{ {KIND_PTX: 'ptx', KIND_ELF: 'elf'}.get(self.kind, f'kind{self.kind}') } sm_{self.architecture}"

    def contents(self) -> bytes:
        """The payload, decompressed. Raises: MalformedImage."""
        if self.flags & FLAG_OLD_COMPRESSION:
            raise MalformedImage(f"{self.name}: the compression of old toolkits is not read")
        if self.flags & (FLAG_LZ4 | FLAG_ZSTD) and self.uncompressed_size > MAXIMUM_TEXT:
            raise MalformedImage(f"{self.name}: {self.uncompressed_size} bytes, limit {MAXIMUM_TEXT}")
        if self.flags & FLAG_LZ4:
            return decompress_lz4(self.payload, self.uncompressed_size)
        if self.flags & FLAG_ZSTD:
            try:
                # Streamed, because a frame's own header is not to be believed about the size.
                with zstandard.ZstdDecompressor().stream_reader(self.payload) as reader:
                    data = reader.read(self.uncompressed_size + 1)
            except zstandard.ZstdError as error:
                raise MalformedImage(f"{self.name}: {error}") from None
            if len(data) != self.uncompressed_size:
                raise MalformedImage(f"{self.name}: {len(data)} bytes, {self.uncompressed_size} announced")
            return data
        return self.payload


def decompress_lz4(block: bytes, size: int) -> bytes:
    """A raw LZ4 block that holds exactly `size` bytes. Raises: MalformedImage.

    Sequences of (literals, copy from what came out before); format: https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md
    """
    out = bytearray()
    position, end = 0, len(block)

    def extended(length: int) -> int:
        nonlocal position
        while True:
            if position >= end:
                raise MalformedImage("LZ4 block ends inside a length")
            more = block[position]
            position += 1
            length += more
            if more != 255:
                return length

    while position < end:
        token = block[position]
        position += 1
        literals = token >> 4
        if literals == 15:
            literals = extended(literals)
        if position + literals > end or len(out) + literals > size:
            raise MalformedImage("LZ4 literals run past the end")
        out += block[position : position + literals]
        position += literals
        if position == end:
            break  # the last sequence has no copy
        if position + 2 > end:
            raise MalformedImage("LZ4 block ends inside an offset")
        offset = block[position] | block[position + 1] << 8
        position += 2
        length = token & 15
        if length == 15:
            length = extended(length)
        length += 4
        start = len(out) - offset
        if offset == 0 or start < 0 or len(out) + length > size:
            raise MalformedImage("LZ4 copy outside what has come out")
        if offset >= length:
            out += out[start : start + length]
        else:  # the copy reads what it writes: a repeating pattern
            pattern = bytes(out[start:])
            out += (pattern * (length // offset + 1))[:length]
    if len(out) != size:
        raise MalformedImage(f"LZ4 block holds {len(out)} bytes, {size} announced")
    return bytes(out)


def entries(image: bytes) -> list[Entry]:
    """The entries of a fatbin. Raises: MalformedImage."""
    if len(image) < _HEADER.size:
        raise MalformedImage(f"{len(image)} bytes are no fatbin header")
    magic, version, header_size, size = _HEADER.unpack_from(image)
    if magic != FATBIN_MAGIC or version != 1 or header_size < _HEADER.size:
        raise MalformedImage(f"fatbin magic {magic:#x}, version {version}, header of {header_size} bytes")
    end = header_size + size
    if end > len(image):
        raise MalformedImage(f"fatbin of {end} bytes in an image of {len(image)}")
    found = []
    position = header_size
    while position < end:
        if end - position < _ENTRY.size:
            if any(image[position:end]):
                raise MalformedImage(f"{end - position} bytes are left where an entry should begin")
            break  # padding
        fields = _ENTRY.unpack_from(image, position)
        kind, _, entry_size, padded, compressed, _, minor, major, architecture = fields[:9]
        flags, uncompressed = fields[11], fields[13]
        start = position + entry_size
        if entry_size < _ENTRY.size or padded > end - start or start > end:
            raise MalformedImage(f"entry at {position}: header of {entry_size} and payload of {padded} bytes")
        if compressed > padded:
            raise MalformedImage(f"entry at {position}: {compressed} compressed bytes in {padded}")
        payload = image[start : start + (compressed or padded)]
        found.append(Entry(kind, architecture, flags, payload, uncompressed, (major, minor)))
        position = start + padded
    return found


def _text(data: bytes) -> str:
    data = data.partition(b"\0")[0]
    if len(data) > MAXIMUM_TEXT:
        raise MalformedImage(f"PTX of {len(data)} bytes, limit {MAXIMUM_TEXT}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedImage(f"neither a known container nor text: {error}") from None


def select_ptx(image: bytes, capability: tuple[int, int], *, newer: bool = True) -> str:
    """The PTX of an image that suits a device best: the newest one not newer than its compute capability.

    Where there is none, the oldest newer one, unless ``newer`` says no. Libraries carry machine code for many devices and PTX for the last of
    them only; what executes PTX has no use for the former, and no architecture of its own that would keep it from the
    latter: an instruction it has not is refused by name.

    `image` begins with a fatbin header, ELF or PTX text (which may end in NUL). Code for one architecture only (sm_90a)
    counts where it is this one. Raises: MalformedImage, NoUsableImage.
    """
    if image[:4] == ELF_MAGIC:
        raise NoUsableImage("machine code (a cubin): this device executes PTX")
    if image[:4] != FATBIN_MAGIC.to_bytes(4, "little"):
        if not image.partition(b"\0")[0].strip():
            raise MalformedImage("the image is empty")
        return _text(image)
    listed = entries(image)
    device = capability[0] * 10 + capability[1]
    usable = [
        entry
        for entry in listed
        if entry.kind == KIND_PTX
        and (entry.architecture == device or not entry.flags & FLAG_ARCHITECTURE_SPECIFIC)
    ]
    best: Entry | None = None
    for entry in usable:
        if entry.architecture <= device and (best is None or entry.architecture >= best.architecture):
            best = entry
    if best is None and newer:
        best = min(usable, key=lambda entry: entry.architecture, default=None)
    if best is None:
        there = ", ".join(entry.name for entry in listed) or "nothing"
        raise NoUsableImage(
            f"no PTX for compute capability {capability[0]}.{capability[1]}; the image holds {there}"
        )
    return _text(best.contents())
