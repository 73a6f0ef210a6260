# SPDX-License-Identifier: Apache-2.0
# mypy: ignore-errors
# (it runs in an environment of its own, whose packages have no types here)
"""Print, as JSON, the PTX of kernels that CuPy generates for its functions and reductions. Needs no GPU.

Run by an interpreter that has CuPy (see test_cupy_kernels.py): arguments are the path of libnvrtc and of the CUDA headers.
CuPy's own code generator is called below its public interface, because the public one wants a device; the
version of CuPy is pinned with the toolchain.
"""

import ctypes
import json
import re
import sys
from pathlib import Path

import cupy
import cupy._core._carray as carray
import cupy._core._kernel as kernel
import cupy._core._reduction as reduction
import cupy._core._routines_logic as logic
import cupy._core._routines_math as math
import numpy

HEADERS = "\n".join(
    f"#include <cupy/{name}>" for name in ("complex.cuh", "carray.cuh", "atomics.cuh", "math_constants.h")
)
BLOCK = 256


def compile_source(nvrtc, source, folders):
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    options = [
        b"--gpu-architecture=compute_75",
        b"--std=c++17",
        *(f"-I{folder}".encode() for folder in folders),
    ]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    if status:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.value.decode())
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, text)
    return text.value.decode()


def array_of(dtype, dimensions):
    return kernel._ArgInfo(1, cupy.ndarray, numpy.dtype(dtype).type, dimensions, True, True)


def indexer(dimensions):
    return kernel._ArgInfo(2, carray.Indexer, None, dimensions, True, True)


def elementwise(function, op):
    types = [numpy.dtype(d) for d in (*op.in_types, *op.out_types)]
    names = [f"in{i}_type" for i in range(len(op.in_types))] + [
        f"out{i}_type" for i in range(len(op.out_types))
    ]
    type_map = kernel._TypeMap(tuple(zip(names, (t.type for t in types), strict=True)))
    arguments = (*(array_of(t, 1) for t in types), indexer(1))
    source = kernel._get_elementwise_kernel_code(
        arguments,
        type_map,
        function._params,
        op.routine,
        "kern",
        function._preamble,
        function._loop_prep,
        "",
        (),
    )
    # The generator leaves the type of each argument to its caller, under the one name T.
    source = re.sub(r"const T &(\w+) =", r"const \1_type \1 =", source)
    return re.sub(r"\bT &(\w+) =", r"\1_type &\1 =", source)


def reducing(function, op):
    source_type, result_type = numpy.dtype(op.in_types[0]), numpy.dtype(op.out_types[0])
    before, reduce, after, kind = op.routine
    integer = kernel._ArgInfo(3, int, numpy.int32, 0, True, True)
    arguments = (array_of(source_type, 2), array_of(result_type, 1), indexer(2), indexer(1), integer)
    type_map = kernel._TypeMap((("type_in0_raw", source_type.type), ("type_out0_raw", result_type.type)))
    return "typedef int IndexT;\n" + reduction._create_reduction_function_code(
        "kern", BLOCK, kind or "type_out0_raw", function._params, arguments, function.identity, before, reduce, after,
        type_map, function._input_expr, function._output_expr, function.preamble, (),
    )  # fmt: skip


def usable(op):
    types = [numpy.dtype(d) for d in (*op.in_types, *op.out_types)]
    return isinstance(op.routine, str | tuple) and op.routine and all(t.kind in "biufc" for t in types)


def main():
    nvrtc = ctypes.CDLL(sys.argv[1])
    here = Path(cupy.__file__).parent / "_core" / "include"
    folders = [here, *(here / "cupy" / "_cccl").iterdir(), *sys.argv[2:]]
    wanted = []
    for number, name in enumerate(sorted(n for n in dir(cupy) if isinstance(getattr(cupy, n), kernel.ufunc))):
        function = getattr(cupy, name)
        ops = [op for op in function._ops.ops if usable(op)]
        # One set of types for each function, a different one for each, halves and complex numbers included.
        for op in ops[number % len(ops) :: len(ops)] if ops else []:
            wanted.append((name, "elementwise", op, elementwise(function, op)))
    for module in (math, logic):
        for name, function in sorted(vars(module).items()):
            if isinstance(function, reduction._SimpleReductionKernel):
                for op in [op for op in function._ops.ops if usable(op)][-4::2]:
                    wanted.append((name, "reduction", op, reducing(function, op)))
    out = []
    for name, family, op, source in wanted:
        types = [numpy.dtype(d).str for d in op.in_types], [numpy.dtype(d).str for d in op.out_types]
        try:
            text = compile_source(nvrtc, f"{HEADERS}\n{source}", folders)
        except RuntimeError as error:
            text = f"error: {error}"
        out.append({"name": name, "family": family, "in": types[0], "out": types[1], "ptx": text})
    json.dump(out, sys.stdout)


main()
