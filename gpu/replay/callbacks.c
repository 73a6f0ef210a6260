/* SPDX-License-Identifier: Apache-2.0 */
/*
 * callbacks.c - host functions run in the guest. The driver calls host_call() on a thread of its own when the stream
 * reaches the function; that thread posts an entry in the session page, and sleeps until the guest has run it. It
 * gives up when the session ends, so that a dead guest leaves no thread behind.
 *
 * The guest may scribble over its entries; which are in use is kept here.
 */
#include "internal.h"

#include <linux/futex.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LOOK_AGAIN_NS 100000000l /* a wake can be missed by a guest that plays with the words, not by us for longer */
/* A guest in a VM cannot wake us. So we look: soon at first, for most functions are short, then less and less often. */
#define VM_LOOK_FIRST_NS 20000l
#define VM_LOOK_MOST_NS 1000000l

#define CAPTURED_MOST (1u << 20) /* nodes stay until the session ends, also when their graph does not */

struct replay_host_call {
    struct vgpu_replay *replay;
    uint64_t function, user, stream;
    uint32_t kind;
    bool repeats;
    struct replay_host_call *next;
};

static void nap(uint32_t *word, uint32_t seen, long nanoseconds)
{
    const struct timespec limit = {.tv_nsec = nanoseconds};
    syscall(SYS_futex, word, FUTEX_WAIT, seen, &limit, NULL, 0);
}

static int claim(struct replay_private *private)
{
    _Static_assert(VGPU_CALLBACK_ENTRIES == 64, "one bit an entry");
    uint64_t taken = atomic_load(&private->callbacks_claimed);
    while (~taken != 0) {
        int entry = __builtin_ctzll(~taken);
        if (atomic_compare_exchange_weak(&private->callbacks_claimed, &taken, taken | 1ull << entry))
            return entry;
    }
    return -1;
}

void replay_host_function(struct vgpu_replay *replay, uint32_t kind, uint64_t function, uint64_t user, uint64_t stream, uint32_t status)
{
    struct replay_private *private = replay->private;
    int index;
    while ((index = claim(private)) < 0) { /* as many run already as there are entries */
        if (atomic_load(&private->ended) != 0)
            return;
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    struct vgpu_callback *entry = &replay->page->callback[index];
    entry->kind = kind;
    entry->function = function;
    entry->user = user;
    entry->stream = stream;
    entry->status = status;
    /* SAFETY: release pairs with the guest's acquire load of `state`. */
    atomic_store_explicit(replay_word(&entry->state), VGPU_CALLBACK_POSTED, memory_order_release);
    atomic_fetch_add(replay_word(&replay->page->callback_wake), 1);
    syscall(SYS_futex, &replay->page->callback_wake, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
    long look_again = private->in_vm ? VM_LOOK_FIRST_NS : LOOK_AGAIN_NS;
    for (;;) {
        uint32_t seen = atomic_load_explicit(replay_word(&entry->state), memory_order_acquire);
        if (seen == VGPU_CALLBACK_DONE || atomic_load(&private->ended) != 0)
            break;
        nap(&entry->state, seen, look_again);
        if (private->in_vm && look_again < VM_LOOK_MOST_NS)
            look_again += look_again / 2;
    }
    atomic_store_explicit(replay_word(&entry->state), VGPU_CALLBACK_FREE, memory_order_release);
    atomic_fetch_and(&private->callbacks_claimed, ~(1ull << index));
}

static void host_call(void *user)
{
    struct replay_host_call *call = user;
    replay_host_function(call->replay, call->kind, call->function, call->user, call->stream, call->replay->private->error);
    if (!call->repeats)
        free(call);
}

/* arguments: stream, function, user, kind, the stream as the guest's function is to be told of it */
CUresult replay_wireHostFunction(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *stream;
    if (!replay_stream(replay, call->argument[0], &stream))
        return CUDA_ERROR_INVALID_HANDLE;
    if (call->argument[3] > 1)
        return CUDA_ERROR_INVALID_VALUE;
    struct replay_host_call *node = calloc(1, sizeof *node);
    if (node == NULL)
        return CUDA_ERROR_OUT_OF_MEMORY;
    *node = (struct replay_host_call){.replay = replay,
                                      .function = call->argument[1],
                                      .user = call->argument[2],
                                      .stream = call->argument[4],
                                      .kind = (uint32_t)call->argument[3],
                                      /* A captured function runs once for each launch of its graph, so its node stays. */
                                      .repeats = replay_is_capturing(replay, stream)};
    if (node->repeats && replay->private->captured_count == CAPTURED_MOST) {
        free(node);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    int status = replay->driver.cuLaunchHostFunc(stream, (void *)host_call, node);
    if (status != 0) {
        free(node);
    } else if (node->repeats) {
        node->next = replay->private->captured_calls;
        replay->private->captured_calls = node;
        replay->private->captured_count++;
    }
    return (CUresult)status;
}

void replay_callbacks_close(struct vgpu_replay *replay)
{
    while (replay->private->captured_calls != NULL) {
        struct replay_host_call *node = replay->private->captured_calls;
        replay->private->captured_calls = node->next;
        free(node);
    }
}
