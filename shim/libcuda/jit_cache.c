/* SPDX-License-Identifier: Apache-2.0 */
/* The compile cache in memory.  See jit_cache.h. */
#include "jit_cache.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "jit_cache_files.h"

enum { BUCKETS = 1024, KEY_MAGIC = 0x4a4b4559, KIND_CUBIN = 1, KIND_PTX = 2 };

/* Memory is dearer than disk: a long-lived process keeps its most recent kernels and reads others from files. */
#define LARGEST_MEMORY ((uint64_t)256 << 20)

struct key {
    uint32_t magic;
    uint8_t digest[VGPU_SHA256_SIZE];
};

/* In the map, or lent, or both; freed when neither. */
struct entry {
    struct entry *chain;           /* of its bucket */
    struct entry *newer, *older;   /* by last use, while in the map */
    struct entry *next_lent;       /* while lent */
    unsigned lent;                 /* hits not yet released */
    bool mapped;
    uint8_t digest[VGPU_SHA256_SIZE];
    size_t size;
    _Alignas(16) uint8_t data[];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
/* All guarded by lock. */
static struct entry *buckets[BUCKETS];
static struct entry *newest, *oldest;
static struct entry *lent_entries;
static struct vgpu_jit_cache_statistics statistics;

/* The thread's last kind 2 key and the digest of its input; see vgpu_jit_cache_open. */
static _Thread_local struct {
    bool known;
    uint8_t input[VGPU_SHA256_SIZE];
    uint8_t key[VGPU_SHA256_SIZE];
} last_ptx;

static struct entry *make_entry(const uint8_t digest[VGPU_SHA256_SIZE], size_t size)
{
    if (size > SIZE_MAX - sizeof(struct entry))
        return NULL;
    struct entry *entry = malloc(sizeof *entry + size);
    if (entry == NULL)
        return NULL;
    memset(entry, 0, sizeof *entry);
    memcpy(entry->digest, digest, sizeof entry->digest);
    entry->size = size;
    return entry;
}

static struct entry **bucket_of(const uint8_t digest[VGPU_SHA256_SIZE])
{
    uint16_t low;
    memcpy(&low, digest, sizeof low);
    return &buckets[low % BUCKETS];
}

/* Lock held in all of the following. */
static struct entry *find_mapped(const uint8_t digest[VGPU_SHA256_SIZE])
{
    struct entry *entry = *bucket_of(digest);
    while (entry != NULL && memcmp(entry->digest, digest, sizeof entry->digest) != 0)
        entry = entry->chain;
    return entry;
}

static void unlink_use(struct entry *entry)
{
    *(entry->newer != NULL ? &entry->newer->older : &newest) = entry->older;
    *(entry->older != NULL ? &entry->older->newer : &oldest) = entry->newer;
    entry->newer = entry->older = NULL;
}

static void link_newest(struct entry *entry)
{
    entry->older = newest;
    *(newest != NULL ? &newest->newer : &oldest) = entry;
    newest = entry;
}

static void unmap(struct entry *entry)
{
    struct entry **link = bucket_of(entry->digest);
    while (*link != entry)
        link = &(*link)->chain;
    *link = entry->chain;
    unlink_use(entry);
    entry->mapped = false;
    statistics.bytes_in_memory -= entry->size;
    if (entry->lent == 0)
        free(entry);
}

static void map(struct entry *entry)
{
    struct entry **bucket = bucket_of(entry->digest);
    entry->chain = *bucket;
    *bucket = entry;
    link_newest(entry);
    entry->mapped = true;
    statistics.bytes_in_memory += entry->size;
}

static void evict(void)
{
    uint64_t limit = vgpu_jit_cache_limit();
    if (limit > LARGEST_MEMORY)
        limit = LARGEST_MEMORY;
    while (oldest != NULL && statistics.bytes_in_memory > limit) {
        statistics.evictions++;
        unmap(oldest);
    }
}

static void lend(struct entry *entry)
{
    if (entry->lent++ == 0) {
        entry->next_lent = lent_entries;
        lent_entries = entry;
    }
    statistics.lent++;
}

static bool take_back(const void *data)
{
    struct entry **link = &lent_entries;
    while (*link != NULL && (*link)->data != data)
        link = &(*link)->next_lent;
    struct entry *entry = *link;
    if (entry == NULL)
        return false;
    statistics.lent--;
    if (--entry->lent == 0) {
        *link = entry->next_lent;
        if (!entry->mapped)
            free(entry);
    }
    return true;
}

/* Lengths go in front, so that no two different sets of fields give the same bytes. */
static void add_field(struct vgpu_sha256 *hash, const void *data, uint64_t size)
{
    uint64_t length = data != NULL ? size : UINT64_MAX;
    vgpu_sha256_add(hash, &length, sizeof length);
    if (data != NULL)
        vgpu_sha256_add(hash, data, size);
}

static void add_text(struct vgpu_sha256 *hash, const char *text)
{
    add_field(hash, text, text != NULL ? strlen(text) : 0);
}

CUresult vgpu_jit_cache_open(void **key, int kind, const void *input, size_t size, const char *options,
                             const char *host, const char *build_stamp, int sm)
{
    if (key == NULL || (input == NULL && size > 0))
        return CUDA_ERROR_INVALID_VALUE;
    *key = NULL;
    if (shim_is_torn_down())
        return CUDA_ERROR_DEINITIALIZED;
    if (!vgpu_jit_cache_enabled())
        return CUDA_ERROR_NOT_INITIALIZED;
    struct key *opened = calloc(1, sizeof *opened);
    if (opened == NULL)
        return CUDA_ERROR_OUT_OF_MEMORY;
    opened->magic = KEY_MAGIC;
    struct vgpu_sha256 hash;
    uint8_t input_digest[VGPU_SHA256_SIZE];
    vgpu_sha256_start(&hash);
    if (size > 0)
        vgpu_sha256_add(&hash, input, size);
    vgpu_sha256_finish(&hash, input_digest);

    int32_t numbers[2] = {kind, sm};
    vgpu_sha256_start(&hash);
    add_field(&hash, numbers, sizeof numbers);
    add_field(&hash, input_digest, sizeof input_digest);
    add_text(&hash, options);
    add_text(&hash, host);
    add_text(&hash, build_stamp);
    bool follows =
        kind == KIND_CUBIN && last_ptx.known && memcmp(last_ptx.input, input_digest, sizeof input_digest) == 0;
    add_field(&hash, follows ? last_ptx.key : NULL, sizeof last_ptx.key);
    vgpu_sha256_finish(&hash, opened->digest);
    if (kind == KIND_PTX) {
        last_ptx.known = true;
        memcpy(last_ptx.input, input_digest, sizeof last_ptx.input);
        memcpy(last_ptx.key, opened->digest, sizeof last_ptx.key);
    }
    *key = opened;
    return CUDA_SUCCESS;
}

static const struct key *checked(const void *key)
{
    const struct key *opened = key;
    return opened != NULL && opened->magic == KEY_MAGIC ? opened : NULL;
}

CUresult vgpu_jit_cache_close(void *key)
{
    if (checked(key) == NULL)
        return CUDA_ERROR_INVALID_HANDLE;
    ((struct key *)key)->magic = 0;
    free(key);
    return CUDA_SUCCESS;
}

/* Reads an entry from its file; NULL is a miss. */
static struct entry *read_entry(const uint8_t digest[VGPU_SHA256_SIZE])
{
    size_t size;
    int descriptor = vgpu_jit_file_open(digest, &size);
    if (descriptor < 0)
        return NULL;
    struct entry *entry = make_entry(digest, size);
    if (entry == NULL) {
        vgpu_jit_file_discard(descriptor);
        return NULL;
    }
    if (!vgpu_jit_file_read(descriptor, digest, entry->data, size)) {
        free(entry);
        return NULL;
    }
    return entry;
}

CUresult vgpu_jit_cache_find(void *key, int zero, void **data, uint32_t *size)
{
    (void)zero;
    const struct key *opened = checked(key);
    if (opened == NULL)
        return CUDA_ERROR_INVALID_HANDLE;
    if (data == NULL || size == NULL)
        return CUDA_ERROR_INVALID_VALUE;
    pthread_mutex_lock(&lock);
    struct entry *entry = find_mapped(opened->digest);
    if (entry != NULL) {
        statistics.memory_hits++;
    } else {
        pthread_mutex_unlock(&lock);
        struct entry *fresh = read_entry(opened->digest);
        pthread_mutex_lock(&lock);
        entry = find_mapped(opened->digest); /* another thread may have been faster */
        if (entry != NULL) {
            free(fresh);
            statistics.memory_hits++;
        } else if (fresh != NULL) {
            entry = fresh;
            map(entry);
            statistics.file_hits++;
        } else {
            statistics.misses++;
        }
    }
    if (entry != NULL) {
        lend(entry); /* before evict(): a lent entry outlives its place in the map */
        unlink_use(entry);
        link_newest(entry);
        *data = entry->data;
        *size = (uint32_t)entry->size;
        evict();
    }
    pthread_mutex_unlock(&lock);
    return entry != NULL ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult vgpu_jit_cache_store(void *key, int zero, const void *data, size_t size)
{
    (void)zero;
    const struct key *opened = checked(key);
    if (opened == NULL)
        return CUDA_ERROR_INVALID_HANDLE;
    if ((data == NULL && size > 0) || size > UINT32_MAX)
        return CUDA_ERROR_INVALID_VALUE;
    struct entry *entry = make_entry(opened->digest, size);
    if (entry == NULL)
        return CUDA_ERROR_OUT_OF_MEMORY;
    if (size > 0)
        memcpy(entry->data, data, size);
    uint8_t digest[VGPU_SHA256_SIZE];
    memcpy(digest, opened->digest, sizeof digest);
    pthread_mutex_lock(&lock);
    struct entry *earlier = find_mapped(digest);
    if (earlier != NULL)
        unmap(earlier);
    map(entry);
    statistics.stores++;
    evict();
    pthread_mutex_unlock(&lock);
    vgpu_jit_file_write(digest, data, size); /* from the caller's bytes: the entry may be gone by now */
    return CUDA_SUCCESS;
}

CUresult vgpu_jit_cache_release(const void *data)
{
    pthread_mutex_lock(&lock);
    bool released = take_back(data);
    pthread_mutex_unlock(&lock);
    return released ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

void vgpu_jit_cache_read_statistics(struct vgpu_jit_cache_statistics *out)
{
    pthread_mutex_lock(&lock);
    *out = statistics;
    pthread_mutex_unlock(&lock);
}

void vgpu_jit_cache_fork_child(void)
{
    /* The map may have been caught in the middle of a change by another thread of the parent: start empty. */
    pthread_mutex_init(&lock, NULL);
    memset(buckets, 0, sizeof buckets);
    newest = oldest = lent_entries = NULL;
    memset(&statistics, 0, sizeof statistics);
    vgpu_jit_files_fork_child();
}
