# SPDX-License-Identifier: Apache-2.0
"""Memory in a VM, where the arena may be smaller than what is copied: real library, real worker, fake driver, fake device."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.gpu.replay.guest import build_fake_driver
from tests.shim.fake_device import FIRST_SLOT, KIB, MIB, FakeDevice
from tests.shim.fake_host import short_folder
from tests.shim.pci_guest import UNCACHED, build_library, environment, until
from tests.shim.worker_device import WorkerHost

HERE = Path(__file__).parent
SMALLEST, SMALL, USUAL = MIB, 2 * MIB - 64 * KIB, 32 * MIB - 64 * KIB
Run = Callable[..., dict[str, int]]


@pytest.fixture(scope="module")
def fake_memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A libcuda over host memory that checks addresses as the real one does."""
    return build_fake_driver(tmp_path_factory.mktemp("fake"), "fake_memory.c")


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


@pytest.fixture
def run(folder: Path, fake_memory: Path) -> Run:
    """Compile a program of ``c/``, run it as a guest of a device, and see it end well; what its worker's grant page held."""

    def compile_and_run(
        program: str,
        *words: object,
        slot_size: int,
        slots: int = 2,
        options: tuple[str, ...] = (),
        **more: str,
    ) -> dict[str, int]:
        library = build_library(*options)
        binary = folder / program
        command = ["gcc", "-std=gnu11", "-O1", "-g", str(HERE / "c" / f"{program}.c"), "-o", str(binary)]
        subprocess.run([*command, f"-L{library}", "-l:libcuda.so.1", "-pthread"], check=True)
        host = WorkerHost(folder, ("--gpu", "nvidia", "--library", str(fake_memory)))
        try:
            with FakeDevice(folder, host, slots=slots, slot_size=slot_size, sealed=True) as device:
                done = subprocess.run(
                    [str(binary), *map(str, words)],
                    cwd=folder,
                    env=environment(folder, LD_LIBRARY_PATH=str(library), **more),
                    capture_output=True,
                    text=True,
                    timeout=200,
                    check=False,
                )
                assert done.stderr == ""
                assert (done.returncode, done.stdout) == (0, "all as expected\n")
                until(lambda: device.states() == [0] * slots)
                assert device.problems == []
                assert (device.stores["OWNER"], device.stores["RELEASE"]) == (1, 1)
                # What lies before the slots is nobody's to write but a claimant's name.
                assert device.memory[: 16 * KIB] == bytes(16 * KIB)
                left = device.memory[FIRST_SLOT : FIRST_SLOT + slot_size]
                assert left == bytes(slot_size)
            return host.sessions[0].grant.snapshot()
        finally:
            host.close()

    return compile_and_run


@pytest.mark.parametrize(("slot_size", "threads"), [(SMALLEST, 1), (SMALLEST, 4), (SMALL, 3), (USUAL, 4)])
def test_random_copies_agree_with_a_model(run: Run, slot_size: int, threads: int) -> None:
    left = run("memory_data", 5, 60, threads, slot_size=slot_size)
    assert left["protocol_errors"] == left["replay_errors"] == 0
    assert left["memory_used_bytes"] == 0


def test_random_copies_agree_with_a_model_where_the_arena_is_not_cached(run: Run) -> None:
    assert run("memory_data", 6, 60, 4, slot_size=USUAL, options=(UNCACHED,))["replay_errors"] == 0


def test_random_copies_agree_with_a_model_when_nothing_is_pinned(run: Run) -> None:
    left = run("memory_data", 7, 60, 2, slot_size=USUAL, VGPU_PINNED="ordinary")
    assert left["replay_errors"] == 0


def test_codes_are_the_real_drivers(run: Run) -> None:
    assert run("memory_codes", slot_size=USUAL)["protocol_errors"] == 0


def test_pinned_memory_beyond_the_arena(run: Run) -> None:
    left = run("pci_pinned", slot_size=SMALL)
    assert left["protocol_errors"] == left["replay_errors"] == 0


@pytest.mark.parametrize("slot_size", [SMALLEST, SMALL])
def test_many_threads_share_a_small_arena(run: Run, slot_size: int) -> None:
    assert run("pci_threads", 24, slot_size=slot_size)["replay_errors"] == 0
