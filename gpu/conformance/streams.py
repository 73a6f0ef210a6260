# SPDX-License-Identifier: Apache-2.0
"""Conformance: streams, events, host functions, stream memory operations."""

from __future__ import annotations

import struct

from .kernels import PTX
from .probe import Probe, check

BLOCKING_SYNC, DISABLE_TIMING = 1, 2


@check
def streams(p: Probe) -> None:
    """Made, used, asked and destroyed; unknown flags are refused."""
    stream = p.value("cuStreamCreateWithPriority", 1, 0)
    p.ok("cuStreamQuery", stream)
    p.ok("cuStreamSynchronize", stream)
    p.ok("cuStreamSynchronize", 0)
    p.ok("cuStreamSynchronize", 1)
    p.ok("cuStreamSynchronize", 2)
    p.ok("cuStreamDestroy_v2", stream)
    cell = p.cell()
    p.expect(1, "cuStreamCreateWithPriority", cell, 0x100, 0)
    for priority in (100, -100):  # outside of the range is clamped
        p.ok("cuStreamDestroy_v2", p.value("cuStreamCreateWithPriority", 0, priority))


@check
def legacy_handles(p: Probe) -> None:
    """0 and 1 are the legacy stream, 2 is the thread's own; none of them can be destroyed."""
    out = p.device(16)
    for handle, value in ((0, 1), (1, 2), (2, 3)):
        p.ok("cuMemsetD8Async", out, value, 16, handle)
        p.ok("cuStreamSynchronize", handle)
        p.equal(p.download(out, 16), bytes([value]) * 16, f"memory after stream {handle}")
    p.true(p.call("cuStreamDestroy_v2", 0) in (1, 400), "the null stream cannot be destroyed")


@check
def events(p: Probe) -> None:
    """Never recorded is complete; recorded ones complete; elapsed time is that of both, in order."""
    stream = p.stream()
    first, second = p.event(), p.event()
    p.ok("cuEventQuery", first)
    p.ok("cuEventSynchronize", first)
    milliseconds = p.cell("float")
    p.expect(400, "cuEventElapsedTime_v2", milliseconds, first, second)
    p.ok("cuEventRecord", first, stream)
    fill = p.function("fill", PTX)
    p.launch(fill, 4, 256, "QII", p.device(4096), 1, 1024, stream=stream)
    p.ok("cuEventRecordWithFlags", second, stream, 0)
    p.ok("cuEventSynchronize", second)
    p.ok("cuEventQuery", first)
    p.ok("cuEventElapsedTime_v2", milliseconds, first, second)
    p.true(0 <= milliseconds[0] < 60_000, f"{milliseconds[0]} ms is an elapsed time")
    p.ok("cuEventElapsedTime_v2", milliseconds, second, first)
    p.true(milliseconds[0] <= 0, "backwards it is negative")


@check
def events_without_time(p: Probe) -> None:
    """An event without timing has none; unknown flags are refused."""
    stream = p.stream()
    timed, untimed = p.event(), p.event(DISABLE_TIMING)
    p.ok("cuEventRecord", timed, stream)
    p.ok("cuEventRecord", untimed, stream)
    p.ok("cuStreamSynchronize", stream)
    p.expect(400, "cuEventElapsedTime_v2", p.cell("float"), timed, untimed)
    p.expect(1, "cuEventCreate", p.cell(), 0x100)
    p.expect(1, "cuStreamWaitEvent", stream, timed, 4)
    p.expect(1, "cuEventRecordWithFlags", timed, stream, 4)


@check
def waiting_for_events(p: Probe) -> None:
    """A stream that waits for an event runs after what the event followed."""
    first, second, event = p.stream(), p.stream(), p.event(DISABLE_TIMING)
    out = p.device(4096)
    fill, scale = p.function("fill", PTX), p.function("scale", PTX)
    for turn in range(1, 6):
        p.launch(fill, 4, 256, "QII", out, turn, 1024, stream=first)
        p.ok("cuEventRecord", event, first)
        p.ok("cuStreamWaitEvent", second, event, 0)
        p.launch(scale, 4, 256, "QII", out, 10, 1024, stream=second)
        p.ok("cuEventRecord", event, second)
        p.ok("cuStreamWaitEvent", first, event, 0)
    p.ok("cuStreamSynchronize", first)
    p.equal(p.download(out, 4096), struct.pack("<1024I", *[50] * 1024), "memory after the last turn")


@check
def host_functions(p: Probe) -> None:
    """Called once each, in stream order, with the argument given."""
    stream = p.stream()
    seen: list[int] = []
    callback = p.keep(
        p.ffi.callback("void(void *)", lambda user: seen.append(int(p.ffi.cast("uintptr_t", user))))
    )
    out = p.device(64)
    for number in range(1, 4):
        p.ok("cuMemsetD8Async", out, number, 64, stream)
        p.ok("cuLaunchHostFunc", stream, callback, number)
    p.ok("cuStreamSynchronize", stream)
    p.equal(seen, [1, 2, 3], "calls of the host function")


@check
def written_values(p: Probe) -> None:
    """The device writes words into memory in stream order: what fences are made of."""
    stream, out = p.stream(), p.device(64)
    p.ok("cuStreamWriteValue64_v2", stream, out, 0x1122334455667788, 0)
    p.ok("cuStreamWriteValue32_v2", stream, out + 8, 0xAABBCCDD, 0)
    p.ok("cuStreamWaitValue64_v2", stream, out, 0x1122334455667788, 1)
    p.ok("cuStreamWaitValue32_v2", stream, out + 8, 1, 2)  # 2: any of these bits
    p.ok("cuStreamSynchronize", stream)
    p.equal(p.download(out, 12), struct.pack("<QI", 0x1122334455667788, 0xAABBCCDD), "words")


@check
def destroyed_twice(p: Probe) -> None:
    """Handles that are gone. A real driver gives no promise here; what it was seen to do is written down."""
    if p.kind == "nvidia":
        return  # use after destroy is undefined behaviour of libcuda; the worker's handle table stands in front
    stream, event = p.value("cuStreamCreateWithPriority", 0, 0), p.value("cuEventCreate", 0)
    p.ok("cuStreamDestroy_v2", stream)
    p.ok("cuEventDestroy_v2", event)
    p.expect(400, "cuStreamDestroy_v2", stream)
    p.expect(400, "cuEventDestroy_v2", event)
    p.expect(400, "cuStreamSynchronize", stream)
    p.expect(400, "cuEventRecord", event, 0)
