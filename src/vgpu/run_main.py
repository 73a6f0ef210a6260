# SPDX-License-Identifier: Apache-2.0
"""``vgpu-run``: run any program on this host as if it were in a VM.

Sets the library path and the socket, nothing else, and becomes the program.
"""

from __future__ import annotations

import argparse
import errno
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vgpu import __version__
from vgpu.completion import add_completion_option, complete_if_asked, programs
from vgpu.paths import run_directory
from vgpu.shim.locate import library_directory
from vgpu.standard_output import parse_arguments
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


def why_no_gpu(run_dir: Path) -> str | None:
    """Why a program will find no mediator there, and what to do; None where one listens. Does not wait, and the mediator sees nothing
    of it."""
    # The socket of a mediator that was killed is still there, so it has to be connected to. A datagram socket cannot be, and the
    # kernel says so only where somebody has the other end; a connection would be a guest without a word to the mediator.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(str(run_dir / "mediator.sock"))
        except PermissionError:
            return f"user {os.geteuid()} may not reach the mediator at {run_dir}"
        except OSError as error:
            if error.errno == errno.EPROTOTYPE:
                return None
    return f"no mediator at {run_dir}; start run-mediator, or set VGPU_RUN_DIR"


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
    options = parse_arguments(parser, arguments)
    run_dir = (options.run_dir or run_directory(os.environ)).absolute()
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
    trouble = why_no_gpu(run_dir)
    if trouble is not None:
        print(f"vgpu-run: {trouble}. The program will see no GPU.", file=sys.stderr)
    try:
        os.execvpe(program[0], program, guest_environment(os.environ, vm, run_dir))
    except OSError as error:
        print(f"vgpu-run: cannot run {program[0]}: {error.strerror}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
