# SPDX-License-Identifier: Apache-2.0
"""Emitters for integer arithmetic, logic, shifts and bit fields.

Arithmetic with a type that may also be floating point (add, mul, min, ...) is dispatched from here to emit_float.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from . import emit_float, emit_packed
from .emit import DTYPES, INTEGER, BlockEmitter, constant_bits, emits, type_of
from .syntax import TYPE_BITS, Immediate, Instruction, Pair


def _unsigned(kind: str) -> str:
    return "u" + kind[1:]


@emits("add", "sub")
def add(e: BlockEmitter, i: Instruction) -> None:
    kind = type_of(e, i)
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
    kind = _unsigned(type_of(e, i))
    _, a, b = i.operands
    _with_carry(e, i, e.value(a, kind), e.value(b, kind), kind, _carry_in(e, kind))


@emits("madc")
def mad_with_carry(e: BlockEmitter, i: Instruction) -> None:
    _mad_carry(e, i, _carry_in(e, _unsigned(type_of(e, i))))


def _mad_carry(e: BlockEmitter, i: Instruction, carry: str | None) -> None:
    kind = type_of(e, i)
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
    kind = type_of(e, i)
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
    kind = type_of(e, i)
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
    kind = type_of(e, i)
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
    kind = type_of(e, i)
    d, a, b, c = i.operands
    function = (
        f"sum_absolute_difference({e.value(a, kind)}, {e.value(b, kind)}, {e.value(c, _unsigned(kind))})"
    )
    e.define(d, function, _unsigned(kind))


@emits("div")
def div(e: BlockEmitter, i: Instruction) -> None:
    kind = type_of(e, i)
    if kind not in INTEGER:
        emit_float.div(e, i, kind)
        return
    d, a, b = i.operands
    e.define(d, f"divide({e.value(a, kind)}, {e.value(b, kind)})", kind)


@emits("rem")
def rem(e: BlockEmitter, i: Instruction) -> None:
    kind = type_of(e, i)
    d, a, b = i.operands
    e.define(d, f"remainder({e.value(a, kind)}, {e.value(b, kind)})", kind)


@emits("abs", "neg")
def abs_neg(e: BlockEmitter, i: Instruction) -> None:
    kind = type_of(e, i)
    if kind not in INTEGER:
        emit_float.abs_neg(e, i, kind)
        return
    d, a = i.operands
    x = e.value(a, kind)
    e.define(d, f"npabs({x})" if i.opcode == "abs" else f"-{x}", kind)


@emits("min", "max")
def min_max(e: BlockEmitter, i: Instruction) -> None:
    kind = type_of(e, i)
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
    kind = type_of(e, i)
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
    kind = type_of(e, i)
    d, a, b, c = i.operands
    e.define(d, f"extract({e.value(a, kind)}, {e.value(b, 'u32')}, {e.value(c, 'u32')})", kind)


@emits("bfi")
def bfi(e: BlockEmitter, i: Instruction) -> None:
    kind = type_of(e, i)
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
    kind = type_of(e, i)
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
    kind = type_of(e, i)
    d, a, b = i.operands
    sign = {"and": "&", "or": "|", "xor": "^"}[i.opcode]
    e.define(d, f"{e.value(a, kind)} {sign} {e.value(b, kind)}", kind)


@emits("not")
def invert(e: BlockEmitter, i: Instruction) -> None:
    kind = type_of(e, i)
    e.define(i.operands[0], f"~{e.value(i.operands[1], kind)}", kind)


@emits("cnot")
def cnot(e: BlockEmitter, i: Instruction) -> None:
    kind = type_of(e, i)
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
    kind = type_of(e, i)
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
