# SPDX-License-Identifier: Apache-2.0
"""Finding a host, losing it, finding the next; a writer that writes while we read; threads and forks."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vgpu.transport.attach import LAYOUT_VERSION, Status
from vgpu.transport.layout import DEVICE_PAGE_SIZE

from .page_host import PageHost, page_bytes, writing

DRIVER_NOT_LOADED, TIMEOUT, GPU_IS_LOST = 9, 10, 15


def number(nvml: ctypes.CDLL, device: ctypes.c_void_p, name: str) -> int:
    value = ctypes.c_uint()
    status = nvml[name](device, ctypes.byref(value))
    assert status == 0, f"{name}: {status}"
    return value.value


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- finding a host ----


def test_without_a_host_there_is_no_driver(
    library: ctypes.CDLL, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for place in (str(run_dir), "/nonexistent", "relative"):
        monkeypatch.setenv("VGPU_RUN_DIR", place)
        took = []
        for _ in range(5):
            began = time.monotonic()
            assert library.nvmlInit_v2() == DRIVER_NOT_LOADED
            took.append(time.monotonic() - began)
        assert min(took) < 0.2  # half a second for one that has gone
        assert library.nvmlShutdown() == 1
    assert capfd.readouterr() == ("", "")


def test_a_host_that_has_gone_is_waited_for_a_moment(
    library: ctypes.CDLL, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VGPU_RUN_DIR", str(run_dir))
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as left_over:
        left_over.bind(str(run_dir / "mediator.sock"))
    began = time.monotonic()
    assert library.nvmlInit_v2() == DRIVER_NOT_LOADED
    assert 0.5 < time.monotonic() - began < 30
    (run_dir / "mediator.sock").unlink()


def test_the_default_places(library: ctypes.CDLL, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGPU_RUN_DIR", "")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(run_dir))
    (run_dir / "vgpu").mkdir()
    with PageHost(run_dir / "vgpu"):
        assert library.nvmlInit_v2() == 0
        assert library.nvmlShutdown() == 0


def test_what_the_hello_says(library: ctypes.CDLL, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGPU_RUN_DIR", str(run_dir))
    monkeypatch.setenv("VGPU_VM", "blue")
    with PageHost(run_dir, busy_times=2) as host:
        assert library.nvmlInit_v2() == 0
        assert library.nvmlShutdown() == 0
        hello = host.hellos[-1]
        assert (hello.vm, hello.pid, hello.layout_version) == ("blue", os.getpid(), LAYOUT_VERSION)
        assert hello.program != ""
        assert len(host.hellos) == 3  # two answers were "busy"


@pytest.mark.parametrize(
    ("status", "expected"), [(Status.NO_DEVICE, 9), (Status.REFUSED, 4), (Status.VERSION_MISMATCH, 18)]
)
def test_a_host_that_refuses(
    library: ctypes.CDLL, run_dir: Path, monkeypatch: pytest.MonkeyPatch, status: Status, expected: int
) -> None:
    monkeypatch.setenv("VGPU_RUN_DIR", str(run_dir))
    with PageHost(run_dir, status=status):
        assert library.nvmlInit_v2() == expected
        assert library.nvmlShutdown() == 1


def test_a_page_that_is_too_small(
    library: ctypes.CDLL, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VGPU_RUN_DIR", str(run_dir))
    with PageHost(run_dir, file_size=DEVICE_PAGE_SIZE - 4096):
        assert library.nvmlInit_v2() == 18


def test_cuda_version_before_init(
    library: ctypes.CDLL, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VGPU_RUN_DIR", str(run_dir))
    version = ctypes.c_int()
    assert library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(version)) == 12
    assert library.nvmlSystemGetCudaDriverVersion_v2(None) == 2
    with PageHost(run_dir):
        assert library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(version)) == 0
    assert version.value == 13000
    assert library.nvmlShutdown() == 1


# ---- counting users ----


def test_init_counts(library: ctypes.CDLL, host: PageHost) -> None:
    assert [library.nvmlInit(), library.nvmlInit_v2(), library.nvmlInitWithFlags(3)] == [0, 0, 0]
    assert library.nvmlInitWithFlags(4) == 2
    assert len(host.hellos) == 1
    count = ctypes.c_uint()
    for status in (0, 0, 1):
        assert library.nvmlShutdown() == 0
        assert library.nvmlDeviceGetCount_v2(ctypes.byref(count)) == status
    assert library.nvmlShutdown() == 1
    wait_until(lambda: host.open_connections() == 0)


def test_nothing_stays_open(library: ctypes.CDLL, host: PageHost) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    def mappings() -> int:
        with open("/proc/self/maps") as file:
            return sum("memfd:device-page" in line or "memfd:nvml" in line for line in file)

    room = ctypes.create_string_buffer(96)
    handle = ctypes.c_void_p()
    before = mappings()
    for _ in range(20):
        assert library.nvmlInit_v2() == 0
        assert library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)) == 0
        assert library.nvmlDeviceGetName(handle, room, 96) == 0
        assert library.nvmlShutdown() == 0
    assert mappings() == before
    wait_until(lambda: len(host.connections) == 20 and host.open_connections() == 0)
    host.hang_up()
    steady = descriptors()
    for _ in range(20):
        assert library.nvmlInit_v2() == 0
        assert library.nvmlShutdown() == 0
    wait_until(lambda: len(host.connections) == 20 and host.open_connections() == 0)
    host.hang_up()
    assert descriptors() == steady


def test_threads_begin_and_end_while_others_ask(library: ctypes.CDLL, host: PageHost) -> None:
    stop, problems = threading.Event(), []

    def cycle() -> None:
        while not stop.is_set():
            if library.nvmlInit_v2() != 0 or library.nvmlShutdown() != 0:
                problems.append("init")

    def ask() -> None:
        handle, room = ctypes.c_void_p(), ctypes.create_string_buffer(96)
        while not stop.is_set():
            if library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)) not in (0, 1):
                problems.append("handle")
            status = library.nvmlDeviceGetName(handle, room, 96)
            if status not in (0, 1) and handle.value is not None:
                problems.append(f"name {status}")
            if status == 0 and room.value != b"NVIDIA H200":
                problems.append(f"name {room.value!r}")

    threads = [threading.Thread(target=target) for target in (cycle, cycle, ask, ask)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert problems == []
    assert library.nvmlShutdown() == 1  # as many ends as beginnings


# ---- the sequence lock ----


def test_telemetry_is_never_torn(nvml: ctypes.CDLL, device: ctypes.c_void_p, host: PageHost) -> None:
    """All fields of one answer are of one round of the writer."""
    seen: set[int] = set()

    class Value(ctypes.Structure):
        _fields_ = (
            ("field", ctypes.c_uint),
            ("scope", ctypes.c_uint),
            ("time", ctypes.c_longlong),
            ("latency", ctypes.c_longlong),
            ("type", ctypes.c_uint),
            ("status", ctypes.c_int),
            ("value", ctypes.c_ulonglong),
        )

    rates, values = (ctypes.c_uint * 2)(), (Value * 2)(Value(field=186), Value(field=192))
    fields = (
        "gpu_utilization_percent",
        "memory_utilization_percent",
        "power_milliwatts",
        "power_limit_milliwatts",
    )
    with writing(host, *fields):
        deadline = time.monotonic() + 60
        while len(seen) < 300:
            assert time.monotonic() < deadline
            assert nvml.nvmlDeviceGetUtilizationRates(device, rates) == 0
            assert rates[0] == rates[1]
            assert nvml.nvmlDeviceGetFieldValues(device, 2, values) == 0
            assert values[0].value == values[1].value
            seen.add(values[0].value)


def test_a_writer_that_died_leaves_the_last_answer(
    nvml: ctypes.CDLL, device: ctypes.c_void_p, host: PageHost
) -> None:
    assert number(nvml, device, "nvmlDeviceGetPowerUsage") == 412_345
    host.set("telemetry_sequence", 9)
    host.set("power_milliwatts", 1)
    began = time.monotonic()
    assert number(nvml, device, "nvmlDeviceGetPowerUsage") == 412_345
    assert 0.01 < time.monotonic() - began < 30
    host.set("telemetry_sequence", 10)
    assert number(nvml, device, "nvmlDeviceGetPowerUsage") == 1


def test_a_writer_that_died_before_we_came(library: ctypes.CDLL, host: PageHost) -> None:
    host.set("telemetry_sequence", 9)
    assert library.nvmlInit_v2() == 0
    handle, value = ctypes.c_void_p(), ctypes.c_uint()
    assert library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)) == 0
    assert library.nvmlDeviceGetPowerUsage(handle, ctypes.byref(value)) == TIMEOUT
    assert library.nvmlShutdown() == 0


# ---- losing the host ----


def test_the_next_host_is_found(nvml: ctypes.CDLL, device: ctypes.c_void_p, host: PageHost) -> None:
    assert number(nvml, device, "nvmlDeviceGetPowerUsage") == 412_345
    host.leave()
    for _ in range(3):
        assert number(nvml, device, "nvmlDeviceGetPowerUsage") == 412_345  # what was last known
    host.page = page_bytes({"power_milliwatts": 7})
    host.come_back()
    wait_until(lambda: number(nvml, device, "nvmlDeviceGetPowerUsage") == 7)
    assert len(host.hellos) == 2


def test_a_host_is_asked_at_most_once_a_second(
    nvml: ctypes.CDLL, device: ctypes.c_void_p, host: PageHost
) -> None:
    host.status = Status.NO_DEVICE
    host.hang_up()
    began = time.monotonic()
    # The first HELLO was that of nvmlInit; one at once when the host has gone, and one after a second.
    while len(host.hellos) < 3 and time.monotonic() - began < 20:
        assert number(nvml, device, "nvmlDeviceGetPowerUsage") == 412_345
    assert len(host.hellos) >= 3
    assert len(host.hellos) <= 2 + (time.monotonic() - began)


def test_a_page_taken_away_is_an_error_and_no_signal(
    nvml: ctypes.CDLL, device: ctypes.c_void_p, host: PageHost
) -> None:
    host.resize(0)
    value = ctypes.c_uint()
    assert nvml.nvmlDeviceGetPowerUsage(device, ctypes.byref(value)) == GPU_IS_LOST
    host.resize(DEVICE_PAGE_SIZE)
    host.replace_page(page_bytes())
    assert number(nvml, device, "nvmlDeviceGetPowerUsage") == 412_345


def test_a_child_asks_with_a_connection_of_its_own(host: PageHost, library_path: Path) -> None:
    program = """
import ctypes, os, sys
nvml = ctypes.CDLL(sys.argv[1])
assert nvml.nvmlInit_v2() == 0
device, value = ctypes.c_void_p(), ctypes.c_uint()
assert nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)) == 0
assert nvml.nvmlDeviceGetPowerUsage(device, ctypes.byref(value)) == 0
for _ in range(3):
    child = os.fork()
    if child == 0:
        value = ctypes.c_uint()
        status = nvml.nvmlDeviceGetPowerUsage(device, ctypes.byref(value))
        os._exit(0 if status == 0 and value.value == 412345 else 1)
    assert os.waitpid(child, 0)[1] == 0
assert nvml.nvmlDeviceGetPowerUsage(device, ctypes.byref(value)) == 0
assert nvml.nvmlShutdown() == 0
"""
    done = subprocess.run(
        [sys.executable, "-c", program, library_path],
        env={**os.environ, **host.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(host.hellos) == 4
    assert len({hello.pid for hello in host.hellos}) == 4


def test_a_waiter_for_events_does_not_wait_longer_than_asked(
    nvml: ctypes.CDLL, device: ctypes.c_void_p
) -> None:
    events = ctypes.c_void_p()
    assert nvml.nvmlEventSetCreate(ctypes.byref(events)) == 0
    began = time.monotonic()
    assert nvml.nvmlEventSetWait_v2(events, ctypes.create_string_buffer(64), 600) == TIMEOUT
    assert 0.55 < time.monotonic() - began < 30
    assert nvml.nvmlEventSetFree(events) == 0
