/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Threads that use context-local storage and the compile cache as hard as they can; built with ThreadSanitizer by its test,
 * with fake_libcuda.c for the hooks.  Exits with 0 if every invariant held, 1 with a message otherwise.
 * CUDA_CACHE_PATH and a small CUDA_CACHE_MAXSIZE come from the test, so that entries are evicted all the time.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "context_storage.h"
#include "jit_cache.h"

enum { THREADS = 6, ROUNDS = 400, CONTEXTS = 3, KEYS = 5, INPUTS = 12, LARGEST = 3000 };

static atomic_int given;   /* values put */
static atomic_int freed;   /* by a destructor or by the deleter */
static char keys[THREADS * KEYS];
static char contexts[CONTEXTS];

static void fail(const char *what)
{
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static void destroy(CUcontext context, void *key, void *value)
{
    void *found;
    /* Re-entering must not deadlock; whether another thread has put a new value meanwhile is open. */
    (void)vgpu_context_storage_get(&found, context, key);
    if (*(int *)value != 4711)
        fail("a destructor got a value that was freed before");
    *(int *)value = 0;
    free(value);
    atomic_fetch_add(&freed, 1);
}

static void *use_storage(void *argument)
{
    unsigned seed = (unsigned)(size_t)argument;
    for (int round = 0; round < ROUNDS; round++) {
        CUcontext context = (CUcontext)(void *)&contexts[rand_r(&seed) % CONTEXTS];
        /* Each thread has keys of its own, as runtime copies do: who deletes its key is the one who put it. */
        void *key = keys + KEYS * (size_t)argument + rand_r(&seed) % KEYS;
        void *found = NULL;
        uint32_t number = 0;
        switch (rand_r(&seed) % 8) {
        case 0:
            vgpu_context_storage_drop(context);
            break;
        case 1:
            /* The value a delete takes away is the deleter's, unless a drop was faster: then it is the destructor's. */
            if (vgpu_context_storage_get(&found, context, key) == CUDA_SUCCESS &&
                vgpu_context_storage_delete(context, key) == CUDA_SUCCESS) {
                free(found);
                atomic_fetch_add(&freed, 1);
            }
            break;
        case 2:
            if (vgpu_context_storage_number(context, &number) != CUDA_SUCCESS || number == 0)
                fail("a context without a number");
            break;
        default:
            if (vgpu_context_storage_get(&found, context, key) == CUDA_SUCCESS)
                break;
            int *value = malloc(sizeof *value);
            *value = 4711;
            if (vgpu_context_storage_put(context, key, value, destroy) != CUDA_SUCCESS)
                fail("put");
            atomic_fetch_add(&given, 1);
            break;
        }
    }
    return NULL;
}

static size_t fill(char *buffer, int input)
{
    size_t size = (size_t)(100 + input * 200) % LARGEST;
    memset(buffer, 'a' + input, size);
    return size;
}

static void *use_cache(void *argument)
{
    unsigned seed = 99 + (unsigned)(size_t)argument;
    char expected[LARGEST];
    for (int round = 0; round < ROUNDS; round++) {
        int input = rand_r(&seed) % INPUTS;
        size_t expected_size = fill(expected, input);
        void *key = NULL;
        if (vgpu_jit_cache_open(&key, 2, &input, sizeof input, "-arch", "HOST64", "stamp", 90) != CUDA_SUCCESS)
            fail("open");
        void *data = NULL;
        uint32_t size = 0;
        CUresult result = vgpu_jit_cache_find(key, 0, &data, &size);
        if (result == CUDA_SUCCESS) {
            if (size != expected_size || memcmp(data, expected, size) != 0)
                fail("the cache gave other data than was stored");
            if (vgpu_jit_cache_release(data) != CUDA_SUCCESS)
                fail("release");
        } else if (result != CUDA_ERROR_NOT_FOUND) {
            fail("find");
        } else if (vgpu_jit_cache_store(key, 0, expected, expected_size) != CUDA_SUCCESS) {
            fail("store");
        }
        if (vgpu_jit_cache_close(key) != CUDA_SUCCESS)
            fail("close");
    }
    return NULL;
}

int main(void)
{
    pthread_t threads[2 * THREADS];
    for (size_t i = 0; i < THREADS; i++) {
        if (pthread_create(&threads[i], NULL, use_storage, (void *)i) != 0 ||
            pthread_create(&threads[THREADS + i], NULL, use_cache, (void *)i) != 0)
            fail("pthread_create");
    }
    for (size_t i = 0; i < 2 * THREADS; i++)
        pthread_join(threads[i], NULL);
    for (size_t i = 0; i < CONTEXTS; i++)
        vgpu_context_storage_drop((CUcontext)(void *)&contexts[i]);
    if (atomic_load(&given) == 0 || atomic_load(&given) != atomic_load(&freed))
        fail("a value was freed twice or never");
    struct vgpu_jit_cache_statistics statistics;
    vgpu_jit_cache_read_statistics(&statistics);
    if (statistics.lent != 0 || statistics.stores == 0 || statistics.evictions == 0 || statistics.memory_hits == 0)
        fail("the cache was not exercised as meant");
    printf("%d values, %llu stores, %llu evictions, %llu + %llu hits\n", atomic_load(&given),
           (unsigned long long)statistics.stores, (unsigned long long)statistics.evictions,
           (unsigned long long)statistics.memory_hits, (unsigned long long)statistics.file_hits);
    return 0;
}
