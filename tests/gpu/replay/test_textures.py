# SPDX-License-Identifier: Apache-2.0
"""Handlers of textures and surfaces, fed by a guest that says whatever it likes. The fake driver believes what it is told, and
ends the process where a worker must have looked first."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gpu.replay.guest import CONTEXT, DEFERRED, READY, STATE, Replayed, build_fake_driver, replayed
from vgpu.gpu.errors import Result as Code
from vgpu.transport._generated_calls import CallId

FLOAT, LAST = 0x20, (1 << 64) - 1
LIMIT_IMAGES = 1010
ARRAY, MIPMAPPED, LINEAR, PITCH2D = range(4)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_driver(tmp_path_factory.mktemp("textures"), "fake_memory.c")


@pytest.fixture
def session(driver: Path) -> Iterator[Replayed]:
    with replayed(driver) as running:
        running.guest.retain()
        yield running
        assert running.guest.u32(STATE) == READY


@pytest.fixture(scope="module")
def long_session(driver: Path) -> Iterator[Replayed]:
    with replayed(driver) as running:
        running.guest.retain()
        yield running


def resource(kind: int, *words: int, flags: int = 0, rest: bytes = b"") -> bytes:
    body = b"".join(word.to_bytes(8, "little") for word in words) + rest
    return struct.pack("<Ixxxx128sIxxxx", kind, body.ljust(128, b"\0"), flags)


def linear(address: int, form: int = FLOAT, channels: int = 1, size: int = 1024) -> bytes:
    return resource(LINEAR, address, channels << 32 | form, size)


def how(
    modes: tuple[int, int, int] = (0, 1, 2), filtering: int = 0, flags: int = 0, levels: int = 0
) -> bytes:
    return struct.pack("<7I7f", *modes, filtering, flags, 1, levels, *[0.5] * 7) + b"\xff" * 48


def view(form: int = 0, levels: tuple[int, int] = (0, 0), layers: tuple[int, int] = (0, 0)) -> bytes:
    return struct.pack("<IxxxxQQQ4I", form, 16, 8, 0, *levels, *layers) + b"\xff" * 64


def make_array(session: Replayed, flags: int = 2) -> int:
    made = session.guest.ask(CallId.cuArray3DCreate_v2, 16, 8, 0, FLOAT, 1, flags)
    assert made.status == 0
    return made.values[0]


def images(session: Replayed) -> int:
    return session.guest.ask(CallId.cuCtxGetLimit, LIMIT_IMAGES).values[0]


def next_value(session: Replayed, value: int) -> None:
    assert session.guest.ask(CallId.cuCtxSetLimit, LIMIT_IMAGES, value).status == 0


def test_objects_come_and_go(session: Replayed) -> None:
    guest, before = session.guest, images(session)
    array = make_array(session)
    made = [
        guest.ask(CallId.cuTexObjectCreate, 0, payload=resource(ARRAY, array) + how()),
        guest.ask(CallId.cuTexObjectCreate, 1, payload=resource(ARRAY, array) + how() + view(0x16)),
        guest.ask(CallId.cuTexObjectCreate, 0, payload=linear(0x1000) + how(filtering=1, flags=0x73)),
        guest.ask(
            CallId.cuTexObjectCreate, 0, payload=resource(PITCH2D, 0x2000, 1 << 32 | FLOAT, 16, 8, 64) + how()
        ),
    ]
    surface = guest.ask(CallId.cuSurfObjectCreate, payload=resource(ARRAY, array))
    assert [one.status for one in [*made, surface]] == [0] * 5
    assert images(session) == before + 5
    assert guest.ask(CallId.cuTexObjectDestroy, surface.values[0]).status == Code.INVALID_VALUE
    assert guest.ask(CallId.cuSurfObjectDestroy, made[0].values[0]).status == Code.INVALID_VALUE
    for one in made:
        assert guest.ask(CallId.cuTexObjectDestroy, one.values[0]).status == 0
        assert guest.ask(CallId.cuTexObjectDestroy, one.values[0]).status == Code.INVALID_VALUE
    assert guest.ask(CallId.cuSurfObjectDestroy, surface.values[0]).status == 0
    for value in (0, 1, LAST, 1 << 56, 1 << 63):
        assert guest.ask(CallId.cuTexObjectDestroy, value).status == Code.INVALID_VALUE
        assert guest.ask(CallId.cuSurfObjectDestroy, value).status == Code.INVALID_VALUE
    assert images(session) == before


def test_nothing_wrong_reaches_the_driver(session: Replayed) -> None:
    guest, before = session.guest, images(session)
    array = make_array(session)
    good = resource(ARRAY, array)
    for payload, flags, status in [
        (good, 0, Code.INVALID_VALUE),
        ((good + how())[:-1], 0, Code.INVALID_VALUE),
        (good + how() + b"\0" * 8, 0, Code.INVALID_VALUE),
        (good + how(), 1, Code.INVALID_VALUE),
        (good + how() + view(), 0, Code.INVALID_VALUE),
        (good + how() + view(), 2, Code.INVALID_VALUE),
        (resource(ARRAY, array, flags=1) + how(), 0, Code.INVALID_VALUE),
        (resource(MIPMAPPED, array) + how(), 0, Code.NOT_SUPPORTED),
        (resource(4, array) + how(), 0, Code.INVALID_VALUE),
        (resource(0xFFFF_FFFF, array) + how(), 0, Code.INVALID_VALUE),
        (linear(0x1000, form=0xB0) + how(), 0, Code.NOT_SUPPORTED),
        (linear(0x1000, channels=3) + how(), 0, Code.INVALID_VALUE),
        (linear(0x1000) + how() + view(), 1, Code.INVALID_VALUE),
        (good + how(modes=(0, 4, 0)), 0, Code.INVALID_VALUE),
        (good + how(filtering=2), 0, Code.INVALID_VALUE),
        (good + how(levels=2), 0, Code.INVALID_VALUE),
        (good + how(flags=4), 0, Code.INVALID_VALUE),
        (good + how(flags=1 << 31), 0, Code.INVALID_VALUE),
        (good + how() + view(0x23), 1, Code.INVALID_VALUE),
        (good + how() + view(levels=(0, 1)), 1, Code.INVALID_VALUE),
        (good + how() + view(layers=(2, 1)), 1, Code.INVALID_VALUE),
    ]:
        assert guest.ask(CallId.cuTexObjectCreate, flags, payload=payload).status == status
    for forged in (0, array + 16, array + (1 << 28), array ^ 1 << 42, LAST, 64):
        wrong = resource(ARRAY, forged)
        assert guest.ask(CallId.cuTexObjectCreate, 0, payload=wrong + how()).status == Code.INVALID_HANDLE
        assert guest.ask(CallId.cuSurfObjectCreate, payload=wrong).status == Code.INVALID_HANDLE
    for payload in (b"", good[:-8], good + how(), linear(0x1000), resource(ARRAY, array, flags=2)):
        assert guest.ask(CallId.cuSurfObjectCreate, payload=payload).status == Code.INVALID_VALUE
    assert images(session) == before
    # What lies around the fields that a resource has does not go along: the fake looks.
    stuffed = resource(ARRAY, array, LAST, LAST, rest=b"\xff" * 96)
    assert guest.ask(CallId.cuTexObjectCreate, 0, payload=stuffed + how()).status == 0
    assert guest.ask(CallId.cuArrayDestroy, array).status == 0
    assert guest.ask(CallId.cuTexObjectCreate, 0, payload=good + how()).status == Code.INVALID_HANDLE


def test_a_value_is_one_of_its_context(session: Replayed) -> None:
    """Drivers count in each context for itself; so what is 7 in one may be somebody else's 7 in another."""
    guest = session.guest
    payload = linear(0x1000) + how()
    other = CONTEXT + 16
    next_value(session, 0x7777)
    assert guest.ask(CallId.cuTexObjectCreate, 0, payload=payload).values[0] == 0x7777
    assert guest.ask(CallId.wireContextCreate, other, 0).status == 0
    guest.send(CallId.wireSetContext, other)
    assert guest.ask(CallId.cuTexObjectDestroy, 0x7777).status == Code.INVALID_VALUE
    next_value(session, 0x7777)
    assert guest.ask(CallId.cuTexObjectCreate, 0, payload=payload).values[0] == 0x7777
    count = images(session)
    guest.send(CallId.wireSetContext, CONTEXT)
    assert guest.ask(CallId.cuTexObjectDestroy, 0x7777).status == 0
    assert guest.ask(CallId.cuTexObjectDestroy, 0x7777).status == Code.INVALID_VALUE
    guest.send(CallId.wireSetContext, other)
    assert guest.ask(CallId.cuTexObjectDestroy, 0x7777).status == 0
    assert images(session) == count - 2


def test_objects_end_with_their_context(session: Replayed) -> None:
    guest = session.guest
    payload = linear(0x1000) + how()
    values = [guest.ask(CallId.cuTexObjectCreate, 0, payload=payload).values[0] for _ in range(200)]
    surface = guest.ask(CallId.cuSurfObjectCreate, payload=resource(ARRAY, make_array(session))).values[0]
    assert guest.ask(CallId.wirePrimaryReset, CONTEXT).status == 0
    guest.retain()
    for value in values:
        assert guest.ask(CallId.cuTexObjectDestroy, value).status == Code.INVALID_VALUE
    assert guest.ask(CallId.cuSurfObjectDestroy, surface).status == Code.INVALID_VALUE


def test_a_value_that_cannot_be_kept_is_given_back(session: Replayed) -> None:
    before = images(session)
    next_value(session, 1 << 56)
    made = session.guest.ask(CallId.cuTexObjectCreate, 0, payload=linear(0x1000) + how())
    assert made.status == Code.OUT_OF_MEMORY
    assert images(session) == before


WORDS = st.one_of(st.integers(0, 8), st.sampled_from([64, 1 << 31, 1 << 56, LAST]), st.integers(0, LAST))
CALLS = [
    CallId.cuTexObjectCreate,
    CallId.cuTexObjectDestroy,
    CallId.cuSurfObjectCreate,
    CallId.cuSurfObjectDestroy,
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    call=st.sampled_from(CALLS),
    word=WORDS,
    kind=st.integers(0, 5),
    words=st.lists(WORDS, max_size=16),
    modes=st.tuples(*[st.integers(0, 4)] * 3),
    flags=st.sampled_from([0, 1, 2, 0x10, 0x73, 4, LAST & 0xFFFF_FFFF]),
    tail=st.one_of(st.just(b""), st.binary(max_size=200), st.just(view())),
)
def test_no_arguments_break_the_worker(
    long_session: Replayed, call: int, word: int, kind: int, words: list[int], modes: tuple[int, int, int],
    flags: int, tail: bytes,
) -> None:  # fmt: skip
    guest = long_session.guest
    guest.ask(call, word, payload=resource(kind, *words) + how(modes, flags=flags) + tail)
    guest.set_u32(DEFERRED, 0)
    assert guest.u32(STATE) == READY
