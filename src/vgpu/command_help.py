# SPDX-License-Identifier: Apache-2.0
"""What every command and every subcommand says about itself: ``--version``, and examples below its options."""

from __future__ import annotations

import argparse

from vgpu import __version__


def add_words(parser: argparse.ArgumentParser, examples: tuple[str, ...]) -> None:
    """Give a subcommand's parser its ``--version`` and the examples in its ``--help``.

    examples: whole command lines; a comment may follow two spaces and a ``#``.
    """
    program = parser.prog.split()[0]
    parser.add_argument("--version", action="version", version=f"{program} {__version__}")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(("examples:", *(f"  {line}" for line in examples)))
