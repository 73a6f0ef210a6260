# SPDX-License-Identifier: Apache-2.0
"""What a VM's programs read about their GPU while it works, end to end: mediator, workers, guests, and our NVML."""

from __future__ import annotations

import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.mediator import GPU, Mediator, wait_until
from tests.e2e.steady import Steady
from tests.e2e.vm_device import DeviceMediator, VirtualMachine, VmGuest
from vgpu.shim.locate import library_directory
from vgpu.transport._generated_calls import TABLE_HASH
from vgpu.transport.attach import FLAG_DEVICE_PAGE, WELCOME_SIZE, Hello, Status, Welcome
from vgpu.transport.layout import DEVICE_FIELDS, DEVICE_PAGE_SIZE, DEVICE_TEXTS, PROCESS_FORMAT, UNKNOWN

Build = Callable[[str], Path]
MIB = 1 << 20
FRESH_SECONDS = 30.0
NVML = library_directory() / "libnvidia-ml.so.1"
# Through ctypes, as Python programs ask NVML: one line for each question.
ASK = """
import ctypes, sys
nvml = ctypes.CDLL(sys.argv[1])
def ok(status): assert status == 0, status
ok(nvml.nvmlInit_v2())
device = ctypes.c_void_p()
ok(nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)))
name = ctypes.create_string_buffer(96)
ok(nvml.nvmlDeviceGetName(device, name, 96))
memory = (ctypes.c_ulonglong * 3)()
ok(nvml.nvmlDeviceGetMemoryInfo(device, memory))
count = ctypes.c_uint(128)
class Process(ctypes.Structure):
    _fields_ = [("pid", ctypes.c_uint), ("used", ctypes.c_ulonglong), ("gi", ctypes.c_uint), ("ci", ctypes.c_uint)]
found = (Process * 128)()
ok(nvml.nvmlDeviceGetComputeRunningProcesses_v3(device, ctypes.byref(count), found))
busy = (ctypes.c_uint * 2)()
ok(nvml.nvmlDeviceGetUtilizationRates(device, busy))
print(name.value.decode(), memory[0], memory[2], [(p.pid, p.used) for p in found[: count.value]], busy[0] <= 100, sep="|")
"""


class Page:
    """A connection that has been given a device page, as our NVML library makes one.

    Nobody can say what GPU it is before the first worker is up, and who asks is told so after some seconds: it asks again.
    """

    def __init__(self, mediator: Mediator, vm: str) -> None:
        wait_until(lambda: self._asked(mediator, vm), 60, "there is a page")

    def _asked(self, mediator: Mediator, vm: str) -> bool:
        self.link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.link.settimeout(60)
        self.link.connect(str(mediator.run_dir / "mediator.sock"))
        hello = Hello(os.getpid(), TABLE_HASH, vm, "test", FLAG_DEVICE_PAGE)
        self.link.sendall(hello.encode())
        data, descriptors, _, _ = socket.recv_fds(self.link, WELCOME_SIZE, 4)
        self.welcome = Welcome.decode(data)
        if self.welcome.status is not Status.WELCOME:
            self.link.close()
            return False
        (self.file,) = descriptors
        return True

    def close(self) -> None:
        self.link.close()
        os.close(self.file)

    def name(self) -> str:
        """The GPU's, which does not change: also of a page that its writer left in the middle of a round."""
        return self._read()[16:272].split(b"\0")[0].decode()

    def _read(self) -> bytes:
        return os.pread(self.file, DEVICE_PAGE_SIZE, 0)

    def consistent(self) -> dict[str, Any]:
        """All numbers, the name and the processes, of one round."""
        deadline = time.monotonic() + 60
        while True:
            assert time.monotonic() < deadline, "the page is never of one round"
            data = self._read()
            page: dict[str, Any] = {
                name: struct.unpack_from(f"<{kind}", data, offset)[0]
                for name, (offset, kind) in DEVICE_FIELDS.items()
            }
            again = struct.unpack_from("<I", self._read(), DEVICE_FIELDS["telemetry_sequence"][0])[0]
            if page["telemetry_sequence"] == again and again % 2 == 0:
                break
        page["name"] = data[16:272].split(b"\0")[0].decode()
        base, size = DEVICE_TEXTS["process"][0], struct.calcsize(PROCESS_FORMAT)
        page["processes"] = [
            struct.unpack_from(PROCESS_FORMAT, data, base + i * size) for i in range(page["process_count"])
        ]
        return page

    def __getitem__(self, name: str) -> Any:
        return self.consistent()[name]


@contextmanager
def page_of(mediator: Mediator, vm: str) -> Iterator[Page]:
    page = Page(mediator, vm)
    try:
        yield page
    finally:
        page.close()


def test_a_page_lives_while_its_connection_stands(own_mediator: Mediator) -> None:
    with page_of(own_mediator, "red") as page:
        first = page.consistent()
        assert first["name"]
        assert first["driver_version"] == page.welcome.driver_version >= 12000
        assert first["total_memory_bytes"] > 0
        assert first["process_count"] == 0
        assert abs(first["telemetry_ns"] - time.time_ns()) < 60 * 10**9
        if GPU == "software":
            assert first["gpu_utilization_percent"] == 0
            assert (first["temperature_celsius"], first["power_milliwatts"]) == (UNKNOWN, UNKNOWN)
        wait_until(
            lambda: page["telemetry_sequence"] > first["telemetry_sequence"], FRESH_SECONDS, "it moves"
        )
        with pytest.raises(OSError):
            os.pwrite(page.file, b"x", 0)
        assert own_mediator.sessions() == []  # it costs no session
        page.link.close()

        def stands() -> bool:
            before = page["telemetry_sequence"]
            time.sleep(1.2)  # more than two rounds
            return bool(page["telemetry_sequence"] == before)

        wait_until(stands, 60, "nobody writes it any more")


def test_memory_and_processes_are_the_vms_own(
    own_mediator: Mediator, driver_program: Build, kernels: Path
) -> None:
    mine = own_mediator.begin(driver_program("hoard"), vm="red")
    other = own_mediator.begin(driver_program("hoard"), vm="blue")
    for guest in (mine, other):
        guest.until("ready")
    with page_of(own_mediator, "red") as page:
        wait_until(lambda: page["process_count"] == 1, FRESH_SECONDS, "the process is listed")
        before = page.consistent()
        pid, _, used, session = before["processes"][0]
        assert pid == mine.process.pid
        assert session == own_mediator.session_of(mine)["info"]["session"]
        assert used == before["memory_used_bytes"]
        other.say()
        other.until("ready")
        at_first = int(before["memory_used_bytes"])

        def has_risen_by(blocks: int) -> Callable[[], bool]:
            return lambda: bool(page["memory_used_bytes"] >= at_first + blocks * 64 * MIB)

        for step in (1, 2, 3):
            mine.say()
            mine.until("ready")
            wait_until(has_risen_by(step), FRESH_SECONDS, "what was allocated shows")
        now = page.consistent()
        assert now["memory_used_bytes"] < at_first + 4 * 64 * MIB  # the other's is not in it
        assert now["processes"][0][2] == now["memory_used_bytes"]
        assert now["memory_used_bytes"] < now["total_memory_bytes"]
        mine.finish()
        wait_until(lambda: page["process_count"] == 0, FRESH_SECONDS, "who has ended is not listed")
        assert page["memory_used_bytes"] == 0
    other.finish()


def test_utilisation_rises_while_a_program_computes(own_mediator: Mediator, steady: Steady) -> None:
    with page_of(own_mediator, "red") as page:
        guest = steady.begin(own_mediator, "red")
        deadline = time.monotonic() + 60
        seen: list[tuple[int, int]] = []
        while not any(0 < busy <= 100 and 0 < own <= 100 for busy, own in seen):
            assert time.monotonic() < deadline, seen
            guest.until("turn")
            now = page.consistent()
            if now["processes"]:
                seen.append((now["gpu_utilization_percent"], now["processes"][0][1]))
        guest.finish()
        wait_until(lambda: page["process_count"] == 0, FRESH_SECONDS, "the program has ended")
        if GPU == "software":
            wait_until(lambda: page["gpu_utilization_percent"] == 0, FRESH_SECONDS, "the GPU rests")


def test_a_kernel_that_never_ends_keeps_the_gpu_busy(
    own_mediator: Mediator, driver_program: Build, kernels: Path
) -> None:
    with page_of(own_mediator, "red") as page:
        guest = own_mediator.begin(driver_program("spin"), kernels, vm="red")
        guest.until("launching")

        def is_busy() -> bool:
            """Of one round: what the next one measures may be less, where telemetry had no processor for a moment."""
            now = page.consistent()
            own = [process[1] for process in now["processes"]]
            return bool(now["gpu_utilization_percent"] > 90 and (GPU != "software" or (own and own[0] > 90)))

        wait_until(is_busy, 60, "the GPU is busy, with that program")
        guest.kill()
        wait_until(lambda: page["process_count"] == 0, FRESH_SECONDS, "the program has ended")


def test_our_nvml_shows_it_and_finds_the_next_mediator(
    own_mediator: Mediator, driver_program: Build, kernels: Path
) -> None:
    guest = own_mediator.begin(driver_program("hoard"), vm="red")
    guest.until("ready")
    guest.say()
    guest.until("ready")

    def ask() -> list[str]:
        (line,) = own_mediator.run(sys.executable, "-c", ASK, NVML, vm="red")
        return line.split("|")

    name, total, used, processes, _ = ask()
    with page_of(own_mediator, "red") as page:
        assert name == page["name"]
        assert int(total) == page["total_memory_bytes"]
    assert int(used) >= 64 * MIB
    assert processes.startswith(f"[({guest.process.pid}, ")
    # Nobody else of this machine is told what the VM does.
    (line,) = own_mediator.run(sys.executable, "-c", ASK, NVML, vm="blue")
    assert line.split("|")[2:4] == ["0", "[]"]
    own_mediator.kill()
    own_mediator.start()
    assert ask()[:2] == [name, total]
    guest.finish()


def test_a_reader_is_told_when_telemetry_was_restarted(own_mediator: Mediator) -> None:
    """The connection ends, so that whoever holds a page that nobody writes any more asks for another."""
    with page_of(own_mediator, "red") as page:
        own_mediator.kill()
        assert page.link.recv(1) == b""
        assert page.name()


def test_a_virtual_machines_page() -> None:
    with DeviceMediator() as mediator:
        answer = mediator.call(
            "register_vm", vm_name="red", bar1_bytes=64 * MIB, slots=4, memory_limit_bytes=512 * MIB
        )
        with VirtualMachine(Path(answer["result"]["device"]["socket"])) as vm:

            def number(name: str) -> int:
                offset, kind = DEVICE_FIELDS[name]
                return int(struct.unpack_from(f"<{kind}", vm.memory, offset)[0])

            def first_process() -> tuple[int, ...]:
                return struct.unpack_from(PROCESS_FORMAT, vm.memory, DEVICE_TEXTS["process"][0])

            wait_until(lambda: number("telemetry_ns") > 0, 60, "the page is there before any session")
            assert number("magic") == int.from_bytes(b"VS_VGPU1", "little")
            assert number("total_memory_bytes") == 512 * MIB
            assert number("process_count") == 0
            guest = VmGuest(vm, 1, 0xABCD, 321, "ollama")
            wait_until(lambda: number("process_count") == 1, FRESH_SECONDS, "the process is listed")
            assert first_process()[0] == 321
            assert first_process()[3] == guest.session
            # The mediator goes and comes back: the page stands still, and is written again.
            mediator.kill()
            stood = number("telemetry_sequence") | 1
            mediator.start()
            wait_until(lambda: number("telemetry_sequence") > stood + 2, 60, "the next mediator writes it")
            wait_until(lambda: first_process()[0] == 321, FRESH_SECONDS, "the session is still listed")
            guest.release()
            wait_until(lambda: number("process_count") == 0, 60, "who has ended is not listed")


def test_a_version_mismatch_comes_first(own_mediator: Mediator) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(60)
        link.connect(str(own_mediator.run_dir / "mediator.sock"))
        link.sendall(Hello(os.getpid(), TABLE_HASH ^ 1, "red", "test", FLAG_DEVICE_PAGE).encode())
        data, descriptors, _, _ = socket.recv_fds(link, WELCOME_SIZE, 4)
        assert (Welcome.decode(data).status, descriptors) == (Status.VERSION_MISMATCH, [])
