/* SPDX-License-Identifier: Apache-2.0 */
/*
 * allocations.h - what the session has allocated: which addresses may be freed, what they count against the
 * quota, and what is mapped where. Sorted by address; touched by the replay thread alone.
 */
#ifndef VGPU_REPLAY_ALLOCATIONS_H
#define VGPU_REPLAY_ALLOCATIONS_H

#include "replay.h"

enum replay_allocation_kind { REPLAY_ALLOCATION_DEVICE = 1, REPLAY_ALLOCATION_POOL, REPLAY_ALLOCATION_MAPPING };

/* Physical memory behind cuMemCreate's handle. It lives while a handle or a mapping refers to it. */
struct replay_physical {
    uint64_t handle; /* the guest's */
    uint64_t real;   /* the driver's */
    uint64_t size;
    uint32_t handles, mappings;
};

struct replay_allocation {
    uint64_t address, size;
    uint64_t context; /* wire handle; 0 for kinds that outlive contexts */
    enum replay_allocation_kind kind;
    struct replay_physical *physical; /* mappings */
};

/* False when there is no memory for the entry, or something begins at that address already. */
bool replay_allocation_add(struct vgpu_replay *replay, struct replay_allocation allocation);
/* The allocation that begins exactly at `address`, NULL if none. Valid until the next add or remove. */
struct replay_allocation *replay_allocation_find(struct vgpu_replay *replay, uint64_t address);
/* The first that begins at or after `address`. */
struct replay_allocation *replay_allocation_next(struct vgpu_replay *replay, uint64_t address);
/* The one that contains `address`. */
struct replay_allocation *replay_allocation_at(struct vgpu_replay *replay, uint64_t address);
void replay_allocation_remove(struct vgpu_replay *replay, uint64_t address);
/* Frees the table, while the handles are still there; what it lists is the driver's to end. */
void replay_allocations_close(struct vgpu_replay *replay);

#endif
