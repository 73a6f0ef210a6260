/* SPDX-License-Identifier: Apache-2.0 */
/* A program of CUDA's driver API that knows nothing of virtual GPUs: adds two vectors on the GPU and checks every sum.
 *
 *     gcc -I /usr/local/cuda/include vector_add.c -o vector_add -L /usr/local/cuda/lib64/stubs -lcuda
 *     vgpu-run ./vector_add
 */
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>

#define COUNT 4096
#define CHECK(call)                                                                                                    \
    do {                                                                                                               \
        CUresult status = (call);                                                                                      \
        if (status != CUDA_SUCCESS) {                                                                                  \
            fprintf(stderr, "%s: error %d\n", #call, (int)status);                                                     \
            return 1;                                                                                                  \
        }                                                                                                              \
    } while (0)

static const char *ptx = ".version 6.3\n"
                         ".target sm_70\n"
                         ".address_size 64\n"
                         ".visible .entry add(.param .u64 out, .param .u64 left, .param .u64 right, .param .u32 count)\n"
                         "{\n"
                         "    .reg .pred %p<2>; .reg .b32 %r<6>; .reg .f32 %f<4>; .reg .b64 %rd<8>;\n"
                         "    ld.param.u64 %rd1, [out]; ld.param.u64 %rd2, [left]; ld.param.u64 %rd3, [right];\n"
                         "    ld.param.u32 %r1, [count];\n"
                         "    mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x; mov.u32 %r4, %tid.x;\n"
                         "    mad.lo.s32 %r5, %r2, %r3, %r4;\n"
                         "    setp.ge.u32 %p1, %r5, %r1;\n"
                         "    @%p1 bra DONE;\n"
                         "    mul.wide.u32 %rd4, %r5, 4;\n"
                         "    add.s64 %rd5, %rd1, %rd4; add.s64 %rd6, %rd2, %rd4; add.s64 %rd7, %rd3, %rd4;\n"
                         "    ld.global.f32 %f1, [%rd6]; ld.global.f32 %f2, [%rd7];\n"
                         "    add.f32 %f3, %f1, %f2;\n"
                         "    st.global.f32 [%rd5], %f3;\n"
                         "DONE:\n"
                         "    ret;\n"
                         "}\n";

int main(void)
{
    static float left[COUNT], right[COUNT], sums[COUNT];
    char name[64];
    CUdevice device;
    CUcontext context;
    CUmodule module;
    CUfunction add;
    CUdeviceptr out, first, second;
    unsigned count = COUNT, wrong = 0;

    CHECK(cuInit(0));
    CHECK(cuDeviceGet(&device, 0));
    CHECK(cuDeviceGetName(name, sizeof name, device));
    CHECK(cuDevicePrimaryCtxRetain(&context, device));
    CHECK(cuCtxSetCurrent(context));
    CHECK(cuModuleLoadData(&module, ptx));
    CHECK(cuModuleGetFunction(&add, module, "add"));
    CHECK(cuMemAlloc(&out, sizeof sums));
    CHECK(cuMemAlloc(&first, sizeof left));
    CHECK(cuMemAlloc(&second, sizeof right));
    for (int i = 0; i < COUNT; i++) {
        left[i] = (float)i;
        right[i] = (float)(3 * i) + 0.5f;
    }
    CHECK(cuMemcpyHtoD(first, left, sizeof left));
    CHECK(cuMemcpyHtoD(second, right, sizeof right));
    void *parameters[] = {&out, &first, &second, &count};
    CHECK(cuLaunchKernel(add, COUNT / 256, 1, 1, 256, 1, 1, 0, NULL, parameters, NULL));
    CHECK(cuMemcpyDtoH(sums, out, sizeof sums));
    for (int i = 0; i < COUNT; i++)
        wrong += sums[i] != left[i] + right[i];
    printf("%s: %d sums, %u wrong\n", name, COUNT, wrong);
    return wrong != 0;
}
