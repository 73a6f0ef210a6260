# SPDX-License-Identifier: Apache-2.0
"""A mediator that is told a place where it cannot live says so in a line, and starts nothing."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.src.test_commands import MEDIATOR, command, folder
from vgpu.actors.ledger import SCHEMA_VERSION, LedgerFile
from vgpu.config import ConfigError
from vgpu.places_check import BadPlace, check_places

__all__ = ["folder"]  # the fixture

Make = Callable[[Path], tuple[Path, Path]]


def _file_as_run(at: Path) -> tuple[Path, Path]:
    (at / "file").write_text("")
    return at / "file", at / "s"


def _below_a_file(at: Path) -> tuple[Path, Path]:
    (at / "file").write_text("")
    return at / "r", at / "file" / "s"


def _ledger(data: bytes | None) -> Make:
    def make(at: Path) -> tuple[Path, Path]:
        (at / "s").mkdir()
        if data is None:
            (at / "s" / "ledger.sqlite").mkdir()
        else:
            (at / "s" / "ledger.sqlite").write_bytes(data)
        return at / "r", at / "s"

    return make


def _newer(at: Path) -> tuple[Path, Path]:
    (at / "s").mkdir()
    with sqlite3.connect(at / "s" / "ledger.sqlite") as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    return at / "r", at / "s"


CASES: list[tuple[Make, int, str]] = [
    (lambda at: (Path("/proc/x"), at / "s"), 1, "cannot make the run directory /proc/x: No such file or directory;"),
    (lambda at: (at / "r", Path("/proc/x")), 1, "cannot make the state directory /proc/x: "),
    (_file_as_run, 1, "/file is a file; move it away, or say --run-dir with a folder"),
    (_below_a_file, 1, "/file/s lies below a file; say --state-dir with another folder"),
    (_ledger(b"this is no database, whatever its name is"), 1, "cannot be read: file is not a database; move it away"),
    (_ledger(None), 1, "ledger.sqlite is no file; move it away"),
    (_newer, 1, f"is of a newer version (schema {SCHEMA_VERSION + 1}, and this program knows {SCHEMA_VERSION})"),
    (lambda at: (at / ("x" * 110), at / "s"), 2, "too long for sockets (paths of at most 107 bytes): say --run-dir"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "status", "message"), CASES)
def test_a_mediator_ends_with_one_line(folder: Path, make: Make, status: int, message: str) -> None:
    run_dir, state_dir = make(folder)
    done = command(MEDIATOR, "--gpu", "software", "--run-dir", run_dir, "--state-dir", state_dir)
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("run-mediator: ")
    assert not list(folder.glob("**/*.sock"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('run_dir = "a\\u0000b"', "line 2: run_dir is 'a\\x00b', expected a path"),
        ('state_dir = ""', "line 2: state_dir is '', expected a path"),
    ],
)
def test_a_path_that_is_none_ends_with_2(folder: Path, text: str, message: str) -> None:
    (folder / "mediator.toml").write_text(f"[mediator]\n{text}\n")
    done = command(MEDIATOR, "--gpu", "software", "--config", folder / "mediator.toml")
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_good_places_are_made_and_left_as_they_are(folder: Path) -> None:
    run_dir, state_dir = folder / "a" / "run", folder / "b" / "state"
    check_places(run_dir, state_dir)
    assert (list(run_dir.iterdir()), list(state_dir.iterdir())) == ([], [])
    assert stat.S_IMODE(state_dir.stat().st_mode) == 0o700
    LedgerFile(state_dir / "ledger.sqlite").close()
    before = (state_dir / "ledger.sqlite").read_bytes()
    check_places(run_dir, state_dir)
    assert (state_dir / "ledger.sqlite").read_bytes() == before
    (state_dir / "ledger.sqlite").write_bytes(b"")  # a mediator that was killed as it began leaves one
    check_places(run_dir, state_dir)


@pytest.fixture
def not_writable(folder: Path) -> Iterator[Path]:
    (folder / "closed").mkdir(0o500)
    yield folder / "closed"
    (folder / "closed").chmod(0o700)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_another_is_told(folder: Path, not_writable: Path) -> None:
    with pytest.raises(BadPlace, match="may not write the state directory"):
        check_places(folder / "r", not_writable)
    with pytest.raises(BadPlace, match=r"cannot make the run directory .* Permission denied"):
        check_places(not_writable / "r", folder / "s")


def test_a_run_directory_with_room_for_a_short_name_is_taken(folder: Path) -> None:
    start = len(os.fsencode(folder)) + 1
    fits = folder / ("x" * (107 - len("/vfio-user/.sock") - 20 - start))
    check_places(fits, folder / "s")
    assert len(os.fsencode(fits / "workers" / "software0-123456789abc.sock")) <= 107
    with pytest.raises(ConfigError, match="1 bytes shorter"):
        check_places(Path(f"{fits}x"), folder / "s")
