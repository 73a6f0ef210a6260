# SPDX-License-Identifier: Apache-2.0
"""``vgpu-admin top``: who uses the GPU now, how much of it, and what holds the others back.

Rates come from two looks at a mediator and the time between them; values in, tables out, and one function that draws. On a
terminal it redraws until ``q``; anywhere else it prints plain tables, with ``--json`` a line of JSON for each look.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import attrs

from vgpu.admin_client import AdminClient
from vgpu.paths import run_directory
from vgpu.time_shares import PARTS, time_percent
from vgpu.trace_views import Table, as_text
from vgpu.transport.text import printable
from vgpu.units import show_seconds, show_size

# A day: what sleeps longer is not looking.
LONGEST_SECONDS = 86400.0
SENSORS = (
    ("gpu_utilization_percent", "busy {:.0f} %", 1),
    ("card_memory_used_bytes", "memory {}", None),
    ("card_memory_total_bytes", "of {}", None),
    ("temperature_celsius", "{:.0f} °C", 1),
    ("power_milliwatts", "{:.0f} W", 1e-3),
    ("power_limit_milliwatts", "of {:.0f} W", 1e-3),
    ("sm_clock_mhz", "{:.0f} MHz", 1),
)


@attrs.frozen
class Look:
    """A mediator at one moment, as it answered."""

    at_ns: int
    vms: list[dict[str, Any]]
    devices: list[dict[str, Any]]
    sessions: list[dict[str, Any]]  # those that live
    schedules: dict[str, dict[str, Any]]
    accounts: list[dict[str, Any]]
    quarantines: list[dict[str, Any]]
    gpu: dict[str, Any] | None
    health: dict[str, Any]
    gpu_time: dict[str, Any] = attrs.Factory(dict)  # windows by GPU


def look_at(client: AdminClient) -> Look:
    """Ask.

    Raises:
        NoMediator: there is none any more.
    """
    return Look(
        time.monotonic_ns(),
        client.ask("vms"),
        client.ask("devices"),
        [s for s in client.ask("sessions") if not s["ended"]],
        client.ask("schedule"),
        client.ask("accounts"),
        client.ask("quarantines"),
        client.ask("gpu"),
        client.ask("health"),
        client.ask("gpu_time"),
    )


def rates(before: Look, now: Look) -> dict[str, Any]:
    """What ``--json`` prints: rates between two looks. A session that was not there before has none yet: 0."""
    earlier = {s["info"]["session"]: s for s in before.sessions}
    sessions = [_session(s, earlier.get(s["info"]["session"])) for s in now.sessions]
    sessions.sort(key=lambda s: (-s["gpu_percent"], -s["calls_per_second"], s["session"]))
    vms = [_vm(vm, now, [s for s in sessions if s["vm"] == vm["name"]]) for vm in now.vms]
    vms.sort(key=lambda v: (-v["gpu_percent"], -v["calls_per_second"], -v["sessions"], v["name"]))
    return {
        "seconds": (now.at_ns - before.at_ns) / 1e9,
        "ok": now.health["ok"],
        "trouble": now.health.get("trouble", []),
        "kind": now.health["gpu"],
        "gpu": now.gpu,
        "gpu_time": now.gpu_time,
        "vms": vms,
        "sessions": sessions,
    }


def _session(sample: dict[str, Any], old: dict[str, Any] | None) -> dict[str, Any]:
    info, grant = sample["info"], sample["grant"]
    was = grant if old is None else old["grant"]
    nanoseconds: int = max(sample["taken_ns"] - (0 if old is None else old["taken_ns"]), 1)

    def per_second(field: str) -> float:
        risen: int = max(grant[field] - was[field], 0)
        return risen * 1e9 / nanoseconds

    return {
        "session": info["session"],
        "vm": info["vm"],
        "program": info["program"],
        "pid": info["guest_pid"],
        "gpu_percent": min(per_second("gpu_ns") / 1e7, 100.0),
        "lease_wait_percent": min(per_second("lease_wait_ns") / 1e7, 100.0),
        "time_percent": time_percent(old, sample),
        "calls_per_second": per_second("records"),
        "bytes_per_second": per_second("bytes_to_device") + per_second("bytes_from_device"),
        "memory_used_bytes": grant["memory_used_bytes"],
        "gpu_seconds": grant["gpu_ns"] / 1e9,
        "sticky_error": sample["guest"]["sticky_error"],
    }


def _vm(vm: dict[str, Any], now: Look, sessions: list[dict[str, Any]]) -> dict[str, Any]:
    name = vm["name"]
    states = [
        pool["vms"][name]
        for schedule in now.schedules.values()
        for pool in schedule["pools"].values()
        if name in pool["vms"]
    ]
    waiting = sum(state["waiting"] for state in states)
    return {
        "name": name,
        "pool": vm["pool"],
        "priority": vm["priority"],
        "weight": vm["weight"],
        "sessions": len(sessions),
        "gpu_percent": sum(s["gpu_percent"] for s in sessions),
        # Of all the GPUs shared; a VM's sessions may be on several.
        "share_percent": 100
        * sum(state["configured_share"] for state in states)
        / max(len(now.schedules), 1),
        "calls_per_second": sum(s["calls_per_second"] for s in sessions),
        "memory_used_bytes": sum(s["memory_used_bytes"] for s in sessions),
        "memory_limit_bytes": vm["memory_limit_bytes"],
        "state": _state(name, now, sessions, waiting),
    }


def _state(name: str, now: Look, sessions: list[dict[str, Any]], waiting: int) -> str:
    """The most important thing to say of a VM, in a word or two."""
    if any(q["vm"] == name for q in now.quarantines):
        return "quarantined"
    device = next((d for d in now.devices if d["vm"] == name), None)
    if device is not None and not device["running"]:
        return "no device"
    if any(s["sticky_error"] for s in sessions):
        return "failed"
    if any(a["vm"] == name and a["is_held_back"] for a in now.accounts):
        return "held back"
    if any(s["gpu_percent"] >= 1 for s in sessions):
        return "computes"
    if waiting:
        return "waits for GPU"
    if sessions:
        return "idle"
    return "VM is off" if device is not None and not device["connected"] else "-"


def _counted(gpu_time: dict[str, Any]) -> list[str]:
    """The first GPU's last seconds, as workers count them: beside what the card says of itself."""
    windows = gpu_time.get("0") or []
    return [f"(counted {100 * windows[0]['counted_ratio']:.0f} %)"] if windows else []


def summary(found: dict[str, Any]) -> str:
    """The line above the tables."""
    words = []
    for field, form, factor in SENSORS:
        value = (found["gpu"] or {}).get(field)
        if value is not None:
            words.append(form.format(show_size(value) if factor is None else value * factor))
            if field == "gpu_utilization_percent":
                words += _counted(found["gpu_time"])
    sensors = " ".join(words).replace(" of ", "/") if words else "no sensors"
    line = f"GPU ({found['kind']}): {sensors}   VMs: {len(found['vms'])}   sessions: {len(found['sessions'])}"
    return line if found["ok"] else f"{line}\nNOT WELL: {printable('; '.join(found['trouble']))}"


def tables(found: dict[str, Any], limit: int = 40) -> tuple[Table, Table, Table]:
    """VMs, then sessions, the busiest first, then where the time of the sessions' programs goes, as their guests say."""
    vms = tuple(
        (
            vm["name"],
            vm["pool"],
            vm["priority"],
            str(vm["weight"]),
            f"{vm['gpu_percent']:.0f}",
            f"{vm['share_percent']:.0f}" if vm["share_percent"] else "-",
            show_size(vm["memory_used_bytes"])
            + (f"/{show_size(vm['memory_limit_bytes'])}" if vm["memory_limit_bytes"] else ""),
            f"{vm['calls_per_second']:.0f}",
            str(vm["sessions"]),
            vm["state"],
        )
        for vm in found["vms"][:limit]
    )
    sessions = tuple(
        (
            str(s["session"]),
            s["vm"],
            str(s["pid"]),
            s["program"] or "-",
            f"{s['gpu_percent']:.0f}",
            f"{s['lease_wait_percent']:.0f}",
            f"{s['calls_per_second']:.0f}",
            f"{show_size(int(s['bytes_per_second']))}/s",
            show_size(s["memory_used_bytes"]),
            show_seconds(s["gpu_seconds"]),
        )
        for s in found["sessions"][:limit]
    )
    times = tuple(
        (str(s["session"]), s["vm"], *(f"{s['time_percent'][part]:.0f}" for part in (*PARTS, "own")))
        for s in found["sessions"][:limit]
    )
    return (
        Table("VMs", ("VM", "POOL", "PRIORITY", "WEIGHT", "GPU %", "SHARE %", "MEMORY", "CALLS/S", "SESSIONS", "STATE"), vms),
        Table(
            "sessions",
            ("SESSION", "VM", "PID", "PROGRAM", "GPU %", "WAITS %", "CALLS/S", "COPIES", "MEMORY", "GPU TIME"),
            sessions,
        ),
        Table(
            "where programs' time goes, as their guests say",
            ("SESSION", "VM", *(f"{part.upper()} %" for part in PARTS), "OWN %"),
            times,
        ),
    )  # fmt: skip


def top_options(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("--once", action="store_true", help="show it once and end")
    parser.add_argument(
        "--interval", type=_positive, default=1.0, metavar="SECONDS", help="between two looks (default 1)"
    )


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= LONGEST_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of up to {LONGEST_SECONDS:g}")
    return value


def run_top(options: argparse.Namespace) -> int:
    """Show it until the reader has seen enough.

    Raises:
        NoMediator: there is none, or it has ended.
    """
    with AdminClient(options.run_dir or run_directory(os.environ)) as client:
        before = look_at(client)

        def look() -> dict[str, Any]:
            nonlocal before
            now = look_at(client)
            found, before = rates(before, now), now
            return found

        try:
            if sys.stdout.isatty() and not options.json and not options.once:
                return _live(look, options.interval)
            return _plain(look, options)
        except KeyboardInterrupt:
            return 0


def _plain(look: Callable[[], dict[str, Any]], options: argparse.Namespace) -> int:
    while True:
        time.sleep(options.interval)
        found = look()
        if options.json:
            print(json.dumps(found, indent=2 if options.once else None), flush=True)
        else:
            print(f"{summary(found)}\n\n{as_text(*tables(found))}", flush=True)
        if options.once:
            return 0
        if not options.json:
            print(flush=True)


def _live(look: Callable[[], dict[str, Any]], interval: float) -> int:
    from rich.live import Live

    with _keys() as quits_within, Live(drawing(look()), screen=True, auto_refresh=False) as live:
        while not quits_within(interval):
            live.update(drawing(look()), refresh=True)
    return 0


def drawing(found: dict[str, Any]) -> Any:
    """The screen: a line about the card, then the tables."""
    from rich.console import Group
    from rich.text import Text

    from vgpu.admin_tables import rich_table

    style = "" if found["ok"] else "bold red"
    drawn = [rich_table(table, title=True) for table in tables(found)]
    return Group(Text(summary(found), style=style), Text(), *drawn, Text("q: quit", style="dim"))


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Waits for so many seconds, or less: was q pressed? Where there is no keyboard it only waits."""
    import termios
    import tty

    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, termios.error):

        def wait(seconds: float) -> bool:
            time.sleep(seconds)
            return False

        yield wait
        return

    def quits(seconds: float) -> bool:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([descriptor], [], [], left)[0]:
                pressed = os.read(descriptor, 64)
                if not pressed or b"q" in pressed.lower():
                    return True
        return False

    tty.setcbreak(descriptor)
    try:
        yield quits
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
