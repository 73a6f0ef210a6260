# SPDX-License-Identifier: Apache-2.0
"""What a kernel can reach and where it lies: parameters, shared variables, functions whose address is taken."""

from __future__ import annotations

import re
from typing import Final

from .syntax import (
    Address,
    Function,
    Group,
    Instruction,
    Operand,
    Register,
    Source,
    SymbolReference,
    Variable,
    Vector,
)


def aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def parameter_layout(function: Function) -> tuple[dict[Variable, int], int]:
    """Byte offsets of a kernel's parameters, as the driver lays them out, and their total size."""
    offsets, end = {}, 0
    for parameter in function.parameters:
        offsets[parameter] = end = aligned(end, parameter.alignment)
        end += parameter.size
    return offsets, end


FUNCTION_WINDOW: Final = 4 << 56  # functions have addresses only to be compared and called


def function_addresses(source: Source) -> dict[str, int]:
    """Addresses of the functions that the module takes the address of, in code or in initial values. Raises: PtxError."""
    if source.function_addresses is None:
        source.function_addresses = _function_addresses(source)
    return source.function_addresses


def _function_addresses(source: Source) -> dict[str, int]:
    callable_names = [re.escape(name) for name, function in source.functions.items() if not function.is_entry]
    if not callable_names:
        return {}
    taking = re.compile(rf"\bmov\b[^;]{{0,99}}[\s,{{](?:{'|'.join(callable_names)})(?![\w$])")
    taken: dict[str, None] = {}
    for variable in source.variables.values():
        for relocation in variable.relocations:
            taken[relocation.symbol] = None
    for function in source.functions.values():
        if function.deferred is not None and not function.deferred.matches(taking):
            continue
        for statement in function.body or ():
            if isinstance(statement, Instruction) and statement.opcode == "mov":
                taken.update(dict.fromkeys(_symbols(statement)))
    found = [name for name in taken if name in source.functions and not source.functions[name].is_entry]
    return {name: FUNCTION_WINDOW + 16 * (number + 1) for number, name in enumerate(found)}


def resolved_symbols(source: Source) -> list[str]:
    """Names of the module that stand for an address: its variables in global and constant memory, and functions."""
    return [
        *(v.name for v in source.variables.values() if v.space in ("global", "const") and not v.is_extern),
        *function_addresses(source),
    ]


def _is_indirect(call: Instruction) -> bool:
    operands = [operand for operand in call.operands if not isinstance(operand, Group)]
    return isinstance(operands[0], Register)


def reachable(source: Source, function: Function) -> tuple[list[Function], list[str]]:
    """Functions that `function` may call, itself first, and the names of the module's symbols they mention."""
    found: dict[str, Function] = {function.name: function}
    names: dict[str, None] = {}
    pending = [function]
    while pending:
        for statement in pending.pop().body or ():
            if not isinstance(statement, Instruction):
                continue
            mentioned = _symbols(statement)
            if statement.opcode == "call" and _is_indirect(statement):
                mentioned += function_addresses(source)
            for name in mentioned:
                names[name] = None
                callee = source.functions.get(source.aliases.get(name, name))
                if callee is not None and callee.name not in found:
                    found[callee.name] = callee
                    pending.append(callee)
    return list(found.values()), list(names)


def _symbols(instruction: Instruction) -> list[str]:
    names = []
    stack: list[Operand] = list(instruction.operands)
    while stack:
        operand = stack.pop()
        if isinstance(operand, SymbolReference) and operand.variable is None:
            names.append(operand.name)
        elif isinstance(operand, Address) and isinstance(operand.base, SymbolReference):
            stack.append(operand.base)
        elif isinstance(operand, Vector | Group):
            stack.extend(operand.elements)
    return names


def shared_layout(source: Source, function: Function) -> tuple[dict[str, int], int, int]:
    """(offset by name, static size, alignment of dynamic memory) of the shared variables a kernel can reach."""
    functions, names = reachable(source, function)
    offsets: dict[str, int] = {}
    end, dynamic_alignment = 0, 16
    variables = [source.variables[name] for name in names if name in source.variables]
    variables += [variable for reached in functions for variable in reached.variables]
    dynamic = []
    for variable in variables:
        if variable.space != "shared" or variable.name in offsets:
            continue
        if variable.is_extern or variable.size == 0:
            dynamic.append(variable.name)
            dynamic_alignment = max(dynamic_alignment, variable.alignment)
            continue
        offsets[variable.name] = end = aligned(end, variable.alignment)
        end += variable.size
    for name in dynamic:
        offsets[name] = aligned(end, dynamic_alignment)
    return offsets, end, dynamic_alignment
