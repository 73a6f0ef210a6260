/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memory_stress.c - the interval table and the shared memcpy under many threads, without a session. Linked with
 * memory_map.c, copy_threads.c and shared_copy.c and built with -fsanitize=thread or address.
 */
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>

#include "../../../shim/libcuda/memory.h"

#define SLOTS 400
#define STRIDE 0x10000ull
#define THREADS 4

/* Any number of processors, so that helpers exist here. */
int sched_getaffinity(pid_t pid, size_t size, cpu_set_t *set)
{
    (void)pid, (void)size;
    CPU_ZERO(set);
    for (int i = 0; i < 8; i++) CPU_SET(i, set);
    return 0;
}

/* What the linked files need of the rest of the library. */
struct shim_session shim;
bool shim_arena_offset(const void *pointer, size_t size, uint64_t *offset)
{
    (void)pointer, (void)size;
    *offset = 0;
    return true;
}
void shim_block_signals(sigset_t *before) { sigemptyset(before); }
/* Nobody asks here where time goes. */
uint64_t shim_copy_begins(void) { return 0; }
void shim_copy_ends(uint64_t began) { (void)began; }

static _Atomic int failures;
static _Atomic int stop;
#define CHECK(c) do { if (!(c)) { printf("line %d: not so: %s\n", __LINE__, #c); atomic_fetch_add(&failures, 1); } } while (0)

/* Size, id and owner follow from the base, so a torn answer shows. */
static struct shim_range range_at(unsigned slot)
{
    uint64_t base = (slot + 1) * STRIDE;
    return (struct shim_range){.base = base, .size = 1 + base % 0xffff, .device_address = base * 3, .context = base + 1, .id = base + 2, .kind = SHIM_RANGE_DEVICE, .flags = (uint32_t)base, .owner = base + 3};
}

static void *reader(void *argument)
{
    unsigned long state = (unsigned long)(uintptr_t)argument, found = 0;
    while (!atomic_load(&stop) || found == 0) {
        struct shim_range got;
        state = state * 6364136223846793005ul + 1442695040888963407ul;
        uint64_t address = (state >> 33) % (SLOTS * STRIDE);
        bool next = state & 1;
        if (!(next ? shim_map_next(&shim_memory_map, address, &got) : shim_map_find(&shim_memory_map, address, &got))) continue;
        struct shim_range expected = range_at((unsigned)(got.base / STRIDE - 1));
        CHECK(memcmp(&got, &expected, sizeof got) == 0);
        CHECK(next ? got.base + got.size > address : address - got.base < got.size);
        found++;
    }
    return NULL;
}

static void *writer(void *argument)
{
    unsigned offset = (unsigned)(uintptr_t)argument;
    for (unsigned round = 0; round < 60; round++) {
        for (unsigned slot = offset; slot < SLOTS; slot += 2) {
            struct shim_range range = range_at(slot), got, overlap = range;
            CHECK(shim_map_add(&shim_memory_map, &range));
            overlap.base += overlap.size - 1;
            overlap.size = 1;
            CHECK(!shim_map_add(&shim_memory_map, &overlap));
            CHECK(shim_map_find(&shim_memory_map, range.base + range.size - 1, &got) && got.base == range.base);
            CHECK(!shim_map_find(&shim_memory_map, range.base + range.size, &got));
        }
        for (unsigned slot = offset; slot < SLOTS; slot += 2) {
            struct shim_range range = range_at(slot), got;
            CHECK(!shim_map_remove(&shim_memory_map, range.base + 1, NULL));
            CHECK(shim_map_remove(&shim_memory_map, range.base, &got) && memcmp(&got, &range, sizeof got) == 0);
            CHECK(!shim_map_remove(&shim_memory_map, range.base, NULL));
        }
    }
    return NULL;
}

static void *copier(void *argument)
{
    unsigned seed = (unsigned)(uintptr_t)argument;
    size_t size = (5 << 20) + 12345 * seed;
    uint8_t *from = malloc(size), *to = malloc(size);
    for (unsigned round = 0; round < 12; round++) {
        for (size_t i = 0; i < size; i += 97) from[i] = (uint8_t)(i * 31 + round + seed);
        memset(to, 0, size);
        memory_copy_bytes(to, from, size);
        bool same = true;
        for (size_t i = 0; i < size; i += 97) same = same && to[i] == from[i];
        CHECK(same);
    }
    free(from);
    free(to);
    return NULL;
}

/* Each place in a line, each length to some lines; nothing beyond is touched. */
static void uncached(void)
{
    static uint8_t from[1024], to[1024], expected[1024];
    for (size_t i = 0; i < sizeof from; i++) from[i] = (uint8_t)(i * 7 + i / 256 + 1);
    for (size_t start = 0; start < 70; start++)
        for (size_t size = 0; size < 270; size += size < 130 ? 1 : 13) {
            memset(to, 0, sizeof to);
            memset(expected, 0, sizeof expected);
            memcpy(expected + 3, from + start, size);
            memory_copy_uncached(to + 3, from + start, size);
            CHECK(memcmp(to, expected, sizeof to) == 0);
        }
}

static void copy_by_threads(void)
{
    pthread_t copiers[3];
    for (uintptr_t i = 0; i < 3; i++) pthread_create(&copiers[i], NULL, copier, (void *)i);
    for (int i = 0; i < 3; i++) pthread_join(copiers[i], NULL);
}

int main(void)
{
    pthread_t readers[THREADS], writers[2];
    for (uintptr_t i = 0; i < 2; i++) pthread_create(&writers[i], NULL, writer, (void *)i);
    for (uintptr_t i = 0; i < THREADS; i++) pthread_create(&readers[i], NULL, reader, (void *)(i + 1));
    for (int i = 0; i < 2; i++) pthread_join(writers[i], NULL);
    struct shim_range last = range_at(0);
    shim_map_add(&shim_memory_map, &last);
    atomic_store(&stop, 1);
    for (int i = 0; i < THREADS; i++) pthread_join(readers[i], NULL);
    copy_by_threads();
    shim.uncached = true;
    copy_by_threads();
    uncached();
    printf("%s\n", atomic_load(&failures) == 0 ? "all as expected" : "FAILED");
    return atomic_load(&failures) != 0;
}
