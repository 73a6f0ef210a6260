# SPDX-License-Identifier: Apache-2.0
"""Emitters for loads, stores, atomics and the instructions that only order or hint at memory.

Every access goes through `Batch`, which checks addresses lane by lane. Cache, scope and ordering modifiers change nothing
here: lanes execute in lockstep over one coherent memory.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from .emit import DTYPES, BlockEmitter, emits, result_is_wanted
from .syntax import (
    TYPE_BITS,
    Address,
    Immediate,
    Instruction,
    Operand,
    Register,
    Sink,
    SymbolReference,
    Vector,
)

_SPACES: Final = {
    "global": "global", "const": "global", "shared": "shared", "local": "local", "param": "param",
}  # fmt: skip
_VECTORS: Final = {"v2": 2, "v4": 4, "v8": 8}
_HINTS: Final = frozenset({
    "weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "cta", "gpu", "sys", "cluster", "nc", "ca", "cg", "cs",
    "lu", "cv", "wb", "wt", "mmio", "uni", "noftz", "unified",
})  # fmt: skip


def _shape(e: BlockEmitter, i: Instruction) -> tuple[str, str, int]:
    """(space, type, elements per lane) of a load or store."""
    kind = i.modifiers[-1]
    space, count = "generic", 1
    for modifier in i.modifiers[:-1]:
        name, _, qualifier = modifier.partition("::")
        if name in _SPACES and (not qualifier or qualifier in ("cta", "entry", "func")):
            space = _SPACES[name]
        elif modifier in _VECTORS:
            count = _VECTORS[modifier]
        elif modifier not in _HINTS and name not in ("L1", "L2", "level"):
            raise e.unsupported()
    if kind not in DTYPES or kind == "pred":
        raise e.unsupported()
    return space, kind, count


def _address(e: BlockEmitter, operand: Operand, space: str) -> str:
    if not isinstance(operand, Address):
        raise e.unsupported("an address in brackets was expected")
    base = operand.base
    if base is None:
        return e.owner.constant(np.array([operand.offset & (2**64 - 1)], dtype=np.uint64))
    if isinstance(base, SymbolReference):
        return e.value(SymbolReference(base.name, base.offset + operand.offset, base.variable), "u64")
    kind = "u64" if base.bits == 64 else "u32"
    if base.bits == 32 and space in ("global", "generic"):
        raise e.unsupported("a 32-bit generic or global address")
    start = e.value(base, kind)
    if not operand.offset:
        return start
    return e.let(f"{start} + {e.constant(operand.offset, kind)}")


def guarded_lanes(e: BlockEmitter, i: Instruction) -> str:
    """The lanes where the guard holds, as an argument for Batch."""
    if i.guard is None:
        return "None"
    return e.let(f"choose({e.value(i.guard, 'pred')}, {i.guard_negated})")


def _elements(operand: Operand) -> tuple[Operand, ...]:
    return operand.elements if isinstance(operand, Vector) else (operand,)


@emits("ld", "ldu")
def ld(e: BlockEmitter, i: Instruction) -> None:
    space, kind, count = _shape(e, i)
    destinations = _elements(i.operands[0])
    if len(destinations) != count:
        raise e.unsupported()
    size = TYPE_BITS[kind] // 8
    place = i.operands[1]
    if space == "param" and isinstance(place, Address) and isinstance(place.base, SymbolReference):
        _load_parameter(e, i, place, destinations, kind, size)
        return
    lanes = guarded_lanes(e, i)
    address = _address(e, place, space)
    loaded = [e.owner.fresh() for _ in destinations]
    suffix = "" if lanes == "None" else f", {lanes}"
    e.line(f"{', '.join(loaded)}, = C.load(G, {space!r}, {address}, {size}, {count}{suffix})")
    for destination, name in zip(destinations, loaded, strict=True):
        if isinstance(destination, Sink):
            continue
        value = name if DTYPES[kind][0] == "u" else e.let(f"{name}.view({DTYPES[kind]})")
        if lanes == "None":
            e.assign(destination, value, kind)
        else:
            merge_load(e, destination, value, kind, lanes)


def merge_load(e: BlockEmitter, destination: Operand, value: str, kind: str, lanes: str) -> None:
    """A guarded load: extend to the register's width, then replace the chosen lanes."""
    assert isinstance(destination, Register)
    width = max(destination.bits, TYPE_BITS[kind])
    wide = f"{'s' if kind[0] == 's' else 'u'}{width}"
    if DTYPES[kind][0] == "f":
        value = e.let(f"{value}.view(u{TYPE_BITS[kind] // 8})")
    old = e.value(destination, wide)
    extended = value if width == TYPE_BITS[kind] else e.let(f"{value}.astype({DTYPES[wide]})")
    e.assign(destination, f"merge({old}, {extended}, {lanes}, n)", wide)


def _load_parameter(
    e: BlockEmitter, i: Instruction, place: Address, destinations: tuple[Operand, ...], kind: str, size: int
) -> None:
    assert isinstance(place.base, SymbolReference)
    variable = place.base.variable
    if variable is None or variable not in e.kernel.parameter_offsets:
        raise e.unsupported(f"{place.base.name} is not a parameter of this kernel")
    start = place.base.offset + place.offset
    if start < 0 or start + size * len(destinations) > variable.size:
        raise e.unsupported(f"it reads past {variable.name}")
    start += e.kernel.parameter_offsets[variable]
    for position, destination in enumerate(destinations):
        if not isinstance(destination, Sink):
            view = "" if DTYPES[kind][0] == "u" else f".view({DTYPES[kind]})"
            e.define(destination, f"C.parameter({start + position * size}, {size}){view}", kind)


@emits("st")
def st(e: BlockEmitter, i: Instruction) -> None:
    space, kind, count = _shape(e, i)
    values = _elements(i.operands[1])
    if len(values) != count or space == "param":
        raise e.unsupported()
    size = TYPE_BITS[kind] // 8
    lanes = guarded_lanes(e, i)
    address = _address(e, i.operands[0], space)
    names = [
        e.value(value, f"u{TYPE_BITS[kind]}" if not isinstance(value, Immediate) else kind)
        for value in values
    ]
    names = [
        e.let(f"{n}.view(u{size})") if isinstance(v, Immediate) and DTYPES[kind][0] != "u" else n
        for n, v in zip(names, values, strict=True)
    ]
    suffix = "" if lanes == "None" else f", {lanes}"
    e.line(f"C.store(G, {space!r}, {address}, {size}, [{', '.join(names)}]{suffix})")


_ATOMICS: Final = frozenset({"add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec"})


@emits("atom", "red")
def atom(e: BlockEmitter, i: Instruction) -> None:
    kind = i.modifiers[-1]
    space, operation = "generic", ""
    for modifier in i.modifiers[:-1]:
        name, _, qualifier = modifier.partition("::")
        if modifier in _ATOMICS:
            operation = modifier
        elif name in ("global", "shared") and qualifier in ("", "cta"):
            space = name
        elif modifier not in _HINTS and name not in ("L1", "L2"):
            raise e.unsupported()
    if kind not in DTYPES or TYPE_BITS[kind] < 16 or not operation:
        raise e.unsupported()
    if kind in ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2") and operation not in (
        "add",
        "min",
        "max",
        "exch",
    ):
        raise e.unsupported()
    operands = list(i.operands)
    destination = operands.pop(0) if i.opcode == "atom" else Sink()
    wanted = isinstance(destination, Register) and result_is_wanted(e, i)
    lanes = guarded_lanes(e, i)
    address = _address(e, operands[0], space)
    values = [e.value(operand, kind) for operand in operands[1:]]
    if len(values) != (2 if operation == "cas" else 1):
        raise e.unsupported()
    call = f"atomic(C, G, n, {space!r}, {operation!r}, {kind!r}, {address}, [{', '.join(values)}], {lanes}, {wanted})"
    if not wanted:
        e.line(call)
        return
    old = e.let(call)
    if lanes == "None":
        e.assign(destination, old, f"u{TYPE_BITS[kind]}")
    else:
        merge_load(e, destination, old, f"u{TYPE_BITS[kind]}", lanes)


@emits(
    "membar",
    "fence",
    "prefetch",
    "prefetchu",
    "discard",
    "applypriority",
    "griddepcontrol",
    "setmaxnreg",
    "pmevent",
)
def nothing(e: BlockEmitter, i: Instruction) -> None:
    """Ordering and hints: memory here is one, coherent and in program order."""


@emits("cp")
def cp_async(e: BlockEmitter, i: Instruction) -> None:
    """cp.async copies at once; waiting for it is then nothing."""
    if i.modifiers[:1] != ("async",) or "bulk" in i.modifiers or "mbarrier" in i.modifiers:
        raise e.unsupported()
    if "commit_group" in i.modifiers or "wait_group" in i.modifiers or "wait_all" in i.modifiers:
        return
    to, source, size, *rest = i.operands
    if not isinstance(size, Immediate) or len(rest) > 1:
        raise e.unsupported()
    kept = "None"
    if rest:
        # source size (zero fill beyond it), or a predicate that ignores the source altogether
        if isinstance(rest[0], Register) and rest[0].type == "pred":
            kept = e.let(
                f"where({e.value(rest[0], 'pred')}, {e.constant(0, 'u32')}, {e.constant(int(size.value), 'u32')})"
            )
        else:
            kept = e.value(rest[0], "u32")
    e.line(
        f"copy(C, G, n, {_address(e, to, 'shared')}, {_address(e, source, 'global')}, {int(size.value)}, {kept})"
    )


@emits("createpolicy")
def createpolicy(e: BlockEmitter, i: Instruction) -> None:
    """A cache policy is a value to hand to loads and stores, which ignore it."""
    e.define(i.operands[0], e.constant(0, "u64"), "u64")
