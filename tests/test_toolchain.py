# SPDX-License-Identifier: Apache-2.0
"""The test toolchain delivers what its fixtures say. No driver is needed, and none is used."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.toolchain import CUDART_RELEASES, STATIC_CUDART_RELEASES, ToolchainError

PROGRAM = """
#include <cuda_runtime.h>
__global__ void scale(float *values, float factor) { values[threadIdx.x] *= factor; }
int main()
{
    float *values = nullptr;
    if (cudaMalloc(&values, 64 * sizeof(float)) != cudaSuccess) return 1;
    scale<<<1, 64>>>(values, 2.0f);
    return cudaDeviceSynchronize() == cudaSuccess ? 0 : 1;
}
"""


def needed_libraries(program: Path) -> list[str]:
    listing = subprocess.run(["readelf", "-d", program], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.*)\]", listing)


@pytest.mark.parametrize("release", CUDART_RELEASES)
def test_a_program_needs_the_runtime_it_was_linked_with(
    compile_cuda: Callable[..., Path], cudart_libraries: dict[str, Path], release: str
) -> None:
    libraries = needed_libraries(compile_cuda(PROGRAM, release=release))
    assert [name for name in libraries if "cudart" in name] == [cudart_libraries[release].name]
    assert "libcuda.so.1" not in libraries  # the runtime opens it by name, when it is first used


@pytest.mark.parametrize("release", STATIC_CUDART_RELEASES)
def test_a_static_program_needs_no_runtime(compile_cuda: Callable[..., Path], release: str) -> None:
    libraries = needed_libraries(compile_cuda(PROGRAM, release=release, cudart="static"))
    assert [name for name in libraries if "cuda" in name] == []


def test_every_runtime_is_another(cudart_libraries: dict[str, Path]) -> None:
    assert tuple(cudart_libraries) == CUDART_RELEASES
    assert len({library.read_bytes() for library in cudart_libraries.values()}) == len(CUDART_RELEASES)


def test_a_program_is_compiled_once(compile_cuda: Callable[..., Path]) -> None:
    first = compile_cuda(PROGRAM)
    written = first.stat().st_mtime_ns
    assert compile_cuda(PROGRAM) == first
    assert first.stat().st_mtime_ns == written
    assert compile_cuda(PROGRAM, extra=["-O0"]) != first


def test_ptx_is_for_the_architecture_asked_for(compile_ptx: Callable[..., str]) -> None:
    text = compile_ptx(PROGRAM, arch="compute_90")
    assert ".target sm_90" in text
    assert re.search(r"\.visible \.entry \w*scale\w*\(", text)


def test_a_program_that_does_not_compile_says_why(compile_cuda: Callable[..., Path]) -> None:
    with pytest.raises(ToolchainError, match="undefined_name"):
        compile_cuda("int main() { return undefined_name; }")


def test_a_release_without_a_static_runtime_is_refused(compile_cuda: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"no static libcudart in release 12\.4"):
        compile_cuda(PROGRAM, release="12.4", cudart="static")


def test_cupy_imports_and_compiles_at_run_time(cupy_python: Path, nvrtc_library: Path) -> None:
    program = (
        "import cupy\n"
        "from cupy_backends.cuda.libs import nvrtc\n"
        "source = 'extern \"C\" __global__ void twice(float *x) { x[threadIdx.x] *= 2; }'\n"
        "compilation = nvrtc.createProgram(source, 'twice.cu', (), ())\n"
        "nvrtc.compileProgram(compilation, ['-arch=compute_75'])\n"
        "assert b'.entry twice' in nvrtc.getPTX(compilation)\n"
        "print(nvrtc.getVersion())\n"
        "print(next(line.split()[-1] for line in open('/proc/self/maps') if 'libnvrtc.so' in line))\n"
    )
    done = subprocess.run([cupy_python, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    version, mapped = done.stdout.splitlines()
    assert version == "(13, 0)"
    assert Path(mapped).samefile(nvrtc_library)
