/* SPDX-License-Identifier: Apache-2.0 */
/*
 * copy_threads.c - memcpy by several threads, for pageable copies.
 *
 * One core moves about 12 GB/s; a GPU behind PCIe takes 55. A copy between pageable memory and staging is
 * therefore cut into slices that the caller and a few helpers take from a common counter. Helpers exist
 * only after the first long copy and only where there are processors to spare; one long copy uses them at
 * a time, others run alone meanwhile. They touch nothing but the bytes of the job, so the application may
 * do anything in its own threads; the program's signals are blocked in them.
 */
#include "memory.h"

#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SLICE (256u << 10)
#define WORTH_SHARING (1u << 20)
#define MOST_HELPERS 3
#define SPINS 4000 /* about 100 us: the pause between two chunks of one copy */

static struct {
    pthread_mutex_t owner;
    pthread_once_t started;
    unsigned helpers;
    uint8_t *destination;
    const uint8_t *source;
    size_t size;
    _Atomic size_t next;         /* first byte nobody has taken */
    _Atomic uint32_t generation; /* futex word; one more for each job */
    _Atomic uint32_t open;       /* the job helpers may join, 0 none */
    _Atomic uint32_t inside;     /* helpers that may be touching the job */
    _Atomic uint32_t sleepers;
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER, .started = PTHREAD_ONCE_INIT};

static void pause_briefly(void) { __builtin_ia32_pause(); }

static void move(void *destination, const void *source, size_t size)
{
    if (__builtin_expect(shim.uncached, 0) && shim_arena_offset(source, size, &(uint64_t){0}))
        memory_copy_uncached(destination, source, size);
    else
        memcpy(destination, source, size);
}

static void take_slices(void)
{
    for (;;) {
        size_t at = atomic_fetch_add_explicit(&pool.next, SLICE, memory_order_relaxed);
        if (at >= pool.size) return;
        size_t length = pool.size - at < SLICE ? pool.size - at : SLICE;
        move(pool.destination + at, pool.source + at, length);
    }
}

static void *helper(void *unused)
{
    (void)unused;
    uint32_t seen = 0;
    for (;;) {
        uint32_t now;
        for (unsigned spin = 0; (now = atomic_load_explicit(&pool.generation, memory_order_acquire)) == seen; spin++) {
            if (spin < SPINS) {
                pause_briefly();
                continue;
            }
            atomic_fetch_add(&pool.sleepers, 1);
            syscall(SYS_futex, &pool.generation, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
            atomic_fetch_sub(&pool.sleepers, 1);
        }
        seen = now;
        /* Announce first, look second; the owner closes first and counts second (both sequentially consistent). */
        atomic_fetch_add(&pool.inside, 1);
        if (atomic_load(&pool.open) == now) take_slices();
        atomic_fetch_sub(&pool.inside, 1);
    }
    return NULL;
}

static void start(void)
{
    cpu_set_t set;
    int processors = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    /* The worker spins on a processor of its own on the same host, and the application has threads too. */
    unsigned wanted = processors < 4 ? 0 : processors < 8 ? 1 : MOST_HELPERS;
    sigset_t old;
    shim_block_signals(&old);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    for (unsigned i = 0; i < wanted; i++) {
        pthread_t thread;
        if (pthread_create(&thread, &attributes, helper, NULL) != 0) break;
        pthread_setname_np(thread, "vgpu-copy");
        pool.helpers++;
    }
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

static void copy_bytes(void *destination, const void *source, size_t size)
{
    if (size < WORTH_SHARING || pthread_mutex_trylock(&pool.owner) != 0) {
        move(destination, source, size);
        return;
    }
    pthread_once(&pool.started, start);
    if (pool.helpers == 0) {
        move(destination, source, size);
    } else {
        pool.destination = destination;
        pool.source = source;
        pool.size = size;
        atomic_store(&pool.next, 0);
        uint32_t job = atomic_load(&pool.generation) + 1;
        if (job == 0) job = 1;
        atomic_store(&pool.open, job);
        atomic_store(&pool.generation, job);
        if (atomic_load(&pool.sleepers) != 0) syscall(SYS_futex, &pool.generation, FUTEX_WAKE_PRIVATE, MOST_HELPERS, NULL, NULL, 0);
        take_slices();
        atomic_store(&pool.open, 0);
        for (unsigned spin = 0; atomic_load(&pool.inside) != 0; spin++) {
            if (spin < SPINS)
                pause_briefly();
            else
                sched_yield();
        }
    }
    pthread_mutex_unlock(&pool.owner);
}

void memory_copy_bytes(void *destination, const void *source, size_t size)
{
    uint64_t began = shim_copy_begins();
    copy_bytes(destination, source, size);
    shim_copy_ends(began);
}
