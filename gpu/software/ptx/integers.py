# SPDX-License-Identifier: Apache-2.0
"""Integer instructions that NumPy has no single operation for, on arrays of lanes.

Shapes as in numerics: length 1 (all lanes alike) or the number of lanes. Nothing here warns on overflow: integers wrap.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_U32: Final = np.uint64(0xFFFF_FFFF)
_S32: Final = np.uint64(32)


def mul_hi(a: Array, b: Array) -> Array:
    """Upper half of the product; the dtype says the width and the signedness."""
    kind = a.dtype
    if kind.itemsize < 8:
        wide = np.dtype(f"{kind.kind}{kind.itemsize * 2}")
        out: Array = ((a.astype(wide) * b.astype(wide)) >> wide.type(kind.itemsize * 8)).astype(kind)
        return out
    x, y = a.view(np.uint64), b.view(np.uint64)
    x0, x1, y0, y1 = x & _U32, x >> _S32, y & _U32, y >> _S32
    low, middle = x0 * y0, x1 * y0
    middle = middle + (low >> _S32)
    other = x0 * y1 + (middle & _U32)
    high: Array = x1 * y1 + (middle >> _S32) + (other >> _S32)
    if kind.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(kind)


def divide(a: Array, b: Array) -> Array:
    """Truncating; by zero gives all ones, as the hardware does."""
    quotient: Array = np.floor_divide(a, b)
    if a.dtype.kind == "i":
        inexact = quotient * b != a
        quotient = quotient + (inexact & ((a < 0) != (b < 0))).astype(a.dtype)
    return np.where(b == 0, a.dtype.type(0) - a.dtype.type(1), quotient) if (b == 0).any() else quotient


def remainder(a: Array, b: Array) -> Array:
    """Sign of the dividend; by zero gives the dividend."""
    out: Array = np.fmod(a, b)
    return np.where(b == 0, a, out) if (b == 0).any() else out


def add_saturating(a: Array, b: Array, sign: int = 1) -> Array:
    limits = np.iinfo(a.dtype)
    total = a.astype(np.int64) + sign * b.astype(np.int64)
    out: Array = np.clip(total, limits.min, limits.max).astype(a.dtype)
    return out


def sum_absolute_difference(a: Array, b: Array, c: Array) -> Array:
    """c + |a - b|, in the unsigned dtype of c."""
    out: Array = np.where(a > b, a - b, b - a).view(c.dtype) + c
    return out


def population(a: Array) -> Array:
    out: Array = np.bitwise_count(a).astype(np.uint32)
    return out


def leading_zeros(a: Array) -> Array:
    bits = a.dtype.itemsize * 8
    x = a
    shift = 1
    while shift < bits:
        x = x | (x >> a.dtype.type(shift))
        shift *= 2
    out: Array = np.uint32(bits) - population(x)
    return out


def find_top(a: Array, shift_amount: bool) -> Array:
    """bfind: place of the highest bit that differs from the sign (from the top where `shift_amount`); none: all ones."""
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    x = np.where(a < 0, ~a, a).view(unsigned) if a.dtype.kind == "i" else a
    zeros = leading_zeros(x)
    place = zeros if shift_amount else np.uint32(a.dtype.itemsize * 8 - 1) - zeros
    return np.where(x == 0, np.uint32(0xFFFF_FFFF), place)


def reverse_bits(a: Array) -> Array:
    unsigned = a.dtype
    raw = np.ascontiguousarray(a).view(np.uint8).reshape(-1, unsigned.itemsize)
    bits = np.unpackbits(raw, axis=1, bitorder="little")[:, ::-1]
    out: Array = np.packbits(bits, axis=1, bitorder="little").view(unsigned).reshape(-1)
    return out


def _low_mask(count: Array, kind: np.dtype[Any]) -> Array:
    """`count` ones at the bottom; counts at or past the width give all ones."""
    one = kind.type(1)
    full = kind.type(np.iinfo(kind).max)
    bits = kind.itemsize * 8
    out: Array = np.where(count >= bits, full, (one << np.minimum(count, bits - 1).astype(kind)) - one)
    return out


def extract(a: Array, position: Array, length: Array) -> Array:
    """bfe; the dtype of `a` says whether the field is sign-extended."""
    kind = a.dtype
    unsigned = np.dtype(f"u{kind.itemsize}")
    top = kind.itemsize * 8 - 1
    position, length = position & np.uint32(0xFF), length & np.uint32(0xFF)
    field: Array = (a.view(unsigned) >> position.astype(unsigned)) & _low_mask(length, unsigned)
    if kind.kind == "u":
        return field
    # The sign is bit pos+len-1 of a, or its top bit where the field reaches past the end.
    last = np.minimum(position.astype(np.int64) + length - 1, top)
    sign = (a.view(unsigned) >> np.maximum(last, 0).astype(unsigned)) & unsigned.type(1)
    negative = (sign != 0) & (length != 0)
    kept = np.minimum(length.astype(np.int64), np.maximum(top + 1 - position.astype(np.int64), 0))
    out: Array = np.where(negative, field | ~_low_mask(kept, unsigned), field).view(kind)
    return out


def insert(a: Array, b: Array, position: Array, length: Array) -> Array:
    """bfi: the low `length` bits of a, placed into b."""
    kind = a.dtype
    position, length = (position & np.uint32(0xFF)).astype(kind), length & np.uint32(0xFF)
    mask = _low_mask(length, kind) << position
    out: Array = (b & ~mask) | ((a << position) & mask)
    return out


def bit_mask(position: Array, width: Array, clamp: bool) -> Array:
    """bmsk.b32."""
    if not clamp:
        position, width = position & np.uint32(31), width & np.uint32(31)
    out: Array = _low_mask(width, np.dtype(np.uint32)) << position
    return out


def sign_extend_at(a: Array, position: Array, clamp: bool) -> Array:
    """szext: keep `position` bits, extend by the dtype's signedness."""
    if not clamp:
        position = position & np.uint32(31)
    unsigned = a.view(np.uint32)
    mask = _low_mask(position, np.dtype(np.uint32))
    low: Array = unsigned & mask
    if a.dtype.kind == "u":
        return low
    sign = (
        unsigned >> np.minimum(np.maximum(position.astype(np.int64) - 1, 0), 31).astype(np.uint32)
    ) & np.uint32(1)
    out: Array = np.where((sign != 0) & (position != 0), low | ~mask, low).view(a.dtype)
    return out


def funnel(low: Array, high: Array, amount: Array, left: bool, clamp: bool) -> Array:
    """shf: 32 bits out of high:low shifted left or right."""
    amount = np.minimum(amount, np.uint32(32)) if clamp else amount & np.uint32(31)
    both = (high.astype(np.uint64) << _S32) | low
    count = amount.astype(np.uint64)
    moved = (both << count) >> _S32 if left else both >> count
    out: Array = (moved & _U32).astype(np.uint32)
    return out


def logic3(a: Array, b: Array, c: Array, table: int) -> Array:
    """lop3 with a constant table: the minterms that are set, or those that are not, whichever are fewer."""
    if table == 0 or table == 0xFF:
        return np.full(1, np.uint32(0 if table == 0 else 0xFFFF_FFFF))
    inverted = table.bit_count() > 4
    wanted = table ^ 0xFF if inverted else table
    na, nb, nc = ~a, ~b, ~c
    out: Array | None = None
    for row in range(8):
        if wanted >> row & 1:
            term = (a if row & 4 else na) & (b if row & 2 else nb) & (c if row & 1 else nc)
            out = term if out is None else out | term
    assert out is not None
    return ~out if inverted else out


_MODES: Final = {
    "f4e": ((3, 2, 1, 0), (4, 3, 2, 1), (5, 4, 3, 2), (6, 5, 4, 3)),
    "b4e": ((5, 6, 7, 0), (6, 7, 0, 1), (7, 0, 1, 2), (0, 1, 2, 3)),
    "rc8": ((0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3)),
    "ecl": ((3, 2, 1, 0), (3, 2, 1, 1), (3, 2, 2, 2), (3, 3, 3, 3)),
    "ecr": ((0, 0, 0, 0), (1, 1, 1, 0), (2, 2, 1, 0), (3, 2, 1, 0)),
    "rc16": ((1, 0, 1, 0), (3, 2, 3, 2), (1, 0, 1, 0), (3, 2, 3, 2)),
}


def permute(a: Array, b: Array, selector: Array, mode: str = "") -> Array:
    """prmt. Byte i of the result is picked by nibble i of the selector; its top bit replicates the byte's sign."""
    both = (b.astype(np.uint64) << _S32) | a
    out: Array = np.zeros(1, np.uint32)
    for place in range(4):
        if mode:
            # _MODES rows list bytes from the top down, for each value of the selector's low two bits.
            rows = np.array([row[3 - place] for row in _MODES[mode]], dtype=np.uint64)
            pick, sign = rows[selector & np.uint32(3)], np.zeros(1, bool)
        else:
            nibble = (selector >> np.uint32(4 * place)) & np.uint32(15)
            pick, sign = (nibble & np.uint32(7)).astype(np.uint64), (nibble & np.uint32(8)) != 0
        byte = ((both >> (pick * np.uint64(8))) & np.uint64(0xFF)).astype(np.uint32)
        if sign.any():
            byte = np.where(sign, np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0)), byte)
        out = out | (byte << np.uint32(8 * place))
    return out


def dot4(a: Array, b: Array, c: Array, a_signed: bool, b_signed: bool) -> Array:
    """dp4a on bits (uint32 in, uint32 out)."""
    total = c
    for place in range(4):
        shift = np.uint32(8 * place)
        x, y = ((a >> shift) & np.uint32(0xFF)), ((b >> shift) & np.uint32(0xFF))
        x = x.astype(np.uint8).view(np.int8).astype(np.int32).view(np.uint32) if a_signed else x
        y = y.astype(np.uint8).view(np.int8).astype(np.int32).view(np.uint32) if b_signed else y
        total = total + x * y
    return total


def dot2(a: Array, b: Array, c: Array, a_signed: bool, b_signed: bool, high: bool) -> Array:
    """dp2a: 16-bit halves of a times two bytes of b."""
    total = c
    for place in range(2):
        x = (a >> np.uint32(16 * place)) & np.uint32(0xFFFF)
        y = (b >> np.uint32(8 * (place + (2 if high else 0)))) & np.uint32(0xFF)
        x = x.astype(np.uint16).view(np.int16).astype(np.int32).view(np.uint32) if a_signed else x
        y = y.astype(np.uint8).view(np.int8).astype(np.int32).view(np.uint32) if b_signed else y
        total = total + x * y
    return total


def add_carry(a: Array, b: Array, carry: Array) -> tuple[Array, Array]:
    """(a + b + carry, carry out) on unsigned arrays; carry is 0 or 1 of the same dtype."""
    first = a + b
    total = first + carry
    return total, ((first < a) | (total < first)).astype(a.dtype)


def subtract_borrow(a: Array, b: Array, borrow: Array) -> tuple[Array, Array]:
    first = a - b
    total = first - borrow
    return total, ((a < b) | (first < borrow)).astype(a.dtype)
