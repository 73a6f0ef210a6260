# SPDX-License-Identifier: Apache-2.0
"""Names inside a function: registers, variables and labels, in scopes that nest."""

from __future__ import annotations

import re
from typing import Final

import attrs

from .syntax import Label, LabelReference, Register, Variable

_NAME_AND_NUMBER: Final = re.compile(r"(.*?)(0|[1-9]\d*)$")


@attrs.define(eq=False)
class Scope:
    parent: Scope | None
    registers: dict[str, Register] = attrs.Factory(dict)
    ranges: dict[str, tuple[str, int]] = attrs.Factory(dict)
    variables: dict[str, Variable] = attrs.Factory(dict)
    labels: dict[str, Label] = attrs.Factory(dict)
    references: list[LabelReference] = attrs.Factory(list)

    def register(self, name: str) -> Register | None:
        scope: Scope | None = self
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
        scope: Scope | None = self
        while scope is not None:
            if name in scope.variables:
                return scope.variables[name]
            scope = scope.parent
        return None
