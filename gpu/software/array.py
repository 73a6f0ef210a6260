# SPDX-License-Identifier: Apache-2.0
"""CUDA arrays of the software GPU: rows one after the other in device memory, without the gaps of a real card's layout."""

from __future__ import annotations

from typing import Final

import attrs

from .attributes import ATTRIBUTES
from .ptx.texture import FORMAT_BYTES
from .state import CudaError

INVALID_VALUE: Final = 1
LAYERED: Final = 1
SURFACE: Final = 2
CUBEMAP: Final = 4
GATHER: Final = 8


@attrs.frozen
class Description:
    """A CUDA_ARRAY3D_DESCRIPTOR: sizes in elements, rows and slices (or layers); 0 where there is no such dimension."""

    width: int
    height: int
    depth: int
    format: int
    channels: int
    flags: int

    def check(self) -> None:
        """Is it one that CUDA makes?

        Raises:
            CudaError: INVALID_VALUE, as the documentation of cuArray3DCreate has it.
        """
        if not self.width or self.channels not in (1, 2, 4) or self.format not in FORMAT_BYTES:
            raise CudaError(INVALID_VALUE, f"{self}")
        if self.flags & ~(LAYERED | SURFACE | CUBEMAP | GATHER):
            raise CudaError(INVALID_VALUE, f"array flags {self.flags:#x}")
        layered = bool(self.flags & LAYERED)
        if self.depth and not self.height and not layered:
            raise CudaError(INVALID_VALUE, "slices without rows")
        if layered and not self.depth:
            raise CudaError(INVALID_VALUE, "no layers")
        if self.flags & CUBEMAP and (
            self.width != self.height or not self.depth or self.depth % 6 or (self.depth != 6 and not layered)
        ):
            raise CudaError(INVALID_VALUE, "a cube has six square faces")
        if self.flags & GATHER and (not self.height or self.depth):
            raise CudaError(INVALID_VALUE, "gathering is for two dimensions")
        if any(size > ATTRIBUTES[limit] for size, limit in self._limits()):
            raise CudaError(INVALID_VALUE, f"larger than the device has arrays: {self}")

    def _limits(self) -> list[tuple[int, int]]:
        """Each size, and the CUdevice_attribute of its limit: MAXIMUM_TEXTURE1D_WIDTH and its like."""
        if self.flags & CUBEMAP:
            return [(self.width, 53), (self.depth, 54)] if self.flags & LAYERED else [(self.width, 52)]
        if self.flags & LAYERED:
            if not self.height:
                return [(self.width, 42), (self.depth, 43)]
            return [(self.width, 27), (self.height, 28), (self.depth, 29)]
        if self.depth:
            return [(self.width, 24), (self.height, 25), (self.depth, 26)]
        if self.height:
            return [(self.width, 22), (self.height, 23)]
        return [(self.width, 21)]

    @property
    def element_bytes(self) -> int:
        """Bytes of one element, all channels together."""
        return FORMAT_BYTES[self.format] * self.channels


@attrs.define(eq=False)
class Array:
    """An array and where it lies. Sizes in bytes, rows and slices; a dimension there is not counts 1."""

    address: int
    description: Description

    @property
    def row_bytes(self) -> int:
        """Bytes in a row."""
        return self.description.width * self.description.element_bytes

    @property
    def rows(self) -> int:
        """Rows in a slice."""
        return self.description.height or 1

    @property
    def slices(self) -> int:
        """Slices, or layers."""
        return self.description.depth or 1

    def check_box(self, at: tuple[int, int, int], size: tuple[int, int, int]) -> None:
        """Does the array hold a box of that size there (bytes, rows, slices)?

        Raises:
            CudaError: INVALID_VALUE where it does not, or where the box cuts through elements.
        """
        whole = (self.row_bytes, self.rows, self.slices)
        if any(a + s > w for a, s, w in zip(at, size, whole, strict=True)):
            raise CudaError(INVALID_VALUE, f"{size} at {at} of an array of {whole}")
        if at[0] % self.description.element_bytes or size[0] % self.description.element_bytes:
            raise CudaError(INVALID_VALUE, "a part of an element")
