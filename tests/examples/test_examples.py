# SPDX-License-Identifier: Apache-2.0
"""Every example is run as its readme says, by its own entry point; what it claims must hold."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.mediator import Mediator
from vgpu.shim.locate import library_directory

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# Those that inject faults; the others are programs, or `make demo`.
PROGRAMS = {"demo", "cupy_program", "scale_words"}
FAULTS = sorted(p.stem for p in EXAMPLES.glob("[a-z]*.py") if p.stem not in PROGRAMS)
SECONDS = 180
# What one of them is there to show, and could leave out unnoticed.
SHOWN = {
    "flooding_vm": (
        r"VM floods saw BUSY: held back [1-9]\d* times",
        r"took \d+ calls of it, .* its rate is \d+",
    ),
    "hung_kernel": (
        r"its deadline: 2 s after the launch",
        r"lateness: it was told [\d.]+ s after the deadline",
    ),
    "raising_actors": (
        r"mediator/devices/in-vm raised, was restarted",
        r"mediator/gpus/gpu0/executors raised",
    ),
    "three_vms": (
        r"(?s)(watch it:  .* --run-dir \S+ top\n.*){3}",
        r"VM vm2 saw BUSY: held back [1-9]\d* times",
    ),
}


def run(*command: str | Path, **environment: str) -> str:
    """Run a command as a reader would; what it printed. It must succeed."""
    done = subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("name", FAULTS)
def test_an_example(name: str) -> None:
    out = run(sys.executable, EXAMPLES / f"{name}.py")
    lines = out.splitlines()
    verdict = re.fullmatch(r"verdict: holds, (\d+) facts \([\d.]+ s\)", lines[-1])
    assert verdict is not None, out
    facts = [line for line in lines if line.startswith("  [ok] ")]
    assert len(facts) == int(verdict[1])
    assert "[WRONG]" not in out
    for shown in SHOWN.get(name, ()):
        assert re.search(shown, out), f"{shown}\n{out}"
    # A neighbour was there, computed, and lost nothing.
    neighbours = [re.search(r": (\d+) calls, 0 lost; (\d+) sums, 0 wrong;", line) for line in facts]
    assert any(found is not None and int(found[2]) > 0 for found in neighbours), out


def test_an_example_that_does_not_hold_says_so(tmp_path: Path) -> None:
    """The verdict is not decoration: one wrong fact, or none at all, is a failure."""
    for body, said in (("example.fact(False, 'pigs fly')", "pigs fly"), ("pass", "0 of 0")):
        path = tmp_path / "example.py"
        path.write_text(
            f"import sys\nsys.path.insert(0, {str(EXAMPLES)!r})\nfrom _support import main\n"
            f"def body(example):\n    {body}\nsys.exit(main('Nothing', body))\n"
        )
        done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1, done.stderr
        assert said in done.stdout
        assert "DOES NOT HOLD" in done.stdout


def test_the_programs(tmp_path: Path, cuda_home: Path) -> None:
    """The C and the Python program of the driver API, through vgpu-run."""
    program = tmp_path / "vector_add"
    source, stub = EXAMPLES / "vector_add.c", library_directory() / "libcuda.so.1"
    warnings = ("-Wall", "-Wextra", "-Werror")
    run("gcc", "-O1", *warnings, "-I", cuda_home / "include", "-o", program, source, stub, "-ldl")
    with Mediator() as mediator:
        assert mediator.run(program, vm="c")[-1].endswith("4096 sums, 0 wrong")
        (line,) = mediator.run(sys.executable, EXAMPLES / "scale_words.py", vm="python")
        assert line.startswith("4096 numbers, 0 wrong")


def test_the_readme_lists_them_all() -> None:
    listed = set(re.findall(r"`(\w+\.(?:py|c))`", (EXAMPLES / "README.md").read_text()))
    there = {p.name for p in EXAMPLES.iterdir() if p.suffix in (".py", ".c")}
    assert listed == there
