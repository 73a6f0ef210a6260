# SPDX-License-Identifier: Apache-2.0
"""Counted GPU time against the card's, of a mediator at work: both sides are served, and on the software GPU they agree."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.mediator import Mediator
from tests.e2e.steady import Steady

Window = tuple[str, str]


@pytest.fixture
def mediator() -> Iterator[Mediator]:
    with Mediator() as running:
        yield running


def gpu_times(mediator: Mediator) -> dict[Window, float]:
    """Values by what they are and their window."""
    return {
        (sample.name.removeprefix("vgpu_gpu_time_"), sample.labels["window"]): sample.value
        for family in text_string_to_metric_families(mediator.ask("metrics"))
        for sample in family.samples
        if sample.name.startswith("vgpu_gpu_time_") and sample.labels["gpu"] == "0"
    }


def test_a_program_at_work_is_counted_and_the_card_agrees(mediator: Mediator, steady: Steady) -> None:
    gpu_times(mediator)  # who asks first begins it
    guest = steady.begin(mediator, "red")
    deadline = time.monotonic() + 60
    while True:
        found = gpu_times(mediator)
        # Seconds after the beginning the edges are large; they pass.
        if found.get(("counted_ratio", "10s"), 0.0) > 0.05 and abs(found["drift_ratio", "10s"]) < 0.05:
            break
        assert time.monotonic() < deadline, found
        guest.until("turn")
        time.sleep(0.1)
    for window in ("10s", "60s"):
        counted, nvml, drift = (found[f"{what}_ratio", window] for what in ("counted", "nvml", "drift"))
        assert drift == pytest.approx(min(counted, 1.0) - nvml, abs=1e-9)
    shown = mediator.ask("gpu_time")
    assert [window["seconds"] for window in shown["0"]] == [10.0, 60.0]
    guest.kill()
