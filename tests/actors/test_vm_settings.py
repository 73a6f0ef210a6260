# SPDX-License-Identifier: Apache-2.0
"""What a VM may be registered with."""

from __future__ import annotations

from typing import Any

import pytest

from vgpu.actors.messages import VmRecord
from vgpu.actors.vm_settings import BadVm, check_name, vm_from

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
    }
    assert vm_from(said) == VmRecord(
        "user1", "A", "high", 1000, 20 * GIB, 5.0, False, 200, 100, 64 * GIB, 127, "express", "0x1f.7"
    )


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
        ({"vm_name": "../a"}, "vm_name is '../a'"),
        ({"pool": "-"}, "pool is '-'"),
        ({"priority": "urgent"}, "priority is 'urgent', expected high, medium, low"),
        ({"weight": 0}, "weight is 0, expected 1 to 1000"),
        ({"weight": 1001}, "weight is 1001"),
        ({"weight": True}, "weight is True"),
        ({"weight": 1.5}, "weight is 1.5"),
        ({"memory_limit_bytes": -1}, "memory_limit_bytes is -1"),
        ({"watchdog_seconds": 0}, "watchdog_seconds is 0"),
        ({"watchdog_seconds": float("nan")}, "watchdog_seconds is nan"),
        ({"watchdog_seconds": True}, "watchdog_seconds is True"),
        ({"rate": -1}, "rate is -1"),
        ({"queue_depth": "many"}, "queue_depth is 'many'"),
        ({"bar1_bytes": 100 * MIB}, "bar1_bytes is 104857600, expected a power of two"),
        ({"bar1_bytes": 8 * MIB}, "expected a power of two from 16 MiB to 64 GiB"),
        ({"bar1_bytes": 128 * GIB}, "bar1_bytes is"),
        (
            {"bar1_bytes": 16 * MIB, "slots": 16},
            "16 slots in a BAR1 of 16 MiB have 960 KiB each, expected 1 MiB",
        ),
        ({"slots": 128}, "slots is 128, expected 1 to 127"),
        ({"variant": "agp"}, "variant is 'agp'"),
        ({"address": "0x5,socket=x"}, "address is '0x5,socket=x', expected a PCI slot like 0x5"),
        ({"address": "5"}, "address is '5'"),
        ({"colour": "red"}, r"unknown parameters \['colour'\]; known are vm_name, pool"),
    ],
)
def test_values_that_cannot_be_meant(said: dict[str, Any], message: str) -> None:
    with pytest.raises(BadVm, match=message):
        vm_from({"vm_name": "a", **said})
