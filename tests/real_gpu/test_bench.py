# SPDX-License-Identifier: Apache-2.0
"""The bench end to end on the software GPU: real mediator, real worker, real shim, and a record that holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench import run, sides
from bench.sides import NATIVE, REMOTED, SideError


def test_the_bench_runs_on_the_software_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    status = run.main(["--gpu", "software", "--repetitions", "1", "--only", "driver", "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["failures"] == []
    assert status == 0
    rows = record["rows"]
    assert rows["local_ring_bytes"][REMOTED]["median"] == 0
    assert rows["local_ring_bytes"]["met"] is True
    # A launch with 16 bytes of parameters is one header of 80 bytes and its payload.
    assert rows["launch_record_bytes"][REMOTED]["median"] == pytest.approx(96, abs=2)
    assert 0 < rows["launch_ns_p50"][REMOTED]["median"] < 1e6
    assert rows["pageable_dtoh_64mib_gbs"][REMOTED]["median"] > 0
    assert all(NATIVE not in row for row in rows.values())
    assert record["settings"]["left_out"].keys() == {"decode", "llama"}
    printed = capsys.readouterr().out
    assert "the software GPU computes" in printed
    assert "cuLaunchKernel, caller's time, p50" in printed


def test_a_failing_program_is_in_the_record_and_not_in_the_rows(tmp_path: Path) -> None:
    samples = run.Samples()

    def fail(_environment: run.Environment, _side: str) -> dict[str, list[float]]:
        raise SideError("it broke")

    group = run.Group("driver", fail)
    samples.measure(group, NATIVE, {})
    assert samples.failed(group, NATIVE)
    assert not samples.failed(group, REMOTED)
    assert samples.failures == [{"group": "driver", "side": NATIVE, "error": "SideError: it broke"}]
    assert samples.values == {NATIVE: {}, REMOTED: {}}


def test_a_mediator_that_cannot_start_says_why() -> None:
    with pytest.raises(SideError, match="run-mediator is not ready"), sides.open_mediator("no-such-gpu"):
        pytest.fail("it started")
