# SPDX-License-Identifier: Apache-2.0
"""What holds for every room's tests: the CUDA toolchain, small guest programs, the rule for a real GPU, and a limit for each test."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import toolchain
from tests.e2e.mediator import PROGRAMS
from tests.hang_guard import HangGuard, end_run, limit_of
from vgpu.gpu.conformance.kernels import PTX
from vgpu.shim.locate import library_directory

SPIN = """
.visible .entry spin(.param .u32 spin_0)
{
    .reg .pred %p<2>;
    .reg .b32 %r<2>;
    ld.param.u32 %r1, [spin_0];
    setp.eq.u32 %p1, %r1, 0;
    @%p1 bra DONE;
L:
    bra.uni L;
DONE:
    ret;
}
"""


# Hypothesis measures by the clock how long an example takes, and how long it takes to make one up: on a machine that is busy with
# other things a fifth of a second goes by in a test of microseconds. The hang guard is there for what does not end.
settings.register_profile("vgpu", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vgpu")

_GUARD = pytest.StashKey[HangGuard]()


def pytest_configure(config: pytest.Config) -> None:
    """One guard for the run; and programs under test can be interrupted, also where a shell began this run with ``&``."""
    config.stash[_GUARD] = HangGuard(end_run(config))
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _limited(item: pytest.Item, phase: str) -> Generator[None, object, object]:
    guard = item.config.stash[_GUARD]
    with guard.limit(f"{item.nodeid} ({phase})", limit_of(item, phase)):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from _limited(item, "setup"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from _limited(item, "call"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from _limited(item, "teardown"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` on a machine that has none; nothing stands in for the real thing."""
    if Path("/dev/nvidiactl").exists():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="this machine has no NVIDIA GPU"))


@pytest.fixture(scope="session")
def compile_cuda() -> Callable[..., Path]:
    """:func:`tests.toolchain.compile_cuda`: CUDA C++ source in, path of an executable out."""
    return toolchain.compile_cuda


@pytest.fixture(scope="session")
def compile_ptx() -> Callable[..., str]:
    """:func:`tests.toolchain.compile_ptx`: CUDA C++ device code in, PTX text out."""
    return toolchain.compile_ptx


@pytest.fixture(scope="session")
def cuda_home() -> Path:
    """The CUDA 13.0 compiler and headers: ``bin/nvcc``, ``bin/ptxas``, ``include/cuda.h``."""
    return toolchain.cuda_home()


@pytest.fixture(scope="session")
def cudart_libraries() -> dict[str, Path]:
    """Release (``"11.8"`` to the newest 13.x) -> path of its unmodified ``libcudart.so.N``."""
    return toolchain.cudart_libraries()


@pytest.fixture(scope="session")
def nvrtc_library() -> Path:
    """Path of ``libnvrtc.so.13``, CUDA 13.0."""
    return toolchain.nvrtc_library()


@pytest.fixture(scope="session")
def cupy_python() -> Path:
    """Path of a Python interpreter that can ``import cupy``, apart from the project's environment."""
    return toolchain.cupy_python()


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PTX file: the kernels of the conformance suite, and ``spin``, which never ends if told so."""
    path = tmp_path_factory.mktemp("kernels") / "kernels.ptx"
    path.write_text(PTX.rstrip(b"\0").decode() + SPIN)
    return path


@pytest.fixture(scope="session")
def driver_program(tmp_path_factory: pytest.TempPathFactory, cuda_home: Path) -> Callable[[str], Path]:
    """Compile ``programs/NAME.c`` against NVIDIA's header and this project's library; the executable."""
    folder = tmp_path_factory.mktemp("driver-programs")

    def build(name: str) -> Path:
        out = folder / name
        if not out.exists():
            command = [
                *("gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-I", str(cuda_home / "include")),
                *(
                    "-o",
                    str(out),
                    str(PROGRAMS / f"{name}.c"),
                    str(library_directory() / "libcuda.so.1"),
                    "-ldl",
                ),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        return out

    return build
