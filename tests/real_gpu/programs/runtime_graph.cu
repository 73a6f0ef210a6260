/* SPDX-License-Identifier: Apache-2.0 */
/* CUDA graphs: capture across streams, an explicit graph, update in place, parameter changes, host nodes. */
#include "check.cuh"
#include <vector>

__global__ void add(float *x, float value, int n)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        x[i] += value;
}
__global__ void multiply(float *x, float value, int n)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        x[i] *= value;
}

static int host_calls;
static void CUDART_CB on_host(void *) { host_calls++; }

int main()
{
    const int n = 10000;
    float *x, *y;
    std::vector<float> host(n);
    cudaStream_t stream, side;
    cudaEvent_t fork, join;
    CHECK(cudaMalloc(&x, n * sizeof(float)));
    CHECK(cudaMalloc(&y, n * sizeof(float)));
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaStreamCreate(&side));
    CHECK(cudaEventCreateWithFlags(&fork, cudaEventDisableTiming));
    CHECK(cudaEventCreateWithFlags(&join, cudaEventDisableTiming));

    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    CHECK(cudaMemsetAsync(x, 0, n * sizeof(float), stream));
    CHECK(cudaEventRecord(fork, stream));
    CHECK(cudaStreamWaitEvent(side, fork, 0));
    add<<<(n + 255) / 256, 256, 0, stream>>>(x, 3, n);
    CHECK(cudaMemsetAsync(y, 0, n * sizeof(float), side));
    add<<<(n + 255) / 256, 256, 0, side>>>(y, 4, n);
    CHECK(cudaEventRecord(join, side));
    CHECK(cudaStreamWaitEvent(stream, join, 0));
    multiply<<<(n + 255) / 256, 256, 0, stream>>>(x, 5, n);
    CHECK(cudaLaunchHostFunc(stream, on_host, nullptr));
    cudaStreamCaptureStatus state;
    CHECK(cudaStreamIsCapturing(stream, &state));
    equal("capturing", state);
    CHECK(cudaStreamEndCapture(stream, &graph));
    size_t nodes = 0;
    CHECK(cudaGraphGetNodes(graph, nullptr, &nodes));
    equal("nodes", (long long)nodes);
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    for (int i = 0; i < 20; i++)
        CHECK(cudaGraphLaunch(exec, stream));
    CHECK(cudaStreamSynchronize(stream));
    REQUIRE(host_calls == 20);
    CHECK(cudaMemcpy(host.data(), x, n * sizeof(float), cudaMemcpyDeviceToHost));
    for (float v : host)
        REQUIRE(v == 15);

    /* The same shape with other numbers: update in place. */
    cudaGraph_t changed;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    CHECK(cudaMemsetAsync(x, 0, n * sizeof(float), stream));
    CHECK(cudaEventRecord(fork, stream));
    CHECK(cudaStreamWaitEvent(side, fork, 0));
    add<<<(n + 255) / 256, 256, 0, stream>>>(x, 7, n);
    CHECK(cudaMemsetAsync(y, 0, n * sizeof(float), side));
    add<<<(n + 255) / 256, 256, 0, side>>>(y, 4, n);
    CHECK(cudaEventRecord(join, side));
    CHECK(cudaStreamWaitEvent(stream, join, 0));
    multiply<<<(n + 255) / 256, 256, 0, stream>>>(x, 2, n);
    CHECK(cudaLaunchHostFunc(stream, on_host, nullptr));
    CHECK(cudaStreamEndCapture(stream, &changed));
    cudaGraphExecUpdateResultInfo update;
    equal("update", cudaGraphExecUpdate(exec, changed, &update));
    equal("update result", update.result);
    CHECK(cudaGraphLaunch(exec, stream));
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaMemcpy(host.data(), x, n * sizeof(float), cudaMemcpyDeviceToHost));
    REQUIRE(host[n - 1] == 14);
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaGraphDestroy(changed));

    /* Built by hand, then one node's parameters changed. */
    cudaGraph_t built;
    cudaGraphNode_t first, second;
    int count = n;
    float value = 2;
    void *arguments[] = {&x, &value, &count};
    cudaKernelNodeParams parameters = {};
    parameters.func = (void *)add;
    parameters.gridDim = dim3((n + 255) / 256);
    parameters.blockDim = dim3(256);
    parameters.kernelParams = arguments;
    CHECK(cudaGraphCreate(&built, 0));
    CHECK(cudaGraphAddKernelNode(&first, built, nullptr, 0, &parameters));
    parameters.func = (void *)multiply;
    CHECK(cudaGraphAddKernelNode(&second, built, &first, 1, &parameters));
    CHECK(cudaGraphInstantiate(&exec, built, 0));
    CHECK(cudaMemset(x, 0, n * sizeof(float)));
    CHECK(cudaGraphLaunch(exec, stream)); /* (0 + 2) * 2 */
    value = 10;
    CHECK(cudaGraphExecKernelNodeSetParams(exec, second, &parameters));
    CHECK(cudaGraphLaunch(exec, stream)); /* (4 + 2) * 10 */
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaMemcpy(host.data(), x, n * sizeof(float), cudaMemcpyDeviceToHost));
    REQUIRE(host[0] == 60);

    /* What must not happen during a capture is refused, and the capture is lost. */
    cudaGraph_t lost = nullptr;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    add<<<1, 32, 0, stream>>>(x, 1, 32);
    equal("synchronize in capture", cudaStreamSynchronize(stream));
    equal("end of a lost capture", cudaStreamEndCapture(stream, &lost));
    cudaGetLastError();
    add<<<1, 32, 0, stream>>>(x, 1, 32);
    CHECK(cudaStreamSynchronize(stream));

    for (int i = 0; i < 2000; i++)
        CHECK(cudaGraphLaunch(exec, stream));
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(built));
    return finish();
}
