/* SPDX-License-Identifier: Apache-2.0 */
/*
 * driver_bench.c - what single driver-API calls cost, as the program that makes them sees it.
 *
 * The same binary is run natively and remoted (bench/run.py), so it knows nothing of either: it opens
 * whatever libcuda.so.1 the library path gives it, through prototypes of its own, and prints one JSON
 * object. Times of single calls are read with the time-stamp counter, with the counter's own cost taken
 * off; everything longer with CLOCK_MONOTONIC. The only thing it ever looks at that is ours is the
 * session page, if there is one among its mappings: the ring's tail shows whether a call wrote a record.
 *
 *     driver_bench GROUP[,GROUP...] [--largest-mib N] [--scale F] [--start-ns N]
 *     groups: launch sustained sync dtoh event async pinned pageable local roundtrip first
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <x86intrin.h>

#include "../../transport/wire.h"

typedef int CUresult, CUdevice;
typedef void *CUcontext, *CUmodule, *CUfunction, *CUstream, *CUevent;
typedef uint64_t CUdeviceptr;

/* Every driver function used, with the name that a program linked today would import. */
#define FUNCTIONS(X)                                                                                         \
    X(cuInit, "cuInit", (unsigned))                                                                          \
    X(cuDeviceGet, "cuDeviceGet", (CUdevice *, int))                                                         \
    X(cuDeviceGetName, "cuDeviceGetName", (char *, int, CUdevice))                                           \
    X(cuDeviceGetAttribute, "cuDeviceGetAttribute", (int *, int, CUdevice))                                  \
    X(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (CUcontext *, CUdevice))                         \
    X(cuDevicePrimaryCtxGetState, "cuDevicePrimaryCtxGetState", (CUdevice, unsigned *, int *))               \
    X(cuCtxSetCurrent, "cuCtxSetCurrent", (CUcontext))                                                       \
    X(cuCtxGetCurrent, "cuCtxGetCurrent", (CUcontext *))                                                     \
    X(cuCtxGetDevice, "cuCtxGetDevice", (CUdevice *))                                                        \
    X(cuCtxSynchronize, "cuCtxSynchronize", (void))                                                          \
    X(cuModuleLoadData, "cuModuleLoadData", (CUmodule *, const void *))                                      \
    X(cuModuleGetFunction, "cuModuleGetFunction", (CUfunction *, CUmodule, const char *))                    \
    X(cuFuncGetAttribute, "cuFuncGetAttribute", (int *, int, CUfunction))                                    \
    X(cuLaunchKernel, "cuLaunchKernel",                                                                      \
      (CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void **,  \
       void **))                                                                                             \
    X(cuStreamCreate, "cuStreamCreate", (CUstream *, unsigned))                                              \
    X(cuStreamSynchronize, "cuStreamSynchronize", (CUstream))                                                \
    X(cuStreamQuery, "cuStreamQuery", (CUstream))                                                            \
    X(cuEventCreate, "cuEventCreate", (CUevent *, unsigned))                                                 \
    X(cuEventRecord, "cuEventRecord", (CUevent, CUstream))                                                   \
    X(cuEventSynchronize, "cuEventSynchronize", (CUevent))                                                   \
    X(cuMemAlloc, "cuMemAlloc_v2", (CUdeviceptr *, size_t))                                                  \
    X(cuMemFree, "cuMemFree_v2", (CUdeviceptr))                                                              \
    X(cuMemHostAlloc, "cuMemHostAlloc", (void **, size_t, unsigned))                                         \
    X(cuMemFreeHost, "cuMemFreeHost", (void *))                                                              \
    X(cuMemcpyHtoD, "cuMemcpyHtoD_v2", (CUdeviceptr, const void *, size_t))                                  \
    X(cuMemcpyDtoH, "cuMemcpyDtoH_v2", (void *, CUdeviceptr, size_t))                                        \
    X(cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2", (CUdeviceptr, const void *, size_t, CUstream))              \
    X(cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2", (void *, CUdeviceptr, size_t, CUstream))                    \
    X(cuMemsetD8Async, "cuMemsetD8Async", (CUdeviceptr, unsigned char, size_t, CUstream))

#define DECLARE(name, symbol, arguments) static CUresult (*name) arguments;
FUNCTIONS(DECLARE)

#define CHECK(call)                                                                                          \
    do {                                                                                                     \
        CUresult status_ = (call);                                                                           \
        if (status_ != 0) {                                                                                  \
            fprintf(stderr, "driver_bench: %s answered %d at line %d\n", #call, status_, __LINE__);          \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

static const char kernels[] =
    ".version 7.0\n.target sm_75\n.address_size 64\n"
    ".visible .entry empty(.param .u64 a, .param .u64 b)\n{\n  ret;\n}\n"
    ".visible .entry add(.param .u64 x, .param .u64 y, .param .u64 z, .param .u32 count)\n{\n"
    "  .reg .pred %p<2>;\n  .reg .b32 %r<8>;\n  .reg .f32 %f<4>;\n  .reg .b64 %d<12>;\n"
    "  ld.param.u64 %d1, [x];\n  ld.param.u64 %d2, [y];\n  ld.param.u64 %d3, [z];\n  ld.param.u32 %r1, [count];\n"
    "  mov.u32 %r2, %ctaid.x;\n  mov.u32 %r3, %ntid.x;\n  mov.u32 %r4, %tid.x;\n"
    "  mad.lo.s32 %r5, %r2, %r3, %r4;\n  setp.ge.u32 %p1, %r5, %r1;\n  @%p1 bra done;\n"
    "  mul.wide.u32 %d4, %r5, 4;\n  add.s64 %d5, %d1, %d4;\n  add.s64 %d6, %d2, %d4;\n  add.s64 %d7, %d3, %d4;\n"
    "  ld.global.f32 %f1, [%d5];\n  ld.global.f32 %f2, [%d6];\n  add.f32 %f3, %f1, %f2;\n"
    "  st.global.f32 [%d7], %f3;\ndone:\n  ret;\n}\n";

/* ---- time ------------------------------------------------------------------------------------ */

static double ticks_per_ns;
static uint64_t tick_cost; /* of reading the counter twice */

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline uint64_t ticks(void)
{
    unsigned core;
    uint64_t value = __rdtscp(&core);
    _mm_lfence();
    return value;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Sorts `sample`. Fraction 0.5 is the median. */
static double quantile(double *sample, size_t count, double fraction)
{
    qsort(sample, count, sizeof *sample, by_value);
    return sample[(size_t)(fraction * (double)(count - 1) + 0.5)];
}

static void calibrate(void)
{
    static double cost[4096];
    uint64_t t0 = now_ns(), c0 = ticks();
    while (now_ns() - t0 < 20000000u) {
    }
    uint64_t t1 = now_ns(), c1 = ticks();
    ticks_per_ns = (double)(c1 - c0) / (double)(t1 - t0);
    for (size_t i = 0; i < 4096; i++) {
        uint64_t a = ticks(), b = ticks();
        cost[i] = (double)(b - a);
    }
    tick_cost = (uint64_t)quantile(cost, 4096, 0.5);
}

static double elapsed_ns(uint64_t from, uint64_t to)
{
    uint64_t span = to - from;
    return span > tick_cost ? (double)(span - tick_cost) / ticks_per_ns : 0.0;
}

/* ---- output ------------------------------------------------------------------------------------ */

static bool any_printed;
static void put(const char *name, double value)
{
    printf("%s\"%s\": %.6g", any_printed ? ", " : "{", name, value);
    any_printed = true;
}

/* Prints name_p50 and name_p99. */
static void put_quantiles(const char *name, double *sample, size_t count)
{
    char full[96];
    snprintf(full, sizeof full, "%s_p50", name);
    put(full, quantile(sample, count, 0.5));
    snprintf(full, sizeof full, "%s_p99", name);
    put(full, quantile(sample, count, 0.99));
}

/* ---- the session page, where there is one -------------------------------------------------------- */

static volatile struct vgpu_session_page *session;

/* Look through this process's shared mappings for a page that begins as a session page does. */
static void find_session(void)
{
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[512];
    while (maps != NULL && session == NULL && fgets(line, sizeof line, maps) != NULL) {
        uint64_t from, to;
        char mode[8], path[256] = "";
        if (sscanf(line, "%lx-%lx %7s %*s %*s %*s %255[^\n]", &from, &to, mode, path) < 3)
            continue;
        if (mode[0] != 'r' || mode[3] != 's' || strstr(path, "/memfd:") == NULL)
            continue;
        for (uint64_t at = from; at + VGPU_SESSION_PAGE_SIZE <= to && at < from + (1u << 16); at += 4096) {
            volatile struct vgpu_session_page *page = (volatile struct vgpu_session_page *)at;
            uint64_t size = page->ring_size;
            if (page->magic == VGPU_SEGMENT_MAGIC && page->layout_version == VGPU_LAYOUT_VERSION && size != 0 &&
                (size & (size - 1)) == 0 && page->ring_offset != 0 && page->ring_offset < page->segment_size &&
                page->slot_count != 0 && page->segment_size > size) {
                session = page;
                break;
            }
        }
    }
    if (maps != NULL)
        fclose(maps);
}

static uint64_t ring_bytes(void)
{
    return session != NULL ? session->tail : 0;
}

/* ---- groups ------------------------------------------------------------------------------------- */

static CUdevice device;
static CUcontext context;
static CUfunction empty, add;
static CUstream stream;
static CUdeviceptr small;
static double scale = 1.0;
static size_t largest = 1024;

static size_t scaled(size_t count)
{
    size_t n = (size_t)((double)count * scale);
    return n < 20 ? 20 : n;
}

static void launch_empty(void)
{
    uint64_t a = 1, b = 2;
    void *parameters[] = {&a, &b};
    CHECK(cuLaunchKernel(empty, 1, 1, 1, 32, 1, 1, 0, stream, parameters, NULL));
}

static void vector_add(unsigned count)
{
    size_t bytes = count * sizeof(float);
    float *x = malloc(bytes), *y = malloc(bytes), *z = calloc(1, bytes);
    CUdeviceptr dx, dy, dz;
    CHECK(cuMemAlloc(&dx, bytes));
    CHECK(cuMemAlloc(&dy, bytes));
    CHECK(cuMemAlloc(&dz, bytes));
    for (unsigned i = 0; i < count; i++) {
        x[i] = (float)i;
        y[i] = 0.5f * (float)i;
    }
    CHECK(cuMemcpyHtoD(dx, x, bytes));
    CHECK(cuMemcpyHtoD(dy, y, bytes));
    void *parameters[] = {&dx, &dy, &dz, &count};
    CHECK(cuLaunchKernel(add, (count + 127) / 128, 1, 1, 128, 1, 1, 0, NULL, parameters, NULL));
    CHECK(cuMemcpyDtoH(z, dz, bytes));
    for (unsigned i = 0; i < count; i++)
        if (z[i] != x[i] + y[i]) {
            fprintf(stderr, "driver_bench: element %u is %g, expected %g\n", i, z[i], x[i] + y[i]);
            exit(1);
        }
    CHECK(cuMemFree(dx));
    CHECK(cuMemFree(dy));
    CHECK(cuMemFree(dz));
    free(x);
    free(y);
    free(z);
}

/* Bursts short enough for any queue, so that the caller's own cost shows and not the wait for a full one. */
static void group_launch(void)
{
    enum { BURST = 500 };
    size_t bursts = scaled(60), n = 0;
    double *sample = malloc(bursts * BURST * sizeof *sample);
    for (size_t b = 0; b < bursts; b++) {
        for (int i = 0; i < BURST; i++) {
            uint64_t c0 = ticks();
            launch_empty();
            sample[n++] = elapsed_ns(c0, ticks());
        }
        CHECK(cuStreamSynchronize(stream));
    }
    put_quantiles("launch_ns", sample, n);
    free(sample);
}

static void group_sustained(void)
{
    size_t count = scaled(200000);
    uint64_t t0 = now_ns(), before = ring_bytes();
    for (size_t i = 0; i < count; i++)
        launch_empty();
    CHECK(cuStreamSynchronize(stream));
    put("sustained_launches_per_s", 1e9 * (double)count / (double)(now_ns() - t0));
    if (session != NULL)
        put("launch_record_bytes", (double)(ring_bytes() - before) / (double)count);
}

static void group_sync(void)
{
    size_t count = scaled(4000);
    double *sample = malloc(count * sizeof *sample);
    for (size_t i = 0; i < count; i++) {
        uint64_t c0 = ticks();
        launch_empty();
        CHECK(cuStreamSynchronize(stream));
        sample[i] = elapsed_ns(c0, ticks()) / 1e3;
    }
    put_quantiles("launch_sync_us", sample, count);
    for (size_t i = 0; i < count; i++) {
        uint64_t c0 = ticks();
        launch_empty();
        CHECK(cuCtxSynchronize());
        sample[i] = elapsed_ns(c0, ticks()) / 1e3;
    }
    put_quantiles("launch_ctx_sync_us", sample, count);
    free(sample);
}

static void group_dtoh(void)
{
    size_t count = scaled(4000);
    double *sample = malloc(count * sizeof *sample);
    uint32_t word, written = 0x5eed;
    for (size_t i = 0; i < count; i++) {
        uint32_t value = written + (uint32_t)i;
        CHECK(cuMemcpyHtoD(small, &value, 4));
        CHECK(cuCtxSynchronize()); /* or the wait below would pay for the copy above */
        word = 0;
        uint64_t c0 = ticks();
        CHECK(cuMemcpyDtoH(&word, small, 4));
        sample[i] = elapsed_ns(c0, ticks()) / 1e3;
        if (word != value) {
            fprintf(stderr, "driver_bench: read %x back, wrote %x\n", word, value);
            exit(1);
        }
    }
    put_quantiles("dtoh_4b_us", sample, count);
    for (size_t i = 0; i < count; i++) {
        uint64_t c0 = ticks();
        CHECK(cuMemcpyHtoD(small, &word, 4));
        sample[i] = elapsed_ns(c0, ticks()) / 1e3;
    }
    put_quantiles("htod_4b_us", sample, count);
    free(sample);
}

static void group_event(void)
{
    size_t count = scaled(4000);
    double *sample = malloc(count * sizeof *sample);
    CUevent event;
    CHECK(cuEventCreate(&event, 2)); /* CU_EVENT_DISABLE_TIMING */
    for (size_t i = 0; i < count; i++) {
        uint64_t c0 = ticks();
        CHECK(cuEventRecord(event, stream));
        CHECK(cuEventSynchronize(event));
        sample[i] = elapsed_ns(c0, ticks()) / 1e3;
    }
    put_quantiles("event_sync_us", sample, count);
    free(sample);
}

/* What a caller spends in other calls that nobody waits for. */
static void group_async(void)
{
    enum { BURST = 200 };
    size_t bursts = scaled(30), n;
    double *sample = malloc(bursts * BURST * sizeof *sample);
    char bytes[64] = {1};
    void *pinned;
    CUevent event;
    CHECK(cuMemHostAlloc(&pinned, 65536, 0));
    CHECK(cuEventCreate(&event, 2));
#define TIMED(name, call)                                                                                    \
    n = 0;                                                                                                   \
    for (size_t b = 0; b < bursts; b++) {                                                                    \
        for (int i = 0; i < BURST; i++) {                                                                    \
            uint64_t c0 = ticks();                                                                           \
            CHECK(call);                                                                                     \
            sample[n++] = elapsed_ns(c0, ticks());                                                           \
        }                                                                                                    \
        CHECK(cuStreamSynchronize(stream));                                                                  \
    }                                                                                                        \
    put_quantiles(name, sample, n)
    TIMED("memset_async_ns", cuMemsetD8Async(small, 7, 4096, stream));
    TIMED("htod_async_64b_ns", cuMemcpyHtoDAsync(small, bytes, sizeof bytes, stream));
    TIMED("htod_async_pinned_4k_ns", cuMemcpyHtoDAsync(small, pinned, 4096, stream));
    TIMED("dtoh_async_pinned_4k_ns", cuMemcpyDtoHAsync(pinned, small, 4096, stream));
    TIMED("event_record_ns", cuEventRecord(event, stream));
#undef TIMED
    CHECK(cuMemFreeHost(pinned));
    free(sample);
}

static void fill(uint64_t *words, size_t bytes, uint64_t seed)
{
    for (size_t i = 0; i < bytes / 8; i++)
        words[i] = seed + i * 0x9e3779b97f4a7c15ull;
}

/* GB/s (1e9 bytes) of whole copies both ways, each waited for; the data is read back and compared. */
static void copies(const char *kind, bool pinned, const size_t *mib, size_t sizes)
{
    for (size_t s = 0; s < sizes; s++) {
        if (mib[s] > largest)
            continue;
        size_t bytes = mib[s] << 20, repeat = mib[s] >= 1024 ? 4 : mib[s] >= 256 ? 8 : 24;
        double down[32], up[32];
        char name[96];
        void *out, *back;
        CUdeviceptr there;
        CHECK(cuMemAlloc(&there, bytes));
        if (pinned) {
            CHECK(cuMemHostAlloc(&out, bytes, 0));
            CHECK(cuMemHostAlloc(&back, bytes, 0));
        } else {
            out = malloc(bytes);
            back = malloc(bytes);
        }
        fill(out, bytes, mib[s]);
        memset(back, 0, bytes);
        for (size_t i = 0; i < repeat + 1; i++) { /* the first pair warms up */
            uint64_t t0 = now_ns();
            if (pinned) {
                CHECK(cuMemcpyHtoDAsync(there, out, bytes, stream));
                CHECK(cuStreamSynchronize(stream));
            } else {
                CHECK(cuMemcpyHtoD(there, out, bytes));
                CHECK(cuCtxSynchronize());
            }
            uint64_t t1 = now_ns();
            if (pinned) {
                CHECK(cuMemcpyDtoHAsync(back, there, bytes, stream));
                CHECK(cuStreamSynchronize(stream));
            } else {
                CHECK(cuMemcpyDtoH(back, there, bytes));
            }
            uint64_t t2 = now_ns();
            if (i > 0) {
                down[i - 1] = (double)bytes / (double)(t1 - t0);
                up[i - 1] = (double)bytes / (double)(t2 - t1);
            }
        }
        if (memcmp(out, back, bytes) != 0) {
            fprintf(stderr, "driver_bench: a %s copy of %zu MiB came back different\n", kind, mib[s]);
            exit(1);
        }
        snprintf(name, sizeof name, "%s_htod_%zumib_gbs", kind, mib[s]);
        put(name, quantile(down, repeat, 0.5));
        snprintf(name, sizeof name, "%s_dtoh_%zumib_gbs", kind, mib[s]);
        put(name, quantile(up, repeat, 0.5));
        if (pinned) {
            CHECK(cuMemFreeHost(out));
            CHECK(cuMemFreeHost(back));
        } else {
            free(out);
            free(back);
        }
        CHECK(cuMemFree(there));
    }
}

static void group_pinned(void)
{
    static const size_t mib[] = {4, 16, 64, 256, 1024};
    copies("pinned", true, mib, sizeof mib / sizeof *mib);
}

static void group_pageable(void)
{
    static const size_t mib[] = {4, 64, 256, 1024};
    copies("pageable", false, mib, sizeof mib / sizeof *mib);
}

static void group_local(void)
{
    size_t count = scaled(500000);
    uint64_t before = ring_bytes(), t0;
    CUcontext current;
    CUdevice which;
    unsigned flags;
    int active, value;
#define TIMED(name, call)                                                                                    \
    t0 = now_ns();                                                                                           \
    for (size_t i = 0; i < count; i++)                                                                       \
        CHECK(call);                                                                                         \
    put(name, (double)(now_ns() - t0) / (double)count)
    TIMED("local_ctx_get_current_ns", cuCtxGetCurrent(&current));
    TIMED("local_ctx_get_device_ns", cuCtxGetDevice(&which));
    TIMED("local_device_get_attribute_ns", cuDeviceGetAttribute(&value, 16, device));
    TIMED("local_primary_ctx_get_state_ns", cuDevicePrimaryCtxGetState(device, &flags, &active));
    uint64_t written = ring_bytes() - before;
    CHECK(cuFuncGetAttribute(&value, 0, empty)); /* the first may have to ask */
    before = ring_bytes();
    TIMED("local_func_get_attribute_ns", cuFuncGetAttribute(&value, 0, empty));
#undef TIMED
    written += ring_bytes() - before;
    if (session != NULL)
        put("local_ring_bytes", (double)written);
}

/* The cheapest calls that need an answer from whoever drives the GPU. */
static void group_roundtrip(void)
{
    size_t count = scaled(4000);
    double *sample = malloc(count * sizeof *sample);
    for (size_t i = 0; i < count; i++) {
        uint64_t c0 = ticks();
        CHECK(cuStreamQuery(stream));
        sample[i] = elapsed_ns(c0, ticks()) / 1e3;
    }
    put_quantiles("stream_query_us", sample, count);
    for (size_t i = 0; i < count; i++) {
        CUdeviceptr block;
        uint64_t c0 = ticks();
        CHECK(cuMemAlloc(&block, 4096));
        CHECK(cuMemFree(block));
        sample[i] = elapsed_ns(c0, ticks()) / 1e3;
    }
    put_quantiles("alloc_free_us", sample, count);
    free(sample);
}

int main(int argc, char **argv)
{
    uint64_t entered = now_ns(), started = 0;
    if (argc < 2) {
        fprintf(stderr, "usage: driver_bench GROUP[,GROUP...] [--largest-mib N] [--scale F] [--start-ns N]\n");
        return 2;
    }
    for (int i = 2; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--largest-mib") == 0)
            largest = strtoul(argv[i + 1], NULL, 10);
        else if (strcmp(argv[i], "--scale") == 0)
            scale = strtod(argv[i + 1], NULL);
        else if (strcmp(argv[i], "--start-ns") == 0)
            started = strtoull(argv[i + 1], NULL, 10);
        else {
            fprintf(stderr, "driver_bench: unknown option %s\n", argv[i]);
            return 2;
        }
    }
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (library == NULL) {
        fprintf(stderr, "driver_bench: %s\n", dlerror());
        return 1;
    }
#define RESOLVE(name, symbol, arguments)                                                                     \
    *(void **)&name = dlsym(library, symbol);                                                                \
    if (name == NULL) {                                                                                      \
        fprintf(stderr, "driver_bench: no %s\n", symbol);                                                    \
        return 1;                                                                                            \
    }
    FUNCTIONS(RESOLVE)

    CUmodule module;
    uint64_t t0 = now_ns();
    CHECK(cuInit(0));
    CHECK(cuDeviceGet(&device, 0));
    CHECK(cuDevicePrimaryCtxRetain(&context, device));
    CHECK(cuCtxSetCurrent(context));
    CHECK(cuModuleLoadData(&module, kernels));
    CHECK(cuModuleGetFunction(&empty, module, "empty"));
    CHECK(cuModuleGetFunction(&add, module, "add"));
    vector_add(10007);
    uint64_t t1 = now_ns();
    if (strstr(argv[1], "first") != NULL) {
        put("main_to_first_result_ms", (double)(t1 - entered) / 1e6);
        put("init_to_first_result_ms", (double)(t1 - t0) / 1e6);
        if (started != 0)
            put("start_to_first_result_ms", (double)(t1 - started) / 1e6);
    }
    CHECK(cuStreamCreate(&stream, 1)); /* CU_STREAM_NON_BLOCKING */
    CHECK(cuMemAlloc(&small, 65536));
    for (int i = 0; i < 200; i++)
        launch_empty();
    CHECK(cuStreamSynchronize(stream));
    find_session();
    calibrate();
    static const struct {
        const char *name;
        void (*run)(void);
    } groups[] = {{"launch", group_launch},     {"sustained", group_sustained}, {"sync", group_sync},
                  {"dtoh", group_dtoh},         {"event", group_event},         {"async", group_async},
                  {"pinned", group_pinned},     {"pageable", group_pageable},   {"local", group_local},
                  {"roundtrip", group_roundtrip}};
    char *wanted = strdup(argv[1]), *rest = wanted, *name;
    while ((name = strsep(&rest, ",")) != NULL) {
        bool known = strcmp(name, "first") == 0;
        for (size_t i = 0; i < sizeof groups / sizeof *groups; i++)
            if (strcmp(name, groups[i].name) == 0) {
                groups[i].run();
                known = true;
            }
        if (!known) {
            fprintf(stderr, "driver_bench: unknown group %s\n", name);
            return 2;
        }
    }
    free(wanted);
    printf("%s}\n", any_printed ? "" : "{");
    return 0;
}
