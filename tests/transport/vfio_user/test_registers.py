# SPDX-License-Identifier: Apache-2.0
"""BAR0 from both sides: claims, releases, doorbells, calls; and a hostile guest, who is counted and never obeyed."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgpu.transport.errors import LocalProtocolError
from vgpu.transport.vfio_user import registers as r
from vgpu.transport.vfio_user.device import DEFAULT_BAR1, MIN_BAR1, cut_bar1
from vgpu.transport.vfio_user.registers import Offence, Registers, SlotRegister, SlotState

S = SlotRegister
DOCUMENT = (Path(__file__).resolve().parents[3] / "docs" / "registers.md").read_text()


def at(slot: int, register: int) -> int:
    return r.PAGE * (1 + slot) + register


def u32(registers: Registers, offset: int) -> int:
    return int.from_bytes(registers.read(offset, 4), "little")


def store(registers: Registers, offset: int, value: int, count: int = 4) -> list[r.RegisterEvent]:
    return registers.write(offset, value.to_bytes(count, "little"))


def claim(registers: Registers, slot: int, token: int = 77, pid: int = 1234) -> list[r.RegisterEvent]:
    return store(registers, at(slot, S.OWNER), pid << 32 | token, 8)


def granted(registers: Registers, slot: int, token: int = 77) -> None:
    claim(registers, slot, token)
    assert registers.grant(slot, token, 42, 0x7F0000000000)


def test_identification(registers: Registers) -> None:
    d = r.DeviceRegister
    assert registers.read(d.MAGIC, 4) == b"VGPU"
    assert u32(registers, d.INTERFACE_VERSION) == r.INTERFACE_VERSION
    assert u32(registers, d.SLOT_COUNT) == 2
    assert u32(registers, d.DRIVER_VERSION) == 13000
    assert registers.read(d.TABLE_HASH, 8) == (0x1122334455667788).to_bytes(8, "little")
    assert u32(registers, d.BAR1_SIZE) == MIN_BAR1
    registers.status = r.DeviceStatus.HOST_PRESENT
    assert u32(registers, d.STATUS) == 1
    assert registers.offences.total() == 0


def test_a_claim_is_pending_then_ready_and_one_store_decides_a_race(registers: Registers) -> None:
    assert u32(registers, r.DeviceRegister.FREE_SLOT) == 0
    assert claim(registers, 0, 77, 1234) == [r.ClaimAsked(0, 77, 1234)]
    assert claim(registers, 0, 88, 5678) == []
    assert registers.read(at(0, S.OWNER), 8) == struct.pack("<II", 77, 1234)
    assert u32(registers, at(0, S.STATE)) == SlotState.PENDING
    assert u32(registers, r.DeviceRegister.FREE_SLOT) == 1
    assert registers.grant(0, 88, 1, 1) is False
    assert registers.grant(0, 77, 42, 0x7F0000000000) is True
    assert u32(registers, at(0, S.STATE)) == SlotState.READY
    assert u32(registers, at(0, S.SLOT)) == 0
    assert registers.read(at(0, S.SESSION), 8) == struct.pack("<Q", 42)
    assert registers.read(at(0, S.WORKER_ADDRESS), 8) == struct.pack("<Q", 0x7F0000000000)
    claim(registers, 1)
    assert u32(registers, r.DeviceRegister.FREE_SLOT) == r.NO_SLOT
    assert u32(registers, at(1, S.SLOT)) == 1
    assert registers.offences.total() == 0, "losing a race is no offence"


def test_a_refusal_is_read_and_released(registers: Registers) -> None:
    claim(registers, 0)
    assert registers.refuse(0, 77, 1, 250)
    assert registers.read(at(0, S.REFUSAL), 8) == struct.pack("<II", 1, 250)
    assert store(registers, at(0, S.RELEASE), 77) == [r.ReleaseAsked(0)]
    assert registers.refuse(0, 77, 1) is False
    registers.free(0)
    assert registers.state(0) is SlotState.FREE
    assert registers.owner(0) == (0, 0)


def test_a_slot_is_not_given_again_before_the_host_frees_it(registers: Registers) -> None:
    granted(registers, 0)
    with pytest.raises(LocalProtocolError):
        registers.free(0)
    store(registers, at(0, S.RELEASE), 77)
    assert claim(registers, 0, 99) == []
    assert u32(registers, at(0, S.STATE)) == SlotState.RELEASING
    registers.free(0)
    assert claim(registers, 0, 99) == [r.ClaimAsked(0, 99, 1234)]


def test_release_of_others_is_refused(registers: Registers) -> None:
    granted(registers, 0)
    assert store(registers, at(0, S.RELEASE), 78) == []
    assert store(registers, at(1, S.RELEASE), 77) == []
    assert registers.state(0) is SlotState.READY
    assert registers.offences == {Offence.TOKEN: 1, Offence.STATE: 1}
    assert u32(registers, r.DeviceRegister.REFUSED_ACCESSES) == 2


def test_the_host_takes_a_slot_back(registers: Registers) -> None:
    assert registers.release(0) == []
    granted(registers, 0)
    assert registers.release(0) == [r.ReleaseAsked(0)]
    assert registers.release(0) == []
    assert registers.view(0) == r.SlotView(SlotState.RELEASING, 77, 1234, 0, 0, 42, 0x7F0000000000)
    registers.free(0)
    assert registers.view(0) == r.SlotView(SlotState.FREE, 0, 0, 0, 0, 0, 0)


def test_reset_asks_for_every_owned_slot_once(registers: Registers) -> None:
    granted(registers, 1)
    assert registers.reset() == [r.ReleaseAsked(1, by_reset=True)]
    assert registers.reset() == []
    assert registers.state(1) is SlotState.RELEASING
    assert u32(registers, r.DeviceRegister.GENERATION) == 2
    assert registers.complete_call(1, bytes(40)) is False


def test_doorbell_and_end(registers: Registers) -> None:
    assert store(registers, at(0, S.DOORBELL), 1) == []
    granted(registers, 0)
    assert store(registers, at(0, S.DOORBELL), 1) == [r.DoorbellRung(0)]
    registers.end(0)
    assert u32(registers, at(0, S.STATE)) == SlotState.DEAD
    assert store(registers, at(0, S.DOORBELL), 1) == []
    assert registers.offences == {Offence.STATE: 2}
    registers.end(1)
    assert registers.state(1) is SlotState.FREE


def test_a_call_through_registers(registers: Registers) -> None:
    granted(registers, 0)
    header = struct.pack("<HHIIHH8Q", 5, 1, 12, 1, 0, 0, *range(8))
    for offset in range(0, 80, 8):
        assert registers.write(at(0, S.CALL_HEADER) + offset, header[offset : offset + 8]) == []
    for offset in range(0, 12, 4):
        registers.write(at(0, r.CALL_DATA_OFFSET) + offset, b"payload--end"[offset : offset + 4])
    assert store(registers, at(0, S.CALL_SUBMIT), 1) == []
    assert store(registers, at(0, S.CALL_SUBMIT), 77) == [r.CallSubmitted(0, header, b"payload--end")]
    assert u32(registers, at(0, S.CALL_STATE)) == r.CallState.BUSY
    assert store(registers, at(0, S.CALL_SUBMIT), 77) == []
    assert store(registers, at(0, S.CALL_HEADER), 0) == []
    assert registers.offences == {Offence.TOKEN: 1, Offence.STATE: 2}
    assert registers.complete_call(0, b"r" * 40, b"answer!!") is True
    assert registers.complete_call(0, b"r" * 40) is False
    assert u32(registers, at(0, S.CALL_STATE)) == r.CallState.DONE
    assert u32(registers, at(0, S.CALL_RESULT_LENGTH)) == 8
    assert registers.read(at(0, S.CALL_RESULT), 8) == b"r" * 8
    assert registers.read(at(0, r.CALL_DATA_OFFSET), 8) == b"answer!!"
    with pytest.raises(LocalProtocolError):
        registers.complete_call(0, b"short")


def test_limit_of_a_calls_payload(registers: Registers) -> None:
    granted(registers, 0)
    store(registers, at(0, S.CALL_HEADER) + 4, r.CALL_DATA_SIZE + 1)
    assert store(registers, at(0, S.CALL_SUBMIT), 77) == []
    assert registers.offences == {Offence.RANGE: 1}
    store(registers, at(0, S.CALL_HEADER) + 4, r.CALL_DATA_SIZE)
    assert len(store(registers, at(0, S.CALL_SUBMIT), 77)) == 1


@pytest.mark.parametrize(
    ("offset", "count", "offence"),
    [
        (0x00, 1, Offence.WIDTH),
        (0x00, 2, Offence.WIDTH),
        (0x00, 3, Offence.WIDTH),
        (0x00, 4096, Offence.WIDTH),
        (0x02, 4, Offence.ALIGNMENT),
        (0x04, 8, Offence.ALIGNMENT),
        (0xF00, 4, Offence.RANGE),
        (3 * r.PAGE, 4, Offence.RANGE),
        (at(0, 0x300), 4, Offence.RANGE),
    ],
)
def test_a_wrong_read_gives_ones_and_is_counted(
    registers: Registers, offset: int, count: int, offence: Offence
) -> None:
    assert registers.read(offset, count) == b"\xff" * count
    assert registers.offences == {offence: 1}


@pytest.mark.parametrize(
    ("offset", "data", "offence"),
    [
        (0x00, bytes(4), Offence.READ_ONLY),
        (at(0, S.STATE), bytes(4), Offence.READ_ONLY),
        (at(0, S.SESSION), bytes(8), Offence.READ_ONLY),
        (at(0, S.OWNER), b"\1\0\0\0", Offence.WIDTH),
        (at(0, S.OWNER), bytes(8), Offence.TOKEN),
        (at(0, S.OWNER), b"\xff" * 4 + bytes(4), Offence.TOKEN),
        (at(0, S.RELEASE), bytes(8), Offence.WIDTH),  # stands on a multiple of 8
        (at(0, S.DOORBELL), b"\1", Offence.WIDTH),
        (at(2, S.OWNER), b"\1" * 8, Offence.RANGE),
        (at(500, S.OWNER), b"\1" * 8, Offence.RANGE),
        (at(0, S.CALL_HEADER), bytes(4), Offence.STATE),
        (at(0, r.CALL_DATA_OFFSET), bytes(4), Offence.STATE),
        (at(0, S.OWNER) + 1, bytes(8), Offence.ALIGNMENT),
    ],
)
def test_a_wrong_write_does_nothing_and_is_counted(
    registers: Registers, offset: int, data: bytes, offence: Offence
) -> None:
    assert registers.write(offset, data) == []
    assert registers.offences == {offence: 1}
    assert [registers.state(slot) for slot in (0, 1)] == [SlotState.FREE] * 2


def test_geometry() -> None:
    cut = cut_bar1()
    assert (cut.bar1_size, cut.slot_count, cut.bar0_size) == (DEFAULT_BAR1, 8, 65536)
    assert cut.slot_offset(7) + cut.slot_size <= DEFAULT_BAR1
    assert cut_bar1(64 << 30, r.MAX_SLOTS).bar0_size == 128 * r.PAGE
    for size, slots in ((MIN_BAR1, 0), (MIN_BAR1, 128), (MIN_BAR1 - 1, 1), (8 << 20, 1), (128 << 30, 1)):
        with pytest.raises(ValueError):
            cut_bar1(size, slots)


ACCESS = st.tuples(
    st.one_of(
        st.sampled_from([at(slot, reg) for slot in (0, 1, 2) for reg in S]), st.integers(0, 4 * r.PAGE)
    ),
    st.one_of(
        st.sampled_from([struct.pack("<I", 77), struct.pack("<II", 77, 1), struct.pack("<I", 1)]),
        st.binary(min_size=1, max_size=16),
    ),
    st.sampled_from(["write", "read", "reset", "grant", "free"]),
)


@given(st.lists(ACCESS, max_size=40))
def test_whatever_a_guest_does_is_answered(accesses: list[tuple[int, bytes, str]]) -> None:
    registers = Registers(cut_bar1(MIN_BAR1, 2))
    for offset, data, what in accesses:
        if what == "write":
            for event in registers.write(offset, data):
                assert 0 <= event.slot < 2
        elif what == "read":
            assert len(registers.read(offset, len(data))) == len(data)
        elif what == "reset":
            registers.reset()
        for slot in (0, 1):
            if what == "grant":
                registers.grant(slot, 77, 1, 1)
            elif what == "free" and registers.state(slot) is SlotState.RELEASING:
                registers.free(slot)
    for slot in (0, 1):
        assert (registers.state(slot) is SlotState.FREE) == (registers.owner(slot) == (0, 0))


@pytest.mark.parametrize("enumeration", [r.DeviceRegister, r.SlotRegister])
def test_the_document_lists_every_register(enumeration: type[r.DeviceRegister | r.SlotRegister]) -> None:
    listed = {
        name: int(offset, 16) for offset, name in re.findall(r"\| `(0x[0-9a-f]+)` \| `(\w+)`", DOCUMENT)
    }
    assert {member.name: member.value for member in enumeration}.items() <= listed.items()


@pytest.mark.parametrize("enumeration", [r.SlotState, r.CallState, r.DeviceStatus])
def test_the_document_lists_every_value(
    enumeration: type[r.SlotState | r.CallState | r.DeviceStatus],
) -> None:
    for member in enumeration:
        assert f"{member.value} {member.name}" in DOCUMENT
