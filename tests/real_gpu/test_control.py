# SPDX-License-Identifier: Apache-2.0
"""The run that shows the control plane on a real GPU, on the software GPU: its cheapest steps, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.real_gpu import control, examples
from tests.real_gpu.control_changes import effect
from tests.real_gpu.control_host import Findings, Scene, spread, without_paths


def test_faults_on_the_software_gpu(tmp_path: Path) -> None:
    """Real mediator, workers and guests: a kernel that faults, what is killed, garbage, quarantine; beside a neighbour."""
    out = tmp_path / "control.json"
    words = ["--gpu", "software", "--seconds", "1", "--only", "faults", "--commit", "none", "--out", str(out)]
    control.main(words)
    record = json.loads(out.read_text())
    faults = record["steps"]["faults"]
    kept = {name: part["kept"] for name, part in faults.items() if isinstance(part, dict) and "kept" in part}
    assert [name for part in kept.values() for name, good in part.items() if not good] == [], faults
    assert set(kept) == {
        "illegal address", "guest killed in mid-copy", "worker killed", "garbage in the ring", "VM dies",
        "device process killed", "hung kernels",
    }  # fmt: skip
    assert faults["neighbour"]["failed_calls"] == faults["neighbour"]["wrong_sums"] == 0
    assert faults["neighbour"]["turns"] > 0
    assert faults["kept"] == {"neighbour lost no call": True}
    assert record["machine"]["commit"] == "none"
    assert str(tmp_path) not in out.read_text()


def test_a_step_that_fails_or_takes_too_long_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_scene: Scene, found: Findings) -> None:
        found.put("so far", 1)
        raise AssertionError(f"{tmp_path}/run/x.sock is not there")

    def hangs(_scene: Scene, found: Findings) -> None:
        found.put("so far", 2)
        while True:
            pass

    def works(_scene: Scene, found: Findings) -> None:
        found.child("part").judge("good", True)
        found.child("part").judge("bad", False)
        found.judge("fast", False, of_speed=True)

    monkeypatch.setattr(control, "STEPS", {"fails": (fails, 1), "hangs": (hangs, 1), "works": (works, 1)})
    monkeypatch.setattr(control, "LEAST_LIMIT_SECONDS", 1.0)
    out = tmp_path / "control.json"
    names = list(control.STEPS)
    assert control.main(["--gpu", "software", "--seconds", "1", "--only", *names, "--out", str(out)]) == 1
    steps: dict[str, Any] = json.loads(out.read_text())["steps"]
    assert steps["fails"]["so far"] == 1
    assert steps["fails"]["trouble"]["what"] == "AssertionError: .../x.sock is not there"
    assert steps["hangs"]["so far"] == 2
    assert "OutOfTime" in steps["hangs"]["trouble"]["what"]
    assert steps["works"]["part"]["kept"] == {"good": True, "bad": False}
    assert steps["works"]["not_judged_here"] == {"fast": False}
    assert json.loads(out.read_text())["not_kept"] == ["fails: trouble", "hangs: trouble", "works/part: bad"]


def test_the_effect_of_a_change_is_found_in_shares() -> None:
    def share(begin: int, end: int) -> float:
        """One half up to 1000 + 37 ms, then four fifths."""
        turn = 1_037_000_000
        early = max(min(end, turn) - begin, 0)
        return (0.5 * early + 0.8 * (end - begin - early)) / (end - begin)

    at, window, between = 1_000_000_000, 20_000_000, 600_000_000
    before, after, took = effect(share, at, window, between)
    assert (before, round(after, 3)) == (0.5, 0.8)
    assert took is not None
    assert 37_000_000 < took <= 37_000_000 + window
    assert effect(lambda begin, end: 0.5, at, window, between)[2] is None


def test_an_example_that_never_ends_is_ended_and_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README.md").write_text("`sleeps.py` `fine.py`")
    (tmp_path / "sleeps.py").write_text("print('asleep', flush=True)\nimport time\ntime.sleep(100)")
    (tmp_path / "fine.py").write_text("import sys\nprint(sys.argv[1:], '/some/where/else.txt')")
    monkeypatch.setattr(examples, "EXAMPLES", tmp_path)
    out = tmp_path / "examples.txt"
    words = [
        "--gpu",
        "software",
        "--limit",
        "5",  # in which "fine" has long ended, on a busy machine too
        "--only",
        "sleeps",
        "fine",
        "--commit",
        "c",
        "--out",
        str(out),
    ]
    assert examples.main(words) == 1
    text = out.read_text()
    assert "1 of 2 hold" in text
    assert "=== sleeps: no end within its time, " in text
    assert "asleep" in text
    assert "['--gpu', 'software'] .../else.txt" in text


def test_what_is_written_is_free_of_paths() -> None:
    assert (
        without_paths("no /tmp/vgpu-x1/run/mediator.sock; 3/4 of GPU/s")
        == "no .../mediator.sock; 3/4 of GPU/s"
    )
    assert spread([3.0, 1.0, 2.0])["median"] == 2.0
    assert spread([])["median"] is None
