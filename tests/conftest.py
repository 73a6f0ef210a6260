# SPDX-License-Identifier: Apache-2.0
"""Fixtures that every room's tests may use: the CUDA toolchain, and the rule for tests that need a real GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import toolchain


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
