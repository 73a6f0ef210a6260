# SPDX-License-Identifier: Apache-2.0
"""``vgpu-run``: run any program on this host as if it were in a VM.

Sets the library path and the socket, nothing else, and becomes the program.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vgpu import __version__
from vgpu.completion import add_completion_option, complete_if_asked, programs
from vgpu.paths import run_directory
from vgpu.shim.locate import library_directory
from vgpu.transport.names import NAME_RULE, is_name

EXAMPLES = """examples:
  vgpu-run python3 train.py
  vgpu-run --vm user1 -- ./vectoradd --size 1000000
"""


def guest_environment(environment: Mapping[str, str], vm: str | None, run_dir: Path) -> dict[str, str]:
    """The environment of a program that shall use the virtual GPU, in whatever folder it or its children work."""
    guest = dict(environment)
    folders = [str(library_directory())]
    if environment.get("LD_LIBRARY_PATH"):
        folders.append(environment["LD_LIBRARY_PATH"])
    guest["LD_LIBRARY_PATH"] = ":".join(folders)
    guest["VGPU_RUN_DIR"] = str(run_dir.absolute())
    if vm is not None:
        guest["VGPU_VM"] = vm
    return guest


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="vgpu-run",
        description="Run a program on this host as if it were in a VM with the virtual GPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vgpu-run {__version__}")
    add_completion_option(parser)
    parser.add_argument("--vm", help="name of the VM to run as (registered ad hoc where it is unknown)")
    parser.add_argument("--run-dir", type=Path, help="where the mediator's sockets are")
    program = parser.add_argument("program", help="the program to run")
    program.completer = programs  # type: ignore[attr-defined]  # argcomplete looks for it there
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: 1 if the program cannot be run, 2 if none is named or no VM can be called so; else the program takes this process's place."""
    parser = build_parser()
    complete_if_asked(parser)
    options = parser.parse_args(arguments)
    run_dir = options.run_dir or run_directory(os.environ)
    vm = options.vm if options.vm is not None else os.environ.get("VGPU_VM") or None
    if vm is not None and not is_name(vm):
        source = "--vm" if options.vm is not None else "VGPU_VM"
        print(f"vgpu-run: {source} is {vm!r}, expected {NAME_RULE}", file=sys.stderr)
        return 2
    program = [options.program, *options.arguments]
    if program[0] == "--":
        program = program[1:]
    if not program:
        print("vgpu-run: no program named; see vgpu-run --help", file=sys.stderr)
        return 2
    if not (run_dir / "mediator.sock").exists():
        print(
            f"vgpu-run: no mediator at {run_dir}; start run-mediator, or set VGPU_RUN_DIR. "
            "The program will see no GPU.",
            file=sys.stderr,
        )
    try:
        os.execvpe(program[0], program, guest_environment(os.environ, vm, run_dir))
    except OSError as error:
        print(f"vgpu-run: cannot run {program[0]}: {error.strerror}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
