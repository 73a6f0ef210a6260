# SPDX-License-Identifier: Apache-2.0
"""A core with four slots, a clock in the test's hand and shared memory that is a few dicts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import attrs
import pytest

from tests.transport.stub.world import World, until_sync
from vgpu.transport.stub import effects as do
from vgpu.transport.stub.core import Core
from vgpu.transport.stub.launch import device_socket_path
from vgpu.transport.stub.messages import Command, Event, Grant
from vgpu.transport.vfio_user.device import MIN_BAR1, cut_bar1
from vgpu.transport.vfio_user.pci import Variant
from vgpu.transport.vfio_user.registers import PAGE, Registers, SlotRegister, SlotState, SlotView

SLOTS = 4
E = TypeVar("E")


@attrs.define
class FakePeek:
    """Shared memory as the guest would have left it."""

    programs: dict[int, bytes] = attrs.field(factory=dict)
    beats: dict[int, int] = attrs.field(factory=dict)
    reads: int = 0
    writes: int = 0

    def program(self, slot: int) -> bytes:
        return self.programs.get(slot, b"\0" * 64)

    def heartbeat(self, slot: int) -> int:
        return self.beats.get(slot, 0)

    def accesses(self) -> tuple[int, int]:
        return self.reads, self.writes


class Bench:
    """Plays guest, mediator, worker and clock against one core, and keeps what it decided."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.peek = FakePeek()
        self.registers = Registers(cut_bar1(MIN_BAR1, SLOTS), table_hash=0x1234)
        self.core = Core("vm1", 4711, Variant.EXPRESS, self.registers, self.peek, self.now)
        self.effects: list[do.Effect] = []
        self.shown: dict[int, SlotView] = {}
        self.head: do.WriteHead | None = None
        self.did(self.core.start())
        self.effects.clear()

    def did(self, effects: Iterable[do.Effect]) -> None:
        for effect in effects:
            self.effects.append(effect)
            if isinstance(effect, do.WriteSlot):
                self.shown[effect.slot] = effect.view
            elif isinstance(effect, do.WriteHead):
                self.head = effect

    def take(self) -> list[do.Effect]:
        """Everything since the last take but what stands in the directory."""
        taken: list[do.Effect] = [
            e for e in self.effects if not isinstance(e, do.WriteSlot | do.WriteHead | do.CancelCall)
        ]
        self.effects = []
        return taken

    def said(self) -> list[Event]:
        """What the mediator was told since the last take, which this is."""
        return [e.event for e in self.take() if isinstance(e, do.Say)]

    def of(self, kind: type[E]) -> list[E]:
        """Effects of a kind since the last take."""
        return [e for e in self.effects if isinstance(e, kind)]

    # ---- the guest

    def write(self, slot: int, register: int, value: int, count: int = 4) -> None:
        events = self.registers.write(PAGE * (slot + 1) + register, value.to_bytes(count, "little"))
        self.peek.writes += 1
        self.did(self.core.guest_did(events, self.now))

    def claim(self, slot: int = 0, token: int = 77, pid: int = 5) -> None:
        self.write(slot, SlotRegister.OWNER, pid << 32 | token, 8)

    def release(self, slot: int = 0, token: int = 77) -> None:
        self.write(slot, SlotRegister.RELEASE, token)

    def reset(self) -> None:
        self.did(self.core.guest_did(self.registers.reset(), self.now))

    # ---- the others

    def connect(self) -> None:
        self.did(self.core.mediator_connected(self.now))

    def command(self, command: Command, descriptors: Sequence[int] = ()) -> None:
        self.did(self.core.command(command, tuple(descriptors), self.now))

    def grant(
        self, slot: int = 0, token: int = 77, session: int = 9, fds: tuple[int, int] = (101, 102)
    ) -> None:
        self.command(Grant(slot, token, session, 0x2000_0000_0000, 8000 + slot), fds)

    def own(self, slot: int = 0, fds: tuple[int, int] = (101, 102)) -> None:
        """Claimed and granted; a mediator must be there."""
        self.claim(slot)
        self.grant(slot, session=9 + slot, fds=fds)

    def worker_gone(self, slot: int = 0, process: int = 102) -> None:
        self.did(self.core.worker_gone(slot, process, self.now))

    def zeroed(self, slot: int = 0) -> None:
        self.did(self.core.zeroed(slot))

    def sleep(self, seconds: float, step: float = 0.5) -> None:
        """Ticks as the clock of the process gives them, and at every deadline."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + step, max(self.now + 0.001, self.core.next_deadline()))
            self.did(self.core.tick(self.now))

    def state(self, slot: int = 0) -> SlotState:
        """As the registers have it, which the directory must agree with."""
        assert self.shown[slot] == self.registers.view(slot)
        return self.registers.state(slot)


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A device process with a booted QEMU, for tests that leave it as they found it."""
    one = World(tmp_path_factory.mktemp("run"))
    one.spawn()
    try:
        until_sync(device_socket_path(one.run_dir, one.vm).exists)
        one.boot()
        yield one
        assert one.process is not None
        assert one.process.poll() is None, one.log_path.read_text()
        assert "Traceback" not in one.log_path.read_text()
    finally:
        one.end()
