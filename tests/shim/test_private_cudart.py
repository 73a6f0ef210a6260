# SPDX-License-Identifier: Apache-2.0
"""Stock CUDA runtimes and a stock NVRTC against the private half: the judges that no description of ours can replace.

The library they find is a throw-away libcuda.so.1 with the real tables (c/fake_libcuda.c), so what is shown here is that the
runtimes accept the tables, not that a GPU computes.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shim.private_library import HERE, STATISTICS, TABLES, build_fake_libcuda, compile_c
from tests.toolchain import CUDART_RELEASES

SOFTWARE_VALIDITY_NOT_ESTABLISHED = 103

# Tables without which no release starts; CONTEXT_CHECKS and the tools context became mandatory later.
MANDATORY = ("cudart", "hooks", "tls", "storage", "integrity")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("cudart")
    build_fake_libcuda(where)
    compile_c(where / "probe", [HERE / "cudart_probe.c"], "-O1", "-ldl")
    return where


@pytest.fixture(params=CUDART_RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def cudart(release: str, cudart_libraries: dict[str, Path]) -> Path:
    return cudart_libraries[release]


def version_of(release: str) -> tuple[int, int]:
    major, minor = release.split(".")
    return int(major), int(minor)


def run_probe(
    folder: Path, cudart: Path, where: str = "main", *, clean_exit: bool = True, **environment: str
) -> list[list[str]]:
    """The probe's lines, as words. It has to end by itself with status 0: exit is part of what is tested.

    Not so (``clean_exit=False``) where a table is refused: the runtime's own exit handler then crashes over what it had not
    finished setting up.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FAKE_", "CUDA_"))}
    done = subprocess.run(
        [folder / "probe", cudart, where],
        env={**clean, "LD_LIBRARY_PATH": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if clean_exit:
        assert done.returncode == 0, f"status {done.returncode}: {done.stdout}{done.stderr}"
    return [line.split() for line in done.stdout.splitlines()]


WORKS = [["malloc", "0"], ["free", "0"], ["reset", "0"], ["malloc", "0"], ["free", "0"]]


@pytest.mark.parametrize("where", ["main", "thread", "fork"])
def test_a_stock_runtime_counts_one_device_and_uses_it(folder: Path, cudart: Path, where: str) -> None:
    assert run_probe(folder, cudart, where) == [["count", "0", "1"], *WORKS]


@pytest.mark.parametrize("devices", [2, 8])
def test_a_stock_runtime_counts_several_devices(folder: Path, cudart: Path, devices: int) -> None:
    lines = run_probe(folder, cudart, FAKE_DEVICES=str(devices))
    assert lines == [["count", "0", str(devices)], *WORKS]


@pytest.mark.parametrize("what", ["version", "uuid", "pci", "count"])
def test_a_spoiled_digest_is_refused_by_the_runtime(folder: Path, cudart: Path, what: str) -> None:
    (line,) = run_probe(folder, cudart, FAKE_SPOIL=what)
    assert line[:2] == ["count", str(SOFTWARE_VALIDITY_NOT_ESTABLISHED)]


def test_a_reset_runs_the_runtimes_destructors(folder: Path, cudart: Path, tmp_path: Path) -> None:
    """After a reset the runtime starts over with the context: it retains again, so it forgot what it had stored."""
    log = tmp_path / "log"
    run_probe(folder, cudart, FAKE_LOG=str(log))
    events = [line for line in log.read_text().splitlines() if not line.startswith(("table", "refused"))]
    reset = events.index("reset 0")
    assert "retain 0" in events[:reset]
    assert events[reset + 1 : reset + 3] == ["retain 0", "alloc 2048"]


@pytest.mark.parametrize("name", MANDATORY)
def test_each_mandatory_table_is_one(folder: Path, cudart: Path, name: str) -> None:
    """Were this to pass without the table, the suite would prove nothing about the table."""
    (line,) = run_probe(folder, cudart, clean_exit=False, FAKE_REFUSE=TABLES[name])
    assert line[:2] == ["count", "1"], "the runtime hands on the code it was refused with"


@pytest.mark.parametrize(("name", "since"), [("checks", (13, 0)), ("tools_context", (13, 4))])
def test_later_releases_need_two_more_tables(
    folder: Path, cudart: Path, release: str, name: str, since: tuple[int, int]
) -> None:
    lines = run_probe(folder, cudart, clean_exit=False, FAKE_REFUSE=TABLES[name])
    assert lines[0][:2] == ["count", "1" if version_of(release) >= since else "0"]


def test_starting_a_runtime_calls_no_refused_slot(folder: Path, cudart: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    run_probe(folder, cudart, FAKE_LOG=str(log))
    refused = {line for line in log.read_text().splitlines() if line.startswith("refused")}
    # The one table that is asked for and refused; releases since 12.9 go on without it.
    assert refused <= {"refused cuGetExportTable f8cff95121468b4eb9e2fb469e7c0dd9"}


# ---- NVRTC ----

SOURCE = b"""
extern "C" __global__ void k(float *a, float b) { a[threadIdx.x] = sqrtf(b / a[1]) * b + a[2]; }
"""
OPTIONS = [
    ["-arch=sm_90"],
    ["-arch=sm_90", "--prec-div=false"],
    ["-arch=sm_90", "--prec-sqrt=false"],
    ["-arch=sm_90", "--ftz=true"],
    ["-arch=sm_90", "--use_fast_math"],
    ["-arch=sm_90", "--fmad=false"],
    ["-arch=compute_90"],
]


def compile_all(nvrtc_path: str, libcuda_path: str) -> dict[str, object]:
    """Compile :data:`SOURCE` with each set of options: digests of the results, and the cache's counters."""
    driver = ctypes.CDLL(libcuda_path)
    nvrtc = ctypes.CDLL(nvrtc_path)
    digests = []
    for options in OPTIONS:
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), SOURCE, b"k.cu", 0, None, None) == 0
        words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        assert nvrtc.nvrtcCompileProgram(program, len(options), words) == 0
        kind = "PTX" if "compute" in options[0] else "CUBIN"
        assert getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)) == 0
        output = ctypes.create_string_buffer(size.value)
        assert getattr(nvrtc, f"nvrtcGet{kind}")(program, output) == 0
        digests.append(hashlib.sha256(output.raw).hexdigest())
        assert nvrtc.nvrtcDestroyProgram(ctypes.byref(program)) == 0
    counters = (ctypes.c_uint64 * len(STATISTICS))()
    driver.fake_jit_statistics(counters)
    return {"digests": digests, **dict(zip(STATISTICS, counters, strict=True))}


def run_nvrtc(folder: Path, nvrtc: Path, cache: Path, **environment: str) -> dict[str, object]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FAKE_", "CUDA_"))}
    done = subprocess.run(
        [sys.executable, __file__, nvrtc, folder / "libcuda.so.1"],
        env={
            **clean,
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            "LD_LIBRARY_PATH": f"{folder}:{nvrtc.parent}",
            "CUDA_CACHE_PATH": str(cache),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_nvrtc_compiles_once_and_gets_the_same_code_again(
    folder: Path, nvrtc_library: Path, tmp_path: Path
) -> None:
    """Seven compilations that differ in options alone, some of which NVRTC leaves out of the key of its last step."""
    without = run_nvrtc(folder, nvrtc_library, tmp_path / "none", CUDA_CACHE_DISABLE="1")
    assert without["stores"] == 0
    assert not (tmp_path / "none").exists()

    cold = run_nvrtc(folder, nvrtc_library, tmp_path / "cache")
    # Six cubins take two steps each; the PTX alone shares its step with the first of them.
    assert (cold["misses"], cold["stores"], cold["memory_hits"]) == (12, 12, 1)
    warm = run_nvrtc(folder, nvrtc_library, tmp_path / "cache")
    assert (warm["misses"], warm["stores"], warm["file_hits"], warm["memory_hits"]) == (0, 0, 12, 1)
    assert cold["lent"] == warm["lent"] == 0, "NVRTC released every hit"

    digests = without["digests"]
    assert isinstance(digests, list)
    assert len(set(digests)) == len(OPTIONS)
    assert cold["digests"] == digests
    assert warm["digests"] == digests


if __name__ == "__main__":
    json.dump(compile_all(sys.argv[1], sys.argv[2]), sys.stdout)
