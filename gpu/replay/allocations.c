/* SPDX-License-Identifier: Apache-2.0 */
/*
 * allocations.c - the table of allocations.h. A dense sorted array: programs hold hundreds of allocations,
 * seldom more than thousands, and the worker looks here only when one is made or freed.
 */
#include "allocations.h"
#include "graph_memory.h"
#include "internal.h"

#include <stdlib.h>

#define PATIENCE_NS 50000u          /* a stream's last work may be seen to be done a moment before the stream is */
#define ALLOCATIONS_MOST (4u << 20) /* of 40 bytes each: a session that leaks pointers must not take the host's memory with it */

/* A stream in whose order memory of pools was freed since it was last synchronized with. */
struct freeing {
    uint64_t stream;
    unsigned slot; /* context of a legacy stream */
    bool has_ended; /* the stream was destroyed meanwhile */
};

struct replay_allocations {
    struct replay_allocation *entry;
    size_t count, capacity;
    struct replay_pool *pool;
    size_t pool_count, pool_capacity;
    uintptr_t ended; /* pools destroyed with something left in them */
    struct freeing *freeing;
    size_t freeing_count, freeing_capacity;
};

static struct replay_allocations *table(struct vgpu_replay *replay)
{
    if (replay->allocations == NULL)
        replay->allocations = calloc(1, sizeof *replay->allocations);
    return replay->allocations;
}

/* How many begin before `address`. */
static size_t before(const struct replay_allocations *allocations, uint64_t address)
{
    size_t low = 0, high = allocations->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (allocations->entry[middle].address < address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

bool replay_allocation_add(struct vgpu_replay *replay, struct replay_allocation allocation)
{
    struct replay_allocations *allocations = table(replay);
    if (allocations == NULL)
        return false;
    if (allocations->count == allocations->capacity) {
        size_t capacity = allocations->capacity ? allocations->capacity * 2 : 256;
        struct replay_allocation *bigger =
            capacity > ALLOCATIONS_MOST ? NULL : realloc(allocations->entry, capacity * sizeof *bigger);
        if (bigger == NULL)
            return false;
        allocations->entry = bigger;
        allocations->capacity = capacity;
    }
    size_t at = before(allocations, allocation.address);
    if (at < allocations->count && allocations->entry[at].address == allocation.address)
        return false;
    memmove(&allocations->entry[at + 1], &allocations->entry[at], (allocations->count - at) * sizeof *allocations->entry);
    allocations->entry[at] = allocation;
    allocations->count++;
    return true;
}

struct replay_allocation *replay_allocation_next(struct vgpu_replay *replay, uint64_t address)
{
    struct replay_allocations *allocations = table(replay);
    if (allocations == NULL)
        return NULL;
    size_t at = before(allocations, address);
    return at < allocations->count ? &allocations->entry[at] : NULL;
}

struct replay_allocation *replay_allocation_find(struct vgpu_replay *replay, uint64_t address)
{
    struct replay_allocation *found = replay_allocation_next(replay, address);
    return found != NULL && found->address == address ? found : NULL;
}

struct replay_allocation *replay_allocation_at(struct vgpu_replay *replay, uint64_t address)
{
    struct replay_allocations *allocations = table(replay);
    if (allocations == NULL)
        return NULL;
    size_t at = before(allocations, address);
    if (at < allocations->count && allocations->entry[at].address == address)
        return &allocations->entry[at];
    if (at == 0)
        return NULL;
    struct replay_allocation *found = &allocations->entry[at - 1];
    return address - found->address < found->size ? found : NULL;
}

struct replay_allocation *replay_allocation_before(struct vgpu_replay *replay, uint64_t address)
{
    struct replay_allocations *allocations = table(replay);
    size_t at = allocations != NULL ? before(allocations, address) : 0;
    return at != 0 ? &allocations->entry[at - 1] : NULL;
}

uint64_t replay_allocation_cost(struct vgpu_replay *replay, uint64_t address, uint64_t size)
{
    uint64_t unit = replay->memory_unit;
    if (unit <= 1)
        return size;
    uint64_t first = address / unit, last = (address + size - 1) / unit, units = last - first + 1;
    const struct replay_allocation *left = replay_allocation_before(replay, address), *right = replay_allocation_next(replay, address + 1);
    bool shares_first = left != NULL && left->kind == REPLAY_ALLOCATION_DEVICE && (left->address + left->size - 1) / unit == first;
    bool shares_last = right != NULL && right->kind == REPLAY_ALLOCATION_DEVICE && right->address / unit == last;
    if (shares_first)
        units--;
    if (shares_last && units != 0 && !(shares_first && first == last))
        units--;
    return units * unit;
}

/* ---- pools ---- */

static struct replay_pool *pool_of(struct vgpu_replay *replay, void *pool)
{
    struct replay_allocations *allocations = table(replay);
    if (allocations == NULL)
        return NULL;
    for (size_t i = 0; i < allocations->pool_count; i++)
        if (allocations->pool[i].pool == pool)
            return &allocations->pool[i];
    if (allocations->pool_count == allocations->pool_capacity) {
        size_t capacity = allocations->pool_capacity ? allocations->pool_capacity * 2 : 8;
        struct replay_pool *bigger = realloc(allocations->pool, capacity * sizeof *bigger);
        if (bigger == NULL)
            return NULL;
        allocations->pool = bigger;
        allocations->pool_capacity = capacity;
    }
    allocations->pool[allocations->pool_count] = (struct replay_pool){.pool = pool};
    return &allocations->pool[allocations->pool_count++];
}

/* Charges what the pool holds now. False: more than there is room for, and nothing has changed. */
static bool settle(struct vgpu_replay *replay, struct replay_pool *pool, uint64_t live)
{
    uint64_t holds = 0;
    if (pool->has_ended)
        holds = live != 0 ? pool->charged : 0;
    else if (replay->driver.cuMemPoolGetAttribute(pool->pool, RESERVED_NOW, &holds) != 0 || holds < live)
        holds = live;
    if (holds > pool->charged && live <= pool->live)
        replay_memory_charge_always(replay, holds - pool->charged); /* freeing is never refused, and what is kept counts */
    else if (holds > pool->charged && !replay_memory_charge(replay, holds - pool->charged))
        return false;
    if (holds < pool->charged)
        replay_memory_release(replay, pool->charged - holds);
    pool->charged = holds;
    pool->live = live;
    return true;
}

bool replay_pool_use(struct vgpu_replay *replay, void *pool, int64_t bytes)
{
    struct replay_pool *used = pool_of(replay, pool);
    if (used == NULL || !settle(replay, used, used->live + (uint64_t)bytes))
        return false;
    if (used->has_ended && used->live == 0)
        *used = replay->allocations->pool[--replay->allocations->pool_count];
    return true;
}

void replay_pool_end(struct vgpu_replay *replay, void *pool)
{
    struct replay_pool *ended = pool_of(replay, pool);
    if (ended == NULL)
        return;
    struct replay_allocations *allocations = replay->allocations;
    if (ended->live == 0) {
        replay_memory_release(replay, ended->charged);
        *ended = allocations->pool[--allocations->pool_count];
        return;
    }
    /* What is still allocated from it stays so, and the driver's pieces that it lies in stay taken: all of it counts until the
     * last is freed. The driver may give the pool's address to another, so this one gets a name that no pointer has. */
    void *name = (void *)(uintptr_t)(++allocations->ended * 2 + 1);
    for (size_t i = 0; i < allocations->count; i++)
        if (allocations->entry[i].kind == REPLAY_ALLOCATION_POOL && allocations->entry[i].pool == pool)
            allocations->entry[i].pool = name;
    ended->pool = name;
    ended->has_ended = true;
}

static struct freeing *freeing_of(struct replay_allocations *allocations, uint64_t stream, unsigned slot)
{
    for (size_t i = 0; i < allocations->freeing_count; i++) {
        struct freeing *found = &allocations->freeing[i];
        if (found->stream == stream && found->slot == slot && !found->has_ended)
            return found;
    }
    return NULL;
}

void replay_pools_freed(struct vgpu_replay *replay, uint64_t stream)
{
    struct replay_allocations *allocations = table(replay);
    unsigned slot = stream == 0 ? replay->private->current : 0;
    if (allocations == NULL || freeing_of(allocations, stream, slot) != NULL)
        return;
    if (allocations->freeing_count == allocations->freeing_capacity) {
        size_t capacity = allocations->freeing_capacity ? allocations->freeing_capacity * 2 : 8;
        struct freeing *bigger = realloc(allocations->freeing, capacity * sizeof *bigger);
        if (bigger == NULL)
            return; /* it counts until the stream is synchronized with for something else */
        allocations->freeing = bigger;
        allocations->freeing_capacity = capacity;
    }
    allocations->freeing[allocations->freeing_count++] = (struct freeing){.stream = stream, .slot = slot};
}

void replay_pools_stream_ended(struct vgpu_replay *replay, uint64_t stream)
{
    struct freeing *found = replay->allocations != NULL ? freeing_of(replay->allocations, stream, 0) : NULL;
    if (found == NULL)
        return;
    struct replay_allocations *allocations = replay->allocations;
    found->has_ended = true;
    /* One stands for all that have ended: they wait for the same, and a guest may make and destroy any number of streams. */
    for (size_t i = 0; i < allocations->freeing_count; i++)
        if (allocations->freeing[i].has_ended && &allocations->freeing[i] != found) {
            *found = allocations->freeing[--allocations->freeing_count];
            break;
        }
    replay_pools_settle(replay, REPLAY_POOLS_COUNT);
}

bool replay_pools_hold_more(const struct vgpu_replay *replay)
{
    return replay->allocations != NULL && replay->allocations->freeing_count != 0;
}

static bool is_idle(struct vgpu_replay *replay)
{
    return !replay_outstanding(replay) || replay_poll_driver(replay, replay_now_ns());
}

/* The driver takes freed memory back when it is synchronized with the stream that freed it, and at no other call: asking
 * whether the stream is done does not, nor does cuMemPoolTrimTo (measured on 580). Done only where it does not wait.
 * True: there is nothing left to do for this stream. */
static bool synchronize(struct vgpu_replay *replay, const struct freeing *freeing)
{
    struct replay_private *private = replay->private;
    void *real = NULL;
    unsigned slot = freeing->slot, before = private->current;
    if (freeing->has_ended)
        return is_idle(replay); /* destroying it did that, of what was done by then */
    if (freeing->stream == 0) {
        /* It stands for all blocking streams; and while one captures, to ask for it is an error. */
        if (private->context[slot].real == NULL || private->error != 0)
            return true;
        if (private->captures != 0 || !is_idle(replay))
            return false;
    } else {
        if (!replay_stream_owner(replay, freeing->stream, &real, &slot) || private->error != 0)
            return true;
        if (replay_is_capturing(replay, real) || replay->driver.cuStreamQuery(real) == CUDA_ERROR_NOT_READY)
            return false;
    }
    if (replay_select_context(replay, slot))
        (void)replay->driver.cuStreamSynchronize(real); /* a fault is found by who looks at the device */
    replay_select_context(replay, before);
    return true;
}

void replay_pools_settle(struct vgpu_replay *replay, enum replay_pools_settle how)
{
    struct replay_allocations *allocations = replay->allocations;
    if (allocations == NULL) {
        graph_memory_settle(replay, how == REPLAY_POOLS_EMPTY);
        return;
    }
    uint64_t until_ns = how == REPLAY_POOLS_COUNT_EXACTLY && allocations->freeing_count != 0 ? replay_now_ns() + PATIENCE_NS : 0;
    for (size_t i = allocations->freeing_count; i-- > 0;) {
        bool is_done;
        while (!(is_done = synchronize(replay, &allocations->freeing[i])) && until_ns != 0 && replay_now_ns() < until_ns)
            __builtin_ia32_pause();
        if (is_done)
            allocations->freeing[i] = allocations->freeing[--allocations->freeing_count];
    }
    for (size_t i = 0; i < allocations->pool_count; i++) {
        struct replay_pool *pool = &allocations->pool[i];
        if (pool->has_ended)
            continue;
        if (how == REPLAY_POOLS_EMPTY)
            replay->driver.cuMemPoolTrimTo(pool->pool, 0);
        (void)settle(replay, pool, pool->live);
    }
    graph_memory_settle(replay, how == REPLAY_POOLS_EMPTY);
}

void replay_allocation_remove(struct vgpu_replay *replay, uint64_t address)
{
    struct replay_allocation *found = replay_allocation_find(replay, address);
    if (found == NULL)
        return;
    struct replay_allocations *allocations = replay->allocations;
    size_t at = (size_t)(found - allocations->entry);
    memmove(found, found + 1, (allocations->count - at - 1) * sizeof *found);
    allocations->count--;
}

void replay_allocation_freed(struct vgpu_replay *replay, const struct replay_allocation *freed)
{
    const struct replay_allocation was = *freed; /* it may be the table's own entry */
    replay_allocation_remove(replay, was.address);
    if (was.kind == REPLAY_ALLOCATION_POOL)
        (void)replay_pool_use(replay, was.pool, -(int64_t)was.size);
    else
        replay_memory_release(replay, replay_allocation_cost(replay, was.address, was.size));
}

static void free_record(struct vgpu_replay *replay, uint64_t handle, void *real, void *user)
{
    (void)replay, (void)handle, (void)user;
    free(real);
}

void replay_allocations_close(struct vgpu_replay *replay)
{
    if (replay->tables[VGPU_KIND_MEMORY] != NULL)
        replay_each(replay, VGPU_KIND_MEMORY, free_record, NULL);
    if (replay->tables[VGPU_KIND_ARRAY] != NULL)
        replay_each(replay, VGPU_KIND_ARRAY, free_record, NULL);
    if (replay->allocations == NULL)
        return;
    free(replay->allocations->entry);
    free(replay->allocations->pool);
    free(replay->allocations->freeing);
    free(replay->allocations);
    replay->allocations = NULL;
}
