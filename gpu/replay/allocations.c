/* SPDX-License-Identifier: Apache-2.0 */
/*
 * allocations.c - the table of allocations.h. A dense sorted array: programs hold hundreds of allocations,
 * seldom more than thousands, and the worker looks here only when one is made or freed.
 */
#include "allocations.h"

#include <stdlib.h>

/* A session that leaks pointers for ever must not take the host's memory with it: 40 bytes each. */
#define ALLOCATIONS_MOST (4u << 20)

struct replay_allocations {
    struct replay_allocation *entry;
    size_t count, capacity;
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

static void free_physical(struct vgpu_replay *replay, uint64_t handle, void *real, void *user)
{
    (void)replay, (void)handle, (void)user;
    free(real);
}

void replay_allocations_close(struct vgpu_replay *replay)
{
    if (replay->tables[VGPU_KIND_MEMORY] != NULL)
        replay_each(replay, VGPU_KIND_MEMORY, free_physical, NULL);
    if (replay->allocations == NULL)
        return;
    free(replay->allocations->entry);
    free(replay->allocations);
    replay->allocations = NULL;
}
