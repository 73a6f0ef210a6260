# SPDX-License-Identifier: Apache-2.0
"""The linker of the software GPU: one piece of PTX in, the same PTX out as what a module can be loaded from.

Real drivers give machine code back. Here PTX is the machine code. Several pieces are refused: symbols are not resolved
between modules.
"""

from __future__ import annotations

import ctypes

import attrs

from . import attributes as facts
from .entries import NOT_SUPPORTED, entry
from .fatbin import MalformedImage, NoUsableImage, select_ptx
from .host import get_bytes, put_u64
from .ptx import load_ptx
from .state import CudaError, Device

PTX, FATBIN = 1, 2
INVALID_IMAGE, NO_BINARY_FOR_GPU = 200, 209


@attrs.define(eq=False)
class Link:
    """A link in progress. The product stays until the link is destroyed."""

    pieces: list[str] = attrs.Factory(list)
    product: object = None


@entry
def cuLinkCreate_v2(device: Device, count: int, options: int, values: int, out: int) -> None:
    put_u64(out, device.add(Link()))


@entry
def cuLinkAddData_v2(
    device: Device,
    handle: int,
    kind: int,
    data: int,
    size: int,
    name: int,
    count: int,
    options: int,
    values: int,
) -> None:
    link = device.get(handle, Link)
    if kind not in (PTX, FATBIN):
        raise CudaError(NO_BINARY_FOR_GPU, f"linker input of type {kind}; the software GPU executes PTX only")
    try:
        text = select_ptx(get_bytes(data, size), facts.COMPUTE_CAPABILITY)
    except MalformedImage as error:
        raise CudaError(INVALID_IMAGE, str(error)) from None
    except NoUsableImage as error:
        raise CudaError(NO_BINARY_FOR_GPU, str(error)) from None
    if ".version" not in text:
        raise CudaError(INVALID_IMAGE, "not PTX")
    load_ptx(text)  # what is wrong with it is said now
    link.pieces.append(text)


@entry
def cuLinkComplete(device: Device, handle: int, out: int, size: int) -> None:
    link = device.get(handle, Link)
    if len(link.pieces) != 1:
        raise CudaError(NOT_SUPPORTED, f"{len(link.pieces)} pieces to link; this device takes one")
    product = ctypes.create_string_buffer(link.pieces[0].encode())
    link.product = product
    put_u64(out, ctypes.addressof(product))
    put_u64(size, len(product))


@entry
def cuLinkDestroy(device: Device, handle: int) -> None:
    device.remove(handle, Link)
