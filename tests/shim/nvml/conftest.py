# SPDX-License-Identifier: Apache-2.0
"""Fixtures for tests of libnvidia-ml.so.1: the built library, a host with a page, and the interface's own layouts."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests import toolchain

from .page_host import PageHost
from .table import ROOT, compile_library

NATIVE = ROOT / "build" / "native"


@pytest.fixture(scope="session")
def library_path() -> Path:
    """``libnvidia-ml.so.1`` as tools/build_native.py built it."""
    path = NATIVE / "libnvidia-ml.so.1"
    assert path.exists(), "run `make build`"
    return path


@pytest.fixture(scope="session")
def nvidia_smi() -> Path:
    """Our nvidia-smi, the library beside it."""
    path = NATIVE / "nvidia-smi"
    assert path.exists(), "run `make build`"
    return path


@pytest.fixture(scope="session")
def library(library_path: Path) -> ctypes.CDLL:
    """The library, loaded into this process."""
    return ctypes.CDLL(str(library_path))


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """An empty folder whose name leaves room for a socket's."""
    folder = Path(tempfile.mkdtemp(prefix="nvml"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def host(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PageHost]:
    """A host with the page of :data:`~.page_host.NUMBERS`, which this process's library finds."""
    monkeypatch.setenv("VGPU_RUN_DIR", str(run_dir))
    with PageHost(run_dir) as running:
        yield running


@pytest.fixture
def nvml(library: ctypes.CDLL, host: PageHost) -> Iterator[ctypes.CDLL]:
    """The library, initialised against ``host``."""
    assert library.nvmlInit_v2() == 0
    yield library
    while library.nvmlShutdown() == 0:
        pass


@pytest.fixture
def device(nvml: ctypes.CDLL) -> ctypes.c_void_p:
    """The handle of the only GPU."""
    handle = ctypes.c_void_p()
    assert nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)) == 0
    return handle


@pytest.fixture(scope="session")
def pynvml(library: ctypes.CDLL) -> ModuleType:
    """nvidia-ml-py, the interface's public structures and numbers, over our library."""
    (path,) = toolchain.nvml_clients_python().parent.parent.glob("lib/python*/site-packages/pynvml.py")
    spec = importlib.util.spec_from_file_location("pynvml_for_tests", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # it looks itself up there
    spec.loader.exec_module(module)
    module.nvmlLib = library  # type: ignore[attr-defined] # where it keeps what it has loaded
    return module


@pytest.fixture(scope="session")
def pci_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that stands for sysfs in :func:`pci_library_path`."""
    return tmp_path_factory.mktemp("pci")


@pytest.fixture(scope="session")
def pci_library_path(tmp_path_factory: pytest.TempPathFactory, pci_folder: Path) -> Path:
    """The library built over another sysfs."""
    out = tmp_path_factory.mktemp("pci-library") / "libnvidia-ml.so.1"
    return compile_library(out, f'-DVGPU_SYSFS_PCI="{pci_folder}"')
