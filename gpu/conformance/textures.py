# SPDX-License-Identifier: Apache-2.0
"""Texture and surface objects: what kernels fetch from arrays and device memory, and what they read and write of surfaces.

Coordinates stay away from where one texel ends and the next begins, since nothing says to which a driver gives the border.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, Final

from .arrays import ARRAY, DEVICE, FLOAT, HALF, HOST, LAYERED, SURFACE, UINT8, UINT16, UINT32
from .memory import LAYOUT_3D
from .probe import Mismatch, Probe, check, fatal_check

SINT8, SINT16 = 0x08, 0x09
WRAP, CLAMP, MIRROR, BORDER = range(4)
AS_INTEGER, NORMALIZED = 1, 2
Size = tuple[int, int, int]

_HEAD: Final = ".version 6.3\n.target sm_70\n.address_size 64\n"
_COORDINATES: Final = {
    ("1d", "f32"): "%f1", ("2d", "f32"): "%f1, %f2", ("3d", "f32"): "%f1, %f2, %f3, %f3",
    ("a1d", "f32"): "%r1, %f2", ("a2d", "f32"): "%r1, %f2, %f3, %f3", ("1d", "s32"): "%r1",
}  # fmt: skip
_IN_SURFACES: Final = {
    "1d": "%r1",
    "2d": "%r1, %r2",
    "3d": "%r1, %r2, %r3, %r3",
    "a1d": "%r1, %r2",
    "a2d": "%r1, %r2, %r3, %r3",
}

# Every thread takes four words (coordinates) from `at`, and has four for what it finds at `out`.
_BEGIN: Final = """
.visible .entry {name}(.param .u64 p0, .param .u64 p1, .param .u64 p2)
{{
    .reg .b16 %h<5>; .reg .b32 %r<12>; .reg .f32 %f<4>; .reg .b64 %rd<10>;
    ld.param.u64 %rd1, [p0];
    ld.param.u64 %rd2, [p1];
    ld.param.u64 %rd3, [p2];
    mov.u32 %r9, %tid.x;
    mul.wide.u32 %rd4, %r9, 16;
    add.s64 %rd5, %rd2, %rd4;
    add.s64 %rd6, %rd3, %rd4;
    ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd5];
    mov.b32 %f1, %r1;
    mov.b32 %f2, %r2;
    mov.b32 %f3, %r3;
"""
_TEX: Final = (
    _BEGIN
    + """    tex.{shape}.v4.{kind}.{coordinate} {{%r5, %r6, %r7, %r8}}, [%rd1, {{{coordinates}}}];
    st.global.v4.u32 [%rd6], {{%r5, %r6, %r7, %r8}};
    ret;
}}
"""
)
_SULD: Final = (
    _BEGIN
    + """    suld.b.{shape}.{kind}.{edge} {{{values}}}, [%rd1, {{{coordinates}}}];
    st.global.{kind} [%rd6], {memory};
    ret;
}}
"""
)
_SUST: Final = (
    _BEGIN
    + """    ld.global.{kind} {memory}, [%rd6];
    sust.b.{shape}.{kind}.{edge} [%rd1, {{{coordinates}}}], {{{values}}};
    ret;
}}
"""
)
_VALUES: Final = {
    "b8": "%h1", "b16": "%h1", "b32": "%r5", "b64": "%rd7", "v2.b32": "%r5, %r6", "v4.b32": "%r5, %r6, %r7, %r8",
    "v2.b64": "%rd7, %rd8", "v4.b8": "%h1, %h2, %h3, %h4",
}  # fmt: skip
_WIDTHS: Final = {"b8": 1, "b16": 2, "b32": 4, "b64": 8, "v2.b32": 8, "v4.b32": 16, "v2.b64": 16, "v4.b8": 4}


def _tex(shape: str, kind: str = "f32", coordinate: str = "f32") -> bytes:
    """A module with a kernel `fetch` of that instruction."""
    coordinates = _COORDINATES[shape, coordinate]
    body = _TEX.format(name="fetch", shape=shape, kind=kind, coordinate=coordinate, coordinates=coordinates)
    return (_HEAD + body).encode() + b"\0"


def _surf(shape: str, kind: str, edge: str) -> bytes:
    """A module with kernels `read` and `write`."""
    values = _VALUES[kind]
    # A vector of one has braces in a surface only.
    memory = f"{{{values}}}" if "," in values else values
    fill = {"shape": shape, "kind": kind, "edge": edge, "values": values, "memory": memory}
    pair = (("read", _SULD), ("write", _SUST))
    text = "".join(body.format(name=name, coordinates=_IN_SURFACES[shape], **fill) for name, body in pair)
    return (_HEAD + text).encode() + b"\0"


def _filled(p: Probe, size: Size, form: int, channels: int, flags: int, content: bytes) -> int:
    """An array with that content, destroyed after the check."""
    handle = p.value("cuArray3DCreate_v2", p.pack("<QQQIIIxxxx", *size, form, channels, flags))
    p.later("cuArrayDestroy", handle)
    width, rows, slices = size[0], size[1] or 1, size[2] or 1
    row = len(content) // (rows * slices)
    assert row % width == 0
    here = (0, 0, 0, 0, HOST, p.host(content), 0, 0, 0, row, rows)
    p.ok(
        "cuMemcpy3DAsync_v2",
        p.pack(LAYOUT_3D, *here, 0, 0, 0, 0, ARRAY, 0, 0, handle, 0, 0, 0, row, rows, slices),
        0,
    )
    p.ok("cuCtxSynchronize")
    return handle


def _content(p: Probe, array: int, row: int, rows: int, slices: int = 1) -> bytes:
    """What an array holds."""
    back = p.host(row * rows * slices)
    there = (0, 0, 0, 0, HOST, back, 0, 0, 0, row, rows)
    p.ok(
        "cuMemcpy3DAsync_v2",
        p.pack(LAYOUT_3D, 0, 0, 0, 0, ARRAY, 0, 0, array, 0, 0, 0, *there, row, rows, slices),
        0,
    )
    p.ok("cuCtxSynchronize")
    return p.bytes_of(back, row * rows * slices)


def _of_array(p: Probe, array: int) -> Any:
    """A CUDA_RESOURCE_DESC."""
    return p.pack("<IxxxxQ128x", 0, array)


def _of_row(p: Probe, address: int, form: int, channels: int, size: int) -> Any:
    return p.pack("<IxxxxQIIQ112x", 2, address, form, channels, size)


def _how(
    p: Probe,
    modes: tuple[int, int, int] = (CLAMP, CLAMP, CLAMP),
    flags: int = 0,
    *,
    linear: bool = False,
    border: Sequence[float] = (0, 0, 0, 0),
) -> Any:
    """A CUDA_TEXTURE_DESC."""
    return p.pack("<7I3f4f48x", *modes, int(linear), flags, 0, 0, 0.0, 0.0, 0.0, *border)


def _texture(p: Probe, resource: Any, how: Any, view: Any = 0) -> int:
    """A texture object, destroyed after the check."""
    value = p.value("cuTexObjectCreate", resource, how, view)
    p.later("cuTexObjectDestroy", value)
    return value


def _fetch(
    p: Probe, image: bytes, texture: int, places: Sequence[Sequence[float]], letters: str = "fff"
) -> bytes:
    """Four words for each place."""
    packed = b"".join(
        struct.pack(f"<{letters}", *[*place, 0, 0, 0][: len(letters)]).ljust(16, b"\0") for place in places
    )
    out = p.device(16 * len(places))
    p.launch(p.function("fetch", image), 1, len(places), "QQQ", texture, p.device(packed), out)
    return p.download(out, 16 * len(places))


def _first(words: bytes) -> list[float]:
    """The first of each four, as numbers."""
    return [value[0] for value in struct.iter_unpack("<ffff", words)]


def _near(p: Probe, got: Sequence[float], wanted: Sequence[float], within: float, what: str) -> None:
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        p.true(math.isfinite(a) and abs(a - b) <= within, f"{what}: number {index} is {a}, {b} was expected")


def _numbers(count: int) -> list[float]:
    return [float(index * 37 % 101) for index in range(count)]


@check
def dimensions(p: Probe) -> None:
    """A texel of an array of one, two and three dimensions, and of layers."""
    w, h, d = 9, 5, 4
    numbers = _numbers(w * h * d)
    content = struct.pack(f"<{len(numbers)}f", *numbers)
    places = [(x, y, z) for z in range(d) for y in range(h) for x in range(w)]
    box = _texture(p, _of_array(p, _filled(p, (w, h, d), FLOAT, 1, 0, content)), _how(p))
    middles = [(x + 0.5, y + 0.5, z + 0.5) for x, y, z in places]
    p.equal(_first(_fetch(p, _tex("3d"), box, middles)), numbers, "texels of a box")
    layers = _texture(p, _of_array(p, _filled(p, (w, h, d), FLOAT, 1, LAYERED, content)), _how(p))
    found = _fetch(p, _tex("a2d"), layers, [(z, x + 0.5, y + 0.5) for x, y, z in places], "Iff")
    p.equal(_first(found), numbers, "texels of layers")
    flat = _texture(p, _of_array(p, _filled(p, (w, h, 0), FLOAT, 1, 0, content[: w * h * 4])), _how(p))
    p.equal(_first(_fetch(p, _tex("2d"), flat, middles[: w * h])), numbers[: w * h], "texels of a plane")
    lines = _texture(p, _of_array(p, _filled(p, (w, 0, h), FLOAT, 1, LAYERED, content[: w * h * 4])), _how(p))
    found = _fetch(p, _tex("a1d"), lines, [(y, x + 0.25) for x, y, _ in places[: w * h]], "If")
    p.equal(_first(found), numbers[: w * h], "texels of lines in layers")
    line = _texture(p, _of_array(p, _filled(p, (w, 0, 0), FLOAT, 1, 0, content[: w * 4])), _how(p))
    p.equal(
        _first(_fetch(p, _tex("1d"), line, [(x + 0.75,) for x in range(w)])), numbers[:w], "texels of a line"
    )


def _index(at: int, size: int, mode: int) -> int:
    """The texel that a mode finds for a number; -1 the border."""
    if mode == WRAP:
        return at % size
    if mode == MIRROR:
        at %= 2 * size
        return at if at < size else 2 * size - 1 - at
    if mode == CLAMP:
        return min(max(at, 0), size - 1)
    return at if 0 <= at < size else -1


@check
def modes(p: Probe) -> None:
    """What lies outside: clamped to the edge, wrapped around, mirrored, or the border's colour; each axis by its own mode."""
    w, h, colour = 8, 4, -7.0
    numbers = _numbers(w * h)
    array = _filled(p, (w, h, 0), FLOAT, 1, 0, struct.pack(f"<{w * h}f", *numbers))
    places = [(x, y) for x in range(-2 * w, 3 * w, 3) for y in range(-2 * h, 3 * h, 3)]
    fetch = _tex("2d")

    def wanted(at: tuple[int, int], across: int, down: int) -> float:
        x, y = _index(at[0], w, across), _index(at[1], h, down)
        return colour if x < 0 or y < 0 else numbers[y * w + x]

    for across, down, normalized in [
        (CLAMP, CLAMP, 0), (BORDER, BORDER, 0), (CLAMP, BORDER, 0), (CLAMP, CLAMP, 1), (WRAP, WRAP, 1), (MIRROR, MIRROR, 1),
        (BORDER, BORDER, 1), (WRAP, MIRROR, 1), (MIRROR, BORDER, 1), (CLAMP, WRAP, 1),
    ]:  # fmt: skip
        how = _how(p, (across, down, CLAMP), NORMALIZED * normalized, border=(colour, 0, 0, 0))
        texture = _texture(p, _of_array(p, array), how)
        scale = (w, h) if normalized else (1, 1)
        at = [((x + 0.5) / scale[0], (y + 0.5) / scale[1]) for x, y in places]
        expected = [wanted(place, across, down) for place in places]
        p.equal(
            _first(_fetch(p, fetch, texture, at)), expected, f"texels by modes {across}, {down}, {normalized}"
        )


@check
def filtering(p: Probe) -> None:
    """Between texels, the mean by nearness, to the eighth bit: along a line, in a plane and in a box."""
    w, h, d = 8, 6, 4
    numbers = _numbers(w * h * d)
    content = struct.pack(f"<{len(numbers)}f", *numbers)
    spread, steps = 101.0, [(k * 29 % 256) / 32 for k in range(64)]
    for shape, size in (("1d", (w, 0, 0)), ("2d", (w, h, 0)), ("3d", (w, h, d))):
        axes = [s for s in size if s]
        array = _filled(p, size, FLOAT, 1, 0, content[: 4 * math.prod(axes)])
        places = [[(step * (k + 1)) % (s + 2) - 1 for k, s in enumerate(axes)] for step in steps]
        expected = [_mean(numbers, axes, place) for place in places]
        for flags in (0, NORMALIZED):
            texture = _texture(p, _of_array(p, array), _how(p, flags=flags, linear=True))
            at = [[x / (s if flags else 1) for x, s in zip(place, axes, strict=True)] for place in places]
            got = _first(_fetch(p, _tex(shape), texture, at))
            _near(p, got, expected, len(axes) * spread / 256, f"a mean in {len(axes)} dimensions")


def _mean(numbers: list[float], sizes: list[int], place: list[float]) -> float:
    """The formula of the programming guide, along the last axis first; outside is the edge."""
    if not sizes:
        return numbers[0]
    step = math.prod(sizes[:-1])
    x = place[-1] - 0.5
    low, part = math.floor(x), x - math.floor(x)
    ends = []
    for at in (low, low + 1):
        first = _index(at, sizes[-1], CLAMP) * step
        ends.append(_mean(numbers[first : first + step], sizes[:-1], place[:-1]))
    return (1 - part) * ends[0] + part * ends[1]


@check
def formats(p: Probe) -> None:
    """Integers as they are with their sign, or as numbers from 0 or -1 to 1; halves; channels in order."""
    raw = bytes(k * 41 % 256 for k in range(64))
    raw = b"\x80\x00\x80\xff\x7f\x80\xff\xff" + raw[8:]
    for form, letter, bits, is_signed in (
        (UINT8, "B", 8, False), (SINT8, "b", 8, True), (UINT16, "H", 16, False), (SINT16, "h", 16, True),
    ):  # fmt: skip
        for channels in (1, 2, 4):
            count = 8
            values = struct.unpack_from(f"<{count * channels}{letter}", raw)
            resource = _of_array(
                p, _filled(p, (count, 0, 0), form, channels, 0, raw[: count * channels * bits // 8])
            )
            at = [(x + 0.5,) for x in range(count)]
            kind = "s32" if is_signed else "u32"
            plain = _fetch(p, _tex("1d", kind), _texture(p, resource, _how(p, flags=AS_INTEGER)), at)
            words = struct.unpack(f"<{4 * count}{'i' if is_signed else 'I'}", plain)
            p.equal(_channels(words, channels), list(values), f"integers of {bits} bits")
            scaled = _fetch(p, _tex("1d"), _texture(p, resource, _how(p)), at)
            largest = (1 << (bits - is_signed)) - 1
            expected = [max(value / largest, -1.0) for value in values]
            got = _channels(struct.unpack(f"<{4 * count}f", scaled), channels)
            _near(p, got, expected, 1e-6, f"numbers of {bits} bits")
    halves = [0.0, 1.5, -2.0, 1000.0, 2.0**-14, -0.25, 65504.0, 3.0]
    array = _filled(p, (4, 0, 0), HALF, 2, 0, struct.pack("<8e", *halves))
    found = _fetch(p, _tex("1d"), _texture(p, _of_array(p, array), _how(p)), [(x + 0.5,) for x in range(4)])
    p.equal(_channels(struct.unpack("<16f", found), 2), halves, "halves")


def _channels(words: Sequence[Any], channels: int) -> list[Any]:
    """The channels that there are, of four for each."""
    return [word for index, word in enumerate(words) if index % 4 < channels]


@check
def device_memory(p: Probe) -> None:
    """A row of device memory by numbers, and a rectangle with a pitch; what is written later is seen by the next kernel."""
    values = [k * k - 500 for k in range(100)]
    memory = p.device(struct.pack("<100i", *values))
    row = _texture(p, _of_row(p, memory, 0x0A, 2, 400), _how(p))
    image = _tex("1d", "s32", "s32")
    at = [(k * 7 % 50,) for k in range(50)]
    words = struct.unpack("<200i", _fetch(p, image, row, at, "i"))
    p.equal(_channels(words, 2), [v for (k,) in at for v in values[2 * k : 2 * k + 2]], "elements of a row")
    view = p.pack("<IxxxxQQQIIII64x", 0, 50, 0, 0, 0, 0, 0, 0)
    # Views are documented for arrays; one of memory is taken, and no matter.
    viewed = _texture(p, _of_row(p, memory, 0x0A, 2, 400), _how(p), view)
    p.equal(
        _fetch(p, image, viewed, at, "i"), _fetch(p, image, row, at, "i"), "elements of a row with a view"
    )
    p.upload(memory, struct.pack("<2i", 11, -12))
    p.equal(
        struct.unpack("<2i", _fetch(p, image, row, [(0,)], "i")[:8]), (11, -12), "an element that was changed"
    )
    most = p.value("cuDeviceGetTexture1DLinearMaxWidth", FLOAT, 4, 0, kind="size_t")
    p.true(most >= 1 << 20, f"a row of {most} elements of 16 bytes is long")
    w, h, pitch = 10, 6, 512
    numbers = _numbers(w * h)
    lines = [struct.pack(f"<{w}f", *numbers[y * w : y * w + w]).ljust(pitch, b"\xee") for y in range(h)]
    flat = p.device(b"".join(lines))
    resource = p.pack("<IxxxxQIIQQQ96x", 3, flat, FLOAT, 1, w, h, pitch)
    places = [(x + 0.5, y + 0.5) for y in range(-1, h + 1) for x in range(-1, w + 1)]
    expected = [
        numbers[_index(int(y), h, CLAMP) * w + _index(math.floor(x), w, CLAMP)]
        for x, y in [(a, math.floor(b)) for a, b in places]
    ]
    p.equal(_first(_fetch(p, _tex("2d"), _texture(p, resource, _how(p)), places)), expected, "a rectangle")
    middle = _fetch(p, _tex("2d"), _texture(p, resource, _how(p, linear=True)), [(3.0, 2.5)])
    _near(p, _first(middle), [(numbers[2 * w + 2] + numbers[2 * w + 3]) / 2], 101 / 256, "between two texels")


@check
def views(p: Probe) -> None:
    """An array's texels as another format of the same size, and some of its layers as all."""
    numbers = _numbers(4 * 2 * 3)
    array = _filled(p, (4, 2, 3), FLOAT, 1, LAYERED, struct.pack("<24f", *numbers))
    view = p.pack("<IxxxxQQQIIII64x", 0x0D, 4, 2, 3, 0, 0, 1, 2)
    texture = _texture(p, _of_array(p, array), _how(p), view)
    places = [(z, x + 0.5, y + 0.5) for z in range(2) for y in range(2) for x in range(4)]
    words = struct.unpack("<64I", _fetch(p, _tex("a2d", "u32"), texture, places, "Iff"))
    p.equal(struct.pack("<16I", *words[::4]), struct.pack("<16f", *numbers[8:]), "layers 1 and 2 as words")


@check
def refused(p: Probe) -> None:
    """What cuTexObjectCreate and cuSurfObjectCreate document as invalid."""
    array = _filled(p, (4, 4, 0), FLOAT, 1, 0, bytes(64))
    memory = p.device(4096)
    cell = p.cell()
    p.expect(1, "cuTexObjectCreate", cell, p.pack("<IxxxxQ120xIxxxx", 0, array, 1), _how(p), 0)
    p.expect(1, "cuTexObjectCreate", cell, _of_row(p, memory + 4, FLOAT, 1, 1024), _how(p), 0)
    p.expect(1, "cuSurfObjectCreate", cell, _of_row(p, memory, FLOAT, 1, 4096))


def _surface(p: Probe, array: int) -> int:
    """A surface object, destroyed after the check."""
    value = p.value("cuSurfObjectCreate", _of_array(p, array))
    p.later("cuSurfObjectDestroy", value)
    return value


def _at(places: Sequence[Sequence[int]]) -> bytes:
    return b"".join(struct.pack("<4i", *[*place, 0, 0, 0, 0][:4]) for place in places)


def _read(p: Probe, image: bytes, surface: int, places: Sequence[Sequence[int]], width: int) -> list[bytes]:
    out = p.device(16 * len(places))
    p.launch(p.function("read", image), 1, len(places), "QQQ", surface, p.device(_at(places)), out)
    found = p.download(out, 16 * len(places))
    return [found[16 * k : 16 * k + width] for k in range(len(places))]


def _write(
    p: Probe, image: bytes, surface: int, places: Sequence[Sequence[int]], values: Sequence[bytes]
) -> None:
    packed = p.device(b"".join(value.ljust(16, b"\0") for value in values))
    p.launch(p.function("write", image), 1, len(places), "QQQ", surface, p.device(_at(places)), packed)
    p.ok("cuCtxSynchronize")


def _ordered(shape: str, x: int, y: int, z: int) -> tuple[int, ...]:
    """Coordinates as an instruction takes them: a layer comes first."""
    return (z, x, y) if shape == "a2d" else (z, x) if shape == "a1d" else (x, y, z)


@check
def surfaces(p: Probe) -> None:
    """Elements of every size are read and written, columns counted in bytes, in every dimension and in layers."""
    shapes: list[tuple[str, str, int, int]] = [
        ("b8", "2d", UINT8, 1), ("b16", "1d", UINT16, 1), ("b32", "3d", UINT32, 1), ("b64", "a1d", UINT32, 2),
        ("v2.b32", "a2d", UINT32, 2), ("v4.b32", "2d", FLOAT, 4), ("v2.b64", "3d", FLOAT, 4), ("v4.b8", "2d", UINT8, 4),
    ]  # fmt: skip
    for kind, shape, form, channels in shapes:
        width, w = _WIDTHS[kind], 8
        h = 3 if shape in ("2d", "3d", "a2d") else 0
        d = 4 if shape in ("3d", "a1d", "a2d") else 0
        rows, slices = h or 1, d or 1
        content = bytes(k * 73 % 251 for k in range(w * width * rows * slices))
        flags = SURFACE | (LAYERED if shape[0] == "a" else 0)
        array = _filled(p, (w, h, d), form, channels, flags, content)
        surface, image = _surface(p, array), _surf(shape, kind, "trap")
        cells = [(x, y, z) for z in range(slices) for y in range(rows) for x in range(w)]
        places = [_ordered(shape, x * width, y, z) for x, y, z in cells]
        parts = [content[k * width : k * width + width] for k in range(len(cells))]
        p.equal(_read(p, image, surface, places, width), parts, f"suld.b.{shape}.{kind}")
        turned = [part[::-1] for part in parts[::-1]]
        _write(p, image, surface, places, turned)
        p.equal(_content(p, array, w * width, rows, slices), b"".join(turned), f"sust.b.{shape}.{kind}")


@check
def edges_of_surfaces(p: Probe) -> None:
    """Outside: zeros and nothing written, or the nearest element."""
    w, h = 8, 4
    words = list(range(1, w * h + 1))
    array = _filled(p, (w, h, 0), UINT32, 1, SURFACE, struct.pack(f"<{w * h}I", *words))
    surface = _surface(p, array)
    places = [(4 * x, y) for x in (-3, 0, 5, 7, 8, 100) for y in (-1, 0, 3, 4)]
    zero, clamp = _surf("2d", "b32", "zero"), _surf("2d", "b32", "clamp")

    def word(x: int, y: int) -> int:
        return words[y * w + x]

    inside = [word(x // 4, y) if 0 <= x < 4 * w and 0 <= y < h else 0 for x, y in places]
    near = [word(_index(x // 4, w, CLAMP), _index(y, h, CLAMP)) for x, y in places]
    p.equal(_read(p, zero, surface, places, 4), [v.to_bytes(4, "little") for v in inside], "zeros outside")
    p.equal(
        _read(p, clamp, surface, places, 4), [v.to_bytes(4, "little") for v in near], "the nearest outside"
    )
    outside = [place for place, value in zip(places, inside, strict=True) if not value]
    _write(p, zero, surface, outside, [b"\xff" * 4] * len(outside))
    p.equal(
        _content(p, array, 4 * w, h), struct.pack(f"<{w * h}I", *words), "the array after stores to nowhere"
    )
    _write(p, clamp, surface, [(400, 1), (-4, 100)], [b"\x55" * 4, b"\x66" * 4])
    words[1 * w + 7], words[3 * w] = 0x55555555, 0x66666666
    p.equal(
        _content(p, array, 4 * w, h), struct.pack(f"<{w * h}I", *words), "the array after stores at its edges"
    )


@check
def surfaces_and_textures(p: Probe) -> None:
    """What a kernel writes to a surface, the next one finds in a texture of the same array; and copies find it."""
    array = _filled(p, (16, 2, 0), FLOAT, 1, SURFACE, bytes(128))
    surface, texture = _surface(p, array), _texture(p, _of_array(p, array), _how(p))
    numbers = _numbers(32)
    cells = [(x, y) for y in range(2) for x in range(16)]
    _write(
        p,
        _surf("2d", "b32", "trap"),
        surface,
        [(4 * x, y) for x, y in cells],
        [struct.pack("<f", v) for v in numbers],
    )
    p.equal(_first(_fetch(p, _tex("2d"), texture, [(x + 0.5, y + 0.5) for x, y in cells])), numbers, "texels")
    flat = p.device(128)
    box = (0, 0, 0, 0, ARRAY, 0, 0, array, 0, 0, 0, 0, 0, 0, 0, DEVICE, 0, flat, 0, 0, 64, 2, 64, 2, 1)
    p.ok("cuMemcpy3DAsync_v2", p.pack(LAYOUT_3D, *box), 0)
    p.equal(p.download(flat, 128), struct.pack("<32f", *numbers), "the array")


@fatal_check
def trap_outside_a_surface(p: Probe) -> None:
    """The default: an access outside ends the context."""
    array = _filled(p, (8, 4, 0), UINT32, 1, SURFACE, bytes(128))
    image, surface = _surf("2d", "b32", "trap"), _surface(p, array)
    p.launch(p.function("read", image), 1, 1, "QQQ", surface, p.device(_at([(64, 1)])), p.device(16))
    if p.call("cuCtxSynchronize") == 0:
        raise Mismatch("a surface access outside went through")
    p.drop_cleanups()
