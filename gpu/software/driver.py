# SPDX-License-Identifier: Apache-2.0
"""The software GPU behind the driver vtable: what the worker installs where there is no NVIDIA GPU.

Puts Python functions into the fields of ``struct vgpu_driver``. It reports itself under its own name and
version, runs PTX, and answers CUDA_ERROR_NOT_SUPPORTED where it has no entry. Made for truth, not speed.
"""

from __future__ import annotations

import os
from typing import Any

import attrs

from . import (
    driver_array,
    driver_context,
    driver_graph,
    driver_graph_memory,
    driver_link,
    driver_memory,
    driver_module,
    driver_node,
    driver_stream,
    driver_texture,
)
from .entries import ENTRIES, call
from .state import Device

# Importing these fills ENTRIES.
PARTS = (
    driver_context,
    driver_memory,
    driver_array,
    driver_texture,
    driver_module,
    driver_link,
    driver_stream,
    driver_graph,
    driver_graph_memory,
    driver_node,
)

DEFAULT_CAPACITY_BYTES = 4 << 30


@attrs.frozen(eq=False)
class SoftwareGpu:
    """Keeps the callbacks alive that C holds pointers to."""

    device: Device
    callbacks: list[Any]


def _bind(ffi: Any, device: Device, name: str, kind: Any) -> Any:
    def function(*arguments: Any) -> int:
        numbers = [int(ffi.cast("uintptr_t", a)) if isinstance(a, ffi.CData) else a for a in arguments]
        return call(device, name, tuple(numbers))

    return ffi.callback(kind, function, error=999)


def install(ffi: Any, driver: Any, capacity_bytes: int | None = None) -> SoftwareGpu:
    """Fill the vtable.

    Args:
        ffi: the FFI that knows ``struct vgpu_driver``.
        driver: pointer to the struct; fields without an entry are left as they are.
        capacity_bytes: device memory; default 4 GiB, or ``VGPU_SOFTWARE_MEMORY`` bytes.

    Returns:
        What must stay referenced for as long as the vtable is used.
    """
    if capacity_bytes is None:
        capacity_bytes = int(os.environ.get("VGPU_SOFTWARE_MEMORY", DEFAULT_CAPACITY_BYTES))
    device = Device(capacity_bytes)
    callbacks = []
    fields: list[tuple[str, Any]] = ffi.typeof("struct vgpu_driver").fields
    for name, field in fields:
        if name in ENTRIES:
            pointer = _bind(ffi, device, name, field.type)
            setattr(driver, name, pointer)
            callbacks.append(pointer)
    unknown = set(ENTRIES) - {name for name, _ in fields}
    if unknown:
        raise RuntimeError(f"entries that are not in the vtable: {', '.join(sorted(unknown))}")
    return SoftwareGpu(device, callbacks)
