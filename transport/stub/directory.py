# SPDX-License-Identifier: Apache-2.0
"""The slot directory of a BAR1 (``struct vgpu_directory``): what BAR0 says, in shared memory.

Guests can write it as they can all of BAR1; what they put there misleads only themselves, for nothing of it is read
back but ``guest_program``, which is theirs.
"""

from __future__ import annotations

from vgpu.transport.layout import (
    DIRECTORY_FIELDS,
    DIRECTORY_HEAD_SIZE,
    DIRECTORY_MAGIC,
    DIRECTORY_OFFSET,
    DIRECTORY_PROGRAM,
    DIRECTORY_SIZE,
    DIRECTORY_SLOT_FIELDS,
    DIRECTORY_SLOT_SIZE,
    Page,
)
from vgpu.transport.vfio_user.registers import INTERFACE_VERSION, Registers, SlotView

from .effects import WriteHead


def _entry(slot: int) -> int:
    return DIRECTORY_HEAD_SIZE + slot * DIRECTORY_SLOT_SIZE


class Directory:
    """Written by its device process alone. Owns a mapping of it."""

    def __init__(self, bar1: int, registers: Registers) -> None:
        fields = dict(DIRECTORY_FIELDS)
        for slot in range(registers.geometry.slot_count):
            for name, (offset, kind) in DIRECTORY_SLOT_FIELDS.items():
                fields[f"{slot}.{name}"] = (_entry(slot) + offset, kind)
        self._page = Page(bar1, DIRECTORY_SIZE, fields, offset=DIRECTORY_OFFSET)
        self._beats = 0
        geometry = registers.geometry
        self._page.set("layout_version", registers.layout_version)
        self._page.set("interface_version", INTERFACE_VERSION)
        self._page.set("table_hash", registers.table_hash)
        self._page.set("bar1_size", geometry.bar1_size)
        self._page.set("first_slot", geometry.first_slot)
        self._page.set("slot_size", geometry.slot_size)
        self._page.set("slot_count", geometry.slot_count)
        self._page.set("magic", DIRECTORY_MAGIC)

    def write_head(self, head: WriteHead) -> None:
        """Status, generation and driver version."""
        self._page.set("driver_version", head.driver_version)
        self._page.set("generation", head.generation)
        self._page.set("status", head.status)

    def write_slot(self, slot: int, view: SlotView) -> None:
        """One entry, its state last."""
        self._page.set(f"{slot}.token", view.token)
        self._page.set(f"{slot}.pid", view.pid)
        self._page.set(f"{slot}.refusal", view.refusal)
        self._page.set(f"{slot}.retry_milliseconds", view.retry_milliseconds)
        self._page.set(f"{slot}.session_id", view.session)
        self._page.set(f"{slot}.worker_address", view.worker_address)
        self._page.set(f"{slot}.state", view.state)

    def beat(self) -> None:
        """Show that the device's process lives."""
        self._beats += 1
        self._page.set("host_heartbeat", self._beats)

    def program(self, slot: int) -> bytes:
        """What the claimant of a slot calls itself: 64 bytes of anything."""
        offset, count = DIRECTORY_PROGRAM
        return self._page.read_bytes(_entry(slot) + offset, count)

    def close(self) -> None:
        """Unmap it."""
        self._page.close()
