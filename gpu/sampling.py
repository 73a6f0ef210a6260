# SPDX-License-Identifier: Apache-2.0
"""How the host's GPU is at a moment: the value, who measures it, and a bound on how long that may take.

What a card or a driver does not say is None here and "unknown" for guests; nothing is ever made up. The software GPU
knows how busy it is, from its workers, and has no sensors.

A measurement must never hold up whoever asked or fail him: the real one is C code of the driver that may hang, so it
runs in a thread with a time limit, and while such a thread hangs no second one is started.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import attrs
import trio

_log = logging.getLogger("vgpu.sampling")

SAMPLE_SECONDS = 2.0
# Two looks at the workers' counters closer together than this say nothing about the time between them.
SHORTEST_NS = 100_000_000


@attrs.frozen
class GpuSample:
    """One GPU at one moment; None: not known. Names are those of the device page (transport/wire.h).

    ``sm_utilization``: percent by pid of a worker; a pid that is missing is not known.
    ``card_memory_*``: of the whole card, all its users together. Enumerations are NVML's numbers.
    """

    temperature_celsius: int | None = None
    gpu_utilization_percent: int | None = None
    memory_utilization_percent: int | None = None
    power_milliwatts: int | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    graphics_clock_mhz: int | None = None
    video_clock_mhz: int | None = None
    graphics_clock_max_mhz: int | None = None
    sm_clock_max_mhz: int | None = None
    memory_clock_max_mhz: int | None = None
    video_clock_max_mhz: int | None = None
    energy_millijoules: int | None = None
    throttle_reasons: int | None = None
    bar1_total_bytes: int | None = None
    power_limit_milliwatts: int | None = None
    power_limit_default_milliwatts: int | None = None
    power_limit_min_milliwatts: int | None = None
    power_limit_max_milliwatts: int | None = None
    performance_state: int | None = None
    fan_percent: int | None = None
    memory_temperature_celsius: int | None = None
    temperature_slowdown_celsius: int | None = None
    temperature_shutdown_celsius: int | None = None
    encoder_utilization_percent: int | None = None
    decoder_utilization_percent: int | None = None
    ecc_enabled: int | None = None
    ecc_corrected_volatile: int | None = None
    ecc_corrected_aggregate: int | None = None
    ecc_uncorrected_volatile: int | None = None
    ecc_uncorrected_aggregate: int | None = None
    persistence_mode: int | None = None
    compute_mode: int | None = None
    brand: int | None = None
    architecture: int | None = None
    pcie_generation: int | None = None
    pcie_generation_max: int | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    pcie_tx_kilobytes: int | None = None
    pcie_rx_kilobytes: int | None = None
    memory_bus_width_bits: int | None = None
    vbios_version: str | None = None
    nvml_version: str | None = None
    serial: str | None = None
    board_part_number: str | None = None
    card_memory_total_bytes: int | None = None
    card_memory_reserved_bytes: int | None = None
    card_memory_used_bytes: int | None = None
    sm_utilization: Mapping[int, int] = attrs.field(factory=dict)


UNKNOWN_SAMPLE = GpuSample()


@attrs.frozen
class DeviceIdentity:
    """Which GPU: what its driver says of it."""

    uuid: str  # "GPU-..."
    pci: str  # "0000:41:00.0"
    is_software: bool = False


class Sampler(Protocol):
    """Measures one GPU."""

    def sample(self, work: Mapping[int, int]) -> GpuSample:
        """How it is now. May block; called by one thread at a time, not always the same. Never raises.

        work: the GPU time of every worker that lives, in nanoseconds since it began, by pid.
        """
        ...


@attrs.define(eq=False)
class WorkMeter:
    """Percent of the time between two looks in which each worker had work on the device."""

    clock: Callable[[], int] = time.monotonic_ns
    _before: dict[int, int] = attrs.Factory(dict)
    _before_ns: int = 0
    _percent: dict[int, int] = attrs.Factory(dict)

    def measure(self, work: Mapping[int, int]) -> dict[int, int]:
        """Percent by pid, 0 to 100. A worker seen for the first time is not in it; neither is one that has gone."""
        now = self.clock()
        elapsed = now - self._before_ns
        if self._before_ns == 0 or elapsed >= SHORTEST_NS:
            self._percent = {
                pid: min(100, max(0, round(100 * (total - self._before[pid]) / elapsed)))
                for pid, total in work.items()
                if pid in self._before
            }
            self._before, self._before_ns = dict(work), now
        return {pid: percent for pid, percent in self._percent.items() if pid in work}


@attrs.define(eq=False)
class SoftwareSampler:
    """The software GPU. Workers compute side by side, so the device is as busy as all of them, at most 100 percent."""

    meter: WorkMeter = attrs.Factory(WorkMeter)

    def sample(self, work: Mapping[int, int]) -> GpuSample:
        """Utilisation; everything else is unknown. Does not block."""
        by_worker = self.meter.measure(work)
        busy = min(100, sum(by_worker.values()))
        return GpuSample(gpu_utilization_percent=busy, sm_utilization=by_worker)


@attrs.define(eq=False)
class PatientSampler:
    """A sampler that is waited for only so long."""

    sampler: Sampler
    seconds: float = SAMPLE_SECONDS
    _limiter: trio.CapacityLimiter = attrs.Factory(lambda: trio.CapacityLimiter(1))
    _is_slow: bool = False

    async def sample(self, work: Mapping[int, int]) -> GpuSample:
        """How the GPU is; nothing known of it where that could not be had in time. Waits for ``seconds`` at most.

        Cancelled or late, the measurement goes on in its thread; until it ends there is no other.
        """
        if self._limiter.available_tokens == 0:
            await trio.lowlevel.checkpoint()
            return UNKNOWN_SAMPLE
        with trio.move_on_after(self.seconds):
            sample = await trio.to_thread.run_sync(
                self.sampler.sample, dict(work), abandon_on_cancel=True, limiter=self._limiter
            )
            self._is_slow = False
            return sample
        if not self._is_slow:
            _log.warning("the GPU's sensors did not answer within %g s; they show as unknown", self.seconds)
        self._is_slow = True
        return UNKNOWN_SAMPLE
