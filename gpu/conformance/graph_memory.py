# SPDX-License-Identifier: Apache-2.0
"""Conformance: memory nodes of graphs, as the programming guide's "Graph Memory Nodes" and the driver's reference have them."""

from __future__ import annotations

import struct
from typing import Any

from .kernels import PTX
from .probe import Probe, check

ALLOCATION, FREE = 10, 11
AUTO_FREE, UPLOAD = 1, 2
USED, USED_HIGH, RESERVED, RESERVED_HIGH = range(4)
RELAXED = 2
PARAMETERS = "<iiiiQQ56xQQQQ"
KERNEL_NODE = "<QIIIIIIIxxxxQQQQ"
SIZE = 3 << 20


def _graph(p: Probe) -> int:
    graph = p.value("cuGraphCreate", 0)
    p.later("cuGraphDestroy", graph)
    return graph


def _parameters(p: Probe, size: int, kind: int = 1) -> Any:
    return p.pack(PARAMETERS, kind, 0, 1, 0, 0, 0, 0, 0, size, 0)


def _after(p: Probe, *nodes: int) -> tuple[Any, int]:
    return (p.pack(f"<{len(nodes)}Q", *nodes) if nodes else 0), len(nodes)


def _allocate(p: Probe, graph: int, *after: int, size: int = SIZE) -> tuple[int, int]:
    parameters = _parameters(p, size)
    node = p.value("cuGraphAddMemAllocNode", graph, *_after(p, *after), parameters)
    address = struct.unpack(PARAMETERS, p.bytes_of(parameters, 120))[-1]
    p.true(address != 0, "an allocation node has an address")
    return node, address


def _fill(p: Probe, graph: int, address: int, value: int, *after: int) -> int:
    function = p.function("fill", PTX)
    parameters = p.pack(
        KERNEL_NODE, function, 1, 1, 1, 16, 1, 1, 0, p.parameters("QII", address, value, 16), 0, 0, 0
    )
    return p.value("cuGraphAddKernelNode_v2", graph, *_after(p, *after), parameters)


def _copy(p: Probe, graph: int, to: int, from_: int, *after: int) -> int:
    side = (0, 0, 0, 0, 2, 0)
    box = p.pack(
        "<QQQQIxxxxQQQQQQQQQQIxxxxQQQQQQQQQ",
        *(*side, from_, 0, 0, 64, 1),
        *(*side, to, 0, 0, 64, 1),
        *(64, 1, 1),
    )
    context = p.value("cuDevicePrimaryCtxRetain", 0)
    p.later("cuDevicePrimaryCtxRelease_v2", 0)
    return p.value("cuGraphAddMemcpyNode", graph, *_after(p, *after), box, context)


def _instance(p: Probe, graph: int, flags: int = 0) -> int:
    executable = p.value("cuGraphInstantiateWithFlags", graph, flags)
    p.later("cuGraphExecDestroy", executable)
    return executable


def _launch(p: Probe, executable: int, stream: int) -> None:
    p.ok("cuGraphLaunch", executable, stream)
    p.ok("cuStreamSynchronize", stream)


def _last(p: Probe, name: str, *arguments: Any) -> int:
    """Call a function whose last argument is an output of up to 8 bytes."""
    cell = p.cell()
    p.ok(name, *arguments, cell)
    return int(cell[0])


def _attribute(p: Probe, number: int) -> int:
    return _last(p, "cuDeviceGetGraphMemAttribute", 0, number)


def _words(p: Probe, address: int) -> tuple[int, ...]:
    return struct.unpack("<16I", p.download(address, 64))


def _trimmed(p: Probe) -> int:
    """What is reserved when all has been let go of that can be."""
    p.ok("cuCtxSynchronize")
    p.ok("cuDeviceGraphMemTrim", 0)
    return _attribute(p, RESERVED)


@check
def inside_a_graph(p: Probe) -> None:
    """Allocated, used and freed in each launch; nothing grows, and trimming gives it back."""
    stream, out, graph = p.stream(), p.device(64), _graph(p)
    before = _trimmed(p)
    node, address = _allocate(p, graph)
    filled = _fill(p, graph, address, 5, node)
    copied = _copy(p, graph, out, address, filled)
    freed = p.value("cuGraphAddMemFreeNode", graph, *_after(p, copied), address)
    p.equal(_last(p, "cuGraphNodeGetType", node), ALLOCATION, "type of the allocation")
    p.equal(_last(p, "cuGraphNodeGetType", freed), FREE, "type of the free node")
    p.equal(_last(p, "cuGraphMemFreeNodeGetParams", freed), address, "address of the free node")
    executable = _instance(p, graph)
    held = 0
    for turn in range(3):
        p.ok("cuMemsetD8Async", out, 0, 64, stream)
        _launch(p, executable, stream)
        p.equal(_words(p, out), (5,) * 16, "memory after a launch")
        if turn:
            p.equal(_attribute(p, RESERVED), held, "memory reserved after another launch")
        held = _attribute(p, RESERVED)
        p.true(held - before >= SIZE, "the allocation is in what is reserved")
    p.true(_attribute(p, RESERVED_HIGH) >= held, "the high-water mark is no lower than what there is")
    p.equal(_trimmed(p), before, "memory reserved after trimming")
    _launch(p, executable, stream)
    p.equal(_words(p, out), (5,) * 16, "memory after a launch that followed trimming")


@check
def parameters(p: Probe) -> None:
    """A node gives back what it was made with."""
    graph = _graph(p)
    access = p.pack("<iii", 1, 0, 3)
    wanted = p.pack(PARAMETERS, 1, 0, 1, 0, 0, 0, access, 1, 4096, 0)
    node = p.value("cuGraphAddMemAllocNode", graph, 0, 0, wanted)
    address = struct.unpack(PARAMETERS, p.bytes_of(wanted, 120))[-1]
    found = p.host(120)
    p.ok("cuGraphMemAllocNodeGetParams", node, found)
    kind, handles, location, identity, _, _, _, _, size, at = struct.unpack(
        PARAMETERS, p.bytes_of(found, 120)
    )
    p.equal((kind, handles, location, identity), (1, 0, 1, 0), "properties")
    p.equal((size, at), (4096, address), "size and address")
    p.expect(1, "cuGraphMemFreeNodeGetParams", node, p.cell())
    empty = p.value("cuGraphAddEmptyNode", graph, 0, 0)
    p.expect(1, "cuGraphMemAllocNodeGetParams", empty, found)


@check
def refused_nodes(p: Probe) -> None:
    """No bytes, no such kind of memory, memory of nobody, memory that is freed already."""
    graph = _graph(p)
    cell = p.cell()
    p.expect(1, "cuGraphAddMemAllocNode", cell, graph, 0, 0, _parameters(p, 0))
    p.true(
        p.call("cuGraphAddMemAllocNode", cell, graph, 0, 0, _parameters(p, 64, kind=99)) != 0,
        "an unknown kind",
    )
    p.expect(1, "cuGraphAddMemFreeNode", cell, graph, 0, 0, p.device(64))
    node, address = _allocate(p, graph)
    p.expect(1, "cuGraphAddMemFreeNode", cell, graph, *_after(p, node), address + 256)
    freed = p.value("cuGraphAddMemFreeNode", graph, *_after(p, node), address)
    p.expect(1, "cuGraphAddMemFreeNode", cell, graph, *_after(p, freed), address)


@check
def left_allocated(p: Probe) -> None:
    """What a launch leaves allocated is used and freed by others; until then the graph is not launched again."""
    stream, graph = p.stream(), _graph(p)
    node, address = _allocate(p, graph)
    _fill(p, graph, address, 9, node)
    executable = _instance(p, graph)
    _launch(p, executable, stream)
    p.equal(_words(p, address), (9,) * 16, "memory after the launch")
    p.expect(1, "cuGraphLaunch", executable, stream)
    p.ok("cuMemFreeAsync", address, stream)
    _launch(p, executable, stream)
    p.equal(_words(p, address), (9,) * 16, "memory after the second launch: the address is the same")
    p.ok("cuMemFree_v2", address)
    _launch(p, executable, stream)
    other = _graph(p)
    p.value("cuGraphAddMemFreeNode", other, 0, 0, address)
    _launch(p, _instance(p, other), stream)
    _launch(p, executable, stream)
    held = _trimmed(p)
    p.true(held >= SIZE, "trimming leaves what is allocated")
    p.equal(_words(p, address), (9,) * 16, "memory after trimming")
    p.ok("cuMemFree_v2", address)
    p.true(_trimmed(p) <= held - SIZE, "when it is free it can be had")


@check
def freed_by_itself(p: Probe) -> None:
    """CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH."""
    stream, graph = p.stream(), _graph(p)
    node, address = _allocate(p, graph)
    _fill(p, graph, address, 4, node)
    executable = _instance(p, graph, AUTO_FREE)
    _launch(p, executable, stream)
    held = _attribute(p, RESERVED)
    for _ in range(3):
        _launch(p, executable, stream)
    p.equal(_words(p, address), (4,) * 16, "memory after the last launch")
    p.equal(
        _attribute(p, RESERVED), held, "memory reserved after launches that free what the one before left"
    )
    p.ok("cuMemFreeAsync", address, stream)
    p.ok("cuStreamSynchronize", stream)


@check
def outlives_its_graph(p: Probe) -> None:
    """What is allocated stays when graph and instance have gone."""
    stream = p.stream()
    graph = p.value("cuGraphCreate", 0)
    node, address = _allocate(p, graph)
    _fill(p, graph, address, 7, node)
    executable = p.value("cuGraphInstantiateWithFlags", graph, 0)
    _launch(p, executable, stream)
    p.ok("cuGraphExecDestroy", executable)
    p.ok("cuGraphDestroy", graph)
    p.equal(_words(p, address), (7,) * 16, "memory after the graph")
    p.ok("cuMemFreeAsync", address, stream)
    p.ok("cuStreamSynchronize", stream)
    p.true(p.call("cuMemFree_v2", address) != 0, "it cannot be freed twice")


@check
def forbidden(p: Probe) -> None:
    """Such a graph is not copied, made part of another, taken apart, or instantiated twice."""
    graph, other, cell = _graph(p), _graph(p), p.cell()
    first, address = _allocate(p, graph)
    second = p.value("cuGraphAddMemFreeNode", graph, *_after(p, first), address)
    p.expect(801, "cuGraphClone", cell, graph)
    p.expect(801, "cuGraphAddChildGraphNode", cell, other, 0, 0, graph)
    p.expect(801, "cuGraphDestroyNode", second)
    p.expect(801, "cuGraphRemoveDependencies_v2", graph, p.pack("<Q", first), p.pack("<Q", second), 0, 1)
    executable = p.value("cuGraphInstantiateWithFlags", graph, 0)
    p.expect(801, "cuGraphInstantiateWithFlags", cell, graph, 0)
    p.ok("cuGraphExecDestroy", executable)
    _instance(p, graph)


@check
def captured(p: Probe) -> None:
    """Memory in a stream's order becomes nodes of a capture."""
    stream, out = p.stream(), p.device(64)
    fill = p.function("fill", PTX)
    p.ok("cuStreamBeginCapture_v2", stream, RELAXED)
    address = p.value("cuMemAllocAsync", SIZE, stream)
    p.true(address != 0, "a captured allocation has an address")
    p.launch(fill, 1, 16, "QII", address, 6, 16, stream=stream)
    p.ok("cuMemcpyDtoDAsync_v2", out, address, 64, stream)
    p.ok("cuMemFreeAsync", address, stream)
    cell = p.cell()
    p.ok("cuStreamEndCapture", stream, cell)
    graph = int(cell[0])
    p.later("cuGraphDestroy", graph)
    count = p.cell("uint64_t")
    p.ok("cuGraphGetNodes", graph, 0, count)
    room = p.host(8 * int(count[0]))
    p.ok("cuGraphGetNodes", graph, room, count)
    nodes = struct.unpack(f"<{int(count[0])}Q", p.bytes_of(room, 8 * int(count[0])))
    kinds = sorted(_last(p, "cuGraphNodeGetType", node) for node in nodes)
    p.equal(kinds, [0, 1, ALLOCATION, FREE], "types of the nodes")
    executable = _instance(p, graph)
    for _ in range(2):
        p.ok("cuMemsetD8Async", out, 0, 64, stream)
        _launch(p, executable, stream)
        p.equal(_words(p, out), (6,) * 16, "memory after a launch of what was captured")


@check
def upload(p: Probe) -> None:
    """An upload gets the memory, and the launch after it in that stream no more."""
    stream, graph = p.stream(), _graph(p)
    before = _trimmed(p)
    node, address = _allocate(p, graph)
    p.value("cuGraphAddMemFreeNode", graph, *_after(p, node), address)
    executable = _instance(p, graph)
    p.ok("cuGraphUpload", executable, stream)
    p.ok("cuStreamSynchronize", stream)
    held = _attribute(p, RESERVED)
    p.true(held - before >= SIZE, "the allocation is in what is reserved")
    _launch(p, executable, stream)
    p.equal(_attribute(p, RESERVED), held, "memory reserved after the launch")


@check
def attributes(p: Probe) -> None:
    """High-water marks can be begun again, the others not set."""
    zero = p.pack("<Q", 0)
    for number in (USED_HIGH, RESERVED_HIGH):
        p.ok("cuDeviceSetGraphMemAttribute", 0, number, zero)
    highest = _attribute(p, RESERVED_HIGH)
    p.true(highest <= _attribute(p, RESERVED), "a high-water mark begins again at what there is")
    p.expect(1, "cuDeviceSetGraphMemAttribute", 0, RESERVED, zero)
    p.expect(1, "cuDeviceGetGraphMemAttribute", 0, 9, p.cell("unsigned long long"))
