# SPDX-License-Identifier: Apache-2.0
"""``vgpu-guest``: what is installed inside a VM, and the bundle that takes it there.

``install``, ``check`` and ``uninstall`` are ``install.sh``, found in this package and run in this process's place: there is
one implementation, and it works in a VM without Python. ``bundle`` packs that script with the libraries and, from a checkout,
their sources.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from vgpu import __version__
from vgpu.command_help import add_words
from vgpu.completion import add_completion_option, complete_if_asked
from vgpu.shim.guest_bundle import BundleError, write_bundle
from vgpu.standard_output import parse_arguments

EXAMPLES = """examples:
  sudo vgpu-guest install --with-ollama
  vgpu-guest check
  sudo vgpu-guest uninstall
  vgpu-guest bundle -o /tmp/             then copy it into the VM, unpack it, and: sudo ./install.sh
"""

ACTION_EXAMPLES = {
    "install": (
        "sudo vgpu-guest install --with-ollama",
        "vgpu-guest install --user --dry-run",
    ),
    "check": ("vgpu-guest check", "vgpu-guest check --json"),
    "uninstall": ("sudo vgpu-guest uninstall",),
    "bundle": ("vgpu-guest bundle --output=/tmp/",),
}


def installer() -> Path:
    """The shell script of this package or checkout."""
    return Path(str(files("vgpu.shim"))).resolve() / "guest" / "install.sh"


def _add_action(actions: Any, name: str, what: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=what, description=f"{what}.")
    add_words(parser, ACTION_EXAMPLES[name])
    return parser


def build_parser() -> argparse.ArgumentParser:
    """The command line; what install.sh understands is described here and checked there."""
    parser = argparse.ArgumentParser(
        prog="vgpu-guest",
        description="Install the virtual GPU's libraries inside a VM, say what is wrong with them, or take them out.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vgpu-guest {__version__}")
    add_completion_option(parser)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    install = _add_action(actions, "install", "put libraries, rules and service into this VM")
    check = _add_action(actions, "check", "say what works and what does not, each with its remedy")
    uninstall = _add_action(actions, "uninstall", "take everything out, put back what was there")
    for action in (install, check, uninstall):
        action.add_argument(
            "--prefix", metavar="FOLDER", help="work on the system whose root this is (an image)"
        )
        action.add_argument(
            "--user", "--no-root", action="store_true", help="for this user alone, below ~/.local"
        )
    check.add_argument("--json", action="store_true", help="print JSON, for programs")
    for action in (install, uninstall):
        action.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    install.add_argument(
        "--with-ollama", action="store_true", help="install Ollama too and let it use the GPU"
    )
    install.add_argument("--ollama-archive", metavar="FILE", help="its release archive, without a network")
    install.add_argument(
        "--group", metavar="NAME", help="who may use the GPU (else the group render, or video)"
    )
    install.add_argument("--build", action="store_true", help="compile the libraries here")
    install.add_argument(
        "--force", action="store_true", help="beside a real driver, or without a virtual GPU"
    )

    bundle = _add_action(actions, "bundle", "write what a VM needs into one archive")
    bundle.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path(),
        metavar="FILE",
        help="the archive, or a folder for it (default: here)",
    )
    return parser


def script_words(options: argparse.Namespace) -> list[str]:
    """The command line of install.sh for what was asked of ``vgpu-guest``."""
    words = [str(options.action)]
    for name, value in sorted(vars(options).items()):
        option = f"--{name.replace('_', '-')}"
        if name == "action" or value is None or value is False:
            continue
        words += [option] if value is True else [f"{option}={value}"]
    return words


def run_installer(words: list[str]) -> NoReturn:
    """Become install.sh."""
    os.environ["VGPU_GUEST_NAME"] = "vgpu-guest"  # what its messages shall tell people to type
    os.execv("/bin/sh", ["/bin/sh", str(installer()), *words])


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: the status of install.sh, which takes this process's place; 1 if there is no bundle to be made."""
    parser = build_parser()
    complete_if_asked(parser)
    options = parse_arguments(parser, arguments)
    if options.action == "bundle":
        try:
            print(write_bundle(options.output, __version__))
        except (BundleError, OSError) as error:
            print(f"vgpu-guest: {error}", file=sys.stderr)
            return 1
        return 0
    run_installer(script_words(options))


if __name__ == "__main__":
    raise SystemExit(main())
