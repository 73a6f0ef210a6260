# SPDX-License-Identifier: Apache-2.0
"""Modules, kernels and their instances: the PTX executor as the driver sees it.

A `Module` is read once and holds no device memory. `instantiate` gives its variables addresses in an address space; an
`Instance` launches kernels. Kernels are lowered and compiled at their first launch, and kept with the module. A launch
runs to its end before it returns (waiting belongs to the caller), and an interrupted or failed one leaves the writes it made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final

import attrs
import numpy as np
import numpy.typing as npt

from ..memory import AddressSpace
from . import (
    atomics,
    batch,
    builtins,
    conversions,
    emit_convert,
    emit_integer,
    emit_memory,
    emit_move,
    emit_packed,
    emit_texture,
    emit_warp,
    float8,
    halves,
    integers,
    numerics,
    texture,
    warps,
)
from .batch import Batch
from .emit import BlockEmitter, KernelEmitter
from .errors import PtxError, UnsupportedPtx
from .launch import CompiledBlock, Scheduler, compiled_block
from .layout import aligned, function_addresses, parameter_layout, reachable, shared_layout
from .lowering import LoweredKernel, lower
from .parser import parse
from .syntax import Function, Register, Relocation, Source, Variable

Array = npt.NDArray[Any]
Dimensions = tuple[int, int, int]

MAXIMUM_THREADS: Final = 1024
MAXIMUM_DIMENSIONS: Final = ((1 << 31) - 1, 65535, 65535)
MAXIMUM_BLOCK: Final = (1024, 1024, 64)
MAXIMUM_SHARED: Final = 1 << 20  # of a block; a device says less, this only bounds what the host allocates
MAXIMUM_LOCAL: Final = 512 << 10  # of a thread, as on NVIDIA devices
_LANES: Final = (
    1 << 16
)  # threads that run at once, unless a block alone has more or the grid must run together
_LOCAL_LIMIT: Final = 256 << 20  # bytes of local and shared memory of a batch
# The emitters register themselves when these are imported.
_EMITTER_MODULES: Final = (
    emit_convert,
    emit_integer,
    emit_memory,
    emit_move,
    emit_packed,
    emit_texture,
    emit_warp,
)


def _namespace() -> dict[str, Any]:
    """The names that generated code may use."""
    names: dict[str, Any] = {"where": np.where, "np": np}
    for size in (1, 2, 4, 8):
        names[f"u{size}"], names[f"i{size}"] = np.dtype(f"u{size}"), np.dtype(f"i{size}")
    for size in (2, 4, 8):
        names[f"f{size}"] = np.dtype(f"f{size}")
    for name in (
        "abs", "minimum", "maximum", "copysign", "signbit", "isfinite", "isinf", "isnan", "sin", "cos", "exp2", "log2",
        "tanh",
    ):  # fmt: skip
        names[f"np{name}"] = getattr(np, name)
    for module in (conversions, float8, halves, integers, numerics, warps):
        for name, function in vars(module).items():
            if not name.startswith("_") and (callable(function) or name.endswith("_TINY")):
                names.setdefault(name, function)
    names.update(
        atomic=atomics.atomic,
        choose=batch.choose,
        merge=batch.merge,
        vprintf=builtins.vprintf,
        assertfail=builtins.assertfail,
        assert_fail=builtins.assert_fail,
        malloc=builtins.malloc,
        free=builtins.free,
        copy=builtins.copy,
        fetch_texture=texture.fetch_texture,
        load_surface=texture.load_surface,
        store_surface=texture.store_surface,
    )
    return names


@attrs.frozen
class Param:
    """A kernel parameter in the parameter buffer, in bytes."""

    offset: int
    size: int
    alignment: int


@attrs.frozen
class GlobalVariable:
    """A module variable in global or constant memory."""

    name: str
    size: int
    alignment: int
    initial: bytes | None
    relocations: tuple[Relocation, ...]
    is_constant: bool


@attrs.define(eq=False)
class Kernel:
    """An entry point; sizes in bytes. What depends on the body is found when it is asked for, and may raise PtxError."""

    name: str
    params: list[Param]
    params_size: int
    max_threads: int
    reqntid: Dimensions | None
    min_blocks: int
    max_registers: int
    source: Source = attrs.field(repr=False)
    function: Function = attrs.field(repr=False)
    _compiled: tuple[LoweredKernel, list[CompiledBlock]] | None = attrs.field(
        default=None, init=False, repr=False
    )

    @cached_property
    def static_shared(self) -> int:
        return shared_layout(self.source, self.function)[1]

    @cached_property
    def local_size(self) -> int:
        functions, _ = reachable(self.source, self.function)
        return sum(aligned(v.size, 16) for f in functions for v in f.variables if v.space == "local")

    @cached_property
    def registers(self) -> int:
        """An estimate: what a compiler might have needed of 32-bit registers."""
        return _estimate_registers(self.function)

    def compiled(self) -> tuple[LoweredKernel, list[CompiledBlock]]:
        """Lowered and compiled, at the first call. Raises: UnsupportedPtx naming the instruction."""
        if self._compiled is None:
            try:
                lowered = lower(self.source, self.function)
            except (IndexError, ValueError, KeyError, AssertionError) as error:
                # Control instructions are taken apart as if they were well formed; what is not ends here.
                raise UnsupportedPtx(
                    f".entry {self.name}", self.function.line, f"malformed: {error}"
                ) from error
            owner = KernelEmitter(lowered, _namespace())
            text = "\n".join(BlockEmitter(owner, block).run() for block in lowered.blocks)
            # The text is ours: PTX reaches it only as numbers, register numbers and repr() of names.
            exec(compile(text, f"<ptx {self.name}>", "exec"), owner.namespace)  # noqa: S102
            blocks = [compiled_block(block, owner.namespace[f"b{block.number}"]) for block in lowered.blocks]
            self._compiled = lowered, blocks
        return self._compiled


def _estimate_registers(function: Function) -> int:
    """Compilers reuse registers; about a third of the 32-bit halves of those named in the body is what they keep."""
    seen: set[Register] = set()
    for statement in function.body or ():
        for operand in getattr(statement, "operands", ()):
            if isinstance(operand, Register):
                seen.add(operand)
    halves = sum(max(register.bits // 32, 1) for register in seen if register.type != "pred")
    limit = function.directives.get("maxnreg", (255,))[0]
    return int(min(max(16, aligned(halves // 3 + 8, 8)), limit, 255))


def _kernel(source: Source, function: Function) -> Kernel:
    offsets, size = parameter_layout(function)
    directives = function.directives
    required: Dimensions | None = None
    if "reqntid" in directives:
        x, y, z = (*directives["reqntid"], 1, 1)[:3]
        required = (x, y, z)
    largest = required or directives.get("maxntid")
    threads = min(int(np.prod(largest)), MAXIMUM_THREADS) if largest else MAXIMUM_THREADS
    return Kernel(
        name=function.name,
        params=[Param(offsets[p], p.size, p.alignment) for p in function.parameters],
        params_size=size,
        max_threads=threads,
        reqntid=required,
        min_blocks=directives.get("minnctapersm", (0,))[0],
        max_registers=directives.get("maxnreg", (0,))[0],
        source=source,
        function=function,
    )


@attrs.define(eq=False)
class Module:
    """A PTX module. Immutable once read (compiled kernels are a cache)."""

    source: Source = attrs.field(repr=False)
    kernels: dict[str, Kernel]
    globals: dict[str, GlobalVariable]

    def instantiate(self, space: AddressSpace) -> Instance:
        """Allocate and fill the module's variables. Raises: MemoryError; UnsupportedPtx for an unresolved symbol."""
        return Instance.create(self, space)


def _global(variable: Variable) -> GlobalVariable:
    return GlobalVariable(
        name=variable.name,
        size=max(variable.size, 1),
        alignment=variable.alignment,
        initial=variable.initial,
        relocations=variable.relocations,
        is_constant=variable.space == "const",
    )


def load_ptx(text: str) -> Module:
    """Read a module. Raises: PtxError (message with line). Errors in the kernels of a large one come when these are used."""
    source = parse(text)
    if source.address_bits != 64:
        raise PtxError(f".address_size {source.address_bits}: only 64-bit modules are executed")
    kernels = {
        name: _kernel(source, function)
        for name, function in source.functions.items()
        if function.is_entry and function.is_defined
    }
    variables = {
        name: _global(variable)
        for name, variable in source.variables.items()
        if variable.space in ("global", "const") and not variable.is_extern
    }
    return Module(source, kernels, variables)


@attrs.frozen
class LaunchResult:
    """What a finished launch did."""

    threads: int
    batches: int


@attrs.define(eq=False)
class Instance:
    """A module in an address space."""

    module: Module
    space: AddressSpace
    addresses: dict[str, int]  # of every variable in `module.globals`
    _symbols: dict[str, Array]
    _is_loaded: bool = True

    @classmethod
    def create(cls, module: Module, space: AddressSpace) -> Instance:
        addresses: dict[str, int] = {}
        try:
            for variable in module.globals.values():
                addresses[variable.name] = space.allocate(variable.size, max(variable.alignment, 256))
            known = function_addresses(module.source) | addresses
            for variable in module.globals.values():
                cls._fill(space, variable, known)
        except BaseException:
            for address in addresses.values():
                space.free(address)
            raise
        symbols = {name: np.array([address], dtype=np.uint64) for name, address in known.items()}
        return cls(module, space, addresses, symbols)

    @staticmethod
    def _fill(space: AddressSpace, variable: GlobalVariable, addresses: dict[str, int]) -> None:
        image = bytearray(variable.initial or bytes(variable.size)).ljust(variable.size, b"\0")
        for relocation in variable.relocations:
            if relocation.symbol not in addresses:
                raise UnsupportedPtx(
                    f"address of {relocation.symbol} in the initial value of {variable.name}"
                )
            value = (addresses[relocation.symbol] + relocation.addend) & ((1 << 64) - 1)
            image[relocation.offset : relocation.offset + relocation.size] = value.to_bytes(8, "little")
        space.write(addresses[variable.name], bytes(image))

    def unload(self) -> None:
        """Give the variables' memory back. Nothing may be launched afterwards; a second call does nothing."""
        if self._is_loaded:
            self._is_loaded = False
            for address in self.addresses.values():
                self.space.free(address)

    def launch(
        self,
        name: str,
        grid: Dimensions,
        block: Dimensions,
        dynamic_shared: int = 0,
        params: bytes = b"",
        printf: Callable[[str], None] | None = None,
        deadline: Callable[[], bool | None] | None = None,
        together: bool = False,
        images: Mapping[int, object] = MappingProxyType({}),
    ) -> LaunchResult:
        """Run a kernel to its end.

        `params` is the packed parameter buffer (see `Kernel.params`). `printf` gets the text of each printf call as
        it happens. `deadline` is asked now and then; a true answer stops the launch. `together`: all blocks of the grid
        run at once, which a cooperative launch needs to synchronise across blocks. `images`: the textures and surfaces by
        the values of their objects; others may be among them.

        Raises: KeyError for an unknown kernel, ValueError for dimensions or parameters that do not fit, UnsupportedPtx,
        IllegalAddress, MisalignedAddress, LaunchError and its kin.
        """
        kernel = self.module.kernels[name]
        if not self._is_loaded:
            raise ValueError("the module has been unloaded")
        threads = block[0] * block[1] * block[2]
        if not all(1 <= size <= limit for size, limit in zip(grid, MAXIMUM_DIMENSIONS, strict=True)):
            raise ValueError(f"grid {grid} is out of range")
        if (
            not all(1 <= size <= limit for size, limit in zip(block, MAXIMUM_BLOCK, strict=True))
            or threads > MAXIMUM_THREADS
        ):
            raise ValueError(f"block {block} is out of range")
        if len(params) < kernel.params_size:
            raise ValueError(f"{len(params)} bytes of parameters, {name} takes {kernel.params_size}")
        lowered, blocks = kernel.compiled()
        if (
            not 0 <= lowered.dynamic_base + dynamic_shared <= MAXIMUM_SHARED
            or lowered.local_size > MAXIMUM_LOCAL
        ):
            raise ValueError(
                f"{lowered.dynamic_base} + {dynamic_shared} bytes of shared, {lowered.local_size} of local memory"
            )
        parameters = np.zeros(aligned(max(kernel.params_size, 1), 16), np.uint8)
        parameters[: kernel.params_size] = np.frombuffer(params, np.uint8, kernel.params_size)
        total = grid[0] * grid[1] * grid[2]
        per_batch = self._blocks_at_once(lowered, threads, dynamic_shared) if not together else total
        workspace = self._grid_workspace() if together else 0
        try:
            with np.errstate(all="ignore"):
                for first in range(0, total, per_batch):
                    running = Batch(
                        space=self.space,
                        kernel=lowered,
                        symbols=self._symbols,
                        grid=grid,
                        block=block,
                        first_block=first,
                        block_count=min(per_batch, total - first),
                        dynamic_shared=dynamic_shared,
                        parameters=parameters,
                        printf=printf or _discard,
                        workspace=workspace,
                        images=images,
                    )
                    Scheduler(running, blocks, deadline).run()
        finally:
            if workspace:
                self.space.free(workspace)
        return LaunchResult(total * threads, -(-total // per_batch))

    def _grid_workspace(self) -> int:
        """What cooperative_groups' grid.sync() counts in: its size, then the barrier's counter."""
        address = self.space.allocate(8)
        self.space.write(address, (8).to_bytes(8, "little"))
        return address

    @staticmethod
    def _blocks_at_once(kernel: LoweredKernel, threads: int, dynamic_shared: int) -> int:
        slots = aligned(threads, 32)
        memory = kernel.local_size * slots + kernel.dynamic_base + dynamic_shared
        return max(1, min(_LANES // slots, _LOCAL_LIMIT // max(memory, 1)))


def _discard(_: str) -> None:
    """Text of a launch nobody listens to."""
