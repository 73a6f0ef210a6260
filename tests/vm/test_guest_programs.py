# SPDX-License-Identifier: Apache-2.0
"""Unmodified programs in a VM whose GPU is ours: installed by the installer, no variable set, found by the loader alone."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.mediator import PROGRAMS as HOST_PROGRAMS
from tests.e2e.mediator import wait_until
from tests.e2e.test_programs import THINGS
from tests.vm.guest import GuestMachine, last_turn
from vgpu.gpu.software.attributes import NAME

pytestmark = pytest.mark.vm

PROGRAMS = Path(__file__).resolve().parent / "programs"
INVALID_VALUE, NO_DEVICE = 1, 100
SLOW_SECONDS = 300.0

Build = Callable[[str], Path]
Compile = Callable[..., Path]


def test_driver_program(alpha: GuestMachine, driver_program: Build, kernels: Path) -> None:
    result = alpha.run([driver_program("driver"), kernels])
    assert (result.lines, result.stderr) == (["devices 1", NAME, "done"], "")
    alpha.host.wait_idle("alpha")


@pytest.mark.parametrize("cudart", ["shared", "static"])
def test_runtime_program(alpha: GuestMachine, compile_cuda: Compile, cudart: str) -> None:
    """Built by nvcc, with an unmodified libcudart."""
    program = compile_cuda(HOST_PROGRAMS / "runtime.cu", cudart=cudart)
    result = alpha.run([program], seconds=SLOW_SECONDS)
    assert (result.lines, result.stderr) == (["devices 1", "runtime 13000", *THINGS], "")


def test_python_through_ctypes(alpha: GuestMachine, kernels: Path) -> None:
    result = alpha.run([sys.executable, PROGRAMS / "compute.py", kernels])
    assert result.lines == ["devices 1", NAME, "sum 3145728", "done"]


def test_cupy(alpha: GuestMachine, cupy_python: Path) -> None:
    environment = {"CUPY_CACHE_DIR": "/tmp/cupy", "CUPY_COMPILE_WITH_PTX": "1", "CUPY_ACCELERATORS": ""}
    result = alpha.run(
        [cupy_python, HOST_PROGRAMS / "arrays.py"], environment=environment, seconds=SLOW_SECONDS
    )
    assert result.lines == ["element-wise", "reductions", "raw kernel", "streams", "done"]


def test_the_device_is_where_pci_says(alpha: GuestMachine, beta: GuestMachine) -> None:
    """CUDA's and NVML's idea of the address is the guest's own, not the host's."""
    for machine, address in ((alpha, "00:05.0"), (beta, "01:00.0")):
        result = machine.run([sys.executable, PROGRAMS / "identity.py"])
        shown = json.loads(result.stdout)
        assert shown["cuda"]["pci"].lower().endswith(address)
        assert shown["cuda"]["pci"].split(":")[1:] == shown["nvml"]["pci"].split(":")[1:]
        assert shown["cuda"]["uuid"] == shown["nvml"]["uuid"]
        assert shown["cuda"]["name"] == shown["nvml"]["name"] == NAME
        assert shown["cuda"]["memory"] == shown["nvml"]["memory"]


def test_nvidia_smi(alpha: GuestMachine) -> None:
    table = alpha.run(["nvidia-smi"]).stdout
    assert NAME[:20] in table
    assert re.search(r"CUDA Version: +13\.\d", table)
    (listed,) = alpha.run(["nvidia-smi", "-L"]).lines
    found = re.fullmatch(r"GPU 0: (.*) \(UUID: (GPU-[0-9a-f-]{36})\)", listed)
    assert found is not None
    assert found[1] == NAME
    query = "--query-gpu=name,uuid,memory.total,pci.bus_id"
    (line,) = alpha.run(["nvidia-smi", query, "--format=csv,noheader,nounits"]).lines
    name, uuid, memory, address = line.split(", ")
    assert (name, uuid) == (NAME, found[2])
    assert int(memory) > 0
    assert address.lower().endswith(":00:05.0")


def test_nvidia_smi_shows_a_computing_process(
    alpha: GuestMachine, driver_program: Build, kernels: Path
) -> None:
    running = alpha.spawn([driver_program("steady"), kernels])
    running.until("turn 3")
    query = ["nvidia-smi", "--query-compute-apps=pid,process_name", "--format=csv,noheader"]
    shown: list[str] = []
    for _ in range(20):  # telemetry is sampled every second or so
        shown = alpha.run(query).lines
        if shown:
            break
        time.sleep(0.5)
    assert [line.split(", ")[0] for line in shown] == [str(running.pid)]
    assert "steady" in shown[0]
    running.close_input()
    assert running.wait().status == 0


def test_two_processes_at_once(alpha: GuestMachine, driver_program: Build, kernels: Path) -> None:
    processes = [alpha.spawn([driver_program("steady"), kernels]) for _ in range(2)]
    for process in processes:
        process.until("turn 5")
    assert len({alpha.worker_of(process) for process in processes}) == 2
    before = [last_turn(process) for process in processes]
    for process, turn in zip(processes, before, strict=True):
        process.until(f"turn {turn + 10}")
    for process in processes:
        process.close_input()
        assert process.wait().lines[-1].startswith("done")
    alpha.host.wait_idle("alpha")


# -- who may


def test_a_user_of_the_group_computes(alpha: GuestMachine, driver_program: Build, kernels: Path) -> None:
    group = alpha.gpu_group()
    assert group is not None
    words = [alpha.send_file(driver_program("driver")), alpha.send_file(kernels)]
    result = alpha.run(words, user=12345, groups=[group[1]])
    assert result.lines[-1] == "done"


def test_another_user_has_no_device(alpha: GuestMachine, driver_program: Build) -> None:
    result = alpha.run([alpha.send_file(driver_program("init"))], user=12345)
    assert int(result.stdout.split()[0]) == NO_DEVICE
    assert result.stderr == ""


# -- what it costs


def test_a_session_is_trapped_ten_times_at_most(
    alpha: GuestMachine, driver_program: Build, kernels: Path
) -> None:
    """From its claim to its release, however much it launches in between: no exit from the VM per call."""
    alpha.host.wait_idle("alpha")
    before = alpha.host.accesses("alpha")
    launches = 5000
    result = alpha.run([driver_program("many_launches"), kernels, str(launches)], seconds=SLOW_SECONDS)
    assert result.lines == [f"done {launches}"]
    alpha.host.wait_idle("alpha")
    used = alpha.host.accesses("alpha").since(before)
    assert (used.claims, used.refused) == (1, 0)
    assert used.trapped <= 10, used


def test_waiting_costs_no_more_than_a_doorbell(
    alpha: GuestMachine, driver_program: Build, kernels: Path
) -> None:
    """A program that waits for every turn finds its worker asleep; waking it is all that is trapped."""
    alpha.host.wait_idle("alpha")
    before = alpha.host.accesses("alpha")
    process = alpha.spawn([driver_program("steady"), kernels])
    process.until("turn 100", 120)
    process.close_input()
    turns = int(process.wait().lines[-1].split()[1])
    alpha.host.wait_idle("alpha")
    used = alpha.host.accesses("alpha").since(before)
    assert used.trapped - used.doorbells <= 5, used
    assert used.doorbells <= 10 + 4 * turns, used


# -- without BAR1


def test_a_guest_that_maps_no_bar1_calls_through_registers(alpha: GuestMachine) -> None:
    result = alpha.run([sys.executable, PROGRAMS / "registers.py", "call"])
    shown = json.loads(result.stdout)
    assert shown["state"] == "READY"
    assert shown["statuses"] == [0, 0, INVALID_VALUE]
    assert shown["sequences"] == [1, 2, 3]
    free, total = shown["memory"]
    assert 0 < free <= total
    assert shown["released"]
    alpha.host.wait_idle("alpha")


def test_garbage_on_the_registers_disturbs_nobody(
    alpha: GuestMachine, beta: GuestMachine, driver_program: Build, kernels: Path
) -> None:
    """Sessions of the same VM and of another one compute on, and slots that garbage claimed come free again."""
    running = [machine.spawn([driver_program("steady"), kernels]) for machine in (alpha, beta)]
    for process in running:
        process.until("turn 3")
    before = [last_turn(process) for process in running]

    def refused() -> int:
        return int(alpha.host.device("alpha")["counters"]["refused"])

    refused_before = refused()
    result = alpha.run([sys.executable, PROGRAMS / "registers.py", "garbage", "3000"])
    assert json.loads(result.stdout)["accesses"] == 3000
    for process, turn in zip(running, before, strict=True):
        process.until(f"turn {turn + 20}")
        process.close_input()
        assert process.wait().lines[-1].startswith("done")
    wait_until(lambda: refused() > refused_before, 60, "the device has counted what it refused")
    alpha.host.wait_idle("alpha", 30)
    assert alpha.run([driver_program("driver"), kernels]).lines[-1] == "done"
