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


def _tests_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", GUIDE)
    assert len(named) > 30
    missing = [f"{file}::{test}" for file, test in named if test not in _tests_in(HERE / file)]
    assert missing == []


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    namespace: dict[str, object] = {}
    exec(compile(code, "docs/supervision.md", "exec"), namespace)  # noqa: S102 - our own page
    trio.run(namespace["main"])  # type: ignore[arg-type]
    assert capsys.readouterr().out == "55\n"
