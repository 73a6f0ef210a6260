# SPDX-License-Identifier: Apache-2.0
"""Arguments that several of ``vgpu-admin``'s commands have, and what is said of those that cannot be meant."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from vgpu.admin_client import AdminClient, NoMediator, RequestRefused
from vgpu.paths import run_directory
from vgpu.units import parse_seconds, parse_size


class WrongUse(Exception):
    """Asked for something that cannot be meant, which argparse could not see; the exit status is 2."""


def quantity(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """As argparse wants it: its message names the option, ours the value."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


size = quantity(parse_size)
seconds = quantity(parse_seconds)
whole = quantity(int)


def vm_name(parser: argparse.ArgumentParser) -> None:
    """``--vm-name`` of a VM that is there, with tab completion."""
    name = parser.add_argument("--vm-name", required=True, metavar="NAME", help="which VM")
    name.completer = registered  # type: ignore[attr-defined]  # argcomplete looks for it there


def registered(parsed_args: argparse.Namespace, **_: object) -> list[str]:
    """Names of VMs, for tab completion; none where no mediator answers."""
    try:
        with AdminClient(parsed_args.run_dir or run_directory(os.environ)) as client:
            return [vm["name"] for vm in client.ask("vms")]
    except (NoMediator, RequestRefused):
        return []
