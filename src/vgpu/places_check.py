# SPDX-License-Identifier: Apache-2.0
"""Can a mediator live in these folders? Asked before anything is started, so that who typed the command reads one line.

Makes the folders, and changes nothing in them. What can mend itself, as a disk that is full, is no reason not to start.
"""

from __future__ import annotations

import os
import sqlite3
import stat
from pathlib import Path
from typing import Final

from vgpu.actors.ledger import SCHEMA_VERSION
from vgpu.config import ConfigError

# Of sockaddr_un, without the zero at its end.
SOCKET_PATH_BYTES: Final = 107
# What a VM's name may be at least, in run_dir/vfio-user/NAME.sock. Workers' sockets, workers/software0-123456789abc.sock, fit then.
SHORTEST_NAME: Final = 20
LEDGER_NAME: Final = "ledger.sqlite"


class BadPlace(Exception):
    """A folder or the ledger in it cannot be used; the message says which, why, and what to do."""


def check_places(run_dir: Path, state_dir: Path) -> None:
    """See to it that both folders are there and can be used.

    Raises:
        ConfigError: the run directory cannot hold sockets, whoever asks.
        BadPlace: the host does not let us.
    """
    room = name_room(run_dir)
    if room < SHORTEST_NAME:
        raise ConfigError(
            f"run_dir is {str(run_dir)!r}, too long for sockets (paths of at most {SOCKET_PATH_BYTES} bytes):"
            f" say --run-dir with one that is {SHORTEST_NAME - room} bytes shorter, like /run/vgpu",
            "run_dir",
        )
    _make(run_dir, "run directory", "--run-dir")
    _make(state_dir, "state directory", "--state-dir", 0o700)
    _check_ledger(state_dir / LEDGER_NAME)


def name_room(run_dir: Path) -> int:
    """Bytes that are left for a VM's name in the longest path of a socket."""
    return SOCKET_PATH_BYTES - len(os.fsencode(run_dir / "vfio-user" / ".sock"))


def _make(folder: Path, what: str, option: str, mode: int = 0o777) -> None:
    remedy = f"mend that, or say {option} with a folder that user {os.getuid()} may write"
    try:
        folder.mkdir(mode, parents=True, exist_ok=True)
    except FileExistsError:
        raise BadPlace(
            f"the {what} {folder} is a file; move it away, or say {option} with a folder"
        ) from None
    except NotADirectoryError:
        raise BadPlace(f"the {what} {folder} lies below a file; say {option} with another folder") from None
    except OSError as error:
        raise BadPlace(f"cannot make the {what} {folder}: {error.strerror}; {remedy}") from None
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise BadPlace(f"user {os.getuid()} may not write the {what} {folder}; {remedy}")


def _check_ledger(path: Path) -> None:
    away = "move it away and restore a backup (docs/operations.md), or say --state-dir with another folder"
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise BadPlace(f"the ledger {path} cannot be looked at: {error.strerror}") from None
    if not stat.S_ISREG(kind):
        raise BadPlace(f"the ledger {path} is no file; {away}")
    if not os.access(path, os.R_OK | os.W_OK):
        raise BadPlace(f"user {os.getuid()} may not write the ledger {path}; chown it, or run as its owner")
    try:
        ledger = sqlite3.connect(path)
        try:
            version = int(ledger.execute("PRAGMA user_version").fetchone()[0])
            ledger.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        finally:
            ledger.close()
    except sqlite3.OperationalError:
        return  # busy, or a disk that is full: the ledger waits for that
    except sqlite3.DatabaseError as error:
        raise BadPlace(f"the ledger {path} cannot be read: {error}; {away}") from None
    if version > SCHEMA_VERSION:
        raise BadPlace(
            f"the ledger {path} is of a newer version (schema {version}, and this program knows {SCHEMA_VERSION});"
            " install that version again, or restore a backup (docs/operations.md)"
        )
