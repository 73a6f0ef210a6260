# SPDX-License-Identifier: Apache-2.0
"""Memory nodes of graphs from a guest program's side: real library, real ring, real worker, the software GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.gpu.replay.guest import until
from tests.shim.session_host import SessionHost
from tests.shim.test_code_program import SHIM, compiled
from vgpu.shim.locate import library_directory

HERE = Path(__file__).parent
MIB = 1 << 20


def _run(folder: Path, *words: str, memory_limit: int = 0) -> dict[str, int]:
    """Run ``c/graph_memory.c`` as a guest and see it end well; the grant page as it left it."""
    library = library_directory() / "libcuda.so.1"
    program = compiled("graph_memory", [HERE / "c" / "graph_memory.c"], str(library))
    with SessionHost(folder, "--gpu", "software", memory_limit=memory_limit) as host:
        done = subprocess.run(
            [program, *words],
            env=host.environment(library_directory()),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "all as expected\n", "")
        session = host.sessions[0]
        assert until(lambda: session.worker.poll() is not None)
        return session.grant.snapshot()


@pytest.mark.parametrize("memory_limit", [0, 64 * MIB])
def test_memory_nodes(tmp_path: Path, memory_limit: int) -> None:
    left = _run(tmp_path, memory_limit=memory_limit)
    assert left["memory_used_bytes"] == 0
    assert left["protocol_errors"] == 0


def test_quota(tmp_path: Path) -> None:
    left = _run(tmp_path, "quota", memory_limit=64 * MIB)
    assert left["memory_used_bytes"] == 0
    assert left["memory_peak_bytes"] == 64 * MIB


def test_ranges_that_share_addresses() -> None:
    sources = [HERE / "c" / "graph_ranges.c", SHIM / "graph_memory.c", SHIM / "memory_map.c"]
    done = subprocess.run([compiled("graph_ranges", sources)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "all as expected\n")
