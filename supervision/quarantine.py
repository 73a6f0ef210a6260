# SPDX-License-Identifier: Apache-2.0
"""The quarantine actor: keeps VMs away that made too many faults, until an administrator lets them in again.

What is in force stands in the ledger, with who and why; connections, devices and executors ask there, so that no
new session begins whatever becomes of this actor. It decides (``_quarantine``), has it written, and then tells
those who must know at once: the VM's sessions end, its PCI device and its device page say so. Whatever it was doing when it
ended, its next life looks at all that is written and does it again.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import ClassVar

import attrs

from vgpu.actors import Actor, ActorError, Down, Refused, WhichChildren, handles
from vgpu.actors.fault_book import NotQuarantined
from vgpu.actors.fault_messages import (
    COUNTED,
    BeginQuarantine,
    ClearQuarantine,
    EndQuarantine,
    EndSessionsOf,
    FaultKept,
    FaultTimes,
    GetRules,
    ListQuarantines,
    Quarantine,
    QuarantineRecord,
    QuarantineRule,
    SetQuarantined,
)
from vgpu.actors.messages import MarkVm

from ._quarantine import reached

_log = logging.getLogger("vgpu.quarantine")

LEDGER = "mediator/ledger"
TELEMETRY = "mediator/telemetry"
CUDA_ERROR_DEVICE_UNAVAILABLE = 46
LEDGER_SECONDS = 30.0
AGAIN_SECONDS = 1.0


@attrs.frozen
class Review:
    """Look at everything that is written, as after a restart."""


@attrs.define(eq=False)
class QuarantineKeeper(Actor):
    """Decides and applies. ``gpus``: supervisors, one for each GPU; ``kinds``: the faults that count."""

    # It asks the ledger up to four times, which may be coming back.
    stuck_after_seconds: ClassVar[float | None] = 4 * LEDGER_SECONDS + 5

    gpus: tuple[str, ...]
    devices: str = "mediator/devices"
    rule: QuarantineRule = attrs.field(factory=QuarantineRule)
    kinds: tuple[str, ...] = COUNTED
    _marked: set[str] = attrs.Factory(set)
    _monitors: bool = False

    async def started(self) -> None:
        self.send_after(0, Review())

    @handles(Review)
    async def review(self, message: Review) -> None:
        try:
            for record in await self._in_force():
                await self._apply(record)
            await self._judge(None)
        except ActorError as error:
            _log.warning("cannot look at the quarantines yet: %s", error)
            self.send_after(AGAIN_SECONDS, Review())

    @handles(FaultKept)
    async def fault_kept(self, message: FaultKept) -> None:
        try:
            await self._judge(message.vm)
        except ActorError as error:
            _log.warning("cannot judge %s yet: %s", message.vm, error, extra={"vm": message.vm})
            self.send_after(AGAIN_SECONDS, Review())

    async def _in_force(self) -> tuple[QuarantineRecord, ...]:
        return await self.find(LEDGER).ask(
            ListQuarantines(), timeout_seconds=LEDGER_SECONDS, wait_for_name=True
        )

    async def _judge(self, vm: str | None) -> None:
        """Look whether a VM (None: any) has made too many faults by now."""
        ledger, now = self.find(LEDGER), time.time()
        rules = await ledger.ask(GetRules(), timeout_seconds=LEDGER_SECONDS)
        longest = max(rule.seconds for rule in (self.rule, *rules.values()))
        found = await ledger.ask(FaultTimes(self.kinds, now - longest), timeout_seconds=LEDGER_SECONDS)
        already = {record.vm for record in await self._in_force()}
        for name in {name for name, _ in found} - already:
            rule = rules.get(name, self.rule)
            count = reached(rule, (at for who, at in found if who == name), now)
            if count and vm in (None, name):
                reason = f"{count} faults within {rule.seconds:g} s"
                message = BeginQuarantine(name, "watchdog", reason)
                await self._apply(await ledger.ask(message, timeout_seconds=LEDGER_SECONDS))

    @handles(Quarantine)
    async def quarantine(self, message: Quarantine) -> QuarantineRecord:
        try:
            record = await self.find(LEDGER).ask(
                BeginQuarantine(message.vm, message.by, message.reason), timeout_seconds=LEDGER_SECONDS
            )
        except ActorError as error:
            raise Refused(error) from error
        await self._apply(record)
        return record

    @handles(ClearQuarantine)
    async def clear(self, message: ClearQuarantine) -> QuarantineRecord:
        try:
            record = await self.find(LEDGER).ask(
                EndQuarantine(message.vm, message.by), timeout_seconds=LEDGER_SECONDS
            )
        except (NotQuarantined, ActorError) as error:
            raise Refused(error) from error
        about = {"vm": message.vm}
        _log.warning("the quarantine of %s is over, says %s", message.vm, message.by, extra=about)
        self._marked.discard(message.vm)
        self._tell(message.vm, is_quarantined=False)
        return record

    # -- what follows from it

    async def _apply(self, record: QuarantineRecord) -> None:
        if record.vm not in self._marked:
            about = {"vm": record.vm}
            _log.warning("%s is quarantined by %s: %s", record.vm, record.by, record.reason, extra=about)
        self._marked.add(record.vm)
        if not self._monitors:
            self._monitors = True
            self.monitor(self.find(TELEMETRY))
        self._tell(record.vm, is_quarantined=True)
        order = EndSessionsOf(record.vm, CUDA_ERROR_DEVICE_UNAVAILABLE, f"quarantine: {record.reason}")
        for gpu in self.gpus:
            with contextlib.suppress(ActorError):
                for child in await self.find(f"{gpu}/executors").ask(WhichChildren()):
                    with contextlib.suppress(ActorError):
                        self.find(child.name).notify(order)

    def _tell(self, vm: str, *, is_quarantined: bool) -> None:
        """Those who show it. A device that is not there asks the ledger when it comes."""
        with contextlib.suppress(ActorError):
            self.find(TELEMETRY).notify(MarkVm(vm, quarantined=is_quarantined))
        with contextlib.suppress(ActorError):
            self.find(f"{self.devices}/{vm}").notify(SetQuarantined(is_quarantined))

    @handles(Down)
    async def telemetry_restarted(self, message: Down) -> None:
        self._monitors = False
        self.send_after(AGAIN_SECONDS, Review())
