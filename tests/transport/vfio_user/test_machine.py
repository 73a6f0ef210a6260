# SPDX-License-Identifier: Apache-2.0
"""The protocol core by bytes: whole, byte by byte, with trailing data; every order, every limit, no descriptor lost."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vgpu.transport.errors import LocalProtocolError, RemoteProtocolError
from vgpu.transport.vfio_user import machine as vm
from vgpu.transport.vfio_user import messages as m

BAR1 = 1 << 24


def make(descriptor: int = 0) -> vm.ServerMachine:
    access = m.RegionFlag.READ | m.RegionFlag.WRITE
    regions = [vm.Region(index) for index in range(9)]
    regions[0] = vm.Region(0, 16384, access)
    regions[1] = vm.Region(1, BAR1, access | m.RegionFlag.MMAP, ((0, BAR1),), descriptor)
    regions[7] = vm.Region(7, 256, access)
    regions[8] = vm.Region(8, 4096, m.RegionFlag.READ)
    return vm.ServerMachine(regions, [m.IrqInfo(i, int(i == 3), int(i == 3)) for i in range(5)])


def message(command: int, payload: bytes = b"", message_id: int = 7, flags: int = 0) -> bytes:
    return m.Header(message_id, command, 16 + len(payload), flags).encode() + payload


HELLO = message(m.Command.VERSION, m.Version(0, 0, {"max_msg_fds": 16, "pad": "x" * 200}).encode())


def ready(descriptor: int = 0) -> vm.ServerMachine:
    machine = make(descriptor)
    assert machine.receive_data(HELLO) == [vm.Negotiated({"max_msg_fds": 16, "pad": "x" * 200})]
    machine.data_to_send()
    return machine


def pipes(count: int) -> list[int]:
    return [os.dup(0) for _ in range(count)]


def errors(machine: vm.ServerMachine) -> list[int]:
    """The errno of every reply, 0 for success."""
    found = []
    for reply in machine.data_to_send():
        header = m.Header.decode(reply.data[:16])
        assert header.size == len(reply.data)
        assert header.is_reply
        found.append(header.error if header.flags & m.MessageFlag.ERROR else 0)
    return found


# message, events, reply payload
EXCHANGES: dict[str, tuple[bytes, list[vm.Event], bytes]] = {
    "map": (message(m.Command.DMA_MAP, m.DmaMap(4096, 8192).encode()), [vm.DmaMapped(4096, 8192)], b""),
    "info": (
        message(m.Command.GET_INFO, m.DeviceInfo(0, 0, 0).encode()),
        [],
        struct.pack("<IIII", 16, 3, 9, 5),
    ),
    "region": (
        message(m.Command.GET_REGION_INFO, m.RegionInfo(7).encode_request()),
        [],
        struct.pack("<IIIIQQ", 32, 3, 7, 0, 256, 0),
    ),
    "short": (
        message(m.Command.GET_REGION_INFO, m.RegionInfo(1).encode_request()),
        [],
        struct.pack("<IIIIQQ", 64, 7, 1, 0, BAR1, 0),
    ),
    "irq": (
        message(m.Command.GET_IRQ_INFO, m.IrqInfo(3).encode()),
        [],
        struct.pack("<IIII", 16, 1, 3, 1),
    ),
    "no-msix": (
        message(m.Command.GET_IRQ_INFO, m.IrqInfo(2).encode()),
        [],
        struct.pack("<IIII", 16, 0, 2, 0),
    ),
    "disable": (message(m.Command.SET_IRQS, m.SetIrqs(2, 0, 0, 0x21).encode()), [], b""),
    "all": (
        message(m.Command.DMA_UNMAP, m.DmaUnmap(0, 0, m.UNMAP_ALL).encode()),
        [vm.DmaUnmapped(0, 0)],
        struct.pack("<IIQQ", 24, 2, 0, 0),
    ),
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_an_exchange_whole_and_byte_by_byte_and_with_trailing_data(name: str) -> None:
    data, events, answer = EXCHANGES[name]
    whole = ready()
    assert whole.receive_data(data) == events
    (reply,) = whole.data_to_send()
    assert reply.data[16:] == answer
    assert m.Header.decode(reply.data[:16]).message_id == 7

    slow = ready()
    for byte in data[:-1]:
        assert slow.receive_data(bytes([byte])) == []
        assert slow.data_to_send() == []
    assert slow.receive_data(data[-1:]) == events
    assert slow.data_to_send() == [reply]

    more = ready()
    assert more.receive_data(data + b"\1\2\3") == events
    assert more.data_to_send() == [reply]
    assert more.bytes_wanted == 13


def test_bytes_wanted_never_crosses_a_message() -> None:
    machine, stream, at = make(), HELLO + EXCHANGES["map"][0] + EXCHANGES["info"][0], 0
    ends = {len(HELLO), len(HELLO) + 48, len(HELLO) + 48 + 32}
    passed = set()
    while at < len(stream):
        wanted = machine.bytes_wanted
        machine.receive_data(stream[at : at + wanted])
        at += wanted
        passed.add(at)
    assert ends <= passed


def test_the_answer_to_version_is_no_longer_than_the_question() -> None:
    for capabilities, has_json in (({"x": "y" * 200}, True), ({}, False)):
        machine = make()
        question = m.Version(0, 0, dict(capabilities)).encode()
        machine.receive_data(message(m.Command.VERSION, question))
        (reply,) = machine.data_to_send()
        assert len(reply.data) - 16 <= len(question)
        assert bool(m.Version.decode(reply.data[16:]).capabilities) is has_json


def test_the_descriptor_of_a_region_is_lent_with_the_second_answer() -> None:
    machine = ready(descriptor=2)
    machine.receive_data(message(m.Command.GET_REGION_INFO, m.RegionInfo(1, argsz=64).encode_request()))
    (reply,) = machine.data_to_send()
    assert reply.descriptors == (2,)
    assert m.RegionInfo.decode(reply.data[16:]).areas == ((0, BAR1),)
    os.fstat(2)


def test_reads_and_writes_wait_for_the_answer() -> None:
    machine = ready()
    read = message(m.Command.REGION_READ, m.RegionAccess(7, 0, 4).encode(), 1)
    write = message(m.Command.REGION_WRITE, m.RegionAccess(0, 8, 4).encode(b"abcd"), 2)
    first, second, third = machine.receive_data(read + write + message(m.Command.RESET, b"", 3))
    assert machine.data_to_send() == []
    assert first == vm.RegionRead(1, 7, 0, 4)
    assert second == vm.RegionWrite(2, 0, 8, b"abcd")
    assert isinstance(first, vm.RegionRead)
    assert isinstance(second, vm.RegionWrite)
    assert isinstance(third, vm.ResetAsked)
    machine.answer_write(second)
    machine.answer_read(first, b"wxyz")
    machine.answer_reset(third)
    out = [reply.data for reply in machine.data_to_send()]
    assert out[0][16:] == m.RegionAccess(0, 8, 4).encode()
    assert out[1][16:] == m.RegionAccess(7, 0, 4).encode(b"wxyz")
    assert out[2] == m.Header(3, m.Command.RESET, 16, 1).encode()
    with pytest.raises(LocalProtocolError):
        machine.answer_read(first, b"wxyz")


def test_an_answer_of_the_wrong_length_is_our_mistake() -> None:
    machine = ready()
    (event,) = machine.receive_data(message(m.Command.REGION_READ, m.RegionAccess(7, 0, 4).encode()))
    assert isinstance(event, vm.RegionRead)
    with pytest.raises(LocalProtocolError):
        machine.answer_read(event, b"abc")
    machine.refuse(event)
    assert errors(machine) == [errno.EIO]


def test_no_reply_means_none() -> None:
    machine = ready()
    body = m.RegionAccess(0, 8, 4).encode(b"abcd")
    (event,) = machine.receive_data(message(m.Command.REGION_WRITE, body, flags=m.MessageFlag.NO_REPLY))
    assert isinstance(event, vm.RegionWrite)
    machine.answer_write(event)
    machine.receive_data(message(99, flags=m.MessageFlag.NO_REPLY))
    assert machine.data_to_send() == []


def test_dma_windows_are_kept_and_their_descriptors_are_not() -> None:
    machine = ready()
    for address in (0, 8192, 65536):
        data = message(m.Command.DMA_MAP, m.DmaMap(address, 4096).encode())
        machine.receive_data(data[:16], pipes(1))
        machine.receive_data(data[16:])
    assert machine.dma_windows == {0: 4096, 8192: 4096, 65536: 4096}
    machine.receive_data(message(m.Command.DMA_UNMAP, m.DmaUnmap(0, 16384).encode()))
    assert machine.dma_windows == {65536: 4096}
    assert errors(machine) == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("command", "payload", "descriptors", "error"),
    [
        (99, b"", 0, errno.ENOSYS),
        (m.Command.DEVICE_FEATURE, bytes(8), 0, errno.EOPNOTSUPP),
        (m.Command.MIGRATION_DATA_READ, bytes(8), 0, errno.EOPNOTSUPP),
        (m.Command.REGION_WRITE_MULTI, bytes(8), 0, errno.EOPNOTSUPP),
        (m.Command.GET_REGION_IO_FDS, bytes(16), 2, errno.EOPNOTSUPP),
        (m.Command.VERSION, m.Version(0, 0).encode(), 0, errno.EINVAL),
        (m.Command.GET_INFO, b"", 0, errno.EINVAL),
        (m.Command.GET_REGION_INFO, m.RegionInfo(9).encode_request(), 0, errno.EINVAL),
        (m.Command.GET_IRQ_INFO, m.IrqInfo(5).encode(), 0, errno.EINVAL),
        (m.Command.SET_IRQS, m.SetIrqs(0, 0, 1, 0x24).encode(), 1, errno.EINVAL),
        (m.Command.SET_IRQS, m.SetIrqs(3, 0, 1, 0x24).encode(), 2, errno.EINVAL),
        (m.Command.SET_IRQS, m.SetIrqs(3, 0, 1, 0x21).encode(), 1, errno.EINVAL),
        (m.Command.SET_IRQS, m.SetIrqs(3, 0xFFFFFFFF, 0xFFFFFFFF, 0x24).encode(), 0, errno.EINVAL),
        (m.Command.DMA_UNMAP, m.DmaUnmap(0, 4096).encode(), 0, errno.ENOENT),
        (m.Command.REGION_READ, m.RegionAccess(7, 253, 4).encode(), 0, errno.EINVAL),
        (m.Command.REGION_READ, m.RegionAccess(2, 0, 4).encode(), 0, errno.EINVAL),
        (m.Command.REGION_READ, m.RegionAccess(1 << 31, 0, 4).encode(), 0, errno.EINVAL),
        (m.Command.REGION_READ, m.RegionAccess(0, (1 << 64) - 1, 4).encode(), 0, errno.EINVAL),
        (m.Command.REGION_WRITE, m.RegionAccess(8, 0, 1).encode(b"x"), 0, errno.EINVAL),
        (m.Command.REGION_WRITE, m.RegionAccess(0, 0, 4).encode(b"x"), 0, errno.EINVAL),
        (m.Command.RESET, b"x", 0, errno.EINVAL),
    ],
)
def test_what_cannot_be_is_answered_with_an_errno_and_the_link_stays(
    command: int, payload: bytes, descriptors: int, error: int
) -> None:
    machine = ready()
    (event,) = machine.receive_data(message(command, payload), pipes(descriptors))
    assert isinstance(event, vm.Refused)
    assert (event.command, event.error) == (command, error)
    assert machine.refusals == {error: 1}
    machine.receive_data(EXCHANGES["info"][0])
    assert errors(machine) == [error, 0]


@pytest.mark.parametrize(
    ("data", "state"),
    [
        (message(m.Command.GET_INFO, bytes(16)), vm.State.NEGOTIATING),
        (message(99), vm.State.NEGOTIATING),
        (message(m.Command.VERSION, b"\1\0\0\0"), vm.State.NEGOTIATING),
        (message(m.Command.VERSION, b"\0\0"), vm.State.NEGOTIATING),
        (message(m.Command.RESET, flags=m.MessageFlag.REPLY), vm.State.READY),
        (message(m.Command.RESET, flags=m.MessageFlag.ERROR), vm.State.READY),
        (m.Header(0, 1, 15).encode(), vm.State.READY),
        (m.Header(0, 1, m.MAX_MESSAGE_BYTES + 1).encode(), vm.State.READY),
        (message(m.Command.RESET, b"", 1) * 2, vm.State.READY),
    ],
)
def test_a_broken_rule_ends_the_connection(data: bytes, state: vm.State) -> None:
    machine = make() if state is vm.State.NEGOTIATING else ready()
    with pytest.raises(RemoteProtocolError):
        machine.receive_data(data, pipes(2))
    assert machine.state is vm.State.CLOSED
    with pytest.raises(LocalProtocolError):
        machine.receive_data(b"x", pipes(1))


def test_limit_of_descriptors() -> None:
    machine = ready()
    machine.receive_data(b"\0", pipes(m.MAX_DESCRIPTORS))
    with pytest.raises(RemoteProtocolError):
        machine.receive_data(b"\0", pipes(1))


def test_limit_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm, "MAX_DMA_WINDOWS", 3)
    machine = ready()
    for address in (0, 4096, 8192, 12288, 8192):
        machine.receive_data(message(m.Command.DMA_MAP, m.DmaMap(address, 4096).encode()))
    assert errors(machine) == [0, 0, 0, errno.ENOSPC, 0]


def test_limit_of_unanswered_messages() -> None:
    machine = ready()
    body = m.RegionAccess(7, 0, 4).encode()
    events = machine.receive_data(
        b"".join(message(m.Command.REGION_READ, body, i) for i in range(vm.MAX_UNANSWERED + 1))
    )
    assert [type(event) for event in events] == [vm.RegionRead] * vm.MAX_UNANSWERED + [vm.Refused]
    assert errors(machine) == [errno.EBUSY]


def test_the_end_within_a_message_is_an_error_and_between_messages_is_not() -> None:
    machine = ready()
    assert machine.receive_data(b"") == []
    assert machine.state is vm.State.CLOSED
    machine = ready()
    machine.receive_data(b"\0" * 5, pipes(1))
    with pytest.raises(RemoteProtocolError):
        machine.receive_data(b"")
    machine.close()
    machine.close()


def test_a_region_that_contradicts_itself_is_our_mistake() -> None:
    mapped = m.RegionFlag.READ | m.RegionFlag.MMAP
    areas: tuple[tuple[int, int], ...]
    for size, flags, areas, descriptor in (
        (4096, mapped, (), None),
        (4096, mapped, ((0, 8192),), 0),
        (8192, mapped, ((1, 4096),), 0),
        (4096, m.RegionFlag.READ, (), 0),
    ):
        with pytest.raises(LocalProtocolError):
            vm.Region(0, size, flags, areas, descriptor)


def test_the_table_covers_every_state() -> None:
    assert {state for state, _ in vm.TRANSITIONS} == set(vm.State)
    assert {(s, vm.Input.END) for s in vm.State} <= set(vm.TRANSITIONS)
    assert set(vm.SERVED) <= set(m.Command)


def _plausible() -> st.SearchStrategy[bytes]:
    numbers = st.sampled_from([0, 1, 2, 3, 7, 8, 16, 20, 24, 32, 64, 256, 4096, 1 << 24, (1 << 32) - 1])
    words = st.lists(numbers, max_size=10).map(lambda ws: struct.pack(f"<{len(ws)}I", *ws))
    return st.builds(
        message,
        st.integers(0, 20),
        words,
        st.integers(0, 3),
        st.sampled_from([0, 0, 0, 0, 0x10, 1, 0x20]),
    )


@settings(max_examples=300, deadline=None)
@given(
    st.booleans(),
    st.lists(
        st.tuples(st.one_of(_plausible(), _plausible(), st.binary(max_size=80)), st.integers(0, 3)),
        max_size=12,
    ),
    st.integers(1, 200),
)
def test_any_bytes_work_or_end_in_a_protocol_error(
    negotiated: bool, pieces: Sequence[tuple[bytes, int]], chunk: int
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    machine = ready() if negotiated else make()
    try:
        for data, count in pieces:
            given_with = pipes(count)
            for at in range(0, len(data), chunk):
                for event in machine.receive_data(data[at : at + chunk], given_with):
                    if isinstance(event, vm.RegionRead):
                        machine.answer_read(event, bytes(event.count))
                    elif isinstance(event, vm.RegionWrite):
                        machine.answer_write(event)
                    elif isinstance(event, vm.ResetAsked):
                        machine.answer_reset(event)
                given_with = []
            if given_with:
                machine.receive_data(b"", given_with)
        assert all(error >= 0 for error in errors(machine))
        machine.close()
    except RemoteProtocolError:
        pass
    assert machine.state is vm.State.CLOSED
    assert len(os.listdir("/proc/self/fd")) == before
