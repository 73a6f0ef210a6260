# SPDX-License-Identifier: Apache-2.0
"""A machine with the virtual GPU and the project's own installer run in it: what a user of a VM has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final, Self

from tests.vm.host import Host
from tests.vm.machine import Machine
from tests.vm.remote import Process, Result

ROOT: Final = Path(__file__).resolve().parents[2]
INSTALLER: Final = ROOT / "shim" / "guest" / "install.sh"
LIBRARIES: Final = Path("/usr/lib/vgpu")
INSTALL_SECONDS: Final = 180.0
# Groups that the installer gives the device to, in its order of choice.
GROUPS: Final = ("render", "video")


class GuestMachine(Machine):
    """A VM of a :class:`Host`. Inside the context everything is installed and nothing else is set: no variable, no path."""

    def __init__(self, host: Host, vm: str, **options: Any) -> None:
        super().__init__([host.socket(vm)], name=vm, **options)
        self.host, self.vm = host, vm
        self.guest_agent: Process | None = None

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self.install()
        except BaseException:
            self.close()
            raise
        return self

    def install(self) -> Result:
        """Run the installer, and the guest agent, which systemd would start."""
        result = self.run(["/bin/sh", INSTALLER, "install"], seconds=INSTALL_SECONDS)
        self.start_agent()
        return result

    def start_agent(self) -> None:
        """Start the agent that releases slots of the dead, so that it survives unplugging, as its unit would have it."""
        self.guest_agent = self.spawn([LIBRARIES / "vgpu-guest-agent", "--stay", *self._group_words()])
        self.kept = [self.guest_agent]

    def tidy(self) -> None:
        """As after its start: running, plugged, installed."""
        was_running, was_plugged = self.is_running(), not self.unplugged
        super().tidy()
        if not was_running:
            self.install()
        elif not was_plugged:
            self.wait_device(present=True)

    def _group_words(self) -> list[str]:
        group = self.gpu_group()
        return ["--group", group[0]] if group is not None else []

    def gpu_group(self) -> tuple[str, int] | None:
        """The group of this system that may use GPUs: name and number."""
        known = {
            words[0]: int(words[2])
            for words in (line.split(":") for line in self.run("cat /etc/group").lines)
            if len(words) > 2
        }
        return next(((name, known[name]) for name in GROUPS if name in known), None)

    # -- what the host sees of it

    def worker_of(self, process: Process) -> int:
        """The worker that serves a process of this machine."""
        return self.host.worker_in(self.vm, process)

    def replug(self) -> None:
        """Take the device out and put the one that is served now in, as an administrator does after a crash."""
        self.unplug()
        self.wait_device(present=False)
        self.plug(self.host.socket(self.vm))
        self.wait_device(present=True)

    def wait_device(self, *, present: bool, seconds: float = 30) -> None:
        """Wait until the guest's kernel sees the GPU, or no longer does; switches it on, as the udev rule would."""
        found = "grep -qs 0x2331 /sys/bus/pci/devices/*/device"
        test = found if present else f"! {found}"
        self.run(f"for i in $(seq {int(seconds * 10)}); do {test} && exit 0; sleep 0.1; done; exit 1")
        if present:
            words = " ".join(self._group_words())
            permit = f"{LIBRARIES}/vgpu-guest-agent {words} --permit"
            self.run(
                f"for d in $(grep -ls 0x2331 /sys/bus/pci/devices/*/device); do {permit} ${{d%/device}}; done"
            )


def last_turn(process: Process) -> int:
    """The number of the last turn that the program ``steady`` has told."""
    turns = re.findall(r"^turn (\d+)", process.output(), re.MULTILINE)
    return int(turns[-1]) if turns else 0
