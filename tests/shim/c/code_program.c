/* SPDX-License-Identifier: Apache-2.0 */
/*
 * code_program.c - a driver-API program that says what each call answered, line by line. Run natively and through the
 * guest library, the two outputs must be the same; run on the software GPU, tests compare it with what is written down.
 * Lines contain no addresses, no times and nothing that depends on the model of the device.
 *
 * Usage: code_program [section ...]
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "_generated_prototypes.h"

static int say(const char *what, CUresult status)
{
    printf("%s: %d\n", what, status);
    return status == CUDA_SUCCESS;
}
#define SAY(call) say(#call, call)
/* A call that must work for the rest to mean anything. */
#define NEED(call)                                             \
    do {                                                       \
        CUresult need_status = (call);                         \
        if (need_status != CUDA_SUCCESS) {                     \
            printf("FAILED %s: %d\n", #call, need_status);     \
            exit(1);                                           \
        }                                                      \
    } while (0)

static char *ptx_text(void)
{
    /* `many` has more parameters than one slot describes, `wide` one of 4,000 bytes. */
    size_t size = 1 << 20, used = 0;
    char *text = malloc(size);
    used += (size_t)snprintf(text + used, size - used,
        "\n// a comment first\n.version 7.0\n.target sm_52\n.address_size 64\n"
        ".visible .global .align 4 .u32 counter = 7;\n"
        ".visible .entry nothing() { ret; }\n"
        ".visible .entry bounded() .maxntid 64, 1, 1 { ret; }\n"
        ".visible .entry exact() .reqntid 64, 1, 1 { ret; }\n"
        ".visible .entry store(.param .u64 out, .param .u32 value) {\n"
        " .reg .u64 %%rd<4>; .reg .u32 %%r<8>;\n"
        " ld.param.u64 %%rd1, [out]; ld.param.u32 %%r1, [value]; cvta.to.global.u64 %%rd2, %%rd1;\n"
        " mov.u32 %%r2, %%ctaid.x; mov.u32 %%r3, %%ntid.x; mov.u32 %%r4, %%tid.x; mad.lo.u32 %%r5, %%r2, %%r3, %%r4;\n"
        " mul.wide.u32 %%rd3, %%r5, 4; add.u64 %%rd2, %%rd2, %%rd3; add.u32 %%r6, %%r1, %%r5; st.global.u32 [%%rd2], %%r6; ret; }\n"
        ".visible .entry mixed(.param .u8 a, .param .u64 out, .param .u16 b, .param .f64 c, .param .u32 d) {\n"
        " .reg .u64 %%rd<4>; .reg .u32 %%r<8>; .reg .u16 %%h<4>; .reg .f64 %%d<2>;\n"
        " ld.param.u64 %%rd1, [out]; cvta.to.global.u64 %%rd2, %%rd1;\n"
        " ld.param.u8 %%h1, [a]; cvt.u32.u16 %%r1, %%h1; ld.param.u16 %%h2, [b]; cvt.u32.u16 %%r2, %%h2;\n"
        " ld.param.f64 %%d1, [c]; cvt.rni.u32.f64 %%r3, %%d1; ld.param.u32 %%r4, [d];\n"
        " st.global.u32 [%%rd2], %%r1; st.global.u32 [%%rd2+4], %%r2; st.global.u32 [%%rd2+8], %%r3; st.global.u32 [%%rd2+12], %%r4; ret; }\n"
        ".visible .entry wide(.param .u64 out, .param .align 4 .b8 block[4000]) {\n"
        " .reg .u64 %%rd<4>; .reg .u32 %%r<4>;\n"
        " ld.param.u64 %%rd1, [out]; cvta.to.global.u64 %%rd2, %%rd1; ld.param.u32 %%r1, [block+3996]; st.global.u32 [%%rd2], %%r1; ret; }\n"
        ".visible .entry many(.param .u64 out");
    for (int i = 0; i < 600; i++) used += (size_t)snprintf(text + used, size - used, ", .param .u32 p%d", i);
    used += (size_t)snprintf(text + used, size - used,
        ") {\n .reg .u64 %%rd<4>; .reg .u32 %%r<4>;\n"
        " ld.param.u64 %%rd1, [out]; cvta.to.global.u64 %%rd2, %%rd1;\n"
        " ld.param.u32 %%r1, [p0]; st.global.u32 [%%rd2], %%r1; ld.param.u32 %%r2, [p599]; st.global.u32 [%%rd2+4], %%r2; ret; }\n");
    return text;
}

static CUcontext context;
static CUmodule module;
static CUfunction nothing, store, mixed, wide, many;
static CUdeviceptr memory;

static void set_up(void)
{
    if (context != NULL) return;
    NEED(cuDevicePrimaryCtxRetain(&context, 0));
    NEED(cuCtxSetCurrent(context));
    char *text = ptx_text();
    NEED(cuModuleLoadData(&module, text));
    free(text);
    NEED(cuModuleGetFunction(&nothing, module, "nothing"));
    NEED(cuModuleGetFunction(&store, module, "store"));
    NEED(cuModuleGetFunction(&mixed, module, "mixed"));
    NEED(cuModuleGetFunction(&wide, module, "wide"));
    NEED(cuModuleGetFunction(&many, module, "many"));
    NEED(cuMemAlloc_v2(&memory, 1 << 20));
    NEED(cuMemsetD32_v2(memory, 0, 1 << 18));
}

static void show(const char *what, unsigned count)
{
    uint32_t word[16] = {0};
    NEED(cuMemcpyDtoH_v2(word, memory, count * 4));
    printf("%s:", what);
    for (unsigned i = 0; i < count; i++) printf(" %u", word[i]);
    printf("\n");
}

static CUresult run(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                    CUstream stream, void **parameters, void **extra)
{
    return cuLaunchKernel(f, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra);
}

static void images(void)
{
    set_up();
    CUmodule m = NULL;
    SAY(cuModuleLoadData(&m, NULL));
    SAY(cuModuleLoadData(NULL, "x"));
    SAY(cuModuleLoad(&m, "/nonexistent/file.cubin"));
    CUfunction f = NULL, again = NULL;
    SAY(cuModuleGetFunction(&f, module, "no_such_kernel"));
    SAY(cuModuleGetFunction(&again, module, "store"));
    printf("same function: %d\n", again == store);
    CUdeviceptr counter = 0;
    size_t bytes = 0;
    SAY(cuModuleGetGlobal_v2(&counter, &bytes, module, "counter"));
    uint32_t value = 0;
    NEED(cuMemcpyDtoH_v2(&value, counter, 4));
    printf("counter: %u in %zu bytes\n", value, bytes);
    SAY(cuModuleGetGlobal_v2(&counter, &bytes, module, "no_such_variable"));
    char name[64] = "/tmp/vgpu-code-program-XXXXXX";
    const int file = mkstemp(name);
    char *text = ptx_text();
    if (file < 0 || write(file, text, strlen(text)) != (ssize_t)strlen(text)) exit(1);
    close(file);
    SAY(cuModuleLoad(&m, name));
    unlink(name);
    SAY(cuModuleGetFunction(&f, m, "store"));
    unsigned count = 0;
    SAY(cuModuleGetFunctionCount(&count, m));
    printf("functions: %u\n", count);
    CUfunction all[16] = {NULL};
    SAY(cuModuleEnumerateFunctions(all, count < 16 ? count : 16, m));
    unsigned found = 0;
    for (unsigned i = 0; i < count && i < 16; i++) {
        const char *function_name = NULL;
        if (cuFuncGetName(&function_name, all[i]) == CUDA_SUCCESS)
            for (const char *const *known = (const char *const[]){"nothing", "store", "mixed", "wide", "many", "bounded", "exact", NULL}; *known; known++)
                found += strcmp(function_name, *known) == 0;
    }
    printf("names known: %u\n", found);
    SAY(cuModuleUnload(m));
    free(text);
    /* The log of a compilation that fails. */
    int options[] = {5, 6};
    char log[4096] = "";
    void *values[] = {log, (void *)sizeof log};
    const CUresult failed = cuModuleLoadDataEx(&m, ".version 7.0\n.target sm_52\n.address_size 64\n.entry x() { bogus; }\n", 2, options, values);
    printf("bad PTX: %d\n", failed);
    printf("log says something: %d\n", log[0] != 0);
}

static void parameters(void)
{
    set_up();
    size_t offset, size;
    CUfunction const f[] = {nothing, store, mixed, wide, many};
    for (unsigned i = 0; i < 5; i++) {
        unsigned n = 0;
        size_t sum = 0;
        while (cuFuncGetParamInfo(f[i], n, &offset, &size) == CUDA_SUCCESS) {
            sum += offset * 31 + size;
            n++;
        }
        printf("function %u: %u parameters, sum %zu, then %d\n", i, n, sum, cuFuncGetParamInfo(f[i], n, &offset, &size));
    }
    int value;
    for (unsigned attribute = 0; attribute < 17; attribute++) {
        const CUresult status = cuFuncGetAttribute(&value, attribute, store);
        if (attribute == 4 || attribute == 6 || attribute == 9 || attribute == 3)
            printf("attribute %u: %d\n", attribute, status);
        else
            printf("attribute %u: %d %d\n", attribute, status, status == 0 ? value : 0);
    }
    SAY(cuFuncSetAttribute(store, 8, 65536));
    SAY(cuFuncGetAttribute(&value, 8, store));
    printf("dynamic shared now: %d\n", value);
    SAY(cuFuncSetAttribute(store, 8, 300000));
    SAY(cuFuncSetAttribute(store, 8, -1));
    SAY(cuFuncSetAttribute(store, 9, 50));
    SAY(cuFuncGetAttribute(&value, 9, store));
    printf("carve-out now: %d\n", value);
    SAY(cuFuncSetAttribute(store, 9, 101));
    SAY(cuFuncSetAttribute(store, 0, 1));
    SAY(cuFuncSetAttribute(store, 99, 1));
    SAY(cuFuncSetAttribute(store, 8, 0));
    const char *name = NULL;
    SAY(cuFuncGetName(&name, store));
    printf("name: %s\n", name);
    CUmodule owner = NULL;
    SAY(cuFuncGetModule(&owner, store));
    printf("module is the one: %d\n", owner == module);
}

static void launches(void)
{
    set_up();
    uint32_t value = 100;
    void *p[] = {&memory, &value};
    SAY(run(store, 2, 1, 1, 4, 1, 1, 0, NULL, p, NULL));
    show("store", 8);
    struct { uint64_t out; uint32_t value; } packed = {memory, 500};
    size_t size = sizeof packed;
    void *extra[] = {(void *)1, &packed, (void *)2, &size, NULL};
    SAY(run(store, 1, 1, 1, 4, 1, 1, 0, NULL, NULL, extra));
    show("extra, four bytes too many", 4);
    size = 12;
    SAY(run(store, 1, 1, 1, 4, 1, 1, 0, NULL, NULL, extra));
    show("extra", 4);
    size = 8;
    SAY(run(store, 1, 1, 1, 4, 1, 1, 0, NULL, NULL, extra));
    SAY(cuCtxSynchronize());
    size = 12;
    uint8_t a = 200;
    uint16_t b = 50000;
    double c = 123456.0;
    uint32_t d = 4000000000u;
    void *m[] = {&a, &memory, &b, &c, &d};
    SAY(run(mixed, 1, 1, 1, 1, 1, 1, 0, NULL, m, NULL));
    show("mixed", 4);
    uint8_t block[4000] = {0};
    memcpy(block + 3996, &d, 4);
    void *w[] = {&memory, block};
    SAY(run(wide, 1, 1, 1, 1, 1, 1, 0, NULL, w, NULL));
    show("wide", 1);
    uint32_t numbers[600];
    void *all[601] = {&memory};
    for (unsigned i = 0; i < 600; i++) {
        numbers[i] = 1000 + i;
        all[i + 1] = &numbers[i];
    }
    SAY(run(many, 1, 1, 1, 1, 1, 1, 0, NULL, all, NULL));
    show("many", 2);
    SAY(run(nothing, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL));
    SAY(cuCtxSynchronize());

    SAY(run(store, 0, 1, 1, 1, 1, 1, 0, NULL, p, NULL));
    SAY(run(store, 1, 1, 1, 0, 1, 1, 0, NULL, p, NULL));
    SAY(run(store, 1, 70000, 1, 1, 1, 1, 0, NULL, p, NULL));
    SAY(run(store, 1, 1, 1, 2048, 1, 1, 0, NULL, p, NULL));
    SAY(run(store, 1, 1, 1, 1, 1, 65, 0, NULL, p, NULL));
    SAY(run(store, 1, 1, 1, 64, 64, 1, 0, NULL, p, NULL));
    SAY(run(store, 1, 1, 1, 1, 1, 1, 300000, NULL, p, NULL));
    SAY(run(store, 1, 1, 1, 1, 1, 1, 60000, NULL, p, NULL));
    SAY(cuFuncSetAttribute(store, 8, 65536));
    SAY(run(store, 1, 1, 1, 4, 1, 1, 60000, NULL, p, NULL));
    SAY(cuFuncSetAttribute(store, 8, 49152));
    CUfunction bounded = NULL, exact = NULL;
    NEED(cuModuleGetFunction(&bounded, module, "bounded"));
    NEED(cuModuleGetFunction(&exact, module, "exact"));
    SAY(run(bounded, 1, 1, 1, 65, 1, 1, 0, NULL, NULL, NULL));
    SAY(run(bounded, 1, 1, 1, 32, 1, 1, 0, NULL, NULL, NULL));
    SAY(run(exact, 1, 1, 1, 32, 1, 1, 0, NULL, NULL, NULL));
    SAY(run(exact, 1, 1, 1, 64, 1, 1, 0, NULL, NULL, NULL));
    SAY(run(NULL, 1, 1, 1, 1, 1, 1, 0, NULL, p, NULL));
    SAY(run(store, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL));
    SAY(run(store, 1, 1, 1, 1, 1, 1, 0, NULL, p, extra));
    SAY(cuCtxSynchronize());

    CUstream stream;
    NEED(cuStreamCreate(&stream, 1));
    CUlaunchAttribute attribute[4] = {{.id = 6}, {.id = 8}, {.id = 0}, {.id = 2}};
    attribute[0].value.words[0] = 1;
    CUlaunchConfig config = {.gridDimX = 2, .gridDimY = 1, .gridDimZ = 1, .blockDimX = 4, .blockDimY = 1, .blockDimZ = 1,
                             .hStream = stream, .attrs = attribute, .numAttrs = 3};
    value = 700;
    SAY(cuLaunchKernelEx(&config, store, p, NULL));
    SAY(cuStreamSynchronize(stream));
    show("with attributes", 8);
    config.numAttrs = 0;
    config.attrs = NULL;
    value = 800;
    SAY(cuLaunchKernelEx(&config, store, p, NULL));
    SAY(cuStreamSynchronize(stream));
    show("without attributes", 8);
    value = 900;
    SAY(cuLaunchCooperativeKernel(store, 2, 1, 1, 4, 1, 1, 0, stream, p));
    SAY(cuStreamSynchronize(stream));
    show("cooperative", 8);
    SAY(cuStreamDestroy_v2(stream));
}

static void clusters(void) /* Hopper and later */
{
    set_up();
    uint32_t value = 40;
    void *p[] = {&memory, &value};
    SAY(cuLaunchCooperativeKernel(store, 1000000, 1, 1, 1024, 1, 1, 0, NULL, p));
    CUlaunchAttribute attribute = {.id = 4};
    attribute.value.words[0] = 2;
    attribute.value.words[1] = attribute.value.words[2] = 1;
    CUlaunchConfig config = {.gridDimX = 4, .gridDimY = 1, .gridDimZ = 1, .blockDimX = 2, .blockDimY = 1, .blockDimZ = 1,
                             .attrs = &attribute, .numAttrs = 1};
    SAY(cuLaunchKernelEx(&config, store, p, NULL));
    show("clusters of 2", 8);
    attribute.value.words[0] = 3;
    SAY(cuLaunchKernelEx(&config, store, p, NULL));
    attribute.value.words[0] = 16;
    config.gridDimX = 16;
    SAY(cuLaunchKernelEx(&config, store, p, NULL));
    attribute.value.words[0] = 0;
    SAY(cuLaunchKernelEx(&config, store, p, NULL));
    attribute.value.words[0] = 4;
    int count = 0;
    SAY(cuOccupancyMaxActiveClusters(&count, store, &config));
    printf("some clusters: %d\n", count > 0);
    int again = 0;
    SAY(cuOccupancyMaxActiveClusters(&again, store, &config));
    printf("the same again: %d\n", again == count);
    SAY(cuOccupancyMaxPotentialClusterSize(&count, store, &config));
    printf("largest cluster: %d\n", count);
    /* A tensor map of 64 x 32 floats. */
    uint8_t map[128] __attribute__((aligned(64))) = {0};
    const uint64_t dimension[2] = {64, 32}, stride[1] = {256};
    const uint32_t box[2] = {16, 16}, step[2] = {1, 1};
    SAY(cuTensorMapEncodeTiled(map, 7, 2, (void *)memory, dimension, stride, box, step, 0, 0, 0, 0));
    unsigned nonzero = 0;
    for (unsigned i = 0; i < 128; i++) nonzero += map[i] != 0;
    printf("map written: %d\n", nonzero > 8);
    SAY(cuTensorMapReplaceAddress(map, (void *)(memory + 4096)));
    SAY(cuTensorMapEncodeTiled(map, 7, 2, (void *)(memory + 1), dimension, stride, box, step, 0, 0, 0, 0));
    SAY(cuTensorMapEncodeTiled(map, 7, 9, (void *)memory, dimension, stride, box, step, 0, 0, 0, 0));
    SAY(cuTensorMapEncodeTiled(map, 7, 2, (void *)memory, NULL, stride, box, step, 0, 0, 0, 0));
    SAY(cuTensorMapEncodeTiled(map, 7, 1, (void *)memory, dimension, NULL, box, step, 0, 0, 0, 0));
}

static void library(void)
{
    CUlibrary lib = NULL;
    CUkernel kernel = NULL, again = NULL;
    char *text = ptx_text();
    if (context != NULL) NEED(cuCtxSetCurrent(NULL));
    int option = 1;
    SAY(cuLibraryLoadData(&lib, text, NULL, NULL, 0, &option, NULL, 1));
    free(text);
    SAY(cuLibraryGetKernel(&kernel, lib, "store"));
    SAY(cuLibraryGetKernel(&again, lib, "store"));
    printf("same kernel: %d\n", kernel == again);
    SAY(cuLibraryGetKernel(&again, lib, "no_such_kernel"));
    unsigned count = 0;
    SAY(cuLibraryGetKernelCount(&count, lib));
    printf("kernels: %u\n", count);
    const char *name = NULL;
    SAY(cuKernelGetName(&name, kernel));
    printf("name: %s\n", name);
    CUlibrary owner = NULL;
    SAY(cuKernelGetLibrary(&owner, kernel));
    printf("library is the one: %d\n", owner == lib);
    size_t offset = 0, size = 0;
    SAY(cuKernelGetParamInfo(kernel, 1, &offset, &size));
    printf("parameter 1: offset %zu, size %zu\n", offset, size);
    SAY(cuKernelGetParamInfo(kernel, 2, &offset, &size));
    set_up();
    NEED(cuCtxSetCurrent(context));
    int value = 0;
    SAY(cuKernelGetAttribute(&value, 0, kernel, 0));
    printf("threads: %d\n", value);
    SAY(cuKernelSetAttribute(8, 50000, kernel, 0));
    SAY(cuKernelSetAttribute(8, 50000, kernel, 0));
    SAY(cuKernelGetAttribute(&value, 8, kernel, 0));
    printf("dynamic shared: %d\n", value);
    SAY(cuKernelSetAttribute(8, 300000, kernel, 0));
    uint32_t number = 60;
    void *p[] = {&memory, &number};
    SAY(run((CUfunction)kernel, 1, 1, 1, 4, 1, 1, 0, NULL, p, NULL));
    show("kernel as function", 4);
    SAY(cuFuncGetAttribute(&value, 0, (CUfunction)kernel));
    SAY(cuOccupancyMaxActiveBlocksPerMultiprocessor(&value, (CUfunction)kernel, 128, 0));
    CUfunction f = NULL, f2 = NULL;
    SAY(cuKernelGetFunction(&f, kernel));
    SAY(cuKernelGetFunction(&f2, kernel));
    printf("same function: %d\n", f == f2);
    SAY(cuFuncGetAttribute(&value, 8, f));
    number = 70;
    SAY(run(f, 1, 1, 1, 4, 1, 1, 0, NULL, p, NULL));
    show("its function", 4);
    CUmodule inner = NULL;
    SAY(cuLibraryGetModule(&inner, lib));
    CUfunction by_name = NULL;
    SAY(cuModuleGetFunction(&by_name, inner, "store"));
    number = 80;
    SAY(run(by_name, 1, 1, 1, 4, 1, 1, 0, NULL, p, NULL));
    show("by its module", 4);
    CUdeviceptr counter = 0;
    size_t bytes = 0;
    SAY(cuLibraryGetGlobal(&counter, &bytes, lib, "counter"));
    uint32_t seven = 0;
    NEED(cuMemcpyDtoH_v2(&seven, counter, 4));
    printf("counter: %u in %zu bytes\n", seven, bytes);
    CUkernel all[16] = {NULL};
    SAY(cuLibraryEnumerateKernels(all, 7, lib));
    unsigned launched = 0;
    for (unsigned i = 0; i < 7; i++) {
        const char *n = NULL;
        if (cuKernelGetName(&n, all[i]) == CUDA_SUCCESS && strcmp(n, "nothing") == 0)
            launched += run((CUfunction)all[i], 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL) == CUDA_SUCCESS;
    }
    printf("enumerated and launched: %u\n", launched);
    SAY(cuCtxSynchronize());
    SAY(cuLibraryUnload(lib));
}

static void occupancy(void)
{
    set_up();
    int first = 0, second = 0, grid = 0, block = 0;
    SAY(cuOccupancyMaxActiveBlocksPerMultiprocessor(&first, store, 256, 0));
    SAY(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(&second, store, 256, 0, 0));
    printf("blocks: %d, the same: %d\n", first > 0, first == second);
    SAY(cuOccupancyMaxActiveBlocksPerMultiprocessor(&first, store, 0, 0));
    SAY(cuOccupancyMaxActiveBlocksPerMultiprocessor(&first, NULL, 256, 0));
    size_t bytes = 0;
    SAY(cuOccupancyAvailableDynamicSMemPerBlock(&bytes, store, 2, 128));
    printf("dynamic shared for two blocks: %d\n", bytes > 0);
}

static size_t no_shared(int block)
{
    (void)block;
    return 0;
}

static void block_size(void)
{
    set_up();
    int grid = 0, block = 0, grid2 = 0, block2 = 0;
    SAY(cuOccupancyMaxPotentialBlockSize(&grid, &block, store, NULL, 0, 0));
    SAY(cuOccupancyMaxPotentialBlockSize(&grid2, &block2, store, (void *)no_shared, 0, 0));
    printf("with and without callback: %d %d\n", grid == grid2, block == block2);
    SAY(cuOccupancyMaxPotentialBlockSize(&grid, &block, store, NULL, 0, 100));
    SAY(cuOccupancyMaxPotentialBlockSize(&grid2, &block2, store, (void *)no_shared, 0, 100));
    printf("limited to 100: %d %d, %d\n", grid == grid2, block == block2, block);
}

static void *end_in_another_thread(void *stream)
{
    CUgraph graph = (CUgraph)1;
    NEED(cuCtxSetCurrent(context));
    SAY(cuStreamEndCapture(stream, &graph));
    printf("graph: %s\n", graph == NULL ? "none" : "some");
    return NULL;
}

static void *allocate_in_another_thread(void *unused)
{
    (void)unused;
    CUdeviceptr more = 0;
    NEED(cuCtxSetCurrent(context));
    const CUresult status = cuMemAlloc_v2(&more, 4096);
    printf("another thread allocates: %d\n", status);
    if (status == CUDA_SUCCESS) cuMemFree_v2(more);
    return NULL;
}

static void capture(void)
{
    set_up();
    CUstream a, b;
    CUevent fork, join;
    NEED(cuStreamCreate(&a, 1));
    NEED(cuStreamCreate(&b, 1));
    NEED(cuEventCreate(&fork, 2));
    NEED(cuEventCreate(&join, 2));
    unsigned state = 9;
    SAY(cuStreamIsCapturing(a, &state));
    printf("capturing: %u\n", state);
    SAY(cuStreamBeginCapture_v2(NULL, 2));
    SAY(cuStreamBeginCapture_v2(a, 7));
    SAY(cuStreamBeginCapture_v2(a, 0));
    SAY(cuStreamBeginCapture_v2(a, 0));
    SAY(cuStreamIsCapturing(a, &state));
    printf("capturing: %u\n", state);
    uint32_t value = 10;
    CUdeviceptr second = memory + 16;
    void *p[] = {&memory, &value}, *q[] = {&second, &value};
    SAY(run(store, 1, 1, 1, 4, 1, 1, 0, a, p, NULL));
    SAY(cuEventRecord(fork, a));
    SAY(cuStreamWaitEvent(b, fork, 0));
    SAY(cuStreamIsCapturing(b, &state));
    printf("joined: %u\n", state);
    value = 20;
    SAY(run(store, 1, 1, 1, 4, 1, 1, 0, b, q, NULL));
    SAY(cuEventRecord(join, b));
    SAY(cuStreamWaitEvent(a, join, 0));
    unsigned long long id = 0;
    CUgraph inside = NULL, graph = NULL;
    const CUgraphNode *dependencies = NULL;
    size_t count = 99;
    SAY(cuStreamGetCaptureInfo_v2(a, &state, &id, &inside, &dependencies, &count));
    printf("info: %u, an id %d, a graph %d, dependencies %zu\n", state, id != 0, inside != NULL, count);
    unsigned type = 99;
    for (size_t i = 0; i < count; i++) {
        SAY(cuGraphNodeGetType(dependencies[i], &type));
        printf("type: %u\n", type);
    }
    SAY(cuStreamEndCapture(b, &graph));
    SAY(cuStreamEndCapture(a, &graph));
    printf("the same graph: %d\n", graph == inside);
    SAY(cuStreamIsCapturing(b, &state));
    printf("afterwards: %u\n", state);
    SAY(cuGraphGetNodes(graph, NULL, &count));
    printf("nodes: %zu\n", count);
    show("before the launch", 8);
    CUgraphExec exec = NULL;
    SAY(cuGraphInstantiateWithFlags(&exec, graph, 0));
    SAY(cuGraphLaunch(exec, a));
    SAY(cuStreamSynchronize(a));
    show("after the launch", 8);
    SAY(cuGraphDestroy(graph));
    NEED(cuMemsetD32_v2(memory, 0, 8));
    SAY(cuGraphLaunch(exec, a));
    SAY(cuStreamSynchronize(a));
    show("graph gone, exec lives", 8);
    SAY(cuGraphExecDestroy(exec));

    SAY(cuStreamEndCapture(a, &graph));
    /* A fork that is not joined. */
    SAY(cuStreamBeginCapture_v2(a, 2));
    SAY(cuEventRecord(fork, a));
    SAY(cuStreamWaitEvent(b, fork, 0));
    SAY(run(store, 1, 1, 1, 4, 1, 1, 0, b, q, NULL));
    SAY(cuStreamEndCapture(a, &graph));
    printf("graph: %s\n", graph == NULL ? "none" : "some");
    SAY(cuStreamIsCapturing(b, &state));
    printf("b afterwards: %u\n", state);
    /* Waiting for a stream that captures. */
    SAY(cuStreamBeginCapture_v2(a, 2));
    SAY(cuStreamSynchronize(a));
    SAY(cuStreamIsCapturing(a, &state));
    printf("spoilt: %u\n", state);
    SAY(run(store, 1, 1, 1, 4, 1, 1, 0, a, p, NULL));
    SAY(cuStreamEndCapture(a, &graph));
    SAY(cuEventDestroy_v2(fork));
    SAY(cuEventDestroy_v2(join));
    SAY(cuStreamDestroy_v2(a));
    SAY(cuStreamDestroy_v2(b));
    SAY(cuCtxSynchronize());
}

/* Which thread may do what while a stream captures. The software GPU has no such rules; this is about the guest's. */
static void modes(void)
{
    set_up();
    CUstream a;
    CUgraph graph = NULL;
    CUdeviceptr more = 0;
    pthread_t thread;
    unsigned state = 9;
    NEED(cuStreamCreate(&a, 1));
    for (unsigned mode = 0; mode < 3; mode++) {
        printf("mode %u\n", mode);
        SAY(cuStreamBeginCapture_v2(a, mode));
        const CUresult status = cuMemAlloc_v2(&more, 4096);
        printf("allocate: %d\n", status);
        if (status == CUDA_SUCCESS) NEED(cuMemFree_v2(more));
        SAY(cuStreamIsCapturing(a, &state));
        printf("state: %u\n", state);
        SAY(cuStreamEndCapture(a, &graph));
        if (graph != NULL) SAY(cuGraphDestroy(graph));
        SAY(cuStreamBeginCapture_v2(a, mode));
        pthread_create(&thread, NULL, allocate_in_another_thread, NULL);
        pthread_join(thread, NULL);
        SAY(cuStreamEndCapture(a, &graph));
        if (graph != NULL) SAY(cuGraphDestroy(graph));
        SAY(cuStreamBeginCapture_v2(a, mode));
        pthread_create(&thread, NULL, end_in_another_thread, a);
        pthread_join(thread, NULL);
        SAY(cuStreamIsCapturing(a, &state));
        printf("state: %u\n", state);
        if (state != 0) SAY(cuStreamEndCapture(a, &graph));
    }
    SAY(cuStreamBeginCapture_v2(a, 0));
    unsigned relaxed = 2;
    SAY(cuThreadExchangeStreamCaptureMode(&relaxed));
    printf("mode before: %u\n", relaxed);
    SAY(cuMemAlloc_v2(&more, 4096));
    SAY(cuThreadExchangeStreamCaptureMode(&relaxed));
    SAY(cuStreamEndCapture(a, &graph));
    SAY(cuGraphDestroy(graph));
    SAY(cuMemFree_v2(more));
    SAY(cuStreamDestroy_v2(a));
}

struct kernel_node { CUDA_KERNEL_NODE_PARAMS p; };

static void graphs(void)
{
    set_up();
    CUgraph graph = NULL;
    CUgraphNode one = NULL, two = NULL, clear = NULL, copy = NULL, empty = NULL;
    SAY(cuGraphCreate(&graph, 0));
    uint32_t value = 1;
    void *p[] = {&memory, &value};
    CUDA_KERNEL_NODE_PARAMS kernel = {.func = store, .gridDimX = 1, .gridDimY = 1, .gridDimZ = 1, .blockDimX = 4, .blockDimY = 1,
                                      .blockDimZ = 1, .kernelParams = p};
    const struct { uint64_t dst, pitch; uint32_t value, element; uint64_t width, height; } set = {memory, 0, 9, 4, 8, 1};
    SAY(cuGraphAddMemsetNode(&clear, graph, NULL, 0, &set, context));
    SAY(cuGraphAddKernelNode_v2(&one, graph, &clear, 1, &kernel));
    uint32_t *pinned = NULL;
    NEED(cuMemHostAlloc((void *)&pinned, 4096, 0));
    memset(pinned, 0xff, 4096);
    CUDA_MEMCPY3D back = {.srcMemoryType = 2, .srcDevice = memory, .srcPitch = 32, .srcHeight = 1, .dstMemoryType = 1,
                          .dstHost = pinned, .dstPitch = 32, .dstHeight = 1, .WidthInBytes = 32, .Height = 1, .Depth = 1};
    SAY(cuGraphAddMemcpyNode(&copy, graph, &one, 1, &back, context));
    SAY(cuGraphAddEmptyNode(&empty, graph, &copy, 1));
    size_t count = 0;
    SAY(cuGraphGetNodes(graph, NULL, &count));
    printf("nodes: %zu\n", count);
    CUgraphNode nodes[8];
    count = 8;
    SAY(cuGraphGetNodes(graph, nodes, &count));
    printf("nodes: %zu, the first four: %d\n", count, nodes[0] == clear && nodes[1] == one && nodes[2] == copy && nodes[3] == empty);
    printf("beyond: %d\n", nodes[5] == NULL);
    count = 8;
    SAY(cuGraphGetRootNodes(graph, nodes, &count));
    printf("roots: %zu, %d\n", count, nodes[0] == clear);
    CUgraphNode from[8], to[8];
    count = 8;
    SAY(cuGraphGetEdges(graph, from, to, &count));
    printf("edges: %zu\n", count);
    count = 8;
    SAY(cuGraphNodeGetDependencies(copy, nodes, &count));
    printf("copy depends on: %zu, %d\n", count, nodes[0] == one);
    count = 8;
    SAY(cuGraphNodeGetDependentNodes(one, nodes, &count));
    printf("on the kernel depend: %zu, %d\n", count, nodes[0] == copy);
    CUgraphExec exec = NULL;
    SAY(cuGraphInstantiate_v2(&exec, graph, NULL, NULL, 0));
    CUstream stream;
    NEED(cuStreamCreate(&stream, 1));
    SAY(cuGraphLaunch(exec, stream));
    SAY(cuStreamSynchronize(stream));
    printf("pinned: %u %u %u %u %u %u %u %u %u\n", pinned[0], pinned[1], pinned[2], pinned[3], pinned[4], pinned[5], pinned[6], pinned[7], pinned[8]);
    /* Other parameters for the same instance, then for the graph and an update. */
    value = 100;
    SAY(cuGraphExecKernelNodeSetParams_v2(exec, one, &kernel));
    SAY(cuGraphLaunch(exec, stream));
    SAY(cuStreamSynchronize(stream));
    printf("set in the instance: %u %u\n", pinned[0], pinned[3]);
    value = 200;
    SAY(cuGraphKernelNodeSetParams_v2(one, &kernel));
    struct { int result; CUgraphNode a, b; } update = {77, NULL, NULL};
    SAY(cuGraphExecUpdate_v2(exec, graph, &update));
    printf("update: %d\n", update.result);
    SAY(cuGraphLaunch(exec, stream));
    SAY(cuStreamSynchronize(stream));
    printf("updated: %u %u\n", pinned[0], pinned[3]);
    CUgraph other = NULL;
    SAY(cuGraphCreate(&other, 0));
    SAY(cuGraphAddKernelNode_v2(&two, other, NULL, 0, &kernel));
    SAY(cuGraphExecUpdate_v2(exec, other, &update));
    printf("other shape refused: %d\n", update.result != 0);
    CUgraph clone = NULL;
    CUgraphNode twin = NULL;
    SAY(cuGraphClone(&clone, graph));
    SAY(cuGraphNodeFindInClone(&twin, one, clone));
    unsigned type = 99;
    SAY(cuGraphNodeGetType(twin, &type));
    printf("twin is a kernel: %u\n", type);
    SAY(cuGraphDestroyNode(empty));
    CUgraphNode child = NULL;
    CUgraph inner = NULL;
    SAY(cuGraphAddChildGraphNode(&child, graph, &copy, 1, other));
    SAY(cuGraphChildGraphNodeGetGraph(child, &inner));
    count = 0;
    SAY(cuGraphGetNodes(inner, NULL, &count));
    printf("nodes of the child: %zu\n", count);
    SAY(cuGraphExecDestroy(exec));
    SAY(cuGraphDestroy(other));
    count = 0;
    SAY(cuGraphGetNodes(inner, NULL, &count));
    printf("the child has a copy: %zu\n", count);
    SAY(cuGraphDestroy(clone));
    SAY(cuGraphDestroy(graph));
    NEED(cuStreamDestroy_v2(stream));
    NEED(cuMemFreeHost(pinned));
}

static void node_parameters(void)
{
    set_up();
    CUgraph graph = NULL;
    CUgraphNode node = NULL, made = NULL;
    CUstream stream;
    NEED(cuStreamCreate(&stream, 1));
    uint32_t value = 33;
    void *p[] = {&memory, &value};
    SAY(cuStreamBeginCapture_v2(stream, 2));
    SAY(run(store, 3, 1, 1, 4, 1, 1, 0, stream, p, NULL));
    SAY(cuStreamEndCapture(stream, &graph));
    size_t count = 1;
    SAY(cuGraphGetNodes(graph, &node, &count));
    CUDA_KERNEL_NODE_PARAMS k = {0};
    if (!SAY(cuGraphKernelNodeGetParams_v2(node, &k))) return;
    printf("function %d, grid %u, block %u, value %u, out %d\n", k.func == store, k.gridDimX, k.blockDimX,
           *(uint32_t *)k.kernelParams[1], *(uint64_t *)k.kernelParams[0] == memory);
    uint32_t next = 44;
    k.kernelParams[1] = &next;
    SAY(cuGraphKernelNodeSetParams_v2(node, &k));
    CUDA_KERNEL_NODE_PARAMS changed = {0};
    SAY(cuGraphKernelNodeGetParams_v2(node, &changed));
    printf("value %u\n", *(uint32_t *)changed.kernelParams[1]);
    const struct { uint64_t dst, pitch; uint32_t value, element; uint64_t width, height; } set = {memory, 0, 9, 4, 8, 1};
    SAY(cuGraphAddMemsetNode(&made, graph, &node, 1, &set, context));
    struct { uint64_t dst, pitch; uint32_t value, element; uint64_t width, height; } got;
    SAY(cuGraphMemsetNodeGetParams(made, &got));
    printf("memset: %d %u %u %zu %zu\n", got.dst == memory, got.value, got.element, (size_t)got.width, (size_t)got.height);
    union { unsigned words[16]; } attribute = {{0}};
    SAY(cuGraphKernelNodeGetAttribute(node, 2, &attribute));
    printf("cooperative: %u\n", attribute.words[0]);
    attribute.words[0] = 0;
    SAY(cuGraphKernelNodeSetAttribute(node, 2, &attribute));
    NEED(cuGraphDestroy(graph));
    NEED(cuStreamDestroy_v2(stream));
}

static _Atomic int calls;
static CUresult inside, told_status = 99;
static int told_stream;

static void host_function(void *user)
{
    int device = 0;
    CUdeviceptr more = 0;
    (void)device;
    inside = cuMemAlloc_v2(&more, 4096);
    calls += (int)(intptr_t)user;
}

static void stream_callback(CUstream stream, CUresult status, void *user)
{
    told_stream = stream == *(CUstream *)user;
    told_status = status;
    calls += 1000;
}

static void destroy_object(void *user)
{
    printf("object destroyed: %d\n", (int)(intptr_t)user);
}

static void host(void)
{
    set_up();
    CUstream stream;
    NEED(cuStreamCreate(&stream, 1));
    calls = 0;
    SAY(cuLaunchHostFunc(stream, (void *)host_function, (void *)1));
    SAY(cuStreamSynchronize(stream));
    printf("calls: %d, inside %d\n", calls, inside);
    for (int i = 0; i < 100; i++) NEED(cuLaunchHostFunc(stream, (void *)host_function, (void *)1));
    SAY(cuStreamSynchronize(stream));
    printf("calls: %d\n", calls);
    SAY(cuStreamAddCallback(stream, (void *)stream_callback, &stream, 0));
    SAY(cuStreamSynchronize(stream));
    printf("callback: stream %d, status %d\n", told_stream, told_status);
    printf("calls: %d\n", calls);
    SAY(cuLaunchHostFunc(stream, NULL, NULL));
    CUgraph graph = NULL;
    CUgraphExec exec = NULL;
    SAY(cuStreamBeginCapture_v2(stream, 2));
    SAY(cuLaunchHostFunc(stream, (void *)host_function, (void *)10000));
    SAY(cuStreamEndCapture(stream, &graph));
    SAY(cuGraphInstantiateWithFlags(&exec, graph, 0));
    SAY(cuGraphLaunch(exec, stream));
    SAY(cuGraphLaunch(exec, stream));
    SAY(cuStreamSynchronize(stream));
    printf("calls: %d\n", calls);
    NEED(cuGraphExecDestroy(exec));
    NEED(cuGraphDestroy(graph));
    NEED(cuStreamDestroy_v2(stream));
}

static void host_nodes(void)
{
    set_up();
    CUstream stream;
    CUgraph graph = NULL;
    CUgraphNode node = NULL;
    CUgraphExec exec = NULL;
    NEED(cuStreamCreate(&stream, 1));
    calls = 0;
    SAY(cuGraphCreate(&graph, 0));
    struct { void *fn, *user; } p = {(void *)host_function, (void *)5}, got = {NULL, NULL};
    SAY(cuGraphAddHostNode(&node, graph, NULL, 0, &p));
    SAY(cuGraphHostNodeGetParams(node, &got));
    printf("the same: %d %d\n", got.fn == p.fn, got.user == p.user);
    SAY(cuGraphInstantiateWithFlags(&exec, graph, 0));
    SAY(cuGraphLaunch(exec, stream));
    SAY(cuStreamSynchronize(stream));
    printf("calls: %d\n", calls);
    NEED(cuGraphExecDestroy(exec));
    NEED(cuGraphDestroy(graph));
    NEED(cuStreamDestroy_v2(stream));
}

static void objects(void)
{
    set_up();
    CUuserObject object = NULL;
    CUgraph graph = NULL;
    SAY(cuUserObjectCreate(&object, (void *)1, (void *)destroy_object, 1, 1));
    SAY(cuGraphCreate(&graph, 0));
    SAY(cuGraphRetainUserObject(graph, (unsigned long long)(uintptr_t)object, 1, 1));
    SAY(cuGraphDestroy(graph));
    SAY(cuUserObjectCreate(&object, (void *)2, (void *)destroy_object, 2, 1));
    SAY(cuUserObjectRetain((unsigned long long)(uintptr_t)object, 1));
    SAY(cuUserObjectRelease((unsigned long long)(uintptr_t)object, 2));
    printf("one left\n");
    SAY(cuUserObjectRelease((unsigned long long)(uintptr_t)object, 1));
    SAY(cuUserObjectCreate(&object, (void *)3, (void *)destroy_object, 1, 0));
    SAY(cuUserObjectCreate(&object, (void *)3, NULL, 1, 1));
}

static void link_images(void)
{
    set_up();
    CUlinkState state = NULL;
    char log[4096] = "";
    int options[] = {3, 4};
    void *values[] = {log, (void *)sizeof log};
    if (!SAY(cuLinkCreate_v2(2, options, values, &state))) return;
    char *text = ptx_text();
    SAY(cuLinkAddData_v2(state, 1, text, strlen(text) + 1, "first", 0, NULL, NULL));
    void *cubin = NULL;
    size_t size = 0;
    SAY(cuLinkComplete(state, &cubin, &size));
    printf("an ELF: %d\n", size > 64 && memcmp(cubin, "\177ELF", 4) == 0);
    CUmodule m = NULL;
    CUfunction f = NULL;
    SAY(cuModuleLoadData(&m, cubin));
    SAY(cuLinkDestroy(state));
    SAY(cuModuleGetFunction(&f, m, "store"));
    uint32_t value = 11;
    void *p[] = {&memory, &value};
    SAY(run(f, 1, 1, 1, 4, 1, 1, 0, NULL, p, NULL));
    show("linked", 4);
    SAY(cuModuleUnload(m));
    NEED(cuLinkCreate_v2(0, NULL, NULL, &state));
    SAY(cuLinkAddData_v2(state, 1, "this is no PTX", 15, "bad", 0, NULL, NULL));
    SAY(cuLinkDestroy(state));
    free(text);
}

/* Modules end with their context; libraries and kernels live on, and a kernel has another function then. */
static void reset(void)
{
    CUlibrary lib;
    CUkernel kernel;
    char *text = ptx_text();
    for (unsigned round = 0; round < 3; round++) {
        set_up();
        if (round == 0) {
            NEED(cuLibraryLoadData(&lib, text, NULL, NULL, 0, NULL, NULL, 0));
            NEED(cuLibraryGetKernel(&kernel, lib, "store"));
        }
        CUfunction function = NULL;
        uint32_t value = 100 * round;
        void *p[] = {&memory, &value};
        SAY(cuKernelGetFunction(&function, kernel));
        SAY(run(function, 1, 1, 1, 4, 1, 1, 0, NULL, p, NULL));
        show("its function", 4);
        value++;
        SAY(run((CUfunction)kernel, 1, 1, 1, 4, 1, 1, 0, NULL, p, NULL));
        show("the kernel", 4);
        CUmodule inner = NULL;
        CUfunction by_name = NULL;
        SAY(cuLibraryGetModule(&inner, lib));
        SAY(cuModuleGetFunction(&by_name, inner, "nothing"));
        SAY(run(by_name, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL));
        SAY(cuCtxSynchronize());
        SAY(cuDevicePrimaryCtxReset_v2(0));
        NEED(cuDevicePrimaryCtxRelease_v2(0));
        context = NULL;
    }
    SAY(cuLibraryUnload(lib));
    free(text);
}

static void stale(void) /* natively undefined: the guest must answer, and the worker must live */
{
    set_up();
    CUmodule m = NULL;
    CUfunction f = NULL;
    char *text = ptx_text();
    NEED(cuModuleLoadData(&m, text));
    NEED(cuModuleGetFunction(&f, m, "nothing"));
    NEED(cuModuleUnload(m));
    SAY(cuModuleUnload(m));
    SAY(cuModuleGetFunction(&f, m, "nothing"));
    SAY(run(f, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL));
    SAY(run((CUfunction)0x1234567890, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL));
    SAY(cuGraphLaunch((CUgraphExec)0x7777777777, NULL));
    SAY(cuGraphDestroy((CUgraph)module));
    SAY(cuModuleLoadData(&m, "\001\002\003\004"));
    SAY(cuModuleLoadData(&m, ""));
    SAY(cuLibraryUnload((CUlibrary)m));
    CUgraph graph = NULL, inner = NULL;
    CUgraphNode node = NULL, child = NULL;
    CUgraphExec exec = NULL;
    NEED(cuGraphCreate(&graph, 0));
    NEED(cuGraphCreate(&inner, 0));
    NEED(cuGraphAddEmptyNode(&node, inner, NULL, 0));
    NEED(cuGraphAddChildGraphNode(&child, graph, NULL, 0, inner));
    NEED(cuGraphDestroyNode(node));
    SAY(cuGraphDestroyNode(node));
    NEED(cuGraphChildGraphNodeGetGraph(child, &inner));
    SAY(cuGraphDestroy(inner));
    NEED(cuGraphInstantiateWithFlags(&exec, graph, 0));
    NEED(cuGraphExecDestroy(exec));
    SAY(cuGraphExecDestroy(exec));
    SAY(cuGraphLaunch(exec, NULL));
    NEED(cuGraphDestroy(graph));
    SAY(cuGraphDestroy(graph));
    unsigned type;
    SAY(cuGraphNodeGetType(child, &type));
    SAY(cuGraphAddEmptyNode(&node, inner, NULL, 0));
    SAY(cuLinkDestroy((CUlinkState)m));
    NEED(cuCtxSetCurrent(NULL));
    SAY(run(nothing, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL));
    NEED(cuCtxSetCurrent(context));
    SAY(run(nothing, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL));
    SAY(cuCtxSynchronize());
    free(text);
}

static const struct { const char *name; void (*run)(void); } sections[] = {
    {"library", library}, {"images", images}, {"parameters", parameters}, {"launches", launches}, {"occupancy", occupancy},
    {"block_size", block_size}, {"capture", capture}, {"modes", modes}, {"graphs", graphs}, {"node_parameters", node_parameters},
    {"host", host}, {"host_nodes", host_nodes}, {"objects", objects}, {"link", link_images}, {"clusters", clusters}, {"stale", stale}, {"reset", reset},
};

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    NEED(cuInit(0));
    for (int i = 1; i < argc; i++)
        for (unsigned s = 0; s < sizeof sections / sizeof *sections; s++)
            if (strcmp(argv[i], sections[s].name) == 0) {
                printf("== %s\n", argv[i]);
                sections[s].run();
            }
    return 0;
}
