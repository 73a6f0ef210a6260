# SPDX-License-Identifier: Apache-2.0
"""The page in a PCI device's BAR1: a folder stands for sysfs, a file for the aperture. Each case is a process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .page_host import PageHost, make_pci_device, page_bytes

QUESTIONS = """
import ctypes, json, os, sys
nvml = ctypes.CDLL(sys.argv[1])
device, value = ctypes.c_void_p(), ctypes.c_uint()
pci = ctypes.create_string_buffer(68)
answer = {"init": nvml.nvmlInit_v2()}
if answer["init"] == 0:
    nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device))
    answer["power"] = [nvml.nvmlDeviceGetPowerUsage(device, ctypes.byref(value)), value.value]
    answer["pci"] = nvml.nvmlDeviceGetPciInfo_v3(device, pci)
    answer["bus"] = pci.raw[36:52].decode()
    answer["ids"] = [hex(int.from_bytes(pci.raw[i : i + 4], "little")) for i in (28, 32)]
    for command in sys.argv[2:]:
        if command.startswith("/"):
            os.rename(command, command + ".away")
        elif command.startswith("truncate "):
            os.truncate(command.split()[1], 0)
        elif command == "back":
            os.rename(sys.argv[2] + ".away", sys.argv[2])
        elif command == "init":
            answer["init again"] = nvml.nvmlInit_v2()
        else:
            answer[command] = nvml.nvmlDeviceGetPowerUsage(device, ctypes.byref(value))
    answer["end"] = nvml.nvmlShutdown()
print(json.dumps(answer))
"""


@pytest.fixture
def sysfs(pci_folder: Path) -> Iterator[Path]:
    """The folder that stands for sysfs, empty."""
    yield pci_folder
    for item in pci_folder.iterdir():
        shutil.rmtree(item)


def ask(library: Path, *commands: str, **environment: str) -> dict[str, Any]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VGPU")}
    kept["XDG_RUNTIME_DIR"] = "/nonexistent"
    done = subprocess.run(
        [sys.executable, "-c", QUESTIONS, library, *commands],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_the_device_is_found_and_shown_where_it_is(pci_library_path: Path, sysfs: Path) -> None:
    make_pci_device(sysfs, page_bytes(), address="0000:00:1f.2", vendor=0x8086, device=0x2922)
    make_pci_device(sysfs, page_bytes())
    make_pci_device(sysfs, page_bytes({"power_milliwatts": 1}), address="0000:00:06.0")
    assert ask(pci_library_path) == {
        "init": 0,
        "power": [0, 412_345],
        "pci": 0,
        "bus": "00000000:00:05.0",  # the guest's, not the host's 41:00.0
        "ids": ["0x233110de", "0x16c110de"],
        "end": 0,
    }


def test_a_real_card_is_left_alone(pci_library_path: Path, sysfs: Path) -> None:
    make_pci_device(sysfs, page_bytes(), directory_magic=0)
    make_pci_device(sysfs, bytes(16384), address="0000:00:07.0")
    make_pci_device(sysfs, page_bytes(), address="0000:00:08.0", device=0x2330)
    assert ask(pci_library_path) == {"init": 9}
    make_pci_device(sysfs, page_bytes(), address="0000:01:00.0")
    assert ask(pci_library_path)["bus"] == "00000000:01:00.0"


def test_a_small_aperture_is_not_mapped(pci_library_path: Path, sysfs: Path) -> None:
    bar = make_pci_device(sysfs, page_bytes())
    os.truncate(bar, 32768)
    assert ask(pci_library_path) == {"init": 9}


def test_a_run_dir_goes_before_the_device(pci_library_path: Path, sysfs: Path, run_dir: Path) -> None:
    make_pci_device(sysfs, page_bytes())
    assert ask(pci_library_path, VGPU_RUN_DIR=str(run_dir)) == {"init": 9}
    with PageHost(run_dir, page=page_bytes({"power_milliwatts": 3})) as host:
        assert ask(pci_library_path, **host.environment)["power"] == [0, 3]


def test_the_device_goes_before_a_default_socket(pci_library_path: Path, sysfs: Path, run_dir: Path) -> None:
    (run_dir / "vgpu").mkdir()
    with PageHost(run_dir / "vgpu", page=page_bytes({"power_milliwatts": 3})):
        assert ask(pci_library_path, XDG_RUNTIME_DIR=str(run_dir))["power"] == [0, 3]
        make_pci_device(sysfs, page_bytes())
        assert ask(pci_library_path, XDG_RUNTIME_DIR=str(run_dir))["power"] == [0, 412_345]


def test_an_unplugged_device_is_lost_until_the_next_init(pci_library_path: Path, sysfs: Path) -> None:
    make_pci_device(sysfs, page_bytes())
    answer = ask(pci_library_path, str(sysfs / "0000:00:05.0"), "gone", "back", "still", "init", "found")
    assert (answer["gone"], answer["still"], answer["init again"], answer["found"]) == (15, 15, 0, 0)


def test_a_vanishing_aperture_is_no_signal(pci_library_path: Path, sysfs: Path) -> None:
    bar = make_pci_device(sysfs, page_bytes())
    answer = ask(pci_library_path, f"truncate {bar}", "gone")
    assert (answer["gone"], answer["end"]) == (15, 0)
