# SPDX-License-Identifier: Apache-2.0
"""How commands end where they cannot say what they found, or were given what is none of theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.e2e.vm_device import DeviceMediator
from tests.src.test_commands import command

ADMIN, TRACE = "vgpu.admin_main", "vgpu.trace_main"


@pytest.fixture(scope="module")
def mediator() -> Iterator[DeviceMediator]:
    with DeviceMediator() as running:
        running.call("register_vm", vm_name="user1")
        yield running


def into(output: str, mediator: DeviceMediator, module: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run it with its standard output going there."""
    with open(output, "w") as out:
        return subprocess.run(
            [sys.executable, "-P", "-m", module, *words],
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
            env={**os.environ, "VGPU_RUN_DIR": str(mediator.run_dir)},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (ADMIN, ["list-vms"]),
        (ADMIN, ["list-vms", "--json"]),
        (ADMIN, ["show-metrics"]),
        (ADMIN, ["doctor"]),
        (ADMIN, ["doctor", "--json"]),
        (ADMIN, ["top", "--once", "--interval=0.1"]),
        (TRACE, ["tree", "--once"]),
        (TRACE, ["top", "--once", "--interval=0.1"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_disk_that_is_full_is_told(mediator: DeviceMediator, module: str, words: list[str]) -> None:
    done = into("/dev/full", mediator, module, *words)
    name = {ADMIN: "vgpu-admin", TRACE: "vgpu-trace"}[module]
    assert done.returncode == 1
    assert done.stderr == f"{name}: cannot write to standard output: No space left on device\n"


@pytest.mark.parametrize("module", [ADMIN, TRACE])
def test_a_reader_that_has_gone_is_no_failure(mediator: DeviceMediator, module: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as out:
        done = subprocess.run(
            [sys.executable, "-P", "-m", module, "tree", *(["--once"] if module == TRACE else [])],
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
            env={**os.environ, "VGPU_RUN_DIR": str(mediator.run_dir)},
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


EVERY = pytest.mark.parametrize(
    ("module", "name"),
    [
        (ADMIN, "vgpu-admin"),
        (TRACE, "vgpu-trace"),
        ("vgpu.mediator_main", "run-mediator"),
        ("vgpu.run_main", "vgpu-run"),
        ("vgpu.guest_main", "vgpu-guest"),
    ],
)
ABOUT = pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["--print-completion", "bash"]], ids=" ".join
)


def say_into(module: str, words: list[str], out: IO[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", module, *words],
        stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip


@EVERY
@ABOUT
def test_words_about_a_command_that_cannot_be_written_are_told(
    module: str, name: str, words: list[str]
) -> None:
    with open("/dev/full", "w") as out:
        done = say_into(module, words, out)
    assert (done.returncode, done.stderr) == (
        1,
        f"{name}: cannot write to standard output: No space left on device\n",
    )


@EVERY
@ABOUT
def test_a_reader_of_words_about_a_command_may_go(module: str, name: str, words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as out:
        done = say_into(module, words, out)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_help_of_a_subcommand_that_cannot_be_written_is_told() -> None:
    with open("/dev/full", "w") as out:
        done = say_into(ADMIN, ["register-vm", "--help"], out)
    assert done.returncode == 1
    assert done.stderr == "vgpu-admin: cannot write to standard output: No space left on device\n"


def test_wrong_use_is_wrong_use_wherever_the_output_goes() -> None:
    with open("/dev/full", "w") as out:
        done = say_into(ADMIN, ["--no-such-option"], out)
    assert done.returncode == 2
    assert "cannot write" not in done.stderr


# -- what is no recording


HEAD = json.dumps({"vgpu_trace": 1, "started_ns": 1, "pid": 1})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x7fELF\x02\x01\x01\xff\xfe\x80", "this is not text; vgpu-trace record --raw writes"),
        (b"", "line 1: no JSON; vgpu-trace record --raw writes"),
        (b"[1, 2]\n", "line 1: not the head of a recording of this version"),
        (f"{HEAD}\nnonsense\n".encode(), "line 2: no JSON"),
        (b'{"vgpu_trace": 1}\n', "not as a recording is written (KeyError: "),
        (f'{HEAD[:-1]}, "sessions": [5]}}\n'.encode(), "not as a recording is written (TypeError: "),
        (f'{HEAD}\n["worker", 1, "####"]\n'.encode(), "line 2: not a piece of a worker's trace"),
    ],
)
def test_what_is_no_recording_is_not_converted(tmp_path: Path, data: bytes, message: str) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out.json"
    raw.write_bytes(data)
    done = command(TRACE, "convert", raw, out)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"vgpu-trace: {raw}: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [raw]


def test_a_recording_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = command(TRACE, "convert", tmp_path / "nothing", tmp_path / "out.json")
    assert (done.returncode, done.stderr) == (
        1,
        f"vgpu-trace: {tmp_path}/nothing: No such file or directory\n",
    )


# -- times and names that cannot be meant


@pytest.mark.parametrize("text", ["1e300", "86401", "0", "-1", "nan", "inf", "soon"])
@pytest.mark.parametrize(
    ("module", "words"), [(TRACE, ["top", "--interval"]), (TRACE, ["tree", "--interval"]), (TRACE, ["record", "--seconds"]), (ADMIN, ["top", "--interval"])]
)  # fmt: skip
def test_times_that_cannot_be_meant(module: str, words: list[str], text: str) -> None:
    from vgpu import admin_main, trace_main

    main = {ADMIN: admin_main.main, TRACE: trace_main.main}[module]
    with pytest.raises(SystemExit) as end:
        main([*words[:-1], f"{words[-1]}={text}"])
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("vm", "status", "message"),
    [
        ("usr1", 1, "VM 'usr1' is not known: names like it: user1"),
        ("", 2, "the VM's name is '', expected 1 to 63 of letters"),
        ("a/b", 2, "the VM's name is 'a/b', expected"),
    ],
)
def test_a_vm_that_is_not_there_is_not_recorded(
    mediator: DeviceMediator, tmp_path: Path, vm: str, status: int, message: str
) -> None:
    done = command(
        TRACE, "record", "--seconds=1", f"--vm={vm}", "-o", tmp_path / "out.json",
        VGPU_RUN_DIR=str(mediator.run_dir),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []
