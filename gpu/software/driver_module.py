# SPDX-License-Identifier: Apache-2.0
"""Modules, libraries, kernels and launches of the software GPU."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import struct
import sys
import time

from . import attributes as facts
from .entries import INVALID_PTX, INVALID_VALUE, NOT_SUPPORTED, entry
from .fatbin import ImageError, select_ptx
from .host import get_bytes, get_text, get_u64, get_u64_list, put_bytes, put_i32, put_u64, unpack
from .memory import IllegalAddress, MisalignedAddress
from .ptx import AssertFailure, LaunchError, PtxError, UnsupportedPtx, load_ptx
from .state import CudaError, Device, Function, LoadedModule

_log = logging.getLogger("vgpu.software")

NODE_KERNEL, NODE_HOST = 0, 3
WRAPPER_MAGIC, FATBIN_MAGIC, ELF_MAGIC = 0x466243B1, 0xBA55ED50, 0x464C457F
INVALID_IMAGE = 200
NO_BINARY_FOR_GPU = 209
NOT_FOUND = 500
LAUNCH_FAILED = 719
ASSERT = 710
MISALIGNED = 716
ILLEGAL = 700
OUT_OF_RESOURCES = 701
COOPERATIVE_TOO_LARGE = 720
JIT_INFO_LOG, JIT_INFO_SIZE, JIT_ERROR_LOG, JIT_ERROR_SIZE = 3, 4, 5, 6


def image_texts(address: int) -> list[str]:
    """The PTX in an image the replay handler passes: a wrapper, a fatbin, or PTX text.

    A wrapper of the second kind may list images that the driver is to link; then there are several.

    Raises:
        CudaError: NO_BINARY_FOR_GPU for images without PTX this device could run.
    """
    if unpack("<I", address)[0] != WRAPPER_MAGIC:
        return [_text_of(address)]
    _magic, version, image, listed = unpack("<IIQQ", address)
    parts: list[int] = []
    while version == 2 and listed and (part := get_u64(listed + 8 * len(parts))):
        parts.append(part)
    texts: list[str] = []
    for part in parts:
        # nvcc lists its device runtime, too, whose text is for newer devices. What a kernel misses from a part that is
        # left out here is named when the rest is loaded.
        with contextlib.suppress(CudaError):
            texts.append(_text_of(part, newer=False))
    return texts or [_text_of(image)]


def _text_of(address: int, *, newer: bool = True) -> str:
    magic = unpack("<I", address)[0]
    if magic == ELF_MAGIC:
        raise CudaError(NO_BINARY_FOR_GPU, "machine code; the software GPU executes PTX only")
    if magic == FATBIN_MAGIC:
        _magic, _version, header, size = unpack("<IHHQ", address)
        try:
            return select_ptx(get_bytes(address, header + size), facts.COMPUTE_CAPABILITY, newer=newer)
        except ImageError as error:
            raise CudaError(NO_BINARY_FOR_GPU, str(error)) from None
    return get_text(address)


def image_text(address: int) -> str:
    """The PTX of an image that is one module."""
    texts = image_texts(address)
    if len(texts) > 1:
        raise CudaError(NOT_SUPPORTED, f"{len(texts)} images to link; linking is not built")
    return texts[0]


def load(device: Device, image: int, *, is_library: bool) -> int:
    """Load an image; returns the handle of a LoadedModule."""
    if not is_library and unpack("<I", image)[0] == WRAPPER_MAGIC:
        raise CudaError(INVALID_IMAGE, "a wrapper, which only libraries take")
    module = load_ptx(image_text(image))
    return device.add(LoadedModule(module.instantiate(device.space), is_library))


def _log_to(options: dict[int, int], buffer: int, size: int, text: str) -> None:
    room = options.get(size, 0) & 0xFFFFFFFF
    if options.get(buffer) and room:
        put_bytes(options[buffer], text.encode()[: room - 1] + b"\0")


def _load_with_log(
    device: Device, out: int, image: int, count: int, names: int, values: int, *, is_library: bool
) -> None:
    options = dict(
        zip(
            struct.unpack(f"<{count}I", get_bytes(names, 4 * count)) if count else (),
            get_u64_list(values, count),
            strict=True,
        )
    )
    _log_to(options, JIT_INFO_LOG, JIT_INFO_SIZE, "")
    try:
        put_u64(out, load(device, image, is_library=is_library))
    except (PtxError, UnsupportedPtx) as error:
        _log.error("%s", error)
        _log_to(options, JIT_ERROR_LOG, JIT_ERROR_SIZE, str(error))
        raise CudaError(INVALID_PTX, str(error)) from error


@entry
def cuModuleLoadDataEx(device: Device, out: int, image: int, count: int, names: int, values: int) -> None:
    _load_with_log(device, out, image, count, names, values, is_library=False)


@entry
def cuLibraryLoadData(
    device: Device, out: int, image: int, names: int, values: int, count: int, _lo: int, _lv: int, _ln: int
) -> None:
    _load_with_log(device, out, image, count, names, values, is_library=True)


@entry
def cuModuleUnload(device: Device, handle: int) -> None:
    module = device.remove(handle, LoadedModule)
    for function in module.functions.values():
        device.objects.pop(device.handle_of(function), None)
    module.instance.unload()


@entry
def cuLibraryUnload(device: Device, handle: int) -> None:
    cuModuleUnload(device, handle)


def _function(device: Device, handle: int, name: str) -> int:
    module = device.get(handle, LoadedModule)
    function = module.functions.get(name)
    if function is None:
        kernel = module.instance.module.kernels.get(name)
        if kernel is None:
            raise CudaError(NOT_FOUND, name)
        # Compiled here, so that an instruction we cannot run is named at load and not in mid-flight.
        kernel.compiled()
        function = Function(module, kernel, facts.SHARED_PER_BLOCK, name_bytes=name.encode() + b"\0")
        module.functions[name] = function
        return device.add(function)
    return device.handle_of(function)


@entry
def cuModuleGetFunction(device: Device, out: int, handle: int, name: int) -> None:
    put_u64(out, _function(device, handle, get_text(name)))


@entry
def cuLibraryGetKernel(device: Device, out: int, handle: int, name: int) -> None:
    put_u64(out, _function(device, handle, get_text(name)))


@entry
def cuModuleGetFunctionCount(device: Device, out: int, handle: int) -> None:
    put_i32(out, len(device.get(handle, LoadedModule).instance.module.kernels))


@entry
def cuLibraryGetKernelCount(device: Device, out: int, handle: int) -> None:
    cuModuleGetFunctionCount(device, out, handle)


@entry
def cuModuleEnumerateFunctions(device: Device, out: int, count: int, handle: int) -> None:
    names = list(device.get(handle, LoadedModule).instance.module.kernels)
    for index, name in enumerate(names[:count]):
        put_u64(out + 8 * index, _function(device, handle, name))


@entry
def cuLibraryEnumerateKernels(device: Device, out: int, count: int, handle: int) -> None:
    cuModuleEnumerateFunctions(device, out, count, handle)


@entry
def cuModuleGetGlobal_v2(device: Device, address: int, size: int, handle: int, name: int) -> None:
    instance = device.get(handle, LoadedModule).instance
    text = get_text(name)
    if text not in instance.addresses:
        raise CudaError(NOT_FOUND, text)
    put_u64(address, instance.addresses[text])
    put_u64(size, instance.module.globals[text].size)


@entry
def cuLibraryGetGlobal(device: Device, address: int, size: int, handle: int, name: int) -> None:
    cuModuleGetGlobal_v2(device, address, size, handle, name)


@entry
def cuLibraryGetModule(device: Device, out: int, handle: int) -> None:
    device.get(handle, LoadedModule)
    put_u64(out, handle)


@entry
def cuKernelGetFunction(device: Device, out: int, handle: int) -> None:
    device.get(handle, Function)
    put_u64(out, handle)


@entry
def cuKernelGetLibrary(device: Device, out: int, handle: int) -> None:
    put_u64(out, device.handle_of(device.get(handle, Function).module))


@entry
def cuFuncGetModule(device: Device, out: int, handle: int) -> None:
    cuKernelGetLibrary(device, out, handle)


@entry
def cuFuncGetName(device: Device, out: int, handle: int) -> None:
    function = device.get(handle, Function)
    held = ctypes.c_char_p(function.name_bytes)
    put_u64(out, ctypes.cast(held, ctypes.c_void_p).value or 0)


@entry
def cuKernelGetName(device: Device, out: int, handle: int) -> None:
    cuFuncGetName(device, out, handle)


@entry
def cuFuncGetParamInfo(device: Device, handle: int, index: int, offset: int, size: int) -> None:
    parameters = device.get(handle, Function).kernel.params
    if index >= len(parameters):
        raise CudaError(INVALID_VALUE)
    put_u64(offset, parameters[index].offset)
    put_u64(size, parameters[index].size)


@entry
def cuKernelGetParamInfo(device: Device, handle: int, index: int, offset: int, size: int) -> None:
    cuFuncGetParamInfo(device, handle, index, offset, size)


def registers(function: Function) -> int:
    """Of a thread, as a compiler would have given them: as many blocks as the kernel promises room for have it.

    So no block that may be launched has an occupancy of 0, from which programs make empty grids.
    """
    kernel = function.kernel
    warps = -(-kernel.max_threads // 32) * max(kernel.min_blocks, 1)
    room = max(facts.REGISTERS // (32 * warps) // 8 * 8, 8)
    return min(max(kernel.registers, 1), room, 255)


def _attribute(function: Function, attribute: int) -> int:
    kernel = function.kernel
    version = 10 * facts.COMPUTE_CAPABILITY[0] + facts.COMPUTE_CAPABILITY[1]
    # What the code was written for. CUB takes block sizes from it, so it must be that of the text, also of newer text.
    written_for = re.match(r"sm_(\d+)", kernel.source.target)
    values = {
        0: kernel.max_threads, 1: kernel.static_shared, 2: 0, 3: kernel.local_size,
        4: registers(function), 5: int(written_for[1][:4]) if written_for else version, 6: version, 7: 0,
        8: function.max_dynamic_shared, 9: function.carveout,
        10: 0, 11: 0, 12: 0, 13: 0, 14: 0, 15: 0,
    }  # fmt: skip
    if attribute not in values:
        raise CudaError(INVALID_VALUE)
    return values[attribute]


@entry
def cuFuncGetAttribute(device: Device, out: int, attribute: int, handle: int) -> None:
    put_i32(out, _attribute(device.get(handle, Function), attribute))


@entry
def cuKernelGetAttribute(device: Device, out: int, attribute: int, handle: int, dev: int) -> None:
    cuFuncGetAttribute(device, out, attribute, handle)


@entry
def cuFuncSetAttribute(device: Device, handle: int, attribute: int, value: int) -> None:
    function = device.get(handle, Function)
    if attribute == 8:
        if not 0 <= value <= facts.SHARED_PER_BLOCK_OPTIN - function.kernel.static_shared:
            raise CudaError(INVALID_VALUE)
        function.max_dynamic_shared = value
    elif attribute == 9:
        if not -1 <= value <= 100:
            raise CudaError(INVALID_VALUE)
        function.carveout = value
    else:
        raise CudaError(INVALID_VALUE)


@entry
def cuKernelSetAttribute(device: Device, attribute: int, value: int, handle: int, dev: int) -> None:
    cuFuncSetAttribute(device, handle, attribute, value)


@entry
def cuFuncSetCacheConfig(device: Device, handle: int, config: int) -> None:
    device.get(handle, Function)


@entry
def cuFuncSetSharedMemConfig(device: Device, handle: int, config: int) -> None:
    device.get(handle, Function)


@entry
def cuKernelSetCacheConfig(device: Device, handle: int, config: int, dev: int) -> None:
    device.get(handle, Function)


@entry
def cuFuncIsLoaded(device: Device, out: int, handle: int) -> None:
    device.get(handle, Function)
    put_i32(out, 1)


@entry
def cuFuncLoad(device: Device, handle: int) -> None:
    device.get(handle, Function)


# -- occupancy ------------------------------------------------------------------------------------


def blocks_per_multiprocessor(function: Function, block: int, dynamic_shared: int) -> int:
    """Resident blocks by threads, blocks, registers and shared memory (256-byte and 8-register units)."""
    if block <= 0:
        raise CudaError(INVALID_VALUE)
    kernel = function.kernel
    if block > kernel.max_threads:
        return 0
    warps = -(-block // 32)
    register_file = -(-registers(function) // 8) * 8 * 32 * warps
    shared = -(-(kernel.static_shared + dynamic_shared) // 256) * 256
    if kernel.static_shared + dynamic_shared > facts.SHARED_PER_BLOCK_OPTIN:
        return 0
    limits = [
        facts.BLOCKS_PER_MULTIPROCESSOR,
        facts.THREADS_PER_MULTIPROCESSOR // (warps * 32),
        facts.REGISTERS // register_file,
    ]
    if shared:
        limits.append(facts.SHARED_PER_MULTIPROCESSOR // shared)
    return max(min(limits), 0)


@entry
def cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    device: Device, out: int, handle: int, block: int, dynamic_shared: int, flags: int
) -> None:
    put_i32(out, blocks_per_multiprocessor(device.get(handle, Function), block, dynamic_shared))


@entry
def cuOccupancyMaxPotentialBlockSizeWithFlags(
    device: Device, grid: int, block: int, handle: int, shared_of: int, shared: int, limit: int, flags: int
) -> None:
    function = device.get(handle, Function)
    if shared_of:
        raise CudaError(NOT_SUPPORTED, "a callback for the shared memory")
    most = min(limit or function.kernel.max_threads, function.kernel.max_threads)
    sizes = [s for s in range(32, most + 1, 32)] or [most]
    resident = {size: blocks_per_multiprocessor(function, size, shared) for size in sizes}
    best = max(sizes, key=lambda size: (size * resident[size], size))
    put_i32(block, best)
    put_i32(grid, resident[best] * facts.MULTIPROCESSORS)


@entry
def cuOccupancyAvailableDynamicSMemPerBlock(
    device: Device, out: int, handle: int, blocks: int, block: int
) -> None:
    function = device.get(handle, Function)
    if blocks <= 0 or blocks_per_multiprocessor(function, block, 0) < blocks:
        raise CudaError(INVALID_VALUE)
    room = facts.SHARED_PER_MULTIPROCESSOR // blocks // 256 * 256 - function.kernel.static_shared
    put_u64(out, max(min(room, facts.SHARED_PER_BLOCK_OPTIN), 0))


# -- launches -------------------------------------------------------------------------------------


def packed_parameters(function: Function, parameters: int, extra: int) -> bytes:
    """The parameter buffer from ``kernelParams`` (one pointer each) or ``extra`` (one packed buffer)."""
    kernel = function.kernel
    if extra:
        if parameters:
            raise CudaError(INVALID_VALUE, "both kernelParams and extra")
        words = get_u64_list(extra, 5)
        if words[0] != 1 or words[2] != 2 or words[4] != 0:
            raise CudaError(INVALID_VALUE)
        size = get_u64(words[3])
        if size > kernel.params_size:
            raise CudaError(OUT_OF_RESOURCES, f"{size} bytes of parameters, {kernel.params_size} expected")
        return get_bytes(words[1], size).ljust(kernel.params_size, b"\0")
    packed = bytearray(kernel.params_size)
    if kernel.params:
        if not parameters:
            raise CudaError(INVALID_VALUE)
        for parameter, address in zip(
            kernel.params, get_u64_list(parameters, len(kernel.params)), strict=True
        ):
            packed[parameter.offset : parameter.offset + parameter.size] = get_bytes(address, parameter.size)
    return bytes(packed)


def check_shape(
    function: Function, grid: tuple[int, int, int], block: tuple[int, int, int], shared: int
) -> None:
    """Refuse what a driver refuses at the call."""
    limits = facts.ATTRIBUTES
    threads = block[0] * block[1] * block[2]
    if not all(1 <= g <= limits[5 + i] for i, g in enumerate(grid)):
        raise CudaError(INVALID_VALUE, f"grid {grid}")
    if not all(1 <= b <= limits[2 + i] for i, b in enumerate(block)) or threads > function.kernel.max_threads:
        raise CudaError(INVALID_VALUE, f"block {block}")
    if function.kernel.reqntid is not None and tuple(function.kernel.reqntid) != block:
        raise CudaError(INVALID_VALUE, f"block {block} of a kernel for blocks of {function.kernel.reqntid}")
    if shared + function.kernel.static_shared > max(
        facts.SHARED_PER_BLOCK, function.max_dynamic_shared + function.kernel.static_shared
    ):
        raise CudaError(INVALID_VALUE, f"{shared} bytes of shared memory")


class Launch:
    """One launch with its parameters bound: what a stream runs, or a graph node."""

    def __init__(
        self,
        device: Device,
        function: Function,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        parameters: bytes,
        *,
        cooperative: bool = False,
    ) -> None:
        check_shape(function, grid, block, shared)
        if cooperative:
            resident = blocks_per_multiprocessor(function, block[0] * block[1] * block[2], shared)
            if grid[0] * grid[1] * grid[2] > resident * facts.MULTIPROCESSORS:
                raise CudaError(COOPERATIVE_TOO_LARGE)
        self.device, self.function, self.grid, self.block = device, function, grid, block
        self.shared, self.parameters, self.cooperative = shared, parameters, cooperative

    def __call__(self) -> None:
        """Run to the end. A fault poisons the context, and is reported by the next call, as CUDA does."""
        device = self.device
        began = time.perf_counter_ns()
        try:
            self.function.module.instance.launch(
                self.function.kernel.name,
                self.grid,
                self.block,
                dynamic_shared=self.shared,
                params=self.parameters,
                printf=print_text,
                deadline=device.should_stop,
                together=self.cooperative,
                images=device.objects,
            )
        except IllegalAddress as error:
            device.poison(ILLEGAL, str(error))
        except MisalignedAddress as error:
            device.poison(MISALIGNED, str(error))
        except AssertFailure as error:
            sys.stderr.write(error.text)
            device.poison(ASSERT, str(error))
        except LaunchError as error:
            device.poison(LAUNCH_FAILED, str(error))
        finally:
            device.kernel_ns += time.perf_counter_ns() - began
            device.launches += 1
        if device.fault:
            _log.warning("kernel %s: %s", self.function.kernel.name, device.fault_text)


def print_text(text: str) -> None:
    """Device printf goes to the worker's standard output, as the real driver's does."""
    os.write(1, text.encode("utf-8", "replace"))


@entry
def cuLaunchKernel(
    device: Device, handle: int, gx: int, gy: int, gz: int, bx: int, by: int, bz: int, shared: int,
    stream: int, parameters: int, extra: int,
) -> None:  # fmt: skip
    function = device.get(handle, Function)
    packed = packed_parameters(function, parameters, extra)
    device.submit(
        device.stream(stream),
        NODE_KERNEL,
        Launch(device, function, (gx, gy, gz), (bx, by, bz), shared, packed),
    )


@entry
def cuLaunchCooperativeKernel(
    device: Device, handle: int, gx: int, gy: int, gz: int, bx: int, by: int, bz: int, shared: int,
    stream: int, parameters: int,
) -> None:  # fmt: skip
    function = device.get(handle, Function)
    packed = packed_parameters(function, parameters, 0)
    launch = Launch(device, function, (gx, gy, gz), (bx, by, bz), shared, packed, cooperative=True)
    device.submit(device.stream(stream), NODE_KERNEL, launch)


ATTRIBUTE_IGNORED = {0, 1, 5, 6, 7, 8, 10, 12, 14}  # hints: they change speed, not results
ATTRIBUTE_COOPERATIVE, ATTRIBUTE_CLUSTER = 2, 4


@entry
def cuLaunchKernelEx(device: Device, config: int, handle: int, parameters: int, extra: int) -> None:
    gx, gy, gz, bx, by, bz, shared, stream, attributes, count = unpack("<IIIIIIIxxxxQQIxxxx", config)
    cooperative = False
    for index in range(count):
        number, value = unpack("<IxxxxI", attributes + 72 * index)
        if number == ATTRIBUTE_COOPERATIVE:
            cooperative = bool(value)
        elif number == ATTRIBUTE_CLUSTER:
            if unpack("<IxxxxIII", attributes + 72 * index)[1:] not in ((0, 0, 0), (1, 1, 1)):
                raise CudaError(801, "clusters are not built")
        elif number not in ATTRIBUTE_IGNORED:
            raise CudaError(801, f"launch attribute {number} is not built")
    function = device.get(handle, Function)
    packed = packed_parameters(function, parameters, extra)
    launch = Launch(device, function, (gx, gy, gz), (bx, by, bz), shared, packed, cooperative=cooperative)
    device.submit(device.stream(stream), NODE_KERNEL, launch)
