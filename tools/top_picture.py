# SPDX-License-Identifier: Apache-2.0
"""Draw what ``vgpu-admin top`` shows of a running mediator, for documents:

    python tools/top_picture.py --run-dir DIR OUT.svg [--when STATE] [--wait SECONDS]

The same rows as on a terminal, by the same function. ``--when quarantined`` waits until a VM is in that state, by the words of
the table's last column. Text with generic fonts: nothing is fetched by whoever looks at it.
"""

from __future__ import annotations

import argparse
import html
import re
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "src"))

from vgpu.admin_client import AdminClient
from vgpu.admin_top import drawing, look_at, rates

INTERVAL_SECONDS = 1.0
COLUMNS = 100
REMOTE_FONTS = re.compile(r"@font-face\s*\{.*?\}\s*", re.DOTALL)
WORDS = re.compile(
    r'(<text class="[\w-]+" x=")([\d.]+)(" y="[\d.]+" textLength=")([\d.]+)("[^>]*>)((?:&#160;)*)(.*?)((?:&#160;)*)</text>'
)
FONTS = "font-family: ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"


def found_when(client: AdminClient, state: str | None, seconds: float) -> dict[str, Any]:
    """What top has to show, once a VM is in that state and its rates are those of a whole interval.

    Raises:
        SystemExit: no VM was in time.
    """
    deadline = time.monotonic() + seconds
    before = look_at(client)
    while time.monotonic() < deadline:
        time.sleep(INTERVAL_SECONDS)
        now = look_at(client)
        found, before = rates(before, now), now
        if state is None or any(vm["state"] == state for vm in found["vms"]):
            return found
    raise SystemExit(f"no VM was {state!r} within {seconds:g} s")


def _without_margins(word: re.Match[str]) -> str:
    """A piece of text without the spaces around it, at its place: some viewers drop leading spaces."""
    head, left, between, length, rest, before, text, after = word.groups()
    if not text:
        return ""
    blanks, spaces = (len(part) // len("&#160;") for part in (before, after))
    letter = float(length) / (blanks + spaces + len(html.unescape(text)))
    moved, shorter = float(left) + blanks * letter, float(length) - (blanks + spaces) * letter
    return f"{head}{moved:.1f}{between}{shorter:.1f}{rest}{text}</text>"


def picture(found: dict[str, Any]) -> str:
    """The table as SVG text."""
    from rich.console import Console
    from rich.terminal_theme import SVG_EXPORT_THEME

    with open("/dev/null", "w", encoding="utf-8") as nowhere:
        console = Console(
            record=True, width=COLUMNS, file=nowhere, force_terminal=True, color_system="truecolor"
        )
        console.print(drawing(found))
        drawn = console.export_svg(title="vgpu-admin top", theme=SVG_EXPORT_THEME, unique_id="top")
    drawn = REMOTE_FONTS.sub("", drawn)
    drawn = re.sub(r"font-family: Fira Code, monospace", FONTS, drawn)
    drawn = re.sub(r"font-family: arial", "font-family: sans-serif", drawn)
    drawn = re.sub(r"\s*<!--.*?-->", "", drawn)
    drawn = WORDS.sub(_without_margins, drawn)
    return "\n".join(line.rstrip() for line in drawn.splitlines()).strip() + "\n"


def main() -> int:
    """Look, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--run-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--when", metavar="STATE", help="wait until a VM is in this state, e.g. 'held back' or quarantined"
    )
    parser.add_argument("--wait", type=float, default=60.0, metavar="SECONDS", help="how long (default 60 s)")
    options = parser.parse_args()
    with AdminClient(options.run_dir) as client:
        options.out.write_text(picture(found_when(client, options.when, options.wait)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
