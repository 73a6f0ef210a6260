# SPDX-License-Identifier: Apache-2.0
"""What a host says of its memory, and what may be promised of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from vgpu.transport import host_memory
from vgpu.transport.host_memory import HostMemory, memory_from

GIB = 1 << 30


def test_all_there_is_may_be_promised_and_no_more() -> None:
    memory = memory_from("MemTotal:        2097152 kB\nMemFree:  5 kB\nMemAvailable:      1024 kB\n")
    assert memory == HostMemory(2 * GIB, 1 << 20)
    assert memory.can_promise([])
    assert memory.can_promise([GIB, GIB])
    assert not memory.can_promise([GIB, GIB, 1])


def test_a_host_that_says_nothing_has_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory_from("") == HostMemory(0, 0)
    here = host_memory.host_memory()
    assert 0 < here.available_bytes <= here.total_bytes
    monkeypatch.setattr(host_memory, "MEMINFO", tmp_path / "none")
    assert host_memory.host_memory() == HostMemory(0, 0)
