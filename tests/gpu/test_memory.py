# SPDX-License-Identifier: Apache-2.0
"""The software GPU's address space against a plain model, and each of its limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vgpu.gpu.software.memory import PAGE, AddressSpace, IllegalAddress, MisalignedAddress

WINDOW = 0x7FFF_0000_0000


@pytest.fixture
def space() -> AddressSpace:
    return AddressSpace(64 << 20)


def test_bytes_come_back(space: AddressSpace) -> None:
    address = space.allocate(1000)
    assert address % 256 == 0
    space.write(address, bytes(range(256)) * 3)
    assert space.read(address + 1, 300) == (bytes(range(256)) * 3)[1:301]
    space.view(address, 4)[:] = 9
    assert space.read(address, 5) == bytes([9, 9, 9, 9, 4])
    assert space.find(address + 999) == (address, 1000)
    assert space.find(address + 1000) is None


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (1000, 1), (999, 2), (0, 1001), (1 << 40, 8)])
def test_outside_is_illegal(space: AddressSpace, offset: int, size: int) -> None:
    address = space.allocate(1000)
    space.allocate(1000)
    with pytest.raises(IllegalAddress):
        space.read(address + offset, size)
    with pytest.raises(IllegalAddress) as caught:
        space.write(address + offset, bytes(size))
    assert caught.value.is_write


def test_freed_memory_is_illegal_and_used_again(space: AddressSpace) -> None:
    first, second, third = (space.allocate(10 << 20) for _ in range(3))
    space.free(second)
    with pytest.raises(IllegalAddress):
        space.read(second, 1)
    with pytest.raises(KeyError):
        space.free(second)
    with pytest.raises(KeyError):
        space.free(first + 256)
    assert space.allocate(10 << 20) == second
    assert space.used == 30 << 20
    space.free(third)
    assert space.used == 20 << 20


def test_capacity_is_a_limit(space: AddressSpace) -> None:
    whole = space.allocate(64 << 20)
    with pytest.raises(MemoryError, match="0 of"):
        space.allocate(1)
    space.free(whole)
    assert space.allocate(64 << 20) == whole


def test_large_freed_pages_go_back_to_the_host(space: AddressSpace) -> None:
    address = space.allocate(4 << 20)
    space.view(address, 4 << 20)[:] = 1
    space.free(address)
    assert space.allocate(4 << 20) == address
    assert not space.view(address, 4 << 20).any()


def test_windows_are_the_buffer_itself(space: AddressSpace) -> None:
    buffer = np.zeros(100, np.uint8)
    space.map_window(WINDOW, buffer)
    space.write(WINDOW + 10, b"abc")
    assert buffer[10:13].tobytes() == b"abc"
    with pytest.raises(ValueError, match="in use"):
        space.map_window(WINDOW + 96, np.zeros(16, np.uint8))
    with pytest.raises(ValueError, match="in use"):
        space.map_window(WINDOW - 16, np.zeros(32, np.uint8))
    with pytest.raises(ValueError, match="multiple"):
        space.map_window(WINDOW + 1001, np.zeros(16, np.uint8))
    with pytest.raises(KeyError):
        space.free(WINDOW)
    space.unmap_window(WINDOW)
    with pytest.raises(IllegalAddress):
        space.read(WINDOW, 1)
    with pytest.raises(KeyError):
        space.unmap_window(WINDOW)


def test_read_only_window(space: AddressSpace) -> None:
    buffer = np.arange(64, dtype=np.uint8)
    buffer.flags.writeable = False
    space.map_window(WINDOW, buffer)
    assert space.read(WINDOW + 5, 2) == b"\x05\x06"
    with pytest.raises(IllegalAddress):
        space.write(WINDOW, b"x")
    with pytest.raises(IllegalAddress):
        space.locate(np.array([WINDOW], np.uint64), 4, 4, True)


def lanes(space: AddressSpace, addresses: list[int], width: int, element: int | None = None) -> list[int]:
    """What the executor does to gather."""
    asked = np.array(addresses, dtype=np.uint64)
    out = np.zeros(len(addresses), np.uint64)
    for where, memory, index in space.locate(asked, element or width, width, False):
        out[slice(None) if where is None else where] = memory[index]
    return out.tolist()


def test_lanes_across_allocations_windows_and_mappings(space: AddressSpace) -> None:
    first, second = space.allocate(64), space.allocate(4096)
    window = np.arange(16, dtype=np.uint32).view(np.uint8)
    space.map_window(WINDOW, window)
    reserved = space.reserve(2 * PAGE)
    physical = space.create_physical(PAGE)
    space.map(reserved + PAGE, physical)
    space.set_access(reserved + PAGE, PAGE, readable=True, writable=True)
    for number, address in enumerate((first, second, reserved + PAGE)):
        space.write(address, np.arange(number * 100, number * 100 + 16, dtype=np.uint32).tobytes())
    assert lanes(space, [first + 8, first], 4) == [2, 0]
    assert lanes(space, [second + 4, first + 60, second], 4) == [101, 15, 100]
    assert lanes(space, [WINDOW + 4, second, reserved + PAGE + 8, WINDOW], 4) == [1, 100, 202, 0]
    assert lanes(space, [WINDOW + 8, first + 16], 8, 4) == [2, 4]
    for bad in (
        first + 64,
        first - 4,
        second + 4096,
        WINDOW + 64,
        reserved,
        reserved + 2 * PAGE,
        0,
        2**64 - 4,
    ):
        with pytest.raises(IllegalAddress) as caught:
            lanes(space, [first, bad, second], 4)
        assert caught.value.address == bad
    with pytest.raises(MisalignedAddress) as misaligned:
        lanes(space, [first, second + 6], 4)
    assert misaligned.value.address == second + 6
    with pytest.raises(IllegalAddress):  # 8 bytes at the last 4
        lanes(space, [first + 60 - 4, first + 64], 8)


def test_virtual_memory(space: AddressSpace) -> None:
    base = space.reserve(32 << 30)  # as large as an engine's address pool; costs nothing until mapped
    physical = [space.create_physical(PAGE) for _ in range(2)]
    assert space.used == 2 * PAGE
    space.map(base, physical[0])
    space.map(base + PAGE, physical[1])
    with pytest.raises(IllegalAddress):
        space.read(base, 1)  # no access yet
    space.set_access(base, 2 * PAGE, readable=True, writable=True)
    space.write(base + PAGE - 2, b"abcd")  # across two mappings
    assert space.read(base + PAGE - 2, 4) == b"abcd"
    with pytest.raises(ValueError, match="in use"):
        space.map(base + PAGE, physical[0])
    with pytest.raises(ValueError, match="still mapped"):
        space.release(base)
    # the same memory at a second address
    alias = space.reserve(PAGE, fixed=base + (64 << 30))
    assert alias == base + (64 << 30)
    space.map(alias, physical[1])
    space.set_access(alias, PAGE, readable=True, writable=False)
    assert space.read(alias, 2) == b"cd"
    with pytest.raises(IllegalAddress):
        space.write(alias, b"x")
    for handle in physical:
        space.release_physical(handle)
    assert space.used == 0
    assert space.read(alias, 2) == b"cd"  # mappings keep the bytes
    for address in (base, base + PAGE, alias):
        space.unmap(address)
        with pytest.raises(IllegalAddress):
            space.read(address, 1)
    space.release(base)
    space.release(alias)
    with pytest.raises(KeyError):
        space.release(alias)
    with pytest.raises(KeyError):
        space.release_physical(physical[0])
    with pytest.raises(KeyError):
        space.unmap(base)


def test_reservations_refuse_what_makes_no_sense(space: AddressSpace) -> None:
    with pytest.raises(ValueError, match="multiple"):
        space.reserve(4096)
    with pytest.raises(ValueError, match="multiple"):
        space.create_physical(4096)
    with pytest.raises(MemoryError):
        space.create_physical(66 << 20)
    base = space.reserve(PAGE)
    assert space.reserve(PAGE, fixed=base) != base  # the wish cannot be granted
    physical = space.create_physical(2 * PAGE)
    with pytest.raises(KeyError):
        space.map(base, physical)
    with pytest.raises(KeyError):
        space.set_access(base, PAGE, readable=True, writable=True)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 5000), st.sampled_from([16, 256, 4096]), st.booleans()), max_size=60)
)
def test_allocations_never_overlap(steps: list[tuple[int, int, bool]]) -> None:
    space = AddressSpace(256 << 10)
    live: dict[int, int] = {}
    for size, alignment, drop in steps:
        if drop and live:
            address = next(iter(live))
            del live[address]
            space.free(address)
            continue
        try:
            address = space.allocate(size, alignment)
        except MemoryError:
            continue
        assert address % alignment == 0
        assert all(address + size <= base or base + length <= address for base, length in live.items())
        live[address] = size
    assert space.used == sum(live.values())
    for address in list(live):
        space.free(address)
    assert space.find(space.allocate(256 << 10)) is not None
