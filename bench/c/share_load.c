/* SPDX-License-Identifier: Apache-2.0 */
/*
 * share_load.c - a program that keeps a GPU busy with kernels of one length, or asks it for something now and then.
 *
 * Lines in, lines out:
 *     time COUNT ITERATIONS                    launches COUNT kernels, waits       -> "time NANOSECONDS"
 *     greedy SECONDS ITERATIONS BATCH          as many as it can, four batches queued -> "greedy KERNELS NANOSECONDS"
 *     requests COUNT PERIOD_US KERNELS ITERATIONS   each: launches, waits          -> "requests NANOSECONDS..."
 * Prints "ready" once it has a context. The kernel is a chain of multiplications in one warp: what it takes is work done,
 * not time gone by, so being switched off the device does not shorten it. Opens the libcuda.so.1 that the library path gives.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef void *handle;
static int (*cuInit)(unsigned), (*cuDevicePrimaryCtxRetain)(handle *, int), (*cuCtxSetCurrent)(handle),
    (*cuModuleLoadData)(handle *, const void *), (*cuModuleGetFunction)(handle *, handle, const char *),
    (*cuMemAlloc)(uint64_t *, size_t), (*cuStreamCreate)(handle *, unsigned), (*cuStreamSynchronize)(handle),
    (*cuEventCreate)(handle *, unsigned), (*cuEventRecord)(handle, handle), (*cuEventSynchronize)(handle),
    (*cuLaunchKernel)(handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, handle, void **, void **);

static const char PTX[] = ".version 7.0\n.target sm_70\n.address_size 64\n"
                          ".visible .entry chain(.param .u64 out, .param .u32 count)\n"
                          "{\n"
                          " .reg .pred %p;\n .reg .b32 %n, %i;\n .reg .f32 %x;\n .reg .b64 %a;\n"
                          " ld.param.u64 %a, [out];\n ld.param.u32 %n, [count];\n"
                          " mov.u32 %i, 0;\n mov.f32 %x, 0f3F800000;\n"
                          "LOOP:\n"
                          " fma.rn.f32 %x, %x, 0f3F7FFFFF, 0f33800000;\n"
                          " fma.rn.f32 %x, %x, 0f3F7FFFFF, 0f33800000;\n"
                          " fma.rn.f32 %x, %x, 0f3F7FFFFF, 0f33800000;\n"
                          " fma.rn.f32 %x, %x, 0f3F7FFFFF, 0f33800000;\n"
                          " add.u32 %i, %i, 1;\n setp.lt.u32 %p, %i, %n;\n @%p bra LOOP;\n"
                          " cvta.to.global.u64 %a, %a;\n st.global.f32 [%a], %x;\n ret;\n"
                          "}\n";

#define CHECK(call)                                                                                                    \
    do {                                                                                                               \
        int status_ = (call);                                                                                          \
        if (status_ != 0) {                                                                                            \
            printf("failed %d: %s\n", status_, #call);                                                                 \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static handle stream, kernel;
static uint64_t memory;

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

static void launch(unsigned iterations)
{
    void *parameters[] = {&memory, &iterations};
    CHECK(cuLaunchKernel(kernel, 1, 1, 1, 32, 1, 1, 0, stream, parameters, NULL));
}

static void time_kernels(unsigned count, unsigned iterations)
{
    uint64_t began = now_ns();
    for (unsigned i = 0; i < count; i++)
        launch(iterations);
    CHECK(cuStreamSynchronize(stream));
    printf("time %llu\n", (unsigned long long)(now_ns() - began));
}

#define BATCHES 4
static void greedy(double seconds, unsigned iterations, unsigned batch)
{
    handle event[BATCHES];
    uint64_t began = now_ns(), end = began + (uint64_t)(seconds * 1e9), done = 0, last = began;
    for (unsigned i = 0; i < BATCHES; i++)
        CHECK(cuEventCreate(&event[i], 2));
    for (unsigned turn = 0;; turn++) {
        if (turn >= BATCHES) {
            CHECK(cuEventSynchronize(event[turn % BATCHES]));
            uint64_t now = now_ns();
            if (now > end)
                break;
            done += batch;
            last = now;
        }
        for (unsigned i = 0; i < batch; i++)
            launch(iterations);
        CHECK(cuEventRecord(event[turn % BATCHES], stream));
    }
    CHECK(cuStreamSynchronize(stream));
    printf("greedy %llu %llu\n", (unsigned long long)done, (unsigned long long)(last - began));
}

static void requests(unsigned count, unsigned period_us, unsigned kernels, unsigned iterations)
{
    uint64_t next = now_ns();
    printf("requests");
    for (unsigned i = 0; i < count; i++) {
        struct timespec until = {.tv_sec = (time_t)(next / 1000000000ull), .tv_nsec = (long)(next % 1000000000ull)};
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
        uint64_t began = now_ns();
        for (unsigned k = 0; k < kernels; k++)
            launch(iterations);
        CHECK(cuStreamSynchronize(stream));
        uint64_t now = now_ns();
        printf(" %llu", (unsigned long long)(now - began));
        next += (uint64_t)period_us * 1000;
        if (next < now)
            next = now;
    }
    printf("\n");
}

int main(void)
{
    handle library = dlopen("libcuda.so.1", RTLD_NOW), context, module;
    if (library == NULL) {
        printf("failed: %s\n", dlerror());
        return 1;
    }
#define FIND(name, symbol) *(void **)&name = dlsym(library, symbol)
    FIND(cuInit, "cuInit"), FIND(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
    FIND(cuCtxSetCurrent, "cuCtxSetCurrent"), FIND(cuModuleLoadData, "cuModuleLoadData");
    FIND(cuModuleGetFunction, "cuModuleGetFunction"), FIND(cuMemAlloc, "cuMemAlloc_v2");
    FIND(cuStreamCreate, "cuStreamCreate"), FIND(cuStreamSynchronize, "cuStreamSynchronize");
    FIND(cuEventCreate, "cuEventCreate"), FIND(cuEventRecord, "cuEventRecord");
    FIND(cuEventSynchronize, "cuEventSynchronize"), FIND(cuLaunchKernel, "cuLaunchKernel");
    CHECK(cuInit(0));
    CHECK(cuDevicePrimaryCtxRetain(&context, 0));
    CHECK(cuCtxSetCurrent(context));
    CHECK(cuModuleLoadData(&module, PTX));
    CHECK(cuModuleGetFunction(&kernel, module, "chain"));
    CHECK(cuMemAlloc(&memory, 4096));
    CHECK(cuStreamCreate(&stream, 1));
    time_kernels(4, 8);
    puts("ready");
    fflush(stdout);
    char line[256];
    while (fgets(line, sizeof line, stdin) != NULL) {
        double seconds;
        unsigned a, b, c, d;
        if (sscanf(line, "time %u %u", &a, &b) == 2)
            time_kernels(a, b);
        else if (sscanf(line, "greedy %lf %u %u", &seconds, &a, &b) == 3)
            greedy(seconds, a, b);
        else if (sscanf(line, "requests %u %u %u %u", &a, &b, &c, &d) == 4)
            requests(a, b, c, d);
        else
            printf("failed: not understood: %s", line);
        fflush(stdout);
    }
    return 0;
}
