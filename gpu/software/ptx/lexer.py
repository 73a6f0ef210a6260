# SPDX-License-Identifier: Apache-2.0
"""PTX text to tokens. One regular expression; comments and white space vanish; each token knows its offset.

An opcode with its modifiers (`ld.global.v4.f32`) is one word, as is `%tid.x`; directives keep their dot.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from typing import Final, NamedTuple

from .errors import PtxError

_TOKEN: Final = re.compile(
    r"""
    (?P<skip>(?:\s+|//[^\n]*|/\*.*?\*/)+)
  | (?P<number>0[fF][0-9a-fA-F]{8}(?![\w])|0[dD][0-9a-fA-F]{16}(?![\w])|0[xX][0-9a-fA-F]+U?|0[bB][01]+U?
      |\d+\.\d*(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+|\d+U?)
  | (?P<word>[A-Za-z_$%][\w$]*(?:(?:\.|::)\w+)*)
  | (?P<directive>\.[A-Za-z_]\w*(?:::\w+)*)
  | (?P<string>"(?:[^"\\]|\\.)*")
  | (?P<mark>[{}()\[\],;:=+\-!|@<>*~&^/?])
    """,
    re.VERBOSE | re.DOTALL,
)


class Token(NamedTuple):
    kind: str  # number, word, directive, string, mark, body, end
    text: str
    offset: int


class Lines:
    """Offsets to line numbers."""

    def __init__(self, text: str) -> None:
        self._starts = [0, *(match.end() for match in re.finditer("\n", text))]

    def number(self, offset: int) -> int:
        return bisect_right(self._starts, offset)


def tokenize(
    text: str, lines: Lines, start: int = 0, end: int | None = None, bodies: Mapping[int, int] | None = None
) -> list[Token]:
    """The tokens from `start` to `end`.

    `bodies` are pieces to step over, where they end by where they begin; each becomes one token of kind "body", if
    its beginning is a token and does not lie in a comment. Raises: PtxError at the first character that begins no token.
    """
    tokens: list[Token] = []
    position, end = start, len(text) if end is None else end
    bodies = bodies or {}
    match_at = _TOKEN.match
    while position < end:
        if position in bodies:
            tokens.append(Token("body", "{...}", position))
            position = bodies[position]
            continue
        match = match_at(text, position, end)
        if match is None:
            if text[position] == "\0":
                break  # the driver takes NUL-terminated text
            raise PtxError(f"unexpected character {text[position]!r}", lines.number(position))
        kind = match.lastgroup
        if kind != "skip":
            assert kind is not None
            tokens.append(Token(kind, match.group(), position))
        position = match.end()
    tokens.append(Token("end", "", end))
    return tokens
