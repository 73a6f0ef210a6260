# SPDX-License-Identifier: Apache-2.0
"""Configuration space as a guest's kernel reads it, and what a guest may change."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgpu.transport.vfio_user.pci import ConfigurationSpace, Variant

BOTH = pytest.mark.parametrize("variant", Variant)


def number(space: ConfigurationSpace, offset: int, count: int) -> int:
    return int.from_bytes(space.read(offset, count), "little")


def capabilities(space: ConfigurationSpace) -> dict[int, int]:
    """Capability id -> offset, walked as the kernel walks them."""
    found: dict[int, int] = {}
    at = number(space, 0x34, 1)
    while at:
        assert at % 4 == 0
        assert at not in found.values()
        found[number(space, at, 1)] = at
        at = number(space, at + 1, 1)
    return found


@BOTH
def test_identity(variant: Variant) -> None:
    space = ConfigurationSpace(variant)
    assert [number(space, offset, 2) for offset in (0x00, 0x02, 0x2C, 0x2E)] == [
        0x10DE,
        0x2331,
        0x10DE,
        0x16C1,
    ]
    assert number(space, 0x08, 4) == 0x030200A1
    assert number(space, 0x0E, 1) == 0
    assert number(space, 0x06, 2) == 0x0010
    assert number(space, 0x10, 4) == 0
    assert number(space, 0x14, 4) == 0xC
    assert number(space, 0x3D, 1) == 0, "no interrupt pin"


def test_capabilities_of_either_variant() -> None:
    assert capabilities(ConfigurationSpace(Variant.CONVENTIONAL)) == {0x01: 0x40}
    express = ConfigurationSpace(Variant.EXPRESS)
    assert capabilities(express) == {0x01: 0x40, 0x10: 0x60}
    assert (ConfigurationSpace(Variant.CONVENTIONAL).size, express.size) == (256, 4096)
    assert number(express, 0x62, 2) & 0xF0 == 0, "an endpoint"
    assert number(express, 0x64, 4) & 1 << 28, "function-level reset"
    for register in (0x6C, 0x72):
        assert number(express, register, 2) & 0xF == 5, "32 GT/s"
        assert number(express, register, 2) >> 4 & 0x3F == 16, "x16"
    assert number(express, 0x8C, 4) >> 1 == 0x1F, "all five speeds"
    assert number(express, 0x100, 4) == 0, "no extended capability"


@BOTH
def test_the_command_register_is_kept_and_status_is_not_written(variant: Variant) -> None:
    space = ConfigurationSpace(variant)
    assert not space.memory_enabled
    assert space.write(0x04, b"\x06\x04\xff\xff") is False
    assert number(space, 0x04, 4) == 0x00100406
    assert space.memory_enabled
    space.write(0x04, b"\x01\x00")
    assert number(space, 0x04, 2) == 0, "there are no I/O ports"


@BOTH
@pytest.mark.parametrize(
    "offset", [0x00, 0x08, 0x0E, 0x10, 0x14, 0x18, 0x1C, 0x20, 0x24, 0x2C, 0x30, 0x34, 0x40]
)
def test_bars_rom_and_identity_ignore_writes(variant: Variant, offset: int) -> None:
    space = ConfigurationSpace(variant)
    before = space.read(offset, 4)
    assert space.write(offset, b"\xff" * (4 if offset != 0x0E else 1)) is False
    assert space.read(offset, 4) == before


def test_power_states() -> None:
    space = ConfigurationSpace()
    space.write(0x44, b"\x03\x00")
    assert number(space, 0x44, 2) == 0xB
    space.write(0x44, b"\x01\x00")
    assert number(space, 0x44, 2) == 0xB, "there is no D1"
    space.write(0x44, b"\xfc\xff")
    assert number(space, 0x44, 2) == 0x8


def test_function_level_reset_is_asked_for_and_not_latched() -> None:
    space = ConfigurationSpace(Variant.EXPRESS)
    assert space.write(0x68, b"\x10\xa9") is True
    assert number(space, 0x68, 2) == 0x2910
    assert space.write(0x68, b"\x10\x29") is False
    assert space.write(0x68, b"\xff") is False
    assert space.write(0x69, b"\x80") is True
    space.reset()
    assert number(space, 0x68, 2) == 0x2910
    conventional = ConfigurationSpace(Variant.CONVENTIONAL)
    assert conventional.write(0x68, b"\x10\xa9") is False
    assert number(conventional, 0x68, 2) == 0


def test_the_audio_switch_is_tolerated() -> None:
    space = ConfigurationSpace(Variant.EXPRESS)
    assert number(space, 0x488, 4) == 0
    assert space.write(0x488, b"\xff\xff\xff\xff") is False
    assert number(space, 0x488, 4) == 1 << 25
    assert number(space, 0x0E, 1) == 0, "and no second function appears"


@given(st.sampled_from(list(Variant)), st.integers(0, 5000), st.binary(max_size=64), st.integers(0, 64))
def test_any_access_is_answered(variant: Variant, offset: int, data: bytes, count: int) -> None:
    space = ConfigurationSpace(variant)
    asked = space.write(offset, data)
    assert asked == (
        variant is Variant.EXPRESS and offset <= 0x69 < offset + len(data) and data[0x69 - offset] >= 0x80
    )
    assert len(space.read(offset, count)) == count
    assert space.read(0, 4) == b"\xde\x10\x31\x23"
    space.reset()
    assert space == ConfigurationSpace(variant)
