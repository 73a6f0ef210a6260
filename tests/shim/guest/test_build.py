# SPDX-License-Identifier: Apache-2.0
"""build.sh, the bundle and the vgpu-guest command; and that every script is plain sh."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.shim.guest.staging import GUEST, ROOT, SHELL
from vgpu import __version__
from vgpu.guest_main import build_parser, installer, script_words
from vgpu.shim import guest_bundle

SCRIPTS = sorted(GUEST.glob("*.sh"))


# ---- plain sh


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    subprocess.run([SHELL, "-n", str(script)], check=True)
    if shutil.which("shellcheck") is not None:
        done = subprocess.run(
            ["shellcheck", "-S", "warning", "-s", "sh", str(script)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == ""


def test_scripts_need_coreutils_alone() -> None:
    """A minimal VM has no awk, and need not have sed, grep or find."""
    words = re.compile(
        r"(?:^|[|;&({!]|\$\(|\b(?:then|do|else|if)) *(awk|sed|grep|find|xargs|perl|python3?|bash) "
    )
    found = [
        f"{path.name}: {line.strip()}"
        for path in SCRIPTS
        for line in path.read_text().splitlines()
        if words.search(line) and not line.lstrip().startswith("#")
    ]
    assert found == []


# ---- one list of sources


def test_globs_are_those_of_cmake() -> None:
    cmake = (ROOT / "CMakeLists.txt").read_text()
    for program in re.findall(r"foreach\(program ([\w ]+)\)", cmake):
        cmake += "".join(f"/shim/guest/{name}*.c " for name in program.split())
    globs = re.findall(r"(?:sources|without)='(shim/[^']+)'", (GUEST / "build.sh").read_text())
    assert len(globs) >= 7
    for glob in globs:
        # nvidia-smi's sources are filtered by a regular expression there.
        assert glob in cmake or f"{glob.rpartition('/')[2].removesuffix('*.c')}[^/]*\\\\.c" in cmake, glob


def test_build_makes_each_part_that_it_names(tmp_path: Path) -> None:
    """Small sources of the same layout: quick, and a new file is seen."""
    for name, text in {
        "shim/libcuda/one.c": "int cuInit(void); int cuOther(void); int cuInit(void) { return cuOther(); }",
        "shim/libcuda/two.c": "int cuOther(void); __attribute__((visibility(\"default\"))) int cuOther(void) { return 7; }",
        "shim/libcuda/libcuda.map": "{ global: cu*; local: *; };",
        "shim/libnvidia_ml/a.c": "int nvmlInit(void); __attribute__((visibility(\"default\"))) int nvmlInit(void) { return 0; }",
        "shim/libnvidia_ml/libnvidia_ml.map": "{ global: nvml*; local: *; };",
        "shim/libnvidia_ml/nvidia_smi.c": "int main(void) { return 3; }",
        "shim/exec/e.c": "int e;",
        "shim/guest/agent.c": "int helper(void); int main(void) { return helper(); }",
        "shim/guest/agent_more.c": "int helper(void); int helper(void) { return 4; }",
        "shim/guest/probe.c": "int main(void) { return 5; }",
    }.items():  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    shutil.copy(GUEST / "build.sh", tmp_path / "shim/guest")
    script, out = tmp_path / "shim/guest/build.sh", tmp_path / "out"
    subprocess.run([SHELL, str(script), "-o", str(out)], check=True, capture_output=True)
    assert {path.name for path in out.iterdir()} == {*guest_bundle.PARTS, "libcuda.so", "libnvidia-ml.so"}
    status = [subprocess.run([str(out / name)], check=False).returncode for name in guest_bundle.PARTS[3:]]
    assert status == [3, 4, 5]
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", str(out / "libcuda.so.1")], capture_output=True, text=True, check=True
    )
    assert "cuOther" in symbols.stdout
    assert (
        "SONAME"
        in subprocess.run(
            ["readelf", "-d", str(out / "libcuda.so.1")], capture_output=True, text=True, check=True
        ).stdout
    )

    (tmp_path / "shim/exec/e.c").write_text("this is no C\n")
    failed = subprocess.run([SHELL, str(script), "-o", str(out)], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "libvgpu-exec.so: FAILED" in failed.stderr
    (tmp_path / "shim/exec/e.c").unlink()
    assert (
        subprocess.run(
            [SHELL, str(script), "-o", str(out), "libvgpu-exec"], capture_output=True, check=False
        ).returncode
        == 1
    )


def test_without_a_compiler_it_says_which_packages() -> None:
    environment = {**os.environ, "CC": "no-such-compiler"}
    done = subprocess.run(
        [SHELL, str(GUEST / "build.sh")], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, "gcc libc6-dev" in done.stderr) == (1, True)


# ---- the bundle


@pytest.fixture
def shim(tmp_path: Path, parts: Path) -> Path:
    """This room as a checkout has it, with built parts."""
    root = tmp_path / "checkout"
    for folder in guest_bundle.SOURCES:
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    native = root / "build" / "native"
    native.mkdir(parents=True)
    for part in guest_bundle.PARTS:
        shutil.copy(parts / part, native)
    return root / "shim"


def test_a_bundle_unpacks_to_what_the_installer_needs(shim: Path, tmp_path: Path) -> None:
    content = guest_bundle.bundle_files(shim, "9.9")
    data = guest_bundle.archive_bytes("vgpu-guest-9.9", content)
    assert data == guest_bundle.archive_bytes("vgpu-guest-9.9", guest_bundle.bundle_files(shim, "9.9"))
    archive = tmp_path / "b.tar.gz"
    archive.write_bytes(data)
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    folder = tmp_path / "vgpu-guest-9.9"
    done = subprocess.run(
        [str(folder / "install.sh"), "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "install.sh 9.9\n"
    # Both ways: with what was built, and from source.
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=folder / "prebuilt", check=True)
    built = subprocess.run(
        [SHELL, str(folder / "shim/guest/build.sh"), "-o", str(tmp_path / "out"), "vgpu-guest-agent", "vgpu-guest-probe", "libvgpu-exec"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    for room in ("libcuda", "libnvidia_ml"):
        assert {path.name for path in (folder / "shim" / room).iterdir()} == {
            path.name for path in (ROOT / "shim" / room).iterdir() if path.suffix in {".c", ".h", ".map"}
        }


def test_every_header_that_sources_include_is_in_the_bundle(shim: Path) -> None:
    names = {Path(name).name for name in guest_bundle.bundle_files(shim, "1")}
    for path in guest_bundle.sources(ROOT):
        for header in re.findall(r'^#include "([^"]+)"', (ROOT / path).read_text(), re.MULTILINE):
            assert Path(header).name in names, f"{path} includes {header}"


def test_scripts_of_the_bundle_are_all_there_are() -> None:
    assert set(guest_bundle.SCRIPTS) == {path.name for path in SCRIPTS}


def test_no_bundle_of_half_a_build(shim: Path) -> None:
    (shim.parent / "build/native/nvidia-smi").unlink()
    with pytest.raises(guest_bundle.BundleError, match="nvidia-smi; run `make build` first"):
        guest_bundle.bundle_files(shim, "1")


def test_the_c_library_that_a_binary_needs() -> None:
    assert (
        guest_bundle.glibc_needed([b"\0GLIBC_2.2.5\0GLIBC_2.34\0", b"GLIBC_2.9\0GLIBC_PRIVATE\0"]) == "2.34"
    )
    assert guest_bundle.glibc_needed([b""]) == "2.17"


# ---- the command


def test_the_command_understands_what_the_script_does() -> None:
    """Every option that install.sh takes can be given to vgpu-guest, and arrives."""
    script = installer().read_text()
    (cases,) = re.findall(r"^while \[ \$# -gt 0 \]; do\n(.*?)^done$", script, re.MULTILINE | re.DOTALL)
    taken = set(re.findall(r"--[a-z-]+", cases)) - {
        "--check",
        "--uninstall",
        "--version",
        "--help",
        "--no-root",
        "--json",
    }
    words = [
        "install",
        "--with-ollama",
        "--ollama-archive",
        "f",
        "--group",
        "g",
        "--build",
        "--force",
        "--dry-run",
    ]
    options = build_parser().parse_args([*words, "--prefix", "/x", "--no-root"])
    handed = script_words(options)
    assert handed[0] == "install"
    assert {word.partition("=")[0] for word in handed[1:]} == taken
    assert "--prefix=/x" in handed
    assert script_words(build_parser().parse_args(["check", "--json"])) == ["check", "--json"]


def test_the_command_runs_the_script(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "vgpu.guest_main", "check", "--prefix", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "remedy: vgpu-guest install" in done.stdout
    version = subprocess.run(
        [SHELL, str(installer()), "--version"], capture_output=True, text=True, check=True
    )
    assert version.stdout == f"install.sh {__version__}\n"


@pytest.mark.parametrize(
    ("words", "status"), [(["--version"], 0), (["--help"], 0), ([], 2), (["frobnicate"], 2)]
)
def test_words(words: list[str], status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "vgpu.guest_main", *words], capture_output=True, check=False
    )
    assert done.returncode == status


# ---- the chapter in docs/


def test_the_chapter_keeps_to_the_scripts() -> None:
    """Every option, place and line of `check` that it names exists; every option of the scripts is in it."""
    chapter = (ROOT / "docs" / "vm" / "guest.md").read_text()
    code = "".join(path.read_text() for path in SCRIPTS)
    for status, item in re.findall(r"`(FAIL|WARN) (\w+)`", chapter):
        says = "fail" if status == "FAIL" else "doubt"
        assert re.search(rf"\b{says} {item}\b|ask_library \w+ {item}\b", code), item
    for place in re.findall(r"`(/(?:etc|var)/[\w./-]+)`", chapter):
        assert place.rstrip("/") in code, place
    usage = subprocess.run(
        [SHELL, str(installer()), "--help"], capture_output=True, text=True, check=True
    ).stdout
    for option in re.findall(r"^  (--[a-z-]+)", usage, re.MULTILINE):
        assert option in chapter or option in ("--version", "--help"), option
