# SPDX-License-Identifier: Apache-2.0
"""f16 and bf16 on arrays: f16 as float16, bf16 as its bits (uint16) or as the float32 it abbreviates.

Every operation is correctly rounded: what could round twice is first rounded to odd.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .conversions import integer_error
from .numerics import round_to_odd, sum_to_f32, two_sum

Array = npt.NDArray[Any]


def bf16_to_f32(bits: Array) -> Array:
    out: Array = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return out


def f32_to_bf16(a: Array, mode: str = "rn") -> Array:
    """Bits (uint16). NaN becomes 0x7fff."""
    bits = a.view(np.uint32)
    if mode in ("rz", "rm", "rp"):
        rounded = bits >> np.uint32(16)
        if mode != "rz":
            away = np.signbit(a) == (mode == "rm")
            rounded = rounded + (away & ((bits & np.uint32(0xFFFF)) != 0)).astype(np.uint32)
    else:
        rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    out: Array = np.where(np.isnan(a), np.uint32(0x7FFF), rounded).astype(np.uint16)
    return out


def _f64_to_f32_odd(s: Array, e: Array) -> Array:
    """s + e to f32, rounded to odd, so that rounding to bf16 or f16 afterwards is right."""
    odd = round_to_odd(s, e)
    truncated = sum_to_f32(odd, np.zeros_like(odd), "rz")
    inexact = truncated.astype(np.float64) != odd
    return np.where(
        inexact & np.isfinite(odd), truncated.view(np.uint32) | np.uint32(1), truncated.view(np.uint32)
    ).view(np.float32)


def fma_f16(a: Array, b: Array, c: Array) -> Array:
    """On float16."""
    product = a.astype(np.float64) * b.astype(np.float64)
    s, e = two_sum(product, c.astype(np.float64))
    out: Array = round_to_odd(s, np.where(np.isfinite(s), e, 0.0)).astype(np.float16)
    return out


def f32_to_f16(a: Array, mode: str = "rn") -> Array:
    out: Array = a.astype(np.float16)
    if mode == "rn":
        return out
    wide = out.astype(a.dtype)
    if mode == "rz":
        wrong, towards = np.abs(wide) > np.abs(a), np.float16(0)
    elif mode == "rm":
        wrong, towards = wide > a, np.float16(-np.inf)
    else:
        wrong, towards = wide < a, np.float16(np.inf)
    return np.where(wrong & np.isfinite(a), np.nextafter(out, towards), out)


def relu(a: Array) -> Array:
    """max(a, 0), NaN stays."""
    return np.where(a < 0, a.dtype.type(0), a)


def flush_f16(a: Array) -> Array:
    small = (np.abs(a) < np.float16(2.0**-14)) & (a != 0)
    return np.where(small, np.copysign(np.float16(0), a), a) if small.any() else a


def saturate_finite(a: Array) -> Array:
    """f16 overflow to the largest finite number; NaN becomes the canonical one."""
    largest = np.float16(65504)
    return np.where(np.isinf(a), np.copysign(largest, a), a)


def fma_bf16_wide(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of bf16 values held as f32, as an f32 that rounds to the right bf16."""
    s, e = two_sum(a.astype(np.float64) * b, c.astype(np.float64))
    return _f64_to_f32_odd(s, np.where(np.isfinite(s), e, 0.0))


def f64_to_bf16(a: Array, mode: str = "rn") -> Array:
    """Bits; from f64 or from integers (64-bit ones keep a sticky bit)."""
    wide = a.astype(np.float64)
    rest = integer_error(a, wide) if a.dtype.itemsize == 8 and a.dtype.kind in "iu" else np.zeros_like(wide)
    return f32_to_bf16(_f64_to_f32_odd(wide, rest), mode)
