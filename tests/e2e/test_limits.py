# SPDX-License-Identifier: Apache-2.0
"""Limits of VMs through the whole system: a flooder slows down and nobody else, quotas are exact, changes hold at once."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.e2e.mediator import GPU, SMALL, Guest, wait_until
from tests.e2e.steady import Steady, ends_well, goes_on
from tests.e2e.vm_device import DeviceMediator
from tests.src.test_commands import command
from vgpu.gpu.process import WorkerOptions, start_worker
from vgpu.mediator import GpuPlan, MediatorPlan, open_mediator
from vgpu.transport.host_memory import HostMemory

MIB = 1 << 20
OUT_OF_MEMORY = 2
# A change is promised within 100 ms; the rest is for a loaded machine, and for asking.
AT_ONCE_SECONDS = 5.0

Build = Callable[[str], Path]


@pytest.fixture
def mediator() -> Iterator[DeviceMediator]:
    with DeviceMediator() as running:
        yield running


def change(mediator: DeviceMediator, method: str, **parameters: Any) -> dict[str, Any]:
    answer = mediator.call(method, **parameters)
    assert "result" in answer, answer
    return dict(answer["result"])


def refusal(mediator: DeviceMediator, method: str, **parameters: Any) -> str:
    return str(mediator.call(method, **parameters)["error"]["message"])


def account(mediator: DeviceMediator, vm: str) -> dict[str, Any]:
    (found,) = [a for a in mediator.ask("accounts") if a["vm"] == vm]
    return dict(found)


class Teller:
    """A program that allocates what it is told."""

    def __init__(self, mediator: DeviceMediator, build: Build, vm: str) -> None:
        self.guest = mediator.begin(build("teller"), vm=vm)
        self.guest.until("ready")

    def tell(self, what: object) -> tuple[int, int, int, int]:
        """CUresult, free, total, total of the device."""
        self.guest.say(str(what))
        code, free, total, device_total = map(int, self.guest.line().split())
        return code, free, total, device_total


def records(mediator: DeviceMediator, guest: Guest) -> int:
    return int(mediator.session_of(guest)["grant"]["records"])


def test_a_flooder_slows_to_its_rate_and_its_neighbour_loses_nothing(
    mediator: DeviceMediator, driver_program: Build, steady: Steady
) -> None:
    rate, count = 400, 1600
    change(mediator, "register_vm", vm_name="flooder", rate=rate)
    change(mediator, "register_vm", vm_name="calm")
    calm = steady.begin(mediator, "calm")
    flooder = mediator.begin(driver_program("flood"), str(count), vm="flooder")
    flooder.until("ready")
    before = records(mediator, flooder)
    began = time.monotonic()
    flooder.say()
    # Accounts are looked at twice a second, and it floods for three at least.
    wait_until(lambda: account(mediator, "flooder")["is_held_back"], 60, "it is held back")
    time.sleep(1)
    taken = records(mediator, flooder) - before
    elapsed = time.monotonic() - began
    assert taken <= rate * 1.05 * elapsed + rate
    flooder.until("flooded")
    lasted = time.monotonic() - began
    assert lasted >= (count - rate) / (rate * 1.05)
    assert lasted <= (count - rate) / rate + 60  # and it was not stuck
    flooder.until("in order")
    assert flooder.finish()[0] == 0
    assert account(mediator, "flooder")["held_back"] > 10
    assert not account(mediator, "calm")["held_back"]
    goes_on(calm, 20)
    ends_well(calm)


def test_two_sessions_of_a_vm_share_its_rate(mediator: DeviceMediator, driver_program: Build) -> None:
    rate, count = 400, 1000
    change(mediator, "register_vm", vm_name="flooder", rate=rate)
    pair = [mediator.begin(driver_program("flood"), str(count), vm="flooder") for _ in range(2)]
    for guest in pair:
        guest.until("ready")
    began = time.monotonic()
    for guest in pair:
        guest.say()
    for guest in pair:
        guest.until("in order")
        assert guest.finish()[0] == 0
    assert time.monotonic() - began >= (2 * count - rate) / (rate * 1.05)


def test_a_rate_is_changed_under_a_flooder(mediator: DeviceMediator, driver_program: Build) -> None:
    change(mediator, "register_vm", vm_name="flooder", rate=20)
    flooder = mediator.begin(driver_program("flood"), "5000", vm="flooder")
    flooder.until("ready")
    flooder.say()
    wait_until(lambda: account(mediator, "flooder")["is_held_back"], 60, "it is held back")
    changed = change(mediator, "change_vm", vm_name="flooder", rate=0, weight=70, priority="low")["vm"]
    assert (changed["rate"], changed["weight"], changed["priority"]) == (0, 70, "low")
    flooder.until("in order", 60)
    assert flooder.finish()[0] == 0


def test_a_quota_is_one_number_for_all_sessions(mediator: DeviceMediator, driver_program: Build) -> None:
    quota = 64 * MIB
    change(mediator, "register_vm", vm_name="small", memory_limit_bytes=quota)
    one, two = (Teller(mediator, driver_program, "small") for _ in range(2))
    assert one.tell("info") == (0, quota, quota, quota)
    assert one.tell(40 * MIB) == (0, 24 * MIB, quota, quota)
    assert two.tell("info") == (0, 24 * MIB, quota, quota)
    assert two.tell(24 * MIB + 1) == (OUT_OF_MEMORY, 24 * MIB, quota, quota)
    assert two.tell(24 * MIB) == (0, 0, quota, quota)
    assert one.tell(1) == (OUT_OF_MEMORY, 0, quota, quota)
    held = account(mediator, "small")
    assert (
        held["used"]["memory"] == quota == sum(s["grant"]["memory_used_bytes"] for s in mediator.sessions())
    )
    wait_until(lambda: account(mediator, "small")["refused"]["memory"] == 2, 60, "refusals are counted")
    # Other VMs are not concerned.
    other = Teller(mediator, driver_program, "other")
    assert other.tell(128 * MIB)[0] == 0
    # A worker that is killed gives back what it held.
    os.kill(mediator.worker_of(one.guest), signal.SIGKILL)
    wait_until(lambda: two.tell("info") == (0, 40 * MIB, quota, quota), 60, "the dead one's memory is back")
    assert two.tell(40 * MIB) == (0, 0, quota, quota)
    assert two.tell("free") == (0, quota, quota, quota)


def test_a_quota_is_changed_while_programs_run(mediator: DeviceMediator, driver_program: Build) -> None:
    change(mediator, "register_vm", vm_name="small", memory_limit_bytes=64 * MIB)
    teller = Teller(mediator, driver_program, "small")
    assert teller.tell(48 * MIB)[0] == 0
    began = time.monotonic()
    change(mediator, "change_vm", vm_name="small", memory_limit_bytes=96 * MIB)
    wait_until(
        lambda: teller.tell("info") == (0, 48 * MIB, 96 * MIB, 96 * MIB), 60, "it is larger everywhere"
    )
    assert time.monotonic() - began < AT_ONCE_SECONDS
    change(mediator, "change_vm", vm_name="small", memory_limit_bytes=32 * MIB)
    wait_until(
        lambda: teller.tell("info") == (0, 0, 32 * MIB, 32 * MIB), 60, "it is smaller than what is held"
    )
    assert teller.tell(1)[0] == OUT_OF_MEMORY
    assert teller.tell("free") == (0, 32 * MIB, 32 * MIB, 32 * MIB)
    change(mediator, "change_vm", vm_name="small", memory_limit_bytes=0)
    wait_until(lambda: teller.tell("info")[3] == 1 << 30, 60, "it is the whole card")


def test_limits_outlive_the_mediator(mediator: DeviceMediator, driver_program: Build) -> None:
    quota = 64 * MIB
    change(mediator, "register_vm", vm_name="small", memory_limit_bytes=quota)
    change(mediator, "create_pool", pool="B", weight=30)
    one, two = (Teller(mediator, driver_program, "small") for _ in range(2))
    assert one.tell(40 * MIB)[0] == 0
    assert two.tell(8 * MIB)[0] == 0
    mediator.kill()
    two.guest.kill()  # nobody is there to see it
    mediator.start()
    wait_until(lambda: len(mediator.sessions()) == 1, 60, "the other session goes on")
    wait_until(lambda: one.tell("info") == (0, 24 * MIB, quota, quota), 60, "the dead one's memory is back")
    assert one.tell(24 * MIB + 1)[0] == OUT_OF_MEMORY
    third = Teller(mediator, driver_program, "small")
    assert third.tell(24 * MIB) == (0, 0, quota, quota)
    assert [(p["name"], p["weight"]) for p in mediator.ask("pools")] == [("B", 30), ("default", 100)]


def test_a_vm_has_so_many_sessions_and_no_more(mediator: DeviceMediator, driver_program: Build) -> None:
    change(mediator, "register_vm", vm_name="single", session_limit=1)
    first = Teller(mediator, driver_program, "single")
    second = mediator.begin(driver_program("teller"), vm="single")
    status, lines = second.finish(60)
    assert status != 0
    assert "ready" not in lines
    assert first.tell("info")[0] == 0
    assert account(mediator, "single")["sessions_refused"] >= 1
    assert first.guest.finish()[0] == 0
    wait_until(lambda: account(mediator, "single")["sessions"] == 0, 60, "its place is free")
    assert Teller(mediator, driver_program, "single").tell("info")[0] == 0


def test_promises_that_cannot_be_kept_are_refused(mediator: DeviceMediator) -> None:
    change(mediator, "register_vm", vm_name="large", memory_limit_bytes=700 * MIB)
    why = refusal(mediator, "register_vm", vm_name="too-much", memory_limit_bytes=400 * MIB)
    assert "there are 1024 MiB, and 700 MiB of them are promised to others" in why
    assert "too-much" not in [vm["name"] for vm in mediator.ask("vms")]
    change(mediator, "register_vm", vm_name="too-much", memory_limit_bytes=400 * MIB, overcommit=True)
    change(mediator, "register_vm", vm_name="third")
    assert "promised" in refusal(mediator, "change_vm", vm_name="third", memory_limit_bytes=MIB)
    # What was promised may be made less, whatever the others have.
    change(mediator, "change_vm", vm_name="too-much", memory_limit_bytes=300 * MIB)
    change(mediator, "change_vm", vm_name="third", memory_limit_bytes=24 * MIB)
    assert "no pool 'Q'" in refusal(mediator, "change_vm", vm_name="third", pool="Q")
    assert "no VM 'nobody'" in refusal(mediator, "change_vm", vm_name="nobody", weight=3)
    assert "expected some of" in refusal(mediator, "change_vm", vm_name="third", slots=3)
    assert "rate is -1" in refusal(mediator, "change_vm", vm_name="third", rate=-1)
    change(mediator, "create_pool", pool="Q")
    assert "there already" in refusal(mediator, "create_pool", pool="Q")
    assert change(mediator, "change_vm", vm_name="third", pool="Q")["vm"]["pool"] == "Q"
    assert change(mediator, "set_pool_weight", pool="Q", weight=7) == {"name": "Q", "weight": 7}
    assert "no pool 'R'" in refusal(mediator, "set_pool_weight", pool="R", weight=7)
    (schedule,) = mediator.ask("schedule").values()
    assert schedule["pools"]["Q"]["weight"] == 7
    assert list(schedule["pools"]["Q"]["vms"]) == ["third"]


# Devices and workers outlive the mediator, on purpose; what it had of them is dropped while they run.
@pytest.mark.filterwarnings(
    "ignore:subprocess .* is still running:ResourceWarning", "ignore:unclosed file:ResourceWarning"
)
async def test_promises_of_the_hosts_memory_are_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host that is made up and small, so that the test asks for no more than any machine has."""
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    outside = DeviceMediator()
    memory = HostMemory(300 * MIB, 1)  # what is free just now decides nothing
    plan = MediatorPlan(
        outside.run_dir,
        outside.state_dir,
        (GpuPlan(0, partial(start_worker, WorkerOptions(outside.run_dir, GPU))),),
        memory=lambda: memory,
    )
    try:
        async with open_mediator(plan):
            await trio.to_thread.run_sync(_register_until_it_is_full, outside)
            memory = HostMemory(0, 0)
            why = await trio.to_thread.run_sync(
                lambda: refusal(outside, "register_vm", vm_name="x", **SMALLEST)
            )
            assert "does not say how much memory it has" in why
    finally:
        outside.__exit__()
        gc.collect()


SMALLEST = {"bar1_bytes": 16 * MIB, "slots": 1}


def _register_until_it_is_full(mediator: DeviceMediator) -> None:
    def register(name: str, *words: str) -> tuple[int, str]:
        done = command(
            "vgpu.admin_main", "register-vm", f"--vm-name={name}", *words, VGPU_RUN_DIR=str(mediator.run_dir)
        )
        return done.returncode, done.stderr

    def names() -> list[str]:
        return [vm["name"] for vm in mediator.ask("vms")]

    assert register("first") == (0, "")  # whose BAR1 has the 256 MiB that nobody said
    assert register("second", "--bar1=32MiB") == (0, "")
    status, why = register("third")
    assert status == 1
    assert why == (
        "vgpu-admin: VM 'third' cannot be promised a BAR1 of 256 MiB, which is memory of the host: there are"
        " 300 MiB, and 288 MiB of them are promised to others; a smaller --bar1, or --overcommit\n"
    )
    assert register("third", "--bar1=16MiB")[0] == 1
    assert names() == ["first", "second"]
    # One without a device is promised nothing; one that says so is let in; and one that leaves makes room.
    assert register("third", "--no-device") == (0, "")
    assert register("fourth", "--bar1=16MiB", "--overcommit") == (0, "")
    assert "304 MiB of them" in refusal(mediator, "register_vm", vm_name="fifth", **SMALLEST)
    change(mediator, "change_vm", vm_name="fourth", weight=7)
    change(mediator, "unregister_vm", vm_name="first")
    assert register("fifth", "--bar1=128MiB") == (0, "")
    assert names() == ["fifth", "fourth", "second", "third"]
