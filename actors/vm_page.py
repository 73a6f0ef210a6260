# SPDX-License-Identifier: Apache-2.0
"""One VM's device page: what its programs read about the GPU they share (struct vgpu_device_page in transport/wire.h).

It lies at the start of the VM's BAR1, or in memory of its own for processes of this host. The host only ever writes it:
a VM can write its BAR1 too, so nothing that stands there is believed, not even by this module.

The first part says what the GPU is and comes from a worker that has asked the driver. The rest says how it is and is
written again and again under a sequence number, odd while the page is not consistent.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from collections.abc import Sequence
from typing import Final, Self

import attrs

from vgpu.gpu.sampling import DeviceIdentity, GpuSample
from vgpu.transport.layout import (
    DEVICE_FIELDS,
    DEVICE_PAGE_SIZE,
    DEVICE_TEXTS,
    PROCESS_FORMAT,
    PROCESSES,
    STATE_QUARANTINED,
    STATE_RATE_LIMITED,
    UNKNOWN,
    UNKNOWN_64,
    DevicePage,
)

from .messages import SessionUse

# Linux 5.1: whoever gets the file later can neither write it nor map it to write. Python 3.11 has no name for it.
F_SEAL_FUTURE_WRITE: Final = 0x10
TELEMETRY: Final = DEVICE_FIELDS["telemetry_sequence"][0]
UUID: Final = DEVICE_TEXTS["uuid"]
FLAG_SOFTWARE: Final = 1
# Fields of the telemetry that a sample fills under their own names.
SAMPLED: Final = tuple(
    (name, kind)
    for name, (offset, kind) in DEVICE_FIELDS.items()
    if offset >= TELEMETRY and name in {a.name for a in attrs.fields(GpuSample)}
)
SAMPLED_TEXTS: Final = tuple(n for n in DEVICE_TEXTS if n in {a.name for a in attrs.fields(GpuSample)})


@attrs.frozen
class Description:
    """What a worker found out about the GPU: the device page as it filled it."""

    page: bytes

    def _number(self, name: str) -> int:
        offset, kind = DEVICE_FIELDS[name]
        (value,) = struct.unpack_from(f"<{kind}", self.page, offset)
        return int(value)

    @property
    def memory_bytes(self) -> int:
        """Memory of the card, as the driver counts it."""
        return self._number("total_memory_bytes")

    @property
    def driver_version(self) -> int:
        """As cuDriverGetVersion gives it."""
        return self._number("driver_version")

    @property
    def identity(self) -> DeviceIdentity:
        """Which GPU it is."""
        offset, size = UUID
        uuid = self.page[offset : offset + size].hex()
        domain, bus, device, function = (
            self._number(f"pci_{part}") for part in ("domain", "bus", "device", "function")
        )
        return DeviceIdentity(
            f"GPU-{uuid[:8]}-{uuid[8:12]}-{uuid[12:16]}-{uuid[16:20]}-{uuid[20:]}",
            f"{domain:04x}:{bus:02x}:{device:02x}.{function:x}",
            bool(self._number("device_flags") & FLAG_SOFTWARE),
        )


@attrs.frozen
class VmSituation:
    """What of a VM shows in its page besides the GPU's own state."""

    sessions: tuple[SessionUse, ...] = ()
    memory_limit_bytes: int = 0  # 0: the whole card
    is_quarantined: bool = False
    is_rate_limited: bool = False


@attrs.define(eq=False)
class VmPage:
    """A page that is being written. ``in_vm``: at the start of a BAR1, read by a VM."""

    in_vm: bool
    _page: DevicePage
    _file: int = -1

    @classmethod
    def at_start_of(cls, bar1_fd: int) -> Self:
        """The page of a VM's device. The descriptor is the caller's, and not needed afterwards.

        Raises:
            OSError: it is no memory that keeps its size, or too small: a mapping of it could be made to fault.
        """
        seals = fcntl.fcntl(bar1_fd, fcntl.F_GET_SEALS)
        if not seals & fcntl.F_SEAL_SHRINK or os.fstat(bar1_fd).st_size < DEVICE_PAGE_SIZE:
            raise OSError(errno.EINVAL, "a BAR1 must be sealed against shrinking and hold a device page")
        return cls(True, DevicePage(bar1_fd))

    @classmethod
    def of_its_own(cls) -> Self:
        """A page for processes of this host, in memory that nobody but this object can write or resize.

        Raises:
            OSError: no memory or no descriptor is left, or the kernel is older than 5.1.
        """
        file = os.memfd_create("vgpu-device-page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(file, DEVICE_PAGE_SIZE)
            page = DevicePage(file)
            # In this order: the seal lets a writer go on who has mapped the file already.
            resizing = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, resizing | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(file)
            raise
        return cls(False, page, file)

    def open_reader(self) -> int:
        """A descriptor that can only be read; the caller's to close. Only of a page of its own.

        Raises:
            OSError: no descriptor is left.
        """
        return os.open(f"/proc/self/fd/{self._file}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Stop writing; readers keep what was written last."""
        self._page.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def write(self, description: Description, sample: GpuSample, situation: VmSituation) -> None:
        """Bring the page up to date. Does not wait; a reader in the middle reads again."""
        page = self._page
        sequence = (page.get("telemetry_sequence") + 1) & UNKNOWN | 1
        page.set("telemetry_sequence", sequence)
        limit = situation.memory_limit_bytes
        total = min(limit, description.memory_bytes) if limit else description.memory_bytes
        self._write_description(description, total)
        for name, kind in SAMPLED:
            page.set(name, _encoded(getattr(sample, name), kind))
        for name in SAMPLED_TEXTS:
            page.set_text(name, getattr(sample, name) or "")
        page.set("memory_reserved_bytes", _reserved(sample, description, has_limit=bool(limit)))
        self._write_sessions(sample, situation.sessions)
        quarantined = STATE_QUARANTINED if situation.is_quarantined else 0
        limited = STATE_RATE_LIMITED if situation.is_rate_limited else 0
        page.set("device_state", quarantined | limited)
        page.set("telemetry_ns", time.time_ns())
        page.set("telemetry_sequence", (sequence + 1) & UNKNOWN)

    def _write_description(self, description: Description, total: int) -> None:
        # Each time: a guest that has scribbled on its page gets a good one back.
        magic_size = 8
        self._page.write_bytes(magic_size, description.page[magic_size:TELEMETRY])
        self._page.set("total_memory_bytes", total)
        # Last: a page that was empty becomes one.
        self._page.set("magic", int.from_bytes(description.page[:magic_size], "little"))

    def _write_sessions(self, sample: GpuSample, sessions: Sequence[SessionUse]) -> None:
        self._page.set("memory_used_bytes", sum(s.memory_used_bytes for s in sessions) & UNKNOWN_64)
        # A VM numbers its processes in its own way; those of the host are none of its processes, and vice versa.
        shown = [s for s in sessions if (s.info.slot is not None) is self.in_vm][:PROCESSES]
        offset, _ = DEVICE_TEXTS["process"]
        packed = b"".join(
            struct.pack(
                PROCESS_FORMAT,
                s.info.guest_pid & UNKNOWN,
                sample.sm_utilization.get(s.info.worker_pid, UNKNOWN),
                s.memory_used_bytes & UNKNOWN_64,
                s.info.session & UNKNOWN_64,
            )
            for s in shown
        )
        self._page.write_bytes(offset, packed)
        self._page.set("process_count", len(shown))


def _encoded(value: int | None, kind: str) -> int:
    unknown = UNKNOWN_64 if kind == "Q" else UNKNOWN
    return unknown if value is None else min(max(value, 0), unknown - 1)


def _reserved(sample: GpuSample, description: Description, *, has_limit: bool) -> int:
    """What programs cannot have of the memory that the page calls the card's: the driver has left out its own already,
    or the greater part of it, and of a VM's share nothing is taken."""
    if sample.card_memory_reserved_bytes is None or sample.card_memory_total_bytes is None:
        return UNKNOWN_64
    left_out = max(0, sample.card_memory_total_bytes - description.memory_bytes)
    return 0 if has_limit else max(0, sample.card_memory_reserved_bytes - left_out)
