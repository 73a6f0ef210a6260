# SPDX-License-Identifier: Apache-2.0
"""Keeps, for every GPU, how the time that workers count compares with what the card says (``vgpu.gpu.drift``).

State of the telemetry actor and used by nobody else. The first GPU is measured by telemetry anyway, for device pages; the
others are measured here, with a sampler each. It is asked once a second and only while somebody looks, for NVML is no
bystander: its calls take the driver's locks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import attrs

from vgpu.gpu.drift import DriftMeter, GpuTimeWindow
from vgpu.gpu.sampling import GpuSample, PatientSampler, Sampler
from vgpu.gpu.schedule import SessionId

from . import Request
from .messages import SessionUse

LOOK_SECONDS: Final = 1.0
# After somebody asked: longer than any scrape interval in use, so that scraping keeps it going.
INTEREST_SECONDS: Final = 300.0


@attrs.frozen
class MeasureGpuTime(Request[dict[str, tuple[GpuTimeWindow, ...]]]):
    """To telemetry: windows by GPU ("0", "1", ...). None for a GPU that nobody has looked at lately; asking begins it."""


def gpu_of(executor: str) -> str | None:
    """The supervisor of the GPU whose executor has that name."""
    gpu, found, _ = executor.partition("/executors")
    return gpu if found else None


def label_of(gpu: str) -> str:
    """``0`` of ``mediator/gpus/gpu0``."""
    return gpu.rpartition("/")[2].removeprefix("gpu")


@attrs.define(eq=False)
class GpuTimes:
    """Meters by the GPU's supervisor."""

    clock: Callable[[], int] = time.monotonic_ns
    _meters: dict[str, DriftMeter] = attrs.Factory(dict)
    _samplers: dict[str, PatientSampler] = attrs.Factory(dict)

    def knows(self, gpu: str) -> bool:
        """Is there somebody to measure it?"""
        return gpu in self._samplers

    def know(self, gpu: str, sampler: Sampler) -> None:
        """Who measures this GPU."""
        self._samplers[gpu] = PatientSampler(sampler)

    async def measure(self, gpu: str, uses: tuple[SessionUse, ...]) -> None:
        """Look at a GPU that telemetry does not measure itself. Waits for its sensors, for a bounded time."""
        work = {use.info.worker_pid: use.gpu_ns for use in uses}
        self.add(gpu, uses, await self._samplers[gpu].sample(work))

    def add(
        self,
        gpu: str,
        uses: tuple[SessionUse, ...],
        sample: GpuSample,
        work: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """A look: the sessions of that GPU, and the card. ``work``: GPU time by worker where ``uses`` do not have all of it."""
        totals = {int(use.info.session): work.get(use.info.worker_pid, use.gpu_ns) for use in uses}
        percent = sample.gpu_utilization_percent
        named = [
            sample.sm_utilization[use.info.worker_pid]
            for use in uses
            if use.info.worker_pid in sample.sm_utilization
        ]
        self._meters.setdefault(gpu, DriftMeter()).look(
            self.clock(),
            totals,
            None if percent is None else percent / 100,
            # No session used nothing; sessions that NVML does not name may have used anything.
            min(sum(named) / 100, 1.0) if named or (not uses and percent is not None) else None,
        )

    def ended(self, gpu: str, session: SessionId, gpu_ns: int) -> None:
        """A session has ended, with so much GPU time in all."""
        meter = self._meters.get(gpu)
        if meter is not None:
            meter.ended(int(session), gpu_ns, self.clock())

    def windows(self) -> dict[str, tuple[GpuTimeWindow, ...]]:
        """By label; only those that have something to show."""
        now = self.clock()
        found = {label_of(gpu): meter.windows(now) for gpu, meter in sorted(self._meters.items())}
        return {gpu: windows for gpu, windows in found.items() if windows}
