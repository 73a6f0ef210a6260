# SPDX-License-Identifier: Apache-2.0
"""Unmodified CUDA programs compute on the virtual GPU, through the mediator: stock runtimes, NVRTC, CuPy."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.mediator import GPU, PROGRAMS, Guest, Mediator
from tests.e2e.steady import Steady, ends_well, goes_on
from tests.toolchain import STATIC_CUDART_RELEASES
from vgpu.gpu.software.attributes import NAME

THINGS = (
    "vector add", "reduction", "matrix", "variables", "streams and events", "mapped memory", "graph",
    "cooperative launch", "rectangles", "pool", "errors", "vector add", "done",
)  # fmt: skip

Compile = Callable[..., Path]


def _version(release: str) -> str:
    major, minor = release.split(".")
    return f"runtime {int(major) * 1000 + int(minor) * 10}"


@pytest.mark.parametrize("release", ["11.8", "12.1", "13.0"])
def test_shared_runtime(mediator: Mediator, compile_cuda: Compile, release: str) -> None:
    program = compile_cuda(PROGRAMS / "runtime.cu", release=release)
    lines = mediator.run(program)
    assert lines == ["devices 1", _version(release), *THINGS]


@pytest.mark.parametrize("release", ["12.4", "12.6", "12.8", "12.9", "13.5"])
def test_shared_runtime_of_another_release(
    mediator: Mediator, compile_cuda: Compile, cudart_libraries: dict[str, Path], release: str
) -> None:
    """The same file as for 12.1 or 13.0, with another libcudart on the library path."""
    program = compile_cuda(PROGRAMS / "runtime.cu", release="12.1" if release.startswith("12") else "13.0")
    lines = mediator.run(program, LD_LIBRARY_PATH=str(cudart_libraries[release].parent))
    assert lines == ["devices 1", _version(release), *THINGS]


@pytest.mark.parametrize("release", STATIC_CUDART_RELEASES)
def test_static_runtime(mediator: Mediator, compile_cuda: Compile, release: str) -> None:
    program = compile_cuda(PROGRAMS / "runtime.cu", cudart="static", release=release)
    assert mediator.run(program) == ["devices 1", _version(release), *THINGS]


def test_separate_compilation(mediator: Mediator, compile_cuda: Compile) -> None:
    """``-rdc=true``: the driver is given a list of images to link, the program's and the device runtime's."""
    program = compile_cuda(PROGRAMS / "runtime.cu", cudart="static", extra=["-rdc=true"])
    assert mediator.run(program) == ["devices 1", _version("13.0"), *THINGS]


def test_driver_program(mediator: Mediator, driver_program: Callable[[str], Path], kernels: Path) -> None:
    expected = ["devices 1", NAME, "done"]
    if GPU != "software":
        native = [str(driver_program("driver")), str(kernels)]
        one_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
        done = subprocess.run(native, capture_output=True, text=True, check=True, env=one_gpu)
        expected = done.stdout.splitlines()
    assert mediator.run(driver_program("driver"), kernels) == expected


def test_arrays(mediator: Mediator, driver_program: Callable[[str], Path]) -> None:
    assert mediator.run(driver_program("cuda_arrays")) == ["done"]


def test_memory_nodes_of_graphs(mediator: Mediator, compile_cuda: Compile) -> None:
    lines = mediator.run(compile_cuda(PROGRAMS / "graph_memory.cu"))
    assert lines == ["captured", "by hand", "done"]


def test_texture_objects(mediator: Mediator, driver_program: Callable[[str], Path]) -> None:
    assert mediator.run(driver_program("cuda_textures")) == ["done"]


@pytest.mark.parametrize("release", ["11.8", "13.0"])
def test_textures_and_surfaces(mediator: Mediator, compile_cuda: Compile, release: str) -> None:
    lines = mediator.run(compile_cuda(PROGRAMS / "textures.cu", release=release))
    assert lines == [
        "modes and filters", "dimensions and layers", "formats", "device memory", "surfaces", "done",
    ]  # fmt: skip


def test_nvrtc_program(
    mediator: Mediator, driver_program: Callable[[str], Path], nvrtc_library: Path
) -> None:
    builtins = str(nvrtc_library.parent)  # NVRTC opens a second library of its own by name
    assert mediator.run(driver_program("nvrtc"), nvrtc_library, LD_LIBRARY_PATH=builtins) == ["done"]


def test_cupy(mediator: Mediator, cupy_python: Path, tmp_path: Path) -> None:
    lines = mediator.run(
        cupy_python,
        PROGRAMS / "arrays.py",
        CUPY_CACHE_DIR=str(tmp_path),
        CUPY_COMPILE_WITH_PTX="1",
        CUPY_DISABLE_JITIFY_CACHE="1",
    )
    assert lines == ["element-wise", "reductions", "raw kernel", "streams", "done"]


def test_cupy_with_cub_and_thrust(mediator: Mediator, cupy_python: Path, tmp_path: Path) -> None:
    """Results, where a module without PTX for this device once gave zeros and no error."""
    lines = mediator.run(
        cupy_python,
        PROGRAMS / "accelerated.py",
        CUPY_CACHE_DIR=str(tmp_path),
        CUPY_COMPILE_WITH_PTX="1",
        CUPY_DISABLE_JITIFY_CACHE="1",
    )
    assert lines == ["reductions", "scans", "histograms", "sorting"]


def test_visible_devices(mediator: Mediator, compile_cuda: Compile) -> None:
    """Hiding the device leaves none, as natively."""
    program = compile_cuda(PROGRAMS / "count.cu")
    assert mediator.run(program) == [json.dumps({"devices": 1, "status": 0})]
    assert mediator.run(program, CUDA_VISIBLE_DEVICES="0") == [json.dumps({"devices": 1, "status": 0})]
    assert mediator.run(program, CUDA_VISIBLE_DEVICES="") == [json.dumps({"devices": 0, "status": 100})]


def test_two_at_once(mediator: Mediator, steady: Steady) -> None:
    """Two processes, two sessions, two workers; both right all the time."""
    guests = steady.begin_together(mediator, None, None)
    sessions = [mediator.session_of(guest)["info"] for guest in guests]
    assert sessions[0]["session"] != sessions[1]["session"]
    assert sessions[0]["worker_pid"] != sessions[1]["worker_pid"]
    for guest in guests:
        goes_on(guest, 50)
    for guest in guests:
        ends_well(guest)


def _settled(mediator: Mediator, guest: Guest) -> dict[str, int]:
    """The worker's counters once they stand still: it answers before it counts."""
    before: dict[str, int] = {}
    now: dict[str, int] = mediator.session_of(guest)["grant"]
    while now != before:
        time.sleep(0.05)
        before, now = now, mediator.session_of(guest)["grant"]
    return now


def test_local_queries_make_no_records(
    mediator: Mediator, driver_program: Callable[[str], Path], kernels: Path
) -> None:
    """Tens of thousands of queries, and the worker has not seen one of them."""
    guest = mediator.begin(driver_program("queries"), kernels)
    assert guest.line() == "ready"
    before = _settled(mediator, guest)
    guest.say()
    assert guest.line() == "asked"
    after = mediator.session_of(guest)["grant"]
    counters = ("records", "async_records", "reply_records", "fence_records", "doorbells")
    assert {name: after[name] for name in counters} == {name: before[name] for name in counters}
    assert before["records"] > 0
    guest.say()
    assert guest.finish()[0] == 0
