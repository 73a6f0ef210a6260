# SPDX-License-Identifier: Apache-2.0
"""Do VMs get their shares of a real GPU, whatever the length of their kernels, and does nobody pay for it?

    python bench/shares.py [--gpu nvidia|software] [--seconds N] [--quantum-us N...] [--variant NAME...] [--out FILE]

Runs a mediator and guests here, each guest in a VM of its own (bench/c/share_load.c). A guest's share is the kernels it
finished times what one takes it alone, over the sum of all. "Throughput" is that sum over the time: 1.0 is what they
do alone, back to back. Alone and together alternate; of the rounds the median counts. Criteria are printed with the
numbers: share error <= 2 points, Jain's index >= 0.999, throughput >= 0.985; a high-priority VM's P99 beside a greedy
VM <= 1.3 times its own without.

Variants (of the scheduler's tuning) run one after the other, so that one run compares them. The file is written anew after
each scenario. With ``--seconds 2`` a variant takes about 80 s.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import trio

from vgpu.actors import ActorSystem
from vgpu.actors.messages import ListSessions, ScheduleState, SetPool, SetVm
from vgpu.gpu.fluid import jain_index
from vgpu.gpu.process import WorkerOptions, start_worker
from vgpu.gpu.schedule import Tuning
from vgpu.mediator import GpuPlan, MediatorPlan, open_mediator
from vgpu.run_main import guest_environment

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import sides

SCHEDULER = "mediator/gpus/gpu0/scheduler"
SHARE_ERROR, JAIN, THROUGHPUT, SLOWDOWN = 0.02, 0.999, 0.985, 1.3
GUEST_SECONDS = 120.0
WARM_SECONDS = 0.5
CALIBRATE_NS = 8_000_000
ROUNDS = 3
ALONE = 1 / 3  # of the time together, for each VM and round
REQUESTS = (
    170  # in each round, for each second of the time together: the rounds' are enough for a 99th percentile
)
VARIANTS = {
    "default": Tuning(),
    "plain": Tuning(
        stretch=1, standby=False, guarded_parts=4
    ),  # each lease a quantum, and every arrival is asked for
    "stretch": Tuning(standby=False, guarded_parts=4),
    "standby": Tuning(stretch=1),
    "long": Tuning(stretch=4, round_ns=32_000_000),
    "tight": Tuning(guarded_parts=32),
}


@attrs.frozen
class Tenant:
    """A VM and its kernels."""

    vm: str
    weight: int
    kernel_us: float
    pool: str = "default"
    priority: str = "medium"


SCENARIOS: dict[str, tuple[dict[str, int], tuple[Tenant, ...]]] = {
    "75/25, 1 ms against 20 us": ({}, (Tenant("a", 75, 1000), Tenant("b", 25, 20))),
    "75/25, 20 us against 1 ms": ({}, (Tenant("a", 75, 20), Tenant("b", 25, 1000))),
    "90/10, 20 us against 1 ms": ({}, (Tenant("a", 90, 20), Tenant("b", 10, 1000))),
    "90/10, 1 ms against 20 us": ({}, (Tenant("a", 90, 1000), Tenant("b", 10, 20))),
    "two pools 50/50: 60/40 in one, one VM in the other": (
        {"p": 50, "q": 50},
        (Tenant("a", 60, 1000, "p"), Tenant("b", 40, 20, "p"), Tenant("c", 10, 100, "q")),
    ),
}


@attrs.define(eq=False)
class Guest:
    """A running share_load: lines in, lines out."""

    process: trio.Process
    _text: str = ""

    async def line(self) -> list[str]:
        """Its next line, in words."""
        assert self.process.stdout is not None
        with trio.fail_after(GUEST_SECONDS):
            while "\n" not in self._text:
                data = await self.process.stdout.receive_some(1 << 16)
                if not data:
                    raise SystemExit(f"a guest ended: {self._text}")
                self._text += data.decode()
        line, _, self._text = self._text.partition("\n")
        words = line.split()
        if words[0] == "failed":
            raise SystemExit(line)
        return words

    async def ask(self, text: str) -> list[str]:
        """Send a command; its answer, without the first word."""
        assert self.process.stdin is not None
        await self.process.stdin.send_all(text.encode() + b"\n")
        return (await self.line())[1:]


@attrs.define(eq=False)
class Bench:
    """Guests of one mediator."""

    system: ActorSystem
    run_dir: Path
    program: Path
    nursery: trio.Nursery
    seconds: float
    guests: dict[str, Guest] = attrs.Factory(dict)
    iterations_per_us: float = 0.0

    async def guest(self, vm: str) -> Guest:
        """The guest of a VM, started if need be."""
        if vm not in self.guests:
            environment = guest_environment(dict(os.environ), vm, self.run_dir)
            run = partial(trio.run_process, stdin=subprocess.PIPE, stdout=subprocess.PIPE, check=False)
            process = await self.nursery.start(partial(run, env=environment), [str(self.program)])
            self.guests[vm] = guest = Guest(process)
            while (await guest.line())[0] != "ready":
                pass
        return self.guests[vm]

    async def place(self, tenants: Sequence[Tenant], pools: dict[str, int]) -> None:
        """Open the sessions, and put their VMs where they belong."""
        for tenant in tenants:
            await self.guest(tenant.vm)
        scheduler = self.system.ref(SCHEDULER)
        for pool, weight in pools.items():
            await scheduler.send(SetPool(pool, weight))
        for tenant in tenants:
            await scheduler.send(SetVm(tenant.vm, tenant.pool, tenant.priority, tenant.weight))

    async def calibrate(self) -> None:
        """How many iterations a microsecond takes."""
        guest = await self.guest("a")
        few = 64
        while int((await guest.ask(f"time 20 {few}"))[0]) < CALIBRATE_NS:
            few *= 2
        # The least of some: whoever else is on the machine only ever adds to it.
        taken = []
        for iterations in (few, 2 * few):
            times = [int((await guest.ask(f"time 20 {iterations}"))[0]) for _ in range(5)]
            taken.append(min(times))
        self.iterations_per_us = 20 * few / (max(taken[1] - taken[0], 1) / 1000)

    def iterations(self, kernel_us: float) -> int:
        """Of a kernel of that length."""
        return max(int(kernel_us * self.iterations_per_us), 1)

    async def greedy(self, tenant: Tenant, seconds: float) -> tuple[int, int]:
        """Kernels finished, and nanoseconds up to the last of them."""
        batch = max(int(2000 / tenant.kernel_us), 1)
        guest = await self.guest(tenant.vm)
        count, taken = await guest.ask(f"greedy {seconds} {self.iterations(tenant.kernel_us)} {batch}")
        return int(count), int(taken)

    async def together(self, tenants: Sequence[Tenant]) -> dict[str, tuple[int, int]]:
        """All at once."""
        results: dict[str, tuple[int, int]] = {}

        async def one(tenant: Tenant) -> None:
            results[tenant.vm] = await self.greedy(tenant, self.seconds)

        async with trio.open_nursery() as nursery:
            for tenant in tenants:
                nursery.start_soon(one, tenant)
        return results

    async def shares(self, pools: dict[str, int], tenants: Sequence[Tenant]) -> dict[str, Any]:
        """One scenario: alone, one after the other, then together, and that some times over."""
        await self.place(tenants, pools)
        # A GPU that has been idle is slow at first: nobody is to be measured on that.
        await self.greedy(tenants[0], WARM_SECONDS)
        weights = {t.vm: self.configured(t, tenants, pools) for t in tenants}
        alone = await self.alone(tenants)
        rounds: list[dict[str, Any]] = []
        for _ in range(ROUNDS):
            before = await self.used()
            found = await self.together(tenants)
            after = await self.used()
            # The better of before and after is what a VM could have had.
            earlier, alone = alone, await self.alone(tenants)
            taken = {vm: min(alone[vm], earlier[vm]) for vm in alone}
            work = {vm: count * taken[vm] for vm, (count, _) in found.items()}
            share = {vm: work[vm] / sum(work.values()) for vm in weights}
            used = {vm: after[vm] - before[vm] for vm in weights}
            rounds.append(
                {
                    "share": share,
                    "share_by_gpu_ns": {vm: ns / sum(used.values()) for vm, ns in used.items()},
                    "throughput": sum(work.values()) / (self.seconds * 1e9),
                    "alone_ns_a_kernel": taken,
                    "kernels": {vm: count for vm, (count, _) in found.items()},
                }
            )
        state = (await self.system.ref(SCHEDULER).ask(ScheduleState()))["pools"]
        assert isinstance(state, dict)
        places = {vm: fields for pool in state.values() for vm, fields in pool["vms"].items()}
        share = {vm: statistics.median(one["share"][vm] for one in rounds) for vm in weights}
        return {
            "configured": weights,
            "share": share,
            "share_error": max(abs(share[vm] - weights[vm]) for vm in share),
            "jain": jain_index([share[vm] for vm in share], [weights[vm] for vm in share]),
            "throughput": statistics.median(one["throughput"] for one in rounds),
            "longest_wait_ms": {vm: places[vm]["longest_wait_ns"] / 1e6 for vm in share},
            "rounds": rounds,
        }

    @staticmethod
    def configured(tenant: Tenant, tenants: Sequence[Tenant], pools: dict[str, int]) -> float:
        """What a VM's weights say (all of one priority)."""
        present = {t.pool for t in tenants}
        pool = pools[tenant.pool] / sum(pools[p] for p in present) if pools else 1.0
        return pool * tenant.weight / sum(t.weight for t in tenants if t.pool == tenant.pool)

    async def alone(self, tenants: Sequence[Tenant]) -> dict[str, float]:
        """Nanoseconds a kernel takes each, one tenant after the other."""
        found = {}
        for tenant in tenants:
            count, taken, seconds = 0, 0, self.seconds * ALONE
            while count == 0:  # on a busy machine a short while may be over before the first batch is
                count, taken = await self.greedy(tenant, seconds)
                seconds *= 2
            found[tenant.vm] = taken / count
        return found

    async def used(self) -> dict[str, int]:
        """GPU nanoseconds as the workers count them, by VM."""
        samples = await self.system.ref("mediator/telemetry").ask(ListSessions())
        return {sample.info.vm: sample.grant["gpu_ns"] for sample in samples if not sample.ended}

    async def latency(
        self, greedy_us: float, kernels: int, kernel_us: float, period_us: int
    ) -> dict[str, Any]:
        """A high-priority VM's requests, without and with a greedy neighbour, in turns; percentiles of all turns' requests."""
        tenants = (Tenant("urgent", 50, kernel_us, priority="high"), Tenant("a", 50, greedy_us))
        await self.place(tenants, {})
        guest = await self.guest("urgent")
        count = max(round(REQUESTS * self.seconds), 1)
        seconds = count * period_us / 1e6
        command = f"requests {count} {period_us} {kernels} {self.iterations(kernel_us)}"
        await self.greedy(tenants[0], WARM_SECONDS)
        turns: list[tuple[list[int], list[int]]] = []
        for _ in range(ROUNDS):
            alone = sorted(map(int, await guest.ask(command)))
            beside: list[int] = []

            async def ask(into: list[int]) -> None:
                await trio.sleep(0.2)
                into.extend(sorted(map(int, await guest.ask(command))))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, beside)
                await self.greedy(tenants[1], seconds + 0.4)
            turns.append((alone, beside))
        all_alone, all_beside = (sorted(n for turn in turns for n in turn[k]) for k in (0, 1))
        return {
            "requests": len(all_alone),
            "alone_ms": _percentiles(all_alone),
            "beside_ms": _percentiles(all_beside),
            "slowdown_p99": _at(all_beside, 99) / _at(all_alone, 99),
            "rounds": [_at(beside, 99) / _at(alone, 99) for alone, beside in turns],
        }


def _at(ordered: Sequence[int], percent: float) -> int:
    return ordered[max(-(-len(ordered) * percent // 100) - 1, 0).__int__()]


def _percentiles(ordered: Sequence[int]) -> dict[str, float]:
    return {f"p{p}": _at(ordered, p) / 1e6 for p in (50, 90, 99, 100)}


def build(folder: Path) -> Path:
    """Compile the load."""
    out = folder / "share_load"
    source = ROOT / "bench" / "c" / "share_load.c"
    command = [os.environ.get("CC", "gcc"), "-std=gnu11", "-O2", "-Wall", "-o", str(out), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return out


@contextlib.asynccontextmanager
async def running(gpu: str, quantum_ns: int, seconds: float, tuning: Tuning) -> AsyncIterator[Bench]:
    """A mediator with that quantum and tuning, and nobody in it yet."""
    with tempfile.TemporaryDirectory(prefix="vgpu-", dir="/tmp") as name:
        folder = Path(name)
        program = build(folder)
        spawn = partial(start_worker, WorkerOptions(folder / "run", gpu))
        gpu_plan = GpuPlan(0, spawn, quantum_ns=quantum_ns, kind=gpu, tuning=tuning)
        plan = MediatorPlan(folder / "run", folder / "state", (gpu_plan,))
        async with open_mediator(plan) as system, trio.open_nursery() as nursery:
            bench = Bench(system, folder / "run", program, nursery, seconds)
            await bench.calibrate()
            yield bench
            for guest in bench.guests.values():
                guest.process.kill()


async def measure(options: argparse.Namespace) -> None:
    """Everything, by variant and quantum."""
    results: dict[str, Any] = {
        "machine": sides.machine_facts(options.commit),
        "gpu": options.gpu,
        "seconds": options.seconds,
        "rounds": ROUNDS,
        "variants": {},
    }

    def keep() -> None:
        if options.out is not None:
            options.out.write_text(json.dumps(results, indent=1) + "\n")

    for variant in options.variant:
        tuning = VARIANTS[variant]
        quanta: dict[str, Any] = {}
        results["variants"][variant] = {"tuning": attrs.asdict(tuning), "quanta": quanta}
        for quantum_us in options.quantum_us:
            found: dict[str, Any] = {"shares": {}, "latency": {}}
            quanta[f"{quantum_us} us"] = found
            title = f"{variant}, {quantum_us} us"
            async with running(options.gpu, quantum_us * 1000, options.seconds, tuning) as bench:
                found["iterations_per_us"] = bench.iterations_per_us
                for name, (pools, tenants) in () if options.no_shares else SCENARIOS.items():
                    found["shares"][name] = one = await bench.shares(pools, tenants)
                    keep()
                    _print_shares(f"{title}, {name}", one)
                for greedy_us, kernels, kernel_us, period_us in options.latency:
                    name = f"{kernels} x {kernel_us:g} us every {period_us} us beside kernels of {greedy_us:g} us"
                    found["latency"][name] = one = await bench.latency(
                        greedy_us, kernels, kernel_us, period_us
                    )
                    keep()
                    _print_latency(f"{title}, {name}", one)


def _print_shares(title: str, one: dict[str, Any]) -> None:
    good = one["share_error"] <= SHARE_ERROR and one["jain"] >= JAIN and one["throughput"] >= THROUGHPUT
    shares = ", ".join(f"{vm} {share:.4f}" for vm, share in one["share"].items())
    rounds = ", ".join(f"{r['throughput']:.4f}" for r in one["rounds"])
    print(
        f"{title}: {shares}; error {one['share_error']:.4f}, jain {one['jain']:.5f},"
        f" throughput {one['throughput']:.4f} ({rounds}) {'ok' if good else 'MISSED'}",
        flush=True,
    )


def _print_latency(title: str, one: dict[str, Any]) -> None:
    print(
        f"{title}: P50 {one['alone_ms']['p50']:.3f} -> {one['beside_ms']['p50']:.3f} ms,"
        f" P99 {one['alone_ms']['p99']:.3f} -> {one['beside_ms']['p99']:.3f} ms:"
        f" {one['slowdown_p99']:.2f} ({', '.join(f'{r:.2f}' for r in one['rounds'])}) {'ok' if one['slowdown_p99'] <= SLOWDOWN else 'MISSED'}",
        flush=True,
    )


def main() -> int:
    """Run it; what is missed is printed and recorded, and does not change the exit status."""
    parser = argparse.ArgumentParser(description="shares of a GPU, measured")
    parser.add_argument("--gpu", choices=["nvidia", "software"], default="nvidia")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each round together")
    parser.add_argument("--quantum-us", type=int, nargs="+", default=[2000])
    parser.add_argument("--no-latency", action="store_true", help="shares alone")
    parser.add_argument("--no-shares", action="store_true", help="latency alone")
    parser.add_argument("--variant", choices=sorted(VARIANTS), nargs="+", default=["default"])
    parser.add_argument("--commit", help="what the record shall say; git is asked otherwise")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    # Greedy kernel, kernels a request, their length, period.
    options.latency = (
        ()
        if options.no_latency
        else ((200.0, 50, 200.0, 40_000), (1000.0, 50, 200.0, 40_000), (20.0, 10, 100.0, 10_000))
    )
    trio.run(measure, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
