# SPDX-License-Identifier: Apache-2.0
"""Memory, streams and events from a guest program's side: real library, real ring, real worker, fake device.

The programs in ``c/memory_*.c`` check themselves; what they expect was measured on a real GPU, and they pass there too
(but for the lines that say what a guest is refused).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.replay.guest import until
from tests.shim.session_host import SessionHost
from vgpu.shim.locate import library_directory

HERE = Path(__file__).parent
MIB = 1 << 20
Run = Callable[..., dict[str, int]]


@pytest.fixture(scope="module")
def fake_memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A libcuda over host memory that checks addresses as the real one does."""
    library = tmp_path_factory.mktemp("fake") / "libcuda.so.1"
    source = HERE.parent / "gpu" / "replay" / "fake_memory.c"
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-O1",
        "-pthread",
        str(source),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    return library


@pytest.fixture
def run(tmp_path: Path, fake_memory: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Compile a program of ``c/``, run it as a guest, and see it end well; the grant page as it left it."""

    def compile_and_run(
        program: str,
        *words: object,
        environment: dict[str, str] | None = None,
        sanitized: Path | None = None,
        **host_options: Any,
    ) -> dict[str, int]:
        binary = tmp_path / program
        folder = sanitized or library_directory()
        command = ["gcc", "-std=gnu11", "-O1", "-g", str(HERE / "c" / f"{program}.c"), "-o", str(binary)]
        command += [f"-L{folder}", "-l:libcuda.so.1", "-pthread"]
        subprocess.run([*command, *(["-fsanitize=thread"] if sanitized else [])], check=True)
        for name, value in (environment or {}).items():
            monkeypatch.setenv(name, value)
        arena = ["--arena-bytes", str(512 * MIB), "--registered-bytes", str(16 * MIB)]
        if sanitized:  # where the sanitizer lets an application map things
            arena += ["--address", "0x7ea000000000"]
        with SessionHost(
            tmp_path, "--gpu", "nvidia", "--library", str(fake_memory), *arena, **host_options
        ) as host:
            done = subprocess.run(
                [str(binary), *map(str, words)],
                env=host.environment(folder),
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.stderr == ""
            assert (done.returncode, done.stdout) == (0, "all as expected\n")
            session = host.sessions[0]
            assert until(lambda: session.worker.poll() is not None)  # the guest is gone, and so is its worker
            return {**session.grant.snapshot(), "segment_bytes": os.fstat(session.segment_fd).st_blocks * 512}

    return compile_and_run


def test_codes_are_the_real_drivers(run: Run) -> None:
    left = run("memory_codes")
    assert left["memory_used_bytes"] == 0
    assert left["protocol_errors"] == 0


def test_pointer_attributes_are_local_and_the_real_drivers(run: Run) -> None:
    left = run("memory_attributes")
    # Allocations and mappings are all that was sent: 250 queries made no record.
    assert left["records"] <= 16


@pytest.mark.parametrize(("seed", "threads"), [(1, 1), (2, 4), (3, 2)])
def test_random_copies_agree_with_a_model(run: Run, seed: int, threads: int) -> None:
    left = run("memory_data", seed, 120, threads)
    assert left["replay_errors"] == 0
    assert left["memory_used_bytes"] == 0
    assert left["fences_issued"] >= 0
    assert left["bytes_to_device"] > 40 * MIB
    assert left["bytes_from_device"] > 40 * MIB


def test_random_copies_agree_with_a_model_on_a_device_that_cannot_write_fences(run: Run) -> None:
    left = run("memory_data", 4, 80, 2, environment={"FAKE_NO_WRITES": "1"})
    assert left["replay_errors"] == 0


def test_pinned_memory_grows_and_comes_back(run: Run) -> None:
    left = run("memory_pinned")
    assert left["memory_used_bytes"] == 0
    # It touched 200 MiB at a time; long pieces went back to the system when they were free.
    assert left["segment_bytes"] < 150 * MIB


def test_quota_holds_for_every_way_to_allocate(run: Run) -> None:
    left = run("memory_quota", memory_limit=64 * MIB)
    assert left["memory_used_bytes"] == 0
    assert left["memory_peak_bytes"] == 64 * MIB


def test_error_of_an_asynchronous_copy_is_reported_once(run: Run) -> None:
    assert run("memory_deferred", environment={"FAKE_FAIL_COPY": "2"})["replay_errors"] == 1


def test_fault_reaches_everybody_who_waits(run: Run) -> None:
    run("memory_fault", environment={"FAKE_FAULT_COPY": "0"})


def test_random_copies_by_four_threads_have_no_data_race(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "sanitized"
    folder.mkdir()
    shim = HERE.parent.parent / "shim" / "libcuda"
    command = ["gcc", "-std=gnu11", "-D_GNU_SOURCE", "-O1", "-g", "-fPIC", "-shared", "-fsanitize=thread"]
    command += ["-fvisibility=hidden", "-pthread", *map(str, sorted(shim.glob("*.c")))]
    command += ["-o", str(folder / "libcuda.so.1"), "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, f"-Wl,--version-script={shim / 'libcuda.map'}", "-ldl"], check=True)
    assert run("memory_data", 3, 30, 4, sanitized=folder)["memory_used_bytes"] == 0


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_table_and_shared_copy_hold_under_threads(tmp_path: Path, sanitizer: str) -> None:
    binary = tmp_path / "stress"
    shim = HERE.parent.parent / "shim" / "libcuda"
    sources = [HERE / "c" / "memory_stress.c"]
    sources += [shim / name for name in ("memory_map.c", "copy_threads.c", "shared_copy.c")]
    command = ["gcc", "-std=gnu11", "-D_GNU_SOURCE", "-O1", "-g", f"-fsanitize={sanitizer}", "-pthread"]
    subprocess.run([*command, *map(str, sources), "-o", str(binary)], check=True)
    done = subprocess.run([str(binary)], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "all as expected\n"), done.stderr
