#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Three VMs, two pools: each gets its share; then one floods, and one hangs until it is quarantined.

VM 1 (pool A, high, weight 80), VM 2 (pool A, medium, weight 50), VM 3 (pool B, high, weight 60). To watch it, say
``examples/three_vms.py --seconds 60`` and run the ``vgpu-admin`` line that it prints first in another terminal.
"""

from __future__ import annotations

import json
import time

from _support import LAUNCH_TIMEOUT, Example, Host, NotSo, main, wait_until

VMS = {"vm1": ("A", "high", 80), "vm2": ("A", "medium", 50), "vm3": ("B", "high", 60)}
DEADLINE = 1.0  # instead of thirty seconds
RATE = 500  # calls a second, for the flooder
# A kernel on so many words takes long enough for a program to be always ahead of it.
WORDS = {"software": 1 << 16, "nvidia": 1 << 26}
FAULTS = 3  # that quarantine a VM


def used(host: Host) -> dict[str, float]:
    """GPU seconds of each VM's sessions so far, ended ones too."""
    seconds = dict.fromkeys(VMS, 0.0)
    for sample in host.ask("sessions"):
        seconds[sample["info"]["vm"]] += sample["grant"]["gpu_ns"] / 1e9
    return seconds


def shares(example: Example, host: Host, seconds: float, what: str) -> dict[str, float]:
    """Watch for a while, and print who had how much of the GPU."""
    before = used(host)
    time.sleep(seconds)
    gained = {vm: max(after - before[vm], 0) for vm, after in used(host).items()}
    total = sum(gained.values()) or 1.0
    found = {vm: value / total for vm, value in gained.items()}
    example.say(f"{what}: " + ", ".join(f"{vm} {share:.0%}" for vm, share in found.items()))
    return found


def sharing(example: Example, host: Host, seconds: float) -> None:
    """All three want all of the GPU."""
    hungry = [
        host.begin("flood.py", f"{seconds + 1:g}", str(1 << 30), str(WORDS[host.gpu]), vm=vm) for vm in VMS
    ]
    for guest in hungry:
        guest.until("flooding")
    time.sleep(0.5)
    found = shares(example, host, seconds, "all three want all of it")
    example.fact(found["vm1"] > found["vm2"] > 0.02, "VM 1 has more than VM 2, and VM 2 does not starve")
    example.fact(0.3 < found["vm3"] < 0.7, f"VM 3, alone in its pool, has about half ({found['vm3']:.0%})")
    for guest in hungry:
        guest.kill()
    wait_until(lambda: not host.sessions(), "their sessions have ended")


def flooding(example: Example, host: Host, seconds: float) -> None:
    """VM 2 floods over its rate beside the others' work."""
    example.say(host.admin("set-rate-limit", "--vm-name=vm2", f"--rate={RATE}"))
    others = [host.begin("neighbour.py", vm=vm) for vm in ("vm1", "vm3")]
    for guest in others:
        guest.until("turn")
    flood = host.begin("flood.py", f"{seconds:g}", str(int(RATE * max(seconds, 2))), vm="vm2")
    flood.until("flooding")
    shares(example, host, seconds, "VM 2 floods")
    status, last = flood.finish_by_itself(60)
    done = json.loads(last)
    rate = (done["launches"] - RATE) / max(done["seconds"], 0.1)  # the burst is one second's calls
    example.fact(
        status == 0 and done["is_right"] and rate < RATE * 1.1,
        f"VM 2 was told BUSY down to {rate:.0f} calls a second beyond its burst; of {done['launches']} launches none is lost",
    )
    for vm, guest in zip(("vm1", "vm3"), others, strict=True):
        example.settle(vm, guest)
    host.admin("set-rate-limit", "--vm-name=vm2", "--rate=0")


def hanging(example: Example, host: Host) -> None:
    """VM 3 launches kernels that never end, until it is kept away."""
    others = [host.begin("neighbour.py", vm=vm) for vm in ("vm1", "vm2")]
    for guest in others:
        guest.until("turn")
    for number in range(FAULTS):
        guest = host.begin("hang.py", vm="vm3")
        guest.until("launching")
        began = time.monotonic()
        code = int(guest.until("synchronize").split()[1])
        took = time.monotonic() - began
        example.fact(
            code == LAUNCH_TIMEOUT,
            f"VM 3 hangs, {number + 1}: told CUDA_ERROR_LAUNCH_TIMEOUT after {took:.1f} s",
        )
        guest.finish()
    wait_until(lambda: "vm3" in host.admin("list-quarantines"), "VM 3 is quarantined", 10)
    refused = host.begin("neighbour.py", vm="vm3")
    status, last = refused.finish()
    example.fact(status != 0 and "CudaError" in last, f"VM 3 is quarantined; its next program: {last}")
    example.say(host.admin("list-quarantines").replace("\n", "\n  "))
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
        example.say(f"to watch: vgpu-admin --run-dir {host.run_dir} top")
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
        flooding(example, host, min(seconds, 10))
        hanging(example, host)
        example.say(host.admin("show-faults").replace("\n", "\n  "))


if __name__ == "__main__":
    raise SystemExit(main(__doc__, body))
