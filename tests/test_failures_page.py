# SPDX-License-Identifier: Apache-2.0
"""docs/failures.md keeps its word: both tables have the same rows, and every test, example and record it names is there."""

from __future__ import annotations

import ast
import functools
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEASUREMENTS = ROOT / "docs" / "measurements"
# What is commented out is a place for a record that is still to come.
PAGE = re.sub(r"<!--.*?-->", "", (ROOT / "docs" / "failures.md").read_text(encoding="utf-8"))
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)(?:\[([^\]`]+)\])?`")
EXAMPLE = re.compile(r"`(\w+\.py)`")
RECORD = re.compile(r"`([\w.-]+\.(?:json|txt))`")
DESIGN = {
    *("a kernel hangs", "repeated faults", "a kernel faults", "a worker crashes", "a guest process dies", "a VM dies"),
    *("garbage on the ring", "garbage on a socket", "garbage on PCI registers", "an actor raises"),
    *("the mediator is killed or upgraded", "a device process is killed", "a VM floods"),
    *("a header changes after it was checked", "a worker is stopped (SIGSTOP)", "the scheduler restarts under load"),
    *("the ledger's disk is full", "the wall clock jumps", "a storm of BUSY"),
}  # fmt: skip

# The parts of a recorded run's step "faults".
FAULTS = {
    "a kernel hangs": "hung kernels",
    "repeated faults": "hung kernels",
    "a kernel faults": "illegal address",
    "a worker crashes": "worker killed",
    "a guest process dies": "guest killed in mid-copy",
    "a VM dies": "VM dies",
    "garbage on the ring": "garbage in the ring",
    "a device process is killed": "device process killed",
}


def tables() -> list[list[list[str]]]:
    """Cells of every row of every table, without the head."""
    found = re.findall(r"^\|[^\n]*\|\n\|[-|]+\|\n((?:\|[^\n]*\|\n)+)", PAGE, re.MULTILINE)
    return [
        [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table.splitlines()]
        for table in found
    ]


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    if not path.is_file():
        return frozenset()
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return frozenset(
        node.name
        for node in body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    )


def test_both_tables_have_every_row() -> None:
    happens, holds = tables()
    assert [len(row) for row in happens] == [5] * len(DESIGN)
    assert [len(row) for row in holds] == [4] * len(DESIGN)
    assert {row[0] for row in happens} == DESIGN
    assert [row[0] for row in holds] == [row[0] for row in happens]
    assert not [row for row in happens + holds if "" in row]


def test_every_row_names_a_test_that_exists() -> None:
    _, holds = tables()
    for name, tests, _, _ in holds:
        named = TEST.findall(tests)
        assert named, name
        assert len(named) == tests.count("`") // 2, name
        missing = [
            f"{file}::{test}[{case}]"
            for file, test, case in named
            if test not in names_in(ROOT / file)
            or (case and not (ROOT / "examples" / f"{case}.py").is_file() and case not in (ROOT / file).read_text())
        ]  # fmt: skip
        assert missing == [], name


def test_every_example_and_every_record_exists() -> None:
    _, holds = tables()
    for name, _, example, record in holds:
        examples = EXAMPLE.findall(example)
        assert examples or example == "–", name
        assert [one for one in examples if not (ROOT / "examples" / one).is_file()] == [], name
        records = RECORD.findall(record)
        assert records or record.startswith("–"), name
        assert [one for one in records if not (ROOT / "docs" / "measurements" / one).is_file()] == [], name


def control_parts(record: str, row: str) -> list[dict[str, bool]]:
    """What was judged of a row in a record of ``tests/real_gpu/control.py``."""
    steps = json.loads((MEASUREMENTS / record).read_text(encoding="utf-8"))["steps"]
    parts = (
        steps["limits"].values() if row == "a VM floods" else [steps["faults"][FAULTS[row]], steps["faults"]]
    )
    return [part["kept"] for part in parts if isinstance(part, dict) and "kept" in part]


def test_what_a_row_rests_on_held_on_the_card() -> None:
    """A record proves nothing by being there."""
    _, holds = tables()
    for name, tests, example, record in holds:
        for one in RECORD.findall(record):
            text = (MEASUREMENTS / one).read_text(encoding="utf-8")
            if one.startswith("control-"):
                judged = control_parts(one, name)
                assert judged, f"{name}: {one} has no such part"
                assert [key for kept in judged for key, good in kept.items() if not good] == [], (
                    f"{name}: {one}"
                )
            elif one.startswith("examples-"):
                shown = [Path(program).stem for program in EXAMPLE.findall(example)]
                assert shown, name
                assert [e for e in shown if f"=== {e}: exit status 0, " not in text] == [], f"{name}: {one}"
            elif one.startswith("e2e-"):
                ran = [f"{file}::{test}" for file, test, _ in TEST.findall(tests)]
                assert any(f"PASSED {test}" in text for test in ran), f"{name}: {one}"
                assert [test for test in ran if f"FAILED {test}" in text] == [], f"{name}: {one}"
            elif one.startswith("hang-"):
                assert json.loads(text)["passed"] is True
            elif one.startswith("conformance-"):
                *checks, total = text.splitlines()
                assert [check for check in checks if not check.startswith("ok ")] == []
                assert total.startswith(f"{len(checks)} of {len(checks)} checks passed")
            elif one.startswith("real_gpu-"):
                assert [p["name"] for p in json.loads(text)["programs"] if not p["passed"]] == []
            else:
                assert one.startswith("vm-"), f"{name}: nothing is known of {one}"
                assert json.loads(text)["mediator restart"]["ok"] is True


def test_every_example_of_a_fault_has_its_row() -> None:
    """An example that is shown nowhere here proves something that the page does not promise."""
    _, holds = tables()
    shown = {one for _, _, example, _ in holds for one in EXAMPLE.findall(example)}
    programs = {"demo.py", "cupy_program.py", "scale_words.py"}
    there = {path.name for path in (ROOT / "examples").glob("[a-z]*.py")} - programs
    assert shown == there
