/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fence.c - fence words: 64-bit words of the segment that the GPU (or the worker) raises to a value when the work before
 * it is done.
 *
 * A word is owned by one waiter at a time and only ever grows, so a value says exactly one moment. Each thread keeps one
 * free word of its own: a synchronisation then takes no lock. Word 0 means "no fence" on the wire and is never handed out.
 */
#include "core.h"

#define FENCE_LIMIT 65536u /* more than any layout has; bounds the private table */

/* What a word reads where a VM's device has been unplugged: no value that a fence ever gets. */
#define NOBODY UINT64_MAX

static struct {
    struct shim_lock lock;
    uint32_t count;      /* words there are */
    uint32_t fresh;      /* words from here on were never handed out */
    uint32_t free_count; /* in `free` */
    uint32_t free[FENCE_LIMIT];
    uint64_t value[FENCE_LIMIT]; /* the last value promised for a word; owned by who holds the word */
} fences;

/* arena.c: gives back words whose staging buffers are done. */
__attribute__((weak)) extern void shim_arena_collect(void);

void shim_fence_attach(void)
{
    fences.count = shim.page->fence_count < FENCE_LIMIT ? shim.page->fence_count : FENCE_LIMIT;
    fences.fresh = 1;
    fences.free_count = 0;
}

static uint32_t take_word(void)
{
    uint32_t index = 0;
    shim_lock_take(&fences.lock);
    if (fences.free_count > 0)
        index = fences.free[--fences.free_count];
    else if (fences.fresh < fences.count)
        index = fences.fresh++;
    shim_lock_give(&fences.lock);
    return index;
}

CUresult shim_fence_new(struct shim_fence *fence)
{
    struct shim_thread_block *block = shim_block();
    uint32_t index = block->fence;
    block->fence = 0;
    if (SHIM_UNLIKELY(index == 0)) index = take_word();
    if (SHIM_UNLIKELY(index == 0) && shim_arena_collect != NULL) {
        shim_arena_collect();
        index = take_word();
    }
    if (SHIM_UNLIKELY(index == 0)) return CUDA_ERROR_OUT_OF_MEMORY;
    uint64_t held = __atomic_load_n(&shim.fences[index], __ATOMIC_RELAXED);
    if (held > fences.value[index]) fences.value[index] = held;
    fence->index = index;
    fence->value = ++fences.value[index];
    return CUDA_SUCCESS;
}

bool shim_fence_done(const struct shim_fence *fence)
{
    /* SAFETY: acquire pairs with the store by the GPU or the worker: what the fenced work wrote is visible after it. */
    uint64_t now = __atomic_load_n(&shim.fences[fence->index], __ATOMIC_ACQUIRE);
    if (now < fence->value || SHIM_UNLIKELY(now == NOBODY)) return false;
    if (SHIM_UNLIKELY(shim.combining)) __builtin_ia32_mfence(); /* nothing of pinned memory has been fetched ahead of it (pci_map.c) */
    return true;
}

static bool not_done(const void *argument) { return !shim_fence_done(argument); }

CUresult shim_fence_wait(const struct shim_fence *fence)
{
    struct shim_waiter waiter = {0};
    while (!shim_fence_done(fence)) {
        CUresult status = shim_wait_step(&waiter, SHIM_WAIT_FENCE, not_done, fence);
        if (status != CUDA_SUCCESS) return status;
    }
    shim_wait_end(&waiter, SHIM_WAIT_FENCE);
    return CUDA_SUCCESS;
}

void shim_fence_free(const struct shim_fence *fence)
{
    struct shim_thread_block *block = shim_block();
    if (fence->index == 0 || !shim_fence_done(fence)) return; /* the session is dead: the word may still be written */
    if (block->fence == 0) {
        block->fence = fence->index;
        return;
    }
    shim_fence_give_word(fence->index);
}

void shim_fence_give_word(uint32_t index)
{
    if (index == 0) return;
    shim_lock_take(&fences.lock);
    fences.free[fences.free_count++] = index;
    shim_lock_give(&fences.lock);
}
