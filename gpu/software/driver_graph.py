# SPDX-License-Identifier: Apache-2.0
"""Graphs of the software GPU: nodes, instantiation, update, launch."""

from __future__ import annotations

from collections.abc import Callable

from . import driver_graph_memory as memory
from .driver_memory import BOX_BYTES, copy_3d, memset_2d
from .driver_module import Launch, packed_parameters
from .driver_stream import ILLEGAL_STATE, host_run
from .entries import INVALID_VALUE, NOT_SUPPORTED, entry
from .host import get_bytes, get_u64, get_u64_list, put_bytes, put_i32, put_u64, unpack
from .state import CudaError, Device, Event, Executable, Function, Graph, Node

KERNEL, MEMCPY, MEMSET, HOST, CHILD, EMPTY, WAIT, RECORD = range(8)
UPDATE_ERROR = 910
UPLOAD = 2
KERNEL_PARAMS = "<QIIIIIIIxxxxQQQQ"


def _nothing() -> None:
    """What an empty node does."""


def _add(device: Device, out: int, graph: int, dependencies: int, count: int, kind: int, run: Callable[[], None],
         **details: object) -> None:  # fmt: skip
    before = [device.get(n, Node) for n in get_u64_list(dependencies, count)]
    node = Node(kind, run, before, details=details)
    device.get(graph, Graph).nodes.append(node)
    put_u64(out, device.add(node))


@entry
def cuGraphCreate(device: Device, out: int, flags: int) -> None:
    put_u64(out, device.add(Graph()))


def _refuse_captured(device: Device, graph: Graph) -> None:
    if any(capture.graph is graph for capture in device.captures):
        raise CudaError(ILLEGAL_STATE, "the graph is captured into")


@entry
def cuGraphDestroy(device: Device, handle: int) -> None:
    _refuse_captured(device, device.get(handle, Graph))
    graph = device.remove(handle, Graph)
    memory.graph_ended(device, graph)
    mine = {id(n) for n in graph.nodes}
    for number in [h for h, o in device.objects.items() if id(o) in mine]:
        del device.objects[number]


def _copy(original: Graph) -> Graph:
    """A graph of its own that does the same; each node knows which it was made from."""
    memory.refuse_memory(original)
    copies = {id(n): Node(n.kind, n.run, [], n.enabled, dict(n.details, original=n)) for n in original.nodes}
    for node in original.nodes:
        copies[id(node)].dependencies = [copies[id(d)] for d in node.dependencies]
    return Graph([copies[id(n)] for n in original.nodes])


@entry
def cuGraphClone(device: Device, out: int, handle: int) -> None:
    put_u64(out, device.add(_copy(device.get(handle, Graph))))


@entry
def cuGraphNodeFindInClone(device: Device, out: int, node: int, clone: int) -> None:
    wanted = device.get(node, Node)
    for copy in device.get(clone, Graph).nodes:
        if copy.details.get("original") is wanted:
            put_u64(out, device.handle_of(copy))
            return
    raise CudaError(INVALID_VALUE)


def _list(device: Device, nodes: list[Node], out: int, count: int) -> None:
    if not out:
        put_u64(count, len(nodes))
        return
    room = get_u64_list(count, 1)[0]
    for index, node in enumerate(nodes[:room]):
        put_u64(out + 8 * index, device.handle_of(node))
    for index in range(len(nodes), room):
        put_u64(out + 8 * index, 0)
    put_u64(count, min(len(nodes), room))


@entry
def cuGraphGetNodes(device: Device, handle: int, out: int, count: int) -> None:
    _list(device, device.get(handle, Graph).nodes, out, count)


@entry
def cuGraphGetRootNodes(device: Device, handle: int, out: int, count: int) -> None:
    _list(device, [n for n in device.get(handle, Graph).nodes if not n.dependencies], out, count)


@entry
def cuGraphGetEdges_v2(
    device: Device, handle: int, sources: int, targets: int, edges: int, count: int
) -> None:
    pairs = [(d, n) for n in device.get(handle, Graph).nodes for d in n.dependencies]
    if not sources or not targets:
        put_u64(count, len(pairs))
        return
    room = get_u64_list(count, 1)[0]
    for index, (source, target) in enumerate(pairs[:room]):
        put_u64(sources + 8 * index, device.handle_of(source))
        put_u64(targets + 8 * index, device.handle_of(target))
        if edges:
            put_bytes(edges + 8 * index, bytes(8))
    put_u64(count, min(room, len(pairs)))


@entry
def cuGraphNodeGetDependencies_v2(device: Device, handle: int, out: int, edges: int, count: int) -> None:
    _list(device, device.get(handle, Node).dependencies, out, count)


@entry
def cuGraphNodeGetDependentNodes_v2(device: Device, handle: int, out: int, edges: int, count: int) -> None:
    wanted = device.get(handle, Node)
    _list(device, [n for n in _graph_of(device, wanted).nodes if wanted in n.dependencies], out, count)


def _graph_of(device: Device, node: Node) -> Graph:
    for value in device.objects.values():
        if isinstance(value, Graph) and any(n is node for n in value.nodes):
            return value
    raise CudaError(INVALID_VALUE)


@entry
def cuGraphNodeGetType(device: Device, handle: int, out: int) -> None:
    put_i32(out, device.get(handle, Node).kind)


@entry
def cuGraphDestroyNode(device: Device, handle: int) -> None:
    node = device.get(handle, Node)
    graph = _graph_of(device, node)
    _refuse_captured(device, graph)
    memory.refuse_memory(graph)
    graph.nodes = [n for n in graph.nodes if n is not node]
    for other in graph.nodes:
        other.dependencies = [d for d in other.dependencies if d is not node]
    device.remove(handle, Node)


@entry
def cuGraphAddDependencies_v2(
    device: Device, graph: int, sources: int, targets: int, edges: int, count: int
) -> None:
    for source, target in zip(get_u64_list(sources, count), get_u64_list(targets, count), strict=True):
        device.get(target, Node).dependencies.append(device.get(source, Node))


@entry
def cuGraphRemoveDependencies_v2(
    device: Device, graph: int, sources: int, targets: int, edges: int, count: int
) -> None:
    memory.refuse_memory(device.get(graph, Graph))
    for source, target in zip(get_u64_list(sources, count), get_u64_list(targets, count), strict=True):
        node, before = device.get(target, Node), device.get(source, Node)
        if before not in node.dependencies:
            raise CudaError(INVALID_VALUE)
        node.dependencies.remove(before)


def _kernel(device: Device, parameters: int) -> Launch:
    function, gx, gy, gz, bx, by, bz, shared, kernel, extra, other, _context = unpack(
        KERNEL_PARAMS, parameters
    )
    target = device.get(function or other, Function)
    return Launch(
        device, target, (gx, gy, gz), (bx, by, bz), shared, packed_parameters(target, kernel, extra)
    )


@entry
def cuGraphAddKernelNode_v2(
    device: Device, out: int, graph: int, before: int, count: int, parameters: int
) -> None:
    _add(device, out, graph, before, count, KERNEL, _kernel(device, parameters))


@entry
def cuGraphKernelNodeSetParams_v2(device: Device, handle: int, parameters: int) -> None:
    node = device.get(handle, Node)
    if node.kind != KERNEL:
        raise CudaError(INVALID_VALUE)
    node.run = _kernel(device, parameters)


@entry
def cuGraphExecKernelNodeSetParams_v2(device: Device, executable: int, handle: int, parameters: int) -> None:
    replace_step(device, executable, handle, _kernel(device, parameters))


def replace_step(device: Device, executable: int, handle: int, run: Callable[[], None]) -> None:
    """Run something else for a node in one executable.

    Raises:
        CudaError: INVALID_VALUE where the executable was not made from a graph with this node.
    """
    node, plan = device.get(handle, Node), device.get(executable, Executable)
    for index, (original, _) in enumerate(plan.steps):
        if original is node:
            plan.steps[index] = (original, run)
            return
    raise CudaError(INVALID_VALUE)


@entry
def cuGraphAddMemcpyNode(
    device: Device, out: int, graph: int, before: int, count: int, parameters: int, context: int
) -> None:
    raw = get_bytes(parameters, BOX_BYTES)
    _add(device, out, graph, before, count, MEMCPY, copy_3d(device, raw), copy=raw)


def copy_run(device: Device, parameters: int) -> Callable[[], None]:
    """The copy that a CUDA_MEMCPY3D describes."""
    return copy_3d(device, get_bytes(parameters, BOX_BYTES))


@entry
def cuGraphExecMemcpyNodeSetParams(
    device: Device, executable: int, node: int, parameters: int, context: int
) -> None:
    replace_step(device, executable, node, copy_run(device, parameters))


def memset_run(device: Device, parameters: int) -> tuple[Callable[[], None], tuple[int, ...]]:
    """The memset that a CUDA_MEMSET_NODE_PARAMS describes, and its fields.

    Raises:
        CudaError: INVALID_VALUE for an element size there is not.
    """
    address, pitch, value, element, width, height = unpack("<QQIIQQ", parameters)
    if element not in (1, 2, 4):
        raise CudaError(INVALID_VALUE)
    shape = (address, pitch, value, element, width, height)
    return (lambda: memset_2d(device, *shape)), shape


@entry
def cuGraphAddMemsetNode(
    device: Device, out: int, graph: int, before: int, count: int, parameters: int, context: int
) -> None:
    run, shape = memset_run(device, parameters)
    _add(device, out, graph, before, count, MEMSET, run, memset=shape)


@entry
def cuGraphAddHostNode(
    device: Device, out: int, graph: int, before: int, count: int, parameters: int
) -> None:
    function, user = unpack("<QQ", parameters)
    _add(device, out, graph, before, count, HOST, host_run(function, user), function=function, user=user)


@entry
def cuGraphExecMemsetNodeSetParams(
    device: Device, executable: int, node: int, parameters: int, context: int
) -> None:
    replace_step(device, executable, node, memset_run(device, parameters)[0])


@entry
def cuGraphAddEmptyNode(device: Device, out: int, graph: int, before: int, count: int) -> None:
    _add(device, out, graph, before, count, EMPTY, _nothing)


@entry
def cuGraphAddChildGraphNode(
    device: Device, out: int, graph: int, before: int, count: int, child: int
) -> None:
    inner = _copy(device.get(child, Graph))  # the node's own: the given graph may be changed or destroyed
    _add(device, out, graph, before, count, CHILD, child_run(inner), child=inner)


def child_run(graph: Graph) -> Callable[[], None]:
    """A graph as one step."""
    steps = [n.run for n in graph.ordered()]

    def run() -> None:
        for step in steps:
            step()

    return run


@entry
def cuGraphChildGraphNodeGetGraph(device: Device, handle: int, out: int) -> None:
    child = device.get(handle, Node).details.get("child")
    if not isinstance(child, Graph):
        raise CudaError(INVALID_VALUE)
    put_u64(out, device.handle_of(child))


def record_run(device: Device, event: int) -> Callable[[], None]:
    """Recording an event."""
    target = device.get(event, Event)

    def run() -> None:
        target.recorded_ns = device.now_ns()

    return run


@entry
def cuGraphAddEventRecordNode(
    device: Device, out: int, graph: int, before: int, count: int, event: int
) -> None:
    _add(device, out, graph, before, count, RECORD, record_run(device, event), event=event)


@entry
def cuGraphAddEventWaitNode(
    device: Device, out: int, graph: int, before: int, count: int, event: int
) -> None:
    device.get(event, Event)
    _add(device, out, graph, before, count, WAIT, _nothing, event=event)


@entry
def cuGraphEventRecordNodeGetEvent(device: Device, handle: int, out: int) -> None:
    event = device.get(handle, Node).details.get("event")
    if not isinstance(event, int):
        raise CudaError(INVALID_VALUE)
    put_u64(out, event)


@entry
def cuGraphEventWaitNodeGetEvent(device: Device, handle: int, out: int) -> None:
    cuGraphEventRecordNodeGetEvent(device, handle, out)


# -- executables ----------------------------------------------------------------------------------


@entry
def cuGraphInstantiateWithFlags(device: Device, out: int, handle: int, flags: int) -> None:
    if flags & ~0xB:
        raise CudaError(NOT_SUPPORTED, f"instantiation flags {flags:#x}")
    graph = device.get(handle, Graph)
    plan = Executable(graph, [(n, n.run) for n in graph.ordered()], flags)
    memory.instantiated(device, plan)
    put_u64(out, device.add(plan))


@entry
def cuGraphInstantiateWithParams(device: Device, out: int, handle: int, parameters: int) -> None:
    flags, stream = get_u64_list(parameters, 2)
    cuGraphInstantiateWithFlags(device, out, handle, flags)
    if flags & UPLOAD:
        executable = get_u64(out)
        try:
            cuGraphUpload(device, executable, stream)
        except (CudaError, MemoryError):
            cuGraphExecDestroy(device, executable)
            raise
    put_u64(parameters + 16, 0)
    put_i32(parameters + 24, 0)


@entry
def cuGraphExecGetFlags(device: Device, handle: int, out: int) -> None:
    put_u64(out, device.get(handle, Executable).flags)


@entry
def cuGraphExecUpdate_v2(device: Device, handle: int, graph: int, result: int) -> None:
    plan, other = device.get(handle, Executable), device.get(graph, Graph)
    fresh = other.ordered()
    if (memory.has_memory(other) or plan.held) and other is not plan.graph:
        put_i32(result, 6)  # not supported
        raise CudaError(UPDATE_ERROR)
    if len(fresh) != len(plan.steps) or any(
        n.kind != old.kind for n, (old, _) in zip(fresh, plan.steps, strict=True)
    ):
        put_i32(result, 2)  # topology changed
        raise CudaError(UPDATE_ERROR)
    plan.steps = [(old, n.run) for n, (old, _) in zip(fresh, plan.steps, strict=True)]
    put_i32(result, 0)
    put_u64(result + 8, 0)
    put_u64(result + 16, 0)


@entry
def cuGraphNodeSetEnabled(device: Device, executable: int, node: int, enabled: int) -> None:
    plan, target = device.get(executable, Executable), device.get(node, Node)
    if enabled:
        plan.disabled.discard(id(target))
    else:
        plan.disabled.add(id(target))


@entry
def cuGraphNodeGetEnabled(device: Device, executable: int, node: int, out: int) -> None:
    put_i32(out, id(device.get(node, Node)) not in device.get(executable, Executable).disabled)


@entry
def cuGraphUpload(device: Device, handle: int, stream: int) -> None:
    memory.uploaded(device, device.get(handle, Executable), device.stream(stream))


@entry
def cuGraphLaunch(device: Device, handle: int, stream: int) -> None:
    plan, target = device.get(handle, Executable), device.stream(stream)
    if target.capture is not None and plan.held:
        target.capture.invalid = True
        raise CudaError(NOT_SUPPORTED, "a graph with memory nodes is no child of another")
    if target.capture is None:
        memory.launching(device, plan, target)

    def run() -> None:
        for node, step in plan.steps:
            if id(node) not in plan.disabled:
                step()
            if device.fault:
                return

    device.submit(target, CHILD, run)


@entry
def cuGraphExecDestroy(device: Device, handle: int) -> None:
    memory.ended(device, device.remove(handle, Executable))
