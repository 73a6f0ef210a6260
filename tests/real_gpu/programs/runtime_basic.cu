/* SPDX-License-Identifier: Apache-2.0 */
/* The runtime API's everyday half: copies of every kind, symbols, streams, events, mapped memory, attributes. */
#include "check.cuh"
#include <cstring>
#include <vector>

__constant__ float coefficients[8];
__device__ unsigned long long total;
__device__ int table[256];

template <typename T> __global__ void polynomial(T *out, const T *in, int count)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count)
        return;
    T value = 0;
    for (int k = 7; k >= 0; k--)
        value = value * in[i] + (T)coefficients[k];
    out[i] = value;
}

__global__ void accumulate(const int *in, int count)
{
    extern __shared__ int shared[];
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    shared[threadIdx.x] = i < count ? in[i] : 0;
    __syncthreads();
    for (int step = blockDim.x / 2; step > 0; step /= 2) {
        if (threadIdx.x < step)
            shared[threadIdx.x] += shared[threadIdx.x + step];
        __syncthreads();
    }
    if (threadIdx.x == 0)
        atomicAdd(&total, (unsigned long long)shared[0]);
}

__global__ void large_shared(int *out, int words)
{
    extern __shared__ int shared[];
    for (int i = threadIdx.x; i < words; i += blockDim.x)
        shared[i] = i * 3;
    __syncthreads();
    int sum = 0;
    for (int i = threadIdx.x; i < words; i += blockDim.x)
        sum += shared[words - 1 - i];
    atomicAdd(out, sum);
}

__global__ void warp_scan(unsigned *out)
{
    unsigned value = threadIdx.x + blockIdx.x, sum = value;
    for (int step = 1; step < 32; step *= 2) {
        unsigned below = __shfl_up_sync(~0u, sum, step);
        if ((threadIdx.x & 31) >= step)
            sum += below;
    }
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum ^ __ballot_sync(~0u, value & 1);
}

__global__ void increment(int *value) { value[threadIdx.x]++; }
__global__ void say(int number) { printf("kernel says %d\n", number); }

int main()
{
    int count = 0, version = 0;
    cudaDeviceProp properties;
    CHECK(cudaGetDeviceCount(&count));
    CHECK(cudaRuntimeGetVersion(&version));
    CHECK(cudaGetDeviceProperties(&properties, 0));
    equal("count", count);
    equal("name", properties.name);
    equal("capability", properties.major * 10 + properties.minor);
    equal("multiprocessors", properties.multiProcessorCount);
    equal("memory", (long long)properties.totalGlobalMem);
    equal("l2", properties.l2CacheSize);
    info("runtime", version);

    const int n = 1 << 20;
    std::vector<float> in(n), out(n);
    float table8[8] = {1, .5f, .25f, -.125f, 2, -1, .0625f, 3};
    for (int i = 0; i < n; i++)
        in[i] = (float)i / n - .5f;
    float *din, *dout;
    CHECK(cudaMalloc(&din, n * sizeof(float)));
    CHECK(cudaMalloc(&dout, n * sizeof(float)));
    CHECK(cudaMemcpy(din, in.data(), n * sizeof(float), cudaMemcpyHostToDevice));
    CHECK(cudaMemcpyToSymbol(coefficients, table8, sizeof table8));
    polynomial<float><<<n / 256, 256>>>(dout, din, n);
    CHECK(cudaGetLastError());
    CHECK(cudaMemcpy(out.data(), dout, n * sizeof(float), cudaMemcpyDeviceToHost));
    for (int i = 0; i < n; i += 999) {
        double expected = 0;
        for (int k = 7; k >= 0; k--)
            expected = expected * in[i] + table8[k];
        REQUIRE(out[i] - expected < 1e-5 && expected - out[i] < 1e-5);
    }
    equal("polynomial", digest(out.data(), n * sizeof(float)));

    std::vector<int> numbers(n);
    for (int i = 0; i < n; i++)
        numbers[i] = i % 1000;
    int *dnumbers;
    unsigned long long zero = 0, sum = 0, expected = 0;
    for (int v : numbers)
        expected += v;
    CHECK(cudaMalloc(&dnumbers, n * sizeof(int)));
    CHECK(cudaMemcpyToSymbol(total, &zero, sizeof zero));
    CHECK(cudaMemcpy(dnumbers, numbers.data(), n * sizeof(int), cudaMemcpyHostToDevice));
    accumulate<<<n / 512, 512, 512 * sizeof(int)>>>(dnumbers, n);
    CHECK(cudaMemcpyFromSymbol(&sum, total, sizeof sum));
    REQUIRE(sum == expected);

    /* More than 48 KiB of shared memory needs the attribute, and is refused without it. */
    int *dsum, hsum = 0;
    CHECK(cudaMalloc(&dsum, sizeof(int)));
    CHECK(cudaMemset(dsum, 0, sizeof(int)));
    large_shared<<<1, 256, 96 * 1024>>>(dsum, 24 * 1024);
    equal("too much shared memory", cudaGetLastError());
    CHECK(cudaFuncSetAttribute(large_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, 96 * 1024));
    large_shared<<<1, 256, 96 * 1024>>>(dsum, 24 * 1024);
    CHECK(cudaGetLastError());
    CHECK(cudaMemcpy(&hsum, dsum, sizeof hsum, cudaMemcpyDeviceToHost));
    REQUIRE(hsum == 3 * (24 * 1024 / 2) * (24 * 1024 - 1));

    unsigned *dscan;
    std::vector<unsigned> scan(64 * 128);
    CHECK(cudaMalloc(&dscan, scan.size() * 4));
    warp_scan<<<64, 128>>>(dscan);
    CHECK(cudaMemcpy(scan.data(), dscan, scan.size() * 4, cudaMemcpyDeviceToHost));
    equal("warp scan", digest(scan.data(), scan.size() * 4));

    /* Two-dimensional copies through a pitched allocation. */
    void *pitched;
    size_t pitch;
    std::vector<unsigned char> rows(300 * 77), back(300 * 77);
    for (size_t i = 0; i < rows.size(); i++)
        rows[i] = (unsigned char)(i * 7);
    CHECK(cudaMallocPitch(&pitched, &pitch, 300, 77));
    CHECK(cudaMemcpy2D(pitched, pitch, rows.data(), 300, 300, 77, cudaMemcpyHostToDevice));
    CHECK(cudaMemset2D(pitched, pitch, 9, 10, 5));
    CHECK(cudaMemcpy2D(back.data(), 300, pitched, pitch, 300, 77, cudaMemcpyDeviceToHost));
    for (int y = 0; y < 77; y++)
        for (int x = 0; x < 300; x++)
            REQUIRE(back[y * 300 + x] == (y < 5 && x < 10 ? 9 : rows[y * 300 + x]));
    equal("pitch", (long long)pitch);

    /* Mapped pinned memory: the kernel writes, the program sees it without a copy. */
    int *pinned, *mapped;
    CHECK(cudaHostAlloc(&pinned, 4096, cudaHostAllocMapped));
    memset(pinned, 0, 4096);
    CHECK(cudaHostGetDevicePointer(&mapped, pinned, 0));
    for (int i = 0; i < 10; i++)
        increment<<<1, 64>>>(mapped);
    CHECK(cudaDeviceSynchronize());
    for (int i = 0; i < 64; i++)
        REQUIRE(pinned[i] == 10);
    cudaPointerAttributes attributes;
    CHECK(cudaPointerGetAttributes(&attributes, pinned));
    equal("pinned type", attributes.type);
    CHECK(cudaPointerGetAttributes(&attributes, dnumbers));
    equal("device type", attributes.type);
    CHECK(cudaPointerGetAttributes(&attributes, numbers.data()));
    equal("host type", attributes.type);
    static char registered[1 << 16] __attribute__((aligned(4096)));
    CHECK(cudaHostRegister(registered, sizeof registered, cudaHostRegisterDefault));
    CHECK(cudaMemcpy(dnumbers, registered, sizeof registered, cudaMemcpyHostToDevice));
    CHECK(cudaHostUnregister(registered));

    cudaStream_t first, second;
    cudaEvent_t start, middle, stop;
    CHECK(cudaStreamCreate(&first));
    CHECK(cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking));
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&middle));
    CHECK(cudaEventCreate(&stop));
    CHECK(cudaMemsetAsync(dnumbers, 0, 256 * sizeof(int), first));
    CHECK(cudaEventRecord(start, first));
    for (int i = 0; i < 100; i++)
        increment<<<1, 256, 0, first>>>(dnumbers);
    CHECK(cudaEventRecord(middle, first));
    CHECK(cudaStreamWaitEvent(second, middle, 0));
    for (int i = 0; i < 100; i++)
        increment<<<1, 256, 0, second>>>(dnumbers);
    CHECK(cudaEventRecord(stop, second));
    CHECK(cudaEventSynchronize(stop));
    CHECK(cudaMemcpy(numbers.data(), dnumbers, 256 * sizeof(int), cudaMemcpyDeviceToHost));
    for (int i = 0; i < 256; i++)
        REQUIRE(numbers[i] == 200);
    float milliseconds;
    CHECK(cudaEventElapsedTime(&milliseconds, start, stop));
    REQUIRE(milliseconds > 0);
    info("milliseconds", milliseconds);
    REQUIRE(cudaStreamQuery(second) == cudaSuccess);

    void *symbol;
    CHECK(cudaGetSymbolAddress(&symbol, table));
    increment<<<1, 256>>>((int *)symbol);
    CHECK(cudaMemcpyFromSymbol(numbers.data(), table, sizeof(int) * 256));
    REQUIRE(numbers[255] == 1);

    cudaFuncAttributes of;
    int blocks, block_size, grid_size;
    CHECK(cudaFuncGetAttributes(&of, accumulate));
    equal("registers", of.numRegs);
    equal("binary", of.binaryVersion);
    equal("threads", of.maxThreadsPerBlock);
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, accumulate, 512, 2048));
    equal("occupancy", blocks);
    CHECK(cudaOccupancyMaxPotentialBlockSize(&grid_size, &block_size, polynomial<float>, 0, 0));
    equal("block size", block_size);
    equal("grid size", grid_size);

    say<<<1, 1>>>(42);
    CHECK(cudaDeviceSynchronize());
    fflush(stdout);
    CHECK(cudaFree(din));
    CHECK(cudaFree(pitched));
    CHECK(cudaFreeHost(pinned));
    CHECK(cudaDeviceReset());
    return finish();
}
