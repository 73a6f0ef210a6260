# SPDX-License-Identifier: Apache-2.0
"""Conversions between integers and floating point, and between f64 and f32, in every rounding mode, on arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .numerics import directed, sum_to_f32

Array = npt.NDArray[Any]

_ROUND: Final[dict[str, Callable[[Array], Array]]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}


def to_integral(a: Array, mode: str) -> Array:
    """Round to an integer, staying floating point (cvt.rni.f32.f32 and kin)."""
    out: Array = _ROUND[mode](a)
    return out


def to_integer(a: Array, mode: str, target: npt.DTypeLike) -> Array:
    """Float to integer: rounds, clamps to the target's range; NaN is 0, or the top bit alone where 64 bits are involved."""
    kind = np.dtype(target)
    limits = np.iinfo(kind)
    rounded = _ROUND[mode](a.astype(np.float64))
    nan = np.isnan(rounded)
    # Bounds that f64 can hold; the upper one is exclusive for 64 bits.
    low, high = float(limits.min), float(limits.max)
    above = rounded >= high if kind.itemsize == 8 else rounded > high
    below = rounded < low
    inside = np.where(nan | above | below, 0.0, rounded)
    if kind == np.uint64:
        out: Array = inside.astype(np.uint64)
    else:
        out = inside.astype(np.int64).astype(kind)
    if above.any() or below.any() or nan.any():
        out = np.where(above, kind.type(limits.max), np.where(below, kind.type(limits.min), out))
        if kind.itemsize == 8 or a.dtype == np.float64:
            top = np.array([1 << (kind.itemsize * 8 - 1)], dtype=f"u{kind.itemsize}").view(kind)
            out = np.where(nan, top, out)
    return out


def integer_to_f32(a: Array, mode: str) -> Array:
    if mode == "rn":
        out: Array = a.astype(np.float32)
        return out
    if a.dtype.itemsize < 8:
        wide = a.astype(np.float64)
        return sum_to_f32(wide, np.zeros_like(wide), mode)
    near = a.astype(np.float64)
    rest = integer_error(a, near)
    return sum_to_f32(near, rest, mode)


def integer_error(a: Array, near: Array) -> Array:
    """a - near, exactly, for 64-bit integers (small, so it fits f64)."""
    if a.dtype == np.uint64:
        top = near >= 2.0**64
        back = np.where(top, 0.0, near).astype(np.uint64)
    else:
        top = near >= 2.0**63
        back = np.where(top, -(2.0**63), near).astype(np.int64).view(np.uint64)
    out: Array = (a.view(np.uint64) - back).view(np.int64).astype(np.float64)
    return out


def integer_to_f64(a: Array, mode: str) -> Array:
    near: Array = a.astype(np.float64)
    if mode == "rn" or a.dtype.itemsize < 8:
        return near
    return directed(near, integer_error(a, near), mode)


def f64_to_f32(a: Array, mode: str) -> Array:
    if mode == "rn":
        out: Array = a.astype(np.float32)
        return out
    return sum_to_f32(a, np.zeros_like(a), mode)
