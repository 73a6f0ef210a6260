# SPDX-License-Identifier: Apache-2.0
"""Array functions of the software GPU. Copies into and out of arrays are those of driver_memory."""

from __future__ import annotations

from .array import Array, Description
from .entries import entry
from .host import put_u64, unpack
from .state import Context, Device


@entry
def cuArray3DCreate_v2(device: Device, out: int, description: int) -> None:
    asked = Description(*unpack("<QQQIII", description))
    asked.check()
    size = asked.width * asked.element_bytes * (asked.height or 1) * (asked.depth or 1)
    address = device.space.allocate(size, 512)
    handle = device.add(Array(address, asked))
    owner = device.context()
    owner.memory.add(address)
    owner.handles.add(handle)
    put_u64(out, handle)


@entry
def cuArrayDestroy(device: Device, handle: int) -> None:
    array = device.remove(handle, Array)
    device.space.free(array.address)
    for context in [value for value in device.objects.values() if isinstance(value, Context)]:
        context.memory.discard(array.address)
        context.handles.discard(handle)
