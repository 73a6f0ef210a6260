# SPDX-License-Identifier: Apache-2.0
"""Conformance: modules, libraries, functions, their attributes, occupancy."""

from __future__ import annotations

from .kernels import BROKEN_PTX, PTX, fatbin
from .probe import Mismatch, Probe, check


def _function(p: Probe, name: str) -> int:
    return p.function(name, PTX)


@check
def module_from_text(p: Probe) -> None:
    """PTX text loads; functions are found by name, others are not."""
    module = p.module(PTX)
    function = p.value("cuModuleGetFunction", module, b"fill\0")
    p.equal(p.value("cuModuleGetFunction", module, b"fill\0"), function, "the same function again")
    cell = p.cell()
    p.expect(500, "cuModuleGetFunction", cell, module, b"absent\0")
    p.equal(p.value("cuModuleGetFunctionCount", module, kind="unsigned int"), 11, "functions")
    handles = p.host(8 * 11)
    p.ok("cuModuleEnumerateFunctions", handles, 11, module)
    listed = {int.from_bytes(p.bytes_of(handles, 88)[8 * i : 8 * i + 8], "little") for i in range(11)}
    p.true(function in listed and len(listed) == 11, "enumeration lists every function once")


@check
def module_from_fatbin(p: Probe) -> None:
    """A fatbin as a module; a library takes the wrapper that nvcc puts around it, too."""
    image = p.host(fatbin())
    module = p.value("cuModuleLoadDataEx", image, 0, 0, 0)
    p.value("cuModuleGetFunction", module, b"fill\0")
    p.ok("cuModuleUnload", module)
    wrapper = p.pack("<IIQQ", 0x466243B1, 1, image, 0)
    loaded = p.value("cuLibraryLoadData", wrapper, 0, 0, 0, 0, 0, 0)
    p.value("cuLibraryGetKernel", loaded, b"scale\0")
    p.ok("cuLibraryUnload", loaded)
    p.expect(200, "cuModuleLoadDataEx", p.cell(), wrapper, 0, 0, 0)  # measured: only libraries take wrappers


@check
def module_refused(p: Probe) -> None:
    """Text that is no PTX fails with a compiler's log, not with a crash."""
    cell = p.cell()
    log = p.host(4096)
    options = p.pack("<II", 5, 6)
    values = p.pack("<QQ", log, 4096)
    p.expect(218, "cuModuleLoadDataEx", cell, p.host(BROKEN_PTX), 2, options, values)
    p.true(p.bytes_of(log, 4096).split(b"\0")[0] != b"", "the error log says something")
    p.true(
        p.call("cuModuleLoadDataEx", cell, p.host(b"not a module at all\0\0\0\0"), 0, 0, 0) in (200, 218),
        "text that is nothing is an invalid image or invalid PTX",
    )


@check
def globals_by_name(p: Probe) -> None:
    """Variables have an address and a size, hold their initial values and can be written."""
    module = p.module(PTX)
    address, size = p.cell(), p.cell()
    p.ok("cuModuleGetGlobal_v2", address, size, module, b"counter\0")
    p.equal(int(size[0]), 4, "size of counter")
    counter = int(address[0])
    p.equal(p.download(counter, 4), bytes([7, 0, 0, 0]), "counter")
    p.ok("cuModuleGetGlobal_v2", address, size, module, b"table\0")
    p.equal(int(size[0]), 16, "size of table")
    table = int(address[0])
    p.equal(p.download(table + 8, 4), bytes([33, 0, 0, 0]), "table[2]")
    p.expect(500, "cuModuleGetGlobal_v2", address, size, module, b"absent\0")
    p.expect(1, "cuMemFree_v2", counter)
    p.upload(counter, (1000).to_bytes(4, "little"))
    p.upload(table + 8, (99).to_bytes(4, "little"))
    out = p.device(8)
    function = p.value("cuModuleGetFunction", module, b"globals\0")
    p.launch(function, 1, 1, "Q", out)
    p.equal(
        p.download(out, 8), (1000).to_bytes(4, "little") + (99).to_bytes(4, "little"), "what a kernel saw"
    )
    p.equal(p.download(counter, 4), (1001).to_bytes(4, "little"), "counter afterwards")


@check
def modules_have_their_own_globals(p: Probe) -> None:
    """The same image twice is two sets of variables."""
    address, size = p.cell(), p.cell()
    p.ok("cuModuleGetGlobal_v2", address, size, p.module(PTX), b"counter\0")
    first = int(address[0])
    p.ok("cuModuleGetGlobal_v2", address, size, p.module(PTX), b"counter\0")
    p.upload(first, (5).to_bytes(4, "little"))
    p.equal(p.download(int(address[0]), 4), (7).to_bytes(4, "little"), "the other module's counter")


@check
def library(p: Probe) -> None:
    """A library gives kernels, and functions and a module of the current context."""
    loaded = p.value("cuLibraryLoadData", p.host(PTX), 0, 0, 0, 0, 0, 0)
    kernel = p.value("cuLibraryGetKernel", loaded, b"fill\0")
    p.equal(p.value("cuLibraryGetKernelCount", loaded, kind="unsigned int"), 11, "kernels")
    handles = p.host(88)
    p.ok("cuLibraryEnumerateKernels", handles, 11, loaded)
    cell, size = p.cell(), p.cell()
    p.expect(500, "cuLibraryGetKernel", cell, loaded, b"absent\0")
    function = p.value("cuKernelGetFunction", kernel)
    module = p.value("cuLibraryGetModule", loaded)
    p.value("cuModuleGetFunction", module, b"scale\0")
    p.equal(p.value("cuKernelGetLibrary", kernel), loaded, "library of a kernel")
    p.ok("cuLibraryGetGlobal", cell, size, loaded, b"counter\0")
    p.equal(p.download(int(cell[0]), 4), (7).to_bytes(4, "little"), "counter")
    memory = p.device(64)
    p.launch(function, 1, 16, "QII", memory, 3, 16)
    p.equal(p.download(memory, 64), (3).to_bytes(4, "little") * 16, "filled by a kernel's function")
    p.launch(kernel, 1, 16, "QII", memory, 4, 16)
    p.equal(p.download(memory, 64), (4).to_bytes(4, "little") * 16, "filled by a kernel handle itself")
    name = p.value("cuKernelGetName", kernel)
    p.equal(p.ffi.string(p.ffi.cast("char *", name)), b"fill", "name of a kernel")
    p.ok("cuLibraryUnload", loaded)


@check
def function_attributes(p: Probe) -> None:
    """Limits and sizes of a kernel, and the two that can be set."""
    fill, fixed = _function(p, "fill"), _function(p, "fixed")

    def get(attribute: int, function: int) -> int:
        return p.value("cuFuncGetAttribute", attribute, function, kind="int")

    p.equal(get(0, fill), 1024, "threads per block")
    p.equal((get(1, fill), get(1, fixed)), (0, 1024), "static shared memory")
    p.true(1 <= get(4, fill) <= 255, "registers")
    p.true(get(6, fill) >= 70, "binary version")
    p.equal(get(0, _function(p, "bounded")), 64, "threads per block under .maxntid")
    most = p.value("cuDeviceGetAttribute", 97, 0, kind="int")
    p.ok("cuFuncSetAttribute", fill, 8, most)
    p.equal(get(8, fill), most, "dynamic shared memory after setting it")
    p.expect(1, "cuFuncSetAttribute", fill, 8, most + 1)
    p.ok("cuFuncSetAttribute", fill, 9, 50)
    p.expect(1, "cuFuncSetAttribute", fill, 0, 5)
    cell = p.cell("int")
    p.expect(1, "cuFuncGetAttribute", cell, 9999, fill)
    p.ok("cuFuncSetCacheConfig", fill, 1)
    name = p.value("cuFuncGetName", fill)
    p.equal(p.ffi.string(p.ffi.cast("char *", name)), b"fill", "name of a function")


@check
def parameter_information(p: Probe) -> None:
    """Offsets and sizes of parameters, and the end of the list."""
    mixed = _function(p, "mixed")
    offset, size = p.cell(), p.cell()
    seen = []
    for index in range(4):
        p.ok("cuFuncGetParamInfo", mixed, index, offset, size)
        seen.append((int(offset[0]), int(size[0])))
    p.equal(seen, [(0, 1), (8, 8), (16, 12), (28, 2)], "parameters")
    p.expect(1, "cuFuncGetParamInfo", mixed, 4, offset, size)
    p.expect(1, "cuFuncGetParamInfo", _function(p, "nothing"), 0, offset, size)


@check
def occupancy(p: Probe) -> None:
    """Plausible, monotone, and zero where a block cannot be resident."""
    name = "cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags"
    fill = _function(p, "fill")

    def blocks(block: int, shared: int) -> int:
        return p.value(name, fill, block, shared, 0, kind="int")

    threads = p.value("cuDeviceGetAttribute", 39, 0, kind="int")
    limit = p.value("cuDeviceGetAttribute", 106, 0, kind="int")
    p.equal(blocks(1024, 0), threads // 1024, "blocks of 1024 threads")
    p.equal(blocks(32, 0), min(limit, threads // 32), "blocks of one warp")
    shared = p.value("cuDeviceGetAttribute", 81, 0, kind="int")
    p.true(1 <= blocks(32, 40 << 10) <= shared // (40 << 10), "shared memory limits blocks")
    p.true(blocks(256, 0) >= blocks(512, 0) >= blocks(1024, 0), "larger blocks are not more")
    cell = p.cell("int")
    p.expect(1, name, cell, fill, 0, 0, 0)
    room = p.value("cuOccupancyAvailableDynamicSMemPerBlock", fill, 1, 256, kind="size_t")
    p.true(room >= 40 << 10, "one block may have most of the shared memory")


@check
def code_handles(p: Probe) -> None:
    """A module unloaded twice is refused. (Handles that never were are undefined behaviour in a real driver.)"""
    module = p.value("cuModuleLoadDataEx", p.host(PTX), 0, 0, 0)
    p.ok("cuModuleUnload", module)
    if p.kind == "software":
        cell = p.cell()
        for name in ("cuModuleGetFunction", "cuLibraryGetKernel"):
            got = p.call(name, cell, 0xDEAD0, b"fill\0")
            if got != 400:
                raise Mismatch(f"{name} with a wild handle returned {got}")
        p.expect(400, "cuModuleUnload", module)
