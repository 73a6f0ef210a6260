# SPDX-License-Identifier: Apache-2.0
"""A driver-API program through library, ring and worker; every answer compared with what the real driver answered.

``tests/data/code_program`` holds the output of ``c/code_program.c`` on an H200 with driver 580, natively. Through this
project on the same machine it is the same, line by line (``clusters`` included). Here the device is the software GPU, and
where that differs it is listed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.shim.session_host import SessionHost
from vgpu.shim.locate import library_directory

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SHIM = ROOT / "shim" / "libcuda"
RECORDED = HERE.parent / "data" / "code_program"
SECONDS = 120
Run = Callable[..., list[str]]

# Answers of the software GPU that are its own: (line of the real driver, line here).
OWN_ANSWERS = {
    "images": {
        ("bad PTX: 218", "bad PTX: 0"),  # it compiles a kernel when it is first wanted
        ("log says something: 1", "log says something: 0"),
    },
    "link": {("an ELF: 1", "an ELF: 0")},  # what it links stays PTX
}
HERE_TOO = sorted(p.stem for p in RECORDED.glob("*.txt") if p.stem != "clusters")


def compiled(name: str, sources: list[Path], *options: str) -> Path:
    """The program, compiled when its sources or the library's have changed since an earlier run."""
    folder = ROOT / ".cache" / "code-tests"
    folder.mkdir(parents=True, exist_ok=True)
    arguments = ["-std=gnu11", "-D_GNU_SOURCE", "-g", "-O1", "-pthread", f"-I{SHIM}", *options]
    key = hashlib.sha256(repr(arguments).encode())
    for source in [*sources, *sorted(SHIM.glob("*.h")), *sorted((ROOT / "transport").glob("*.h"))]:
        key.update(source.read_bytes())
    product = folder / f"{name}-{key.hexdigest()[:16]}"
    if not product.exists():
        for old in folder.glob(f"{name}-*"):
            old.unlink()
        subprocess.run(["gcc", *arguments, *map(str, sources), "-o", f"{product}.new", *options], check=True)
        os.rename(f"{product}.new", product)
    return product


@pytest.fixture(scope="module")
def program() -> Path:
    library = library_directory() / "libcuda.so.1"
    return compiled("code_program", [HERE / "c" / "code_program.c"], str(library))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SessionHost]:
    # A short path: sockets have no room for more.
    with SessionHost(tmp_path_factory.mktemp("s"), "--gpu", "software") as made:
        yield made


@pytest.fixture
def run(program: Path, host: SessionHost) -> Run:
    def section(name: str) -> list[str]:
        environment = host.environment(library_directory())
        done = subprocess.run(
            [program, name], env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == ""
        return done.stdout.splitlines()

    return section


@pytest.mark.parametrize("section", HERE_TOO)
def test_answers_are_those_of_the_real_driver(run: Run, section: str) -> None:
    recorded = (RECORDED / f"{section}.txt").read_text().splitlines()
    own, seen = OWN_ANSWERS.get(section, set()), set()
    found = run(section)
    for expected, line in zip(recorded, found, strict=True):
        if line == expected:
            continue
        assert (expected, line) in own, f"{line!r} instead of {expected!r}"
        seen.add((expected, line))
    assert seen == own  # what has been mended leaves the list


def test_handles_that_are_gone(run: Run) -> None:
    """Natively these calls are undefined, and some crash; a guest is answered, and its worker lives."""
    assert run("stale") == [
        "== stale",
        "cuModuleUnload(m): 400",
        'cuModuleGetFunction(&f, m, "nothing"): 400',
        "run(f, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL): 400",
        "run((CUfunction)0x1234567890, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL): 400",
        "cuGraphLaunch((CUgraphExec)0x7777777777, NULL): 1",
        "cuGraphDestroy((CUgraph)module): 1",
        'cuModuleLoadData(&m, "\\001\\002\\003\\004"): 200',
        'cuModuleLoadData(&m, ""): 200',
        "cuLibraryUnload((CUlibrary)m): 400",
        "cuGraphDestroyNode(node): 1",
        "cuGraphDestroy(inner): 1",
        "cuGraphExecDestroy(exec): 1",
        "cuGraphLaunch(exec, NULL): 1",
        "cuGraphDestroy(graph): 1",
        "cuGraphNodeGetType(child, &type): 400",
        "cuGraphAddEmptyNode(&node, inner, NULL, 0): 1",
        "cuLinkDestroy((CUlinkState)m): 400",
        "run(nothing, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL): 201",
        "run(nothing, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL): 0",
        "cuCtxSynchronize(): 0",
    ]


def test_a_whole_section_takes_few_records(run: Run, host: SessionHost) -> None:
    """Questions are answered in the guest once a function is known. Counted by the worker."""
    run("occupancy")
    grant = host.sessions[-1].grant
    assert grant.get("records") < 60
    assert grant.get("protocol_errors") == 0


def test_threads_under_thread_sanitizer(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The segment lies where ThreadSanitizer lets a program map memory."""
    sources = [HERE / "c" / "code_threads.c", *sorted(SHIM.glob("*.c"))]
    binary = compiled("code_threads", sources, "-fsanitize=thread")
    small = ["--arena-bytes", str(64 << 20), "--registered-bytes", str(16 << 20), "--address", str(1 << 38)]
    with SessionHost(tmp_path_factory.mktemp("t"), "--gpu", "software", *small) as made:
        environment = made.environment(library_directory()) | {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
        done = subprocess.run(
            [binary], env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-4000:]
