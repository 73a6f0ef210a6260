# SPDX-License-Identifier: Apache-2.0
"""Memory functions of the software GPU: allocation, copies, memsets, pinned windows, VMM, pools."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable

import numpy as np

from .array import Array
from .driver_graph_memory import capture_allocation, capture_free, free_block
from .entries import INVALID_VALUE, NOT_SUPPORTED, entry
from .host import get_bytes, get_u64, put_bytes, put_i32, put_u64, unpack
from .memory import PAGE
from .pool import Pool
from .state import Context, CudaError, Device, Stream

INVALID_ADDRESS_SPACE = 717
# struct layout of CUDA_MEMCPY2D and CUDA_MEMCPY3D as public documentation gives them.
MEMCPY_2D = "<QQIxxxxQQQQQQIxxxxQQQQQQ"
MEMCPY_3D = "<QQQQIxxxxQQQQQQQQQQIxxxxQQQQQQQQQ"
BOX_BYTES = struct.calcsize(MEMCPY_3D)
NODE_MEMCPY, NODE_MEMSET = 1, 2
HOST, DEVICE, ARRAY, UNIFIED = 1, 2, 3, 4


@entry
def cuMemGetInfo_v2(device: Device, free: int, total: int) -> None:
    put_u64(free, device.space.capacity - device.space.used)
    put_u64(total, device.space.capacity)


@entry
def cuMemAlloc_v2(device: Device, out: int, size: int) -> None:
    if not size:
        raise CudaError(INVALID_VALUE)
    put_u64(out, _allocate(device, size))


def _allocate(device: Device, size: int) -> int:
    """Memory that ends with the current context, aligned as textures want it."""
    address = device.space.allocate(size, 512)
    device.context().memory.add(address)
    return address


@entry
def cuMemAllocPitch_v2(device: Device, out: int, pitch: int, width: int, height: int, element: int) -> None:
    if element not in (4, 8, 16) or not width or not height:
        raise CudaError(INVALID_VALUE)
    row = -(-width // 512) * 512
    put_u64(out, _allocate(device, row * height))
    put_u64(pitch, row)


@entry
def cuMemFree_v2(device: Device, address: int) -> None:
    if not address:
        return
    pool = device.pool_of.pop(address, None)
    if pool is not None:
        pool.free(address)
        return
    if free_block(device, address):
        return
    contexts = [c for c in device.objects.values() if isinstance(c, Context) and address in c.memory]
    if not contexts:
        raise CudaError(INVALID_VALUE, f"{address:#x} is not an allocation")
    device.space.free(address)
    for context in contexts:
        context.memory.discard(address)


@entry
def cuMemGetAddressRange_v2(device: Device, base: int, size: int, address: int) -> None:
    found = device.space.find(address)
    if found is None:
        raise CudaError(500)
    put_u64(base, found[0])
    put_u64(size, found[1])


@entry
def cuMemHostRegister_v2(device: Device, address: int, size: int, flags: int) -> None:
    # SAFETY: the worker keeps the segment mapped until it has unregistered it.
    memory = memoryview((ctypes.c_uint8 * size).from_address(address)).cast("B")
    buffer = np.frombuffer(memory, dtype=np.uint8)
    try:
        device.space.map_window(address, buffer)
    except ValueError as error:
        raise CudaError(712, str(error)) from None
    device.windows[address] = size
    device.context().windows.add(address)


@entry
def cuMemHostUnregister(device: Device, address: int) -> None:
    if device.windows.pop(address, None) is None:
        raise CudaError(713)
    device.context().windows.discard(address)
    device.space.unmap_window(address)


@entry
def cuMemHostGetDevicePointer_v2(device: Device, out: int, address: int, flags: int) -> None:
    if device.space.find(address) is None:
        raise CudaError(INVALID_VALUE)
    put_u64(out, address)


def _not_null(host: int) -> None:
    if not host:
        raise CudaError(INVALID_VALUE, "a null host pointer")


def _to_device(device: Device, destination: int, source: int, size: int) -> None:
    device.space.view(destination, size, is_write=True)[:] = np.frombuffer(get_bytes(source, size), np.uint8)


def _from_device(device: Device, destination: int, source: int, size: int) -> None:
    put_bytes(destination, device.space.view(source, size).tobytes())


def _within(device: Device, destination: int, source: int, size: int) -> None:
    data = device.space.view(source, size).copy()
    device.space.view(destination, size, is_write=True)[:] = data


def _submit_copy(
    device: Device,
    stream: Stream,
    run: Callable[[], None],
    to: int,
    from_: int,
    size: int,
    from_kind: int,
    to_kind: int,
) -> None:
    """Copy, or become a node that can tell what it copies."""
    raw = b""
    if stream.capture is not None:
        raw = struct.pack(
            MEMCPY_3D,
            *(
                0,
                0,
                0,
                0,
                from_kind,
                from_ if from_kind == HOST else 0,
                0 if from_kind == HOST else from_,
                0,
                0,
                size,
                1,
            ),
            *(0, 0, 0, 0, to_kind, to if to_kind == HOST else 0, 0 if to_kind == HOST else to, 0, 0, size, 1),
            *(size, 1, 1),
        )
    device.submit(stream, NODE_MEMCPY, run, copy=raw)


@entry
def cuMemcpyHtoDAsync_v2(device: Device, destination: int, source: int, size: int, stream: int) -> None:
    if size:
        _not_null(source)
        target = device.stream(stream)
        _submit_copy(
            device,
            target,
            lambda: _to_device(device, destination, source, size),
            destination,
            source,
            size,
            HOST,
            DEVICE,
        )


@entry
def cuMemcpyDtoHAsync_v2(device: Device, destination: int, source: int, size: int, stream: int) -> None:
    if size:
        _not_null(destination)
        target = device.stream(stream)
        _submit_copy(
            device,
            target,
            lambda: _from_device(device, destination, source, size),
            destination,
            source,
            size,
            DEVICE,
            HOST,
        )


@entry
def cuMemcpyDtoDAsync_v2(device: Device, destination: int, source: int, size: int, stream: int) -> None:
    if size:
        target = device.stream(stream)
        _submit_copy(
            device,
            target,
            lambda: _within(device, destination, source, size),
            destination,
            source,
            size,
            DEVICE,
            DEVICE,
        )


@entry
def cuMemcpyHtoD_v2(device: Device, destination: int, source: int, size: int) -> None:
    cuMemcpyHtoDAsync_v2(device, destination, source, size, 0)


@entry
def cuMemcpyDtoH_v2(device: Device, destination: int, source: int, size: int) -> None:
    cuMemcpyDtoHAsync_v2(device, destination, source, size, 0)


@entry
def cuMemcpyDtoD_v2(device: Device, destination: int, source: int, size: int) -> None:
    cuMemcpyDtoDAsync_v2(device, destination, source, size, 0)


class _Side:
    """One side of a 2D/3D copy: where byte (x, y, z) lies.

    ``size``: width in bytes, height and depth of the box. ``places``: memory by its type: host address, device address, array.
    """

    def __init__(
        self,
        device: Device,
        kind: int,
        places: tuple[int, int, int],
        at: tuple[int, int, int],
        pitch: int,
        height: int,
        size: tuple[int, int, int],
    ) -> None:
        if kind not in (HOST, DEVICE, ARRAY, UNIFIED):
            raise CudaError(INVALID_VALUE, f"memory type {kind}")
        self.is_host = kind == HOST
        self.is_either = kind == UNIFIED
        self.base = places[0] if kind == HOST else places[1]
        self.x, self.y, self.z = at
        self.pitch, self.height = pitch or size[0], height or size[1]
        if kind == ARRAY:
            array = device.get(places[2], Array)
            array.check_box(at, size)
            self.base, self.pitch, self.height = array.address, array.row_bytes, array.rows

    def row(self, y: int, z: int) -> int:
        """Address of a row's first byte."""
        return self.base + ((self.z + z) * self.height + self.y + y) * self.pitch + self.x


def _copy_rows(
    device: Device, source: _Side, destination: _Side, width: int, height: int, depth: int
) -> None:
    for side in (source, destination):
        if side.is_either:
            side.is_host = device.space.find(side.base) is None
    for z in range(depth):
        for y in range(height):
            a, b = source.row(y, z), destination.row(y, z)
            data = get_bytes(a, width) if source.is_host else device.space.read(a, width)
            if destination.is_host:
                put_bytes(b, data)
            else:
                device.space.write(b, data)


def _check_pitches(width: int, *sides: int) -> None:
    """Refuse rows that do not fit into their pitch."""
    for x, pitch in zip(sides[::2], sides[1::2], strict=True):
        if pitch and x + width > pitch:
            raise CudaError(INVALID_VALUE, f"rows of {width} bytes at {x} with a pitch of {pitch}")


@entry
def cuMemcpy2DAsync_v2(device: Device, parameters: int, stream: int) -> None:
    (sx, sy, sk, sh, sd, sa, sp, dx, dy, dk, dh, dd, da, dp, width, height) = unpack(MEMCPY_2D, parameters)
    if not width or not height:
        return
    _check_pitches(width, sx, sp, dx, dp)
    size = (width, height, 1)
    source = _Side(device, sk, (sh, sd, sa), (sx, sy, 0), sp, 0, size)
    destination = _Side(device, dk, (dh, dd, da), (dx, dy, 0), dp, 0, size)
    target = device.stream(stream)
    fields = (
        sx,
        sy,
        0,
        0,
        sk,
        sh,
        sd,
        sa,
        0,
        sp,
        height,
        dx,
        dy,
        0,
        0,
        dk,
        dh,
        dd,
        da,
        0,
        dp,
        height,
        width,
        height,
        1,
    )
    raw = struct.pack(MEMCPY_3D, *fields) if target.capture is not None else b""
    device.submit(
        target, NODE_MEMCPY, lambda: _copy_rows(device, source, destination, width, height, 1), copy=raw
    )


@entry
def cuMemcpy3DAsync_v2(device: Device, parameters: int, stream: int) -> None:
    raw = get_bytes(parameters, BOX_BYTES)
    device.submit(device.stream(stream), NODE_MEMCPY, copy_3d(device, raw), copy=raw)


def copy_3d(device: Device, raw: bytes) -> _Copy3D:
    """The copy that a CUDA_MEMCPY3D describes, as something to run."""
    return _Copy3D(device, raw)


class _Copy3D:
    def __init__(self, device: Device, raw: bytes) -> None:
        buffer = ctypes.create_string_buffer(raw, len(raw))
        (
            sx, sy, sz, _sl, sk, sh, sd, sa, _r0, sp, sheight, dx, dy, dz, _dl, dk, dh, dd, da, _r1, dp, dheight,
            width, height, depth,
        ) = unpack(MEMCPY_3D, ctypes.addressof(buffer))  # fmt: skip
        _check_pitches(width, sx, sp, dx, dp)
        self.device, self.raw = device, raw
        self.shape = (width, height, depth)
        self.source = _Side(device, sk, (sh, sd, sa), (sx, sy, sz), sp, sheight, self.shape)
        self.destination = _Side(device, dk, (dh, dd, da), (dx, dy, dz), dp, dheight, self.shape)

    def __call__(self) -> None:
        _copy_rows(self.device, self.source, self.destination, *self.shape)


def memset_2d(
    device: Device, address: int, pitch: int, value: int, element: int, width: int, height: int
) -> None:
    """Fill ``height`` rows of ``width`` elements of ``element`` bytes."""
    if address % element or pitch % element or (height > 1 and width * element > pitch):
        raise CudaError(INVALID_VALUE)
    pattern = np.frombuffer((value & (1 << 8 * element) - 1).to_bytes(element, "little"), np.uint8)
    for y in range(height):
        row = device.space.view(address + y * pitch, width * element, is_write=True)
        row.reshape(-1, element)[:] = pattern


def _memset(device: Device, stream: int, *shape: int) -> None:
    address, pitch, value, element, width, height = shape
    if width and height:
        device.submit(
            device.stream(stream),
            NODE_MEMSET,
            lambda: memset_2d(device, address, pitch, value, element, width, height),
            memset=(address, pitch or width * element, value, element, width, height),
        )


def memset_bytes(*shape: int) -> bytes:
    """A CUDA_MEMSET_NODE_PARAMS."""
    return struct.pack("<QQIIQQ", *shape)


@entry
def cuMemsetD8Async(device: Device, address: int, value: int, count: int, stream: int) -> None:
    _memset(device, stream, address, 0, value, 1, count, 1)


@entry
def cuMemsetD16Async(device: Device, address: int, value: int, count: int, stream: int) -> None:
    _memset(device, stream, address, 0, value, 2, count, 1)


@entry
def cuMemsetD32Async(device: Device, address: int, value: int, count: int, stream: int) -> None:
    _memset(device, stream, address, 0, value, 4, count, 1)


@entry
def cuMemsetD2D8Async(
    device: Device, address: int, pitch: int, value: int, width: int, height: int, stream: int
) -> None:
    _memset(device, stream, address, pitch, value, 1, width, height)


@entry
def cuMemsetD2D16Async(
    device: Device, address: int, pitch: int, value: int, width: int, height: int, stream: int
) -> None:
    _memset(device, stream, address, pitch, value, 2, width, height)


@entry
def cuMemsetD2D32Async(
    device: Device, address: int, pitch: int, value: int, width: int, height: int, stream: int
) -> None:
    _memset(device, stream, address, pitch, value, 4, width, height)


# -- virtual memory management --------------------------------------------------------------------


@entry
def cuMemGetAllocationGranularity(device: Device, out: int, properties: int, option: int) -> None:
    put_u64(out, PAGE)


@entry
def cuMemAddressReserve(
    device: Device, out: int, size: int, alignment: int, address: int, flags: int
) -> None:
    try:
        put_u64(out, device.space.reserve(size, alignment, address))
    except ValueError as error:
        raise CudaError(INVALID_VALUE, str(error)) from None


@entry
def cuMemAddressFree(device: Device, address: int, size: int) -> None:
    try:
        device.space.release(address, size)
    except (KeyError, ValueError) as error:
        raise CudaError(INVALID_VALUE, str(error)) from None


@entry
def cuMemCreate(device: Device, out: int, size: int, properties: int, flags: int) -> None:
    try:
        physical = device.space.create_physical(size)
    except ValueError as error:
        raise CudaError(INVALID_VALUE, str(error)) from None
    handle = device.add(physical)
    device.physical[handle] = physical
    put_u64(out, handle)


@entry
def cuMemRelease(device: Device, handle: int) -> None:
    physical = device.physical.pop(handle, None)
    if physical is None:
        raise CudaError(INVALID_VALUE)
    device.objects.pop(handle, None)
    device.space.release_physical(physical)


@entry
def cuMemMap(device: Device, address: int, size: int, offset: int, handle: int, flags: int) -> None:
    physical = device.physical.get(handle)
    if physical is None:
        raise CudaError(INVALID_VALUE)
    if offset or size != physical.size:
        raise CudaError(NOT_SUPPORTED, "a part of an allocation, which NVIDIA's driver refuses too")
    try:
        device.space.map(address, physical)
    except (KeyError, ValueError) as error:
        raise CudaError(INVALID_VALUE, str(error)) from None


@entry
def cuMemUnmap(device: Device, address: int, size: int) -> None:
    try:
        device.space.unmap_range(address, size)
    except KeyError:
        raise CudaError(INVALID_VALUE) from None


@entry
def cuMemSetAccess(device: Device, address: int, size: int, descriptors: int, count: int) -> None:
    for index in range(count):
        _kind, _identity, flags = unpack("<iii", descriptors + 12 * index)
        try:
            device.space.set_access(address, size, readable=flags in (1, 3), writable=flags == 3)
        except KeyError:
            raise CudaError(INVALID_VALUE) from None


# -- pools -----------------------------------------------------------------------------------------


@entry
def cuDeviceGetDefaultMemPool(device: Device, out: int, dev: int) -> None:
    put_u64(out, device.default_pool)


@entry
def cuDeviceGetMemPool(device: Device, out: int, dev: int) -> None:
    put_u64(out, device.pool)


@entry
def cuDeviceSetMemPool(device: Device, dev: int, pool: int) -> None:
    device.get(pool, Pool)
    device.pool = pool


@entry
def cuMemAllocAsync(device: Device, out: int, size: int, stream: int) -> None:
    cuMemAllocFromPoolAsync(device, out, size, device.pool, stream)


@entry
def cuMemAllocFromPoolAsync(device: Device, out: int, size: int, pool: int, stream: int) -> None:
    holder = device.get(pool, Pool)
    if not size:
        put_u64(out, 0)  # no memory and no error, as NVIDIA's driver has it
        return
    captured = capture_allocation(device, device.stream(stream), size)
    if captured is not None:
        put_u64(out, captured)
        return
    address = holder.allocate(size, device.stream(stream))
    device.pool_of[address] = holder
    put_u64(out, address)


@entry
def cuMemFreeAsync(device: Device, address: int, stream: int) -> None:
    if capture_free(device, device.stream(stream), address):
        return
    pool = device.pool_of.pop(address, None)
    if pool is not None:
        pool.free_in_order(address, device.stream(stream))
    else:
        cuMemFree_v2(device, address)


@entry
def cuMemPoolCreate(device: Device, out: int, properties: int) -> None:
    put_u64(out, device.add(Pool(device.space)))


@entry
def cuMemPoolDestroy(device: Device, pool: int) -> None:
    if pool == device.default_pool:
        raise CudaError(INVALID_VALUE)
    device.remove(pool, Pool).end()
    if device.pool == pool:
        device.pool = device.default_pool


@entry
def cuMemPoolTrimTo(device: Device, pool: int, keep: int) -> None:
    device.get(pool, Pool).trim(keep)


@entry
def cuMemPoolSetAttribute(device: Device, pool: int, attribute: int, value: int) -> None:
    holder = device.get(pool, Pool)
    if attribute in (1, 2, 3):
        holder.attributes[attribute] = get_u64(value) & 0xFFFFFFFF
    elif attribute == 4:
        holder.attributes[attribute] = get_u64(value)
    elif attribute == 6:
        holder.reserved_high = holder.reserved
    elif attribute == 8:
        holder.high = holder.used
    else:
        raise CudaError(INVALID_VALUE)


@entry
def cuMemPoolGetAttribute(device: Device, pool: int, attribute: int, value: int) -> None:
    holder = device.get(pool, Pool)
    if attribute in (1, 2, 3):
        put_i32(value, holder.attributes.get(attribute, 1))
    elif attribute == 4:
        put_u64(value, holder.attributes.get(4, 0))
    elif attribute == 5:
        put_u64(value, holder.reserved)
    elif attribute == 6:
        put_u64(value, holder.reserved_high)
    elif attribute == 7:
        put_u64(value, holder.used)
    elif attribute == 8:
        put_u64(value, holder.high)
    else:
        raise CudaError(INVALID_VALUE)


@entry
def cuMemPoolSetAccess(device: Device, pool: int, descriptors: int, count: int) -> None:
    device.get(pool, Pool)
