# SPDX-License-Identifier: Apache-2.0
"""How a command ends that cannot say what it found: its reader has gone, its disk is full, somebody pressed Ctrl-C.

What is printed is buffered, so that a failure may come only as the interpreter ends, as a traceback that nobody can catch: everything
is written before that.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Final

# As a shell says of a program that SIGINT ended.
INTERRUPTED: Final = 130


def run_command(program: str, work: Callable[[], int]) -> int:
    """Do the work and write out what it printed; its status, 0 where the reader had seen enough, 1 where writing failed."""
    try:
        status = work()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return 0
    except OSError as error:
        _drop_output()
        what = error.strerror or str(error)
        where = f"{error.filename}: {what}" if error.filename else f"cannot write to standard output: {what}"
        print(f"{program}: {where}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return status


def parse_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """What the command line says. ``--help`` and its like end the process here, with 1 where their words could not be written.

    argparse itself does not look whether they could.
    """
    words = io.StringIO()
    try:
        with contextlib.redirect_stdout(words):
            return parser.parse_args(arguments)
    except SystemExit as end:
        if not words.getvalue():
            raise  # wrong use, which is told on standard error
        status = run_command(parser.prog, lambda: _write(words.getvalue()))
        raise SystemExit(end.code or status) from None


def _write(text: str) -> int:
    if sys.stdout is not None:
        sys.stdout.write(text)
    return 0


def _drop_output() -> None:
    """What is left in the buffer goes nowhere, or it would fail once more as the interpreter ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
