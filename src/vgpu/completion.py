# SPDX-License-Identifier: Apache-2.0
"""Tab completion for bash, zsh and fish, out of the argparse parsers themselves.

``--print-completion SHELL`` prints what the shell has to read once; from then on the shell runs the command
with ``_ARGCOMPLETE`` set and argcomplete answers from the parser. A command that is simply run does not even
import argcomplete.
"""

from __future__ import annotations

import argparse
import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHELLS = ("bash", "zsh", "fish")


class PrintCompletion(argparse.Action):
    """``--print-completion SHELL``: print and end, like ``--version``."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        from argcomplete.shell_integration import shellcode

        print(shellcode([parser.prog], shell=str(values)))
        parser.exit()


def add_completion_option(parser: argparse.ArgumentParser) -> None:
    """Give a command its ``--print-completion``."""
    parser.add_argument(
        "--print-completion",
        choices=SHELLS,
        action=PrintCompletion,
        metavar="SHELL",
        help="print tab completion for bash, zsh or fish, and end",
    )


def complete_if_asked(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and end the process, if it is the shell that asks. Call it before parsing."""
    if "_ARGCOMPLETE" in os.environ:
        from argcomplete import autocomplete

        autocomplete(parser)


def programs(prefix: str, **_: object) -> list[str]:
    """What could be run: commands on the search path, or files once there is a slash. For argcomplete."""
    if "/" in prefix:
        found = glob.glob(f"{glob.escape(prefix)}*")
        return sorted(f"{name}/" if os.path.isdir(name) else name for name in found)
    names: set[str] = set()
    for folder in os.get_exec_path():
        for path in Path(folder).glob(f"{glob.escape(prefix)}*"):
            if path.is_file() and os.access(path, os.X_OK):
                names.add(path.name)
    return sorted(names)
