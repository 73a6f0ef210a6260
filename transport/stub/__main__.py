# SPDX-License-Identifier: Apache-2.0
"""The command: python -m vgpu.transport.stub --run-dir DIR --vm NAME [--bar1-bytes N] [--slots N] [--variant V]
[--socket-group GROUP].

Exit status: 0 told to leave; 2 wrong options; 3 a living device process of that VM is there; 1 anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import grp
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from vgpu.transport._generated_calls import TABLE_HASH
from vgpu.transport.attach import LAYOUT_VERSION
from vgpu.transport.vfio_user.device import DEFAULT_BAR1, GpuDevice, SharedMemory, cut_bar1
from vgpu.transport.vfio_user.pci import Variant
from vgpu.transport.vfio_user.registers import Geometry, Registers

from .directory import Directory
from .keeper import Keeper, start_keeper
from .launch import DEFAULT_SLOTS, NAME_PATTERN, device_socket_path, vfio_socket_path
from .process import make_process

log = logging.getLogger(__name__)

SERVED_ALREADY = 3


class ServedAlready(Exception):
    """A living process is the device of this VM; the message says which."""


def _parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Geometry]:
    parser = argparse.ArgumentParser(
        prog="python -m vgpu.transport.stub", description="the PCI device of one VM"
    )
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument(
        "--vm", required=True, help="name; the sockets are vfio-user/VM.sock and devices/VM.sock"
    )
    parser.add_argument("--bar1-bytes", type=int, default=DEFAULT_BAR1, help="size of BAR1, a power of two")
    parser.add_argument("--slots", type=int, default=DEFAULT_SLOTS, help="guest processes at a time")
    parser.add_argument(
        "--variant", type=Variant, default=Variant.CONVENTIONAL, help="conventional or express"
    )
    parser.add_argument(
        "--socket-group", type=_group, metavar="GROUP", help="who besides this user may connect a QEMU"
    )
    options = parser.parse_args(arguments)
    if not NAME_PATTERN.fullmatch(options.vm):
        parser.error(f"--vm {options.vm!r} is no name for a VM")
    try:
        return options, cut_bar1(options.bar1_bytes, options.slots)
    except ValueError as error:
        parser.error(str(error))


def _group(name: str) -> int:
    """A group's number, of its name or number."""
    if name.isascii() and name.isdigit():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise argparse.ArgumentTypeError(f"there is no group {name!r}") from None


def _let_through(folder: Path, group: int | None) -> None:
    """Have the members of a group reach the sockets of a folder by their names, and not list them.

    The folder is shared with devices of other VMs; one that was started without a group leaves it as it is.
    """
    if group is not None:
        os.chown(folder, -1, group)
        folder.chmod(0o710)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock that says who the device of a VM is. The kernel gives it back however the process ends.

    Raises:
        ServedAlready: somebody else holds it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
                raise ServedAlready(f"process {holder} is the device of this VM already ({path})") from None
            if not _is_same(path, descriptor):
                continue  # the one before us removed it as it left, and somebody may have made another
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def _is_same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


async def _run(options: argparse.Namespace, geometry: Geometry, keeper: Keeper) -> None:
    registers = Registers(geometry, layout_version=LAYOUT_VERSION, table_hash=TABLE_HASH)
    with SharedMemory(geometry.bar1_size, f"vgpu-bar1-{options.vm}") as memory:
        device = GpuDevice.assemble(registers, memory, options.variant)
        with contextlib.closing(Directory(memory.descriptor, registers)) as directory:
            await make_process(options.vm, device, directory, keeper).run(
                vfio_socket_path(options.run_dir, options.vm),
                device_socket_path(options.run_dir, options.vm),
                options.socket_group,
            )


def main(arguments: list[str] | None = None) -> int:
    """Be the device until told to leave. The exit status."""
    options, geometry = _parse(arguments)
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s device {options.vm}: %(message)s", stream=sys.stderr
    )
    os.umask(0o077)
    with contextlib.suppress(PermissionError):
        os.setsid()  # what ends the mediator's session does not end this one
    devices = device_socket_path(options.run_dir, options.vm).parent
    for folder in (devices, vfio_socket_path(options.run_dir, options.vm).parent):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        _let_through(vfio_socket_path(options.run_dir, options.vm).parent, options.socket_group)
    except OSError as error:
        log.error("cannot let the group %d in: %s", options.socket_group, error)
        return 1
    try:
        with _alone(devices / f"{options.vm}.lock"):
            trio.run(_run, options, geometry, start_keeper())
    except ServedAlready as error:
        log.error("%s", error)
        return SERVED_ALREADY
    return 0


if __name__ == "__main__":
    sys.exit(main())
