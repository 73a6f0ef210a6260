# SPDX-License-Identifier: Apache-2.0
"""Textures and surfaces as kernels see them: fetching over lanes, with addressing modes and filtering.

Follows the CUDA programming guide's appendix on texture fetching: a coordinate is brought into the texture (wrap and mirror,
of normalized ones), scaled, and either its floor is the texel (point) or its two neighbours are mixed with a fraction of eight
bits (linear). What lies outside is an index outside, which each mode puts back in its own way, or the border's colour.

Memory is reached through a function of its caller, so every address is checked where all others are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, Final, TypeVar

import attrs
import numpy as np
import numpy.typing as npt

from ..memory import IllegalAddress, MisalignedAddress
from .batch import Batch, Group, pick
from .errors import Trap

Array = npt.NDArray[Any]
# (addresses, bytes of a channel, channels) -> an unsigned array for each channel
Reader = Callable[[Array, int, int], list[Array]]
T = TypeVar("T")

WRAP, CLAMP, MIRROR, BORDER = range(4)  # CUaddress_mode
HALF, FLOAT = 0x10, 0x20  # CUarray_format
SIGNED: Final = frozenset({0x08, 0x09, 0x0A})
# CUarray_format: bytes of one channel.
FORMAT_BYTES: Final = {0x01: 1, 0x02: 2, 0x03: 4, 0x08: 1, 0x09: 2, 0x0A: 4, HALF: 2, FLOAT: 4}
# Dimensions with coordinates of their own, and whether the first operand is a layer.
SHAPES: Final = {"1d": (1, False), "2d": (2, False), "3d": (3, False), "a1d": (1, True), "a2d": (2, True)}
_FAR: Final = float(1 << 31)  # farther out than any texture reaches
_FRACTION: Final = 256  # steps between two texels


@attrs.frozen
class Texels:
    """Elements in device memory: how many in a row, rows, and slices or layers; 1 where there is no such dimension."""

    address: int
    size: tuple[int, int, int]
    pitch: int  # bytes from row to row
    slice_bytes: int
    format: int
    channels: int

    @property
    def channel_bytes(self) -> int:
        """Bytes of one channel."""
        return FORMAT_BYTES[self.format]

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return self.channel_bytes * self.channels


@attrs.frozen
class Texture:
    """What a texture object stands for."""

    texels: Texels
    modes: tuple[int, int, int] = (CLAMP, CLAMP, CLAMP)
    is_linear: bool = False
    is_normalized: bool = False  # the coordinates
    reads_integers: bool = False  # 8 and 16 bits are not made numbers from 0, or -1, to 1
    border: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    @property
    def gives_floats(self) -> bool:
        """Floating point, or integers?"""
        return self.texels.format in (HALF, FLOAT) or (
            not self.reads_integers and self.texels.channel_bytes < 4
        )


@attrs.frozen
class Surface:
    """What a surface object stands for."""

    texels: Texels


# --- fetching -------------------------------------------------------------------------------------------------------


def sample(read: Reader, texture: Texture, shape: str, coordinates: Sequence[Array]) -> list[Array]:
    """Four 32-bit words for each lane. Coordinates are float32, or int32 for texels by number; a layer is uint32."""
    dimensions, has_layers = SHAPES[shape]
    rest = list(coordinates)
    layer: Array = np.zeros(1, np.int64)
    if has_layers:
        layer = np.minimum(rest.pop(0).astype(np.int64), texture.texels.size[2] - 1)
    axes = rest[:dimensions]
    by_number = axes[0].dtype.kind != "f"
    modes = [
        CLAMP if mode in (WRAP, MIRROR) and (by_number or not texture.is_normalized) else mode
        for mode in texture.modes[:dimensions]
    ]
    if by_number:
        values = _texel(read, texture, layer, [c.astype(np.int64) for c in axes], modes)
    else:
        sizes = texture.texels.size[:dimensions]
        positions = [
            _position(c, size, mode, texture.is_normalized)
            for c, size, mode in zip(axes, sizes, modes, strict=True)
        ]
        if texture.is_linear:
            values = _filtered(read, texture, layer, positions, modes)
        else:
            values = _texel(read, texture, layer, [np.floor(x).astype(np.int64) for x in positions], modes)
    # Nothing is documented of channels that there are not: 0, and 1 for the last.
    one = np.ones(1, values[0].dtype)
    values += [np.zeros(1, one.dtype), np.zeros(1, one.dtype), one][len(values) - 1 :]
    return [value.view(np.uint32) for value in values]


def _position(coordinate: Array, size: int, mode: int, is_normalized: bool) -> Array:
    """Where in the row of texels, whose first begins at 0."""
    x: Array = np.nan_to_num(coordinate.astype(np.float64), nan=0.0, posinf=_FAR, neginf=-_FAR)
    if is_normalized:
        whole = np.floor(x)
        if mode == WRAP:
            x = x - whole
        elif mode == MIRROR:
            x = np.where(whole % 2 == 0, x - whole, 1 - (x - whole))
        x = x * size
    return np.clip(x, -_FAR, _FAR)


def _inside(index: Array, size: int, mode: int) -> tuple[Array, Array | None]:
    """An index that exists, and where it is the one that was asked for (None: it need not be)."""
    if mode == WRAP:
        return index % size, None
    if mode == MIRROR:
        index = index % (2 * size)
        return np.where(index < size, index, 2 * size - 1 - index), None
    clamped = np.clip(index, 0, size - 1)
    return clamped, clamped == index if mode == BORDER else None


def _texel(
    read: Reader, texture: Texture, layer: Array, indices: Sequence[Array], modes: Sequence[int]
) -> list[Array]:
    """The channels of a texel, as float32 or uint32."""
    texels = texture.texels
    offset: Array = layer * texels.slice_bytes
    there: Array | None = None
    steps = (texels.element_bytes, texels.pitch, texels.slice_bytes)
    for index, size, mode, step in zip(indices, texels.size, modes, steps, strict=False):
        found, is_there = _inside(index, size, mode)
        offset = offset + found * step
        if is_there is not None:
            there = is_there if there is None else there & is_there
    address = (offset + texels.address).view(np.uint64)
    values = [_value(texture, raw) for raw in read(address, texels.channel_bytes, texels.channels)]
    if there is None or there.all():
        return values
    border = np.array(texture.border, np.float32).view(values[0].dtype)
    return [np.where(there, value, border[channel]) for channel, value in enumerate(values)]


def _value(texture: Texture, raw: Array) -> Array:
    """A channel as the texture gives it."""
    form, size = texture.texels.format, texture.texels.channel_bytes
    if form in (HALF, FLOAT):
        return raw.view(f"f{size}").astype(np.float32)
    integers: Array = raw.view(f"i{size}") if form in SIGNED else raw
    if not texture.gives_floats:
        return integers.astype(np.int32 if form in SIGNED else np.uint32).view(np.uint32)
    largest = (1 << (8 * size - (form in SIGNED))) - 1
    return np.maximum(integers.astype(np.float64) / largest, -1.0).astype(np.float32)


def _filtered(
    read: Reader, texture: Texture, layer: Array, positions: Sequence[Array], modes: Sequence[int]
) -> list[Array]:
    """The mean of the two, four or eight texels around, by nearness."""
    lower = [np.floor(x - 0.5) for x in positions]
    parts = [
        np.floor((x - 0.5 - low) * _FRACTION + 0.5) / _FRACTION
        for x, low in zip(positions, lower, strict=True)
    ]
    sums: list[Array] = [np.zeros(1, np.float64)] * texture.texels.channels
    for corner in product((0, 1), repeat=len(positions)):
        weight: Array = np.ones(1, np.float64)
        for part, is_upper in zip(parts, corner, strict=True):
            weight = weight * (part if is_upper else 1 - part)
        indices = [low.astype(np.int64) + step for low, step in zip(lower, corner, strict=True)]
        values = _texel(read, texture, layer, indices, modes)
        sums = [total + weight * value for total, value in zip(sums, values, strict=True)]
    return [total.astype(np.float32) for total in sums]


# --- lanes ----------------------------------------------------------------------------------------------------------


def _find(images: Mapping[int, object], value: int, kind: type[T], is_write: bool) -> T:
    """What an object's value stands for. Raises: IllegalAddress where it is none."""
    found = images.get(value)
    if not isinstance(found, kind):
        raise IllegalAddress(value, 4, is_write)
    return found


def _for_each(objects: Array, count: int, run: Callable[[int, Array | None], list[Array]]) -> list[Array]:
    """`run` once for each object with the lanes that name it (None: all), and the answers put together."""
    if (objects == objects[0]).all():
        return run(int(objects[0]), None)
    out: list[Array] = []
    for value in np.unique(objects):
        where = np.flatnonzero(objects == value)
        answers = run(int(value), where)
        out = out or [np.empty(count, answer.dtype) for answer in answers]
        for whole, answer in zip(out, answers, strict=True):
            whole[where] = answer
    return out


def fetch_texture(
    batch: Batch,
    group: Group,
    n: int,
    shape: str,
    objects: Array,
    coordinates: list[Array],
    lanes: Array | None,
) -> list[Array]:
    """tex: four words for each chosen lane. Raises: IllegalAddress."""
    if lanes is not None and not lanes.size:
        return [np.empty(0, np.uint32)] * 4
    objects, coordinates = pick(objects, lanes), [pick(c, lanes) for c in coordinates]

    def read(addresses: Array, size: int, channels: int) -> list[Array]:
        return batch.load(group, "global", addresses, size, channels)

    def run(value: int, where: Array | None) -> list[Array]:
        texture = _find(batch.images, value, Texture, False)
        return sample(read, texture, shape, [pick(c, where) for c in coordinates])

    return _for_each(objects, n if lanes is None else lanes.size, run)


def _places(
    surface: Surface, shape: str, coordinates: Sequence[Array], width: int, edge: str, is_write: bool
) -> tuple[Array, Array | None]:
    """Addresses, and which of them are the ones that were asked for (None: all, or it does not matter).

    Raises: Trap where the instruction is to trap at what lies outside, MisalignedAddress.
    """
    dimensions, has_layers = SHAPES[shape]
    texels = surface.texels
    rest = [c.astype(np.int64) for c in coordinates]
    limits = [texels.size[0] * texels.element_bytes - width, texels.size[1] - 1, texels.size[2] - 1]
    steps = [1, texels.pitch, texels.slice_bytes]
    axes = [*zip(rest[has_layers:][:dimensions], limits, steps, strict=False)]
    if has_layers:
        axes.append((rest[0], limits[2], steps[2]))
    x = axes[0][0]
    if int(np.bitwise_or.reduce(x)) & (width - 1):
        raise MisalignedAddress(int(x[(x & (width - 1)) != 0][0]) & 0xFFFF_FFFF, width, is_write)
    offset: Array = np.zeros(1, np.int64)
    there: Array = np.ones(1, bool)
    for index, limit, step in axes:
        if limit < 0:
            raise Trap(f"a surface access of {width} bytes to rows of {width + limit}")
        clamped = np.clip(index, 0, limit)
        there = there & (clamped == index)
        offset = offset + clamped * step
    address = (offset + texels.address).view(np.uint64)
    if edge == "clamp" or there.all():
        return address, None
    if edge == "trap":
        raise Trap("a surface access outside the surface")
    return address, there


def load_surface(
    batch: Batch, group: Group, n: int, shape: str, objects: Array, coordinates: list[Array], size: int, count: int,
    edge: str, lanes: Array | None,
) -> list[Array]:  # fmt: skip
    """suld.b: `count` elements of `size` bytes for each chosen lane. Raises: IllegalAddress, MisalignedAddress, Trap."""
    if lanes is not None and not lanes.size:
        return [np.empty(0, f"u{size}")] * count
    objects, coordinates = pick(objects, lanes), [pick(c, lanes) for c in coordinates]

    def run(value: int, where: Array | None) -> list[Array]:
        surface = _find(batch.images, value, Surface, False)
        chosen = [pick(c, where) for c in coordinates]
        address, there = _places(surface, shape, chosen, size * count, edge, False)
        # Rows have no gaps here, so an element may lie at an address that is no multiple of its size.
        piece = math.gcd(size, surface.texels.pitch)
        parts = [
            batch.load(group, "global", address + np.uint64(at), piece, 1)[0]
            for at in range(0, size * count, piece)
        ]
        words = np.ascontiguousarray(np.stack(parts, axis=-1)).view(f"u{size}")
        if there is not None:
            words = np.where(there[:, None], words, np.zeros(1, words.dtype))
        return [np.ascontiguousarray(words[:, place]) for place in range(count)]

    return _for_each(objects, n if lanes is None else lanes.size, run)


def store_surface(
    batch: Batch, group: Group, n: int, shape: str, objects: Array, coordinates: list[Array], values: list[Array],
    edge: str, lanes: Array | None,
) -> None:  # fmt: skip
    """sust.b. Where lanes collide, the highest lane's value stays. Raises: as load_surface."""
    if lanes is not None and not lanes.size:
        return
    objects, coordinates = pick(objects, lanes), [pick(c, lanes) for c in coordinates]
    values = [pick(v, lanes) for v in values]
    size = values[0].dtype.itemsize

    def run(value: int, where: Array | None) -> list[Array]:
        surface = _find(batch.images, value, Surface, True)
        chosen = [pick(c, where) for c in coordinates]
        address, there = _places(surface, shape, chosen, size * len(values), edge, True)
        lanes_there = None if there is None else np.flatnonzero(there)
        if lanes_there is not None and not lanes_there.size:
            return []
        if lanes_there is not None and there is not None and there.size > 1:
            address = pick(address, lanes_there)
        piece = math.gcd(size, surface.texels.pitch)
        for place, element in enumerate(values):
            mine = pick(element, where)
            if there is not None and there.size > 1:
                mine = pick(mine, lanes_there)
            pieces = np.ascontiguousarray(mine).view(f"u{piece}").reshape(mine.size, -1)
            for at in range(pieces.shape[1]):
                target = address + np.uint64(place * size + at * piece)
                batch.store(group, "global", target, piece, [np.ascontiguousarray(pieces[:, at])])
        return []

    _for_each(objects, n if lanes is None else lanes.size, run)
