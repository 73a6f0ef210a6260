# SPDX-License-Identifier: Apache-2.0
"""The log: objects for programs, priorities for the journal, and who it was about."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping

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
