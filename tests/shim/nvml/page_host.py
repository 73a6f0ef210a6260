# SPDX-License-Identifier: Apache-2.0
"""A host for tests of libnvidia-ml.so.1: a device page with known contents, and a mediator's socket that hands it out.

The same page can be laid out as a PCI device's BAR1 in a folder that stands for sysfs. It must never be used outside
tests; the real page is written by the mediator.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import attrs

from tests.shim.fake_host import store
from vgpu.transport.attach import FLAG_DEVICE_PAGE, HELLO_SIZE, Hello, Status, Welcome
from vgpu.transport.layout import (
    DEVICE_FIELDS,
    DEVICE_PAGE_SIZE,
    DEVICE_TEXTS,
    DIRECTORY_MAGIC,
    DIRECTORY_OFFSET,
    PROCESS_FORMAT,
    PROCESSES,
    SEGMENT_MAGIC,
    UNKNOWN,
    UNKNOWN_64,
)

ATTRIBUTE_VALID, ATTRIBUTE = 936, 1096  # offsets in the page, of 160 bytes and 160 words
UUID = bytes.fromhex("b19598fbac3f010f1c1be5a23a7b38d4")
UUID_TEXT = "GPU-b19598fb-ac3f-010f-1c1b-e5a23a7b38d4"
GIB = 1 << 30

# An H200 in the middle of something, as one VM with a quota of 40 GiB sees it.
NUMBERS: dict[str, int] = {
    "magic": SEGMENT_MAGIC,
    "layout_version": 1,
    "driver_version": 13000,
    "pci_domain": 0,
    "pci_bus": 0x41,
    "pci_device": 0,
    "pci_function": 0,
    "total_memory_bytes": 40 * GIB,
    "telemetry_sequence": 8,
    "temperature_celsius": 43,
    "gpu_utilization_percent": 87,
    "memory_utilization_percent": 31,
    "power_milliwatts": 412_345,
    "sm_clock_mhz": 1980,
    "memory_clock_mhz": 3201,
    "process_count": 0,
    "memory_used_bytes": 5 * GIB,
    "telemetry_ns": 1_760_000_000_123_456_789,
    "energy_millijoules": 987_654_321,
    "throttle_reasons": 0x4,
    "bar1_total_bytes": 256 * GIB,
    "memory_reserved_bytes": GIB // 2,
    "graphics_clock_mhz": 1979,
    "video_clock_mhz": 1500,
    "graphics_clock_max_mhz": 1981,
    "sm_clock_max_mhz": 1982,
    "memory_clock_max_mhz": 3202,
    "video_clock_max_mhz": 1545,
    "power_limit_milliwatts": 700_000,
    "power_limit_default_milliwatts": 690_000,
    "power_limit_min_milliwatts": 200_000,
    "power_limit_max_milliwatts": 710_000,
    "performance_state": 0,
    "fan_percent": UNKNOWN,
    "memory_temperature_celsius": 51,
    "temperature_slowdown_celsius": 87,
    "temperature_shutdown_celsius": 92,
    "encoder_utilization_percent": 3,
    "decoder_utilization_percent": 5,
    "ecc_enabled": 1,
    "ecc_corrected_volatile": 3,
    "ecc_corrected_aggregate": 5_000_000_000,
    "ecc_uncorrected_volatile": 0,
    "ecc_uncorrected_aggregate": 2,
    "persistence_mode": 1,
    "compute_mode": 0,
    "brand": 14,
    "architecture": 9,
    "pcie_generation": 4,
    "pcie_generation_max": 5,
    "pcie_width": 8,
    "pcie_width_max": 16,
    "pcie_tx_kilobytes": 123,
    "pcie_rx_kilobytes": 456,
    "memory_bus_width_bits": 6144,
}
TEXTS: dict[str, str] = {
    "name": "NVIDIA H200",
    "driver_version_text": "580.159.04",
    "vbios_version": "96.00.A5.00.01",
    "nvml_version": "13.580.159.04",
    "serial": "1652723012345",
    "board_part_number": "692-2G520-0280-001",
}
ATTRIBUTES = {16: 132, 37: 6144, 75: 9, 76: 0}
# pid, SM utilisation, memory, session
Process = tuple[int, int, int, int]


def page_bytes(
    numbers: Mapping[str, int] | None = None,
    texts: Mapping[str, str | bytes] | None = None,
    processes: tuple[Process, ...] = (),
    attributes: Mapping[int, int] | None = None,
) -> bytes:
    """A device page: the values above, with those given here instead."""
    page = bytearray(DEVICE_PAGE_SIZE)
    filled = {**NUMBERS, "process_count": len(processes), **(numbers or {})}
    for name, value in filled.items():
        offset, kind = DEVICE_FIELDS[name]
        struct.pack_into(f"<{kind}", page, offset, value)
    for name, text in {**TEXTS, **(texts or {})}.items():
        offset, size = DEVICE_TEXTS[name]
        raw = text if isinstance(text, bytes) else text.encode()
        page[offset : offset + len(raw[:size])] = raw[:size]
    offset, size = DEVICE_TEXTS["uuid"]
    page[offset : offset + size] = UUID
    offset, _ = DEVICE_TEXTS["process"]
    for process in processes[:PROCESSES]:
        struct.pack_into(PROCESS_FORMAT, page, offset, *process)
        offset += struct.calcsize(PROCESS_FORMAT)
    for index, value in (ATTRIBUTES if attributes is None else attributes).items():
        page[ATTRIBUTE_VALID + index] = 1
        struct.pack_into("<i", page, ATTRIBUTE + 4 * index, value)
    return bytes(page)


def unknown_page() -> bytes:
    """The page of a card that tells nothing: the software GPU's."""
    known = {"magic", "layout_version", "driver_version", "total_memory_bytes", "telemetry_sequence"}
    known |= {"process_count", "memory_used_bytes", "telemetry_ns"}
    numbers = {
        name: {"I": UNKNOWN, "Q": UNKNOWN_64}[kind]
        for name, (_, kind) in DEVICE_FIELDS.items()
        if name not in known and offset_of(name) >= offset_of("telemetry_sequence")
    }
    numbers["device_state"] = 0
    texts = dict.fromkeys(("vbios_version", "nvml_version", "serial", "board_part_number"), "")
    return page_bytes(numbers, texts)


def offset_of(name: str) -> int:
    """Of a numeric field of the device page."""
    return DEVICE_FIELDS[name][0]


@attrs.define(eq=False)
class PageHost:
    """A mediator that answers HELLO for the device page and nothing else. Use as a context manager.

    ``run_dir`` gets ``mediator.sock``. ``hang_up`` ends every connection, as a mediator's end does; ``leave`` also
    takes the socket away, ``come_back`` puts a new one there, with a new page.
    """

    run_dir: Path
    page: bytes = attrs.field(factory=page_bytes)
    status: Status = Status.WELCOME
    busy_times: int = 0
    file_size: int = DEVICE_PAGE_SIZE
    hellos: list[Hello] = attrs.field(factory=list)
    connections: list[socket.socket] = attrs.field(factory=list)
    memory: mmap.mmap = attrs.field(init=False)
    file: int = -1  # of the page
    _listener: socket.socket | None = None
    _thread: threading.Thread | None = None
    _lock: threading.Lock = attrs.field(factory=threading.Lock)  # of connections

    @property
    def environment(self) -> dict[str, str]:
        """What a guest process needs to find this host."""
        return {"VGPU_RUN_DIR": str(self.run_dir)}

    def __enter__(self) -> Self:
        self.come_back()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def come_back(self) -> None:
        """Listen, with a new page that holds ``page``."""
        self.file = os.memfd_create("device-page")
        os.ftruncate(self.file, self.file_size)
        os.pwrite(self.file, self.page[: self.file_size], 0)
        self.memory = mmap.mmap(self.file, self.file_size)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.run_dir / "mediator.sock"))
        self._listener.listen(64)
        self._thread = threading.Thread(target=self._serve, args=(self._listener,), daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Stop listening, end every connection, forget the page. Does nothing if it has left."""
        if self._listener is None or self._thread is None:
            return
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(60)
        self._listener.close()
        self._listener = None
        (self.run_dir / "mediator.sock").unlink()
        self.hang_up()
        self.memory.close()
        os.close(self.file)

    def hang_up(self) -> None:
        """End every connection, that of a guest just welcomed too."""
        with self._lock:
            for connection in self.connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                connection.close()
            self.connections.clear()

    def open_connections(self) -> int:
        """Guests that have not hung up."""
        count = 0
        for connection in self.connections:
            try:
                count += connection.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) != b""
            except BlockingIOError:
                count += 1
        return count

    def set(self, name: str, value: int) -> None:
        """Store one number, without the sequence lock."""
        offset, kind = DEVICE_FIELDS[name]
        store(self.memory, offset, kind, value)

    def replace_page(self, page: bytes) -> None:
        """Store a whole page."""
        self.memory[:DEVICE_PAGE_SIZE] = page

    def resize(self, size: int) -> None:
        """Change the file behind the guest's mapping."""
        os.ftruncate(self.file, size)

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        while True:
            data = connection.recv(HELLO_SIZE, socket.MSG_WAITALL)
            if len(data) != HELLO_SIZE:
                connection.close()
                return
            hello = Hello.decode(data)
            self.hellos.append(hello)
            if self.busy_times > 0:
                self.busy_times -= 1
                connection.sendall(Welcome(Status.BUSY, retry_milliseconds=1).encode())
                continue
            break
        welcome = Welcome(self.status, driver_version=NUMBERS["driver_version"]).encode()
        if self.status is Status.WELCOME and hello.flags == FLAG_DEVICE_PAGE:
            # A page that can only be read, as the real mediator hands it out.
            reader = os.open(f"/proc/self/fd/{self.file}", os.O_RDONLY | os.O_CLOEXEC)
            with self._lock:  # a guest that has its welcome is one that hang_up finds
                socket.send_fds(connection, [welcome], [reader])
                self.connections.append(connection)
                os.close(reader)
        else:
            connection.sendall(welcome)
            connection.close()


WRITER = """
import mmap, struct, sys
file, sequence_at, *offsets = map(int, sys.argv[1:])
memory = mmap.mmap(file, 16384)
words = memoryview(memory).cast("I")
sequence, places, rounds = words[sequence_at // 4], [offset // 4 for offset in offsets], 0
while True:
    words[sequence_at // 4] = sequence + 1
    for place in places:
        words[place] = rounds
    sequence = (sequence + 2) % 2**32
    words[sequence_at // 4] = sequence
    rounds = (rounds + 1) % 2**31
    if rounds == 1:
        print("writing", flush=True)
    for _ in range(1000):
        pass
"""


@contextlib.contextmanager
def writing(host: PageHost, *fields: str) -> Iterator[None]:
    """A process that writes one rising number into 32-bit fields of the page, keeping to the sequence lock."""
    offsets = [str(offset_of(name)) for name in ("telemetry_sequence", *fields)]
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(host.file), *offsets],
        pass_fds=[host.file],
        stdout=subprocess.PIPE,
    )
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        yield
    finally:
        writer.kill()
        writer.communicate()


def make_pci_device(
    folder: Path,
    page: bytes,
    *,
    address: str = "0000:00:05.0",
    vendor: int = 0x10DE,
    device: int = 0x2331,
    directory_magic: int = DIRECTORY_MAGIC,
) -> Path:
    """A device's folder as in sysfs, under ``folder``; its BAR1 is a file. Returns the path of BAR1."""
    place = folder / address
    place.mkdir(parents=True)
    numbers = {"vendor": vendor, "device": device, "subsystem_vendor": 0x10DE, "subsystem_device": 0x16C1}
    for name, value in numbers.items():
        (place / name).write_text(f"{value:#06x}\n")
    (place / "numa_node").write_text("-1\n")
    (place / "local_cpulist").write_text("0-1\n")
    memory = bytearray(1 << 20)
    memory[: len(page)] = page
    struct.pack_into("<Q", memory, DIRECTORY_OFFSET, directory_magic)
    bar = place / "resource1"
    bar.write_bytes(memory)
    return bar
