/* SPDX-License-Identifier: Apache-2.0 */
/* Memory nodes of graphs: captured and by hand, launched again and again, freed by another graph, kept, trimmed. */
#include "check.cuh"
#include <cstring>
#include <vector>

static const int COUNT = 1 << 20;
static const size_t BYTES = COUNT * sizeof(float);

__global__ void ramp(float *out, float scale)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = scale * (float)(i % 1009);
}
__global__ void combine(float *out, const float *a, const float *b)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] += a[i] - 0.5f * b[i];
}

static long long device_digest(const float *device)
{
    std::vector<float> host(COUNT);
    CHECK(cudaMemcpy(host.data(), device, BYTES, cudaMemcpyDeviceToHost));
    return digest(host.data(), BYTES);
}
static long long held(cudaGraphMemAttributeType attribute)
{
    unsigned long long bytes = 0;
    CHECK(cudaDeviceGetGraphMemAttribute(0, attribute, &bytes));
    return (long long)bytes;
}

static void captured(cudaStream_t stream, float *out)
{
    float *a, *b;
    cudaGraph_t graph;
    cudaGraphExec_t instance, second;
    CHECK(cudaMemset(out, 0, BYTES));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    CHECK(cudaMallocAsync(&a, BYTES, stream));
    CHECK(cudaMallocAsync(&b, BYTES, stream));
    ramp<<<COUNT / 256, 256, 0, stream>>>(a, 3);
    ramp<<<COUNT / 256, 256, 0, stream>>>(b, 5);
    combine<<<COUNT / 256, 256, 0, stream>>>(out, a, b);
    CHECK(cudaFreeAsync(a, stream));
    CHECK(cudaFreeAsync(b, stream));
    CHECK(cudaStreamEndCapture(stream, &graph));
    size_t nodes = 0;
    CHECK(cudaGraphGetNodes(graph, nullptr, &nodes));
    equal("nodes", (long long)nodes);
    CHECK(cudaGraphInstantiate(&instance, graph, 0));
    equal("second instance", cudaGraphInstantiate(&second, graph, 0));
    cudaGraph_t copy;
    equal("clone", cudaGraphClone(&copy, graph));
    (void)cudaGetLastError();
    for (int i = 0; i < 25; i++)
        CHECK(cudaGraphLaunch(instance, stream));
    CHECK(cudaStreamSynchronize(stream));
    equal("captured", device_digest(out));
    equal("reserved", held(cudaGraphMemAttrReservedMemCurrent));
    CHECK(cudaGraphExecDestroy(instance));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaDeviceGraphMemTrim(0));
    equal("trimmed", held(cudaGraphMemAttrReservedMemCurrent));
}

static void left(cudaStream_t stream, float *out)
{
    cudaGraph_t makes, frees;
    cudaGraphExec_t maker, freer;
    cudaGraphNode_t node, after;
    cudaMemAllocNodeParams parameters;
    memset(&parameters, 0, sizeof parameters);
    parameters.poolProps.allocType = cudaMemAllocationTypePinned;
    parameters.poolProps.location.type = cudaMemLocationTypeDevice;
    parameters.bytesize = BYTES;
    CHECK(cudaGraphCreate(&makes, 0));
    CHECK(cudaGraphAddMemAllocNode(&node, makes, nullptr, 0, &parameters));
    cudaMemsetParams fill;
    memset(&fill, 0, sizeof fill);
    fill.dst = parameters.dptr;
    fill.value = 0x3f800000;
    fill.elementSize = 4;
    fill.width = COUNT;
    fill.height = 1;
    CHECK(cudaGraphAddMemsetNode(&after, makes, &node, 1, &fill));
    CHECK(cudaGraphInstantiate(&maker, makes, 0));
    CHECK(cudaGraphCreate(&frees, 0));
    CHECK(cudaGraphAddMemFreeNode(&node, frees, nullptr, 0, parameters.dptr));
    CHECK(cudaGraphInstantiate(&freer, frees, 0));
    for (int i = 0; i < 5; i++) {
        CHECK(cudaGraphLaunch(maker, stream));
        equal(("with its memory there " + std::to_string(i)).c_str(), cudaGraphLaunch(maker, stream));
        (void)cudaGetLastError();
        ramp<<<COUNT / 256, 256, 0, stream>>>(out, 2);
        combine<<<COUNT / 256, 256, 0, stream>>>(out, (const float *)parameters.dptr, (const float *)parameters.dptr);
        if (i % 2 == 0)
            CHECK(cudaGraphLaunch(freer, stream));
        else
            CHECK(cudaFreeAsync(parameters.dptr, stream));
    }
    CHECK(cudaStreamSynchronize(stream));
    equal("left and freed", device_digest(out));
    /* What a graph allocated outlives it. */
    CHECK(cudaGraphLaunch(maker, stream));
    CHECK(cudaGraphExecDestroy(maker));
    CHECK(cudaGraphDestroy(makes));
    equal("outlived", device_digest((const float *)parameters.dptr));
    CHECK(cudaFree(parameters.dptr));
    CHECK(cudaGraphExecDestroy(freer));
    CHECK(cudaGraphDestroy(frees));
}

static void freed_by_launching(cudaStream_t stream)
{
    float *a;
    cudaGraph_t graph;
    cudaGraphExec_t instance;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
    CHECK(cudaMallocAsync(&a, BYTES, stream));
    ramp<<<COUNT / 256, 256, 0, stream>>>(a, 7);
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiateWithFlags(&instance, graph, cudaGraphInstantiateFlagAutoFreeOnLaunch));
    for (int i = 0; i < 10; i++)
        CHECK(cudaGraphLaunch(instance, stream));
    CHECK(cudaStreamSynchronize(stream));
    equal("freed by launching", device_digest(a));
    CHECK(cudaFreeAsync(a, stream));
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaGraphExecDestroy(instance));
    CHECK(cudaGraphDestroy(graph));
}

int main()
{
    cudaStream_t stream;
    float *out;
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CHECK(cudaMalloc(&out, BYTES));
    captured(stream, out);
    left(stream, out);
    freed_by_launching(stream);
    CHECK(cudaDeviceGraphMemTrim(0));
    equal("at the end", held(cudaGraphMemAttrReservedMemCurrent));
    CHECK(cudaFree(out));
    return finish();
}
