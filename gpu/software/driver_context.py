# SPDX-License-Identifier: Apache-2.0
"""Device and context functions of the software GPU."""

from __future__ import annotations

from . import attributes as facts
from .entries import INVALID_VALUE, NOT_SUPPORTED, entry
from .host import put_bytes, put_i32, put_u64
from .state import Context, CudaError, Device

INVALID_DEVICE = 101
UNSUPPORTED_LIMIT = 215
REFUSED_LIMITS = (3, 9)  # device runtime synchronisation depth, persisting L2 per process


@entry
def cuInit(device: Device, flags: int) -> None:
    if flags:
        raise CudaError(INVALID_VALUE)


@entry
def cuDriverGetVersion(device: Device, version: int) -> None:
    put_i32(version, facts.DRIVER_VERSION)


def _needs(address: int) -> None:
    """Refuse a null pointer where a result has to go."""
    if not address:
        raise CudaError(INVALID_VALUE, "a null pointer")


def _only_device(dev: int) -> None:
    if dev != 0:
        raise CudaError(INVALID_DEVICE)


@entry
def cuDeviceGet(device: Device, out: int, ordinal: int) -> None:
    _needs(out)
    _only_device(ordinal)
    put_i32(out, 0)


@entry
def cuDeviceGetCount(device: Device, count: int) -> None:
    _needs(count)
    put_i32(count, 1)


def _text(address: int, length: int, text: bytes, dev: int) -> None:
    _only_device(dev)
    _needs(address)
    if length <= 0:
        raise CudaError(INVALID_VALUE)
    put_bytes(address, text[: length - 1] + b"\0")


@entry
def cuDeviceGetName(device: Device, name: int, length: int, dev: int) -> None:
    _text(name, length, facts.NAME.encode(), dev)


@entry
def cuDeviceGetUuid_v2(device: Device, uuid: int, dev: int) -> None:
    _only_device(dev)
    _needs(uuid)
    put_bytes(uuid, facts.UUID)


@entry
def cuDeviceTotalMem_v2(device: Device, size: int, dev: int) -> None:
    _only_device(dev)
    _needs(size)
    put_u64(size, device.space.capacity)


@entry
def cuDeviceGetAttribute(device: Device, out: int, attribute: int, dev: int) -> None:
    _needs(out)
    _only_device(dev)
    if attribute not in facts.ATTRIBUTES:
        raise CudaError(INVALID_VALUE)
    put_i32(out, facts.ATTRIBUTES[attribute])


@entry
def cuDeviceGetPCIBusId(device: Device, text: int, length: int, dev: int) -> None:
    domain, bus, slot = facts.PCI
    _text(text, length, f"{domain:04x}:{bus:02x}:{slot:02x}.0".encode(), dev)


@entry
def cuDevicePrimaryCtxRetain(device: Device, out: int, dev: int) -> None:
    _only_device(dev)
    device.primary_active += 1
    put_u64(out, device.primary_handle)


@entry
def cuDevicePrimaryCtxRelease_v2(device: Device, dev: int) -> None:
    _only_device(dev)
    if not device.primary_active:
        raise CudaError(201)
    device.primary_active -= 1
    if not device.primary_active:
        device.end_context(device.primary)


@entry
def cuDevicePrimaryCtxSetFlags_v2(device: Device, dev: int, flags: int) -> None:
    device.primary.flags = flags


@entry
def cuDevicePrimaryCtxReset_v2(device: Device, dev: int) -> None:
    _only_device(dev)
    device.fault, device.fault_text = 0, ""
    device.primary_active = 0
    device.end_context(device.primary)


@entry
def cuCtxCreate_v2(device: Device, out: int, flags: int, dev: int) -> None:
    _only_device(dev)
    device.current = device.add(Context(flags))
    put_u64(out, device.current)


@entry
def cuCtxDestroy_v2(device: Device, context: int) -> None:
    if context == device.primary_handle:
        raise CudaError(201)
    device.end_context(device.remove(context, Context))
    if device.current == context:
        device.current = 0


@entry
def cuCtxSetCurrent(device: Device, context: int) -> None:
    if context:
        device.get(context, Context)
    device.current = context


@entry
def cuCtxSetFlags(device: Device, flags: int) -> None:
    device.context().flags = flags


@entry
def cuCtxSynchronize(device: Device) -> None:
    if device.captures:
        raise CudaError(900)
    device.synchronized(None)


def _known_limit(limits: dict[int, int], limit: int) -> None:
    if limit not in limits:
        raise CudaError(UNSUPPORTED_LIMIT if limit in REFUSED_LIMITS else INVALID_VALUE, f"limit {limit}")


@entry
def cuCtxSetLimit(device: Device, limit: int, value: int) -> None:
    limits = device.context().limits
    _known_limit(limits, limit)
    limits[limit] = value


@entry
def cuCtxGetLimit(device: Device, out: int, limit: int) -> None:
    limits = device.context().limits
    _known_limit(limits, limit)
    put_u64(out, limits[limit])


@entry
def cuCtxGetCacheConfig(device: Device, out: int) -> None:
    put_i32(out, 0)


@entry
def cuCtxSetCacheConfig(device: Device, config: int) -> None:
    if config > 3:
        raise CudaError(INVALID_VALUE)


@entry
def cuCtxGetSharedMemConfig(device: Device, out: int) -> None:
    put_i32(out, 1)


@entry
def cuCtxSetSharedMemConfig(device: Device, config: int) -> None:
    if config > 2:
        raise CudaError(INVALID_VALUE)


@entry
def cuCtxGetStreamPriorityRange(device: Device, least: int, greatest: int) -> None:
    put_i32(least, 0)
    put_i32(greatest, 0)


@entry
def cuCtxResetPersistingL2Cache(device: Device) -> None:
    """There is no persisting cache to reset: done."""


@entry
def cuThreadExchangeStreamCaptureMode(device: Device, mode: int) -> None:
    # The worker captures in relaxed mode; the modes proper are kept per thread by the guest.
    put_i32(mode, 2)


@entry
def cuGetExportTable(device: Device, out: int, uuid: int) -> None:
    put_u64(out, 0)
    raise CudaError(INVALID_VALUE)


@entry
def cuFlushGPUDirectRDMAWrites(device: Device, target: int, scope: int) -> None:
    raise CudaError(NOT_SUPPORTED)
