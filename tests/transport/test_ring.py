# SPDX-License-Identifier: Apache-2.0
"""The guest's half of a ring in Python, against a consumer that checks the rules of docs/wire.md, and against garbage."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vgpu.transport import ring as r
from vgpu.transport.errors import RemoteProtocolError
from vgpu.transport.layout import DEVICE_PAGE_SIZE
from vgpu.transport.wire import CALL_HEADER_SIZE, FLAG_REPLY, RECORD_ALIGNMENT, CallHeader, Result

ROOT = Path(__file__).resolve().parents[2]
RING, SIZE, SLOTS, COUNT = 49152, 8192, 57344, 4
SEGMENT = SLOTS + COUNT * r.SLOT_SIZE


class Segment:
    """A segment, and the worker's side of its ring."""

    def __init__(self) -> None:
        self.memory = bytearray(SEGMENT)
        for name, value in (
            ("ring_offset", RING),
            ("ring_size", SIZE),
            ("slots_offset", SLOTS),
            ("slot_count", COUNT),
            ("state", 1),
        ):
            self.set(name, value)

    def producer(self) -> r.RingProducer:
        return r.RingProducer(memoryview(self.memory))

    def set(self, name: str, value: int) -> None:
        offset, size = r.FIELDS[name]
        at = DEVICE_PAGE_SIZE + offset
        self.memory[at : at + size] = value.to_bytes(size, "little")

    def get(self, name: str) -> int:
        offset, size = r.FIELDS[name]
        at = DEVICE_PAGE_SIZE + offset
        return int.from_bytes(self.memory[at : at + size], "little")

    def consume(self) -> tuple[CallHeader, bytes] | None:
        """The next record, pads skipped; breaks where a worker would."""
        while (head := self.get("head")) != self.get("tail"):
            at = head % SIZE
            rest = SIZE - at
            assert rest >= CALL_HEADER_SIZE, "a rest too small for a header"
            start = RING + at
            header = CallHeader.decode(bytes(self.memory[start : start + CALL_HEADER_SIZE]))
            assert header.record_size <= rest, "a record that wraps"
            payload = bytes(
                self.memory[start + CALL_HEADER_SIZE : start + CALL_HEADER_SIZE + header.payload_length]
            )
            self.set("head", (head + header.record_size) % (1 << 64))
            if header.call:
                return header, payload
            assert header.record_size == rest, "a pad that does not reach the end"
        return None

    def answer(self, header: CallHeader, payload: bytes, said: int | None = None) -> None:
        at = SLOTS + header.slot * r.SLOT_SIZE
        self.memory[at + 64 : at + 64 + len(payload)] = payload
        length = len(payload) if said is None else said
        self.memory[at : at + 40] = Result(header.sequence, 7, length, (1, 2, 3, 4)).encode()


def test_the_fields_are_where_the_header_has_them(tmp_path: Path) -> None:
    compiler = shutil.which("gcc")
    assert compiler, "gcc is a requirement of the project"
    lines = [
        f'printf("{name} %zu %zu\\n", offsetof(struct vgpu_session_page, {name}), '
        f"sizeof(((struct vgpu_session_page *)0)->{name}));"
        for name in r.FIELDS
    ]
    constants = ["VGPU_SLOT_SIZE", "VGPU_SLOT_PAYLOAD_OFFSET", "VGPU_RECORD_ALIGNMENT"]
    lines += [f'printf("{name} %u 0\\n", {name});' for name in constants]
    source = tmp_path / "fields.c"
    source.write_text(
        '#include <stddef.h>\n#include <stdio.h>\n#include "wire.h"\nint main(void) {'
        + "\n".join(lines)
        + "}"
    )
    subprocess.run([compiler, f"-I{ROOT}/transport", source, "-o", tmp_path / "fields"], check=True)
    printed = subprocess.run([tmp_path / "fields"], capture_output=True, text=True, check=True).stdout
    found = {n: (int(a), int(b)) for n, a, b in (line.split() for line in printed.splitlines())}
    numbers = [found.pop(name)[0] for name in constants]
    assert numbers == [r.SLOT_SIZE, r.SLOT_PAYLOAD_OFFSET, RECORD_ALIGNMENT]
    assert found == r.FIELDS


@given(st.lists(st.tuples(st.integers(0, 3072), st.booleans()), max_size=80), st.integers(0, 511))
@settings(deadline=None, max_examples=100)
def test_what_is_pushed_is_consumed_in_order_and_no_rule_is_broken(
    calls: list[tuple[int, bool]], start: int
) -> None:
    segment = Segment()
    # Anywhere a ring may be, short of a rest too small for a header, and close to the end of the counters.
    base = (1 << 64) - SIZE + start * 16 if SIZE - start * 16 >= CALL_HEADER_SIZE else 0
    segment.set("tail", base)
    segment.set("head", base)
    producer = segment.producer()
    waiting: list[tuple[CallHeader, bytes]] = []

    for number, (length, eager) in enumerate(calls):
        payload = bytes([number & 0xFF]) * length
        header = CallHeader(number + 1, (number,) * 8, 0, length, number)
        if not producer.try_push(header, payload):
            drain(segment, waiting)
            assert producer.try_push(header, payload), "an empty ring has room for every record"
        waiting.append((header, payload))
        if eager:
            drain(segment, waiting)
    drain(segment, waiting)
    assert segment.get("head") == segment.get("tail")


def drain(segment: Segment, waiting: list[tuple[CallHeader, bytes]]) -> None:
    """Consume all."""
    while waiting:
        assert segment.consume() == waiting.pop(0)


def test_an_answer_is_taken_when_its_sequence_stands_there() -> None:
    segment = Segment()
    producer = segment.producer()
    header = CallHeader(5, (), FLAG_REPLY, 3, 0x01020304, 2)
    segment.answer(header, b"old")
    assert producer.try_push(header, b"abc")
    assert producer.answer(header, 100) is None, "the last answer there had this sequence"
    segment.answer(header, b"x" * 50)
    assert producer.answer(header, 100) == (Result(0x01020304, 7, 50, (1, 2, 3, 4)), b"x" * 50)
    assert producer.answer(header, 10) == (Result(0x01020304, 7, 50, (1, 2, 3, 4)), b"x" * 10)
    segment.answer(header, b"y" * r.SLOT_PAYLOAD_LIMIT, said=65535)
    answer = producer.answer(header, 1 << 20)
    assert answer is not None
    assert answer[1] == b"y" * r.SLOT_PAYLOAD_LIMIT, "never past the slot"


def test_a_full_ring_takes_nothing() -> None:
    segment = Segment()
    producer = segment.producer()
    header = CallHeader(5, payload_length=3072)
    assert producer.try_push(header, b"a" * 3072)
    assert producer.try_push(header, b"b" * 3072)
    before = bytes(segment.memory)
    assert not producer.try_push(header, b"c" * 3072)
    assert bytes(segment.memory) == before


def test_a_doorbell_is_taken_once() -> None:
    segment = Segment()
    producer = segment.producer()
    assert not producer.take_doorbell()
    segment.set("doorbell_wanted", 1)
    assert producer.take_doorbell()
    assert not producer.take_doorbell()


def test_the_end_of_a_session_is_seen() -> None:
    segment = Segment()
    producer = segment.producer()
    assert producer.session_error() is None
    segment.set("sticky_error", 700)
    assert producer.session_error() is None, "the worker answers with it as long as it lives"
    segment.set("state", 3)
    assert producer.session_error() == 700


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ring_offset", 0),
        ("ring_offset", 49152 + 8),
        ("ring_offset", SEGMENT),
        ("ring_offset", (1 << 64) - 64),
        ("ring_size", 0),
        ("ring_size", 4096),
        ("ring_size", 12288),
        ("ring_size", 1 << 63),
        ("slots_offset", 64),
        ("slots_offset", SLOTS + 64),
        ("slots_offset", (1 << 64) - 4096),
        ("slot_count", COUNT + 1),
        ("slot_count", 0xFFFFFFFF),
    ],
)
def test_a_page_that_describes_no_ring_is_refused(name: str, value: int) -> None:
    segment = Segment()
    segment.set(name, value)
    with pytest.raises(RemoteProtocolError, match="in a segment of"):
        segment.producer()


@pytest.mark.parametrize(("tail", "head"), [(8, 0), (SIZE + 16, 0), (0, 16), (1 << 63, 0)])
def test_counters_that_no_ring_has_are_refused(tail: int, head: int) -> None:
    segment = Segment()
    segment.set("tail", tail)
    segment.set("head", head)
    before = bytes(segment.memory)
    with pytest.raises(RemoteProtocolError, match="a ring of"):
        segment.producer().try_push(CallHeader(1), b"")
    assert bytes(segment.memory) == before


def test_a_completion_slot_that_is_not_there_is_refused() -> None:
    segment = Segment()
    before = bytes(segment.memory)
    with pytest.raises(RemoteProtocolError, match="no completion slot 4"):
        segment.producer().try_push(CallHeader(1, flags=FLAG_REPLY, slot=COUNT), b"")
    assert bytes(segment.memory) == before


@given(
    st.dictionaries(
        st.sampled_from(list(r.FIELDS)),
        st.integers(0, (1 << 32) - 1) | st.sampled_from([RING, SIZE, SLOTS, 1 << 16, 1 << 20]),
    ),
    st.integers(0, 3072),
    st.integers(0, 65535),
)
@settings(deadline=None)
def test_garbage_is_refused_or_stays_within_the_parts(page: dict[str, int], length: int, slot: int) -> None:
    """Nothing outside ring, slots and the two guest-written fields ever changes."""
    segment = Segment()
    for name, value in page.items():
        segment.set(name, value)
    before = bytes(segment.memory)
    header = CallHeader(1, (), FLAG_REPLY, length, 9, slot)
    try:
        producer = segment.producer()
        pushed = producer.try_push(header, b"z" * length)
        producer.take_doorbell()
        if pushed:
            producer.answer(header, 3072)
    except RemoteProtocolError:
        assert bytes(segment.memory) == before
        return
    changed = {i for i in range(len(before)) if before[i] != segment.memory[i]}
    ring = segment.get("ring_offset")
    slots = segment.get("slots_offset")
    for at in changed:
        page_at = at - DEVICE_PAGE_SIZE
        assert (
            ring <= at < ring + segment.get("ring_size")
            or slots <= at < slots + segment.get("slot_count") * r.SLOT_SIZE
            or 128 <= page_at < 136
            or 320 <= page_at < 324
        )


def test_a_header_is_as_the_worker_reads_it() -> None:
    segment = Segment()
    assert segment.producer().try_push(CallHeader(0x1234, (1, 2), FLAG_REPLY, 4, 5, 3), b"data")
    assert segment.memory[RING : RING + 84] == struct.pack(
        "<HHIIHH8Q", 0x1234, 1, 4, 5, 3, 0, 1, 2, 0, 0, 0, 0, 0, 0
    ) + (b"data")
    assert segment.get("tail") == 96
