# SPDX-License-Identifier: Apache-2.0
"""Atomic read-modify-write by many lanes at once, right where lanes hit the same address.

Lanes are put in some serial order (that of their numbers) and the memory and every lane's old value are those of that
order. Lanes with addresses of their own take one vector step. Colliding lanes are sorted by address; then either
"rounds" (the k-th lane of every address, all addresses at once) or "runs" (one address after the other, each as one
accumulation) are used, whichever is fewer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from . import numerics
from .batch import Batch, Group, pick
from .halves import bf16_to_f32, f32_to_bf16

Array = npt.NDArray[Any]
Step = Callable[[Array, Array], Array]

_UFUNCS: Final[dict[str, np.ufunc]] = {
    "add": np.add,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _increment(old: Array, bound: Array) -> Array:
    out: Array = np.where(old >= bound, old.dtype.type(0), old + old.dtype.type(1))
    return out


def _decrement(old: Array, bound: Array) -> Array:
    return np.where((old == 0) | (old > bound), bound, old - old.dtype.type(1))


def _bf16_add(old: Array, value: Array) -> Array:
    return f32_to_bf16(bf16_to_f32(old) + bf16_to_f32(value))


def _halves(step: Step, view: str) -> Step:
    def both(old: Array, value: Array) -> Array:
        out: Array = step(
            np.ascontiguousarray(old).view(view),
            np.ascontiguousarray(np.broadcast_to(value, old.shape)).view(view),
        ).view(np.uint32)
        return out

    return both


def _f16_add(old: Array, value: Array) -> Array:
    out: Array = old + value
    return out


def _step(operation: str, kind: str) -> Step:
    """New value from old value and operand, element by element."""
    if operation == "exch":
        return lambda old, value: np.broadcast_to(value, old.shape)
    if operation == "inc":
        return _increment
    if operation == "dec":
        return _decrement
    if kind in ("f16x2", "bf16x2", "bf16"):
        if operation != "add":
            raise KeyError(f"{operation}.{kind}")
        if kind == "f16x2":
            return _halves(_f16_add, "f2")
        return _bf16_add if kind == "bf16" else _halves(_bf16_add, "u2")
    if operation == "min":
        return numerics.minimum if kind[0] == "f" else np.minimum
    if operation == "max":
        return numerics.maximum if kind[0] == "f" else np.maximum
    return _UFUNCS[operation]


def _accumulator(operation: str, kind: str) -> np.ufunc | None:
    if operation in _UFUNCS and kind not in ("f16x2", "bf16x2", "bf16"):
        return _UFUNCS[operation]
    if operation in ("min", "max") and kind[0] in "us":
        return np.minimum if operation == "min" else np.maximum
    return None


def atomic(
    batch: Batch,
    group: Group,
    count: int,
    space: str,
    operation: str,
    kind: str,
    addresses: Array,
    values: list[Array],
    lanes: Array | None,
    wanted: bool,
) -> Array:
    """Perform it for the chosen lanes (None: all). Old values as unsigned integers where `wanted`, else nothing useful."""
    size = values[0].dtype.itemsize
    chosen = count if lanes is None else int(lanes.size)
    unsigned = np.dtype(f"u{size}")
    old = np.empty(chosen if wanted else 0, unsigned)
    if not chosen:
        return old
    for where, memory, index in batch.places(group, space, addresses, size, size, lanes, True):
        many = chosen if where is None else int(where.size)
        index = np.broadcast_to(index, (many,))
        typed = memory.view(values[0].dtype)
        operands = [np.broadcast_to(pick(pick(value, lanes), where), (many,)) for value in values]
        result = _perform(typed, index, operands, operation, kind, wanted)
        if wanted and result is not None:
            if where is None:
                old = result.view(unsigned)
            else:
                old[where] = result.view(unsigned)
    return old


def _perform(
    memory: Array, index: Array, operands: list[Array], operation: str, kind: str, wanted: bool
) -> Array | None:
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    first = np.empty(ordered.size, bool)
    first[0] = True
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    starts = np.flatnonzero(first)
    if operation == "cas":
        return _compare_and_swap(memory, ordered, order, first, starts, operands)
    step = _step(operation, kind)
    value = operands[0]
    if starts.size == ordered.size:
        before = memory[index]
        memory[index] = step(before, value)
        return before
    accumulator = _accumulator(operation, kind)
    if not wanted and accumulator is not None:
        accumulator.at(memory, index, value)
        return None
    old = np.empty(ordered.size, memory.dtype)
    value = value[order]
    ends = np.append(starts[1:], ordered.size)
    longest = int((ends - starts).max())
    if accumulator is not None and starts.size <= longest:
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            run = np.empty(end - start + 1, memory.dtype)
            run[0] = memory[ordered[start]]
            run[1:] = value[start:end]
            run = accumulator.accumulate(run, dtype=memory.dtype)
            old[start:end] = run[:-1]
            memory[ordered[start]] = run[-1]
    elif operation == "exch":
        old[1:] = value[:-1]
        old[starts] = memory[ordered[starts]]
        memory[ordered[starts]] = value[ends - 1]
    else:
        current = memory[ordered[starts]]
        for k in range(longest):
            live = starts + k < ends
            position = starts[live] + k
            before = current[live]
            old[position] = before
            current[live] = step(before, value[position])
        memory[ordered[starts]] = current
    out = np.empty_like(old)
    out[order] = old
    return out


def _compare_and_swap(
    memory: Array, ordered: Array, order: Array, first: Array, starts: Array, operands: list[Array]
) -> Array:
    """Each turn finds, at every address at once, the next lane whose comparison succeeds."""
    compare, swap = operands[0][order], operands[1][order]
    old: Array
    owner = np.cumsum(first) - 1
    current = memory[ordered[starts]]
    old = current[owner]
    position = np.arange(ordered.size)
    reached = starts.copy()  # lanes before this one have been decided
    while True:
        hit = np.flatnonzero((compare == current[owner]) & (position >= reached[owner]))
        if not hit.size:
            break
        owners, earliest = np.unique(owner[hit], return_index=True)
        hit = hit[earliest]
        current[owners] = swap[hit]
        reached[owners] = hit + 1
        after = position >= reached[owner]
        old = np.where(after, current[owner], old)
    memory[ordered[starts]] = current
    out: Array = np.empty_like(old)
    out[order] = old
    return out
