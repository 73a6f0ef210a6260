# SPDX-License-Identifier: Apache-2.0
"""CuPy's precompiled CUB and Thrust against NumPy: libraries with machine code for many GPUs and PTX for the newest only.

CuPy does not look at what CUB returns: what cannot run is a wrong number here, not an error. Run by an interpreter with CuPy.
"""

from typing import Any

import cupy  # type: ignore[import-not-found,unused-ignore]
import numpy
from cupy._core import get_routine_accelerators  # type: ignore[import-not-found,unused-ignore]
from cupy._core._accelerator import ACCELERATOR_CUB  # type: ignore[import-not-found,unused-ignore]

assert ACCELERATOR_CUB in get_routine_accelerators(), "CuPy's default has changed"
generator = numpy.random.default_rng(7)


def sample(kind: str, *shape: int) -> Any:
    if kind in "fdF":
        return (generator.standard_normal(shape) * 10).astype(kind)
    return generator.integers(0 if kind.isupper() else -100, 100, shape).astype(kind)


def agree(got: Any, want: Any) -> None:
    if numpy.asarray(want).dtype.kind in "fc":
        numpy.testing.assert_allclose(cupy.asnumpy(got), want, rtol=1e-4, atol=1e-3)
    else:
        numpy.testing.assert_array_equal(cupy.asnumpy(got), want)


assert int(cupy.arange(1000).sum()) == 499500
for kind in "ilfdF":
    for count in (1, 70001) if kind == "l" else (1000,):
        values = sample(kind, count)
        for name in ("sum", "max", "min") if kind != "F" else ("sum",):
            agree(getattr(cupy, name)(cupy.asarray(values)), getattr(numpy, name)(values))
        if kind != "F":
            agree(cupy.asarray(values).argmax(), values.argmax())
            agree(cupy.asarray(values).argmin(), values.argmin())
matrix = sample("d", 37, 53)
agree(cupy.asarray(matrix).sum(axis=1), matrix.sum(axis=1))
agree(cupy.asarray(matrix).max(axis=1), matrix.max(axis=1))
print("reductions")

for kind in "ld":
    values = sample(kind, 20001 if kind == "l" else 1000)
    agree(cupy.cumsum(cupy.asarray(values)), numpy.cumsum(values))
agree(cupy.cumprod(cupy.full(20, 2)), 2 ** numpy.arange(1, 21))
values = sample("i", 5000)
agree(cupy.asarray(values)[cupy.asarray(values) > 3], values[values > 3])
print("scans")

for kind in "ld":
    values = sample(kind, 3000)
    agree(cupy.histogram(cupy.asarray(values), bins=17)[0], numpy.histogram(values, bins=17)[0])
    edges = numpy.array([-50, -1, 0, 3, 80], kind)  # CuPy makes edges whole for whole numbers
    agree(cupy.histogram(cupy.asarray(values), cupy.asarray(edges))[0], numpy.histogram(values, edges)[0])
print("histograms")

for kind in "Hilf":
    values = sample(kind, 10001 if kind == "i" else 1000)
    agree(cupy.sort(cupy.asarray(values)), numpy.sort(values))
    agree(cupy.argsort(cupy.asarray(values), kind="stable"), numpy.argsort(values, kind="stable"))
for axis in (0, 1):
    agree(cupy.sort(cupy.asarray(matrix), axis=axis), numpy.sort(matrix, axis=axis))
keys = sample("i", 3, 1000)
agree(cupy.lexsort(cupy.asarray(keys)), numpy.lexsort(keys))
print("sorting")
