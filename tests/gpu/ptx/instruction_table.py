# SPDX-License-Identifier: Apache-2.0
"""PTX instructions, one row each, with what they must give: exact arithmetic on Python's integers and fractions.

A row is the instruction's text (`d` the result, `a` `b` `c` the operands), the operand types, the result type and a
function of plain values. Integers arrive as Python ints of the operand's signedness, floating point as (bits, value)
free floats. Floating point references return a Fraction to be rounded, or a float that is final.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BITS = {f"{letter}{bits}": bits for letter in "bsu" for bits in (8, 16, 32, 64)} | {
    "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "f16x2": 32, "bf16x2": 32, "pred": 1,
}  # fmt: skip
# (precision in bits, smallest exponent of a normal number, largest exponent)
FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023)}


def round_to(value: Fraction, kind: str, mode: str = "rn") -> float:
    """An exact value in a binary format, as a Python float. Zero results are +0 (callers mind signs)."""
    precision, low, high = FORMATS[kind]
    if value == 0:
        return 0.0
    sign, magnitude = (-1 if value < 0 else 1), abs(value)
    exponent = max(magnitude.numerator.bit_length() - magnitude.denominator.bit_length() - 1, low)
    while magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    unit = Fraction(2) ** (exponent - precision + 1)
    scaled = magnitude / unit
    floor = scaled.numerator // scaled.denominator
    rest = scaled - floor
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and floor % 2 == 1),
        "rz": False,
        "rm": sign < 0 and rest > 0,
        "rp": sign > 0 and rest > 0,
    }[mode]
    result = (floor + up) * unit
    largest = (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** high
    if result > largest:
        to_infinity = mode == "rn" or (mode == "rp" and sign > 0) or (mode == "rm" and sign < 0)
        return sign * (math.inf if to_infinity else float(largest))
    return sign * float(result)


def to_bits(value: float, kind: str) -> int:
    if math.isnan(value):
        return {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0x7FFFFFFFFFFFFFFF}[kind]
    if kind == "f64":
        return int(struct.unpack("<Q", struct.pack("<d", value))[0])
    if kind == "f32":
        return int(np.float32(value).view(np.uint32))
    if kind == "f16":
        return int(np.float16(value).view(np.uint16))
    return int(np.float32(value).view(np.uint32)) >> 16


def from_bits(bits: int, kind: str) -> float:
    if kind == "f64":
        return float(struct.unpack("<d", struct.pack("<Q", bits))[0])
    if kind == "f32":
        return float(np.uint32(bits).view(np.float32))
    if kind == "f16":
        return float(np.uint16(bits).view(np.float16))
    return float(np.uint32(bits << 16).view(np.float32))


def wrap(value: int, kind: str) -> int:
    """Bits of an integer result."""
    return value & ((1 << BITS[kind]) - 1)


def signed(bits: int, width: int) -> int:
    return bits - (1 << width) if bits >> (width - 1) else bits


def operand(bits: int, kind: str) -> Any:
    if kind in FORMATS:
        return from_bits(bits, kind)
    return signed(bits, BITS[kind]) if kind[0] == "s" else bits


INTERESTING = {
    16: [0, 1, 2, 5, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF, 0x1234],
    32: [0, 1, 2, 3, 7, 31, 32, 33, 0x7F, 0x80, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFE, 0xFFFFFFFF],
    64: [0, 1, 5, 63, 64, 65, 0xFFFFFFFF, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 63) + 1, (1 << 64) - 2, (1 << 64) - 1],
}  # fmt: skip
SPECIAL = {
    "f32": [0, 0x80000000, 0x3F800000, 0xBF800000, 0x7F800000, 0xFF800000, 0x7FC00000, 1, 0x80000001, 0x007FFFFF,
            0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F000000, 0x3FC00000, 0x4B000001, 0x33800000, 0x4F000000, 0x4EFFFFFF,
            0xCF000000, 0x40490FDB, 0x3F800001, 0x34000000, 0x5F000000, 0x5F800000],
    "f64": [0, 1 << 63, 0x3FF0000000000000, 0xBFF0000000000000, 0x7FF0000000000000, 0xFFF0000000000000, 0x7FF8000000000000,
            1, 0x000FFFFFFFFFFFFF, 0x0010000000000000, 0x7FEFFFFFFFFFFFFF, 0x3FE0000000000000, 0x3FF8000000000000,
            0x4330000000000001, 0x43E0000000000000, 0x43F0000000000000, 0xC3E0000000000000, 0x3FF0000000000001, 0x3CB0000000000000,
            0x36A0000000000000, 0x3690000000000001, 0x47EFFFFFF0000000, 0x47EFFFFFEFFFFFFF],
    "f16": [0, 0x8000, 0x3C00, 0xBC00, 0x7C00, 0xFC00, 0x7E00, 1, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x3800, 0x3E00, 0x3C01],
    "bf16": [0, 0x8000, 0x3F80, 0xBF80, 0x7F80, 0xFF80, 0x7FC0, 1, 0x007F, 0x0080, 0x7F7F, 0x3F00, 0x3FC0, 0x3F81, 0x4049],
}  # fmt: skip


def inputs(kind: str, count: int, generator: np.random.Generator, place: int) -> list[int]:
    """`count` bit patterns: every pair of interesting ones comes up, then random ones of all magnitudes."""
    if kind == "pred":
        return [int(x) for x in generator.integers(0, 2, count)]
    width = BITS[kind]
    if kind in ("f16x2", "bf16x2"):
        half = kind[:-2]
        low, high = inputs(half, count, generator, place), inputs(half, count, generator, place + 1)
        return [a | b << 16 for a, b in zip(low, high, strict=True)]
    special = SPECIAL[kind] if kind in SPECIAL else INTERESTING.get(width, [0, 1, 0x7F, 0x80, 0xFF, 0x55])
    picked = [special[(i // len(special) ** place) % len(special)] for i in range(count // 2)]
    raw = [int(x) for x in generator.integers(0, 1 << 63, count - len(picked), dtype=np.uint64)]
    shifts = generator.integers(0, width, len(raw))
    rest = []
    for value, shift in zip(raw, shifts, strict=True):
        bits = (value * 3) & ((1 << width) - 1)
        if kind in FORMATS:
            if shift % 2:  # near one, where sums and products round interestingly
                bits = to_bits(
                    math.ldexp(1 + (value % 4096) / 4096 + (value >> 40 & 1) * 2.0**-20, int(shift) % 8 - 4),
                    kind,
                )
            if math.isnan(from_bits(bits, kind)):
                bits = 0
        else:
            bits >>= int(shift)
        rest.append(bits)
    return picked + rest


class Row(NamedTuple):
    text: str
    operands: tuple[str, ...]
    result: str
    reference: Callable[..., Any]
    mode: str = "rn"
    ulps: int = 0  # 0: exact
    hardware: float = 0.0  # how far the hardware's approximation may be off, absolutely and relatively
    lanes: int = 400
    limit: tuple[int | None, ...] = ()  # operands reduced modulo this, where only small ones are defined


ROWS: list[Row] = []


def row(text: str, operands: str, result: str, reference: Callable[..., Any], **options: Any) -> None:
    ROWS.append(Row(text, tuple(operands.split()), result, reference, **options))


def unsigned(value: int, width: int) -> int:
    return value & ((1 << width) - 1)


def truncating(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def clamp(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))


# --- integers -------------------------------------------------------------------------------------------------------

for kind in ("s16", "u16", "s32", "u32", "s64", "u64"):
    w = BITS[kind]
    pair, triple = f"{kind} {kind}", f"{kind} {kind} {kind}"
    row(f"add.{kind} d, a, b", pair, kind, lambda a, b: a + b)
    row(f"sub.{kind} d, a, b", pair, kind, lambda a, b: a - b)
    row(f"mul.lo.{kind} d, a, b", pair, kind, lambda a, b: a * b)
    row(f"mul.hi.{kind} d, a, b", pair, kind, lambda a, b, w=w: a * b >> w)
    row(f"mad.lo.{kind} d, a, b, c", triple, kind, lambda a, b, c: a * b + c)
    row(f"mad.hi.{kind} d, a, b, c", triple, kind, lambda a, b, c, w=w: (a * b >> w) + c)
    row(f"min.{kind} d, a, b", pair, kind, min)
    row(f"max.{kind} d, a, b", pair, kind, max)
    row(f"div.{kind} d, a, b", pair, kind, lambda a, b: truncating(a, b) if b else None)
    row(f"rem.{kind} d, a, b", pair, kind, lambda a, b: a - truncating(a, b) * b if b else None)
    row(f"sad.{kind} d, a, b, c", f"{pair} u{w}", f"u{w}", lambda a, b, c: c + abs(a - b))
    row(f"shr.{kind} d, a, b", f"{kind} u32", kind, lambda a, b: a >> min(b, 64), limit=(None, 80))
    row(f"shr.{kind} d, a, b", f"{kind} u32", kind, lambda a, b: a >> min(b, 64))
    for test, name in (("==", "eq"), ("!=", "ne"), ("<", "lt"), ("<=", "le"), (">", "gt"), (">=", "ge")):
        compare = eval(f"lambda a, b: int(a {test} b)")
        row(f"setp.{name}.{kind} d, a, b", pair, "pred", compare, lanes=200)
        row(f"set.{name}.u32.{kind} d, a, b", pair, "u32", lambda a, b, f=compare: -f(a, b), lanes=100)
    if w < 64:
        wide = f"{kind[0]}{2 * w}"
        row(f"mul.wide.{kind} d, a, b", pair, wide, lambda a, b: a * b)
        row(f"mad.wide.{kind} d, a, b, c", f"{pair} {wide}", wide, lambda a, b, c: a * b + c)
        row(f"mul.wide.{kind} d, a, 5", kind, wide, lambda a: a * 5)
for w in (16, 32, 64):
    kind = f"b{w}"
    row(f"and.{kind} d, a, b", f"{kind} {kind}", kind, lambda a, b: a & b)
    row(f"or.{kind} d, a, b", f"{kind} {kind}", kind, lambda a, b: a | b)
    row(f"xor.{kind} d, a, b", f"{kind} {kind}", kind, lambda a, b: a ^ b)
    row(f"not.{kind} d, a", kind, kind, lambda a: ~a)
    row(f"cnot.{kind} d, a", kind, kind, lambda a: int(a == 0))
    row(f"shl.{kind} d, a, b", f"{kind} u32", kind, lambda a, b: a << min(b, 64), limit=(None, 80))
    row(f"shl.{kind} d, a, 3", kind, kind, lambda a: a << 3)
    row(f"shl.{kind} d, a, 77", kind, kind, lambda a: 0)
    row(f"neg.s{w} d, a", f"s{w}", f"s{w}", lambda a: -a)
    row(f"abs.s{w} d, a", f"s{w}", f"s{w}", abs)
    row(f"selp.{kind} d, a, b, c", f"{kind} {kind} pred", kind, lambda a, b, c: a if c else b)
row("add.sat.s32 d, a, b", "s32 s32", "s32", lambda a, b: clamp(a + b, -(2**31), 2**31 - 1))
row("sub.sat.s32 d, a, b", "s32 s32", "s32", lambda a, b: clamp(a - b, -(2**31), 2**31 - 1))
row(
    "mad.hi.sat.s32 d, a, b, c",
    "s32 s32 s32",
    "s32",
    lambda a, b, c: clamp((a * b >> 32) + c, -(2**31), 2**31 - 1),
)
row("mul24.lo.u32 d, a, b", "u32 u32", "u32", lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF))
row("mul24.hi.u32 d, a, b", "u32 u32", "u32", lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF) >> 16)
row(
    "mad24.lo.s32 d, a, b, c",
    "s32 s32 s32",
    "s32",
    lambda a, b, c: signed(a & 0xFFFFFF, 24) * signed(b & 0xFFFFFF, 24) + c,
)
for w in (32, 64):
    row(f"popc.b{w} d, a", f"b{w}", "u32", lambda a: a.bit_count())
    row(f"clz.b{w} d, a", f"b{w}", "u32", lambda a, w=w: w - a.bit_length())
    row(f"brev.b{w} d, a", f"b{w}", f"b{w}", lambda a, w=w: int(f"{a:0{w}b}"[::-1], 2))
    row(f"bfind.u{w} d, a", f"u{w}", "u32", lambda a: a.bit_length() - 1)
    row(f"bfind.s{w} d, a", f"s{w}", "u32", lambda a: (~a if a < 0 else a).bit_length() - 1)
    row(f"bfind.shiftamt.u{w} d, a", f"u{w}", "u32", lambda a, w=w: w - a.bit_length() if a else -1)

    def extract(a: int, b: int, c: int, w: int, is_signed: bool) -> int:
        position, length = b & 0xFF, c & 0xFF
        bits = unsigned(a, w)
        sign = bits >> min(position + length - 1, w - 1) & 1 if is_signed and length else 0
        return sum(
            (bits >> position + i & 1 if i < length and position + i < w else sign) << i for i in range(w)
        )

    row(
        f"bfe.u{w} d, a, b, c",
        f"u{w} u32 u32",
        f"u{w}",
        lambda a, b, c, w=w: extract(a, b, c, w, False),
        limit=(None, 70, 70),
    )
    row(
        f"bfe.s{w} d, a, b, c",
        f"s{w} u32 u32",
        f"s{w}",
        lambda a, b, c, w=w: extract(a, b, c, w, True),
        limit=(None, 70, 70),
    )

    def insert(a: int, b: int, c: int, e: int, w: int) -> int:
        for i in range(min(e & 0xFF, w - (c & 0xFF))):
            b = b & ~(1 << (c & 0xFF) + i) | (a >> i & 1) << (c & 0xFF) + i
        return b

    row(f"bfi.b{w} d, a, b, 5, 9", f"b{w} b{w}", f"b{w}", lambda a, b, w=w: insert(a, b, 5, 9, w))
    row(
        f"bfi.b{w} d, a, b, c, 40",
        f"b{w} b{w} u32",
        f"b{w}",
        lambda a, b, c, w=w: insert(a, b, c, 40, w),
        limit=(None, None, 70),
    )
row("shf.l.wrap.b32 d, a, b, c", "b32 b32 u32", "b32", lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32)
row("shf.r.wrap.b32 d, a, b, c", "b32 b32 u32", "b32", lambda a, b, c: (b << 32 | a) >> (c & 31))
row(
    "shf.l.clamp.b32 d, a, b, c",
    "b32 b32 u32",
    "b32",
    lambda a, b, c: ((b << 32 | a) << min(c, 32)) >> 32,
    limit=(None, None, 50),
)
row(
    "shf.r.clamp.b32 d, a, b, c",
    "b32 b32 u32",
    "b32",
    lambda a, b, c: (b << 32 | a) >> min(c, 32),
    limit=(None, None, 50),
)
for table in (0, 0x1, 0x80, 0x96, 0xE8, 0xCA, 0xF8, 0x6A, 0x7F, 0xFF):

    def lookup(a: int, b: int, c: int, table: int = table) -> int:
        return sum(
            (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32)
        )

    row(f"lop3.b32 d, a, b, c, {table}", "b32 b32 b32", "b32", lookup, lanes=200)


def permuted(a: int, b: int, c: int) -> int:
    both = b << 32 | a
    out = 0
    for i in range(4):
        nibble = c >> 4 * i & 15
        byte = both >> 8 * (nibble & 7) & 0xFF
        out |= ((0xFF if byte & 0x80 else 0) if nibble & 8 else byte) << 8 * i
    return out


def picked_bytes(a: int, b: int, places: tuple[int, ...]) -> int:
    both = b << 32 | a
    return sum((both >> 8 * place & 0xFF) << 8 * (3 - i) for i, place in enumerate(places))


row("prmt.b32 d, a, b, c", "b32 b32 b32", "b32", permuted)
row("prmt.b32 d, a, b, 0x7531", "b32 b32", "b32", lambda a, b: permuted(a, b, 0x7531))
row("prmt.b32.f4e d, a, b, c", "b32 b32 b32", "b32", lambda a, b, c: (b << 32 | a) >> 8 * (c & 3))
row(
    "prmt.b32.b4e d, a, b, c",
    "b32 b32 b32",
    "b32",
    lambda a, b, c: picked_bytes(a, b, tuple((5 + i + (c & 3)) % 8 for i in range(4))),
)
row("prmt.b32.rc8 d, a, b, c", "b32 b32 b32", "b32", lambda a, b, c: (a >> 8 * (c & 3) & 0xFF) * 0x01010101)
row(
    "prmt.b32.ecl d, a, b, c",
    "b32 b32 b32",
    "b32",
    lambda a, b, c: picked_bytes(a, b, tuple(max(3 - i, c & 3) for i in range(4))),
)
row(
    "prmt.b32.ecr d, a, b, c",
    "b32 b32 b32",
    "b32",
    lambda a, b, c: picked_bytes(a, b, tuple(min(3 - i, c & 3) for i in range(4))),
)
row("prmt.b32.rc16 d, a, b, c", "b32 b32 b32", "b32", lambda a, b, c: (a >> 16 * (c & 1) & 0xFFFF) * 0x10001)


def dot(a: int, b: int, c: int, kind_a: str, kind_b: str) -> int:
    for i in range(4):
        x, y = a >> 8 * i & 0xFF, b >> 8 * i & 0xFF
        c += (signed(x, 8) if kind_a == "s32" else x) * (signed(y, 8) if kind_b == "s32" else y)
    return c


for x in ("u32", "s32"):
    for y in ("u32", "s32"):
        row(f"dp4a.{x}.{y} d, a, b, c", "b32 b32 b32", "u32", lambda a, b, c, x=x, y=y: dot(a, b, c, x, y))
row(
    "dp2a.lo.s32.s32 d, a, b, c", "b32 b32 b32", "u32",
    lambda a, b, c: c + sum(signed(a >> 16 * i & 0xFFFF, 16) * signed(b >> 8 * i & 0xFF, 8) for i in range(2)),
)  # fmt: skip
row(
    "dp2a.hi.u32.u32 d, a, b, c", "b32 b32 b32", "u32",
    lambda a, b, c: c + sum((a >> 16 * i & 0xFFFF) * (b >> 8 * i + 16 & 0xFF) for i in range(2)),
)  # fmt: skip
row(
    "bmsk.clamp.b32 d, a, b",
    "u32 u32",
    "u32",
    lambda a, b: ((1 << min(b, 32)) - 1) << min(a, 32),
    limit=(40, 40),
)
row("bmsk.wrap.b32 d, a, b", "u32 u32", "u32", lambda a, b: ((1 << (b & 31)) - 1) << (a & 31))
row(
    "szext.clamp.s32 d, a, b",
    "s32 u32",
    "s32",
    lambda a, b: signed(unsigned(a, min(b, 32)), min(b, 32)) if b else 0,
    limit=(None, 40),
)
row("szext.wrap.u32 d, a, b", "u32 u32", "u32", lambda a, b: unsigned(a, b & 31))
row("mov.b64 d, {a, b}", "b32 b32", "b64", lambda a, b: b << 32 | a)
row("mov.b32 d, {a, b}", "b16 b16", "b32", lambda a, b: b << 16 | a)
row("{ .reg .b32 x; mov.b64 {x, d}, a; }", "b64", "b32", lambda a: a >> 32)
row("{ .reg .b16 x; mov.b32 {d, x}, a; }", "b32", "b16", lambda a: a)
row("slct.u32.s32 d, a, b, c", "u32 u32 s32", "u32", lambda a, b, c: a if c >= 0 else b)
row("slct.f32.f32 d, a, b, c", "f32 f32 f32", "f32", lambda a, b, c: a if c >= 0 else b)
row(
    "{ .reg .u32 l; add.cc.u32 l, a, b; addc.u32 d, c, 0; }",
    "u32 u32 u32",
    "u32",
    lambda a, b, c: c + (a + b >> 32),
)
row(
    "{ .reg .u32 l; sub.cc.u32 l, a, b; subc.u32 d, c, 1; }",
    "u32 u32 u32",
    "u32",
    lambda a, b, c: c - 1 - (a < b),
)
row(
    "{ .reg .u32 l; mad.lo.cc.u32 l, a, b, c; madc.hi.u32 d, a, b, 0; }",
    "u32 u32 u32",
    "u32",
    lambda a, b, c: a * b + c >> 32,
)
row(
    "{ .reg .u64 l; add.cc.u64 l, a, b; addc.u64 d, c, 7; }",
    "u64 u64 u64",
    "u64",
    lambda a, b, c: c + 7 + (a + b >> 64),
)
row(
    "{ .reg .pred p; setp.lt.and.s32 d|p, a, b, c; }",
    "s32 s32 pred",
    "pred",
    lambda a, b, c: int(a < b and c),
)
row(
    "{ .reg .pred p; setp.lt.or.s32 p|d, a, b, c; }", "s32 s32 pred", "pred", lambda a, b, c: int(a >= b or c)
)
row("setp.hi.u32 d, a, b", "u32 u32", "pred", lambda a, b: int(a > b))
row("setp.ls.u64 d, a, b", "u64 u64", "pred", lambda a, b: int(a <= b))
row("xor.pred d, a, b", "pred pred", "pred", lambda a, b: a ^ b)
row("{ mov.u32 d, 7; @a mov.u32 d, b; }", "pred u32", "u32", lambda a, b: b if a else 7)
row("{ mov.u32 d, 7; @!a add.u32 d, b, d; }", "pred u32", "u32", lambda a, b: 7 if a else b + 7)

# --- conversions ----------------------------------------------------------------------------------------------------

INTEGERS = ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")


def limits(kind: str) -> tuple[int, int]:
    width = BITS[kind]
    return (-(1 << width - 1), (1 << width - 1) - 1) if kind[0] == "s" else (0, (1 << width) - 1)


for target in INTEGERS:
    for source in INTEGERS:
        row(f"cvt.{target}.{source} d, a", source, target, lambda a: a, lanes=100)
        low, high = limits(target)
        if (
            low > limits(source)[0] or high < limits(source)[1]
        ):  # elsewhere .sat changes nothing and is refused

            def clamped(a: int, low: int = low, high: int = high) -> int:
                return clamp(a, low, high)

            row(f"cvt.sat.{target}.{source} d, a", source, target, clamped, lanes=100)


def to_integral(a: float, mode: str) -> int:
    exact = Fraction(a)
    return {"rni": round(exact), "rzi": math.trunc(exact), "rmi": math.floor(exact), "rpi": math.ceil(exact)}[
        mode
    ]


def float_to_integer(a: float, mode: str, target: str, source: str) -> int:
    width = BITS[target]
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if target[0] == "s" else (0, (1 << width) - 1)
    if math.isnan(a):
        return 1 << width - 1 if width == 64 or source == "f64" else 0
    if math.isinf(a):
        return high if a > 0 else low
    return clamp(to_integral(a, mode), low, high)


for source in ("f16", "bf16", "f32", "f64"):
    for target in ("s16", "u16", "s32", "u32", "s64", "u64"):
        for mode in ("rni", "rzi", "rmi", "rpi"):
            if source == "bf16":
                continue  # needs sm_90
            row(
                f"cvt.{mode}.{target}.{source} d, a", source, target,
                lambda a, m=mode, t=target, s=source: float_to_integer(a, m, t, s), lanes=150,
            )  # fmt: skip
for source in ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"):
    for target in ("f16", "f32", "f64"):
        for mode in ("rn", "rz", "rm", "rp") if target != "f16" else ("rn",):
            row(
                f"cvt.{mode}.{target}.{source} d, a",
                source,
                target,
                lambda a: Fraction(a),
                mode=mode,
                lanes=150,
            )
for mode in ("rn", "rz", "rm", "rp"):
    row(f"cvt.{mode}.f32.f64 d, a", "f64", "f32", lambda a: a, mode=mode)
for source, target in (("f32", "f16"), ("f64", "f16")):
    row(f"cvt.rn.{target}.{source} d, a", source, target, lambda a: a)
row("cvt.rz.f16.f32 d, a", "f32", "f16", lambda a: a, mode="rz")
row("cvt.f32.f16 d, a", "f16", "f32", lambda a: a)
row("cvt.f64.f16 d, a", "f16", "f64", lambda a: a)
row("cvt.f64.f32 d, a", "f32", "f64", lambda a: a)
for kind in ("f32", "f64", "f16"):
    for mode in ("rni", "rzi", "rmi", "rpi"):
        row(
            f"cvt.{mode}.{kind}.{kind} d, a", kind, kind,
            lambda a, m=mode: a if not math.isfinite(a) or a == 0 else math.copysign(float(to_integral(a, m)), a),
        )  # fmt: skip


def into_unit(a: float) -> float:
    return 0.0 if math.isnan(a) else min(max(a, 0.0), 1.0) + 0.0


row("cvt.sat.f32.f32 d, a", "f32", "f32", into_unit)
row("cvt.rn.sat.f32.f64 d, a", "f64", "f32", into_unit)

# --- floating point -------------------------------------------------------------------------------------------------


def finite(*values: float) -> bool:
    return all(map(math.isfinite, values))


def negative(value: float) -> bool:
    return math.copysign(1.0, value) < 0


def exact_sum(a: float, b: float, mode: str) -> Any:
    if not finite(a, b):
        return a + b
    total = Fraction(a) + Fraction(b)
    if total:
        return total
    if negative(a) == negative(b) and a == b == 0:
        return a
    return -0.0 if mode == "rm" else 0.0


def exact_product(a: float, b: float) -> Any:
    if not finite(a, b):
        return (
            math.nan
            if math.isnan(a) or math.isnan(b) or a == 0 or b == 0
            else math.copysign(math.inf, math.copysign(1, a) * b)
        )
    product = Fraction(a) * Fraction(b)
    return product if product else math.copysign(0.0, math.copysign(1, a) * math.copysign(1, b))


def exact_fma(a: float, b: float, c: float, mode: str) -> Any:
    if not finite(a, b, c):
        product = exact_product(a, b)
        return (float(product) if not isinstance(product, Fraction) else 0.0) + c
    total = Fraction(a) * Fraction(b) + Fraction(c)
    if total:
        return total
    product_negative = negative(a) != negative(b)
    if product_negative == negative(c) and Fraction(a) * Fraction(b) == 0:
        return -0.0 if product_negative else 0.0
    return -0.0 if mode == "rm" else 0.0


def exact_quotient(a: float, b: float) -> Any:
    if math.isnan(a) or math.isnan(b) or (a == 0 and b == 0) or (math.isinf(a) and math.isinf(b)):
        return math.nan
    sign = -1.0 if negative(a) != negative(b) else 1.0
    if math.isinf(a) or b == 0:
        return sign * math.inf
    if math.isinf(b) or a == 0:
        return sign * 0.0
    return Fraction(a) / Fraction(b)


def exact_root(a: float, kind: str) -> Any:
    """A fraction that rounds like the root: the root itself, or enough digits and a sticky one."""
    if math.isnan(a) or a < 0:
        return math.nan
    if a == 0 or math.isinf(a):
        return a
    exact = Fraction(a)
    scale = 1 << 1400
    whole = math.isqrt(exact.numerator * scale * scale // exact.denominator)
    root = Fraction(whole, scale)
    return root if root * root == exact else root + Fraction(1, scale * 2)


def smallest(a: float, b: float) -> float:
    if math.isnan(a):
        return b
    if math.isnan(b):
        return a
    if a == b == 0:
        return a if negative(a) else b
    return min(a, b)


def largest(a: float, b: float) -> float:
    return -smallest(-a, -b) if not (math.isnan(a) and math.isnan(b)) else math.nan


for kind in ("f32", "f64"):
    pair = f"{kind} {kind}"
    for mode in ("rn", "rz", "rm", "rp"):
        n = 700 if mode == "rn" else 250
        row(
            f"add.{mode}.{kind} d, a, b",
            pair,
            kind,
            lambda a, b, m=mode: exact_sum(a, b, m),
            mode=mode,
            lanes=n,
        )
        row(
            f"sub.{mode}.{kind} d, a, b",
            pair,
            kind,
            lambda a, b, m=mode: exact_sum(a, -b, m),
            mode=mode,
            lanes=n,
        )
        row(f"mul.{mode}.{kind} d, a, b", pair, kind, exact_product, mode=mode, lanes=n)
        row(
            f"fma.{mode}.{kind} d, a, b, c",
            f"{pair} {kind}",
            kind,
            lambda a, b, c, m=mode: exact_fma(a, b, c, m),
            mode=mode,
            lanes=3 * n,
        )
        row(f"div.{mode}.{kind} d, a, b", pair, kind, exact_quotient, mode=mode, lanes=n)
        row(f"rcp.{mode}.{kind} d, a", kind, kind, lambda a: exact_quotient(1.0, a), mode=mode, lanes=n)
        row(f"sqrt.{mode}.{kind} d, a", kind, kind, lambda a, k=kind: exact_root(a, k), mode=mode, lanes=120)
    row(f"min.{kind} d, a, b", pair, kind, smallest)
    row(f"max.{kind} d, a, b", pair, kind, largest)
    row(f"abs.{kind} d, a", kind, kind, abs)
    row(f"neg.{kind} d, a", kind, kind, lambda a: -a)
    row(f"copysign.{kind} d, a, b", pair, kind, lambda a, b: math.copysign(b, a))
    row(f"testp.finite.{kind} d, a", kind, "pred", lambda a: int(math.isfinite(a)))
    row(f"testp.infinite.{kind} d, a", kind, "pred", lambda a: int(math.isinf(a)))
    row(f"testp.notanumber.{kind} d, a", kind, "pred", lambda a: int(math.isnan(a)))
    row(f"testp.number.{kind} d, a", kind, "pred", lambda a: int(not math.isnan(a)))
    tiny = 2.0 ** FORMATS[kind][1]
    row(
        f"testp.normal.{kind} d, a",
        kind,
        "pred",
        lambda a, t=tiny: int(math.isfinite(a) and (abs(a) >= t or a == 0)),
    )
    row(f"testp.subnormal.{kind} d, a", kind, "pred", lambda a, t=tiny: int(0 < abs(a) < t))
for kind in ("f32", "f64", "f16"):
    for name, ordered in (("eq", "=="), ("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="), ("ne", "!=")):
        test = eval(f"lambda a, b: a {ordered} b")
        row(
            f"setp.{name}.{kind} d, a, b", f"{kind} {kind}", "pred",
            lambda a, b, f=test: int(f(a, b) and not (math.isnan(a) or math.isnan(b))),
        )  # fmt: skip
        row(
            f"setp.{name}u.{kind} d, a, b", f"{kind} {kind}", "pred",
            lambda a, b, f=test: int(f(a, b) or math.isnan(a) or math.isnan(b)),
        )  # fmt: skip
    row(
        f"setp.num.{kind} d, a, b",
        f"{kind} {kind}",
        "pred",
        lambda a, b: int(not (math.isnan(a) or math.isnan(b))),
    )
    row(
        f"setp.nan.{kind} d, a, b", f"{kind} {kind}", "pred", lambda a, b: int(math.isnan(a) or math.isnan(b))
    )
row("set.gt.f32.f32 d, a, b", "f32 f32", "f32", lambda a, b: 1.0 if a > b else 0.0)
row(
    "add.sat.f32 d, a, b",
    "f32 f32",
    "f32",
    lambda a, b: into_unit(round_to(s, "f32") if isinstance(s := exact_sum(a, b, "rn"), Fraction) else s),
)


def flushed(a: float) -> float:
    return math.copysign(0.0, a) if 0 < abs(a) < 2.0**-126 else a


def flushed_result(value: Any) -> float:
    return flushed(round_to(value, "f32") if isinstance(value, Fraction) else value)


row(
    "add.ftz.f32 d, a, b",
    "f32 f32",
    "f32",
    lambda a, b: flushed_result(exact_sum(flushed(a), flushed(b), "rn")),
)
row(
    "mul.ftz.f32 d, a, b",
    "f32 f32",
    "f32",
    lambda a, b: flushed_result(exact_product(flushed(a), flushed(b))),
)
row(
    "fma.rn.ftz.f32 d, a, b, c", "f32 f32 f32", "f32",
    lambda a, b, c: flushed_result(exact_fma(flushed(a), flushed(b), flushed(c), "rn")),
)  # fmt: skip
row("setp.gt.ftz.f32 d, a, b", "f32 f32", "pred", lambda a, b: int(flushed(a) > flushed(b)))
row("cvt.rzi.ftz.s32.f32 d, a", "f32", "s32", lambda a: float_to_integer(flushed(a), "rzi", "s32", "f32"))
row(
    "min.NaN.f32 d, a, b",
    "f32 f32",
    "f32",
    lambda a, b: math.nan if math.isnan(a) or math.isnan(b) else smallest(a, b),
)


def near(function: Callable[[float], float | None]) -> Callable[[float], Any]:
    def reference(a: float) -> Any:
        try:
            return function(a)
        except (ValueError, OverflowError, ZeroDivisionError):
            return None  # a pole, a domain error or an overflow: not compared

    return reference


row("ex2.approx.f32 d, a", "f32", "f32", near(lambda a: 2.0**a), ulps=2)
row(
    "lg2.approx.f32 d, a",
    "f32",
    "f32",
    near(lambda a: math.log2(a) if a > 0 else None),
    ulps=2,
    hardware=2.0**-20,
)
row("rsqrt.approx.f32 d, a", "f32", "f32", near(lambda a: 1 / math.sqrt(a)), ulps=2)
row("rsqrt.approx.f64 d, a", "f64", "f64", near(lambda a: 1 / math.sqrt(a)), ulps=2)
row(
    "sin.approx.f32 d, a",
    "f32",
    "f32",
    near(lambda a: math.sin(a) if abs(a) < 4 else None),
    ulps=2,
    hardware=2.0**-20,
)
row(
    "cos.approx.f32 d, a",
    "f32",
    "f32",
    near(lambda a: math.cos(a) if abs(a) < 4 else None),
    ulps=2,
    hardware=2.0**-20,
)
row("tanh.approx.f32 d, a", "f32", "f32", near(math.tanh), ulps=2, hardware=2.0**-10)
row("div.full.f32 d, a, b", "f32 f32", "f32", exact_quotient, ulps=2)
row("div.approx.f32 d, a, b", "f32 f32", "f32", exact_quotient, ulps=2)
row("rcp.approx.f32 d, a", "f32", "f32", lambda a: exact_quotient(1.0, a), ulps=2)
row("sqrt.approx.f32 d, a", "f32", "f32", lambda a: exact_root(a, "f32"), ulps=2)

# --- half formats ---------------------------------------------------------------------------------------------------

for kind in ("f16", "bf16"):
    pair, triple = f"{kind} {kind}", f"{kind} {kind} {kind}"
    if kind == "f16":
        row(f"add.{kind} d, a, b", pair, kind, lambda a, b: exact_sum(a, b, "rn"))
        row(f"sub.{kind} d, a, b", pair, kind, lambda a, b: exact_sum(a, -b, "rn"))
        row(f"mul.{kind} d, a, b", pair, kind, exact_product)
    row(f"fma.rn.{kind} d, a, b, c", triple, kind, lambda a, b, c: exact_fma(a, b, c, "rn"), lanes=1500)
    row(f"min.{kind} d, a, b", pair, kind, smallest)
    row(f"max.{kind} d, a, b", pair, kind, largest)
    row(f"neg.{kind} d, a", kind, kind, lambda a: -a)
    row(f"abs.{kind} d, a", kind, kind, abs)
row("cvt.rn.bf16.f32 d, a", "f32", "bf16", lambda a: a)
row("ex2.approx.f16 d, a", "f16", "f16", near(lambda a: 2.0**a), ulps=1)
row("tanh.approx.f16 d, a", "f16", "f16", near(math.tanh), ulps=1)


def packed(kind: str, function: Callable[..., Any]) -> Callable[..., int]:
    """A reference for a packed type from one for its halves; result bits."""

    def reference(*operands: int) -> int:
        out = 0
        for place in (0, 16):
            value = function(*(from_bits(bits >> place & 0xFFFF, kind) for bits in operands))
            out |= to_bits(round_to(value, kind) if isinstance(value, Fraction) else value, kind) << place
        return out

    return reference


for kind in ("f16", "bf16"):
    both = f"{kind}x2"
    if kind == "f16":
        row(f"add.{both} d, a, b", f"{both} {both}", both, packed(kind, lambda a, b: exact_sum(a, b, "rn")))
        row(f"mul.{both} d, a, b", f"{both} {both}", both, packed(kind, exact_product))
    row(
        f"fma.rn.{both} d, a, b, c",
        f"{both} {both} {both}",
        both,
        packed(kind, lambda a, b, c: exact_fma(a, b, c, "rn")),
    )
    row(f"max.{both} d, a, b", f"{both} {both}", both, packed(kind, largest))
    row(f"neg.{both} d, a", both, both, packed(kind, lambda a: -a))
row(
    "cvt.rn.f16x2.f32 d, a, b", "f32 f32", "f16x2",
    lambda a, b: to_bits(rounded(a, "f16"), "f16") << 16 | to_bits(rounded(b, "f16"), "f16"),
)  # fmt: skip
row(
    "cvt.rn.bf16x2.f32 d, a, b", "f32 f32", "bf16x2",
    lambda a, b: to_bits(rounded(a, "bf16"), "bf16") << 16 | to_bits(rounded(b, "bf16"), "bf16"),
)  # fmt: skip


def rounded(value: Any, kind: str, mode: str = "rn") -> float:
    """A reference's answer in the result's format."""
    if isinstance(value, Fraction):
        return round_to(value, kind, mode)
    if math.isfinite(value) and value != 0:
        result = round_to(Fraction(value), kind, mode)
        return math.copysign(result, value)
    return float(value)


for mode in ("rz", "rm", "rp"):
    for source in ("f32", "s32", "u64"):
        for kind in ("f16", "bf16"):
            row(
                f"cvt.{mode}.{kind}.{source} d, a", source, kind,
                lambda a: a if isinstance(a, float) else Fraction(a), mode=mode, lanes=200,
            )  # fmt: skip


def float8(value: float, kind: str) -> int:
    """The code of the nearest value, by looking at all of them."""
    if math.isnan(value):
        return 0x7F
    exponent_bits, last = (4, 0x7E) if kind == "e4m3" else (5, 0x7B)
    mantissa_bits, bias = 7 - exponent_bits, (1 << exponent_bits - 1) - 1

    def of(code: int) -> Fraction:
        exponent, mantissa = (
            code >> mantissa_bits,
            Fraction(code & (1 << mantissa_bits) - 1, 1 << mantissa_bits),
        )
        return (mantissa if exponent == 0 else 1 + mantissa) * Fraction(2) ** (max(exponent, 1) - bias)

    magnitude = min(Fraction(abs(value)), of(last)) if math.isfinite(value) else of(last)
    code = min(range(last + 1), key=lambda c: (abs(of(c) - magnitude), c & 1))
    return code | (0x80 if negative(value) else 0)


for kind in ("e4m3", "e5m2"):
    row(
        f"cvt.rn.satfinite.{kind}x2.f32 d, a, b", "f32 f32", "b16",
        lambda a, b, k=kind: float8(a, k) << 8 | float8(b, k), lanes=120,
    )  # fmt: skip
    row(
        f"{{ .reg .b16 h; cvt.rn.satfinite.{kind}x2.f32 h, a, b; .reg .b32 w; cvt.rn.f16x2.{kind}x2 w, h;"
        f" cvt.rn.satfinite.{kind}x2.f16x2 d, w; }}",
        "f32 f32", "b16", lambda a, b, k=kind: float8(a, k) << 8 | float8(b, k), lanes=120,
    )  # fmt: skip


def by_pieces(width: int, is_signed: bool, function: Callable[[int, int], int]) -> Callable[[int, int], int]:
    def reference(a: int, b: int) -> int:
        out = 0
        for shift in range(0, 32, width):
            x, y = (v >> shift & (1 << width) - 1 for v in (a, b))
            if is_signed:
                x, y = signed(x, width), signed(y, width)
            out |= (function(x, y) & (1 << width) - 1) << shift
        return out

    return reference


PIECEWISE: dict[str, Callable[[int, int], int]] = {"add": lambda a, b: a + b, "min": min, "max": max}
for name, function in PIECEWISE.items():
    for kind in ("u16x2", "s16x2"):
        row(f"{name}.{kind} d, a, b", "b32 b32", "b32", by_pieces(16, kind[0] == "s", function))
for kind in ("u32", "s32"):
    for name, width in (("vabsdiff4", 8), ("vabsdiff2", 16)):
        difference = by_pieces(width, kind == "s32", lambda a, b: abs(a - b))
        row(f"{name}.u32.{kind}.{kind} d, a, b, a", "b32 b32", "b32", difference)
        row(
            f"{name}.u32.{kind}.{kind}.add d, a, b, c", "b32 b32 b32", "u32",
            lambda a, b, c, f=difference, w=width: c + sum(f(a, b) >> s & (1 << w) - 1 for s in range(0, 32, w)),
        )  # fmt: skip


# --- PTX and expectations -------------------------------------------------------------------------------------------


def register_kind(kind: str) -> str:
    if kind in ("f16", "bf16", "b8", "u8", "s8"):
        return "b16"
    return {"f16x2": "b32", "bf16x2": "b32"}.get(kind, kind)


def kernel_text(row: Row, number: int) -> str:
    """An entry that reads each lane's operands from 8-byte slots and writes its result to one."""
    lines = [f".visible .entry row{number}(.param .u64 out, .param .u64 in, .param .u32 n)", "{"]
    for name, kind in zip(("d", *"abc"), (row.result, *row.operands), strict=False):
        lines.append(f"  .reg .{register_kind(kind)} {name};")
    lines += [
        "  .reg .u32 %i, %n, %t; .reg .u64 %o, %x, %slot; .reg .pred %q; .reg .b64 %wide; .reg .b32 %word; .reg .b16 %half;",
        "  mov.u32 %i, %ctaid.x; mov.u32 %t, %ntid.x; mov.u32 %n, %tid.x; mad.lo.u32 %i, %i, %t, %n;",
        "  ld.param.u32 %n, [n]; setp.ge.u32 %q, %i, %n; @%q bra $end;",
        "  ld.param.u64 %o, [out]; ld.param.u64 %x, [in];",
        f"  mul.wide.u32 %slot, %i, {8 * len(row.operands)}; add.u64 %x, %x, %slot;",
        "  mul.wide.u32 %slot, %i, 8; add.u64 %o, %o, %slot;",
    ]
    for place, (name, kind) in enumerate(zip("abc", row.operands, strict=False)):
        if kind == "pred":
            lines.append(f"  ld.global.u32 %word, [%x+{8 * place}]; setp.ne.u32 {name}, %word, 0;")
        else:
            load = {"f16": "b16", "bf16": "b16", "f16x2": "b32", "bf16x2": "b32"}.get(kind, kind)
            lines.append(f"  ld.global.{load} {name}, [%x+{8 * place}];")
    lines.append("  " + row.text + ("" if row.text.startswith("{") else ";"))
    if row.result == "pred":
        lines.append("  selp.u32 %word, 1, 0, d; st.global.u32 [%o], %word;")
    else:
        store = {"f16": "b16", "bf16": "b16", "f16x2": "b32", "bf16x2": "b32"}.get(row.result, row.result)
        lines.append(f"  st.global.{store} [%o], d;")
    lines += ["$end:", "  ret;", "}"]
    return "\n".join(lines)


def operand_bits(row: Row, number: int) -> Array:
    """(count, operands) of uint64."""
    generator = np.random.default_rng(number + 1)
    columns = []
    for place, kind in enumerate(row.operands):
        column = inputs(kind, row.lanes, generator, place)
        limit = row.limit[place] if row.limit else None
        if limit is not None:
            column = [bits % limit for bits in column]
        columns.append(column)
    return np.array(columns, dtype=np.uint64).T.copy()


def expected_bits(row: Row, bits: list[int]) -> tuple[int, float] | None:
    """(result bits, result value) the instruction must give; None where it is not defined."""
    answer = row.reference(*(operand(value, kind) for value, kind in zip(bits, row.operands, strict=True)))
    if answer is None:
        return None
    if row.result in FORMATS:
        value = rounded(answer, row.result, row.mode)
        return to_bits(value, row.result), value
    return wrap(int(answer), row.result), 0.0


def agrees(row: Row, got: int, bits: list[int], on_hardware: bool = False) -> bool:
    """Whether a result is what the row asks for: NaNs are all alike, approximations may be off by `ulps`."""
    expected = expected_bits(row, bits)
    if expected is None:
        return True
    got &= (1 << BITS[row.result]) - 1
    if row.result in ("f16x2", "bf16x2"):
        kind = row.result[:-2]
        halves = [(got >> s & 0xFFFF, expected[0] >> s & 0xFFFF) for s in (0, 16)]
        return all(
            x == y or (math.isnan(from_bits(x, kind)) and math.isnan(from_bits(y, kind))) for x, y in halves
        )
    if row.result not in FORMATS:
        return got == expected[0]
    value = from_bits(got, row.result)
    if math.isnan(expected[1]) or math.isnan(value):
        return math.isnan(expected[1]) and math.isnan(value)
    if on_hardware and row.hardware and abs(value - expected[1]) <= row.hardware * max(1.0, abs(expected[1])):
        return True
    if row.ulps and math.isfinite(value) and math.isfinite(expected[1]):
        return abs(got - expected[0]) <= row.ulps or (abs(value) < 2.0**-125 and abs(expected[1]) < 2.0**-125)
    return got == expected[0]
