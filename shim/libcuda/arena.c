/* SPDX-License-Identifier: Apache-2.0 */
/*
 * arena.c - an allocator over the part of the shared arena that the host has registered with its driver.
 *
 * Pinned allocations of the application and the staging of copies live here, so their bytes move by DMA
 * and never through a socket. The registered part grows from the arena's start: in steps for staging, by
 * exactly the size for a big pinned allocation. A block never crosses the border of two registrations,
 * because the driver refuses a copy that does.
 *
 * A long piece that becomes wholly free is given back: unregistered, and its pages returned to the system.
 *
 * Bookkeeping is outside the shared memory (an application that overruns a pinned buffer must not break
 * it). Blocks are whole pages; free ones hang in lists by the power of two of their length. Nothing here
 * waits while it holds the lock; only growth, which is rare, is a round trip, under a lock of its own.
 */
#include "memory.h"

#include <stdlib.h>
#include <sys/mman.h>

#define PAGE 4096ull
#define GROWTH (64ull << 20)
#define BIG (2ull << 20) /* growth is a multiple of this, so that registrations stay few and aligned */
#define RETURNED (128ull << 20) /* pieces from this size on are given back when free */
#define BINS 40
#define FENCED_LIMIT 256
#define NO_ARENA UINT64_MAX

struct block {
    uint64_t page, pages;        /* from the arena's start */
    bool used, first, last;      /* first and last of its registration: no neighbour on that side */
    struct block *before, *after; /* free list */
};

/* A part below `registered` that is not registered at present. */
struct hole {
    uint64_t start, size;
    struct hole *next;
};

struct fenced {
    void *pointer;
    struct shim_fence fence;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t growth_lock = PTHREAD_MUTEX_INITIALIZER;
static struct block *bins[BINS];
static struct block **block_of_page; /* set for the first and the last page of a block; sparse */
static uint64_t registered;          /* bytes from the arena's start, holes included */
static struct hole *holes;
static uint64_t growths; /* how often a piece was added: what a thread that found nothing compares */
static bool ready;

/* Staging given back before its copy is done, oldest first. */
static struct fenced fenced[FENCED_LIMIT];
static unsigned fenced_count;

static unsigned bin_of(uint64_t pages)
{
    return pages == 0 ? 0 : 63u - (unsigned)__builtin_clzll(pages);
}

static void bin_remove(struct block *b)
{
    if (b->before != NULL)
        b->before->after = b->after;
    else
        bins[bin_of(b->pages)] = b->after;
    if (b->after != NULL) b->after->before = b->before;
}

static void bin_insert(struct block *b)
{
    struct block **head = &bins[bin_of(b->pages)];
    b->before = NULL;
    b->after = *head;
    if (b->after != NULL) b->after->before = b;
    *head = b;
}

static void mark(struct block *b)
{
    block_of_page[b->page] = b;
    block_of_page[b->page + b->pages - 1] = b;
}

/* A newly registered piece becomes one free block. Under the lock. */
static bool add_piece(uint64_t start, uint64_t size)
{
    struct block *b = calloc(1, sizeof *b);
    if (b == NULL) return false;
    b->page = start / PAGE;
    b->pages = size / PAGE;
    b->first = b->last = true;
    mark(b);
    bin_insert(b);
    return true;
}

static struct block *find(uint64_t pages);

static bool prepare(void)
{
    if (ready) return true;
    if (shim.arena == NULL || shim.arena_size < PAGE) return false;
    uint64_t pages = shim.arena_size / PAGE;
    void *map = mmap(NULL, pages * sizeof *block_of_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) return false;
    block_of_page = map;
    registered = shim.page->arena_registered;
    if (registered > shim.arena_size) registered = shim.arena_size;
    registered &= ~(PAGE - 1);
    ready = registered == 0 || add_piece(0, registered);
    return ready;
}

/* The one buffer that pinned allocations cannot take: what copies fall back on when the arena is used up. */
static struct block *reserve;

static void keep_reserve(void)
{
    if (reserve == NULL) reserve = find(MEMORY_RESERVE_BYTES / PAGE);
}

void *memory_reserve_buffer(uint64_t *offset)
{
    pthread_mutex_lock(&lock);
    struct block *b = reserve;
    pthread_mutex_unlock(&lock);
    if (b == NULL) return NULL;
    *offset = shim.arena_offset + b->page * PAGE;
    return shim.arena + b->page * PAGE;
}

/* Cuts `pages` from the front of a free block that has at least as many. Under the lock. */
static struct block *carve(struct block *b, uint64_t pages)
{
    bin_remove(b);
    if (b->pages > pages) {
        struct block *rest = calloc(1, sizeof *rest);
        if (rest == NULL) { /* out of memory: hand out the whole block */
            b->used = true;
            return b;
        }
        rest->page = b->page + pages;
        rest->pages = b->pages - pages;
        rest->last = b->last;
        b->pages = pages;
        b->last = false;
        mark(rest);
        bin_insert(rest);
    }
    b->used = true;
    mark(b);
    return b;
}

static struct block *find(uint64_t pages)
{
    for (unsigned bin = bin_of(pages); bin < BINS; bin++)
        for (struct block *b = bins[bin]; b != NULL; b = b->after)
            if (b->pages >= pages) return carve(b, pages);
    return NULL;
}

static struct block *give_back(struct block *b)
{
    b->used = false;
    if (!b->last) {
        struct block *next = block_of_page[b->page + b->pages];
        if (!next->used) {
            bin_remove(next);
            b->pages += next->pages;
            b->last = next->last;
            free(next);
        }
    }
    if (!b->first) {
        struct block *previous = block_of_page[b->page - 1];
        if (!previous->used) {
            bin_remove(previous);
            previous->pages += b->pages;
            previous->last = b->last;
            free(b);
            b = previous;
        }
    }
    mark(b);
    bin_insert(b);
    return b;
}

static struct block *block_at(const void *pointer)
{
    uint64_t offset = (uint64_t)((const uint8_t *)pointer - shim.arena);
    if (!ready || (const uint8_t *)pointer < shim.arena || offset >= registered || offset % PAGE != 0) return NULL;
    struct block *b = block_of_page[offset / PAGE];
    return b != NULL && b->used && b->page == offset / PAGE ? b : NULL;
}

/* Takes back staging whose fence is done. Under the lock; frees the fences after it. */
static unsigned collect(struct shim_fence *done, unsigned limit)
{
    unsigned count = 0, kept = 0;
    for (unsigned i = 0; i < fenced_count; i++) {
        if (count < limit && shim_fence_done(&fenced[i].fence)) {
            struct block *b = block_at(fenced[i].pointer);
            if (b != NULL) give_back(b);
            done[count++] = fenced[i].fence;
        } else {
            fenced[kept++] = fenced[i];
        }
    }
    fenced_count = kept;
    return count;
}

#define COLLECT_AT_ONCE 64
/* Gives back staging whose copy is done, and its fence words; fence.c asks for it when it runs short of words. */
void shim_arena_collect(void)
{
    struct shim_fence done[COLLECT_AT_ONCE];
    pthread_mutex_lock(&lock);
    unsigned count = fenced_count == 0 ? 0 : collect(done, COLLECT_AT_ONCE);
    pthread_mutex_unlock(&lock);
    for (unsigned i = 0; i < count; i++)
        shim_fence_free(&done[i]);
}

/* Takes a hole of at least `size` bytes out of the list, cut to it; else the end of the registered part. Under the lock. */
static uint64_t place_for(uint64_t *size, struct hole **taken)
{
    for (struct hole **at = &holes; *at != NULL; at = &(*at)->next) {
        struct hole *hole = *at;
        if (hole->size < *size) continue;
        uint64_t start = hole->start;
        *taken = NULL;
        if (hole->size == *size) {
            *at = hole->next;
            *taken = hole;
        } else {
            hole->start += *size;
            hole->size -= *size;
        }
        return start;
    }
    if (*size > shim.arena_size - registered) *size = (shim.arena_size - registered) & ~(PAGE - 1);
    registered += *size; /* nobody else may have it meanwhile */
    return registered - *size;
}

static void add_hole(uint64_t start, uint64_t size, struct hole *hole)
{
    if (hole == NULL) hole = malloc(sizeof *hole);
    if (hole == NULL) return; /* lost until the process ends */
    *hole = (struct hole){start, size, holes};
    holes = hole;
}

/* Asks the host to register more. True if there is more now, through us or through somebody who was faster. */
static bool grow(uint64_t bytes, uint64_t seen)
{
    bool grown = false;
    pthread_mutex_lock(&growth_lock);
    pthread_mutex_lock(&lock);
    if (growths != seen) {
        grown = true;
        pthread_mutex_unlock(&lock);
    } else {
        uint64_t size = (bytes + BIG - 1) / BIG * BIG;
        if (size < GROWTH) size = GROWTH;
        struct hole *taken = NULL;
        uint64_t start = place_for(&size, &taken);
        pthread_mutex_unlock(&lock);
        const uint64_t argument[8] = {start, size}; /* from the arena's start, unlike the offsets of copies */
        bool done = size >= bytes &&
                    shim_reply(VGPU_CALL_wireArenaRegister, argument, NULL, 0, NULL, NULL, 0, NULL) == CUDA_SUCCESS;
        pthread_mutex_lock(&lock);
        grown = done && add_piece(start, size);
        if (grown) {
            growths++;
            free(taken);
        } else if (start + size == registered) {
            registered = start;
            free(taken);
        } else {
            add_hole(start, size, taken);
        }
        pthread_mutex_unlock(&lock);
    }
    pthread_mutex_unlock(&growth_lock);
    return grown;
}

/* Unregisters a free piece and gives its pages back. The block has been taken out of its list. */
static void give_to_system(struct block *piece)
{
    uint64_t start = piece->page * PAGE, size = piece->pages * PAGE;
    const uint64_t argument[8] = {start, size};
    bool done = shim_reply(VGPU_CALL_wireArenaUnregister, argument, NULL, 0, NULL, NULL, 0, NULL) == CUDA_SUCCESS;
    if (done) (void)madvise(shim.arena + start, size, MADV_REMOVE);
    pthread_mutex_lock(&lock);
    if (done) {
        block_of_page[piece->page] = block_of_page[piece->page + piece->pages - 1] = NULL;
        free(piece);
        add_hole(start, size, NULL);
    } else {
        piece->used = false;
        mark(piece);
        bin_insert(piece);
    }
    pthread_mutex_unlock(&lock);
}

static void *allocate(uint64_t pages, uint64_t *offset, uint64_t *seen)
{
    void *pointer = NULL;
    pthread_mutex_lock(&lock);
    bool usable = prepare();
    if (usable) {
        keep_reserve();
        struct block *b = find(pages);
        if (b != NULL) {
            pointer = shim.arena + b->page * PAGE;
            *offset = shim.arena_offset + b->page * PAGE;
        }
    }
    *seen = usable ? growths : NO_ARENA;
    pthread_mutex_unlock(&lock);
    return pointer;
}

void *shim_arena_allocate(size_t size, size_t alignment, uint64_t *offset)
{
    uint64_t ignored, seen;
    if (offset == NULL) offset = &ignored;
    /* Pages are aligned as far as anybody asks; more is had by asking for more, which nobody does. */
    if (size == 0 || size > shim.arena_size || alignment > PAGE) return NULL;
    uint64_t pages = (size + PAGE - 1) / PAGE;
    shim_arena_collect();
    for (;;) {
        void *pointer = allocate(pages, offset, &seen);
        if (pointer != NULL) return pointer;
        if (seen == NO_ARENA || !grow(pages * PAGE, seen)) break;
    }
    /* Nothing can be added: staging of copies under way is what may still come back. Another thread may collect the
     * fence we wait for; its word then holds that value or a larger one, so the wait ends all the same. */
    for (;;) {
        pthread_mutex_lock(&lock);
        bool any = fenced_count > 0;
        struct shim_fence oldest = any ? fenced[0].fence : (struct shim_fence){0};
        pthread_mutex_unlock(&lock);
        if (!any || shim_fence_wait(&oldest) != CUDA_SUCCESS) return NULL;
        shim_arena_collect();
        void *pointer = allocate(pages, offset, &seen);
        if (pointer != NULL) return pointer;
    }
}

void shim_arena_free(void *pointer)
{
    if (pointer == NULL) return;
    struct block *whole = NULL;
    pthread_mutex_lock(&lock);
    struct block *b = block_at(pointer);
    if (b != NULL) {
        b = give_back(b);
        if (b->first && b->last && b->page != 0 && b->pages * PAGE >= RETURNED) {
            bin_remove(b);
            b->used = true;
            whole = b;
        }
    }
    pthread_mutex_unlock(&lock);
    if (whole != NULL) give_to_system(whole);
}

void shim_arena_free_after(void *pointer, const struct shim_fence *fence)
{
    for (;;) {
        pthread_mutex_lock(&lock);
        bool room = fenced_count < FENCED_LIMIT;
        if (room) fenced[fenced_count++] = (struct fenced){pointer, *fence};
        pthread_mutex_unlock(&lock);
        if (room) return;
        /* Full: this copy's own fence is one that will be done. A dead session leaves the block where it is. */
        if (shim_fence_wait(fence) != CUDA_SUCCESS) return;
        shim_fence_free(fence);
        shim_arena_free(pointer);
        return;
    }
}

bool shim_arena_offset(const void *pointer, size_t size, uint64_t *offset)
{
    const uint8_t *p = pointer;
    if (shim.arena == NULL || p < shim.arena) return false;
    uint64_t at = (uint64_t)(p - shim.arena);
    if (at > shim.arena_size || size > shim.arena_size - at) return false;
    *offset = shim.arena_offset + at;
    return true;
}
