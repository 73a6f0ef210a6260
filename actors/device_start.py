# SPDX-License-Identifier: Apache-2.0
"""Find a VM's device process, or start it.

It runs in a session of its own and outlives this mediator: QEMU never connects to a device a second time. What it has
to say goes to ``devices/VM.log`` beside its socket, for a pipe of ours would keep whoever reads it waiting.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import attrs
import trio

from vgpu.transport._generated_calls import TABLE_HASH
from vgpu.transport.attach import LAYOUT_VERSION
from vgpu.transport.stub.launch import DeviceLink, device_socket_path, open_device_link, stub_command
from vgpu.transport.stub.messages import Hello, Stop, command_line

from .messages import VmRecord

_log = logging.getLogger("vgpu.device")

START_SECONDS = 30.0
HELLO_SECONDS = 5.0
LEAVE_SECONDS = 5.0
LOOK_SECONDS = 0.02
LOG_TAIL_BYTES = 2000
# Exit status of a device process that found another one serving the VM.
ALREADY_THERE = 3


class DeviceNotStarted(OSError):
    """The device process ended, or did not answer in time; the message has the end of its log."""


@attrs.frozen
class OpenedDevice:
    """A link to a device process, and the process if it is our child."""

    link: DeviceLink
    process: trio.Process | None = None


def is_current(hello: Hello) -> bool:
    """Does the device speak of the same calls and layouts as this program?"""
    return hello.layout_version == LAYOUT_VERSION and hello.table_hash == TABLE_HASH


def _is_as_registered(hello: Hello, vm: VmRecord) -> bool:
    shape = (hello.bar1_size, hello.slot_count, hello.variant.value)
    return shape == (vm.bar1_bytes, vm.slots, vm.variant)


@attrs.frozen
class DeviceStarter:
    """Finds, starts and ends the device processes of one run directory."""

    run_dir: Path
    socket_group: Callable[[], str] = str  # who besides us may connect a QEMU to devices that are started now

    async def open(self, vm: VmRecord) -> OpenedDevice:
        """Connect to the VM's device; where there is none, or one that is out of date and has no QEMU, start one.

        Cancelled or failed, it leaves no process behind that it started.

        Raises:
            OSError: it did not start (``DeviceNotStarted``), or hung up.
            RemoteProtocolError: something else listens there.
        """
        path = device_socket_path(self.run_dir, vm.name)
        link = await _connect(path)
        if link is None:
            return await _start(self.run_dir, vm, path, self.socket_group())
        hello = link.described
        if is_current(hello) and _is_as_registered(hello, vm):
            return OpenedDevice(link)
        if hello.connected:
            _log.warning(
                "the device of %s is of another version or shape; it stays until its QEMU ends",
                vm.name,
                extra={"vm": vm.name},
            )
            return OpenedDevice(link)
        await _end(link)
        return await _start(self.run_dir, vm, path, self.socket_group())

    async def stop(self, vm: str) -> bool:
        """End the VM's device, if there is one; its sessions end with it. Was a QEMU connected?

        Raises:
            RemoteProtocolError: something else listens there.
        """
        path = device_socket_path(self.run_dir, vm)
        link = await _connect(path)
        was_connected = link is not None and link.described.connected
        if link is not None:
            await _end(link)
        path.with_suffix(".log").unlink(missing_ok=True)
        return was_connected


async def _connect(path: Path) -> DeviceLink | None:
    try:
        with trio.fail_after(HELLO_SECONDS):
            return await open_device_link(path)
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except trio.TooSlowError:
        raise OSError(f"{path}: no hello within {HELLO_SECONDS} s") from None


async def _end(link: DeviceLink) -> None:
    """Have a device leave, and see it gone."""
    try:
        # Taken while it is connected to us, so it is its process and no other.
        process = os.pidfd_open(link.described.pid)
    except ProcessLookupError:
        await link.aclose()
        return
    try:
        with contextlib.suppress(trio.BrokenResourceError):
            await link.send(command_line(Stop()))
        with trio.move_on_after(LEAVE_SECONDS):
            await trio.lowlevel.wait_readable(process)
            return
        name = link.described.vm
        _log.error("the device of %s does not leave; it is killed", name, extra={"vm": name})
        signal.pidfd_send_signal(process, signal.SIGKILL)
    finally:
        os.close(process)
        await link.aclose()


async def _start(run_dir: Path, vm: VmRecord, path: Path, socket_group: str) -> OpenedDevice:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = path.with_suffix(".log")
    command = stub_command(
        run_dir,
        vm.name,
        bar1_bytes=vm.bar1_bytes,
        slots=vm.slots,
        variant=vm.variant,
        socket_group=socket_group,
    )
    with log.open("ab") as output:
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        with trio.move_on_after(START_SECONDS):
            while (link := await _connect(path)) is None:
                status = process.poll()
                if status not in (None, ALREADY_THERE):
                    raise DeviceNotStarted(f"the device of {vm.name} ended with {status}: {_tail(log)}")
                await trio.sleep(LOOK_SECONDS)
            return OpenedDevice(link, process)
        raise DeviceNotStarted(f"the device of {vm.name} did not listen in {START_SECONDS} s: {_tail(log)}")
    except BaseException:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        raise


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_TAIL_BYTES))
        return file.read().decode("utf-8", "replace").strip()
