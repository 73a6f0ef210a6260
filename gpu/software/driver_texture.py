# SPDX-License-Identifier: Apache-2.0
"""Texture and surface objects of the software GPU. What kernels do with them is in ptx/texture.py."""

from __future__ import annotations

from typing import Any, Final

from .array import CUBEMAP, LAYERED, SURFACE, Array
from .attributes import ATTRIBUTES
from .entries import INVALID_VALUE, NOT_SUPPORTED, entry
from .host import put_u64, unpack
from .ptx.texture import BORDER, FLOAT, FORMAT_BYTES, HALF, Surface, Texels, Texture
from .state import Context, CudaError, Device

ARRAY, MIPMAPPED, LINEAR, PITCH2D = range(4)  # CUresourcetype
READ_AS_INTEGER, NORMALIZED, SRGB, FAST_TRILINEAR_OFF, SEAMLESS = 0x01, 0x02, 0x10, 0x20, 0x40  # CU_TRSF_*
_FLAGS: Final = READ_AS_INTEGER | NORMALIZED | SRGB | FAST_TRILINEAR_OFF | SEAMLESS
# Numbers of CUdevice_attribute.
TEXTURE_ALIGNMENT, PITCH_ALIGNMENT = 14, 51
LINEAR_WIDTH, PITCHED_WIDTH, PITCHED_HEIGHT, LARGEST_PITCH = 69, 70, 71, 72

# CUresourceViewFormat: three of each, of 1, 2 and 4 channels, from 1 on.
_VIEW_FORMATS: Final = (0x01, 0x08, 0x02, 0x09, 0x03, 0x0A, HALF, FLOAT)
_RESOURCE: Final = (
    "<IxxxxQIIQQQ"  # CUDA_RESOURCE_DESC as far as PITCH2D reaches; LINEAR has its size in width's place
)
_RESOURCE_FLAGS: Final = 136
_TEXTURE: Final = "<7I3f4f"  # CUDA_TEXTURE_DESC
_VIEW: Final = "<IxxxxQQQ4I"  # CUDA_RESOURCE_VIEW_DESC


def _of_array(array: Array) -> Texels:
    asked = array.description
    size = (asked.width, array.rows, array.slices)
    return Texels(
        array.address, size, array.row_bytes, array.row_bytes * array.rows, asked.format, asked.channels
    )


def _of_view(array: Array, view: int) -> Texels:
    """An array seen as another format, or a part of its layers."""
    form, width, height, depth, first_level, last_level, first_layer, last_layer = unpack(_VIEW, view)
    asked, texels = array.description, _of_array(array)
    if form > 3 * len(_VIEW_FORMATS):
        raise CudaError(NOT_SUPPORTED, "compressed blocks are not built")
    if (width, height, depth) != (asked.width, asked.height, asked.depth) or first_level or last_level:
        raise CudaError(INVALID_VALUE, "a view of another size")
    if not first_layer <= last_layer < (array.slices if asked.flags & LAYERED else 1):
        raise CudaError(INVALID_VALUE, f"layers {first_layer} to {last_layer}")
    format_, channels = texels.format, texels.channels
    if form:
        format_, channels = _VIEW_FORMATS[(form - 1) // 3], (1, 2, 4)[(form - 1) % 3]
    if FORMAT_BYTES[format_] * channels != texels.element_bytes:
        raise CudaError(INVALID_VALUE, "a view whose elements have another size")
    address, slices = texels.address, texels.size[2]
    if asked.flags & LAYERED:
        address, slices = address + first_layer * texels.slice_bytes, last_layer - first_layer + 1
    size = (texels.size[0], texels.size[1], slices)
    return Texels(address, size, texels.pitch, texels.slice_bytes, format_, channels)


def _of_memory(kind: int, fields: tuple[Any, ...]) -> Texels:
    """A row of device memory, or a rectangle with a pitch."""
    address, form, channels, width, height, pitch = fields
    if form not in FORMAT_BYTES or channels not in (1, 2, 4):
        raise CudaError(INVALID_VALUE, f"format {form:#x} of {channels} channels")
    if not address or address % ATTRIBUTES[TEXTURE_ALIGNMENT]:
        raise CudaError(INVALID_VALUE, f"a texture at {address:#x}")
    element = FORMAT_BYTES[form] * channels
    if kind == LINEAR:
        elements = width // element
        if not 0 < elements <= ATTRIBUTES[LINEAR_WIDTH]:
            raise CudaError(INVALID_VALUE, f"{elements} elements")
        return Texels(address, (elements, 1, 1), width, width, form, channels)
    if (
        not 0 < width <= ATTRIBUTES[PITCHED_WIDTH]
        or not 0 < height <= ATTRIBUTES[PITCHED_HEIGHT]
        or not width * element <= pitch <= ATTRIBUTES[LARGEST_PITCH]
        or pitch % ATTRIBUTES[PITCH_ALIGNMENT]
    ):
        raise CudaError(INVALID_VALUE, f"{height} rows of {width} elements, {pitch} bytes apart")
    return Texels(address, (width, height, 1), pitch, pitch * height, form, channels)


def _resource(device: Device, resource: int) -> tuple[int, int, tuple[Any, ...]]:
    """(kind, address or handle, all fields)."""
    kind, *fields = unpack(_RESOURCE, resource)
    if kind == MIPMAPPED:
        raise CudaError(NOT_SUPPORTED, "mipmapped arrays are not built")
    if kind > PITCH2D or unpack("<I", resource + _RESOURCE_FLAGS)[0]:
        raise CudaError(INVALID_VALUE, f"a resource of kind {kind}")
    return kind, fields[0], tuple(fields)


def _own(device: Device, value: object, out: int) -> None:
    handle = device.add(value)
    device.context().handles.add(handle)
    put_u64(out, handle)


def _forget(device: Device, handle: int, kind: type[object]) -> None:
    if not isinstance(device.objects.get(handle), kind):
        raise CudaError(INVALID_VALUE, f"{handle:#x} is no {kind.__name__}")
    del device.objects[handle]
    for context in [value for value in device.objects.values() if isinstance(value, Context)]:
        context.handles.discard(handle)


@entry
def cuTexObjectCreate(device: Device, out: int, resource: int, texture: int, view: int) -> None:
    if not resource or not texture:
        raise CudaError(INVALID_VALUE)
    kind, first, fields = _resource(device, resource)
    if kind == ARRAY:
        array = device.get(first, Array)
        texels = _of_view(array, view) if view else _of_array(array)
    else:
        texels = _of_memory(kind, fields)
    x, y, z, filter_mode, flags, _anisotropy, _mip_filter, _bias, _least, _most, *border = unpack(
        _TEXTURE, texture
    )
    if max(x, y, z) > BORDER or filter_mode > 1 or flags & ~_FLAGS:
        raise CudaError(INVALID_VALUE, f"modes {x}, {y}, {z}, filter {filter_mode}, flags {flags:#x}")
    if flags & SEAMLESS and not (kind == ARRAY and array.description.flags & CUBEMAP):
        raise CudaError(INVALID_VALUE, "a seamless cube that is none")
    if flags & SRGB:
        raise CudaError(NOT_SUPPORTED, "sRGB is not built")
    if kind == LINEAR:  # which has neither modes nor a filter: nothing lies beside it
        _own(
            device,
            Texture(texels, (BORDER, BORDER, BORDER), reads_integers=bool(flags & READ_AS_INTEGER)),
            out,
        )
        return
    made = Texture(
        texels,
        (x, y, z),
        is_linear=bool(filter_mode),
        is_normalized=bool(flags & NORMALIZED),
        reads_integers=bool(flags & READ_AS_INTEGER),
        border=(border[0], border[1], border[2], border[3]),
    )
    if made.is_linear and not made.gives_floats:
        raise CudaError(INVALID_VALUE, "only numbers between texels are means of them")
    _own(device, made, out)


@entry
def cuTexObjectDestroy(device: Device, handle: int) -> None:
    _forget(device, handle, Texture)


@entry
def cuSurfObjectCreate(device: Device, out: int, resource: int) -> None:
    if not resource:
        raise CudaError(INVALID_VALUE)
    kind, first, _ = _resource(device, resource)
    if kind != ARRAY:
        raise CudaError(INVALID_VALUE, "a surface of what is no array")
    array = device.get(first, Array)
    if not array.description.flags & SURFACE:
        raise CudaError(INVALID_VALUE, "an array that was not made for surfaces")
    _own(device, Surface(_of_array(array)), out)


@entry
def cuSurfObjectDestroy(device: Device, handle: int) -> None:
    _forget(device, handle, Surface)


@entry
def cuDeviceGetTexture1DLinearMaxWidth(
    device: Device, out: int, form: int, channels: int, ordinal: int
) -> None:
    if form not in FORMAT_BYTES or channels not in (1, 2, 4):
        raise CudaError(INVALID_VALUE, f"format {form:#x} of {channels} channels")
    put_u64(out, ATTRIBUTES[LINEAR_WIDTH])
