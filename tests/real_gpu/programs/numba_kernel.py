# SPDX-License-Identifier: Apache-2.0
"""numba-cuda: a kernel with shared memory and a barrier, and an atomic reduction."""

import numpy

if not hasattr(numpy, "row_stack"):
    numpy.row_stack = numpy.vstack  # gone from NumPy 2.5; numba-cuda of its time still looks for it

from numba import cuda, float32
from report import close, digest, report


@cuda.jit
def block_sums(source, out):
    shared = cuda.shared.array(256, float32)
    thread = cuda.threadIdx.x
    index = cuda.grid(1)
    shared[thread] = source[index] if index < source.size else 0.0
    cuda.syncthreads()
    step = 128
    while step > 0:
        if thread < step:
            shared[thread] += shared[thread + step]
        cuda.syncthreads()
        step //= 2
    if thread == 0:
        out[cuda.blockIdx.x] = shared[0]


@cuda.jit
def histogram(source, bins):
    index = cuda.grid(1)
    if index < source.size:
        cuda.atomic.add(bins, source[index] % bins.size, 1)


rng = numpy.random.default_rng(12)
values = rng.standard_normal(100_000).astype(numpy.float32)
blocks = -(-values.size // 256)
sums = cuda.device_array(blocks, numpy.float32)
block_sums[blocks, 256](cuda.to_device(values), sums)
close("block sums", sums.copy_to_host().sum(dtype=numpy.float64), values.sum(dtype=numpy.float64), 1e-4)
numbers = rng.integers(0, 1 << 20, 50_000).astype(numpy.int32)
bins = cuda.to_device(numpy.zeros(64, numpy.int32))
histogram[-(-numbers.size // 128), 128](cuda.to_device(numbers), bins)
assert (bins.copy_to_host() == numpy.bincount(numbers % 64, minlength=64)).all()
device = cuda.get_current_device()
name = device.name.decode() if isinstance(device.name, bytes) else device.name
report({"sums": digest(sums.copy_to_host()), "bins": bins.copy_to_host().tolist(), "device": name})
