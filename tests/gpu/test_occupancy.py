# SPDX-License-Identifier: Apache-2.0
"""A block that may be launched has room: CUB launches as many blocks as occupancy says, and of 0 it launches none."""

from __future__ import annotations

import pytest

from vgpu.gpu.software import attributes
from vgpu.gpu.software.driver_module import blocks_per_multiprocessor, registers
from vgpu.gpu.software.memory import AddressSpace
from vgpu.gpu.software.ptx import load_ptx
from vgpu.gpu.software.state import Function, LoadedModule


def function(directives: str) -> Function:
    """A kernel that names 2,000 registers."""
    body = "\n".join(f"mov.u32 %r{i}, {i};" for i in range(2000))
    module = load_ptx(
        f".version 8.0\n.target sm_75\n.address_size 64\n.entry k()\n{directives}\n"
        f"{{ .reg .b32 %r<2000>;\n{body}\nret; }}\n"
    )
    loaded = LoadedModule(module.instantiate(AddressSpace(1 << 20)), is_library=True)
    return Function(loaded, module.kernels["k"], attributes.SHARED_PER_BLOCK, name_bytes=b"k\0")


@pytest.mark.parametrize(
    ("directives", "least"),
    [
        ("", 1),
        (".maxntid 384, 1, 1", 1),
        (".reqntid 512, 1, 1\n.minnctapersm 2", 2),
        (".maxntid 32, 1, 1", 1),
    ],
)
def test_the_largest_block_has_room(directives: str, least: int) -> None:
    kernel = function(directives)
    assert kernel.kernel.registers == 255
    assert blocks_per_multiprocessor(kernel, kernel.kernel.max_threads, 0) >= least
    assert 8 <= registers(kernel) <= 255
