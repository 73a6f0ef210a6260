# SPDX-License-Identifier: Apache-2.0
"""The list of run_all.py in pytest, one test for each program; needs a real GPU, nvcc, and what a program imports."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench import sides
from bench.sides import NATIVE, REMOTED, Mediator

from tests.real_gpu import killed, llama, run_all
from tests.real_gpu.run_all import Program

pytestmark = pytest.mark.gpu
LLAMA_DIR = Path(os.environ["VGPU_LLAMA_DIR"]) if os.environ.get("VGPU_LLAMA_DIR") else None


@pytest.fixture(scope="module")
def mediator() -> Iterator[Mediator]:
    """One mediator for the whole module, as a host has."""
    with sides.open_mediator("nvidia") as running:
        yield running
        assert running.alive(), running.log_tail()


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled programs are kept."""
    return tmp_path_factory.mktemp("programs")


def assert_passed(record: dict[str, Any]) -> None:
    assert record["passed"], {key: value for key, value in record.items() if key != "name"}


@pytest.mark.parametrize(
    "program", run_all.all_programs(), ids=lambda program: program.name.replace(" ", "-")
)
def test_program(program: Program, build: Path, mediator: Mediator) -> None:
    absent = run_all.missing(program.needs)
    if absent:
        pytest.skip(f"this Python has no {', '.join(absent)}")
    if program.name.startswith("runtime_") and run_all.find_nvcc() is None:
        pytest.skip("no nvcc on this machine")
    assert_passed(
        run_all.compare(
            program.name,
            lambda: run_all.run_side(program, NATIVE, build, None),
            lambda: run_all.run_side(program, REMOTED, build, mediator),
        )
    )


@pytest.mark.parametrize(
    "check", llama.checks(LLAMA_DIR, Path("/tmp/vgpu-models")), ids=lambda check: check.name
)
def test_llama(check: llama.Check, mediator: Mediator) -> None:
    if check.skipped:
        pytest.skip(check.skipped)
    assert_passed(
        run_all.compare(check.name, lambda: check.run(NATIVE, None), lambda: check.run(REMOTED, mediator))
    )


@pytest.mark.parametrize("side", [NATIVE, REMOTED])
def test_a_killed_process_leaves_nothing(side: str, build: Path, mediator: Mediator) -> None:
    record = killed.record(side, run_all.compile_cuda, build, mediator)
    if record.get("skipped"):
        pytest.skip(record["skipped"])
    assert_passed(record)
