# SPDX-License-Identifier: Apache-2.0
"""What a conformance check holds in its hand: a driver to call, expectations, and cleaning up after itself.

A check is a function from a ``Probe``. It states what CUDA documents (or what a real driver was measured to do) and
runs unchanged on every driver. Where two drivers may rightly differ it says so with ``differs`` and a reason, so that
the list of differences can be read off the suite. Must never know which Python objects stand behind the vtable.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import attrs

from vgpu.gpu.errors import result_name

Kind = Literal["software", "nvidia"]
T = TypeVar("T")


class Mismatch(AssertionError):
    """The driver did something else than the suite expects."""


@attrs.frozen
class Check:
    """One named check. A fatal one poisons its process and has to be the only one in it."""

    name: str
    run: Callable[[Probe], None]
    fatal: bool


CHECKS: dict[str, Check] = {}


def check(function: Callable[[Probe], None]) -> Callable[[Probe], None]:
    """List a function as a check under its own name, after its file: ``memory.copies``."""
    return _listed(function, fatal=False)


def fatal_check(function: Callable[[Probe], None]) -> Callable[[Probe], None]:
    """List a check that leaves the process's context unusable."""
    return _listed(function, fatal=True)


def _listed(function: Callable[[Probe], None], *, fatal: bool) -> Callable[[Probe], None]:
    name = f"{function.__module__.rsplit('.', 1)[1]}.{function.__name__}"
    if name in CHECKS:
        raise RuntimeError(f"{name} is written twice")
    CHECKS[name] = Check(name, function, fatal)
    return function


@attrs.define(eq=False)
class Probe:
    """Calls a driver and compares. Not for two threads at once.

    ``ffi`` knows ``struct vgpu_driver``; ``driver`` points to one whose ``cuInit`` has succeeded, with the primary
    context of device 0 current.
    """

    ffi: Any
    driver: Any
    kind: Kind
    _cleanups: list[Callable[[], None]] = attrs.Factory(list)
    _kept: list[Any] = attrs.Factory(list)
    _signatures: dict[str, Any] = attrs.Factory(dict)

    # -- calling

    def call(self, name: str, *arguments: Any) -> int:
        """Call by symbol name. Numbers and buffers are cast to what the function takes."""
        signature = self._signatures.get(name)
        if signature is None:
            fields = dict(self.ffi.typeof("struct vgpu_driver").fields)
            signature = self._signatures[name] = fields[name].type.args
        if len(signature) != len(arguments):
            raise TypeError(f"{name} takes {len(signature)} arguments, {len(arguments)} given")
        converted = []
        for kind, argument in zip(signature, arguments, strict=True):
            if kind.kind != "pointer":
                converted.append(argument)
                continue
            if isinstance(argument, bytes):
                argument = self.keep(self.ffi.new("char[]", argument))
            number = self.ffi.cast("uintptr_t", argument)
            converted.append(self.ffi.cast(kind, number))
        return int(getattr(self.driver, name)(*converted))

    def expect(self, wanted: int, name: str, *arguments: Any) -> None:
        """Call, and compare the result code."""
        got = self.call(name, *arguments)
        if got != wanted:
            raise Mismatch(f"{name} returned {got} ({result_name(got)}), expected {wanted}")

    def ok(self, name: str, *arguments: Any) -> None:
        """Call, and expect success."""
        self.expect(0, name, *arguments)

    def value(self, name: str, *arguments: Any, kind: str = "uint64_t") -> int:
        """Call a function whose first argument is an output; the output."""
        cell = self.cell(kind)
        self.ok(name, cell, *arguments)
        return int(cell[0])

    # -- comparing

    def equal(self, got: T, wanted: T, what: str) -> None:
        """Compare two values."""
        if got != wanted:
            raise Mismatch(f"{what} is {_short(got)}, expected {_short(wanted)}")

    def true(self, condition: bool, what: str) -> None:
        """Expect a condition; ``what`` says it in words."""
        if not condition:
            raise Mismatch(f"not so: {what}")

    def differs(self, why: str, *, software: T, nvidia: T) -> T:
        """What this driver is expected to give where the two legitimately differ. The reason is part of the suite."""
        if not why:
            raise ValueError("a difference needs a reason")
        return software if self.kind == "software" else nvidia

    # -- host memory

    def keep(self, thing: T) -> T:
        """Keep something alive until the check has ended."""
        self._kept.append(thing)
        return thing

    def cell(self, kind: str = "uint64_t", value: int = 0) -> Any:
        """One number that a call may write to."""
        return self.keep(self.ffi.new(f"{kind} *", value))

    def host(self, content: bytes | int) -> Any:
        """A host buffer with this content, or of this many zero bytes."""
        size = content if isinstance(content, int) else len(content)
        buffer = self.keep(self.ffi.new("uint8_t[]", max(size, 1)))
        if not isinstance(content, int):
            self.ffi.memmove(buffer, content, size)
        return buffer

    def pack(self, layout: str, *values: Any) -> Any:
        """A C struct by its ``struct`` layout; buffers stand for their addresses."""
        numbers = [self.address(v) if isinstance(v, self.ffi.CData) else v for v in values]
        return self.host(struct.pack(layout, *numbers))

    def address(self, buffer: Any) -> int:
        """Where a buffer lies."""
        return int(self.ffi.cast("uintptr_t", buffer))

    def bytes_of(self, buffer: Any, size: int) -> bytes:
        """The content of a host buffer."""
        return bytes(self.ffi.buffer(self.ffi.cast("uint8_t *", buffer), size))

    # -- objects that end with the check

    def later(self, name: str, *arguments: Any) -> None:
        """Call this after the check, last in first out, and expect success."""
        self._cleanups.append(lambda: self.ok(name, *arguments))

    def close(self) -> None:
        """Undo everything; raises the first mismatch after trying all."""
        first: Mismatch | None = None
        while self._cleanups:
            try:
                self._cleanups.pop()()
            except Mismatch as error:
                first = first or error
        self._kept.clear()
        if first is not None:
            raise Mismatch(f"while cleaning up: {first}")

    def drop_cleanups(self) -> None:
        """For a check after which nothing can be undone."""
        self._cleanups.clear()

    def page_aligned(self, size: int) -> int:
        """Address of host memory that begins with a page and lives as long as the check."""
        buffer = self.host(size + 4096)
        return -(-self.address(buffer) // 4096) * 4096

    def device(self, content: bytes | int) -> int:
        """Device memory with this content, or of this many zero bytes; freed after the check."""
        size = content if isinstance(content, int) else len(content)
        address = self.value("cuMemAlloc_v2", size)
        self.later("cuMemFree_v2", address)
        if isinstance(content, int):
            self.ok("cuMemsetD8Async", address, 0, size, 0)
        else:
            self.upload(address, content)
        self.ok("cuCtxSynchronize")
        return address

    def upload(self, address: int, content: bytes) -> None:
        """Host to device, complete on return."""
        self.ok("cuMemcpyHtoD_v2", address, self.host(content), len(content))

    def download(self, address: int, size: int) -> bytes:
        """Device to host, after all work of the legacy stream."""
        buffer = self.host(size)
        self.ok("cuMemcpyDtoH_v2", buffer, address, size)
        return self.bytes_of(buffer, size)

    def stream(self, flags: int = 1) -> int:
        """A stream (non-blocking unless told), destroyed after the check."""
        handle = self.value("cuStreamCreateWithPriority", flags, 0)
        self.later("cuStreamDestroy_v2", handle)
        return handle

    def event(self, flags: int = 0) -> int:
        """An event, destroyed after the check."""
        handle = self.value("cuEventCreate", flags)
        self.later("cuEventDestroy_v2", handle)
        return handle

    def module(self, image: bytes) -> int:
        """A module, unloaded after the check. PTX text needs its terminating zero."""
        handle = self.value("cuModuleLoadDataEx", self.host(image), 0, 0, 0)
        self.later("cuModuleUnload", handle)
        return handle

    def function(self, name: str, image: bytes) -> int:
        """A kernel of a module of its own."""
        return self.value("cuModuleGetFunction", self.module(image), name.encode() + b"\0")

    def parameters(self, layout: str, *values: Any) -> Any:
        """A ``kernelParams`` array for parameters of these ``struct`` letters."""
        cells = [self.pack("<" + letter, value) for letter, value in zip(layout, values, strict=True)]
        return self.pack(f"<{len(cells)}Q", *cells) if cells else 0

    def launch(
        self, function: int, grid: int, block: int, layout: str = "", *values: Any, stream: int = 0, shared: int = 0
    ) -> None:  # fmt: skip
        """Launch in one dimension and expect success."""
        parameters = self.parameters(layout, *values)
        self.ok("cuLaunchKernel", function, grid, 1, 1, block, 1, 1, shared, stream, parameters, 0)


def _short(value: object) -> str:
    text = value.hex() if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
