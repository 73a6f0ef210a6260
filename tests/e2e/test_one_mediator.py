# SPDX-License-Identifier: Apache-2.0
"""Two mediators never work with one ledger or one directory of sockets, and one that was killed keeps nobody out."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.mediator import Mediator, is_alive, wait_until
from vgpu.holding import DirectoryTaken, hold_directory


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vgpu-", dir="/tmp") as folder:
        yield Path(folder)


def start_second(run_dir: Path, state_dir: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "vgpu.mediator_main", "--gpu", "software"]
    command += ["--run-dir", str(run_dir), "--state-dir", str(state_dir)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_second_mediator_is_told_who_has_the_state(mediator: Mediator, elsewhere: Path) -> None:
    done = start_second(elsewhere, mediator.state_dir)
    assert done.returncode == 1
    assert done.stderr == (
        f"run-mediator: another mediator (process {mediator.pid}) works with {mediator.state_dir}: end it first,"
        " or give this one a directory of its own with --state-dir\n"
    )
    assert not list(elsewhere.glob("*.sock"))
    assert mediator.ask("health")["ok"]


def test_a_second_mediator_is_told_who_has_the_sockets(mediator: Mediator, elsewhere: Path) -> None:
    workers = mediator.workers()
    done = start_second(mediator.run_dir, elsewhere)
    assert done.returncode == 1
    assert done.stderr == (
        f"run-mediator: another mediator (process {mediator.pid}) works with {mediator.run_dir}: end it first,"
        " or give this one a directory of its own with --run-dir\n"
    )
    assert mediator.ask("health")["ok"]
    assert all(is_alive(pid) for pid in workers)


def test_somebody_else_who_listens_there_is_left_alone(elsewhere: Path) -> None:
    """An older mediator holds no directory."""
    (elsewhere / "run").mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(elsewhere / "run" / "mediator.sock"))
        other.listen()
        done = start_second(elsewhere / "run", elsewhere / "state")
        assert done.returncode == 1
        assert done.stderr == (
            f"run-mediator: another mediator listens on {elsewhere}/run/mediator.sock: end it first,"
            " or give this one a directory of its own with --run-dir\n"
        )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as guest:
            guest.connect(str(elsewhere / "run" / "mediator.sock"))


def test_a_killed_mediator_leaves_no_lock(own_mediator: Mediator) -> None:
    # Its workers outlive it, and have not inherited the lock.
    wait_until(lambda: bool(own_mediator.workers()), 60, "a warm worker is there")
    for _ in range(2):
        killed = own_mediator.pid
        own_mediator.kill()
        assert own_mediator.workers()
        own_mediator.start()
        assert int((own_mediator.state_dir / "mediator.pid").read_text()) == own_mediator.pid != killed


def test_holding_a_directory(tmp_path: Path) -> None:
    place = tmp_path / "a" / "state"
    with hold_directory(place, "--state-dir"):
        assert place.stat().st_mode & 0o777 == 0o700
        with (
            pytest.raises(DirectoryTaken, match=rf"\(process {os.getpid()}\) works with .*--other"),
            hold_directory(place, "--other"),
        ):
            pass
        (place / "mediator.pid").write_text("\x1b[31m not a number")
        with (
            pytest.raises(DirectoryTaken, match="whose number is not known"),
            hold_directory(place, "--other"),
        ):
            pass
        sleeper = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with hold_directory(place, "--state-dir"):
            pass
    finally:
        sleeper.kill()
        sleeper.wait()
    assert not list(place.iterdir())


def test_a_directory_where_nothing_can_be_written_can_be_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vgpu.holding._write_pid", full)
    with (
        hold_directory(tmp_path, "--state-dir"),
        pytest.raises(DirectoryTaken, match="not known"),
        hold_directory(tmp_path, "--state-dir"),
    ):
        pass
