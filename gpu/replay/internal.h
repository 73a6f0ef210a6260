/* SPDX-License-Identifier: Apache-2.0 */
/*
 * internal.h - what loop.c, fences.c, context.c, arena.c, callbacks.c, handles.c and session.c share and handlers
 * of the subjects do not need. One replay thread owns all of it; the few words other threads touch are atomics
 * and say who writes them.
 */
#ifndef VGPU_REPLAY_INTERNAL_H
#define VGPU_REPLAY_INTERNAL_H

#include <stdatomic.h>
#include <time.h>

#include "replay.h"

#define REPLAY_CONTEXTS 64
#define REPLAY_HELPERS 4
#define REPLAY_CHUNKS 1024

#define STREAM_NON_BLOCKING 1u
#define SPIN_WORTHWHILE_NS 1000000ull /* spin_ns of a host with processors to spare: short waits spin there */

/* A stream of ours that carries joins; free again when its last fence word holds the value. */
struct replay_helper {
    void *stream;
    uint32_t index;
    uint64_t value;
};

struct replay_context {
    uint64_t handle; /* wire handle; 0 for a primary context no guest has retained */
    void *real;      /* NULL: slot free */
    bool primary;
    bool legacy_dirty; /* the legacy stream may hold unfinished work */
    uint64_t limit_charged[2]; /* bytes of printf buffer and heap beyond what they were, as the quota has them */
    uint64_t arrays_taken;     /* bytes that its small arrays take of the device, together; charged */
    bool retired_dirty; /* helper[0] waits for the work of streams destroyed before it was done */
    struct replay_helper helper[REPLAY_HELPERS];
};

struct replay_fence_entry {
    void *event; /* polled with cuEventQuery; NULL: the GPU writes the word itself */
    bool owned;  /* the event goes back to the pool */
    unsigned slot; /* context it was issued in */
    uint32_t index;
    uint64_t value;
    uint64_t issued_ns;
};

/* Fences not known to be done, in order of issue. Grows up to a few times fence_count entries. */
struct replay_pending {
    struct replay_fence_entry *entry;
    unsigned capacity, count;
};

/* A stream that may hold unfinished work. After its last work a fence was issued (index != 0): once the word holds the
 * value, the stream is known to be empty without asking the driver. */
struct replay_dirty { uint64_t handle, value; uint32_t index; };

/* The driver forgets a registration with the context it was made in, though all contexts may use it. */
#define REPLAY_NO_CONTEXT REPLAY_CONTEXTS
struct replay_chunk { uint64_t offset, size; unsigned slot; /* that context; REPLAY_NO_CONTEXT: it has ended */ };

enum replay_event { /* bits of replay_private.events: what the control thread passes on */
    REPLAY_EVENT_DEMAND = 1,
    REPLAY_EVENT_IDLE = 2,
    REPLAY_EVENT_FAULT = 4,
    REPLAY_EVENT_ENDED = 8,
};

enum replay_waits { REPLAY_WAITS_NOT, REPLAY_WAITS_CALLS, REPLAY_WAITS_BYTES, REPLAY_WAITS_QUEUE };

/* slice_clock.c */
struct replay_slice_clock {
    void *stream, *begin, *end; /* of the primary context; NULL: not made yet */
    uint64_t charged_ns;        /* for the lease between the two events */
    uint32_t leases, state;
};

struct replay_private {
    /* Contexts; slot 0 is the primary one. */
    struct replay_context context[REPLAY_CONTEXTS];
    unsigned captures; /* begun and not ended, or more */
    unsigned current; /* slot the driver's thread context stands for */
    /* Streams that may hold unfinished work: handles, each once (a bit in its table entry says so). */
    struct replay_dirty *dirty;
    unsigned dirty_count, dirty_capacity;
    /* Events for joins and worker-written fences. They belong to the context they were made in. */
    void **event;
    uint64_t *event_context;
    unsigned event_count, event_capacity;
    struct replay_chunk chunk[REPLAY_CHUNKS]; /* registered ranges of the segment */
    unsigned chunk_count;
    struct replay_host_call *captured_calls; /* host functions inside graphs: run any number of times */
    unsigned captured_count;

    /* Lease, as last read from the grant page. */
    uint64_t epoch;
    uint64_t deadline_ns;
    int64_t credits;
    bool leased, open_ended, demanded, reported;
    /* Leases with a token: lease.c. */
    _Atomic uint64_t *turn; /* the GPU's turn word; NULL: this worker shares none */
    uint32_t token;
    uint64_t slice_ns, in_flight_ns;
    uint64_t began_ns, lost_ns;
    uint64_t billed_ns; /* held_ns is counted up to here */
    bool awaits_turn;   /* granted, and not begun */
    bool standby;       /* granted to be taken when there is something to do, and not taken yet */
    bool watches;       /* somebody may take the place behind this lease, and end it */
    bool owes;          /* begun or declined, over, and not published */
    bool carries;       /* work of an earlier lease is unfinished, and goes on being billed */
    struct replay_slice_clock slice_clock;
    void *marker; /* throttle.c: event behind the last stride of launches */
    unsigned marker_context, launches_since_marker, stride;
    struct { uint64_t handle; unsigned slot; } launched[8]; /* streams with launches since the marker */
    unsigned launched_count;
    uint64_t stride_began_ns, next_stride_ns; /* the stride before the marker, and the one behind it */
    uint64_t marker_done_ns; /* when a marker was last waited for to its end */
    /* GPU time. */
    uint64_t busy_since_ns; /* 0: nothing unfinished; else gpu_ns is counted up to here */
    unsigned failures_logged;
    uint64_t handles_chunks; /* handle table pages in use, bounded */

    struct vgpu_flight *flight, *flight_kept; /* flight.c; kept: where there is no memory to share. Never NULL in a session */
    struct replay_pulse *pulse;               /* pulse.c; NULL: this device sets no marks */

    struct vgpu_trace_head *trace_map; /* the control thread's; stays mapped, for a trace may end in the middle of an event */
    uint64_t trace_busy_ns;            /* the busy time that is not in the trace yet began then; 0: none */

    /* The VM's limits: vm_limits.c. */
    struct vgpu_account *account; /* never NULL */
    uint32_t account_entry;
    bool shares_account;                  /* with the other sessions of the VM; else it is this one's alone */
    uint64_t card_memory, told_memory;    /* total memory, as the driver and as the device page says */
    uint64_t handles, handles_charged;    /* driver objects of all kinds */
    uint64_t refused_at;                  /* a quota was at its end in that record, counted from 1 */
    uint32_t tokens;                      /* calls drawn from the bucket and not used */
    uint64_t token_ns;                    /* what each of them cost */
    enum replay_waits waits_for;          /* why the last record was not taken */
    uint64_t waits_rate, wait_until_ns;   /* the limit then; when there will be enough in the bucket */
    uint32_t queued;                      /* calls given to the driver and not known to be executed */
    uint64_t queue_since_ns;              /* the queue has been full since */
    bool passes_queue;                    /* the next record goes even so */

    struct replay_nvml *nvml; /* process_memory.c; NULL: there is none to ask */

    /* Written by any thread. */
    _Atomic(struct vgpu_trace_head *) trace; /* NULL: nobody traces */
    _Atomic uint32_t stop;         /* leave run() */
    _Atomic uint32_t ended;        /* the session is over: host functions give up */
    _Atomic uint64_t events;       /* enum replay_event, and above bit 8 the epoch that a lease report is about */
    _Atomic uint64_t callbacks_claimed; /* bit per entry; the page's own state words are the guest's to forge */
    int event_fd; /* written when a bit of `events` is set; the control thread reads it */
    int kick_fd;  /* written by the control thread: the grant page changed, or stop */
    uint64_t spin_ns;
    bool has_waited; /* the guest asked to be told when work is done, and pools may have something to let go of */
    bool in_vm; /* the segment is a slot of a BAR1: the guest's futexes are another kernel's */
    _Atomic uint32_t error; /* sticky error, trusted copy; read by callback threads */
    bool defers;            /* the record at hand has no reply, and has not left an error yet */
};

static inline uint64_t replay_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

static inline _Atomic uint32_t *replay_word(uint32_t *word) { return (_Atomic uint32_t *)word; }
static inline _Atomic uint64_t *replay_quad(uint64_t *word) { return (_Atomic uint64_t *)word; }

/* handles.c */
bool replay_handles_open(struct vgpu_replay *replay);
void replay_handles_close(struct vgpu_replay *replay);
void replay_handles_end_context(struct vgpu_replay *replay, unsigned slot);
/* The stream's real pointer and context slot; clears nothing. */
bool replay_stream_owner(struct vgpu_replay *replay, uint64_t handle, void **real, unsigned *slot);
void replay_stream_clean(struct vgpu_replay *replay, uint64_t handle);
/* A fence was issued behind all of the stream's work so far. */
void replay_stream_fenced(struct vgpu_replay *replay, uint64_t handle, uint32_t index, uint64_t value);
/* Is it certain, without asking the driver, that the stream is empty? The legacy stream never is: others are part of it. */
bool replay_stream_is_clean(struct vgpu_replay *replay, uint64_t handle);

/* loop.c */
/* The record at hand has failed and nobody waits for its reply: the guest learns the code at its next synchronising call, of the
 * first such record. Once a record: a handler calls it before it lets anybody go, and the loop for all others. */
void replay_defer(struct vgpu_replay *replay, CUresult status);

/* fences.c */
void replay_wake(struct vgpu_replay *replay);
void replay_poll_words(struct vgpu_replay *replay);             /* fence words the GPU wrote: memory only */
bool replay_poll_driver(struct vgpu_replay *replay, uint64_t now); /* events and streams; true: nothing is unfinished */
bool replay_outstanding(struct vgpu_replay *replay);
bool replay_fence_is_done(struct vgpu_replay *replay, uint32_t index, uint64_t value);
void replay_forget_context(struct vgpu_replay *replay, unsigned slot);
bool replay_probe_gpu_fence(struct vgpu_replay *replay);
void *replay_helper_stream(struct vgpu_replay *replay, unsigned slot);
/* Has the stream, of the current context, wait for all unfinished work. False: not all of it can be waited for there. */
bool replay_waits_for_all(struct vgpu_replay *replay, void *stream);

void *replay_take_event(struct vgpu_replay *replay); /* of the current context; NULL: none to be had */
void replay_give_event(struct vgpu_replay *replay, void *event, unsigned slot);

/* throttle.c */
void replay_throttle(struct vgpu_replay *replay, const struct vgpu_call *call); /* after a launch under a bounded lease */
void replay_throttle_anew(struct vgpu_replay *replay); /* a lease begins: the device is empty of our work, about */

/* event.c */
CUresult replay_elapsed(struct vgpu_replay *replay, void *start, void *end, float *milliseconds); /* the driver's events */

/* slice_clock.c */
void replay_slice_begins(struct vgpu_replay *replay); /* a lease has begun, and no work under it */
void replay_slice_ends(struct vgpu_replay *replay);   /* a lease is lost; its work may be unfinished */
void replay_slice_charged(struct vgpu_replay *replay, uint64_t charged_ns); /* its work is done; 0: or nobody knows */
void replay_slice_context_ended(struct vgpu_replay *replay, unsigned slot);

/* trace.c */
static inline struct vgpu_trace_head *replay_tracing(struct vgpu_replay *replay)
{
    /* SAFETY: acquire pairs with the store that switches the trace on: its head page is written. */
    return atomic_load_explicit(&replay->private->trace, memory_order_acquire);
}
void replay_trace(struct vgpu_replay *replay, enum vgpu_trace_kind kind, uint32_t call, uint64_t begin_ns, uint64_t end_ns, uint64_t detail);
/* Its end, which is the next one's beginning if that comes at once: a look at the clock is most of what an event costs. */
uint64_t replay_trace_call(struct vgpu_replay *replay, const struct vgpu_call *call, uint64_t begin_ns);
void replay_trace_busy(struct vgpu_replay *replay, uint64_t since_ns, uint64_t now, bool is_over);

/* lease.c */
void replay_lease_read(struct vgpu_replay *replay, uint64_t epoch);
bool replay_lease_begins(struct vgpu_replay *replay); /* is it this session's turn now? */
void replay_lease_lose(struct vgpu_replay *replay, uint64_t now);
/* A session of higher priority has taken the place behind this one's lease: it is to end. For each record of a lease that
 * `watches`. */
static inline bool replay_lease_must_yield(const struct replay_private *private)
{
    uint64_t word = atomic_load_explicit(private->turn, memory_order_relaxed);
    return ((word >> 32) & VGPU_TOKEN_STANDBY) != 0 && (uint32_t)word == private->token;
}
/* Does the turn word name this session's lease? Then nobody will wake it. If not, a kick will come with the next grant. */
bool replay_lease_is_named(struct vgpu_replay *replay);
bool replay_lease_is_near(struct vgpu_replay *replay); /* the turn comes next, or is to be passed on soon: do not sleep */
/* When the lease has ended and what it covered is done, say so, once. */
void replay_lease_report(struct vgpu_replay *replay, uint64_t now, bool unfinished, bool records_wait);

/* context.c */
CUresult replay_primary_open(struct vgpu_replay *replay);
bool replay_select_context(struct vgpu_replay *replay, unsigned slot);

/* arena.c */
/* In the current context, what is registered in none. */
CUresult replay_register_again(struct vgpu_replay *replay);
void replay_registrations_end(struct vgpu_replay *replay, unsigned slot); /* that context is about to end */
bool replay_registered_in(const struct vgpu_replay *replay, unsigned slot);
CUresult replay_register(struct vgpu_replay *replay, uint64_t offset, uint64_t size);
CUresult replay_unregister_all(struct vgpu_replay *replay); /* before the segment is left for another */

/* Memory of the device, for what asks about cuMemCreate or calls it. */
static inline CUmemAllocationProp replay_pinned_here(const struct vgpu_replay *replay)
{
    return (CUmemAllocationProp){.type = 1, .location = {.type = 1, .id = replay->device}};
}

/* process_memory.c */
/* Bytes that this process holds of the device, all contexts together. False: the system does not tell. Some 20 us; 20 ms the first
 * time. */
bool replay_process_memory(struct vgpu_replay *replay, uint64_t *bytes);
void replay_process_memory_close(struct vgpu_replay *replay);

/* callbacks.c */
void replay_callbacks_close(struct vgpu_replay *replay);

/* loop.c */
void replay_notify(struct vgpu_replay *replay, uint32_t event);
void replay_end(struct vgpu_replay *replay, uint32_t state, CUresult error);

/* device_page.c */
CUresult replay_fill_device_page(struct vgpu_replay *replay, uint32_t flags);

#endif
