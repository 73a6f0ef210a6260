// SPDX-License-Identifier: Apache-2.0
// Memory nodes of graphs by the runtime API: made by hand, captured, freed by others, and what the device keeps for them.
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(call)                                                                                    \
    do {                                                                                               \
        cudaError_t status_ = (call);                                                                  \
        if (status_ != cudaSuccess) {                                                                  \
            std::printf("line %d: %s: %s\n", __LINE__, #call, cudaGetErrorString(status_));            \
            std::exit(1);                                                                              \
        }                                                                                              \
    } while (0)
#define HOLDS(condition)                                                                               \
    do {                                                                                               \
        if (!(condition)) {                                                                            \
            std::printf("line %d: not so: %s\n", __LINE__, #condition);                                \
            std::exit(1);                                                                              \
        }                                                                                              \
    } while (0)

constexpr int COUNT = 1 << 16;
constexpr size_t BYTES = COUNT * sizeof(float);

__global__ void fill(float *out, float value)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = value + float(i);
}

__global__ void add(float *out, const float *a, const float *b)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = a[i] + b[i];
}

static unsigned long long reserved()
{
    unsigned long long bytes = 0;
    CHECK(cudaDeviceGetGraphMemAttribute(0, cudaGraphMemAttrReservedMemCurrent, &bytes));
    return bytes;
}

static bool sums(const float *device, float value)
{
    std::vector<float> host(COUNT);
    CHECK(cudaMemcpy(host.data(), device, BYTES, cudaMemcpyDeviceToHost));
    for (int i = 0; i < COUNT; i++)
        if (host[i] != value + 2 * float(i)) return false;
    return true;
}

static void captured(cudaStream_t stream, float *out)
{
    float *a, *b;
    cudaGraph_t graph;
    cudaGraphExec_t instance;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    CHECK(cudaMallocAsync(&a, BYTES, stream));
    CHECK(cudaMallocAsync(&b, BYTES, stream));
    fill<<<COUNT / 256, 256, 0, stream>>>(a, 1);
    fill<<<COUNT / 256, 256, 0, stream>>>(b, 2);
    add<<<COUNT / 256, 256, 0, stream>>>(out, a, b);
    CHECK(cudaFreeAsync(a, stream));
    CHECK(cudaFreeAsync(b, stream));
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&instance, graph, 0));
    for (int i = 0; i < 5; i++) {
        CHECK(cudaMemsetAsync(out, 0, BYTES, stream));
        CHECK(cudaGraphLaunch(instance, stream));
        CHECK(cudaStreamSynchronize(stream));
        HOLDS(sums(out, 3));
    }
    HOLDS(reserved() >= 2 * BYTES);
    CHECK(cudaGraphExecDestroy(instance));
    CHECK(cudaGraphDestroy(graph));
}

static void by_hand(cudaStream_t stream)
{
    cudaGraph_t graph;
    cudaGraphNode_t allocation, kernel;
    cudaGraphExec_t instance;
    cudaMemAllocNodeParams memory = {};
    memory.poolProps.allocType = cudaMemAllocationTypePinned;
    memory.poolProps.location.type = cudaMemLocationTypeDevice;
    memory.poolProps.location.id = 0;
    memory.bytesize = BYTES;
    CHECK(cudaGraphCreate(&graph, 0));
    CHECK(cudaGraphAddMemAllocNode(&allocation, graph, nullptr, 0, &memory));
    float *place = static_cast<float *>(memory.dptr), value = 4;
    void *arguments[] = {&place, &value};
    cudaKernelNodeParams launch = {};
    launch.func = reinterpret_cast<void *>(fill);
    launch.gridDim = dim3(COUNT / 256);
    launch.blockDim = dim3(256);
    launch.kernelParams = arguments;
    CHECK(cudaGraphAddKernelNode(&kernel, graph, &allocation, 1, &launch));
    CHECK(cudaGraphInstantiate(&instance, graph, 0));
    CHECK(cudaGraphLaunch(instance, stream));
    add<<<COUNT / 256, 256, 0, stream>>>(place, place, place);
    CHECK(cudaStreamSynchronize(stream));
    std::vector<float> host(COUNT);
    CHECK(cudaMemcpy(host.data(), place, BYTES, cudaMemcpyDeviceToHost));
    for (int i = 0; i < COUNT; i++) HOLDS(host[i] == 2 * (4 + float(i)));
    HOLDS(cudaGraphLaunch(instance, stream) == cudaErrorInvalidValue); // still allocated
    (void)cudaGetLastError();
    CHECK(cudaFreeAsync(place, stream));
    CHECK(cudaGraphLaunch(instance, stream)); // and there again
    CHECK(cudaStreamSynchronize(stream));
    cudaPointerAttributes known;
    CHECK(cudaPointerGetAttributes(&known, place));
    HOLDS(known.type == cudaMemoryTypeDevice);
    CHECK(cudaFree(place));
    CHECK(cudaGraphExecDestroy(instance));
    CHECK(cudaGraphDestroy(graph));
}

int main()
{
    cudaStream_t stream;
    float *out;
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaMalloc(&out, BYTES));
    captured(stream, out);
    std::puts("captured");
    by_hand(stream);
    std::puts("by hand");
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaDeviceGraphMemTrim(0));
    HOLDS(reserved() == 0);
    CHECK(cudaFree(out));
    std::puts("done");
}
