# SPDX-License-Identifier: Apache-2.0
"""The software GPU's objects: contexts, streams, events, modules, graphs, and the one device.

Work runs to its end when it is submitted, in submission order, which is one of the orders CUDA allows;
so a stream has no queue and an event is done once it is recorded. A stream that is capturing collects
nodes instead. One thread at a time is inside the driver (the worker's replay thread).
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from typing import Any, TypeVar

import attrs

from .graph_memory import Block, GraphMemory
from .memory import AddressSpace, PhysicalAllocation
from .pool import Pool
from .ptx import Instance, Kernel

T = TypeVar("T")


class CudaError(Exception):
    """A driver call failed with this CUresult."""

    def __init__(self, code: int, text: str = "") -> None:
        super().__init__(f"CUDA error {code}" + (f": {text}" if text else ""))
        self.code = code


def _default_limits() -> dict[int, int]:
    return {0: 1024, 1: 1 << 20, 2: 8 << 20, 4: 2048, 5: 64, 6: 0, 7: 0, 8: 0}


@attrs.define(eq=False)
class Context:
    """A context and what ends with it: memory, registered host memory, streams, events, modules."""

    flags: int = 0
    limits: dict[int, int] = attrs.Factory(_default_limits)
    memory: set[int] = attrs.Factory(set)
    windows: set[int] = attrs.Factory(set)
    handles: set[int] = attrs.Factory(set)


@attrs.define(eq=False)
class Node:
    """A graph node: its type (CUgraphNodeType), what it does, what it waits for."""

    kind: int
    run: Callable[[], None]
    dependencies: list[Node] = attrs.Factory(list)
    enabled: bool = True
    # What the Get calls of its type give back.
    details: dict[str, Any] = attrs.Factory(dict)


@attrs.define(eq=False)
class Graph:
    """Nodes in the order they were added, which respects dependencies while it is captured."""

    nodes: list[Node] = attrs.Factory(list)

    def ordered(self) -> list[Node]:
        """Nodes so that each comes after those it waits for.

        Raises:
            CudaError: INVALID_VALUE for a cycle.
        """
        done: list[Node] = []
        state: dict[int, int] = {}

        def visit(node: Node) -> None:
            if state.get(id(node)) == 2:
                return
            if state.get(id(node)) == 1:
                raise CudaError(1, "the graph has a cycle")
            state[id(node)] = 1
            for before in node.dependencies:
                visit(before)
            state[id(node)] = 2
            done.append(node)

        for node in self.nodes:
            visit(node)
        return done


@attrs.define(eq=False)
class Executable:
    """An instantiated graph: pairs of original node and what runs for it."""

    graph: Graph
    steps: list[tuple[Node, Callable[[], None]]]
    flags: int = 0
    disabled: set[int] = attrs.Factory(set)
    # Memory nodes: what a launch needs, what it leaves allocated, and what the instance keeps from ending.
    blocks: list[Block] = attrs.Factory(list)
    unfreed: list[Block] = attrs.Factory(list)
    held: list[Block] = attrs.Factory(list)


_capture_ids = itertools.count(1)


@attrs.define(eq=False)
class Capture:
    """A capture in progress, shared by all streams that joined it."""

    graph: Graph
    origin: Stream
    number: int = attrs.Factory(lambda: next(_capture_ids))
    streams: list[Stream] = attrs.Factory(list)
    invalid: bool = False


@attrs.define(eq=False)
class Stream:
    """A stream. ``leaves`` are the nodes its next captured node waits for."""

    flags: int = 0
    priority: int = 0
    capture: Capture | None = None
    leaves: list[Node] = attrs.Factory(list)


@attrs.define(eq=False)
class Event:
    """An event; in a capture it stands for the nodes before it."""

    flags: int = 0
    recorded_ns: int = 0
    capture: Capture | None = None
    nodes: list[Node] = attrs.Factory(list)
    stream: Stream | None = None


@attrs.define(eq=False)
class Function:
    """A kernel of a loaded module. As CUkernel and CUfunction it is the same object."""

    module: LoadedModule
    kernel: Kernel
    max_dynamic_shared: int
    carveout: int = -1
    # The name must lie at a fixed address for cuFuncGetName.
    name_bytes: bytes = b""


@attrs.define(eq=False)
class LoadedModule:
    """A module or library and its functions by name. A library belongs to no context, as CUDA has it."""

    instance: Instance
    is_library: bool = False
    functions: dict[str, Function] = attrs.Factory(dict)


# What a context takes with it. Graphs, pools and physical memory outlive the context they were made in.
_OWNED = (Stream, Event, LoadedModule, Function)


class Device:
    """All state of the software GPU in this process."""

    def __init__(self, capacity_bytes: int) -> None:
        self.space = AddressSpace(capacity_bytes)
        self.objects: dict[int, object] = {}
        self._numbers = itertools.count(0x10000, 16)
        self.primary = Context()
        self.primary_handle = self.add(self.primary)
        self.primary_active = 0
        self.current: int = 0
        self.legacy = Stream()
        self.per_thread = Stream()
        self.default_pool = self.add(Pool(self.space))
        self.pool = self.default_pool
        self.graph_memory = GraphMemory(self.space)
        self.captures: list[Capture] = []
        # Error that poisoned the context; every later call returns it.
        self.fault = 0
        self.fault_text = ""
        self.kernel_ns = 0
        self.launches = 0
        self.physical: dict[int, PhysicalAllocation] = {}
        self.windows: dict[int, int] = {}
        # The pool of an address that came from one, also of one that was destroyed.
        self.pool_of: dict[int, Pool] = {}
        # Asked now and then by a running kernel; true stops it.
        self.should_stop: Callable[[], bool] = lambda: False

    def add(self, value: object) -> int:
        """Give an object a handle."""
        handle = next(self._numbers)
        self.objects[handle] = value
        module = value.module if isinstance(value, Function) else value
        if isinstance(value, _OWNED) and not (isinstance(module, LoadedModule) and module.is_library):
            self.context().handles.add(handle)
        return handle

    def context(self) -> Context:
        """The current context; the primary one where none is."""
        current = self.objects.get(self.current)
        return current if isinstance(current, Context) else self.primary

    def end_context(self, context: Context) -> None:
        """Free everything a context owns. The context object itself can be used afresh."""
        for handle in context.handles:
            value = self.objects.pop(handle, None)
            if isinstance(value, LoadedModule):
                value.instance.unload()
        for value in self.objects.values():
            if isinstance(value, LoadedModule) and value.is_library:
                # A library's variables are per context: the next one begins with their initial values.
                value.instance.unload()
                value.instance = value.instance.module.instantiate(self.space)
        for address in context.memory:
            with contextlib.suppress(KeyError):
                self.space.free(address)
        for address in context.windows:
            if self.windows.pop(address, None) is not None:
                self.space.unmap_window(address)
        for owned in (context.handles, context.memory, context.windows):
            owned.clear()
        context.limits = _default_limits()
        self.captures.clear()
        self.synchronized(None)
        self.legacy, self.per_thread = Stream(), Stream()

    def synchronized(self, stream: Stream | None) -> None:
        """A stream was synchronized with, or all were: pools get back what was freed in its order."""
        for value in self.objects.values():
            if isinstance(value, Pool):
                value.synchronized(stream)

    def get(self, handle: int, kind: type[T]) -> T:
        """The object behind a handle.

        Raises:
            CudaError: INVALID_HANDLE.
        """
        value = self.objects.get(handle)
        if not isinstance(value, kind):
            raise CudaError(400, f"{handle:#x} is no {kind.__name__}")
        return value

    def remove(self, handle: int, kind: type[T]) -> T:
        """Forget a handle and return what was behind it."""
        value = self.get(handle, kind)
        del self.objects[handle]
        return value

    def handle_of(self, value: object) -> int:
        """The handle of an object, made where it has none."""
        for handle, known in self.objects.items():
            if known is value:
                return handle
        return self.add(value)

    def stream(self, handle: int) -> Stream:
        """A stream by handle; 0 and 1 are the legacy stream, 2 the per-thread one."""
        if handle in (0, 1):
            return self.legacy
        if handle == 2:
            return self.per_thread
        return self.get(handle, Stream)

    def submit(self, stream: Stream, kind: int, run: Callable[[], None], **details: Any) -> None:
        """Run work on a stream now, or make it a node of the capture the stream is in.

        Raises:
            CudaError: STREAM_CAPTURE_IMPLICIT when the legacy stream would join a capture.
        """
        capture = stream.capture
        if capture is None:
            if stream is self.legacy and any(not (s.flags & 1) for c in self.captures for s in c.streams):
                raise CudaError(906, "the legacy stream depends on a capturing stream")
            run()
            return
        if capture.invalid:
            raise CudaError(901, "the capture has been spoilt")
        node = Node(kind, run, list(stream.leaves), details=details)
        capture.graph.nodes.append(node)
        stream.leaves = [node]

    def poison(self, code: int, text: str) -> None:
        """A kernel faulted: from now on every call fails with ``code``."""
        if not self.fault:
            self.fault, self.fault_text = code, text

    def now_ns(self) -> int:
        """The clock of events."""
        return time.perf_counter_ns()
