# SPDX-License-Identifier: Apache-2.0
"""How a VM gets its device: the options for QEMU, and the same for libvirt. Pure; the administrator's tool prints it.

QEMU takes the device's socket only in the JSON form. It waits for an answer for as long as x-msg-timeout says, and
gives the device up for good when there was none.
"""

from __future__ import annotations

import json
import shlex
from typing import Final
from xml.sax.saxutils import quoteattr

DEVICE_ID: Final = "vgpu0"
PORT_ID: Final = "vgpu0-port"
MESSAGE_TIMEOUT_MILLISECONDS: Final = 60000
QEMU_NAMESPACE: Final = "http://libvirt.org/schemas/domain/qemu/1.0"


def qemu_arguments(socket: str, variant: str, address: str) -> list[str]:
    """The words for QEMU's command line. ``address``: the slot on the VM's bus, as 0x5; of the port, if express."""
    device: dict[str, object] = {
        "driver": "vfio-user-pci",
        "socket": {"path": socket, "type": "unix"},
        "id": DEVICE_ID,
        "x-msg-timeout": MESSAGE_TIMEOUT_MILLISECONDS,
    }
    words: list[str] = []
    if variant == "express":
        slot = int(address.partition(".")[0], 16)
        # A chassis number is free for whoever has the slot, if everybody takes it from there.
        port = f"pcie-root-port,id={PORT_ID},bus=pcie.0,addr={address},chassis={slot}"
        words += ["-device", port]
        device["bus"] = PORT_ID
    else:
        device["addr"] = address
    return [*words, "-device", json.dumps(device, separators=(",", ":"))]


def qemu_text(arguments: list[str]) -> str:
    """For a shell: one option a line."""
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    return " \\\n".join(f"{option} {shlex.quote(value)}" for option, value in pairs)


def libvirt_text(arguments: list[str]) -> str:
    """What goes into the domain. The namespace stands in its first line; libvirt drops the rest without it."""
    inner = "\n".join(f"    <qemu:arg value={quoteattr(word)}/>" for word in arguments)
    return (
        f"<domain type='kvm' xmlns:qemu='{QEMU_NAMESPACE}'>\n  ...\n"
        f"  <qemu:commandline>\n{inner}\n  </qemu:commandline>\n</domain>"
    )
