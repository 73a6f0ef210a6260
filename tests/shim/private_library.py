# SPDX-License-Identifier: Apache-2.0
"""Builds the shim's private half for tests and reaches its tables, slot by slot, through ctypes.

The library is tests/shim/c/fake_libcuda.c over the real sources. Run as a script it plays a list of cache operations in a
process of its own: ``private_library.py LIBRARY '[["store", {...}], ...]'`` prints one JSON list of outcomes.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
SHIM = ROOT / "shim" / "libcuda"
HERE = Path(__file__).resolve().parent / "c"
SOURCES = [
    SHIM / f"{name}.c"
    for name in (
        "md2",
        "sha256",
        "integrity_check",
        "context_storage",
        "jit_cache",
        "jit_cache_files",
        "private_slots",
        "private_tables",
    )
]
FLAGS = ["-std=gnu11", "-g", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-pthread", f"-I{SHIM}"]

SUCCESS = 0
INVALID_VALUE = 1
NOT_INITIALIZED = 3
DEINITIALIZED = 4
INVALID_DEVICE = 101
INVALID_CONTEXT = 201
INVALID_HANDLE = 400
NOT_FOUND = 500
NOT_SUPPORTED = 801

# Memory order, as cuGetExportTable takes them.
TABLES = {
    "cudart": "6bd5fb6c5bf4e74a8987d93912fd9df9",
    "tls": "42d85a8123f6cb478298f6e78a3aecdc",
    "hooks": "a094798c2e742e7493f20800200c0a66",
    "storage": "c693336e1121df11a8c368f355d89593",
    "checks": "263e88607cd2614392f6bbd5006dfa7e",
    "integrity": "d4082055bde6704b8d34ba123c66e1f2",
    "tools_context": "21318c60971432488ca641ff7324c8f2",
    "tools_module": "6e163fbeb958444d835ce182aff1991e",
    "topology": "1734dc26800d47458726c0f1e7dd8bca",
    "jit_cache": "da9151d33ae6cc41a5c04f26d533e328",
}


def compile_c(output: Path, sources: Sequence[Path], *flags: str) -> Path:
    """Compile and link with the shim's own warning flags; a failure shows what the compiler said."""
    command = ["gcc", *FLAGS, *map(str, sources), *flags, "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output


def build_fake_libcuda(folder: Path) -> Path:
    """``folder/libcuda.so.1``: fit for ctypes and for a runtime that finds it through ``LD_LIBRARY_PATH``."""
    return compile_c(
        folder / "libcuda.so.1",
        [HERE / "fake_libcuda.c", *SOURCES],
        *("-O1", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1"),
    )


class PrivateLibrary:
    """One loaded copy of the fake libcuda, its tables and its test entry points."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.fake_refused_name.restype = ctypes.c_char_p
        self.library.fake_set_current.argtypes = [ctypes.c_void_p]
        self.library.fake_context_dropped.argtypes = [ctypes.c_void_p]

    def table_result(self, uuid: str) -> tuple[int, int | None]:
        """What cuGetExportTable returns and stores; the out pointer starts as rubbish."""
        table = ctypes.c_void_p(0xDEAD)
        result = self.library.cuGetExportTable(ctypes.byref(table), bytes.fromhex(uuid))
        return result, table.value

    def table(self, name: str) -> int:
        """Address of a served table."""
        result, address = self.table_result(TABLES[name])
        assert result == SUCCESS
        assert address is not None
        return address

    def words(self, name: str, count: int) -> list[int]:
        """The first words of a table."""
        return list((ctypes.c_uint64 * count).from_address(self.table(name)))

    def slot(self, name: str, number: int, *argument_types: Any, result: Any = ctypes.c_int) -> Any:
        """A callable slot."""
        address = self.words(name, number + 1)[number]
        assert address != 0, f"{name}[{number}] is null"
        return ctypes.CFUNCTYPE(result, *argument_types)(address)

    def last_refused(self) -> str:
        """The name under which the last refusal was counted."""
        name: bytes = self.library.fake_refused_name(0)
        return name.decode()

    def refused_count(self) -> int:
        """How many refusals were counted."""
        count: int = self.library.fake_refused_count()
        return count


# The fields of ``struct vgpu_jit_cache_statistics``, each a u64.
STATISTICS = ("memory_hits", "file_hits", "misses", "stores", "evictions", "bytes_in_memory", "lent")


class JitCache:
    """The compile cache as NVRTC drives it: open, find, store, release, close."""

    def __init__(self, library: PrivateLibrary) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int
        text, size = ctypes.c_char_p, ctypes.c_size_t
        self._library = library
        self._open = library.slot("jit_cache", 1, pointer, number, text, size, text, text, text, number)
        self.close = library.slot("jit_cache", 2, pointer)
        self._find = library.slot("jit_cache", 3, pointer, number, pointer, pointer)
        self._store = library.slot("jit_cache", 4, pointer, number, text, size)
        self.release = library.slot("jit_cache", 6, pointer)

    def open(
        self,
        *,
        kind: int = 2,
        input: bytes = b"ir",
        options: bytes | None = b" -arch=compute_90",
        host: bytes | None = b"HOST64",
        stamp: bytes | None = b"today",
        sm: int = 90,
    ) -> tuple[int, int | None]:
        """Result and key."""
        key = ctypes.c_void_p()
        result = self._open(ctypes.byref(key), kind, input, len(input), options, host, stamp, sm)
        return result, key.value

    def find(self, key: int | None) -> tuple[int, int | None, int]:
        """Result, address and size of the data."""
        data = ctypes.c_void_p()
        size = ctypes.c_uint32()
        result = self._find(key, 0, ctypes.byref(data), ctypes.byref(size))
        return result, data.value, size.value

    def store(self, key: int | None, data: bytes) -> int:
        """Result."""
        result: int = self._store(key, 0, data, len(data))
        return result

    def statistics(self) -> dict[str, int]:
        """The counters, by name."""
        counters = (ctypes.c_uint64 * len(STATISTICS))()
        self._library.library.fake_jit_statistics(counters)
        return dict(zip(STATISTICS, counters, strict=True))

    def put(self, data: bytes, **key: Any) -> int:
        """Open, store, close; the result of the store, or of the open where that failed."""
        result, opened = self.open(**key)
        if result != SUCCESS:
            return result
        result = self.store(opened, data)
        assert self.close(opened) == SUCCESS
        return result

    def get(self, **key: Any) -> bytes | None:
        """Open, find, copy, release, close; None on a miss."""
        result, opened = self.open(**key)
        if result != SUCCESS:
            return None
        result, address, size = self.find(opened)
        copy = None
        if result == SUCCESS:
            assert address is not None
            copy = ctypes.string_at(address, size)
            assert self.release(address) == SUCCESS
        else:
            assert result == NOT_FOUND
        assert self.close(opened) == SUCCESS
        return copy


def play(library: Path, operations: list[list[Any]]) -> list[Any]:
    """Run ``["put", input, text]``, ``["put_often", input, letter, size, times]``, ``["get", input]``, ``["statistics"]`` on a new library."""
    cache = JitCache(PrivateLibrary(library))
    outcomes: list[Any] = []
    for operation in operations:
        match operation:
            case ["put", input, text]:
                outcomes.append(cache.put(text.encode(), input=input.encode()))
            case ["put_often", input, letter, size, times]:
                outcomes += [cache.put(letter.encode() * size, input=input.encode()) for _ in range(times)]
            case ["get", input]:
                found = cache.get(input=input.encode())
                outcomes.append(None if found is None else found.decode())
            case ["statistics"]:
                outcomes.append(cache.statistics())
            case _:
                raise ValueError(f"unknown operation {operation!r}")
    return outcomes


if __name__ == "__main__":
    json.dump(play(Path(sys.argv[1]), json.loads(sys.argv[2])), sys.stdout)
