# SPDX-License-Identifier: Apache-2.0
"""Guests of a fake device: built with a library that looks for sysfs in its working directory, and talked to."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parent.parent.parent
SHIM = ROOT / "shim" / "libcuda"
FLAGS = ["-std=gnu11", "-g", "-O2", "-pthread", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", f"-I{SHIM}"]
SYSFS = ['-DSHIM_SYSFS="sysfs"']
UNCACHED = "-DSHIM_ASSUME_UNCACHED"  # as where a host heeds the memory types of its guests
SECONDS = 60.0


def _build(name: str, arguments: list[str]) -> Path:
    """Run gcc unless the same sources were compiled the same way in an earlier run."""
    folder = ROOT / ".cache" / "pci-tests"
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(repr(arguments).encode())
    for source in sorted(
        [*(Path(__file__).parent / "c").glob("*"), *SHIM.glob("*"), *(ROOT / "transport").glob("*.h")]
    ):
        key.update(source.read_bytes())
    product = folder / key.hexdigest()[:16] / name
    if not product.exists():
        product.parent.mkdir(exist_ok=True)
        subprocess.run(["gcc", *FLAGS, *SYSFS, *arguments, "-o", f"{product}.new"], check=True)
        os.rename(f"{product}.new", product)
    return product


def build_program(name: str, *options: str) -> Path:
    """``c/NAME.c`` with the library's sources."""
    sources = [str(Path(__file__).parent / "c" / f"{name}.c"), *(str(s) for s in sorted(SHIM.glob("*.c")))]
    return _build(
        "-".join((name, *(option.strip("-").replace("=", "-") for option in options))), [*options, *sources]
    )


def build_library(*options: str) -> Path:
    """The folder of a libcuda.so.1 that looks for sysfs in the working directory."""
    sources = [str(s) for s in sorted(SHIM.glob("*.c"))]
    link = [f"-Wl,-soname,libcuda.so.1,--version-script={SHIM / 'libcuda.map'},-z,defs"]
    return _build(
        "libcuda.so.1", [*options, "-fPIC", "-shared", "-fvisibility=hidden", *sources, *link]
    ).parent


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Without a socket to be found anywhere."""
    base = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA_", "VGPU_"))}
    return base | {"XDG_RUNTIME_DIR": str(folder), "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"} | more


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for what another thread or process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.002)


class Guest:
    """A ``c/pci_guest.c`` that runs. Use as a context manager: it is killed at the end if it has not ended."""

    def __init__(
        self, program: Path, folder: Path, *arguments: str, user: int | None = None, **more: str
    ) -> None:
        self.process = subprocess.Popen(
            [program, *arguments],
            cwd=folder,
            env=environment(folder, **more),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            user=user,
        )
        self._heard = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def heard(self, seconds: float = 0) -> bool:
        """Has it said something that nobody has listened to?"""
        assert self.process.stdout is not None
        while b"\n" not in self._heard:
            if not select.select([self.process.stdout], [], [], seconds)[0]:
                return False
            more = os.read(self.process.stdout.fileno(), 4096)
            if not more:
                return False
            self._heard += more
        return True

    def hear(self, seconds: float = SECONDS) -> str:
        assert self.heard(seconds), "no answer"
        line, self._heard = self._heard.split(b"\n", 1)
        return line.decode()

    def ask(self, line: str, seconds: float = SECONDS) -> str:
        self.say(line)
        return self.hear(seconds)

    def has_open(self, name: str) -> bool:
        """Has it a file of that name open?"""
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                if link.readlink().name == name:
                    return True
        return False

    def has_device_mapped(self) -> bool:
        """Does a mapping lead to a BAR? None does any more in a process that has given the device up."""
        return "/resource" in Path(f"/proc/{self.process.pid}/maps").read_text()

    def finish(self) -> str:
        """End it as a program ends; what it said on standard error."""
        _, error = self.process.communicate(timeout=SECONDS)
        assert self.process.returncode == 0, error
        return error
