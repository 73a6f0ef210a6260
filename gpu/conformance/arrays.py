# SPDX-License-Identifier: Apache-2.0
"""Arrays: what can be made, copies of every shape into and out of them, and that their memory comes back."""

from __future__ import annotations

from typing import Any

from vgpu.gpu.errors import Result

from .memory import LAYOUT_3D
from .probe import Probe, check

UINT8, UINT16, UINT32, FLOAT, HALF = 0x01, 0x02, 0x03, 0x20, 0x10
LAYERED, SURFACE, CUBEMAP, GATHER = 1, 2, 4, 8
HOST, DEVICE, ARRAY = 1, 2, 3

Place = tuple[int, Any, int, int, int, int, int]


def _description(
    p: Probe, size: tuple[int, int, int], form: int = UINT8, channels: int = 1, flags: int = 0
) -> Any:
    """A CUDA_ARRAY3D_DESCRIPTOR."""
    return p.pack("<QQQIIIxxxx", *size, form, channels, flags)


def _array(p: Probe, size: tuple[int, int, int], form: int = UINT8, channels: int = 1, flags: int = 0) -> int:
    """An array that is destroyed after the check."""
    handle = p.value("cuArray3DCreate_v2", _description(p, size, form, channels, flags))
    p.later("cuArrayDestroy", handle)
    return handle


def _in(array: int, x: int = 0, y: int = 0, z: int = 0) -> Place:
    return (ARRAY, array, x, y, z, 0, 0)


def _at(kind: int, where: Any, pitch: int, height: int, x: int = 0, y: int = 0, z: int = 0) -> Place:
    return (kind, where, x, y, z, pitch, height)


def _box(p: Probe, source: Place, destination: Place, size: tuple[int, int, int]) -> Any:
    """A CUDA_MEMCPY3D. ``size``: bytes, rows, slices."""

    def side(place: Place) -> tuple[Any, ...]:
        kind, where, x, y, z, pitch, height = place
        addresses = [where if kind == wanted else 0 for wanted in (HOST, DEVICE, ARRAY)]
        return (x, y, z, 0, kind, *addresses, 0, pitch, height)

    return p.pack(LAYOUT_3D, *side(source), *side(destination), *size)


def _copy(
    p: Probe,
    source: Place,
    destination: Place,
    size: tuple[int, int, int],
    expected: int = 0,
    stream: int = 0,
) -> None:
    p.expect(expected, "cuMemcpy3DAsync_v2", _box(p, source, destination, size), stream)
    p.ok("cuCtxSynchronize")


def _content(size: int) -> bytes:
    return bytes((7 * index + index // 251) & 255 for index in range(size))


@check
def kinds(p: Probe) -> None:
    """Every dimension, number of channels and format that is built can be made, filled and read."""
    shapes = [
        ((64, 0, 0), UINT8, 1, 0),
        ((33, 17, 0), FLOAT, 1, 0),
        ((33, 17, 0), HALF, 4, SURFACE),
        ((20, 10, 5), UINT16, 2, 0),
        ((20, 0, 3), UINT32, 1, LAYERED),
        ((20, 10, 3), FLOAT, 4, LAYERED),
        ((16, 16, 6), UINT8, 4, CUBEMAP),
        ((16, 16, 12), UINT8, 4, CUBEMAP | LAYERED),
        ((32, 32, 0), FLOAT, 1, GATHER),
    ]
    width = {UINT8: 1, UINT16: 2, HALF: 2, UINT32: 4, FLOAT: 4}
    for size, form, channels, flags in shapes:
        array = _array(p, size, form, channels, flags)
        row, rows, slices = size[0] * width[form] * channels, size[1] or 1, size[2] or 1
        content = _content(row * rows * slices)
        there, back = p.host(content), p.host(len(content))
        _copy(p, _at(HOST, there, row, rows), _in(array), (row, rows, slices))
        _copy(p, _in(array), _at(HOST, back, row, rows), (row, rows, slices))
        p.equal(p.bytes_of(back, len(content)), content, f"an array of {size}, format {form}, flags {flags}")


@check
def refused(p: Probe) -> None:
    """What cuArray3DCreate documents as invalid."""
    wrong = [
        ((0, 4, 0), UINT8, 1, 0),
        ((4, 4, 0), UINT8, 3, 0),
        ((4, 4, 0), 0x7F, 1, 0),
        ((4, 0, 4), UINT8, 1, 0),
        ((4, 4, 0), UINT8, 1, LAYERED),
        ((4, 8, 6), UINT8, 1, CUBEMAP),
        ((4, 4, 5), UINT8, 1, CUBEMAP),
        ((1 << 40, 4, 0), UINT8, 1, 0),
    ]
    for size, form, channels, flags in wrong:
        handle = p.cell()
        status = p.call("cuArray3DCreate_v2", handle, _description(p, size, form, channels, flags))
        p.true(
            status != 0, f"an array of {size}, format {form}, {channels} channels, flags {flags} is refused"
        )


@check
def parts(p: Probe) -> None:
    """A box in the middle, between arrays, and from and to device memory with its own pitch."""
    whole = _content(32 * 8 * 4)
    first, second = _array(p, (32, 8, 4)), _array(p, (16, 16, 0), UINT16)
    _copy(p, _at(HOST, p.host(whole), 32, 8), _in(first), (32, 8, 4))
    _copy(p, _in(first, 6, 2, 1), _in(second, 8, 3), (10, 4, 1))
    memory = p.device(_content(64 * 3))
    _copy(p, _at(DEVICE, memory, 64, 3, x=4, y=1), _in(first, 0, 0, 3), (20, 2, 1))
    back, flat = p.host(12), p.device(bytes(100))
    _copy(p, _in(second, 8, 3), _at(DEVICE, flat, 25, 4), (10, 4, 1))
    expected = bytearray(100)
    for y in range(4):
        start = (1 * 8 + 2 + y) * 32 + 6
        expected[y * 25 : y * 25 + 10] = whole[start : start + 10]
    p.equal(p.download(flat, 100), bytes(expected), "a box copied between arrays")
    _copy(p, _in(first, 0, 1, 3), _at(HOST, back, 12, 1), (12, 1, 1))
    p.equal(p.bytes_of(back, 12), _content(64 * 3)[64 * 2 + 4 :][:12], "a box copied from device memory")


@check
def bounds(p: Probe) -> None:
    """A box that leaves the array is refused, and nothing of it is copied."""
    array = _array(p, (16, 4, 2))
    memory = p.host(_content(256))
    _copy(p, _at(HOST, memory, 16, 4), _in(array), (16, 4, 2))
    for where, size in [
        ((1, 0, 0), (16, 4, 2)),
        ((0, 1, 0), (16, 4, 1)),
        ((0, 0, 1), (16, 4, 2)),
        ((0, 0, 0), (17, 1, 1)),
    ]:
        _copy(p, _at(HOST, memory, 32, 4), _in(array, *where), size, Result.INVALID_VALUE)
        _copy(p, _in(array, *where), _at(HOST, memory, 32, 4), size, Result.INVALID_VALUE)
    back = p.host(128)
    _copy(p, _in(array), _at(HOST, back, 16, 4), (16, 4, 2))
    p.equal(p.bytes_of(back, 128), _content(128), "an array after copies that were refused")


@check
def flat_copies(p: Probe) -> None:
    """cuMemcpy2D into and out of an array."""
    array, content = _array(p, (24, 6, 0)), _content(24 * 6)
    layout = "<QQIxxxxQQQQQQIxxxxQQQQQQ"
    to = p.pack(layout, 0, 0, HOST, p.host(content), 0, 0, 24, 0, 0, ARRAY, 0, 0, array, 0, 24, 6)
    p.ok("cuMemcpy2DAsync_v2", to, 0)
    back = p.host(bytes(10 * 3))
    out = p.pack(layout, 4, 2, ARRAY, 0, 0, array, 0, 0, 0, HOST, back, 0, 0, 10, 10, 3)
    p.ok("cuMemcpy2DAsync_v2", out, 0)
    p.ok("cuCtxSynchronize")
    expected = b"".join(content[(2 + y) * 24 + 4 :][:10] for y in range(3))
    p.equal(p.bytes_of(back, 30), expected, "a rectangle of an array")


@check
def memory_comes_back(p: Probe) -> None:
    """An array takes its size of the device's memory at least, and gives all of it back."""

    def free() -> int:
        available, total = p.cell("size_t"), p.cell("size_t")
        p.ok("cuMemGetInfo_v2", available, total)
        return int(available[0])

    before = free()
    array = p.value("cuArray3DCreate_v2", _description(p, (8192, 4096, 0), FLOAT, 2))
    during = free()
    p.ok("cuArrayDestroy", array)
    p.true(before - during >= 8192 * 4096 * 8, f"256 MiB are taken, not {before - during} bytes")
    p.equal(free(), before, "free memory when the array is destroyed")


@check
def nodes(p: Probe) -> None:
    """A copy into an array can be captured and added to a graph."""
    array, stream = _array(p, (64, 4, 0)), p.stream()
    content = _content(256)
    memory, back = p.device(content), p.device(bytes(256))
    p.ok("cuStreamBeginCapture_v2", stream, 1)
    p.ok("cuMemcpy3DAsync_v2", _box(p, _at(DEVICE, memory, 64, 4), _in(array), (64, 4, 1)), stream)
    graph = p.cell()
    p.ok("cuStreamEndCapture", stream, graph)
    p.later("cuGraphDestroy", int(graph[0]))
    nodes, count = p.host(8), p.cell("size_t", 1)
    p.ok("cuGraphGetNodes", int(graph[0]), nodes, count)
    p.equal(int(count[0]), 1, "nodes of the capture")
    node = p.cell()
    box = _box(p, _in(array), _at(DEVICE, back, 64, 4), (64, 4, 1))
    current = p.value("cuDevicePrimaryCtxRetain", 0)
    p.later("cuDevicePrimaryCtxRelease_v2", 0)
    p.ok("cuGraphAddMemcpyNode", node, int(graph[0]), nodes, 1, box, current)
    plan = p.value("cuGraphInstantiateWithFlags", int(graph[0]), 0)
    p.later("cuGraphExecDestroy", plan)
    p.ok("cuGraphLaunch", plan, stream)
    p.ok("cuStreamSynchronize", stream)
    p.equal(p.download(back, 256), content, "what went through an array")
