# SPDX-License-Identifier: Apache-2.0
"""A memory pool of the software GPU: when memory that was freed in a stream's order goes back.

As NVIDIA's driver has it (measured on 580): it stays the pool's until the stream is synchronized with, then what is beyond the
release threshold goes. Asking whether the stream is done, and trimming, do not get at it before. Freed memory of the same stream
is given again at once.
"""

from __future__ import annotations

import attrs

from .memory import AddressSpace

RELEASE_THRESHOLD = 4


@attrs.define(eq=False)
class _Kept:
    """Memory that was freed and is still the pool's. ``stream``: in whose order; None once that was synchronized with."""

    address: int
    size: int
    stream: object | None


@attrs.define(eq=False)
class Pool:
    """Attributes by their numbers, what is allocated, and what is kept; sizes in bytes."""

    space: AddressSpace
    attributes: dict[int, int] = attrs.Factory(dict)
    used: int = 0
    high: int = 0
    reserved_high: int = 0
    _live: dict[int, int] = attrs.Factory(dict)
    _kept: list[_Kept] = attrs.Factory(list)

    @property
    def reserved(self) -> int:
        """What the pool holds of the device."""
        return self.used + sum(block.size for block in self._kept)

    def allocate(self, size: int, stream: object) -> int:
        """Memory that the stream may use from here on.

        Raises:
            CudaError: OUT_OF_MEMORY.
        """
        again = next(
            (b for b in self._kept if b.size == size and (b.stream is None or b.stream is stream)), None
        )
        if again is not None:
            self._kept.remove(again)
            address = again.address
        else:
            address = self.space.allocate(size, 512)
        self._live[address] = size
        self.used += size
        self.high = max(self.high, self.used)
        self.reserved_high = max(self.reserved_high, self.reserved)
        return address

    def free(self, address: int) -> None:
        """Give it back at once, the device being idle."""
        self.used -= self._live.pop(address)
        self.space.free(address)

    def free_in_order(self, address: int, stream: object) -> None:
        """Give it back when the stream has come to it; it is seen to have when it is synchronized with."""
        size = self._live.pop(address)
        self.used -= size
        self._kept.append(_Kept(address, size, stream))

    def synchronized(self, stream: object | None) -> None:
        """A stream was synchronized with; None: all were."""
        touched = False
        for block in self._kept:
            if block.stream is not None and (stream is None or block.stream is stream):
                block.stream = None
                touched = True
        if touched:
            self.trim(self.attributes.get(RELEASE_THRESHOLD, 0))

    def trim(self, keep: int) -> None:
        """Let go of what can be had, until no more than ``keep`` is held."""
        for block in [b for b in self._kept if b.stream is None]:
            if self.reserved <= keep:
                return
            self._kept.remove(block)
            self.space.free(block.address)

    def end(self) -> None:
        """Let go of all that is kept; what is allocated stays so until it is freed."""
        for block in self._kept:
            block.stream = None
        self.trim(0)
