# SPDX-License-Identifier: Apache-2.0
"""A shell in a VM with the virtual GPU, for a person: ``python tests/vm/shell.py``. Leave it and everything is gone.

The VM has this machine's files, a mediator on the software GPU behind its device, and (unless ``--bare``) the guest's
side installed. With a command behind ``--`` that is run instead of a shell, and its status is ours.

    tests/vm/shell.py [--chipset pc|q35] [--bare] [--memory MIB] [--processors N] [-- COMMAND...]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shlex
import shutil
import sys
import termios
import tty
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file, so the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.vm.guest import GuestMachine
from tests.vm.host import Host
from tests.vm.machine import Machine
from tests.vm.remote import Process
from vgpu.transport.vfio_user.pci import Variant

# In the guest: a terminal around a command.
_TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """Every key goes to the guest, Control-C too."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setraw(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def converse(process: Process) -> int:
    """Pass input and output on until the command ends; its status."""
    reading = True
    while True:
        for stream, data in ((sys.stdout, process.take_output()), (sys.stderr, process.take_errors())):
            if data:
                stream.buffer.write(data)
                stream.flush()
        if process.status is not None:
            return process.status if process.status >= 0 else 128 - process.status
        if not reading:
            process.wait_news(0.05)
        elif select.select([sys.stdin], [], [], 0.02)[0]:
            data = os.read(sys.stdin.fileno(), 4096)
            if data:
                process.write(data)
            else:
                reading = False
                process.close_input()


def run(machine: Machine, command: Sequence[str]) -> int:
    """Run a command in a terminal of the guest, or plainly where we have none; its status."""
    words = list(command) or ["/bin/bash", "-l"]
    environment = {"TERM": os.environ.get("TERM", "dumb"), "PS1": r"\\u@\\h:\\w\\$ "}
    if sys.stdin.isatty():
        size = shutil.get_terminal_size()
        python = Path(sys.executable).resolve()
        resized = f"stty rows {size.lines} columns {size.columns}; exec {shlex.join(words)}"
        words = [str(python), "-I", "-S", "-c", _TERMINAL, "/bin/sh", "-c", resized]
    process = machine.spawn(words, environment=environment, folder=Path.cwd())
    with _raw_terminal():
        return converse(process)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="a shell in a VM with the virtual GPU")
    parser.add_argument("--chipset", choices=("pc", "q35"), default="pc")
    parser.add_argument("--bare", action="store_true", help="do not install the guest's side")
    parser.add_argument("--memory", type=int, default=1024, metavar="MIB")
    parser.add_argument("--processors", type=int, default=1, metavar="N")
    parser.add_argument("command", nargs="*")
    options = parser.parse_args(arguments)
    variant = Variant.CONVENTIONAL if options.chipset == "pc" else Variant.EXPRESS
    size = {"memory_mib": options.memory, "processors": options.processors, "chipset": options.chipset}
    with Host({"shell": variant}) as host:
        machine = (
            Machine([host.socket("shell")], name="shell", **size)
            if options.bare
            else GuestMachine(host, "shell", **size)
        )
        with machine:
            print(
                f"booted in {machine.wall_seconds:.0f} s ({machine.accelerator}); mediator: {host.run_dir}, "
                f"console: {machine.console_log}, files: {machine.share} is /run/vm/share",
                file=sys.stderr,
            )
            return run(machine, options.command)


if __name__ == "__main__":
    sys.exit(main())
