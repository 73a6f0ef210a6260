# SPDX-License-Identifier: Apache-2.0
"""A systemd as process 1, in namespaces of its own, for what the unit promises: seconds to boot, and nothing of the machine's is changed.

Its files are this machine's, under a layer in memory that takes the writes (boot.sh); its processes, mounts, network, name and control
groups are its own. The kernel is the machine's, so it needs root, overlayfs, a systemd that is installed, and a control group
file system (version 2) that may be written: :func:`why_not` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parents[1]
SYSTEMDS: Final = (Path("/usr/lib/systemd/systemd"), Path("/lib/systemd/systemd"))
TOOLS: Final = ("unshare", "nsenter", "setpriv", "mount", "umount", "pivot_root", "systemctl", "journalctl")
BOOT_SECONDS: Final = 60.0
COMMAND_SECONDS: Final = 60.0
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NAMESPACES: Final = ("--mount", "--pid", "--uts", "--ipc", "--net", "--cgroup")
_JOURNAL: Final = "[Journal]\nStorage=volatile\nRateLimitBurst=0\n"


def _control_groups() -> Path | None:
    """Where version 2 of control groups is mounted."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup2" and "rw" in options.split(","):
            return Path(place)
    return None


def _systemd() -> Path | None:
    return next((path for path in SYSTEMDS if path.exists()), None)


def why_not() -> str | None:
    """Why no systemd can be booted here; None if one can."""
    if os.geteuid() != 0:
        return "needs root"
    if _systemd() is None:
        return "systemd is not installed"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    groups = _control_groups()
    if groups is None or not os.access(groups, os.W_OK):
        return "no control groups of version 2 that may be written"
    if "overlay" not in Path("/proc/filesystems").read_text():
        return "the kernel has no overlayfs"
    tried = subprocess.run(
        ["unshare", *_NAMESPACES, "--fork", "mount", "-t", "proc", "proc", "/proc"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    return f"no namespaces of its own: {tried.stderr.strip()}" if tried.returncode else None


class SystemdHost:
    """A host of its own while the context lasts; ``share`` is its /run/share."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vgpu-systemd-"))
        self.share = self.folder / "share"
        self._log = self.folder / "boot.log"
        groups = _control_groups()
        assert groups is not None
        self._group = groups / self.folder.name
        self._outer: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self._spawned: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        try:
            self._boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _boot(self) -> None:
        (self.folder / "layer").mkdir()
        self.share.mkdir()
        journal = self.folder / "etc" / "systemd" / "journald.conf.d" / "90-test.conf"
        journal.parent.mkdir(parents=True)
        journal.write_text(_JOURNAL)
        self._group.mkdir()
        # The group first: the new namespace of control groups begins at the one that its maker is in.
        enter = f'echo $$ >"{self._group}/cgroup.procs" && exec "$@"'
        words = ["sh", "-c", enter, "sh", "unshare", *_NAMESPACES, "--fork", "--kill-child"]
        words += ["--propagation", "private", "sh", str(HERE / "boot.sh"), str(self.folder), str(_systemd())]
        words += [str(ROOT), str(Path(sys.base_prefix)), str(Path(sys.prefix))]
        with self._log.open("wb") as log:
            self._outer = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + BOOT_SECONDS
        while not self._is_up():
            if self._outer.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"systemd did not come up: {self._log.read_text()}")
            time.sleep(0.1)

    def _is_up(self) -> bool:
        assert self._outer is not None
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        with contextlib.suppress(OSError, IndexError):
            self._pid = int(children.read_text().split()[0])
            if Path(f"/proc/{self._pid}/comm").read_text().strip() == "systemd":
                state = self.run("systemctl", "is-system-running", check=False)
                return state.stdout.strip() in ("running", "degraded")
        return False

    def close(self) -> None:
        """End everything in it, and remove its files."""
        self.end_spawned()
        if self._outer is not None:
            with contextlib.suppress(ProcessLookupError):
                if self._pid:
                    os.kill(self._pid, signal.SIGKILL)  # the namespace's first process; all others go with it
            self._outer.kill()
            self._outer.wait()
        deadline = time.monotonic() + 10
        while self._group.exists():
            try:
                for folder in sorted((p for p in self._group.rglob("*") if p.is_dir()), reverse=True):
                    folder.rmdir()
                self._group.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        shutil.rmtree(self.folder, ignore_errors=True)

    def words(self, *command: str | Path) -> list[str]:
        """The command line that runs this in there."""
        enter = ["nsenter", "-t", str(self._pid), *_NAMESPACES, "--root", "--wd", "--"]
        clean = ["env", "-i", f"PATH={_PATH}", "LANG=C.UTF-8", "SYSTEMD_PAGER=", "SYSTEMD_COLORS=0"]
        return [*enter, *clean, *map(str, command)]

    def run(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in there as root, to its end, without input.

        Raises:
            AssertionError: it failed, and ``check`` is set.
        """
        done = subprocess.run(
            self.words(*command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def spawn(self, *command: str | Path) -> subprocess.Popen[str]:
        """Start a command in there, with pipes to all three of its streams."""
        process = subprocess.Popen(
            self.words(*command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._spawned.append(process)
        return process

    def end_spawned(self) -> None:
        """Kill what was spawned and still runs, and close its pipes."""
        for process in self._spawned:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        self._spawned.clear()

    def show(self, unit: str, *names: str) -> list[str]:
        """Properties of a unit, in the order asked for."""
        shown = self.run("systemctl", "show", unit, *(f"--property={name}" for name in names)).stdout
        found = dict(line.partition("=")[::2] for line in shown.splitlines())
        return [found.get(name, "") for name in names]  # a list that is empty is not shown

    def journal(self, unit: str, *options: str | Path) -> Sequence[str]:
        """Lines of the journal about a unit, all that were written so far: messages alone, unless options say otherwise."""
        self._sync()
        words = ("journalctl", "--no-pager", "--quiet", "--output=cat", f"--unit={unit}", *options)
        return self.run(*words).stdout.splitlines()

    def journal_now(self) -> str:
        """A cursor: what comes after is newer than this moment (for ``--after-cursor``)."""
        self._sync()
        shown = self.run("journalctl", "--quiet", "--lines=1", "--show-cursor", "--output=cat").stdout
        return shown.splitlines()[-1].removeprefix("-- cursor: ")

    def _sync(self) -> None:
        """Wait until the journal has what it was sent: systemctl does not, and who asks at once may be first."""
        self.run("journalctl", "--sync")
