# SPDX-License-Identifier: Apache-2.0
"""What ``vgpu-trace tree`` and ``top`` show: values out of a mediator's answers, and text out of values.

Nothing here asks anybody and nothing draws on a terminal: rates come from two answers and the time between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs

from vgpu.time_shares import time_percent
from vgpu.units import show_size, show_table

__all__ = ["Look", "Table", "as_text", "dead_letter_lines", "top_json", "top_tables", "tree_lines"]

# Shares of a session's life that its worker can tell (docs/tracing.md), and what is left of it.
SHARES = ("replay_ns", "lease_wait_ns", "gpu_wait_ns")


@attrs.frozen
class Look:
    """A mediator at one moment: what it answered to ``tree``, ``sessions`` and ``trace.activity``."""

    tree: list[dict[str, Any]]
    sessions: list[dict[str, Any]]
    activity: dict[str, Any]


@attrs.frozen
class Table:
    """Rows of words under a header; numbers are words already."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def walk(actors: list[dict[str, Any]], depth: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every actor with its depth in the tree, parents first."""
    for actor in actors:
        yield depth, actor
        yield from walk(actor["children"], depth + 1)


def tree_lines(tree: list[dict[str, Any]]) -> Table:
    """The tree of actors, one line each."""
    rows = []
    for depth, actor in walk(tree):
        mailbox = actor["mailbox"]
        rows.append(
            (
                "  " * depth + actor["name"].rpartition("/")[2],
                actor["kind"],
                actor["state"],
                str(actor["restarts"]),
                "-" if mailbox is None else f"{mailbox['depth']}/{mailbox['capacity']}",
                "-" if mailbox is None else str(mailbox["high_water"]),
                "-" if mailbox is None else str(mailbox["received"]),
                _age(actor["age_seconds"]),
            )
        )
    header = ("ACTOR", "KIND", "STATE", "RESTARTS", "MAILBOX", "DEEPEST", "MESSAGES", "AGE")
    return Table("actors", header, tuple(rows))


def dead_letter_lines(runtime: dict[str, Any]) -> Table:
    """The last messages that nobody read, by who did not: the newest first, those that are alike in one line."""
    letters = runtime["dead_letters"]
    now = runtime.get("now", letters[-1]["time"] if letters else 0.0)  # which an older mediator does not say
    found: dict[tuple[str, str, str], tuple[int, float]] = {}
    for letter in reversed(letters):
        who = (letter["target"], letter["message_type"], letter["sender"] or "-")
        count, newest = found.get(who, (0, letter["time"]))
        found[who] = (count + 1, newest)
    rows = tuple((*who, str(count), f"{_age(now - newest)} ago") for who, (count, newest) in found.items())
    return Table("dead letters, the last ones", ("NOT READ BY", "MESSAGE", "FROM", "COUNT", "LAST"), rows)


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.1f}{unit}"
    return f"{seconds:.0f}s"


def top_json(before: Look, now: Look) -> dict[str, Any]:
    """Rates between two looks. A session or an actor that was not there before has none yet."""
    seconds = max((now.activity["now_ns"] - before.activity["now_ns"]) / 1e9, 1e-9)
    return {
        "seconds": seconds,
        "actors": _actor_rates(before, now, seconds),
        "sessions": _session_rates(before, now),
    }


def _actor_rates(before: Look, now: Look, seconds: float) -> list[dict[str, Any]]:
    earlier = before.activity["actors"]
    rates = []
    for _, actor in walk(now.tree):
        name, mailbox = actor["name"], actor["mailbox"]
        none = {"messages": 0, "busy_ns": 0, "waited_ns": 0}
        new, old = now.activity["actors"].get(name, none), earlier.get(name, none)
        messages = new["messages"] - old["messages"]
        rates.append(
            {
                "name": name,
                "kind": actor["kind"],
                "state": actor["state"],
                "restarts": actor["restarts"],
                "mailbox": 0 if mailbox is None else mailbox["depth"],
                "messages_per_second": messages / seconds,
                "busy_percent": 100 * max(new["busy_ns"] - old["busy_ns"], 0) / 1e9 / seconds,
                "wait_us": (new["waited_ns"] - old["waited_ns"]) / 1e3 / messages if messages > 0 else 0.0,
            }
        )
    return sorted(rates, key=lambda rate: (-rate["messages_per_second"], rate["name"]))


def _session_rates(before: Look, now: Look) -> list[dict[str, Any]]:
    earlier = {s["info"]["session"]: s for s in before.sessions}
    rates = []
    for sample in now.sessions:
        info, grant = sample["info"], sample["grant"]
        old = earlier.get(info["session"])
        if sample["ended"] or old is None:
            continue
        nanoseconds = max(sample["taken_ns"] - old["taken_ns"], 1)

        def share(field: str, grant: Any = grant, was: Any = old["grant"], total: int = nanoseconds) -> float:
            return 100 * float(max(grant[field] - was[field], 0)) / total

        shares = {field.removesuffix("_ns"): share(field) for field in SHARES}
        rates.append(
            {
                "session": info["session"],
                "vm": info["vm"],
                "program": info["program"],
                "calls_per_second": (grant["records"] - old["grant"]["records"]) * 1e9 / nanoseconds,
                "memory_used_bytes": grant["memory_used_bytes"],
                "gpu_percent": min(share("gpu_ns"), 100.0),
                "replay_percent": shares["replay"],
                "lease_wait_percent": shares["lease_wait"],
                "gpu_wait_percent": shares["gpu_wait"],
                "guest_percent": max(100 - sum(shares.values()), 0.0),
                "time_percent": time_percent(old, sample),
            }
        )
    return sorted(rates, key=lambda rate: (-rate["calls_per_second"], rate["session"]))


def top_tables(rates: dict[str, Any], limit: int = 20) -> tuple[Table, Table]:
    """Sessions, then the busiest actors."""
    sessions = tuple(
        (
            str(r["session"]),
            r["vm"],
            r["program"] or "-",
            f"{r['calls_per_second']:.0f}",
            f"{r['gpu_percent']:.0f}",
            f"{r['replay_percent']:.0f}",
            f"{r['lease_wait_percent']:.0f}",
            f"{r['gpu_wait_percent']:.0f}",
            f"{r['guest_percent']:.0f}",
            *(f"{r['time_percent'][part]:.0f}" for part in ("encode", "ring", "sync")),
            show_size(r["memory_used_bytes"]),
        )
        for r in rates["sessions"]
    )
    actors = tuple(
        (
            r["name"],
            r["state"],
            f"{r['messages_per_second']:.1f}",
            f"{r['busy_percent']:.1f}",
            f"{r['wait_us']:.0f}",
            str(r["mailbox"]),
            str(r["restarts"]),
        )
        for r in rates["actors"][:limit]
    )
    return (
        Table(
            "sessions",
            ("SESSION", "VM", "PROGRAM", "CALLS/S", "GPU %", "REPLAY %", "LEASE %", "GPU WAIT %", "GUEST %", "ENCODE %", "RING %", "SYNC %", "MEMORY"),
            sessions,
        ),
        Table("actors", ("ACTOR", "STATE", "MSG/S", "BUSY %", "WAIT US", "MAILBOX", "RESTARTS"), actors),
    )  # fmt: skip


def as_text(*tables: Table) -> str:
    """Tables as plain text."""
    return "\n\n".join(show_table(table.header, list(table.rows)) for table in tables)
