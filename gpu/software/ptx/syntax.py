# SPDX-License-Identifier: Apache-2.0
"""The shapes a PTX module is read into: variables, functions, instructions and their operands.

Plain values with identity where identity matters (registers, labels, variables), so that inlining can rename by
substitution. Nothing here knows what an instruction does.
"""

from __future__ import annotations

import re
from typing import Protocol

import attrs

# Width in bits of each fundamental type that a register, a variable or an instruction may have.
TYPE_BITS = {
    **{f"{letter}{bits}": bits for letter in "bus" for bits in (8, 16, 32, 64)},
    "f16": 16, "bf16": 16, "f16x2": 32, "bf16x2": 32, "f32": 32, "f64": 64, "tf32": 32,
    "e4m3": 8, "e5m2": 8, "e4m3x2": 16, "e5m2x2": 16, "u16x2": 32, "s16x2": 32,
    "b128": 128, "pred": 1,
}  # fmt: skip


@attrs.define(eq=False)
class Register:
    """A virtual register. `type` is as declared; its storage is the unsigned integer of that width."""

    name: str
    type: str
    number: int = -1  # place in the register file, given when the function is lowered

    @property
    def bits(self) -> int:
        return TYPE_BITS[self.type]


@attrs.define(eq=False)
class Label:
    name: str


@attrs.define(eq=False)
class LabelReference:
    """A label by name, found from the innermost scope outwards once the function is complete."""

    name: str
    label: Label | None = None


@attrs.frozen
class Immediate:
    """A literal. `bits` is set for hexadecimal floating point (0f..., 0d...), whose bits are given, not its value."""

    value: int | float
    bits: int = 0


@attrs.frozen
class Special:
    """A special register such as %tid.x."""

    name: str


@attrs.frozen
class SymbolReference:
    """A variable or function by name, plus an offset in bytes."""

    name: str
    offset: int = 0
    variable: Variable | None = None  # set where the name was found in the function's own scopes


@attrs.frozen
class Address:
    """[base + offset]; without a base an absolute address."""

    base: Register | SymbolReference | None
    offset: int = 0


@attrs.frozen
class Indexed:
    """[object, {coordinates}], of textures, surfaces and tensors; with a sampler or offsets, more than one index."""

    base: Register | SymbolReference
    indices: tuple[Operand, ...]


@attrs.frozen
class Vector:
    elements: tuple[Operand, ...]


@attrs.frozen
class Negated:
    """!%p as an operand."""

    register: Register


@attrs.frozen
class Pair:
    """%p|%q: two destinations."""

    first: Operand
    second: Operand


@attrs.frozen
class Group:
    """A parenthesised list, in calls."""

    elements: tuple[Operand, ...]


@attrs.frozen
class Sink:
    """The operand `_`: a result nobody wants."""


Operand = (
    Register
    | Immediate
    | Special
    | SymbolReference
    | Address
    | Indexed
    | Vector
    | Negated
    | Pair
    | Group
    | Sink
    | LabelReference
)


@attrs.frozen(eq=False)
class Instruction:
    line: int
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None = None
    guard_negated: bool = False

    @property
    def name(self) -> str:
        return ".".join((self.opcode, *self.modifiers))


Statement = Instruction | Label


@attrs.frozen
class Relocation:
    """`size` bytes at `offset` of a variable's image are the address of `symbol` plus `addend`."""

    offset: int
    symbol: str
    addend: int
    size: int = 8


@attrs.define(eq=False)
class Variable:
    name: str
    space: str  # global, const, shared, local, param
    alignment: int
    size: int  # bytes; 0 for an unsized extern array
    type: str = "b8"
    initial: bytes | None = None
    relocations: tuple[Relocation, ...] = ()
    is_extern: bool = False
    is_visible: bool = False


class DeferredBody(Protocol):
    """The text of a body that is read when somebody looks at it."""

    def read(self, function: Function) -> None:
        """Fill in the function's body, variables and branch targets. Raises: PtxError."""

    def matches(self, pattern: re.Pattern[str]) -> bool:
        """Does the pattern occur in the text?"""


@attrs.define(eq=False)
class Function:
    name: str
    is_entry: bool
    line: int
    parameters: list[Variable] = attrs.Factory(list)
    results: list[Variable] = attrs.Factory(list)
    variables: list[Variable] = attrs.Factory(list)  # whole once `body` has been looked at, as branch_targets
    branch_targets: dict[str, tuple[LabelReference, ...]] = attrs.Factory(dict)
    directives: dict[str, tuple[int, ...]] = attrs.Factory(
        dict
    )  # maxntid, reqntid, minnctapersm, maxnreg, ...
    deferred: DeferredBody | None = None  # where the body has not been read yet
    _body: list[Statement] | None = None

    @property
    def is_defined(self) -> bool:
        """Is there a body, read or not?"""
        return self.deferred is not None or self._body is not None

    @property
    def body(self) -> list[Statement] | None:
        """The statements; None for a declaration. Raises: PtxError where this look is what reads them."""
        deferred = self.deferred
        if deferred is not None:
            self.deferred = None
            try:
                deferred.read(self)
            except BaseException:  # so that the next look is refused, too
                self._body, self.deferred = None, deferred
                self.variables.clear()
                self.branch_targets.clear()
                raise
        return self._body

    @body.setter
    def body(self, statements: list[Statement]) -> None:
        self._body = statements


@attrs.define
class Source:
    """A parsed module."""

    version: tuple[int, int] = (0, 0)
    target: str = ""
    address_bits: int = 64
    variables: dict[str, Variable] = attrs.Factory(dict)
    functions: dict[str, Function] = attrs.Factory(dict)
    aliases: dict[str, str] = attrs.Factory(dict)
    function_addresses: dict[str, int] | None = None  # see layout.function_addresses
