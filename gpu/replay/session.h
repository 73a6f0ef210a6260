/* SPDX-License-Identifier: Apache-2.0 */
/*
 * session.h - what the worker process (Python, through cffi) may do with a replay: make one, give it a driver, warm it,
 * hand it a guest, run it, stop it. Handlers do not need it; they see replay.h.
 */
#ifndef VGPU_REPLAY_SESSION_H
#define VGPU_REPLAY_SESSION_H

#include <stddef.h>
#include <stdint.h>

struct vgpu_replay;
struct vgpu_driver;

enum vgpu_run_end {
    VGPU_RUN_STOPPED = 1,    /* vgpu_replay_stop */
    VGPU_RUN_GUEST_GONE = 2, /* the lifeline ended */
    VGPU_RUN_CLOSED = 3,     /* the guest said goodbye */
    VGPU_RUN_PROTOCOL = 4,   /* the ring held something the wire forbids */
    VGPU_RUN_FAILED = 5,     /* the driver did not take the session's context */
};

struct vgpu_replay_options {
    uint64_t address;           /* where to map the segment; 0: anywhere */
    uint64_t arena_size;        /* bytes, a multiple of 2 MiB */
    uint64_t arena_registered;  /* bytes of it to register while warm, a multiple of 2 MiB */
    uint64_t ring_size;         /* power of two, 64 KiB to 1 GiB */
    uint32_t slot_count, fence_count;
    uint64_t spin_ns;           /* how long the loop spins before it asks for a doorbell */
};

/* Bytes of a segment with these options; 0 if they break a rule. */
uint64_t vgpu_segment_size(const struct vgpu_replay_options *options);
/* The parts of a slot of that many bytes in a VM's BAR1: sets ring, slots, fences and arena, and cuts arena_registered to the
 * arena. Where the arena begins in the slot; 0 if the size is below 1 MiB or no multiple of 64 KiB. */
uint64_t vgpu_slot_layout(uint64_t slot_size, struct vgpu_replay_options *options);
/* A replay whose driver refuses everything. NULL when out of memory. */
struct vgpu_replay *vgpu_replay_new(void);
/* Frees host memory and mappings; the driver's own state ends with the process. */
void vgpu_replay_free(struct vgpu_replay *replay);
struct vgpu_driver *vgpu_replay_driver(struct vgpu_replay *replay);
/* Maps segment and grant page and writes their constant fields. 0 or an errno. The descriptors stay the caller's. */
int vgpu_replay_map(struct vgpu_replay *replay, int segment_fd, int grant_fd, const struct vgpu_replay_options *options);
/* Initialises the driver and the primary context, registers the segment, fills the device page. A CUresult; *step names
 * the call that failed. Takes 100 to 300 ms on real hardware. */
int vgpu_replay_warm(struct vgpu_replay *replay, int ordinal, uint32_t device_flags, const char *driver_version_text, const char **step);
/* Leaves the segment for [offset, offset + size) of a VM's BAR1: the same address, the parts of vgpu_slot_layout, the same
 * device page; `registered` bytes of the arena are made known to the driver. Once, on the thread that warmed it, before
 * assign. 0, a CUresult, or minus an errno; *step says of what. After a failure the replay is good for nothing but free.
 * The descriptor stays the caller's. Nothing outside the range is ever touched. */
int vgpu_replay_rebase(struct vgpu_replay *replay, int bar1_fd, uint64_t offset, uint64_t size, uint64_t registered, const char **step);
/* Hands the session to a guest. The lifeline stays the caller's to close, after run() returned. */
void vgpu_replay_assign(struct vgpu_replay *replay, int lifeline, uint64_t session_id, uint64_t memory_limit);
/* Replays until the session ends; enum vgpu_run_end. Blocks; meant for a thread of its own. */
int vgpu_replay_run(struct vgpu_replay *replay);
/* From any thread: run() returns before its next record. */
void vgpu_replay_stop(struct vgpu_replay *replay);
/* From any thread: the grant page changed. */
/* Has the flight recorder note the signal when this process crashes. Once, by the process that has one replay. */
void vgpu_replay_note_crashes(struct vgpu_replay *replay);
void vgpu_replay_kick(struct vgpu_replay *replay);
/* A descriptor that becomes readable (8 bytes, eventfd) when vgpu_replay_events has something to say. */
int vgpu_replay_event_fd(struct vgpu_replay *replay);
/* Takes the event bits: 1 demand, 2 lease over, 4 fault, 8 run() ended. Above bit 8: the epoch of the grant page that the
 * first two are about. */
uint64_t vgpu_replay_events(struct vgpu_replay *replay);
/* Name of the wire's call id, for reports; "" when unknown. */
const char *vgpu_call_name(uint32_t call);
/* Addresses of the mapped pages, for tests and reports. */
uint64_t vgpu_replay_address(struct vgpu_replay *replay);
uint64_t vgpu_replay_mapped(struct vgpu_replay *replay);
uint32_t vgpu_replay_error(struct vgpu_replay *replay);

/* Leaves the replay's own account for entry `entry` of its VM's (wire.h): from now on the VM's limits hold, for all its
 * sessions together. Once, before assign, whose memory_limit then says nothing. 0 or an errno; the descriptor stays the
 * caller's. */
int vgpu_replay_share_account(struct vgpu_replay *replay, int account_fd, uint32_t entry);

/* Maps the turn word of the GPU (wire.h), for leases with a token; before run(). 0 or an errno; the descriptor stays the
 * caller's. Without it such a lease begins at once. */
int vgpu_replay_share_turn(struct vgpu_replay *replay, int turn_fd);
/* For the mediator's side of the word: what it is, and replace it if it is as expected (1: done). */
uint64_t vgpu_turn_load(uint64_t *word);
int vgpu_turn_swap(uint64_t *word, uint64_t expected, uint64_t desired);

/* The memory that traces go to (wire.h), once; VGPU_TRACE_FILE_SIZE bytes. 0 or an errno. The descriptor stays the caller's. */
int vgpu_replay_trace_map(struct vgpu_replay *replay, int trace_fd);
/* From the thread that mapped it, also while run() runs: trace that many more events; 0 ends it. */
void vgpu_replay_trace(struct vgpu_replay *replay, uint64_t events);

/* Where the host's libnvidia-ml.so.1 is: not ours. It is opened when it is first needed; one that cannot be used is as none.
 * Before run(). 0 or ENOMEM. */
int vgpu_replay_use_nvml(struct vgpu_replay *replay, const char *path);

/* Fills the vtable from a libcuda by path. NULL, or what is wrong with it. Refuses our own guest library. */
const char *vgpu_driver_open(struct vgpu_driver *driver, const char *path);
/* Threads that are made from now on get stacks of this size, whatever RLIMIT_STACK was at exec. */
void vgpu_thread_stacks(size_t bytes);

#endif
