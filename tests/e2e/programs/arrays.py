# SPDX-License-Identifier: Apache-2.0
"""CuPy as people use it: element-wise expressions, reductions, a kernel of one's own. Run by an interpreter with CuPy."""

import cupy  # type: ignore[import-not-found,unused-ignore]
import numpy

x = numpy.linspace(-3, 3, 1000, dtype=numpy.float32)
a = cupy.asarray(x)
b = cupy.arange(1000, dtype=cupy.float32)

numpy.testing.assert_allclose(
    cupy.asnumpy(a * b + 2), x * numpy.arange(1000, dtype=numpy.float32) + 2, rtol=1e-6
)
numpy.testing.assert_allclose(cupy.asnumpy(cupy.exp(a)), numpy.exp(x), rtol=2e-6)
numpy.testing.assert_array_equal(cupy.asnumpy(cupy.where(a > 0, a, -a)), numpy.abs(x))
print("element-wise")

assert int(cupy.arange(1000, dtype=cupy.int64).sum()) == 499500
assert float(b.max()) == 999
assert int(cupy.argmin(cupy.abs(a - 1))) == int(numpy.argmin(numpy.abs(x - 1)))
square = numpy.arange(60, dtype=numpy.float64).reshape(5, 12)
numpy.testing.assert_allclose(cupy.asnumpy(cupy.asarray(square).mean(axis=1)), square.mean(axis=1))
numpy.testing.assert_array_equal(cupy.asnumpy(cupy.asarray(square).T.copy()), square.T)
print("reductions")

kernel = cupy.RawKernel(
    r"""
extern "C" __global__ void collatz(const unsigned *start, unsigned *steps, int count)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count)
        return;
    unsigned n = start[i], taken = 0;
    while (n != 1) {
        n = n % 2 ? 3 * n + 1 : n / 2;
        taken++;
    }
    steps[i] = taken;
}
""",
    "collatz",
)
starts = cupy.arange(1, 501, dtype=cupy.uint32)
steps = cupy.zeros(500, dtype=cupy.uint32)
kernel((4,), (128,), (starts, steps, numpy.int32(500)))


def collatz(n: int) -> int:
    taken = 0
    while n != 1:
        n = 3 * n + 1 if n % 2 else n // 2
        taken += 1
    return taken


assert cupy.asnumpy(steps).tolist() == [collatz(n) for n in range(1, 501)]
print("raw kernel")

with cupy.cuda.Stream() as stream:
    total = cupy.zeros((), dtype=cupy.float32)
    for _ in range(5):
        total += b.sum()
    stream.synchronize()
assert float(total) == 5 * 499500
print("streams")
assert cupy.cuda.runtime.getDeviceCount() == 1
print("done")
