# SPDX-License-Identifier: Apache-2.0
"""What every committed file keeps to: a licence line, no place of one machine, no binary, generated files current."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE_SUFFIXES = {".py", ".pyi", ".c", ".h", ".cu", ".cuh", ".cpp", ".sh", ".cmake"}
SOURCE_NAMES = {"Makefile", "CMakeLists.txt"}
LICENCE = "SPDX-License-Identifier: Apache-2.0"
# A path that only one machine has, or the name of a package host (where packages come from is pip's configuration).
PLACES = re.compile(
    r"""(?<![\w.$}<>~*-])/(?:work|root|home/\w+|Users/\w+)/[\w.]"""
    r"""|\b(?:pypi\.org|pythonhosted\.org|anaconda\.org|test\.pypi)\b"""
)


def tracked_files() -> list[Path]:
    """The files that git has, except links; in an unpacked source archive there is no such list."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip("this is not a git checkout")
    files = [ROOT / name for name in listing.stdout.split("\0") if name]
    return [path for path in files if path.is_file() and not path.is_symlink()]


def is_source(path: Path) -> bool:
    return path.suffix in SOURCE_SUFFIXES or path.name in SOURCE_NAMES or path.read_bytes()[:2] == b"#!"


def test_every_source_file_names_its_licence() -> None:
    sources = [path for path in tracked_files() if is_source(path)]
    assert len(sources) > 20
    without = [
        str(path.relative_to(ROOT))
        for path in sources
        if path.stat().st_size > 0 and LICENCE not in "\n".join(path.read_text().splitlines()[:5])
    ]
    assert without == []


def test_no_file_is_binary() -> None:
    assert [str(path.relative_to(ROOT)) for path in tracked_files() if b"\0" in path.read_bytes()] == []


def test_no_file_holds_a_place_of_one_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked_files()
        if path != Path(__file__).resolve() and path.name != "LICENSE"
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if PLACES.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    # The marks are taken out below, so that this file itself holds none of these.
    ["see /w*ork/shared/x", '"/r*oot/.venv/bin"', "cd /h*ome/someone/src", "https://py*pi.org/simple"],
)
def test_a_place_is_found(line: str) -> None:
    line = line.replace("*", "")
    assert PLACES.search(line)


@pytest.mark.parametrize(
    "line", ["src/work/queue.py", "$HOME/x", "/home/", "at the root/top", "a/root/b", "~/root/x"]
)
def test_an_ordinary_path_is_not(line: str) -> None:
    assert not PLACES.search(line)


@pytest.mark.parametrize("generator", ["tools/gen_calls.py", "tools/gen_nvml.py", "tools/gen_metrics.py"])
def test_generated_files_are_current(generator: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / generator, "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"run {generator} and commit what it writes\n{done.stdout}{done.stderr}"
