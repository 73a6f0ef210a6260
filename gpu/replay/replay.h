/* SPDX-License-Identifier: Apache-2.0 */
/*
 * replay.h - the worker's side of a session: takes call records from the ring, replays them on a driver
 * behind one vtable (real libcuda or the software GPU), answers. One replay thread per session.
 *
 * Everything in the segment is hostile. The loop copies a header out before it looks at it; handlers get
 * the copy. `payload` points into the ring: read each byte of it once, into locals, before checking.
 */
#ifndef VGPU_REPLAY_H
#define VGPU_REPLAY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "../../shim/libcuda/cuda_types.h"
#include "../../transport/_generated_calls.h"
#include "../../transport/wire.h"
#include "_generated_driver.h"

struct replay_table; /* handles of one kind */
struct replay_pending; /* fences and event waits not yet done */
struct replay_allocations; /* what the session has allocated (allocations.h) */
struct replay_code;    /* modules, functions, graphs, links: what belongs to them (code.h) */

struct vgpu_replay {
    struct vgpu_driver driver; /* every field callable; what is missing refuses */
    int device;                /* CUdevice on this host */
    void *context;             /* the session's primary context (retained while warm) */
    uint8_t *segment;          /* mapped at page->worker_address */
    uint64_t segment_size;
    struct vgpu_session_page *page;
    struct vgpu_grant_page *grant;
    uint64_t ring_offset, ring_size, slots_offset, fences_offset, arena_offset, arena_size; /* trusted copies */
    uint32_t slot_count, fence_count;
    uint64_t arena_registered; /* bytes from the arena's start the driver knows */
    int lifeline;              /* socket to the guest */
    struct replay_table *tables[VGPU_KIND_COUNT];
    struct replay_pending *pending;
    struct replay_code *code;  /* made on first use */
    uint64_t current_context;  /* wire handle the replay thread's driver context stands for */
    void *helper_stream;       /* non-blocking; joins streams for context fences */
    bool gpu_fences;           /* the device writes fence words itself */
    uint64_t memory_unit;      /* what the driver takes device memory in, bytes; 1: as asked for */
    uint64_t memory_used;      /* bytes counted against the VM's quota, this session's part */
    struct replay_allocations *allocations; /* made on first use */
    struct replay_private *private; /* of the files in internal.h's list */
};

#define REPLAY_PARAMETERS                                                                                  \
    struct vgpu_replay *replay, const struct vgpu_call *call, const void *payload, struct vgpu_result *result, uint8_t *reply
#define REPLAY_UNUSED (void)replay, (void)call, (void)payload, (void)result, (void)reply
/* A handler replays one call. Its status goes into the result (reply) or becomes the session's deferred error
 * (async). `reply` has VGPU_SLOT_PAYLOAD_LIMIT private bytes; set result->payload_length to what is used. */
typedef CUresult replay_handler(REPLAY_PARAMETERS);
struct replay_entry { const char *name; replay_handler *handler; };
extern const struct replay_entry replay_entries[VGPU_CALL_COUNT];

/* ---- handles (handles.c) ---- */
bool replay_lookup(struct vgpu_replay *replay, unsigned kind, uint64_t handle, void **real); /* false: forged or stale */
bool replay_bind(struct vgpu_replay *replay, unsigned kind, uint64_t guest_chosen, void *real); /* false: taken or invalid */
uint64_t replay_intern(struct vgpu_replay *replay, unsigned kind, void *real); /* worker-chosen handle, the same for the same pointer */
void replay_unbind(struct vgpu_replay *replay, unsigned kind, uint64_t handle);
void replay_unbind_real(struct vgpu_replay *replay, unsigned kind, void *real);
/* 0 = the legacy stream. Marks the stream dirty: for handlers that put work on it. */
bool replay_stream(struct vgpu_replay *replay, uint64_t id, void **real);
/* A function argument may be a CUfunction or a CUkernel; the driver takes either as CUfunction in launches. */
bool replay_function(struct vgpu_replay *replay, uint64_t handle, void **real, bool *is_kernel);
void replay_each(struct vgpu_replay *replay, unsigned kind, void (*visit)(struct vgpu_replay *, uint64_t handle, void *real, void *user), void *user);
/* Streams remember whether they may hold unfinished work. This is what context fences join, what is
 * polled for faults, and what GPU time is measured by. replay_stream() does it; a handler that submits work to a stream
 * it did not get from there calls this itself. Unknown ids are harmless. */
void replay_stream_dirty(struct vgpu_replay *replay, uint64_t stream_id);

/* ---- arena and fences ---- */
/* Address of [offset, offset+size) of the segment if it lies wholly in the arena, else NULL. The worker's host
 * address equals the device address of registered arena memory. */
void *replay_arena(struct vgpu_replay *replay, uint64_t offset, uint64_t size);
bool replay_arena_is_registered(struct vgpu_replay *replay, uint64_t offset, uint64_t size);
/* A guest thread waits for the word: a handler that was given a fence and fails calls replay_fence_failed with it
 * before it returns its error, or the waiter stays until the session ends. */
/* Make fence word `index` become `value` once all work submitted to `stream` so far is done. Index 0 is "no fence". */
CUresult replay_fence(struct vgpu_replay *replay, void *stream, uint32_t index, uint64_t value);
CUresult replay_fence_event(struct vgpu_replay *replay, void *event, uint32_t index, uint64_t value);
/* Store the fence word now (work was synchronous). */
void replay_fence_now(struct vgpu_replay *replay, uint32_t index, uint64_t value);
/* Let go whoever waits for work that could not be submitted, for this reason; CUDA_SUCCESS: it was done already. */
void replay_fence_failed(struct vgpu_replay *replay, uint32_t index, uint64_t value, CUresult status);
/* Called when the driver returned an error that poisons the context (700-class): becomes the session's sticky error. */
void replay_fault(struct vgpu_replay *replay, CUresult error);
bool replay_is_sticky(CUresult error);
/* Quota: false means CUDA_ERROR_OUT_OF_MEMORY without asking the driver. */
bool replay_memory_charge(struct vgpu_replay *replay, uint64_t bytes);
void replay_memory_release(struct vgpu_replay *replay, uint64_t bytes);
/* The card lacks it whatever the quota says: nothing more is to be had until it is back. */
void replay_memory_charge_always(struct vgpu_replay *replay, uint64_t bytes);
/* What all sessions of the VM have together, and may have; 0: whatever there is. */
uint64_t replay_memory_sum(struct vgpu_replay *replay);
uint64_t replay_memory_limit(struct vgpu_replay *replay);
/* Before cuStreamDestroy: work still in the stream stays known to context fences. */
void replay_stream_retire(struct vgpu_replay *replay, uint64_t stream_id);
/* A context of the session ended and with it everything in it. The memory subject defines this to forget (and give back
 * to the quota) what it counted for that context; absent, nothing is told. `slot` is the context's: handles are the guest's to use again. */
void replay_memory_context_ended(struct vgpu_replay *replay, unsigned slot) __attribute__((weak));
void replay_arrays_context_ended(struct vgpu_replay *replay, unsigned slot); /* while the handles are still there */
void replay_textures_context_ended(struct vgpu_replay *replay, unsigned slot);
/* Frees what the subject of device code keeps for the session (code_map.c). */
void replay_code_close(struct vgpu_replay *replay);
/* Is the stream (0: the legacy one) capturing? False also where the driver cannot say. */
bool replay_is_capturing(struct vgpu_replay *replay, void *stream);
/* Host functions: returns when the guest has run it (called on the driver's callback thread). */
void replay_host_function(struct vgpu_replay *replay, uint32_t kind, uint64_t function, uint64_t user, uint64_t stream, uint32_t status);

#endif
