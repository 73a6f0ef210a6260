# SPDX-License-Identifier: Apache-2.0
"""The host's sensors, through the host's own libnvidia-ml.so.1 and ctypes.

The library that guests load has the same name, and this project puts it on library paths: a file is looked into before it
is loaded, for loading ours would have the mediator ask itself. It is found beside the real libcuda, or where the
loader would look.

Nothing here may fail the mediator: what cannot be had, down to the whole library, is unknown and logged once. Calls
block, for milliseconds as a rule and for ever on a card that has fallen off the bus: see ``sampling.PatientSampler``.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from .driver import DriverNotFound, find_nvml, is_guest_library
from .sampling import UNKNOWN_SAMPLE, DeviceIdentity, GpuSample, Sampler, SoftwareSampler, WorkMeter

_log = logging.getLogger("vgpu.nvml")

# After a library that did not start (the driver is just being replaced, say).
RETRY_SECONDS = 30.0

SUCCESS, INSUFFICIENT_SIZE, NOT_FOUND = 0, 7, 6
CLOCK_GRAPHICS, CLOCK_SM, CLOCK_MEMORY, CLOCK_VIDEO = range(4)
SHUTDOWN, SLOWDOWN = 0, 1
FIELD_MEMORY_TEMPERATURE = 82
NO_PERFORMANCE_STATE = 32
# Counts of processes are asked for first; more than this is no count.
SAMPLES_AT_MOST = 65536

# Unsigned numbers that one call gives for a device, by the field they fill.
STATIC_NUMBERS = {
    "power_limit_default_milliwatts": "nvmlDeviceGetPowerManagementDefaultLimit",
    "brand": "nvmlDeviceGetBrand",
    "architecture": "nvmlDeviceGetArchitecture",
    "pcie_generation_max": "nvmlDeviceGetMaxPcieLinkGeneration",
    "pcie_width_max": "nvmlDeviceGetMaxPcieLinkWidth",
    "memory_bus_width_bits": "nvmlDeviceGetMemoryBusWidth",
}
LIVE_NUMBERS = {
    "power_milliwatts": "nvmlDeviceGetPowerUsage",
    "power_limit_milliwatts": "nvmlDeviceGetEnforcedPowerLimit",
    "performance_state": "nvmlDeviceGetPerformanceState",
    "fan_percent": "nvmlDeviceGetFanSpeed",
    "persistence_mode": "nvmlDeviceGetPersistenceMode",
    "compute_mode": "nvmlDeviceGetComputeMode",
    "pcie_generation": "nvmlDeviceGetCurrPcieLinkGeneration",
    "pcie_width": "nvmlDeviceGetCurrPcieLinkWidth",
}
# The same with a number that says which one.
STATIC_CHOICES = {
    "graphics_clock_max_mhz": ("nvmlDeviceGetMaxClockInfo", CLOCK_GRAPHICS),
    "sm_clock_max_mhz": ("nvmlDeviceGetMaxClockInfo", CLOCK_SM),
    "memory_clock_max_mhz": ("nvmlDeviceGetMaxClockInfo", CLOCK_MEMORY),
    "video_clock_max_mhz": ("nvmlDeviceGetMaxClockInfo", CLOCK_VIDEO),
    "temperature_slowdown_celsius": ("nvmlDeviceGetTemperatureThreshold", SLOWDOWN),
    "temperature_shutdown_celsius": ("nvmlDeviceGetTemperatureThreshold", SHUTDOWN),
}
LIVE_CHOICES = {
    "temperature_celsius": ("nvmlDeviceGetTemperature", 0),
    "graphics_clock_mhz": ("nvmlDeviceGetClockInfo", CLOCK_GRAPHICS),
    "sm_clock_mhz": ("nvmlDeviceGetClockInfo", CLOCK_SM),
    "memory_clock_mhz": ("nvmlDeviceGetClockInfo", CLOCK_MEMORY),
    "video_clock_mhz": ("nvmlDeviceGetClockInfo", CLOCK_VIDEO),
    "pcie_tx_kilobytes": ("nvmlDeviceGetPcieThroughput", 0),
    "pcie_rx_kilobytes": ("nvmlDeviceGetPcieThroughput", 1),
}
STATIC_TEXTS = {
    "vbios_version": "nvmlDeviceGetVbiosVersion",
    "serial": "nvmlDeviceGetSerial",
    "board_part_number": "nvmlDeviceGetBoardPartNumber",
}
TEXT_SIZE = 96


class _Utilization(ctypes.Structure):
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


class _Bar1Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_uint64), ("free", ctypes.c_uint64), ("used", ctypes.c_uint64)]


class _Memory(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_uint),
        ("total", ctypes.c_uint64),
        ("reserved", ctypes.c_uint64),
        ("free", ctypes.c_uint64),
        ("used", ctypes.c_uint64),
    ]


class _FieldValue(ctypes.Structure):
    _fields_ = [
        ("field", ctypes.c_uint),
        ("scope", ctypes.c_uint),
        ("microseconds", ctypes.c_int64),
        ("latency", ctypes.c_int64),
        ("kind", ctypes.c_uint),
        ("status", ctypes.c_int),
        ("value", ctypes.c_uint64),
    ]


class _ProcessSample(ctypes.Structure):
    _fields_ = [
        ("pid", ctypes.c_uint),
        ("microseconds", ctypes.c_uint64),
        ("sm", ctypes.c_uint),
        ("memory", ctypes.c_uint),
        ("encoder", ctypes.c_uint),
        ("decoder", ctypes.c_uint),
    ]


class NvmlUnusable(Exception):
    """There is no library to ask, or it refuses; the message says why."""


@attrs.define(eq=False)
class _Device:
    """One device of an initialised library. Every question answers None where the library refuses."""

    library: ctypes.CDLL
    handle: ctypes.c_void_p

    def call(self, name: str, *arguments: Any) -> int:
        """The status; a function that this driver lacks is "not found"."""
        function = getattr(self.library, name, None)
        return NOT_FOUND if function is None else int(function(*arguments))

    def number(self, name: str, *choice: int) -> int | None:
        value = ctypes.c_uint()
        status = self.call(name, self.handle, *map(ctypes.c_uint, choice), ctypes.byref(value))
        return value.value if status == SUCCESS else None

    def quad(self, name: str, *choice: int) -> int | None:
        value = ctypes.c_uint64()
        status = self.call(name, self.handle, *map(ctypes.c_uint, choice), ctypes.byref(value))
        return value.value if status == SUCCESS else None

    def pair(self, name: str) -> tuple[int, int] | None:
        first, second = ctypes.c_uint(), ctypes.c_uint()
        status = self.call(name, self.handle, ctypes.byref(first), ctypes.byref(second))
        return (first.value, second.value) if status == SUCCESS else None

    def first(self, name: str) -> int | None:
        pair = self.pair(name)
        return None if pair is None else pair[0]

    def text(self, name: str, *, of_system: bool = False) -> str | None:
        buffer = ctypes.create_string_buffer(TEXT_SIZE)
        device = () if of_system else (self.handle,)
        if self.call(name, *device, buffer, ctypes.c_uint(TEXT_SIZE)) != SUCCESS:
            return None
        return buffer.value.decode("utf-8", "replace") or None

    def structure(self, name: str, value: ctypes.Structure) -> Any:
        return value if self.call(name, self.handle, ctypes.byref(value)) == SUCCESS else None

    def memory_temperature(self) -> int | None:
        value = _FieldValue(field=FIELD_MEMORY_TEMPERATURE)
        status = self.call("nvmlDeviceGetFieldValues", self.handle, ctypes.c_int(1), ctypes.byref(value))
        # Of the union the low 32 bits are the number; a card without the sensor says 0 or refuses.
        known = status == SUCCESS and value.status == SUCCESS
        return (value.value & 0xFFFFFFFF) or None if known else None

    def throttle_reasons(self) -> int | None:
        reasons = self.quad("nvmlDeviceGetCurrentClocksEventReasons")
        return reasons if reasons is not None else self.quad("nvmlDeviceGetCurrentClocksThrottleReasons")

    def process_samples(self, since: int) -> list[_ProcessSample] | None:
        """Samples newer than ``since`` (microseconds); empty where nobody used the GPU; None where it cannot say."""
        name = "nvmlDeviceGetProcessUtilization"
        count = ctypes.c_uint(0)
        last = ctypes.c_uint64(since)
        status = self.call(name, self.handle, None, ctypes.byref(count), last)
        if status == NOT_FOUND and getattr(self.library, name, None) is not None:
            return []
        if status not in (SUCCESS, INSUFFICIENT_SIZE) or count.value > SAMPLES_AT_MOST:
            return None
        if count.value == 0:
            return []
        found = (_ProcessSample * count.value)()
        status = self.call(name, self.handle, found, ctypes.byref(count), last)
        if status == NOT_FOUND:
            return []
        return list(found[: count.value]) if status == SUCCESS else None


def open_device(path: Path, identity: DeviceIdentity) -> _Device:
    """Load and initialise the library at ``path`` and find the device in it, by UUID or else by its bus address.

    Raises:
        NvmlUnusable: it cannot be loaded, does not start, or does not know the device.
    """
    if is_guest_library(path):
        raise NvmlUnusable(f"{path} is this project's guest library")
    try:
        library = ctypes.CDLL(str(path))
        status = int(library.nvmlInit_v2())
    except (OSError, AttributeError) as error:
        raise NvmlUnusable(f"{path}: {error}") from error
    if status != SUCCESS:
        raise NvmlUnusable(f"{path}: nvmlInit_v2 answered {status}{_reason(library, status)}")
    device = _Device(library, ctypes.c_void_p())
    for name, key in (
        ("nvmlDeviceGetHandleByUUID", identity.uuid),
        ("nvmlDeviceGetHandleByPciBusId_v2", identity.pci),
    ):
        if key and device.call(name, key.encode(), ctypes.byref(device.handle)) == SUCCESS:
            return device
    raise NvmlUnusable(f"{path} knows neither {identity.uuid} nor {identity.pci}")


def _reason(library: ctypes.CDLL, status: int) -> str:
    try:
        library.nvmlErrorString.restype = ctypes.c_char_p
        text = library.nvmlErrorString(status)
    except AttributeError:
        return ""
    return f" ({text.decode('utf-8', 'replace')})" if text else ""


@attrs.define(eq=False)
class NvmlSampler:
    """Sensors of one real GPU. Looks for the library at the first sample, and again now and then while it fails."""

    identity: DeviceIdentity
    libcuda: Path | None = None
    library: Path | None = None  # where it is, for tests; else looked for
    clock: Callable[[], float] = time.monotonic
    meter: WorkMeter = attrs.Factory(WorkMeter)
    _device: _Device | None = None
    _static: dict[str, Any] = attrs.Factory(dict)
    _next_try: float = float("-inf")
    _complaint: str = ""
    _seen_microseconds: int = 0

    def sample(self, work: Mapping[int, int]) -> GpuSample:
        """Everything the card says. Blocks while the driver measures, some 50 ms."""
        device = self._open()
        if device is None:
            return UNKNOWN_SAMPLE
        live = _live(device)
        if all(value is None for value in live.values()):
            self._give_up(device)
            return UNKNOWN_SAMPLE
        return GpuSample(**self._static, **live, sm_utilization=self._by_worker(device, work))

    def _give_up(self, device: _Device) -> None:
        """The card answers nothing any more: lost, or its driver was unloaded. A later life of either is found again."""
        _log.warning("the GPU's sensors answer nothing any more; they show as unknown")
        device.call("nvmlShutdown")
        self._device = None
        self._next_try = self.clock() + RETRY_SECONDS

    def _open(self) -> _Device | None:
        if self._device is not None or self.clock() < self._next_try:
            return self._device
        self._next_try = self.clock() + RETRY_SECONDS
        try:
            path = self.library or find_nvml(self.libcuda)
            device = open_device(path, self.identity)
        except (DriverNotFound, NvmlUnusable, OSError) as error:
            if str(error) != self._complaint:
                _log.warning("no sensors: %s; temperature, power and clocks show as unknown", error)
            self._complaint = str(error)
            return None
        self._static = _static(device)
        self._device = device
        return device

    def _by_worker(self, device: _Device, work: Mapping[int, int]) -> dict[int, int]:
        """Who of the workers used the multiprocessors how much.

        A worker that is not named did nothing, or goes by another number where this process is in a container; its own
        counter tells which.
        """
        busy = self.meter.measure(work)
        samples = device.process_samples(self._seen_microseconds)
        if samples is None:
            return {}
        idle = {pid: 0 for pid, percent in busy.items() if percent == 0}
        latest: dict[int, _ProcessSample] = {}
        for one in samples:
            self._seen_microseconds = max(self._seen_microseconds, one.microseconds)
            if one.pid not in latest or latest[one.pid].microseconds < one.microseconds:
                latest[one.pid] = one
        return idle | {pid: min(100, one.sm) for pid, one in latest.items() if pid in work}


def _static(device: _Device) -> dict[str, Any]:
    """What does not change while the driver is loaded."""
    values: dict[str, Any] = {field: device.number(name) for field, name in STATIC_NUMBERS.items()}
    values |= {field: device.number(name, which) for field, (name, which) in STATIC_CHOICES.items()}
    values |= {field: device.text(name) for field, name in STATIC_TEXTS.items()}
    values["nvml_version"] = device.text("nvmlSystemGetNVMLVersion", of_system=True)
    limits = device.pair("nvmlDeviceGetPowerManagementLimitConstraints") or (None, None)
    values["power_limit_min_milliwatts"], values["power_limit_max_milliwatts"] = limits
    bar1 = device.structure("nvmlDeviceGetBAR1MemoryInfo", _Bar1Memory())
    values["bar1_total_bytes"] = bar1.total if bar1 else None
    return values


def _live(device: _Device) -> dict[str, Any]:
    values: dict[str, Any] = {field: device.number(name) for field, name in LIVE_NUMBERS.items()}
    values |= {field: device.number(name, which) for field, (name, which) in LIVE_CHOICES.items()}
    if values["performance_state"] == NO_PERFORMANCE_STATE:
        values["performance_state"] = None
    utilization = device.structure("nvmlDeviceGetUtilizationRates", _Utilization())
    values["gpu_utilization_percent"] = utilization.gpu if utilization else None
    values["memory_utilization_percent"] = utilization.memory if utilization else None
    values["encoder_utilization_percent"] = device.first("nvmlDeviceGetEncoderUtilization")
    values["decoder_utilization_percent"] = device.first("nvmlDeviceGetDecoderUtilization")
    values["ecc_enabled"] = device.first("nvmlDeviceGetEccMode")
    for kind, error in enumerate(("corrected", "uncorrected")):
        for life, counter in enumerate(("volatile", "aggregate")):
            values[f"ecc_{error}_{counter}"] = device.quad("nvmlDeviceGetTotalEccErrors", kind, life)
    values["energy_millijoules"] = device.quad("nvmlDeviceGetTotalEnergyConsumption")
    values["throttle_reasons"] = device.throttle_reasons()
    values["memory_temperature_celsius"] = device.memory_temperature()
    memory = device.structure("nvmlDeviceGetMemoryInfo_v2", _Memory(version=ctypes.sizeof(_Memory) | 2 << 24))
    for part in ("total", "reserved", "used"):
        values[f"card_memory_{part}_bytes"] = getattr(memory, part) if memory else None
    return values


def sampler_for(identity: DeviceIdentity, libcuda: Path | None = None) -> Sampler:
    """Whoever can measure that GPU."""
    return SoftwareSampler() if identity.is_software else NvmlSampler(identity, libcuda)
