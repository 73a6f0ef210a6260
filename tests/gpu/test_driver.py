# SPDX-License-Identifier: Apache-2.0
"""Finding the real libcuda, and never our own; result codes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.gpu.replay.guest import build_fake_driver
from vgpu.gpu import driver
from vgpu.gpu._replay import ffi, lib
from vgpu.gpu.errors import CudaError, Result, result_name

ROOT = Path(__file__).resolve().parents[2]


def make_guest_library(folder: Path) -> Path:
    """A shared library with the guest library's marker in it."""
    source = folder / "ours.c"
    source.write_text('const char *marker = "VGPU_RUN_DIR"; int cuInit(void) { return 0; }')
    library = folder / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return library


def opens(path: Path) -> str | None:
    """What vgpu_driver_open says; None when it is content."""
    wrong = lib.vgpu_driver_open(lib.vgpu_replay_driver(lib.vgpu_replay_new()), str(path).encode())
    return None if wrong == ffi.NULL else ffi.string(wrong).decode()


def test_given_path_wins(tmp_path: Path) -> None:
    library = build_fake_driver(tmp_path)
    assert driver.find_library(library, folders=[]) == library
    assert driver.choose("nvidia", library) == (driver.Kind.NVIDIA, library)
    assert opens(library) is None


def test_guest_library_is_never_taken(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "real").mkdir()
    ours, real = make_guest_library(tmp_path / "ours"), build_fake_driver(tmp_path / "real")
    with pytest.raises(driver.DriverNotFound, match="guest library"):
        driver.find_library(ours)
    assert driver.find_library(folders=[tmp_path / "none", ours.parent, real.parent]) == real
    with pytest.raises(driver.DriverNotFound, match="no libcuda"):
        driver.find_library(folders=[ours.parent])
    assert opens(ours) == "this is the guest library of this project, not a driver"


def test_the_loaders_folders_are_looked_into_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a machine has its driver on the library path alone; our own library there is passed over."""
    (tmp_path / "ours").mkdir()
    (tmp_path / "real").mkdir()
    ours, real = make_guest_library(tmp_path / "ours"), build_fake_driver(tmp_path / "real")
    monkeypatch.setattr(driver, "USUAL_FOLDERS", (str(tmp_path / "none"),))
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{ours.parent}::{real.parent}")
    assert driver.find_library() == real
    monkeypatch.setattr(driver, "USUAL_FOLDERS", (str(real.parent),))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(ours.parent))
    assert driver.find_library() == real


@pytest.mark.skipif(
    not (ROOT / "build/native/libcuda.so.1").exists(), reason="the guest library is not built"
)
def test_the_guest_library_itself_is_recognised() -> None:
    built = ROOT / "build/native/libcuda.so.1"
    assert driver.is_guest_library(built)
    assert opens(built) == "this is the guest library of this project, not a driver"


def test_unusable_files_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.so"
    text.write_text("no library")
    (tmp_path / "folder").mkdir()
    assert opens(tmp_path / "none") == "the file cannot be opened"
    assert opens(tmp_path / "folder") == "not a regular file"
    assert opens(text) == "the dynamic linker refuses it"
    source = tmp_path / "old.c"
    source.write_text(
        "int cuInit(unsigned f) { return 0; } int cuDriverGetVersion(int *v) { *v = 12030; return 0; }"
    )
    for name, source_text, expected in (
        ("old", source.read_text(), "the driver is older than CUDA 12.4"),
        ("mute", "int cuInit(unsigned f) { return 0; }", "it does not answer as libcuda does"),
    ):
        (tmp_path / f"{name}.c").write_text(source_text)
        made = tmp_path / f"{name}.so"
        subprocess.run(
            ["gcc", "-w", "-shared", "-fPIC", str(tmp_path / f"{name}.c"), "-o", str(made)], check=True
        )
        assert opens(made) == expected


def test_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert driver.choose("software") == (driver.Kind.SOFTWARE, None)
    with pytest.raises(ValueError, match="gpu is 'amd'"):
        driver.choose("amd")
    with pytest.raises(driver.DriverNotFound):
        driver.choose("nvidia", tmp_path / "none")
    assert driver.choose("auto", tmp_path / "none") == (driver.Kind.SOFTWARE, None)
    library = build_fake_driver(tmp_path)
    assert driver.choose("auto", library) == (driver.Kind.NVIDIA, library)


def test_version_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "KERNEL_MODULE_VERSION", tmp_path / "version")
    real = tmp_path / "libcuda.so.580.159.04"
    real.touch()
    link = tmp_path / "libcuda.so.1"
    link.symlink_to(real)
    assert driver.version_text(link) == "580.159.04"
    assert driver.version_text(tmp_path / "libother.so") == ""
    (tmp_path / "version").write_text("570.1\n")
    assert driver.version_text(link) == "570.1"


def test_result_codes_agree_with_the_header() -> None:
    text = (ROOT / "shim/libcuda/cuda_types.h").read_text()
    header = {name: int(code) for name, code in re.findall(r"\bCUDA_(?:ERROR_)?(\w+) = (\d+)", text)}
    assert {r.name: r.value for r in Result} == header
    assert result_name(0) == "CUDA_SUCCESS"
    assert result_name(700) == "CUDA_ERROR_ILLEGAL_ADDRESS"
    assert result_name(12345) == "CUresult 12345"
    assert str(CudaError(2, "cuMemAlloc_v2")) == "cuMemAlloc_v2 returned CUDA_ERROR_OUT_OF_MEMORY"
