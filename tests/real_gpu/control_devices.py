# SPDX-License-Identifier: Apache-2.0
"""Parts of step ``faults`` that have to do with a VM's PCI device: a VM that dies with all it has, a device process that is killed.

QEMU's part is played by a vfio-user client that maps BAR1, its processes by Python (``tests/e2e/vm_device.py``); workers, device
processes, sessions and memory are real.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.e2e.mediator import is_alive, wait_until
from tests.e2e.vm_device import VirtualMachine, VmGuest
from tests.gpu.replay.guest import DEAD, LOST, STATE, STICKY
from vgpu.transport._generated_calls import CallId

from .control_host import MIB, Findings, Host, Load, Scene

DEVICE_UNAVAILABLE = 46
SLOTS = 4
DIED_SECONDS, TOLD_SECONDS, BACK_SECONDS = 2.0, 10.0, 20.0
PATIENCE = 30.0
# Sets of all a process holds that lie in its queue when its VM dies.
QUEUED = 64


def vm_dies(scene: Scene, host: Host, native: Load | None, part: Findings) -> None:
    """QEMU's connection ends while four of the VM's processes hold memory and have work queued."""
    held = scene.pick(4096, 16) * MIB
    path = _register(host, "mortal")
    with VirtualMachine(path) as machine:
        guests = [VmGuest(machine, slot, slot + 1, 100 + slot) for slot in range(SLOTS)]
        addresses = []
        for guest in guests:
            guest.retain()
            taken = guest.ask(CallId.cuMemAlloc_v2, held)
            assert taken.status == 0, f"cuMemAlloc: {taken.status}"
            addresses.append(taken.values[0])
        of_vm = {int(s["info"]["session"]): int(s["info"]["worker_pid"]) for s in host.of_vm("mortal")}
        workers = [of_vm[guest.session] for guest in guests]
        host.settle()
        before = None if native is None else native.ask("info")[1]
        for guest, address in zip(guests, addresses, strict=True):
            for _ in range(QUEUED):
                guest.put(CallId.wireMemset, address, held, 7, 1, held, 1, 0)
            guest.publish()
    died = time.monotonic()
    rounds: dict[str, Any] = {}

    def reached(name: str) -> None:
        rounds[name] = time.monotonic() - died

    wait_until(lambda: not any(map(is_alive, workers)), PATIENCE, "all workers are gone")
    reached("workers_gone_seconds")
    wait_until(lambda: host.account("mortal")["used"]["memory"] == 0, PATIENCE, "its account is empty")
    reached("account_empty_seconds")
    wait_until(lambda: not host.of_vm("mortal"), PATIENCE, "its sessions have ended")
    reached("sessions_ended_seconds")
    if native is not None and before is not None:
        # Their contexts are gone with them, so more than they held is free again.
        wait_until(lambda: native.ask("info")[1] >= before + SLOTS * held, PATIENCE, "its memory is free")
        reached("memory_free_on_the_card_seconds")
    part.put("held_bytes", SLOTS * held)
    part.put("seconds", rounds)
    part.judge("all is gone within 2 s", max(rounds.values()) < DIED_SECONDS, of_speed=True)
    _next_boot(path, part)


def device_killed(host: Host, part: Findings) -> None:
    """SIGKILL to the device process of a VM that computes; the VM stays, and plugs the device again."""
    path = _register(host, "unplugged")
    with VirtualMachine(path) as machine:
        guest = VmGuest(machine, 0, 1, 100)
        guest.retain()
        part.judge("it computed before", guest.counted(7) == 7)
        (session,) = host.of_vm("unplugged")
        worker, device = int(session["info"]["worker_pid"]), int(host.device("unplugged")["pid"])
        os.kill(device, signal.SIGKILL)
        killed = time.monotonic()
        wait_until(lambda: guest.u32(STATE) == DEAD, PATIENCE, "its program is told")
        told = time.monotonic() - killed
        part.put("told", {"seconds": told, "status": guest.u32(STICKY), "lost": guest.u32(LOST)})
        part.judge("CUDA_ERROR_DEVICE_UNAVAILABLE", guest.u32(STICKY) == DEVICE_UNAVAILABLE)
        wait_until(lambda: not is_alive(worker), PATIENCE, "its worker is gone")
        part.put("worker_gone_seconds", time.monotonic() - killed)
        wait_until(
            lambda: host.device("unplugged")["pid"] not in (0, device), PATIENCE, "the device runs again"
        )
        back = time.monotonic() - killed
        part.put("device_back_seconds", back)
        part.judge("told within 10 s", told < TOLD_SECONDS, of_speed=True)
        part.judge("the device is back within 20 s", back < BACK_SECONDS, of_speed=True)
        _next_boot(path, part)


def _register(host: Host, vm: str) -> Path:
    """A VM with a device; where its QEMU connects."""
    answer = host.change("register_vm", vm_name=vm, bar1_bytes=64 * MIB, slots=SLOTS)
    return Path(answer["device"]["socket"])


def _next_boot(path: Path, part: Findings) -> None:
    with VirtualMachine(path) as machine:
        guest = VmGuest(machine, 0, 9, 11)
        guest.retain()
        part.judge("the next one computes", guest.counted(9) == 9)
