# SPDX-License-Identifier: Apache-2.0
"""The CUDA compiler, the CUDA runtimes and CuPy that the tests run, all from the package index.

A test that only passes where somebody once installed a CUDA toolkit proves little, so nothing here looks for
one. Exact versions are pinned below, fetched once with pip (whose own configuration says where from, so an
offline mirror or ``PIP_NO_INDEX`` with ``PIP_FIND_LINKS`` works), unpacked under ``.cache/toolchain/`` and kept.
``VGPU_TOOLCHAIN_CACHE`` names another place, which several checkouts may share: every step happens under a file
lock and becomes visible by one rename.

Only unmodified third-party files go in. This module must never provide a CUDA *driver*: programs built here find
whatever ``libcuda.so.1`` the test puts on their library path, as they would in a guest.

Run as a script it prints where things are: ``python tests/toolchain.py nvcc|cudart|nvrtc|cupy|compile FILE``,
and with ``fetch`` it brings everything here ahead of the tests.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

Cudart = Literal["shared", "static"]

# Distribution name -> exact version. The compiler and the run-time compiler are those of CUDA 13.0.
COMPILER_WHEELS = {
    "nvidia-cuda-nvcc": "13.0.88",
    "nvidia-cuda-crt": "13.0.88",
    "nvidia-nvvm": "13.0.88",
    "nvidia-cuda-runtime": "13.0.96",
    "nvidia-cuda-cccl": "13.0.85",
}
NVRTC_WHEELS = {"nvidia-cuda-nvrtc": "13.0.88"}

# Release -> the wheel with its libcudart. From the oldest runtime that is still met to the newest there is.
CUDART_WHEELS = {
    "11.8": {"nvidia-cuda-runtime-cu11": "11.8.89"},
    "12.1": {"nvidia-cuda-runtime-cu12": "12.1.105"},
    "12.4": {"nvidia-cuda-runtime-cu12": "12.4.127"},
    "12.6": {"nvidia-cuda-runtime-cu12": "12.6.77"},
    "12.8": {"nvidia-cuda-runtime-cu12": "12.8.90"},
    "12.9": {"nvidia-cuda-runtime-cu12": "12.9.79"},
    "13.0": {"nvidia-cuda-runtime": "13.0.96"},
    "13.5": {"nvidia-cuda-runtime": "13.5.37"},
}
CUDART_RELEASES = tuple(CUDART_WHEELS)
# Only these wheels carry libcudart_static.a.
STATIC_CUDART_RELEASES = ("12.9", "13.0", "13.5")
COMPILER_RELEASE = "13.0"

# CuPy without its optional maths libraries: element-wise kernels, reductions and RawKernel need only NVRTC.
CUPY_WHEELS = {"cupy-cuda13x": "14.2.0", "numpy": "2.4.6", "cuda-pathfinder": "1.3.4"}

# Programs that ask NVML about GPUs, for tests/shim/nvml. gpustat comes as source only; it is pure Python.
NVML_CLIENTS = {
    "nvidia-ml-py": "13.595.45",
    "nvitop": "1.7.2",
    "gpustat": "1.1.1",
    "psutil": "7.1.3",
    "blessed": "1.22.0",
    "wcwidth": "0.2.14",
}

# Unpacked, these are most of the size of their wheels, and nothing here uses them.
_NOT_UNPACKED = re.compile(
    r"(^|/)(libnvvm\.so\.\d+|lib[\w-]+\.alt\.so[.\d]*|\.metadata/.*|.*\.dist-info/.*)$"
)
_WHEEL_PREFIX = re.compile(r"^nvidia/(cu13|cuda_runtime|cuda_nvrtc)/")


class ToolchainError(Exception):
    """The toolchain could not be fetched, unpacked or run; the message holds what the tool said."""


def cache_root() -> Path:
    """The directory everything is kept in; made if absent."""
    configured = os.environ.get("VGPU_TOOLCHAIN_CACHE")
    root = Path(configured) if configured else Path(__file__).resolve().parent.parent / ".cache" / "toolchain"
    root.mkdir(parents=True, exist_ok=True)
    return root


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    """Hold the lock file ``name`` of the cache; waits for another process that holds it."""
    locks = cache_root() / "locks"
    locks.mkdir(exist_ok=True)
    with (locks / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(command: Sequence[str | Path], *, what: str, environment: dict[str, str] | None = None) -> str:
    """Run a tool without a terminal and return its standard output.

    Raises:
        ToolchainError: it could not start or exited with another status than 0.
    """
    try:
        done = subprocess.run(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
    except OSError as error:
        raise ToolchainError(f"{what}: cannot start {command[0]}: {error}") from error
    if done.returncode != 0:
        raise ToolchainError(
            f"{what}: exit status {done.returncode} of {' '.join(str(word) for word in command)}\n"
            f"{done.stdout}{done.stderr}"
        )
    return done.stdout


def _directory_for(name: str, recipe: object, build: Callable[[Path], None]) -> Path:
    """The cached directory ``name``, made by ``build(empty directory)`` where this recipe has not been made yet.

    It appears complete or not at all: ``build`` fills a temporary directory that is renamed when it returned.
    """
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    final = cache_root() / f"{name}-{digest}"
    if final.is_dir():
        return final
    with _locked(f"{name}-{digest}"):
        if not final.is_dir():
            unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache_root()))
            try:
                build(unfinished)
                unfinished.chmod(0o755)
                unfinished.rename(final)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
    return final


def _download(wheels: dict[str, str], destination: Path) -> list[Path]:
    """Fetch the pinned wheels, and nothing they depend on, into ``destination``."""
    _run(
        [
            *(
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--disable-pip-version-check",
                "--no-input",
            ),
            *("--no-deps", "--only-binary=:all:", "--no-cache-dir", "--dest", destination),
            *(f"{name}=={version}" for name, version in wheels.items()),
        ],
        what="fetching the test toolchain from the package index",
    )
    return sorted(destination.glob("*.whl"))


def _unpack(wheels: dict[str, str], destination: Path) -> None:
    """Fetch wheels and lay them over each other as one CUDA toolkit: ``bin include lib nvvm``."""
    with tempfile.TemporaryDirectory(prefix=".wheels-", dir=cache_root()) as scratch:
        for wheel in _download(wheels, Path(scratch)):
            with zipfile.ZipFile(wheel) as archive:
                for member in archive.infolist():
                    if member.is_dir() or _NOT_UNPACKED.search(member.filename):
                        continue
                    target = destination / _WHEEL_PREFIX.sub("", member.filename)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(member) as source, target.open("wb") as sink:
                        shutil.copyfileobj(source, sink, 1 << 20)
                    if (member.external_attr >> 16) & 0o100:  # zipfile itself drops the executable bit
                        target.chmod(0o755)
    libraries = destination / "lib"
    for library in sorted(libraries.glob("lib*.so.*")):
        # The linker wants the plain name; wheels leave it out.
        plain = libraries / re.sub(r"\.so\..*$", ".so", library.name)
        if not plain.exists():
            plain.symlink_to(library.name)
    (destination / "lib64").symlink_to("lib")  # nvcc.profile looks there


@functools.cache
def cuda_home() -> Path:
    """The CUDA 13.0 compiler: ``bin/nvcc``, ``bin/ptxas``, headers, ``libcudart`` shared and static."""
    return _directory_for("cuda-13.0", COMPILER_WHEELS, lambda where: _unpack(COMPILER_WHEELS, where))


@functools.cache
def _cudart_home(release: str) -> Path:
    wheels = CUDART_WHEELS[release]
    return _directory_for(f"cudart-{release}", wheels, lambda where: _unpack(wheels, where))


@functools.cache
def cudart_library(release: str) -> Path:
    """``libcudart.so.N`` of one release in :data:`CUDART_RELEASES`, alone in its directory but for its plain name."""
    (library,) = (_cudart_home(release) / "lib").glob("libcudart.so.*")
    return library


def cudart_libraries() -> dict[str, Path]:
    """Every release in :data:`CUDART_RELEASES` and its ``libcudart.so.N``."""
    return {release: cudart_library(release) for release in CUDART_RELEASES}


@functools.cache
def nvrtc_library() -> Path:
    """``libnvrtc.so.13`` of CUDA 13.0, its builtins library beside it.

    It opens the builtins by name alone: a program that uses it needs this directory in ``LD_LIBRARY_PATH``, or the
    builtins loaded beforehand.
    """
    home = _directory_for("nvrtc-13.0", NVRTC_WHEELS, lambda where: _unpack(NVRTC_WHEELS, where))
    return home / "lib" / "libnvrtc.so.13"


@functools.cache
def _host_compiler() -> Path:
    """The machine's C++ compiler, which nvcc needs for the host half of a program."""
    fetched = Path(__file__).resolve().parent.parent / ".cache" / "bin" / "g++"  # by tools/bootstrap.py
    found = shutil.which("g++") or shutil.which("c++") or (fetched if fetched.exists() else None)
    if found is None:
        raise ToolchainError(
            "nvcc needs a C++ compiler for host code and there is no g++: install g++ (Debian: g++)"
        )
    return Path(found)


@functools.cache
def _host_compiler_version() -> str:
    return _run(
        [_host_compiler(), "--version"], what="asking the host compiler for its version"
    ).splitlines()[0]


def _nvcc(arguments: Sequence[str | Path], *, scratch: Path) -> str:
    """Run nvcc with a path of its own, so that no CUDA installation of the machine can be mixed in."""
    home = cuda_home()
    environment = {
        "PATH": f"{home / 'bin'}:/usr/bin:/bin",
        "TMPDIR": str(scratch),
        "LC_ALL": "C.UTF-8",
        "HOME": os.environ.get("HOME", "/"),
    }
    return _run(
        [home / "bin" / "nvcc", "-ccbin", _host_compiler(), *arguments], what="nvcc", environment=environment
    )


def _read_source(source: str | Path) -> str:
    """Source text as given, or the contents of the file a :class:`~pathlib.Path` names."""
    return source.read_text() if isinstance(source, Path) else source


def _built(
    kind: str,
    text: str,
    options: Sequence[str],
    output_name: str,
    command: Sequence[str | Path],
    include: Path | None,
) -> Path:
    """Compile ``text`` once for these options; the result's name is the hash of everything that went in."""
    recipe = [kind, text, list(options), COMPILER_WHEELS, _host_compiler_version()]
    if include is not None:
        recipe.append(
            {item.name: item.read_text() for item in sorted(include.glob("*.[ch]*")) if item.is_file()}
        )

    def build(where: Path) -> None:
        (where / "program.cu").write_text(text)
        inclusion: list[str | Path] = [] if include is None else ["-I", include]
        _nvcc([*command, *inclusion, "-o", where / output_name, where / "program.cu"], scratch=where)

    return _directory_for(kind, recipe, build) / output_name


def compile_cuda(
    source: str | Path,
    *,
    cudart: Cudart = "shared",
    arch: str = "compute_75",
    extra: Sequence[str] = (),
    release: str = COMPILER_RELEASE,
) -> Path:
    """Build one CUDA C++ program and return the executable; the same request again costs nothing.

    The program holds PTX for ``arch`` alone (``code=compute_75``), so any driver has to compile it. For machine
    code as well, pass ``arch="sm_90"``: then ``code=sm_90``, and a GPU is needed.

    Args:
        source: program text, or the Path of a ``.cu`` file (whose directory is searched for ``#include``).
        cudart: link ``libcudart.so.N`` (found through a RUNPATH, so ``LD_LIBRARY_PATH`` still wins) or its
            static form, which only :data:`STATIC_CUDART_RELEASES` have.
        arch: ``compute_NN`` or ``sm_NN``.
        extra: further nvcc options, such as ``-std=c++20`` or ``-rdc=true``.
        release: which runtime to link. The compiler and headers stay those of 13.0; with an older runtime the
            program may use only what that runtime already had.

    Raises:
        ToolchainError: the compiler refused; its words are in the message.
    """
    if release not in CUDART_WHEELS:
        raise ValueError(f"release is {release!r}, expected one of {CUDART_RELEASES}")
    if cudart == "static" and release not in STATIC_CUDART_RELEASES:
        raise ValueError(f"no static libcudart in release {release}, only in {STATIC_CUDART_RELEASES}")
    virtual = arch.replace("sm_", "compute_")
    options = ["-gencode", f"arch={virtual},code={arch}", "-Xlinker", "--enable-new-dtags", *extra]
    if release == COMPILER_RELEASE:
        options += ["-cudart", cudart]
        if cudart == "shared":
            options += ["-Xlinker", f"-rpath={cudart_library(release).parent}"]
    else:
        # 13.0's launch stubs call entry points that 11.8 does not have; this macro of its headers brings back
        # the plain cudaLaunchKernel that every release exports.
        options += ["-cudart", "none", "-D__NV_LEGACY_LAUNCH", "-Xcompiler", "-D__NV_LEGACY_LAUNCH"]
        libraries = _cudart_home(release) / "lib"
        if cudart == "shared":
            options += ["-Xlinker", str(cudart_library(release)), "-Xlinker", f"-rpath={libraries}"]
        else:
            culibos = libraries / "libculibos.a"
            options += ["-Xlinker", str(libraries / "libcudart_static.a")]
            options += ["-Xlinker", str(culibos)] if culibos.exists() else []
            options += ["-lrt", "-lpthread", "-ldl"]
    include = source.resolve().parent if isinstance(source, Path) else None
    return _built("program", _read_source(source), options, "program", options, include)


def compile_ptx(source: str | Path, *, arch: str = "compute_75", extra: Sequence[str] = ()) -> str:
    """The PTX text nvcc makes of CUDA C++ device code.

    Raises:
        ToolchainError: the compiler refused; its words are in the message.
    """
    options = ["-ptx", f"-arch={arch}", *extra]
    include = source.resolve().parent if isinstance(source, Path) else None
    return _built("ptx", _read_source(source), options, "program.ptx", options, include).read_text()


@functools.cache
def cupy_python() -> Path:
    """A Python that can ``import cupy``, in an environment of its own.

    CuPy compiles its kernels with NVRTC at run time, for the architecture of the device it sees; set
    ``CUPY_CACHE_DIR`` in tests so that one run does not feed the next, and ``CUPY_COMPILE_WITH_PTX=1`` to have it
    hand PTX to the driver instead of machine code.
    """
    python_tag = f"{sys.version_info.major}.{sys.version_info.minor}"

    def build(where: Path) -> None:
        # The interpreter and site-packages of a venv may be renamed with it; only its scripts may not, and none
        # of them is used.
        venv.create(where, symlinks=True, with_pip=False)
        _run(
            [
                *(sys.executable, "-m", "pip", "--python", where / "bin" / "python", "install", "--no-deps"),
                *("--quiet", "--disable-pip-version-check", "--no-input", "--only-binary=:all:"),
                *("--no-cache-dir", "--no-compile"),
                *(f"{name}=={version}" for name, version in CUPY_WHEELS.items()),
            ],
            what="installing CuPy from the package index",
        )
        # CuPy looks for NVIDIA's files where their wheels put them; those wheels are here already, unpacked. Only
        # the names that the wheels have: by a plain libnvrtc.so it would load a compiler without its builtins.
        toolkit = where / "lib" / f"python{python_tag}" / "site-packages" / "nvidia" / "cu13"
        (toolkit / "lib").mkdir(parents=True)
        for library in (nvrtc_library(), cudart_library(COMPILER_RELEASE)):
            for path in library.parent.glob("lib*.so.*"):
                (toolkit / "lib" / path.name).symlink_to(path)
        (toolkit / "include").symlink_to(cuda_home() / "include")

    recipe = [
        "versioned names",
        CUPY_WHEELS,
        NVRTC_WHEELS,
        COMPILER_WHEELS,
        python_tag,
        str(Path(sys.executable).resolve()),
    ]
    return _directory_for(f"cupy-{python_tag}", recipe, build) / "bin" / "python"


@functools.cache
def nvml_clients_python() -> Path:
    """A Python with nvidia-ml-py, gpustat and nvitop, in an environment of its own (``python -m gpustat``)."""
    python_tag = f"{sys.version_info.major}.{sys.version_info.minor}"

    def build(where: Path) -> None:
        venv.create(where, symlinks=True, with_pip=False)
        _run(
            [
                *(sys.executable, "-m", "pip", "--python", where / "bin" / "python", "install", "--no-deps"),
                *("--quiet", "--disable-pip-version-check", "--no-input", "--no-compile", "--no-cache-dir"),
                *(f"{name}=={version}" for name, version in NVML_CLIENTS.items()),
            ],
            what="installing NVML clients from the package index",
        )

    recipe = [NVML_CLIENTS, python_tag, str(Path(sys.executable).resolve())]
    return _directory_for(f"nvml-clients-{python_tag}", recipe, build) / "bin" / "python"


def main(arguments: Sequence[str]) -> int:
    """Print the path of what was asked for, fetching it first."""
    match list(arguments):
        case ["fetch"]:
            if not (cache_root() / "fetched").exists():
                print(
                    "fetching the CUDA compiler, runtimes and CuPy for the tests, about 300 MB",
                    file=sys.stderr,
                )
            cuda_home(), cudart_libraries(), nvrtc_library(), cupy_python(), nvml_clients_python()
            (cache_root() / "fetched").touch()
        case ["nvcc"]:
            print(cuda_home() / "bin" / "nvcc")
        case ["cudart"]:
            for release, library in cudart_libraries().items():
                print(release, library)
        case ["nvrtc"]:
            print(nvrtc_library())
        case ["cupy"]:
            print(cupy_python())
        case ["compile", file, *extra]:
            print(compile_cuda(Path(file), extra=extra))
        case _:
            print(
                "usage: toolchain.py fetch|nvcc|cudart|nvrtc|cupy|compile FILE [NVCC OPTION...]",
                file=sys.stderr,
            )
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
