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

from .errors import PtxError
from .lexer import Lines, Token, tokenize
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
_LONGEST_NUMBER: Final = 66  # 0b and 64 digits; Python's own limit would be another kind of error
_LARGEST_VARIABLE: Final = 1 << 36  # more than any GPU's memory; sizes are multiplied from what the text says
_NAME_AND_NUMBER: Final = re.compile(r"(.*?)(0|[1-9]\d*)$")


@attrs.define(eq=False)
class _Scope:
    parent: _Scope | None
    registers: dict[str, Register] = attrs.Factory(dict)
    ranges: dict[str, tuple[str, int]] = attrs.Factory(dict)
    variables: dict[str, Variable] = attrs.Factory(dict)
    labels: dict[str, Label] = attrs.Factory(dict)
    references: list[LabelReference] = attrs.Factory(list)

    def register(self, name: str) -> Register | None:
        scope: _Scope | None = self
        while scope is not None:
            found = scope.registers.get(name)
            if found is not None:
                return found
            match = _NAME_AND_NUMBER.match(name)
            if match is not None and match[1] in scope.ranges:
                kind, count = scope.ranges[match[1]]
                if int(match[2]) < count:
                    scope.registers[name] = found = Register(name, kind)
                    return found
            scope = scope.parent
        return None

    def variable(self, name: str) -> Variable | None:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.variables:
                return scope.variables[name]
            scope = scope.parent
        return None


class Parser:
    """One module's worth of parsing; use `parse`."""

    def __init__(self, text: str) -> None:
        self._lines = Lines(text)
        self._tokens = tokenize(text, self._lines)
        self._next = 0
        self.source = Source()

    # --- tokens -----------------------------------------------------------------------------------------------------

    def _peek(self) -> str:
        return self._tokens[self._next].text

    def _take(self) -> Token:
        token = self._tokens[self._next]
        if token.kind == "end":
            raise self._error("unexpected end of text")
        self._next += 1
        return token

    def _accept(self, text: str) -> bool:
        if self._tokens[self._next].text == text:
            self._next += 1
            return True
        return False

    def _expect(self, text: str) -> None:
        if not self._accept(text):
            raise self._error(f"expected {text!r}, found {self._peek()!r}")

    def _error(self, message: str) -> PtxError:
        return PtxError(
            message, self._lines.number(self._tokens[min(self._next, len(self._tokens) - 1)].offset)
        )

    def _word(self) -> str:
        token = self._take()
        if token.kind != "word":
            self._next -= 1
            raise self._error(f"expected a name, found {token.text!r}")
        return token.text

    def _integer(self) -> int:
        negative = self._accept("-")
        value = self._literal(self._take())
        if not isinstance(value.value, int) or value.bits:
            self._next -= 1
            raise self._error("expected an integer")
        return -value.value if negative else value.value

    def _literal(self, token: Token) -> Immediate:
        text = token.text
        if token.kind != "number":
            self._next -= 1
            raise self._error(f"expected a number, found {text!r}")
        if len(text) > _LONGEST_NUMBER:
            raise self._error("a number of that length")
        start = text[:2].lower()
        if start == "0f" and len(text) == 10:
            return Immediate(int(text[2:], 16), 32)  # noqa: FURB166
        if start == "0d" and len(text) == 18:
            return Immediate(int(text[2:], 16), 64)  # noqa: FURB166
        digits = text.rstrip("U")
        if start == "0x":
            return Immediate(int(digits, 16))
        if start == "0b":
            return Immediate(int(digits, 2))
        if "." in text or "e" in text or "E" in text:
            return Immediate(float(text))
        return Immediate(int(digits, 8) if len(digits) > 1 and digits[0] == "0" else int(digits))

    # --- module -----------------------------------------------------------------------------------------------------

    def module(self) -> Source:
        if self._peek() != ".version":
            raise self._error("a PTX module begins with .version")
        while self._tokens[self._next].kind != "end":
            self._module_item()
        return self.source

    def _module_item(self) -> None:
        text = self._peek()
        if text == ".version":
            self._take()
            number = self._literal(self._take()).value
            self.source.version = (int(number), round(number * 10) % 10)
        elif text == ".target":
            self._take()
            self.source.target = self._word()
            while self._accept(","):
                self._word()
        elif text == ".address_size":
            self._take()
            self.source.address_bits = self._integer()
        elif text == ".file":
            self._take()
            while self._tokens[self._next].kind in ("number", "string") or self._peek() == ",":
                self._take()
        elif text == ".section":
            self._take()
            self._take()
            self._skip_braces()
        elif text == ".alias":
            self._take()
            name = self._word()
            self._expect(",")
            self.source.aliases[name] = self._word()
            self._expect(";")
        elif text == ".pragma":
            self._skip_to_semicolon()
        elif text == ";":
            self._take()
        elif text in (".loc",):
            self._skip_location()
        else:
            linking = set()
            while self._peek() in _LINKING:
                linking.add(self._take().text)
            text = self._peek()
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
                raise self._error(f"unexpected {text!r}")

    def _skip_braces(self) -> None:
        self._expect("{")
        depth = 1
        while depth:
            text = self._take().text
            depth += (text == "{") - (text == "}")

    def _skip_to_semicolon(self) -> None:
        while self._take().text != ";":
            pass

    def _skip_location(self) -> None:
        self._take()
        for _ in range(3):
            self._integer()
        while self._accept(","):
            # function_name label [+ offset], inlined_at file line column
            self._word()
            while self._tokens[self._next].kind in ("number",) or self._peek() == "+":
                self._take()
            if self._tokens[self._next].kind == "word" and self._peek().startswith(("$", "_")):
                self._take()
                while self._tokens[self._next].kind in ("number",) or self._peek() == "+":
                    self._take()

    # --- variables --------------------------------------------------------------------------------------------------

    def _variables(self) -> list[Variable]:
        """`.space [.align n] [.attribute(...)] [.v2|.v4] .type name[dims] [= init] {, name...} ;`"""
        space = self._take().text[1:].partition("::")[0]
        alignment, vector, kind = 0, 1, ""
        while self._peek().startswith("."):
            text = self._take().text
            if text == ".align":
                alignment = self._integer()
            elif text in (".v2", ".v4"):
                vector = int(text[2:])
            elif text == ".attribute":
                self._parenthesised()
            elif text == ".ptr":
                while self._peek() in (".global", ".const", ".shared", ".local", ".align", ".generic"):
                    if self._take().text == ".align":
                        self._integer()
            elif text[1:] in TYPE_BITS:
                kind = text[1:]
            elif text in (".texref", ".surfref", ".samplerref"):
                kind = "b64"
            else:
                self._next -= 1
                raise self._error(f"unexpected {text!r} in a variable declaration")
        if not kind:
            raise self._error("a variable needs a type")
        variables = []
        while True:
            variables.append(self._declarator(space, alignment, vector, kind))
            if not self._accept(","):
                break
        self._expect(";")
        return variables

    def _parenthesised(self) -> None:
        self._expect("(")
        while self._take().text != ")":
            pass

    def _declarator(self, space: str, alignment: int, vector: int, kind: str) -> Variable:
        element = max(TYPE_BITS[kind] // 8, 1)
        name = self._word()
        count, unsized = vector, False
        while self._accept("["):
            if self._accept("]"):
                unsized = True
                continue
            count *= self._integer()
            if not 0 <= count * element <= _LARGEST_VARIABLE:
                raise self._error(f"{name} of {count} elements")
            self._expect("]")
        initial: bytes | None = None
        relocations: list[Relocation] = []
        if self._accept("="):
            values = self._initializer()
            if unsized:
                count, unsized = len(values) * vector, False
            initial, relocations = self._image(values, kind, element, element * count)
        if alignment & (alignment - 1) or not 0 <= alignment <= 4096:
            raise self._error(f"alignment {alignment} of {name}")
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
        if not self._accept("{"):
            return [self._initial_value()]
        values: list[Immediate | SymbolReference] = []
        while not self._accept("}"):
            values.extend(self._initializer() if self._peek() == "{" else [self._initial_value()])
            if not self._accept(","):
                self._expect("}")
                break
        return values

    def _initial_value(self) -> Immediate | SymbolReference:
        token = self._tokens[self._next]
        if token.kind == "word":
            name = self._word()
            if name == "generic" and self._accept("("):
                name = self._word()
                offset = self._offset()
                self._expect(")")
                return SymbolReference(name, offset + self._offset())
            return SymbolReference(name, self._offset())
        negative = self._accept("-")
        value = self._literal(self._take())
        if negative:
            if value.bits:
                raise self._error("a negative hexadecimal float")
            value = Immediate(-value.value)
        return value

    def _offset(self) -> int:
        total = 0
        while self._peek() in ("+", "-"):
            sign = 1 if self._take().text == "+" else -1
            total += sign * self._integer()
        return total

    def _image(
        self, values: list[Immediate | SymbolReference], kind: str, element: int, size: int
    ) -> tuple[bytes, list[Relocation]]:
        out = bytearray()
        relocations = []
        for value in values:
            if isinstance(value, SymbolReference):
                if element != 8:
                    raise self._error(f"the address of {value.name} does not fit a .{kind}")
                relocations.append(Relocation(len(out), value.name, value.offset))
                out += bytes(element)
            elif kind in ("f32", "f64"):
                if value.bits:
                    if value.bits != element * 8:
                        raise self._error(f"a {value.bits}-bit literal for a .{kind}")
                    out += int(value.value).to_bytes(element, "little")
                else:
                    out += struct.pack("<f" if kind == "f32" else "<d", float(value.value))
            elif isinstance(value.value, int):
                out += (value.value & ((1 << (8 * element)) - 1)).to_bytes(element, "little")
            else:
                raise self._error(f"{value.value} cannot initialise a .{kind}")
        if len(out) > size:
            raise self._error("more initial values than the variable holds")
        return bytes(out.ljust(size, b"\0")), relocations

    # --- functions --------------------------------------------------------------------------------------------------

    def _function(self, linking: set[str]) -> None:
        line = self._lines.number(self._tokens[self._next].offset)
        is_entry = self._take().text == ".entry"
        while self._peek() == ".attribute":
            self._take()
            self._parenthesised()
        results = self._parameters() if not is_entry and self._peek() == "(" else []
        function = Function(self._word(), is_entry, line, results=results)
        if self._peek() == "(":
            function.parameters = self._parameters()
        while self._peek() in _NUMBERED:
            name = self._take().text[1:]
            numbers = []
            while self._tokens[self._next].kind in ("number", "string"):
                token = self._take()
                if token.kind == "number":
                    numbers.append(int(token.text.rstrip("U"), 0))
                self._accept(",")
            function.directives[name] = tuple(numbers)
            if name == "pragma":
                self._accept(";")
        if self._peek() == "{":
            self._body(function)
        else:
            self._accept(";")
        known = self.source.functions.get(function.name)
        if known is None or known.body is None:
            self.source.functions[function.name] = function

    def _parameters(self) -> list[Variable]:
        self._expect("(")
        parameters: list[Variable] = []
        while not self._accept(")"):
            if self._peek() == ".reg":
                raise self._error("register parameters (ABI before PTX 2.0) are not read")
            space = self._peek()
            if space != ".param":
                raise self._error(f"expected .param, found {space!r}")
            # A declarator list ends with ';'; parameters end with ',' or ')', so the pieces are read here.
            self._take()
            parameters.append(self._parameter())
            if not self._accept(","):
                self._expect(")")
                break
        return parameters

    def _parameter(self) -> Variable:
        alignment, vector, kind = 0, 1, ""
        while self._peek().startswith("."):
            text = self._take().text
            if text == ".align":
                alignment = self._integer()
            elif text in (".v2", ".v4"):
                vector = int(text[2:])
            elif text[1:] in TYPE_BITS:
                kind = text[1:]
            elif text not in (".ptr", ".global", ".const", ".shared", ".local", ".generic"):
                self._next -= 1
                raise self._error(f"unexpected {text!r} in a parameter")
            elif text == ".ptr" and not kind:
                raise self._error("a parameter needs a type")
            if (
                text in (".ptr", ".global", ".const", ".shared", ".local", ".generic")
                and self._peek() == ".align"
            ):
                self._take()
                self._integer()  # alignment of what the pointer points at, not of the parameter
        if not kind:
            raise self._error("a parameter needs a type")
        return self._declarator("param", alignment, vector, kind)

    def _body(self, function: Function) -> None:
        root = _Scope(None)
        for parameter in (*function.parameters, *function.results):
            root.variables[parameter.name] = parameter
        function.body = []
        self._scope(function, root)

    def _scope(self, function: Function, scope: _Scope) -> None:
        self._expect("{")
        body = function.body
        assert body is not None
        while not self._accept("}"):
            token = self._tokens[self._next]
            text = token.text
            if text == "{":
                self._scope(function, _Scope(scope))
            elif text == ";":
                self._take()
            elif token.kind == "directive":
                self._body_directive(function, scope, text)
            elif token.kind == "word" and self._tokens[self._next + 1].text == ":":
                self._take()
                self._take()
                if self._peek() in (".branchtargets", ".callprototype", ".calltargets"):
                    self._list_directive(function, scope, text)
                    continue
                if text in scope.labels:
                    raise self._error(f"label {text} defined twice")
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

    def _body_directive(self, function: Function, scope: _Scope, text: str) -> None:
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
            self._take()
        else:
            raise self._error(f"unexpected {text!r} in a function")

    def _list_directive(self, function: Function, scope: _Scope, name: str) -> None:
        if self._take().text != ".branchtargets":
            self._skip_to_semicolon()
            return
        targets = []
        while True:
            reference = LabelReference(self._word())
            scope.references.append(reference)
            targets.append(reference)
            if not self._accept(","):
                break
        self._expect(";")
        function.branch_targets[name] = tuple(targets)

    def _registers(self, scope: _Scope) -> None:
        self._take()
        kind = self._take().text[1:]
        if kind in ("v2", "v4"):
            raise self._error("vector registers are not read")
        if kind not in TYPE_BITS:
            raise self._error(f"unexpected register type .{kind}")
        while True:
            name = self._word()
            if self._accept("<"):
                scope.ranges[name] = (kind, self._integer())
                self._expect(">")
            else:
                scope.registers[name] = Register(name, kind)
            if not self._accept(","):
                break
        self._expect(";")

    # --- instructions -----------------------------------------------------------------------------------------------

    def _instruction(self, scope: _Scope) -> Instruction:
        line = self._lines.number(self._tokens[self._next].offset)
        guard, negated = None, False
        if self._accept("@"):
            negated = self._accept("!")
            name = self._word()
            guard = scope.register(name)
            if guard is None:
                raise self._error(f"register {name} is not declared")
        opcode, *modifiers = self._word().split(".")
        operands: list[Operand] = []
        while not self._accept(";"):
            operands.append(self._operand(scope, opcode))
            if not self._accept(","):
                self._expect(";")
                break
        return Instruction(line, opcode, tuple(modifiers), tuple(operands), guard, negated)

    def _operand(self, scope: _Scope, opcode: str) -> Operand:
        first = self._simple_operand(scope, opcode)
        if self._accept("|"):
            return Pair(first, self._simple_operand(scope, opcode))
        return first

    def _list(self, scope: _Scope, opcode: str, closing: str) -> tuple[Operand, ...]:
        elements: list[Operand] = []
        while not self._accept(closing):
            elements.append(self._operand(scope, opcode))
            if not self._accept(","):
                self._expect(closing)
                break
        return tuple(elements)

    def _simple_operand(self, scope: _Scope, opcode: str) -> Operand:
        token = self._take()
        text = token.text
        if token.kind == "number":
            return self._literal(token)
        if text == "-":
            value = self._literal(self._take())
            if value.bits:
                raise self._error("a negative hexadecimal float")
            return Immediate(-value.value)
        if text == "{":
            return Vector(self._list(scope, opcode, "}"))
        if text == "(":
            return Group(self._list(scope, opcode, ")"))
        if text == "[":
            return self._address(scope)
        if text == "!":
            negated = scope.register(self._word())
            if negated is None:
                raise self._error("expected a predicate register after '!'")
            return Negated(negated)
        if token.kind == "word":
            return self._name(scope, text, opcode)
        self._next -= 1
        raise self._error(f"unexpected {text!r} in operands")

    def _name(self, scope: _Scope, text: str, opcode: str) -> Operand:
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
            raise self._error(f"register {text} is not declared")
        return SymbolReference(text, self._offset(), scope.variable(text))

    def _address(self, scope: _Scope) -> Address:
        token = self._tokens[self._next]
        if token.kind == "number" or token.text == "-":
            offset = self._integer()
            self._expect("]")
            return Address(None, offset)
        name = self._word()
        base: Register | SymbolReference | None = scope.register(name)
        if base is None:
            if name.startswith("%"):
                raise self._error(f"register {name} is not declared")
            base = SymbolReference(name, 0, scope.variable(name))
        offset = self._offset()
        if not self._accept("]"):
            # texture and tensor coordinates: [name, {coordinates}]; nothing here executes those
            while self._take().text != "]":
                pass
        return Address(base, offset)


def parse(text: str) -> Source:
    """Read a PTX module. Raises: PtxError with the line."""
    parser = Parser(text)
    try:
        return parser.module()
    except RecursionError:
        raise parser._error("nested too deeply") from None
