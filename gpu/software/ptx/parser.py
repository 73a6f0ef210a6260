# SPDX-License-Identifier: Apache-2.0
"""PTX tokens to a `Source`: recursive descent over directives, statements and operands.

Resolves names that live inside functions (registers, labels, local variables) to objects, because PTX scopes nest; names
of the module stay names, because PTX allows forward references. Knows the grammar, not the instructions.
"""

from __future__ import annotations

import re
import struct
from typing import Final

import attrs

from .bodies import entry_bodies
from .errors import PtxError
from .lexer import Lines, Token, tokenize
from .reader import TokenReader
from .scopes import Scope
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
    Relocation,
    Sink,
    Source,
    Special,
    SymbolReference,
    Variable,
    Vector,
)

_SPACES: Final = {".global", ".const", ".shared", ".local", ".param"}
_LINKING: Final = {".visible", ".extern", ".weak", ".common"}
_NUMBERED: Final = {
    ".maxntid", ".reqntid", ".minnctapersm", ".maxnctapersm", ".maxnreg", ".noreturn", ".pragma", ".explicitcluster",
    ".reqnctapercluster", ".maxclusterrank", ".blocksareclusters", ".unified",
    ".abi_preserve", ".abi_preserve_control", ".language",
}  # fmt: skip
_SPECIAL: Final = re.compile(
    r"%(?:(?:tid|ntid|ctaid|nctaid|gridid|laneid|warpid|nwarpid|smid|nsmid|clock|clock_hi|clock64|globaltimer(?:_lo|_hi)?"
    r"|lanemask_(?:eq|le|lt|ge|gt)|dynamic_smem_size|total_smem_size|aggr_smem_size|is_explicit_cluster|pm\d+|envreg\d+"
    r"|cluster_ctaid|cluster_nctaid|clusterid|nclusterid|cluster_ctarank|cluster_nctarank|current_graph_exec"
    r"|reserved_smem_offset_\w+))(?:\.[xyzw])?"
)
_LARGEST_VARIABLE: Final = 1 << 36  # more than any GPU's memory; sizes are multiplied from what the text says


class Parser(TokenReader):
    """One module's worth of parsing; use `parse`."""

    def __init__(self, text: str, lines: Lines, tokens: list[Token]) -> None:
        super().__init__(lines, tokens)
        self.text = text
        self.source = Source()
        self.bodies: dict[int, int] = {}

    @classmethod
    def of_module(cls, text: str) -> Parser:
        """For a whole module; the bodies of a large one's kernels are stepped over."""
        lines, bodies = Lines(text), entry_bodies(text)
        parser = cls(text, lines, tokenize(text, lines, bodies=bodies))
        parser.bodies = bodies
        return parser

    # --- module -----------------------------------------------------------------------------------------------------

    def module(self) -> Source:
        if self.peek() != ".version":
            raise self.error("a PTX module begins with .version")
        while self.kind() != "end":
            self._module_item()
        return self.source

    def _module_item(self) -> None:
        text = self.peek()
        if text == ".version":
            self.take()
            number = self.literal(self.take()).value
            self.source.version = (int(number), round(number * 10) % 10)
        elif text == ".target":
            self.take()
            self.source.target = self.word()
            while self.accept(","):
                self.word()
        elif text == ".address_size":
            self.take()
            self.source.address_bits = self.integer()
        elif text == ".file":
            self.take()
            while self.kind() in ("number", "string") or self.peek() == ",":
                self.take()
        elif text == ".section":
            self.take()
            self.take()
            self._skip_braces()
        elif text == ".alias":
            self.take()
            name = self.word()
            self.expect(",")
            self.source.aliases[name] = self.word()
            self.expect(";")
        elif text == ".pragma":
            self._skip_to_semicolon()
        elif text == ";":
            self.take()
        elif text in (".loc",):
            self._skip_location()
        else:
            linking = set()
            while self.peek() in _LINKING:
                linking.add(self.take().text)
            text = self.peek()
            if text in (".entry", ".func"):
                self._function(linking)
            elif text in _SPACES:
                for variable in self._variables():
                    variable.is_extern = ".extern" in linking
                    variable.is_visible = bool(linking - {".extern"})
                    known = self.source.variables.get(variable.name)
                    if known is None or known.is_extern:
                        self.source.variables[variable.name] = variable
            else:
                raise self.error(f"unexpected {text!r}")

    def _skip_braces(self) -> None:
        self.expect("{")
        depth = 1
        while depth:
            text = self.take().text
            depth += (text == "{") - (text == "}")

    def _skip_to_semicolon(self) -> None:
        while self.take().text != ";":
            pass

    def _skip_location(self) -> None:
        self.take()
        for _ in range(3):
            self.integer()
        while self.accept(","):
            # function_name label [+ offset], inlined_at file line column
            self.word()
            while self.kind() in ("number",) or self.peek() == "+":
                self.take()
            if self.kind() == "word" and self.peek().startswith(("$", "_")):
                self.take()
                while self.kind() in ("number",) or self.peek() == "+":
                    self.take()

    # --- variables --------------------------------------------------------------------------------------------------

    def _variables(self) -> list[Variable]:
        """`.space [.align n] [.attribute(...)] [.v2|.v4] .type name[dims] [= init] {, name...} ;`"""
        space = self.take().text[1:].partition("::")[0]
        alignment, vector, kind = 0, 1, ""
        while self.peek().startswith("."):
            text = self.take().text
            if text == ".align":
                alignment = self.integer()
            elif text in (".v2", ".v4"):
                vector = int(text[2:])
            elif text == ".attribute":
                self._parenthesised()
            elif text == ".ptr":
                while self.peek() in (".global", ".const", ".shared", ".local", ".align", ".generic"):
                    if self.take().text == ".align":
                        self.integer()
            elif text[1:] in TYPE_BITS:
                kind = text[1:]
            elif text in (".texref", ".surfref", ".samplerref"):
                kind = "b64"
            else:
                self.back()
                raise self.error(f"unexpected {text!r} in a variable declaration")
        if not kind:
            raise self.error("a variable needs a type")
        variables = []
        while True:
            variables.append(self._declarator(space, alignment, vector, kind))
            if not self.accept(","):
                break
        self.expect(";")
        return variables

    def _parenthesised(self) -> None:
        self.expect("(")
        while self.take().text != ")":
            pass

    def _declarator(self, space: str, alignment: int, vector: int, kind: str) -> Variable:
        element = max(TYPE_BITS[kind] // 8, 1)
        name = self.word()
        count, unsized = vector, False
        while self.accept("["):
            if self.accept("]"):
                unsized = True
                continue
            count *= self.integer()
            if not 0 <= count * element <= _LARGEST_VARIABLE:
                raise self.error(f"{name} of {count} elements")
            self.expect("]")
        initial: bytes | None = None
        relocations: list[Relocation] = []
        if self.accept("="):
            values = self._initializer()
            if unsized:
                count, unsized = len(values) * vector, False
            initial, relocations = self._image(values, kind, element, element * count)
        if alignment & (alignment - 1) or not 0 <= alignment <= 4096:
            raise self.error(f"alignment {alignment} of {name}")
        return Variable(
            name=name,
            space=space,
            alignment=alignment or element * vector,
            size=0 if unsized else element * count,
            type=kind,
            initial=initial,
            relocations=tuple(relocations),
        )

    def _initializer(self) -> list[Immediate | SymbolReference]:
        if not self.accept("{"):
            return [self._initial_value()]
        values: list[Immediate | SymbolReference] = []
        while not self.accept("}"):
            values.extend(self._initializer() if self.peek() == "{" else [self._initial_value()])
            if not self.accept(","):
                self.expect("}")
                break
        return values

    def _initial_value(self) -> Immediate | SymbolReference:
        token = self._tokens[self._next]
        if token.kind == "word":
            name = self.word()
            if name == "generic" and self.accept("("):
                name = self.word()
                offset = self._offset()
                self.expect(")")
                return SymbolReference(name, offset + self._offset())
            return SymbolReference(name, self._offset())
        negative = self.accept("-")
        value = self.literal(self.take())
        if negative:
            if value.bits:
                raise self.error("a negative hexadecimal float")
            value = Immediate(-value.value)
        return value

    def _offset(self) -> int:
        total = 0
        while self.peek() in ("+", "-"):
            sign = 1 if self.take().text == "+" else -1
            total += sign * self.integer()
        return total

    def _image(
        self, values: list[Immediate | SymbolReference], kind: str, element: int, size: int
    ) -> tuple[bytes, list[Relocation]]:
        out = bytearray()
        relocations = []
        for value in values:
            if isinstance(value, SymbolReference):
                if element != 8:
                    raise self.error(f"the address of {value.name} does not fit a .{kind}")
                relocations.append(Relocation(len(out), value.name, value.offset))
                out += bytes(element)
            elif kind in ("f32", "f64"):
                if value.bits:
                    if value.bits != element * 8:
                        raise self.error(f"a {value.bits}-bit literal for a .{kind}")
                    out += int(value.value).to_bytes(element, "little")
                else:
                    out += struct.pack("<f" if kind == "f32" else "<d", float(value.value))
            elif isinstance(value.value, int):
                out += (value.value & ((1 << (8 * element)) - 1)).to_bytes(element, "little")
            else:
                raise self.error(f"{value.value} cannot initialise a .{kind}")
        if len(out) > size:
            raise self.error("more initial values than the variable holds")
        return bytes(out.ljust(size, b"\0")), relocations

    # --- functions --------------------------------------------------------------------------------------------------

    def _function(self, linking: set[str]) -> None:
        line = self.lines.number(self.offset())
        is_entry = self.take().text == ".entry"
        while self.peek() == ".attribute":
            self.take()
            self._parenthesised()
        results = self._parameters() if not is_entry and self.peek() == "(" else []
        function = Function(self.word(), is_entry, line, results=results)
        if self.peek() == "(":
            function.parameters = self._parameters()
        while self.peek() in _NUMBERED:
            name = self.take().text[1:]
            numbers = []
            while self.kind() in ("number", "string"):
                token = self.take()
                if token.kind == "number":
                    numbers.append(int(token.text.rstrip("U"), 0))
                self.accept(",")
            function.directives[name] = tuple(numbers)
            if name == "pragma":
                self.accept(";")
        if self.kind() == "body":
            start = self.take().offset
            function.deferred = _Body(self.text, self.lines, start, self.bodies[start])
        elif self.peek() == "{":
            self.read_body(function)
        else:
            self.accept(";")
        known = self.source.functions.get(function.name)
        if known is None or not known.is_defined:
            self.source.functions[function.name] = function

    def _parameters(self) -> list[Variable]:
        self.expect("(")
        parameters: list[Variable] = []
        while not self.accept(")"):
            if self.peek() == ".reg":
                raise self.error("register parameters (ABI before PTX 2.0) are not read")
            space = self.peek()
            if space != ".param":
                raise self.error(f"expected .param, found {space!r}")
            # A declarator list ends with ';'; parameters end with ',' or ')', so the pieces are read here.
            self.take()
            parameters.append(self._parameter())
            if not self.accept(","):
                self.expect(")")
                break
        return parameters

    def _parameter(self) -> Variable:
        alignment, vector, kind = 0, 1, ""
        while self.peek().startswith("."):
            text = self.take().text
            if text == ".align":
                alignment = self.integer()
            elif text in (".v2", ".v4"):
                vector = int(text[2:])
            elif text[1:] in TYPE_BITS:
                kind = text[1:]
            elif text not in (".ptr", ".global", ".const", ".shared", ".local", ".generic"):
                self.back()
                raise self.error(f"unexpected {text!r} in a parameter")
            elif text == ".ptr" and not kind:
                raise self.error("a parameter needs a type")
            if (
                text in (".ptr", ".global", ".const", ".shared", ".local", ".generic")
                and self.peek() == ".align"
            ):
                self.take()
                self.integer()  # alignment of what the pointer points at, not of the parameter
        if not kind:
            raise self.error("a parameter needs a type")
        return self._declarator("param", alignment, vector, kind)

    def read_body(self, function: Function) -> None:
        """Statements in braces, of a function whose parameters are known."""
        root = Scope(None)
        for parameter in (*function.parameters, *function.results):
            root.variables[parameter.name] = parameter
        function.body = []
        self._scope(function, root)

    def _scope(self, function: Function, scope: Scope) -> None:
        self.expect("{")
        body = function.body
        assert body is not None
        while not self.accept("}"):
            token = self._tokens[self._next]
            text = token.text
            if text == "{":
                self._scope(function, Scope(scope))
            elif text == ";":
                self.take()
            elif token.kind == "directive":
                self._body_directive(function, scope, text)
            elif token.kind == "word" and self.following() == ":":
                self.take()
                self.take()
                if self.peek() in (".branchtargets", ".callprototype", ".calltargets"):
                    self._list_directive(function, scope, text)
                    continue
                if text in scope.labels:
                    raise self.error(f"label {text} defined twice")
                scope.labels[text] = label = Label(text)
                body.append(label)
            else:
                body.append(self._instruction(scope))
        for reference in scope.references:
            found = scope.labels.get(reference.name)
            if found is not None:
                reference.label = found
            elif scope.parent is not None:
                scope.parent.references.append(reference)
            else:
                raise PtxError(f"label {reference.name} is not defined in {function.name}", function.line)

    def _body_directive(self, function: Function, scope: Scope, text: str) -> None:
        if text == ".reg":
            self._registers(scope)
        elif text in _SPACES or text.partition("::")[0] in _SPACES:
            for variable in self._variables():
                scope.variables[variable.name] = variable
                function.variables.append(variable)
        elif text == ".loc":
            self._skip_location()
        elif text == ".pragma":
            self._skip_to_semicolon()
        elif text in _LINKING:
            self.take()
        else:
            raise self.error(f"unexpected {text!r} in a function")

    def _list_directive(self, function: Function, scope: Scope, name: str) -> None:
        if self.take().text != ".branchtargets":
            self._skip_to_semicolon()
            return
        targets = []
        while True:
            reference = LabelReference(self.word())
            scope.references.append(reference)
            targets.append(reference)
            if not self.accept(","):
                break
        self.expect(";")
        function.branch_targets[name] = tuple(targets)

    def _registers(self, scope: Scope) -> None:
        self.take()
        kind = self.take().text[1:]
        if kind in ("v2", "v4"):
            raise self.error("vector registers are not read")
        if kind not in TYPE_BITS:
            raise self.error(f"unexpected register type .{kind}")
        while True:
            name = self.word()
            if self.accept("<"):
                scope.ranges[name] = (kind, self.integer())
                self.expect(">")
            else:
                scope.registers[name] = Register(name, kind)
            if not self.accept(","):
                break
        self.expect(";")

    # --- instructions -----------------------------------------------------------------------------------------------

    def _instruction(self, scope: Scope) -> Instruction:
        line = self.lines.number(self.offset())
        guard, negated = None, False
        if self.accept("@"):
            negated = self.accept("!")
            name = self.word()
            guard = scope.register(name)
            if guard is None:
                raise self.error(f"register {name} is not declared")
        opcode, *modifiers = self.word().split(".")
        operands: list[Operand] = []
        while not self.accept(";"):
            operands.append(self._operand(scope, opcode))
            if not self.accept(","):
                self.expect(";")
                break
        return Instruction(line, opcode, tuple(modifiers), tuple(operands), guard, negated)

    def _operand(self, scope: Scope, opcode: str) -> Operand:
        first = self._simple_operand(scope, opcode)
        if self.accept("|"):
            return Pair(first, self._simple_operand(scope, opcode))
        return first

    def _list(self, scope: Scope, opcode: str, closing: str) -> tuple[Operand, ...]:
        elements: list[Operand] = []
        while not self.accept(closing):
            elements.append(self._operand(scope, opcode))
            if not self.accept(","):
                self.expect(closing)
                break
        return tuple(elements)

    def _simple_operand(self, scope: Scope, opcode: str) -> Operand:
        token = self.take()
        text = token.text
        if token.kind == "number":
            return self.literal(token)
        if text == "-":
            value = self.literal(self.take())
            if value.bits:
                raise self.error("a negative hexadecimal float")
            return Immediate(-value.value)
        if text == "{":
            return Vector(self._list(scope, opcode, "}"))
        if text == "(":
            return Group(self._list(scope, opcode, ")"))
        if text == "[":
            return self._address(scope, opcode)
        if text == "!":
            negated = scope.register(self.word())
            if negated is None:
                raise self.error("expected a predicate register after '!'")
            return Negated(negated)
        if token.kind == "word":
            return self._name(scope, text, opcode)
        self.back()
        raise self.error(f"unexpected {text!r} in operands")

    def _name(self, scope: Scope, text: str, opcode: str) -> Operand:
        if text == "_":
            return Sink()
        register = scope.register(text)
        if register is not None:
            return register
        if _SPECIAL.fullmatch(text):
            return Special(text)
        if text == "WARP_SZ":
            return Immediate(32)
        if opcode == "bra" or (opcode == "brx" and not text.startswith("%")):
            reference = LabelReference(text)
            if opcode == "bra":
                scope.references.append(reference)
            return reference
        if text.startswith("%"):
            raise self.error(f"register {text} is not declared")
        return SymbolReference(text, self._offset(), scope.variable(text))

    def _address(self, scope: Scope, opcode: str) -> Address | Indexed:
        token = self._tokens[self._next]
        if token.kind == "number" or token.text == "-":
            offset = self.integer()
            self.expect("]")
            return Address(None, offset)
        name = self.word()
        base: Register | SymbolReference | None = scope.register(name)
        if base is None:
            if name.startswith("%"):
                raise self.error(f"register {name} is not declared")
            base = SymbolReference(name, 0, scope.variable(name))
        if self.accept(","):
            return Indexed(base, self._list(scope, opcode, "]"))
        offset = self._offset()
        self.expect("]")
        return Address(base, offset)


def parse(text: str) -> Source:
    """Read a PTX module. Raises: PtxError with the line."""
    parser = Parser.of_module(text)
    try:
        return parser.module()
    except RecursionError:
        raise parser.error("nested too deeply") from None


@attrs.frozen
class _Body:
    """A body that is read later; see syntax.DeferredBody."""

    text: str = attrs.field(repr=False)
    lines: Lines = attrs.field(repr=False)
    start: int
    end: int

    def read(self, function: Function) -> None:
        parser = Parser(self.text, self.lines, tokenize(self.text, self.lines, self.start, self.end))
        try:
            parser.read_body(function)
        except RecursionError:
            raise parser.error("nested too deeply") from None

    def matches(self, pattern: re.Pattern[str]) -> bool:
        return pattern.search(self.text, self.start, self.end) is not None
