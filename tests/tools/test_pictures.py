# SPDX-License-Identifier: Apache-2.0
"""Pictures in the documents are text, small, complete by themselves, shown somewhere, and can be drawn again."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PICTURES = sorted([*(DOCS / "pictures").iterdir(), *(DOCS / "figures").iterdir()])
MOST_BYTES = 200_000
# Where a viewer would fetch something. Names of XML vocabularies are links that nobody follows.
FETCHED = re.compile(r"""(?:url\(|\bhref=|\bsrc=|@import)\s*["']?(?:https?:)?//[^\s"')]*""")
SVG = "{http://www.w3.org/2000/svg}"

FOUND: dict[str, Any] = {
    "kind": "software",
    "gpu": None,
    "ok": True,
    "trouble": [],
    "seconds": 1.0,
    "vms": [
        {
            "name": "red <&> blue", "pool": "A", "priority": "high", "weight": 80, "gpu_percent": 61.0,
            "share_percent": 62.0, "memory_used_bytes": 4096, "memory_limit_bytes": None, "calls_per_second": 7.0,
            "sessions": 1, "state": "quarantined",
        }
    ],
    "sessions": [],
}  # fmt: skip


def tool(name: str) -> Any:
    """A program of ``tools/``, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_a_picture_is_text_and_needs_nothing_else(path: Path) -> None:
    assert path.suffix == ".svg"
    assert path.stat().st_size < MOST_BYTES
    text = path.read_text(encoding="utf-8")
    assert ElementTree.fromstring(text).tag == SVG + "svg"
    assert FETCHED.findall(text) == []
    assert "@font-face" not in text
    shown = [page for page in DOCS.rglob("*.md") if path.name in page.read_text(encoding="utf-8")]
    assert shown


def test_top_is_drawn_as_it_is_shown() -> None:
    drawn: str = tool("top_picture").picture(FOUND)
    assert FETCHED.findall(drawn) == []
    assert "@font-face" not in drawn
    texts = {
        "".join(node.itertext()): float(node.attrib.get("x", "0"))
        for node in ElementTree.fromstring(drawn).iter(SVG + "text")
    }
    assert {"red\N{NO-BREAK SPACE}<&>\N{NO-BREAK SPACE}blue", "quarantined", "80", "61", "7"} <= set(texts)
    # Numbers stand to the right, by their place and not by spaces, which some viewers drop.
    assert texts["61"] > texts["GPU\N{NO-BREAK SPACE}%"]
    assert not [text for text in texts if text.strip() and text != text.strip()]


def test_slices_of_a_trace() -> None:
    """Whole ones, pairs that nest, and fences, which begin and end by their id."""
    here = {"pid": 1, "tid": 2}
    events = [
        {**here, "ph": "X", "ts": 5.0, "dur": 2.0, "name": "lease"},
        {**here, "ph": "B", "ts": 10.0, "name": "outer"},
        {**here, "ph": "B", "ts": 11.0, "name": "inner"},
        {**here, "ph": "E", "ts": 12.0, "name": ""},
        {**here, "ph": "E", "ts": 14.0, "name": ""},
        {**here, "ph": "E", "ts": 15.0, "name": "of one that began before the recording"},
        {**here, "ph": "b", "id2": {"local": "0x7"}, "ts": 20.0, "name": "fence 7"},
        {**here, "ph": "b", "id2": {"local": "0x8"}, "ts": 21.0, "name": "fence 8"},
        {**here, "ph": "e", "id2": {"local": "0x7"}, "ts": 25.0, "name": "fence 7"},
    ]
    assert tool("draw_trace").slices_of(events) == {
        (1, 2): [(5.0, 2.0, "lease"), (11.0, 1.0, "inner"), (10.0, 4.0, "outer"), (20.0, 5.0, "fence")]
    }
