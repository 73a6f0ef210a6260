# SPDX-License-Identifier: Apache-2.0
"""What a VM may be registered with."""

from __future__ import annotations

from typing import Any

import pytest

from vgpu.actors.messages import PoolRecord, VmRecord
from vgpu.actors.vm_settings import BadVm, changes_from, check_name, pool_from, vm_from
from vgpu.transport.account import Limits

MIB, GIB = 1 << 20, 1 << 30


def test_what_is_not_said_has_its_default() -> None:
    assert vm_from({"vm_name": "a"}) == VmRecord("a")


def test_everything_that_can_be_said() -> None:
    said = {
        "vm_name": "user1",
        "pool": "A",
        "priority": "high",
        "weight": 1000,
        "memory_limit_bytes": 20 * GIB,
        "watchdog_seconds": 5,
        "rate": 200,
        "queue_depth": 100,
        "bar1_bytes": 64 * GIB,
        "slots": 127,
        "variant": "express",
        "address": "0x1f.7",
        "bytes_per_second": 3 * GIB,
        "session_limit": 3,
        "arena_limit_bytes": 4 * GIB,
        "module_limit": 5,
        "handle_limit": 6,
    }
    vm = VmRecord(
        "user1", "A", "high", 1000, 20 * GIB, 5.0, False, 200, 100, 64 * GIB, 127, "express", "0x1f.7",
        3 * GIB, 3, 4 * GIB, 5, 6,
    )  # fmt: skip
    assert vm_from(said) == vm
    assert vm.limits == Limits(20 * GIB, 4 * GIB, 5, 6, 200, 3 * GIB, 100)


@pytest.mark.parametrize("name", ["a", "user-1.example_X", "_", "0", "a" * 63])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "-a", "a/b", "a b", "a\n", "a" * 64, "ä", "a\0", None, 5, ["a"]]
)
def test_names_that_are_none(name: object) -> None:
    with pytest.raises(BadVm, match="expected 1 to 63 of letters"):
        check_name(name)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"vm_name": "../a"}, "the VM's name is '../a'"),
        ({"pool": "-"}, "--pool is '-'"),
        ({"priority": "urgent"}, "--priority is 'urgent', expected high, medium, low"),
        ({"weight": 0}, "--weight is 0, expected 1 to 1000"),
        ({"weight": 1001}, "--weight is 1001"),
        ({"weight": True}, "--weight is True"),
        ({"weight": 1.5}, "--weight is 1.5"),
        ({"memory_limit_bytes": -1}, "--memory is -1 bytes, expected up to 4 EiB, 0 for the whole card"),
        ({"memory_limit_bytes": 8 << 60}, "--memory is 8 EiB"),
        ({"watchdog_seconds": 0}, "--watchdog is 0 s, expected more than 0 and at most a day"),
        ({"watchdog_seconds": 86400.5}, "--watchdog is 86400.5 s"),
        ({"watchdog_seconds": float("nan")}, "--watchdog is nan s"),
        ({"watchdog_seconds": float("inf")}, "--watchdog is inf s"),
        ({"watchdog_seconds": 10**400}, "--watchdog is 1000000"),
        ({"watchdog_seconds": True}, "--watchdog is True"),
        ({"rate": -1}, "--rate is -1"),
        ({"rate": 10**9 + 1}, "--rate is 1000000001, expected calls a second up to 1000000000"),
        ({"queue_depth": "many"}, "--queue-depth is 'many'"),
        (
            {"bytes_per_second": 0.5},
            "--bytes-per-second is 0.5, expected up to 4 EiB a second, 0 for no limit",
        ),
        ({"arena_limit_bytes": -4096}, "--max-arena is -4 KiB, expected up to 4 EiB, 0 for no limit"),
        ({"module_limit": -1}, "--max-modules is -1"),
        ({"handle_limit": -1}, "--max-handles is -1"),
        ({"session_limit": 0}, "--max-sessions is 0, expected 1 to 254"),
        ({"session_limit": 255}, "--max-sessions is 255"),
        ({"bar1_bytes": 100 * MIB}, "--bar1 is 100 MiB, expected a power of two"),
        ({"bar1_bytes": 100_000_001}, "--bar1 is 100000001 bytes"),
        ({"bar1_bytes": 8 * MIB}, "--bar1 is 8 MiB, expected a power of two from 16 MiB to 64 GiB"),
        ({"bar1_bytes": 128 * GIB}, "--bar1 is 128 GiB, expected a power of two from 16 MiB to 64 GiB"),
        ({"bar1_bytes": "256MiB"}, "--bar1 is '256MiB'"),
        (
            {"bar1_bytes": 16 * MIB, "slots": 16},
            "16 slots in a BAR1 of 16 MiB have 960 KiB each, expected 1 MiB or more: a smaller --slots, or a larger --bar1",
        ),
        ({"slots": 128}, "--slots is 128, expected 1 to 127"),
        ({"variant": "agp"}, "--bus is 'agp'"),
        (
            {"address": "0x5,socket=x"},
            "--kernel-addr is '0x5,socket=x', expected a PCI slot from 0x0 to 0x1f",
        ),
        ({"address": "5"}, "--kernel-addr is '5'"),
        ({"address": "0x20"}, "--kernel-addr is '0x20', expected a PCI slot from 0x0 to 0x1f like 0x5"),
        ({"address": "0x40"}, "--kernel-addr is '0x40'"),
        ({"address": "0x005"}, "--kernel-addr is '0x005'"),
        ({"address": "0x1f.8"}, "expected .* or one with a function like 0x5.1"),
        ({"address": "0x5\n"}, "--kernel-addr is"),
        ({"colour": "red"}, r"unknown parameters \['colour'\]; known are vm_name, pool"),
    ],
)
def test_values_that_cannot_be_meant(said: dict[str, Any], message: str) -> None:
    with pytest.raises(BadVm, match=message):
        vm_from({"vm_name": "a", **said})


@pytest.mark.parametrize("address", ["0x0", "0x00", "0x5", "0x05", "0x1f", "0x10.7"])
def test_every_slot_of_a_bus_may_be_named(address: str) -> None:
    assert vm_from({"vm_name": "a", "address": address}).address == address


def test_a_vm_may_have_a_session_in_each_of_its_slots() -> None:
    assert vm_from({"vm_name": "a", "bar1_bytes": GIB, "slots": 127}).session_limit == 127


def test_what_may_be_changed_of_a_vm_that_runs() -> None:
    assert changes_from({"rate": 5, "pool": "B", "memory_limit_bytes": 0}) == {
        "rate": 5,
        "pool": "B",
        "memory_limit_bytes": 0,
    }
    for said in ({}, {"slots": 4}, {"name": "b"}, {"ad_hoc": True}):
        with pytest.raises(BadVm, match="expected some of pool, priority"):
            changes_from(said)
    with pytest.raises(BadVm, match="--weight is 0"):
        changes_from({"rate": 5, "weight": 0})


def test_pools() -> None:
    assert pool_from({"pool": "A"}) == PoolRecord("A", 100)
    assert pool_from({"pool": "A", "weight": 3}) == PoolRecord("A", 3)
    for said in ({}, {"pool": "a/b"}, {"pool": "A", "weight": 0}, {"pool": "A", "colour": 1}):
        with pytest.raises(BadVm):
            pool_from(said)
