# SPDX-License-Identifier: Apache-2.0
"""Random programs of driver calls, right and wrong ones, against a model in plain Python.

Every result code and every byte that comes back is compared. The model knows what CUDA promises (and what a real
driver was measured to answer); it is told addresses and handles by the system under test and checks that they make
sense. Between the two stand the guest library, the ring, the worker and the software GPU. Seeded, so that a run
repeats; ``VGPU_DIFFERENTIAL_EXAMPLES`` asks for more.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.e2e.mediator import PROGRAMS, Guest, Mediator

EXAMPLES = int(os.environ.get("VGPU_DIFFERENTIAL_EXAMPLES", "150"))
STEPS = 60
INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONTEXT, INVALID_HANDLE, NOT_FOUND, NOT_READY = 1, 2, 201, 400, 500, 600
WILD = 0x1234500
MULTIPROCESSOR_GRID = 4

Answer = tuple[int, list[bytes]]


class Interpreter:
    """The guest process, which lives as long as the test."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    def _ask(self, request: dict[str, Any]) -> Answer:
        self.guest.say(json.dumps(request))
        code, outputs = json.loads(self.guest.line())
        self.guest.lines.clear()
        return code, [bytes.fromhex(o) for o in outputs]

    def call(self, name: str, *arguments: Any) -> Answer:
        return self._ask({"call": name, "arguments": list(arguments)})

    def peek(self, address: int, size: int) -> bytes:
        return self._ask({"peek": address, "size": size})[1][0]

    def poke(self, address: int, data: bytes) -> None:
        self._ask({"poke": address, "bytes": data.hex()})


def out(size: int = 8) -> dict[str, int]:
    return {"out": size}


def given(data: bytes) -> dict[str, str]:
    return {"in": data.hex()}


def number(data: bytes) -> int:
    return int.from_bytes(data, "little")


class Programs(RuleBasedStateMachine):
    """One program: it allocates, copies, launches and waits, makes every mistake it can, and is checked at each call."""

    guest: ClassVar[Interpreter]
    image: ClassVar[bytes]

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, bytearray] = {}  # base address -> content
        self.dead: list[int] = []
        self.pinned: dict[int, int] = {}  # host address -> size
        self.streams: list[int] = [0]
        self.dead_streams: list[int] = []
        self.events: dict[int, bool] = {}  # handle -> has been recorded
        self.dead_events: list[int] = []
        self.modules: dict[int, tuple[int, int, int]] = {}  # module -> fill, scale, globals
        self.counter: dict[int, int] = {}  # module -> value of its variable
        self.foreign: dict[
            int, list[tuple[int, int]]
        ] = {}  # module -> its variables: memory, but none of ours

    # -- helpers

    def expect(self, code: int, name: str, *arguments: Any) -> list[bytes]:
        got, outputs = self.guest.call(name, *arguments)
        assert got == code, f"{name}{arguments} returned {got}, the model says {code}"
        return outputs

    def make(self, name: str, *arguments: Any) -> int:
        return number(self.expect(0, name, out(), *arguments)[0])

    def find(self, address: int, size: int) -> tuple[int, int] | None:
        """(base, offset) of the allocation that holds all of a range."""
        for base, content in self.live.items():
            if base <= address and address + size <= base + len(content) and address < base + len(content):
                return base, address - base
        return None

    def some_address(self, data: st.DataObject) -> int:
        """Inside an allocation, near its ends, dead, null or wild."""
        kind = data.draw(st.sampled_from(("live", "live", "live", "live", "dead", "wild", "null")))
        address = 0 if kind == "null" else WILD
        if kind == "live" and self.live:
            base = data.draw(st.sampled_from(sorted(self.live)))
            size = len(self.live[base])
            offsets = sorted({0, 1, 3, 4, 16, size // 2, size - 1, size, size + 8})
            address = base + data.draw(st.sampled_from(offsets))
        elif kind == "dead" and self.dead:
            address = data.draw(st.sampled_from(self.dead))
        variables = [piece for pieces in self.foreign.values() for piece in pieces]
        return WILD if any(base <= address < base + size for base, size in variables) else address

    def some_stream(self, data: st.DataObject) -> tuple[int, bool]:
        """A stream and whether it lives."""
        if self.dead_streams and data.draw(st.integers(0, 9)) == 0:
            return data.draw(st.sampled_from(self.dead_streams)), False
        return data.draw(st.sampled_from(self.streams)), True

    @initialize()
    def begin(self) -> None:
        self.expect(0, "cuInit", 0)
        context = self.make("cuDevicePrimaryCtxRetain", 0)
        self.expect(0, "cuCtxSetCurrent", context)
        self.context = context

    def teardown(self) -> None:
        if not hasattr(self, "context"):
            return
        for base, content in self.live.items():
            data = self.expect(0, "cuMemcpyDtoH_v2", out(len(content)), base, len(content))[0]
            assert data == bytes(content), f"content of {base:#x} at the end of the program"
        self.expect(0, "cuDevicePrimaryCtxReset_v2", 0)
        for address in self.pinned:
            self.guest.call("cuMemFreeHost", address)
        self.expect(0, "cuDevicePrimaryCtxRelease_v2", 0)

    # -- memory

    @rule(size=st.sampled_from((0, 1, 16, 100, 256, 1000, 4096, 70_000, 1 << 46)))
    def allocate(self, size: int) -> None:
        code = INVALID_VALUE if size == 0 else OUT_OF_MEMORY if size > 1 << 40 else 0
        address = number(self.expect(code, "cuMemAlloc_v2", out(), size)[0])
        if code:
            return
        assert address % 256 == 0
        assert all(address + size <= base or base + len(c) <= address for base, c in self.live.items())
        self.dead = [old for old in self.dead if not address <= old < address + size]
        self.live[address] = bytearray(size)
        self.expect(0, "cuMemsetD8_v2", address, 0, size)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        address = self.some_address(data)
        self.expect(0 if address in self.live or not address else INVALID_VALUE, "cuMemFree_v2", address)
        if self.live.pop(address, None) is not None:
            self.dead.append(address)

    @rule(
        data=st.data(),
        width=st.sampled_from((1, 2, 4)),
        value=st.integers(0, 2**32 - 1),
        count=st.sampled_from((0, 1, 3, 16, 64, 1000)),
        is_async=st.booleans(),
    )
    def memset(self, data: st.DataObject, width: int, value: int, count: int, is_async: bool) -> None:
        address = self.some_address(data)
        name = f"cuMemsetD{8 * width}" + ("Async" if is_async else "_v2")
        value &= (1 << 8 * width) - 1
        stream, is_live = self.some_stream(data) if is_async else (0, True)
        found = self.find(address, width * count)
        fits = count == 0 or (found is not None and address % width == 0)
        code = INVALID_HANDLE if not is_live else 0 if fits else INVALID_VALUE
        if count == 0 and address % width:
            return  # CUDA does not say which of the two counts
        if not is_live and not fits:
            return  # nor here
        self.expect(code, name, address, value, count, *([stream] if is_async else []))
        if code == 0 and count and found:
            base, offset = found
            self.live[base][offset : offset + width * count] = value.to_bytes(width, "little") * count
            self.join(stream)

    def join(self, stream: int) -> None:
        """The model has no time: what was put on a stream is complete before anything else looks."""
        if stream:
            self.expect(0, "cuStreamSynchronize", stream)

    @rule(data=st.data(), content=st.binary(max_size=600), is_async=st.booleans())
    def upload(self, data: st.DataObject, content: bytes, is_async: bool) -> None:
        address = self.some_address(data)
        found = self.find(address, len(content))
        code = 0 if not content or found else INVALID_VALUE
        if is_async:
            stream, is_live = self.some_stream(data)
            if not is_live and (code or not content):
                return
            code = code if is_live else INVALID_HANDLE
            self.expect(code, "cuMemcpyHtoDAsync_v2", address, given(content), len(content), stream)
            if code == 0:
                self.join(stream)
        else:
            self.expect(code, "cuMemcpyHtoD_v2", address, given(content), len(content))
        if code == 0 and found:
            base, offset = found
            self.live[base][offset : offset + len(content)] = content

    @rule(data=st.data(), size=st.sampled_from((0, 1, 7, 64, 600, 5000)), is_async=st.booleans())
    def download(self, data: st.DataObject, size: int, is_async: bool) -> None:
        address = self.some_address(data)
        found = self.find(address, size)
        code = 0 if not size or found else INVALID_VALUE
        if is_async:
            got = self.expect(code, "cuMemcpyDtoHAsync_v2", out(size), address, size, 0)[0]
        else:
            got = self.expect(code, "cuMemcpyDtoH_v2", out(size), address, size)[0]
        if code == 0 and found and size:
            base, offset = found
            assert got == bytes(self.live[base][offset : offset + size])

    @rule(data=st.data(), size=st.sampled_from((0, 1, 8, 100, 900)))
    def copy_within(self, data: st.DataObject, size: int) -> None:
        source, target = self.some_address(data), self.some_address(data)
        from_, to = self.find(source, size), self.find(target, size)
        if from_ and to and from_[0] == to[0] and size and abs(source - target) < size:
            return  # overlapping copies are undefined
        code = 0 if not size or (from_ and to) else INVALID_VALUE
        self.expect(code, "cuMemcpyDtoD_v2", target, source, size)
        if code == 0 and from_ and to:
            chunk = self.live[from_[0]][from_[1] : from_[1] + size]
            self.live[to[0]][to[1] : to[1] + size] = chunk

    @rule(data=st.data(), width=st.integers(1, 20), height=st.integers(1, 5), pitch=st.integers(1, 40))
    def upload_rectangle(self, data: st.DataObject, width: int, height: int, pitch: int) -> None:
        address = self.some_address(data)
        rows = bytes((7 * i + 3) % 256 for i in range(width * height))
        packed = struct.pack(
            "<QQIxxxxQQQQQQIxxxxQQQQQQ",
            *(0, 0, 1), WILD, 0, 0, width, 0, 0, 2, 0, address, 0, pitch, width, height,
        )  # fmt: skip
        # The host address is only known in the guest: pinned memory stands in for it.
        if not self.pinned:
            return
        host = next(iter(self.pinned))
        self.guest.poke(host, rows[: self.pinned[host]])
        if len(rows) > self.pinned[host]:
            return
        packed = packed[:24] + struct.pack("<Q", host) + packed[32:]
        span = pitch * (height - 1) + width
        found = self.find(address, span)
        if width > pitch:
            code = INVALID_VALUE
        else:
            code = 0 if found else INVALID_VALUE
        self.expect(code, "cuMemcpy2D_v2", given(packed))
        if code == 0 and found:
            base, offset = found
            for row in range(height):
                at = offset + row * pitch
                self.live[base][at : at + width] = rows[row * width : (row + 1) * width]

    @rule(data=st.data())
    def ask_about_an_address(self, data: st.DataObject) -> None:
        address = self.some_address(data)
        found = self.find(address, 0)
        code = 0 if found else NOT_FOUND if address else INVALID_VALUE
        if address == 0:
            return  # undefined
        base, size = self.expect(code, "cuMemGetAddressRange_v2", out(), out(), address)
        if found:
            assert (number(base), number(size)) == (found[0], len(self.live[found[0]]))
        (kind,) = self.expect(0 if found else INVALID_VALUE, "cuPointerGetAttribute", out(4), 2, address)
        if found:
            assert number(kind) == 2

    # -- pinned memory

    @precondition(lambda self: len(self.pinned) < 3)
    @rule(size=st.sampled_from((64, 1000, 10_000)))
    def pin(self, size: int) -> None:
        address = self.make("cuMemHostAlloc", size, 2)
        assert all(address + size <= old or old + n <= address for old, n in self.pinned.items())
        self.pinned[address] = size
        self.guest.poke(address, bytes(size))

    @precondition(lambda self: self.pinned)
    @rule(data=st.data(), value=st.integers(0, 255))
    def use_pinned(self, data: st.DataObject, value: int) -> None:
        """The device writes through the mapped address; copies go both ways without staging."""
        address = data.draw(st.sampled_from(sorted(self.pinned)))
        size = self.pinned[address]
        device = self.make("cuMemHostGetDevicePointer_v2", address, 0)
        self.expect(0, "cuMemsetD8_v2", device, value, size)
        self.expect(0, "cuCtxSynchronize")
        assert self.guest.peek(address, size) == bytes([value]) * size
        for base, content in self.live.items():
            some = min(size, len(content))
            self.expect(0, "cuMemcpyDtoHAsync_v2", address, base, some, 0)
            self.expect(0, "cuStreamSynchronize", 0)
            assert self.guest.peek(address, some) == bytes(content[:some])

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        address = data.draw(st.sampled_from(sorted(self.pinned)))
        self.expect(0, "cuMemFreeHost", address)
        del self.pinned[address]
        self.expect(INVALID_VALUE, "cuMemFreeHost", address)

    # -- streams and events

    @precondition(lambda self: len(self.streams) < 4)
    @rule(flags=st.sampled_from((0, 1, 0x100)))
    def create_stream(self, flags: int) -> None:
        code = 0 if flags <= 1 else INVALID_VALUE
        handle = number(self.expect(code, "cuStreamCreate", out(), flags)[0])
        if code == 0:
            assert handle not in self.streams
            assert handle not in self.dead_streams
            self.streams.append(handle)

    @rule(data=st.data())
    def destroy_stream(self, data: st.DataObject) -> None:
        stream, is_live = self.some_stream(data)
        if stream == 0:
            return
        self.expect(0 if is_live else INVALID_HANDLE, "cuStreamDestroy_v2", stream)
        if is_live:
            self.streams.remove(stream)
            self.dead_streams.append(stream)

    @rule(data=st.data(), name=st.sampled_from(("cuStreamSynchronize", "cuStreamQuery")))
    def look_at_stream(self, data: st.DataObject, name: str) -> None:
        stream, is_live = self.some_stream(data)
        self.expect(0 if is_live else INVALID_HANDLE, name, stream)

    @precondition(lambda self: len(self.events) < 4)
    @rule(flags=st.sampled_from((0, 1, 2, 0x80)))
    def create_event(self, flags: int) -> None:
        code = 0 if flags <= 2 else INVALID_VALUE
        handle = number(self.expect(code, "cuEventCreate", out(), flags)[0])
        if code == 0:
            assert handle not in self.events
            if flags != 2:
                self.events[handle] = False
            else:  # no timing: of no further interest
                self.expect(0, "cuEventDestroy_v2", handle)
                self.dead_events.append(handle)

    def some_event(self, data: st.DataObject) -> tuple[int, bool] | None:
        if self.dead_events and data.draw(st.integers(0, 4)) == 0:
            return data.draw(st.sampled_from(self.dead_events)), False
        return (data.draw(st.sampled_from(sorted(self.events))), True) if self.events else None

    @rule(data=st.data())
    def record_event(self, data: st.DataObject) -> None:
        event, (stream, stream_is_live) = self.some_event(data), self.some_stream(data)
        if event is None:
            return
        code = 0 if event[1] and stream_is_live else INVALID_HANDLE
        self.expect(code, "cuEventRecord", event[0], stream)
        if code == 0:
            self.events[event[0]] = True
            self.join(stream)

    @rule(data=st.data())
    def wait_for_event(self, data: st.DataObject) -> None:
        event, (stream, stream_is_live) = self.some_event(data), self.some_stream(data)
        if event is not None:
            code = 0 if event[1] and stream_is_live else INVALID_HANDLE
            self.expect(code, "cuStreamWaitEvent", stream, event[0], 0)

    @rule(data=st.data(), name=st.sampled_from(("cuEventSynchronize", "cuEventQuery")))
    def look_at_event(self, data: st.DataObject, name: str) -> None:
        event = self.some_event(data)
        if event is not None:
            if event[1] and name == "cuEventQuery":
                self.expect(0, "cuEventSynchronize", event[0])
            self.expect(0 if event[1] else INVALID_HANDLE, name, event[0])

    @rule(data=st.data())
    def elapsed_time(self, data: st.DataObject) -> None:
        first, second = self.some_event(data), self.some_event(data)
        if first is None or second is None:
            return
        recorded = all(e[1] and self.events[e[0]] for e in (first, second))
        if recorded:
            self.expect(0, "cuCtxSynchronize")
        self.expect(0 if recorded else INVALID_HANDLE, "cuEventElapsedTime", out(4), first[0], second[0])

    @rule(data=st.data())
    def destroy_event(self, data: st.DataObject) -> None:
        event = self.some_event(data)
        if event is not None:
            self.expect(0 if event[1] else INVALID_HANDLE, "cuEventDestroy_v2", event[0])
            if event[1]:
                del self.events[event[0]]
                self.dead_events.append(event[0])

    # -- code

    @precondition(lambda self: len(self.modules) < 2)
    @rule()
    def load_module(self) -> None:
        module = self.make("cuModuleLoadData", given(self.image))
        names = (b"fill\0", b"scale\0", b"globals\0")
        fill, scale, globals_ = (self.make("cuModuleGetFunction", module, given(name)) for name in names)
        self.expect(NOT_FOUND, "cuModuleGetFunction", out(), module, given(b"absent\0"))
        self.modules[module] = (fill, scale, globals_)
        self.counter[module] = 7
        self.foreign[module] = []
        for name in (b"counter\0", b"table\0"):
            address, size = self.expect(0, "cuModuleGetGlobal_v2", out(), out(), module, given(name))
            self.foreign[module].append((number(address), number(size)))
            self.expect(INVALID_VALUE, "cuMemFree_v2", number(address))

    @precondition(lambda self: self.modules)
    @rule(data=st.data())
    def unload_module(self, data: st.DataObject) -> None:
        module = data.draw(st.sampled_from(sorted(self.modules)))
        fill = self.modules.pop(module)[0]
        del self.foreign[module]
        self.expect(0, "cuModuleUnload", module)
        self.expect(INVALID_HANDLE, "cuModuleUnload", module)
        self.expect(INVALID_HANDLE, "cuModuleGetFunction", out(), module, given(b"fill\0"))
        parameters = {"each": [struct.pack("<Q", 0).hex(), bytes(4).hex(), bytes(4).hex()]}
        self.expect(INVALID_HANDLE, "cuLaunchKernel", fill, 1, 1, 1, 1, 1, 1, 0, 0, parameters, 0)

    @precondition(lambda self: self.modules and self.live)
    @rule(
        data=st.data(),
        value=st.integers(0, 2**32 - 1),
        blocks=st.integers(0, MULTIPROCESSOR_GRID),
        threads=st.sampled_from((0, 1, 32, 100, 256, 1024, 1025)),
        shared=st.sampled_from((0, 0, 0, 1024, 1 << 20)),
        is_extra=st.booleans(),
    )
    def launch(
        self, data: st.DataObject, value: int, blocks: int, threads: int, shared: int, is_extra: bool
    ) -> None:
        functions = self.modules[data.draw(st.sampled_from(sorted(self.modules)))]
        base = data.draw(st.sampled_from(sorted(self.live)))
        is_scale = data.draw(st.booleans())
        content = self.live[base]
        count = len(content) // 4
        stream, is_live = self.some_stream(data)
        is_right = blocks >= 1 and 1 <= threads <= 1024 and shared <= 48 << 10
        if not is_live and not is_right:
            return
        code = 0 if is_right and is_live else INVALID_VALUE if is_live else INVALID_HANDLE
        shape = (max(blocks, 0), 1, 1, threads, 1, 1, shared, stream)
        if is_extra:
            self.launch_packed(code, functions[is_scale], shape, struct.pack("<QII", base, value, count))
        else:
            parameters = {
                "each": [struct.pack("<Q", base).hex(), *(struct.pack("<I", n).hex() for n in (value, count))]
            }
            self.expect(code, "cuLaunchKernel", functions[is_scale], *shape, parameters, 0)
        if code:
            return
        self.join(stream)
        touched = min(count, blocks * threads)
        old = struct.unpack(f"<{touched}I", content[: 4 * touched])
        new = [(word * value) & 0xFFFFFFFF if is_scale else value for word in old]
        content[: 4 * touched] = struct.pack(f"<{touched}I", *new)

    def launch_packed(self, code: int, function: int, shape: tuple[int, ...], packed: bytes) -> None:
        """Through ``extra``, whose pointers have to be pinned memory for this test to know them."""
        if not self.pinned:
            address = self.make("cuMemHostAlloc", 1000, 0)
            self.pinned[address] = 1000
        address = next(iter(self.pinned))
        size_at, extra_at = address, address + 8
        self.guest.poke(address, struct.pack("<Q", len(packed)) + bytes(48))
        buffer_at = self.make("cuMemHostAlloc", 64, 0)
        self.guest.poke(buffer_at, packed)
        self.guest.poke(extra_at, struct.pack("<5Q", 1, buffer_at, 2, size_at, 0))
        self.expect(code, "cuLaunchKernel", function, *shape, 0, extra_at)
        self.expect(0, "cuMemFreeHost", buffer_at)

    @precondition(lambda self: self.modules)
    @rule(data=st.data(), value=st.integers(0, 2**31))
    def use_variable(self, data: st.DataObject, value: int) -> None:
        module = data.draw(st.sampled_from(sorted(self.modules)))
        address, size = self.expect(0, "cuModuleGetGlobal_v2", out(), out(), module, given(b"counter\0"))
        assert number(size) == 4
        got = self.expect(0, "cuMemcpyDtoH_v2", out(4), number(address), 4)[0]
        assert number(got) == self.counter[module]
        self.expect(0, "cuMemcpyHtoD_v2", number(address), given(struct.pack("<I", value)), 4)
        self.counter[module] = value
        if any(len(content) >= 8 for content in self.live.values()):
            base = next(base for base, content in self.live.items() if len(content) >= 8)
            parameters = {"each": [struct.pack("<Q", base).hex()]}
            self.expect(0, "cuLaunchKernel", self.modules[module][2], 1, 1, 1, 1, 1, 1, 0, 0, parameters, 0)
            self.live[base][:8] = struct.pack("<II", value, 33)
            self.counter[module] += 1
        self.expect(NOT_FOUND, "cuModuleGetGlobal_v2", out(), out(), module, given(b"absent\0"))

    # -- graphs

    @precondition(lambda self: len(self.streams) > 1 and self.live)
    @rule(
        data=st.data(),
        values=st.lists(st.integers(0, 255), min_size=1, max_size=4),
        launches=st.integers(0, 2),
    )
    def graph(self, data: st.DataObject, values: list[int], launches: int) -> None:
        """Captured memsets of growing length do nothing until the graph is launched."""
        stream = data.draw(st.sampled_from(self.streams[1:]))
        base = data.draw(st.sampled_from(sorted(self.live)))
        content = self.live[base]
        self.expect(0, "cuStreamBeginCapture_v2", stream, 1)
        for index, value in enumerate(values):
            self.expect(0, "cuMemsetD8Async", base, value, max(len(content) - index, 1), stream)
        graph = number(self.expect(0, "cuStreamEndCapture", stream, out())[0])
        executable = self.make("cuGraphInstantiateWithFlags", graph, 0)
        count = self.expect(0, "cuGraphGetNodes", graph, 0, out())[0]
        assert number(count) == len(values)
        got = self.expect(0, "cuMemcpyDtoH_v2", out(len(content)), base, len(content))[0]
        assert got == bytes(content), "capturing changed memory"
        for _ in range(launches):
            self.expect(0, "cuGraphLaunch", executable, stream)
            for index, value in enumerate(values):
                size = max(len(content) - index, 1)
                content[:size] = bytes([value]) * size
        self.join(stream)
        self.expect(0, "cuGraphExecDestroy", executable)
        self.expect(0, "cuGraphDestroy", graph)
        self.expect(INVALID_VALUE, "cuGraphLaunch", executable, stream)

    @precondition(lambda self: len(self.streams) > 1)
    @rule(data=st.data())
    def spoilt_capture(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(self.streams[1:]))
        self.expect(0, "cuStreamBeginCapture_v2", stream, 2)
        self.expect(900, "cuStreamSynchronize", stream)
        (graph,) = self.expect(901, "cuStreamEndCapture", stream, out())
        assert number(graph) == 0
        self.expect(0, "cuStreamSynchronize", stream)

    # -- contexts

    @rule()
    def without_a_context(self) -> None:
        popped = self.make("cuCtxPopCurrent_v2")
        assert popped == self.context
        (current,) = self.expect(0, "cuCtxGetCurrent", out())
        assert number(current) == 0
        self.expect(INVALID_CONTEXT, "cuMemAlloc_v2", out(), 256)
        self.expect(INVALID_CONTEXT, "cuStreamCreate", out(), 0)
        self.expect(INVALID_CONTEXT, "cuEventCreate", out(), 0)
        self.expect(INVALID_CONTEXT, "cuCtxSynchronize")
        self.expect(INVALID_CONTEXT, "cuCtxPopCurrent_v2", out())
        self.expect(0, "cuCtxPushCurrent_v2", self.context)
        assert self.make("cuCtxGetCurrent") == self.context

    @rule()
    def ask_the_device(self) -> None:
        assert number(self.expect(0, "cuDeviceGetCount", out(4))[0]) == 1
        self.expect(101, "cuDeviceGet", out(4), 1)
        self.expect(INVALID_VALUE, "cuDeviceGetAttribute", out(4), 9999, 0)
        assert number(self.expect(0, "cuDeviceGetAttribute", out(4), 10, 0)[0]) == 32


@pytest.fixture
def interpreter(mediator: Mediator) -> Iterator[Interpreter]:
    guest = mediator.begin(sys.executable, "-P", PROGRAMS / "interpreter.py")
    yield Interpreter(guest)
    assert guest.finish()[0] == 0, guest.errors()


def test_random_programs(interpreter: Interpreter, kernels: Path) -> None:
    Programs.guest = interpreter
    Programs.image = kernels.read_bytes() + b"\0"
    run_state_machine_as_test(
        Programs,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
