# SPDX-License-Identifier: Apache-2.0
"""Every message to JSON and back, the document, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgpu.transport.errors import RemoteProtocolError
from vgpu.transport.stub import messages as m
from vgpu.transport.vfio_user.pci import Variant
from vgpu.transport.vfio_user.registers import SlotState

DOCUMENT = (Path(__file__).resolve().parents[3] / "docs/wire.md").read_text()
SLOT = m.SlotReport(1, SlotState.READY, 2, 3, 1 << 63)
EVENTS: list[m.Event] = [
    m.Hello("a", 1, 1 << 28, 8, 65536, 1 << 24, Variant.EXPRESS, True, (SLOT, SLOT), 1, 2),
    m.Claim(1, 2, 3, "ollama"),
    m.Granted(1, 2),
    m.Withdrawn(1, 2),
    m.Released(1, 2, m.Ending.RESET),
    m.Freed(1),
    m.Client(False),
    m.Counters(1, 2, 3, 4, 5),
]
COMMANDS: list[m.Command] = [
    m.Grant(1, 2, 3, 4, 5),
    m.Refuse(1, 2, 3, 4),
    m.Status(True, False, 13000),
    m.Stop(),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda e: type(e).__name__)
def test_events_there_and_back(event: m.Event) -> None:
    line = json.loads(json.dumps(m.event_line(event)))
    assert m.read_event(line, m.DESCRIPTORS.get(type(event), 0)) == event


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: type(c).__name__)
def test_commands_there_and_back(command: m.Command) -> None:
    line = json.loads(json.dumps(m.command_line(command)))
    assert m.read_command(line, m.DESCRIPTORS.get(type(command), 0)) == command


def test_every_kind_is_tried_here() -> None:
    assert {type(e) for e in EVENTS} == set(m.EVENTS.values())
    assert {type(c) for c in COMMANDS} == set(m.COMMANDS.values())


def test_the_document_lists_each_with_its_fields() -> None:
    section = DOCUMENT[DOCUMENT.index("## 5.") :]
    for key, table in (("event", m.EVENTS), ("do", m.COMMANDS)):
        for name, kind in table.items():
            if name == "withdrawn":
                assert '`"withdrawn"`' in section  # its row is that of granted
                continue
            found = re.search(rf'{{"{key}":"{name}".*', section)
            assert found, name
            for field in attrs.fields(kind):
                assert f'"{field.name}":' in found.group(), f"{name}.{field.name}"
    for ending in m.Ending:
        assert f'"{ending.value}"' in section


def test_what_is_not_known_is_passed_over() -> None:
    assert m.read_command({"do": "dance", "slot": "x"}) is None
    assert m.read_command({"do": "stop", "why": "new field"}) == m.Stop()
    assert m.read_command({"do": "refuse", "slot": 1, "token": 2, "status": 3}) == m.Refuse(1, 2, 3, 0)


@pytest.mark.parametrize(
    ("line", "descriptors"),
    [
        ({}, 0),
        ({"do": 3}, 0),
        ({"do": ["stop"]}, 0),
        ({"do": "stop"}, 1),
        ({"do": "grant", "slot": 1, "token": 2, "session": 3, "worker_address": 4, "worker_pid": 5}, 0),
        ({"do": "grant", "slot": 1, "token": 2, "session": 3, "worker_address": 4}, 2),
        ({"do": "refuse", "slot": -1, "token": 2, "status": 3}, 0),
        ({"do": "refuse", "slot": 1 << 32, "token": 2, "status": 3}, 0),
        ({"do": "refuse", "slot": True, "token": 2, "status": 3}, 0),
        ({"do": "refuse", "slot": 1.0, "token": 2, "status": 3}, 0),
        ({"do": "status", "present": 1, "quarantined": False, "driver_version": 1}, 0),
    ],
)
def test_what_is_wrong_is_refused(line: dict[str, Any], descriptors: int) -> None:
    with pytest.raises(RemoteProtocolError):
        m.read_command(line, descriptors)


@pytest.mark.parametrize(
    "change",
    [
        {"slots": None},
        {"slots": [3]},
        {"slots": [{"slot": 1}]},
        {"slots": [{"slot": 1, "state": "READ", "token": 1, "pid": 1, "session": 1}]},
        {"variant": "odd"},
        {"variant": []},
        {"vm": "x" * 257},
        {"connected": None},
    ],
)
def test_a_wrong_hello_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError):
        m.read_event({**m.event_line(EVENTS[0]), **change}, 1)


VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, 0, -1, 3.5, 1 << 70, "guest", "x" * 300, [], {}, [{}], [[]], [{"slot": 1}]]
)
NAMES = st.sampled_from(["slot", "token", "session", "status", "slots", "by", "vm", "connected"])


@given(st.sampled_from([*m.EVENTS, *m.COMMANDS]), st.dictionaries(NAMES, VALUES), st.integers(0, 3))
def test_any_object_reads_or_is_refused(name: str, fields: dict[str, Any], descriptors: int) -> None:
    for read, key in ((m.read_event, "event"), (m.read_command, "do")):
        try:
            got = read({key: name, **fields}, descriptors)
        except RemoteProtocolError:
            continue
        assert got is None or m.DESCRIPTORS.get(type(got), 0) == descriptors
