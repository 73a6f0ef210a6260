/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vm_limits.h - what a session may do under its VM's limits (struct vgpu_account in wire.h). A replay always has an account:
 * its own, until it is given the VM's. All but vgpu_replay_share_account is the replay thread's.
 */
#ifndef VGPU_REPLAY_VM_LIMITS_H
#define VGPU_REPLAY_VM_LIMITS_H

#include "internal.h"

/* Rates and queue depth: is one of them set? One load from a line that nobody writes. */
static inline bool replay_limits_are_set(const struct vgpu_replay *replay)
{
    return atomic_load_explicit(replay_word(&replay->private->account->is_limited), memory_order_relaxed) != 0;
}
/* May this record be replayed now? Takes what it costs. False: nothing was taken; replay_limits_wait says until when. */
bool replay_limits_take(struct vgpu_replay *replay, const struct vgpu_call *call);
/* It has been replayed, and moved so many bytes between host and device. */
void replay_limits_spent(struct vgpu_replay *replay, const struct vgpu_call *call, uint64_t bytes);
/* After a refusal: nanoseconds until it is worth to try again, 0 now, at most the longest nap between two looks. */
uint64_t replay_limits_wait(struct vgpu_replay *replay, uint64_t now, bool unfinished);
/* How long the guest is told to wait before it looks again. */
uint64_t replay_limits_hint(struct vgpu_replay *replay, uint64_t now);
/* The session has been held back for so long, and may go on or not yet. */
void replay_limits_held(struct vgpu_replay *replay, uint64_t waited_ns, bool is_over);
/* Nothing more to do for now: what was taken from the bucket in advance goes back. */
void replay_limits_rest(struct vgpu_replay *replay);
/* The device is empty of this session's work: none of it is in the VM's queue. */
void replay_limits_drained(struct vgpu_replay *replay);
/* The quota may have been changed: tell the guest's device page. */
void replay_limits_refresh(struct vgpu_replay *replay);

/* False: the VM has so much of it already that there is no room for this. */
bool replay_charge(struct vgpu_replay *replay, enum vgpu_resource resource, uint64_t amount);
void replay_refund(struct vgpu_replay *replay, enum vgpu_resource resource, uint64_t amount);
/* What all sessions of the VM hold. */
uint64_t replay_limits_sum(struct vgpu_replay *replay, enum vgpu_resource resource);
/* Was a charge refused in the record that is being replayed? */
bool replay_limits_refused(struct vgpu_replay *replay);

/* Driver objects of that kind come and go (handles.c). False: no more of them. */
bool replay_handle_begins(struct vgpu_replay *replay, unsigned kind);
void replay_handle_ends(struct vgpu_replay *replay, unsigned kind);

bool replay_limits_open(struct vgpu_replay *replay);
void replay_limits_assign(struct vgpu_replay *replay, uint64_t memory_limit);
void replay_limits_close(struct vgpu_replay *replay);

#endif
