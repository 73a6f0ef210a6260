# SPDX-License-Identifier: Apache-2.0
"""Running a batch: which group of threads executes next, how groups part, meet, wait at barriers and end.

The rule is "lowest program counter first": of all groups that can run, the one at the lowest block number runs one
block; groups that stand at the same block are merged first. So threads that part at a branch meet again where their paths
join. A group passed over for long is run out of turn, for a while, since a thread that spins on what another must do
would otherwise spin for ever; groups at blocks that talk across a warp keep their turn, for the sake of convergence. For
the same reason barriers are looked at now and then, and not only when nothing else can run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import attrs
import numpy as np
import numpy.typing as npt

from ..memory import AddressError
from .batch import Batch, Group
from .errors import BarrierDeadlock, LaunchInterrupted
from .flow import Block
from .syntax import Register

Array = npt.NDArray[Any]
BlockFunction = Callable[[Batch, Group, list[Array | None], int], Any]

_POLL_EVERY: Final = 64  # blocks between two questions to the deadline callback
_PATIENCE: Final = 512  # blocks that may run before a group that waits runs out of turn
_FAVOUR: Final = 32  # blocks that it may then run in a row


@attrs.define(eq=False)
class CompiledBlock:
    """What the scheduler needs of a block."""

    number: int
    run: BlockFunction
    kind: str
    targets: list[int]
    live_in: list[int]
    is_convergent: bool
    barrier_kind: str = ""
    barrier_result: Register | None = None


def compiled_block(block: Block, run: BlockFunction) -> CompiledBlock:
    kind, result = "", None
    if block.exit.kind == "barrier":
        assert block.exit.instruction is not None
        modifiers = [m for m in block.exit.instruction.modifiers if m not in ("cta", "aligned")]
        kind = ".".join(m for m in modifiers if m in ("sync", "arrive", "red", "popc", "and", "or"))
        if "red" in modifiers:
            operand = block.exit.instruction.operands[0]
            assert isinstance(operand, Register)
            result = operand
    return CompiledBlock(
        number=block.number,
        run=run,
        kind=block.exit.kind,
        targets=block.exit.targets,
        live_in=sorted(register.number for register in block.live_in),
        is_convergent=block.is_convergent,
        barrier_kind=kind,
        barrier_result=result,
    )


@attrs.define(eq=False)
class _Waiting:
    """Threads at a barrier."""

    group: Group
    block: CompiledBlock
    barrier: Array  # number, per lane or one for all
    needed: Array | None  # threads the barrier waits for; None: all that live
    predicate: Array | None


class Scheduler:
    """Runs one batch to its end."""

    def __init__(
        self, batch: Batch, blocks: list[CompiledBlock], deadline: Callable[[], bool | None] | None
    ) -> None:
        self._batch = batch
        self._blocks = blocks
        self._deadline = deadline
        self._ready: dict[int, list[Group]] = {}
        self._waiting: list[_Waiting] = []
        self._arrived: dict[tuple[int, int], int] = {}  # (cta, barrier): threads of bar.arrive
        self._steps = 0
        self._favour = 0
        # Threads that have not ended, per thread block of the batch.
        self._live = np.full(batch.block_count, batch.threads, dtype=np.int64)
        self._live_total = batch.threads * batch.block_count

    def run(self) -> None:
        """Raises: whatever the kernel's threads do wrong; LaunchInterrupted, BarrierDeadlock."""
        group: Group | None = self._batch.first_group()
        place = 0
        blocks, batch = self._blocks, self._batch
        while True:
            if group is None:
                if not self._ready:
                    if not self._waiting:
                        return
                    if not self._release():
                        count = sum(waiting.group.count for waiting in self._waiting)
                        raise BarrierDeadlock(f"{count} threads wait at barriers that cannot complete")
                place, group = self._next()
            self._steps += 1
            if self._steps % _POLL_EVERY == 0:
                if self._deadline is not None and self._deadline():
                    raise LaunchInterrupted("the launch was interrupted")
                if self._waiting:
                    self._release()
            block = blocks[place]
            outcome = block.run(batch, group, group.registers, group.count)
            kind = block.kind
            if kind == "jump":
                place = block.targets[0]
            elif kind == "branch":
                taken = np.count_nonzero(outcome)
                if taken == 0:
                    place = block.targets[1]
                elif taken == outcome.size:
                    place = block.targets[0]
                else:
                    self._put(block.targets[0], self._part(group, np.flatnonzero(outcome), block.targets[0]))
                    self._put(block.targets[1], self._part(group, np.flatnonzero(~outcome), block.targets[1]))
                    group = None
                    continue
            elif kind == "switch":
                place, group = self._switch(block, group, outcome)
            elif kind == "barrier":
                group = self._barrier(block, group, outcome)
                place = block.targets[0]
            else:
                self._end(group)
                group = None
            if group is not None and self._ready:
                if self._favour and not blocks[place].is_convergent:
                    self._favour -= 1
                    continue
                self._put(place, group)
                group = None

    # --- groups -----------------------------------------------------------------------------------------------------

    def _put(self, place: int, group: Group) -> None:
        group.waited = self._steps
        self._ready.setdefault(place, []).append(group)

    def _part(self, group: Group, lanes: Array, place: int) -> Group:
        """Some lanes of a group, with the registers that live at `place`."""
        registers: list[Array | None] = [None] * len(group.registers)
        for number in self._blocks[place].live_in:
            value = group.registers[number]
            assert value is not None
            registers[number] = value if value.size == 1 else value[lanes]
        return Group(group.slots[lanes], registers, False)

    def _next(self) -> tuple[int, Group]:
        ready = self._ready
        place = min(ready)
        self._favour = 0
        if len(ready) > 1 and self._steps % (_PATIENCE // 8) == 0:
            overdue = [
                (min(group.waited for group in groups), where)
                for where, groups in ready.items()
                if not self._blocks[where].is_convergent
            ]
            if overdue and self._steps - min(overdue)[0] > _PATIENCE:
                place = min(overdue)[1]
                self._favour = _FAVOUR
        groups = ready.pop(place)
        return place, groups[0] if len(groups) == 1 else self._merge(groups, place)

    def _merge(self, groups: list[Group], place: int) -> Group:
        slots = np.concatenate([group.slots for group in groups])
        order: Array | None = None
        if (slots[1:] < slots[:-1]).any():
            order = np.argsort(slots, kind="stable")
            slots = slots[order]
        is_full = slots.size == self._batch.slot_count
        registers: list[Array | None] = [None] * len(groups[0].registers)
        for number in self._blocks[place].live_in:
            values = [group.registers[number] for group in groups]
            registers[number] = self._join(values, groups, order)
        return Group(self._batch.all_slots if is_full else slots, registers, is_full)

    @staticmethod
    def _join(values: list[Array | None], groups: list[Group], order: Array | None) -> Array:
        first = values[0]
        assert first is not None
        if first.size == 1:
            pattern = first[0]
            if all(v is first or (v is not None and v.size == 1 and v[0] == pattern) for v in values):
                return first
        pieces = []
        for value, group in zip(values, groups, strict=True):
            assert value is not None
            pieces.append(value if value.size == group.count else np.broadcast_to(value, (group.count,)))
        joined = np.concatenate(pieces)
        return joined if order is None else joined[order]

    def _switch(self, block: CompiledBlock, group: Group, index: Array) -> tuple[int, Group | None]:
        if int(index.max()) >= len(block.targets):
            raise AddressError(int(index.max()), 0, False, f"brx.idx past its {len(block.targets)} targets,")
        distinct = np.unique(index)
        if distinct.size == 1:
            return block.targets[int(distinct[0])], group
        for value in distinct:
            place = block.targets[int(value)]
            self._put(place, self._part(group, np.flatnonzero(index == value), place))
        return 0, None

    def _end(self, group: Group) -> None:
        self._live_total -= group.count
        if self._live_total:
            self._live -= np.bincount(group.slots // self._batch.stride, minlength=self._batch.block_count)

    # --- barriers ---------------------------------------------------------------------------------------------------

    def _barrier(
        self, block: CompiledBlock, group: Group, outcome: tuple[Array, Array | None, Array | None]
    ) -> Group | None:
        """The group itself where it may go on at once; None where it waits."""
        barrier, needed, predicate = outcome
        if block.barrier_kind == "arrive":
            ctas, counts = np.unique(group.slots // self._batch.stride, return_counts=True)
            for cta, count in zip(ctas.tolist(), counts.tolist(), strict=True):
                key = (cta, int(barrier[0]))
                self._arrived[key] = self._arrived.get(key, 0) + count
            return group
        waiting = _Waiting(group, block, barrier, needed, predicate)
        everybody = group.count == self._live_total and barrier.size == 1
        if everybody and (needed is None or (needed.size == 1 and int(needed[0]) >= self._batch.threads)):
            self._answer(waiting, group, predicate)
            return group
        self._waiting.append(waiting)
        return None

    def _answer(self, waiting: _Waiting, group: Group, predicate: Array | None) -> None:
        """bar.red: give every thread its block's count, conjunction or disjunction."""
        result = waiting.block.barrier_result
        if result is None or predicate is None:
            return
        ctas = group.slots // self._batch.stride
        spread = np.broadcast_to(predicate, (group.count,))
        holds = np.bincount(ctas, weights=spread, minlength=self._batch.block_count).astype(np.uint32)
        total = np.bincount(ctas, minlength=self._batch.block_count)
        if "popc" in waiting.block.barrier_kind:
            group.registers[result.number] = holds[ctas]
        elif "and" in waiting.block.barrier_kind:
            group.registers[result.number] = (holds == total)[ctas]
        else:
            group.registers[result.number] = (holds != 0)[ctas]

    def _release(self) -> bool:
        """Let go the threads of every barrier that is complete; whether there was one."""
        stride = self._batch.stride
        slots = np.concatenate([w.group.slots for w in self._waiting])
        ctas = slots // stride
        numbers = np.concatenate(
            [np.broadcast_to(w.barrier, (w.group.count,)) for w in self._waiting]
        ).astype(np.int64)
        needed = np.concatenate(
            [
                np.broadcast_to(w.needed.astype(np.int64), (w.group.count,))
                if w.needed is not None
                else self._live[w.group.slots // stride]
                for w in self._waiting
            ]
        )
        keys = ctas * 4096 + numbers
        distinct, owner, counts = np.unique(keys, return_inverse=True, return_counts=True)
        for position, key in enumerate(distinct.tolist()):
            counts[position] += self._arrived.get((key // 4096, key % 4096), 0)
        # A count larger than the threads still alive is met by all of them: the others have exited.
        complete = counts[owner] >= np.minimum(needed, self._live[ctas])
        if not complete.any():
            return False
        for key in distinct[np.bincount(owner, weights=complete) > 0].tolist():
            self._arrived.pop((key // 4096, key % 4096), None)
        before, self._waiting = self._waiting, []
        released: dict[int, list[tuple[_Waiting, Group, Array | None]]] = {}
        start = 0
        for waiting in before:
            group = waiting.group
            go = complete[start : start + group.count]
            start += group.count
            place = waiting.block.targets[0]
            for lanes, is_released in ((np.flatnonzero(go), True), (np.flatnonzero(~go), False)):
                if not lanes.size:
                    continue
                part = group if lanes.size == group.count else self._part(group, lanes, place)
                predicate = waiting.predicate
                if predicate is not None and predicate.size > 1:
                    predicate = predicate[lanes]
                if is_released:
                    released.setdefault(waiting.block.number, []).append((waiting, part, predicate))
                    continue
                barrier = waiting.barrier if waiting.barrier.size == 1 else waiting.barrier[lanes]
                count = waiting.needed
                count = count if count is None or count.size == 1 else count[lanes]
                self._waiting.append(_Waiting(part, waiting.block, barrier, count, predicate))
        self._go_on(released)
        return True

    def _go_on(self, released: dict[int, list[tuple[_Waiting, Group, Array | None]]]) -> None:
        """Threads released together from bar.red answer together, wherever in the program each stood."""
        together = [entry for entries in released.values() for entry in entries]
        reducing = [entry for entry in together if entry[0].block.barrier_result is not None]
        if reducing:
            slots = np.concatenate([part.slots for _, part, _ in reducing])
            predicates = np.concatenate(
                [np.broadcast_to(p, (part.count,)) for _, part, p in reducing if p is not None]
            )
            ctas = slots // self._batch.stride
            holds = np.bincount(ctas, weights=predicates, minlength=self._batch.block_count).astype(np.uint32)
            total = np.bincount(ctas, minlength=self._batch.block_count)
            for waiting, part, _ in reducing:
                own = part.slots // self._batch.stride
                result = waiting.block.barrier_result
                assert result is not None
                kind = waiting.block.barrier_kind
                answer: Array = holds if "popc" in kind else holds == total if "and" in kind else holds != 0
                part.registers[result.number] = answer[own]
        for waiting, part, _ in together:
            self._put(waiting.block.targets[0], part)
