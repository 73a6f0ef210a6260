# SPDX-License-Identifier: Apache-2.0
"""A cursor over tokens, with the small pieces of grammar that stand everywhere: names, numbers, expected marks."""

from __future__ import annotations

from typing import Final

from .errors import PtxError
from .lexer import Lines, Token
from .syntax import Immediate

_LONGEST_NUMBER: Final = 66  # 0b and 64 digits; Python's own limit would be another kind of error


class TokenReader:
    """Reads forward; every refusal carries the line of the token that is next."""

    def __init__(self, lines: Lines, tokens: list[Token]) -> None:
        self.lines = lines
        self._tokens = tokens
        self._next = 0

    def kind(self) -> str:
        """Of the token that is next."""
        return self._tokens[self._next].kind

    def offset(self) -> int:
        return self._tokens[self._next].offset

    def following(self) -> str:
        """The text of the token after the next one."""
        return self._tokens[min(self._next + 1, len(self._tokens) - 1)].text

    def back(self) -> None:
        self._next -= 1

    def peek(self) -> str:
        return self._tokens[self._next].text

    def take(self) -> Token:
        token = self._tokens[self._next]
        if token.kind == "end":
            raise self.error("unexpected end of text")
        self._next += 1
        return token

    def accept(self, text: str) -> bool:
        if self._tokens[self._next].text == text:
            self._next += 1
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.accept(text):
            raise self.error(f"expected {text!r}, found {self.peek()!r}")

    def error(self, message: str) -> PtxError:
        """What to raise about the token that is next."""
        return PtxError(
            message, self.lines.number(self._tokens[min(self._next, len(self._tokens) - 1)].offset)
        )

    def word(self) -> str:
        token = self.take()
        if token.kind != "word":
            self.back()
            raise self.error(f"expected a name, found {token.text!r}")
        return token.text

    def integer(self) -> int:
        negative = self.accept("-")
        value = self.literal(self.take())
        if not isinstance(value.value, int) or value.bits:
            self.back()
            raise self.error("expected an integer")
        return -value.value if negative else value.value

    def literal(self, token: Token) -> Immediate:
        text = token.text
        if token.kind != "number":
            self.back()
            raise self.error(f"expected a number, found {text!r}")
        if len(text) > _LONGEST_NUMBER:
            raise self.error("a number of that length")
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
