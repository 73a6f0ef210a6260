# SPDX-License-Identifier: Apache-2.0
"""From a parsed kernel to what the emitter takes: calls inlined, parameters of calls turned into registers, variables
given their places in shared and local memory, blocks with live registers.

Inlining is how `call` is executed: the body of a .func is copied to each call with fresh registers, labels and local
variables. It follows that recursion is refused. A call through a pointer becomes a comparison with the address of every
function whose address the module takes, and a call of the one that it is. `vprintf`, `__assertfail`, `malloc` and
`free`, which have no PTX body, stay as `builtin` instructions.
"""

from __future__ import annotations

from typing import Final

import attrs

from .errors import UnsupportedPtx
from .flow import Block, build_blocks, destinations, exit_sources, sources
from .syntax import (
    TYPE_BITS,
    Address,
    Function,
    Group,
    Immediate,
    Instruction,
    Label,
    LabelReference,
    Negated,
    Operand,
    Pair,
    Register,
    Sink,
    Source,
    Statement,
    SymbolReference,
    Variable,
    Vector,
)

BUILTINS: Final = frozenset({"vprintf", "__assertfail", "__assert_fail", "malloc", "free"})
_MAXIMUM_STATEMENTS: Final = (
    400_000  # inlining doubles code at every level; refuse what would not fit in memory
)
_VECTOR: Final = {"v2": 2, "v4": 4, "v8": 8}


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
    """Addresses of the functions that the module takes the address of, in code or in initial values."""
    taken: dict[str, None] = {}
    for variable in source.variables.values():
        for relocation in variable.relocations:
            taken[relocation.symbol] = None
    for function in source.functions.values():
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


class _Inliner:
    """Copies bodies, renaming what belongs to one activation."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._addresses = function_addresses(source)
        self.out: list[Statement] = []

    def run(self, kernel: Function) -> None:
        self._copy(kernel, {}, None, [kernel.name])

    def _copy(
        self, function: Function, variables: dict[Variable, Variable], leave: Label | None, chain: list[str]
    ) -> None:
        assert function.body is not None
        registers: dict[Register, Register] = {}
        labels: dict[Label, Label] = {}
        for variable in function.variables:
            if variable.space in ("local", "param") and variable not in variables:
                variables[variable] = attrs.evolve(variable)

        def rename(operand: Operand) -> Operand:
            if isinstance(operand, Register):
                if operand not in registers:
                    registers[operand] = Register(operand.name, operand.type)
                return registers[operand]
            if isinstance(operand, Address):
                base = rename(operand.base) if operand.base is not None else None
                assert base is None or isinstance(base, Register | SymbolReference)
                return Address(base, operand.offset)
            if isinstance(operand, Vector):
                return Vector(tuple(map(rename, operand.elements)))
            if isinstance(operand, Group):
                return Group(tuple(map(rename, operand.elements)))
            if isinstance(operand, Pair):
                return Pair(rename(operand.first), rename(operand.second))
            if isinstance(operand, Negated):
                renamed = rename(operand.register)
                assert isinstance(renamed, Register)
                return Negated(renamed)
            if isinstance(operand, LabelReference):
                if operand.label is None:
                    return operand
                return LabelReference(operand.name, labels.setdefault(operand.label, Label(operand.name)))
            if isinstance(operand, SymbolReference) and operand.variable in variables:
                return SymbolReference(operand.name, operand.offset, variables[operand.variable])
            return operand

        for statement in function.body:
            if len(self.out) > _MAXIMUM_STATEMENTS:
                raise UnsupportedPtx(
                    "call", reason=f"{chain[0]} inlines to more than {_MAXIMUM_STATEMENTS} statements"
                )
            if isinstance(statement, Label):
                self.out.append(labels.setdefault(statement, Label(statement.name)))
                continue
            guard = rename(statement.guard) if statement.guard is not None else None
            assert guard is None or isinstance(guard, Register)
            operands: tuple[Operand, ...]
            if statement.opcode == "brx":
                operands = (rename(statement.operands[0]), self._targets(function, statement, rename))
            else:
                operands = tuple(map(rename, statement.operands))
            copied = attrs.evolve(statement, guard=guard, operands=operands)
            if copied.opcode == "call":
                self._call(copied, chain)
            elif copied.opcode == "ret" and leave is not None:
                self.out.append(attrs.evolve(copied, opcode="bra", modifiers=(), operands=(_to(leave),)))
            else:
                self.out.append(copied)
        if leave is not None:
            self.out.append(leave)

    @staticmethod
    def _targets(function: Function, statement: Instruction, rename: object) -> Group:
        listed = statement.operands[1]
        name = listed.name if isinstance(listed, LabelReference | SymbolReference) else ""
        if name not in function.branch_targets:
            raise UnsupportedPtx(statement.name, statement.line, "its branch targets are not listed")
        assert callable(rename)
        return Group(tuple(rename(target) for target in function.branch_targets[name]))

    def _call(self, call: Instruction, chain: list[str]) -> None:
        operands = list(call.operands)
        results = operands.pop(0) if isinstance(operands[0], Group) else Group(())
        named = operands.pop(0)
        arguments = operands.pop(0) if operands and isinstance(operands[0], Group) else Group(())
        assert isinstance(results, Group)
        assert isinstance(arguments, Group)
        if isinstance(named, Register):
            self._indirect_call(call, named, results, arguments, chain)
            return
        if not isinstance(named, SymbolReference):
            raise UnsupportedPtx(call.name, call.line)
        name = self._source.aliases.get(named.name, named.name)
        around = None
        if call.guard is not None:
            around = Label("after call")
            self.out.append(
                attrs.evolve(
                    call,
                    opcode="bra",
                    modifiers=(),
                    operands=(_to(around),),
                    guard_negated=not call.guard_negated,
                )
            )
        callee = self._source.functions.get(name)
        if callee is not None and callee.body is not None:
            if name in chain:
                raise UnsupportedPtx(call.name, call.line, f"recursive call of {name}")
            if len(arguments.elements) != len(callee.parameters) or len(results.elements) != len(
                callee.results
            ):
                raise UnsupportedPtx(call.name, call.line, f"arguments do not match those of {name}")
            variables: dict[Variable, Variable] = {}
            after: list[Instruction] = []
            for formal, actual in zip(callee.parameters, arguments.elements, strict=True):
                variables[formal] = self._slot(call, formal, actual, self.out, is_result=False)
            for formal, actual in zip(callee.results, results.elements, strict=True):
                variables[formal] = self._slot(call, formal, actual, after, is_result=True)
            self._copy(callee, variables, Label(f"return from {name}"), [*chain, name])
            self.out.extend(after)
        elif name in BUILTINS:
            # Declared only in the module's text, given a body by the executor.
            self.out.append(
                Instruction(
                    call.line, "builtin", (name,), (Group(results.elements), Group(arguments.elements))
                )
            )
        else:
            raise UnsupportedPtx(call.name, call.line, f"{name} has no body in this module")
        if around is not None:
            self.out.append(around)

    def _indirect_call(
        self, call: Instruction, pointer: Register, results: Group, arguments: Group, chain: list[str]
    ) -> None:
        """Compare with each function that it may be; none of them is a trap."""
        done = Label("after indirect call")
        if call.guard is not None:
            self.out.append(
                attrs.evolve(
                    call,
                    opcode="bra",
                    modifiers=(),
                    operands=(_to(done),),
                    guard_negated=not call.guard_negated,
                )
            )
        for name, address in self._addresses.items():
            function = self._source.functions[name]
            shapes = (len(function.results), len(function.parameters))
            if (
                shapes != (len(results.elements), len(arguments.elements))
                or name in chain
                or function.body is None
            ):
                continue
            if not all(
                isinstance(actual, SymbolReference)
                and actual.variable is not None
                and actual.variable.size == formal.size
                for formal, actual in zip(
                    (*function.results, *function.parameters),
                    (*results.elements, *arguments.elements),
                    strict=True,
                )
            ):
                continue
            other = Label(f"not {name}")
            differs = Register("differs", "pred")
            self.out.append(
                Instruction(call.line, "setp", ("ne", "u64"), (differs, pointer, Immediate(address)))
            )
            self.out.append(Instruction(call.line, "bra", (), (_to(other),), differs))
            direct = Instruction(
                call.line, "call", call.modifiers, (results, SymbolReference(name), arguments)
            )
            self._call(direct, chain)
            self.out.append(Instruction(call.line, "bra", (), (_to(done),)))
            self.out.append(other)
        self.out.append(Instruction(call.line, "trap", (), ()))
        self.out.append(done)

    @staticmethod
    def _slot(
        call: Instruction,
        formal: Variable,
        actual: Operand,
        out: list[Statement] | list[Instruction],
        *,
        is_result: bool,
    ) -> Variable:
        """The variable that stands for a parameter: the caller's .param, or a new one for a register or literal."""
        if (
            isinstance(actual, SymbolReference)
            and actual.variable is not None
            and actual.variable.space == "param"
        ):
            return actual.variable
        variable = attrs.evolve(formal)
        if isinstance(actual, Sink):
            return variable
        if not isinstance(actual, Register | Immediate):
            raise UnsupportedPtx(call.name, call.line, "an argument that is neither .param nor register")
        kind = f"b{formal.size * 8}"
        if kind not in TYPE_BITS:
            raise UnsupportedPtx(call.name, call.line, "a register for a structure")
        place = Address(SymbolReference(formal.name, 0, variable))
        if is_result:
            move = Instruction(call.line, "ld", ("param", kind), (actual, place))
        else:
            move = Instruction(call.line, "st", ("param", kind), (place, actual))
        out.append(move)
        return variable


def _to(label: Label) -> LabelReference:
    return LabelReference(label.name, label)


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


def _scalarise(
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


def lower(source: Source, kernel: Function) -> LoweredKernel:
    """Raises: UnsupportedPtx."""
    if kernel.body is None:
        raise UnsupportedPtx(f".entry {kernel.name}", kernel.line, "declared, not defined")
    inliner = _Inliner(source)
    inliner.run(kernel)
    parameter_offsets, parameter_size = parameter_layout(kernel)
    statements, in_memory = _scalarise(inliner.out, parameter_offsets)
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
