# SPDX-License-Identifier: Apache-2.0
"""Conformance: virtual memory management and memory pools."""

from __future__ import annotations

from typing import Any

from .probe import Probe, check

PINNED, ON_DEVICE, READ_WRITE = 1, 1, 3
NOT_READY = 600


def _properties(p: Probe) -> Any:
    return p.pack("<IIIiQQ", PINNED, 0, ON_DEVICE, 0, 0, 0)


def _pool(p: Probe) -> int:
    return p.value("cuMemPoolCreate", p.pack("<IIII72x", PINNED, 0, ON_DEVICE, 0))


def _access(p: Probe, flags: int = READ_WRITE) -> Any:
    return p.pack("<IiI", ON_DEVICE, 0, flags)


def _granularity(p: Probe) -> int:
    return p.value("cuMemGetAllocationGranularity", _properties(p), 0, kind="size_t")


@check
def map_and_use(p: Probe) -> None:
    """Reserve, create, map, allow, use, and everything back; two pieces side by side are one range to a copy."""
    unit = _granularity(p)
    p.true(unit >= 4096 and unit & (unit - 1) == 0, "the granularity is a power of two")
    base = p.value("cuMemAddressReserve", 16 * unit, 0, 0, 0)
    p.later("cuMemAddressFree", base, 16 * unit)
    p.true(base % unit == 0, "a reservation is aligned")
    pieces = [p.value("cuMemCreate", unit, _properties(p), 0) for _ in range(2)]
    for index, piece in enumerate(pieces):
        p.ok("cuMemMap", base + index * unit, unit, 0, piece, 0)
        p.ok("cuMemRelease", piece)
    p.ok("cuMemSetAccess", base, 2 * unit, _access(p), 1)
    p.ok("cuMemsetD8Async", base + unit - 8, 0x77, 16, 0)
    p.equal(p.download(base + unit - 8, 16), b"\x77" * 16, "bytes across two pieces")
    p.ok("cuMemUnmap", base, 2 * unit)
    host = p.host(16)
    p.expect(1, "cuMemcpyDtoH_v2", host, base, 16)


@check
def mapped_twice(p: Probe) -> None:
    """One physical allocation at two addresses is the same memory."""
    unit = _granularity(p)
    base = p.value("cuMemAddressReserve", 2 * unit, 0, 0, 0)
    p.later("cuMemAddressFree", base, 2 * unit)
    piece = p.value("cuMemCreate", unit, _properties(p), 0)
    p.ok("cuMemMap", base, unit, 0, piece, 0)
    p.ok("cuMemMap", base + unit, unit, 0, piece, 0)
    p.ok("cuMemSetAccess", base, 2 * unit, _access(p), 1)
    p.upload(base + 100, b"the same bytes")
    p.equal(p.download(base + unit + 100, 14), b"the same bytes", "through the other address")
    p.ok("cuMemUnmap", base, unit)
    p.ok("cuMemUnmap", base + unit, unit)
    p.ok("cuMemRelease", piece)


@check
def virtual_refused(p: Probe) -> None:
    """Sizes off the granularity, overlapping maps, unknown addresses."""
    unit = _granularity(p)
    cell = p.cell()
    p.expect(1, "cuMemAddressReserve", cell, 0, 0, 0, 0)
    p.expect(1, "cuMemCreate", cell, unit + 1, _properties(p), 0)
    p.expect(1, "cuMemCreate", cell, 0, _properties(p), 0)
    base = p.value("cuMemAddressReserve", 4 * unit, 0, 0, 0)
    piece = p.value("cuMemCreate", unit, _properties(p), 0)
    p.expect(1, "cuMemSetAccess", base, unit, _access(p), 1)
    p.ok("cuMemMap", base, unit, 0, piece, 0)
    p.expect(1, "cuMemMap", base, unit, 0, piece, 0)
    p.expect(1, "cuMemAddressFree", base, 4 * unit)
    p.ok("cuMemUnmap", base + unit, unit)  # nothing is mapped there, and that is no error
    p.expect(1, "cuMemUnmap", base, 0)
    p.expect(1, "cuMemUnmap", 0x1234500000, unit)
    p.ok("cuMemUnmap", base, 4 * unit)
    p.ok("cuMemRelease", piece)
    p.expect(1, "cuMemRelease", piece)
    pair = p.value("cuMemCreate", 2 * unit, _properties(p), 0)
    p.expect(801, "cuMemMap", base, unit, 0, pair, 0)
    p.expect(801, "cuMemMap", base, unit, unit, pair, 0)
    p.ok("cuMemMap", base, 2 * unit, 0, pair, 0)
    p.expect(1, "cuMemUnmap", base, unit)
    p.ok("cuMemUnmap", base, 2 * unit)
    p.ok("cuMemRelease", pair)
    p.expect(1, "cuMemAddressFree", base, unit)
    p.ok("cuMemAddressFree", base, 4 * unit)
    p.expect(1, "cuMemAddressFree", base, 4 * unit)


@check
def large_reservation(p: Probe) -> None:
    """32 GiB of addresses cost nothing until they are mapped."""
    base = p.value("cuMemAddressReserve", 32 << 30, 0, 0, 0)
    p.ok("cuMemAddressFree", base, 32 << 30)


@check
def stream_ordered(p: Probe) -> None:
    """Memory from the device's pool, used and freed in stream order."""
    stream = p.stream()
    pool = p.value("cuDeviceGetDefaultMemPool", 0)
    p.equal(p.value("cuDeviceGetMemPool", 0), pool, "current pool")
    address = p.value("cuMemAllocAsync", 1 << 20, stream)
    p.ok("cuMemsetD8Async", address, 9, 1 << 20, stream)
    back = p.host(64)
    p.ok("cuMemcpyDtoHAsync_v2", back, address + (1 << 20) - 64, 64, stream)
    p.ok("cuMemFreeAsync", address, stream)
    p.ok("cuStreamSynchronize", stream)
    p.equal(p.bytes_of(back, 64), b"\x09" * 64, "bytes of pool memory")
    p.equal(p.value("cuMemAllocAsync", 0, stream), 0, "address of no bytes")
    p.ok("cuMemFreeAsync", 0, stream)
    p.expect(1, "cuMemFreeAsync", 0x1234500, stream)


@check
def pools(p: Probe) -> None:
    """A pool of one's own: attributes, allocation, trimming, end."""
    pool = _pool(p)
    value = p.cell("uint64_t", 12345678)
    p.ok("cuMemPoolSetAttribute", pool, 4, value)
    read = p.cell("uint64_t")
    p.ok("cuMemPoolGetAttribute", pool, 4, read)
    p.equal(int(read[0]), 12345678, "release threshold")
    stream = p.stream()
    address = p.value("cuMemAllocFromPoolAsync", 4 << 20, pool, stream)
    p.ok("cuStreamSynchronize", stream)
    p.ok("cuMemPoolGetAttribute", pool, 7, read)
    p.true(read[0] >= 4 << 20, "used bytes of the pool")
    p.ok("cuMemFreeAsync", address, stream)
    p.ok("cuStreamSynchronize", stream)
    p.ok("cuMemPoolGetAttribute", pool, 7, read)
    p.equal(int(read[0]), 0, "used bytes after the free")
    p.ok("cuMemPoolTrimTo", pool, 0)
    p.ok("cuMemPoolDestroy", pool)
    p.expect(1, "cuMemPoolGetAttribute", p.value("cuDeviceGetDefaultMemPool", 0), 999, read)


@check
def pools_let_go(p: Probe) -> None:
    """What was freed in a stream's order goes back when the stream is synchronized with, and at nothing less."""
    pool, stream, other = _pool(p), p.stream(), p.stream()
    event, read = p.event(2), p.cell("uint64_t")

    def reserved() -> int:
        p.ok("cuMemPoolGetAttribute", pool, 5, read)
        return int(read[0])

    def freed_in(used: int) -> None:
        address = p.value("cuMemAllocFromPoolAsync", 40 << 20, pool, used)
        p.ok("cuMemFreeAsync", address, used)

    freed_in(stream)
    held = reserved()
    p.true(held >= 40 << 20, "the pool holds what was allocated from it")
    p.ok("cuStreamSynchronize", other)
    while p.call("cuStreamQuery", stream) == NOT_READY:
        pass
    p.ok("cuMemPoolTrimTo", pool, 0)
    p.equal(reserved(), held, "held after a look at the stream and a trim")
    p.ok("cuStreamSynchronize", stream)
    p.equal(reserved(), 0, "held after the stream was synchronized with")
    freed_in(stream)
    p.ok("cuEventRecord", event, stream)
    p.ok("cuEventSynchronize", event)
    p.equal(reserved(), 0, "held after an event of the stream was synchronized with")
    p.ok("cuMemPoolSetAttribute", pool, 4, p.cell("uint64_t", 1 << 40))
    freed_in(stream)
    p.ok("cuStreamSynchronize", stream)
    p.true(reserved() >= 40 << 20, "the pool keeps up to its release threshold")
    p.ok("cuMemPoolTrimTo", pool, 0)
    p.equal(reserved(), 0, "held after a trim of what was synchronized with")
    p.ok("cuMemPoolDestroy", pool)
