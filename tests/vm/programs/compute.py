# SPDX-License-Identifier: Apache-2.0
"""CUDA through ctypes alone, as a script of a few lines does it: ``compute.py PTX-FILE``. Nothing but the C library's name."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

cuda = ctypes.CDLL("libcuda.so.1")
COUNT = 1024


def check(status: int) -> None:
    assert status == 0, status


def main() -> None:
    devices, device = ctypes.c_int(), ctypes.c_int()
    context, module, fill = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    memory = ctypes.c_uint64()
    name = ctypes.create_string_buffer(100)
    check(cuda.cuInit(0))
    check(cuda.cuDeviceGetCount(ctypes.byref(devices)))
    check(cuda.cuDeviceGet(ctypes.byref(device), 0))
    check(cuda.cuDeviceGetName(name, len(name), device))
    print("devices", devices.value)
    print(name.value.decode())
    check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    check(cuda.cuCtxSetCurrent(context))
    check(cuda.cuModuleLoadData(ctypes.byref(module), Path(sys.argv[1]).read_bytes() + b"\0"))
    check(cuda.cuModuleGetFunction(ctypes.byref(fill), module, b"fill"))
    check(cuda.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(4 * COUNT)))
    values = (ctypes.c_uint64(memory.value), ctypes.c_uint32(3072), ctypes.c_uint32(COUNT))
    parameters = (ctypes.c_void_p * 3)(*(ctypes.addressof(value) for value in values))
    check(cuda.cuLaunchKernel(fill, COUNT // 256, 1, 1, 256, 1, 1, 0, None, parameters, None))
    result = (ctypes.c_uint32 * COUNT)()
    check(cuda.cuMemcpyDtoH_v2(result, memory, ctypes.c_size_t(4 * COUNT)))
    print("sum", sum(result))
    check(cuda.cuMemFree_v2(memory))
    print("done")


main()
