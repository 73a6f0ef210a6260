/* SPDX-License-Identifier: Apache-2.0 */
/*
 * flight.h - what is left to read of a session whose worker had to be killed: its last calls (flight.c), and whether the
 * device gets on with its kernels (pulse.c). docs/watchdog.md.
 */
#ifndef VGPU_REPLAY_FLIGHT_H
#define VGPU_REPLAY_FLIGHT_H

#include "internal.h"

/* ---- the flight recorder (flight.c) ---- */

/* Maps the recorder behind the grant page in its file. A file without room has none; then it is private memory that dies
 * with the worker. False: out of memory. */
bool replay_flight_open(struct vgpu_replay *replay, int grant_fd);
void replay_flight_close(struct vgpu_replay *replay);
/* A function is about to be launched for the first time, or its name was overwritten since. */
void replay_flight_name(struct vgpu_replay *replay, uint64_t function, void *real, bool is_kernel);

static inline void replay_flight_begin(struct vgpu_flight *flight, const struct vgpu_call *call, uint64_t now)
{
    struct vgpu_flight_entry *entry = &flight->entry[flight->next % VGPU_FLIGHT_ENTRIES];
    entry->call = call->call;
    entry->status = VGPU_FLIGHT_UNFINISHED;
    entry->sequence = call->sequence;
    entry->began_ns = now;
    memcpy(entry->argument, call->argument, sizeof entry->argument);
    /* SAFETY: the reader looks only once this process has been stopped or killed; the compiler must not put it off. */
    atomic_signal_fence(memory_order_release);
    flight->next++;
}

static inline void replay_flight_end(struct vgpu_flight *flight, CUresult status)
{
    flight->entry[(flight->next - 1) % VGPU_FLIGHT_ENTRIES].status = (uint32_t)status;
}

static inline bool replay_flight_knows(const struct vgpu_flight *flight, uint64_t function)
{
    return flight->name[vgpu_flight_slot(function)].function == function;
}

/* ---- the pulse (pulse.c) ---- */

/* What is known of a function's length, kept with it. */
struct replay_pace {
    bool is_light;   /* took the device at most LIGHT_NS when measured */
    uint64_t blocks; /* of the launch that was measured */
};

struct replay_pace *replay_pace_of(struct vgpu_replay *replay, uint64_t function); /* NULL: it is gone */

void replay_pulse_open(struct vgpu_replay *replay);  /* the primary context is there */
void replay_pulse_again(struct vgpu_replay *replay); /* in the current context, if the one it was opened in has ended */
void replay_pulse_close(struct vgpu_replay *replay);
/* After a launch went to the driver. pace NULL: a graph. `function`: whose pace it is, to find it again. */
void replay_pulse_launch(struct vgpu_replay *replay, void *stream, uint64_t function, struct replay_pace *pace, uint64_t blocks);
void replay_pulse_stream_ends(struct vgpu_replay *replay, void *stream);
void replay_pulse_context_ends(struct vgpu_replay *replay, unsigned slot);
/* Looks which marks the device has set, and publishes in the grant page since when it has not got on.
 * is_idle: the driver says that nothing is unfinished. */
void replay_pulse_look(struct vgpu_replay *replay, uint64_t now, bool is_idle);

#endif
