# SPDX-License-Identifier: Apache-2.0
"""One mediator for one directory: a lock on the directory itself, held for the mediator's life.

The kernel gives it back however the process ends, so nothing is left behind by a kill. The directory is locked and no file in
it, because a full disk must not keep a mediator from starting. Beside it ``mediator.pid`` says who it is, for people; it is
written where it can be, and nothing is decided by it. Workers and devices, which outlive a mediator, do not inherit the lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["DirectoryTaken", "hold_directory"]

PID_FILE = "mediator.pid"
PID_DIGITS = 20


class DirectoryTaken(OSError):
    """Another mediator has the directory; the message says who, and how to go on."""


@contextlib.contextmanager
def hold_directory(path: Path, option: str) -> Iterator[None]:
    """Hold the directory while the block runs, making it if need be, for its owner alone. Does not wait.

    option: the option that names another directory, for the message.

    Raises:
        DirectoryTaken: another mediator holds it, in this process or another.
        OSError: it cannot be made or opened.
    """
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Not inherited by what is started from here: the lock is this process' and ends with it.
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DirectoryTaken(
                errno.EADDRINUSE,
                f"another mediator ({_holder(path)}) works with {path}: end it first,"
                f" or give this one a directory of its own with {option}",
            ) from None
        with contextlib.suppress(OSError):
            _write_pid(path / PID_FILE)
        yield
        with contextlib.suppress(OSError):
            (path / PID_FILE).unlink()
    finally:
        os.close(descriptor)


def _write_pid(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, f"{os.getpid()}\n".encode())
    finally:
        os.close(descriptor)


def _holder(path: Path) -> str:
    try:
        with (path / PID_FILE).open("rb") as file:
            word = file.read(PID_DIGITS).strip()
    except OSError:
        word = b""
    return f"process {word.decode()}" if word.isdigit() else "whose number is not known"
