#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Every actor of the mediator raises, one after the other, under load: supervisors restart them, programs do not notice.

Programs of two kinds compute: neighbours of this host, and one in a VM, through its device. Then supervisors raise, from below to
above. Those of connections and devices hold no session, and nobody notices. Those of a GPU hold its executors, and an executor
is the exception that is meant: it owns one worker, and its end is that session's end. The supervisor at the top is left out: its
end is the mediator's (``mediator_restarts.py``).
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from _in_process import InjectedFault, MediatorHere, mediator_here
from _slot_guest import SlotGuest, VirtualMachine, VmProgram
from _support import Example, Guest, Host, main, wait_until

from vgpu.actors import Crashed

# A supervisor gives up when ten of its children end within ten seconds; here every failure is ours.
RESTARTS = 9
PERIOD_SECONDS = 10.5
# Supervisors that have executors below them, from below to above.
WITH_SESSIONS = ("mediator/gpus/gpu0/executors", "mediator/gpus/gpu0", "mediator/gpus")


class Pace:
    """Keeps the failures below one supervisor as rare as it accepts."""

    def __init__(self) -> None:
        self._last: dict[str, list[float]] = {}

    def wait(self, name: str) -> None:
        """Return when one more may be."""
        times = self._last.setdefault(name.rpartition("/")[0], [])
        if len(times) >= RESTARTS:
            time.sleep(max(0.0, times[-RESTARTS] + PERIOD_SECONDS - time.monotonic()))
        times.append(time.monotonic())


class Faults:
    """Makes one actor after the other raise."""

    def __init__(self, example: Example, mediator: MediatorHere) -> None:
        self._example, self._mediator = example, mediator
        self._pace = Pace()

    def raise_in(self, name: str, *, comes_back: bool = True) -> bool:
        """Was it our error that ended it? If it comes back, its successor lives now."""
        self._pace.wait(name)
        reason = self._mediator.make_raise(name, comes_back=comes_back)
        return isinstance(reason, Crashed) and isinstance(reason.error, InjectedFault)

    def unnoticed(self, name: str, neighbours: list[Guest], in_vm: VmProgram) -> None:
        """State that nobody lost anything by it."""
        is_ours = self.raise_in(name)
        self._example.goes_on(neighbours)
        in_vm.goes_on()
        self._example.fact(is_ours, f"{name} raised, was restarted, and all programs computed on")


def sessions_of(host: Host) -> set[int]:
    return {sample["info"]["session"] for sample in host.sessions()}


def device_of(host: Host, vm: str) -> int:
    """The process of a VM's device, once the actor that keeps it is connected to it."""

    def pids() -> list[int]:
        return [device["pid"] for device in host.ask("devices") if device["vm"] == vm and device["running"]]

    wait_until(lambda: bool(pids()), f"the device of {vm} runs")
    return pids()[0]


def without_sessions(
    example: Example, host: Host, mediator: MediatorHere, faults: Faults, machine: VirtualMachine
) -> None:
    """Actors that own no session: programs of this host and of a VM do not notice."""
    guest = SlotGuest(machine, 0, 1)
    with example.neighbours(host, 2) as neighbours, guest, VmProgram(guest) as in_vm:
        example.say("a program in a VM stores numbers in device memory and checks what comes back")
        wait_until(lambda: guest.session in sessions_of(host), "the VM's session is known")
        before, device = sessions_of(host), device_of(host, "in-vm")
        for name in [name for name in mediator.actors() if "/executors/" not in name]:
            faults.unnoticed(name, neighbours, in_vm)
        for name in [name for name in mediator.supervisors() if name not in WITH_SESSIONS]:
            faults.unnoticed(name, neighbours, in_vm)
        wait_until(lambda: sessions_of(host) == before, "the sessions are known again")
        example.fact(True, "all sessions are the same as before")
        example.fact(device_of(host, "in-vm") == device, "and so is the process of the VM's device")
        with SlotGuest(machine, 1, 2) as newcomer:
            example.fact(newcomer.turn(), "a newcomer in the VM has a session, and its number came back")
        an_executor(example, host, mediator, faults)
        example.goes_on(neighbours)
        in_vm.goes_on()
    example.fact(
        (in_vm.failure, in_vm.wrong) == ("", 0) and in_vm.turns > 0,
        f"the program in the VM: {in_vm.turns} numbers, {in_vm.wrong} wrong {in_vm.failure}".rstrip(),
    )


def an_executor(example: Example, host: Host, mediator: MediatorHere, faults: Faults) -> None:
    """It takes its session along, and no other."""
    victim = host.begin("neighbour.py", vm="victim")
    victim.until("turn")
    session = host.session_of(victim)["info"]["session"]
    executors = [name for name in mediator.actors() if "/executors/" in name]
    name = max(executors, key=lambda name: int(name.rpartition("-")[2]))
    is_ours = faults.raise_in(name, comes_back=False)
    ends_with_an_error(example, victim, is_ours, f"the executor of session {session}")
    a_newcomer(example, host, "victim")


def with_sessions(example: Example, host: Host, faults: Faults) -> None:
    """Supervisors that hold executors take their sessions along; then all of it is there again."""
    for number, name in enumerate(WITH_SESSIONS):
        # Each time another VM: three faults of one would quarantine it.
        victim = host.begin("neighbour.py", vm=f"victim-{number}")
        victim.until("turn")
        is_ours = faults.raise_in(name)
        ends_with_an_error(example, victim, is_ours, name)
        a_newcomer(example, host, f"newcomer-{number}")


def ends_with_an_error(example: Example, victim: Guest, is_ours: bool, name: str) -> None:
    status, last = victim.finish_by_itself()
    done = json.loads(last)
    example.fact(
        is_ours and status == 1 and (done["failed"], done["wrong"]) == (1, 0),
        f"{name} raised: its program got an error, and no wrong number",
    )


def a_newcomer(example: Example, host: Host, vm: str) -> None:
    newcomer = host.begin("neighbour.py", vm=vm)
    newcomer.until("turn")
    example.settle("a newcomer", newcomer)


def body(example: Example) -> None:
    with example.host(start=False) as host, mediator_here(host) as mediator:
        answer = host.admin("register-vm", "--vm-name=in-vm", "--bar1=16MiB", "--slots=4", "--json")
        faults = Faults(example, mediator)
        with VirtualMachine(Path(json.loads(answer)["device"]["socket"])) as machine:
            without_sessions(example, host, mediator, faults, machine)
            with_sessions(example, host, faults)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, body))
