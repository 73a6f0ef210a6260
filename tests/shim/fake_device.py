# SPDX-License-Identifier: Apache-2.0
"""A virtual GPU for tests without a VM: a folder that looks like sysfs, BARs that are files, and a thread behind them.

The guest library under test is built with ``SHIM_SYSFS="sysfs"``, a folder relative to where the guest runs. The BARs are
ordinary files, so a store to a register is a store to a page, which the thread finds by looking: it cannot count loads,
nor answer them differently each time, and everything else is as a device does it. What a slot is filled with is the
caller's affair (``Grant``): a replay loop in Python, or a real worker.

It must never be used outside tests; ``vgpu.transport.stub`` is the real thing.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, Self

import attrs

from tests.shim.fake_host import SLOT_SIZE, FakeHost, Session, store
from vgpu.transport._generated_calls import TABLE_HASH
from vgpu.transport.layout import (
    DEVICE_PAGE_SIZE,
    DIRECTORY_FIELDS,
    DIRECTORY_HEAD_SIZE,
    DIRECTORY_MAGIC,
    DIRECTORY_OFFSET,
    DIRECTORY_PROGRAM,
    DIRECTORY_SLOT_FIELDS,
    DIRECTORY_SLOT_SIZE,
    SESSION_PAGE_SIZE,
)
from vgpu.transport.vfio_user.registers import MAGIC, PAGE, SlotRegister, SlotState

KIB, MIB = 1 << 10, 1 << 20
FIRST_SLOT = 64 * KIB
PAGES = DEVICE_PAGE_SIZE + SESSION_PAGE_SIZE
HOST_PRESENT = 1
ADDRESS = "0000:00:05.0"
STEP_SECONDS = 0.0005


class Tenant(Protocol):
    """What a granted slot holds."""

    worker_address: int
    session_id: int

    def ring(self) -> None:
        """The guest rang."""

    def end(self) -> None:
        """The slot is released; returns when nothing touches it any more."""


Grant = Callable[["FakeDevice", int], Tenant]


@attrs.define(eq=False)
class PythonTenant:
    """The replay loop of ``fake_host`` in a slot."""

    session: Session
    worker_address: int
    session_id: int = 7

    def ring(self) -> None:
        with contextlib.suppress(OSError):
            self.session.far_end.send(b"!")

    def end(self) -> None:
        self.session.far_end.close()
        self.session.done.wait(60)
        self.session.close()


@attrs.define(eq=False)
class PythonHost:
    """Grants slots that are replayed in Python. ``host`` says how; it is never entered, so it has no socket."""

    host: FakeHost = attrs.field(
        factory=lambda: FakeHost(Path("/nonexistent"), ring_size=1 << 18, slot_count=64)
    )
    sessions: list[Session] = attrs.field(factory=list)
    first_address: int = 0x3100_0000_0000

    def __call__(self, device: FakeDevice, slot: int) -> PythonTenant:
        self.host.worker_address = self.first_address + slot * (1 << 36)
        host = self.host
        before = PAGES + host.ring_size + host.slot_count * SLOT_SIZE + host.fence_count * 8
        host.arena_size = (device.slot_size - before) & ~(PAGE - 1)
        session = Session(self.host, within=device.memory_fd, offset=device.slot_offset(slot))
        self.sessions.append(session)
        threading.Thread(target=session.replay, daemon=True).start()
        return PythonTenant(session, self.host.worker_address)


@attrs.define(eq=False, slots=False)
class FakeDevice:
    """One device in ``folder``/sysfs; use as a context manager, and run guests with ``folder`` as working directory."""

    folder: Path
    grant: Grant
    slots: int = 4
    slot_size: int = 2 * MIB
    address: str = ADDRESS
    driver_version: int = 13000
    refuse: list[tuple[int, int]] = attrs.field(factory=list)  # (status, milliseconds) for the next claims
    answering: bool = True  # claims become more than PENDING
    sealed: bool = (
        False  # BAR1 is a memfd that cannot shrink, which a real worker insists on; it cannot be unplugged
    )
    tenants: dict[int, Tenant] = attrs.field(factory=dict)
    claims: list[tuple[int, int, int, str]] = attrs.field(factory=list)  # slot, token, pid, program
    releases: list[tuple[int, int]] = attrs.field(factory=list)  # slot, token
    stores: Counter[str] = attrs.field(factory=Counter)
    problems: list[str] = attrs.field(factory=list)
    memory_fd: int = -1

    # ---- the folder ----

    @property
    def place(self) -> Path:
        return self.folder / "sysfs" / "bus" / "pci" / "devices" / self.address

    @property
    def bar1_size(self) -> int:
        return FIRST_SLOT + self.slots * self.slot_size

    def slot_offset(self, slot: int) -> int:
        return FIRST_SLOT + slot * self.slot_size

    def write(self, name: str, text: str) -> None:
        (self.place / name).write_text(text)

    def _make_folder(self) -> None:
        self.place.mkdir(parents=True)
        for name, text in (("vendor", "0x10de\n"), ("device", "0x2331\n"), ("enable", "1\n")):
            self.write(name, text)
        with (self.place / "resource0").open("wb") as file:
            file.truncate((1 + self.slots) * PAGE)
        if self.sealed:
            self.memory_fd = os.memfd_create("bar1", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.truncate(self.memory_fd, self.bar1_size)
            fcntl.fcntl(self.memory_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            (self.place / "resource1").symlink_to(f"/proc/{os.getpid()}/fd/{self.memory_fd}")
        else:
            self.memory_fd = os.open(self.place / "resource1", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
            os.truncate(self.memory_fd, self.bar1_size)
        (self.place / "resource1_wc").symlink_to("resource1")

    # ---- words ----

    def field(self, name: str) -> int:
        offset, kind = DIRECTORY_FIELDS[name]
        return int(struct.unpack_from(f"<{kind}", self.memory, DIRECTORY_OFFSET + offset)[0])

    def set_field(self, name: str, value: int) -> None:
        offset, kind = DIRECTORY_FIELDS[name]
        store(self.memory, DIRECTORY_OFFSET + offset, kind, value)

    def _entry(self, slot: int) -> int:
        return DIRECTORY_OFFSET + DIRECTORY_HEAD_SIZE + slot * DIRECTORY_SLOT_SIZE

    def entry(self, slot: int, name: str) -> int:
        offset, kind = DIRECTORY_SLOT_FIELDS[name]
        return int(struct.unpack_from(f"<{kind}", self.memory, self._entry(slot) + offset)[0])

    def set_entry(self, slot: int, **values: int) -> None:
        """In the order given: put ``state`` last."""
        for name, value in values.items():
            offset, kind = DIRECTORY_SLOT_FIELDS[name]
            store(self.memory, self._entry(slot) + offset, kind, value)

    def program(self, slot: int) -> str:
        start = self._entry(slot) + DIRECTORY_PROGRAM[0]
        return self.memory[start : start + DIRECTORY_PROGRAM[1]].split(b"\0")[0].decode()

    def sysfs(self, slot: int) -> int:
        """Which instance of sysfs the owner says that it sees."""
        return int(struct.unpack_from("<Q", self.memory, self._entry(slot) + sum(DIRECTORY_PROGRAM) - 8)[0])

    def set_sysfs(self, slot: int, number: int) -> None:
        store(self.memory, self._entry(slot) + sum(DIRECTORY_PROGRAM) - 8, "Q", number)

    def states(self) -> list[int]:
        return [self.entry(slot, "state") for slot in range(self.slots)]

    def set_present(self, present: bool) -> None:
        self.set_field("status", HOST_PRESENT if present else 0)

    # ---- life ----

    def __enter__(self) -> Self:
        self._make_folder()
        self.memory = mmap.mmap(self.memory_fd, self.bar1_size)
        with (self.place / "resource0").open("r+b") as file:
            self.registers = mmap.mmap(file.fileno(), 0)
        struct.pack_into("<I", self.registers, 0, MAGIC)
        self.set_field("layout_version", 1)
        self.set_field("table_hash", TABLE_HASH)
        self.set_field("bar1_size", self.bar1_size)
        self.set_field("first_slot", FIRST_SLOT)
        self.set_field("slot_size", self.slot_size)
        self.set_field("slot_count", self.slots)
        self.set_field("driver_version", self.driver_version)
        self.set_present(True)
        self.set_field("magic", DIRECTORY_MAGIC)
        self._stop = threading.Event()
        self._still, self._stands = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        for tenant in self.tenants.values():
            tenant.end()
        os.close(self.memory_fd)

    def stand_still(self) -> None:
        """As a device process that was stopped: nothing is answered, and its heartbeat stands. So it is when this returns."""
        self._still.set()
        assert self._stands.wait(60)

    def vanish(self) -> None:
        """As a device process that has died: registers read as ones."""
        self.stand_still()
        self.registers[:] = b"\xff" * len(self.registers)

    def _end(self) -> None:
        self._stop.set()
        self._thread.join(60)
        while self.tenants:
            self.tenants.popitem()[1].end()

    def blank(self, byte: bytes) -> None:
        """As a device that is taken away where mappings stay: nobody answers at their addresses."""
        self._end()
        self.memory[:] = byte * len(self.memory)
        self.registers[:] = byte * len(self.registers)

    def unplug(self) -> None:
        """As a device that is taken away where mappings go with it: whoever touches one gets SIGBUS."""
        self._end()
        for name in ("resource0", "resource1"):
            os.truncate(self.place / name, 0)

    def kill(self, slot: int) -> None:
        """The worker of a slot died."""
        tenant = self.tenants.pop(slot)
        tenant.end()
        self.set_entry(slot, state=SlotState.DEAD)

    # ---- the thread ----

    def _run(self) -> None:
        beat = 0
        while not self._stop.is_set():
            time.sleep(STEP_SECONDS)
            if self._still.is_set():
                self._stands.set()
                continue
            beat += 1
            if beat % 50 == 0:
                self.set_field("host_heartbeat", beat)
            for slot in range(self.slots):
                self._serve(slot)

    def _take(self, slot: int, register: SlotRegister, kind: str) -> int:
        """What has been stored since the last look, 0 nothing. One store between two looks is all a test makes."""
        at = (1 + slot) * PAGE + register
        value = int(struct.unpack_from(f"<{kind}", self.registers, at)[0])
        if value:
            struct.pack_into(f"<{kind}", self.registers, at, 0)
            self.stores[register.name] += 1
        return value

    def _serve(self, slot: int) -> None:
        if owner := self._take(slot, SlotRegister.OWNER, "Q"):
            self._claim(slot, owner & 0xFFFFFFFF, owner >> 32)
        if self._take(slot, SlotRegister.DOORBELL, "I") and slot in self.tenants:
            self.tenants[slot].ring()
        if token := self._take(slot, SlotRegister.RELEASE, "I"):
            self._release(slot, token)
        if self.answering and self.entry(slot, "state") == SlotState.PENDING:
            self._answer(slot)

    def _claim(self, slot: int, token: int, pid: int) -> None:
        if self.entry(slot, "state") != SlotState.FREE or not token:
            self.problems.append(f"claim of slot {slot}, which is not free")
            return
        self.claims.append((slot, token, pid, self.program(slot)))
        self.set_entry(slot, token=token, pid=pid, state=SlotState.PENDING)

    def _answer(self, slot: int) -> None:
        if self.refuse:
            status, milliseconds = self.refuse.pop(0)
            if status == 100:  # the worker dies before it is ready
                self.set_entry(slot, state=SlotState.DEAD)
            else:
                self.set_entry(slot, refusal=status, retry_milliseconds=milliseconds, state=SlotState.REFUSED)
            return
        tenant = self.tenants[slot] = self.grant(self, slot)
        self.set_entry(
            slot, session_id=tenant.session_id, worker_address=tenant.worker_address, state=SlotState.READY
        )

    def _release(self, slot: int, token: int) -> None:
        # Who sweeps stores again what it has stored until it sees the state change; a device says nothing to that.
        if (slot, token) in self.releases and token != self.entry(slot, "token"):
            return
        self.releases.append((slot, token))
        if token != self.entry(slot, "token"):
            self.problems.append(f"release of slot {slot} with a token that is not its owner's")
            return
        self.set_entry(slot, state=SlotState.RELEASING)
        if tenant := self.tenants.pop(slot, None):
            tenant.end()
        start = self.slot_offset(slot)
        self.memory[start : start + self.slot_size] = bytes(self.slot_size)
        self.set_entry(slot, token=0, pid=0, refusal=0, session_id=0, worker_address=0, state=SlotState.FREE)
