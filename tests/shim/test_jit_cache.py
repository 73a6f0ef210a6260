# SPDX-License-Identifier: Apache-2.0
"""The compile cache behind its private table: keys, memory, files, limits, damage, concurrency.

Each scene runs in a process of its own, because the driver's variables are read once in a process's life.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.shim import private_library
from tests.shim.private_library import (
    HERE,
    INVALID_HANDLE,
    INVALID_VALUE,
    NOT_FOUND,
    NOT_INITIALIZED,
    SOURCES,
    SUCCESS,
    JitCache,
    PrivateLibrary,
    build_fake_libcuda,
    compile_c,
)

HEADER_SIZE = 80
Operations = list[list[Any]]
Player = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def library_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_libcuda(tmp_path_factory.mktemp("jit"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the entries of this test lie, once there are some."""
    return tmp_path / "cache" / "vgpu-1"


def start(library: Path, tmp_path: Path, operations: Operations, **environment: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FAKE_", "CUDA_"))}
    return subprocess.Popen(
        [sys.executable, private_library.__file__, library, json.dumps(operations)],
        env={**clean, "CUDA_CACHE_PATH": str(tmp_path / "cache"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> list[Any]:
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    outcomes: list[Any] = json.loads(output)
    return outcomes


@pytest.fixture
def play(library_path: Path, tmp_path: Path) -> Player:
    """Runs operations in a fresh process: ``play(*operations, **environment)``."""

    def run(*operations: list[Any], **environment: str) -> list[Any]:
        return finish(start(library_path, tmp_path, list(operations), **environment))

    return run


@pytest.fixture
def cache(library_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JitCache:
    """A cache in this process, with a copy of the library to itself: the loader knows libraries by file."""
    own = tmp_path / "libcuda.so.1"
    own.write_bytes(library_path.read_bytes())
    monkeypatch.setenv("CUDA_CACHE_PATH", str(tmp_path / "cache"))
    for name in ("CUDA_CACHE_DISABLE", "CUDA_CACHE_MAXSIZE"):
        monkeypatch.delenv(name, raising=False)
    return JitCache(PrivateLibrary(own))


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


# ---- keys and memory ----


def test_what_was_stored_is_found(cache: JitCache) -> None:
    assert cache.get(input=b"a") is None
    assert cache.put(b"compiled a", input=b"a") == SUCCESS
    assert cache.get(input=b"a") == b"compiled a"
    assert cache.put(b"again", input=b"a") == SUCCESS
    assert cache.get(input=b"a") == b"again"
    assert cache.put(b"", input=b"empty") == SUCCESS
    assert cache.get(input=b"empty") == b""


def test_everything_that_decides_the_output_is_in_the_key(cache: JitCache) -> None:
    plain: dict[str, Any] = {
        "kind": 2,
        "input": b"ir",
        "options": b"-a",
        "host": b"HOST64",
        "stamp": b"s",
        "sm": 90,
    }
    assert cache.put(b"plain", **plain) == SUCCESS
    others: list[dict[str, Any]] = [
        {"kind": 3},
        {"input": b"iR"},
        {"input": b"ir\0"},
        {"options": b"-b"},
        {"options": b""},
        {"options": None},
        {"host": b"HOST32"},
        {"host": None},
        {"stamp": b"t"},
        {"sm": 100},
        # The same bytes with the seam between two fields elsewhere.
        {"options": b"-aHOST64", "host": b""},
        {"host": b"HOST64s", "stamp": b""},
    ]
    for number, difference in enumerate(others):
        assert cache.get(**{**plain, **difference}) is None, difference
        assert cache.put(b"%d" % number, **{**plain, **difference}) == SUCCESS
    for number, difference in enumerate(others):
        assert cache.get(**{**plain, **difference}) == b"%d" % number
    assert cache.get(**plain) == b"plain"


def test_a_cubin_key_takes_in_the_ptx_key_before_it(cache: JitCache) -> None:
    """NVRTC leaves the options of its first step out of the key of its second."""

    def first_step(options: bytes, input: bytes = b"ir") -> None:
        result, key = cache.open(kind=2, input=input, options=options)
        assert result == SUCCESS
        assert cache.close(key) == SUCCESS

    def second_step() -> dict[str, Any]:
        return {"kind": 1, "input": b"ir", "options": b" -arch=sm_90"}

    first_step(b"-prec-div=1")
    assert cache.put(b"precise", **second_step()) == SUCCESS
    first_step(b"-prec-div=0")
    assert cache.get(**second_step()) is None
    assert cache.put(b"fast", **second_step()) == SUCCESS
    first_step(b"-prec-div=1")
    assert cache.get(**second_step()) == b"precise"
    # A first step for other input has nothing to do with this cubin.
    first_step(b"-prec-div=0", input=b"other")
    assert cache.get(**second_step()) is None


def test_lent_data_outlives_its_key_and_its_replacement(cache: JitCache) -> None:
    assert cache.put(b"first", input=b"a") == SUCCESS
    _, key = cache.open(input=b"a")
    result, address, size = cache.find(key)
    assert result == SUCCESS
    assert cache.find(key)[1] == address, "lent twice, stored once"
    assert cache.store(key, b"second") == SUCCESS
    assert cache.close(key) == SUCCESS
    assert address is not None
    assert ctypes.string_at(address, size) == b"first"
    assert cache.statistics()["lent"] == 2
    assert cache.release(address) == SUCCESS
    assert ctypes.string_at(address, size) == b"first"
    assert cache.release(address) == SUCCESS
    assert cache.release(address) == INVALID_VALUE, "each hit is released once"
    assert cache.release(0x1234) == INVALID_VALUE
    assert cache.release(None) == INVALID_VALUE
    assert cache.statistics()["lent"] == 0
    assert cache.get(input=b"a") == b"second"


def test_bad_arguments_are_errors(cache: JitCache, library_path: Path) -> None:
    _, key = cache.open(input=b"a")
    assert cache.find(None)[0] == INVALID_HANDLE
    assert cache.store(None, b"x") == INVALID_HANDLE
    assert cache.close(None) == INVALID_HANDLE
    # A miss leaves the caller's variables as they were.
    data, size = ctypes.c_void_p(77), ctypes.c_uint32(88)
    assert cache._find(key, 0, ctypes.byref(data), ctypes.byref(size)) == NOT_FOUND
    assert (data.value, size.value) == (77, 88)
    assert cache._find(key, 0, None, ctypes.byref(size)) == INVALID_VALUE
    assert cache._store(key, 0, b"x", 2**32) == INVALID_VALUE, "the look-up could not tell its size"
    assert cache._store(key, 0, None, 1) == INVALID_VALUE
    assert cache._open(None, 2, b"a", 1, b"", b"", b"", 90) == INVALID_VALUE
    assert cache._open(ctypes.byref(data), 2, None, 1, b"", b"", b"", 90) == INVALID_VALUE
    assert cache.close(key) == SUCCESS


# ---- files ----


def test_the_next_process_finds_it_in_a_file(play: Player, folder: Path) -> None:
    assert play(["put", "a", "compiled a"], ["get", "a"]) == [SUCCESS, "compiled a"]
    found, missed, again, counters = play(["get", "a"], ["get", "b"], ["get", "a"], ["statistics"])
    assert (found, missed, again) == ("compiled a", None, "compiled a")
    assert (counters["file_hits"], counters["memory_hits"], counters["misses"]) == (1, 1, 1)
    (entry,) = entries(folder)
    assert entry.stat().st_size == HEADER_SIZE + len("compiled a")


def test_only_the_owner_may_read_whatever_the_umask_is(play: Player, folder: Path, tmp_path: Path) -> None:
    earlier = os.umask(0)
    try:
        assert play(["put", "a", "secret"]) == [SUCCESS]
    finally:
        os.umask(earlier)
    (entry,) = entries(folder)
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700


def test_disabled_means_no_key_and_no_file(play: Player, tmp_path: Path) -> None:
    assert play(["put", "a", "x"]) == [SUCCESS]
    before = sorted(tmp_path.rglob("*"))
    assert play(["put", "b", "x"], ["get", "a"], CUDA_CACHE_DISABLE="1") == [NOT_INITIALIZED, None]
    assert sorted(tmp_path.rglob("*")) == before
    assert play(["get", "a"], CUDA_CACHE_DISABLE="0") == ["x"]


def test_the_default_folder_is_in_the_home(play: Player, tmp_path: Path) -> None:
    assert play(["put", "a", "x"], CUDA_CACHE_PATH="", HOME=str(tmp_path)) == [SUCCESS]
    assert len(entries(tmp_path / ".nv" / "ComputeCache" / "vgpu-1")) == 1
    assert play(["get", "a"], CUDA_CACHE_PATH="", HOME=str(tmp_path)) == ["x"]
    # Without either there is memory alone.
    assert play(["put", "a", "x"], ["get", "a"], CUDA_CACHE_PATH="", HOME="") == [SUCCESS, "x"]
    assert play(["get", "a"], CUDA_CACHE_PATH="", HOME="") == [None]


def damaged(entry: Path) -> Iterator[bytes]:
    """The entry truncated anywhere, grown, and with each interesting byte changed."""
    whole = entry.read_bytes()
    for size in (0, 1, HEADER_SIZE - 1, HEADER_SIZE, len(whole) - 1):
        yield whole[:size]
    yield whole + b"x"
    for position in (0, 8, 16, 47, 48, 79, HEADER_SIZE, len(whole) - 1):
        changed = bytearray(whole)
        changed[position] ^= 1
        yield bytes(changed)
    yield bytes(len(whole))


def test_a_damaged_file_is_a_miss_and_goes(play: Player, folder: Path) -> None:
    assert play(["put", "a", "compiled a"]) == [SUCCESS]
    (entry,) = entries(folder)
    for contents in list(damaged(entry)):
        entry.write_bytes(contents)
        assert play(["get", "a"], ["put", "b", "x"]) == [None, SUCCESS]
        assert not entry.exists()
    assert play(["put", "a", "compiled a"], ["get", "a"]) == [SUCCESS, "compiled a"]
    assert play(["get", "a"]) == ["compiled a"]


def test_the_file_of_another_key_is_a_miss(play: Player, folder: Path) -> None:
    assert play(["put", "a", "compiled a"]) == [SUCCESS]
    (of_a,) = entries(folder)
    assert play(["put", "b", "compiled b"]) == [SUCCESS]
    (of_b,) = [entry for entry in entries(folder) if entry != of_a]
    of_b.write_bytes(of_a.read_bytes())
    assert play(["get", "b"], ["get", "a"]) == [None, "compiled a"]


def test_links_and_other_things_in_the_way_are_left_alone(play: Player, folder: Path, tmp_path: Path) -> None:
    assert play(["put", "a", "compiled a"]) == [SUCCESS]
    (entry,) = entries(folder)
    elsewhere = tmp_path / "elsewhere"
    entry.rename(elsewhere)
    entry.symlink_to(elsewhere)
    assert play(["get", "a"]) == [None]
    assert elsewhere.exists()
    entry.unlink()
    os.mkfifo(entry)
    assert play(["get", "a"]) == [None], "a pipe must not make the program wait"
    entry.unlink()
    entry.mkdir()
    assert play(["get", "a"], ["put", "a", "x"], ["get", "a"]) == [None, SUCCESS, "x"]
    assert entry.is_dir()
    assert [path.name for path in folder.iterdir()] == [entry.name], "no temporary file stays behind"


def test_a_folder_that_others_may_write_to_is_not_used(play: Player, folder: Path) -> None:
    assert play(["put", "a", "x"]) == [SUCCESS]
    for mode in (0o720, 0o702, 0o777):
        folder.chmod(mode)
        assert play(["get", "a"], ["put", "b", "y"], ["get", "b"]) == [None, SUCCESS, "y"]
        assert len(entries(folder)) == 1
    folder.chmod(0o755)
    assert play(["get", "a"]) == ["x"]


def test_a_path_that_cannot_be_is_memory_alone(play: Player, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (str(tmp_path / "file"), str(tmp_path / "file" / "below"), "/" + "x" * 5000, "/dev/null"):
        assert play(["put", "a", "x"], ["get", "a"], CUDA_CACHE_PATH=path) == [SUCCESS, "x"]


def test_a_full_disk_is_memory_alone(play: Player, library_path: Path, tmp_path: Path, folder: Path) -> None:
    """A limit on the size of files stands for the disk: the write breaks off half-way."""
    operations = json.dumps([["put", "a", "x" * 5000], ["get", "a"]])
    done = subprocess.run(
        [
            *("bash", "-c", 'trap "" XFSZ; ulimit -f 1; exec "$@"', "limited"),
            *(sys.executable, private_library.__file__, library_path, operations),
        ],
        env={**os.environ, "CUDA_CACHE_PATH": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [SUCCESS, "x" * 5000]
    assert list(folder.iterdir()) == []
    assert play(["get", "a"]) == [None]


# ---- limits ----


def total(folder: Path) -> int:
    return sum(entry.stat().st_size for entry in entries(folder))


@pytest.mark.parametrize("unused", ["a", "b", "c", "d"])
def test_the_least_recently_used_file_goes_first(play: Player, folder: Path, unused: str) -> None:
    text = "x" * (1000 - HEADER_SIZE)
    for name in "abcd":
        assert play(["put", name, text], CUDA_CACHE_MAXSIZE="4500") == [SUCCESS]
    assert total(folder) == 4000
    for name in "abcd".replace(unused, ""):
        assert play(["get", name]) == [text]
    assert play(["put", "e", text], CUDA_CACHE_MAXSIZE="4500") == [SUCCESS]
    assert total(folder) == 4000
    left = [name for name in "abcde" if play(["get", name]) == [text]]
    assert left == list("abcde".replace(unused, ""))


def test_the_limit_holds_within_one_process_too(play: Player, folder: Path) -> None:
    text = "x" * 920
    puts = [["put", f"input {number}", text] for number in range(40)]
    *results, counters = play(*puts, ["statistics"], CUDA_CACHE_MAXSIZE="10000")
    assert results == [SUCCESS] * 40
    assert 5000 < total(folder) <= 10000
    assert counters["evictions"] == 30, "memory keeps ten of 920 bytes below 10,000"
    assert counters["bytes_in_memory"] == 9200
    (newest, oldest) = play(["get", "input 39"], ["get", "input 0"])
    assert (newest, oldest) == (text, None)


def test_an_entry_above_the_limit_is_not_written(play: Player, tmp_path: Path) -> None:
    assert play(["put", "a", "x" * 1000], CUDA_CACHE_MAXSIZE="1079") == [SUCCESS]
    assert not (tmp_path / "cache").exists()
    assert play(["put", "a", "x" * 1000], CUDA_CACHE_MAXSIZE="1080") == [SUCCESS]
    assert play(["get", "a"]) == ["x" * 1000]


@pytest.mark.parametrize("limit", ["", "many", "-5", "12x", "99999999999999999999999"])
def test_a_limit_that_is_no_number_or_absurd_still_caches(play: Player, folder: Path, limit: str) -> None:
    assert play(["put", "a", "x" * 1000], CUDA_CACHE_MAXSIZE=limit) == [SUCCESS]
    assert play(["get", "a"], CUDA_CACHE_MAXSIZE=limit) == ["x" * 1000]


def test_abandoned_temporary_files_are_swept_up_and_live_ones_are_not(play: Player, folder: Path) -> None:
    assert play(["put", "a", "x"]) == [SUCCESS]
    abandoned, live = folder / ".new-1-0-1-1", folder / ".new-2-0-1-1"
    abandoned.write_text("half")
    os.utime(abandoned, (1, 1))
    live.write_text("half")
    strange = folder / "README"
    strange.write_text("not ours")
    assert play(["put", "b", "x"]) == [SUCCESS]
    assert not abandoned.exists()
    assert live.exists()
    assert strange.exists()


# ---- at once ----


def test_processes_share_a_folder_without_a_wrong_answer(
    library_path: Path, tmp_path: Path, folder: Path
) -> None:
    """Several processes store and look up the same keys under a limit that makes them evict each other's files."""

    def text(number: int) -> str:
        return hashlib.sha256(b"%d" % number).hexdigest() * (number + 1)

    def work(seed: int) -> Operations:
        order = [(seed * 7 + step * 5) % 20 for step in range(60)]
        operations: Operations = []
        for number in order:
            operations += [["get", f"{number}"], ["put", f"{number}", text(number)]]
        return operations

    tasks = {seed: work(seed) for seed in range(6)}
    processes = {
        seed: start(library_path, tmp_path, operations, CUDA_CACHE_MAXSIZE="8000")
        for seed, operations in tasks.items()
    }
    hits = 0
    for seed, process in processes.items():
        for operation, outcome in zip(tasks[seed], finish(process), strict=True):
            if operation[0] == "put":
                assert outcome == SUCCESS
            elif outcome is not None:
                assert outcome == text(int(operation[1]))
                hits += 1
    assert hits > 0
    assert all(len(entry.name) == 64 for entry in folder.iterdir()), "no temporary file stays behind"


def test_a_process_killed_while_storing_leaves_nothing_half_done(
    library_path: Path, tmp_path: Path, play: Player
) -> None:
    text = "y" * 200_000
    killed = 0
    for number in range(6):
        process = start(library_path, tmp_path, [["put_often", "a", "y", 200_000, 1000]])
        try:
            process.communicate(timeout=0.1 + 0.02 * number)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed += 1
        assert play(["get", "a"]) in ([text], [None])
    assert killed > 0, "no process was caught at it"
    assert play(["put_often", "a", "y", 200_000, 1], ["get", "a"]) == [SUCCESS, text]
    assert play(["get", "a"]) == [text]


def test_threads_under_the_thread_sanitizer(tmp_path: Path) -> None:
    stress = compile_c(
        tmp_path / "stress",
        [HERE / "private_stress.c", HERE / "fake_libcuda.c", *SOURCES],
        *("-O1", "-fsanitize=thread"),
    )
    done = subprocess.run(
        [stress],
        env={**os.environ, "CUDA_CACHE_PATH": str(tmp_path / "cache"), "CUDA_CACHE_MAXSIZE": "8000"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel's address layout is too random for the installed ThreadSanitizer")
    assert done.returncode == 0, done.stderr
    assert "WARNING: ThreadSanitizer" not in done.stderr
    assert "evictions" in done.stdout


def test_a_forked_child_has_an_empty_memory_and_the_files(cache: JitCache, library_path: Path) -> None:
    assert cache.put(b"compiled", input=b"a") == SUCCESS
    _, key = cache.open(input=b"a")
    _, lent, _ = cache.find(key)
    child = os.fork()
    if child == 0:
        cache._library.library.fake_fork_child()
        fresh = not any(cache.statistics().values())
        found = cache.get(input=b"a") == b"compiled" and cache.statistics()["file_hits"] == 1
        harmless = cache.release(lent) == INVALID_VALUE and cache.close(key) == SUCCESS
        os._exit(0 if fresh and found and harmless else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert cache.release(lent) == SUCCESS
    assert cache.close(key) == SUCCESS
