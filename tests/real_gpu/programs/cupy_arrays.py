# SPDX-License-Identifier: Apache-2.0
"""CuPy: element-wise kernels, reductions, RawKernel, RawModule, streams, pinned memory, FFT and a GEMM."""

import cupy
import numpy
from report import close, digest, report

rng = numpy.random.default_rng(9)
host = rng.standard_normal(1_000_003)
array = cupy.asarray(host)
results = {
    "elementwise": digest(cupy.sin(array) * array + 2),
    "sum": array.sum().item().hex(),
    "max": array.max().item().hex(),
    "argmin": int(array.argmin()),
    "sorted": digest(cupy.sort(array)[:1000]),
    "integers": digest(cupy.arange(100000, dtype=cupy.int32) ** 2 % 977),
    "histogram": cupy.histogram(array, bins=16)[0].tolist(),
    "axis": digest(cupy.asarray(rng.standard_normal((130, 257))).mean(axis=1)),
}
close("elementwise", (cupy.sin(array) * array + 2).get(), numpy.sin(host) * host + 2, 1e-12)
# A scan over blocks adds in another order each time, natively too: compared with the CPU, not bit for bit.
close("cumulative", cupy.cumsum(array).get(), numpy.cumsum(host), 1e-10)
close("sum", array.sum().get(), host.sum(), 1e-10)
fused = cupy.ElementwiseKernel("float64 x, float64 y", "float64 z", "z = x > y ? x - y : x * y", "fused")
results["kernel"] = digest(fused(array, array[::-1].copy()))
squares = cupy.ReductionKernel("float64 x", "float64 y", "x * x", "a + b", "y = sqrt(a)", "0", "norm")
results["reduction"] = squares(array).item().hex()

raw = cupy.RawKernel(
    r"""
extern "C" __global__ void saxpy(float a, const float *x, const float *y, float *z, int n) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) z[i] = a * x[i] + y[i];
}""",
    "saxpy",
)
x, y = (cupy.asarray(rng.standard_normal(54321).astype(numpy.float32)) for _ in range(2))
z = cupy.empty_like(x)
raw((64,), (256,), (numpy.float32(1.5), x, y, z, numpy.int32(x.size)))
close("saxpy", z.get(), 1.5 * x.get() + y.get(), 1e-6)
results["raw"] = digest(z)

module = cupy.RawModule(
    code=r"""
__constant__ int table[4];
__device__ unsigned counter;
template <typename T> __global__ void scale(T *out, T factor) { out[threadIdx.x] *= factor * table[threadIdx.x & 3]; }
extern "C" __global__ void count() { atomicAdd(&counter, threadIdx.x); }
""",
    options=("-std=c++14",),
    name_expressions=("scale<float>", "scale<double>"),
)
table = cupy.ndarray(4, cupy.int32, module.get_global("table"))
table[...] = cupy.asarray([1, 2, 3, 4], cupy.int32)
for name, kind in (("scale<float>", numpy.float32), ("scale<double>", numpy.float64)):
    values = cupy.arange(64, dtype=kind)
    module.get_function(name)((1,), (64,), (values, kind(0.5)))
    assert (values.get() == numpy.arange(64, dtype=kind) * 0.5 * (numpy.arange(64) % 4 + 1)).all(), name
    results[name] = digest(values)
counter = cupy.ndarray(1, cupy.uint32, module.get_global("counter"))
counter[...] = 0
module.get_function("count")((100,), (128,), ())
assert counter.get()[0] == 100 * 127 * 64

with cupy.cuda.Stream(non_blocking=True) as stream:
    pinned = cupy.cuda.alloc_pinned_memory(4 * 100000)
    source = numpy.frombuffer(pinned, numpy.float32, 100000)
    source[...] = numpy.arange(100000)
    there = cupy.empty(100000, cupy.float32)
    there.set(source, stream=stream)
    there *= 3
    stream.synchronize()
    assert (there.get(stream=stream) == numpy.arange(100000, dtype=numpy.float32) * 3).all()
a, b = (cupy.asarray(rng.standard_normal((300, 300)).astype(numpy.float32)) for _ in range(2))
results["gemm"] = digest(a @ b)
results["fft"] = digest(cupy.fft.fft(array[:4096]))
report(results, cupy=cupy.__version__, runtime=cupy.cuda.runtime.runtimeGetVersion())
