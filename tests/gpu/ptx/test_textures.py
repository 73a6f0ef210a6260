# SPDX-License-Identifier: Apache-2.0
"""Fetching from textures against a slow plain reference, texel by texel in exact arithmetic; and the instructions' forms."""

from __future__ import annotations

import itertools
import math
import struct
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vgpu.gpu.software.memory import IllegalAddress, MisalignedAddress
from vgpu.gpu.software.ptx import UnsupportedPtx
from vgpu.gpu.software.ptx.errors import Trap
from vgpu.gpu.software.ptx.texture import (
    BORDER,
    CLAMP,
    FORMAT_BYTES,
    MIRROR,
    SIGNED,
    WRAP,
    Surface,
    Texels,
    Texture,
    sample,
)

from .conftest import Harness

LETTERS = {0x01: "B", 0x02: "H", 0x03: "I", 0x08: "b", 0x09: "h", 0x0A: "i", 0x10: "e", 0x20: "f"}
BASE = 0x1000  # where the texels' memory begins
SHAPES = {"1d": 1, "2d": 2, "3d": 3, "a1d": 1, "a2d": 2}


# --- the reference --------------------------------------------------------------------------------------------------


def put_back(index: int, size: int, mode: int) -> int | None:
    """The texel that stands at an index, None for the border."""
    if 0 <= index < size:
        return index
    if mode == BORDER:
        return None
    if mode == CLAMP:
        return 0 if index < 0 else size - 1
    if mode == WRAP:
        return index % size
    row: list[int] = [*range(size), *reversed(range(size))]
    return row[index % len(row)]


def position(coordinate: Fraction, size: int, mode: int, normalized: bool) -> Fraction:
    if normalized and mode == WRAP:
        coordinate -= math.floor(coordinate)
    if normalized and mode == MIRROR:
        whole = math.floor(coordinate)
        coordinate = 1 - (coordinate - whole) if whole % 2 else coordinate - whole
    return coordinate * size if normalized else coordinate


def reference(memory: bytes, texture: Texture, shape: str, place: list[Fraction | int]) -> list[float]:
    """The channels of one fetch."""
    texels, dimensions = texture.texels, SHAPES[shape]
    layer = 0
    if shape[0] == "a":
        layer = min(int(place[0]), texels.size[2] - 1)
        place = place[1:]
    by_number = isinstance(place[0], int)
    modes = list(texture.modes)
    if by_number or not texture.is_normalized:
        modes = [CLAMP if mode in (WRAP, MIRROR) else mode for mode in modes]

    def texel(indices: list[int]) -> list[float]:
        found = [put_back(i, texels.size[k], modes[k]) for k, i in enumerate(indices)]
        if None in found:
            words = struct.pack("<4f", *texture.border)
            return list(
                struct.unpack(
                    "<4f" if texture.gives_floats else "<4i" if texels.format in SIGNED else "<4I", words
                )[: texels.channels]
            )
        x, y, z = [int(i or 0) for i in found] + [0] * (3 - dimensions)
        z += layer
        at = z * texels.slice_bytes + y * texels.pitch + x * texels.element_bytes + texels.address - BASE
        values = struct.unpack_from(f"<{texels.channels}{LETTERS[texels.format]}", memory, at)
        if texture.gives_floats and texels.format not in (0x10, 0x20):
            largest = (1 << (8 * texels.channel_bytes - (texels.format in SIGNED))) - 1
            return [max(value / largest, -1.0) for value in values]
        return [float(value) for value in values] if texture.gives_floats else list(values)

    if by_number:
        return texel([int(i) for i in place])
    at = [
        position(Fraction(c), texels.size[k], modes[k], texture.is_normalized)
        for k, c in enumerate(place[:dimensions])
    ]
    if not texture.is_linear:
        return texel([math.floor(x) for x in at])
    total = [0.0] * texels.channels
    lower = [math.floor(x - Fraction(1, 2)) for x in at]
    parts = [
        Fraction(round_half_up((x - Fraction(1, 2) - low) * 256), 256)
        for x, low in zip(at, lower, strict=True)
    ]
    for corner in itertools.product((0, 1), repeat=dimensions):
        weight = math.prod(part if step else 1 - part for part, step in zip(parts, corner, strict=True))
        values = texel([low + step for low, step in zip(lower, corner, strict=True)])
        total = [sum_ + float(weight) * value for sum_, value in zip(total, values, strict=True)]
    return total


def round_half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


# --- against it -----------------------------------------------------------------------------------------------------


def reader(memory: bytes) -> Any:
    """Memory from BASE on; only what is asked for inside it is there."""
    array = np.frombuffer(memory, np.uint8)

    def read(addresses: npt.NDArray[Any], size: int, channels: int) -> list[npt.NDArray[Any]]:
        offsets = addresses.astype(np.int64) - BASE
        assert offsets.min() >= 0
        assert offsets.max() + size * channels <= array.size
        rows = array[offsets[:, None] + np.arange(size * channels)]
        return [
            np.ascontiguousarray(rows[:, k * size : k * size + size]).view(f"u{size}")[:, 0]
            for k in range(channels)
        ]

    return read


@st.composite
def textures(draw: st.DrawFn) -> tuple[str, Texture, bytes]:
    shape = draw(st.sampled_from(sorted(SHAPES)))
    form = draw(st.sampled_from(sorted(LETTERS)))
    channels = draw(st.sampled_from([1, 2, 4]))
    width, height, depth = (draw(st.integers(1, 6)) for _ in range(3))
    if SHAPES[shape] < 2:
        height = 1
    if SHAPES[shape] < 3 and shape[0] != "a":
        depth = 1
    row = width * FORMAT_BYTES[form] * channels
    pitch = row + draw(st.integers(0, 3)) * FORMAT_BYTES[form] * channels
    texels = Texels(BASE, (width, height, depth), pitch, pitch * height, form, channels)
    texture = Texture(
        texels,
        (draw(st.integers(0, 3)), draw(st.integers(0, 3)), draw(st.integers(0, 3))),
        is_normalized=draw(st.booleans()),
        reads_integers=draw(st.booleans()),
        border=(1.5, -2.0, 0.25, 8.0),
    )
    if texture.gives_floats and draw(st.booleans()):
        texture = Texture(
            texels, texture.modes, True, texture.is_normalized, texture.reads_integers, texture.border
        )
    count = pitch * height * depth // FORMAT_BYTES[form]
    if form in (0x10, 0x20):
        values = [float(draw(st.integers(-64, 64))) / 4 for _ in range(min(count, 16))]
    else:
        low, high = (-(1 << 7), (1 << 7) - 1) if form in SIGNED else (0, 255)
        shift = 8 * (FORMAT_BYTES[form] - 1)
        values = [draw(st.integers(low, high)) << shift for _ in range(min(count, 16))]
    memory = b"".join(struct.pack(f"<{LETTERS[form]}", values[k * 7 % len(values)]) for k in range(count))
    return shape, texture, memory


@settings(max_examples=400, deadline=None)
@given(made=textures(), numbers=st.lists(st.integers(-(1 << 17), 1 << 17), min_size=12, max_size=12))
def test_fetches(made: tuple[str, Texture, bytes], numbers: list[int]) -> None:
    shape, texture, memory = made
    lanes = 4
    step = 1 << 16 if texture.is_normalized else 1 << 13
    axes = [[Fraction(n, step) for n in numbers[k * lanes : k * lanes + lanes]] for k in range(3)]
    coordinates: list[npt.NDArray[Any]] = [np.array([float(x) for x in axis], np.float32) for axis in axes]
    places: list[list[Fraction | int]] = [list(place) for place in zip(*axes, strict=True)]
    if shape[0] == "a":
        layers = np.array([abs(n) % 9 for n in numbers[:lanes]], np.uint32)
        coordinates = [layers, *coordinates]
        places = [[int(layer), *place] for layer, place in zip(layers, places, strict=True)]
    _compare(shape, texture, memory, coordinates, places)


@settings(max_examples=200, deadline=None)
@given(made=textures(), numbers=st.lists(st.integers(-9, 9), min_size=12, max_size=12))
def test_texels_by_number(made: tuple[str, Texture, bytes], numbers: list[int]) -> None:
    shape, texture, memory = made
    axes = [numbers[k * 4 : k * 4 + 4] for k in range(3)]
    coordinates: list[npt.NDArray[Any]] = [np.array(axis, np.int32) for axis in axes]
    places: list[list[Fraction | int]] = [list(place) for place in zip(*axes, strict=True)]
    if shape[0] == "a":
        coordinates = [np.array([2], np.uint32), *coordinates]
        places = [[2, *place] for place in places]
    _compare(shape, texture, memory, coordinates, places)


def _compare(
    shape: str,
    texture: Texture,
    memory: bytes,
    coordinates: list[npt.NDArray[Any]],
    places: list[list[Fraction | int]],
) -> None:
    with np.errstate(all="ignore"):
        words = sample(reader(memory), texture, shape, coordinates)
    assert len(words) == 4
    assert all(word.dtype == np.uint32 for word in words)
    kind = "f4" if texture.gives_floats else "i4" if texture.texels.format in SIGNED else "u4"
    for lane, place in enumerate(places):
        dimensions = SHAPES[shape] + (shape[0] == "a")
        expected = reference(memory, texture, shape, place[:dimensions])
        for channel, wanted in enumerate(expected):
            word = words[channel].view(kind)
            got = word[lane if word.size > 1 else 0]
            if texture.gives_floats:
                assert got == pytest.approx(wanted, rel=1e-6, abs=1e-6)
            else:
                assert int(got) == wanted


def test_coordinates_that_are_no_numbers_find_something() -> None:
    """Infinite and enormous ones lie outside; what is no number may be anything, in the texture."""
    memory = struct.pack("<4f", 1, 2, 3, 4)
    strange = np.array([np.inf, -np.inf, 3e38, -3e38, np.nan], np.float32)
    for mode, normalized, linear in itertools.product(
        (CLAMP, BORDER, WRAP, MIRROR), (False, True), (False, True)
    ):
        texture = Texture(Texels(BASE, (4, 1, 1), 16, 16, 0x20, 1), (mode,) * 3, linear, normalized)
        with np.errstate(all="ignore"):
            found = sample(reader(memory), texture, "1d", [strange])[0].view(np.float32)
        if mode in (CLAMP, BORDER):
            edges = [4, 1, 4, 1] if mode == CLAMP else [0, 0, 0, 0]
            assert list(found[:4]) == edges
        assert ((found >= 0) & (found <= 4)).all()


# --- instructions ---------------------------------------------------------------------------------------------------

KERNEL = """.version 8.0
.target sm_75
.address_size 64
.visible .entry k(.param .u64 p0, .param .u64 p1)
{{
    .reg .pred %p<2>; .reg .b16 %h<5>; .reg .b32 %r<10>; .reg .f32 %f<6>; .reg .b64 %rd<8>;
    ld.param.u64 %rd1, [p0];
    ld.param.u64 %rd2, [p1];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 8;
    add.s64 %rd4, %rd1, %rd3;
    ld.global.u64 %rd5, [%rd4];
    mul.wide.u32 %rd3, %r1, 16;
    add.s64 %rd6, %rd2, %rd3;
    cvt.rn.f32.u32 %f5, %r1;
    and.b32 %r2, %r1, 1;
    setp.eq.u32 %p1, %r2, 0;
    shl.b32 %r3, %r1, 2;
    mov.b32 %r5, 5; mov.b32 %r6, 6; mov.b32 %r7, 7; mov.b32 %r8, 8;
    {instruction}
    st.global.v4.u32 [%rd6], {{%r5, %r6, %r7, %r8}};
    ret;
}}
"""
FETCH = "tex.1d.v4.f32.f32 {%r5, %r6, %r7, %r8}, [%rd5, {%f5}];"


def run(
    harness: Harness, instruction: str, objects: list[int], images: dict[int, object]
) -> npt.NDArray[np.uint32]:
    harness.load(KERNEL.format(instruction=instruction))
    out = np.zeros((len(objects), 4), np.uint32)
    values, result = harness.upload(np.array(objects, np.uint64)), harness.upload(out)
    harness.launch("k", 1, len(objects), values, result, images=images)
    return harness.download(result, out)


def line(harness: Harness, *numbers: float) -> Texels:
    content = np.array(numbers, np.float32)
    return Texels(harness.upload(content), (len(numbers), 1, 1), content.nbytes, content.nbytes, 0x20, 1)


def test_each_lane_has_its_object(harness: Harness) -> None:
    images: dict[int, object] = {
        7: Texture(line(harness, 1, 2, 3, 4)),
        9: Texture(line(harness, 10, 20, 30, 40)),
    }
    found = run(harness, FETCH, [7, 9, 9, 7], images)
    assert list(found.view(np.float32)[:, 0]) == [1, 20, 30, 4]
    assert [list(row) for row in found[:, 1:3]] == [[0, 0]] * 4
    assert list(found.view(np.float32)[:, 3]) == [1] * 4


def test_a_guard_keeps_what_was_there(harness: Harness) -> None:
    images: dict[int, object] = {7: Texture(line(harness, 1, 2, 3, 4)), 8: Surface(line(harness, 1, 2, 3, 4))}
    found = run(harness, "@%p1 " + FETCH, [7, 0, 7, 0], images)
    assert list(found.view(np.float32)[::2, 0]) == [1, 3]
    assert [list(row) for row in found[1::2]] == [[5, 6, 7, 8]] * 2
    found = run(harness, "@!%p1 suld.b.1d.b32.trap {%r5}, [%rd5, {%r3}];", [0, 8, 0, 8], images)
    assert list(found.view(np.float32)[1::2, 0]) == [2, 4]
    assert list(found[::2, 0]) == [5, 5]
    nobody = "setp.eq.u32 %p1, %r1, 99; @%p1 " + FETCH
    assert list(run(harness, nobody, [0, 0], images)[:, 0]) == [5, 5]


def test_a_store_goes_where_its_guard_holds(harness: Harness) -> None:
    surface = Surface(line(harness, 1, 2, 3, 4))
    run(harness, "@%p1 sust.b.1d.b32.trap [%rd5, {%r3}], {%r5};", [8, 0, 8, 0], {8: surface})
    words = np.frombuffer(harness.space.read(surface.texels.address, 16), np.uint32)
    assert [words[0], words[2]] == [5, 5]
    assert list(words.view(np.float32)[1::2]) == [2, 4]


@pytest.mark.parametrize("value", [0, 9, 8, 1 << 63])
def test_an_object_that_does_not_exist_is_a_fault(harness: Harness, value: int) -> None:
    """Also a surface where a texture is wanted, and what is neither."""
    images: dict[int, object] = {7: Texture(line(harness, 1, 2)), 8: Surface(line(harness, 1, 2)), 9: "else"}
    with pytest.raises(IllegalAddress):
        run(harness, FETCH, [7, value], images)
    with pytest.raises(IllegalAddress):
        run(harness, "suld.b.1d.b32.zero {%r5}, [%rd5, {%r3}];", [7 if value == 8 else value], images)


def test_memory_that_is_gone_is_a_fault(harness: Harness) -> None:
    texels = Texels(0x10_0000, (4, 1, 1), 16, 16, 0x20, 1)
    with pytest.raises(IllegalAddress):
        run(harness, FETCH, [7, 7], {7: Texture(texels)})


def test_surfaces_fault(harness: Harness) -> None:
    images: dict[int, object] = {8: Surface(line(harness, 1, 2))}
    with pytest.raises(Trap):
        run(harness, "suld.b.1d.b32.trap {%r5}, [%rd5, {%r3}];", [8, 8, 8], images)
    with pytest.raises(Trap):
        run(harness, "sust.b.1d.b32.trap [%rd5, {-4}], {%r5};", [8], images)
    with pytest.raises(Trap):
        run(harness, "suld.b.1d.v4.b32.clamp {%r5, %r6, %r7, %r8}, [%rd5, {%r3}];", [8], images)
    with pytest.raises(MisalignedAddress):
        run(harness, "suld.b.1d.b32.zero {%r5}, [%rd5, {%r1}];", [8, 8], images)


def test_rows_without_gaps(harness: Harness) -> None:
    """A row's elements may lie at addresses that are no multiples of what is read at once."""
    content = np.arange(15, dtype=np.uint32)  # three rows of five
    surface = Surface(Texels(harness.upload(content), (5, 3, 1), 20, 60, 0x03, 1))
    read = "suld.b.2d.b64.trap {%rd7}, [%rd5, {8, %r1}]; mov.b64 {%r5, %r6}, %rd7;"
    assert [list(row[:2]) for row in run(harness, read, [8] * 3, {8: surface})] == [[2, 3], [7, 8], [12, 13]]
    write = "sust.b.2d.v2.b32.trap [%rd5, {0, %r1}], {%r5, %r1};"
    run(harness, write, [8] * 3, {8: surface})
    written = np.frombuffer(harness.space.read(surface.texels.address, 60), np.uint32).reshape(3, 5)
    assert [list(row[:2]) for row in written] == [[5, 0], [5, 1], [5, 2]]
    assert [list(row[2:]) for row in written] == [[2, 3, 4], [7, 8, 9], [12, 13, 14]]


@pytest.mark.parametrize(
    "instruction",
    [
        "tex.1d.v4.f32.f32 {%r5, %r6, %r7, %r8}, [%rd5, %rd5, {%f5}];",
        "tex.cube.v4.f32.f32 {%r5, %r6, %r7, %r8}, [%rd5, {%f5, %f5, %f5, %f5}];",
        "tex.level.2d.v4.f32.f32 {%r5, %r6, %r7, %r8}, [%rd5, {%f5, %f5}], %f5;",
        "tex.2d.v4.f32.f32 {%r5, %r6, %r7, %r8}, [%rd5, {%f5}];",
        "tex.1d.v4.f32.f32 {%r5, %r6, %r7, %r8}|%p1, [%rd5, {%f5}];",
        "tex.1d.v4.f32.f32 {%r5, %r6}, [%rd5, {%f5}];",
        "tex.1d.v4.f32.f32 {%r5, %r6, %r7, %r8}, [%rd5];",
        "tex.1d.v4.f32.f32 {%r5, %r6, %r7, %r8}, [%r5, {%f5}];",
        "tld4.r.2d.v4.f32.f32 {%r5, %r6, %r7, %r8}, [%rd5, {%f5, %f5}];",
        "txq.width.b32 %r5, [%rd5];",
        "suld.p.1d.b32.trap {%r5}, [%rd5, {%r3}];",
        "suld.b.1d.v4.b64.trap {%rd7, %rd7, %rd7, %rd7}, [%rd5, {%r3}];",
        "suld.b.1d.b32 {%r5}, [%rd5, {%r3}];",
        "sust.b.1d.v2.b32.trap [%rd5, {%r3}], {%r5};",
        "sured.b.add.1d.u32.trap [%rd5, {%r3}], %r5;",
    ],
)
def test_other_forms_are_refused_by_name(harness: Harness, instruction: str) -> None:
    with pytest.raises(UnsupportedPtx, match=instruction.split()[0].replace(".", r"\.")):
        run(harness, instruction, [7], {})
