# SPDX-License-Identifier: Apache-2.0
"""From a parsed kernel to what the emitter takes: calls inlined, their parameters turned into registers, variables given
their places in shared and local memory, blocks with live registers.
"""

from __future__ import annotations

import attrs

from .errors import UnsupportedPtx
from .flow import Block, build_blocks, destinations, exit_sources, sources
from .inlining import Inliner
from .layout import aligned, parameter_layout, resolved_symbols, shared_layout
from .slots import scalarise
from .syntax import Address, Function, Register, Source, SymbolReference, Variable


@attrs.define(eq=False)
class LoweredKernel:
    """A kernel ready for the emitter."""

    function: Function
    blocks: list[Block]
    register_count: int
    shared_offsets: dict[str, int]  # of module-scope and function-scope shared variables, by name
    static_shared: int
    dynamic_base: int  # where dynamic shared memory begins
    local_offsets: dict[Variable, int]
    local_size: int
    parameter_offsets: dict[Variable, int]
    parameter_size: int
    symbols: frozenset[str]  # of the module that have an address
    initial: frozenset[Register]  # read before they are written on some path: they start as zero


def lower(source: Source, kernel: Function) -> LoweredKernel:
    """Raises: UnsupportedPtx."""
    if not kernel.is_defined:
        raise UnsupportedPtx(f".entry {kernel.name}", kernel.line, "declared, not defined")
    inliner = Inliner(source)
    inliner.run(kernel)
    parameter_offsets, parameter_size = parameter_layout(kernel)
    statements, in_memory = scalarise(inliner.out, parameter_offsets)
    blocks = build_blocks(statements)
    numbers: dict[Register, int] = {}
    local: dict[Variable, int] = {}
    end = 0

    def place(variable: Variable | None) -> None:
        nonlocal end
        if (
            variable is not None
            and (variable.space == "local" or variable in in_memory)
            and variable not in local
        ):
            local[variable] = end = aligned(end, max(variable.alignment, 1))
            end += variable.size

    for block in blocks:
        instructions = block.body + ([block.exit.instruction] if block.exit.instruction is not None else [])
        for instruction in instructions:
            for register in (*destinations(instruction), *sources(instruction)):
                register.number = numbers.setdefault(register, len(numbers))
            for operand in instruction.operands:
                if isinstance(operand, SymbolReference):
                    place(operand.variable)
                elif isinstance(operand, Address) and isinstance(operand.base, SymbolReference):
                    place(operand.base.variable)
        for register in exit_sources(block.exit):
            register.number = numbers.setdefault(register, len(numbers))
    offsets, static, alignment = shared_layout(source, kernel)
    return LoweredKernel(
        function=kernel,
        blocks=blocks,
        register_count=len(numbers),
        shared_offsets=offsets,
        static_shared=static,
        dynamic_base=aligned(static, alignment),
        local_offsets=local,
        local_size=aligned(end, 16),
        parameter_offsets=parameter_offsets,
        parameter_size=parameter_size,
        symbols=frozenset(resolved_symbols(source)),
        initial=blocks[0].live_in,
    )
