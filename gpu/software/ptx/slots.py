# SPDX-License-Identifier: Apache-2.0
"""Parameters of calls, once calls are inlined: registers where every access agrees on the pieces, local memory elsewhere."""

from __future__ import annotations

from typing import Final

import attrs

from .errors import UnsupportedPtx
from .syntax import (
    TYPE_BITS,
    Address,
    Group,
    Instruction,
    Operand,
    Register,
    Statement,
    SymbolReference,
    Variable,
    Vector,
)

_VECTOR: Final = {"v2": 2, "v4": 4, "v8": 8}


def _access(instruction: Instruction) -> tuple[int, int]:
    """(bytes per element, elements) of an ld or st."""
    kind = instruction.modifiers[-1]
    count = next((_VECTOR[m] for m in instruction.modifiers if m in _VECTOR), 1)
    return TYPE_BITS.get(kind, 8) // 8, count


def _slot_of(operand: Operand, parameters: dict[Variable, int]) -> tuple[Variable, int] | None:
    if isinstance(operand, Address) and isinstance(operand.base, SymbolReference):
        variable = operand.base.variable
        if variable is not None and variable.space == "param" and variable not in parameters:
            return variable, operand.base.offset + operand.offset
    return None


def scalarise(
    statements: list[Statement], parameters: dict[Variable, int]
) -> tuple[list[Statement], set[Variable]]:
    """Turn call parameters into registers where every access agrees on the pieces; the rest stay memory."""
    pieces: dict[Variable, dict[int, int]] = {}
    in_memory: set[Variable] = set()

    def note(variable: Variable, offset: int, size: int) -> None:
        known = pieces.setdefault(variable, {})
        if known.setdefault(offset, size) != size or size > 8:
            in_memory.add(variable)

    for statement in statements:
        if not isinstance(statement, Instruction):
            continue
        if statement.opcode in ("ld", "st") and statement.modifiers[0].startswith("param"):
            slot = _slot_of(statement.operands[1 if statement.opcode == "ld" else 0], parameters)
            if slot is not None:
                size, count = _access(statement)
                for position in range(count):
                    note(slot[0], slot[1] + position * size, size)
        elif statement.opcode == "builtin":
            for group in statement.operands:
                assert isinstance(group, Group)
                for element in group.elements:
                    if isinstance(element, SymbolReference) and element.variable is not None:
                        note(element.variable, 0, element.variable.size)
        else:
            for operand in statement.operands:
                if isinstance(operand, SymbolReference) and operand.variable is not None:
                    variable = operand.variable
                    if variable.space == "param" and variable not in parameters:
                        raise UnsupportedPtx(
                            statement.name, statement.line, "the address of a call parameter"
                        )
    for variable, known in pieces.items():
        reached = 0
        for offset in sorted(known):
            if offset < reached:
                in_memory.add(variable)
            reached = offset + known[offset]
    registers = {
        (variable, offset): Register(f"{variable.name}+{offset}", f"b{size * 8}")
        for variable, known in pieces.items()
        if variable not in in_memory
        for offset, size in known.items()
    }

    def piece(variable: Variable, offset: int) -> Register:
        return registers[variable, offset]

    out: list[Statement] = []
    for statement in statements:
        if isinstance(statement, Instruction):
            if statement.opcode in ("ld", "st") and statement.modifiers[0].startswith("param"):
                slot = _slot_of(statement.operands[1 if statement.opcode == "ld" else 0], parameters)
                if slot is not None and slot[0] not in in_memory:
                    size, count = _access(statement)
                    group = Group(tuple(piece(slot[0], slot[1] + i * size) for i in range(count)))
                    other = statement.operands[0 if statement.opcode == "ld" else 1]
                    listed = Group(other.elements if isinstance(other, Vector) else (other,))
                    operands = (listed, group) if statement.opcode == "ld" else (group, listed)
                    statement = attrs.evolve(statement, opcode=f"{statement.opcode}.slot", operands=operands)
                elif slot is not None:
                    modifiers = ("local", *statement.modifiers[1:])
                    statement = attrs.evolve(statement, modifiers=modifiers)
            elif statement.opcode == "builtin":
                groups = []
                for group_operand in statement.operands:
                    assert isinstance(group_operand, Group)
                    groups.append(
                        Group(
                            tuple(
                                piece(e.variable, 0)
                                if isinstance(e, SymbolReference) and e.variable is not None
                                else e
                                for e in group_operand.elements
                            )
                        )
                    )
                statement = attrs.evolve(statement, operands=tuple(groups))
        out.append(statement)
    return out, in_memory
