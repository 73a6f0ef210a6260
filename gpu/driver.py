# SPDX-License-Identifier: Apache-2.0
"""Which driver a worker puts behind the vtable: the host's real libcuda, found by path, or the software GPU.

The library that guests load is called libcuda.so.1 too, and this project puts it on library paths. So a
candidate is looked into before it is taken; loading our own would make a worker its own guest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path

# Words of the guest library that NVIDIA's does not hold, and the size beyond which a file cannot be ours.
GUEST_MARKER = b"VGPU_RUN_DIR"
GUEST_LIBRARY_AT_MOST = 16 << 20

# Where distributions, containers and NixOS put the driver's library.
USUAL_FOLDERS = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/lib/x86_64-linux-gnu",
    "/usr/local/nvidia/lib64",
    "/usr/local/nvidia/lib",
    "/usr/lib/wsl/lib",
    "/usr/lib/x86_64-linux-gnu/nvidia/current",
    "/usr/lib64/nvidia",
    "/run/opengl-driver/lib",
)
NVML = "libnvidia-ml.so.1"
KERNEL_MODULE_VERSION = Path("/sys/module/nvidia/version")
CONTROL_DEVICE = Path("/dev/nvidiactl")


class Kind(Enum):
    """What stands behind the vtable."""

    NVIDIA = "nvidia"
    SOFTWARE = "software"


class DriverNotFound(Exception):
    """There is no usable libcuda; the message says where it was looked for."""


def is_guest_library(path: Path) -> bool:
    """Is this file the library that guests load? Reads the file if it is small enough to be."""
    return path.stat().st_size <= GUEST_LIBRARY_AT_MOST and GUEST_MARKER in path.read_bytes()


def library_folders() -> list[str]:
    """Where the driver's library may be: the usual places, then where the loader was told to look."""
    told = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    return [*USUAL_FOLDERS, *(folder for folder in told if folder)]


def find_library(given: Path | None = None, folders: Iterable[str | Path] | None = None) -> Path:
    """The real libcuda: the given path, else ``libcuda.so.1`` in the first folder that has one.

    ``folders``: where to look, else ``library_folders``.

    Raises:
        DriverNotFound: nothing there, or only the guest library.
    """
    if given is not None:
        if not given.is_file():
            raise DriverNotFound(f"{given} is not a file")
        if is_guest_library(given):
            raise DriverNotFound(f"{given} is this project's guest library, not a driver")
        return given.resolve()
    seen = []
    for folder in library_folders() if folders is None else folders:
        candidate = Path(folder) / "libcuda.so.1"
        seen.append(str(candidate))
        if candidate.is_file() and not is_guest_library(candidate):
            return candidate.resolve()
    raise DriverNotFound("no libcuda.so.1 of a driver among " + ", ".join(seen))


def _loader_folders() -> Iterator[Path]:
    """Where the loader would look: the library path, then its cache."""
    import subprocess

    for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":"):
        if folder.startswith("/"):
            yield Path(folder)
    for program in ("/sbin/ldconfig", "/usr/sbin/ldconfig"):
        if not os.access(program, os.X_OK):
            continue
        try:
            done = subprocess.run([program, "-p"], capture_output=True, text=True, timeout=5, check=False)
        except (OSError, subprocess.SubprocessError):
            continue
        for line in done.stdout.splitlines():
            name, arrow, path = line.partition(" => ")
            if arrow and name.split()[:1] == [NVML] and "x86-64" in name:
                yield Path(path.strip()).parent
        return


def find_nvml(libcuda: Path | None = None, folders: Callable[[], Iterable[Path]] = _loader_folders) -> Path:
    """The host's libnvidia-ml.so.1: beside ``libcuda``, else in ``folders``, else where drivers are put.

    Raises:
        DriverNotFound: there is none, or only the one that guests load.
    """

    def candidates() -> Iterator[Path]:
        if libcuda is not None:
            yield libcuda.parent
        yield from folders()
        yield from map(Path, USUAL_FOLDERS)

    for folder in candidates():
        path = folder / NVML
        try:
            if path.is_file() and not is_guest_library(path):
                return path.resolve()
        except OSError:
            continue
    raise DriverNotFound(f"this host has no {NVML} of a driver")


def choose(wanted: str, library: Path | None = None) -> tuple[Kind, Path | None]:
    """Resolve ``auto``, ``nvidia`` or ``software`` to a kind and, for nvidia, the library's path.

    ``auto`` is the real GPU where both library and kernel driver are present, else the software one.

    Raises:
        DriverNotFound: nvidia was asked for and is not there.
        ValueError: an unknown word.
    """
    if wanted == "software":
        return Kind.SOFTWARE, None
    if wanted == "nvidia":
        return Kind.NVIDIA, find_library(library)
    if wanted != "auto":
        raise ValueError(f"gpu is {wanted!r}, expected auto, nvidia or software")
    try:
        found = find_library(library)
    except DriverNotFound:
        return Kind.SOFTWARE, None
    if library is None and not CONTROL_DEVICE.exists():
        return Kind.SOFTWARE, None
    return Kind.NVIDIA, found


def version_text(library: Path) -> str:
    """The driver's release, e.g. ``580.159.04``: from the kernel module, else from the library's file name."""
    if KERNEL_MODULE_VERSION.exists():
        return KERNEL_MODULE_VERSION.read_text().strip()
    match = re.search(r"\.so\.(\d+\.\d+(?:\.\d+)?)$", library.resolve().name)
    return match.group(1) if match else ""
