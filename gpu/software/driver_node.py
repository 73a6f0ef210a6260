# SPDX-License-Identifier: Apache-2.0
"""Graph nodes of the software GPU looked at and changed one by one: what each was made with, and something else instead.

What an executable runs is fixed when it is instantiated; changing a node of a graph leaves executables alone.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable

from .driver_graph import (
    KERNEL,
    MEMCPY,
    MEMSET,
    child_run,
    copy_run,
    memset_run,
    record_run,
    replace_step,
)
from .driver_graph_memory import refuse_memory
from .driver_memory import BOX_BYTES, memset_bytes
from .driver_module import Launch
from .driver_stream import host_run
from .entries import INVALID_VALUE, NOT_SUPPORTED, entry
from .host import get_bytes, put_bytes, put_i32, unpack
from .state import CudaError, Device, Event, Graph, Node

HOST, CHILD, WAIT, RECORD = 3, 4, 6, 7
ATTRIBUTE_COOPERATIVE, ATTRIBUTE_CLUSTER, ATTRIBUTE_PRIORITY = 2, 4, 8
ATTRIBUTE_BYTES = 64


def _node(device: Device, handle: int, kind: int) -> Node:
    node = device.get(handle, Node)
    if node.kind != kind:
        raise CudaError(INVALID_VALUE, f"a node of type {node.kind}, expected {kind}")
    return node


def _launch(node: Node) -> Launch:
    assert isinstance(node.run, Launch)
    return node.run


@entry
def cuGraphKernelNodeGetParams_v2(device: Device, handle: int, out: int) -> None:
    node = _node(device, handle, KERNEL)
    launch = _launch(node)
    kernel = launch.function.kernel
    values = ctypes.create_string_buffer(launch.parameters, max(len(launch.parameters), 1))
    pointers = (ctypes.c_uint64 * max(len(kernel.params), 1))()
    for index, parameter in enumerate(kernel.params):
        pointers[index] = ctypes.addressof(values) + parameter.offset
    node.details["given"] = (values, pointers)  # the caller may look until the node is changed
    function = device.handle_of(launch.function)
    is_kernel = launch.function.module.is_library
    put_bytes(
        out,
        struct.pack(
            "<QIIIIIIIxxxxQQQQ",
            *(0 if is_kernel else function, *launch.grid, *launch.block, launch.shared),
            *(
                ctypes.addressof(pointers) if kernel.params else 0,
                0,
                function if is_kernel else 0,
                device.current,
            ),
        ),
    )


@entry
def cuGraphKernelNodeGetAttribute(device: Device, handle: int, attribute: int, out: int) -> None:
    node = _node(device, handle, KERNEL)
    if attribute == ATTRIBUTE_COOPERATIVE:
        value = struct.pack("<I", _launch(node).cooperative)
    elif attribute in (ATTRIBUTE_CLUSTER, ATTRIBUTE_PRIORITY):
        value = node.details.get(f"attribute {attribute}", b"")
    else:
        raise CudaError(NOT_SUPPORTED, f"kernel node attribute {attribute}")
    put_bytes(out, value.ljust(ATTRIBUTE_BYTES, b"\0"))


@entry
def cuGraphKernelNodeSetAttribute(device: Device, handle: int, attribute: int, value: int) -> None:
    node = _node(device, handle, KERNEL)
    if attribute == ATTRIBUTE_COOPERATIVE:
        launch = _launch(node)
        node.run = Launch(
            device,
            launch.function,
            launch.grid,
            launch.block,
            launch.shared,
            launch.parameters,
            cooperative=unpack("<I", value)[0] != 0,
        )
    elif attribute == ATTRIBUTE_PRIORITY:
        node.details[f"attribute {attribute}"] = get_bytes(value, 4)
    elif attribute == ATTRIBUTE_CLUSTER and unpack("<III", value) in ((0, 0, 0), (1, 1, 1)):
        node.details[f"attribute {attribute}"] = get_bytes(value, 12)
    else:
        raise CudaError(NOT_SUPPORTED, f"kernel node attribute {attribute}")


@entry
def cuGraphKernelNodeCopyAttributes(device: Device, destination: int, source: int) -> None:
    to, from_ = _node(device, destination, KERNEL), _node(device, source, KERNEL)
    for attribute in (ATTRIBUTE_CLUSTER, ATTRIBUTE_PRIORITY):
        name = f"attribute {attribute}"
        to.details.pop(name, None)
        if name in from_.details:
            to.details[name] = from_.details[name]
    launch = _launch(to)
    to.run = Launch(
        device,
        launch.function,
        launch.grid,
        launch.block,
        launch.shared,
        launch.parameters,
        cooperative=_launch(from_).cooperative,
    )


@entry
def cuGraphMemcpyNodeGetParams(device: Device, handle: int, out: int) -> None:
    put_bytes(out, _node(device, handle, MEMCPY).details["copy"])


@entry
def cuGraphMemcpyNodeSetParams(device: Device, handle: int, parameters: int) -> None:
    node = _node(device, handle, MEMCPY)
    node.run = copy_run(device, parameters)
    node.details["copy"] = get_bytes(parameters, BOX_BYTES)


@entry
def cuGraphMemsetNodeGetParams(device: Device, handle: int, out: int) -> None:
    put_bytes(out, memset_bytes(*_node(device, handle, MEMSET).details["memset"]))


@entry
def cuGraphMemsetNodeSetParams(device: Device, handle: int, parameters: int) -> None:
    node = _node(device, handle, MEMSET)
    node.run, node.details["memset"] = memset_run(device, parameters)


def _host_parameters(parameters: int) -> tuple[Callable[[], None], dict[str, int]]:
    function, user = unpack("<QQ", parameters)
    return host_run(function, user), {"function": function, "user": user}


@entry
def cuGraphHostNodeGetParams(device: Device, handle: int, out: int) -> None:
    details = _node(device, handle, HOST).details
    put_bytes(out, struct.pack("<QQ", details["function"], details["user"]))


@entry
def cuGraphHostNodeSetParams(device: Device, handle: int, parameters: int) -> None:
    node = _node(device, handle, HOST)
    node.run, details = _host_parameters(parameters)
    node.details.update(details)


@entry
def cuGraphExecHostNodeSetParams(device: Device, executable: int, handle: int, parameters: int) -> None:
    _node(device, handle, HOST)
    replace_step(device, executable, handle, _host_parameters(parameters)[0])


@entry
def cuGraphExecChildGraphNodeSetParams(device: Device, executable: int, handle: int, child: int) -> None:
    _node(device, handle, CHILD)
    graph = device.get(child, Graph)
    refuse_memory(graph)
    replace_step(device, executable, handle, child_run(graph))


@entry
def cuGraphEventRecordNodeSetEvent(device: Device, handle: int, event: int) -> None:
    node = _node(device, handle, RECORD)
    node.run = record_run(device, event)
    node.details["event"] = event


@entry
def cuGraphEventWaitNodeSetEvent(device: Device, handle: int, event: int) -> None:
    node = _node(device, handle, WAIT)
    device.get(event, Event)
    node.details["event"] = event


@entry
def cuGraphExecEventRecordNodeSetEvent(device: Device, executable: int, handle: int, event: int) -> None:
    _node(device, handle, RECORD)
    replace_step(device, executable, handle, record_run(device, event))


@entry
def cuGraphExecEventWaitNodeSetEvent(device: Device, executable: int, handle: int, event: int) -> None:
    # Everything runs in order here, so there is nothing to wait for; the handles must be right all the same.
    device.get(event, Event)
    replace_step(device, executable, handle, _node(device, handle, WAIT).run)


@entry
def cuMemPoolGetAccess(device: Device, flags: int, pool: int, location: int) -> None:
    kind, identity = unpack("<ii", location)
    if (kind, identity) != (1, 0):
        raise CudaError(INVALID_VALUE)
    put_i32(flags, 3)
