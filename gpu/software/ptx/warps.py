# SPDX-License-Identifier: Apache-2.0
"""Warp-wide operations: values that cross lanes.

A group may hold only part of a warp. Lanes outside the group take no part: a shuffle that would read one keeps its own
value, votes do not count it. Arrays: (lanes) in, (lanes) out; scratch arrays have one element per slot of the batch.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .batch import WARP, Batch, Group

Array = npt.NDArray[Any]

_BITS: Final = np.uint32(1) << np.arange(WARP, dtype=np.uint32)


def _scatter(batch: Batch, group: Group, values: Array, fill: Any) -> Array:
    """Values by slot."""
    if group.is_full and values.size == batch.slot_count:
        return values
    out = np.full(batch.slot_count, fill, dtype=values.dtype)
    out[group.slots] = values
    return out


def _present(batch: Batch, group: Group) -> Array:
    """Per slot: whether its thread is in the group."""
    found = group.cache.get("present")
    if found is None:
        found = np.zeros(batch.slot_count, bool)
        found[group.slots] = True
        group.cache["present"] = found
    return found


def shuffle(
    batch: Batch, group: Group, count: int, mode: str, value: Array, offset: Array, control: Array
) -> tuple[Array, Array]:
    """shfl.sync: (value of the source lane, whether the source was in range)."""
    lane = group.slots & 31
    clamp = (control & np.uint32(31)).astype(np.int64)
    segment = ((control >> np.uint32(8)) & np.uint32(31)).astype(np.int64)
    offset = (offset & np.uint32(31)).astype(np.int64)
    limit = (lane & segment) | (clamp & ~segment)
    if mode == "up":
        source = lane - offset
        in_range = source >= limit
    elif mode == "down":
        source = lane + offset
        in_range = source <= limit
    elif mode == "bfly":
        source = lane ^ offset
        in_range = source <= limit
    else:
        source = (lane & segment) | (offset & ~segment)
        in_range = source <= limit
    from_slot = np.where(in_range, source, lane) + (group.slots - lane)
    by_slot = _scatter(batch, group, value, 0)
    if not group.is_full:
        from_slot = np.where(_present(batch, group)[from_slot], from_slot, group.slots)
    result = by_slot[from_slot]
    in_range = np.broadcast_to(in_range, (count,))
    return result, in_range


def _ballots(batch: Batch, group: Group, predicate: Array) -> Array:
    """One word per warp of the batch."""
    by_slot = _scatter(batch, group, np.broadcast_to(predicate, (group.count,)), False)
    return np.packbits(by_slot, bitorder="little").view(np.uint32)


def vote(batch: Batch, group: Group, count: int, mode: str, predicate: Array, members: Array) -> Array:
    warp = group.slots >> 5
    yes: Array = _ballots(batch, group, predicate)[warp] & members
    if mode == "ballot":
        return yes
    result: Array
    if mode == "any":
        result = yes != 0
        return result
    everybody: Array = _ballots(batch, group, np.ones(1, bool))[warp] & members
    result = yes == everybody
    return result if mode == "all" else result | (yes == 0)


def _by_warp(batch: Batch, group: Group, values: Array) -> Array:
    """(warps, 32)"""
    spread = np.broadcast_to(values, (group.count,))
    return _scatter(batch, group, np.ascontiguousarray(spread), 0).reshape(-1, WARP)


def match(
    batch: Batch, group: Group, count: int, every: bool, value: Array, members: Array
) -> tuple[Array, Array]:
    """match.any / match.all: (mask of member lanes with the same value, whether all members agree)."""
    values = _by_warp(batch, group, value)
    present = _present(batch, group).reshape(-1, WARP)
    equal = (values[:, :, None] == values[:, None, :]) & present[:, None, :]
    masks = (equal * _BITS).sum(axis=2, dtype=np.uint32).reshape(-1)[group.slots] & members
    everybody = _ballots(batch, group, np.ones(1, bool))[group.slots >> 5] & members
    same = masks == everybody
    return (np.where(same, masks, np.uint32(0)) if every else masks), same


_REDUCE: Final[dict[str, np.ufunc]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def redux(batch: Batch, group: Group, count: int, operation: str, value: Array, members: Array) -> Array:
    """A reduction over the member lanes of each lane's mask."""
    values = _by_warp(batch, group, value)
    masks = _by_warp(batch, group, members)
    present = _present(batch, group).reshape(-1, WARP)
    taken = ((masks[:, :, None] & _BITS) != 0) & present[:, None, :]
    limits = np.iinfo(values.dtype)
    neutral = {"min": limits.max, "max": limits.min, "and": -1 if limits.min else limits.max}.get(
        operation, 0
    )
    spread = np.where(taken, values[:, None, :], values.dtype.type(neutral))
    out: Array = _REDUCE[operation].reduce(spread, axis=2).astype(values.dtype).reshape(-1)[group.slots]
    return out


def elect(batch: Batch, group: Group, count: int, members: Array) -> tuple[Array, Array]:
    """elect.sync: (lowest member lane, whether it is this one)."""
    everybody = _ballots(batch, group, np.ones(1, bool))[group.slots >> 5] & members
    lowest = everybody & (~everybody + np.uint32(1))
    leader = np.bitwise_count(lowest - np.uint32(1)).astype(np.uint32)
    return leader, leader == (group.slots & 31).astype(np.uint32)
