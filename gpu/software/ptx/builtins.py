# SPDX-License-Identifier: Apache-2.0
"""Device functions that have no PTX body: vprintf, __assertfail, malloc, free; and the plain copy behind cp.async.

Text from device memory is hostile like everything a guest wrote: lengths are bounded, conversions are parsed here and never
handed to the host's printf.
"""

from __future__ import annotations

import re
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .batch import LOCAL_WINDOW, Batch, Group, pick
from .errors import AssertFailure

Array = npt.NDArray[Any]

_MAXIMUM_TEXT: Final = 64 << 10  # a format or a %s longer than this is cut
_MAXIMUM_WIDTH: Final = 4096
_CONVERSION: Final = re.compile(
    r"%([-+ #0]*)(\*|\d+)?(?:\.(\*|\d+)?)?(hh|h|ll|l|j|z|t|L)?([diouxXcsfFeEgGaAp%])|%"
)
_LONG: Final = frozenset({"l", "ll", "j", "z", "t"})


def read_text(batch: Batch, group: Group, lane: int, address: int) -> str:
    """The NUL-terminated string at a lane's generic address."""
    out = bytearray()
    one = Group(group.slots[lane : lane + 1], [], False)
    while len(out) < _MAXIMUM_TEXT:
        if address + len(out) < LOCAL_WINDOW >> 1:  # global: read as far as its allocation goes
            found = batch.space.find(address + len(out))
            if found is not None:
                piece = batch.space.read(address, min(found[0] + found[1] - address, _MAXIMUM_TEXT))
                return piece.partition(b"\0")[0].decode("utf-8", "replace")
        (byte,) = batch.load(one, "generic", np.array([address + len(out)], np.uint64), 1, 1)
        if not byte[0]:
            break
        out.append(int(byte[0]))
    return out.decode("utf-8", "replace")


class _Arguments:
    """A lane's vprintf buffer: each value at its own alignment, as the C ABI promotes it."""

    def __init__(self, batch: Batch, group: Group, lane: int, address: int) -> None:
        self._batch = batch
        self._lane = Group(group.slots[lane : lane + 1], [], False)
        self._address = address
        self._offset = 0

    def take(self, size: int) -> npt.NDArray[Any]:
        self._offset = -(-self._offset // size) * size
        at = np.array([self._address + self._offset], np.uint64)
        self._offset += size
        return self._batch.load(self._lane, "generic", at, size, 1)[0]


def _format(batch: Batch, group: Group, lane: int, text: str, arguments: _Arguments) -> tuple[str, int]:
    """(the formatted text, how many arguments it took)."""
    taken = 0

    def convert(match: re.Match[str]) -> str:
        nonlocal taken
        flags, width, precision, length, letter = match.groups()
        if letter is None:
            return "%"
        if letter == "%":
            return "%"

        def number(field: str | None) -> int | None:
            nonlocal taken
            if field != "*":
                return int(field) if field else None
            taken += 1
            return int(arguments.take(4).view(np.int32)[0])

        wide = number(width)
        digits = number(precision)
        if "." in match.group() and digits is None:
            digits = 0
        if wide is not None and wide < 0:
            flags, wide = flags + "-", -wide
        spec = (
            "%" + "".join(dict.fromkeys(flags)) + (str(min(wide, _MAXIMUM_WIDTH)) if wide is not None else "")
        )
        if digits is not None and digits >= 0:
            spec += f".{min(digits, _MAXIMUM_WIDTH)}"
        taken += 1
        if letter in "diouxXc":
            bits = arguments.take(8 if length in _LONG else 4)
            if letter == "c":
                return (spec.partition(".")[0] + "s") % chr(int(bits[0]) & 0xFF)
            signed = letter in "di"
            value = int(bits.view(f"i{bits.itemsize}")[0]) if signed else int(bits[0])
            if length in ("h", "hh"):
                width_bits = 16 if length == "h" else 8
                value &= (1 << width_bits) - 1
                if signed and value >> (width_bits - 1):
                    value -= 1 << width_bits
            if letter == "o" and "#" in spec:
                return (spec.replace("#", "") + "s") % (f"0{value:o}" if value else "0")
            return (spec + ("d" if letter in "diu" else letter)) % value
        if letter == "p":
            return (spec.partition(".")[0] + "s") % f"0x{int(arguments.take(8)[0]):x}"
        if letter == "s":
            address = int(arguments.take(8)[0])
            content = read_text(batch, group, lane, address) if address else "(null)"
            return (spec + "s") % content
        double = float(arguments.take(8).view(np.float64)[0])
        if letter in "aA":
            plain = double.hex()
            return (spec.partition(".")[0] + "s") % (plain if letter == "a" else plain.upper())
        return (spec + letter) % double

    return _CONVERSION.sub(convert, text), taken


def vprintf(batch: Batch, group: Group, count: int, formats: Array, buffers: Array) -> Array:
    """Print lane by lane, in thread order; gives each lane its number of arguments."""
    out = np.zeros(count, np.uint32)
    cache: dict[int, str] = {}
    for lane in np.argsort(group.slots, kind="stable").tolist():
        address = int(formats[lane if formats.size > 1 else 0])
        text = cache.get(address)
        if text is None:
            text = cache[address] = read_text(batch, group, lane, address)
        arguments = _Arguments(batch, group, lane, int(buffers[lane if buffers.size > 1 else 0]))
        line, taken = _format(batch, group, lane, text, arguments)
        batch.printf(line)
        out[lane] = taken
    return out


def assertfail(
    batch: Batch,
    group: Group,
    count: int,
    message: Array,
    file: Array,
    line: Array,
    function: Array,
    _: Array | None = None,
) -> None:
    """A device assert() failed. Raises: AssertFailure with a line for each thread, as CUDA prints them."""
    lines = []
    for lane in np.argsort(group.slots, kind="stable").tolist():
        texts = [
            read_text(batch, group, lane, address) if address else ""
            for address in (
                int(pointer[lane if pointer.size > 1 else 0]) for pointer in (file, function, message)
            )
        ]
        place = [
            ",".join(
                str(int(pick(batch.special(group, f"%{base}.{axis}"), np.array([lane]))[0])) for axis in "xyz"
            )
            for base in ("ctaid", "tid")
        ]
        number = int(line[lane if line.size > 1 else 0])
        lines.append(
            f"{texts[0]}:{number}: {texts[1]}: block: [{place[0]}], thread: [{place[1]}] Assertion `{texts[2]}` failed."
        )
    raise AssertFailure("\n".join(lines))


assert_fail = assertfail


def malloc(batch: Batch, group: Group, count: int, sizes: Array) -> Array:
    """Device-side malloc, from the same heap as cuMemAlloc; null where it is used up."""
    out = np.zeros(count, np.uint64)
    for lane in range(count):
        size = int(sizes[lane if sizes.size > 1 else 0])
        if 0 < size <= batch.space.capacity:
            try:
                out[lane] = batch.space.allocate(size)
            except MemoryError:
                continue
    return out


def free(batch: Batch, group: Group, count: int, addresses: Array) -> None:
    """Device-side free; of something that is not a live allocation: nothing (undefined on hardware)."""
    for lane in range(count):
        address = int(addresses[lane if addresses.size > 1 else 0])
        found = batch.space.find(address)
        if address and found is not None and found[0] == address:
            try:
                batch.space.free(address)
            except KeyError:
                continue


def copy(
    batch: Batch, group: Group, count: int, to: Array, source: Array, size: int, kept: Array | None
) -> None:
    """cp.async: `size` bytes per lane from global to shared; beyond `kept` bytes zeros are written instead."""
    element = 4 if size % 4 == 0 else 1
    pieces = size // element
    if kept is None:
        batch.store(group, "shared", to, element, batch.load(group, "global", source, element, pieces))
        return
    for piece in range(pieces):
        offset = np.uint64(piece * element)
        wanted = np.broadcast_to(kept > np.uint32(piece * element), (count,))
        lanes = np.flatnonzero(wanted)
        value = np.zeros(count, np.uint32 if element == 4 else np.uint8)
        if lanes.size:
            (loaded,) = batch.load(group, "global", source + offset, element, 1, lanes)
            value[lanes] = loaded
        batch.store(group, "shared", to.astype(np.uint64) + offset, element, [value])
