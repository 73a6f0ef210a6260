# SPDX-License-Identifier: Apache-2.0
"""Conformance: kernel launches, what is refused at the call, and faults."""

from __future__ import annotations

import struct
from itertools import product

from .kernels import PTX
from .probe import Probe, check, fatal_check


@check
def in_three_dimensions(p: Probe) -> None:
    """Every thread of a 3D grid of 3D blocks runs once and knows where it is."""
    shape = p.function("shape", PTX)
    grid, block = (3, 2, 2), (4, 3, 2)
    threads = 24
    out = p.device(12 * threads * 4)
    p.ok("cuLaunchKernel", shape, *grid, *block, 0, 0, p.parameters("Q", out), 0)
    words = struct.unpack(f"<{12 * threads}I", p.download(out, 12 * threads * 4))
    expected = tuple(b << 16 | t for b, t in product(range(12), range(threads)))
    p.equal(words, expected, "block and thread numbers")


@check
def parameters_both_ways(p: Probe) -> None:
    """``kernelParams`` and ``extra`` give a kernel the same bytes; giving both is refused."""
    mixed = p.function("mixed", PTX)
    out = p.device(8)
    twelve = struct.pack("<III", 100, 200, 300)
    cells = [p.pack("<B", 5), p.pack("<Q", out), p.host(twelve), p.pack("<H", 4000)]
    array = p.pack("<4Q", *cells)
    p.ok("cuLaunchKernel", mixed, 1, 1, 1, 1, 1, 1, 0, 0, array, 0)
    p.equal(p.download(out, 4), (4605).to_bytes(4, "little"), "sum through kernelParams")
    packed = struct.pack("<BxxxxxxxQ12sH", 6, out + 4, twelve, 4000)
    size = p.cell("uint64_t", len(packed))
    extra = p.pack("<QQQQQ", 1, p.host(packed), 2, size, 0)
    p.ok("cuLaunchKernel", mixed, 1, 1, 1, 1, 1, 1, 0, 0, 0, extra)
    p.equal(p.download(out + 4, 4), (4606).to_bytes(4, "little"), "sum through extra")
    p.expect(1, "cuLaunchKernel", mixed, 1, 1, 1, 1, 1, 1, 0, 0, array, extra)


@check
def parameters_are_copied_at_the_call(p: Probe) -> None:
    """What the caller does to the arguments afterwards does not matter."""
    fill = p.function("fill", PTX)
    out = p.device(64)
    value = p.pack("<I", 17)
    array = p.pack("<3Q", p.pack("<Q", out), value, p.pack("<I", 16))
    p.ok("cuLaunchKernel", fill, 1, 1, 1, 16, 1, 1, 0, 0, array, 0)
    p.ffi.memmove(value, struct.pack("<I", 99), 4)
    p.equal(p.download(out, 64), struct.pack("<16I", *[17] * 16), "memory")


@check
def shared_memory(p: Probe) -> None:
    """Static and dynamic shared memory with a barrier; more than the default only after asking for it."""
    words = list(range(256))
    for name, shared in (("reverse", 1024), ("fixed", 0)):
        function = p.function(name, PTX)
        memory = p.device(struct.pack("<256I", *words))
        p.launch(function, 1, 256, "Q", memory, shared=shared)
        p.equal(p.download(memory, 1024), struct.pack("<256I", *words[::-1]), f"words after {name}")
    reverse = p.function("reverse", PTX)
    most = p.value("cuDeviceGetAttribute", 97, 0, kind="int")
    memory = p.device(struct.pack("<256I", *words))
    parameters = p.parameters("Q", memory)
    if most > 48 << 10:
        p.expect(1, "cuLaunchKernel", reverse, 1, 1, 1, 256, 1, 1, most, 0, parameters, 0)
        p.ok("cuFuncSetAttribute", reverse, 8, most)
        p.ok("cuLaunchKernel", reverse, 1, 1, 1, 256, 1, 1, most, 0, parameters, 0)
        p.equal(p.download(memory, 1024), struct.pack("<256I", *words[::-1]), "words with all shared memory")


@check
def refused(p: Probe) -> None:
    """Shapes and sizes no device takes are refused at the call, and nothing is broken by it."""
    fill = p.function("fill", PTX)
    out = p.device(64)
    array = p.parameters("QII", out, 1, 16)
    shapes = (
        (0, 1, 1, 1, 1, 1, 0), (1, 0, 1, 1, 1, 1, 0), (1, 1, 0, 1, 1, 1, 0), (1, 1, 1, 0, 1, 1, 0),
        (1, 1, 1, 1, 0, 1, 0), (1, 1, 1, 1, 1, 0, 0), (1, 1, 1, 2048, 1, 1, 0), (1, 1, 1, 64, 64, 1, 0),
        (1, 1, 1, 1, 1, 65, 0), (1, 65536, 1, 1, 1, 1, 0), (1, 1, 65536, 1, 1, 1, 0), (1 << 31, 1, 1, 1, 1, 1, 0),
        (1, 1, 1, 1, 1, 1, 1 << 20), (1, 1, 1, 1, 1, 1, (48 << 10) + 1),
    )  # fmt: skip
    for shape in shapes:
        p.expect(1, "cuLaunchKernel", fill, *shape, 0, array, 0)
    p.expect(1, "cuLaunchKernel", fill, 1, 1, 1, 16, 1, 1, 0, 0, 0, 0)
    bounded = p.function("bounded", PTX)
    p.expect(1, "cuLaunchKernel", bounded, 1, 1, 1, 128, 1, 1, 0, 0, p.parameters("Q", 0), 0)
    p.ok("cuLaunchKernel", fill, 1, 1, 1, 16, 1, 1, 0, 0, array, 0)
    p.equal(p.download(out, 64), struct.pack("<16I", *[1] * 16), "a launch after refusals")


CONFIG = "<IIIIIIIxxxxQQIxxxx"


@check
def with_attributes(p: Probe) -> None:
    """``cuLaunchKernelEx``: plain, cooperative, and with programmatic serialization."""
    fill = p.function("fill", PTX)
    out = p.device(64)
    stream = p.stream()
    for value, attributes in enumerate(([], [(2, 1)], [(6, 1)]), start=1):
        packed = b"".join(struct.pack("<IxxxxI60x", number, setting) for number, setting in attributes)
        config = p.pack(CONFIG, 1, 1, 1, 16, 1, 1, 0, stream, p.host(packed), len(attributes))
        p.ok("cuLaunchKernelEx", config, fill, p.parameters("QII", out, value, 16), 0)
        p.ok("cuStreamSynchronize", stream)
        p.equal(
            p.download(out, 64), struct.pack("<16I", *[value] * 16), f"memory with attributes {attributes}"
        )
    empty = p.pack(CONFIG, 0, 1, 1, 16, 1, 1, 0, stream, 0, 0)
    p.expect(1, "cuLaunchKernelEx", empty, fill, p.parameters("QII", out, 9, 16), 0)


@check
def cooperative(p: Probe) -> None:
    """As many blocks as are resident at once run together; more are refused."""
    fill = p.function("fill", PTX)
    out = p.device(4096)
    array = p.parameters("QII", out, 5, 1024)
    p.ok("cuLaunchCooperativeKernel", fill, 4, 1, 1, 256, 1, 1, 0, 0, array)
    p.equal(p.download(out, 4096), struct.pack("<1024I", *[5] * 1024), "memory")
    most = p.value(
        "cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags", fill, 256, 0, 0, kind="int"
    ) * p.value("cuDeviceGetAttribute", 16, 0, kind="int")
    p.expect(720, "cuLaunchCooperativeKernel", fill, most + 1, 1, 1, 256, 1, 1, 0, 0, array)


@check
def in_order(p: Probe) -> None:
    """Work of a stream runs in the order it was enqueued."""
    fill, scale = p.function("fill", PTX), p.function("scale", PTX)
    stream, out = p.stream(), p.device(4096)
    p.launch(fill, 4, 256, "QII", out, 1, 1024, stream=stream)
    for factor in (3, 5, 7):
        p.launch(scale, 4, 256, "QII", out, factor, 1024, stream=stream)
    back = p.host(4096)
    p.ok("cuMemcpyDtoHAsync_v2", back, out, 4096, stream)
    p.ok("cuStreamSynchronize", stream)
    p.equal(p.bytes_of(back, 4096), struct.pack("<1024I", *[105] * 1024), "memory")


def _sticky(p: Probe, code: int) -> None:
    p.expect(code, "cuCtxSynchronize")
    cell = p.cell()
    p.expect(code, "cuMemAlloc_v2", cell, 256)
    p.expect(code, "cuStreamQuery", 0)
    p.ok("cuDeviceGetCount", p.cell("int"))
    p.value("cuDeviceGetAttribute", 10, 0, kind="int")
    p.drop_cleanups()


@fatal_check
def illegal_address(p: Probe) -> None:
    """A store to nowhere is reported at the next synchronization, and then by every call."""
    wild = p.function("wild", PTX)
    p.launch(wild, 1, 1, "Q", 0x10_0000_0000)
    _sticky(p, 700)


@fatal_check
def misaligned_address(p: Probe) -> None:
    """A word stored at an odd address."""
    wild = p.function("wild", PTX)
    p.launch(wild, 1, 1, "Q", p.device(64) + 1)
    _sticky(p, 716)


@fatal_check
def trap(p: Probe) -> None:
    """A kernel that gives up."""
    p.launch(p.function("trapped", PTX), 1, 1)
    _sticky(p, p.differs("measured: NVIDIA reports trap as a failed launch", software=719, nvidia=719))


@fatal_check
def primary_context_reset(p: Probe) -> None:
    """Resetting the primary context ends what was in it; a new retain works; a library outlives it."""
    address = p.value("cuMemAlloc_v2", 32 << 20)
    loaded = p.value("cuLibraryLoadData", p.host(PTX), 0, 0, 0, 0, 0, 0)
    kernel = p.value("cuLibraryGetKernel", loaded, b"globals\0")
    out = p.value("cuMemAlloc_v2", 8)
    for turn in range(2):
        p.launch(kernel, 1, 1, "Q", out)
        p.equal(p.download(out, 8), struct.pack("<II", 7 + turn, 33), f"counter and table in turn {turn}")
    p.ok("cuDevicePrimaryCtxReset_v2", 0)
    context = p.value("cuDevicePrimaryCtxRetain", 0)
    p.ok("cuCtxSetCurrent", context)
    p.ok("cuCtxSynchronize")
    p.expect(1, "cuMemFree_v2", address)
    out = p.value("cuMemAlloc_v2", 8)
    p.launch(kernel, 1, 1, "Q", out)
    p.equal(p.download(out, 8), struct.pack("<II", 7, 33), "counter and table in the new context")
    p.drop_cleanups()
