# SPDX-License-Identifier: Apache-2.0
"""From samples to the table: medians, ratios, promises kept and broken, and nothing lost on the way."""

from __future__ import annotations

import pytest
from bench import metrics
from bench.metrics import METRICS, Metric
from bench.sides import NATIVE, REMOTED


def test_a_row_has_median_spread_ratio_and_verdict() -> None:
    row = metrics.rows(
        {NATIVE: {"launch_sync_us_p50": [7.0, 7.3, 9.0]}, REMOTED: {"launch_sync_us_p50": [7.2, 7.5, 7.1]}}
    )["launch_sync_us_p50"]
    assert (row[NATIVE]["median"], row[NATIVE]["min"], row[NATIVE]["max"]) == (7.3, 7.0, 9.0)
    assert row[REMOTED]["samples"] == [7.2, 7.5, 7.1]
    assert row["ratio"] == pytest.approx(7.2 / 7.3, rel=1e-3)
    assert (row["target"], row["met"]) == ("≤ 1.05 × native", True)


@pytest.mark.parametrize(
    ("metric", "native", "remoted", "met"),
    [
        (Metric("x", "", "ns", at_most=100), 2400.0, 100.0, True),
        (Metric("x", "", "ns", at_most=100), None, 101.0, False),
        (Metric("x", "", "B", at_least=5), None, 5.0, True),
        (Metric("x", "", "", ratio_at_least=0.97), 100.0, 97.0, True),
        (Metric("x", "", "", ratio_at_least=0.97), 100.0, 96.9, False),
        (Metric("x", "", "", ratio_at_most=1.3), 100.0, 131.0, False),
        (Metric("x", "", "", ratio_at_most=1.3), None, 131.0, None),
        (Metric("x", "", "", ratio_at_most=1.3), 100.0, None, None),
        (Metric("x", "", ""), 1.0, 1.0, None),
    ],
)
def test_a_promise_is_judged(
    metric: Metric, native: float | None, remoted: float | None, met: bool | None
) -> None:
    assert metric.met(native, remoted) is met


def test_a_value_without_a_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="brand_new_us"):
        metrics.rows({REMOTED: {"brand_new_us": [1.0]}})


def test_on_the_software_gpu_only_the_promise_on_ring_records_stands() -> None:
    found = metrics.rows({REMOTED: {"launch_ns_p50": [50.0], "local_ring_bytes": [0.0]}}, promised=False)
    assert "met" not in found["launch_ns_p50"]
    assert found["local_ring_bytes"]["met"] is True


def test_the_table_has_a_line_for_each_row_and_says_no() -> None:
    found = metrics.rows({NATIVE: {"decode_tokens_per_s": [30.0]}, REMOTED: {"decode_tokens_per_s": [20.0]}})
    lines = metrics.table(found).splitlines()
    assert len(lines) == 2
    assert lines[1].endswith("NO")
    assert "0.667" in lines[1]


def test_names_are_unique() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
