/* SPDX-License-Identifier: Apache-2.0 */
/* Launches that are more than a grid and a block: cooperative, clusters, programmatic order, callbacks, pools, threads. */
#include "check.cuh"
#include <atomic>
#include <cooperative_groups.h>
#include <thread>
#include <vector>
namespace cg = cooperative_groups;

__global__ void whole_grid(int *x, int n)
{
    cg::grid_group grid = cg::this_grid();
    for (int i = grid.thread_rank(); i < n; i += grid.size())
        x[i] = i;
    grid.sync();
    for (int i = grid.thread_rank(); i < n; i += grid.size())
        atomicAdd(&x[n], x[n - 1 - i] & 1);
}

__global__ void in_cluster(int *out)
{
#if __CUDA_ARCH__ >= 900
    __shared__ int mine;
    cg::cluster_group cluster = cg::this_cluster();
    if (threadIdx.x == 0)
        mine = blockIdx.x * 10;
    cluster.sync();
    int *other = cluster.map_shared_rank(&mine, cluster.block_rank() ^ 1);
    if (threadIdx.x == 0)
        out[blockIdx.x] = *other;
    cluster.sync();
#endif
}

__global__ void first_half(int *x)
{
#if __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
#endif
    x[threadIdx.x] = threadIdx.x + 1;
}
__global__ void second_half(int *x, int *y)
{
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
    y[threadIdx.x] = x[threadIdx.x] * 2;
}
__global__ void add_one(unsigned *x) { atomicAdd(x, 1u); }

struct Big {
    float values[900];
};
__global__ void big_parameters(Big big, double scale, char last, float *out)
{
    float sum = 0;
    for (int i = 0; i < 900; i++)
        sum += big.values[i];
    *out = sum * (float)scale + last;
}

static std::atomic<int> called;
static void CUDART_CB on_host(void *expected)
{
    if (called == (int)(intptr_t)expected)
        called++;
}

int main()
{
    int device = 0, cooperative, processors, blocks;
    CHECK(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device));
    CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    REQUIRE(cooperative == 1);
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, whole_grid, 256, 0));
    int n = 1 << 20, *x, *y, result;
    CHECK(cudaMalloc(&x, (n + 1) * sizeof(int)));
    CHECK(cudaMalloc(&y, 4096));
    CHECK(cudaMemset(x, 0, (n + 1) * sizeof(int)));
    void *arguments[] = {&x, &n};
    CHECK(cudaLaunchCooperativeKernel((void *)whole_grid, dim3(processors * blocks), dim3(256), arguments, 0, 0));
    CHECK(cudaMemcpy(&result, x + n, sizeof result, cudaMemcpyDeviceToHost));
    REQUIRE(result == n / 2);
    equal("too large to cooperate", cudaLaunchCooperativeKernel((void *)whole_grid, dim3(processors * blocks + 1),
                                                                dim3(256), arguments, 0, 0));
    cudaGetLastError();

    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream));
    cudaLaunchConfig_t configuration = {};
    cudaLaunchAttribute attribute[2];
    configuration.gridDim = dim3(8);
    configuration.blockDim = dim3(64);
    configuration.stream = stream;
    configuration.attrs = attribute;
    cudaDeviceProp properties;
    CHECK(cudaGetDeviceProperties(&properties, 0));
    if (properties.major >= 9) {
        attribute[0].id = cudaLaunchAttributeClusterDimension;
        attribute[0].val.clusterDim = {2, 1, 1};
        configuration.numAttrs = 1;
        CHECK(cudaLaunchKernelEx(&configuration, in_cluster, y));
        int out[8];
        CHECK(cudaMemcpyAsync(out, y, sizeof out, cudaMemcpyDeviceToHost, stream));
        CHECK(cudaStreamSynchronize(stream));
        for (int i = 0; i < 8; i++)
            REQUIRE(out[i] == (i ^ 1) * 10);
        int clusters;
        CHECK(cudaOccupancyMaxActiveClusters(&clusters, in_cluster, &configuration));
        equal("clusters", clusters);

        attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute[0].val.programmaticStreamSerializationAllowed = 1;
        configuration.gridDim = dim3(1);
        for (int i = 0; i < 200; i++) {
            CHECK(cudaMemsetAsync(y, 0, 64 * sizeof(int), stream));
            first_half<<<1, 64, 0, stream>>>(x);
            CHECK(cudaLaunchKernelEx(&configuration, second_half, x, y));
        }
        int doubled[64];
        CHECK(cudaMemcpyAsync(doubled, y, sizeof doubled, cudaMemcpyDeviceToHost, stream));
        CHECK(cudaStreamSynchronize(stream));
        for (int i = 0; i < 64; i++)
            REQUIRE(doubled[i] == 2 * (i + 1));
    }

    Big big;
    for (int i = 0; i < 900; i++)
        big.values[i] = i * .25f;
    float *sum, got;
    CHECK(cudaMalloc(&sum, sizeof(float)));
    big_parameters<<<1, 1>>>(big, 2.0, 7, sum);
    CHECK(cudaMemcpy(&got, sum, sizeof got, cudaMemcpyDeviceToHost));
    REQUIRE(got == 2 * .25f * 900 * 899 / 2 + 7);

    for (int i = 0; i < 50; i++)
        CHECK(cudaLaunchHostFunc(stream, on_host, (void *)(intptr_t)i));
    CHECK(cudaStreamSynchronize(stream));
    REQUIRE(called == 50);

    /* Stream-ordered allocation. */
    for (int i = 0; i < 50; i++) {
        int *block;
        CHECK(cudaMallocAsync(&block, 1 << 20, stream));
        CHECK(cudaMemsetAsync(block, i, 1 << 20, stream));
        CHECK(cudaMemcpyAsync(&result, block + 1000, sizeof result, cudaMemcpyDeviceToHost, stream));
        CHECK(cudaFreeAsync(block, stream));
        CHECK(cudaStreamSynchronize(stream));
        REQUIRE(result == i * 0x01010101);
    }

    /* Several host threads, each with its stream, on the per-thread default stream, and all on one counter. */
    unsigned *counter, counted;
    CHECK(cudaMalloc(&counter, sizeof *counter));
    CHECK(cudaMemset(counter, 0, sizeof *counter));
    CHECK(cudaDeviceSynchronize());
    std::vector<std::thread> threads;
    std::atomic<int> wrong{0};
    for (int t = 0; t < 8; t++)
        threads.emplace_back([&, t] {
            cudaStream_t own;
            int *mine, host[32];
            if (cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking) || cudaMalloc(&mine, sizeof host))
                wrong++;
            for (int i = 0; i < 500; i++) {
                add_one<<<4, 32, 0, t % 2 ? own : cudaStreamPerThread>>>(counter);
                if (i % 50 == 0) {
                    cudaMemsetAsync(mine, t, sizeof host, own);
                    cudaMemcpyAsync(host, mine, sizeof host, cudaMemcpyDeviceToHost, own);
                    if (cudaStreamSynchronize(own) || host[31] != t * 0x01010101)
                        wrong++;
                }
            }
            if (cudaStreamSynchronize(own) || cudaStreamSynchronize(cudaStreamPerThread) || cudaGetLastError())
                wrong++;
            cudaStreamDestroy(own);
        });
    for (std::thread &thread : threads)
        thread.join();
    CHECK(cudaMemcpy(&counted, counter, sizeof counted, cudaMemcpyDeviceToHost));
    REQUIRE(wrong == 0);
    REQUIRE(counted == 8u * 500 * 4 * 32);
    equal("counted", counted);
    return finish();
}
