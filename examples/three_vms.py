#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Three VMs, two pools: each gets its share; then one floods, and one hangs until it is quarantined.

VM 1 (pool A, high, weight 80), VM 2 (pool A, medium, weight 50), VM 3 (pool B, high, weight 60). To watch it, say
``examples/three_vms.py --seconds 60`` and run the ``vgpu-admin`` line that each part prints first in another terminal. Each
part lasts as long as that: all three want all of it, VM 2 floods, VM 3 is quarantined.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from _support import Example, Host, NotSo, main, wait_until

VMS = {"vm1": ("A", "high", 80), "vm2": ("A", "medium", 50), "vm3": ("B", "high", 60)}
DEADLINE = 1.0  # instead of thirty seconds
# Calls a second, for the flooder: far fewer than its share of the GPU lets through beside two that go before it, so that
# it is its rate that slows it.
RATE = 25
# A kernel on so many words takes long enough for a program to be always ahead of it.
WORDS = {"software": 1 << 16, "nvidia": 1 << 26}
FAULTS = 3  # that quarantine a VM
# Longer than a part lasts, for programs that are told when to end.
MORE_SECONDS = 600


def top(host: Host) -> str:
    """The command line of ``vgpu-admin top``, for any folder: the command that is beside this Python, or its module."""
    command = Path(sys.executable).with_name("vgpu-admin")
    words = [str(command)] if command.exists() else [sys.executable, "-m", "vgpu.admin_main"]
    return shlex.join([*words, "--run-dir", str(host.run_dir), "top"])


def part(example: Example, host: Host, number: int, what: str, look_at: str) -> None:
    """Say that a part begins, and what there is to see of it."""
    example.say("")
    example.say(f"part {number} of 3: {what}")
    example.say(f"  watch it:  {top(host)}")
    example.say(f"  look at:   {look_at}")


def used(host: Host) -> dict[str, float]:
    """GPU seconds of each VM's sessions so far, ended ones too."""
    seconds = dict.fromkeys(VMS, 0.0)
    for sample in host.ask("sessions"):
        seconds[sample["info"]["vm"]] += sample["grant"]["gpu_ns"] / 1e9
    return seconds


@contextmanager
def shares(example: Example, host: Host, what: str) -> Iterator[dict[str, float]]:
    """Afterwards there is, and is printed, who had how much of the GPU while the block ran."""
    found: dict[str, float] = {}
    before = used(host)
    yield found
    gained = {vm: max(after - before[vm], 0) for vm, after in used(host).items()}
    total = sum(gained.values()) or 1.0
    found.update({vm: value / total for vm, value in gained.items()})
    example.say(f"{what}: " + ", ".join(f"{vm} {share:.0%}" for vm, share in found.items()))


def sharing(example: Example, host: Host, seconds: float) -> None:
    """All three want all of the GPU."""
    part(
        example,
        host,
        1,
        f"all three want all of the GPU, for {seconds:g} s",
        "GPU % of each VM, beside its SHARE %",
    )
    hungry = [
        host.begin("flood.py", f"{seconds + MORE_SECONDS:g}", str(1 << 30), str(WORDS[host.gpu]), vm=vm)
        for vm in VMS
    ]
    for guest in hungry:
        guest.until("flooding")
    time.sleep(0.5)
    with shares(example, host, "all three want all of it") as found:
        time.sleep(seconds)
    example.fact(found["vm1"] > found["vm2"] > 0.02, "VM 1 has more than VM 2, and VM 2 does not starve")
    example.fact(0.3 < found["vm3"] < 0.7, f"VM 3, alone in its pool, has about half ({found['vm3']:.0%})")
    for guest in hungry:
        guest.kill()
    wait_until(lambda: not host.sessions(), "their sessions have ended")


def flooding(example: Example, host: Host, seconds: float) -> None:
    """VM 2 floods over its rate beside the others' work."""
    part(
        example,
        host,
        2,
        f"VM 2 floods and may send {RATE} calls a second, the others compute, for {seconds:g} s",
        f'vm2: its STATE is "held back", its CALLS/S about {RATE}; the others compute',
    )
    example.say(host.admin("set-rate-limit", "--vm-name=vm2", f"--rate={RATE}"))
    others = [host.begin("neighbour.py", vm=vm) for vm in ("vm1", "vm3")]
    for guest in others:
        guest.until("turn")
    # Enough to be held back to the end, and little enough that the rest is soon done.
    launches = int(RATE * (seconds + 60))
    flood = host.begin("flood.py", f"{seconds + MORE_SECONDS:g}", str(launches), vm="vm2")
    flood.until("flooding")
    with shares(example, host, "VM 2 floods"):
        example.held_to_rate(host, flood, "vm2", RATE, seconds)
    for vm, guest in zip(("vm1", "vm3"), others, strict=True):
        example.settle(vm, guest)
    done = example.end_of_flood(host, flood, "vm2")
    example.fact(
        done["is_right"],
        f"of VM 2's {done['launches']} launches none is lost, none overtaken",
    )


def is_quarantined(host: Host, vm: str) -> bool:
    """Is it kept away now?"""
    return any(quarantine["vm"] == vm for quarantine in host.ask("quarantines"))


def hanging(example: Example, host: Host, seconds: float) -> None:
    """VM 3 launches kernels that never end, until it is kept away; then an administrator lets it in again."""
    part(
        example,
        host,
        3,
        f"VM 3 hangs {FAULTS} times, at {DEADLINE:g} s and more each, and is quarantined for {seconds:g} s",
        'vm3: a session at a time, CALLS/S 0; then its STATE is "quarantined", and its SHARE % the others\'',
    )
    others = [host.begin("neighbour.py", vm=vm) for vm in ("vm1", "vm2")]
    for guest in others:
        guest.until("turn")
    for number in range(FAULTS):
        guest = host.begin("hang.py", vm="vm3")
        example.hung(f"VM 3 hangs, {number + 1}: its program", guest, DEADLINE)
        guest.finish()
    wait_until(lambda: is_quarantined(host, "vm3"), "VM 3 is quarantined")
    with shares(example, host, "VM 3 is quarantined"):
        began = time.monotonic()
        refused = host.begin("neighbour.py", vm="vm3")
        status, last = refused.finish()
        example.fact(status != 0 and "CudaError" in last, f"VM 3 is quarantined; its next program: {last}")
        example.say(host.admin("list-quarantines").replace("\n", "\n  "))
        example.goes_on(others)
        time.sleep(max(0.0, began + seconds - time.monotonic()))
    example.fact(is_quarantined(host, "vm3"), "VM 3 stays quarantined until it is cleared")
    example.say(host.admin("clear-quarantine", "--vm-name=vm3"))
    again = host.begin("neighbour.py", vm="vm3")
    again.until("turn")
    example.settle("VM 3, once an administrator has cleared it,", again)
    for vm, guest in zip(("vm1", "vm2"), others, strict=True):
        example.settle(vm, guest)


def body(example: Example) -> None:
    seconds = example.seconds or 1.5
    if seconds < 1:
        raise NotSo("--seconds must be 1 or more")
    with example.host() as host:
        for vm, (pool, priority, weight) in VMS.items():
            words = [
                f"--pool={pool}",
                f"--priority={priority}",
                f"--weight={weight}",
                f"--watchdog={DEADLINE:g}s",
            ]
            host.admin("register-vm", f"--vm-name={vm}", "--no-device", *words)
        example.say(host.admin("list-vms").replace("\n", "\n  "))
        sharing(example, host, seconds)
        flooding(example, host, seconds)
        hanging(example, host, seconds)
        example.say("")
        example.say(host.admin("show-faults").replace("\n", "\n  "))


if __name__ == "__main__":
    raise SystemExit(main(__doc__, body))
