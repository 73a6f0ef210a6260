# SPDX-License-Identifier: Apache-2.0
"""The host's side of the VM tests: a mediator on the software GPU with VMs registered, and what a test asks of it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from tests.e2e.mediator import Mediator, is_alive, wait_until
from tests.vm.remote import Process
from vgpu.actors.ledger import LedgerFile
from vgpu.actors.messages import VmRecord
from vgpu.transport.stub.launch import vfio_socket_path
from vgpu.transport.vfio_user.pci import Variant

BAR1_BYTES: Final = 256 << 20
DEVICE_SECONDS: Final = 30.0


class Host(Mediator):
    """A mediator whose VMs are registered before it starts: name -> variant of the VM's device."""

    def __init__(
        self,
        vms: Mapping[str, Variant],
        *,
        slots: int = 8,
        bar1_bytes: int = BAR1_BYTES,
        options: Sequence[str] = (),
    ) -> None:
        super().__init__(options=options)
        self._vms = dict(vms)
        ledger = LedgerFile(self.state_dir / "ledger.sqlite")
        for name, variant in vms.items():
            ledger.save_vm(VmRecord(name, bar1_bytes=bar1_bytes, slots=slots, variant=variant.value))
        ledger.close()

    def start(self) -> None:
        """Start the mediator, and wait until the device of every VM is there for QEMU and for guests."""
        super().start()
        for name in self._vms:
            self.wait_for_device(name)

    def stop(self) -> None:
        """End the mediator, every worker and every device process."""
        super().stop()
        for pid in self._device_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def socket(self, vm: str) -> Path:
        """Where QEMU connects the device of a VM."""
        return vfio_socket_path(self.run_dir, vm)

    # -- devices

    def device(self, vm: str) -> dict[str, Any]:
        """What the mediator knows of a VM's device."""
        (found,) = [device for device in self.ask("devices") if device["vm"] == vm]
        return dict(found)

    def wait_for_device(self, vm: str) -> None:
        """Wait until the device is served and the mediator is connected to it."""

        def there() -> bool:
            return self.socket(vm).is_socket() and bool(self.device(vm)["running"])

        wait_until(there, DEVICE_SECONDS, f"the device of {vm} is there")

    def kill_device(self, vm: str) -> None:
        """SIGKILL a device process, as a crash would end it, and wait until the mediator has a new one there."""
        pid = int(self.device(vm)["pid"])
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid), 60, "the device process is gone")
        wait_until(
            lambda: self.device(vm)["pid"] not in (0, None, pid),
            DEVICE_SECONDS,
            f"{vm} has a new device process",
        )
        self.wait_for_device(vm)

    def accesses(self, vm: str) -> Accesses:
        """How often the VM has been trapped so far. The count comes once a second, so it is awaited until it rests."""
        seen: list[Accesses] = []

        def rests() -> bool:
            counters = self.device(vm)["counters"]
            names = ("reads", "writes", "refused", "claims", "doorbells")
            seen.append(Accesses(**{name: int(counters.get(name, 0)) for name in names}))
            return len(seen) > 150 and len(set(seen[-150:])) == 1

        wait_until(rests, 60, f"the counters of {vm} rest")
        return seen[-1]

    def _device_pids(self) -> list[int]:
        marker = str(self.run_dir).encode()
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
                if b"vgpu.transport.stub" in words and marker in words:
                    found.append(int(entry.name))
        return found

    # -- sessions

    def sessions_of(self, vm: str) -> list[dict[str, Any]]:
        """The living sessions of a VM."""
        return [sample for sample in self.sessions() if sample["info"]["vm"] == vm]

    def session_in(self, vm: str, process: Process) -> dict[str, Any]:
        """The living session of a process in a VM."""
        (found,) = [s for s in self.sessions_of(vm) if s["info"]["guest_pid"] == process.pid]
        return found

    def worker_in(self, vm: str, process: Process) -> int:
        """The worker process of a process in a VM."""
        return int(self.session_in(vm, process)["info"]["worker_pid"])

    def kill_worker(self, pid: int) -> None:
        """SIGKILL."""
        os.kill(pid, signal.SIGKILL)

    def wait_idle(self, vm: str, seconds: float = 10) -> None:
        """Wait until no process of the VM has a session, and all slots of its device are free."""
        wait_until(
            lambda: not self.sessions_of(vm) and self.device(vm)["claimed"] == 0,
            seconds,
            f"{vm} has no session",
        )


@attrs.frozen
class Accesses:
    """What a device has counted."""

    reads: int
    writes: int
    refused: int
    claims: int
    doorbells: int

    def since(self, earlier: Accesses) -> Accesses:
        """The difference."""
        return Accesses(*(a - b for a, b in zip(attrs.astuple(self), attrs.astuple(earlier), strict=True)))

    @property
    def trapped(self) -> int:
        """Accesses that stopped a processor of the VM."""
        return self.reads + self.writes
