# SPDX-License-Identifier: Apache-2.0
"""Where the bodies of kernels lie in a module's text, found without reading them.

Libraries carry PTX of tens of megabytes and hundreds of kernels (CuPy's CUB module: 21 MB, 383 kernels), of which a program
launches a few. To read all of it takes most of a minute and most of a gigabyte. So a large module is read around
the bodies of its kernels, and each body when its kernel is asked for; what is wrong in one is then said there.
"""

from __future__ import annotations

import re
from typing import Final

LARGE: Final = 1 << 20  # characters; smaller modules are read whole, and refused whole
# What is not closed goes to the end of the text, so that nothing is looked at twice: the text is a guest's.
_NOT_CODE: Final = r'"(?:[^"\\]|\\.)*"?|//[^\n]*|/\*.*?(?:\*/|\Z)'
_HEADER: Final = re.compile(rf"\.entry\b|[{{}};]|{_NOT_CODE}", re.DOTALL)
_BRACE: Final = re.compile(rf"[{{}}]|{_NOT_CODE}", re.DOTALL)


def entry_bodies(text: str) -> dict[int, int]:
    """Offsets of the braces that open kernels' bodies, and of what follows the braces that close them.

    Those of a text that is not large are not told, nor one whose header holds a `;`, nor one that does not end.
    """
    found: dict[int, int] = {}
    if len(text) < LARGE:
        return found
    position, in_header = 0, False
    while (match := _HEADER.search(text, position)) is not None:
        position = match.end()
        mark = match.group()
        if mark[0] in '/"':
            continue
        if mark != "{" or not in_header:
            in_header = mark == ".entry"
            continue
        in_header = False
        end = _closing(text, match.start())
        if end is None:
            break
        found[match.start()] = position = end
    return found


def _closing(text: str, start: int) -> int | None:
    depth = 0
    for match in _BRACE.finditer(text, start):
        mark = match.group()
        depth += (mark == "{") - (mark == "}")
        if depth == 0:
            return match.end()
    return None
