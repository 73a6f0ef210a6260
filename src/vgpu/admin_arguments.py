# SPDX-License-Identifier: Apache-2.0
"""Arguments that several of ``vgpu-admin``'s commands have, and what is said of those that cannot be meant."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable
from typing import Any

from vgpu.admin_client import AdminClient, NoMediator, RequestRefused
from vgpu.paths import run_directory
from vgpu.units import parse_seconds, parse_size


class NotDone(Exception):
    """What was asked for is not so, although nothing was wrong with asking; the text says what to do."""


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


def _parse_whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is no whole number") from None


size = quantity(parse_size)
seconds = quantity(parse_seconds)
whole = quantity(_parse_whole)


def vm_name(parser: argparse.ArgumentParser) -> None:
    """``--vm-name`` of a VM that is there, with tab completion."""
    name = parser.add_argument("--vm-name", required=True, metavar="NAME", help="which VM")
    name.completer = registered  # type: ignore[attr-defined]  # argcomplete looks for it there


def registered(parsed_args: argparse.Namespace, **_: object) -> list[str]:
    """Names of VMs, for tab completion; none where no mediator answers."""
    try:
        with AdminClient(parsed_args.run_dir or run_directory(os.environ), lambda text: None) as client:
            return [vm["name"] for vm in client.ask("vms")]
    except (NoMediator, RequestRefused):
        return []


def pool_name(parser: argparse.ArgumentParser) -> None:
    """``--pool`` of one that is there, with tab completion."""
    name = parser.add_argument("--pool", required=True, metavar="NAME", help="which pool")
    name.completer = pools  # type: ignore[attr-defined]  # argcomplete looks for it there


def new_vm_pool(parser: argparse.ArgumentParser) -> None:
    """``--pool`` of a VM that is being registered; one that is not there is made."""
    name = parser.add_argument("--pool", help="the pool it belongs to (default: default)")
    name.completer = pools  # type: ignore[attr-defined]  # argcomplete looks for it there


def live_session(parser: argparse.ArgumentParser) -> None:
    """The number of a session that lives, with tab completion."""
    number = parser.add_argument(
        "session", type=whole, metavar="ID", help="its number, as list-sessions shows it"
    )
    number.completer = live_sessions  # type: ignore[attr-defined]  # argcomplete looks for it there


def live_sessions(parsed_args: argparse.Namespace, **_: object) -> list[str]:
    """Numbers of sessions that live, for tab completion; none where no mediator answers."""
    try:
        with AdminClient(parsed_args.run_dir or run_directory(os.environ), lambda text: None) as client:
            return [str(s["info"]["session"]) for s in client.ask("sessions") if not s["ended"]]
    except (NoMediator, RequestRefused):
        return []


def pools(parsed_args: argparse.Namespace, **_: object) -> list[str]:
    """Names of pools, for tab completion; none where no mediator answers."""
    try:
        with AdminClient(parsed_args.run_dir or run_directory(os.environ)) as client:
            return [pool["name"] for pool in client.ask("pools")]
    except (NoMediator, RequestRefused):
        return []


def refuse_stranger(client: AdminClient, name: str, what: str, remedy: str = "") -> None:
    """Do nothing where the name is of a VM that is there, or once was.

    Raises:
        NotDone: nobody has had it; the text is ``VM NAME WHAT``, names like it, and the remedy.
        RequestRefused: it cannot be a VM's name.
    """
    names = {vm["name"] for vm in client.ask("vms")}
    # Before anything else, so that a name that cannot be one is told as that.
    has_faults = bool(client.ask("faults", vm_name=name, limit=1))
    names |= set(client.ask("quarantine_rules"))
    names |= {quarantine["vm"] for quarantine in client.ask("quarantines", all=True)}
    if name in names or has_faults:
        return
    near = difflib.get_close_matches(name, sorted(names), 5, 0.5)
    hint = f"names like it: {', '.join(near)}" if near else "vgpu-admin list-vms has those there are"
    raise NotDone(f"VM {name!r} {what}: {hint}{remedy}")
