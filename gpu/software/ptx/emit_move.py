# SPDX-License-Identifier: Apache-2.0
"""Emitters for what moves, compares and selects values: mov, cvta, setp, set, selp, slct, and call parameters that became
registers.

Comparisons of floating point are dispatched from here to emit_float.
"""

from __future__ import annotations

from typing import Final

from . import emit_float
from .batch import LOCAL_WINDOW, PARAMETER_WINDOW, SHARED_WINDOW
from .emit import DTYPES, INTEGER, BlockEmitter, emits, type_of
from .syntax import TYPE_BITS, Immediate, Instruction, Pair, Register, Sink, Special, SymbolReference, Vector

_BITS: Final = frozenset(f"b{bits}" for bits in (8, 16, 32, 64))


@emits("mov")
def mov(e: BlockEmitter, i: Instruction) -> None:
    kind = type_of(e, i)
    d, a = i.operands
    if isinstance(d, Vector):
        _unpack(e, d, e.value(a, f"u{TYPE_BITS[kind]}"), TYPE_BITS[kind])
    elif isinstance(a, Vector):
        _pack(e, i, d, a, TYPE_BITS[kind])
    elif isinstance(a, SymbolReference | Special | Immediate | Register):
        e.define(d, e.value(a, kind), kind)
    else:
        raise e.unsupported()


def _unpack(e: BlockEmitter, d: Vector, packed: str, bits: int) -> None:
    each = bits // len(d.elements)
    wide, narrow = f"u{bits}", f"u{each}"
    for place, element in enumerate(d.elements):
        if isinstance(element, Sink):
            continue
        piece = packed if place == 0 else f"({packed} >> {e.constant(place * each, wide)})"
        e.define(element, f"{piece}.astype({DTYPES[narrow]})", narrow)


def _pack(e: BlockEmitter, i: Instruction, d: object, a: Vector, bits: int) -> None:
    each = bits // len(a.elements)
    wide, narrow = f"u{bits}", f"u{each}"
    if narrow not in DTYPES or wide not in DTYPES:
        raise e.unsupported()
    pieces = []
    for place, element in enumerate(a.elements):
        piece = f"{e.value(element, narrow)}.astype({DTYPES[wide]})"
        pieces.append(piece if place == 0 else f"({piece} << {e.constant(place * each, wide)})")
    e.define(d, " | ".join(pieces), wide)  # type: ignore[arg-type]


@emits("ld.slot", "st.slot")
def slot(e: BlockEmitter, i: Instruction) -> None:
    """A call parameter that became registers."""
    kind = i.modifiers[-1]
    to, source = i.operands
    for destination, value in zip(to.elements, source.elements, strict=True):  # type: ignore[union-attr]
        e.define(destination, e.value(value, kind), kind)


@emits("cvta")
def cvta(e: BlockEmitter, i: Instruction) -> None:
    kind = type_of(e, i)
    d, a = i.operands
    space = next((m.partition("::")[0] for m in i.modifiers if m != "to" and m != kind), "")
    window = {
        "shared": SHARED_WINDOW,
        "local": LOCAL_WINDOW,
        "param": PARAMETER_WINDOW,
        "global": 0,
        "const": 0,
    }.get(space)
    if window is None or kind not in ("u64", "b64", "s64"):
        raise e.unsupported()
    x = e.value(a, "u64")
    if window == 0:
        e.define(d, x, "u64")
    else:
        e.define(d, f"{x} {'-' if 'to' in i.modifiers else '+'} {e.constant(window, 'u64')}", "u64")


@emits("isspacep")
def isspacep(e: BlockEmitter, i: Instruction) -> None:
    d, a = i.operands
    number = {"global": 0, "const": 0, "shared": 1, "local": 2, "param": 3}.get(
        i.modifiers[0].partition("::")[0]
    )
    if number is None:
        raise e.unsupported()
    e.define(d, f"({e.value(a, 'u64')} >> {e.constant(56, 'u64')}) == {e.constant(number, 'u64')}", "pred")


@emits("selp")
def selp(e: BlockEmitter, i: Instruction) -> None:
    kind = type_of(e, i)
    d, a, b, p = i.operands
    e.define(d, f"where({e.value(p, 'pred')}, {e.value(a, kind)}, {e.value(b, kind)})", kind)


@emits("slct")
def slct(e: BlockEmitter, i: Instruction) -> None:
    kind, test = i.modifiers[-2:]
    d, a, b, c = i.operands
    x = e.value(c, test)
    if "ftz" in i.modifiers:
        x = e.let(f"flush({x})")
    e.define(d, f"where({x} >= {e.constant(0, test)}, {e.value(a, kind)}, {e.value(b, kind)})", kind)


_COMPARE: Final = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip


def _comparison(e: BlockEmitter, i: Instruction, kind: str, a: object, b: object) -> str:
    test = i.modifiers[0]
    if kind not in INTEGER and kind not in _BITS and kind != "pred":
        return emit_float.comparison(e, i, test, kind, a, b)
    if test not in _COMPARE or kind == "pred":
        raise e.unsupported()
    return f"{e.value(a, kind)} {_COMPARE[test]} {e.value(b, kind)}"  # type: ignore[arg-type]


_JOIN: Final = {"and": "&", "or": "|", "xor": "^"}


@emits("setp")
def setp(e: BlockEmitter, i: Instruction) -> None:
    kind = type_of(e, i)
    d, a, b, *rest = i.operands
    if kind in ("f16x2", "bf16x2"):
        emit_float.compare_halves(e, i, kind)
        return
    first = e.let(_comparison(e, i, kind, a, b))
    second = e.let(f"~{first}") if isinstance(d, Pair) else ""
    if rest:
        join = next((_JOIN[m] for m in i.modifiers[1:] if m in _JOIN), None)
        if join is None:
            raise e.unsupported()
        other = e.value(rest[0], "pred")
        first = e.let(f"{first} {join} {other}")
        if second:
            second = e.let(f"{second} {join} {other}")
    if isinstance(d, Pair):
        if not isinstance(d.first, Sink):
            e.define(d.first, first, "pred")
        if not isinstance(d.second, Sink):
            e.define(d.second, second, "pred")
    else:
        e.define(d, first, "pred")


@emits("set")
def set_(e: BlockEmitter, i: Instruction) -> None:
    target, kind = i.modifiers[-2:]
    d, a, b, *rest = i.operands
    if kind in ("f16x2", "bf16x2"):
        emit_float.set_halves(e, i, target, kind)
        return
    test = e.let(_comparison(e, i, kind, a, b))
    if rest:
        join = next((_JOIN[m] for m in i.modifiers[1:] if m in _JOIN), None)
        if join is None:
            raise e.unsupported()
        test = e.let(f"{test} {join} {e.value(rest[0], 'pred')}")
    if target in ("f32", "f16"):
        e.define(d, f"{test}.astype({DTYPES[target]})", target)
    elif target == "bf16":
        e.define(d, f"where({test}, {e.constant(0x3F80, 'u16')}, {e.constant(0, 'u16')})", "u16")
    else:
        e.define(d, f"where({test}, {e.constant(-1, target)}, {e.constant(0, target)})", target)
