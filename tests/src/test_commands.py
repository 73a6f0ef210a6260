# SPDX-License-Identifier: Apache-2.0
"""run-mediator and vgpu-run as people and shells meet them: statuses, help, versions, refusals, completion."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vgpu import __version__
from vgpu.completion import programs
from vgpu.run_main import why_no_gpu

MEDIATOR, RUN = "vgpu.mediator_main", "vgpu.run_main"
BOTH = pytest.mark.parametrize(("module", "name"), [(MEDIATOR, "run-mediator"), (RUN, "vgpu-run")])


def command(module: str, *words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", module, *map(str, words)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "VGPU_SOFTWARE_MEMORY": str(1 << 30), **environment},
    )  # fmt: skip


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short-named: socket paths are limited to 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="vgpu-", dir="/tmp") as name:
        yield Path(name)


# -- words about itself


@BOTH
def test_version(module: str, name: str) -> None:
    done = command(module, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{name} {__version__}\n", "")


@BOTH
def test_help_says_every_option_and_has_examples(module: str, name: str) -> None:
    done = command(module, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {name} ")
    examples = done.stdout.partition("examples:\n")[2]
    assert len(re.findall(rf"^  {name} ", examples, re.MULTILINE)) >= 2
    options = ["--run-dir", "--print-completion"]
    if module == MEDIATOR:
        options += [
            "--gpu",
            "--device",
            "--state-dir",
            "--config",
            "--metrics",
            "--log-level",
            "--log-format",
        ]
    for option in options:
        # The option, its value's name or choices, and words about it, on that line or the next.
        assert re.search(rf"^  {option} \S+\s+\w+", done.stdout, re.MULTILINE), option


# -- wrong use is 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--no-such-option"], "unrecognized arguments"),
        (["--gpu", "amd"], "invalid choice: 'amd'"),
        (["--device", "one"], "--device is 'one', expected numbers like 0 or 0,1"),
        (["--device", "0,0"], "expected device numbers, each once"),
        (["--gpu", "software", "--device", "0,1"], "--device is 0,1, but the software GPU is one device: use --device 0"),
        (["--gpu", "software", "--device", "1"], "use --device 0"),
        (["--metrics", "9400"], "metrics is '9400', expected HOST:PORT like 127.0.0.1:9400"),
        (["--metrics", "localhost:http"], "the port 'http' is not a number from 0 to 65535"),
        (["--config", "/nonexistent/mediator.toml"], "/nonexistent/mediator.toml"),
    ],
)  # fmt: skip
def test_a_mediator_told_what_cannot_be_meant_ends_with_2(
    folder: Path, words: list[str], message: str
) -> None:
    places: list[str | Path] = ["--run-dir", folder / "run", "--state-dir", folder / "state"]
    done = command(MEDIATOR, *places, *words, XDG_CONFIG_HOME=str(folder))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('gpu = "software"\ndevices = [1]\n', "line 3: devices is [1], but the software GPU is one device: use devices = [0]"),
        (f'gpu = "software"\n\nrun_dir = "/tmp/{"x" * 110}"\n', f"line 4: run_dir is '/tmp/{'x' * 110}', too long for sockets"),
    ],
)  # fmt: skip
def test_what_comes_out_later_is_told_with_its_line_too(folder: Path, text: str, message: str) -> None:
    (folder / "m.toml").write_text(f"[mediator]\n{text}")
    done = command(MEDIATOR, "--config", folder / "m.toml", "--state-dir", folder / "s", VGPU_RUN_DIR="")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"run-mediator: {folder}/m.toml, {message}"), done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", [[], ["--"], ["--vm", "user1"], ["--no-such-option", "true"]])
def test_vgpu_run_without_a_program_ends_with_2(words: list[str]) -> None:
    done = command(RUN, *words)
    assert done.returncode == 2
    assert "usage: vgpu-run" in done.stderr


# -- failure is 1


def test_a_mediator_without_the_gpu_it_needs_ends_with_1(folder: Path) -> None:
    done = command(MEDIATOR, "--gpu", "nvidia", "--library", "/nonexistent/libcuda.so.1", "--run-dir", folder)
    assert done.returncode == 1
    assert "/nonexistent/libcuda.so.1 is not a file; use --gpu software" in done.stderr


@pytest.mark.parametrize("in_file", [False, True])
def test_a_mediator_whose_metrics_port_is_taken_ends_with_2(folder: Path, in_file: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (folder / "m.toml").write_text(f'[mediator]\nmetrics = "127.0.0.1:{port}"\n')
        words = ["--config", folder / "m.toml"] if in_file else ["--metrics", f"127.0.0.1:{port}"]
        done = command(
            MEDIATOR, "--gpu", "software", "--run-dir", folder / "r", "--state-dir", folder / "s", *words
        )
    assert (done.returncode, done.stdout) == (2, "")
    place = f"{folder}/m.toml, line 2: " if in_file else ""
    assert done.stderr == (
        f"run-mediator: {place}metrics cannot be served at 127.0.0.1:{port}: Address already in use;"
        " end what listens there (ss -ltnp shows it), or name another port\n"
    )
    assert not list(folder.glob("**/*.sock"))


def test_vgpu_run_of_a_program_that_is_not_there_ends_with_1(folder: Path) -> None:
    done = command(RUN, "--run-dir", folder, "--", "no-such-program")
    assert done.returncode == 1
    assert "vgpu-run: cannot run no-such-program: No such file" in done.stderr
    assert f"no mediator at {folder}; start run-mediator" in done.stderr


def _nothing_there(path: Path) -> None:
    pass


def _left_by_a_killed_mediator(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as mediator:
        mediator.bind(str(path))
        mediator.listen()


@pytest.mark.parametrize("make", [_nothing_there, _left_by_a_killed_mediator, Path.touch])
def test_vgpu_run_says_where_nobody_listens(folder: Path, make: Callable[[Path], None]) -> None:
    make(folder / "mediator.sock")
    done = command(RUN, "--run-dir", folder, "--", "true")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == (
        f"vgpu-run: no mediator at {folder}; start run-mediator, or set VGPU_RUN_DIR."
        " The program will see no GPU.\n"
    )


@pytest.fixture
def as_nobody() -> Iterator[int]:
    """The user for whom a folder is closed: nobody, where the tests are root's."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield os.geteuid()
    os.seteuid(user)


def test_a_mediator_that_is_out_of_reach_is_said(folder: Path, as_nobody: int) -> None:
    # The folder is closed for everybody but its owner, who may be root, and closed even for him who made it if not.
    if folder.stat().st_uid == as_nobody:
        folder.chmod(0)
    try:
        assert why_no_gpu(folder / "run") == f"user {as_nobody} may not reach the mediator at {folder}/run"
    finally:
        if folder.stat().st_uid == as_nobody:
            folder.chmod(0o700)


# -- success is 0, and the program's own status


@pytest.mark.parametrize("status", [0, 7])
def test_vgpu_run_ends_as_its_program_does(folder: Path, status: int) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as mediator:
        mediator.bind(str(folder / "mediator.sock"))
        mediator.listen()
        mediator.setblocking(False)
        done = command(
            RUN, "--run-dir", folder, "--vm", "user1", "--",
            "sh", "-c", f'echo "$VGPU_VM $1 $2"; exit {status}', "sh", "--help", "--",
        )  # fmt: skip
        with pytest.raises(BlockingIOError):  # nobody has knocked, for the mediator would wait for a word
            mediator.accept()
    assert (done.returncode, done.stdout, done.stderr) == (status, "user1 --help --\n", "")


@pytest.mark.parametrize("in_words", [True, False])
def test_a_relative_run_directory_is_the_same_for_a_program_that_works_elsewhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch, in_words: bool
) -> None:
    monkeypatch.chdir(folder)
    words = ["--run-dir", "run"] if in_words else []
    done = command(RUN, *words, "--", "sh", "-c", 'cd /; echo "$VGPU_RUN_DIR"', VGPU_RUN_DIR="run")
    assert (done.returncode, done.stdout) == (0, f"{folder}/run\n")
    assert f"no mediator at {folder}/run; start run-mediator" in done.stderr


def test_a_mediator_serves_metrics_and_ends_with_0_when_told_to(folder: Path) -> None:
    (folder / "mediator.toml").write_text('[mediator]\ngpu = "software"\nmetrics = "127.0.0.1:0"\n')
    log = folder / "log"
    with log.open("wb") as output:
        words = ["--config", folder / "mediator.toml", "--run-dir", folder / "r", "--state-dir", folder / "s"]
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", MEDIATOR, *map(str, words)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            env={**os.environ, "VGPU_SOFTWARE_MEMORY": str(1 << 30)},
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 30
            while not (
                found := re.search(r"metrics at (http://127\.0\.0\.1:\d+/metrics)\s", log.read_text())
            ):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
            with urllib.request.urlopen(found[1], timeout=60) as answer:
                assert 'vgpu_mediator_info{gpu="software"' in answer.read().decode()
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()


# -- completion


def completions(module: str, line: str, **environment: str) -> list[str]:
    """What the command answers a bash that completes ``line`` at its end."""
    with tempfile.NamedTemporaryFile(mode="r") as out:
        done = command(
            module,
            _ARGCOMPLETE="1", _ARGCOMPLETE_STDOUT_FILENAME=out.name, _ARGCOMPLETE_IFS="\n",
            COMP_LINE=line, COMP_POINT=str(len(line)), COMP_TYPE="9", _ARGCOMPLETE_COMP_WORDBREAKS=" \n",
            **environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [word.strip() for word in out.read().splitlines()]


def test_options_and_their_values_are_completed() -> None:
    assert completions(MEDIATOR, "run-mediator --gpu ") == ["auto", "nvidia", "software"]
    assert completions(MEDIATOR, "run-mediator --metr") == ["--metrics"]
    assert completions(MEDIATOR, "run-mediator --gpu software --log-l") == ["--log-level"]
    assert completions(RUN, "vgpu-run --v") == ["--version", "--vm"]


def test_programs_are_completed(tmp_path: Path) -> None:
    (tmp_path / "trainer").touch(0o755)
    (tmp_path / "training-notes").touch(0o644)
    assert completions(RUN, "vgpu-run --vm user1 train", PATH=str(tmp_path)) == ["trainer"]
    assert programs(f"{tmp_path}/train") == [f"{tmp_path}/trainer", f"{tmp_path}/training-notes"]


@BOTH
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_gets_its_code(module: str, name: str, shell: str) -> None:
    done = command(module, "--print-completion", shell)
    assert (done.returncode, done.stderr) == (0, "")
    registered = {"bash": "complete ", "zsh": "compdef ", "fish": "complete --command "}[shell]
    assert [line for line in done.stdout.splitlines() if line.strip().startswith(registered) and name in line]


def test_bash_itself_completes(folder: Path) -> None:
    (folder / "run-mediator").write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m {MEDIATOR} "$@"\n')
    (folder / "run-mediator").chmod(0o755)
    script = (
        'eval "$(run-mediator --print-completion bash)"\n'
        "COMP_WORDS=(run-mediator --log-format ''); COMP_CWORD=2; COMP_LINE='run-mediator --log-format '\n"
        "COMP_POINT=${#COMP_LINE}; COMP_TYPE=9\n"
        '$(complete -p run-mediator | sed "s/.*-F \\([^ ]*\\).*/\\1/") run-mediator "" --log-format\n'
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert [word.strip() for word in done.stdout.splitlines()] == ["text", "json"], done.stderr


def test_a_command_that_is_run_does_not_load_argcomplete(folder: Path) -> None:
    program = "import sys, vgpu.run_main as m; m.main(['--run-dir', sys.argv[1], '/nonexistent']); print('argcomplete' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, str(folder)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == "False\n"
