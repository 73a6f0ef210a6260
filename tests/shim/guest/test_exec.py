# SPDX-License-Identifier: Apache-2.0
"""libvgpu-exec.so with real children: every member of the exec family, environments made afresh, set-uid programs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
TAKING = (
    "execve",
    "execvpe",
    "execle",
    "fexecve",
    "execveat",
    "execveat-empty",
    "posix_spawn",
    "posix_spawnp",
    "vfork",
)
INHERITING = ("execv", "execvp", "execl", "execlp", "system", "popen")

# Prints its arguments and the environment, and ends with a status of its own.
CHILD = r"""
#include <stdio.h>
extern char **environ;
int main(int count, char **arguments)
{
    for (int i = 1; i < count; i++) printf("argument=%s\n", arguments[i]);
    for (char **entry = environ; *entry != NULL; entry++) puts(*entry);
    return 42;
}
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``family``, which starts children, and ``child``, which shows what it got."""
    folder = tmp_path_factory.mktemp("programs")
    compiler = ["gcc", "-D_GNU_SOURCE", "-O1", "-Wall", "-o"]
    subprocess.run([*compiler, str(folder / "family"), str(HERE / "c" / "exec_family.c")], check=True)
    subprocess.run([*compiler, str(folder / "child"), "-x", "c", "-"], input=CHILD, text=True, check=True)
    return folder


def start(
    library: Path,
    programs: Path,
    member: str,
    mode: str = "fresh",
    child: Path | None = None,
    **environment: str,
) -> dict[str, str]:
    """The environment that a child got; its arguments and status are checked."""
    done = subprocess.run(
        [str(programs / "family"), member, str(child or programs / "child"), mode],
        env={"LD_PRELOAD": str(library), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (42, "")
    lines = done.stdout.splitlines()
    assert lines[:2] == ["argument=a", "argument=b"]
    names = [line.partition("=")[0] for line in lines[2:]]
    assert len({name for name in names if name != "X"}) == len([name for name in names if name != "X"])
    return dict(line.split("=", 1) for line in lines[2:])


@pytest.fixture(scope="module")
def library(parts: Path) -> Path:
    return parts / "libvgpu-exec.so"


@pytest.mark.parametrize("member", [*TAKING, *INHERITING])
def test_a_fresh_environment_gets_what_it_lacks(library: Path, programs: Path, member: str) -> None:
    got = start(library, programs, member, VGPU_VM="mine", VGPU_RUN_DIR="/it's here", OTHER="dropped")
    assert got.pop("OWN") == "1"
    for name in ("PATH", "PWD", "_", "SHLVL", "OLDPWD"):  # of the members that search, and of the shell
        got.pop(name, None)
    assert got == {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(library.parent),
        "VGPU_VM": "mine",
        "VGPU_RUN_DIR": "/it's here",
    }


@pytest.mark.parametrize("member", [*TAKING, *INHERITING])
def test_values_of_the_callers_own_stay(library: Path, programs: Path, member: str) -> None:
    got = start(library, programs, member, "theirs", VGPU_VM="mine", VGPU_LOG="1")
    assert got["LD_LIBRARY_PATH"] == f"{library.parent}:/theirs:/more"
    assert got["LD_PRELOAD"] == str(library)  # theirs was empty: no colon, no empty entry
    assert (got["VGPU_VM"], got["VGPU_LOG"], got["OWN"]) == ("theirs", "1", "1")


@pytest.mark.parametrize("member", ["execve", "posix_spawn", "vfork"])
def test_no_environment_at_all(library: Path, programs: Path, member: str) -> None:
    assert start(library, programs, member, "null") == {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(library.parent),
    }


@pytest.mark.parametrize("member", ["execve", "posix_spawnp", "vfork", "execlp", "system"])
def test_an_environment_too_big_for_the_stack(library: Path, programs: Path, member: str) -> None:
    got = start(library, programs, member, "huge", VGPU_VM="mine")
    assert (got["LD_LIBRARY_PATH"], got["VGPU_VM"], got["X"]) == (str(library.parent), "mine", "1")


@pytest.mark.parametrize("member", ["execve", "posix_spawn", "system"])
def test_it_can_be_told_to_keep_out(library: Path, programs: Path, member: str) -> None:
    got = start(library, programs, member, "off", VGPU_VM="mine")
    assert got["VGPU_EXEC"] == "0"
    assert not {"LD_PRELOAD", "LD_LIBRARY_PATH", "VGPU_VM"} & set(got)


@pytest.mark.parametrize(
    "member", ["execve", "execvp", "posix_spawnp", "fexecve", "execveat-empty", "execveat"]
)
@pytest.mark.parametrize("bits", [0o4755, 0o2755])
def test_a_privileged_program_gets_what_the_caller_gave(
    library: Path, programs: Path, tmp_path: Path, member: str, bits: int
) -> None:
    child = tmp_path / "child"
    shutil.copy(programs / "child", child)
    child.chmod(bits)
    got = start(library, programs, member, child=child, VGPU_VM="mine")
    assert set(got) - {"PATH"} == {"OWN"}


def test_the_second_generation_carries_it_too(library: Path, programs: Path) -> None:
    """A child that was started with a fresh environment has the library, and so do its own children."""
    command = f"env -i OWN=1 {programs}/child a b"
    done = subprocess.run(
        ["env", "-i", "/bin/sh", "-c", f"{command}; exit $?"],
        env={"LD_PRELOAD": str(library), "PATH": os.environ["PATH"], "VGPU_VM": "mine"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 42
    assert {f"LD_PRELOAD={library}", f"LD_LIBRARY_PATH={library.parent}", "VGPU_VM=mine", "OWN=1"} <= set(
        done.stdout.splitlines()
    )


def test_scripts_without_a_first_line_still_run(library: Path, programs: Path, tmp_path: Path) -> None:
    """execvp falls back to the shell where the kernel refuses; so it does with the library."""
    script = tmp_path / "child"
    script.write_text(f'exec {programs}/child "$@"\n')
    script.chmod(0o755)
    got = start(library, programs, "execvp", child=script)
    assert got["LD_LIBRARY_PATH"] == str(library.parent)


def test_errors_are_the_callers(library: Path, programs: Path) -> None:
    done = subprocess.run(
        [str(programs / "family"), "execve", "/nonexistent/child", "huge"],
        env={"LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (93, "execve: No such file or directory\n")


def test_a_shells_own_unset_is_undone_but_its_children_are_told(library: Path, programs: Path) -> None:
    """What the head of the library promises: VGPU_EXEC=0 is the way out, unset is not."""
    for way, kept in (
        ("unset LD_LIBRARY_PATH;", True),
        ("unset LD_LIBRARY_PATH; export VGPU_EXEC=0;", False),
    ):
        done = subprocess.run(
            ["/bin/sh", "-c", f"{way} {programs}/child a b"],
            env={
                "LD_PRELOAD": str(library),
                "LD_LIBRARY_PATH": str(library.parent),
                "PATH": os.environ["PATH"],
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert (f"LD_LIBRARY_PATH={library.parent}" in done.stdout.splitlines()) is kept
