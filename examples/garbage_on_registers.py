#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Garbage on PCI registers: noise in the registers, the BAR memory and the vfio-user messages of one VM's device.

QEMU's part is played by a client that speaks its protocol. What is not allowed reads as ones or does nothing, a client that
breaks the protocol is hung up on, and the device is there for the next one.
"""

from __future__ import annotations

import json
import random
import socket
from pathlib import Path

from _support import WAIT_SECONDS, Example, Host, is_alive, main, wait_until

from vgpu.transport.errors import RemoteProtocolError
from vgpu.transport.testing import CONFIGURATION, QemuClient
from vgpu.transport.vfio_user.registers import MAGIC, PAGE, DeviceRegister, SlotRegister

ACCESSES = 800
NOISES = 10
MESSAGES = 40
BAR0, BAR1 = 0, 1
ONES = 0xFFFFFFFF


def registers(example: Example, qemu: QemuClient, noise: random.Random) -> None:
    """Reads and writes of any width anywhere in BAR0 and the configuration space."""
    before = qemu.read(BAR0, DeviceRegister.REFUSED_ACCESSES)
    # Random words at random places, and the registers that do something, with values nobody would write.
    busy = [SlotRegister.OWNER, SlotRegister.RELEASE, SlotRegister.DOORBELL, SlotRegister.CALL_SUBMIT]
    refused = 0
    for _ in range(ACCESSES):
        region = noise.choice((BAR0, BAR0, BAR0, CONFIGURATION))
        size = qemu.regions[region].size
        offset = noise.choice((noise.randrange(size), PAGE * noise.randrange(6) + noise.choice(busy)))
        width = noise.choice((1, 2, 3, 4, 8))
        if noise.random() < 0.5:
            refused += qemu.write(region, offset % size, noise.getrandbits(8 * width), width) != 0
        else:
            qemu.read(region, offset % size, width)
    counted = qemu.read(BAR0, DeviceRegister.REFUSED_ACCESSES) - before
    example.fact(
        counted > 0,
        f"{ACCESSES} random accesses: all answered; {counted} counted as not allowed, {refused} refused",
    )
    qemu.reset()
    slots = range(qemu.read(BAR0, DeviceRegister.SLOT_COUNT))
    wait_until(
        lambda: not any(qemu.read(BAR0, PAGE * (1 + n) + SlotRegister.STATE) for n in slots),
        "all slots are free",
    )
    example.fact(
        qemu.read(BAR0, DeviceRegister.MAGIC) == MAGIC,
        "after a reset the device is as it was, all slots free",
    )


def memory(example: Example, qemu: QemuClient, noise: random.Random) -> None:
    """All of BAR1 overwritten, the directory and the slots' pages included, between claims and doorbells."""
    bar1 = qemu.maps[BAR1]
    for number in range(NOISES):
        bar1[: 1 << 20] = noise.randbytes(1 << 20)
        page = PAGE * (1 + number % 4)
        qemu.write(BAR0, page + SlotRegister.OWNER, 0x1234 + number | 77 << 32, 8)
        bar1[: 1 << 20] = noise.randbytes(1 << 20)
        qemu.write(BAR0, page + SlotRegister.DOORBELL, 1)
        qemu.write(BAR0, page + SlotRegister.RELEASE, 0x1234 + number)
    example.fact(
        qemu.read(BAR0, DeviceRegister.MAGIC) == MAGIC,
        f"{NOISES} times noise over BAR1 between claims and doorbells: the device answers",
    )


def messages(example: Example, socket_path: Path, noise: random.Random) -> None:
    """Bytes that are no vfio-user, and messages out of their order."""
    hung_up = 0
    for number in range(MESSAGES):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.settimeout(WAIT_SECONDS)
            peer.connect(str(socket_path))
            if number % 2:
                peer.sendall(noise.randbytes(noise.choice((1, 15, 16, 64, 2048))))
            else:
                command = noise.randrange(20).to_bytes(2, "little")
                length = noise.choice((0, 15, 16, 1 << 31)).to_bytes(4, "little")
                peer.sendall(b"\1\0" + command + length + bytes(8))
            try:
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(4096):
                    pass
                hung_up += 1
            except (ConnectionError, OSError) as error:
                hung_up += isinstance(error, (ConnectionError, BrokenPipeError))
    example.fact(hung_up == MESSAGES, f"{MESSAGES} clients that do not speak the protocol: all hung up on")


def device_of(host: Host, vm: str) -> int:
    (found,) = [device["pid"] for device in host.ask("devices") if device["vm"] == vm]
    return int(found)


def body(example: Example) -> None:
    noise = random.Random(22)
    with example.host() as host:
        answer = host.admin("register-vm", "--vm-name=hostile", "--bar1=16MiB", "--slots=4", "--json")
        socket_path = Path(json.loads(answer)["device"]["socket"])
        host.admin("register-vm", "--vm-name=healthy", "--bar1=16MiB", "--slots=4")
        with example.neighbours(host) as neighbours:
            before, healthy = device_of(host, "hostile"), device_of(host, "healthy")
            with QemuClient.connect(socket_path) as qemu:
                qemu.boot()
                registers(example, qemu, noise)
                memory(example, qemu, noise)
            messages(example, socket_path, noise)
            example.fact(
                is_alive(before) and device_of(host, "hostile") == before,
                "its device process is the same as before",
            )
            example.fact(device_of(host, "healthy") == healthy, "and so is that of another VM")

            def boots() -> bool:
                try:
                    with QemuClient.connect(socket_path) as qemu:
                        qemu.boot()
                        return qemu.read(BAR0, DeviceRegister.MAGIC) == MAGIC
                except (OSError, RemoteProtocolError):
                    return False

            wait_until(boots, "the next QEMU boots with the device")
            example.fact(True, "the next QEMU boots with the device")
            wait_until(
                lambda: not [s for s in host.sessions() if s["info"]["vm"] == "hostile"],
                "no session of it is left",
            )
            example.goes_on(neighbours)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, body))
