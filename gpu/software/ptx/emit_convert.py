# SPDX-License-Identifier: Apache-2.0
"""Emitters for cvt: between integers, between floating point formats, and across."""

from __future__ import annotations

from typing import Final

from .emit import DTYPES, BlockEmitter, emits
from .syntax import TYPE_BITS, Instruction

_INTEGERS: Final = frozenset(f"{letter}{bits}" for letter in "usb" for bits in (8, 16, 32, 64))
_INTEGER_MODES: Final = ("rni", "rzi", "rmi", "rpi")
_MODES: Final = ("rn", "rz", "rm", "rp")
_LIMITS: Final = {
    **{f"u{b}": (0, (1 << b) - 1) for b in (8, 16, 32, 64)},
    **{f"s{b}": (-(1 << (b - 1)), (1 << (b - 1)) - 1) for b in (8, 16, 32, 64)},
}


@emits("cvt")
def cvt(e: BlockEmitter, i: Instruction) -> None:
    if i.modifiers[0] == "pack":
        _pack(e, i)
        return
    target, source = i.modifiers[-2:]
    if len(i.operands) == 3:
        _pair(e, i, target, source)
    elif target in ("e4m3x2", "e5m2x2") and source == "f16x2":
        bits = e.value(i.operands[1], "u32")
        shift = e.constant(16, "u32")
        pieces = (f"({bits} >> {shift})", bits)
        _float8(e, i, target, [e.let(f"{piece}.astype(u2).view(f2).astype(f4)") for piece in pieces])
    elif target == "f16x2" and source in ("e4m3x2", "e5m2x2"):
        _from_float8(e, i, source)
    elif target not in DTYPES or source not in DTYPES or target.endswith("x2") or source.endswith("x2"):
        raise e.unsupported()
    elif source in _INTEGERS and target in _INTEGERS:
        _integer_to_integer(e, i, target, source)
    elif source in _INTEGERS:
        _integer_to_float(e, i, target, source)
    elif target in _INTEGERS:
        _float_to_integer(e, i, target, source)
    else:
        _float_to_float(e, i, target, source)


def _integer_to_integer(e: BlockEmitter, i: Instruction, target: str, source: str) -> None:
    x = e.value(i.operands[1], source)
    if "sat" in i.modifiers:
        low, high = _LIMITS[target]
        have_low, have_high = _LIMITS[source]
        low, high = max(low, have_low), min(high, have_high)
        x = f"npminimum(npmaximum({x}, {e.constant(low, source)}), {e.constant(high, source)})"
    if DTYPES[target] == DTYPES[source]:
        e.define(i.operands[0], x, target)
    else:
        e.define(i.operands[0], f"({x}).astype({DTYPES[target]})", target)


def _mode(e: BlockEmitter, i: Instruction, modes: tuple[str, ...], default: str = "") -> str:
    mode = next((m for m in i.modifiers if m in modes), default)
    if not mode:
        raise e.unsupported()
    return mode


def _integer_to_float(e: BlockEmitter, i: Instruction, target: str, source: str) -> None:
    x = e.value(i.operands[1], source)
    mode = _mode(e, i, _MODES, "rn")
    if target in ("f32", "f64"):
        result = f"integer_to_{target}({x}, {mode!r})"
        if "sat" in i.modifiers:
            result = f"saturate({result})"
        e.define(i.operands[0], result, target)
    elif target == "f16":
        # every integer that f16 holds without overflow is exact in f64, and larger ones overflow anyway
        e.define(i.operands[0], f"f32_to_f16({x}.astype(f8), {mode!r})", "f16")
    elif target == "bf16":
        e.define(i.operands[0], f"f64_to_bf16({x}, {mode!r})", "u16")
    else:
        raise e.unsupported()


def _source(e: BlockEmitter, i: Instruction, operand: object, source: str) -> str:
    """The value in a dtype NumPy can calculate with: float16, float32 or float64."""
    if source == "bf16":
        return e.let(f"bf16_to_f32({e.value(operand, 'u16')})")  # type: ignore[arg-type]
    if source not in ("f16", "f32", "f64"):
        raise e.unsupported()
    x = e.value(operand, source)  # type: ignore[arg-type]
    return e.let(f"flush({x})") if "ftz" in i.modifiers and source == "f32" else x


def _float_to_integer(e: BlockEmitter, i: Instruction, target: str, source: str) -> None:
    x = _source(e, i, i.operands[1], source)
    mode = _mode(e, i, _INTEGER_MODES)
    e.define(i.operands[0], f"to_integer({x}, {mode!r}, {DTYPES[target]})", target)


def _float_to_float(e: BlockEmitter, i: Instruction, target: str, source: str) -> None:
    d, a = i.operands
    x = _source(e, i, a, source)
    integral = next((m for m in i.modifiers if m in _INTEGER_MODES), "")
    if integral:
        x = e.let(f"to_integral({x}, {integral!r})")
    mode = next((m for m in i.modifiers if m in _MODES), "rn")
    if target == source or (source, target) in (
        ("f16", "f32"),
        ("f16", "f64"),
        ("bf16", "f32"),
        ("f32", "f64"),
        ("bf16", "f64"),
    ):
        compute = {"f16": "f2", "f32": "f4", "f64": "f8", "bf16": "f4"}[target]
        result = x if target == source else f"{x}.astype({compute})"
        if "sat" in i.modifiers:
            result = f"saturate({result})"
        if target == "bf16":
            e.define(d, f"f32_to_bf16({result})", "u16")
            return
        if "ftz" in i.modifiers and target == "f32":
            result = f"flush({result})"
        e.define(d, result, target)
        return
    if "sat" in i.modifiers:
        x = e.let(f"saturate({x})")
    if target == "f32" and source == "f64":
        result = f"f64_to_f32({x}, {mode!r})"
        e.define(d, f"flush({result})" if "ftz" in i.modifiers else result, "f32")
    elif target == "f16":
        result = f"f32_to_f16({x}, {mode!r})"
        result = f"saturate_finite({result})" if "satfinite" in i.modifiers else result
        e.define(d, f"relu({result})" if "relu" in i.modifiers else result, "f16")
    elif target == "bf16" and source in ("f32", "f16") and "satfinite" not in i.modifiers:
        x = x if source == "f32" else f"{x}.astype(f4)"
        x = f"relu({x})" if "relu" in i.modifiers else x
        e.define(d, f"f32_to_bf16({x}, {mode!r})", "u16")
    elif target == "bf16" and source == "f64" and mode == "rn":
        e.define(d, f"f64_to_bf16({x})", "u16")
    elif target == "f16" and source == "bf16":
        e.define(d, f"f32_to_f16({x}, {mode!r})", "f16")
    elif target == "tf32" and source == "f32" and "rna" in i.modifiers:
        e.define(d, f"({x}.view(u4) + {e.constant(0x1000, 'u32')}) & {e.constant(0xFFFFE000, 'u32')}", "u32")
    else:
        raise e.unsupported()


def _pair(e: BlockEmitter, i: Instruction, target: str, source: str) -> None:
    """cvt.f16x2.f32 d, a, b: a to the upper half, b to the lower."""
    d, a, b = i.operands
    mode = next((m for m in i.modifiers if m in _MODES), "rn")
    if target in ("e4m3x2", "e5m2x2") and source == "f32":
        _float8(e, i, target, [e.value(a, "f32"), e.value(b, "f32")])
        return
    if target not in ("f16x2", "bf16x2") or source != "f32" or mode not in ("rn", "rz"):
        raise e.unsupported()
    if "satfinite" in i.modifiers and target == "bf16x2":
        raise e.unsupported()
    halves = []
    for operand in (a, b):
        x = e.value(operand, "f32")
        if "relu" in i.modifiers:
            x = e.let(f"relu({x})")
        if target == "f16x2":
            result = f"f32_to_f16({x}, {mode!r})"
            result = f"saturate_finite({result})" if "satfinite" in i.modifiers else result
            halves.append(e.let(f"{result}.view(u2).astype(u4)"))
        else:
            halves.append(e.let(f"f32_to_bf16({x}, {mode!r}).astype(u4)"))
    e.define(d, f"({halves[0]} << {e.constant(16, 'u32')}) | {halves[1]}", "u32")


def _float8(e: BlockEmitter, i: Instruction, target: str, values: list[str]) -> None:
    """Two values, upper first, to 8-bit formats in 16 bits."""
    if "satfinite" not in i.modifiers or "rn" not in i.modifiers:
        raise e.unsupported()
    relu = "relu" in i.modifiers
    codes = [
        e.let(f"encode_float8({f'relu({v})' if relu else v}, {target[:4]!r}).astype(u2)") for v in values
    ]
    e.define(i.operands[0], f"({codes[0]} << {e.constant(8, 'u16')}) | {codes[1]}", "u16")


def _from_float8(e: BlockEmitter, i: Instruction, source: str) -> None:
    bits = e.value(i.operands[1], "u16")
    pieces = (f"({bits} >> {e.constant(8, 'u16')})", bits)
    halves = []
    for piece in pieces:
        value = f"decode_float8({piece}.astype(u1), {source[:4]!r})"
        value = f"relu({value})" if "relu" in i.modifiers else value
        halves.append(e.let(f"{value}.view(u2).astype(u4)"))
    e.define(i.operands[0], f"({halves[0]} << {e.constant(16, 'u32')}) | {halves[1]}", "u32")


def _pack(e: BlockEmitter, i: Instruction) -> None:
    """cvt.pack.sat: two (u16, s16) or, with c, two bytes shifted into c (u8, s8)."""
    kind = i.modifiers[2]
    d, a, b, *rest = i.operands
    if kind not in _LIMITS or TYPE_BITS[kind] > 16 or (TYPE_BITS[kind] == 8) != bool(rest):
        raise e.unsupported()
    low, high = _LIMITS[kind]
    width = TYPE_BITS[kind]
    parts = []
    for operand in (a, b):
        x = e.value(operand, "s32")
        clipped = f"npminimum(npmaximum({x}, {e.constant(low, 's32')}), {e.constant(high, 's32')})"
        parts.append(e.let(f"{clipped}.view(u4) & {e.constant((1 << width) - 1, 'u32')}"))
    result = f"({parts[0]} << {e.constant(width, 'u32')}) | {parts[1]}"
    if rest:
        result = f"{result} | ({e.value(rest[0], 'u32')} << {e.constant(2 * width, 'u32')})"
    e.define(d, result, "u32")
