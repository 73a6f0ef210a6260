# SPDX-License-Identifier: Apache-2.0
"""docs/vfio-user.md says what the code does: states, commands, limits."""

from __future__ import annotations

import re
from pathlib import Path

from vgpu.transport.vfio_user import machine, messages

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "vfio-user.md").read_text()


def rows(title: str) -> list[list[str]]:
    """Cells of the first table in the section, without its two head lines."""
    section = re.split(r"^## \d+\. ", PAGE, flags=re.MULTILINE)
    (body,) = [part for part in section if part.startswith(title)]
    lines = [line for line in body.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_states_are_the_table() -> None:
    documented = {(state, what): after for state, what, after in rows("States")}
    coded = {(state.value, what.value): after.value for (state, what), after in machine.TRANSITIONS.items()}
    assert documented == coded


def test_the_commands_are_those_served() -> None:
    assert [command for command, _ in rows("Commands")] == [messages.Command(c).name for c in machine.SERVED]


def test_the_limits_are_the_codes() -> None:
    limits = dict(rows("Limits"))
    assert limits["data of one access"] == f"{messages.MAX_DATA_BYTES >> 20} MiB"
    assert limits["descriptors of one message"] == str(messages.MAX_DESCRIPTORS)
    assert limits["VERSION"] == f"{messages.MAX_VERSION_BYTES} bytes"
    assert limits["windows of guest memory"] == str(machine.MAX_DMA_WINDOWS)
    assert limits["messages that wait for an answer"] == str(machine.MAX_UNANSWERED)
