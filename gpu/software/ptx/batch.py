# SPDX-License-Identifier: Apache-2.0
"""The state of the thread blocks that run in lockstep: their threads, their shared and local memory, and how lanes
read and write every state space.

A batch gives each thread a *slot*: block number in the batch times the block's thread count rounded up to whole warps,
plus the thread's linear index. Slots of one warp are therefore 32 neighbours. A `Group` is a set of threads at the same
place in the program, with a register file of its own: arrays of one element per lane, or of a single element where all
lanes agree. Generic addresses above 2**56 are shared, local or parameter memory; below, global.

It must never touch shared or local memory of a block or thread other than the lane's own: every offset is checked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np
import numpy.typing as npt

from ..memory import AddressSpace, IllegalAddress, MisalignedAddress
from .errors import Trap

if TYPE_CHECKING:
    from .lowering import LoweredKernel

Array = npt.NDArray[Any]
Slots = npt.NDArray[np.int64]

SHARED_WINDOW: Final = 1 << 56
LOCAL_WINDOW: Final = 2 << 56
PARAMETER_WINDOW: Final = 3 << 56
WINDOW_SIZE: Final = 1 << 32
WARP: Final = 32

_NONE: Final = np.empty(0, np.int64)
_KIND: Final = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_ZERO: Final = np.zeros(1, np.int64)


@attrs.define(eq=False)
class Group:
    """Threads that stand at the same instruction."""

    slots: Slots
    registers: list[Array | None]
    is_full: bool  # every slot of the batch, in order
    waited: int = 0  # the step at which it was put aside
    cache: dict[str, Array] = attrs.Factory(dict)

    @property
    def count(self) -> int:
        return int(self.slots.size)


def pick(values: Array, lanes: Array | None) -> Array:
    """The values of some lanes (None: all), where `values` may hold one for all."""
    return values if lanes is None or values.size == 1 else values[lanes]


def choose(predicate: Array, negated: bool) -> Array | None:
    """Lanes where a guard holds; None where it holds everywhere."""
    if negated:
        predicate = ~predicate
    if predicate.size == 1:
        return None if predicate[0] else _NONE
    lanes = np.flatnonzero(predicate)
    return None if lanes.size == predicate.size else lanes


def merge(old: Array, new: Array, lanes: Array | None, count: int) -> Array:
    """`old` with the values of some lanes replaced."""
    if lanes is None:
        return new
    if not lanes.size:
        return old
    out = np.empty(count, old.dtype)
    out[:] = old
    out[lanes] = new
    return out


@attrs.define(eq=False)
class Batch:
    """Blocks `first_block` to `first_block + block_count` of a grid, running."""

    space: AddressSpace
    kernel: LoweredKernel
    symbols: dict[str, Array]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    first_block: int
    block_count: int
    dynamic_shared: int
    parameters: Array  # uint8
    printf: Callable[[str], None]
    workspace: int = (
        0  # device address of what a grid-wide barrier counts in; 0 unless the launch is cooperative
    )
    images: Mapping[int, object] = MappingProxyType(
        {}
    )  # textures and surfaces by the values of their objects
    clock: Callable[[], int] = time.perf_counter_ns

    threads: int = attrs.field(init=False)  # of one block
    stride: int = attrs.field(init=False)  # slots of one block
    slot_count: int = attrs.field(init=False)
    shared_size: int = attrs.field(init=False)
    shared: Array = attrs.field(init=False)
    local: Array = attrs.field(init=False)
    all_slots: Slots = attrs.field(init=False)
    _views: dict[tuple[str, int], Array] = attrs.Factory(dict)
    _specials: dict[str, Array] = attrs.Factory(dict)

    def __attrs_post_init__(self) -> None:
        self.threads = self.block[0] * self.block[1] * self.block[2]
        self.stride = -(-self.threads // WARP) * WARP
        self.slot_count = self.stride * self.block_count
        size = self.kernel.dynamic_base + self.dynamic_shared
        self.shared_size = -(-size // 16) * 16
        self.shared = np.zeros(self.shared_size * self.block_count, np.uint8)
        self.local = np.zeros(self.kernel.local_size * self.slot_count, np.uint8)
        self.all_slots = np.arange(self.slot_count, dtype=np.int64)

    def first_group(self) -> Group:
        """All threads, at the beginning."""
        slots = self.all_slots
        if self.stride != self.threads:
            slots = slots[slots % self.stride < self.threads]
        registers: list[Array | None] = [None] * self.kernel.register_count
        for register in self.kernel.initial:
            registers[register.number] = (
                np.zeros(1, bool) if register.type == "pred" else np.zeros(1, _KIND[register.bits // 8])
            )
        return Group(slots, registers, slots.size == self.slot_count)

    # --- who a lane is ----------------------------------------------------------------------------------------------

    def special(self, group: Group, name: str) -> Array:
        """A special register's value for each lane (uint32, or uint64 for the 64-bit ones)."""
        cached = group.cache.get(name)
        if cached is None:
            whole = self._specials.get(name)
            if whole is None:
                whole = self._special(name)
                if name not in (
                    "%clock",
                    "%clock64",
                    "%clock_hi",
                    "%globaltimer",
                    "%globaltimer_lo",
                    "%globaltimer_hi",
                ):
                    self._specials[name] = whole
                else:
                    return whole
            cached = whole if group.is_full or whole.size == 1 else whole[group.slots]
            group.cache[name] = cached
        return cached

    def _special(self, name: str) -> Array:
        base, _, axis_name = name[1:].partition(".")
        axis = {"x": 0, "y": 1, "z": 2, "w": 3, "": 0}[axis_name]
        if axis == 3:
            return np.zeros(1, np.uint32) if base in ("tid", "ctaid") else np.ones(1, np.uint32)
        thread = np.arange(self.stride, dtype=np.int64)  # of one block; the others are alike
        lane = (thread % WARP).astype(np.uint32)
        one = np.uint32(1)
        x, y, _ = self.block
        grid_x, grid_y, _ = self.grid
        if base == "tid":
            if self.block[axis] == 1:
                return np.zeros(1, np.uint32)
            return self._in_each_block(
                (thread % x, thread // x % y, thread // (x * y))[axis].astype(np.uint32)
            )
        if base in ("ctaid", "clusterid"):
            block = np.arange(self.first_block, self.first_block + self.block_count)
            value = (block % grid_x, block // grid_x % grid_y, block // (grid_x * grid_y))[axis].astype(
                np.uint32
            )
            if self.block_count == 1 or self.grid[axis] == 1:
                return value[:1]
            return np.repeat(value, self.stride)
        if base in ("ntid", "nctaid", "nclusterid"):
            return np.array([self.block[axis] if base == "ntid" else self.grid[axis]], dtype=np.uint32)
        by_lane = {
            "laneid": lane,
            "warpid": (thread // WARP).astype(np.uint32),
            "lanemask_eq": one << lane,
            "lanemask_lt": (one << lane) - one,
            "lanemask_le": ((one << lane) - one) | (one << lane),
            "lanemask_ge": ~((one << lane) - one),
            "lanemask_gt": ~(((one << lane) - one) | (one << lane)),
        }
        if base in by_lane:
            return self._in_each_block(by_lane[base])
        numbers = {
            "nwarpid": self.stride // WARP,
            "smid": 0,
            "nsmid": 1,
            "gridid": 0,
            "dynamic_smem_size": self.dynamic_shared,
            "total_smem_size": self.shared_size,
            "aggr_smem_size": self.shared_size,
            "cluster_ctaid": 0,
            "cluster_ctarank": 0,
            "cluster_nctaid": 1,
            "cluster_nctarank": 1,
            "is_explicit_cluster": 0,
            "current_graph_exec": 0,
            # where cooperative_groups looks for the grid's workspace
            "envreg1": self.workspace >> 32,
            "envreg2": self.workspace & 0xFFFF_FFFF,
        }
        if base in ("clock64", "globaltimer", "gridid", "current_graph_exec"):
            return np.array([numbers.get(base, self.clock())], dtype=np.uint64)
        if base in ("clock", "globaltimer_lo"):
            return np.array([self.clock() & 0xFFFF_FFFF], dtype=np.uint32)
        if base in ("clock_hi", "globaltimer_hi"):
            return np.array([self.clock() >> 32 & 0xFFFF_FFFF], dtype=np.uint32)
        return np.array([numbers.get(base, 0)], dtype=np.uint32)  # envreg and pm counters read as zero

    def _in_each_block(self, values: Array) -> Array:
        """By slot, from the values of one block's slots."""
        return np.tile(values, self.block_count) if self.block_count > 1 else values

    def shared_base(self, group: Group) -> Slots:
        """Where each lane's block has its shared memory."""
        if self.block_count == 1:
            return _ZERO
        found = group.cache.get("shared")
        if found is None:
            found = group.cache["shared"] = group.slots // self.stride * self.shared_size
        return found

    def local_base(self, group: Group) -> Slots:
        found = group.cache.get("local")
        if found is None:
            found = group.cache["local"] = group.slots * self.kernel.local_size
        return found

    # --- places -----------------------------------------------------------------------------------------------------

    def _view(self, which: str, array: Array, size: int) -> Array:
        found = self._views.get((which, size))
        if found is None:
            usable = array.size - array.size % size
            found = self._views[which, size] = array[:usable].view(_KIND[size])
        return found

    @staticmethod
    def _offsets(offsets: Array, limit: int, width: int, window: int, is_write: bool) -> Array:
        """Checked int64 offsets into a lane's own shared or local memory."""
        if offsets.dtype == np.uint32:
            offsets = offsets.astype(np.int64)
        elif offsets.dtype != np.int64:
            offsets = offsets.view(np.int64)
        if offsets.size and (int(offsets.min()) < 0 or int(offsets.max()) + width > limit):
            bad = offsets[(offsets < 0) | (offsets + width > limit)]
            raise IllegalAddress(window + (int(bad[0]) & 0xFFFF_FFFF), width, is_write)
        if width > 1 and int(np.bitwise_or.reduce(offsets)) & (width - 1):
            bad = offsets[(offsets & (width - 1)) != 0]
            raise MisalignedAddress(window + int(bad[0]), width, is_write)
        return offsets

    def places(
        self,
        group: Group,
        space: str,
        addresses: Array,
        size: int,
        width: int,
        lanes: Array | None,
        is_write: bool,
    ) -> list[tuple[Array | None, Array, Array]]:
        """Where accesses go: (positions among the chosen lanes or None for all, typed array, index of first element)."""
        addresses = pick(addresses, lanes)
        shift = size.bit_length() - 1
        if space == "global":
            return list(self.space.locate(addresses.view(np.uint64), size, width, is_write))
        if space == "shared":
            index = self._offsets(addresses, self.shared_size, width, SHARED_WINDOW, is_write)
            index = index + pick(self.shared_base(group), lanes)
            return [(None, self._view("shared", self.shared, size), index >> shift)]
        if space == "local":
            index = self._offsets(addresses, self.kernel.local_size, width, LOCAL_WINDOW, is_write)
            index = index + pick(self.local_base(group), lanes)
            return [(None, self._view("local", self.local, size), index >> shift)]
        if space == "param":
            index = self._offsets(addresses, self.parameters.size, width, PARAMETER_WINDOW, is_write)
            return [(None, self._view("param", self.parameters, size), index >> shift)]
        return self._generic(group, addresses, size, width, lanes, is_write)

    def _generic(
        self, group: Group, addresses: Array, size: int, width: int, lanes: Array | None, is_write: bool
    ) -> list[tuple[Array | None, Array, Array]]:
        if int(addresses.max()) < SHARED_WINDOW:
            return list(self.space.locate(addresses, size, width, is_write))
        windows = addresses >> np.uint64(56)
        names = {0: "global", 1: "shared", 2: "local", 3: "param"}
        distinct = np.unique(windows)
        found: list[tuple[Array | None, Array, Array]] = []
        for window in distinct:
            if int(window) not in names:
                raise IllegalAddress(int(addresses[windows == window][0]), width, is_write)
            name = names[int(window)]
            base = np.uint64(int(window) << 56)
            if addresses.size == 1:
                return self.places(group, name, addresses - base, size, width, lanes, is_write)
            if distinct.size == 1 and lanes is None:
                return self.places(group, name, addresses - base, size, width, None, is_write)
            where = np.flatnonzero(windows == window)
            chosen = where if lanes is None else lanes[where]
            for inner, array, index in self._places_of(
                group, name, addresses[where] - base, size, width, chosen, is_write
            ):
                found.append((where if inner is None else where[inner], array, index))
        return found

    def _places_of(
        self, group: Group, space: str, offsets: Array, size: int, width: int, lanes: Array, is_write: bool
    ) -> list[tuple[Array | None, Array, Array]]:
        """Like `places` for addresses that have been picked already."""
        some = Group(group.slots[lanes], [], False)
        return self.places(some, space, offsets, size, width, None, is_write)

    # --- loads and stores -------------------------------------------------------------------------------------------

    def load(
        self, group: Group, space: str, addresses: Array, size: int, count: int, lanes: Array | None = None
    ) -> list[Array]:
        """`count` neighbouring elements of `size` bytes for each chosen lane, as unsigned integers."""
        if lanes is not None and not lanes.size:
            return [np.empty(0, _KIND[size])] * count
        found = self.places(group, space, addresses, size, size * count, lanes, False)
        if len(found) == 1 and found[0][0] is None:
            _, array, index = found[0]
            return [array.take(index if position == 0 else index + position) for position in range(count)]
        total = sum(index.size for _, _, index in found)
        out = [np.empty(total, _KIND[size]) for _ in range(count)]
        for where, array, index in found:
            for position in range(count):
                out[position][where] = array[index + position]
        return out

    def store(
        self,
        group: Group,
        space: str,
        addresses: Array,
        size: int,
        values: list[Array],
        lanes: Array | None = None,
    ) -> None:
        """Where lanes collide, the highest lane's value stays."""
        if lanes is not None and not lanes.size:
            return
        found = self.places(group, space, addresses, size, size * len(values), lanes, True)
        for where, array, index in found:
            for position, value in enumerate(values):
                chosen = pick(pick(value, lanes), where)
                if index.size == 1 and chosen.size > 1:
                    chosen = chosen[-1:]
                array[index if position == 0 else index + position] = chosen

    def parameter(self, offset: int, size: int) -> Array:
        """A kernel parameter (or a piece of one), the same for all lanes."""
        return self.parameters[offset : offset + size].view(_KIND[size])

    def trap(self, group: Group) -> None:
        """Raises: Trap, always."""
        raise Trap(f"trap in {self.kernel.function.name} by {group.count} threads")
