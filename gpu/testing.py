# SPDX-License-Identifier: Apache-2.0
"""``check_driver``: one conformance suite for whatever stands behind ``struct vgpu_driver``.

The software GPU is only worth something as far as it does what a real driver does, so both pass the same suite. The
checks are in ``vgpu.gpu.conformance``; a place where the two may differ is written there with its reason.

    python -m vgpu.gpu.testing --gpu software
    python -m vgpu.gpu.testing --gpu nvidia [--library PATH] [--only NAME ...]

prints a line per check and exits with 1 if one failed. Checks that poison their context (a faulting kernel) get a
process each.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs

from .conformance import CHECKS, Check, Mismatch, Probe
from .conformance.probe import Kind

SUBJECTS = (
    "device", "memory", "arrays", "textures", "code", "launches", "streams", "graphs", "graph_memory", "virtual",
)  # fmt: skip
CHECK_SECONDS = 60.0

for _subject in SUBJECTS:
    importlib.import_module(f"{__package__}.conformance.{_subject}")


class DriverUnusable(Exception):
    """There is nothing to check; the message says at which step that came out."""


@attrs.frozen
class Outcome:
    """What became of one check; ``problem`` is empty where it passed."""

    name: str
    problem: str


@attrs.frozen(eq=False)
class OpenDriver:
    """A driver struct and what keeps it alive."""

    driver: Any
    ffi: Any
    kind: Kind
    keep: object


def names(*, fatal: bool | None = None) -> list[str]:
    """Names of all checks, or of those that do or do not poison their process."""
    return [c.name for c in CHECKS.values() if fatal is None or c.fatal is fatal]


def open_driver(kind: Kind, library: Path | None = None) -> OpenDriver:
    """A driver of this kind in this process, initialised, with the primary context current.

    Raises:
        DriverUnusable: the library is not there or does not answer.
    """
    from ._replay import ffi, lib

    driver = ffi.new("struct vgpu_driver *")
    keep: object = None
    if kind == "software":
        from .software.driver import install

        # Fields the software GPU does not have must refuse, as they do in a worker.
        replay = lib.vgpu_replay_new()
        ffi.memmove(driver, lib.vgpu_replay_driver(replay), ffi.sizeof("struct vgpu_driver"))
        keep = (install(ffi, driver), driver)
    else:
        from .driver import DriverNotFound, find_library

        try:
            path = find_library(library)
        except DriverNotFound as error:
            raise DriverUnusable(str(error)) from error
        wrong = lib.vgpu_driver_open(driver, os.fsencode(path))
        if wrong != ffi.NULL:
            raise DriverUnusable(f"{path}: {ffi.string(wrong).decode()}")
        keep = driver
    probe = Probe(ffi, driver, kind)
    try:
        probe.ok("cuInit", 0)
        probe.ok("cuCtxSetCurrent", probe.value("cuDevicePrimaryCtxRetain", 0))
    except Mismatch as error:
        raise DriverUnusable(str(error)) from error
    return OpenDriver(driver, ffi, kind, keep)


def run_check(opened: OpenDriver, check: Check) -> Outcome:
    """Run one check and put away what it made. Blocks for as long as the driver does."""
    probe = Probe(opened.ffi, opened.driver, opened.kind)
    problem = ""
    try:
        check.run(probe)
    except Mismatch as error:
        problem = str(error)
    try:
        probe.close()
    except Mismatch as error:
        problem = problem or str(error)
    return Outcome(check.name, problem)


def check_driver(driver: Any, ffi: Any, *, kind: Kind, only: Iterable[str] | None = None) -> list[Outcome]:
    """Run the checks that leave the process usable against a driver that is initialised and has a current context.

    Args:
        driver: pointer to a filled ``struct vgpu_driver``.
        ffi: the FFI that knows it.
        kind: which side of the written differences applies.
        only: names to run; all that are not fatal where None.
    """
    chosen = names(fatal=False) if only is None else list(only)
    opened = OpenDriver(driver, ffi, kind, None)
    return [run_check(opened, CHECKS[name]) for name in chosen]


def run_in_process(name: str, kind: Kind, library: Path | None = None) -> Outcome:
    """Run one check in a process of its own."""
    command = [sys.executable, "-P", "-m", "vgpu.gpu.testing", "--gpu", kind, "--here", "--only", name]
    command += ["--library", str(library)] if library is not None else []
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=2 * CHECK_SECONDS, check=False
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Outcome(name, f"not over after {2 * CHECK_SECONDS} s")
    if done.returncode == 0:
        return Outcome(name, "")
    words = (done.stdout + done.stderr).strip().splitlines() or [f"exit status {done.returncode}"]
    return Outcome(name, words[0].removeprefix(f"FAILED  {name}: ") if done.returncode == 1 else words[-1])


def _give_up(name: str) -> None:
    print(f"FAILED  {name}: not over after {CHECK_SECONDS:.0f} s; the rest was not run", flush=True)
    os._exit(1)


def main(arguments: list[str] | None = None) -> int:
    """Run the suite; 0 if all checks passed, 1 if not, 2 for wrong use."""
    parser = argparse.ArgumentParser(
        prog="python -m vgpu.gpu.testing", description="driver conformance suite"
    )
    parser.add_argument("--gpu", choices=["software", "nvidia"], required=True)
    parser.add_argument("--library", type=Path, help="the real libcuda (nvidia only)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these checks only")
    parser.add_argument("--here", action="store_true", help="run even fatal checks in this process")
    options = parser.parse_args(arguments)
    unknown = set(options.only or ()) - set(CHECKS)
    if unknown:
        parser.error(f"no such check: {', '.join(sorted(unknown))}")
    chosen = options.only or names()
    try:
        opened = open_driver(options.gpu, options.library)
    except DriverUnusable as error:
        print(f"no driver to check: {error}", file=sys.stderr)
        return 1
    failed = 0
    for name in sorted(chosen, key=lambda n: CHECKS[n].fatal):
        if CHECKS[name].fatal and not options.here:
            outcome = run_in_process(name, options.gpu, options.library)
        else:
            # A driver that waits for ever cannot be interrupted; its process can be ended.
            timer = threading.Timer(CHECK_SECONDS, _give_up, [name])
            timer.daemon = True
            timer.start()
            outcome = run_check(opened, CHECKS[name])
            timer.cancel()
        print(f"FAILED  {name}: {outcome.problem}" if outcome.problem else f"ok      {name}", flush=True)
        failed += bool(outcome.problem)
    if len(chosen) > 1:
        print(f"{len(chosen) - failed} of {len(chosen)} checks passed on {options.gpu}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
