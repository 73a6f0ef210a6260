/* SPDX-License-Identifier: Apache-2.0 */
/*
 * code_threads.c - many threads look up, describe, change, ask about and launch the same kernels, while others load and
 * unload, capture, build graphs and run host functions. Linked with the guest library's own objects under
 * ThreadSanitizer; exits 0 and prints "done" when every call answered as it must.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "_generated_prototypes.h"

#define THREADS 6
#define ROUNDS 25
#define NEED(call)                                                  \
    do {                                                            \
        const CUresult need_status = (call);                        \
        if (need_status != CUDA_SUCCESS) {                          \
            fprintf(stderr, "%s: %d\n", #call, need_status);        \
            _Exit(1);                                               \
        }                                                           \
    } while (0)

static const char ptx[] =
    ".version 7.0\n.target sm_52\n.address_size 64\n"
    ".visible .entry store(.param .u64 out, .param .u32 value) {\n"
    " .reg .u64 %rd<3>; .reg .u32 %r<2>;\n"
    " ld.param.u64 %rd1, [out]; ld.param.u32 %r1, [value]; cvta.to.global.u64 %rd2, %rd1; st.global.u32 [%rd2], %r1; ret; }\n"
    ".visible .entry other(.param .u64 out) { ret; }\n";

static CUcontext context;
static CUlibrary shared;
static CUdeviceptr memory;
static pthread_barrier_t barrier;
static _Atomic int host_calls;

static void host_function(void *user)
{
    (void)user;
    host_calls++;
}

static void use_shared(unsigned number, CUstream stream)
{
    CUkernel kernel, other;
    CUfunction function;
    int value, blocks;
    size_t offset, size;
    NEED(cuLibraryGetKernel(&kernel, shared, "store"));
    NEED(cuLibraryGetKernel(&other, shared, "other"));
    NEED(cuKernelGetFunction(&function, kernel));
    NEED(cuKernelGetAttribute(&value, 0, kernel, 0));
    NEED(cuKernelSetAttribute(8, 1024 * (int)(number + 1), kernel, 0));
    NEED(cuFuncGetAttribute(&value, 8, function));
    NEED(cuKernelGetParamInfo(kernel, 1, &offset, &size));
    NEED(cuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, (CUfunction)kernel, 32 * (int)(number + 1), 0));
    CUdeviceptr mine = memory + 256 * number;
    uint32_t word = 1000 + number;
    void *p[] = {&mine, &word};
    NEED(cuLaunchKernel((CUfunction)kernel, 1, 1, 1, 1, 1, 1, 0, stream, p, NULL));
    NEED(cuLaunchKernel((CUfunction)other, 1, 1, 1, 1, 1, 1, 0, stream, p, NULL));
    NEED(cuStreamSynchronize(stream));
    uint32_t found = 0;
    NEED(cuMemcpyDtoH_v2(&found, mine, 4));
    if (found != word) {
        fprintf(stderr, "thread %u found %u\n", number, found);
        _Exit(1);
    }
}

static void load_and_unload(void)
{
    CUmodule module;
    CUfunction function;
    NEED(cuModuleLoadData(&module, ptx));
    NEED(cuModuleGetFunction(&function, module, "other"));
    void *p[] = {&memory};
    NEED(cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, NULL, p, NULL));
    NEED(cuCtxSynchronize());
    NEED(cuModuleUnload(module));
}

static void build_graph(CUstream stream)
{
    CUgraph graph;
    CUgraphNode first, second;
    CUgraphExec exec;
    CUuserObject object;
    NEED(cuGraphCreate(&graph, 0));
    NEED(cuUserObjectCreate(&object, NULL, (void *)host_function, 1, 1));
    NEED(cuGraphRetainUserObject(graph, (unsigned long long)(uintptr_t)object, 1, 1));
    NEED(cuGraphAddEmptyNode(&first, graph, NULL, 0));
    NEED(cuGraphAddEmptyNode(&second, graph, &first, 1));
    NEED(cuGraphInstantiateWithFlags(&exec, graph, 0));
    NEED(cuGraphLaunch(exec, stream));
    NEED(cuGraphDestroy(graph));
    NEED(cuGraphExecDestroy(exec));
    NEED(cuLaunchHostFunc(stream, (void *)host_function, NULL));
    NEED(cuStreamSynchronize(stream));
}

static void *work(void *argument)
{
    const unsigned number = (unsigned)(uintptr_t)argument;
    CUstream stream;
    NEED(cuCtxSetCurrent(context));
    NEED(cuStreamCreate(&stream, 1));
    pthread_barrier_wait(&barrier);
    for (unsigned round = 0; round < ROUNDS; round++) {
        use_shared(number, stream);
        if (number % 3 == 0) load_and_unload();
        if (number % 3 == 1) build_graph(stream);
    }
    NEED(cuStreamDestroy_v2(stream));
    return NULL;
}

int main(void)
{
    pthread_t thread[THREADS];
    NEED(cuInit(0));
    NEED(cuDevicePrimaryCtxRetain(&context, 0));
    NEED(cuCtxSetCurrent(context));
    NEED(cuLibraryLoadData(&shared, ptx, NULL, NULL, 0, NULL, NULL, 0));
    NEED(cuMemAlloc_v2(&memory, 4096));
    pthread_barrier_init(&barrier, NULL, THREADS);
    for (unsigned i = 0; i < THREADS; i++) pthread_create(&thread[i], NULL, work, (void *)(uintptr_t)i);
    for (unsigned i = 0; i < THREADS; i++) pthread_join(thread[i], NULL);
    NEED(cuLibraryUnload(shared));
    /* Every host function ran, and every object was destroyed, some of them a moment later. */
    const struct timespec moment = {.tv_nsec = 5000000};
    for (unsigned i = 0; i < 2000 && host_calls < 2 * ROUNDS * 2; i++) nanosleep(&moment, NULL);
    if (host_calls != 2 * ROUNDS * 2) {
        fprintf(stderr, "host functions and destroyed objects: %d\n", host_calls);
        return 1;
    }
    puts("done");
    return 0;
}
