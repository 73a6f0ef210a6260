/* SPDX-License-Identifier: Apache-2.0 */
/*
 * slice_clock.c - how long the work of a lease took by the device's own clock: a witness for the host's, which leases are
 * charged by.
 *
 * Every eighth lease while others are there has a timed event at either end, in a stream of ours. The first one is recorded when the
 * lease begins, on a device that is empty: the device gets to it when it turns to this session. The second one is recorded when the lease is
 * lost, behind all work that is unfinished then. What lies between them is compared with what the lease is charged; the difference
 * is the handing over, and whatever the host was late by. Both are read when the next lease begins, so nobody waits for them.
 *
 * It is about the primary context, where nearly all programs work: events of two contexts cannot be compared.
 */
#include "internal.h"

#define LEASES_A_SAMPLE 8u
#define LAST_QUERIES 32u

enum { OFF, BEGUN, ENDED, CHARGED };

static bool open_clock(struct vgpu_replay *replay, struct replay_slice_clock *clock)
{
    if (clock->stream == NULL && replay->driver.cuStreamCreateWithPriority(&clock->stream, STREAM_NON_BLOCKING, 0) != 0)
        clock->stream = NULL;
    if (clock->stream != NULL && clock->begin == NULL && replay->driver.cuEventCreate(&clock->begin, 0) != 0)
        clock->begin = NULL;
    if (clock->begin != NULL && clock->end == NULL && replay->driver.cuEventCreate(&clock->end, 0) != 0)
        clock->end = NULL;
    return clock->end != NULL;
}

static void read_clock(struct vgpu_replay *replay, struct replay_slice_clock *clock)
{
    float milliseconds = 0;
    if (replay_elapsed(replay, clock->begin, clock->end, &milliseconds) != CUDA_SUCCESS || !(milliseconds >= 0))
        return; /* not done yet, or nothing that can be said */
    replay->grant->timed_leases++;
    replay->grant->timed_charged_ns += clock->charged_ns;
    replay->grant->timed_device_ns += (uint64_t)((double)milliseconds * 1e6);
}

void replay_slice_begins(struct vgpu_replay *replay)
{
    struct replay_private *private = replay->private;
    struct replay_slice_clock *clock = &private->slice_clock;
    const bool is_due = private->in_flight_ns != 0 && ++clock->leases % LEASES_A_SAMPLE == 0;
    if (clock->state != CHARGED && !is_due)
        return;
    const unsigned before = private->current, state = clock->state;
    clock->state = OFF;
    if (private->error != 0 || private->captures != 0 || !replay_select_context(replay, 0))
        return;
    if (state == CHARGED)
        read_clock(replay, clock);
    if (is_due && private->busy_since_ns == 0 && open_clock(replay, clock) && replay->driver.cuEventRecord(clock->begin, clock->stream) == 0)
        clock->state = BEGUN;
    replay_select_context(replay, before);
}

void replay_slice_ends(struct vgpu_replay *replay)
{
    struct replay_private *private = replay->private;
    struct replay_slice_clock *clock = &private->slice_clock;
    if (clock->state != BEGUN)
        return;
    const unsigned before = private->current;
    clock->state = OFF;
    if (private->error != 0 || private->captures != 0 || !replay_select_context(replay, 0))
        return;
    if (replay_waits_for_all(replay, clock->stream) && replay->driver.cuEventRecord(clock->end, clock->stream) == 0)
        clock->state = ENDED;
    replay_select_context(replay, before);
}

void replay_slice_charged(struct vgpu_replay *replay, uint64_t charged_ns)
{
    struct replay_slice_clock *clock = &replay->private->slice_clock;
    if (clock->state != ENDED)
        return;
    /* The work is done, and so is the event but for a microsecond or two: left behind, it would have the device turn back to this
     * session in the middle of the next one's lease. */
    for (unsigned i = 0; i < LAST_QUERIES && replay->driver.cuEventQuery(clock->end) == CUDA_ERROR_NOT_READY; i++)
        ;
    clock->charged_ns = charged_ns;
    clock->state = charged_ns != 0 ? CHARGED : OFF;
}

void replay_slice_context_ended(struct vgpu_replay *replay, unsigned slot)
{
    if (slot == 0) /* stream and events are gone with it */
        replay->private->slice_clock = (struct replay_slice_clock){0};
}
