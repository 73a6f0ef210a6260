# SPDX-License-Identifier: Apache-2.0
"""Emitters for integer arithmetic, logic, shifts and bit fields, and for what moves or selects values.

Arithmetic with a type that may also be floating point (add, mul, min, ...) is dispatched from here to emit_float.
"""

from __future__ import annotations

from typing import Any, Final

import numpy.typing as npt

from . import emit_float, emit_packed
from .emit import DTYPES, BlockEmitter, constant_bits, emits
from .syntax import TYPE_BITS, Immediate, Instruction, Pair, Register, Sink, Special, SymbolReference, Vector

INTEGER: Final = frozenset(f"{letter}{bits}" for letter in "us" for bits in (8, 16, 32, 64))
_BITS: Final = frozenset(f"b{bits}" for bits in (8, 16, 32, 64))


def _unsigned(kind: str) -> str:
    return "u" + kind[1:]


def _kind(e: BlockEmitter, i: Instruction) -> str:
    """The instruction's last modifier, which must be a type."""
    kind = i.modifiers[-1] if i.modifiers else ""
    if kind not in DTYPES:
        raise e.unsupported()
    return kind


@emits("add", "sub")
def add(e: BlockEmitter, i: Instruction) -> None:
    kind = _kind(e, i)
    if kind not in INTEGER:
        if kind in ("u16x2", "s16x2"):
            emit_packed.halves(e, i, kind)
        else:
            emit_float.add(e, i, kind)
        return
    d, a, b = i.operands
    sign = "+" if i.opcode == "add" else "-"
    if "sat" in i.modifiers:
        if kind != "s32":
            raise e.unsupported()
        e.define(d, f"add_saturating({e.value(a, kind)}, {e.value(b, kind)}, {sign}1)", kind)
        return
    unsigned = _unsigned(kind)
    x, y = e.value(a, unsigned), e.value(b, unsigned)
    if "cc" in i.modifiers:
        _with_carry(e, i, x, y, unsigned, None)
    elif i.modifiers == (kind,):
        e.define(d, f"{x} {sign} {y}", unsigned)
    else:
        raise e.unsupported()


def _with_carry(e: BlockEmitter, i: Instruction, x: str, y: str, kind: str, carry: str | None) -> None:
    if e.guard is not None:
        raise e.unsupported("predicated extended-precision arithmetic")
    subtract = i.opcode.startswith("sub")
    total, out = e.owner.fresh(), e.owner.fresh()
    function = "subtract_borrow" if subtract else "add_carry"
    e.line(f"{total}, {out} = {function}({x}, {y}, {carry or e.constant(0, kind)})")
    if "cc" in i.modifiers:
        e.carry, e.carry_dtype = out, DTYPES[kind]
    e.define(i.operands[0], total, kind)


def _carry_in(e: BlockEmitter, kind: str) -> str:
    if e.carry is None:
        raise e.unsupported("the carry does not come from the same basic block")
    return e.carry if e.carry_dtype == DTYPES[kind] else e.let(f"{e.carry}.astype({DTYPES[kind]})")


@emits("addc", "subc")
def add_with_carry(e: BlockEmitter, i: Instruction) -> None:
    kind = _unsigned(_kind(e, i))
    _, a, b = i.operands
    _with_carry(e, i, e.value(a, kind), e.value(b, kind), kind, _carry_in(e, kind))


@emits("madc")
def mad_with_carry(e: BlockEmitter, i: Instruction) -> None:
    _mad_carry(e, i, _carry_in(e, _unsigned(_kind(e, i))))


def _mad_carry(e: BlockEmitter, i: Instruction, carry: str | None) -> None:
    kind = _kind(e, i)
    _, a, b, c = i.operands
    product = _product(e, i, kind, a, b)
    _with_carry(e, i, product, e.value(c, _unsigned(kind)), _unsigned(kind), carry)


def _product(e: BlockEmitter, i: Instruction, kind: str, a: object, b: object) -> str:
    """lo or hi half of a product, as the unsigned dtype."""
    if "lo" in i.modifiers:
        return e.let(f"{e.value(a, _unsigned(kind))} * {e.value(b, _unsigned(kind))}")  # type: ignore[arg-type]
    if "hi" in i.modifiers:
        high = f"mul_hi({e.value(a, kind)}, {e.value(b, kind)})"  # type: ignore[arg-type]
        return e.let(high if kind[0] == "u" else f"{high}.view({DTYPES[_unsigned(kind)]})")
    raise e.unsupported()


@emits("mul")
def mul(e: BlockEmitter, i: Instruction) -> None:
    kind = _kind(e, i)
    if kind not in INTEGER:
        emit_float.mul(e, i, kind)
        return
    d, a, b = i.operands
    if "wide" in i.modifiers:
        wide = f"{kind[0]}{TYPE_BITS[kind] * 2}"
        e.define(d, _wide_product(e, kind, a, b), wide)
        return
    e.define(d, _product(e, i, kind, a, b), _unsigned(kind))


def _wide_product(e: BlockEmitter, kind: str, a: object, b: object) -> str:
    wide = DTYPES[f"{kind[0]}{TYPE_BITS[kind] * 2}"]
    factors = []
    for operand in (a, b):
        if isinstance(operand, Immediate):
            factors.append(e.owner.constant(_wide_constant(operand, kind)))
        else:
            factors.append(f"{e.value(operand, kind)}.astype({wide})")  # type: ignore[arg-type]
    return f"{factors[0]} * {factors[1]}"


def _wide_constant(operand: Immediate, kind: str) -> npt.NDArray[Any]:
    return constant_bits(operand, kind).astype(DTYPES[f"{kind[0]}{TYPE_BITS[kind] * 2}"])


@emits("mad")
def mad(e: BlockEmitter, i: Instruction) -> None:
    kind = _kind(e, i)
    if kind not in INTEGER:
        emit_float.fma(e, i)
        return
    d, a, b, c = i.operands
    if "cc" in i.modifiers:
        _mad_carry(e, i, None)
    elif "wide" in i.modifiers:
        wide = f"{kind[0]}{TYPE_BITS[kind] * 2}"
        e.define(d, f"{_wide_product(e, kind, a, b)} + {e.value(c, wide)}", wide)
    elif "sat" in i.modifiers:
        if kind != "s32" or "hi" not in i.modifiers:
            raise e.unsupported()
        e.define(
            d, f"add_saturating(mul_hi({e.value(a, kind)}, {e.value(b, kind)}), {e.value(c, kind)})", kind
        )
    else:
        e.define(d, f"{_product(e, i, kind, a, b)} + {e.value(c, _unsigned(kind))}", _unsigned(kind))


@emits("mul24", "mad24")
def mul24(e: BlockEmitter, i: Instruction) -> None:
    kind = _kind(e, i)
    d, a, b, *rest = i.operands
    eight = e.constant(8, kind)
    wide = DTYPES[f"{kind[0]}64"]
    x, y = (f"(({e.value(o, kind)} << {eight}) >> {eight}).astype({wide})" for o in (a, b))
    product = e.let(f"{x} * {y}")
    if "hi" in i.modifiers:
        product = e.let(f"{product} >> {e.constant(16, kind[0] + '64')}")
    low = f"{product}.astype({DTYPES[kind]})"
    if rest:
        low = f"{low} + {e.value(rest[0], kind)}"
    e.define(d, low, kind)


@emits("sad")
def sad(e: BlockEmitter, i: Instruction) -> None:
    kind = _kind(e, i)
    d, a, b, c = i.operands
    function = (
        f"sum_absolute_difference({e.value(a, kind)}, {e.value(b, kind)}, {e.value(c, _unsigned(kind))})"
    )
    e.define(d, function, _unsigned(kind))


@emits("div")
def div(e: BlockEmitter, i: Instruction) -> None:
    kind = _kind(e, i)
    if kind not in INTEGER:
        emit_float.div(e, i, kind)
        return
    d, a, b = i.operands
    e.define(d, f"divide({e.value(a, kind)}, {e.value(b, kind)})", kind)


@emits("rem")
def rem(e: BlockEmitter, i: Instruction) -> None:
    kind = _kind(e, i)
    d, a, b = i.operands
    e.define(d, f"remainder({e.value(a, kind)}, {e.value(b, kind)})", kind)


@emits("abs", "neg")
def abs_neg(e: BlockEmitter, i: Instruction) -> None:
    kind = _kind(e, i)
    if kind not in INTEGER:
        emit_float.abs_neg(e, i, kind)
        return
    d, a = i.operands
    x = e.value(a, kind)
    e.define(d, f"npabs({x})" if i.opcode == "abs" else f"-{x}", kind)


@emits("min", "max")
def min_max(e: BlockEmitter, i: Instruction) -> None:
    kind = _kind(e, i)
    if kind not in INTEGER:
        if kind in ("u16x2", "s16x2"):
            emit_packed.halves(e, i, kind)
        else:
            emit_float.min_max(e, i, kind)
        return
    d, a, b = i.operands
    function = "npminimum" if i.opcode == "min" else "npmaximum"
    expression = f"{function}({e.value(a, kind)}, {e.value(b, kind)})"
    if "relu" in i.modifiers:
        expression = f"npmaximum({expression}, {e.constant(0, kind)})"
    e.define(d, expression, kind)


@emits("popc", "clz", "brev", "bfind")
def count_bits(e: BlockEmitter, i: Instruction) -> None:
    kind = _kind(e, i)
    d, a = i.operands
    x = e.value(a, kind)
    if i.opcode == "brev":
        e.define(d, f"reverse_bits({x})", kind)
    elif i.opcode == "bfind":
        e.define(d, f"find_top({x}, {'shiftamt' in i.modifiers})", "u32")
    else:
        e.define(d, f"{'population' if i.opcode == 'popc' else 'leading_zeros'}({x})", "u32")


@emits("bfe")
def bfe(e: BlockEmitter, i: Instruction) -> None:
    kind = _kind(e, i)
    d, a, b, c = i.operands
    e.define(d, f"extract({e.value(a, kind)}, {e.value(b, 'u32')}, {e.value(c, 'u32')})", kind)


@emits("bfi")
def bfi(e: BlockEmitter, i: Instruction) -> None:
    kind = _kind(e, i)
    f, a, b, c, d = i.operands
    e.define(
        f, f"insert({e.value(a, kind)}, {e.value(b, kind)}, {e.value(c, 'u32')}, {e.value(d, 'u32')})", kind
    )


@emits("bmsk")
def bmsk(e: BlockEmitter, i: Instruction) -> None:
    d, a, b = i.operands
    e.define(d, f"bit_mask({e.value(a, 'u32')}, {e.value(b, 'u32')}, {'clamp' in i.modifiers})", "u32")


@emits("szext")
def szext(e: BlockEmitter, i: Instruction) -> None:
    kind = _kind(e, i)
    d, a, b = i.operands
    e.define(d, f"sign_extend_at({e.value(a, kind)}, {e.value(b, 'u32')}, {'clamp' in i.modifiers})", kind)


@emits("dp4a", "dp2a")
def dot(e: BlockEmitter, i: Instruction) -> None:
    d, a, b, c = i.operands
    signs = ", ".join(str(m[0] == "s") for m in i.modifiers if m in ("u32", "s32"))
    operands = ", ".join(e.value(o, "u32") for o in (a, b, c))
    if i.opcode == "dp4a":
        e.define(d, f"dot4({operands}, {signs})", "u32")
    else:
        e.define(d, f"dot2({operands}, {signs}, {'hi' in i.modifiers})", "u32")


@emits("and", "or", "xor")
def logic(e: BlockEmitter, i: Instruction) -> None:
    kind = _kind(e, i)
    d, a, b = i.operands
    sign = {"and": "&", "or": "|", "xor": "^"}[i.opcode]
    e.define(d, f"{e.value(a, kind)} {sign} {e.value(b, kind)}", kind)


@emits("not")
def invert(e: BlockEmitter, i: Instruction) -> None:
    kind = _kind(e, i)
    e.define(i.operands[0], f"~{e.value(i.operands[1], kind)}", kind)


@emits("cnot")
def cnot(e: BlockEmitter, i: Instruction) -> None:
    kind = _kind(e, i)
    e.define(i.operands[0], f"({e.value(i.operands[1], kind)} == 0).astype({DTYPES[kind]})", kind)


@emits("lop3")
def lop3(e: BlockEmitter, i: Instruction) -> None:
    d, a, b, c, table, *rest = i.operands
    if not isinstance(table, Immediate) or rest or "BoolOp" in i.modifiers or isinstance(d, Pair):
        raise e.unsupported()
    operands = ", ".join(e.value(o, "u32") for o in (a, b, c))
    e.define(d, f"logic3({operands}, {int(table.value) & 0xFF})", "u32")


@emits("shl", "shr")
def shift(e: BlockEmitter, i: Instruction) -> None:
    kind = _kind(e, i)
    d, a, b = i.operands
    x = e.value(a, kind)
    # NumPy shifts by the width or more the way PTX clamps: zero, or copies of the sign.
    if isinstance(b, Immediate):
        amount = e.constant(
            min(int(b.value) & 0xFFFF_FFFF, 64 if TYPE_BITS[kind] == 64 else TYPE_BITS[kind]), kind
        )
    elif DTYPES[kind] == "u4":
        amount = e.value(b, "u32")
    elif kind[0] == "s":
        amount = e.let(
            f"npminimum({e.value(b, 'u32')}, {e.constant(TYPE_BITS[kind], 'u32')}).astype({DTYPES[kind]})"
        )
    elif TYPE_BITS[kind] == 64:
        amount = e.let(f"{e.value(b, 'u32')}.astype(u8)")
    else:
        amount = e.let(
            f"npminimum({e.value(b, 'u32')}, {e.constant(TYPE_BITS[kind], 'u32')}).astype({DTYPES[kind]})"
        )
    e.define(d, f"{x} {'<<' if i.opcode == 'shl' else '>>'} {amount}", kind)


@emits("shf")
def shf(e: BlockEmitter, i: Instruction) -> None:
    d, a, b, c = i.operands
    operands = ", ".join(e.value(o, "u32") for o in (a, b, c))
    e.define(d, f"funnel({operands}, {i.modifiers[0] == 'l'}, {'clamp' in i.modifiers})", "u32")


@emits("prmt")
def prmt(e: BlockEmitter, i: Instruction) -> None:
    d, a, b, c = i.operands
    mode = i.modifiers[1] if len(i.modifiers) > 1 else ""
    operands = ", ".join(e.value(o, "u32") for o in (a, b, c))
    e.define(d, f"permute({operands}, {mode!r})", "u32")


# --- moving and selecting -------------------------------------------------------------------------------------------


@emits("mov")
def mov(e: BlockEmitter, i: Instruction) -> None:
    kind = _kind(e, i)
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
    from .batch import LOCAL_WINDOW, PARAMETER_WINDOW, SHARED_WINDOW

    kind = _kind(e, i)
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
    kind = _kind(e, i)
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
    kind = _kind(e, i)
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
