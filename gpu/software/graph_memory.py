# SPDX-License-Identifier: Apache-2.0
"""Memory of graphs on the software GPU: addresses that nodes have for good, and memory that launches put there.

As NVIDIA's programming guide has it ("Graph Memory Nodes"): an allocation node gets its address when it is made; memory is there
between the allocation and the free, in the order of the graph. Physical memory comes with a launch or an upload, stays for later
launches until it is trimmed, and may go from one graph to another that is launched into the same stream. Addresses are
used again inside a graph where the first allocation has been freed before the second is made.
"""

from __future__ import annotations

import attrs

from .memory import PAGE, AddressSpace
from .physical import PhysicalAllocation

USED, USED_HIGH, RESERVED, RESERVED_HIGH = range(4)


@attrs.define(eq=False)
class Block:
    """Addresses for one allocation at a time, and the memory behind them while there is some."""

    address: int
    size: int
    holders: int = 0  # nodes of graphs that exist, instances
    physical: PhysicalAllocation | None = None
    live: bool = False  # allocated, and not freed
    stream: object | None = None  # whose launch had it last


@attrs.define(eq=False)
class GraphMemory:
    """All of a device's. ``kept``: memory that is at no address. Sizes in bytes."""

    space: AddressSpace
    blocks: dict[int, Block] = attrs.Factory(dict)
    kept: list[PhysicalAllocation] = attrs.Factory(list)
    used_high: int = 0
    reserved_high: int = 0

    @property
    def used(self) -> int:
        """What is at an address of some graph."""
        return sum(b.size for b in self.blocks.values() if b.physical is not None)

    @property
    def reserved(self) -> int:
        """What is held of the device."""
        return self.used + sum(p.size for p in self.kept)

    def _note(self) -> None:
        self.used_high = max(self.used_high, self.used)
        self.reserved_high = max(self.reserved_high, self.reserved)

    def address(self, size: int) -> Block:
        """Addresses for a new node. Raises: MemoryError."""
        whole = -(-size // PAGE) * PAGE
        block = Block(self.space.reserve(whole), whole)
        self.blocks[block.address] = block
        return block

    def hold(self, block: Block) -> None:
        """One more node or instance has it."""
        block.holders += 1

    def release(self, block: Block) -> None:
        """One less; the last gives the addresses back once nothing is allocated there."""
        block.holders -= 1
        self._end(block)

    def _end(self, block: Block) -> None:
        if block.holders == 0 and not block.live and self.blocks.pop(block.address, None) is not None:
            if block.physical is not None:
                self.kept.append(self._unmap(block))
            self.space.release(block.address)

    def _unmap(self, block: Block) -> PhysicalAllocation:
        physical = block.physical
        assert physical is not None
        self.space.unmap_range(block.address, block.size)
        block.physical = None
        return physical

    def provide(self, blocks: list[Block], stream: object) -> None:
        """Memory at all of these, for a launch into that stream. Raises: MemoryError; what it got by then stays."""
        mine = {id(b) for b in blocks}
        for block in blocks:
            if block.physical is None:
                physical = self._find(block.size, mine, stream) or self.space.create_physical(block.size)
                self.space.map(block.address, physical)
                block.physical = physical
                self._note()
            block.stream = stream

    def _find(self, size: int, mine: set[int], stream: object) -> PhysicalAllocation | None:
        for physical in self.kept:
            if physical.size == size:
                self.kept.remove(physical)
                return physical
        for other in self.blocks.values():
            if id(other) in mine or other.live or other.size != size or other.stream is not stream:
                continue
            if other.physical is not None:
                return self._unmap(other)
        return None

    def begin(self, block: Block) -> None:
        """The launch has come to an allocation."""
        block.live = True
        self.space.set_access(block.address, block.size, readable=True, writable=True)

    def free(self, block: Block) -> None:
        """It is free; the memory stays there for the next launch."""
        block.live = False
        if block.physical is not None:
            self.space.set_access(block.address, block.size, readable=False, writable=False)
        self._end(block)

    def trim(self) -> None:
        """Let go of what is not allocated."""
        for block in self.blocks.values():
            if block.physical is not None and not block.live:
                self.kept.append(self._unmap(block))
        for physical in self.kept:
            self.space.release_physical(physical)
        self.kept.clear()

    def attribute(self, number: int) -> int:
        """CUgraphMem_attribute. Raises: KeyError."""
        return {
            USED: self.used,
            USED_HIGH: self.used_high,
            RESERVED: self.reserved,
            RESERVED_HIGH: self.reserved_high,
        }[number]

    def reset(self, number: int) -> None:
        """A high-water mark begins again. Raises: KeyError."""
        if number == USED_HIGH:
            self.used_high = self.used
        elif number == RESERVED_HIGH:
            self.reserved_high = self.reserved
        else:
            raise KeyError(number)
