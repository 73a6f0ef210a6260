# SPDX-License-Identifier: Apache-2.0
"""The keeper of limits: what it writes, what it sees, and what it gives back; and pools in the ledger."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import attrs
import pytest
import trio

from vgpu.actors import ActorSpec, ActorSystem, open_system
from vgpu.actors.ledger import LedgerFile, NoSuchPool, NoSuchVm, PoolExists
from vgpu.actors.limits import LimitKeeper, _sweep
from vgpu.actors.messages import (
    AccountState,
    ApplyLimits,
    ListAccounts,
    PoolRecord,
    SessionRefused,
    VmRecord,
)
from vgpu.transport.account import ENTRY_OFFSETS, OFFSETS, Account, Limits, account_path


async def states(system: ActorSystem) -> dict[str, AccountState]:
    return {state.vm: state for state in await system.ref("limits").ask(ListAccounts())}


async def test_limits_are_written_and_what_is_met_is_counted(tmp_path: Path) -> None:
    path = account_path(tmp_path, "vm1")
    async with open_system(ActorSpec("limits", lambda: LimitKeeper(tmp_path, ()))) as system:
        keeper = system.ref("limits")
        await keeper.send(ApplyLimits(VmRecord("vm1", rate=7, memory_limit_bytes=9)))
        await keeper.send(SessionRefused("vm1"))
        state = (await states(system))["vm1"]
        assert (state.limits.calls_per_second, state.limits.memory_bytes, state.sessions) == (7, 9, 0)
        assert state.sessions_refused == 1
        account = Account(path)
        assert account.limits() == VmRecord("vm1", rate=7, memory_limit_bytes=9).limits
        entry = account.claim(5, os.getpid())
        start = OFFSETS["entry"] + entry * 128
        account._set(start + ENTRY_OFFSETS["used"], 1000)
        account._set(start + ENTRY_OFFSETS["held_back"], 3)
        account._set(start + ENTRY_OFFSETS["held_back_ns"], 50)
        with trio.fail_after(60):
            while (state := (await states(system))["vm1"]).held_back != 3:
                await trio.sleep(0.05)
        assert (state.used["memory"], state.sessions, state.held_back_ns) == (1000, 1, 50)
        account.clear(entry)
        account.close()
        await trio.sleep(0.6)
        state = (await states(system))["vm1"]
        assert (state.used["memory"], state.sessions, state.held_back) == (0, 0, 3)  # what was, was
        assert not state.is_held_back


async def test_vms_that_nobody_registered_are_seen_too(tmp_path: Path) -> None:
    async with open_system(ActorSpec("limits", lambda: LimitKeeper(tmp_path, ()))) as system:
        Account(account_path(tmp_path, "..")).close()  # a name with dots only
        with trio.fail_after(60):
            while ".." not in await states(system):
                await trio.sleep(0.05)
    assert (tmp_path / "accounts" / "...account").exists()


def test_the_unseen_dead_give_back(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    account = Account(account_path(tmp_path, "vm1"))
    account.claim(1, dead.pid)
    account.claim(2, os.getpid())
    _sweep("vm1", account)
    assert [h.session_id for h in account.holdings()] == [2]
    account.close()


def test_a_debt_of_another_clock_is_forgiven(tmp_path: Path) -> None:
    account = Account(account_path(tmp_path, "vm1"))
    account._set(OFFSETS["bytes_ns"], 1 << 63)
    account.forgive()
    assert account._get(OFFSETS["bytes_ns"]) == 0
    account.close()


def test_the_ledger_keeps_pools_and_changes(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = LedgerFile(path)
    assert ledger.pools() == (PoolRecord("default", 100),)
    assert ledger.save_pool(PoolRecord("A", 30), is_new=True) == PoolRecord("A", 30)
    with pytest.raises(PoolExists, match="set-pool-weight"):
        ledger.save_pool(PoolRecord("A", 40), is_new=True)
    with pytest.raises(NoSuchPool, match="create-pool"):
        ledger.save_pool(PoolRecord("B", 40), is_new=False)
    ledger.save_pool(PoolRecord("A", 50), is_new=False)
    vm = ledger.save_vm(VmRecord("vm1"))
    changed = attrs.evolve(vm, rate=3, session_limit=4)
    assert ledger.update_vm(changed) == changed
    with pytest.raises(NoSuchVm):
        ledger.update_vm(VmRecord("nobody"))
    ledger.close()
    again = LedgerFile(path)
    assert again.pools() == (PoolRecord("A", 50), PoolRecord("default", 100))
    assert again.get_vm("vm1") == changed
    again.close()


def test_default_limits_are_not_rates() -> None:
    """A VM without rates must cost its workers nothing."""
    limits = VmRecord("a").limits
    assert (limits.calls_per_second, limits.bytes_per_second, limits.queue_depth) == (0, 0, 0)
    assert limits.memory_bytes == 0
    assert limits != Limits()  # but what it keeps from the host has an end
