# SPDX-License-Identifier: Apache-2.0
"""What the PTX tests share: a small CUDA-like harness over the executor."""

from __future__ import annotations

import struct
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import pytest

from vgpu.gpu.software.memory import AddressSpace
from vgpu.gpu.software.ptx import Instance, LaunchResult, load_ptx

Array = npt.NDArray[Any]


@attrs.define(eq=False)
class Harness:
    """Device memory and one loaded module."""

    space: AddressSpace
    text: list[str] = attrs.Factory(list)
    instance: Instance | None = None

    def load(self, ptx: str) -> Instance:
        self.instance = load_ptx(ptx).instantiate(self.space)
        return self.instance

    def upload(self, array: Array) -> int:
        address = self.space.allocate(max(array.nbytes, 1))
        self.space.write(address, np.ascontiguousarray(array).tobytes())
        return address

    def download(self, address: int, like: Array) -> Array:
        return np.frombuffer(self.space.read(address, like.nbytes), like.dtype).reshape(like.shape).copy()

    def launch(
        self,
        name: str,
        grid: int | tuple[int, int, int],
        block: int | tuple[int, int, int],
        *arguments: int | np.generic | bytes,
        shared: int = 0,
        **options: Any,
    ) -> LaunchResult:
        """Arguments: int is a 64-bit pointer, a NumPy scalar is itself, bytes are a structure."""
        assert self.instance is not None
        kernel = self.instance.module.kernels[name]
        packed = bytearray(kernel.params_size)
        assert len(arguments) == len(kernel.params)
        for parameter, argument in zip(kernel.params, arguments, strict=True):
            if isinstance(argument, int):
                data = struct.pack("<Q", argument)
            else:
                data = argument if isinstance(argument, bytes) else argument.tobytes()
            assert len(data) == parameter.size, (parameter, argument)
            packed[parameter.offset : parameter.offset + parameter.size] = data
        return self.instance.launch(
            name,
            grid=grid if isinstance(grid, tuple) else (grid, 1, 1),
            block=block if isinstance(block, tuple) else (block, 1, 1),
            dynamic_shared=shared,
            params=bytes(packed),
            printf=self.text.append,
            **options,
        )


@pytest.fixture
def harness() -> Harness:
    return Harness(AddressSpace(256 << 20))
