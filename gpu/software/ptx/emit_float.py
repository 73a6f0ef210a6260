# SPDX-License-Identifier: Apache-2.0
"""Emitters for floating point arithmetic, comparisons and approximations.

Half formats are computed element-wise in a wider or native dtype ("compute form"): f16 as float16, bf16 as the float32
it abbreviates; the packed types as two of those. `_operands` and `_finish` convert to and from that form.
"""

from __future__ import annotations

from typing import Final

from .emit import DTYPES, BlockEmitter, emits
from .syntax import Instruction, Operand, Pair, Sink

_FLOATS: Final = {"f16": "f16", "f16x2": "f16", "bf16": "bf16", "bf16x2": "bf16", "f32": "f32", "f64": "f64"}
_MODES: Final = ("rn", "rz", "rm", "rp")


def _mode(i: Instruction) -> str:
    return next((m for m in i.modifiers if m in _MODES), "rn")


def _check(e: BlockEmitter, kind: str, allowed: tuple[str, ...] = tuple(_FLOATS)) -> None:
    if kind not in allowed:
        raise e.unsupported()


def _operands(e: BlockEmitter, i: Instruction, kind: str, *operands: Operand) -> list[tuple[str, ...]]:
    """For each scalar of the type (one, or two of a packed one), the operands in compute form."""
    ftz = "ftz" in i.modifiers and kind in ("f32", "f16", "f16x2")
    columns = []
    for operand in operands:
        if kind in ("f32", "f64", "f16"):
            halves = [e.value(operand, kind)]
        elif kind == "bf16":
            halves = [e.let(f"bf16_to_f32({e.value(operand, 'u16')})")]
        else:
            bits = e.value(operand, "u32")
            low = e.let(f"{bits}.astype(u2)")
            high = e.let(f"({bits} >> {e.constant(16, 'u32')}).astype(u2)")
            halves = [e.let(f"{h}.view(f2)" if kind == "f16x2" else f"bf16_to_f32({h})") for h in (low, high)]
        if ftz:
            halves = [e.let(f"{'flush' if kind == 'f32' else 'flush_f16'}({h})") for h in halves]
        columns.append(halves)
    return list(zip(*columns, strict=True))


def _finish(e: BlockEmitter, i: Instruction, kind: str, results: list[str], d: Operand | None = None) -> None:
    """Saturation, flushing and packing, then the definition. A bf16 result is given as float32 and rounded here."""
    final = []
    for result in results:
        if "sat" in i.modifiers:
            result = f"saturate({result})"
        if "relu" in i.modifiers:
            result = f"relu({result})"
        if "ftz" in i.modifiers and kind == "f32":
            result = f"flush({result})"
        elif "ftz" in i.modifiers and kind in ("f16", "f16x2"):
            result = f"flush_f16({result})"
        if kind in ("bf16", "bf16x2"):
            result = f"f32_to_bf16({result})"
        final.append(result)
    _pack(e, kind, final, i.operands[0] if d is None else d)


def _pack(e: BlockEmitter, kind: str, results: list[str], d: Operand) -> None:
    if kind in ("f32", "f64", "f16"):
        e.define(d, results[0], kind)
    elif kind == "bf16":
        e.define(d, results[0], "u16")
    else:
        bits = [f"({r}).view(u2).astype(u4)" if kind == "f16x2" else f"({r}).astype(u4)" for r in results]
        e.define(d, f"{bits[0]} | ({bits[1]} << {e.constant(16, 'u32')})", "u32")


def add(e: BlockEmitter, i: Instruction, kind: str) -> None:
    _check(e, kind)
    sign = "+" if i.opcode == "add" else "-"
    mode = _mode(i)
    results = []
    for a, b in _operands(e, i, kind, *i.operands[1:3]):
        if mode == "rn":
            results.append(f"{a} {sign} {b}")
        else:
            _check(e, kind, ("f32", "f64"))
            results.append(f"add_{kind}({a}, {'' if sign == '+' else '-'}{b}, {mode!r})")
    _finish(e, i, kind, results)


def mul(e: BlockEmitter, i: Instruction, kind: str) -> None:
    _check(e, kind)
    mode = _mode(i)
    results = []
    for a, b in _operands(e, i, kind, *i.operands[1:3]):
        if mode == "rn":
            results.append(f"{a} * {b}")
        else:
            _check(e, kind, ("f32", "f64"))
            results.append(f"mul_{kind}({a}, {b}, {mode!r})")
    _finish(e, i, kind, results)


@emits("fma")
def fma(e: BlockEmitter, i: Instruction) -> None:
    kind = i.modifiers[-1]
    _check(e, kind)
    mode = _mode(i)
    results = []
    for a, b, c in _operands(e, i, kind, *i.operands[1:4]):
        scalar = _FLOATS[kind]
        if scalar in ("f32", "f64"):
            extra = "" if mode == "rn" else f", {mode!r}"
            results.append(f"fma_{scalar}({a}, {b}, {c}{extra})")
        elif scalar == "f16":
            results.append(f"fma_f16({a}, {b}, {c})")
        else:
            results.append(f"fma_bf16_wide({a}, {b}, {c})")
    _finish(e, i, kind, results)


def div(e: BlockEmitter, i: Instruction, kind: str) -> None:
    _check(e, kind, ("f32", "f64"))
    ((a, b),) = _operands(e, i, kind, *i.operands[1:3])
    mode = _mode(i)
    _finish(e, i, kind, [f"{a} / {b}" if mode == "rn" else f"div_{kind}({a}, {b}, {mode!r})"])


@emits("rcp", "sqrt")
def root(e: BlockEmitter, i: Instruction) -> None:
    kind = i.modifiers[-1]
    _check(e, kind, ("f32", "f64"))
    ((a,),) = _operands(e, i, kind, i.operands[1])
    _finish(e, i, kind, [f"{i.opcode}_{kind}({a}, {_mode(i)!r})"])


_APPROXIMATE: Final = {
    "sin": "approximate(npsin, {})",
    "cos": "approximate(npcos, {})",
    "ex2": "approximate(npexp2, {})",
    "lg2": "approximate(nplog2, {})",
    "tanh": "approximate(nptanh, {})",
    "rsqrt": "rsqrt({})",
}


@emits(*_APPROXIMATE)
def approximation(e: BlockEmitter, i: Instruction) -> None:
    kind = i.modifiers[-1]
    allowed = {
        "ex2": ("f32", "f16", "f16x2", "bf16", "bf16x2"),
        "tanh": ("f32", "f16", "f16x2", "bf16", "bf16x2"),
    }
    _check(e, kind, allowed.get(i.opcode, ("f32", "f64") if i.opcode == "rsqrt" else ("f32",)))
    results = []
    for (a,) in _operands(e, i, kind, i.operands[1]):
        result = _APPROXIMATE[i.opcode].format(a)
        results.append(f"{result}.astype(f2)" if _FLOATS[kind] == "f16" else result)
    _finish(e, i, kind, results)


def abs_neg(e: BlockEmitter, i: Instruction, kind: str) -> None:
    """On bits, so that NaNs keep theirs."""
    _check(e, kind)
    d, a = i.operands
    bits = {"f16": "u16", "bf16": "u16", "f32": "u32", "f64": "u64"}.get(kind, "u32")
    sign = (
        {"u16": 0x8000, "u32": 0x8000_0000, "u64": 1 << 63}[bits] if not kind.endswith("x2") else 0x8000_8000
    )
    if "ftz" in i.modifiers and kind == "f32":
        x = e.let(f"flush({e.value(a, kind)}).view(u4)")
    else:
        x = e.value(a, bits)
    if i.opcode == "neg":
        e.define(d, f"{x} ^ {e.constant(sign, bits)}", bits)
    else:
        e.define(d, f"{x} & {e.constant(~sign & ((1 << int(bits[1:])) - 1), bits)}", bits)


@emits("copysign")
def copysign(e: BlockEmitter, i: Instruction) -> None:
    kind = i.modifiers[-1]
    _check(e, kind, ("f32", "f64"))
    d, a, b = i.operands
    e.define(d, f"npcopysign({e.value(b, kind)}, {e.value(a, kind)})", kind)


def min_max(e: BlockEmitter, i: Instruction, kind: str) -> None:
    _check(e, kind)
    if len(i.operands) != 3:
        raise e.unsupported()
    function = "minimum" if i.opcode == "min" else "maximum"
    results = []
    for a, b in _operands(e, i, kind, *i.operands[1:3]):
        x, y = (a, b) if "abs" not in i.modifiers else (f"npabs({a})", f"npabs({b})")
        result = f"{function}({x}, {y})"
        if "abs" in i.modifiers:
            sign = e.let(f"npsignbit({a}) != npsignbit({b})")
            result = f"where({sign}, -{result}, {result})"
        if "NaN" in i.modifiers:
            result = f"propagate_nan({result}, {a}, {b})"
        results.append(result)
    _finish(e, i, kind, results)


@emits("testp")
def testp(e: BlockEmitter, i: Instruction) -> None:
    test, kind = i.modifiers
    _check(e, kind, ("f32", "f64"))
    x = e.value(i.operands[1], kind)
    tiny = "F32_TINY" if kind == "f32" else "F64_TINY"
    expressions = {
        "finite": f"npisfinite({x})",
        "infinite": f"npisinf({x})",
        "number": f"~npisnan({x})",
        "notanumber": f"npisnan({x})",
        "normal": f"npisfinite({x}) & ((npabs({x}) >= {tiny}) | ({x} == 0))",  # zeros count as normal
        "subnormal": f"(npabs({x}) < {tiny}) & ({x} != 0)",
    }
    if test not in expressions:
        raise e.unsupported()
    e.define(i.operands[0], expressions[test], "pred")


_ORDERED: Final = {"eq": "=={}", "lt": "<{}", "le": "<={}", "gt": ">{}", "ge": ">={}"}
# "or unordered" is the negation of the opposite ordered test
_UNORDERED: Final = {"neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}


def _test(e: BlockEmitter, test: str, a: str, b: str) -> str:
    if test in _ORDERED:
        return f"({a} {_ORDERED[test].format('')} {b})"
    if test in _UNORDERED:
        return f"~({a} {_ORDERED[_UNORDERED[test]].format('')} {b})"
    if test == "ne":
        return f"(({a} < {b}) | ({a} > {b}))"
    if test == "equ":
        return f"~(({a} < {b}) | ({a} > {b}))"
    if test == "num":
        return f"(({a} == {a}) & ({b} == {b}))"
    if test == "nan":
        return f"(({a} != {a}) | ({b} != {b}))"
    raise e.unsupported()


def comparison(e: BlockEmitter, i: Instruction, test: str, kind: str, a: object, b: object) -> str:
    _check(e, kind, ("f32", "f64", "f16", "bf16"))
    ((x, y),) = _operands(e, i, kind, a, b)  # type: ignore[arg-type]
    return _test(e, test, x, y)


def compare_halves(e: BlockEmitter, i: Instruction, kind: str) -> None:
    """setp on packed halves: two predicates."""
    d = i.operands[0]
    if not isinstance(d, Pair) or len(i.operands) != 3:
        raise e.unsupported()
    results = [e.let(_test(e, i.modifiers[0], a, b)) for a, b in _operands(e, i, kind, *i.operands[1:3])]
    for destination, result in zip((d.first, d.second), results, strict=True):
        if not isinstance(destination, Sink):
            e.define(destination, result, "pred")


def set_halves(e: BlockEmitter, i: Instruction, target: str, kind: str) -> None:
    """set on packed halves: 1.0 or 0.0 in each, or all ones or zeros in 16 bits each."""
    if len(i.operands) != 3:
        raise e.unsupported()
    true = {"f16x2": 0x3C00, "bf16x2": 0x3F80, "u32": 0xFFFF, "s32": 0xFFFF}.get(target)
    if true is None:
        raise e.unsupported()
    pieces = []
    for place, (a, b) in enumerate(_operands(e, i, kind, *i.operands[1:3])):
        value = e.constant(true << 16 * place, "u32")
        pieces.append(f"where({_test(e, i.modifiers[0], a, b)}, {value}, {e.constant(0, 'u32')})")
    e.define(i.operands[0], " | ".join(pieces), "u32")


assert set(_FLOATS) <= set(DTYPES)
