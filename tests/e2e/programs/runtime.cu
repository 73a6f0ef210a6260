// SPDX-License-Identifier: Apache-2.0
// What ordinary CUDA runtime programs do, one thing after the other; prints a line per thing that came out right.
// Uses only functions whose name and signature are the same in every runtime from 11.8 on.
#include <cooperative_groups.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda_runtime.h>
#include <vector>

#define CHECK(call)                                                                                                    \
    do {                                                                                                               \
        cudaError_t status = (call);                                                                                   \
        if (status != cudaSuccess) {                                                                                   \
            printf("line %d: %s: %s\n", __LINE__, #call, cudaGetErrorName(status));                                    \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)
#define EXPECT(condition)                                                                                              \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            printf("line %d: not so: %s\n", __LINE__, #condition);                                                     \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

__global__ void add(const float *a, const float *b, float *c, int n)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        c[i] = a[i] + b[i];
}

__global__ void sum(const int *in, int *out, int n)
{
    __shared__ int warps[32];
    int value = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        value += in[i];
    for (int step = 16; step > 0; step /= 2)
        value += __shfl_down_sync(0xffffffffu, value, step);
    if (threadIdx.x % 32 == 0)
        warps[threadIdx.x / 32] = value;
    __syncthreads();
    if (threadIdx.x < 32) {
        value = threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : 0;
        for (int step = 16; step > 0; step /= 2)
            value += __shfl_down_sync(0xffffffffu, value, step);
        if (threadIdx.x == 0)
            atomicAdd(out, value);
    }
}

#define TILE 16
__global__ void multiply(const float *a, const float *b, float *c, int n)
{
    __shared__ float left[TILE][TILE], right[TILE][TILE];
    int row = blockIdx.y * TILE + threadIdx.y, column = blockIdx.x * TILE + threadIdx.x;
    float total = 0;
    for (int tile = 0; tile < n / TILE; tile++) {
        left[threadIdx.y][threadIdx.x] = a[row * n + tile * TILE + threadIdx.x];
        right[threadIdx.y][threadIdx.x] = b[(tile * TILE + threadIdx.y) * n + column];
        __syncthreads();
        for (int k = 0; k < TILE; k++)
            total += left[threadIdx.y][k] * right[k][threadIdx.x];
        __syncthreads();
    }
    c[row * n + column] = total;
}

__constant__ int factors[4];
__device__ int counter = 5;
__global__ void symbols(int *out)
{
    out[threadIdx.x] = factors[threadIdx.x % 4] * counter;
    if (threadIdx.x == 0)
        atomicAdd(&counter, 1);
}

__global__ void increment(int *data, int n)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        data[i]++;
}

__global__ void neighbours(int *data, int *out, int n)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    data[i] = i;
    cooperative_groups::this_grid().sync();
    out[i] = data[(i + 1) % n] + data[(i + n - 1) % n];
}

static void vector_add()
{
    const int n = 10007;
    std::vector<float> a(n), b(n), c(n);
    for (int i = 0; i < n; i++)
        a[i] = 0.5f * i, b[i] = 3.0f * i;
    float *da, *db, *dc;
    CHECK(cudaMalloc(&da, n * sizeof(float)));
    CHECK(cudaMalloc(&db, n * sizeof(float)));
    CHECK(cudaMalloc(&dc, n * sizeof(float)));
    CHECK(cudaMemcpy(da, a.data(), n * sizeof(float), cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(db, b.data(), n * sizeof(float), cudaMemcpyHostToDevice));
    add<<<(n + 255) / 256, 256>>>(da, db, dc, n);
    CHECK(cudaGetLastError());
    CHECK(cudaMemcpy(c.data(), dc, n * sizeof(float), cudaMemcpyDeviceToHost));
    for (int i = 0; i < n; i++)
        EXPECT(c[i] == a[i] + b[i]);
    CHECK(cudaFree(da));
    CHECK(cudaFree(db));
    CHECK(cudaFree(dc));
    puts("vector add");
}

static void reduction()
{
    const int n = 5000;
    std::vector<int> in(n);
    long expected = 0;
    for (int i = 0; i < n; i++)
        expected += in[i] = i * 7 % 1000 - 300;
    int *din, *dout, out = 0;
    CHECK(cudaMalloc(&din, n * sizeof(int)));
    CHECK(cudaMalloc(&dout, sizeof(int)));
    CHECK(cudaMemcpy(din, in.data(), n * sizeof(int), cudaMemcpyHostToDevice));
    CHECK(cudaMemset(dout, 0, sizeof(int)));
    sum<<<4, 256>>>(din, dout, n);
    CHECK(cudaMemcpy(&out, dout, sizeof(int), cudaMemcpyDeviceToHost));
    EXPECT(out == expected);
    CHECK(cudaFree(din));
    CHECK(cudaFree(dout));
    puts("reduction");
}

static void matrix()
{
    const int n = 64;
    std::vector<float> a(n * n), b(n * n), c(n * n);
    for (int i = 0; i < n * n; i++)
        a[i] = i % 13 - 6, b[i] = i % 7 - 3;
    float *da, *db, *dc;
    size_t size = n * n * sizeof(float);
    CHECK(cudaMalloc(&da, size));
    CHECK(cudaMalloc(&db, size));
    CHECK(cudaMalloc(&dc, size));
    CHECK(cudaMemcpy(da, a.data(), size, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(db, b.data(), size, cudaMemcpyHostToDevice));
    multiply<<<dim3(n / TILE, n / TILE), dim3(TILE, TILE)>>>(da, db, dc, n);
    CHECK(cudaMemcpy(c.data(), dc, size, cudaMemcpyDeviceToHost));
    for (int row = 0; row < n; row++)
        for (int column = 0; column < n; column++) {
            float total = 0;
            for (int k = 0; k < n; k++)
                total += a[row * n + k] * b[k * n + column];
            EXPECT(c[row * n + column] == total); // small integers: exact in any order
        }
    CHECK(cudaFree(da));
    CHECK(cudaFree(db));
    CHECK(cudaFree(dc));
    puts("matrix");
}

static void variables()
{
    int values[4] = {1, 10, 100, 1000}, out[8], after = 0, *dout;
    CHECK(cudaMemcpyToSymbol(factors, values, sizeof values));
    CHECK(cudaMalloc(&dout, sizeof out));
    symbols<<<1, 8>>>(dout);
    CHECK(cudaMemcpy(out, dout, sizeof out, cudaMemcpyDeviceToHost));
    for (int i = 0; i < 8; i++)
        EXPECT(out[i] == values[i % 4] * 5);
    CHECK(cudaMemcpyFromSymbol(&after, counter, sizeof after));
    EXPECT(after == 6);
    void *address = nullptr;
    CHECK(cudaGetSymbolAddress(&address, counter));
    EXPECT(address != nullptr);
    CHECK(cudaFree(dout));
    puts("variables");
}

static void streams_and_events()
{
    const int n = 4096;
    int *pinned, *device;
    cudaStream_t streams[2];
    cudaEvent_t begin, end, handover;
    CHECK(cudaMallocHost(&pinned, n * sizeof(int)));
    CHECK(cudaMalloc(&device, n * sizeof(int)));
    for (auto &stream : streams)
        CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    CHECK(cudaEventCreateWithFlags(&handover, cudaEventDisableTiming));
    for (int i = 0; i < n; i++)
        pinned[i] = i;
    CHECK(cudaEventRecord(begin, streams[0]));
    CHECK(cudaMemcpyAsync(device, pinned, n * sizeof(int), cudaMemcpyHostToDevice, streams[0]));
    for (int turn = 0; turn < 10; turn++) {
        increment<<<n / 256, 256, 0, streams[turn % 2]>>>(device, n);
        CHECK(cudaEventRecord(handover, streams[turn % 2]));
        CHECK(cudaStreamWaitEvent(streams[(turn + 1) % 2], handover, 0));
    }
    CHECK(cudaMemcpyAsync(pinned, device, n * sizeof(int), cudaMemcpyDeviceToHost, streams[0]));
    CHECK(cudaEventRecord(end, streams[0]));
    CHECK(cudaEventSynchronize(end));
    CHECK(cudaEventQuery(begin));
    for (int i = 0; i < n; i++)
        EXPECT(pinned[i] == i + 10);
    float milliseconds = -1;
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    EXPECT(milliseconds >= 0 && milliseconds < 60000);
    for (auto &stream : streams)
        CHECK(cudaStreamDestroy(stream));
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    CHECK(cudaEventDestroy(handover));
    CHECK(cudaFreeHost(pinned));
    CHECK(cudaFree(device));
    puts("streams and events");
}

static void mapped()
{
    int *host, *device;
    CHECK(cudaHostAlloc(&host, 1024 * sizeof(int), cudaHostAllocMapped));
    memset(host, 0, 1024 * sizeof(int));
    CHECK(cudaHostGetDevicePointer(&device, host, 0));
    for (int turn = 0; turn < 3; turn++)
        increment<<<4, 256>>>(device, 1024);
    CHECK(cudaDeviceSynchronize());
    for (int i = 0; i < 1024; i++)
        EXPECT(host[i] == 3);
    CHECK(cudaFreeHost(host));
    puts("mapped memory");
}

static void called(void *user) { ++*(int *)user; }

static void graph()
{
    int *device, host[256], calls = 0;
    cudaStream_t stream;
    cudaGraph_t captured;
    cudaGraphExec_t executable;
    CHECK(cudaMalloc(&device, sizeof host));
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    CHECK(cudaMemsetAsync(device, 0, sizeof host, stream));
    for (int i = 0; i < 5; i++)
        increment<<<1, 256, 0, stream>>>(device, 256);
    CHECK(cudaLaunchHostFunc(stream, called, &calls));
    CHECK(cudaStreamEndCapture(stream, &captured));
    CHECK(cudaGraphInstantiateWithFlags(&executable, captured, 0));
    EXPECT(calls == 0);
    for (int turn = 1; turn <= 3; turn++) {
        CHECK(cudaGraphLaunch(executable, stream));
        CHECK(cudaStreamSynchronize(stream));
        EXPECT(calls == turn);
        CHECK(cudaMemcpy(host, device, sizeof host, cudaMemcpyDeviceToHost));
        for (int value : host)
            EXPECT(value == 5);
    }
    CHECK(cudaGraphExecDestroy(executable));
    CHECK(cudaGraphDestroy(captured));
    CHECK(cudaStreamDestroy(stream));
    CHECK(cudaFree(device));
    puts("graph");
}

static void cooperative()
{
    int supported = 0, *data, *out, n = 512;
    std::vector<int> host(n);
    CHECK(cudaDeviceGetAttribute(&supported, cudaDevAttrCooperativeLaunch, 0));
    EXPECT(supported == 1);
    CHECK(cudaMalloc(&data, n * sizeof(int)));
    CHECK(cudaMalloc(&out, n * sizeof(int)));
    void *arguments[] = {&data, &out, &n};
    CHECK(cudaLaunchCooperativeKernel((void *)neighbours, dim3(4), dim3(128), arguments, 0, nullptr));
    CHECK(cudaMemcpy(host.data(), out, n * sizeof(int), cudaMemcpyDeviceToHost));
    for (int i = 0; i < n; i++)
        EXPECT(host[i] == (i + 1) % n + (i + n - 1) % n);
    CHECK(cudaFree(data));
    CHECK(cudaFree(out));
    puts("cooperative launch");
}

static void rectangles()
{
    int host[8][8], back[8][8] = {};
    for (int i = 0; i < 64; i++)
        host[i / 8][i % 8] = i;
    void *device;
    size_t pitch;
    CHECK(cudaMallocPitch(&device, &pitch, sizeof host[0], 8));
    CHECK(cudaMemcpy2D(device, pitch, host, sizeof host[0], sizeof host[0], 8, cudaMemcpyHostToDevice));
    CHECK(cudaMemset2D((char *)device + pitch, pitch, 0, 8, 2));
    CHECK(cudaMemcpy2D(back, sizeof back[0], device, pitch, sizeof back[0], 8, cudaMemcpyDeviceToHost));
    for (int i = 0; i < 64; i++)
        EXPECT(back[i / 8][i % 8] == (i / 8 == 1 || i / 8 == 2 ? (i % 8 < 2 ? 0 : i) : i));
    CHECK(cudaFree(device));
    puts("rectangles");
}

static void pool()
{
    int *device, host[256];
    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaMallocAsync((void **)&device, sizeof host, stream));
    CHECK(cudaMemsetAsync(device, 0, sizeof host, stream));
    increment<<<1, 256, 0, stream>>>(device, 256);
    CHECK(cudaMemcpyAsync(host, device, sizeof host, cudaMemcpyDeviceToHost, stream));
    CHECK(cudaFreeAsync(device, stream));
    CHECK(cudaStreamSynchronize(stream));
    for (int value : host)
        EXPECT(value == 1);
    CHECK(cudaStreamDestroy(stream));
    puts("pool");
}

static void errors()
{
    int *device;
    EXPECT(cudaMalloc(&device, (size_t)1 << 46) == cudaErrorMemoryAllocation);
    EXPECT(cudaGetLastError() == cudaErrorMemoryAllocation);
    CHECK(cudaGetLastError());
    increment<<<1, 2048>>>(nullptr, 0);
    cudaError_t refused = cudaGetLastError(); // the runtime looks for a reason behind the driver's invalid value
    EXPECT(refused == cudaErrorInvalidConfiguration || refused == cudaErrorInvalidValue);
    EXPECT(cudaFree((void *)0x1234500) == cudaErrorInvalidValue);
    cudaGetLastError();
    CHECK(cudaDeviceSynchronize());
    puts("errors");
}

int main(int count, char **words)
{
    int devices = -1, version = 0;
    CHECK(cudaGetDeviceCount(&devices));
    CHECK(cudaRuntimeGetVersion(&version));
    printf("devices %d\nruntime %d\n", devices, version);
    if (count > 1 && strcmp(words[1], "short") == 0) {
        vector_add();
        return 0;
    }
    vector_add();
    reduction();
    matrix();
    variables();
    streams_and_events();
    mapped();
    graph();
    cooperative();
    rectangles();
    pool();
    errors();
    CHECK(cudaDeviceReset());
    vector_add();
    puts("done");
    return 0;
}
