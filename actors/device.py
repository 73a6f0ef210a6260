# SPDX-License-Identifier: Apache-2.0
"""One device actor per registered VM: keeps the VM's PCI device running and gives its guest processes sessions.

The device is a process of its own that outlives mediators (docs/wire.md section 5). This actor finds or starts it, and
answers its claims: an executor is started as for a local guest, its worker replays in the claimed slot, and the device
gets the guest's end of the lifeline. Sessions live between device and worker: neither this actor's end nor the
mediator's ends one. The device's end does, through the lifelines it held; then it is started anew.

Two workers must never have one slot. So claims of a slot are answered one after the other, and a claim is refused
only when the executor that was tried for it, and with it the worker, has gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import attrs
import trio

from vgpu.transport.attach import Status as Answer
from vgpu.transport.errors import RemoteProtocolError
from vgpu.transport.layout import DIRECTORY_FIELDS, DIRECTORY_OFFSET, DIRECTORY_SIZE, Page
from vgpu.transport.lines import close_all
from vgpu.transport.stub.launch import DeviceLink
from vgpu.transport.stub.messages import (
    Claim,
    Client,
    Counters,
    Event,
    Freed,
    Grant,
    Granted,
    Refuse,
    Released,
    Status,
    Withdrawn,
    command_line,
    read_event,
)

from . import (
    Actor,
    ActorError,
    Down,
    ExitReason,
    MailboxFull,
    Ref,
    Refused,
    Reply,
    StartChild,
    handles,
)
from .descriptor import Descriptor
from .device_start import OpenedDevice, is_current
from .executor import Quarantined, TooManySessions
from .fault_messages import GetQuarantine, SetQuarantined
from .messages import (
    Attach,
    AttachDevice,
    Attachment,
    AwaitDevice,
    DetachDevice,
    DeviceState,
    DriverVersion,
    EndDevice,
    GetVm,
    GuestLeft,
    SessionRequest,
    ShowDevice,
    SlotPlacement,
    VmRecord,
)
from .placement import choose_gpu, pool_of
from .start_bucket import StartBucket, StartRate

_log = logging.getLogger("vgpu.device")

TELEMETRY = "mediator/telemetry"
RETRY_MILLISECONDS = 200
START_SECONDS = 60.0
# After a device that did not start, or did not stay; doubles up to the limit, and begins anew after a steady while.
AGAIN_SECONDS = 0.2
AGAIN_LIMIT_SECONDS = 10.0
STEADY_SECONDS = 30.0


class Starter(Protocol):
    """Who finds, starts and ends device processes: ``DeviceStarter``."""

    async def open(self, vm: VmRecord) -> OpenedDevice: ...

    async def stop(self, vm: str) -> bool: ...


class NoDevice(ActorError):
    """The VM has no device to be started: it is not registered, or without one."""


@attrs.define(eq=False)
class Device(Actor):
    """The device of one VM."""

    # Ending a device waits for its process to leave.
    stuck_after_seconds: ClassVar[float | None] = 30.0

    starter: Starter
    executors: tuple[str, ...]  # supervisors, one for each GPU
    vm: str
    starts: StartRate = attrs.field(factory=StartRate)
    _bucket: StartBucket = attrs.field(init=False)
    _link: DeviceLink | None = None
    _bar1: Descriptor | None = None
    _is_connected: bool = False
    _counters: dict[str, int] = attrs.Factory(dict)
    _owned: set[int] = attrs.Factory(set)
    _sessions: dict[int, Ref[Any]] = attrs.Factory(dict)  # by slot; those begun in this life
    _turns: dict[int, trio.Lock] = attrs.Factory(dict)
    _trying: set[Ref[Any]] = attrs.Factory(
        set
    )  # executors whose workers may have a slot that was not granted
    _monitor: int | None = None
    _asking: list[Reply[DeviceState]] = attrs.Factory(list)
    _trouble: str = "it is just being started"
    _is_tried: bool = False
    _is_quarantined: bool = False
    _version: int = 0  # of the driver, as the device was told; 0: not yet
    _keeping: trio.CancelScope = attrs.Factory(trio.CancelScope)
    _kept: trio.Event = attrs.Factory(trio.Event)

    def __attrs_post_init__(self) -> None:
        self._bucket = StartBucket(self.starts)

    @property
    def subject(self) -> Mapping[str, object]:
        """The VM."""
        return {"vm": self.vm}

    async def started(self) -> None:
        self.nursery.start_soon(self._keep)

    # -- the process

    async def _keep(self) -> None:
        pause = AGAIN_SECONDS
        with self._keeping:
            while True:
                began = trio.current_time()
                try:
                    await self._converse(await self.starter.open(await self._record()))
                    self._trouble = "it has ended and is being started again"
                    _log.warning("the device of %s has hung up", self.vm)
                except (OSError, RemoteProtocolError, ActorError, trio.BrokenResourceError) as error:
                    self._trouble = str(error)
                    _log.error("no device for %s: %s", self.vm, error)
                self._settle()
                if trio.current_time() - began > STEADY_SECONDS:
                    pause = AGAIN_SECONDS
                await trio.sleep(pause)
                pause = min(2 * pause, AGAIN_LIMIT_SECONDS)
        self._kept.set()

    async def _record(self) -> VmRecord:
        vm = await self.find("mediator/ledger").ask(GetVm(self.vm))
        if vm is None or vm.ad_hoc or not vm.bar1_bytes:
            raise NoDevice(f"VM {self.vm!r} is not registered with a device")
        return vm

    async def _converse(self, opened: OpenedDevice) -> None:
        """Serve one life of the connection; returns when the device has hung up."""
        link = opened.link
        hello = link.described
        try:
            if opened.process is not None:
                # Reaped whenever it ends. Cancelled, this leaves the process alone: a successor connects to it.
                self.nursery.start_soon(opened.process.wait)
            self._bar1 = Descriptor(os.dup(link.bar1_fd))
            self._link = link
            self._is_connected = hello.connected
            self._counters = {}
            self._owned = {report.slot for report in hello.slots}
            self._trouble = ""
            _log.info("device of %s: process %d, %d slots in use", self.vm, hello.pid, len(self._owned))
            self._settle()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._attach_telemetry)
                nursery.start_soon(self._say_status, link)
                try:
                    await self._hear(link)
                except RemoteProtocolError as error:
                    _log.error("the device of %s speaks another language: %s", self.vm, error)
                nursery.cancel_scope.cancel()
        finally:
            self._link = None
            self._is_connected = False
            if self._bar1 is not None:
                self._bar1.close()
                self._bar1 = None
            with contextlib.suppress(MailboxFull):
                self.find(TELEMETRY).send_nowait(DetachDevice(self.vm))
            await link.aclose()

    async def _attach_telemetry(self) -> None:
        """Lend telemetry the BAR1, for its device page. A telemetry that ends has a successor: ``peer_restarted``."""
        telemetry = self.find(TELEMETRY)
        await telemetry.wait_alive()
        if self._monitor is not None:
            self.demonitor(self._monitor)
        self._monitor = self.monitor(telemetry)
        if self._bar1 is None:
            return
        descriptor = self._bar1.copy()
        is_taken = False
        try:
            is_taken = await telemetry.send(AttachDevice(self.vm, descriptor))
        finally:
            if not is_taken:
                os.close(descriptor)

    @handles(Down)
    def peer_restarted(self, message: Down) -> None:
        if self._link is not None:
            self.nursery.start_soon(self._attach_telemetry)

    async def _say_status(self, link: DeviceLink) -> None:
        """HOST_PRESENT as soon as guests can be told the driver's version: at once where the device knows it still."""
        with contextlib.suppress(trio.BrokenResourceError):
            self._version = known = _driver_version_in(link)
            await self._ask_quarantine()
            if known:
                await self._tell_status(link)
            pool = self.find(pool_of(self.executors[0]))
            while True:
                try:
                    version = await pool.ask(DriverVersion(), timeout_seconds=START_SECONDS)
                    break
                except ActorError as error:
                    _log.warning("no worker can say yet what driver %s has: %s", self.vm, error)
                    await trio.sleep(AGAIN_SECONDS)
            if version != known:
                self._version = version
                await self._tell_status(link)

    async def _ask_quarantine(self) -> None:
        while True:
            try:
                self._is_quarantined = (
                    await self.find("mediator/ledger").ask(GetQuarantine(self.vm)) is not None
                )
                return
            except ActorError as error:
                _log.warning("nobody can say yet whether %s is quarantined: %s", self.vm, error)
                await trio.sleep(AGAIN_SECONDS)

    async def _tell_status(self, link: DeviceLink) -> None:
        await link.send(command_line(Status(True, self._is_quarantined, self._version)))

    @handles(SetQuarantined)
    async def set_quarantined(self, message: SetQuarantined) -> None:
        self._is_quarantined = message.quarantined
        if self._link is not None and self._version:
            with contextlib.suppress(trio.BrokenResourceError):
                await self._tell_status(self._link)

    async def _hear(self, link: DeviceLink) -> None:
        while True:
            message, descriptors = await link.receive()
            if message is None:
                return
            close_all(descriptors)
            event = read_event(message, len(descriptors))
            if isinstance(event, Claim):
                self._owned.add(event.slot)
                self.nursery.start_soon(self._answer, link, event)
            elif event is not None:
                self._note(event)

    def _note(self, event: Event) -> None:
        if isinstance(event, Client):
            self._is_connected = event.connected
        elif isinstance(event, Counters):
            self._counters = attrs.asdict(event)
        elif isinstance(event, Freed):
            self._owned.discard(event.slot)
        elif isinstance(event, (Released, Withdrawn)):
            # The lifeline has ended, and the worker leaves by itself; its executor makes sure.
            executor = self._sessions.pop(event.slot, None)
            if executor is not None and executor.is_alive:
                with contextlib.suppress(MailboxFull):
                    executor.notify(GuestLeft())
        elif isinstance(event, Granted):
            about = {"session": event.session}
            _log.info("session %d of %s in slot %d", event.session, self.vm, event.slot, extra=about)

    # -- claims

    async def _answer(self, link: DeviceLink, claim: Claim) -> None:
        async with self._turns.setdefault(claim.slot, trio.Lock()):
            if link is not self._link:
                return  # the device asks again once it is connected again
            try:
                await self._grant(link, claim)
            except trio.BrokenResourceError as error:
                _log.info("%s took no answer to its claim: %s", self.vm, error)

    async def _grant(self, link: DeviceLink, claim: Claim) -> None:
        refusal = self._refusal(link, claim) or self._haste_refusal(claim) or await self._quarantine_refusal()
        if refusal is not None:
            await self._refuse(link, claim, refusal)
            return
        try:
            vm = await self._record()
            supervisor = self.find(await choose_gpu(self, self.executors))
            request = SessionRequest(vm, claim.pid, claim.program, self._placement(link, claim))
            executor = await supervisor.ask(StartChild((request,)), timeout_seconds=START_SECONDS)
        except ActorError as error:
            _log.warning("no session for pid %d of %s: %s", claim.pid, self.vm, error)
            await self._refuse(link, claim, Answer.REFUSED if isinstance(error, NoDevice) else Answer.BUSY)
            return
        self._trying.add(executor)
        try:
            attachment = await executor.ask(Attach(), timeout_seconds=START_SECONDS)
        except ActorError as error:
            _log.warning("no session for pid %d of %s: %s", claim.pid, self.vm, error)
            await self._end(executor)
            is_final = isinstance(error, (TooManySessions, Quarantined))
            await self._refuse(link, claim, Answer.REFUSED if is_final else Answer.BUSY)
            return
        try:
            await self._hand_over(link, claim, attachment)
        except trio.BrokenResourceError:
            # It will claim again on its next connection, and must find the slot without a worker.
            await self._end(executor)
            raise
        self._trying.discard(executor)
        self._sessions[claim.slot] = executor

    def _refusal(self, link: DeviceLink, claim: Claim) -> Answer | None:
        if not is_current(link.described):
            return Answer.VERSION_MISMATCH
        if claim.slot >= link.described.slot_count or self._bar1 is None:
            return Answer.REFUSED
        return None

    def _haste_refusal(self, claim: Claim) -> Answer | None:
        if not self._bucket.take(trio.current_time()):
            return None
        _log.debug("pid %d of %s waits: it starts too many sessions", claim.pid, self.vm)
        return Answer.BUSY

    async def _quarantine_refusal(self) -> Answer | None:
        try:
            record = await self.find("mediator/ledger").ask(GetQuarantine(self.vm))
        except ActorError as error:
            _log.warning("nobody can say whether %s is quarantined: %s", self.vm, error)
            return Answer.BUSY
        return Answer.REFUSED if record is not None else None

    def _placement(self, link: DeviceLink, claim: Claim) -> SlotPlacement:
        assert self._bar1 is not None
        hello = link.described
        offset = hello.first_slot + claim.slot * hello.slot_size
        return SlotPlacement(claim.slot, self._bar1, offset, hello.slot_size)

    async def _hand_over(self, link: DeviceLink, claim: Claim, attachment: Attachment) -> None:
        grant = Grant(
            claim.slot, claim.token, attachment.session, attachment.worker_address, attachment.worker_pid
        )
        try:
            await link.send(command_line(grant), [attachment.lifeline_fd, attachment.worker_pidfd])
        finally:
            attachment.close()

    async def _refuse(self, link: DeviceLink, claim: Claim, status: Answer) -> None:
        retry = RETRY_MILLISECONDS if status is Answer.BUSY else 0
        await link.send(command_line(Refuse(claim.slot, claim.token, status, retry)))

    async def _end(self, executor: Ref[Any]) -> None:
        """Wait until the executor, and with it its worker, has gone."""
        executor.kill("its claim was not granted")
        await executor.wait_exit()
        self._trying.discard(executor)

    # -- looking, and ending

    def _state(self) -> DeviceState:
        if self._link is None:
            return DeviceState(self.vm, running=False, trouble=self._trouble)
        hello = self._link.described
        return DeviceState(
            self.vm,
            running=True,
            pid=hello.pid,
            connected=self._is_connected,
            bar1_bytes=hello.bar1_size,
            slots=hello.slot_count,
            claimed=len(self._owned),
            variant=hello.variant.value,
            counters=dict(self._counters),
        )

    def _settle(self) -> None:
        self._is_tried = True
        while self._asking:
            self._asking.pop().answer(self._state())

    @handles(ShowDevice)
    def show(self, message: ShowDevice) -> DeviceState:
        return self._state()

    @handles(AwaitDevice)
    def when_tried(self, message: AwaitDevice) -> DeviceState:
        reply = self.take_reply() if not self._is_tried else None
        if reply is not None:
            self._asking.append(reply)
        return self._state()

    @handles(EndDevice)
    async def end(self, message: EndDevice) -> bool:
        # First let go of it: what comes back afterwards would be a new one.
        self._keeping.cancel()
        await self._kept.wait()
        try:
            return await self.starter.stop(self.vm)
        except (OSError, RemoteProtocolError) as error:
            raise Refused(NoDevice(f"the device of {self.vm!r} cannot be ended: {error}")) from error

    async def stopped(self, reason: ExitReason) -> None:
        if self._bar1 is not None:
            self._bar1.close()
        # The next life is asked the same claims again, at once.
        for executor in tuple(self._trying):
            await self._end(executor)


def _driver_version_in(link: DeviceLink) -> int:
    """What the device tells its guests already; 0 where no mediator has said so yet."""
    page = Page(link.bar1_fd, DIRECTORY_SIZE, DIRECTORY_FIELDS, offset=DIRECTORY_OFFSET)
    try:
        return page.get("driver_version")
    finally:
        page.close()
