# SPDX-License-Identifier: Apache-2.0
"""The 8-bit floating point formats e4m3 and e5m2: conversion from f32 with saturation, and to f16.

Both are small enough to be tables: the value of each code, and for encoding the ascending non-negative finite values.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_EXPONENT_BITS: Final = {"e4m3": 4, "e5m2": 5}
_LARGEST_CODE: Final = {"e4m3": 0x7E, "e5m2": 0x7B}  # of a finite value; e4m3 has no infinities
_NAN: Final = 0x7F


def _values(kind: str) -> Array:
    """What each of the 256 codes stands for, as float16 (which holds all of them)."""
    exponent_bits = _EXPONENT_BITS[kind]
    mantissa_bits = 7 - exponent_bits
    bias = (1 << (exponent_bits - 1)) - 1
    values = []
    for code in range(128):
        exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        if exponent == 0:
            value = mantissa * 2.0 ** (1 - bias - mantissa_bits)
        else:
            value = (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)
        if code > _LARGEST_CODE[kind]:
            value = np.inf if kind == "e5m2" and mantissa == 0 else np.nan
        values.append(value)
    return np.array([*values, *(-value for value in values)], dtype=np.float16)


_TABLES: Final = {kind: _values(kind) for kind in _EXPONENT_BITS}
_FINITE: Final = {
    kind: table[: _LARGEST_CODE[kind] + 1].astype(np.float64) for kind, table in _TABLES.items()
}


def decode_float8(codes: Array, kind: str) -> Array:
    """uint8 codes to float16."""
    out: Array = _TABLES[kind][codes]
    return out


def encode_float8(a: Array, kind: str) -> Array:
    """float32 to uint8 codes, to nearest even; what is too large becomes the largest finite value, NaN stays NaN."""
    finite = _FINITE[kind]
    magnitude = np.minimum(np.where(np.isnan(a), 0, np.abs(a)).astype(np.float64), finite[-1])
    below = np.searchsorted(finite, magnitude, side="right") - 1
    above = np.minimum(below + 1, finite.size - 1)
    to_below, to_above = magnitude - finite[below], finite[above] - magnitude
    up = (to_above < to_below) | ((to_above == to_below) & (below % 2 == 1))
    code = np.where(up, above, below).astype(np.uint8)
    code = np.where(np.isnan(a), np.uint8(_NAN), code)
    out: Array = np.where(np.signbit(a) & ~np.isnan(a), code | np.uint8(0x80), code)
    return out
