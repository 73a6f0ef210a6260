# SPDX-License-Identifier: Apache-2.0
"""Conformance: initialisation, device queries, contexts and limits."""

from __future__ import annotations

import re

from .probe import Probe, check

LIMIT_STACK, LIMIT_PRINTF, LIMIT_HEAP = 0, 1, 2
REGISTER_FLAGS = 3  # portable, with a device address


@check
def initialisation(p: Probe) -> None:
    """Flags must be zero; the version is that of a driver new enough."""
    p.ok("cuInit", 0)
    p.expect(1, "cuInit", 1)
    p.true(p.value("cuDriverGetVersion", kind="int") >= 12040, "the driver is of CUDA 12.4 or later")


@check
def ordinals(p: Probe) -> None:
    """Device 0 exists, those outside the count do not."""
    count = p.value("cuDeviceGetCount", kind="int")
    p.true(count >= 1, "there is a device")
    p.equal(p.value("cuDeviceGet", 0, kind="int"), 0, "device of ordinal 0")
    cell = p.cell("int")
    p.expect(101, "cuDeviceGet", cell, count)
    p.expect(101, "cuDeviceGet", cell, -1)
    p.expect(1, "cuDeviceGet", 0, 0)
    p.expect(1, "cuDeviceGetCount", 0)


@check
def identity(p: Probe) -> None:
    """Name (cut to the room given), UUID, PCI address, memory."""
    name = p.host(256)
    p.ok("cuDeviceGetName", name, 256, 0)
    full = p.bytes_of(name, 256).split(b"\0")[0]
    p.true(len(full) > 4, "the device has a name")
    p.ok("cuDeviceGetName", name, 4, 0)
    p.equal(p.bytes_of(name, 4), full[:3] + b"\0", "name cut to 4 bytes")
    uuid = p.host(16)
    p.ok("cuDeviceGetUuid_v2", uuid, 0)
    p.true(any(p.bytes_of(uuid, 16)), "the UUID is not zero")
    bus = p.host(32)
    p.ok("cuDeviceGetPCIBusId", bus, 32, 0)
    text = p.bytes_of(bus, 32).split(b"\0")[0].decode()
    p.true(
        re.fullmatch(r"[0-9A-Fa-f]{4}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.0", text) is not None,
        f"{text} is a PCI address",
    )
    total = p.value("cuDeviceTotalMem_v2", 0)
    p.true(total >= 64 << 20, "there is memory")
    cell = p.cell()
    p.expect(101, "cuDeviceGetName", name, 256, 77)
    p.expect(101, "cuDeviceTotalMem_v2", cell, 77)
    p.expect(101, "cuDeviceGetUuid_v2", uuid, 77)


@check
def attributes(p: Probe) -> None:
    """Values that programs rely on, and their relations to one another."""

    def get(number: int) -> int:
        return p.value("cuDeviceGetAttribute", number, 0, kind="int")

    p.equal(get(10), 32, "warp size")
    p.equal(get(1), 1024, "threads per block")
    p.equal((get(2), get(3), get(4)), (1024, 1024, 64), "largest block")
    p.equal((get(5), get(6), get(7)), (2**31 - 1, 65535, 65535), "largest grid")
    p.true(get(8) >= 48 << 10, "48 KiB of shared memory per block")
    p.true(get(97) >= get(8), "opt-in shared memory is not less than the usual")
    p.true(get(81) >= get(97), "shared memory per multiprocessor is not less than per block")
    p.equal(get(9), 65536, "constant memory")
    p.true(get(12) >= 32768, "registers per block")
    p.true(get(16) >= 1, "multiprocessors")
    p.true((get(75), get(76)) >= (7, 5), "compute capability 7.5 or later")
    p.true(get(39) >= 1024 and get(39) % 32 == 0, "resident threads are whole warps")
    p.equal(get(41), 1, "unified addressing")
    p.equal(get(99), 1, "host memory can be registered")
    p.equal(get(95), 1, "cooperative launch")
    p.equal(get(102), 1, "virtual memory management")
    p.equal(get(115), 1, "memory pools")
    cell = p.cell("int")
    p.expect(1, "cuDeviceGetAttribute", cell, 99999, 0)
    p.expect(1, "cuDeviceGetAttribute", 0, 10, 0)
    p.expect(101, "cuDeviceGetAttribute", cell, 10, 77)


@check
def every_attribute(p: Probe) -> None:
    """All documented numbers answer; none is negative except where CUDA says so."""
    cell = p.cell("int")
    for number in range(1, 135):
        got = p.call("cuDeviceGetAttribute", cell, number, 0)
        if got == 0:
            # the numbers of placement in a host's NUMA nodes use -1 for none
            p.true(cell[0] >= (-1 if number in (130, 131, 134) else 0), f"attribute {number} is {cell[0]}")
        else:
            p.equal(got, 1, f"result for attribute {number}")


@check
def primary_context(p: Probe) -> None:
    """Retained twice it is one context, and outlives the first release."""
    first = p.value("cuDevicePrimaryCtxRetain", 0)
    second = p.value("cuDevicePrimaryCtxRetain", 0)
    p.equal(second, first, "primary context")
    p.ok("cuDevicePrimaryCtxRelease_v2", 0)
    p.ok("cuDevicePrimaryCtxRelease_v2", 0)
    p.ok("cuCtxSynchronize")
    cell = p.cell()
    p.expect(101, "cuDevicePrimaryCtxRetain", cell, 77)


@check
def contexts_own_memory(p: Probe) -> None:
    """A created context becomes current; what was made in it ends with it."""
    primary = p.value("cuDevicePrimaryCtxRetain", 0)
    p.later("cuDevicePrimaryCtxRelease_v2", 0)
    created = p.value("cuCtxCreate_v2", 0, 0)
    p.true(created != primary, "a created context is not the primary one")
    address = p.value("cuMemAlloc_v2", 32 << 20)
    p.ok("cuMemsetD8Async", address, 1, 16, 0)
    p.ok("cuCtxDestroy_v2", created)
    p.ok("cuCtxSetCurrent", primary)
    p.expect(1, "cuMemFree_v2", address)
    p.ok("cuCtxSynchronize")


@check
def contexts_own_registrations(p: Probe) -> None:
    """Host memory that is registered is known to all contexts, until the one ends that it was registered in."""
    primary = p.value("cuDevicePrimaryCtxRetain", 0)
    p.later("cuDevicePrimaryCtxRelease_v2", 0)
    size = 1 << 20
    address = p.page_aligned(size)
    created = p.value("cuCtxCreate_v2", 0, 0)
    p.ok("cuMemHostRegister_v2", address, size, REGISTER_FLAGS)
    p.ok("cuCtxSetCurrent", primary)
    p.equal(p.value("cuMemHostGetDevicePointer_v2", address, 0), address, "its address in another context")
    p.ok("cuCtxSetCurrent", created)  # so that ending it leaves the stack of contexts as it was
    p.ok("cuCtxDestroy_v2", created)
    p.ok("cuCtxSetCurrent", primary)
    p.expect(1, "cuMemHostGetDevicePointer_v2", p.cell(), address, 0)
    p.ok("cuMemHostRegister_v2", address, size, REGISTER_FLAGS)
    p.ok("cuMemHostUnregister", address)


@check
def no_context(p: Probe) -> None:
    """Without a current context there is nothing to allocate in."""
    primary = p.value("cuDevicePrimaryCtxRetain", 0)
    p.later("cuDevicePrimaryCtxRelease_v2", 0)
    p.ok("cuCtxSetCurrent", 0)
    p.later("cuCtxSetCurrent", primary)
    cell = p.cell()
    p.expect(201, "cuMemAlloc_v2", cell, 256)
    p.expect(201, "cuCtxSynchronize")
    p.expect(201, "cuStreamCreateWithPriority", cell, 0, 0)
    p.expect(201, "cuEventCreate", cell, 0)
    p.ok("cuDeviceGetCount", p.cell("int"))


@check
def limits(p: Probe) -> None:
    """Limits read back at least what was set; unknown ones are refused."""
    for limit in (LIMIT_STACK, LIMIT_PRINTF, LIMIT_HEAP):
        before = p.value("cuCtxGetLimit", limit)
        p.true(before > 0, f"limit {limit} has a value")
    before = p.value("cuCtxGetLimit", LIMIT_STACK)
    p.ok("cuCtxSetLimit", LIMIT_STACK, before + 1024)
    p.true(p.value("cuCtxGetLimit", LIMIT_STACK) >= before + 1024, "the stack limit grew")
    p.ok("cuCtxSetLimit", LIMIT_STACK, before)
    cell = p.cell()
    for limit in (4, 5, 6, 7, 8):
        p.ok("cuCtxGetLimit", cell, limit)
    for limit in (3, 9):
        p.expect(215, "cuCtxGetLimit", cell, limit)
    p.expect(1, "cuCtxGetLimit", cell, 10)
    p.expect(1, "cuCtxGetLimit", cell, 99)
    p.expect(1, "cuCtxSetLimit", 99, 1)


@check
def cache_and_priorities(p: Probe) -> None:
    """The cache preference is kept or ignored, never refused; priorities are a range downwards."""
    p.ok("cuCtxSetCacheConfig", 1)
    p.true(p.value("cuCtxGetCacheConfig", kind="unsigned int") in (0, 1, 2, 3), "a cache preference")
    p.ok("cuCtxSetCacheConfig", 0)
    least, greatest = p.cell("int"), p.cell("int")
    p.ok("cuCtxGetStreamPriorityRange", least, greatest)
    p.true(least[0] == 0 and greatest[0] <= 0, "priorities go from 0 downwards")
