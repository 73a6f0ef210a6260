# SPDX-License-Identifier: Apache-2.0
"""Where a program's time goes, out of two samples of its session."""

from __future__ import annotations

from typing import Any

import pytest

from tests.src.test_top import look, session
from vgpu.admin_top import rates, tables
from vgpu.time_shares import PARTS, in_words, spent_ns, time_percent
from vgpu.trace_views import as_text


def sample(second: float, **milliseconds: int) -> dict[str, Any]:
    """A session's sample; times in milliseconds."""
    guest = {f"{name}_ns": value * 1_000_000 for name, value in milliseconds.items()}
    return {**session(1, "red", int(second * 10**9)), "guest": {"sticky_error": 0, **guest}}


BUSY = {
    "encode": 100, "copy": 50, "answer_wait": 300, "room_wait": 100, "held_ring": 60, "ring_wait": 240,
    "sync": 500, "held_sync": 40, "held": 100,
}  # fmt: skip


def test_the_parts_do_not_overlap() -> None:
    milliseconds = {part: spent // 1_000_000 for part, spent in spent_ns(sample(1, **BUSY)).items()}
    assert milliseconds == {"encode": 150, "ring": 240, "lease": 100, "replay": 100, "sync": 460}
    # All that was waited and written, each once.
    assert sum(milliseconds.values()) == 100 + 50 + 300 + 100 + 500


def test_percent_between_two_looks() -> None:
    shares = time_percent(sample(1), sample(3, **BUSY))
    assert shares == pytest.approx(
        {"encode": 7.5, "ring": 12, "lease": 5, "replay": 5, "sync": 23, "own": 47.5}
    )
    assert list(shares) == [*PARTS, "own"]
    assert set(time_percent(None, sample(3, **BUSY)).values()) == {0}


def test_several_threads_may_wait_longer_than_there_is_time() -> None:
    shares = time_percent(sample(1), sample(2, sync=3000))
    assert (shares["sync"], shares["own"]) == (300, 0)


def test_a_session_whose_guest_says_nothing_is_all_its_own() -> None:
    assert time_percent(session(1, "red", 0), session(1, "red", 10**9))["own"] == 100


def test_in_words() -> None:
    two = [sample(1, **BUSY), sample(1, sync=540)]
    assert in_words(two) == "encode 0.1s, ring 0.2s, lease 0.1s, replay 0.1s, sync 1.0s"


def test_top_shows_it() -> None:
    found = rates(look(1, [sample(1)]), look(3, [sample(3, **BUSY)]))
    assert found["sessions"][0]["time_percent"]["ring"] == pytest.approx(12)
    lines = as_text(*tables(found)).splitlines()
    header = next(i for i, line in enumerate(lines) if "ENCODE %" in line)
    assert lines[header].split() == [
        "SESSION",
        "VM",
        "ENCODE",
        "%",
        "RING",
        "%",
        "LEASE",
        "%",
        "REPLAY",
        "%",
        "SYNC",
        "%",
        "OWN",
        "%",
    ]
    assert lines[header + 1].split() == ["1", "red", "8", "12", "5", "5", "23", "48"]
