/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pci_guest.c - a guest program that does as it is told on standard input, a word a line, and answers each with a line. Linked
 * with the library's sources, so that it sees what the library does not export. tests/shim/test_pci_*.py run it.
 */
#include "core.h"
#include "pci.h"
#include "_generated_prototypes.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define RECORD VGPU_CALL_cuMemPoolTrimTo /* any call id the host echoes */

static CUcontext context;
static uint8_t *volatile pinned; /* a signal handler reads it */
static volatile sig_atomic_t foreign;

static void begin(void)
{
    CUresult status = cuInit(0);
    if (status == CUDA_SUCCESS) {
        status = cuDevicePrimaryCtxRetain(&context, 0);
        if (status == CUDA_SUCCESS) status = cuCtxSetCurrent(context);
    }
    printf("init %d\n", (int)status);
}

static void identity(void)
{
    char bus[32] = "";
    int domain = -1, number = -1, device = -1, again = -1;
    cuDeviceGetPCIBusId(bus, sizeof bus, 0);
    cuDeviceGetAttribute(&domain, 50, 0);
    cuDeviceGetAttribute(&number, 33, 0);
    cuDeviceGetAttribute(&device, 34, 0);
    int status = (int)cuDeviceGetByPCIBusId(&again, bus);
    printf("%s %d %d %d %d %d\n", bus, domain, number, device, status, again);
}

static void segment(void)
{
    printf("%d %d %d %llu %llu %u\n", shim.identical, shim.combining, shim.uncached, (unsigned long long)shim.arena_size,
           (unsigned long long)shim.ring_mask + 1, shim.page->slot_count);
}

/* N records, then one synchronisation. */
static void launch(long count)
{
    static const uint8_t payload[VGPU_INLINE_LIMIT];
    CUresult status = CUDA_SUCCESS;
    for (long i = 0; i < count && status == CUDA_SUCCESS; i++) {
        const uint64_t words[8] = {(uint64_t)i};
        status = shim_async(RECORD, words, payload, (uint32_t)(i * 3307 % (VGPU_INLINE_LIMIT + 1)));
    }
    if (status == CUDA_SUCCESS) status = cuCtxSynchronize();
    printf("launched %d\n", (int)status);
}

static void on_foreign(int number)
{
    (void)number;
    foreign++;
    /* A fault at memory of our own: mend it, or it comes again. */
    mmap(pinned, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

/* A SIGBUS that has nothing to do with the device, after the attach. */
static void own_fault(void)
{
    FILE *file = tmpfile();
    pinned = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fileno(file), 0);
    *(volatile uint8_t *)pinned = 1; /* beyond the file's end */
    printf("survived %d\n", (int)foreign);
}

static void *in_context(void *function)
{
    cuCtxSetCurrent(context);
    return ((void *(*)(void *))function)(NULL);
}

static void *in_a_thread(void *unused)
{
    (void)unused;
    CUresult status = cuCtxSetCurrent(context);
    return (void *)(intptr_t)(status != CUDA_SUCCESS ? status : cuCtxSynchronize());
}

static void forked(void)
{
    pid_t child = fork();
    if (child == 0) {
        printf("child %d\n", (int)cuCtxSynchronize());
        fflush(stdout);
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    pthread_t thread;
    void *result;
    pthread_create(&thread, NULL, in_a_thread, NULL);
    pthread_join(thread, &result);
    printf("parent %d\n", (int)(intptr_t)result);
}

/* A child that lives on without leaving anything behind but itself. */
static void left_child(void)
{
    pid_t child = fork();
    if (child == 0) {
        for (int i = 0; i < 3; i++) close(i);
        pause();
        _exit(0);
    }
    printf("left %d\n", (int)child);
}

static void pin(size_t size)
{
    void *at = NULL;
    CUresult status = cuMemHostAlloc(&at, size, 0);
    if (status == CUDA_SUCCESS) pinned = at;
    printf("pinned %d %d\n", (int)status, shim_arena_offset(at, 1, &(uint64_t){0}));
}

static void fill(void)
{
    for (size_t i = 0; i < 100000; i++) pinned[i] = (uint8_t)i;
    printf("filled %d\n", (int)cuCtxSynchronize());
}

static void *waits(void *unused)
{
    (void)unused;
    printf("waited %d\n", (int)cuCtxSynchronize());
    return NULL;
}

/* A wait that goes on while more is asked. */
static void wait_beside(void)
{
    pthread_t thread;
    pthread_create(&thread, NULL, in_context, waits);
    pthread_detach(thread);
    printf("waiting\n");
}

static _Atomic int called;
static void on_host(void *user) { called += (int)(intptr_t)user; }

static void host_function(void)
{
    CUresult status = cuLaunchHostFunc(NULL, (void *)(uintptr_t)on_host, (void *)(intptr_t)1);
    if (status == CUDA_SUCCESS) status = cuCtxSynchronize();
    printf("called %d %d\n", (int)status, called);
}

/* Processor time of this process in a second of waiting for something that does not come. */
static void idle_cost(void)
{
    struct timespec before, after;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &before);
    usleep(1000000);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &after);
    printf("%ld\n", (long)((after.tv_sec - before.tv_sec) * 1000000 + (after.tv_nsec - before.tv_nsec) / 1000));
}

static void local(void)
{
    int count = -1, value = -1;
    char name[64] = "";
    int status = (int)cuDeviceGetCount(&count);
    cuDeviceGetAttribute(&value, 16, 0);
    cuDeviceGetName(name, sizeof name, 0);
    printf("%d %d %d %s\n", status, count, value, name);
}

int main(int argc, char **argv)
{
    char line[128];
    long number;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc > 1 && strcmp(argv[1], "chained") == 0) signal(SIGBUS, on_foreign);
    while (fgets(line, sizeof line, stdin) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        if (strcmp(line, "init") == 0) begin();
        else if (strcmp(line, "version") == 0) { int version = 0; cuDriverGetVersion(&version); printf("version %d\n", version); }
        else if (strcmp(line, "identity") == 0) identity();
        else if (strcmp(line, "segment") == 0) segment();
        else if (sscanf(line, "launch %ld", &number) == 1) launch(number);
        else if (strcmp(line, "sync") == 0) printf("sync %d\n", (int)cuCtxSynchronize());
        else if (strcmp(line, "slot") == 0) printf("slot %lld\n", (long long)(shim.doorbell == NULL ? -1 : ((const uint8_t *)shim.doorbell - pci.registers) / 4096 - 1));
        else if (sscanf(line, "pin %ld", &number) == 1) pin((size_t)number);
        else if (strcmp(line, "unpin") == 0) printf("unpin %d\n", (int)cuMemFreeHost(pinned));
        else if (strcmp(line, "fill") == 0) fill();
        else if (strcmp(line, "local") == 0) local();
        else if (strcmp(line, "wait-beside") == 0) wait_beside();
        else if (strcmp(line, "host-function") == 0) host_function();
        else if (strcmp(line, "idle-cost") == 0) idle_cost();
        else if (strcmp(line, "own-fault") == 0) own_fault();
        else if (strcmp(line, "fork") == 0) forked();
        else if (strcmp(line, "leave-child") == 0) left_child();
        else if (strcmp(line, "abort-at-once") == 0) _exit(3);
        else printf("what is \"%s\"?\n", line);
    }
    return 0;
}
