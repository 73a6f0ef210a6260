# SPDX-License-Identifier: Apache-2.0
"""Words of guests and of people, made harmless before they are kept, logged or shown.

A guest names its programs and kernels as it likes: with the escape sequences of a terminal, with line ends that begin a line
of a log, with marks that turn the direction of writing. Where such a word comes in it passes ``printable``; where anything
is shown or logged it passes a second time, so that one forgotten door is not enough. Pure.
"""

from __future__ import annotations

__all__ = ["escaped", "printable", "printable_lines"]

# Instead of what cannot be shown.
STAND_IN = "?"


def printable(text: str, limit: int | None = None) -> str:
    """The text with ``?`` for each character that is not printable (also lone surrogates), and no longer than ``limit``.

    What comes out is one line that every encoding of Unicode can write.
    """
    if limit is not None:
        text = text[:limit]
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else STAND_IN for letter in text)


def printable_lines(text: str) -> str:
    """As ``printable``, but line ends stay: for text that we have laid out ourselves."""
    return "\n".join(map(printable, text.split("\n")))


def escaped(text: str) -> str:
    """The text with ``\\n``, ``\\x1b``, ``\\udcff`` … for what is not printable: one line in which nothing is lost."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )
