# SPDX-License-Identifier: Apache-2.0
"""CUDA C through nvcc, run on the executor, against NumPy: what ordinary programs are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vgpu.gpu.software.ptx import AssertFailure, BarrierDeadlock, Trap, UnsupportedPtx

from .conftest import Harness

Compile = Callable[..., str]
ARCHITECTURES = ["compute_75", "compute_80", "compute_90"]

SOURCE = r"""
#include <cstdio>
#include <cassert>
#include <cstdint>
#include <cooperative_groups.h>
namespace cg = cooperative_groups;
#define K extern "C" __global__ void

K matmul(const float *a, const float *b, float *c, int n) {
  __shared__ float s[16][16], t[16][17];
  int x = threadIdx.x, y = threadIdx.y, row = blockIdx.y * 16 + y, column = blockIdx.x * 16 + x;
  float sum = 0;
  for (int k = 0; k < n; k += 16) {
    s[y][x] = a[row * n + k + x]; t[y][x] = b[(k + y) * n + column];
    __syncthreads();
    for (int i = 0; i < 16; i++) sum += s[y][i] * t[i][x];
    __syncthreads();
  }
  c[row * n + column] = sum;
}
K reduce_sum(const float *in, float *out, int n) {
  extern __shared__ float scratch[];
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += in[i];
  for (int o = 16; o; o >>= 1) sum += __shfl_down_sync(~0u, sum, o);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? scratch[threadIdx.x] : 0;
    for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
    if (threadIdx.x == 0) atomicAdd(out, sum);
  }
}
K tree(int *data) {  // one warp's worth of threads falls away at each step
  for (int s = blockDim.x / 2; s > 0; s >>= 1) {
    if (threadIdx.x < s) data[blockIdx.x * blockDim.x + threadIdx.x] += data[blockIdx.x * blockDim.x + threadIdx.x + s];
    __syncthreads();
  }
}
K scan(const int *in, int *out) {
  __shared__ int s[256];
  int t = threadIdx.x;
  s[t] = in[blockIdx.x * 256 + t];
  __syncthreads();
  for (int o = 1; o < 256; o <<= 1) {
    int v = t >= o ? s[t - o] : 0;
    __syncthreads();
    s[t] += v;
    __syncthreads();
  }
  out[blockIdx.x * 256 + t] = s[t];
}
K collatz(const unsigned *in, unsigned *out, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  unsigned long long x = in[i]; unsigned steps = 0;
  while (x != 1) { x = x & 1 ? 3 * x + 1 : x / 2; if (++steps > 500) break; }
  out[i] = steps;
}
K mandelbrot(float *out, int width, int height, int limit) {
  int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
  if (x >= width || y >= height) return;
  float cr = -2.f + 3.f * x / width, ci = -1.5f + 3.f * y / height, zr = 0, zi = 0; int k = 0;
  for (; k < limit && zr * zr + zi * zi < 4.f; k++) { float r = zr * zr - zi * zi + cr; zi = 2 * zr * zi + ci; zr = r; }
  out[y * width + x] = k;
}
K histogram(const unsigned char *in, unsigned *bins, int n) {
  __shared__ unsigned local[256];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) local[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&local[in[i]], 1u);
  __syncthreads();
  for (int i = threadIdx.x; i < 256; i += blockDim.x) atomicAdd(&bins[i], local[i]);
}
K atomics(int *i, unsigned *u, unsigned long long *l, float *f, double *d, int *old) {
  int t = blockIdx.x * blockDim.x + threadIdx.x;
  old[t] = atomicAdd(&i[0], 1);
  atomicMax(&i[1], t * 7 % 1000); atomicMin(&i[2], -t); atomicAnd(&i[3], ~(1 << t % 31)); atomicOr(&i[4], 1 << t % 31);
  atomicXor(&i[5], t); atomicExch(&i[6], t); atomicSub(&i[7], t);
  atomicInc(&u[0], 9u); atomicDec(&u[1], 9u);
  atomicAdd(&l[0], (unsigned long long)t << 20); atomicMax(&l[1], 1ull << t % 60);
  atomicAdd(&f[0], 0.5f); atomicAdd(&d[0], 0.25);
  // maximum of floats by compare and swap
  int *as_int = (int *)&f[1]; int seen = *as_int;
  while (__int_as_float(seen) < (float)t) { int was = atomicCAS(as_int, seen, __float_as_int((float)t)); if (was == seen) break; seen = was; }
}
K spinlock(int *lock, int *value) {
  bool done = false;
  while (!done) {
    if (atomicCAS(lock, 0, 1) == 0) { *(volatile int *)value += 1; __threadfence(); atomicExch(lock, 0); done = true; }
  }
}
K last_block(const int *in, int *partial, unsigned *arrived, int *total) {
  __shared__ bool last;
  int v = __reduce_add_syncX(in[blockIdx.x * 32 + threadIdx.x]);
  if (threadIdx.x == 0) { partial[blockIdx.x] = v; __threadfence(); last = atomicInc(arrived, gridDim.x) == gridDim.x - 1; }
  __syncthreads();
  if (last && threadIdx.x == 0) { int s = 0; for (int i = 0; i < gridDim.x; i++) s += ((volatile int *)partial)[i]; *total = s; }
}
K chain(volatile int *flag, int *out) {  // each block waits for the one before it, which has barriers to pass
  __shared__ int s;
  if (threadIdx.x == 0) { int v = 0; if (blockIdx.x) while ((v = flag[blockIdx.x - 1]) == 0); s = v + 1; }
  __syncthreads();
  int v = s; out[blockIdx.x * blockDim.x + threadIdx.x] = v;
  __syncthreads();
  if (threadIdx.x == blockDim.x - 1) flag[blockIdx.x] = v;
}
K never(int *out) { if (threadIdx.x < 32) asm volatile("bar.sync 1, 96;"); else asm volatile("bar.sync 2, 96;"); }
K producer(int *data, int *out) {  // named barriers: one warp fills, the other reads
  __shared__ int s[32];
  for (int i = 0; i < 3; i++) {
    if (threadIdx.x < 32) { s[threadIdx.x] = data[i * 32 + threadIdx.x]; asm volatile("bar.arrive 1, 64;"); asm volatile("bar.sync 2, 64;"); }
    else { asm volatile("bar.sync 1, 64;"); out[i * 32 + threadIdx.x - 32] = s[63 - threadIdx.x]; asm volatile("bar.arrive 2, 64;"); }
  }
}
K votes(unsigned *out) {
  int t = threadIdx.x; unsigned *o = out + t * 8;
  o[0] = __ballot_sync(~0u, t % 3 == 0); o[1] = __any_sync(~0u, t == 40); o[2] = __all_sync(~0u, t < 40);
  o[3] = __match_any_sync(~0u, t / 5);
  int same; o[4] = __match_all_sync(~0u, t / 32, &same); o[4] += same;
  if (t % 2) o[5] = __activemask(); else o[5] = __ballot_sync(0x55555555, t % 4 == 0);
  o[6] = __shfl_sync(~0u, t * 10, t + 3, 8); o[7] = __shfl_up_sync(~0u, t, 2, 16);
}
K barriers(int *out) {
  int t = threadIdx.x;
  out[t * 3] = __syncthreads_count(t % 3 == 0); out[t * 3 + 1] = __syncthreads_and(t < 70); out[t * 3 + 2] = __syncthreads_or(t == 70);
}
K divergent_barrier(int *out) {  // both sides reach a barrier, each its own
  __shared__ int s[64];
  int t = threadIdx.x;
  if (t < 32) { s[t] = t; __syncthreads(); out[t] = s[t + 32]; } else { s[t] = 2 * t; __syncthreads(); out[t] = s[t - 32]; }
}
K early_exit_barrier(int *out) {
  if (threadIdx.x >= 40) return;
  __shared__ int s[40];
  s[threadIdx.x] = threadIdx.x; __syncthreads();
  out[threadIdx.x] = s[39 - threadIdx.x];
}
struct Big { int a; double b; short c[6]; float4 d; };
__device__ __noinline__ float from_struct(Big x, int k) { return x.a + (float)x.b * x.c[k] + x.d.z; }
__device__ __noinline__ int2 two(int x) { return make_int2(x * x, x + 1); }
K calls(Big x, float *out) {
  int t = threadIdx.x; int2 p = two(t);
  out[t] = from_struct(x, t % 6) + p.x - p.y;
}
K dynamic_parameter(const __grid_constant__ Big x, float *out) { out[threadIdx.x] = x.c[threadIdx.x % 6]; }
K local_array(const int *in, int *out) {
  int buffer[32]; int t = threadIdx.x;
  for (int i = 0; i < 32; i++) buffer[(i * 7 + t) & 31] = in[i];
  int s = 0; for (int i = 0; i < 8; i++) s = s * 3 + buffer[(t + in[i]) & 31];
  out[t] = s;
}
K switches(const int *in, int *out) {
  int t = threadIdx.x, r;
  switch (in[t]) { case 0: r = t; break; case 1: r = t * t; break; case 2: r = ~t; case 3: r = t << 3; break;
    case 4: r = out[t] / 3; break; case 5: r = 77; break; case 6: r = __popc(t); break; case 7: r = -t; break; default: r = -1; }
  out[t] = r;
}
K generic(int *global, int which) {
  __shared__ int shared[32]; int local[4]; int t = threadIdx.x;
  shared[t] = t; local[t & 3] = 100 + t; global[t] = 1000 + t; __syncthreads();
  int *p = which == 0 ? &shared[31 - t] : which == 1 ? &local[t & 3] : which == 2 ? &global[31 - t]
         : t % 3 == 0 ? &shared[t] : t % 3 == 1 ? &local[t & 3] : &global[t];
  __syncthreads();
  int v = *p; __syncthreads(); *p = v + 1; __syncthreads();
  global[32 + t] = v; global[64 + t] = shared[t] + local[t & 3] + global[t];
  atomicAdd(p, 5); __syncthreads();
  global[96 + t] = *p;
}
K vectors(const float4 *a, float4 *b, const short4 *c, short4 *d, const double2 *e, double2 *f, const uchar4 *g, uchar4 *h) {
  int t = blockIdx.x * blockDim.x + threadIdx.x;
  float4 x = a[t]; b[t] = make_float4(x.w, x.z, x.y, x.x);
  short4 y = c[t]; d[t] = make_short4(y.y, y.x, y.w, y.z);
  double2 z = e[t]; f[t] = make_double2(z.y, -z.x);
  uchar4 w = g[t]; h[t] = make_uchar4(w.w + 1, w.x, w.y, w.z);
}
__constant__ int table[4] = {10, 20, 30, 40};
__device__ int counter = 5;
__device__ int *pointer = &counter;
__device__ int (*unused)(int);
K globals(int *out) { out[threadIdx.x] = table[threadIdx.x & 3] + *pointer; __syncthreads(); if (threadIdx.x == 0) counter += 3; }
K prints(int n) {
  if (threadIdx.x < n) printf("t=%d u=%u x=%#x c=%c s=%s f=%.3f e=%e ll=%lld p=%p %%|%5d|%-5d|%05d\n", -(int)threadIdx.x, threadIdx.x,
    threadIdx.x + 16, 'a' + threadIdx.x, threadIdx.x ? "one" : "zero", threadIdx.x * 1.5, 1e10, 1ll << 40, (void *)0x1234, 42, 42, 42);
}
K asserts(int n) { assert(threadIdx.x < n); }
K traps() { if (threadIdx.x == 3) __trap(); }
K math(const float *in, float *out, int n) {
  int i = threadIdx.x; float x = in[i]; float *o = out + i;
  o[0] = sinf(x); o[n] = cosf(x); o[2*n] = expf(x); o[3*n] = logf(fabsf(x)); o[4*n] = powf(fabsf(x), 1.7f); o[5*n] = tanhf(x);
  o[6*n] = erff(x); o[7*n] = sqrtf(fabsf(x)); o[8*n] = rsqrtf(fabsf(x)); o[9*n] = x / 3.1f; o[10*n] = fmodf(x, 0.7f); o[11*n] = atan2f(x, 2.f);
  o[12*n] = floorf(x); o[13*n] = roundf(x); o[14*n] = cbrtf(x); o[15*n] = log1pf(fabsf(x)); o[16*n] = tgammaf(fabsf(x) + 1); o[17*n] = asinhf(x);
}
K math64(const double *in, double *out, int n) {
  int i = threadIdx.x; double x = in[i]; double *o = out + i;
  o[0] = sin(x); o[n] = cos(x); o[2*n] = exp(x); o[3*n] = log(fabs(x)); o[4*n] = pow(fabs(x), 1.7); o[5*n] = tanh(x);
  o[6*n] = erf(x); o[7*n] = sqrt(fabs(x)); o[8*n] = x / 3.1; o[9*n] = fmod(x, 0.7); o[10*n] = lgamma(fabs(x) + 1); o[11*n] = cbrt(x);
}
K wide(const unsigned long long *a, const unsigned long long *b, unsigned long long *out) {
  int t = threadIdx.x; unsigned __int128 p = (unsigned __int128)a[t] * b[t] + a[t];
  out[t * 4] = (unsigned long long)p; out[t * 4 + 1] = (unsigned long long)(p >> 64); out[t * 4 + 2] = a[t] / (b[t] | 1); out[t * 4 + 3] = (long long)a[t] % (long long)(b[t] | 1);
}
K grid_sync(int *data, int *out) {
  cg::grid_group grid = cg::this_grid();
  int t = grid.thread_rank();
  data[t] = t; grid.sync();
  out[t] = data[grid.size() - 1 - t];
}
K tiles(int *out) {
  auto tile = cg::tiled_partition<8>(cg::this_thread_block());
  int v = threadIdx.x; for (int o = 4; o; o /= 2) v += tile.shfl_xor(v, o);
  auto active = cg::coalesced_threads();
  if (threadIdx.x % 3 == 0) { auto some = cg::coalesced_threads(); v += 1000 * some.thread_rank() + 100000 * some.size(); }
  out[threadIdx.x] = v + active.size() * 0;
}
template <class T> __device__ T twice(T x) { return x + x; }
K special(unsigned *out) {
  unsigned i = ((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x) * (blockDim.x * blockDim.y * blockDim.z)
    + (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  unsigned lane, warp, lt; asm("mov.u32 %0, %%laneid;" : "=r"(lane)); asm("mov.u32 %0, %%warpid;" : "=r"(warp)); asm("mov.u32 %0, %%lanemask_lt;" : "=r"(lt));
  out[i * 4] = i; out[i * 4 + 1] = lane; out[i * 4 + 2] = warp; out[i * 4 + 3] = lt;
}
__device__ __noinline__ int factorial(int n) { return n <= 1 ? 1 : n * factorial(n - 1) % 1000003; }
K recursion(int *out) { out[threadIdx.x] = factorial(threadIdx.x); }
typedef int (*operation)(int, int);
__device__ __noinline__ int plus(int a, int b) { return a + b; }
__device__ __noinline__ int times(int a, int b) { return a * b; }
__device__ __noinline__ int minus(int a, int b) { return a - b; }
__device__ operation operations[3] = {plus, times, minus};
K pointers(int *out, int which) {
  operation f = which < 3 ? operations[which] : operations[threadIdx.x % 3];
  out[threadIdx.x] = f(threadIdx.x, 7);
}
struct Shape { __device__ virtual int area(int) = 0; };
struct Square : Shape { __device__ int area(int x) override { return x * x; } };
struct Line : Shape { int k; __device__ Line(int k) : k(k) {} __device__ int area(int x) override { return x + k; } };
K virtuals(int *out, int which) {
  Square square; Line line(which); Shape *shape = threadIdx.x % 2 ? (Shape *)&square : (Shape *)&line;
  out[threadIdx.x] = shape->area(threadIdx.x);
}
K heap(int **out, int n) { int *p = (int *)malloc(sizeof(int) * 4); p[0] = threadIdx.x; p[3] = n; out[threadIdx.x] = p; if (threadIdx.x % 2) { free(p); out[threadIdx.x] = 0; } }
K clocks(long long *out) { long long a = clock64(); for (int i = 0; i < 3; i++) __nanosleep(100); out[threadIdx.x] = clock64() - a; }
""".replace(
    "__reduce_add_syncX(in[blockIdx.x * 32 + threadIdx.x])", "sum32(in[blockIdx.x * 32 + threadIdx.x])"
).replace(
    "#define K",
    "__device__ int sum32(int v) { for (int o = 16; o; o /= 2) v += __shfl_xor_sync(~0u, v, o); return v; }\n#define K",
)


@pytest.fixture(params=ARCHITECTURES)
def cuda(request: pytest.FixtureRequest, compile_ptx: Compile, harness: Harness) -> Harness:
    harness.load(compile_ptx(SOURCE, arch=request.param))
    return harness


def test_matmul(cuda: Harness) -> None:
    n = 64
    a, b = np.random.default_rng(1).random((2, n, n), dtype=np.float32)
    c = cuda.upload(a)
    cuda.launch("matmul", (n // 16, n // 16, 1), (16, 16, 1), cuda.upload(a), cuda.upload(b), c, np.int32(n))
    expected = np.zeros((n, n))
    np.testing.assert_allclose(cuda.download(c, a), a.astype(np.float64) @ b + expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("count", "grid", "block"), [(1, 1, 32), (1000, 3, 64), (50_000, 7, 256), (100_001, 4, 1024)]
)
def test_reduction_with_shuffles(cuda: Harness, count: int, grid: int, block: int) -> None:
    values = np.random.default_rng(count).integers(0, 8, count).astype(np.float32)
    total = cuda.upload(np.zeros(1, np.float32))
    cuda.launch(
        "reduce_sum", grid, block, cuda.upload(values), total, np.int32(count), shared=block // 32 * 4
    )
    assert cuda.download(total, np.zeros(1, np.float32))[0] == values.sum(dtype=np.float64)


def test_tree_and_scan(cuda: Harness) -> None:
    values = np.random.default_rng(2).integers(-1000, 1000, (5, 256)).astype(np.int32)
    data = cuda.upload(values)
    cuda.launch("tree", 5, 256, data)
    np.testing.assert_array_equal(cuda.download(data, values)[:, 0], values.sum(axis=1))
    out = cuda.upload(values)
    cuda.launch("scan", 5, 256, cuda.upload(values), out)
    np.testing.assert_array_equal(cuda.download(out, values), values.cumsum(axis=1))


def test_loops_that_end_at_different_times(cuda: Harness) -> None:
    values = np.arange(1, 2001, dtype=np.uint32)
    out = cuda.upload(values)
    cuda.launch("collatz", 8, 256, cuda.upload(values), out, np.int32(values.size))

    def steps(x: int) -> int:
        count = 0
        while x != 1:
            x = 3 * x + 1 if x & 1 else x // 2
            count += 1
        return count

    np.testing.assert_array_equal(cuda.download(out, values), [steps(int(x)) for x in values])


def test_mandelbrot(cuda: Harness) -> None:
    width, height, limit = 90, 70, 60
    image = np.zeros((height, width), np.float32)
    out = cuda.upload(image)
    cuda.launch("mandelbrot", (3, 9, 1), (32, 8, 1), out, np.int32(width), np.int32(height), np.int32(limit))
    got = cuda.download(out, image)
    c = (-2 + 3 * np.arange(width) / width)[None, :] + 1j * (-1.5 + 3 * np.arange(height) / height)[:, None]
    z, expected = np.zeros_like(c), np.zeros(c.shape)
    for _ in range(limit):
        inside = np.abs(z) < 2
        expected += inside
        z = np.where(inside, z * z + c, z)
    assert (got == expected).mean() > 0.99  # the border is chaotic: f32 with fma against f64


def test_histogram(cuda: Harness) -> None:
    values = (np.random.default_rng(3).normal(128, 20, 30_000)).clip(0, 255).astype(np.uint8)
    bins = cuda.upload(np.zeros(256, np.uint32))
    cuda.launch("histogram", 5, 128, cuda.upload(values), bins, np.int32(values.size))
    np.testing.assert_array_equal(
        cuda.download(bins, np.zeros(256, np.uint32)), np.bincount(values, minlength=256)
    )


def test_atomics_on_the_same_address(cuda: Harness) -> None:
    threads = 4 * 96
    i, u = np.array([0, -5, 5, -1, 0, 0, 0, 0], np.int32), np.zeros(2, np.uint32)
    long, f, d = np.zeros(2, np.uint64), np.zeros(2, np.float32), np.zeros(1, np.float64)
    old = np.zeros(threads, np.int32)
    arrays: list[npt.NDArray[Any]] = [i, u, long, f, d, old]
    pointers = [cuda.upload(x) for x in arrays]
    cuda.launch("atomics", 4, 96, *pointers)
    got_i, got_u, got_l, got_f, got_d, got_old = (
        cuda.download(p, x) for p, x in zip(pointers, arrays, strict=True)
    )
    t = np.arange(threads)
    assert got_i[0] == threads
    np.testing.assert_array_equal(np.sort(got_old), t)
    assert got_i[1] == (t * 7 % 1000).max()
    assert got_i[2] == -(threads - 1)
    assert got_i[3] == np.bitwise_and.reduce(~(1 << t % 31))
    assert got_i[4] == np.bitwise_or.reduce(1 << t % 31)
    assert got_i[5] == np.bitwise_xor.reduce(t)
    assert got_i[6] in t
    assert got_i[7] == -t.sum()
    assert got_u.tolist() == [threads % 10, (10 - threads % 10) % 10]
    assert got_l.tolist() == [int(t.sum()) << 20, 1 << 59]
    assert got_f.tolist() == [threads / 2, threads - 1]
    assert got_d[0] == threads / 4


def test_a_lock_that_threads_of_a_warp_fight_for(cuda: Harness) -> None:
    lock, value = cuda.upload(np.zeros(1, np.int32)), cuda.upload(np.zeros(1, np.int32))
    cuda.launch("spinlock", 3, 32, lock, value)
    assert cuda.download(value, np.zeros(1, np.int32))[0] == 96


def test_blocks_that_wait_for_one_another(cuda: Harness) -> None:
    out = np.zeros((12, 64), np.int32)
    flag, pointer = cuda.upload(np.zeros(12, np.int32)), cuda.upload(out)
    cuda.launch("chain", 12, 64, flag, pointer)
    np.testing.assert_array_equal(
        cuda.download(pointer, out), np.repeat(np.arange(1, 13), 64).reshape(12, 64)
    )


def test_named_barriers(cuda: Harness) -> None:
    data = np.random.default_rng(9).integers(0, 99, (3, 32)).astype(np.int32)
    out = cuda.upload(np.zeros_like(data))
    cuda.launch("producer", 2, 64, cuda.upload(data), out)
    np.testing.assert_array_equal(cuda.download(out, data), data[:, ::-1])
    with pytest.raises(BarrierDeadlock, match="64 threads"):
        cuda.launch("never", 1, 64, out)


def test_last_block_sums_up(cuda: Harness) -> None:
    values = np.random.default_rng(4).integers(-99, 99, 40 * 32).astype(np.int32)
    partial, total = cuda.upload(np.zeros(40, np.int32)), cuda.upload(np.zeros(1, np.int32))
    cuda.launch(
        "last_block", 40, 32, cuda.upload(values), partial, cuda.upload(np.zeros(1, np.uint32)), total
    )
    assert cuda.download(total, np.zeros(1, np.int32))[0] == values.sum()


def test_votes_matches_and_shuffles(cuda: Harness) -> None:
    out = np.zeros((64, 8), np.uint32)
    pointer = cuda.upload(out)
    cuda.launch("votes", 1, 64, pointer)
    got = cuda.download(pointer, out)
    for t in range(64):
        warp = range(t // 32 * 32, t // 32 * 32 + 32)

        def mask(test: Callable[[int], bool], warp: range = warp) -> int:
            return sum(1 << s % 32 for s in warp if test(s))

        lane = t % 32
        key = t // 5
        expected = [
            mask(lambda s: s % 3 == 0),
            int(40 in warp),
            int(t < 32),
            sum(1 << s % 32 for s in warp if s // 5 == key),
            0xFFFFFFFF + 1 & 0xFFFFFFFF,
            0xAAAAAAAA if t % 2 else mask(lambda s: s % 4 == 0),
            (t // 8 * 8 + (t + 3) % 8) * 10,
            t - 2 if lane % 16 >= 2 else t,
        ]
        assert got[t].tolist() == expected, t


def test_barriers(cuda: Harness) -> None:
    out = np.zeros((96, 3), np.int32)
    pointer = cuda.upload(out)
    cuda.launch("barriers", 1, 96, pointer)
    np.testing.assert_array_equal(cuda.download(pointer, out), np.tile([32, 0, 1], (96, 1)))
    single = np.zeros(64, np.int32)
    pointer = cuda.upload(single)
    cuda.launch("divergent_barrier", 1, 64, pointer)
    np.testing.assert_array_equal(cuda.download(pointer, single), [*range(64, 128, 2), *range(32)])
    cuda.launch("early_exit_barrier", 1, 64, pointer)
    np.testing.assert_array_equal(cuda.download(pointer, single)[:40], range(39, -1, -1))


def test_calls_structures_and_local_memory(cuda: Harness) -> None:
    kind = np.dtype([("a", "i4"), ("b", "f8"), ("c", "i2", 6), ("d", "f4", 4)], align=True)
    # float4 is aligned to 16 bytes in CUDA
    packed = bytearray(48)
    packed[0:4] = np.int32(3).tobytes()
    packed[8:16] = np.float64(2.5).tobytes()
    packed[16:28] = np.array([1, -2, 3, -4, 5, -6], np.int16).tobytes()
    packed[32:48] = np.array([1, 2, 3, 4], np.float32).tobytes()
    assert kind["c"].shape == (6,)
    t = np.arange(64)
    c = np.array([1, -2, 3, -4, 5, -6])[t % 6]
    out = np.zeros(64, np.float32)
    pointer = cuda.upload(out)
    cuda.launch("calls", 1, 64, bytes(packed), pointer)
    np.testing.assert_array_equal(cuda.download(pointer, out), 3 + 2.5 * c + 3 + t * t - (t + 1))
    cuda.launch("dynamic_parameter", 1, 64, bytes(packed), pointer)
    np.testing.assert_array_equal(cuda.download(pointer, out), c)


def test_local_arrays(cuda: Harness) -> None:
    values = np.random.default_rng(5).integers(0, 100, 32).astype(np.int32)
    out = np.zeros(50, np.int32)
    pointer = cuda.upload(out)
    cuda.launch("local_array", 1, 50, cuda.upload(values), pointer)
    expected = []
    for t in range(50):
        buffer = [0] * 32
        for i in range(32):
            buffer[(i * 7 + t) & 31] = int(values[i])
        s = 0
        for i in range(8):
            s = s * 3 + buffer[(t + int(values[i])) & 31]
        expected.append(s)
    np.testing.assert_array_equal(cuda.download(pointer, out), expected)


def test_switches(cuda: Harness) -> None:
    values = (np.arange(128) * 5 % 11).astype(np.int32)
    out = np.arange(128, dtype=np.int32) * 9
    pointer = cuda.upload(out)
    cuda.launch("switches", 1, 128, cuda.upload(values), pointer)
    t = np.arange(128)
    choices = [t, t * t, t << 3, t << 3, t * 3, 77 + 0 * t, np.array([int(x).bit_count() for x in t]), -t]
    expected = np.array([choices[v][i] if v < 8 else -1 for i, v in enumerate(values)])
    np.testing.assert_array_equal(cuda.download(pointer, out), expected)


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_generic_addresses(cuda: Harness, which: int) -> None:
    out = np.zeros(128, np.int32)
    pointer = cuda.upload(out)
    cuda.launch("generic", 1, 32, pointer, np.int32(which))
    got = cuda.download(pointer, out).reshape(4, 32)
    t = np.arange(32)
    shared, local, memory = t.copy(), 100 + t, 1000 + t
    seen = np.array([[31 - t, local, 1000 + 31 - t, [t, local, memory][0]][which]])[0]
    if which == 3:
        seen = np.choose(t % 3, [t, local, memory])
        shared, local, memory = (
            np.where(t % 3 == k, x + 1, x) for k, x in enumerate((shared, local, memory))
        )
    elif which == 0:
        shared = shared + 1
    elif which == 1:
        local = local + 1
    else:
        memory = memory + 1
    np.testing.assert_array_equal(got[1], seen)
    np.testing.assert_array_equal(got[2], shared + local + memory)
    np.testing.assert_array_equal(got[3], seen + 1 + 5)


def test_vector_loads_and_stores(cuda: Harness) -> None:
    generator = np.random.default_rng(6)
    n = 192
    a, c = generator.random((n, 4), dtype=np.float32), generator.integers(-999, 999, (n, 4)).astype(np.int16)
    e, g = generator.random((n, 2)), generator.integers(0, 256, (n, 4)).astype(np.uint8)
    sources: list[npt.NDArray[Any]] = [a, c, e, g]
    outs = [np.zeros_like(x) for x in sources]
    pointers = [cuda.upload(x) for x in outs]
    arguments: list[int] = []
    for source, target in zip(sources, pointers, strict=True):
        arguments += [cuda.upload(source), target]
    cuda.launch("vectors", 3, 64, *arguments)
    b, d, f, h = (cuda.download(p, x) for p, x in zip(pointers, outs, strict=True))
    np.testing.assert_array_equal(b, a[:, ::-1])
    np.testing.assert_array_equal(d, c[:, [1, 0, 3, 2]])
    np.testing.assert_array_equal(f, np.stack([e[:, 1], -e[:, 0]], axis=1))
    np.testing.assert_array_equal(h, np.concatenate([g[:, 3:] + np.uint8(1), g[:, :3]], axis=1))


def test_module_variables(cuda: Harness) -> None:
    out = np.zeros(8, np.int32)
    pointer = cuda.upload(out)
    for value in (5, 8, 11):
        cuda.launch("globals", 1, 8, pointer)
        np.testing.assert_array_equal(cuda.download(pointer, out), np.tile([10, 20, 30, 40], 2) + value)
    instance = cuda.instance
    assert instance is not None
    assert cuda.space.read(instance.addresses["counter"], 4) == np.int32(14).tobytes()
    assert cuda.space.read(instance.addresses["table"], 4) == np.int32(10).tobytes()
    live = cuda.space.used
    instance.unload()
    instance.unload()
    assert cuda.space.used < live


def test_printf(cuda: Harness) -> None:
    cuda.launch("prints", 1, 4, np.int32(2))
    assert cuda.text == [
        "t=0 u=0 x=0x10 c=a s=zero f=0.000 e=1.000000e+10 ll=1099511627776 p=0x1234 %|   42|42   |00042\n",
        "t=-1 u=1 x=0x11 c=b s=one f=1.500 e=1.000000e+10 ll=1099511627776 p=0x1234 %|   42|42   |00042\n",
    ]


def test_assert_and_trap(cuda: Harness) -> None:
    cuda.launch("asserts", 2, 32, np.int32(32))
    with pytest.raises(AssertFailure) as caught:
        cuda.launch("asserts", 2, 32, np.int32(30))
    lines = caught.value.text.splitlines()
    assert len(lines) == 4
    assert "block: [0,0,0], thread: [30,0,0] Assertion `threadIdx.x < n` failed." in lines[0]
    with pytest.raises(Trap):
        cuda.launch("traps", 1, 32)
    cuda.launch("traps", 1, 3)


def test_math_functions(cuda: Harness) -> None:
    import math

    n = 200
    x = np.concatenate([np.linspace(-6, 6, n - 6), [0.001, 50, -40, 1e-5, 20, 3e4]]).astype(np.float32)
    out = np.zeros((18, n), np.float32)
    pointer = cuda.upload(out)
    cuda.launch("math", 1, n, cuda.upload(x), pointer, np.int32(n))
    got = cuda.download(pointer, out)
    with np.errstate(all="ignore"):
        y = x.astype(np.float64)
        z = np.abs(y)
        gamma = np.array([math.gamma(v + 1) if v < 34 else np.inf for v in z])
        expected: list[Any] = [
            np.sin(y), np.cos(y), np.exp(y), np.log(z), z ** float(np.float32(1.7)), np.tanh(y), [math.erf(v) for v in y], np.sqrt(z),
            1 / np.sqrt(z), y / np.float32(3.1), np.fmod(y, float(np.float32(0.7))), np.arctan2(y, 2), np.floor(y),
            np.trunc(y + np.copysign(0.5, y)), np.cbrt(y), np.log1p(z), gamma, np.arcsinh(y),
        ]  # fmt: skip
    for place, values in enumerate(expected):
        np.testing.assert_allclose(
            got[place], np.array(values, np.float32), rtol=2e-6, atol=1e-7, err_msg=str(place)
        )


def test_double_math_functions(cuda: Harness) -> None:
    import math

    n = 100
    x = np.linspace(-6, 6, n)
    out = np.zeros((12, n))
    pointer = cuda.upload(out)
    cuda.launch("math64", 1, n, cuda.upload(x), pointer, np.int32(n))
    got = cuda.download(pointer, out)
    z = np.abs(x)
    expected: list[Any] = [
        np.sin(x), np.cos(x), np.exp(x), np.log(z), z**1.7, np.tanh(x), [math.erf(v) for v in x], np.sqrt(z), x / 3.1,
        np.fmod(x, 0.7), [math.lgamma(v + 1) for v in z], np.cbrt(x),
    ]  # fmt: skip
    for place, values in enumerate(expected):
        np.testing.assert_allclose(got[place], values, rtol=1e-14, atol=1e-15, err_msg=str(place))


def test_wide_integers(cuda: Harness) -> None:
    a, b = np.random.default_rng(7).integers(0, 1 << 64, (2, 64), dtype=np.uint64)
    out = np.zeros((64, 4), np.uint64)
    pointer = cuda.upload(out)
    cuda.launch("wide", 1, 64, cuda.upload(a), cuda.upload(b), pointer)
    for x, y, got in zip(a.tolist(), b.tolist(), cuda.download(pointer, out).tolist(), strict=True):
        p = x * y + x
        sx, sy = (v - (1 << 64) if v >> 63 else v for v in (x, y | 1))
        remainder = abs(sx) % abs(sy) * (-1 if sx < 0 else 1)
        assert got == [p & (1 << 64) - 1, p >> 64 & (1 << 64) - 1, x // (y | 1), remainder & (1 << 64) - 1]


def test_grid_synchronisation(cuda: Harness) -> None:
    threads = 6 * 64
    data, out = cuda.upload(np.zeros(threads, np.int32)), cuda.upload(np.zeros(threads, np.int32))
    live = cuda.space.used
    cuda.launch("grid_sync", 6, 64, data, out, together=True)
    np.testing.assert_array_equal(cuda.download(out, np.zeros(threads, np.int32)), range(threads - 1, -1, -1))
    assert cuda.space.used == live
    with pytest.raises(Trap):  # as on hardware where the launch is not cooperative
        cuda.launch("grid_sync", 6, 64, data, out)


def test_tiles_and_coalesced_groups(cuda: Harness) -> None:
    out = np.zeros(64, np.int32)
    pointer = cuda.upload(out)
    cuda.launch("tiles", 1, 64, pointer)
    expected = []
    for t in range(64):
        v = sum(range(t // 8 * 8, t // 8 * 8 + 8))
        if t % 3 == 0:
            mates = [s for s in range(t // 32 * 32, t // 32 * 32 + 32) if s % 3 == 0]
            v += 1000 * mates.index(t) + 100000 * len(mates)
        expected.append(v)
    np.testing.assert_array_equal(cuda.download(pointer, out), expected)


@pytest.mark.parametrize(
    ("grid", "block"), [((2, 3, 4), (5, 4, 3)), ((3, 1, 1), (33, 1, 1)), ((1, 2, 2), (1, 64, 1))]
)
def test_who_a_thread_is(cuda: Harness, grid: tuple[int, int, int], block: tuple[int, int, int]) -> None:
    threads, blocks = int(np.prod(block)), int(np.prod(grid))
    out = np.zeros((blocks, threads, 4), np.uint32)
    pointer = cuda.upload(out)
    cuda.launch("special", grid, block, pointer)
    got = cuda.download(pointer, out)
    t = np.arange(threads)
    for number in range(blocks):
        np.testing.assert_array_equal(got[number, :, 0], number * threads + t)
        np.testing.assert_array_equal(got[number, :, 1], t % 32)
        np.testing.assert_array_equal(got[number, :, 2], t // 32)
        np.testing.assert_array_equal(got[number, :, 3], (1 << t % 32) - 1)


def test_recursion_is_refused_by_name(cuda: Harness) -> None:
    pointer = cuda.upload(np.zeros(8, np.int32))
    try:
        cuda.launch("recursion", 1, 8, pointer)
    except UnsupportedPtx as error:
        assert "recursive call" in str(error)  # noqa: PT017
    else:  # the compiler turned it into a loop
        assert cuda.download(pointer, np.zeros(8, np.int32))[4] == 24


def test_calls_through_pointers(cuda: Harness) -> None:
    out = np.zeros(32, np.int32)
    pointer = cuda.upload(out)
    t = np.arange(32)
    by_operation = [t + 7, t * 7, t - 7]
    for which in range(4):
        cuda.launch("pointers", 1, 32, pointer, np.int32(which))
        expected = by_operation[which] if which < 3 else np.choose(t % 3, by_operation)
        np.testing.assert_array_equal(cuda.download(pointer, out), expected)
    cuda.launch("virtuals", 1, 32, pointer, np.int32(100))
    np.testing.assert_array_equal(cuda.download(pointer, out), np.where(t % 2, t * t, t + 100))


def test_device_heap(cuda: Harness) -> None:
    out = np.zeros(16, np.uint64)
    pointer = cuda.upload(out)
    cuda.launch("heap", 1, 16, pointer, np.int32(9))
    pointers = cuda.download(pointer, out)
    assert (pointers[1::2] == 0).all()
    for thread in range(0, 16, 2):
        assert np.frombuffer(cuda.space.read(int(pointers[thread]), 16), np.int32)[[0, 3]].tolist() == [
            thread,
            9,
        ]


def test_clocks_advance(cuda: Harness) -> None:
    out = np.zeros(8, np.int64)
    pointer = cuda.upload(out)
    cuda.launch("clocks", 1, 8, pointer)
    assert (cuda.download(pointer, out) > 0).all()
