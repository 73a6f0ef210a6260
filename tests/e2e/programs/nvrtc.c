/* SPDX-License-Identifier: Apache-2.0 */
/* Compiles CUDA C++ at run time and runs what came out: nvrtc LIBNVRTC. */
#include "guest.h"

#include <dlfcn.h>

typedef struct program *nvrtcProgram;

static const char source[] = "extern \"C\" __global__ void saxpy(float a, const float *x, float *y, int n)\n"
                             "{\n"
                             "    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)\n"
                             "        y[i] = a * x[i] + y[i];\n"
                             "}\n"
                             "template <typename T> __global__ void square(T *x) { x[threadIdx.x] *= x[threadIdx.x]; }\n";

#define FUNCTION(name, ...)                                                                                            \
    int (*name)(__VA_ARGS__) = (int (*)(__VA_ARGS__))dlsym(library, #name);                                            \
    EXPECT(name != NULL)

int main(int argc, char **argv)
{
    (void)argc;
    void *library = dlopen(argv[1], RTLD_NOW);
    EXPECT(library != NULL);
    FUNCTION(nvrtcCreateProgram, nvrtcProgram *, const char *, const char *, int, const char *const *, const char *const *);
    FUNCTION(nvrtcAddNameExpression, nvrtcProgram, const char *);
    FUNCTION(nvrtcCompileProgram, nvrtcProgram, int, const char *const *);
    FUNCTION(nvrtcGetPTXSize, nvrtcProgram, size_t *);
    FUNCTION(nvrtcGetPTX, nvrtcProgram, char *);
    FUNCTION(nvrtcGetLoweredName, nvrtcProgram, const char *, const char **);
    start();
    int major, minor;
    CHECK(cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 0));
    CHECK(cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 0));
    char architecture[64];
    snprintf(architecture, sizeof architecture, "--gpu-architecture=compute_%d%d", major, minor);
    const char *options[] = {architecture, "--std=c++17"};
    nvrtcProgram program;
    EXPECT(nvrtcCreateProgram(&program, source, "saxpy.cu", 0, NULL, NULL) == 0);
    EXPECT(nvrtcAddNameExpression(program, "square<int>") == 0);
    EXPECT(nvrtcCompileProgram(program, 2, options) == 0);
    size_t size;
    EXPECT(nvrtcGetPTXSize(program, &size) == 0);
    char *ptx = malloc(size);
    EXPECT(nvrtcGetPTX(program, ptx) == 0);
    const char *lowered;
    EXPECT(nvrtcGetLoweredName(program, "square<int>", &lowered) == 0);

    CUmodule module;
    CUfunction saxpy, square;
    CHECK(cuModuleLoadData(&module, ptx));
    CHECK(cuModuleGetFunction(&saxpy, module, "saxpy"));
    CHECK(cuModuleGetFunction(&square, module, lowered));
    enum { N = 3000 };
    static float x[N], y[N];
    for (int i = 0; i < N; i++)
        x[i] = (float)i, y[i] = (float)(2 * i);
    CUdeviceptr dx, dy;
    CHECK(cuMemAlloc(&dx, sizeof x));
    CHECK(cuMemAlloc(&dy, sizeof y));
    CHECK(cuMemcpyHtoD(dx, x, sizeof x));
    CHECK(cuMemcpyHtoD(dy, y, sizeof y));
    float a = 4;
    int n = N;
    void *parameters[] = {&a, &dx, &dy, &n};
    CHECK(cuLaunchKernel(saxpy, 8, 1, 1, 128, 1, 1, 0, NULL, parameters, NULL));
    CHECK(cuMemcpyDtoH(y, dy, sizeof y));
    for (int i = 0; i < N; i++)
        EXPECT(y[i] == (float)(6 * i));
    int numbers[32];
    for (int i = 0; i < 32; i++)
        numbers[i] = i;
    CHECK(cuMemcpyHtoD(dx, numbers, sizeof numbers));
    void *only[] = {&dx};
    CHECK(cuLaunchKernel(square, 1, 1, 1, 32, 1, 1, 0, NULL, only, NULL));
    CHECK(cuMemcpyDtoH(numbers, dx, sizeof numbers));
    for (int i = 0; i < 32; i++)
        EXPECT(numbers[i] == i * i);
    puts("done");
    return 0;
}
