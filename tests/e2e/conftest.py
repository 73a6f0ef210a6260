# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the end-to-end tests: mediators, and compiled guest programs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.mediator import PROGRAMS, Mediator
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


@pytest.fixture(scope="session")
def mediator() -> Iterator[Mediator]:
    """A mediator shared by the tests that leave it as they found it."""
    with Mediator() as running:
        yield running


@pytest.fixture
def own_mediator() -> Iterator[Mediator]:
    """A mediator of the test's own, to be ill-treated."""
    with Mediator() as running:
        yield running


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
