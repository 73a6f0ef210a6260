# SPDX-License-Identifier: Apache-2.0
"""The keeper of limits: writes what VMs may do into their accounts, and sees who is being held back.

Workers enforce the limits by themselves, in C (``gpu/replay/vm_limits.c``), from an account that all sessions of a VM share.
This actor writes the accounts when the mediator starts and when an administrator changes something, has the workers look,
tells telemetry while calls of a VM are held back, and gives back what sessions held whose worker and executor are both gone.
If it dies, limits hold as they were.
"""

from __future__ import annotations

import logging
from pathlib import Path

import attrs
import trio

from vgpu.transport.account import Account, Holding, Resource, account_path

from . import Actor, ActorError, ExitReason, Refused, WhichChildren, handles
from .messages import (
    AccountState,
    ApplyLimits,
    LimitsChanged,
    ListAccounts,
    ListVms,
    MarkVm,
    SessionRefused,
    VmChanged,
    VmRecord,
)

_log = logging.getLogger("vgpu.limits")

LEDGER = "mediator/ledger"
TELEMETRY = "mediator/telemetry"
LOOK_SECONDS = 0.5
AGAIN_SECONDS = 0.5
SWEEP_LOOKS = 10  # a sweep every so many looks
NAMES = {resource: resource.name.lower() for resource in Resource}


class NoAccount(ActorError):
    """A VM's account cannot be had; the message says why."""


@attrs.define(eq=False)
class _Watched:
    """One VM's account, and what has been seen in it. Counters outlive the sessions that they are of."""

    account: Account
    last: dict[int, Holding] = attrs.Factory(dict)  # by session
    held_back: int = 0
    held_back_ns: int = 0
    refused: list[int] = attrs.Factory(lambda: [0] * len(Resource))
    sessions_refused: int = 0
    is_held_back: bool = False

    def look(self) -> None:
        """Add up what is new."""
        self.is_held_back = False
        seen: dict[int, Holding] = {}
        for holding in self.account.holdings():
            before = self.last.get(holding.session_id)
            self.held_back += holding.held_back - (before.held_back if before else 0)
            waited = holding.held_back_ns - (before.held_back_ns if before else 0)
            self.held_back_ns += waited
            self.is_held_back |= waited > 0
            for resource in Resource:
                self.refused[resource] += holding.refused[resource] - (
                    before.refused[resource] if before else 0
                )
            seen[holding.session_id] = holding
        self.last = seen

    def state(self, vm: str) -> AccountState:
        """How it is now."""
        holdings = list(self.account.holdings())
        return AccountState(
            vm,
            self.account.limits(),
            len(holdings),
            {name: sum(h.used[resource] for h in holdings) for resource, name in NAMES.items()},
            {name: self.refused[resource] for resource, name in NAMES.items()},
            self.sessions_refused,
            self.held_back,
            self.held_back_ns,
            self.is_held_back,
        )


@attrs.define(eq=False)
class LimitKeeper(Actor):
    """Accounts by VM."""

    run_dir: Path
    gpus: tuple[str, ...]
    _watched: dict[str, _Watched] = attrs.Factory(dict)

    async def started(self) -> None:
        self.nursery.start_soon(self._write_all)
        self.nursery.start_soon(self._watch)

    async def stopped(self, reason: ExitReason) -> None:
        for watched in self._watched.values():
            watched.account.close()
        self._watched.clear()

    def _of(self, vm: str) -> _Watched:
        watched = self._watched.get(vm)
        if watched is None:
            watched = _Watched(Account(account_path(self.run_dir, vm)))
            watched.account.forgive()
            self._watched[vm] = watched
        return watched

    # -- what VMs may do

    async def _write_all(self) -> None:
        """What the ledger says, whatever an earlier mediator has left in the accounts."""
        while True:
            try:
                for vm in await self.find(LEDGER).ask(ListVms(), wait_for_name=True):
                    self._of(vm.name).account.set_limits(vm.limits)
                return
            except (ActorError, OSError) as error:
                _log.warning("limits are as they were left, until they can be written: %s", error)
                await trio.sleep(AGAIN_SECONDS)

    @handles(ApplyLimits)
    async def apply(self, message: ApplyLimits) -> None:
        try:
            self._of(message.vm.name).account.set_limits(message.vm.limits)
        except OSError as error:
            _log.error(
                "the limits of %s cannot be written: %s",
                message.vm.name,
                error,
                extra={"vm": message.vm.name},
            )
            return
        self.find(TELEMETRY).notify(VmChanged(message.vm))
        # Rates are read for every call; a quota shows in a session's device page once its worker has looked.
        self.nursery.start_soon(self._tell_executors, message.vm)

    async def _tell_executors(self, vm: VmRecord) -> None:
        for gpu in self.gpus:
            try:
                children = await self.find(f"{gpu}/executors").ask(WhichChildren(), timeout_seconds=1)
            except ActorError:
                continue  # just being restarted; its sessions look by themselves, twice a second
            for child in children:
                self.find(child.name).notify(LimitsChanged(vm.name, vm.watchdog_seconds))

    # -- what they do

    async def _watch(self) -> None:
        looks = 0
        while True:
            await trio.sleep(LOOK_SECONDS)
            looks += 1
            self._find_new()
            for vm, watched in self._watched.items():
                watched.look()
                if watched.is_held_back:
                    self.find(TELEMETRY).notify(MarkVm(vm, quarantined=None, rate_limited=True))
                if looks % SWEEP_LOOKS == 0:
                    _sweep(vm, watched.account)

    def _find_new(self) -> None:
        """VMs that came by themselves have an account, too."""
        for path in (self.run_dir / "accounts").glob("*.account"):
            vm = path.name.removesuffix(".account")
            if vm not in self._watched:
                try:
                    self._of(vm)
                except OSError as error:
                    _log.error("the account of %s cannot be read: %s", vm, error, extra={"vm": vm})

    @handles(SessionRefused)
    def session_refused(self, message: SessionRefused) -> None:
        try:
            self._of(message.vm).sessions_refused += 1
        except OSError as error:
            _log.error("the account of %s cannot be read: %s", message.vm, error, extra={"vm": message.vm})

    @handles(ListAccounts)
    def list_accounts(self, message: ListAccounts) -> tuple[AccountState, ...]:
        try:
            return tuple(watched.state(vm) for vm, watched in sorted(self._watched.items()))
        except OSError as error:
            raise Refused(NoAccount(str(error))) from error


def _sweep(vm: str, account: Account) -> None:
    """Executors give back what their workers held; these died when no mediator was there."""
    for holding in list(account.holdings()):
        if not Path(f"/proc/{holding.worker_pid}").exists():
            _log.info(
                "session %d of %s has gone unseen; what it held is given back",
                holding.session_id,
                vm,
                extra={"vm": vm, "session": holding.session_id},
            )
            account.clear(holding.entry)
