# SPDX-License-Identifier: Apache-2.0
"""An ordinary CuPy program: it knows nothing of this project and asks only for a CUDA device.

Prints one JSON object with its results; examples/demo.py compares them with NumPy on the CPU.
"""

import json

import cupy  # type: ignore[import-not-found, unused-ignore]

properties = cupy.cuda.runtime.getDeviceProperties(0)
generator = cupy.arange(1 << 16, dtype=cupy.float32)
x = (generator % 997) / 997
y = (generator % 1009) / 1009

element_wise = x * 2 + y
total = float(cupy.sum(element_wise, dtype=cupy.float64))
largest = int(cupy.argmax(x * y))

kernel = cupy.RawKernel(
    r"""
extern "C" __global__ void smooth(const float *in, float *out, int n)
{
    __shared__ float tile[258];
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    tile[threadIdx.x + 1] = i < n ? in[i] : 0.0f;
    if (threadIdx.x == 0) tile[0] = i > 0 ? in[i - 1] : 0.0f;
    if (threadIdx.x == blockDim.x - 1) tile[257] = i + 1 < n ? in[i + 1] : 0.0f;
    __syncthreads();
    if (i < n) out[i] = (tile[threadIdx.x] + tile[threadIdx.x + 1] + tile[threadIdx.x + 2]) / 3.0f;
}
""",
    "smooth",
)
smoothed = cupy.empty_like(x)
kernel((256,), (256,), (x, smoothed, cupy.int32(x.size)))

print(
    json.dumps(
        {
            "device": properties["name"].decode(),
            "devices": cupy.cuda.runtime.getDeviceCount(),
            "memory_bytes": int(properties["totalGlobalMem"]),
            "driver": cupy.cuda.runtime.driverGetVersion(),
            "total": total,
            "largest": largest,
            "smoothed": [float(v) for v in cupy.asnumpy(smoothed[:1000])],
        }
    )
)
