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
    unsigned slot; /* of the context, for kinds that do not outlive it */
    enum replay_allocation_kind kind;
    union {
        struct replay_physical *physical; /* mappings */
        void *pool;                       /* memory of a pool; NULL: the pool was destroyed */
    };
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
/* The last that begins before `address`. */
struct replay_allocation *replay_allocation_before(struct vgpu_replay *replay, uint64_t address);

/* What the driver takes for [address, address + size) beside the other allocations of the table: whole units of device memory
 * that no other allocation lies in. Where the driver counts bytes, the size. */
uint64_t replay_allocation_cost(struct vgpu_replay *replay, uint64_t address, uint64_t size);

#define RESERVED_NOW 5u /* CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT */
/* What a pool holds counts, also what it keeps for later. */
struct replay_pool { void *pool; uint64_t live, charged; bool has_ended; /* destroyed; what it holds goes with its last allocation */ };
/* So much more (or, negative, less) of the pool is allocated. False: the quota is at its end; nothing has changed. */
bool replay_pool_use(struct vgpu_replay *replay, void *pool, int64_t bytes);
void replay_pool_end(struct vgpu_replay *replay, void *pool);
/* Something of a pool was freed in that stream's order. The driver takes it back when the program synchronizes with the stream,
 * which ours is never seen to: so the worker does, when the program has waited and the stream is empty (loop.c), and before memory
 * is asked about. */
void replay_pools_freed(struct vgpu_replay *replay, uint64_t stream);
void replay_pools_stream_ended(struct vgpu_replay *replay, uint64_t stream);
bool replay_pools_hold_more(const struct vgpu_replay *replay);
enum replay_pools_settle {
    REPLAY_POOLS_COUNT,         /* what was freed beyond each pool's release threshold goes back; what they hold then counts */
    REPLAY_POOLS_COUNT_EXACTLY, /* the same, and a stream that is about to be empty is waited for, some microseconds */
    REPLAY_POOLS_EMPTY,         /* they keep nothing */
};
/* Never waits for the device's work. */
void replay_pools_settle(struct vgpu_replay *replay, enum replay_pools_settle how);
/* As replay_memory_charge; pools are told to keep nothing before it is refused. */
bool replay_memory_charge_settling(struct vgpu_replay *replay, uint64_t bytes);
/* The driver has freed it, device memory or memory of a pool: out of the table, and what it took is the VM's again. */
void replay_allocation_freed(struct vgpu_replay *replay, const struct replay_allocation *freed);
/* The driver's array, if it holds a box of `size` at `at` (bytes, rows, slices): CUDA_SUCCESS, INVALID_HANDLE or INVALID_VALUE. */
CUresult replay_array_box(struct vgpu_replay *replay, uint64_t handle, const uint64_t at[3], const uint64_t size[3], void **real);
/* The driver's array; false: no array of the session. */
bool replay_array_real(struct vgpu_replay *replay, uint64_t handle, void **real);
/* The handle of one of the session's arrays, 0 if it is none. Slow: for what programs seldom ask. */
uint64_t replay_array_handle(struct vgpu_replay *replay, void *real);
/* Frees the table, while the handles are still there; what it lists is the driver's to end. */
void replay_allocations_close(struct vgpu_replay *replay);

#endif
