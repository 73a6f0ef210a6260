# SPDX-License-Identifier: Apache-2.0
"""Streams, events, host functions and captures of the software GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from .entries import INVALID_VALUE, NOT_SUPPORTED, entry
from .host import get_u64_list, put_i32, put_u64, unpack
from .state import Capture, CudaError, Device, Event, Graph, Node, Stream

NODE_HOST, NODE_EMPTY, NODE_WAIT, NODE_RECORD, NODE_MEMOP = 3, 5, 6, 7, 12
NOT_READY = 600
ILLEGAL_STATE = 401
UNSUPPORTED, INVALIDATED, MERGE, UNMATCHED, UNJOINED, ISOLATION = 900, 901, 902, 903, 904, 905
DISABLE_TIMING, INTERPROCESS = 2, 4


@entry
def cuStreamCreateWithPriority(device: Device, out: int, flags: int, priority: int) -> None:
    if flags > 1:
        raise CudaError(INVALID_VALUE)
    put_u64(out, device.add(Stream(flags, priority)))


@entry
def cuStreamDestroy_v2(device: Device, handle: int) -> None:
    stream = device.remove(handle, Stream)
    device.synchronized(stream)
    if stream.capture is not None:
        stream.capture.invalid = True


@entry
def cuStreamSynchronize(device: Device, handle: int) -> None:
    cuStreamQuery(device, handle)
    device.synchronized(device.stream(handle))


@entry
def cuStreamQuery(device: Device, handle: int) -> None:
    stream = device.stream(handle)
    if stream.capture is not None:
        stream.capture.invalid = True
        raise CudaError(UNSUPPORTED)


@entry
def cuStreamCopyAttributes(device: Device, destination: int, source: int) -> None:
    device.stream(destination)
    device.stream(source)


@entry
def cuStreamGetAttribute(device: Device, handle: int, attribute: int, value: int) -> None:
    device.stream(handle)
    raise CudaError(NOT_SUPPORTED)


@entry
def cuStreamSetAttribute(device: Device, handle: int, attribute: int, value: int) -> None:
    device.stream(handle)
    raise CudaError(NOT_SUPPORTED)


def _write(device: Device, address: int, value: int, size: int) -> None:
    # A fence word lies in a registered window; the store must be one 8-byte store, as others look meanwhile.
    kind = ctypes.c_uint64 if size == 8 else ctypes.c_uint32
    view = device.space.view(address, size, is_write=True)
    kind.from_address(view.ctypes.data).value = value


@entry
def cuStreamWriteValue64_v2(device: Device, stream: int, address: int, value: int, flags: int) -> None:
    device.submit(device.stream(stream), NODE_MEMOP, lambda: _write(device, address, value, 8))


@entry
def cuStreamWriteValue32_v2(device: Device, stream: int, address: int, value: int, flags: int) -> None:
    device.submit(device.stream(stream), NODE_MEMOP, lambda: _write(device, address, value, 4))


def _wait(device: Device, address: int, value: int, size: int, flags: int) -> None:
    seen = int.from_bytes(device.space.read(address, size), "little")
    bits = 8 * size
    kind = flags & 7
    met = {
        0: (seen - value) & (1 << bits) - 1 < 1 << (bits - 1),
        1: seen == value,
        2: seen & value != 0,
        3: seen | value != (1 << bits) - 1,
    }.get(kind)
    if met is None:
        raise CudaError(INVALID_VALUE)
    if not met:
        # Work runs when it is submitted, so nothing could come later that makes it true.
        raise CudaError(NOT_SUPPORTED, "a wait for a value that is not there yet")


@entry
def cuStreamWaitValue64_v2(device: Device, stream: int, address: int, value: int, flags: int) -> None:
    device.submit(device.stream(stream), NODE_MEMOP, lambda: _wait(device, address, value, 8, flags))


@entry
def cuStreamWaitValue32_v2(device: Device, stream: int, address: int, value: int, flags: int) -> None:
    device.submit(device.stream(stream), NODE_MEMOP, lambda: _wait(device, address, value, 4, flags))


@entry
def cuStreamBatchMemOp_v2(device: Device, stream: int, count: int, operations: int, flags: int) -> None:
    for index in range(count):
        kind, address, value, mode = unpack("<IxxxxQQI", operations + 48 * index)
        if kind in (1, 4):
            size = 4 if kind == 1 else 8
            _wait(device, address, value & (1 << 8 * size) - 1, size, mode)
        elif kind in (2, 5):
            _write(device, address, value, 4 if kind == 2 else 8)
        elif kind not in (3, 6):
            raise CudaError(INVALID_VALUE)


# -- events ---------------------------------------------------------------------------------------


@entry
def cuEventCreate(device: Device, out: int, flags: int) -> None:
    if flags & ~7:
        raise CudaError(INVALID_VALUE)
    if flags & INTERPROCESS:
        raise CudaError(NOT_SUPPORTED, "events between processes")
    put_u64(out, device.add(Event(flags)))


@entry
def cuEventDestroy_v2(device: Device, handle: int) -> None:
    device.remove(handle, Event)


@entry
def cuEventRecord(device: Device, handle: int, stream: int) -> None:
    cuEventRecordWithFlags(device, handle, stream, 0)


@entry
def cuEventRecordWithFlags(device: Device, handle: int, stream: int, flags: int) -> None:
    if flags & ~1:
        raise CudaError(INVALID_VALUE, f"flags {flags:#x}")
    event, target = device.get(handle, Event), device.stream(stream)
    if target.capture is not None and not flags & 1:
        event.capture, event.nodes = target.capture, list(target.leaves)
        return

    def run() -> None:
        event.recorded_ns = device.now_ns()
        event.stream = target

    event.capture, event.nodes = None, []
    device.submit(target, NODE_RECORD, run, event=handle)


@entry
def cuEventQuery(device: Device, handle: int) -> None:
    if device.get(handle, Event).capture is not None:
        raise CudaError(UNSUPPORTED)


@entry
def cuEventSynchronize(device: Device, handle: int) -> None:
    cuEventQuery(device, handle)
    recorded = device.get(handle, Event).stream
    if recorded is not None:
        device.synchronized(recorded)


@entry
def cuEventElapsedTime_v2(device: Device, out: int, start: int, end: int) -> None:
    first, second = device.get(start, Event), device.get(end, Event)
    if not first.recorded_ns or not second.recorded_ns or (first.flags | second.flags) & DISABLE_TIMING:
        raise CudaError(400)
    ctypes.c_float.from_address(out).value = (second.recorded_ns - first.recorded_ns) / 1e6


@entry
def cuEventElapsedTime(device: Device, out: int, start: int, end: int) -> None:
    cuEventElapsedTime_v2(device, out, start, end)


@entry
def cuStreamWaitEvent(device: Device, stream: int, handle: int, flags: int) -> None:
    if flags & ~1:
        raise CudaError(INVALID_VALUE, f"flags {flags:#x}")
    target, event = device.stream(stream), device.get(handle, Event)
    if event.capture is not None:
        if target is device.legacy:
            raise CudaError(906)
        if target.capture is None:
            target.capture, target.leaves = event.capture, []
            event.capture.streams.append(target)
        elif target.capture is not event.capture:
            raise CudaError(MERGE)
        target.leaves = list(dict.fromkeys([*target.leaves, *event.nodes]))
        return
    if target.capture is not None and not flags & 1:
        raise CudaError(ISOLATION)


@entry
def cuLaunchHostFunc(device: Device, stream: int, function: int, user: int) -> None:
    device.submit(device.stream(stream), NODE_HOST, host_run(function, user), function=function, user=user)


def host_run(function: int, user: int) -> Callable[[], None]:
    """Calling a C function with its argument."""
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)
    return lambda: call(user)


# -- capture --------------------------------------------------------------------------------------


def _begin(device: Device, stream: Stream, graph: Graph, leaves: list[Node], mode: int) -> None:
    if not 0 <= mode <= 2:
        raise CudaError(INVALID_VALUE, f"capture mode {mode}")
    if stream is device.legacy:
        raise CudaError(UNSUPPORTED)
    if stream.capture is not None:
        raise CudaError(ILLEGAL_STATE, "the stream is capturing already")
    capture = Capture(graph, stream, streams=[stream])
    stream.capture, stream.leaves = capture, leaves
    device.captures.append(capture)


@entry
def cuStreamBeginCapture_v2(device: Device, handle: int, mode: int) -> None:
    _begin(device, device.stream(handle), Graph(), [], mode)


@entry
def cuStreamBeginCaptureToGraph(
    device: Device, handle: int, graph: int, dependencies: int, edges: int, count: int, mode: int
) -> None:
    leaves = [device.get(n, Node) for n in get_u64_list(dependencies, count)]
    _begin(device, device.stream(handle), device.get(graph, Graph), leaves, mode)


@entry
def cuStreamEndCapture(device: Device, handle: int, out: int) -> None:
    put_u64(out, 0)
    stream = device.stream(handle)
    capture = stream.capture
    if capture is None:
        raise CudaError(401)
    if capture.origin is not stream:
        capture.invalid = True
        raise CudaError(UNMATCHED)
    joined = {id(n) for n in _reachable(stream.leaves)}
    unjoined = any(
        any(id(n) not in joined for n in other.leaves) for other in capture.streams if other is not stream
    )
    for other in capture.streams:
        other.capture, other.leaves = None, []
    device.captures.remove(capture)
    if capture.invalid:
        raise CudaError(INVALIDATED)
    if unjoined:
        raise CudaError(UNJOINED)
    put_u64(out, device.handle_of(capture.graph))


def _reachable(leaves: list[Node]) -> list[Node]:
    seen: dict[int, Node] = {}
    todo = list(leaves)
    while todo:
        node = todo.pop()
        if id(node) not in seen:
            seen[id(node)] = node
            todo.extend(node.dependencies)
    return list(seen.values())


@entry
def cuStreamIsCapturing(device: Device, handle: int, out: int) -> None:
    capture = device.stream(handle).capture
    put_i32(out, 0 if capture is None else 2 if capture.invalid else 1)


# Arrays handed out by cuStreamGetCaptureInfo_v3 stay valid until the next call on the same stream.
_handed_out: dict[int, ctypes.Array[ctypes.c_uint64]] = {}


@entry
def cuStreamGetCaptureInfo_v3(
    device: Device, handle: int, status: int, number: int, graph: int, nodes: int, edges: int, count: int
) -> None:
    stream = device.stream(handle)
    capture = stream.capture
    put_i32(status, 0 if capture is None else 2 if capture.invalid else 1)
    if capture is None:
        return
    put_u64(number, capture.number)
    if graph:
        put_u64(graph, device.handle_of(capture.graph))
    handles = [device.handle_of(n) for n in stream.leaves]
    array = (ctypes.c_uint64 * max(len(handles), 1))(*handles)
    _handed_out[id(stream)] = array
    put_u64(nodes, ctypes.addressof(array))
    put_u64(edges, 0)
    put_u64(count, len(handles))


@entry
def cuStreamUpdateCaptureDependencies_v2(
    device: Device, handle: int, nodes: int, edges: int, count: int, flags: int
) -> None:
    stream = device.stream(handle)
    if stream.capture is None:
        raise CudaError(401)
    given = [device.get(n, Node) for n in get_u64_list(nodes, count)]
    stream.leaves = given if flags == 1 else list(dict.fromkeys([*stream.leaves, *given]))
