/* SPDX-License-Identifier: Apache-2.0 */
/*
 * enqueue_cost.c - what the caller of cuLaunchKernel pays while nobody replays: bench/enqueue_cost.py stops the worker first.
 *
 *     enqueue_cost BATCHES LAUNCHES     as many launches in all as the ring holds, at most
 *
 * Prints "ready", waits for a line, and prints the nanoseconds of a launch in each batch. Then it waits to be killed: what it
 * has put into the ring is not meant to be computed.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
int cuInit(unsigned flags);
int cuDevicePrimaryCtxRetain(CUcontext *context, int device);
int cuCtxSetCurrent(CUcontext context);
int cuCtxSynchronize(void);
int cuModuleLoadData(CUmodule *module, const void *image);
int cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name);
int cuMemAlloc_v2(unsigned long long *pointer, size_t bytes);
int cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void *stream, void **parameters, void **extra);

static const char ptx[] = ".version 7.0\n.target sm_70\n.address_size 64\n"
    ".visible .entry nothing(.param .u64 p) {\n ret;\n}\n";

static void check(int status)
{
    if (status == 0) return;
    fprintf(stderr, "CUDA error %d\n", status);
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

/* By itself, for valgrind to find. */
__attribute__((noinline)) void launch_batch(CUfunction nothing, void **parameters, unsigned launches);
void launch_batch(CUfunction nothing, void **parameters, unsigned launches)
{
    for (unsigned i = 0; i < launches; i++)
        check(cuLaunchKernel(nothing, 1, 1, 1, 1, 1, 1, 0, NULL, parameters, NULL));
}

int main(int argc, char **argv)
{
    unsigned batches = argc > 2 ? (unsigned)atoi(argv[1]) : 20, launches = argc > 2 ? (unsigned)atoi(argv[2]) : 2000;
    CUcontext context;
    CUmodule module;
    CUfunction nothing;
    unsigned long long memory;
    char line[16];
    check(cuInit(0));
    check(cuDevicePrimaryCtxRetain(&context, 0));
    check(cuCtxSetCurrent(context));
    check(cuModuleLoadData(&module, ptx));
    check(cuModuleGetFunction(&nothing, module, "nothing"));
    check(cuMemAlloc_v2(&memory, 16));
    void *parameters[] = {&memory};
    check(cuLaunchKernel(nothing, 1, 1, 1, 1, 1, 1, 0, NULL, parameters, NULL));
    check(cuCtxSynchronize());
    puts("ready");
    fflush(stdout);
    if (fgets(line, sizeof line, stdin) == NULL) return 1;
    for (unsigned batch = 0; batch < batches; batch++) {
        uint64_t began = now_ns();
        launch_batch(nothing, parameters, launches);
        printf("%.2f ", (double)(now_ns() - began) / launches);
    }
    puts("");
    fflush(stdout);
    pause();
    return 0;
}
