# SPDX-License-Identifier: Apache-2.0
"""Sizes and times as people type them and want to read them. Pure."""

from __future__ import annotations

import re
from typing import Final

from vgpu.transport.text import printable

_SIZES: Final = {
    "": 1,
    "b": 1,
    **{f"{letter}{ending}": 1 << 10 * n for n, letter in enumerate("kmgt", 1) for ending in ("", "ib")},
    **{f"{letter}b": 1000**n for n, letter in enumerate("kmgt", 1)},
}
_TIMES: Final = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_QUANTITY: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)")


def parse_size(text: str) -> int:
    """Bytes of ``20GiB``, ``256MiB``, ``512M`` (binary too), ``1GB`` (decimal) or a plain number.

    Raises:
        ValueError: it is something else; the message shows what is expected.
    """
    found = _QUANTITY.fullmatch(text.strip())
    scale = _SIZES.get(found[2].lower()) if found else None
    if found is None or scale is None or float(found[1]) * scale % 1:
        raise ValueError(f"{text!r} is no size; expected one like 256MiB or 20GiB")
    return int(float(found[1]) * scale)


def parse_seconds(text: str) -> float:
    """Seconds of ``30s``, ``500ms``, ``2m``, ``1h`` or a plain number.

    Raises:
        ValueError: it is something else; the message shows what is expected.
    """
    found = _QUANTITY.fullmatch(text.strip())
    if found is None or found[2].lower() not in _TIMES:
        raise ValueError(f"{text!r} is no time; expected one like 30s or 2m")
    return float(found[1]) * _TIMES[found[2].lower()]


def show_size(count: int) -> str:
    """Bytes in the largest binary unit that leaves at least 1, with one digit behind the point where there is a rest."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1 << 10 * power:
            whole, rest = divmod(count, 1 << 10 * power)
            return f"{whole} {unit}" if rest == 0 else f"{count / (1 << 10 * power):.1f} {unit}"
    return f"{count} B"


def show_seconds(seconds: float) -> str:
    """A time as ``12.3s``, ``4m05s`` or ``2h07m``."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}m{rest:02}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"


def show_table(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """Columns as wide as their longest value, numbers to the right; the header is left away from nothing."""
    # Guests' words are harmless already; this is the last door before a terminal.
    texts = [tuple(printable(str(value)) for value in row) for row in rows]
    widths = [max(len(line[i]) for line in (header, *texts)) for i in range(len(header))]
    right = [bool(rows) and all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]

    def lay(line: tuple[str, ...]) -> str:
        cells = [t.rjust(w) if r else t.ljust(w) for t, w, r in zip(line, widths, right, strict=True)]
        return "  ".join(cells).rstrip()

    return "\n".join(map(lay, (header, *texts)))
