# SPDX-License-Identifier: Apache-2.0
"""The instruction table on a real GPU: what the executor is held to must be what the hardware does.

Talks to libcuda by ctypes, alone: no part of this project is between, so that a disagreement is about the table.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from .instruction_table import ROWS, agrees, kernel_text, operand_bits

pytestmark = pytest.mark.gpu
HEADER = ".version 8.4\n.target sm_90\n.address_size 64\n"


class Gpu:
    """A context on the first device and the whole table as one module."""

    def __init__(self) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.check("cuInit", 0)
        device, self.context, self.module = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self.check("cuDeviceGet", ctypes.byref(device), 0)
        self.check("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), device)
        self.check("cuCtxSetCurrent", self.context)
        text = HEADER + "\n".join(kernel_text(row, number) for number, row in enumerate(ROWS))
        self.check("cuModuleLoadData", ctypes.byref(self.module), text.encode() + b"\0")

    def check(self, name: str, *arguments: Any) -> None:
        status = getattr(self.cuda, name)(*arguments)
        assert status == 0, f"{name} gave {status}"

    def run(self, number: int) -> tuple[list[list[int]], list[int]]:
        """(operands of each lane, its result)"""
        row = ROWS[number]
        bits = operand_bits(row, number)
        out = np.zeros(row.lanes, np.uint64)
        source, target, function = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_void_p()
        self.check("cuMemAlloc_v2", ctypes.byref(source), ctypes.c_size_t(bits.nbytes))
        self.check("cuMemAlloc_v2", ctypes.byref(target), ctypes.c_size_t(out.nbytes))
        self.check(
            "cuMemcpyHtoD_v2", source, bits.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(bits.nbytes)
        )
        self.check("cuMemsetD8_v2", target, ctypes.c_ubyte(0), ctypes.c_size_t(out.nbytes))
        self.check("cuModuleGetFunction", ctypes.byref(function), self.module, f"row{number}".encode())
        values = (target, source, ctypes.c_uint32(row.lanes))
        pointers = (ctypes.c_void_p * 3)(*(ctypes.cast(ctypes.pointer(v), ctypes.c_void_p) for v in values))
        grid = -(-row.lanes // 96)
        self.check("cuLaunchKernel", function, grid, 1, 1, 96, 1, 1, 0, None, pointers, None)
        self.check(
            "cuMemcpyDtoH_v2", out.ctypes.data_as(ctypes.c_void_p), target, ctypes.c_size_t(out.nbytes)
        )
        self.check("cuMemFree_v2", source)
        self.check("cuMemFree_v2", target)
        return bits.tolist(), out.tolist()


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return Gpu()


@pytest.mark.parametrize("number", range(len(ROWS)), ids=[row.text for row in ROWS])
def test_hardware_agrees(gpu: Gpu, number: int) -> None:
    operands, results = gpu.run(number)
    wrong = [
        ([hex(o) for o in lane], hex(got))
        for lane, got in zip(operands, results, strict=True)
        if not agrees(ROWS[number], got, lane, on_hardware=True)
    ]
    assert not wrong, f"{len(wrong)} of {len(results)}: {wrong[:4]}"
