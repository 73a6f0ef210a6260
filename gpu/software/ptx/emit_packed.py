# SPDX-License-Identifier: Apache-2.0
"""Emitters for integers packed in one register: 16-bit halves, and the video instructions that nvcc still uses.

NumPy cannot view a register shared by all lanes as several smaller elements without changing its length, so the pieces are
taken apart by shifts and put together again.
"""

from __future__ import annotations

from .emit import BlockEmitter, emits
from .syntax import Instruction, Operand


def _pieces(e: BlockEmitter, operand: Operand, width: int, is_signed: bool) -> list[str]:
    """Each 8- or 16-bit piece, lowest first, extended to int32."""
    bits = e.value(operand, "u32")
    size = width // 8
    pieces = []
    for place in range(32 // width):
        piece = f"({bits} >> {e.constant(place * width, 'u32')})" if place else bits
        narrow = f"{piece}.astype(u{size})"
        pieces.append(e.let(f"{narrow}{f'.view(i{size})' if is_signed else ''}.astype(i4)"))
    return pieces


def _join(e: BlockEmitter, pieces: list[str], width: int) -> str:
    mask = e.constant((1 << width) - 1, "u32")
    parts = [f"(({p}).view(u4) & {mask})" for p in pieces]
    return " | ".join(
        part if place == 0 else f"({part} << {e.constant(place * width, 'u32')})"
        for place, part in enumerate(parts)
    )


def halves(e: BlockEmitter, i: Instruction, kind: str) -> None:
    """add, sub, min and max of u16x2 and s16x2."""
    d, a, b = i.operands
    x, y = (_pieces(e, operand, 16, kind[0] == "s") for operand in (a, b))
    form = {
        "add": "{} + {}",
        "sub": "{} - {}",
        "min": "npminimum({}, {})",
        "max": "npmaximum({}, {})",
    }[i.opcode]
    results = [form.format(p, q) for p, q in zip(x, y, strict=True)]
    if "relu" in i.modifiers:
        results = [f"npmaximum({result}, {e.constant(0, 's32')})" for result in results]
    elif i.modifiers != (kind,):
        raise e.unsupported()
    e.define(d, _join(e, results, 16), "u32")


@emits("vabsdiff4", "vabsdiff2")
def absolute_differences(e: BlockEmitter, i: Instruction) -> None:
    """|a - b| of each piece; with .add their sum, added to c."""
    kinds = [m for m in i.modifiers if m in ("u32", "s32")]
    if len(kinds) != 3 or set(i.modifiers) - {"u32", "s32", "add"} or len(i.operands) != 4:
        raise e.unsupported()
    d, a, b, c = i.operands
    width = 8 if i.opcode == "vabsdiff4" else 16
    x, y = _pieces(e, a, width, kinds[1] == "s32"), _pieces(e, b, width, kinds[2] == "s32")
    results = [e.let(f"npabs({p} - {q})") for p, q in zip(x, y, strict=True)]
    if "add" in i.modifiers:
        total = " + ".join(f"{result}.view(u4)" for result in results)
        e.define(d, f"{total} + {e.value(c, 'u32')}", "u32")
    else:
        e.define(d, _join(e, results, width), "u32")
