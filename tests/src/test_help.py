# SPDX-License-Identifier: Apache-2.0
"""Every command and every subcommand says what it is for, its version, and shows examples that it understands itself."""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
from collections.abc import Iterator

import pytest

from vgpu import __version__, admin_main, guest_main, mediator_main, run_main, trace_main
from vgpu.admin_examples import EXAMPLES

PROGRAMS = {
    "run-mediator": mediator_main.build_parser,
    "vgpu-run": run_main.build_parser,
    "vgpu-admin": admin_main.build_parser,
    "vgpu-guest": guest_main.build_parser,
    "vgpu-trace": trace_main.build_parser,
}


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


def all_parsers() -> Iterator[tuple[str, ...]]:
    for program, build in PROGRAMS.items():
        yield (program,)
        for name in subparsers(build()):
            yield (program, name)


def parse(program: str, words: list[str]) -> tuple[argparse.Namespace | None, int, str]:
    """What becomes of the words; the status and the text where the parser ends the program."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            return PROGRAMS[program]().parse_args(words), 0, ""
        except SystemExit as end:
            return None, int(end.code or 0), out.getvalue() + errors.getvalue()


def examples(text: str) -> list[str]:
    lines = text.partition("examples:\n")[2].splitlines()
    return [line.strip() for line in lines if line.startswith("  ")]


def test_there_are_as_many_as_are_promised() -> None:
    found = list(all_parsers())
    assert {name for name, *_ in found} == set(PROGRAMS)
    assert {words[1] for words in found if words[0] == "vgpu-admin" and len(words) > 1} == set(EXAMPLES)
    assert {words[1] for words in found if words[0] == "vgpu-trace" and len(words) > 1} == {
        "record", "tree", "top", "convert",
    }  # fmt: skip
    assert len(found) > 35


@pytest.mark.parametrize("words", list(all_parsers()), ids=" ".join)
def test_it_has_help_with_examples_it_understands(words: tuple[str, ...]) -> None:
    program, *rest = words
    _, status, text = parse(program, [*rest, "--help"])
    assert status == 0
    assert text.startswith(f"usage: {' '.join(words)} ")
    shown = examples(text)
    assert shown
    for line in shown:
        line = line.partition("  ")[0].removeprefix("sudo ")
        said = shlex.split(line)
        assert said[: len(words)] == list(words), line
        found, status, why = parse(program, said[1:])
        assert (status, why) == (0, ""), line
        assert found is not None


@pytest.mark.parametrize("words", list(all_parsers()), ids=" ".join)
def test_it_tells_its_version(words: tuple[str, ...]) -> None:
    program, *rest = words
    _, status, text = parse(program, [*rest, "--version"])
    assert (status, text) == (0, f"{program} {__version__}\n")


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_is_explained(program: str) -> None:
    parser = PROGRAMS[program]()
    for name, own in {"": parser, **subparsers(parser)}.items():
        assert own.description, (program, name)
        for action in own._actions:
            if isinstance(action, argparse._SubParsersAction):
                continue
            assert action.help, (program, name, action.option_strings or action.dest)
