/* SPDX-License-Identifier: Apache-2.0 */
/* An ordinary driver-API program: driver PTX-FILE. */
#include "guest.h"

#define COUNT 1024

int main(int argc, char **argv)
{
    (void)argc;
    int count = 0, version = 0;
    char name[128];
    CHECK(cuInit(0));
    CHECK(cuDeviceGetCount(&count));
    CHECK(cuDriverGetVersion(&version));
    CHECK(cuDeviceGetName(name, sizeof name, 0));
    printf("devices %d\n%s\n", count, name);

    CUcontext context, popped;
    CHECK(cuCtxCreate(&context, NULL, 0, 0));
    CUmodule module = load(argv[1]);
    CUfunction fill, scale;
    CHECK(cuModuleGetFunction(&fill, module, "fill"));
    CHECK(cuModuleGetFunction(&scale, module, "scale"));
    EXPECT(cuModuleGetFunction(&fill, module, "absent") == CUDA_ERROR_NOT_FOUND);
    CHECK(cuModuleGetFunction(&fill, module, "fill"));

    CUdeviceptr memory;
    CUstream stream;
    CUevent first, last;
    CHECK(cuMemAlloc(&memory, COUNT * sizeof(unsigned)));
    CHECK(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    CHECK(cuEventCreate(&first, 0));
    CHECK(cuEventCreate(&last, 0));
    CHECK(cuEventRecord(first, stream));
    unsigned value = 6, factor = 7, n = COUNT;
    void *parameters[] = {&memory, &value, &n};
    CHECK(cuLaunchKernel(fill, COUNT / 256, 1, 1, 256, 1, 1, 0, stream, parameters, NULL));
    struct {
        CUdeviceptr pointer;
        unsigned factor, count;
    } packed = {memory, factor, n};
    size_t size = sizeof packed;
    void *extra[] = {CU_LAUNCH_PARAM_BUFFER_POINTER, &packed, CU_LAUNCH_PARAM_BUFFER_SIZE, &size, CU_LAUNCH_PARAM_END};
    CHECK(cuLaunchKernel(scale, COUNT / 256, 1, 1, 256, 1, 1, 0, stream, NULL, extra));
    CHECK(cuEventRecord(last, stream));
    CHECK(cuEventSynchronize(last));
    float milliseconds = -1;
    CHECK(cuEventElapsedTime(&milliseconds, first, last));
    EXPECT(milliseconds >= 0);
    static unsigned host[COUNT];
    CHECK(cuMemcpyDtoH(host, memory, sizeof host));
    for (int i = 0; i < COUNT; i++)
        EXPECT(host[i] == 42);

    EXPECT(cuLaunchKernel(fill, 0, 1, 1, 256, 1, 1, 0, stream, parameters, NULL) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuLaunchKernel(fill, 1, 1, 1, 2048, 1, 1, 0, stream, parameters, NULL) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuLaunchKernel(fill, 1, 1, 1, 1, 1, 1, 1 << 20, stream, parameters, NULL) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemFree(0x1234500) == CUDA_ERROR_INVALID_VALUE);
    CHECK(cuEventDestroy(first));
    CHECK(cuEventDestroy(last));
    CHECK(cuStreamDestroy(stream));
    CHECK(cuMemFree(memory));
    EXPECT(cuMemFree(memory) == CUDA_ERROR_INVALID_VALUE);
    CHECK(cuModuleUnload(module));
    CHECK(cuCtxPopCurrent(&popped));
    EXPECT(popped == context);
    CHECK(cuCtxDestroy(context));
    puts("done");
    return 0;
}
