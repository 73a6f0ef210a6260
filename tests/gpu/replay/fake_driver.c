/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fake_driver.c - a libcuda of a few functions for testing the replay core: device memory is host memory, and one
 * queue stands for the whole device. It does what it is told through limits no real driver has:
 *
 *   cuCtxSetLimit(1000, ms)       the call itself takes so long
 *   cuCtxSetLimit(1001, ms)       the device is busy for so long: streams and events are not ready, writes are late
 *   cuCtxSetLimit(1002, ms)       after so long everything answers 700, and late writes never happen
 *   cuCtxSetLimit(1003, address)  fills 80 bytes at the address with 0xff (a guest that changes a record under us)
 *   cuCtxSetLimit(1004, n)        the call returns n
 *   cuCtxGetLimit(1006)           number of driver calls so far
 *   cuCtxGetLimit(1010)           bytes of host memory that are registered
 *
 * With FAKE_NO_WRITES in the environment at cuInit the device cannot write fence words.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define EXPORT __attribute__((visibility("default")))
#define NOT_READY 600
#define ILLEGAL_ADDRESS 700
#define QUEUE 4096

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic uint64_t busy_until, fault_at, calls;
static _Atomic int writes_supported = 1;
static struct { uint64_t at, value; _Atomic uint64_t *word; pthread_t asker; } queue[QUEUE];
static unsigned queued;
static uint64_t limits[16];
static __thread void *current;

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static int device(void)
{
    atomic_fetch_add(&calls, 1);
    uint64_t fault = atomic_load(&fault_at), time = now(); /* one look: no moment between busy and faulted */
    if (fault != 0 && time >= fault)
        return ILLEGAL_ADDRESS;
    return time < atomic_load(&busy_until) ? NOT_READY : 0;
}

static void *write_late(void *unused)
{
    (void)unused;
    for (;;) {
        pthread_mutex_lock(&lock);
        unsigned kept = 0;
        for (unsigned i = 0; i < queued; i++) {
            uint64_t fault = atomic_load(&fault_at);
            if (queue[i].at > now())
                queue[kept++] = queue[i];
            else if (fault == 0 || queue[i].at < fault)
                atomic_store(queue[i].word, queue[i].value);
        }
        queued = kept;
        pthread_mutex_unlock(&lock);
        nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
    }
    return NULL;
}

/* What that thread asked for and is still to be written is not: its memory is about to go. */
EXPORT void fakeForgetWrites(pthread_t asker)
{
    pthread_mutex_lock(&lock);
    unsigned kept = 0;
    for (unsigned i = 0; i < queued; i++)
        if (!pthread_equal(queue[i].asker, asker))
            queue[kept++] = queue[i];
    queued = kept;
    pthread_mutex_unlock(&lock);
}

EXPORT int cuInit(unsigned flags)
{
    static atomic_flag started = ATOMIC_FLAG_INIT;
    pthread_t thread;
    if (!atomic_flag_test_and_set(&started) && pthread_create(&thread, NULL, write_late, NULL) != 0)
        return 999;
    atomic_store(&busy_until, 0); /* a test begins */
    atomic_store(&fault_at, 0);
    atomic_store(&writes_supported, getenv("FAKE_NO_WRITES") == NULL);
    return flags == 0 ? 0 : 1;
}
EXPORT int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
EXPORT int cuDeviceGet(int *found, int ordinal) { *found = ordinal; return ordinal == 0 ? 0 : 101; }
EXPORT int cuDeviceGetName(char *name, int size, int d) { (void)d; strncpy(name, "Fake", (size_t)size); return 0; }
EXPORT int cuDeviceGetUuid_v2(void *uuid, int d) { (void)d; memset(uuid, 0xab, 16); return 0; }
EXPORT int cuDeviceTotalMem_v2(size_t *bytes, int d) { (void)d; *bytes = 8ull << 30; return 0; }
EXPORT int cuDeviceGetPCIBusId(char *text, int size, int d) { (void)d; strncpy(text, "0000:1a:00.0", (size_t)size); return 0; }
EXPORT int cuDeviceGetAttribute(int *value, unsigned attribute, int d)
{
    (void)d;
    if (attribute == 0 || attribute > 140)
        return 1;
    *value = attribute == 16 ? 132 : attribute == 75 ? 9 : (int)attribute;
    return 0;
}
EXPORT int cuMemGetAllocationGranularity(size_t *size, const void *p, unsigned option) { (void)p; *size = (2ull << 20) << option; return 0; }
EXPORT int cuDevicePrimaryCtxRetain(void **context, int d) { (void)d; *context = (void *)0x1000; return 0; }
static void forget_registrations(void *context);
EXPORT int cuDevicePrimaryCtxRelease_v2(int d) { (void)d; forget_registrations((void *)0x1000); return 0; }
EXPORT int cuDevicePrimaryCtxSetFlags_v2(int d, unsigned flags) { (void)d; (void)flags; return 0; }
EXPORT int cuCtxCreate_v2(void **context, unsigned flags, int d)
{
    (void)flags; (void)d;
    current = *context = malloc(16);
    return 0;
}
EXPORT int cuCtxDestroy_v2(void *context) { forget_registrations(context); free(context); return 0; }
EXPORT int cuCtxSetCurrent(void *context) { current = context; return 0; }
EXPORT int cuCtxGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }

EXPORT int cuCtxSetLimit(unsigned limit, size_t value)
{
    uint64_t later = now() + value * 1000000ull;
    device();
    if (current == NULL)
        return 201;
    switch (limit) {
    case 1000: nanosleep(&(struct timespec){(time_t)(value / 1000), (long)(value % 1000) * 1000000}, NULL); return 0;
    case 1001: atomic_store(&busy_until, later); return 0;
    case 1002: atomic_store(&busy_until, later); atomic_store(&fault_at, later); return 0;
    case 1003: memset((void *)value, 0xff, 80); return 0;
    case 1004: return (int)value;
    default: break;
    }
    if (limit >= 16)
        return 215;
    limits[limit] = value;
    return 0;
}
/* What is registered, with the context that it ends with: only whole registrations are taken back. Replays that ended left theirs here, and somebody else may
 * live at the address now; such leftovers give way. */
static struct { char *start; size_t size; void *context; } registered[1024];
static void forget_registrations(void *context)
{
    for (int i = 0; i < 1024; i++)
        if (registered[i].context == context)
            registered[i].size = 0;
}
EXPORT int cuMemHostRegister_v2(void *p, size_t size, unsigned flags)
{
    (void)flags;
    int entry = -1;
    for (int i = 1023; i >= 0; i--) {
        if ((char *)p < registered[i].start + registered[i].size && registered[i].start < (char *)p + size)
            registered[i].size = 0;
        if (registered[i].size == 0)
            entry = i;
    }
    if (size == 0 || entry < 0)
        return 1;
    registered[entry].start = p;
    registered[entry].size = size;
    registered[entry].context = current;
    return 0;
}
EXPORT int cuMemHostUnregister(void *p)
{
    for (int i = 0; i < 1024; i++)
        if (registered[i].size != 0 && registered[i].start == p)
            return (int)(registered[i].size = 0);
    return 713;
}
static int is_registered(uint64_t address, size_t size)
{
    for (int i = 0; i < 1024; i++)
        if (address >= (uint64_t)registered[i].start && address - (uint64_t)registered[i].start < registered[i].size)
            return size <= registered[i].size - (address - (uint64_t)registered[i].start);
    return 0;
}
static size_t registered_bytes(void)
{
    size_t sum = 0;
    for (int i = 0; i < 1024; i++)
        sum += registered[i].size;
    return sum;
}
EXPORT int cuCtxGetLimit(size_t *value, unsigned limit)
{
    if (limit == 1006)
        *value = atomic_load(&calls);
    else if (limit == 1010)
        *value = registered_bytes();
    else if (limit >= 16 && limit < 1000)
        return 215;
    else
        *value = limit < 16 ? limits[limit] : 0;
    return 0;
}
EXPORT int cuMemHostGetDevicePointer_v2(uint64_t *address, void *p, unsigned flags) { (void)flags; *address = (uint64_t)p; return 0; }

EXPORT int cuStreamCreateWithPriority(void **stream, unsigned flags, int priority)
{
    (void)flags; (void)priority;
    *stream = malloc(16);
    return 0;
}
EXPORT int cuStreamDestroy_v2(void *stream) { free(stream); return 0; }
EXPORT int cuStreamQuery(void *stream) { (void)stream; return device(); }
EXPORT int cuStreamWaitEvent(void *stream, void *event, unsigned flags) { (void)stream; (void)event; (void)flags; return 0; }
EXPORT int cuStreamIsCapturing(void *stream, unsigned *status) { (void)stream; *status = 0; return 0; }
EXPORT int cuThreadExchangeStreamCaptureMode(unsigned *mode) { *mode = 0; return 0; }
static int write_word(uint64_t address, uint64_t value)
{
    if (!atomic_load(&writes_supported))
        return 801;
    int status = device();
    if (status == ILLEGAL_ADDRESS)
        return status;
    if (status == 0) {
        atomic_store((_Atomic uint64_t *)address, value);
        return 0;
    }
    pthread_mutex_lock(&lock);
    status = queued < QUEUE ? 0 : 2;
    if (status == 0) {
        queue[queued].asker = pthread_self();
        queue[queued].at = atomic_load(&busy_until);
        queue[queued].word = (_Atomic uint64_t *)address;
        queue[queued++].value = value;
    }
    pthread_mutex_unlock(&lock);
    return status;
}
EXPORT int cuStreamWriteValue64_v2(void *stream, uint64_t address, uint64_t value, unsigned flags)
{
    (void)stream; (void)flags;
    /* As the real one: it writes into memory that it knows, and nowhere else. */
    return address % 8 == 0 && is_registered(address, 8) ? write_word(address, value) : 1;
}

struct event { uint64_t done_at; };
EXPORT int cuEventCreate(void **event, unsigned flags) { (void)flags; *event = calloc(1, sizeof(struct event)); return 0; }
EXPORT int cuEventDestroy_v2(void *event) { free(event); return 0; }
EXPORT int cuEventElapsedTime(float *milliseconds, struct event *start, struct event *end) { (void)start; (void)end; *milliseconds = 1.5f; return now() < end->done_at ? NOT_READY : 0; }
EXPORT int cuEventRecord(struct event *event, void *stream) { (void)stream; event->done_at = atomic_load(&busy_until); return 0; }
EXPORT int cuEventQuery(struct event *event)
{
    int status = device();
    return status == ILLEGAL_ADDRESS ? status : now() < event->done_at ? NOT_READY : 0;
}

/* Threads that are in a host function or about to be: until there are none, a replay must not be freed. */
static _Atomic int host_calls;
EXPORT int fakeHostCalls(void) { return atomic_load(&host_calls); }
struct host_call { void (*function)(void *); void *user; uint64_t at; };
static void *run_host_call(void *argument)
{
    struct host_call call = *(struct host_call *)argument;
    free(argument);
    while (now() < call.at)
        nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
    call.function(call.user);
    atomic_fetch_sub(&host_calls, 1);
    return NULL;
}
EXPORT int cuLaunchHostFunc(void *stream, void (*function)(void *), void *user)
{
    (void)stream;
    struct host_call *call = malloc(sizeof *call);
    pthread_t thread;
    *call = (struct host_call){function, user, atomic_load(&busy_until)};
    atomic_fetch_add(&host_calls, 1);
    if (pthread_create(&thread, NULL, run_host_call, call) != 0) {
        atomic_fetch_sub(&host_calls, 1);
        free(call);
        return 2;
    }
    return pthread_detach(thread);
}
