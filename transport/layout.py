# SPDX-License-Identifier: Apache-2.0
"""Pages of shared memory as Python sees them: named fields over a mapping.

Offsets repeat ``wire.h``; tests/transport/test_layout.py compiles a C program that prints the header's
own offsets and compares. Each field is one aligned load or store (memoryview items are copied whole),
so a field is never seen half written. Nothing here waits.
"""

from __future__ import annotations

import mmap
from typing import Final

GRANT_PAGE_SIZE = 4096
GRANT_STANDBY = 2  # in `granted`: to be taken by the worker itself
GRANT_MAGIC = 0x544E415247555047
DEVICE_PAGE_SIZE = 16384
SESSION_PAGE_SIZE = 32768
SEGMENT_MAGIC = 0x31555047565F5356
DIRECTORY_MAGIC = 0x3152494455504756
DIRECTORY_OFFSET = 16384
DIRECTORY_SLOTS = 127
DIRECTORY_HEAD_SIZE = 128
DIRECTORY_SLOT_SIZE = 128
DIRECTORY_SIZE = DIRECTORY_HEAD_SIZE + DIRECTORY_SLOTS * DIRECTORY_SLOT_SIZE
PROCESSES = 128
UNKNOWN = 0xFFFFFFFF
UNKNOWN_64 = 0xFFFFFFFFFFFFFFFF
STATE_QUARANTINED = 0x1
STATE_RATE_LIMITED = 0x2

# name: (offset, memoryview format)
GRANT_FIELDS: Final[dict[str, tuple[int, str]]] = {
    "magic": (0, "Q"),
    "session_id": (8, "Q"),
    "epoch": (64, "Q"),
    "deadline_ns": (72, "Q"),
    "credits": (80, "q"),
    "granted": (88, "I"),
    "preempt": (92, "I"),
    "memory_limit_bytes": (96, "Q"),
    "retry_hint_ns": (104, "Q"),
    "token": (112, "I"),
    "in_flight_us": (116, "I"),
    "slice_ns": (120, "Q"),
    "seen_epoch": (128, "Q"),
    "demand": (136, "I"),
    "current_call": (140, "I"),
    "records": (144, "Q"),
    "current_since_ns": (152, "Q"),
    "async_records": (160, "Q"),
    "reply_records": (168, "Q"),
    "fence_records": (176, "Q"),
    "doorbells": (184, "Q"),
    "replay_errors": (192, "Q"),
    "protocol_errors": (200, "Q"),
    "launches": (208, "Q"),
    "bytes_to_device": (216, "Q"),
    "bytes_from_device": (224, "Q"),
    "gpu_ns": (232, "Q"),
    "fences_issued": (240, "Q"),
    "fences_done": (248, "Q"),
    "oldest_fence_ns": (256, "Q"),
    "memory_used_bytes": (264, "Q"),
    "memory_peak_bytes": (272, "Q"),
    "last_error": (280, "I"),
    "worker_pid": (284, "I"),
    "held_ns": (288, "Q"),
    "ended_token": (296, "I"),
    "replay_ns": (304, "Q"),
    "lease_wait_ns": (312, "Q"),
    "gpu_wait_ns": (320, "Q"),
    "oldest_mark_ns": (328, "Q"),
    "last_mark_ns": (336, "Q"),
    "looked_ns": (344, "Q"),
    "answered_ns": (352, "Q"),
    "timed_leases": (360, "Q"),
    "timed_charged_ns": (368, "Q"),
    "timed_device_ns": (376, "Q"),
}

# The device page: numbers, then byte strings as (offset, bytes).
DEVICE_FIELDS: Final[dict[str, tuple[int, str]]] = {
    "magic": (0, "Q"),
    "layout_version": (8, "I"),
    "driver_version": (12, "I"),
    "pci_domain": (288, "I"),
    "pci_bus": (292, "I"),
    "pci_device": (296, "I"),
    "pci_function": (300, "I"),
    "total_memory_bytes": (304, "Q"),
    "device_flags": (312, "I"),
    "telemetry_sequence": (1792, "I"),
    "temperature_celsius": (1796, "I"),
    "gpu_utilization_percent": (1800, "I"),
    "memory_utilization_percent": (1804, "I"),
    "power_milliwatts": (1808, "I"),
    "sm_clock_mhz": (1812, "I"),
    "memory_clock_mhz": (1816, "I"),
    "process_count": (1820, "I"),
    "memory_used_bytes": (1824, "Q"),
    "telemetry_ns": (1832, "Q"),
    "energy_millijoules": (1840, "Q"),
    "throttle_reasons": (1848, "Q"),
    "bar1_total_bytes": (1856, "Q"),
    "memory_reserved_bytes": (1864, "Q"),
    "graphics_clock_mhz": (1872, "I"),
    "video_clock_mhz": (1876, "I"),
    "graphics_clock_max_mhz": (1880, "I"),
    "sm_clock_max_mhz": (1884, "I"),
    "memory_clock_max_mhz": (1888, "I"),
    "video_clock_max_mhz": (1892, "I"),
    "power_limit_milliwatts": (1896, "I"),
    "power_limit_default_milliwatts": (1900, "I"),
    "power_limit_min_milliwatts": (1904, "I"),
    "power_limit_max_milliwatts": (1908, "I"),
    "performance_state": (1912, "I"),
    "fan_percent": (1916, "I"),
    "memory_temperature_celsius": (1920, "I"),
    "temperature_slowdown_celsius": (1924, "I"),
    "temperature_shutdown_celsius": (1928, "I"),
    "encoder_utilization_percent": (1932, "I"),
    "decoder_utilization_percent": (1936, "I"),
    "ecc_enabled": (1940, "I"),
    "persistence_mode": (1944, "I"),
    "compute_mode": (1948, "I"),
    "brand": (1952, "I"),
    "architecture": (1956, "I"),
    "pcie_generation": (1960, "I"),
    "pcie_generation_max": (1964, "I"),
    "pcie_width": (1968, "I"),
    "pcie_width_max": (1972, "I"),
    "pcie_tx_kilobytes": (1976, "I"),
    "pcie_rx_kilobytes": (1980, "I"),
    "memory_bus_width_bits": (1984, "I"),
    "device_state": (1988, "I"),
    "ecc_corrected_volatile": (2168, "Q"),
    "ecc_corrected_aggregate": (2176, "Q"),
    "ecc_uncorrected_volatile": (2184, "Q"),
    "ecc_uncorrected_aggregate": (2192, "Q"),
}
DEVICE_TEXTS: Final[dict[str, tuple[int, int]]] = {
    "name": (16, 256),
    "uuid": (272, 16),
    "driver_version_text": (856, 80),
    "vbios_version": (1992, 32),
    "nvml_version": (2024, 80),
    "serial": (2104, 32),
    "board_part_number": (2136, 32),
    "process": (2200, 3072),
}
# An entry of "process": pid, sm_utilization_percent, memory_used_bytes, session_id.
PROCESS_FORMAT: Final = "<IIQQ"

# The directory behind the device page of a BAR1, and one slot's entry in it.
DIRECTORY_FIELDS: Final[dict[str, tuple[int, str]]] = {
    "magic": (0, "Q"),
    "layout_version": (8, "I"),
    "interface_version": (12, "I"),
    "table_hash": (16, "Q"),
    "bar1_size": (24, "Q"),
    "first_slot": (32, "Q"),
    "slot_size": (40, "Q"),
    "slot_count": (48, "I"),
    "status": (52, "I"),
    "generation": (56, "I"),
    "driver_version": (60, "I"),
    "host_heartbeat": (64, "Q"),
}
DIRECTORY_SLOT_FIELDS: Final[dict[str, tuple[int, str]]] = {
    "token": (0, "I"),
    "pid": (4, "I"),
    "state": (8, "I"),
    "refusal": (12, "I"),
    "retry_milliseconds": (16, "I"),
    "session_id": (24, "Q"),
    "worker_address": (32, "Q"),
}
DIRECTORY_PROGRAM: Final = (64, 64)  # offset in an entry, bytes; written by guests

# Offsets within a segment (the device page comes first, then the session page).
SESSION_FIELDS: Final[dict[str, tuple[int, str]]] = {
    "magic": (0, "Q"),
    "session_id": (16, "Q"),
    "tail": (128, "Q"),
    "heartbeat": (192, "Q"),
    "guest_pid": (200, "I"),
    "head": (256, "Q"),
    "state": (384, "I"),
    "sticky_error": (388, "I"),
    "deferred_error": (392, "I"),
    "busy": (396, "I"),
    "wake": (408, "I"),
    "device_lost": (412, "I"),
    "local_calls": (4608, "Q"),
    "async_calls": (4616, "Q"),
    "fence_calls": (4624, "Q"),
    "reply_calls": (4632, "Q"),
    "refused_calls": (4640, "Q"),
}
# Of the session page as well: struct vgpu_guest_times. Raw words of a guest; actors/guest_times.py makes sense of them.
GUEST_TIMES_OFFSET = 8768
GUEST_TIME_FIELDS: Final[dict[str, tuple[int, str]]] = {
    "ticks_per_second": (8768, "Q"),
    "encode_ticks": (8776, "Q"),
    "encode_samples": (8784, "Q"),
    "copy_ticks": (8792, "Q"),
    "sync_ticks": (8800, "Q"),
    "sync_waits": (8808, "Q"),
    "answer_ticks": (8816, "Q"),
    "answer_waits": (8824, "Q"),
    "room_ticks": (8832, "Q"),
    "room_waits": (8840, "Q"),
    "held_sync_ticks": (8848, "Q"),
    "held_ring_ticks": (8856, "Q"),
}
REFUSED_OFFSET = 4648
REFUSED_NAMES = 1024


class Page:
    """Fields of one mapped page, read and written by name.

    Owns the mapping: ``close`` releases it. A page may be closed twice.
    """

    def __init__(self, fd: int, size: int, fields: dict[str, tuple[int, str]], *, offset: int = 0) -> None:
        self._map = mmap.mmap(fd, size, offset=offset)
        self._views = {f: memoryview(self._map).cast(f) for f in ("I", "q", "Q")}
        self._fields = fields
        self._size = {"I": 4, "q": 8, "Q": 8}

    def get(self, name: str) -> int:
        """One field's value now."""
        offset, kind = self._fields[name]
        return int(self._views[kind][offset // self._size[kind]])

    def set(self, name: str, value: int) -> None:
        """Store one field. x86-64 keeps stores in order, so the field stored last publishes the others."""
        offset, kind = self._fields[name]
        self._views[kind][offset // self._size[kind]] = value

    def snapshot(self) -> dict[str, int]:
        """All fields, each read once."""
        return {name: self.get(name) for name in self._fields}

    def words(self, offset: int, count: int) -> list[int]:
        """``count`` 32-bit words from byte ``offset``."""
        view = self._views["I"]
        return [int(view[offset // 4 + i]) for i in range(count)]

    def read_bytes(self, offset: int, count: int) -> bytes:
        """A copy of ``count`` bytes."""
        return self._map[offset : offset + count]

    def write_bytes(self, offset: int, data: bytes) -> None:
        """Store ``data``. Not atomic: publish it with a field stored afterwards, or under a sequence lock."""
        self._map[offset : offset + len(data)] = data

    def close(self) -> None:
        """Unmap. The fields must not be used afterwards."""
        for view in self._views.values():
            view.release()
        self._views = {}
        self._map.close()


class GrantPage(Page):
    """The page between mediator and worker that carries a session's lease and its progress."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, GRANT_PAGE_SIZE, GRANT_FIELDS)

    def grant(
        self,
        *,
        deadline_ns: int,
        credits: int = -1,
        token: int = 0,
        slice_ns: int = 0,
        in_flight_us: int = 0,
        standby: bool = False,
    ) -> int:
        """Write a lease and publish it. deadline_ns is CLOCK_MONOTONIC, 0 open-ended. Returns its epoch.

        With a token it begins when the turn word names that; then ``slice_ns`` may stand in for a deadline. With
        ``standby`` the worker names it there by itself, once it has something to do.
        """
        if standby:
            # First: a worker that reads the page in between must not take the new token for an ordinary lease's.
            self.set("granted", GRANT_STANDBY)
        self.set("token", token)
        self.set("slice_ns", slice_ns)
        self.set("in_flight_us", in_flight_us)
        self.set("deadline_ns", deadline_ns)
        self.set("credits", credits)
        self.set("preempt", 0)
        self.set("granted", GRANT_STANDBY if standby else 1)
        return self._publish()

    def revoke(self) -> int:
        """Ask the worker to stop at its next record. Returns the epoch of the request."""
        self.set("preempt", 1)
        self.set("granted", 0)
        return self._publish()

    def _publish(self) -> int:
        epoch = self.get("epoch") + 1
        self.set("epoch", epoch)
        return epoch


class SessionPage(Page):
    """The session page inside a segment, as the mediator sees it. Everything the guest wrote is hostile.

    ``segment_offset`` is where the segment begins in the file: 0 for one of its own, a slot's offset in a BAR1.
    """

    def __init__(self, segment_fd: int, segment_offset: int = 0) -> None:
        super().__init__(
            segment_fd, SESSION_PAGE_SIZE, SESSION_FIELDS, offset=segment_offset + DEVICE_PAGE_SIZE
        )

    def times(self) -> dict[str, int]:
        """What the guest says of its threads' time, each word read once and not believed."""
        view = self._views["Q"]
        return {name: int(view[offset // 8]) for name, (offset, _) in GUEST_TIME_FIELDS.items()}

    def refused(self) -> dict[int, int]:
        """Calls the guest says it refused, by call id; for metrics only."""
        counts = self.words(REFUSED_OFFSET, REFUSED_NAMES)
        return {index: count for index, count in enumerate(counts) if count}


class DevicePage(Page):
    """The device page at the start of a segment, of a BAR1, or alone in a memfd."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, DEVICE_PAGE_SIZE, DEVICE_FIELDS)

    def text(self, name: str) -> str:
        """One of DEVICE_TEXTS, up to its first NUL."""
        return self.read_bytes(*DEVICE_TEXTS[name]).split(b"\0", 1)[0].decode("utf-8", "replace")

    def set_text(self, name: str, value: str) -> None:
        """Store one of DEVICE_TEXTS, cut to fit with its NUL."""
        offset, size = DEVICE_TEXTS[name]
        self.write_bytes(offset, value.encode()[: size - 1].ljust(size, b"\0"))
