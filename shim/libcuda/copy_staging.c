/* SPDX-License-Identifier: Apache-2.0 */
/*
 * copy_staging.c - copies of pageable memory, through pieces of the arena.
 *
 * Up: the bytes are read before the call returns, as CUDA does for pageable memory. A few travel in the record
 * itself, which the worker takes over at once. Longer ones, for which that would be three copies, fill a few staging buffers in turn, each
 * reused when the fence behind its DMA is done, so that filling and DMA overlap.
 * Down: the same the other way round, and the call returns when the destination holds the bytes.
 */
#include "memory.h"

#include <stdlib.h>

#define SLOTS 4
#define PIECES_IN_ARENA 16
#define INLINE_MOST 16384u
#define CHUNK_MOST (4ull << 20)
#define CHUNK_LEAST (256ull << 10)
#define CHUNK_LEAST_OF_ALL (64ull << 10) /* where the arena is small */
#define SMALL MEMORY_RESERVE_BYTES
#define SMALL_LEAST 8192u

struct slot {
    uint8_t *buffer;
    uint64_t offset, at, size;
    struct shim_fence fence;
    bool busy;
};

uint64_t memory_piece(uint64_t usual, uint64_t least)
{
    uint64_t share = (shim.arena_size / PIECES_IN_ARENA) & ~4095ull;
    return share >= usual ? usual : share > least ? share : least;
}

static uint64_t chunk_for(uint64_t size)
{
    uint64_t chunk = (size / SLOTS + 4095) & ~4095ull, most = memory_piece(CHUNK_MOST, CHUNK_LEAST_OF_ALL);
    uint64_t least = most < CHUNK_LEAST ? most : CHUNK_LEAST;
    return chunk < least ? least : chunk > most ? most : chunk;
}

/* Staging of `size` bytes for one transfer, or what the arena still has. */
static unsigned make_slots(struct slot *slots, uint64_t size, uint64_t chunk)
{
    unsigned count = 0;
    for (uint64_t covered = 0; count < SLOTS && covered < size; covered += chunk, count++) {
        slots[count] = (struct slot){0};
        uint64_t bytes = size - covered < chunk ? size - covered : chunk;
        slots[count].buffer = shim_arena_allocate(bytes, 4096, &slots[count].offset);
        if (slots[count].buffer == NULL) break;
    }
    return count;
}

static CUresult upload_inline(uint64_t destination, const uint8_t *source, uint64_t size, uint64_t stream)
{
    CUresult status = CUDA_SUCCESS;
    for (uint64_t at = 0; at < size && status == CUDA_SUCCESS; at += VGPU_INLINE_LIMIT) {
        uint64_t bytes = size - at < VGPU_INLINE_LIMIT ? size - at : VGPU_INLINE_LIMIT;
        const uint64_t argument[8] = {destination + at, bytes, stream};
        status = memory_submit(VGPU_CALL_wireCopyInline, argument, source + at, (uint32_t)bytes);
    }
    return status;
}

/* Ends a slot's use: staging under way goes back when its fence is done. */
static void retire(struct slot *slot)
{
    if (slot->busy)
        shim_arena_free_after(slot->buffer, &slot->fence);
    else
        shim_arena_free(slot->buffer);
}

static CUresult settle(struct slot *slot)
{
    if (!slot->busy) return CUDA_SUCCESS;
    CUresult status = shim_fence_wait(&slot->fence);
    if (status != CUDA_SUCCESS) return status;
    shim_fence_free(&slot->fence);
    slot->busy = false;
    return CUDA_SUCCESS;
}

CUresult memory_upload(uint64_t destination, const uint8_t *source, uint64_t size, uint64_t stream)
{
    if (size <= INLINE_MOST) return upload_inline(destination, source, size, stream);
    struct slot slots[SLOTS];
    uint64_t chunk = chunk_for(size);
    unsigned count = make_slots(slots, size, chunk);
    if (count == 0) return upload_inline(destination, source, size, stream); /* no staging to be had: slower, not refused */
    CUresult status = CUDA_SUCCESS;
    uint64_t at = 0;
    for (unsigned turn = 0; at < size && status == CUDA_SUCCESS; turn++) {
        struct slot *slot = &slots[turn % count];
        uint64_t bytes = size - at < chunk ? size - at : chunk;
        if ((status = settle(slot)) != CUDA_SUCCESS) break;
        memory_copy_bytes(slot->buffer, source + at, bytes);
        if ((status = shim_fence_new(&slot->fence)) != CUDA_SUCCESS) break;
        const uint64_t argument[8] = {destination + at, slot->offset, bytes, stream, slot->fence.index, slot->fence.value};
        slot->busy = true;
        status = memory_submit(VGPU_CALL_wireCopyToDevice, argument, NULL, 0);
        at += bytes;
    }
    for (unsigned i = 0; i < count; i++)
        retire(&slots[i]);
    return status;
}

/* ---- down ---- */

/* A thread keeps one small buffer: reading back a few bytes is the commonest synchronous call there is. */
struct keep { uint8_t *buffer; uint64_t offset, size; };
static __thread struct keep *kept;
static pthread_key_t kept_key;
static pthread_once_t kept_once = PTHREAD_ONCE_INIT;

static void drop_kept(void *argument)
{
    struct keep *keep = argument;
    if (!shim_is_torn_down()) shim_arena_free(keep->buffer);
    free(keep);
    kept = NULL;
}

static void make_kept_key(void)
{
    if (pthread_key_create(&kept_key, drop_kept) != 0) abort();
}

static struct keep *small_buffer(void)
{
    if (kept != NULL) return kept;
    pthread_once(&kept_once, make_kept_key);
    struct keep *keep = malloc(sizeof *keep);
    if (keep == NULL) return NULL;
    keep->size = memory_piece(SMALL, SMALL_LEAST);
    keep->buffer = shim_arena_allocate(keep->size, 4096, &keep->offset);
    if (keep->buffer == NULL) {
        free(keep);
        return NULL;
    }
    pthread_setspecific(kept_key, keep);
    kept = keep;
    return keep;
}

static CUresult request(struct slot *slot, uint64_t source, uint64_t stream)
{
    CUresult status = shim_fence_new(&slot->fence);
    if (status != CUDA_SUCCESS) return status;
    const uint64_t argument[8] = {slot->offset, source + slot->at, slot->size, stream, slot->fence.index, slot->fence.value};
    slot->busy = true;
    return memory_submit(VGPU_CALL_wireCopyFromDevice, argument, NULL, 0);
}

/* The arena is used up: one buffer for all threads, which therefore take turns, waits and all. Nothing else holds this
 * lock, and a thread that waits under it waits for its own copy only. */
static pthread_mutex_t reserve_lock = PTHREAD_MUTEX_INITIALIZER;

void *memory_reserve_take(uint64_t *offset)
{
    void *buffer = memory_reserve_buffer(offset);
    if (buffer != NULL) pthread_mutex_lock(&reserve_lock);
    return buffer;
}

void memory_reserve_give(void) { pthread_mutex_unlock(&reserve_lock); }

static CUresult download_small(uint8_t *destination, uint64_t source, uint64_t size, uint64_t stream)
{
    struct keep *keep = small_buffer(), shared;
    bool last_resort = keep == NULL;
    if (last_resort) {
        keep = &shared;
        keep->size = SMALL;
        keep->buffer = memory_reserve_take(&keep->offset);
        if (keep->buffer == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    }
    CUresult status = CUDA_SUCCESS;
    for (uint64_t at = 0; at < size && status == CUDA_SUCCESS; at += keep->size) {
        struct slot slot = {.buffer = keep->buffer, .offset = keep->offset, .at = at, .size = size - at < keep->size ? size - at : keep->size};
        status = request(&slot, source, stream);
        if (status == CUDA_SUCCESS) status = settle(&slot);
        if (status == CUDA_SUCCESS) memory_fetch(destination + at, slot.buffer, slot.size);
    }
    if (last_resort) memory_reserve_give();
    return status;
}

CUresult memory_download(uint8_t *destination, uint64_t source, uint64_t size, uint64_t stream)
{
    if (size <= SMALL) return download_small(destination, source, size, stream);
    struct slot slots[SLOTS];
    uint64_t chunk = chunk_for(size);
    unsigned count = make_slots(slots, size, chunk);
    if (count == 0) return download_small(destination, source, size, stream);
    CUresult status = CUDA_SUCCESS;
    uint64_t asked = 0, got = 0;
    unsigned ask = 0, take = 0;
    while (got < size && status == CUDA_SUCCESS) {
        while (asked < size && ask - take < count && status == CUDA_SUCCESS) {
            struct slot *slot = &slots[ask++ % count];
            slot->at = asked;
            slot->size = size - asked < chunk ? size - asked : chunk;
            asked += slot->size;
            status = request(slot, source, stream);
        }
        if (status != CUDA_SUCCESS) break;
        struct slot *slot = &slots[take++ % count];
        if ((status = settle(slot)) != CUDA_SUCCESS) break;
        memory_copy_bytes(destination + slot->at, slot->buffer, slot->size);
        got += slot->size;
    }
    for (unsigned i = 0; i < count; i++)
        retire(&slots[i]);
    return status;
}
