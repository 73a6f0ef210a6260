# SPDX-License-Identifier: Apache-2.0
"""The judge itself, without a GPU: what counts as equal, what is reported, and that a bad side is never passed."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from bench import sides
from bench.sides import SideError

from tests.e2e.mediator import is_alive, wait_until
from tests.models import make_tiny_gguf
from tests.real_gpu import run_all
from tests.real_gpu.run_all import Program

CHILD_SOURCE = """
import os, subprocess, sys
sys.path.insert(0, sys.argv[1])
from bench.sides import descendants
child = subprocess.Popen(["sleep", "30"])
assert child.pid in descendants(os.getpid())
child.kill()
child.wait()
assert child.pid not in descendants(os.getpid())
print('{"found": 1}')
"""


def side(equal: Any, **more: Any) -> dict[str, Any]:
    return {"ok": True, "seconds": 1.0, "equal": equal, "info": {}} | more


def test_equal_sides_pass() -> None:
    record = run_all.compare("x", lambda: side({"a": [1, 2]}), lambda: side({"a": [1, 2]}))
    assert record["passed"] is True
    assert record["equal"] is True


def test_one_different_value_is_found_and_named() -> None:
    record = run_all.compare("x", lambda: side({"a": [1, 2]}), lambda: side({"a": [1, 3]}))
    assert record["passed"] is False
    assert record["differences"] == ["/a[1]: 2 natively, 3 remoted"]
    assert record["native_repeats_itself"] is True


def test_a_missing_value_is_a_difference() -> None:
    assert run_all.differences({"a": 1, "b": 2}, {"a": 1}) == ["/b on one side only"]


def test_a_side_that_failed_never_passes() -> None:
    record = run_all.compare("x", lambda: side({}), lambda: {"ok": False, "seconds": 0.0, "error": "no"})
    assert record["passed"] is False
    assert "equal" not in record


def test_what_fails_natively_is_not_held_against_the_remoted_side() -> None:
    record = run_all.compare("x", lambda: {"ok": False, "seconds": 0.0, "error": "no"}, lambda: side({}))
    assert "passed" not in record
    assert record["skipped"] == "it fails natively too"


def test_equal_values_are_kept_once() -> None:
    short = run_all.shorten(run_all.compare("x", lambda: side({"a": 1}), lambda: side({"a": 1})))
    assert short["native"]["equal"] == {"a": 1}
    assert "equal" not in short["remoted"]


def test_different_values_are_kept_twice() -> None:
    short = run_all.shorten(run_all.compare("x", lambda: side({"a": 1}), lambda: side({"a": 2})))
    assert short["native"]["equal"] == {"a": 1}
    assert short["remoted"]["equal"] == {"a": 2}


def program(source: str, **more: Any) -> Program:
    return Program("x", lambda _build: [sys.executable, "-c", source], **more)


def test_a_program_that_prints_its_line_is_read(tmp_path: Path) -> None:
    source = 'print(\'noise\'); print(\'{"equal": {"a": 1}, "info": {}}\')'
    assert run_all.run_side(program(source), sides.NATIVE, tmp_path, None)["equal"] == {"a": 1}


def test_a_program_that_fails_leaves_its_last_words(tmp_path: Path) -> None:
    result = run_all.run_side(program("raise SystemExit('so it ended')"), sides.NATIVE, tmp_path, None)
    assert result["ok"] is False
    assert "so it ended" in result["error"]


def test_a_program_over_its_time_is_killed_with_what_it_started(tmp_path: Path) -> None:
    note = tmp_path / "child"
    # A shell, which has long started its child by then, on a busy machine too.
    words = ["sh", "-c", f"sleep 60 & echo $! >'{note}'; wait"]
    began = time.monotonic()
    result = run_all.run_side(
        Program("x", lambda _: words, timeout_seconds=3.0), sides.NATIVE, tmp_path, None
    )
    assert result["ok"] is False
    assert "killed after 3 s" in result["error"]
    assert time.monotonic() - began < 40
    pid = int(note.read_text())
    wait_until(lambda: not is_alive(pid), 60, "the child of the killed program is gone")


def test_every_program_exists_and_has_a_name_of_its_own(tmp_path: Path) -> None:
    programs = run_all.all_programs()
    assert len({one.name for one in programs}) == len(programs) >= 20
    elsewhere = {"ollama_sequence", "ollama_run", "hang_guest"}  # run by vm.py and hang.py
    files = {path.stem for path in run_all.PROGRAMS.glob("*.py")} - {"report"} - elsewhere
    assert files <= {one.name for one in programs}
    sources = {path.stem for path in run_all.PROGRAMS.glob("*.cu")} - {"spin_forever"}
    assert sources == {one.name.split()[0] for one in programs if one.name.startswith("runtime_")}
    assert tmp_path.exists()


def test_native_means_nothing_of_ours_in_the_environment() -> None:
    given = {
        "VGPU_RUN_DIR": "/x",
        "VGPU_VM": "y",
        "PYTHONPATH": "z",
        "LD_LIBRARY_PATH": "/driver",
        "HOME": "/h",
    }
    assert sides.native_environment(given) == {"LD_LIBRARY_PATH": "/driver", "HOME": "/h"}


def test_a_process_below_another_is_found() -> None:
    outcome = sides.run_program(
        [
            sys.executable,
            "-c",
            CHILD_SOURCE,
            run_all.ROOT,
        ],
        os.environ,
        30,
    )
    assert outcome.json_line() == {"found": 1}


def test_no_json_is_an_error() -> None:
    with pytest.raises(SideError, match="no JSON line"):
        sides.Outcome(0, "nothing\n", "", 0.1).json_line()


def test_the_counting_model_is_the_same_every_time(tmp_path: Path) -> None:
    sizes = [make_tiny_gguf.write_model(tmp_path / name, "nano") for name in ("a", "b")]
    first, second = ((tmp_path / name).read_bytes() for name in ("a", "b"))
    assert sizes == [len(first), len(second)]
    assert first == second
    assert first[:4] == b"GGUF"
    tokenizer = make_tiny_gguf.make_tokenizer(0)
    ids = {token: index for index, token in enumerate(tokenizer.tokens)}
    assert tokenizer.successor[ids["\u01207"]] == ids["\u01208"]
    assert tokenizer.successor[ids["\u01203999"]] == ids["<|endoftext|>"]
