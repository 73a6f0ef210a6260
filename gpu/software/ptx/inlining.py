# SPDX-License-Identifier: Apache-2.0
"""How `call` is executed: the body of a .func is copied to each call, with fresh registers, labels and local variables.

It follows that recursion is refused. A call through a pointer becomes a comparison with the address of every function
whose address the module takes, and a call of the one that it is. `vprintf`, `__assertfail`, `malloc` and `free`, which
have no PTX body, stay as `builtin` instructions.
"""

from __future__ import annotations

from typing import Final

import attrs

from .errors import UnsupportedPtx
from .layout import function_addresses
from .syntax import (
    TYPE_BITS,
    Address,
    Function,
    Group,
    Immediate,
    Indexed,
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


class Inliner:
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
            if isinstance(operand, Indexed):
                named = rename(operand.base)
                assert isinstance(named, Register | SymbolReference)
                return Indexed(named, tuple(map(rename, operand.indices)))
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
                or not function.is_defined
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
