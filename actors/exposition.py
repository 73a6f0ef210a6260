# SPDX-License-Identifier: Apache-2.0
"""What the mediator knows, as Prometheus metrics: values in, text out.

Sums per VM count every session once, living or ended, never fall while telemetry lives, and are there from the VM's
registration on until it is unregistered and its last session has ended. Series per session exist only while the session
does, so their number is bounded by what runs. A part that could not be had is left out and ``vgpu_source_up`` says so; it is
never shown as zero. Counts of refused calls, and where a program's threads spend their time (``GUEST_COUNTERS``), come from the guests themselves and are as true as the guest is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import attrs
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vgpu.gpu.drift import GpuTimeWindow
from vgpu.gpu.sampling import GpuSample

from . import ActorSnapshot, SystemStatistics
from .exposition_gpu_time import gpu_time_families
from .exposition_runtime import LoopLag, actor_families, mediator_families
from .exposition_tenants import (
    NANOSECOND,
    account_families,
    clean,
    device_families,
    limit_families,
    quarantine_families,
    schedule_families,
)
from .fault_messages import QuarantineRecord
from .ledger_health import LedgerHealth, OutboxHealth, ledger_families, outbox_families
from .messages import AccountState, DeviceState, FaultCount, SessionSample, SessionSurvey, VmRecord

# Of CUDA: ended by an administrator, illegal address, watchdog, launch failed.
USUAL_FAULTS = (46, 700, 702, 719)

# Name without prefix and suffix, field of the grant page, factor, help.
COUNTERS: tuple[tuple[str, str, float, str], ...] = (
    ("records", "records", 1, "Calls replayed by the worker."),
    ("launches", "launches", 1, "Kernel launches."),
    ("bytes_to_device", "bytes_to_device", 1, "Bytes copied to the device."),
    ("bytes_from_device", "bytes_from_device", 1, "Bytes copied from the device."),
    ("gpu_seconds", "gpu_ns", NANOSECOND, "Time with work on the device."),
    (
        "replay_seconds",
        "replay_ns",
        NANOSECOND,
        "Time calls were being replayed, by the worker and the driver.",
    ),
    ("lease_wait_seconds", "lease_wait_ns", NANOSECOND, "Time calls waited because others had the GPU."),
    (
        "gpu_wait_seconds",
        "gpu_wait_ns",
        NANOSECOND,
        "Time without a call while the device was still at work.",
    ),
    (
        "answered_seconds",
        "answered_ns",
        NANOSECOND,
        "Part of the time of replay: calls whose caller waits for the answer.",
    ),
    ("timed_leases", "timed_leases", 1, "Leases that the device's own clock has timed."),
    ("timed_lease_charged_seconds", "timed_charged_ns", NANOSECOND, "What these leases were charged."),
    (
        "timed_lease_device_seconds",
        "timed_device_ns",
        NANOSECOND,
        "What the device's clock says of them, between an event at their begin and one behind their work.",
    ),
    ("fences", "fences_done", 1, "Fences passed."),
    ("replies", "reply_records", 1, "Calls whose caller waited for the answer."),
    ("doorbells", "doorbells", 1, "Times the worker had to be woken."),
    ("replay_errors", "replay_errors", 1, "Calls that the driver refused."),
    ("protocol_errors", "protocol_errors", 1, "Records that were not well formed."),
)

# The same of what guests say (guest_times.py), in nanoseconds: hearsay, and labelled so.
GUEST_COUNTERS: tuple[tuple[str, str, str], ...] = (
    ("guest_encode_seconds", "encode_ns", "As the guest says: time its library took to write calls."),
    ("guest_copy_seconds", "copy_ns", "As the guest says: time it copied to and from shared memory."),
    ("sync_seconds", "sync_ns", "As the guest says: time its threads waited for the device."),
    ("answer_wait_seconds", "answer_wait_ns", "As the guest says: time its threads waited for answers."),
    (
        "room_wait_seconds",
        "room_wait_ns",
        "As the guest says: time its threads waited for room in the ring, or rang for the worker.",
    ),
    (
        "ring_wait_seconds",
        "ring_wait_ns",
        "As the guest says: time its threads waited for answers and room, less replay and being held back.",
    ),
    (
        "guest_held_seconds",
        "held_ns",
        "As the guest says: part of these waits in which it had no lease or was held back by a limit.",
    ),
)

# Name without prefix, field of a sample, factor, help. What the card does not say has no series.
HOST_GAUGES: tuple[tuple[str, str, float, str], ...] = (
    ("temperature_celsius", "temperature_celsius", 1, "Temperature of the chip."),
    ("memory_temperature_celsius", "memory_temperature_celsius", 1, "Temperature of its memory."),
    ("power_watts", "power_milliwatts", 1e-3, "Power drawn."),
    ("power_limit_watts", "power_limit_milliwatts", 1e-3, "Power it may draw."),
    ("utilization_ratio", "gpu_utilization_percent", 1e-2, "Part of the time with work on it."),
    ("memory_utilization_ratio", "memory_utilization_percent", 1e-2, "Part of the time its memory was busy."),
    ("sm_clock_hertz", "sm_clock_mhz", 1e6, "Clock of the multiprocessors."),
    ("memory_clock_hertz", "memory_clock_mhz", 1e6, "Clock of the memory."),
    ("fan_ratio", "fan_percent", 1e-2, "Speed of the fan."),
    ("memory_used_bytes", "card_memory_used_bytes", 1, "Memory in use, by anybody on this host."),
    ("memory_total_bytes", "card_memory_total_bytes", 1, "Memory of the card."),
    ("pcie_transmit_bytes_per_second", "pcie_tx_kilobytes", 1e3, "Sent over PCIe."),
    ("pcie_receive_bytes_per_second", "pcie_rx_kilobytes", 1e3, "Received over PCIe."),
)


@attrs.frozen
class Knowledge:
    """What is shown. None: whoever knows did not answer."""

    describe: dict[str, object]
    uptime_seconds: float
    statistics: SystemStatistics
    survey: SessionSurvey | None
    faults: tuple[FaultCount, ...] | None
    gpu_now: GpuSample | None = None
    gpu_times: dict[str, tuple[GpuTimeWindow, ...]] | None = None  # by GPU
    vms: tuple[VmRecord, ...] | None = None
    devices: tuple[DeviceState, ...] | None = None
    schedules: dict[str, dict[str, Any] | None] = attrs.Factory(dict)  # by GPU
    tree: tuple[ActorSnapshot, ...] = ()
    lag: LoopLag = attrs.Factory(LoopLag)
    ledger: LedgerHealth | None = None
    outbox: OutboxHealth | None = None
    accounts: tuple[AccountState, ...] | None = None
    quarantines: tuple[QuarantineRecord, ...] | None = None


def render(knowledge: Knowledge) -> bytes:
    """The text that is served, process metrics of the mediator included."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_Once(tuple(families(knowledge))))
    return generate_latest(registry)


def families(knowledge: Knowledge) -> Iterator[Metric]:
    """Every metric family, in the order they are served."""
    sources = {
        "telemetry": knowledge.survey is not None,
        "ledger": knowledge.faults is not None and knowledge.vms is not None,
        "fleet": knowledge.devices is not None,
        **{f"scheduler {gpu}": state is not None for gpu, state in knowledge.schedules.items()},
    }
    yield from mediator_families(knowledge.describe, knowledge.uptime_seconds, knowledge.lag, sources)
    yield from actor_families(knowledge.statistics, knowledge.tree)
    knowledge = _without_the_unregistered(knowledge)
    registered = {vm.name: vm.pool for vm in knowledge.vms or ()}
    if knowledge.vms is not None:
        yield from limit_families(knowledge.vms)
        if knowledge.quarantines is not None:
            yield from quarantine_families(knowledge.vms, knowledge.quarantines)
        if knowledge.accounts is not None:
            yield from account_families(knowledge.vms, knowledge.accounts)
    if knowledge.devices is not None:
        yield from device_families(knowledge.devices)
    if knowledge.survey is not None:
        yield from _vms(knowledge.survey, registered)
        yield from _sessions(knowledge.survey.living)
    schedules = {gpu: state for gpu, state in knowledge.schedules.items() if state is not None}
    if schedules:
        yield from schedule_families(schedules, registered)
    if knowledge.gpu_now is not None:
        yield from _host_gpu(knowledge.gpu_now)
    if knowledge.gpu_times is not None:
        yield from gpu_time_families(knowledge.gpu_times)
    if knowledge.faults is not None:
        yield _faults(knowledge.faults, registered)
    if knowledge.ledger is not None:
        yield from ledger_families(knowledge.ledger)
    if knowledge.outbox is not None:
        yield from outbox_families(knowledge.outbox)


def _without_the_unregistered(knowledge: Knowledge) -> Knowledge:
    """The same without VMs that are unregistered and have no session: who makes a VM a job must not fill Prometheus."""
    if knowledge.vms is None:
        return knowledge
    shown = {vm.name for vm in knowledge.vms}
    survey, faults, accounts = knowledge.survey, knowledge.faults, knowledge.accounts
    if survey is not None:
        shown.update(sample.info.vm for sample in survey.living)
        ended = {vm: totals for vm, totals in survey.ended.items() if vm in shown}
        survey = attrs.evolve(survey, ended=ended)
    if faults is not None:
        faults = tuple(fault for fault in faults if fault.vm in shown)
    if accounts is not None:
        accounts = tuple(account for account in accounts if account.vm in shown)
    schedules = {
        gpu: state if state is None else {**state, "pools": _pools_of(state["pools"], shown)}
        for gpu, state in knowledge.schedules.items()
    }
    return attrs.evolve(knowledge, survey=survey, faults=faults, accounts=accounts, schedules=schedules)


def _pools_of(pools: dict[str, Any], shown: set[str]) -> dict[str, Any]:
    return {
        name: {**pool, "vms": {vm: about for vm, about in pool["vms"].items() if vm in shown}}
        for name, pool in pools.items()
    }


def _faults(counts: tuple[FaultCount, ...], registered: Iterable[str]) -> Metric:
    family = CounterMetricFamily(
        "vgpu_vm_faults",
        "Faults in the ledger, by CUDA error; the usual errors from the VM's registration on.",
        labels=("vm", "error"),
    )
    found = {(vm, error): 0 for vm in registered for error in USUAL_FAULTS}
    found.update({(fault.vm, fault.error): fault.count for fault in counts})
    for (vm, error), count in sorted(found.items()):
        family.add_metric((clean(vm), str(error)), count)
    return family


@attrs.frozen(eq=False)
class _Once(Collector):
    """Families that were made already, for a registry that is used once."""

    made: tuple[Metric, ...]

    def collect(self) -> Iterable[Metric]:
        return self.made


def _host_gpu(sample: GpuSample) -> Iterator[Metric]:
    for name, field, factor, text in HOST_GAUGES:
        value = getattr(sample, field)
        if value is not None:
            yield GaugeMetricFamily(
                f"vgpu_host_gpu_{name}", f"{text} The host's (first) GPU.", value * factor
            )
    if sample.energy_millijoules is not None:
        yield CounterMetricFamily(
            "vgpu_host_gpu_energy_joules",
            "Energy drawn since the driver was loaded. The host's (first) GPU.",
            sample.energy_millijoules * 1e-3,
        )


def _vms(survey: SessionSurvey, registered: Iterable[str]) -> Iterator[Metric]:
    by_vm: dict[str, list[SessionSample]] = {vm: [] for vm in (*registered, *survey.ended)}
    for sample in survey.living:
        by_vm.setdefault(sample.info.vm, []).append(sample)
    vms = sorted(by_vm)
    living = GaugeMetricFamily("vgpu_vm_sessions", "Sessions that live.", labels=("vm",))
    ended = CounterMetricFamily("vgpu_vm_sessions_ended", "Sessions that ended.", labels=("vm",))
    used = GaugeMetricFamily("vgpu_vm_memory_used_bytes", "Device memory in use.", labels=("vm",))
    refused = CounterMetricFamily(
        "vgpu_vm_refused_calls", "Calls refused in the guest, as it says.", labels=("vm", "call")
    )
    for vm in vms:
        before = survey.ended.get(vm)
        living.add_metric((clean(vm),), len(by_vm[vm]))
        ended.add_metric((clean(vm),), before.sessions if before else 0)
        used.add_metric((clean(vm),), sum(s.grant["memory_used_bytes"] for s in by_vm[vm]))
        calls = Counter(before.refused if before else {})
        for sample in by_vm[vm]:
            calls.update(sample.refused)
        for call, count in sorted(calls.items()):
            refused.add_metric((clean(vm), call), count)
    yield from (living, ended, used, refused)
    for name, field, factor, text in COUNTERS:
        family = CounterMetricFamily(f"vgpu_vm_{name}", f"{text} All sessions of the VM.", labels=("vm",))
        for vm in vms:
            before = survey.ended.get(vm)
            total = sum(s.grant[field] for s in by_vm[vm]) + (before.grant.get(field, 0) if before else 0)
            family.add_metric((clean(vm),), total * factor)
        yield family
    for name, field, text in GUEST_COUNTERS:
        family = CounterMetricFamily(f"vgpu_vm_{name}", f"{text} All sessions of the VM.", labels=("vm",))
        for vm in vms:
            before = survey.ended.get(vm)
            total = sum(s.guest.get(field, 0) for s in by_vm[vm])
            family.add_metric(
                (clean(vm),), (total + (before.guest.get(field, 0) if before else 0)) * NANOSECOND
            )
        yield family


def _sessions(living: tuple[SessionSample, ...]) -> Iterator[Metric]:
    names = ("vm", "session")
    labels = [(clean(s.info.vm), str(int(s.info.session))) for s in living]
    info = GaugeMetricFamily(
        "vgpu_session_info", "A living session; always 1.", labels=(*names, "program", "guest_pid")
    )
    for sample, words in zip(living, labels, strict=True):
        info.add_metric((*words, clean(sample.info.program), str(sample.info.guest_pid)), 1)
    yield info
    for name, field, factor, text in COUNTERS:
        counter = CounterMetricFamily(f"vgpu_session_{name}", text, labels=names)
        for sample, words in zip(living, labels, strict=True):
            counter.add_metric(words, sample.grant[field] * factor)
        yield counter
    for name, field, text in GUEST_COUNTERS:
        counter = CounterMetricFamily(f"vgpu_session_{name}", text, labels=names)
        for sample, words in zip(living, labels, strict=True):
            counter.add_metric(words, sample.guest.get(field, 0) * NANOSECOND)
        yield counter
    refused = CounterMetricFamily(
        "vgpu_session_refused_calls", "Calls refused in the guest, as it says.", labels=names
    )
    for sample, words in zip(living, labels, strict=True):
        refused.add_metric(words, sample.guest["refused_calls"])
    yield refused
    for name, text in (
        ("memory_used_bytes", "Device memory in use."),
        ("memory_peak_bytes", "The most it was."),
    ):
        gauge = GaugeMetricFamily(f"vgpu_session_{name}", text, labels=names)
        for sample, words in zip(living, labels, strict=True):
            gauge.add_metric(words, sample.grant[name])
        yield gauge
    sticky = GaugeMetricFamily(
        "vgpu_session_sticky_error", "CUDA error that every further call returns; 0 for none.", labels=names
    )
    for sample, words in zip(living, labels, strict=True):
        sticky.add_metric(words, sample.guest["sticky_error"])
    yield sticky
