# SPDX-License-Identifier: Apache-2.0
"""Emitters for texture fetches and surface accesses, by object: what nvcc writes for tex1D, tex2D, tex3D, their layered kin,
tex1Dfetch, and surf*read and surf*write. What they do is in texture.py.

References (.texref), samplers of their own, cubes, gathering, levels of detail and queries are not built.
"""

from __future__ import annotations

from typing import Final

from .emit import BlockEmitter, emits
from .emit_memory import guarded_lanes, merge_load
from .syntax import Immediate, Indexed, Instruction, Operand, Register, Sink, Vector
from .texture import SHAPES

_WIDTHS: Final = {"b8": 1, "b16": 2, "b32": 4, "b64": 8}
_VECTORS: Final = {"v2": 2, "v4": 4}
_EDGES: Final = ("trap", "clamp", "zero")


def _elements(operand: Operand) -> tuple[Operand, ...]:
    return operand.elements if isinstance(operand, Vector) else (operand,)


def _place(e: BlockEmitter, operand: Operand, shape: str, kind: str) -> tuple[str, str]:
    """The object and the list of coordinates of `[object, {coordinates}]`."""
    if shape not in SHAPES:
        raise e.unsupported()
    if not isinstance(operand, Indexed) or len(operand.indices) != 1:
        raise e.unsupported("an operand of this form")
    if not isinstance(operand.base, Register) or operand.base.bits != 64:
        raise e.unsupported("only objects in registers are built")
    dimensions, has_layers = SHAPES[shape]
    coordinates = _elements(operand.indices[0])
    # Three come as four, of which the last says nothing.
    if len(coordinates) != dimensions + has_layers and (len(coordinates), dimensions + has_layers) != (4, 3):
        raise e.unsupported(f"{len(coordinates)} coordinates")
    kinds = ["u32"] * has_layers + [kind] * dimensions
    names = [e.value(c, k) for c, k in zip(coordinates, kinds, strict=False)]
    return e.value(operand.base, "u64"), f"[{', '.join(names)}]"


def _results(e: BlockEmitter, operands: tuple[Operand, ...], call: str, kind: str, lanes: str) -> None:
    """What the call gives goes to the destinations, where the guard holds."""
    names = [e.owner.fresh() for _ in operands]
    e.line(f"{', '.join(names)}, = {call}")
    for destination, name in zip(operands, names, strict=True):
        if isinstance(destination, Sink):
            continue
        if lanes == "None":
            e.assign(destination, name, kind)
        else:
            merge_load(e, destination, name, kind, lanes)


@emits("tex")
def tex(e: BlockEmitter, i: Instruction) -> None:
    if len(i.modifiers) != 4:
        raise e.unsupported()
    shape, vector, kind, coordinate = i.modifiers
    if vector != "v4" or kind not in ("f32", "s32", "u32") or coordinate not in ("f32", "s32"):
        raise e.unsupported()
    destination, place = i.operands
    if not isinstance(destination, Vector) or len(destination.elements) != 4:
        raise e.unsupported()
    lanes = guarded_lanes(e, i)
    texture, coordinates = _place(e, place, shape, coordinate)
    call = f"fetch_texture(C, G, n, {shape!r}, {texture}, {coordinates}, {lanes})"
    _results(e, destination.elements, call, "u32", lanes)


def _access(e: BlockEmitter, i: Instruction) -> tuple[str, str, int, str]:
    """(shape, type, elements, what to do outside) of suld.b and sust.b."""
    if len(i.modifiers) not in (4, 5) or i.modifiers[0] != "b":
        raise e.unsupported()
    shape, *vector, kind, edge = i.modifiers[1:]
    count = _VECTORS.get(vector[0], 0) if vector else 1
    if kind not in _WIDTHS or not 0 < count * _WIDTHS[kind] <= 16 or edge not in _EDGES:
        raise e.unsupported()
    return shape, kind, count, edge


@emits("suld")
def suld(e: BlockEmitter, i: Instruction) -> None:
    shape, kind, count, edge = _access(e, i)
    destination, place = i.operands
    elements = _elements(destination)
    if len(elements) != count:
        raise e.unsupported()
    lanes = guarded_lanes(e, i)
    surface, coordinates = _place(e, place, shape, "s32")
    call = f"load_surface(C, G, n, {shape!r}, {surface}, {coordinates}, {_WIDTHS[kind]}, {count}, {edge!r}, {lanes})"
    _results(e, elements, call, kind, lanes)


@emits("sust")
def sust(e: BlockEmitter, i: Instruction) -> None:
    shape, kind, count, edge = _access(e, i)
    place, source = i.operands
    elements = _elements(source)
    if len(elements) != count or not all(isinstance(o, Register | Immediate) for o in elements):
        raise e.unsupported()
    lanes = guarded_lanes(e, i)
    surface, coordinates = _place(e, place, shape, "s32")
    values = ", ".join(e.value(element, kind) for element in elements)
    e.line(f"store_surface(C, G, n, {shape!r}, {surface}, {coordinates}, [{values}], {edge!r}, {lanes})")
