# SPDX-License-Identifier: Apache-2.0
"""CUDA arrays where host memory is scarce: copies into an array go as boxes, so what does not fit is cut into smaller ones."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.shim.session_host import SessionHost
from vgpu.shim.locate import library_directory

MIB = 1 << 20


@pytest.mark.parametrize("pinned", [0, MIB + MIB // 2, 3 * MIB])
def test_a_small_arena(tmp_path: Path, driver_program: Callable[[str], Path], pinned: int) -> None:
    """Pinned memory takes none, most or all of it."""
    size = str(2 * MIB)
    with SessionHost(
        tmp_path, "--gpu", "software", "--arena-bytes", size, "--registered-bytes", size
    ) as host:
        done = subprocess.run(
            [str(driver_program("cuda_arrays")), str(pinned)],
            env=host.environment(library_directory()),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)
