# SPDX-License-Identifier: Apache-2.0
"""The log: objects for programs, priorities for the journal, and who it was about."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs
import pytest

from vgpu.actors import Actor, ActorSpec, Request, handles, open_system
from vgpu.logs import is_journal, make_handler

LOG = logging.getLogger("vgpu.test_logs")


@attrs.frozen
class Speak(Request[None]):
    """Write a line."""


@attrs.define(eq=False)
class Speaker(Actor):
    """Logs in its own task, and in one of its background tasks."""

    about: Mapping[str, object] = attrs.Factory(dict)

    @property
    def subject(self) -> Mapping[str, object]:
        return self.about

    @handles(Speak)
    def speak(self, message: Speak) -> None:
        LOG.warning("spoken by %s", "itself")


class Lines(io.StringIO):
    """A stream whose lines are looked at."""

    def objects(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.getvalue().splitlines()]


@pytest.fixture
def lines(request: pytest.FixtureRequest) -> Iterator[Lines]:
    """What is written while the test runs, in the format the test asks for."""
    stream = Lines()
    handler = make_handler(request.param, stream, {})
    LOG.addHandler(handler)
    before, LOG.propagate = LOG.propagate, False
    yield stream
    LOG.removeHandler(handler)
    LOG.propagate = before


@pytest.mark.parametrize("lines", ["json"], indirect=True)
async def test_an_object_a_line_says_when_what_and_who(lines: Lines) -> None:
    LOG.error("no actor\nat all")
    async with open_system() as system:
        about = {"vm": "red", "session": 7}
        knowing = await system.spawn(ActorSpec("a/knowing", lambda: Speaker(about)))
        await knowing.ask(Speak())
        plain = await system.spawn(ActorSpec("a/plain", Speaker))
        await plain.ask(Speak())
    LOG.info("not at this level")
    LOG.warning("said", extra={"vm": "blue"})
    first, second, third, last = lines.objects()
    assert (first["level"], first["logger"], first["message"]) == ("error", LOG.name, "no actor\nat all")
    assert str(first["time"]).endswith("+00:00")
    assert not {"actor", "vm", "session"} & set(first)
    assert {name: second[name] for name in ("actor", "vm", "session", "message")} == {
        "actor": "a/knowing", "vm": "red", "session": 7, "message": "spoken by itself",
    }  # fmt: skip
    assert third["actor"] == "a/plain"
    assert "vm" not in third
    assert last["vm"] == "blue"


@pytest.mark.parametrize("lines", ["json"], indirect=True)
def test_an_exception_is_part_of_its_object(lines: Lines) -> None:
    try:
        raise ValueError("of a value")
    except ValueError:
        LOG.exception("it went wrong")
    (entry,) = lines.objects()
    assert "ValueError: of a value" in str(entry["exception"])


@pytest.mark.parametrize("lines", ["text"], indirect=True)
def test_text_says_who_at_the_end_of_the_line(lines: Lines) -> None:
    LOG.warning("slow", extra={"vm": "red", "session": 3})
    assert lines.getvalue().endswith("WARNING vgpu.test_logs: slow [vm=red session=3]\n")
    assert not lines.getvalue().startswith("<")


@pytest.mark.parametrize("lines", ["text"], indirect=True)
def test_nobody_elses_words_forge_a_line_or_reach_a_terminal(lines: Lines) -> None:
    evil = "x\n2026-01-01 00:00:00,000 ERROR vgpu.mediator: forged\x1b[2J\x9b\udcff"
    LOG.warning("quarantined: %s", evil, extra={"vm": evil})
    try:
        raise ValueError(evil)
    except ValueError:
        LOG.exception("it went wrong")
    text = lines.getvalue()
    text.encode()
    assert all(line.isprintable() for line in text.split("\n"))
    first, second, *exception = text.splitlines()
    assert first.count(r"x\n2026-01-01") == 2
    assert "it went wrong" in second
    assert exception
    assert all(line.startswith("  ") for line in exception)
    assert any("forged" in line for line in exception)


def test_the_journal_gets_priorities_on_every_line_and_nobody_else_does() -> None:
    """As systemd does it: the word in the environment names the very stream."""
    program = (
        "import logging, os, sys\n"
        "from vgpu.logs import make_handler\n"
        "logging.basicConfig(level='DEBUG', handlers=[make_handler('text', sys.stderr, os.environ)])\n"
        "log = logging.getLogger('x')\n"
        "log.info('one'); log.error('two\\nthree', exc_info=ValueError('of\\ntwo lines')); log.debug('four'); log.critical('five')\n"
    )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        found = os.fstat(theirs.fileno())
        for stream, is_ours in ((f"{found.st_dev}:{found.st_ino}", True), ("1:1", False)):
            done = subprocess.run(
                [sys.executable, "-P", "-c", program],
                stderr=theirs.fileno(), env={**os.environ, "JOURNAL_STREAM": stream}, timeout=60, check=False,
            )  # fmt: skip
            text = ours.recv(65536).decode()
            assert done.returncode == 0, text
            if is_ours:
                assert (
                    text == "<6>INFO x: one\n<3>ERROR x: two\\nthree\n<3>  ValueError: of\n<3>  two lines\n"
                    "<7>DEBUG x: four\n<2>CRITICAL x: five\n"
                )
            else:
                assert "<" not in text
                assert "ERROR x: two" in text


def test_a_stream_without_a_descriptor_is_not_the_journal() -> None:
    assert not is_journal(io.StringIO(), {"JOURNAL_STREAM": "1:2"})
    assert not is_journal(sys.__stderr__ or io.StringIO(), {})


# -- every line that names a VM or a session says so in its fields

ROOT = Path(__file__).resolve().parents[2]
LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}
# How the code calls what it has at hand.
NAMED = {"vm": "vm", "session": "session", "session_id": "session"}


def unsaid(source: str) -> list[str]:
    """Log calls that put a VM or a session into their text, and neither pass ``extra`` nor are of an actor that knows it."""
    found: list[str] = []

    def look(node: ast.AST, known: set[str]) -> None:
        if isinstance(node, ast.ClassDef):
            subjects = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "subject"]
            constants = {c.value for f in subjects for c in ast.walk(f) if isinstance(c, ast.Constant)}
            known = {field for field in ("vm", "session") if field in constants}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            is_log = ast.unparse(node.func.value).endswith("log") and node.func.attr in LEVELS
            names = {
                NAMED[name]
                for argument in (node.args if is_log else ())
                for part in ast.walk(argument)
                for name in (getattr(part, "attr", None), getattr(part, "id", None))
                if name in NAMED
            }
            if names - known and "extra" not in {keyword.arg for keyword in node.keywords}:
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        for child in ast.iter_child_nodes(node):
            look(child, known)

    look(ast.parse(source), set())
    return found


def test_whoever_names_a_vm_or_a_session_says_so_in_fields() -> None:
    found = [
        f"{path.relative_to(ROOT)}, {what}"
        for folder in ("actors", "supervision", "transport", "gpu", "src/vgpu")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for what in unsaid(path.read_text())
    ]
    assert found == [], 'pass extra={"vm": ..., "session": ...} to these'


def test_the_look_at_the_code_sees_what_it_should() -> None:
    assert unsaid("_log.info('of %s', record.vm)")
    assert unsaid("log.error('of %s', vm.name)")
    assert not unsaid("_log.info('of %s', record.vm, extra={'vm': record.vm})")
    assert not unsaid("_log.info('of %d', worker.pid)")
    knowing = (
        "class A:\n  def subject(self):\n    return {'vm': self.vm}\n  def f(self):\n    _log.info('', %s)\n"
    )
    assert not unsaid(knowing % "self.vm")
    assert unsaid(knowing % "event.session")
