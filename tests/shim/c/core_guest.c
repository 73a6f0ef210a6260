/* SPDX-License-Identifier: Apache-2.0 */
/*
 * core_guest.c - a guest program over the shim's core, linked with its sources so that it can reach what the library does not
 * export. tests/shim/test_core.py runs it against tests/shim/fake_host.py: `core_guest COMMAND [ARGUMENTS]`, one fact a line.
 */
#include "core.h"
#include "_generated_prototypes.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define RECORD VGPU_CALL_cuMemPoolTrimTo /* any call id the host echoes */

static void check(const char *what, long got, long expected)
{
    if (got == expected) return;
    printf("FAILED %s: %ld, expected %ld\n", what, got, expected);
    exit(1);
}
#define CHECK(expression, expected) check(#expression, (long)(expression), (long)(expected))

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static CUcontext retained(void)
{
    CUcontext context = NULL;
    CHECK(cuInit(0), 0);
    CHECK(cuDevicePrimaryCtxRetain(&context, 0), 0);
    CHECK(cuCtxSetCurrent(context), 0);
    return context;
}

/* ---- attach ---- */

static void command_init(char **argument)
{
    (void)argument;
    int version = 0, count = -1;
    double began = seconds();
    CUresult status = cuInit(0);
    printf("init %d\n", (int)status);
    printf("seconds %.3f\n", seconds() - began);
    printf("again %d\n", (int)cuInit(0));
    CUresult counted = cuDeviceGetCount(&count);
    printf("count %d %d\n", (int)counted, count);
    CHECK(cuDriverGetVersion(&version), 0);
    printf("version %d\n", version);
    if (status == CUDA_SUCCESS) printf("identical %d\n", shim.identical);
}

/* ---- ring ---- */

/* N records with payloads of growing length, then one synchronisation. */
static void command_stream(char **argument)
{
    long count = atol(argument[0]);
    uint32_t longest = (uint32_t)atol(argument[1]);
    uint8_t *payload = malloc(longest + 1);
    retained();
    for (uint32_t i = 0; i < longest; i++) payload[i] = (uint8_t)i;
    for (long i = 0; i < count; i++) {
        const uint64_t words[8] = {(uint64_t)i, ~(uint64_t)i, 3, 4, 5, 6, 7, 8};
        uint32_t length = longest != 0 ? (uint32_t)(i * 3307) % (longest + 1) : 0, part = length / 3;
        CHECK(shim_async2(RECORD, words, payload, part, payload + part, length - part), 0);
    }
    CHECK(cuCtxSynchronize(), 0);
    CHECK(shim_async(RECORD, NULL, payload, VGPU_INLINE_LIMIT + 1), CUDA_ERROR_INVALID_VALUE);
    printf("done %llu\n", (unsigned long long)shim.page->async_calls);
    free(payload);
}

struct worker { pthread_t thread; long number, count; };

static void *threads_body(void *argument)
{
    struct worker *me = argument;
    for (long i = 0; i < me->count; i++) {
        const uint64_t words[8] = {(uint64_t)me->number, (uint64_t)i};
        CHECK(shim_async(RECORD, words, words, sizeof words), 0);
        if (i % 8 != 0) continue;
        uint64_t value[4], reply[8];
        uint32_t length = 0;
        CHECK(shim_reply(RECORD, words, words, sizeof words, value, reply, sizeof reply, &length), 0);
        CHECK(value[0] == words[0] && value[1] == words[1], 1);
        CHECK(length, sizeof words);
        CHECK(memcmp(reply, words, sizeof words), 0);
        struct shim_fence fence;
        CHECK(shim_fence_new(&fence), 0);
        const uint64_t fence_words[8] = {0, fence.index, fence.value};
        CHECK(shim_async(VGPU_CALL_wireFence, fence_words, NULL, 0), 0);
        CHECK(shim_fence_wait(&fence), 0);
        CHECK(shim_fence_done(&fence), 1);
        shim_fence_free(&fence);
        struct shim_object *object;
        uint64_t handle = shim_handle_new(VGPU_KIND_EVENT, me, &object);
        CHECK(shim_object(VGPU_KIND_EVENT, handle) == object && object->data == me, 1);
        shim_handle_free(handle);
        CHECK(shim_handle_valid(VGPU_KIND_EVENT, handle), 0);
    }
    return NULL;
}

static void command_threads(char **argument)
{
    long threads = atol(argument[0]), count = atol(argument[1]);
    struct worker *worker = calloc((size_t)threads, sizeof *worker);
    CHECK(cuInit(0), 0);
    for (long i = 0; i < threads; i++) {
        worker[i].number = i;
        worker[i].count = count;
        CHECK(pthread_create(&worker[i].thread, NULL, threads_body, &worker[i]), 0);
    }
    for (long i = 0; i < threads; i++) pthread_join(worker[i].thread, NULL);
    printf("done %llu %llu\n", (unsigned long long)shim.page->async_calls, (unsigned long long)shim.page->reply_calls);
    free(worker);
}

/* Threads in contexts of their own: each record must be replayed in its thread's context. */
static void *context_body(void *argument)
{
    struct worker *me = argument;
    CUcontext context;
    CHECK(cuCtxCreate_v2(&context, 0, 0), 0);
    for (long i = 0; i < me->count; i++) {
        const uint64_t words[8] = {(uint64_t)(uintptr_t)context, (uint64_t)i};
        CHECK(shim_async(RECORD, words, NULL, 0), 0);
    }
    CHECK(cuCtxSynchronize(), 0);
    CHECK(cuCtxDestroy_v2(context), 0);
    return NULL;
}

static void command_contexts_in_threads(char **argument)
{
    struct worker worker[4];
    CHECK(cuInit(0), 0);
    for (long i = 0; i < 4; i++) {
        worker[i].count = atol(argument[0]);
        CHECK(pthread_create(&worker[i].thread, NULL, context_body, &worker[i]), 0);
    }
    for (long i = 0; i < 4; i++) pthread_join(worker[i].thread, NULL);
    puts("done");
}

static void *reply_body(void *argument)
{
    struct worker *me = argument;
    const uint64_t words[8] = {(uint64_t)me->number};
    uint64_t value[4] = {0};
    me->count = (long)shim_reply(RECORD, words, NULL, 0, value, NULL, 0, NULL);
    if (me->count == 0) CHECK(value[0], me->number);
    return NULL;
}

/* More threads than slots, all waiting at once. Prints when they can all be waiting, and what they got. */
static void command_slots(char **argument)
{
    long threads = atol(argument[0]), failed = 0;
    struct worker *worker = calloc((size_t)threads, sizeof *worker);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 256 << 10);
    CHECK(cuInit(0), 0);
    for (long i = 0; i < threads; i++) {
        worker[i].number = i;
        CHECK(pthread_create(&worker[i].thread, &attributes, reply_body, &worker[i]), 0);
    }
    puts("waiting");
    fflush(stdout);
    for (long i = 0; i < threads; i++) {
        pthread_join(worker[i].thread, NULL);
        failed += worker[i].count != 0;
    }
    printf("failed %ld\n", failed);
    free(worker);
}

/* One thread destroys an array, another makes one; the host says when each is told that it is done. */
struct array_work { pthread_t thread; CUcontext context; CUarray array; CUresult status; };

static void *destroy_body(void *argument)
{
    struct array_work *me = argument;
    CHECK(cuCtxSetCurrent(me->context), 0);
    me->status = cuArrayDestroy(me->array);
    return NULL;
}

static void *create_body(void *argument)
{
    struct array_work *me = argument;
    const CUDA_ARRAY_DESCRIPTOR made = {.Width = 77, .Height = 3, .Format = 1, .NumChannels = 1};
    CHECK(cuCtxSetCurrent(me->context), 0);
    CHECK(cuArrayCreate_v2(&me->array, &made), 0);
    return NULL;
}

static void command_arrays(char **argument)
{
    (void)argument;
    struct array_work first = {.context = retained()}, second = {.context = first.context};
    CUDA_ARRAY_DESCRIPTOR said = {0};
    create_body(&first);
    puts("made");
    fflush(stdout);
    getchar(); /* the host holds back what it answers */
    CHECK(pthread_create(&first.thread, NULL, destroy_body, &first), 0);
    getchar();
    CHECK(pthread_create(&second.thread, NULL, create_body, &second), 0);
    pthread_join(second.thread, NULL);
    puts("again");
    fflush(stdout);
    pthread_join(first.thread, NULL);
    printf("destroyed %d\n", (int)first.status);
    printf("first %d\n", (int)cuArrayGetDescriptor_v2(&said, first.array));
    const CUresult status = cuArrayGetDescriptor_v2(&said, second.array);
    printf("second %d %zu\n", (int)status, (size_t)said.Width);
}

/* ---- death ---- */

static void *fence_body(void *argument)
{
    struct worker *me = argument;
    struct shim_fence fence;
    CHECK(shim_fence_new(&fence), 0);
    me->count = (long)shim_fence_wait(&fence); /* nobody will ever store it */
    shim_fence_free(&fence);
    return NULL;
}

/* Three waiting threads: a reply, a fence, room in the ring. Then the host ends, in a way the test chooses. */
static void *space_body(void *argument)
{
    struct worker *me = argument;
    static uint8_t payload[VGPU_INLINE_LIMIT];
    CUresult status = CUDA_SUCCESS;
    while (status == CUDA_SUCCESS) status = shim_async(RECORD, NULL, payload, sizeof payload);
    me->count = (long)status;
    return NULL;
}

static void command_death(char **argument)
{
    (void)argument;
    struct worker worker[3] = {0};
    retained();
    puts("waiting");
    fflush(stdout);
    getchar(); /* the host pauses */
    void *(*body[3])(void *) = {reply_body, fence_body, space_body};
    for (int i = 0; i < 3; i++) CHECK(pthread_create(&worker[i].thread, NULL, body[i], &worker[i]), 0);
    puts("started");
    fflush(stdout);
    for (int i = 0; i < 3; i++) pthread_join(worker[i].thread, NULL);
    printf("reply %ld\nfence %ld\nspace %ld\n", worker[0].count, worker[1].count, worker[2].count);
    printf("later %d\n", (int)cuCtxSynchronize());
    int device = -1;
    printf("local %d\n", (int)cuCtxGetDevice(&device));
}

/* A sticky error while the worker lives: fences end, replies still come. */
static void command_sticky(char **argument)
{
    (void)argument;
    struct worker worker = {0};
    retained();
    puts("waiting");
    fflush(stdout);
    fence_body(&worker);
    printf("fence %ld\n", worker.count);
    printf("synchronize %d\n", (int)cuCtxSynchronize());
}

/* ---- fences ---- */

static void command_fences(char **argument)
{
    (void)argument;
    CHECK(cuInit(0), 0);
    struct shim_fence fence[5000];
    unsigned got = 0;
    while (shim_fence_new(&fence[got]) == CUDA_SUCCESS) got++;
    printf("words %u\n", got);
    for (unsigned i = 0; i < got; i++) {
        CHECK(fence[i].index > 0 && fence[i].index < shim.page->fence_count, 1);
        CHECK(shim_fence_done(&fence[i]), 0);
        __atomic_store_n(&shim.fences[fence[i].index], fence[i].value, __ATOMIC_RELEASE);
        CHECK(shim_fence_done(&fence[i]), 1);
    }
    uint64_t before = fence[7].value;
    uint32_t index = fence[7].index;
    for (unsigned i = 0; i < got; i++) shim_fence_free(&fence[i]);
    unsigned again = 0, seen = 0;
    while (again < got && shim_fence_new(&fence[again]) == CUDA_SUCCESS) {
        if (fence[again].index == index) {
            seen++;
            CHECK(fence[again].value > before, 1); /* a word only grows */
        }
        again++;
    }
    printf("again %u %u\n", again, seen);
}

/* ---- handles ---- */

static unsigned visited;
static void visit(struct shim_object *object, void *user)
{
    CHECK(object->data == user || object->data == NULL, 1);
    visited++;
}

static void command_handles(char **argument)
{
    (void)argument;
    static uint64_t handle[5000];
    for (int i = 0; i < 5000; i++) {
        handle[i] = shim_handle_new(VGPU_KIND_STREAM, handle, NULL);
        CHECK(handle[i] != 0 && handle[i] < 1ull << 47 && (handle[i] & 15) == 0, 1);
        CHECK(vgpu_handle_index(handle[i]) < VGPU_HANDLE_HOST_BASE, 1);
    }
    CHECK(shim_handle_valid(VGPU_KIND_STREAM, handle[4999]), 1);
    CHECK(shim_handle_valid(VGPU_KIND_EVENT, handle[4999]), 0);
    CHECK(shim_handle_valid(VGPU_KIND_STREAM, handle[4999] + (1ull << 28)), 0);
    CHECK(shim_handle_valid(VGPU_KIND_STREAM, handle[4999] | 1), 0);
    CHECK(shim_handle_valid(VGPU_KIND_STREAM, 0), 0);
    CHECK(shim_handle_valid(VGPU_KIND_STREAM, ~0ull), 0);
    CHECK(shim_handle_valid(99, ~0ull), 0);
    for (int i = 0; i < 5000; i += 2) shim_handle_free(handle[i]);
    shim_handle_free(handle[0]); /* twice: nothing happens */
    for (int i = 0; i < 5000; i++) CHECK(shim_handle_valid(VGPU_KIND_STREAM, handle[i]), i % 2);
    uint64_t reused = shim_handle_new(VGPU_KIND_STREAM, handle, NULL);
    CHECK(vgpu_handle_index(reused), vgpu_handle_index(handle[0])); /* the oldest free one */
    CHECK(reused != handle[0], 1);
    CHECK(shim_handle_valid(VGPU_KIND_STREAM, handle[0]), 0);
    uint64_t chosen = vgpu_handle(VGPU_KIND_STREAM, 5, VGPU_HANDLE_HOST_BASE + 77);
    CHECK(shim_handle_valid(VGPU_KIND_STREAM, chosen), 0);
    CHECK(shim_handle_adopt(chosen, NULL), 1);
    CHECK(shim_handle_adopt(chosen, handle), 1);
    CHECK(shim_object(VGPU_KIND_STREAM, chosen)->data == handle, 1);
    CHECK(shim_handle_adopt(reused, NULL), 0); /* not the worker's to choose */
    CHECK(shim_handle_adopt(chosen | 4, NULL), 0);
    CHECK(shim_handle_adopt(vgpu_handle(0, 0, VGPU_HANDLE_HOST_BASE), NULL), 0);
    CHECK(shim_handle_adopt(vgpu_handle(31, 0, VGPU_HANDLE_HOST_BASE), NULL), 0);
    shim_handle_each(VGPU_KIND_STREAM, visit, handle);
    CHECK(visited, 2502);
    shim_handle_free(chosen);
    CHECK(shim_handle_valid(VGPU_KIND_STREAM, chosen), 0);
    puts("done");
}

/* ---- contexts: the answers of a real 580 driver ---- */

static unsigned hooks_run;
static void hook(uint64_t context)
{
    CHECK(context != 0, 1);
    hooks_run++;
}

static void unusable(CUcontext context)
{
    int device = -1, least, greatest;
    unsigned flags, version;
    unsigned long long id;
    size_t limit;
    CUcontext current = NULL;
    CHECK(cuCtxGetCurrent(&current), 0);
    CHECK(current == context, 1);
    CHECK(cuCtxGetDevice(&device), 0);
    CHECK(cuCtxGetDevice(NULL), 1);
    CHECK(cuCtxGetFlags(&flags), 0);
    CHECK(cuCtxGetApiVersion(context, &version), 201);
    CHECK(cuCtxGetApiVersion(NULL, &version), 709);
    CHECK(cuCtxGetId(context, &id), 709);
    CHECK(cuCtxGetId(NULL, &id), 709);
    CHECK(cuCtxGetLimit(&limit, 0), 709);
    CHECK(cuCtxSetLimit(0, 1024), 709);
    CHECK(cuCtxGetStreamPriorityRange(&least, &greatest), 709);
    CHECK(cuCtxSynchronize(), 709);
    CHECK(cuProfilerStart(), 709);
    CHECK(cuProfilerStop(), 709);
    CHECK(shim_enter_context(), 709);
}

static void command_contexts(char **argument)
{
    (void)argument;
    CUcontext current = NULL, primary, retained_context = NULL, other = NULL, third = NULL;
    int device = -1, active = -1, least = 1, greatest = 1;
    unsigned flags = 99, version = 0, affinity[2];
    unsigned long long id = 0, second_id = 0;
    size_t limit = 0;
    CHECK(cuCtxGetCurrent(&current), 3);
    CHECK(cuCtxGetCurrent(NULL), 3);
    CHECK(cuCtxSynchronize(), 3);
    CHECK(cuDeviceGet(NULL, 0), 3);
    CHECK(cuDevicePrimaryCtxGetState(0, &flags, &active), 3);
    CHECK(cuProfilerStart(), 3);
    CHECK(cuProfilerInitialize("a", "b", 0), 801);
    CHECK(cuInit(1), 1);
    CHECK(cuInit(0), 0);
    CHECK(cuInit(0), 0);
    CHECK(cuInit(1), 1);
    shim_on_context_end(hook);
    CHECK(cuCtxGetCurrent(&current), 0);
    CHECK(current == NULL, 1);
    CHECK(cuCtxGetCurrent(NULL), 1);
    CHECK(cuCtxGetDevice(&device), 201);
    CHECK(cuCtxSynchronize(), 201);
    CHECK(cuCtxSetCurrent(NULL), 0);
    CHECK(cuCtxPopCurrent_v2(&current), 201);
    CHECK(cuCtxPushCurrent_v2(NULL), 1);
    CHECK(cuCtxSetCurrent((CUcontext)0x1234560), 201);
    CHECK(cuDevicePrimaryCtxGetState(0, &flags, &active), 0);
    CHECK(flags == 0 && active == 0, 1);
    CHECK(cuDevicePrimaryCtxGetState(0, NULL, &active), 1);
    CHECK(cuDevicePrimaryCtxGetState(0, &flags, NULL), 1);
    CHECK(cuDevicePrimaryCtxGetState(1, &flags, &active), 101);
    CHECK(cuDevicePrimaryCtxRelease_v2(0), 201);
    CHECK(cuDevicePrimaryCtxReset_v2(0), 0);
    CHECK(cuDevicePrimaryCtxSetFlags_v2(0, 0x1000), 1);
    CHECK(cuDevicePrimaryCtxSetFlags_v2(0, 3), 1);
    CHECK(cuDevicePrimaryCtxSetFlags_v2(0, 8), 1);
    CHECK(cuDevicePrimaryCtxSetFlags_v2(0, 4), 0);
    CHECK(cuDevicePrimaryCtxGetState(0, &flags, &active), 0);
    CHECK(flags == 4 && active == 0, 1);
    CHECK(cuDevicePrimaryCtxSetFlags_v2(0, 0), 0);

    primary = shim_primary_context_handle(0);
    CHECK(primary != NULL && shim_primary_context_handle(1) == NULL, 1);
    CHECK(cuCtxSetCurrent(primary), 0);
    unusable(primary);
    CHECK(cuCtxPushCurrent_v2(primary), 0);
    CHECK(cuCtxPopCurrent_v2(&current), 0);
    CHECK(cuCtxDestroy_v2(primary), 201);
    CHECK(shim.page->async_calls + shim.page->reply_calls + shim.page->fence_calls, 0); /* all of it local */

    CHECK(cuDevicePrimaryCtxRetain(&retained_context, 0), 0);
    CHECK(retained_context == primary && shim_current_context() == primary, 1);
    CHECK(cuDevicePrimaryCtxGetState(0, &flags, &active), 0);
    CHECK(flags == 0 && active == 1, 1);
    CHECK(cuCtxGetFlags(&flags), 0);
    CHECK(flags, 8);
    CHECK(cuCtxGetApiVersion(primary, &version), 0);
    CHECK(version, 3020);
    CHECK(cuCtxGetId(NULL, &id), 0);
    CHECK(cuCtxGetStreamPriorityRange(&least, &greatest), 0);
    CHECK(least == 0 && greatest == -5, 1);
    CHECK(cuCtxGetStreamPriorityRange(NULL, NULL), 0);
    CHECK(cuCtxGetLimit(NULL, 0), 1);
    CHECK(cuCtxGetLimit(&limit, 10), 1);
    CHECK(cuCtxSetLimit(99, 1), 1);
    CHECK(cuCtxGetLimit(&limit, 2), 0);
    CHECK(limit, 2); /* the host echoes */
    uint64_t replies = shim.page->reply_calls;
    CHECK(cuCtxGetLimit(&limit, 2), 0);
    CHECK(limit, 2);
    CHECK(shim.page->reply_calls, replies); /* remembered */
    CHECK(cuCtxSetLimit(2, 5), 0);
    CHECK(cuCtxGetLimit(&limit, 2), 0);
    CHECK(shim.page->reply_calls, replies + 2);
    CHECK(cuCtxGetExecAffinity(affinity, 0), 0);
    CHECK(affinity[0] == 0 && affinity[1] == 132, 1);
    CHECK(cuCtxGetExecAffinity(affinity, 5), 224);
    CHECK(cuCtxEnablePeerAccess(primary, 0), 217);
    CHECK(cuCtxEnablePeerAccess(NULL, 0), 201);
    CHECK(cuCtxEnablePeerAccess(primary, 1), 1);
    CHECK(cuCtxDisablePeerAccess(primary), 705);
    CHECK(cuCtxSynchronize(), 0);
    CHECK(cuCtxSynchronize_v2(NULL), 0);
    CHECK(cuCtxSynchronize_v2(primary), 0);
    unsigned mode = 7;
    CHECK(cuThreadExchangeStreamCaptureMode(&mode), 0);
    CHECK(mode, 0);
    CHECK(cuThreadExchangeStreamCaptureMode(&mode), 0);
    CHECK(mode, 7);

    CHECK(cuCtxCreate_v2(&other, 0x1000, 0), 1);
    CHECK(cuCtxCreate_v2(&other, 3, 0), 1);
    CHECK(cuCtxCreate_v2(&other, 0, 5), 101);
    CHECK(cuCtxCreate_v2(NULL, 0, 0), 1);
    CHECK(cuCtxCreate_v2(&other, 0, 0), 0);
    CHECK(shim_current_context() == other, 1);
    CHECK(cuCtxGetFlags(&flags), 0);
    CHECK(flags, 0);
    CHECK(cuCtxGetId(other, &second_id), 0);
    CHECK(second_id == id + 1, 1);
    CHECK(cuCtxGetDevice_v2(&device, other), 0);
    CHECK(cuCtxSynchronize_v2(primary), 0);
    CHECK(cuCtxDestroy_v2(other), 0);
    CHECK(hooks_run, 1);
    CHECK(shim_current_context() == primary, 1); /* popped, as it was current */
    CHECK(cuCtxDestroy_v2(other), 201);
    CHECK(cuCtxCreate_v4(&third, NULL, 0, 0), 0);
    CHECK(cuCtxPushCurrent_v2(primary), 0);
    CHECK(cuCtxDestroy_v2(third), 0);
    CHECK(cuCtxPopCurrent_v2(&current), 0);
    CHECK(current == primary, 1);
    CHECK(shim_current_context() == third, 1); /* destroyed, and still there */
    CHECK(cuCtxSynchronize(), 709);
    CHECK(cuCtxGetDevice(&device), 0);
    CHECK(cuCtxGetFlags(&flags), 0);
    CHECK(cuCtxGetApiVersion(NULL, &version), 709);
    CHECK(cuCtxPopCurrent_v2(&current), 0);

    CHECK(cuDevicePrimaryCtxRetain(&retained_context, 0), 0);
    CHECK(cuDevicePrimaryCtxReset_v2(0), 0);
    CHECK(hooks_run, 3);
    CHECK(cuDevicePrimaryCtxGetState(0, &flags, &active), 0);
    CHECK(active, 0);
    unusable(primary);
    CHECK(cuDevicePrimaryCtxRelease_v2(0), 0);
    CHECK(cuDevicePrimaryCtxRelease_v2(0), 0);
    CHECK(cuDevicePrimaryCtxRelease_v2(0), 201);
    CHECK(cuDevicePrimaryCtxRetain(&retained_context, 0), 0);
    CHECK(retained_context == primary, 1);
    CHECK(cuCtxSynchronize(), 0);
    CHECK(cuDevicePrimaryCtxRelease_v2(0), 0);
    CHECK(hooks_run, 4);
    CHECK(cuDevicePrimaryCtxGetState(0, &flags, &active), 0);
    CHECK(active, 0);
    for (unsigned i = 0; i < SHIM_CONTEXT_DEPTH - 1; i++) CHECK(cuCtxPushCurrent_v2(primary), 0);
    CHECK(cuCtxPushCurrent_v2(primary), 2);
    puts("done");
}

/* ---- devices ---- */

static void command_devices(char **argument)
{
    (void)argument;
    int device = -1, value = -1, other = -1;
    char text[64];
    size_t bytes = 0;
    unsigned char uuid[16];
    CHECK(cuInit(0), 0);
    CHECK(cuDeviceGet(&device, 0), 0);
    CHECK(device, 0);
    CHECK(cuDeviceGet(&device, 1), 101);
    CHECK(cuDeviceGet(&device, -1), 101);
    CHECK(cuDeviceGetName(text, sizeof text, 0), 0);
    printf("name %s\n", text);
    CHECK(cuDeviceGetName(text, 5, 0), 0);
    printf("short %s\n", text);
    CHECK(cuDeviceGetName(text, 0, 0), 1);
    CHECK(cuDeviceGetName(NULL, 5, 0), 1);
    CHECK(cuDeviceGetName(text, 5, 3), 101);
    CHECK(cuDeviceGetPCIBusId(text, sizeof text, 0), 0);
    printf("bus %s\n", text);
    CHECK(cuDeviceGetPCIBusId(text, 12, 0), 1);
    CHECK(cuDeviceGetPCIBusId(text, 13, 0), 0);
    CHECK(cuDeviceGetByPCIBusId(&value, text), 0);
    CHECK(cuDeviceGetByPCIBusId(&value, "1:6:7"), 0);
    CHECK(cuDeviceGetByPCIBusId(&value, "0001:06:07.1"), 101);
    CHECK(cuDeviceGetByPCIBusId(&value, "06:07.0"), 101); /* domain 0 */
    CHECK(cuDeviceGetByPCIBusId(&value, "junk"), 1);
    CHECK(cuDeviceGetByPCIBusId(&value, ""), 1);
    CHECK(cuDeviceGetByPCIBusId(&value, NULL), 1);
    CHECK(cuDeviceGetUuid(uuid, 0), 0);
    CHECK(memcmp(uuid, shim.device->uuid, 16), 0);
    CHECK(cuDeviceGetUuid_v2(uuid, 0), 0);
    CHECK(cuDeviceGetUuid(NULL, 0), 1);
    CHECK(cuDeviceTotalMem_v2(&bytes, 0), 0);
    CHECK(bytes >> 30, 20);
    CHECK(cuDeviceComputeCapability(&value, &other, 0), 0);
    CHECK(value == 9 && other == 0, 1);
    CHECK(cuDeviceGetAttribute(&value, 16, 0), 0);
    CHECK(value, 132);
    CHECK(cuDeviceGetAttribute(&value, 0, 0), 1);
    CHECK(cuDeviceGetAttribute(&value, 9999, 0), 1);
    CHECK(cuDeviceGetAttribute(&value, 2, 0), 1); /* the host does not know it */
    CHECK(cuDeviceGetAttribute(NULL, 16, 0), 1);
    CHECK(cuDeviceGetAttribute(&value, 16, 5), 101);
    CHECK(cuDeviceGetLuid(text, &value, 0), 801);
    CHECK(cuDeviceCanAccessPeer(&value, 0, 0), 0);
    CHECK(value, 0);
    CHECK(cuDeviceCanAccessPeer(&value, 0, 1), 101);
    CHECK(cuDeviceGetP2PAttribute(&value, 1, 0, 0), 101);
    CHECK(cuDeviceGetExecAffinitySupport(&value, 0, 0), 0);
    int properties[14] = {0};
    CHECK(cuDeviceGetProperties(properties, 0), 0);
    CHECK(properties[0], 1024);
    CHECK(shim_device_count(), 1);
    int32_t pci[3];
    shim_device_pci(0, &pci[0], &pci[1], &pci[2]);
    CHECK(pci[0] == 1 && pci[1] == 6 && pci[2] == 7, 1);
    const uint8_t *gpc, *index;
    size_t count = 0;
    CHECK(shim_topology(&gpc, &index, &count), 0);
    CHECK(count == 66 && gpc == NULL, 1);
    const unsigned asked[3] = {5, 6, 7};
    unsigned told[3] = {0};
    CHECK(cuDeviceGetHostAtomicCapabilities(told, asked, 3, 0), 0);
    CHECK(memcmp(told, asked, sizeof told), 0); /* the host echoes */
    CHECK(cuDeviceGetHostAtomicCapabilities(told, asked, 0, 0), 1);
    CHECK(cuDeviceGetHostAtomicCapabilities(told, asked, 1u << 30, 0), 1);
    CHECK(cuDeviceGetHostAtomicCapabilities(told, asked, 3, 1), 101);
    void *registration = NULL;
    CHECK(cuLogsRegisterCallback((void *)(uintptr_t)1, NULL, &registration), 0);
    CHECK(registration != NULL, 1);
    CHECK(cuLogsUnregisterCallback(registration), 0);
    CHECK(cuLogsUnregisterCallback(registration), 1);
    CHECK(cuLogsUnregisterCallback((void *)(uintptr_t)5), 1);
    CHECK(shim_refuse(VGPU_CALL_cuArrayCreate), 801);
    CHECK(cuCtxGetCurrent(NULL), 1);
    puts("done");
}

/* CUDA_VISIBLE_DEVICES for three devices: `visible LIST` prints what is shown. */
static void command_visible(char **argument)
{
    const uint8_t uuid[3][16] = {{0xb1, 0x95, 0x98, 0xfb}, {0xb1, 0x95, 0x00}, {0xee}};
    int out[3];
    int count = shim_visible_devices(argument[0], uuid, 3, out);
    printf("%d:", count);
    for (int i = 0; i < count; i++) printf(" %d", out[i]);
    puts("");
}

/* ---- fork, exit ---- */

static void command_fork(char **argument)
{
    (void)argument;
    CUcontext context = retained(), current = context;
    int value = 0;
    const void *text;
    void *function = NULL;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        printf("child %d %d %d %d %d %d %d\n", (int)cuInit(0), (int)cuDeviceGetCount(&value), (int)cuCtxGetCurrent(&current),
               (int)cuCtxSynchronize(), (int)cuDriverGetVersion(&value), (int)cuGetErrorName(3, &text),
               (int)cuGetProcAddress_v2("cuInit", &function, 12000, 0, NULL));
        fflush(stdout);
        exit(0); /* destructors run: the parent's session must not hear of it */
    }
    CHECK(waitpid(child, &value, 0), child);
    printf("status %d\n", value);
    printf("parent %d\n", (int)cuCtxSynchronize());
}

/* A process that forks before cuInit: the child is as good as any. */
static void command_fork_first(char **argument)
{
    (void)argument;
    int value;
    CHECK(cuDriverGetVersion(&value), 0);
    pid_t child = fork();
    if (child == 0) {
        retained();
        printf("child %d\n", (int)cuCtxSynchronize());
        exit(0);
    }
    CHECK(waitpid(child, &value, 0), child);
    printf("status %d\n", value);
}

static _Atomic int busy_is_over;

static void *busy_body(void *argument)
{
    (void)argument;
    CUresult status = cuInit(0);
    busy_is_over = 1;
    printf("init %d\n", (int)status);
    return NULL;
}

/* Another thread is being told BUSY for a long time: fork does not wait for it. */
static void command_fork_busy(char **argument)
{
    (void)argument;
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, busy_body, NULL), 0);
    usleep(100000);
    int value;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) _exit((int)cuDeviceGetCount(&value));
    CHECK(waitpid(child, &value, 0), child);
    printf("child %d\nquick %d\n", WEXITSTATUS(value), !busy_is_over);
    pthread_join(thread, NULL);
}

static void late(void)
{
    CUcontext context = NULL;
    int value = 0;
    void *function = NULL;
    printf("late %d %d %d %d %d %d\n", (int)cuInit(0), (int)cuCtxSynchronize(), (int)cuDevicePrimaryCtxRelease_v2(0),
           (int)cuCtxGetCurrent(&context), (int)cuDeviceGetCount(&value), (int)cuGetProcAddress_v2("cuInit", &function, 12000, 0, NULL));
    fflush(stdout);
}

/* Linked into one program, our own destructor has to be run by hand before the late caller. */
static void command_exit(char **argument)
{
    (void)argument;
    retained();
    shim_tear_down();
    late();
}

/* ---- figures ---- */

#define NANOSECONDS(name, expression)                                                            \
    do {                                                                                         \
        double best = 1e9;                                                                       \
        for (int round = 0; round < 7; round++) {                                                \
            double began = seconds();                                                            \
            for (int i = 0; i < 20000; i++) (void)(expression);                                  \
            double each = (seconds() - began) * 1e9 / 20000;                                     \
            if (each < best) best = each;                                                        \
        }                                                                                        \
        printf(name " %.1f\n", best);                                                            \
    } while (0)

static void command_figures(char **argument)
{
    (void)argument;
    CUcontext context = retained(), current;
    CHECK(cuCtxSynchronize(), 0);
    int value, active;
    unsigned flags;
    uint64_t before = shim.page->tail;
    NANOSECONDS("cuCtxGetCurrent", cuCtxGetCurrent(&current));
    NANOSECONDS("cuCtxGetDevice", cuCtxGetDevice(&value));
    NANOSECONDS("cuCtxGetDevice_v2", cuCtxGetDevice_v2(&value, context));
    NANOSECONDS("cuDevicePrimaryCtxGetState", cuDevicePrimaryCtxGetState(0, &flags, &active));
    NANOSECONDS("cuDeviceGetAttribute", cuDeviceGetAttribute(&value, 16, 0));
    NANOSECONDS("cuCtxSetCurrent", cuCtxSetCurrent(context));
    NANOSECONDS("shim_enter_context", shim_enter_context());
    printf("records %llu\n", (unsigned long long)(shim.page->tail - before));
    const uint64_t words[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    for (int i = 0; i < 12000; i++) CHECK(shim_async(RECORD, words, words, 16), 0);
    CHECK(cuCtxSynchronize(), 0);
    /* Into an empty ring that nobody reads: what a submission costs the caller. */
    puts("pause");
    fflush(stdout);
    getchar();
    double best = 1e9;
    for (int round = 0; round < 8; round++) {
        double began = seconds();
        for (int i = 0; i < 1000; i++) CHECK(shim_async(RECORD, words, words, 16), 0);
        double each = (seconds() - began) * 1e9 / 1000;
        if (each < best) best = each;
    }
    printf("shim_async %.1f\n", best);
    printf("local_calls %llu\n", (unsigned long long)shim.page->local_calls);
}

int main(int count, char **argument)
{
    static const struct { const char *name; void (*run)(char **); int arguments; } commands[] = {
        {"init", command_init, 0}, {"stream", command_stream, 2}, {"threads", command_threads, 2},
        {"contexts-in-threads", command_contexts_in_threads, 1}, {"slots", command_slots, 1}, {"arrays", command_arrays, 0}, {"death", command_death, 0},
        {"sticky", command_sticky, 0}, {"fences", command_fences, 0}, {"handles", command_handles, 0},
        {"contexts", command_contexts, 0}, {"devices", command_devices, 0}, {"visible", command_visible, 1},
        {"fork", command_fork, 0}, {"fork-first", command_fork_first, 0}, {"fork-busy", command_fork_busy, 0}, {"exit", command_exit, 0}, {"figures", command_figures, 0},
    };
    for (size_t i = 0; count > 1 && i < sizeof commands / sizeof *commands; i++) {
        if (strcmp(argument[1], commands[i].name) != 0 || count - 2 != commands[i].arguments) continue;
        commands[i].run(argument + 2);
        return 0;
    }
    fputs("core_guest: no such command\n", stderr);
    return 2;
}
