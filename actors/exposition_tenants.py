# SPDX-License-Identifier: Apache-2.0
"""What was promised to VMs and pools, and what the schedulers gave them, as Prometheus metrics. Values in, families out.

Series of a VM exist from its registration on, at 0 where nothing has happened yet, so that the first event is a rise and not
the beginning of a series. What the scheduler says is said for each GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from vgpu.transport.text import printable

from .exposition_runtime import buckets
from .fault_messages import QuarantineRecord
from .limits import NAMES
from .messages import AccountState, DeviceState, VmRecord

NANOSECOND: Final = 1e-9

# Name without prefix, field of VmRecord, help.
LIMITS: Final = (
    ("weight", "weight", "Its share against the others of its pool, 1 to 1000."),
    ("memory_limit_bytes", "memory_limit_bytes", "Device memory it may have; 0: the whole card."),
    ("rate_limit_calls_per_second", "rate", "Calls a second it may make; 0: no limit."),
    ("rate_limit_bytes_per_second", "bytes_per_second", "Bytes a second it may copy; 0: no limit."),
    ("queue_depth_limit", "queue_depth", "Calls that may wait to be executed; 0: no limit."),
    ("watchdog_deadline_seconds", "watchdog_seconds", "How long a kernel may run."),
    ("sessions_limit", "session_limit", "Sessions it may have at a time."),
    ("arena_limit_bytes", "arena_limit_bytes", "Host memory it may have made known to the driver."),
    ("modules_limit", "module_limit", "Modules it may have loaded."),
    ("handles_limit", "handle_limit", "Handles it may have."),
)
# Name without prefix, field of DeviceState, help.
DEVICE: Final = (
    ("running", "running", "Whether the process that is its PCI device runs."),
    ("connected", "connected", "Whether a QEMU is connected to it."),
    ("slots", "slots", "Programs that can use it at a time."),
    ("slots_claimed", "claimed", "Slots that have an owner."),
    ("bar1_bytes", "bar1_bytes", "Memory it shares with the VM."),
)


def clean(text: str) -> str:
    """A guest's word as a label: harmless, and certain to be encodable."""
    return printable(text)


def limit_families(vms: Iterable[VmRecord]) -> Iterator[Metric]:
    """What is registered."""
    known = tuple(vms)
    info = GaugeMetricFamily(
        "vgpu_vm_info", "A VM the mediator knows; always 1.", labels=("vm", "pool", "priority", "ad_hoc")
    )
    for vm in known:
        info.add_metric((clean(vm.name), clean(vm.pool), vm.priority, "yes" if vm.ad_hoc else "no"), 1)
    yield info
    for name, field, text in LIMITS:
        family = GaugeMetricFamily(f"vgpu_vm_{name}", text, labels=("vm",))
        for vm in known:
            family.add_metric((clean(vm.name),), getattr(vm, field))
        yield family


def quarantine_families(vms: Iterable[VmRecord], quarantines: Iterable[QuarantineRecord]) -> Iterator[Metric]:
    """Who is kept away."""
    kept_away = {quarantine.vm for quarantine in quarantines if not quarantine.ended}
    family = GaugeMetricFamily("vgpu_vm_quarantined", "Whether it is kept away from the GPU.", labels=("vm",))
    for vm in sorted({vm.name for vm in vms} | kept_away):
        family.add_metric((clean(vm),), float(vm in kept_away))
    yield family


def account_families(vms: Iterable[VmRecord], accounts: Iterable[AccountState]) -> Iterator[Metric]:
    """How VMs met their limits, since the mediator began."""
    known = {account.vm: account for account in accounts}
    names = sorted({vm.name for vm in vms} | set(known))
    held = CounterMetricFamily(
        "vgpu_vm_held_back", "Times its calls were held back by a rate or its queue depth.", labels=("vm",)
    )
    seconds = CounterMetricFamily(
        "vgpu_vm_held_back_seconds",
        "Time its calls were held back by a rate or its queue depth.",
        labels=("vm",),
    )
    now = GaugeMetricFamily("vgpu_vm_is_held_back", "Whether its calls are held back now.", labels=("vm",))
    sessions = CounterMetricFamily(
        "vgpu_vm_sessions_refused", "Sessions refused because it has as many as it may.", labels=("vm",)
    )
    refused = CounterMetricFamily(
        "vgpu_vm_limit_refusals", "Requests refused for want of room under a limit.", labels=("vm", "limit")
    )
    for vm in names:
        account, label = known.get(vm), (clean(vm),)
        held.add_metric(label, account.held_back if account else 0)
        seconds.add_metric(label, account.held_back_ns * NANOSECOND if account else 0)
        now.add_metric(label, float(account.is_held_back) if account else 0)
        sessions.add_metric(label, account.sessions_refused if account else 0)
        for limit in NAMES.values():
            refused.add_metric((*label, limit), account.refused.get(limit, 0) if account else 0)
    yield from (held, seconds, now, sessions, refused)


def device_families(devices: Iterable[DeviceState]) -> Iterator[Metric]:
    """The PCI devices of the VMs that have one."""
    known = tuple(devices)
    for name, field, text in DEVICE:
        family = GaugeMetricFamily(f"vgpu_vm_device_{name}", text, labels=("vm",))
        for device in known:
            family.add_metric((clean(device.vm),), float(getattr(device, field)))
        yield family


def schedule_families(
    schedules: Mapping[str, Mapping[str, Any]], registered: Mapping[str, str]
) -> Iterator[Metric]:
    """What each GPU's scheduler says (the answer to ScheduleState); ``registered``: pools by VM, also of quiet ones."""
    yield from _gpus(schedules)
    yield from _pools(schedules, registered)
    yield from _vms(schedules, registered)


def _gpus(schedules: Mapping[str, Mapping[str, Any]]) -> Iterator[Metric]:
    quantum = GaugeMetricFamily(
        "vgpu_scheduler_quantum_seconds", "Lease length while several sessions compete.", labels=("gpu",)
    )
    leased = GaugeMetricFamily(
        "vgpu_scheduler_leased", "Whether some session has the lease now.", labels=("gpu",)
    )
    waiting = GaugeMetricFamily(
        "vgpu_scheduler_waiting_sessions", "Sessions that wait for a lease now.", labels=("gpu",)
    )
    for gpu, state in schedules.items():
        quantum.add_metric((gpu,), state["quantum_ns"] * NANOSECOND)
        leased.add_metric((gpu,), float(state["holder"] is not None))
        waiting.add_metric((gpu,), len(state["waiting"]))
    yield from (quantum, leased, waiting)


def _pools(schedules: Mapping[str, Mapping[str, Any]], registered: Mapping[str, str]) -> Iterator[Metric]:
    labels = ("gpu", "pool")
    weight = GaugeMetricFamily("vgpu_pool_weight", "Its weight among the pools, 1 to 1000.", labels=labels)
    vms = GaugeMetricFamily("vgpu_pool_vms", "VMs registered in it.", labels=("pool",))
    sessions = GaugeMetricFamily("vgpu_pool_sessions", "Sessions of its VMs.", labels=labels)
    waiting = GaugeMetricFamily(
        "vgpu_pool_waiting_sessions", "Sessions of its VMs that wait for a lease now.", labels=labels
    )
    due = GaugeMetricFamily(
        "vgpu_pool_configured_share_ratio",
        "Its part of the GPU among the VMs with sessions now, 0 to 1.",
        labels=labels,
    )
    got = GaugeMetricFamily(
        "vgpu_pool_achieved_share_ratio",
        "Its part of the GPU time used in the last ten seconds, 0 to 1.",
        labels=labels,
    )
    for gpu, state in schedules.items():
        for pool, about in sorted(state["pools"].items()):
            names = (gpu, clean(pool))
            members = about["vms"].values()
            weight.add_metric(names, about["weight"])
            for family, field in (
                (sessions, "sessions"),
                (waiting, "waiting"),
                (due, "configured_share"),
                (got, "achieved_share"),
            ):
                family.add_metric(names, sum(vm[field] for vm in members))
    pools = {pool for state in schedules.values() for pool in state["pools"]} | set(registered.values())
    for pool in sorted(pools):
        vms.add_metric((clean(pool),), sum(of == pool for of in registered.values()))
    yield from (weight, vms, sessions, waiting, due, got)


def _vms(schedules: Mapping[str, Mapping[str, Any]], registered: Mapping[str, str]) -> Iterator[Metric]:
    labels = ("gpu", "vm")
    seconds = CounterMetricFamily(
        "vgpu_scheduler_gpu_seconds",
        "GPU time that leases with an end reported. A VM that is alone has none; vgpu_vm_gpu_seconds has all.",
        labels=labels,
    )
    leases = CounterMetricFamily("vgpu_scheduler_leases", "Leases it was given.", labels=labels)
    waits = HistogramMetricFamily(
        "vgpu_scheduler_lease_wait_seconds", "From wanting the GPU to having the lease.", labels=labels
    )
    longest = GaugeMetricFamily(
        "vgpu_scheduler_longest_lease_wait_seconds", "The longest of these waits so far.", labels=labels
    )
    waiting = GaugeMetricFamily(
        "vgpu_scheduler_vm_waiting_sessions", "Sessions of it that wait for a lease now.", labels=labels
    )
    due = GaugeMetricFamily(
        "vgpu_scheduler_configured_share_ratio",
        "Its part of the GPU among the VMs with sessions now, 0 to 1.",
        labels=labels,
    )
    got = GaugeMetricFamily(
        "vgpu_scheduler_achieved_share_ratio",
        "Its part of the GPU time used in the last ten seconds, 0 to 1.",
        labels=labels,
    )
    for gpu, state in schedules.items():
        bounds = tuple(bound * NANOSECOND for bound in state["wait_bounds_ns"])
        quiet = {
            **dict.fromkeys(
                (
                    "used_ns",
                    "leases",
                    "wait_ns",
                    "longest_wait_ns",
                    "waiting",
                    "configured_share",
                    "achieved_share",
                ),
                0,
            ),
            "waits": [0] * (len(bounds) + 1),
        }
        known = {name: about for pool in state["pools"].values() for name, about in pool["vms"].items()}
        for vm in sorted({*registered, *known}):
            about: Mapping[str, Any] = known.get(vm, quiet)
            names = (gpu, clean(vm))
            seconds.add_metric(names, about["used_ns"] * NANOSECOND)
            leases.add_metric(names, about["leases"])
            waits.add_metric(names, buckets(bounds, list(about["waits"])), about["wait_ns"] * NANOSECOND)
            longest.add_metric(names, about["longest_wait_ns"] * NANOSECOND)
            waiting.add_metric(names, about["waiting"])
            due.add_metric(names, about["configured_share"])
            got.add_metric(names, about["achieved_share"])
    yield from (seconds, leases, waits, longest, waiting, due, got)
