# SPDX-License-Identifier: Apache-2.0
"""The source archive builds, and the wheel out of it is whole: what a user installs, seen from an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("actors", "gpu", "shim", "supervision", "transport")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive of this checkout."""
    out = tmp_path_factory.mktemp("sdist")
    program = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    run(sys.executable, "-P", "-c", program, out, cwd=ROOT)
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the source archive, not from the checkout."""
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "--no-index")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # Where the distribution's Python headers are not installed, tools/bootstrap.py fetched them.
    fetched = ROOT / ".cache" / "python-headers" / "include"
    has_headers = (Path(sysconfig.get_path("include")) / "Python.h").exists()
    given = [] if has_headers else [f"--config-settings=cmake.define.Python_INCLUDE_DIR={fetched}"]
    run(*pip, *given, "-w", out, sdist, cwd=out, PATH=path)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed and nothing else."""
    out = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-index", "--no-compile")
    run(*pip, "--target", out, wheel, cwd=out)
    return out


def test_the_source_archive_holds_each_file_once(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    for room in ROOMS:
        assert f"src/vgpu/{room}/__init__.py" in names
        assert not [name for name in names if name.startswith(f"{room}/")]
    assert not [name for name in names if name.endswith((".so", ".so.1", ".o", ".pyc"))]


def test_the_wheel_puts_nothing_beside_vgpu(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {
        "vgpu",
        next(n for n in names if ".dist-info" in n).split("/")[0],
    }
    assert "vgpu/py.typed" in names
    assert "vgpu/shim/lib/libcuda.so.1" in names
    assert "vgpu/shim/lib/libcuda.so" in names
    for name in ("libnvidia-ml.so.1", "libnvidia-ml.so", "nvidia-smi"):
        assert f"vgpu/shim/lib/{name}" in names
    assert not [name for name in names if name.endswith((".c", ".h", ".map", ".cdef.txt"))]
    assert wheel.name.split("-")[2:4] == ["cp311", "abi3"]


def test_the_installed_package_loads_its_native_parts(installed: Path, tmp_path: Path) -> None:
    program = (
        "import ctypes, sys\n"
        "from importlib.resources import files\n"
        "from vgpu.gpu import _replay\n"
        "library = files('vgpu.shim') / 'lib' / 'libcuda.so.1'\n"
        "ctypes.CDLL(str(library)).cuInit\n"
        "print(_replay.__file__, library, sep='\\n')\n"
    )
    # -S: without the path that makes this checkout's own package importable.
    dependencies = sysconfig.get_path("purelib")
    search = f"{installed}:{dependencies}"
    printed = run(sys.executable, "-S", "-P", "-c", program, cwd=tmp_path, PYTHONPATH=search).split()
    assert [Path(line).is_relative_to(installed) for line in printed] == [True, True]


def test_the_shim_exports_the_driver_api_alone(installed: Path) -> None:
    library = installed / "vgpu" / "shim" / "lib" / "libcuda.so.1"
    symbols = run("nm", "-D", "--defined-only", library, cwd=installed).splitlines()
    names = [line.split()[-1] for line in symbols]
    assert len(names) > 100
    assert [name for name in names if not name.startswith("cu")] == []
    dynamic = run("readelf", "-d", library, cwd=installed)
    assert "soname: [libcuda.so.1]" in dynamic
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert set(needed) <= {"libc.so.6", "libpthread.so.0", "libdl.so.2", "ld-linux-x86-64.so.2"}


def test_no_native_part_knows_where_it_was_built(installed: Path) -> None:
    for library in [*installed.rglob("*.so"), *installed.rglob("*.so.1")]:
        assert b"/pip-" not in library.read_bytes(), library
