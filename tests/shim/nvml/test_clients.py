# SPDX-License-Identifier: Apache-2.0
"""Programs as users have them: gpustat, nvitop, PyTorch's look-ups, and what NVIDIA's nvidia-smi asks for beyond NVML."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests import toolchain

from .page_host import GIB, UUID, UUID_TEXT, PageHost, page_bytes, unknown_page


def run(host: PageHost, library: Path, *words: str) -> str:
    environment = {**os.environ, **host.environment, "LD_LIBRARY_PATH": str(library.parent)}
    environment |= {"LC_ALL": "C.UTF-8", "COLUMNS": "120", "TERM": "dumb", "HOME": str(host.run_dir)}
    done = subprocess.run(
        [toolchain.nvml_clients_python(), *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_gpustat(host: PageHost, library_path: Path) -> None:
    host.replace_page(page_bytes(processes=((os.getpid(), 40, 3 * GIB, 1),)))
    report = json.loads(run(host, library_path, "-m", "gpustat", "--json"))
    (gpu,) = report["gpus"]
    assert report["driver_version"] == "580.159.04"
    assert (gpu["name"], gpu["uuid"], gpu["index"]) == ("NVIDIA H200", UUID_TEXT, 0)
    assert (gpu["temperature.gpu"], gpu["fan.speed"], gpu["utilization.gpu"]) == (43, None, 87)
    assert (gpu["utilization.enc"], gpu["utilization.dec"]) == (3, 5)
    assert (gpu["power.draw"], gpu["enforced.power.limit"]) == (412, 700)
    assert (gpu["memory.used"], gpu["memory.total"]) == (5120, 40960)
    assert [(p["pid"], p["gpu_memory_usage"]) for p in gpu["processes"]] == [(os.getpid(), 3072)]
    assert "NVIDIA H200" in run(host, library_path, "-m", "gpustat", "--no-color", "--show-all")


def test_gpustat_on_a_card_that_tells_nothing(host: PageHost, library_path: Path) -> None:
    host.replace_page(unknown_page())
    (gpu,) = json.loads(run(host, library_path, "-m", "gpustat", "--json"))["gpus"]
    assert (gpu["temperature.gpu"], gpu["utilization.gpu"], gpu["power.draw"]) == (None, None, None)
    assert (gpu["memory.used"], gpu["memory.total"]) == (5120, 40960)


def test_nvitop(host: PageHost, library_path: Path) -> None:
    host.replace_page(page_bytes(processes=((os.getpid(), 40, 3 * GIB, 1),)))
    text = run(host, library_path, "-m", "nvitop", "--once", "--ascii")
    for expected in ("580.159.04", "H200", "43C", "P0", "412W / 700W", "40.00GiB", "87%", "00000000:41:00.0"):
        assert expected in text
    (line,) = [line for line in text.splitlines() if f" {os.getpid()} " in line]
    assert "3072MiB  40" in line  # its memory, and its part of the processors


def test_nvitops_devices(host: PageHost, library_path: Path) -> None:
    """nvitop as a library asks for more than its screen shows."""
    script = host.run_dir / "devices.py"
    script.write_text(
        "import json\n"
        "from nvitop import Device\n"
        "(device,) = Device.all()\n"
        "snapshot = device.as_snapshot()\n"
        "print(json.dumps({name: getattr(snapshot, name) for name in ('name', 'uuid', 'memory_total',\n"
        "    'gpu_utilization', 'temperature', 'power_usage', 'performance_state', 'mig_mode')}))\n"
    )
    found = json.loads(run(host, library_path, str(script)))
    assert found == {
        "name": "NVIDIA H200",
        "uuid": UUID_TEXT,
        "memory_total": 40 * GIB,
        "gpu_utilization": 87,
        "temperature": 43,
        "power_usage": 412_345,
        "performance_state": "P0",
        "mig_mode": "Disabled",
    }


def test_pytorchs_seven_symbols(host: PageHost, library: ctypes.CDLL) -> None:
    """c10 looks these up and asserts that they exist; its Python half asks by UUID before CUDA is initialised."""
    host.replace_page(page_bytes(processes=((77, 0, GIB, 1),)))
    handle, version = ctypes.c_void_p(), ctypes.c_int()
    assert library.nvmlInit_v2() == 0
    assert library.nvmlDeviceGetHandleByPciBusId_v2(b"0000:41:00.0", ctypes.byref(handle)) == 0
    kind, room = ctypes.c_uint(), ctypes.create_string_buffer(128)
    for link in range(18):
        assert library.nvmlDeviceGetNvLinkRemoteDeviceType(handle, link, ctypes.byref(kind)) == 3
        assert library.nvmlDeviceGetNvLinkRemotePciInfo_v2(handle, link, room) == 3
    count = ctypes.c_uint(16)
    processes = (ctypes.c_ulonglong * 32)()
    assert library.nvmlDeviceGetComputeRunningProcesses(handle, ctypes.byref(count), processes) == 0
    assert (count.value, processes[0], processes[1]) == (1, 77, GIB)
    assert library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(version)) == 0
    assert version.value >= 13000
    fabric = (ctypes.c_uint * 10)(36 | 2 << 24)
    assert library.nvmlDeviceGetGpuFabricInfoV(handle, fabric) == 0
    assert fabric[7] == 0  # the state: not supported
    assert library.nvmlShutdown() == 0

    assert library.nvmlInit() == 0
    assert library.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0
    assert library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)) == 0
    uuid = ctypes.create_string_buffer(96)
    assert library.nvmlDeviceGetUUID(handle, uuid, 96) == 0
    assert uuid.value.decode().removeprefix("GPU-").replace("-", "") == UUID.hex()
    assert library.nvmlShutdown() == 0


# ---- the table that NVIDIA's nvidia-smi asks for ----

TABLE = bytes.fromhex("c4fe3e6cc98f6c4ea327ee696e12f7c4")
ENFORCED_LIMIT, COMPUTE, GRAPHICS, MPS = 108, 213, 214, 215


class Process(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint32),
        ("used", ctypes.c_uint64),
        ("gpu_instance", ctypes.c_uint32),
        ("compute_instance", ctypes.c_uint32),
        ("protected", ctypes.c_uint64),
        ("name", ctypes.c_char * 4096),
    )


def test_the_private_table(nvml: ctypes.CDLL, device: ctypes.c_void_p, host: PageHost) -> None:
    host.replace_page(page_bytes(processes=((os.getpid(), 0, GIB, 1), (2**22 + 1, 0, 0, 2))))
    table = ctypes.POINTER(ctypes.c_uint64)()
    assert nvml.nvmlInternalGetExportTable(ctypes.byref(table), TABLE) == 0
    words = table[0] // 8
    assert words > MPS
    call = {
        slot: ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 3)(table[slot]) for slot in range(1, words)
    }
    for slot in set(call) - {ENFORCED_LIMIT, COMPUTE, GRAPHICS, MPS}:
        assert call[slot](None, None, None) == 3
    limit, count, processes = ctypes.c_uint(), ctypes.c_uint(), (Process * 500)()
    assert call[ENFORCED_LIMIT](device, ctypes.addressof(limit), None) == 0
    assert limit.value == 700_000
    assert call[COMPUTE](device, ctypes.addressof(count), ctypes.addressof(processes)) == 0
    assert [(p.pid, p.used, p.gpu_instance) for p in processes[: count.value]] == [
        (os.getpid(), GIB, 0xFFFFFFFF),
        (2**22 + 1, 0, 0xFFFFFFFF),
    ]
    with open("/proc/self/cmdline") as file:
        assert processes[0].name.decode() == file.read().split("\0")[0]
    assert processes[1].name == b"[Not Found]"
    for slot in (GRAPHICS, MPS):
        count.value = 9
        assert call[slot](device, ctypes.addressof(count), ctypes.addressof(processes)) == 0
        assert count.value == 0
    for slot in (COMPUTE, GRAPHICS, ENFORCED_LIMIT):
        assert call[slot](None, ctypes.addressof(count), ctypes.addressof(processes)) == 2
        assert call[slot](device, None, None) == 2


@pytest.mark.parametrize("name", [bytes(16), TABLE[::-1]])
def test_another_table_is_not_found(library: ctypes.CDLL, name: bytes) -> None:
    table = ctypes.c_void_p(7)
    assert library.nvmlInternalGetExportTable(ctypes.byref(table), name) == 6
    assert table.value == 7
    assert library.nvmlInternalGetExportTable(None, name) == 2
