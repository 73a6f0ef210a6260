/* SPDX-License-Identifier: Apache-2.0 */
/*
 * thread.c - what a thread of the application carries: its stack of contexts, its own default stream, its capture mode.
 *
 * One pointer lies in thread-local storage of the fast kind, of which a library that is loaded late may only take a few
 * bytes; the block behind it is made at first use and given back when the thread ends.
 */
#include "core.h"
#include "_generated_prototypes.h"

#include <stdio.h>
#include <stdlib.h>

__thread struct shim_thread_block *shim_self __attribute__((tls_model("initial-exec")));

static pthread_key_t key;
static pthread_once_t key_once = PTHREAD_ONCE_INIT;

static void destroy_stream(uint64_t stream)
{
    if (stream != 0 && atomic_load(&shim_phase) == SHIM_READY && shim_handle_valid(VGPU_KIND_STREAM, stream))
        (void)cuStreamDestroy_v2((CUstream)(uintptr_t)stream);
}

static void end_of_thread(void *argument)
{
    struct shim_thread_block *block = argument;
    shim_self = block; /* other libraries' destructors may call CUDA after ours: keep the block until this is done */
    block->ending = true;
    destroy_stream(block->state.per_thread_stream);
    while (block->others != NULL) {
        struct shim_other_stream *other = block->others;
        block->others = other->next;
        destroy_stream(other->stream);
        free(other);
    }
    if (atomic_load(&shim_phase) == SHIM_READY) {
        if (block->local_calls != 0) shim_count_flush(block);
        shim_fence_give_word(block->fence);
    }
    shim_self = NULL;
    free(block);
}

static void make_key(void)
{
    if (pthread_key_create(&key, end_of_thread) != 0) abort();
}

struct shim_thread_block *shim_thread_make(void)
{
    pthread_once(&key_once, make_key);
    struct shim_thread_block *block = calloc(1, sizeof *block);
    if (block == NULL) {
        /* No CUDA call has a way to say that a thread has no memory for its own state. */
        fputs("libcuda: out of memory\n", stderr);
        abort();
    }
    shim_self = block;
    pthread_setspecific(key, block);
    return block;
}

void shim_block_signals(sigset_t *before)
{
    sigset_t all;
    sigfillset(&all); /* the program's signals are not for a thread it does not know of */
    sigdelset(&all, SIGBUS); /* ours (pci_watch.c): a fault while it is blocked ends the process */
    pthread_sigmask(SIG_SETMASK, &all, before);
}

struct shim_thread *shim_thread(void) { return &shim_block()->state; }

/* The child is a new process to CUDA: its one thread has no context. */
void shim_thread_fork_child(void)
{
    if (shim_self != NULL) {
        shim_self->state.depth = 0;
        shim_self->state.per_thread_stream = shim_self->state.per_thread_context = 0;
        shim_self->fence = shim_self->local_calls = 0;
        shim_self->others = NULL;
    }
}

uint64_t shim_current_context_id(void)
{
    const struct shim_thread *thread = &shim_block()->state;
    return SHIM_LIKELY(thread->depth != 0) ? thread->context[thread->depth - 1] : 0;
}

/* ---- the thread's own default stream ---- */

/* Puts the stream of `context` into the quick place, and what was there aside. */
static bool swap_streams(struct shim_thread_block *block, uint64_t context)
{
    struct shim_other_stream **place = &block->others;
    while (*place != NULL && (*place)->context != context) place = &(*place)->next;
    struct shim_other_stream *found = *place;
    uint64_t stream = found != NULL ? found->stream : 0;
    if (found != NULL) {
        *place = found->next;
        free(found);
    }
    if (block->state.per_thread_stream != 0) {
        struct shim_other_stream *aside = malloc(sizeof *aside);
        if (aside == NULL) return false;
        *aside = (struct shim_other_stream){block->state.per_thread_context, block->state.per_thread_stream, block->others};
        block->others = aside;
    }
    block->state.per_thread_context = context;
    block->state.per_thread_stream = stream;
    return true;
}

static CUresult own_stream(uint64_t *id)
{
    struct shim_thread_block *block = shim_block();
    uint64_t context = shim_current_context_id();
    if (context == 0) return CUDA_ERROR_INVALID_CONTEXT;
    if (SHIM_UNLIKELY(block->state.per_thread_context != context) && !swap_streams(block, context)) return CUDA_ERROR_OUT_OF_MEMORY;
    if (SHIM_UNLIKELY(block->state.per_thread_stream == 0 || !shim_handle_valid(VGPU_KIND_STREAM, block->state.per_thread_stream))) {
        if (block->ending) return CUDA_ERROR_INVALID_HANDLE;
        /* A blocking stream: CU_STREAM_PER_THREAD does synchronise with the legacy stream. */
        CUstream stream = NULL;
        bool saved = block->state.default_is_per_thread;
        block->state.default_is_per_thread = false;
        CUresult status = cuStreamCreate((void *)&stream, 0);
        block->state.default_is_per_thread = saved;
        if (status != CUDA_SUCCESS) return status;
        block->state.per_thread_stream = (uint64_t)(uintptr_t)stream;
    }
    *id = block->state.per_thread_stream;
    return CUDA_SUCCESS;
}

CUresult shim_stream(CUstream stream, uint64_t *id)
{
    if (stream == NULL) return shim_default_stream(id);
    if (stream == CU_STREAM_LEGACY) {
        *id = 0;
        return CUDA_SUCCESS;
    }
    if (stream == CU_STREAM_PER_THREAD) return own_stream(id);
    if (SHIM_UNLIKELY(!shim_handle_valid(VGPU_KIND_STREAM, (uint64_t)(uintptr_t)stream))) return CUDA_ERROR_INVALID_HANDLE;
    *id = (uint64_t)(uintptr_t)stream;
    return CUDA_SUCCESS;
}

CUresult shim_default_stream(uint64_t *id)
{
    if (SHIM_UNLIKELY(shim_block()->state.default_is_per_thread)) return own_stream(id);
    *id = 0;
    return CUDA_SUCCESS;
}
