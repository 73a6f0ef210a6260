# SPDX-License-Identifier: Apache-2.0
"""The host's sensors, with a library of a made-up card in place of the driver's."""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs
import pytest
import trio

from vgpu.gpu.driver import NVML, find_nvml
from vgpu.gpu.nvml import RETRY_SECONDS, NvmlSampler, NvmlUnusable, open_device, sampler_for
from vgpu.gpu.sampling import (
    UNKNOWN_SAMPLE,
    DeviceIdentity,
    GpuSample,
    PatientSampler,
    SoftwareSampler,
    WorkMeter,
)
from vgpu.shim.locate import library_directory

UUID = "GPU-00112233-4455-6677-8899-aabbccddeeff"
CARD = DeviceIdentity(UUID, "0000:41:00.0")
GUEST_NVML = library_directory() / NVML

EXPECTED = GpuSample(
    temperature_celsius=43,
    gpu_utilization_percent=87,
    memory_utilization_percent=31,
    power_milliwatts=412_345,
    graphics_clock_mhz=1000,
    sm_clock_mhz=1001,
    memory_clock_mhz=1002,
    video_clock_mhz=1003,
    graphics_clock_max_mhz=2000,
    sm_clock_max_mhz=2001,
    memory_clock_max_mhz=2002,
    video_clock_max_mhz=2003,
    energy_millijoules=98_765_432_109,
    throttle_reasons=4,
    bar1_total_bytes=256 << 30,
    power_limit_milliwatts=700_000,
    power_limit_default_milliwatts=690_000,
    power_limit_min_milliwatts=200_000,
    power_limit_max_milliwatts=710_000,
    performance_state=2,
    fan_percent=None,
    memory_temperature_celsius=51,
    temperature_slowdown_celsius=87,
    temperature_shutdown_celsius=92,
    encoder_utilization_percent=3,
    decoder_utilization_percent=5,
    ecc_enabled=1,
    ecc_corrected_volatile=70,
    ecc_corrected_aggregate=71,
    ecc_uncorrected_volatile=None,
    ecc_uncorrected_aggregate=73,
    persistence_mode=1,
    compute_mode=0,
    brand=14,
    architecture=9,
    pcie_generation=4,
    pcie_generation_max=5,
    pcie_width=8,
    pcie_width_max=16,
    pcie_tx_kilobytes=123,
    pcie_rx_kilobytes=456,
    memory_bus_width_bits=6144,
    vbios_version="96.00.A5.00.01",
    nvml_version="13.580.159.04",
    serial="1652723012345",
    board_part_number="692-2G520-0280-001",
    card_memory_total_bytes=143_771 << 20,
    card_memory_reserved_bytes=600 << 20,
    card_memory_used_bytes=5 << 30,
)


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Path]:
    """Compile the library into a folder of the test's own, with the compiler options given."""

    def compile_it(*options: str, name: str = NVML) -> Path:
        out = tmp_path / name
        source = Path(__file__).parent / "fake_nvml.c"
        command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-format-truncation"]
        done = subprocess.run(
            [*command, *options, "-o", str(out), str(source)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return out

    return compile_it


@attrs.define
class Clock:
    """A clock that a test sets, in seconds or nanoseconds as it likes."""

    now: int = 1

    def __call__(self) -> int:
        return self.now


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_every_field_a_card_tells_is_read_and_the_others_are_unknown(build: Callable[..., Path]) -> None:
    sampler = NvmlSampler(CARD, library=build())
    assert sampler.sample({}) == EXPECTED
    # Both ways of saying which card: one whose UUID is unknown is found by its address.
    other = attrs.evolve(CARD, uuid="GPU-11111111-1111-1111-1111-111111111111")
    assert NvmlSampler(other, library=build()).sample({}).temperature_celsius == 43


def test_what_does_not_change_is_asked_once(build: Callable[..., Path]) -> None:
    path = build()
    sampler = NvmlSampler(CARD, library=path)
    library = ctypes.CDLL(str(path))
    for _ in range(5):
        sampler.sample({})
    assert library.fake_static_calls() == 1
    assert library.fake_initialised() == 1


def test_a_driver_without_a_function_only_lacks_what_it_would_say(build: Callable[..., Path]) -> None:
    clock = Clock(10**9)
    sampler = NvmlSampler(CARD, library=build("-DWITHOUT_PROCESSES"), meter=WorkMeter(clock))
    sampler.sample({42: 0})
    clock.now += 10**9
    assert sampler.sample({42: 0}) == EXPECTED
    stripped = build("-DnvmlDeviceGetTemperature=elsewhere", name="other.so")
    assert NvmlSampler(CARD, library=stripped).sample({}) == attrs.evolve(EXPECTED, temperature_celsius=None)


def test_workers_use_of_the_multiprocessors(build: Callable[..., Path]) -> None:
    path = build()
    library = ctypes.CDLL(str(path))
    clock = Clock(10**9)
    sampler = NvmlSampler(CARD, library=path, meter=WorkMeter(clock))

    def look(**milliseconds: int) -> Mapping[int, int]:
        clock.now += 10**9
        work = {int(pid[1:]): spent * 10**6 for pid, spent in milliseconds.items()}
        return sampler.sample(work).sm_utilization

    add = library.fake_add_sample
    add.argtypes = [ctypes.c_uint, ctypes.c_ulonglong, ctypes.c_uint]
    add(41, 1000, 10)
    add(41, 2000, 60)
    add(99, 2000, 30)  # nobody of ours
    # 42 is not named: nothing is known of its work before this look.
    assert look(p41=0, p42=0, p43=0) == {41: 60}
    library.fake_forget_samples()
    add(41, 2000, 60)  # seen already
    add(41, 3000, 120)
    # 42 did nothing by its own counter; 43 worked and is not named, so it is unknown.
    assert look(p41=500, p42=0, p43=700) == {41: 100, 42: 0}
    library.fake_forget_samples()
    assert look(p41=500, p42=0, p43=700) == {41: 0, 42: 0, 43: 0}


def test_a_lost_card_is_given_up_and_found_again(
    build: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = build()
    library = ctypes.CDLL(str(path))
    clock = Clock(0)
    sampler = NvmlSampler(CARD, library=path, clock=clock)
    assert sampler.sample({}) == EXPECTED
    library.fake_lose(1)
    assert sampler.sample({}) == UNKNOWN_SAMPLE
    assert library.fake_shut_down() == 1
    library.fake_lose(0)
    assert sampler.sample({}) == UNKNOWN_SAMPLE  # it is not asked again at once
    clock.now += int(RETRY_SECONDS)
    assert sampler.sample({}) == EXPECTED
    assert len(warnings_of(caplog)) == 1


def test_a_library_that_does_not_start_is_said_once_and_tried_again_now_and_then(
    build: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = build()
    library = ctypes.CDLL(str(path))
    library.fake_init_status(9)
    clock = Clock(0)
    sampler = NvmlSampler(CARD, library=path, clock=clock)
    for _ in range(100):
        assert sampler.sample({}) == UNKNOWN_SAMPLE
        clock.now += 1
    assert library.fake_initialised() == 4
    assert len(warnings_of(caplog)) == 1
    assert "Driver Not Loaded" in warnings_of(caplog)[0]
    library.fake_init_status(0)
    clock.now += int(RETRY_SECONDS)
    assert sampler.sample({}) == EXPECTED


def test_a_card_the_library_does_not_know(build: Callable[..., Path]) -> None:
    stranger = DeviceIdentity("GPU-11111111-1111-1111-1111-111111111111", "0000:01:00.0")
    with pytest.raises(NvmlUnusable, match="knows neither"):
        open_device(build(), stranger)


def test_the_library_is_found_beside_libcuda_and_ours_never(
    build: Callable[..., Path], tmp_path: Path
) -> None:
    ours, theirs, loader = (tmp_path / name for name in ("ours", "theirs", "loader"))
    for folder in (ours, theirs, loader):
        folder.mkdir()
    shutil.copy(GUEST_NVML, ours / NVML)
    real = build()
    shutil.copy(real, theirs / NVML)
    shutil.copy(real, loader / NVML)
    assert find_nvml(theirs / "libcuda.so.580.1", lambda: [loader]) == theirs / NVML
    assert find_nvml(ours / "libcuda.so.1", lambda: [ours, loader]) == loader / NVML
    assert find_nvml(None, lambda: [tmp_path / "nowhere", loader]) == loader / NVML
    # Also where somebody names it: the mediator must not become its own guest.
    with pytest.raises(NvmlUnusable, match="guest library"):
        open_device(ours / NVML, CARD)


def test_the_library_is_looked_for_where_the_loader_would(
    build: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = build()
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{GUEST_NVML.parent}:{tmp_path}")
    assert find_nvml() == library


def test_a_host_without_the_library(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vgpu.gpu.driver.USUAL_FOLDERS", ())
    monkeypatch.setenv("LD_LIBRARY_PATH", str(GUEST_NVML.parent))
    monkeypatch.setattr(subprocess, "run", _no_ldconfig)
    sampler = sampler_for(CARD, GUEST_NVML.parent / "libcuda.so.1")
    for _ in range(3):
        assert sampler.sample({1: 2}) == UNKNOWN_SAMPLE
    assert len(warnings_of(caplog)) == 1
    mapped = Path("/proc/self/maps").read_text()
    assert str(GUEST_NVML) not in mapped


def _no_ldconfig(*_: object, **__: object) -> None:
    raise FileNotFoundError("ldconfig")


def test_the_software_gpu_is_as_busy_as_its_workers() -> None:
    clock = Clock(10**9)
    sampler = SoftwareSampler(WorkMeter(clock))
    assert sampler.sample({1: 5 * 10**9}) == GpuSample(gpu_utilization_percent=0)
    clock.now += 10**9
    assert sampler.sample({1: 5 * 10**9 + 250 * 10**6, 2: 0}) == GpuSample(
        gpu_utilization_percent=25, sm_utilization={1: 25}
    )
    # Too soon to say anything new, and one of them has gone.
    clock.now += 10**6
    assert sampler.sample({2: 0}).sm_utilization == {}
    clock.now += 10**9
    both = sampler.sample({1: 10**10, 2: 10**9})
    assert both.gpu_utilization_percent == 100
    assert both.sm_utilization == {1: 100, 2: 100}
    # A number that was used again must not count backwards.
    clock.now += 10**9
    assert sampler.sample({1: 0}).sm_utilization == {1: 0}
    assert isinstance(sampler_for(DeviceIdentity("GPU-0", "0000:00:00.0", True)), SoftwareSampler)


@attrs.define(eq=False)
class _Stuck:
    """A sampler that hangs until it is let go."""

    go: threading.Event = attrs.Factory(threading.Event)
    calls: int = 0

    def sample(self, work: Mapping[int, int]) -> GpuSample:
        self.calls += 1
        self.go.wait(20)
        return GpuSample(temperature_celsius=self.calls)


async def test_sensors_that_hang_hold_up_nobody(caplog: pytest.LogCaptureFixture) -> None:
    stuck = _Stuck()
    patient = PatientSampler(stuck, seconds=0.05)
    try:
        with trio.fail_after(60):
            assert await patient.sample({}) == UNKNOWN_SAMPLE
            while stuck.calls == 0:  # its thread may be later than the patience lasts
                await trio.sleep(0.01)
            for _ in range(3):
                assert await patient.sample({}) == UNKNOWN_SAMPLE
        assert stuck.calls == 1  # no second thread joins the first
    finally:
        stuck.go.set()
    with trio.fail_after(60):
        while (sample := await patient.sample({})) == UNKNOWN_SAMPLE:
            await trio.sleep(0.01)
    # What the one that hung found is of no use by now. Another one may be late as well.
    assert sample.temperature_celsius is not None
    assert 2 <= sample.temperature_celsius == stuck.calls
    assert len(warnings_of(caplog)) == 1


async def test_a_slow_driver_call_does_not_stop_the_event_loop(build: Callable[..., Path]) -> None:
    path = build()
    ctypes.CDLL(str(path)).fake_hang(300)
    patient = PatientSampler(NvmlSampler(CARD, library=path))
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await trio.sleep(0.01)
            ticks += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tick)
        assert await patient.sample({}) == EXPECTED
        nursery.cancel_scope.cancel()
    assert ticks >= 5
