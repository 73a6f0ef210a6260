/* SPDX-License-Identifier: Apache-2.0 */
/* Errors: what is refused at once, what is reported at the next wait, and what stays. The codes must be native's. */
#include "check.cuh"

__global__ void nothing() {}
__global__ void store(int *where) { *where = 1; }
__global__ void stop() { __trap(); }

int main(int argc, char **argv)
{
    bool trap = argc > 1;
    int *x, *none = nullptr;
    float milliseconds;
    cudaEvent_t event;
    CHECK(cudaMalloc(&x, 4096));
    nothing<<<1, 2048>>>();
    equal("2048 threads", cudaGetLastError());
    nothing<<<0, 32>>>();
    equal("empty grid", cudaGetLastError());
    nothing<<<dim3(1, 70000), 32>>>();
    equal("grid y 70000", cudaGetLastError());
    nothing<<<1, 32, 300000>>>();
    equal("300000 bytes of shared memory", cudaGetLastError());
    equal("after errors", cudaDeviceSynchronize());
    equal("free of nothing", cudaFree(none));
    equal("free of a wild pointer", cudaFree((void *)0x1230));
    cudaGetLastError();
    equal("huge allocation", cudaMalloc(&none, (size_t)1 << 50));
    cudaGetLastError();
    equal("copy from null", cudaMemcpy(x, nullptr, 64, cudaMemcpyHostToDevice));
    cudaGetLastError();
    equal("device 7", cudaSetDevice(7));
    cudaGetLastError();
    CHECK(cudaEventCreate(&event));
    equal("elapsed of an unrecorded event", cudaEventElapsedTime(&milliseconds, event, event));
    cudaGetLastError();
    CHECK(cudaFree(x));
    equal("double free", cudaFree(x));
    cudaGetLastError();
    equal("working", cudaDeviceSynchronize());

    if (trap)
        stop<<<1, 1>>>();
    else
        store<<<1, 1>>>((int *)0x10);
    equal("launch of the faulting kernel", cudaGetLastError());
    equal("the wait", cudaDeviceSynchronize());
    equal("the error stays", cudaDeviceSynchronize());
    equal("in every call", cudaMalloc(&x, 64));
    equal("and launch", (nothing<<<1, 1>>>(), cudaGetLastError()));
    return finish();
}
