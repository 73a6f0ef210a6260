# SPDX-License-Identifier: Apache-2.0
"""Memory nodes of the software GPU's graphs, in graphs made by hand and in captured ones, and what the device keeps for them."""

from __future__ import annotations

import ctypes
import struct

from .entries import INVALID_VALUE, NOT_SUPPORTED, entry
from .graph_memory import Block
from .host import get_bytes, get_u64_list, put_bytes, put_u64, unpack
from .state import CudaError, Device, Executable, Graph, Node, Stream

ALLOCATION, FREE = 10, 11
MEMORY_NODES = (ALLOCATION, FREE)
AUTO_FREE_ON_LAUNCH = 1
INVALID_DEVICE = 101
PARAMETERS = (
    "<iiiiQQ56xQQQQ"  # CUDA_MEM_ALLOC_NODE_PARAMS: CUmemPoolProps, accesses, their number, size, address
)
ACCESS_BYTES = 12


def has_memory(graph: Graph) -> bool:
    """Are there memory nodes in it?"""
    return any(node.kind in MEMORY_NODES for node in graph.nodes)


def refuse_memory(graph: Graph) -> None:
    """For what cannot be done with such a graph. Raises: CudaError."""
    if has_memory(graph):
        raise CudaError(NOT_SUPPORTED, "the graph has memory nodes")


def _before(nodes: list[Node]) -> set[int]:
    """Ids of these nodes and of all that they wait for."""
    seen: set[int] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if id(node) not in seen:
            seen.add(id(node))
            todo.extend(node.dependencies)
    return seen


def _unfreed(graph: Graph) -> dict[int, Node]:
    """Allocation nodes that no node of the graph frees, by address."""
    left: dict[int, Node] = {}
    for node in graph.nodes:
        if node.kind == ALLOCATION:
            left[node.details["block"].address] = node
        elif node.kind == FREE:
            left.pop(node.details["address"], None)
    return left


def _address_for(device: Device, graph: Graph, dependencies: list[Node], size: int) -> Block:
    """Addresses that were freed before, or new ones."""
    before = _before(dependencies)
    owners: dict[int, Node] = {}
    for node in graph.nodes:
        if node.kind in MEMORY_NODES and node.details["block"] is not None:
            owners[id(node.details["block"])] = node  # the last to have it
    for last in owners.values():
        block: Block = last.details["block"]
        if last.kind == FREE and last.details["is_own"] and id(last) in before and block.size >= size:
            return block
    return device.graph_memory.address(size)


def add_allocation(device: Device, graph: Graph, dependencies: list[Node], size: int, access: bytes) -> Node:
    """A new allocation node."""
    if not size:
        raise CudaError(INVALID_VALUE)
    if size > 1 << 44:
        raise MemoryError(f"{size} bytes of addresses")
    block = _address_for(device, graph, dependencies, size)
    node = Node(
        ALLOCATION,
        lambda: device.graph_memory.begin(block),
        list(dependencies),
        details={"block": block, "size": size, "access": access},
    )
    device.graph_memory.hold(block)
    graph.nodes.append(node)
    return node


def add_free(device: Device, graph: Graph, dependencies: list[Node], address: int) -> Node:
    """A new free node, for an allocation of the graph or of another one.

    Raises:
        CudaError: INVALID_VALUE for what is no allocation node's, or is freed already.
    """
    own = [n for n in graph.nodes if n.kind == ALLOCATION and n.details["block"].address == address]
    block = device.graph_memory.blocks.get(address)
    if block is None or (own and address not in _unfreed(graph)):
        raise CudaError(INVALID_VALUE, f"{address:#x} is not to be freed here")
    node = Node(
        FREE,
        lambda: device.graph_memory.free(block),
        list(dependencies),
        details={"block": block, "address": address, "is_own": bool(own)},
    )
    device.graph_memory.hold(block)
    graph.nodes.append(node)
    return node


def _nodes(device: Device, dependencies: int, count: int) -> list[Node]:
    return [device.get(n, Node) for n in get_u64_list(dependencies, count)]


@entry
def cuGraphAddMemAllocNode(
    device: Device, out: int, graph: int, dependencies: int, count: int, parameters: int
) -> None:
    kind, handle_types, location, identity, _, _, access, access_count, size, _ = unpack(
        PARAMETERS, parameters
    )
    if kind != 1 or handle_types or (location, identity) != (1, 0) or access_count > 64:
        raise CudaError(INVALID_VALUE)
    given = get_bytes(access, ACCESS_BYTES * access_count) if access_count else b""
    node = add_allocation(device, device.get(graph, Graph), _nodes(device, dependencies, count), size, given)
    put_u64(parameters + 112, node.details["block"].address)
    put_u64(out, device.add(node))


@entry
def cuGraphMemAllocNodeGetParams(device: Device, handle: int, out: int) -> None:
    node = _node(device, handle, ALLOCATION)
    access: bytes = node.details["access"]
    values = ctypes.create_string_buffer(access, max(len(access), 1))
    node.details["given"] = values  # the caller may look as long as the node is there
    count = len(access) // ACCESS_BYTES
    at = ctypes.addressof(values) if count else 0
    size, address = node.details["size"], node.details["block"].address
    put_bytes(out, struct.pack(PARAMETERS, 1, 0, 1, 0, 0, 0, at, count, size, address))


@entry
def cuGraphAddMemFreeNode(
    device: Device, out: int, graph: int, dependencies: int, count: int, address: int
) -> None:
    node = add_free(device, device.get(graph, Graph), _nodes(device, dependencies, count), address)
    put_u64(out, device.add(node))


@entry
def cuGraphMemFreeNodeGetParams(device: Device, handle: int, out: int) -> None:
    put_u64(out, _node(device, handle, FREE).details["address"])


def _node(device: Device, handle: int, kind: int) -> Node:
    node = device.get(handle, Node)
    if node.kind != kind:
        raise CudaError(INVALID_VALUE, f"a node of type {node.kind}, expected {kind}")
    return node


# -- captured ---------------------------------------------------------------------------------------


def _capturing(stream: Stream) -> Graph | None:
    if stream.capture is None:
        return None
    if stream.capture.invalid:
        raise CudaError(901, "the capture has been spoilt")
    return stream.capture.graph


def capture_allocation(device: Device, stream: Stream, size: int) -> int | None:
    """The address of a node of the stream's capture; None where it does not capture."""
    graph = _capturing(stream)
    if graph is None:
        return None
    node = add_allocation(device, graph, stream.leaves, size, b"")
    stream.leaves = [node]
    return int(node.details["block"].address)


def capture_free(device: Device, stream: Stream, address: int) -> bool:
    """Did it become a node of the stream's capture?"""
    graph = _capturing(stream)
    if graph is None:
        return False
    stream.leaves = [add_free(device, graph, stream.leaves, address)]
    return True


def free_block(device: Device, address: int) -> bool:
    """Free what a launch has allocated there; False where there is none."""
    block = device.graph_memory.blocks.get(address)
    if block is None or not block.live:
        return False
    device.graph_memory.free(block)
    return True


# -- instances ---------------------------------------------------------------------------------------


def instantiated(device: Device, plan: Executable) -> None:
    """What an instance has to hold. Raises: CudaError where the graph has an instance already."""
    graph = plan.graph
    if not has_memory(graph):
        return
    if any(isinstance(o, Executable) and o.graph is graph for o in device.objects.values()):
        raise CudaError(NOT_SUPPORTED, "a graph with memory nodes has one instance at a time")
    plan.blocks = list(
        {id(n.details["block"]): n.details["block"] for n in graph.nodes if n.kind == ALLOCATION}.values()
    )
    plan.unfreed = [n.details["block"] for n in _unfreed(graph).values()]
    plan.held = [n.details["block"] for n in graph.nodes if n.kind in MEMORY_NODES]
    for block in plan.held:
        device.graph_memory.hold(block)


def ended(device: Device, plan: Executable) -> None:
    """The instance is gone."""
    held, plan.held = plan.held, []
    for block in held:
        device.graph_memory.release(block)


def graph_ended(device: Device, graph: Graph) -> None:
    """The graph is gone. What is allocated stays."""
    for node in graph.nodes:
        if node.kind in MEMORY_NODES:
            device.graph_memory.release(node.details["block"])


def uploaded(device: Device, plan: Executable, stream: Stream) -> None:
    """Memory for the next launch into the stream."""
    if plan.blocks:
        device.graph_memory.provide(plan.blocks, stream)


def launching(device: Device, plan: Executable, stream: Stream) -> None:
    """Before a launch.

    Raises:
        CudaError: INVALID_VALUE where something of an earlier launch is still allocated, unless it frees that itself.
    """
    for block in plan.unfreed:
        if block.live and not plan.flags & AUTO_FREE_ON_LAUNCH:
            raise CudaError(INVALID_VALUE, f"{block.address:#x} is still allocated")
    for node, _ in plan.steps:
        if node.kind == FREE and not node.details["is_own"] and not node.details["block"].live:
            raise CudaError(INVALID_VALUE, f"{node.details['address']:#x} is not allocated")
    for block in plan.unfreed:
        if block.live:
            device.graph_memory.free(block)
    uploaded(device, plan, stream)


# -- the device's ------------------------------------------------------------------------------------


def _is_here(dev: int) -> None:
    if dev != 0:
        raise CudaError(INVALID_DEVICE)


@entry
def cuDeviceGraphMemTrim(device: Device, dev: int) -> None:
    _is_here(dev)
    device.graph_memory.trim()


@entry
def cuDeviceGetGraphMemAttribute(device: Device, dev: int, attribute: int, out: int) -> None:
    _is_here(dev)
    try:
        put_u64(out, device.graph_memory.attribute(attribute))
    except KeyError:
        raise CudaError(INVALID_VALUE) from None


@entry
def cuDeviceSetGraphMemAttribute(device: Device, dev: int, attribute: int, value: int) -> None:
    _is_here(dev)
    try:
        device.graph_memory.reset(
            attribute
        )  # to what there is, whatever value is given: 0 is the only one documented
    except KeyError:
        raise CudaError(INVALID_VALUE) from None
