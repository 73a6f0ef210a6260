# SPDX-License-Identifier: Apache-2.0
"""Where our libcuda.so.1 lies: in the installed package, or in a checkout's build folder."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

LIBRARY = "libcuda.so.1"


class ShimNotBuilt(RuntimeError):
    """There is no library to put before NVIDIA's; the message says how to build it."""


def library_directory() -> Path:
    """The folder to put first in a guest program's LD_LIBRARY_PATH.

    Raises:
        ShimNotBuilt: the library is in none of the places where it can be.
    """
    package = Path(str(files("vgpu.shim"))).resolve()
    # A checkout's build is newer than what an editable install left in the package.
    for folder in (package.parent / "build" / "native", package / "lib"):
        if (folder / LIBRARY).exists():
            return folder
    raise ShimNotBuilt(f"{LIBRARY} is not built; run `make build` (looked in {package / 'lib'})")
