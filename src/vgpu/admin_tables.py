# SPDX-License-Identifier: Apache-2.0
"""Tables on a terminal. What goes into a file or a pipe stays the plain text of ``units.show_table``."""

from __future__ import annotations

import re
import sys
from typing import Any

from vgpu.trace_views import Table
from vgpu.transport.text import printable, printable_lines

STYLES = {
    "quarantined": "bold red",
    "failed": "red",
    "no device": "red",
    "not running": "red",
    "held back": "yellow",
    "waits for GPU": "yellow",
    "computes": "green",
    "in use": "green",
    "restarting": "yellow",
    "FAIL": "bold red",
    "WARN": "yellow",
    "ok": "green",
}


def _is_number(text: str) -> bool:
    return text[:1].isdigit()


def rich_table(table: Table, *, title: bool = False) -> Any:
    """A rich table: numbers to the right, words that matter in colour. A guest's words are text and no markup."""
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(
        title=table.title if title else None,
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    for index, name in enumerate(table.header):
        numbers = index > 0 and bool(table.rows) and all(_is_number(row[index]) for row in table.rows)
        drawn.add_column(name, justify="right" if numbers else "left", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*(Text(printable(word), style=STYLES.get(word, "")) for word in row))
    return drawn


_HEADER = re.compile(r"[A-Z][A-Z0-9 %/]*(  +[A-Z][A-Z0-9 %/]*)+")
_WORDS = re.compile("|".join(rf"(?<![\w-]){re.escape(word)}(?![\w-])" for word in STYLES))


def say(text: str) -> None:
    """Print what a command found: on a terminal with the headers of its tables and the words that matter standing out."""
    text = printable_lines(text)
    if not sys.stdout.isatty():
        print(text)
        return
    from rich.console import Console
    from rich.text import Text

    drawn = Text()
    for line in text.splitlines():
        styled = Text(line, style="bold" if _HEADER.fullmatch(line.rstrip()) else "")
        for found in _WORDS.finditer(line):
            styled.stylize(STYLES[found[0]], found.start(), found.end())
        drawn.append_text(styled).append("\n")
    Console(highlight=False).print(drawn, end="", soft_wrap=True)
