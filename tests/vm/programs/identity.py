# SPDX-License-Identifier: Apache-2.0
"""Who the device is, asked of libcuda and of libnvidia-ml: one JSON object."""

from __future__ import annotations

import ctypes
import json
import uuid
from typing import Any


def ask_cuda() -> dict[str, Any]:
    cuda = ctypes.CDLL("libcuda.so.1")
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    name, address, number = (ctypes.create_string_buffer(size) for size in (100, 32, 16))
    for status in (
        cuda.cuInit(0),
        cuda.cuDeviceGet(ctypes.byref(device), 0),
        cuda.cuDeviceGetName(name, len(name), device),
        cuda.cuDeviceGetPCIBusId(address, len(address), device),
        cuda.cuDeviceGetUuid_v2(number, device),
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device),
    ):
        assert status == 0, status
    return {
        "name": name.value.decode(),
        "pci": address.value.decode(),
        "uuid": f"GPU-{uuid.UUID(bytes=number.raw)}",
        "memory": memory.value,
    }


class Memory(ctypes.Structure):
    """nvmlMemory_t, bytes."""

    _fields_ = (("total", ctypes.c_uint64), ("free", ctypes.c_uint64), ("used", ctypes.c_uint64))


class Pci(ctypes.Structure):
    """nvmlPciInfo_t."""

    _fields_ = (
        ("legacy", ctypes.c_char * 16), ("domain", ctypes.c_uint), ("bus", ctypes.c_uint), ("device", ctypes.c_uint),
        ("numbers", ctypes.c_uint), ("subsystem", ctypes.c_uint), ("address", ctypes.c_char * 32),
    )  # fmt: skip


def ask_nvml() -> dict[str, Any]:
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    device, memory, pci = ctypes.c_void_p(), Memory(), Pci()
    name, number = (ctypes.create_string_buffer(96) for _ in range(2))
    for status in (
        nvml.nvmlInit_v2(),
        nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)),
        nvml.nvmlDeviceGetName(device, name, len(name)),
        nvml.nvmlDeviceGetUUID(device, number, len(number)),
        nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)),
        nvml.nvmlDeviceGetPciInfo_v3(device, ctypes.byref(pci)),
        nvml.nvmlShutdown(),
    ):
        assert status == 0, status
    return {
        "name": name.value.decode(),
        "pci": pci.address.decode(),
        "uuid": number.value.decode(),
        "memory": memory.total,
    }


print(json.dumps({"cuda": ask_cuda(), "nvml": ask_nvml()}))
