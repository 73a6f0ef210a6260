# SPDX-License-Identifier: Apache-2.0
"""Conformance: stream capture, graphs made by hand, instantiation, update, launch."""

from __future__ import annotations

import struct
from typing import Any

from .kernels import PTX
from .probe import Probe, check

GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2
KERNEL_NODE = "<QIIIIIIIxxxxQQQQ"


def _fill_node(p: Probe, function: int, out: int, value: int) -> Any:
    return p.pack(KERNEL_NODE, function, 1, 1, 1, 16, 1, 1, 0, p.parameters("QII", out, value, 16), 0, 0, 0)


def _words(p: Probe, address: int) -> tuple[int, ...]:
    return struct.unpack("<16I", p.download(address, 64))


def _capture(p: Probe, stream: int, out: int, factor: int) -> int:
    fill, scale = p.function("fill", PTX), p.function("scale", PTX)
    p.ok("cuStreamBeginCapture_v2", stream, RELAXED)
    p.launch(fill, 1, 16, "QII", out, 3, 16, stream=stream)
    p.launch(scale, 1, 16, "QII", out, factor, 16, stream=stream)
    graph = _end(p, stream)
    p.later("cuGraphDestroy", graph)
    return graph


def _end(p: Probe, stream: int) -> int:
    cell = p.cell()
    p.ok("cuStreamEndCapture", stream, cell)
    p.true(cell[0] != 0, "a capture gives a graph")
    return int(cell[0])


def _instantiate(p: Probe, graph: int) -> int:
    executable = p.value("cuGraphInstantiateWithFlags", graph, 0)
    p.later("cuGraphExecDestroy", executable)
    return executable


def _nodes(p: Probe, name: str, graph: int) -> list[int]:
    count = p.cell("uint64_t")
    p.ok(name, graph, 0, count)
    room = p.host(8 * max(int(count[0]), 1))
    p.ok(name, graph, room, count)
    return list(struct.unpack(f"<{count[0]}Q", p.bytes_of(room, 8 * int(count[0]))))


@check
def capture_and_replay(p: Probe) -> None:
    """Captured work does not run until the graph does, and then each time."""
    stream, out = p.stream(), p.device(64)
    graph = _capture(p, stream, out, 7)
    p.equal(_words(p, out), (0,) * 16, "memory after capturing")
    p.equal(len(_nodes(p, "cuGraphGetNodes", graph)), 2, "nodes")
    p.equal(len(_nodes(p, "cuGraphGetRootNodes", graph)), 1, "root nodes")
    executable = _instantiate(p, graph)
    for _ in range(3):
        p.ok("cuMemsetD8Async", out, 0, 64, stream)
        p.ok("cuGraphLaunch", executable, stream)
        p.ok("cuStreamSynchronize", stream)
        p.equal(_words(p, out), (21,) * 16, "memory after a launch of the graph")


@check
def update(p: Probe) -> None:
    """An executable takes over the parameters of a graph of the same shape, and refuses another shape."""
    stream, out = p.stream(), p.device(64)
    executable = _instantiate(p, _capture(p, stream, out, 7))
    result = p.host(24)
    p.ok("cuGraphExecUpdate_v2", executable, _capture(p, stream, out, 9), result)
    p.equal(struct.unpack("<i", p.bytes_of(result, 4))[0], 0, "result of the update")
    p.ok("cuGraphLaunch", executable, stream)
    p.ok("cuStreamSynchronize", stream)
    p.equal(_words(p, out), (27,) * 16, "memory after the update")
    empty = p.value("cuGraphCreate", 0)
    p.later("cuGraphDestroy", empty)
    p.expect(910, "cuGraphExecUpdate_v2", executable, empty, result)


@check
def capture_status(p: Probe) -> None:
    """What a stream says of itself while it captures, and what it refuses."""
    stream, out = p.stream(), p.device(64)
    status = p.cell("unsigned int")
    p.ok("cuStreamIsCapturing", stream, status)
    p.equal(int(status[0]), 0, "capture status before")
    p.ok("cuStreamBeginCapture_v2", stream, RELAXED)
    p.ok("cuStreamIsCapturing", stream, status)
    p.equal(int(status[0]), 1, "capture status during")
    p.ok("cuMemsetD8Async", out, 1, 64, stream)
    number, graph, dependencies, count = p.cell(), p.cell(), p.cell(), p.cell()
    edges = p.cell()
    p.ok("cuStreamGetCaptureInfo_v3", stream, status, number, graph, dependencies, edges, count)
    p.equal((int(status[0]), int(count[0])), (1, 1), "status and leaves during capture")
    p.true(number[0] != 0 and graph[0] != 0, "a capture has a number and a graph")
    ended = _end(p, stream)
    p.ok("cuStreamIsCapturing", stream, status)
    p.equal(int(status[0]), 0, "capture status after")
    p.ok("cuGraphDestroy", ended)
    cell = p.cell()
    p.expect(1, "cuStreamBeginCapture_v2", stream, 99)
    p.true(p.call("cuStreamEndCapture", stream, cell) in (1, 401), "ending what was not begun is refused")


@check
def capture_of_the_legacy_stream(p: Probe) -> None:
    """The legacy stream cannot be captured."""
    p.expect(900, "cuStreamBeginCapture_v2", 0, RELAXED)
    p.ok("cuCtxSynchronize")


@check
def capture_invalidated(p: Probe) -> None:
    """Synchronizing a capturing stream is an error that spoils the capture."""
    stream, out = p.stream(), p.device(64)
    p.ok("cuStreamBeginCapture_v2", stream, RELAXED)
    p.ok("cuMemsetD8Async", out, 1, 64, stream)
    p.expect(900, "cuStreamSynchronize", stream)
    cell = p.cell()
    p.expect(901, "cuStreamEndCapture", stream, cell)
    p.equal(int(cell[0]), 0, "graph of a spoilt capture")
    p.ok("cuStreamSynchronize", stream)


@check
def capture_across_streams(p: Probe) -> None:
    """A fork through an event and a join back; a fork never joined is an error."""
    first, second = p.stream(), p.stream()
    fork, join, out = p.event(2), p.event(2), p.device(128)
    fill = p.function("fill", PTX)
    p.ok("cuStreamBeginCapture_v2", first, RELAXED)
    p.ok("cuEventRecord", fork, first)
    p.ok("cuStreamWaitEvent", second, fork, 0)
    p.launch(fill, 1, 16, "QII", out, 1, 16, stream=first)
    p.launch(fill, 1, 16, "QII", out + 64, 2, 16, stream=second)
    p.ok("cuEventRecord", join, second)
    p.ok("cuStreamWaitEvent", first, join, 0)
    graph = _end(p, first)
    p.later("cuGraphDestroy", graph)
    p.equal(len(_nodes(p, "cuGraphGetRootNodes", graph)), 2, "root nodes")
    p.ok("cuGraphLaunch", _instantiate(p, graph), first)
    p.ok("cuStreamSynchronize", first)
    p.equal((_words(p, out), _words(p, out + 64)), ((1,) * 16, (2,) * 16), "both branches")
    p.ok("cuStreamBeginCapture_v2", first, RELAXED)
    p.ok("cuEventRecord", fork, first)
    p.ok("cuStreamWaitEvent", second, fork, 0)
    p.launch(fill, 1, 16, "QII", out, 1, 16, stream=second)
    p.expect(904, "cuStreamEndCapture", first, p.cell())


@check
def captured_into(p: Probe) -> None:
    """A graph that a stream captures into cannot be destroyed nor lose a node, and the capture goes on."""
    stream, out = p.stream(), p.device(64)
    graph = p.value("cuGraphCreate", 0)
    p.later("cuGraphDestroy", graph)
    node = p.value("cuGraphAddEmptyNode", graph, 0, 0)
    p.ok("cuStreamBeginCaptureToGraph", stream, graph, 0, 0, 0, RELAXED)
    p.expect(401, "cuGraphDestroy", graph)
    p.expect(401, "cuGraphDestroyNode", node)
    p.launch(p.function("fill", PTX), 1, 16, "QII", out, 5, 16, stream=stream)
    p.equal(_end(p, stream), graph, "the graph that was captured into")
    p.ok("cuGraphLaunch", _instantiate(p, graph), stream)
    p.ok("cuStreamSynchronize", stream)
    p.equal(_words(p, out), (5,) * 16, "memory after the launch")


@check
def by_hand(p: Probe) -> None:
    """Kernel, memset, empty and child nodes with dependencies, in the order these ask for."""
    fill, scale = p.function("fill", PTX), p.function("scale", PTX)
    out, stream = p.device(64), p.stream()
    graph = p.value("cuGraphCreate", 0)
    p.later("cuGraphDestroy", graph)
    times = p.value("cuGraphAddKernelNode_v2", graph, 0, 0, _fill_node(p, scale, out, 6))
    memset = p.value("cuGraphAddMemsetNode", graph, 0, 0, p.pack("<QQIIQQ", out, 0, 2, 4, 16, 1), 0)
    empty = p.value("cuGraphAddEmptyNode", graph, p.pack("<Q", memset), 1)
    p.ok("cuGraphAddDependencies_v2", graph, p.pack("<Q", empty), p.pack("<Q", times), 0, 1)
    kinds = p.cell("unsigned int")
    for node, kind in ((times, 0), (memset, 2), (empty, 5)):
        p.ok("cuGraphNodeGetType", node, kinds)
        p.equal(int(kinds[0]), kind, "type of a node")
    inner = p.value("cuGraphCreate", 0)
    p.value("cuGraphAddKernelNode_v2", inner, 0, 0, _fill_node(p, scale, out, 10))
    p.value("cuGraphAddChildGraphNode", graph, p.pack("<Q", times), 1, inner)
    p.ok("cuGraphDestroy", inner)
    executable = _instantiate(p, graph)
    p.ok("cuGraphLaunch", executable, stream)
    p.ok("cuStreamSynchronize", stream)
    p.equal(_words(p, out), (120,) * 16, "memory: (2 * 6) * 10")
    p.ok("cuGraphExecKernelNodeSetParams_v2", executable, times, _fill_node(p, fill, out, 4))
    p.ok("cuGraphLaunch", executable, stream)
    p.ok("cuStreamSynchronize", stream)
    p.equal(_words(p, out), (40,) * 16, "memory with another kernel in the node")
    p.ok("cuGraphNodeSetEnabled", executable, times, 0)
    p.ok("cuGraphLaunch", executable, stream)
    p.ok("cuStreamSynchronize", stream)
    p.equal(_words(p, out), (20,) * 16, "memory with the node switched off")


@check
def clones_and_edges(p: Probe) -> None:
    """A clone is a graph of its own; edges are listed; a node can be taken out."""
    graph = p.value("cuGraphCreate", 0)
    p.later("cuGraphDestroy", graph)
    first = p.value("cuGraphAddEmptyNode", graph, 0, 0)
    second = p.value("cuGraphAddEmptyNode", graph, p.pack("<Q", first), 1)
    count = p.cell("uint64_t")
    p.ok("cuGraphGetEdges_v2", graph, 0, 0, 0, count)
    p.equal(int(count[0]), 1, "edges")
    p.ok("cuGraphNodeGetDependencies_v2", second, 0, 0, count)
    p.equal(int(count[0]), 1, "dependencies of the second node")
    p.ok("cuGraphNodeGetDependentNodes_v2", first, 0, 0, count)
    p.equal(int(count[0]), 1, "dependents of the first node")
    clone = p.value("cuGraphClone", graph)
    p.later("cuGraphDestroy", clone)
    copy = p.value("cuGraphNodeFindInClone", first, clone)
    p.true(copy not in (0, first), "a clone has nodes of its own")
    p.ok("cuGraphDestroyNode", second)
    p.equal(len(_nodes(p, "cuGraphGetNodes", graph)), 1, "nodes left")
    p.equal(len(_nodes(p, "cuGraphGetNodes", clone)), 2, "nodes of the clone")


@check
def cycles_are_refused(p: Probe) -> None:
    """A graph that waits for itself cannot be made into an executable (or the edge is refused at once)."""
    graph = p.value("cuGraphCreate", 0)
    p.later("cuGraphDestroy", graph)
    first = p.value("cuGraphAddEmptyNode", graph, 0, 0)
    second = p.value("cuGraphAddEmptyNode", graph, p.pack("<Q", first), 1)
    added = p.call("cuGraphAddDependencies_v2", graph, p.pack("<Q", second), p.pack("<Q", first), 0, 1)
    if added == 0:
        p.expect(1, "cuGraphInstantiateWithFlags", p.cell(), graph, 0)
    else:
        p.equal(added, 1, "result for an edge that closes a cycle")


@check
def host_nodes_and_events(p: Probe) -> None:
    """A captured host function runs at each launch."""
    stream, out = p.stream(), p.device(64)
    seen: list[int] = []
    callback = p.keep(
        p.ffi.callback("void(void *)", lambda user: seen.append(int(p.ffi.cast("uintptr_t", user))))
    )
    p.ok("cuStreamBeginCapture_v2", stream, RELAXED)
    p.ok("cuMemsetD8Async", out, 1, 64, stream)
    p.ok("cuLaunchHostFunc", stream, callback, 42)
    graph = _end(p, stream)
    p.later("cuGraphDestroy", graph)
    executable = _instantiate(p, graph)
    p.equal(seen, [], "calls before a launch")
    for _ in range(2):
        p.ok("cuGraphLaunch", executable, stream)
    p.ok("cuStreamSynchronize", stream)
    p.equal(seen, [42, 42], "calls after two launches")
