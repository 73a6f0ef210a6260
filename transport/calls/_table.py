# SPDX-License-Identifier: Apache-2.0
"""Read the call table: the one list of driver functions, as values.

``driver.table`` beside this file says what each column means. This module only parses and checks it;
the generator (``tools/gen_calls.py``) and tests consume the result. It must never know what a call
does.
"""

from __future__ import annotations

from importlib.resources import files

import attrs

KINDS = ("local", "async", "fence", "reply", "refused")
SCALARS = ("u8", "u16", "u32", "i32", "u64", "size", "f32")
HANDLES = (
    "context", "stream", "event", "module", "function", "library", "kernel", "graph",
    "node", "exec", "pool", "link", "memory", "array", "mipmap", "userobject",
)  # fmt: skip


class TableError(ValueError):
    """The table is malformed; the message names the line."""


@attrs.frozen
class Parameter:
    """One parameter: its name and its wire type as written in the table."""

    name: str
    type: str


@attrs.frozen
class Row:
    """One exported symbol (one ABI) of the driver."""

    symbol: str
    base: str
    since: int
    kind: str
    # Per-thread-default-stream twin: (suffix without underscore, first version), or None.
    twin: tuple[str, int] | None = None
    shim: str = "-"
    host: str = "-"
    parameters: tuple[Parameter, ...] = ()


@attrs.frozen
class WireCall:
    """A record that is not one driver function."""

    name: str
    kind: str
    arguments: str
    payload: str


@attrs.frozen
class Table:
    """The whole table, in file order."""

    rows: tuple[Row, ...]
    wire: tuple[WireCall, ...]


def _parameter(text: str, line: int) -> Parameter:
    name, _, kind = text.partition(":")
    base = kind.removeprefix("out.")
    known = (
        base in SCALARS
        or kind in ("dev", "ptr", "cptr", "cstr")
        or (base.startswith("h.") and base[2:] in HANDLES)
        or (kind.startswith("in.") and kind[3:].isdigit())
    )
    if not name.isidentifier() or not known:
        raise TableError(f"line {line}: parameter {text!r} is not name:type with a known type")
    return Parameter(name, kind)


def _wire(line: list[str], number: int) -> WireCall:
    name, *rest = line
    kinds = ("async", "fence", "reply")
    starts = ("a=", "p=")[: len(rest) - 1]
    if len(rest) not in (2, 3) or rest[0] not in kinds or not all(map(str.startswith, rest[1:], starts)):
        raise TableError(f"line {number}: expected {name}, {'|'.join(kinds)}, a=..., maybe p=...")
    return WireCall(name, rest[0], rest[1][2:], rest[2][2:] if len(rest) == 3 else "-")


def parse(text: str) -> Table:
    """Parse the table's text.

    Raises:
        TableError: a line is malformed or a symbol stands twice.
    """
    rows: list[Row] = []
    wire: list[WireCall] = []
    seen: set[str] = set()
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.partition("#")[0].split()
        if not line:
            continue
        if line[0] in seen:
            raise TableError(f"line {number}: {line[0]} stands twice")
        seen.add(line[0])
        if line[0].startswith("wire"):
            wire.append(_wire(line, number))
            continue
        if len(line) < 3:
            raise TableError(f"line {number}: expected symbol, base@version, kind, got {raw!r}")
        symbol, spec, kind, *rest = line
        plain, _, twin_text = spec.partition("/")
        base, _, since = plain.partition("@")
        if not base or not since.isdigit() or kind not in KINDS:
            raise TableError(f"line {number}: bad name, version or kind in {raw!r}")
        twin: tuple[str, int] | None = None
        if twin_text:
            suffix, _, twin_since = twin_text.partition("@")
            if suffix not in ("ptsz", "ptds") or not twin_since.isdigit():
                raise TableError(f"line {number}: bad twin {twin_text!r}")
            twin = (suffix, int(twin_since))
            if f"{symbol}_{suffix}" in seen:
                raise TableError(f"line {number}: {symbol}_{suffix} stands twice")
            seen.add(f"{symbol}_{suffix}")
        shim, host = [*rest, "-", "-"][:2] if kind != "refused" else ("-", "-")
        if shim not in ("gen", "hand", "-") or host not in ("gen", "vt", "-"):
            raise TableError(f"line {number}: shim must be gen or hand, host gen, vt or -")
        parameters = tuple(_parameter(p, number) for p in rest[2:])
        rows.append(Row(symbol, base, int(since), kind, twin, shim, host, parameters))
    return Table(tuple(rows), tuple(wire))


def load() -> Table:
    """The project's own table."""
    return parse((files("vgpu.transport.calls") / "driver.table").read_text())
