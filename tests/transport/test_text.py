# SPDX-License-Identifier: Apache-2.0
"""Hostile words are harmless wherever they come in, and once more wherever they are shown."""

from __future__ import annotations

import io
import os
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgpu.actors.exposition_tenants import clean
from vgpu.admin_tables import rich_table, say
from vgpu.admin_top import summary
from vgpu.gpu import flight
from vgpu.trace_views import Table, as_text
from vgpu.transport._generated_calls import CallId
from vgpu.transport.attach import HELLO_SIZE, Hello
from vgpu.transport.stub.core import _program
from vgpu.transport.text import escaped, printable, printable_lines
from vgpu.units import show_table

# Escape sequences, line ends, a terminal's 8-bit escape, letters that turn the direction, half a surrogate pair.
EVIL = "ev\x1b[31mil\nx\r\x07\x9b\u202e\u2028\udcff"
TAME = "ev?[31mil?x??????"


def test_hostile_words() -> None:
    assert printable(EVIL) == TAME
    assert printable("größe 日本 ☃") == "größe 日本 ☃"
    assert printable("abc", 2) == "ab"
    assert printable_lines("a\x1b\nb\x1b") == "a?\nb?"
    assert escaped(EVIL) == r"ev\x1b[31mil\nx\r\x07\x9b\u202e\u2028\udcff"
    assert escaped("größe") == "größe"


@given(st.text(st.characters(exclude_categories=())))
def test_what_comes_out_is_one_line_that_can_be_written(text: str) -> None:
    for tame in (printable(text), escaped(text)):
        assert tame.isprintable()
        tame.encode()
        assert len(tame.splitlines()) <= 1
    assert len(printable(text)) == len(text)
    assert printable(printable(text)) == printable(text)


def test_a_guest_may_call_its_program_as_it_likes() -> None:
    raw = bytearray(Hello(1, 2, vm="vm", program="").encode())
    name = EVIL.replace("\udcff", "").encode() + b"\xff\xc3"  # and ends in mid-letter
    raw[88 : 88 + len(name)] = name
    assert len(raw) == HELLO_SIZE
    program = Hello.decode(bytes(raw)).program
    assert program == TAME[:-1] + "\ufffd\ufffd"
    assert program.isprintable()
    assert _program(name).isprintable()


def test_a_kernel_may_have_any_name() -> None:
    name = b"ker\x1b]0;nel\nforged\xff"
    function = 7
    data = bytearray(flight.FLIGHT_SIZE)
    struct.pack_into("<QQI", data, 0, flight.MAGIC, 1, 0)
    flight._ENTRY.pack_into(data, flight._HEAD_SIZE, CallId.wireLaunch, 0, 1, 1, function, 0, 0, 0, 0)
    slot = function * 0x9E3779B97F4A7C15 % (1 << 64) >> 56
    at = flight._NAMES_AT + slot * flight._NAME_SIZE
    data[at : at + 8 + len(name)] = function.to_bytes(8, "little") + name
    descriptor = os.memfd_create("flight")
    try:
        os.pwrite(descriptor, data, flight.OFFSET)
        found = flight.read_flight(descriptor)
    finally:
        os.close(descriptor)
    assert found is not None
    assert found.calls[0].kernel == "ker?]0;nel?forged\ufffd"


def test_labels_of_metrics() -> None:
    assert clean(EVIL) == TAME


def test_tables_of_text() -> None:
    assert show_table(("A", "B"), [(EVIL, 1)]).splitlines()[1:] == [f"{TAME}  1"]
    assert as_text(Table("t", ("A",), ((EVIL,),))) == f"A\n{TAME}"


def drawn(what: Any) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=100)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_tables_of_a_terminal_take_no_markup_and_no_escapes() -> None:
    text = drawn(rich_table(Table("t", ("A", "B"), (("[red]x[/red]", EVIL),))))
    assert "[red]x[/red]" in text
    assert TAME in text
    assert "\x1b" not in text


def test_what_a_command_says(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"VM red\n{EVIL}")
    assert capsys.readouterr().out == "VM red\nev?[31mil\nx??????\n"


def test_troubles_in_the_line_above_the_tables() -> None:
    found: dict[str, Any] = {
        "gpu": None,
        "kind": "software",
        "vms": [],
        "sessions": [],
        "ok": False,
        "trouble": [EVIL],
    }
    assert summary(found).splitlines()[1:] == [f"NOT WELL: {TAME}"]
