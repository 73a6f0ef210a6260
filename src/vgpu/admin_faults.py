# SPDX-License-Identifier: Apache-2.0
"""``vgpu-admin``'s commands about faults and quarantine: their options, what they ask, and their text for people."""

from __future__ import annotations

import argparse
import getpass
import time
from typing import Any

from vgpu.admin_arguments import NotDone, WrongUse, refuse_stranger, registered, seconds, vm_name, whole
from vgpu.admin_client import AdminClient
from vgpu.units import show_seconds, show_table

CALLS_SHOWN = 16
DEFAULT_WITHIN = 600.0


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def faults_options(parser: argparse.ArgumentParser) -> None:
    """Which faults."""
    name = parser.add_argument("--vm-name", metavar="NAME", help="of this VM only")
    name.completer = registered  # type: ignore[attr-defined]  # argcomplete looks for it there
    parser.add_argument("--fault", type=whole, metavar="N", help="this one, with its session's last calls")
    parser.add_argument(
        "--limit", type=whole, default=100, metavar="N", help="the last N of them (default 100, at most 1000)"
    )


def faults(client: AdminClient, options: argparse.Namespace) -> Any:
    """The faults asked for; all their details."""
    asked = {"vm_name": options.vm_name, "fault": options.fault}
    found = client.ask("faults", limit=options.limit, **{k: v for k, v in asked.items() if v is not None})
    if options.fault is not None and not found:
        of = f" of VM {options.vm_name}" if options.vm_name is not None else ""
        raise NotDone(f"no fault {options.fault}{of} is kept; vgpu-admin show-faults has those there are")
    if options.vm_name is not None and not found:
        refuse_stranger(client, options.vm_name, "has no faults")
    return found


def show_faults(answer: Any) -> str:
    """A table, and of a single fault everything."""
    rows: list[tuple[object, ...]] = [
        (
            fault["fault"],
            _when(fault["at"]),
            fault["vm"],
            fault["session"],
            fault["guest_pid"],
            fault["program"] or "-",
            fault["kind"],
            fault["error"],
            _kernel(fault["details"]),
            fault["what"],
        )
        for fault in answer
    ]
    header = ("FAULT", "WHEN", "VM", "SESSION", "PID", "PROGRAM", "KIND", "ERROR", "KERNEL", "WHAT")
    text = show_table(header, rows)
    return f"{text}\n\n{_details(answer[0]['details'])}" if len(answer) == 1 else text


def _shape(sizes: Any) -> str:
    return "x".join(map(str, sizes))


def _kernel(details: Any) -> str:
    if "kernel" not in details:
        return "-"
    guess = " (the last one launched)" if details.get("is_last_launch") else ""
    shape = f" {_shape(details['grid'])} of {_shape(details['block'])}" if details["grid"] else ""
    return f"{details['kernel']}{shape}{guess}"


def _details(details: Any) -> str:
    lines = []
    if "age_seconds" in details:
        lines.append(f"hung for {show_seconds(details['age_seconds'])}")
    calls = details.get("calls", [])
    if calls:
        lines.append(f"the last of {details['calls_in_all']} calls:")
        rows: list[tuple[object, ...]] = [
            (
                f"-{call['ago_seconds']:.3f} s",
                call["call"],
                _kernel(call),
                "not done" if call["status"] is None else call["status"],
            )
            for call in calls[-CALLS_SHOWN:]
        ]
        lines.append(show_table(("TIME", "CALL", "KERNEL", "RESULT"), rows))
    return "\n".join(lines)


def _force_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="also for a name that nobody has had yet")


def quarantine_options(parser: argparse.ArgumentParser) -> None:
    """Whom, and why."""
    vm_name(parser)
    _force_option(parser)
    parser.add_argument("--reason", required=True, metavar="TEXT", help="why; it is kept and shown")


def quarantine(client: AdminClient, options: argparse.Namespace) -> Any:
    """Begin one."""
    if not options.force:
        refuse_stranger(client, options.vm_name, "has never been seen", "; --force does it all the same")
    return client.ask("quarantine", vm_name=options.vm_name, reason=options.reason, by=_me())


def quarantine_words(record: Any) -> str:
    """``quarantined by whom since when: why``."""
    return f"quarantined by {record['by']} since {_when(record['began'])}: {record['reason']}"


def show_quarantine(answer: Any) -> str:
    """What is in force now."""
    return f"VM {answer['vm']} is {quarantine_words(answer)}"


def clear_quarantine(client: AdminClient, options: argparse.Namespace) -> Any:
    """End one."""
    return client.ask("clear_quarantine", vm_name=options.vm_name, by=_me())


def show_cleared(answer: Any) -> str:
    """That it is over."""
    return f"VM {answer['vm']} may have the GPU again; it was quarantined since {_when(answer['began'])}: {answer['reason']}"


def quarantines_options(parser: argparse.ArgumentParser) -> None:
    """Which ones."""
    parser.add_argument("--all", action="store_true", help="those that are over, too")


def quarantines(client: AdminClient, options: argparse.Namespace) -> Any:
    """Those in force, or all."""
    return client.ask("quarantines", all=options.all)


def show_quarantines(answer: Any) -> str:
    """A table."""
    rows: list[tuple[object, ...]] = [
        (
            record["vm"],
            _when(record["began"]),
            record["by"],
            record["reason"],
            f"{_when(record['ended'])} by {record['ended_by']}" if record["ended"] else "in force",
        )
        for record in answer
    ]
    return show_table(("VM", "SINCE", "BY", "REASON", "ENDED"), rows)


def rule_options(parser: argparse.ArgumentParser) -> None:
    """Whose, and what."""
    vm_name(parser)
    _force_option(parser)
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument("--faults", type=whole, metavar="N", help="so many quarantine it; 0: none ever do")
    rule.add_argument("--default", action="store_true", help="what the mediator's configuration says")
    parser.add_argument("--within", type=seconds, metavar="TIME", help="in so long (default 10m)")


def set_rule(client: AdminClient, options: argparse.Namespace) -> Any:
    """Keep it."""
    if not options.force and not options.default:
        refuse_stranger(client, options.vm_name, "has never been seen", "; --force does it all the same")
    if options.default:
        if options.within is not None:
            raise WrongUse(
                "--within goes with --faults; --default takes both from the mediator's configuration"
            )
        return client.ask("set_quarantine_rule", vm_name=options.vm_name)
    within = DEFAULT_WITHIN if options.within is None else options.within
    return client.ask("set_quarantine_rule", vm_name=options.vm_name, faults=options.faults, seconds=within)


def show_rule(answer: Any) -> str:
    """What is in force now."""
    rule = answer["rule"]
    if rule is None:
        return f"VM {answer['vm']} has the mediator's rule"
    if not rule["faults"]:
        return f"VM {answer['vm']} is quarantined by an administrator only"
    return (
        f"VM {answer['vm']} is quarantined after {rule['faults']} faults in {show_seconds(rule['seconds'])}"
    )


def _me() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "administrator"
