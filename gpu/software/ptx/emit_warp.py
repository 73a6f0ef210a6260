# SPDX-License-Identifier: Apache-2.0
"""Emitters for what threads do together or to the world outside: shuffles, votes, matches, reductions over a warp,
printf, assert, trap, sleeping.

Barriers that end a block are in emit.py (`_barrier`) and launch.py; the warp-wide ones here order nothing, since a warp's
lanes that have met are in lockstep already.
"""

from __future__ import annotations

from typing import cast

from .emit import BlockEmitter, emits
from .syntax import Group, Instruction, Operand, Pair, Sink


@emits("shfl")
def shfl(e: BlockEmitter, i: Instruction) -> None:
    modifiers = [m for m in i.modifiers if m != "sync"]
    if (
        len(modifiers) != 2
        or modifiers[0] not in ("up", "down", "bfly", "idx")
        or modifiers[1] not in ("b32", "u32")
    ):
        raise e.unsupported()
    d, a, b, c = i.operands[:4]
    value, predicate = e.owner.fresh(), e.owner.fresh()
    operands = ", ".join(e.value(o, "u32") for o in (a, b, c))
    e.line(f"{value}, {predicate} = shuffle(C, G, n, {modifiers[0]!r}, {operands})")
    first: Operand = d.first if isinstance(d, Pair) else d
    if not isinstance(first, Sink):
        e.define(first, value, "u32")
    if isinstance(d, Pair) and not isinstance(d.second, Sink):
        e.define(d.second, predicate, "pred")


@emits("vote")
def vote(e: BlockEmitter, i: Instruction) -> None:
    modifiers = [m for m in i.modifiers if m != "sync"]
    if modifiers not in (["all", "pred"], ["any", "pred"], ["uni", "pred"], ["ballot", "b32"]):
        raise e.unsupported()
    d, a, *mask = i.operands
    members = e.value(mask[0], "u32") if mask else e.constant(0xFFFF_FFFF, "u32")
    call = f"vote(C, G, n, {modifiers[0]!r}, {e.value(a, 'pred')}, {members})"
    e.define(d, call, "u32" if modifiers[0] == "ballot" else "pred")


@emits("activemask")
def activemask(e: BlockEmitter, i: Instruction) -> None:
    ones = e.constant(0xFFFF_FFFF, "u32")
    e.define(i.operands[0], f"vote(C, G, n, 'ballot', {e.constant(1, 'pred')}, {ones})", "u32")


@emits("match")
def match(e: BlockEmitter, i: Instruction) -> None:
    modifiers = [m for m in i.modifiers if m != "sync"]
    if len(modifiers) != 2 or modifiers[0] not in ("any", "all") or modifiers[1] not in ("b32", "b64"):
        raise e.unsupported()
    d, a, mask = i.operands
    found, same = e.owner.fresh(), e.owner.fresh()
    operands = f"{e.value(a, modifiers[1])}, {e.value(mask, 'u32')}"
    e.line(f"{found}, {same} = match(C, G, n, {modifiers[0] == 'all'}, {operands})")
    first: Operand = d.first if isinstance(d, Pair) else d
    if not isinstance(first, Sink):
        e.define(first, found, "u32")
    if isinstance(d, Pair) and not isinstance(d.second, Sink):
        e.define(d.second, same, "pred")


@emits("redux")
def redux(e: BlockEmitter, i: Instruction) -> None:
    modifiers = [m for m in i.modifiers if m != "sync"]
    if len(modifiers) != 2 or modifiers[0] not in ("add", "min", "max", "and", "or", "xor"):
        raise e.unsupported()
    if modifiers[1] not in ("u32", "s32", "b32"):
        raise e.unsupported()
    d, a, mask = i.operands
    e.define(
        d,
        f"redux(C, G, n, {modifiers[0]!r}, {e.value(a, modifiers[1])}, {e.value(mask, 'u32')})",
        modifiers[1],
    )


@emits("elect")
def elect(e: BlockEmitter, i: Instruction) -> None:
    d, mask = i.operands
    if not isinstance(d, Pair):
        raise e.unsupported()
    leader, predicate = e.owner.fresh(), e.owner.fresh()
    e.line(f"{leader}, {predicate} = elect(C, G, n, {e.value(mask, 'u32')})")
    if not isinstance(d.first, Sink):
        e.define(d.first, leader, "u32")
    if not isinstance(d.second, Sink):
        e.define(d.second, predicate, "pred")


@emits("bar", "barrier")
def bar(e: BlockEmitter, i: Instruction) -> None:
    """Only those that do not end a block: bar.warp.sync, and barrier.cluster of a cluster of one block."""
    if i.modifiers[:2] != ("warp", "sync"):
        raise e.unsupported()


@emits("nanosleep")
def nanosleep(e: BlockEmitter, i: Instruction) -> None:
    """Time passes anyway."""


@emits("trap", "brkpt")
def trap(e: BlockEmitter, i: Instruction) -> None:
    e.line("C.trap(G)")


@emits("builtin")
def builtin(e: BlockEmitter, i: Instruction) -> None:
    """A function that the executor provides: arguments and results are call parameters that became registers."""
    (name,) = i.modifiers
    results, arguments = (cast(Group, operand).elements for operand in i.operands)
    widths = {
        "vprintf": ["u64", "u64"],
        "__assertfail": ["u64", "u64", "u32", "u64", "u64"],
        "__assert_fail": ["u64", "u64", "u32", "u64"],
        "malloc": ["u64"],
        "free": ["u64"],
    }[name]
    if len(arguments) != len(widths):
        raise e.unsupported(f"{name} with {len(arguments)} arguments")
    values = ", ".join(e.value(a, k) for a, k in zip(arguments, widths, strict=True))
    call = f"{name.strip('_')}(C, G, n, {values})"
    kind = {"vprintf": "u32", "malloc": "u64"}.get(name)
    if kind is not None and results:
        e.define(results[0], call, kind)
    else:
        e.line(call)
