/* SPDX-License-Identifier: Apache-2.0 */
/*
 * guest_bench.c - what a virtual GPU costs where it is used: inside a VM (or beside the mediator, for comparison). Driver API only.
 *
 *     guest_bench first            from cuInit to a checked result, once
 *     guest_bench copies           memcpy of ordinary memory against memcpy to and from pinned memory (BAR1 in a VM)
 *     guest_bench launches N       N launches, synchronised every thousand: the caller's time in each
 *     guest_bench steady SECONDS   launch, synchronise, check, for so long: the longest gap and every error
 *
 * Prints one JSON object on one line. Exit status 1 if anything answered an error or a result was wrong.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int CUdevice;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;
typedef unsigned long long CUdeviceptr;
int cuInit(unsigned flags);
int cuDeviceGet(CUdevice *device, int ordinal);
int cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device);
int cuCtxSetCurrent(CUcontext context);
int cuCtxSynchronize(void);
int cuModuleLoadData(CUmodule *module, const void *image);
int cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name);
int cuMemAlloc_v2(CUdeviceptr *pointer, size_t bytes);
int cuMemHostAlloc(void **pointer, size_t bytes, unsigned flags);
int cuMemFreeHost(void *pointer);
int cuMemcpyHtoD_v2(CUdeviceptr destination, const void *source, size_t bytes);
int cuMemcpyDtoH_v2(void *destination, CUdeviceptr source, size_t bytes);
int cuMemsetD32_v2(CUdeviceptr pointer, unsigned value, size_t count);
int cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   CUstream stream, void **parameters, void **extra);

static const char ptx[] = ".version 7.0\n.target sm_70\n.address_size 64\n"
    ".visible .entry count(.param .u64 p) {\n .reg .u64 %rd<3>;\n .reg .u32 %r<3>;\n"
    " ld.param.u64 %rd1, [p];\n cvta.to.global.u64 %rd2, %rd1;\n ld.global.u32 %r1, [%rd2];\n add.u32 %r2, %r1, 1;\n"
    " st.global.u32 [%rd2], %r2;\n ret;\n}\n";

#define CHECK(call)                                                                 \
    do {                                                                            \
        int status_ = (call);                                                       \
        if (status_ != 0) {                                                         \
            fprintf(stderr, "%s: CUDA error %d\n", #call, status_);                 \
            exit(1);                                                                \
        }                                                                           \
    } while (0)

static CUfunction count;
static CUdeviceptr counter;

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

static void set_up(void)
{
    CUdevice device;
    CUcontext context;
    CUmodule module;
    CHECK(cuInit(0));
    CHECK(cuDeviceGet(&device, 0));
    CHECK(cuDevicePrimaryCtxRetain(&context, device));
    CHECK(cuCtxSetCurrent(context));
    CHECK(cuModuleLoadData(&module, ptx));
    CHECK(cuModuleGetFunction(&count, module, "count"));
    CHECK(cuMemAlloc_v2(&counter, 4));
    CHECK(cuMemsetD32_v2(counter, 0, 1));
    CHECK(cuCtxSynchronize());
}

static int launch(void)
{
    void *parameters[] = {&counter};
    return cuLaunchKernel(count, 1, 1, 1, 1, 1, 1, 0, NULL, parameters, NULL);
}

static unsigned counted(void)
{
    unsigned value = 0;
    CHECK(cuMemcpyDtoH_v2(&value, counter, sizeof value));
    return value;
}

static int ascending(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static int first(void)
{
    uint64_t began = now_ns();
    set_up();
    CHECK(launch());
    unsigned value = counted();
    printf("{\"first_result_ms\": %.3f, \"right\": %s}\n", (double)(now_ns() - began) / 1e6, value == 1 ? "true" : "false");
    return value != 1;
}

#define COPY_BYTES (8u << 20)
#define COPY_TURNS 31

static uint64_t copy_time(void *to, const void *from)
{
    uint64_t began = now_ns();
    memcpy(to, from, COPY_BYTES);
    __asm__ volatile("" : : "r"(to) : "memory");
    return now_ns() - began;
}

static double gigabytes_a_second(uint64_t took[COPY_TURNS])
{
    qsort(took, COPY_TURNS, sizeof *took, ascending);
    return COPY_BYTES / (double)took[COPY_TURNS / 2];
}

/* In turns, so that what slows the machine for a while slows all three. */
static int copies(void)
{
    set_up();
    unsigned char *a = malloc(COPY_BYTES), *b = malloc(COPY_BYTES), *pinned = NULL;
    if (a == NULL || b == NULL) return 1;
    CHECK(cuMemHostAlloc((void **)&pinned, COPY_BYTES, 0));
    for (size_t i = 0; i < COPY_BYTES; i++) a[i] = (unsigned char)(i * 2654435761u >> 13);
    memset(b, 0, COPY_BYTES);
    memset(pinned, 0, COPY_BYTES);
    uint64_t took[3][COPY_TURNS];
    for (int i = 0; i < COPY_TURNS; i++) {
        took[0][i] = copy_time(b, a);
        took[1][i] = copy_time(pinned, a);
        took[2][i] = copy_time(b, pinned);
    }
    double ordinary = gigabytes_a_second(took[0]), to = gigabytes_a_second(took[1]), from = gigabytes_a_second(took[2]);
    CUdeviceptr device;
    CHECK(cuMemAlloc_v2(&device, COPY_BYTES));
    CHECK(cuMemcpyHtoD_v2(device, pinned, COPY_BYTES));
    memset(b, 0, COPY_BYTES);
    CHECK(cuMemcpyDtoH_v2(b, device, COPY_BYTES));
    int right = memcmp(a, b, COPY_BYTES) == 0;
    printf("{\"ram_to_ram_gb_s\": %.3f, \"ram_to_pinned_gb_s\": %.3f, \"pinned_to_ram_gb_s\": %.3f, \"to_ratio\": %.3f, \"from_ratio\": %.3f, \"right\": %s}\n",
           ordinary, to, from, to / ordinary, from / ordinary, right ? "true" : "false");
    CHECK(cuMemFreeHost(pinned));
    return !right;
}

#define BATCH 1000u

static int launches(unsigned long total)
{
    set_up();
    uint64_t *took = calloc(total, sizeof *took), began = now_ns();
    if (took == NULL) return 1;
    for (unsigned long i = 0; i < total; i++) {
        uint64_t before = now_ns();
        CHECK(launch());
        took[i] = now_ns() - before;
        if (i % BATCH == BATCH - 1) CHECK(cuCtxSynchronize());
    }
    unsigned value = counted();
    double seconds = (double)(now_ns() - began) / 1e9;
    qsort(took, total, sizeof *took, ascending);
    uint64_t clock_began = now_ns();
    for (int i = 0; i < 1000; i++) (void)now_ns();
    double clock_ns = (double)(now_ns() - clock_began) / 1001;
    printf("{\"launches\": %lu, \"p50_ns\": %llu, \"p99_ns\": %llu, \"clock_ns\": %.1f, \"launches_per_second\": %.0f, \"right\": %s}\n", total,
           (unsigned long long)took[total / 2], (unsigned long long)took[total * 99 / 100], clock_ns, (double)total / seconds,
           value == (unsigned)total ? "true" : "false");
    return value != (unsigned)total;
}

static int steady(double seconds)
{
    set_up();
    uint64_t began = now_ns(), last = began, longest = 0;
    unsigned turns = 0, wrong = 0;
    printf("started\n");
    fflush(stdout);
    while ((double)(last - began) < seconds * 1e9) {
        CHECK(launch());
        CHECK(cuCtxSynchronize());
        turns++;
        if (turns % 64 == 0 && counted() != turns) wrong++;
        uint64_t now = now_ns();
        if (now - last > longest) longest = now - last;
        last = now;
    }
    wrong += counted() != turns;
    printf("{\"turns\": %u, \"longest_gap_ms\": %.3f, \"wrong\": %u, \"errors\": 0}\n", turns, (double)longest / 1e6, wrong);
    return wrong != 0;
}

int main(int count_of_words, char **words)
{
    const char *mode = count_of_words > 1 ? words[1] : "";
    if (strcmp(mode, "first") == 0) return first();
    if (strcmp(mode, "copies") == 0) return copies();
    if (strcmp(mode, "launches") == 0 && count_of_words > 2) return launches(strtoul(words[2], NULL, 10));
    if (strcmp(mode, "steady") == 0 && count_of_words > 2) return steady(atof(words[2]));
    fprintf(stderr, "usage: guest_bench first | copies | launches N | steady SECONDS\n");
    return 2;
}
