# SPDX-License-Identifier: Apache-2.0
"""The guide keeps its word: its example runs, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import trio

HERE = Path(__file__).resolve().parent
GUIDE = (HERE.parent.parent / "docs" / "supervision.md").read_text(encoding="utf-8")


ROOT = HERE.parent.parent
NAMED = re.compile(r"`((?:tests/)?[\w/]*test_\w+\.py)::(\w+)`")


def _tests_in(path: Path) -> set[str]:
    """Test functions, and test classes that are assigned."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return {name for name in names if name.lower().startswith("test")}


def _file(named: str) -> Path:
    return ROOT / named if named.startswith("tests/") else HERE / named


def test_every_test_that_is_named_exists() -> None:
    named = NAMED.findall(GUIDE)
    assert len(named) == len(re.findall(r"::\w+`", GUIDE)) > 80
    missing = [f"{file}::{test}" for file, test in named if test not in _tests_in(_file(file))]
    assert missing == []


def test_every_clause_names_a_test() -> None:
    """A row of a table of clauses without a test would be a promise that nobody holds."""
    tables = re.findall(r"^\|[^\n]* \| test \|\n\|[-|]+\n((?:\|[^\n]*\n)+)", GUIDE, re.MULTILINE)
    assert len(tables) == 5
    rows = [row for table in tables for row in table.splitlines()]
    assert [row for row in rows if not NAMED.search(row.rsplit(" | ", 1)[1])] == []


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    namespace: dict[str, object] = {}
    exec(compile(code, "docs/supervision.md", "exec"), namespace)  # noqa: S102 - our own page
    trio.run(namespace["main"])  # type: ignore[arg-type]
    assert capsys.readouterr().out == "55\n"
