# SPDX-License-Identifier: Apache-2.0
"""``vgpu-admin``: the administrator's tool. Asks a running mediator; what it changes holds at once and across restarts.

Ends with 0, with 1 if it could not be done, with 2 if it was told what cannot be meant.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vgpu import __version__
from vgpu.admin_arguments import NotDone, WrongUse
from vgpu.admin_client import AdminClient, NoMediator, RequestRefused
from vgpu.admin_commands import COMMANDS
from vgpu.admin_examples import EXAMPLES as COMMAND_EXAMPLES
from vgpu.admin_seeing import SEEING
from vgpu.admin_tables import say
from vgpu.command_help import add_words
from vgpu.completion import add_completion_option, complete_if_asked
from vgpu.paths import run_directory
from vgpu.standard_output import parse_arguments, run_command
from vgpu.transport.text import printable_lines

EXAMPLES = """examples:
  vgpu-admin register-vm --vm-name=user1 --pool=A --priority=high --memory=20GiB
  vgpu-admin register-vm --vm-name=user2 --bus=pcie --bar1=1GiB --slots=16
  vgpu-admin list-vms
  vgpu-admin set-rate-limit --vm-name=user1 --rate=200 --queue-depth=100
  vgpu-admin set-memory --vm-name=user1 --memory=8GiB
  vgpu-admin show-vm --vm-name=user1 --json
  vgpu-admin kill-session 12
  vgpu-admin top
  vgpu-admin doctor
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="vgpu-admin",
        description="Register VMs with a running mediator, and see what it does.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vgpu-admin {__version__}")
    add_completion_option(parser)
    _add_common(parser, None, False)
    # main asks for it: argparse would, of an option that nobody knows, only say that there is no command.
    commands = parser.add_subparsers(dest="command", required=False, metavar="COMMAND")
    for command in (*COMMANDS, *SEEING):
        own = commands.add_parser(command.name, help=command.help, description=f"{command.help}.")
        command.options(own)
        # Before the command or behind it: the one that is said counts.
        _add_common(own, argparse.SUPPRESS, argparse.SUPPRESS)
        add_words(own, COMMAND_EXAMPLES[command.name])
        own.set_defaults(row=command)
    return parser


def _add_common(parser: argparse.ArgumentParser, run_dir: object, as_json: object) -> None:
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=run_dir,
        help="where the mediator's sockets are (default: /var/vgpu, for users $XDG_RUNTIME_DIR/vgpu)",
    )
    parser.add_argument("--json", action="store_true", default=as_json, help="print JSON, for programs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: see above."""
    parser = build_parser()
    complete_if_asked(parser)
    options = parse_arguments(parser, arguments)
    if options.command is None:
        parser.error("the following arguments are required: COMMAND")
    return run_command("vgpu-admin", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    try:
        if options.row.run is not None:
            return int(options.row.run(options))
        with AdminClient(options.run_dir or run_directory(os.environ)) as client:
            answer = options.row.ask(client, options)
    except RequestRefused as error:
        print(printable_lines(f"vgpu-admin: {error}"), file=sys.stderr)
        return 2 if error.is_wrong_use else 1
    except WrongUse as error:
        print(printable_lines(f"vgpu-admin: {error}"), file=sys.stderr)
        return 2
    except (NoMediator, NotDone) as error:
        print(printable_lines(f"vgpu-admin: {error}"), file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(answer, indent=2))
    else:
        say(options.row.show(answer))
    return 0 if options.row.is_good(answer) else 1


if __name__ == "__main__":
    raise SystemExit(main())
