# SPDX-License-Identifier: Apache-2.0
"""Step ``quota`` of ``control.py``: a VM's memory over two sessions is one number, whoever is asked.

For each way of allocating, two programs of a VM take odd sizes and give them back. After each move all witnesses are asked:
the account that is enforced, the sum of the sessions, cuMemGetInfo and NVML in both programs, the metrics. Beside the guests a
native program sees the whole card: what its free memory changed by is what the real driver took for them.
"""

from __future__ import annotations

import time
from typing import Any

from .control_host import MIB, Findings, Host, Load, Scene, open_host, open_native

OUT_OF_MEMORY, NOT_SUPPORTED = 2, 801
SETTLE_SECONDS = 2.0
VM = "small"


def measure(scene: Scene, found: Findings) -> None:
    """Each way in turn, then what is refused."""
    quota = scene.pick(2048, 128) * MIB
    granule = 2 * MIB
    with open_host(scene, warm=1) as host, open_native(scene) as native:
        host.change("register_vm", vm_name=VM, memory_limit_bytes=quota, bar1_bytes=0)
        pair = [host.load(scene, VM) for _ in range(2)]
        host.settle()
        found.put("quota_bytes", quota)
        witnesses = _Witnesses(host, pair, native, quota)
        sizes = {
            "alloc": (1000, 5 * MIB + 7, 1000, 33 * MIB + 12345, 100_000),
            "create": (granule, 8 * granule, 3 * granule),
            "pool": (1000, 5 * MIB + 7, 17 * MIB + 3),
            "array": (1000, 5 * MIB, 17 * MIB, 64_000, 64_000, 1000, 400_000, 1000, 900_000, 3 * MIB),
        }
        for how, each in sizes.items():
            _one(witnesses, found.child(how), how, each, granule)
        _graph_steps(witnesses, found.child("graph_steps"), scene.pick(100, 30) * MIB)
        _one(witnesses, found.child("graph"), "graph", (1000, 5 * MIB + 7, 17 * MIB + 3), granule)
        found.put("counted_refusals", host.account(VM)["refused"]["memory"])


class _Witnesses:
    """All that know how much memory the VM holds."""

    def __init__(self, host: Host, pair: list[Load], native: Load | None, quota: int) -> None:
        self.host, self.pair, self.native, self.quota = host, pair, native, quota

    def card(self) -> int | None:
        """Bytes free on the whole card, by the real driver."""
        return None if self.native is None else self.native.ask("info")[1]

    def used(self) -> dict[str, int]:
        """What each says is used."""
        found = {
            "account": self.host.account(VM)["used"]["memory"],
            "sessions": sum(s["grant"]["memory_used_bytes"] for s in self.host.of_vm(VM)),
            "metric": int(self.host.metric("vgpu_vm_memory_used_bytes", vm=VM)),
        }
        for number, load in enumerate(self.pair):
            status, free, total, _ = load.ask("info")
            assert status == 0, f"cuMemGetInfo: {status}"
            found[f"cuMemGetInfo in {number}"] = total - free
            status, total, free, used = load.ask("nvml")
            assert status == 0, f"NVML: {status}"
            found[f"NVML in {number}"] = used
            found[f"NVML's total less free in {number}"] = total - free
        return found

    def limits(self) -> dict[str, int]:
        """What each says the VM may have."""
        found = {
            "account": self.host.account(VM)["limits"]["memory_bytes"],
            "metric": int(self.host.metric("vgpu_vm_memory_limit_bytes", vm=VM)),
        }
        for number, load in enumerate(self.pair):
            _, _, total, device_total = load.ask("info")
            found[f"cuMemGetInfo in {number}"] = total
            found[f"cuDeviceTotalMem in {number}"] = device_total
            found[f"NVML in {number}"] = load.ask("nvml")[1]
        return found

    def agreed(self) -> dict[str, Any]:
        """Ask until all say the same, for a while; how long that took."""
        began = time.monotonic()
        while True:
            used = self.used()
            took = time.monotonic() - began
            if len(set(used.values())) == 1:
                return {"agreed": True, "bytes": used["account"], "seconds": round(took, 3)}
            if took > SETTLE_SECONDS:
                return {"agreed": False, "bytes": used["account"], "said": used}


GRAPH_STEPS = (
    "trimmed",
    "with_a_node",
    "instantiated",
    "uploaded",
    "launched",
    "launched_20_times",
    "trimmed_while_it_ran",
    "synchronized",
    "without_the_graph",
    "trimmed_again",
)


def _graph_steps(witnesses: _Witnesses, part: Findings, size: int) -> None:
    """When a graph's memory is taken and given back: in a program of the VM, and in a native one for comparison."""
    before = witnesses.agreed()
    everybody = {"guest": witnesses.pair[0]} | ({"native": witnesses.native} if witnesses.native else {})
    for who, load in everybody.items():
        status, *seen = load.ask("graph-steps", size)
        steps = dict(zip(GRAPH_STEPS, seen, strict=True))
        part.put(who, {"size": size, "status": status, **steps})
        part.judge(
            f"{who}: a launch has the memory, and the ones after it take no more",
            status == 0 and size <= steps["launched"] == steps["launched_20_times"],
        )
        part.judge(f"{who}: trimming gives it back", steps["trimmed_again"] == steps["trimmed"])
    after = witnesses.agreed()
    part.put("after", after)
    part.judge("all is given back", after["agreed"] and after["bytes"] == before["bytes"])


def _one(witnesses: _Witnesses, part: Findings, how: str, sizes: tuple[int, ...], granule: int) -> None:
    """Take it all, in turns by the two programs; then more than there is; then give it back."""
    before, card_before = witnesses.agreed(), witnesses.card()
    moves = []
    good = before["agreed"]
    charged_as_taken = True
    for number, size in enumerate(sizes):
        (status,) = witnesses.pair[number % 2].ask(how, size)
        if status == NOT_SUPPORTED:
            part.put("status", status)
            return
        now, card = witnesses.agreed(), witnesses.card()
        move: dict[str, Any] = {"size": size, "status": status, **now}
        if card is not None and card_before is not None:
            move["taken_from_the_card"] = card_before - card
            charged_as_taken &= card_before - card == now["bytes"] - before["bytes"]
        good &= now["agreed"] and status == 0
        moves.append(move)
    part.put("moves", moves)
    part.put("granted_sizes_sum", sum(sizes))
    limits = witnesses.limits()
    part.put("limits", limits)
    part.judge("one limit for all who are asked", set(limits.values()) == {witnesses.quota})
    part.judge("one number for all who are asked", good)
    if witnesses.native is not None:
        part.judge("charged what the driver took, to the byte", charged_as_taken)
    left = witnesses.quota - moves[-1]["bytes"]
    more = (left // granule + 1) * granule
    statuses = [load.ask(how, more)[0] for load in witnesses.pair]
    refused = witnesses.agreed()
    part.put("more_than_is_left", {"size": more, "left": left, "statuses": statuses, **refused})
    part.judge("over it: CUDA_ERROR_OUT_OF_MEMORY", statuses == [OUT_OF_MEMORY] * 2)
    part.judge("a refusal charges nothing", refused["agreed"] and refused["bytes"] == moves[-1]["bytes"])
    exact = left // granule * granule
    (status,) = witnesses.pair[0].ask(how, exact)
    full = witnesses.agreed()
    part.put("all_that_is_left", {"size": exact, "status": status, **full})
    for load in witnesses.pair:
        assert load.ask("free") == [0]
    after, card = witnesses.agreed(), witnesses.card()
    part.put("given_back", after)
    part.judge("all is given back", after["agreed"] and after["bytes"] == before["bytes"])
    if card is not None and card_before is not None:
        part.put("not_given_back_to_the_card", card_before - card)
