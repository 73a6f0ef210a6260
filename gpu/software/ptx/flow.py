# SPDX-License-Identifier: Apache-2.0
"""From one kernel's statements to basic blocks: the control-flow half of lowering.

A block is a run of instructions with one way in (its start) and one way out (its exit). Blocks are numbered in program
order, so that "lowest program counter first" is "lowest block number first". Predicated instructions that the emitter
cannot predicate become a branch around the instruction. Also finds which registers are live where, because threads
that part carry only live registers along.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import attrs

from .errors import UnsupportedPtx
from .syntax import (
    Address,
    Group,
    Indexed,
    Instruction,
    Label,
    LabelReference,
    Negated,
    Operand,
    Pair,
    Register,
    Statement,
    Vector,
)

# Instructions whose first operand is not a destination.
NO_DESTINATION: Final = frozenset({
    "st", "red", "bra", "brx", "bar", "barrier", "membar", "fence", "prefetch", "prefetchu", "exit", "ret", "trap",
    "brkpt", "nanosleep", "pmevent", "cp", "discard", "applypriority", "griddepcontrol", "setmaxnreg", "sust",
    "mbarrier", "call", "stmatrix", "st.slot", "builtin", "multimem",
})  # fmt: skip
# Instructions that the emitter predicates itself: pure ones through a select, memory ones lane by lane. All others
# get a branch around them.
BRANCH_AROUND: Final = frozenset({
    "bar", "barrier", "trap", "brkpt", "builtin", "brx", "shfl", "vote", "match", "activemask", "redux", "elect", "cp",
})  # fmt: skip


@attrs.define(eq=False)
class Exit:
    """How control leaves a block.

    jump: to targets[0]. branch: to targets[0] where `predicate` (negated?) holds, else targets[1]. switch: to
    targets[index]. end: the thread is done. barrier: wait, then targets[0].
    """

    kind: str
    targets: list[int] = attrs.Factory(list)
    predicate: Register | None = None
    negated: bool = False
    instruction: Instruction | None = None


@attrs.define(eq=False)
class Block:
    number: int
    body: list[Instruction]
    exit: Exit
    is_convergent: bool = False  # holds an instruction that talks to other lanes of the warp
    live_in: frozenset[Register] = frozenset()
    live_out: frozenset[Register] = frozenset()


def registers_in(operand: Operand) -> Iterator[Register]:
    if isinstance(operand, Register):
        yield operand
    elif isinstance(operand, Address):
        if isinstance(operand.base, Register):
            yield operand.base
    elif isinstance(operand, Indexed):
        yield from registers_in(operand.base)
        for index in operand.indices:
            yield from registers_in(index)
    elif isinstance(operand, Vector | Group):
        for element in operand.elements:
            yield from registers_in(element)
    elif isinstance(operand, Negated):
        yield operand.register
    elif isinstance(operand, Pair):
        yield from registers_in(operand.first)
        yield from registers_in(operand.second)


def destinations(instruction: Instruction) -> list[Register]:
    """Registers that the instruction writes."""
    if instruction.opcode in NO_DESTINATION:
        if instruction.opcode in ("bar", "barrier") and "red" in instruction.modifiers:
            return list(registers_in(instruction.operands[0]))
        if instruction.opcode == "builtin":
            return list(registers_in(instruction.operands[0]))
        if instruction.opcode == "st.slot":
            return list(registers_in(instruction.operands[0]))
        return []
    return list(registers_in(instruction.operands[0])) if instruction.operands else []


def sources(instruction: Instruction) -> list[Register]:
    """Registers that the instruction reads (a predicated one reads what it may leave unchanged)."""
    written = destinations(instruction)
    if written or instruction.opcode not in NO_DESTINATION or instruction.opcode in ("builtin", "st.slot"):
        first = 1
    else:
        first = 0
    found = [register for operand in instruction.operands[first:] for register in registers_in(operand)]
    if instruction.guard is not None:
        found.append(instruction.guard)
        found.extend(written)
    return found


def _leaves(instruction: Instruction) -> bool:
    return instruction.opcode in ("bra", "brx", "exit", "ret", "trap", "bar", "barrier") and not _is_passive(
        instruction
    )


def _is_passive(instruction: Instruction) -> bool:
    """Barriers at which no thread of the block waits for others: warp-wide and arrive-only ones stay in the body."""
    if instruction.opcode not in ("bar", "barrier"):
        return False
    return instruction.modifiers[:2] == ("warp", "sync") or "cluster" in instruction.modifiers


def _expand_guards(statements: list[Statement]) -> list[Statement]:
    out: list[Statement] = []
    for statement in statements:
        if (
            isinstance(statement, Instruction)
            and statement.guard is not None
            and statement.opcode in BRANCH_AROUND
        ):
            label = Label("around")
            reference = LabelReference("around", label)
            out.append(
                Instruction(
                    statement.line, "bra", (), (reference,), statement.guard, not statement.guard_negated
                )
            )
            out.append(attrs.evolve(statement, guard=None, guard_negated=False))
            out.append(label)
        else:
            out.append(statement)
    return out


_WARP: Final = frozenset({"shfl", "vote", "match", "activemask", "redux", "elect"})


def build_blocks(statements: list[Statement]) -> list[Block]:
    """Cut statements into blocks, connect them, and find live registers. Raises: UnsupportedPtx."""
    statements = _expand_guards(statements)
    referenced: set[Label] = set()
    for statement in statements:
        if isinstance(statement, Instruction):
            for operand in statement.operands:
                pieces = operand.elements if isinstance(operand, Group) else (operand,)
                for piece in pieces:
                    if isinstance(piece, LabelReference) and piece.label is not None:
                        referenced.add(piece.label)

    # First pass: bodies and where labels point.
    bodies: list[tuple[list[Instruction], Instruction | None]] = []
    place: dict[Label, int] = {}
    current: list[Instruction] = []
    for statement in statements:
        if isinstance(statement, Label):
            if statement in referenced:
                if current:
                    bodies.append((current, None))
                    current = []
                place[statement] = len(bodies)
        elif _leaves(statement):
            bodies.append((current, statement))
            current = []
        else:
            current.append(statement)
    bodies.append((current, None))
    end = len(bodies)  # falling off the end of a kernel is an exit

    def target(reference: object) -> int:
        assert isinstance(reference, LabelReference)
        assert reference.label is not None
        return place[reference.label]

    blocks: list[Block] = []
    for number, (body, last) in enumerate(bodies):
        following = number + 1
        if last is None:
            leave = Exit("jump", [following])
        elif last.opcode == "bra":
            if last.guard is None:
                leave = Exit("jump", [target(last.operands[0])])
            else:
                leave = Exit(
                    "branch", [target(last.operands[0]), following], last.guard, last.guard_negated, last
                )
        elif last.opcode == "brx":
            group = last.operands[1]
            assert isinstance(group, Group)
            leave = Exit("switch", [target(piece) for piece in group.elements], instruction=last)
        elif last.opcode in ("exit", "ret"):
            if last.guard is None:
                leave = Exit("jump", [end])
            else:
                leave = Exit("branch", [end, following], last.guard, last.guard_negated, last)
        elif last.opcode == "trap":
            body.append(last)
            leave = Exit("jump", [end])
        else:
            leave = Exit("barrier", [following], instruction=last)
        blocks.append(Block(number, body, leave, any(i.opcode in _WARP for i in body)))
    blocks.append(Block(end, [], Exit("end")))
    _find_live(blocks)
    return blocks


def exit_sources(leave: Exit) -> list[Register]:
    found = [leave.predicate] if leave.predicate is not None else []
    if leave.kind in ("switch", "barrier") and leave.instruction is not None:
        instruction = leave.instruction
        found += sources(instruction)
    return found


def _find_live(blocks: list[Block]) -> None:
    gain: list[set[Register]] = []
    kill: list[set[Register]] = []
    predecessors: list[list[int]] = [[] for _ in blocks]
    for block in blocks:
        read: set[Register] = set()
        written: set[Register] = set()
        for instruction in block.body:
            read.update(register for register in sources(instruction) if register not in written)
            if instruction.guard is None:
                written.update(destinations(instruction))
        read.update(register for register in exit_sources(block.exit) if register not in written)
        gain.append(read)
        kill.append(written)
        for following in block.exit.targets:
            predecessors[following].append(block.number)
    live_in: list[set[Register]] = [set() for _ in blocks]
    live_out: list[set[Register]] = [set() for _ in blocks]
    pending = list(range(len(blocks)))
    queued = [True] * len(blocks)
    while pending:
        number = pending.pop()
        queued[number] = False
        out: set[Register] = set()
        for following in blocks[number].exit.targets:
            out |= live_in[following]
        barrier = blocks[number].exit.instruction if blocks[number].exit.kind == "barrier" else None
        result = set(destinations(barrier)) if barrier is not None else set()
        live_out[number] = out
        new = gain[number] | (out - kill[number] - result)
        if new != live_in[number]:
            live_in[number] = new
            for before in predecessors[number]:
                if not queued[before]:
                    queued[before] = True
                    pending.append(before)
    for block in blocks:
        block.live_in = frozenset(live_in[block.number])
        block.live_out = frozenset(live_out[block.number])
        if block.exit.kind == "end" and block.body:
            raise UnsupportedPtx("code after the end of a kernel")
