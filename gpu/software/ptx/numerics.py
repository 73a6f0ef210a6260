# SPDX-License-Identifier: Apache-2.0
"""Floating point as PTX defines it, on arrays: fused multiply-add, directed rounding, flushing, half formats,
saturation, conversions.

Exactness. add, sub, mul, div, sqrt and fma of f32 and f64 are correctly rounded in all four rounding modes (f64 in the
directed modes and f64 division and square root in them: through exact rational arithmetic, element by element, slowly). f16 and bf16
operations are correctly rounded. `.ftz` flushes subnormal inputs and results to signed zero. Not equal to hardware in the
last bits: the `.approx` functions (computed in f64 and rounded, so at least as accurate as the hardware's) and the
payload of NaNs.

Functions take and give arrays whose length is 1 (all lanes alike) or the number of lanes.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

F32_TINY: Final = np.float32(2.0**-126)
F64_TINY: Final = np.float64(2.0**-1022)
_LOW_29: Final = np.uint64((1 << 29) - 1)
_HALF_29: Final = np.uint64(1 << 28)

_libm: Final = ctypes.CDLL("libm.so.6")
_libm.fma.restype = ctypes.c_double
_libm.fma.argtypes = [ctypes.c_double, ctypes.c_double, ctypes.c_double]


def flush(x: Array) -> Array:
    """Subnormals to zero of the same sign (f32)."""
    small = (np.abs(x) < F32_TINY) & (x != 0)
    if not small.any():
        return x
    return np.where(small, np.copysign(np.float32(0), x), x)


def saturate(x: Array) -> Array:
    """Into [0, 1]; NaN becomes +0."""
    kind = x.dtype.type
    out: Array = np.where(np.isnan(x), kind(0), np.clip(x, kind(0), kind(1)) + kind(0))
    return out


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """s + e == a + b exactly, s rounded to nearest (no overflow)."""
    s = a + b
    bb = s - a
    return s, (a - (s - bb)) + (b - bb)


def round_to_odd(s: Array, e: Array) -> Array:
    """s + e rounded to odd: s where exact, else the neighbour with an odd last bit. Rounds right when rounded again."""
    bits = s.view(np.uint64)
    even = (bits & np.uint64(1)) == 0
    fix = (e != 0) & even & np.isfinite(s)
    if not fix.any():
        return s
    # Towards e: larger magnitude where e has the sign of s, smaller otherwise. s == 0 implies e == 0.
    up = (e > 0) == (s > 0)
    step = np.where(up, np.uint64(1), np.uint64(0xFFFF_FFFF_FFFF_FFFF))
    return np.where(fix, bits + step, bits).view(np.float64)


def sum_to_f32(s: Array, e: Array, mode: str) -> Array:
    """The exact value s + e (f64 each, |e| at most half an ulp of s) rounded to f32."""
    if mode == "rn":
        out: Array = s.astype(np.float32)
        bits = s.view(np.uint64)
        # Rounding twice only goes wrong where s looks like a tie, or where f32 is subnormal and ties lie elsewhere.
        doubt = (e != 0) & (((bits & _LOW_29) == _HALF_29) | (np.abs(s) < 2.0**-125))
        if doubt.any():
            out = np.where(doubt, round_to_odd(s, e).astype(np.float32), out)
        return out
    near: Array = s.astype(np.float32)
    rest = (s - near.astype(np.float64)) + e  # exact sign is what matters
    with_infinity = np.isinf(near) & np.isfinite(s)
    towards_zero = np.float32(3.4028234663852886e38)
    rest = np.where(with_infinity, np.where(s > 0, -1.0, 1.0), rest)
    down = rest < 0
    up = rest > 0
    lower = np.where(down, np.nextafter(near, np.float32(-np.inf)), near)
    upper = np.where(up, np.nextafter(near, np.float32(np.inf)), near)
    lower = np.where(with_infinity & (s > 0), towards_zero, lower)
    upper = np.where(with_infinity & (s < 0), -towards_zero, upper)
    if mode == "rm":
        out = lower
    elif mode == "rp":
        out = upper
    else:
        out = np.where(s > 0, lower, upper)
    return np.where(np.isfinite(s), out, near)


def _exact_zero_sign(out: Array, s: Array, mode: str, product: Array, c: Array) -> Array:
    """Where an exact sum of non-zero terms is zero, its sign is minus in rm and plus elsewhere."""
    if mode != "rm":
        return out
    cancel = (s == 0) & ((product != 0) | (np.signbit(product) != np.signbit(c)))
    return np.where(cancel, out.dtype.type(-0.0), out)


def fma_f32(a: Array, b: Array, c: Array, mode: str = "rn") -> Array:
    """a * b + c with one rounding. The product of two f32 is exact in f64; the sum is corrected by its error term."""
    product = a.astype(np.float64) * b
    wide = c.astype(np.float64)
    s = product + wide
    if mode == "rn":
        out: Array = s.astype(np.float32)
        doubt = ((s.view(np.uint64) & _LOW_29) == _HALF_29) | (np.abs(s) < 2.0**-125)
        if not doubt.any():
            return out
    total, error = two_sum(product, wide)
    # two_sum yields NaN where the sum is infinite; then s alone is the answer
    error = np.where(np.isfinite(total), error, 0.0)
    return _exact_zero_sign(sum_to_f32(total, error, mode), total, mode, product, wide)


def add_f32(a: Array, b: Array, mode: str = "rn") -> Array:
    if mode == "rn":
        out: Array = a + b
        return out
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    s, e = two_sum(wide_a, wide_b)
    return _exact_zero_sign(sum_to_f32(s, np.where(np.isfinite(s), e, 0.0), mode), s, mode, wide_a, wide_b)


def mul_f32(a: Array, b: Array, mode: str = "rn") -> Array:
    if mode == "rn":
        out: Array = a * b
        return out
    product = a.astype(np.float64) * b
    return sum_to_f32(product, np.zeros_like(product), mode)


def div_f32(a: Array, b: Array, mode: str = "rn") -> Array:
    if mode == "rn":
        out: Array = a / b
        return out
    quotient = a.astype(np.float64) / b
    # The remainder a - q*b tells on which side of the quotient the truth lies; f32 operands make it exact enough.
    high = np.where(np.isfinite(quotient), quotient, 0.0)
    remainder = fma_f64(-high, b.astype(np.float64), a.astype(np.float64))
    error = np.where(remainder == 0, 0.0, np.copysign(np.abs(high) * 2.0**-60, remainder * np.sign(b)))
    return sum_to_f32(quotient, np.where(np.isfinite(quotient), error, 0.0), mode)


def sqrt_f32(a: Array, mode: str = "rn") -> Array:
    if mode == "rn":
        out: Array = np.sqrt(a)
        return out
    root = np.sqrt(a.astype(np.float64))
    high = np.where(np.isfinite(root), root, 0.0)
    remainder = fma_f64(-high, high, np.where(np.isfinite(root), a.astype(np.float64), 0.0))
    error = np.where(remainder == 0, 0.0, np.copysign(np.abs(high) * 2.0**-60, remainder))
    return sum_to_f32(root, np.where(np.isfinite(root), error, 0.0), mode)


def rcp_f32(a: Array, mode: str = "rn") -> Array:
    return div_f32(np.ones(1, np.float32), a, mode)


def _split(a: Array) -> tuple[Array, Array]:
    t = a * 134217729.0
    high = t - (t - a)
    return high, a - high


def fma_f64(a: Array, b: Array, c: Array, mode: str = "rn") -> Array:
    """a * b + c with one rounding (Boldo and Melquiond: error-free product, sums, one step rounded to odd)."""
    if mode != "rn":
        return _exact_f64(lambda x, y, z: Fraction(x) * Fraction(y) + Fraction(z), (a, b, c), mode)
    a, b, c = np.broadcast_arrays(a, b, c)
    high = a * b
    a1, a2 = _split(a)
    b1, b2 = _split(b)
    low = ((a1 * b1 - high) + a1 * b2 + a2 * b1) + a2 * b2
    th, tl = two_sum(c, low)
    vh, vl = two_sum(high, th)
    s, e = two_sum(tl, vl)
    out: Array = vh + round_to_odd(s, e)
    # Splitting overflows for huge operands and error terms vanish for tiny ones: ask libm about those lanes.
    magnitude = np.abs(high)
    size_a, size_b, size_c = np.abs(a), np.abs(b), np.abs(c)
    safe = (size_a < 2.0**990) & (size_b < 2.0**990) & (magnitude < 2.0**1000) & (size_c < 2.0**1000)
    safe &= (magnitude > 2.0**-900) | ((high == 0) & ((a == 0) | (b == 0)))
    safe &= (size_c > 2.0**-960) | (c == 0)
    safe &= out != 0
    if not safe.all():
        out = out.copy()
        fma = _libm.fma
        for lane in np.flatnonzero(~safe):
            out[lane] = fma(a[lane], b[lane], c[lane])
    return out


def _round_fraction(value: Fraction, mode: str) -> float:
    try:
        near = float(value)  # correctly rounded to nearest even
    except OverflowError:
        near = math.inf if value > 0 else -math.inf
    if mode == "rn":
        return near
    below = -math.inf if near == -math.inf else near if near != math.inf and Fraction(near) <= value else None
    if below is None:
        below = math.nextafter(near, -math.inf)
    if below != -math.inf and Fraction(below) == value:
        return below
    above = math.nextafter(below, math.inf)
    if mode == "rm":
        return below
    if mode == "rp":
        return above
    return below if value > 0 else above


def _exact_f64(operation: Callable[..., Fraction], operands: tuple[Array, ...], mode: str) -> Array:
    """Lane by lane in rational arithmetic; non-finite lanes and exact zeros take the ordinary rules."""
    lanes = np.broadcast_arrays(*operands)
    out = np.empty(lanes[0].shape, np.float64)
    for lane in range(out.size):
        values = [float(operand[lane]) for operand in lanes]
        if not all(map(math.isfinite, values)):
            out[lane] = _plain(values)
            continue
        exact = operation(*values)
        if exact == 0:
            plain = _plain(values)
            signs = {math.copysign(1.0, values[0] * values[1]), math.copysign(1.0, values[-1])}
            cancels = len(values) == 3 and len(signs) == 2
            out[lane] = (-0.0 if mode == "rm" else 0.0) if cancels else plain
        else:
            rounded = _round_fraction(exact, mode)
            out[lane] = math.copysign(rounded, 1.0 if exact > 0 else -1.0)
    return out


def _plain(values: list[float]) -> float:
    if len(values) == 3:
        with np.errstate(all="ignore"):
            return float(np.float64(values[0]) * np.float64(values[1]) + np.float64(values[2]))
    return float(np.float64(values[0]) * np.float64(values[1]))


def add_f64(a: Array, b: Array, mode: str = "rn") -> Array:
    if mode == "rn":
        out: Array = a + b
        return out
    return fma_f64(a, np.ones(1), b, mode)


def mul_f64(a: Array, b: Array, mode: str = "rn") -> Array:
    if mode == "rn":
        out: Array = a * b
        return out
    return _exact_f64(lambda x, y: Fraction(x) * Fraction(y), (a, b), mode)


def directed(near: Array, remainder_sign: Array, mode: str) -> Array:
    """A correctly rounded value moved to its neighbour where the truth lies on the other side."""
    if mode == "rn":
        return near
    down = np.nextafter(near, -np.inf)
    up = np.nextafter(near, np.inf)
    lower = np.where(remainder_sign < 0, down, near)
    upper = np.where(remainder_sign > 0, up, near)
    chosen = lower if mode == "rm" else upper if mode == "rp" else np.where(near > 0, lower, upper)
    return np.where(np.isfinite(near) & (near != 0), chosen, near)


def div_f64(a: Array, b: Array, mode: str = "rn") -> Array:
    near: Array = a / b
    if mode == "rn":
        return near
    out = near.copy()
    for lane, (x, y) in enumerate(
        zip(*(np.broadcast_to(v, near.shape).tolist() for v in (a, b)), strict=True)
    ):
        if math.isfinite(x) and math.isfinite(y) and x != 0 and y != 0:
            exact = Fraction(x) / Fraction(y)
            out[lane] = math.copysign(_round_fraction(exact, mode), 1.0 if exact > 0 else -1.0)
    return out


def rcp_f64(a: Array, mode: str = "rn") -> Array:
    return div_f64(np.ones(1), a, mode)


def sqrt_f64(a: Array, mode: str = "rn") -> Array:
    near: Array = np.sqrt(a)
    if mode == "rn":
        return near
    sides = [_side_of_square(root, x) for root, x in zip(near.tolist(), a.tolist(), strict=True)]
    return directed(near, np.array(sides), mode)


def _side_of_square(root: float, x: float) -> float:
    """+1 where the true root is above `root`, -1 where below, 0 where it is exact or not finite."""
    if not math.isfinite(root):
        return 0.0
    square = Fraction(root) ** 2
    return float((square < x) - (square > x))


def minimum(a: Array, b: Array) -> Array:
    """IEEE minNum with -0 < +0; NaN only where both are."""
    low = np.fmin(a, b)
    return np.where((a == b) & (a == 0), np.where(np.signbit(a), a, b), low)


def maximum(a: Array, b: Array) -> Array:
    high = np.fmax(a, b)
    return np.where((a == b) & (a == 0), np.where(np.signbit(a), b, a), high)


def propagate_nan(result: Array, *operands: Array) -> Array:
    """min.NaN and max.NaN: the canonical NaN where any operand is one."""
    bad = np.isnan(operands[0])
    for operand in operands[1:]:
        bad = bad | np.isnan(operand)
    return np.where(bad, result.dtype.type(np.nan), result)


# --- approximations: computed in f64 --------------------------------------------------------------------------------


def approximate(function: Callable[[Array], Array], a: Array) -> Array:
    out: Array = function(a.astype(np.float64)).astype(np.float32)
    return out


def rsqrt(a: Array) -> Array:
    out: Array = (1.0 / np.sqrt(a.astype(np.float64))).astype(a.dtype)
    return out
