/* SPDX-License-Identifier: Apache-2.0 */
/* Queries that must not leave the guest: queries PTX-FILE. Waits for a line before and after them. */
#include "guest.h"

int main(int argc, char **argv)
{
    (void)argc;
    start();
    CUmodule module = load(argv[1]);
    CUfunction fill;
    CUdeviceptr memory;
    CUstream stream;
    CHECK(cuModuleGetFunction(&fill, module, "fill"));
    CHECK(cuMemAlloc(&memory, 4096));
    CHECK(cuStreamCreate(&stream, 0));
    int number, blocks, warm = 0;
    CHECK(cuFuncGetAttribute(&number, CU_FUNC_ATTRIBUTE_NUM_REGS, fill)); /* the first may ask; the answer is kept */
    CHECK(cuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, fill, 256, 0));
    CHECK(cuCtxSynchronize());
    EXPECT(say_and_wait("ready"));
    for (int turn = 0; turn < 1000; turn++) {
        CUcontext context;
        CUdevice device;
        unsigned flags;
        int active, least, greatest;
        size_t size;
        char name[64];
        const char *word;
        CUuuid uuid;
        CUdeviceptr base;
        CUmemorytype type;
        CUstreamCaptureStatus status;
        CHECK(cuCtxGetCurrent(&context));
        CHECK(cuCtxSetCurrent(context));
        CHECK(cuCtxPushCurrent(context));
        CHECK(cuCtxPopCurrent(&context));
        CHECK(cuCtxGetDevice(&device));
        CHECK(cuCtxGetFlags(&flags));
        CHECK(cuCtxGetStreamPriorityRange(&least, &greatest));
        CHECK(cuDeviceGet(&device, 0));
        CHECK(cuDeviceGetCount(&number));
        CHECK(cuDeviceGetName(name, sizeof name, 0));
        CHECK(cuDeviceGetUuid(&uuid, 0));
        CHECK(cuDeviceTotalMem(&size, 0));
        CHECK(cuDevicePrimaryCtxGetState(0, &flags, &active));
        EXPECT(active == 1);
        CHECK(cuDriverGetVersion(&number));
        for (int attribute = 1; attribute < 100; attribute++)
            (void)cuDeviceGetAttribute(&number, (CUdevice_attribute)attribute, 0);
        CHECK(cuFuncGetAttribute(&number, CU_FUNC_ATTRIBUTE_NUM_REGS, fill));
        CHECK(cuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, fill, 256, 0));
        CHECK(cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, memory));
        EXPECT(type == CU_MEMORYTYPE_DEVICE);
        CHECK(cuMemGetAddressRange(&base, &size, memory + 100));
        EXPECT(base == memory && size == 4096);
        CHECK(cuStreamIsCapturing(stream, &status));
        CHECK(cuGetErrorName(CUDA_ERROR_INVALID_VALUE, &word));
        warm += number != 0;
    }
    EXPECT(warm > 0);
    EXPECT(say_and_wait("asked"));
    return 0;
}
