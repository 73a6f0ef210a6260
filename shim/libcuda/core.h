/* SPDX-License-Identifier: Apache-2.0 */
/*
 * core.h - what the files of the shim's core (session, ring, wait, fences, handles, threads, contexts) share with each
 * other. Subject files use shim.h only; nothing here is for them.
 *
 * Rules: no lock below is ever held while waiting for the host; a call that only reads guest state takes no lock at all.
 */
#ifndef VGPU_SHIM_CORE_H
#define VGPU_SHIM_CORE_H

#include "private_hooks.h"
#include "shim.h"

#define SHIM_LIKELY(x) __builtin_expect(!!(x), 1)
#define SHIM_UNLIKELY(x) __builtin_expect(!!(x), 0)

/* ---- life of the library (init.c) ---- */

enum shim_phase {
    SHIM_FRESH = 0,     /* cuInit has not succeeded yet */
    SHIM_READY = 1,     /* attached */
    SHIM_FORKED = 2,    /* child of a process that had called cuInit: CUDA_ERROR_NOT_INITIALIZED for ever, as CUDA does */
    SHIM_TORN_DOWN = 3, /* the process exits */
};
extern _Atomic int shim_phase; /* release-stored after `shim` is complete */

/* CUDA_SUCCESS when cuInit has succeeded, whatever the state of the device: for calls that only read guest state. */
static inline CUresult shim_enter_local(void);
void shim_tear_down(void);       /* the library's destructor */
CUresult shim_phase_error(void); /* the code for a phase that is not READY */

void shim_stay_loaded(void);     /* from now on the library cannot be unloaded */

/* ---- session (session.c) ---- */

/* Finds a host, attaches and maps. Called once at a time, by init.c. */
CUresult shim_session_attach(void);
void shim_session_detach(void);      /* undoes an attach that turned out useless, e.g. no device is visible */
void shim_session_started(void);     /* the library is ready: what has to run beside it may */
void shim_session_release(void);     /* at exit, after the goodbye: what this process held is free for others */
void shim_session_fork_child(void);  /* closes the descriptors the child inherited */
int shim_session_probe_version(void); /* the host's driver version without a session; 0 when not known */

bool shim_pinned_in_use(void); /* pinned.c: the program has memory of the arena */

/* ---- a VM's device going away (pci_watch.c) ---- */

void shim_look_at_page_now(void); /* pci_map.c */
/* Brings shim.told up to date. Called now and then where threads wait, before an error is concluded, and by the heartbeat. */
static inline void shim_look_at_page(void)
{
    if (SHIM_UNLIKELY(shim.uncached)) shim_look_at_page_now();
}
bool shim_device_is_lost(void);      /* one load; false for ever where there is no PCI device */
void shim_look_for_device(void);     /* for a thread that has waited long: asks, if nothing else in this process does */

/* ---- waiting (wait.c) ---- */

/* A waiter's state; zero-initialise, call shim_wait_step until the condition holds or the step returns an error, and in the
 * first case shim_wait_end. */
struct shim_waiter {
    uint64_t began_ns, sleep_ns;
    uint64_t marked; /* ticks up to which this wait has been counted, 0: not begun */
    uint32_t rounds, sleeps, phase;
    bool held; /* the host was BUSY at the last look */
};
enum shim_wait_for {
    SHIM_WAIT_RESULT, /* the worker answers even after a fault; only the end of the session ends the wait */
    SHIM_WAIT_FENCE,  /* never arrives behind a fault: a sticky error ends the wait too */
    SHIM_WAIT_SPACE,  /* the ring is full: as RESULT, and sleeps are shorter because nobody wakes us */
};
/* One turn of waiting: a pause, a yield or a bounded sleep. `unchanged(argument)` is asked once more after this thread
 * has announced itself as a sleeper. CUDA_SUCCESS: look again. Otherwise the session's error: it will not come. */
CUresult shim_wait_step(struct shim_waiter *waiter, enum shim_wait_for what, bool (*unchanged)(const void *), const void *argument);
/* The wait is over: counts its time. Costs a comparison where nobody had to wait. */
static inline void shim_wait_end(struct shim_waiter *waiter, enum shim_wait_for what);
CUresult shim_session_error(void); /* sticky or terminal error of the session, CUDA_SUCCESS while it lives */
void shim_wait_asleep(bool wanted); /* CU_CTX_SCHED_BLOCKING_SYNC: do not spin for long, however many processors there are */
void shim_wait_configure(void);    /* reads the number of CPUs; at attach and after fork */
uint64_t shim_now_ns(void);

/* ---- a lock that spins briefly, then sleeps (lock.c). Never held across a wait for the host. ---- */

struct shim_lock { _Atomic uint32_t word; }; /* 0 free, 1 held, 2 held and somebody sleeps */
void shim_lock_slow(struct shim_lock *lock);
void shim_lock_wake(struct shim_lock *lock);
static inline void shim_lock_take(struct shim_lock *lock)
{
    uint32_t expected = 0;
    if (SHIM_UNLIKELY(!atomic_compare_exchange_strong_explicit(&lock->word, &expected, 1, memory_order_acquire, memory_order_relaxed)))
        shim_lock_slow(lock);
}
/* A full barrier: what the holder stored is visible to everybody before anything after this line is read. */
static inline void shim_lock_give(struct shim_lock *lock)
{
    if (SHIM_UNLIKELY(atomic_exchange_explicit(&lock->word, 0, memory_order_seq_cst) == 2)) shim_lock_wake(lock);
}
extern bool shim_many_processors; /* spinning makes sense */

/* ---- submission (ring.c) ---- */

void shim_ring_attach(void); /* private copies of the ring's geometry */
void shim_ring_doorbell(void); /* rings if the worker asked for it */
void shim_ring_goodbye(void);  /* wireGoodbye if there is room this instant; never waits */
void shim_fence_attach(void);  /* fence.c */
void shim_fence_give_word(uint32_t index); /* a word its thread no longer keeps; 0 is fine */

/* ---- threads (thread.c) ---- */

struct shim_other_stream { uint64_t context, stream; struct shim_other_stream *next; };
struct shim_thread_block {
    struct shim_thread state;  /* first: shim_thread() hands out its address */
    uint32_t local_calls;      /* not yet added to the session page */
    uint32_t fence;            /* a free fence word this thread keeps, 0 none */
    uint32_t slot_hint;
    bool ending;               /* the thread is going: no new stream for it */
    uint64_t encode_began;     /* ticks when the call that is being measured was entered; 0: none is */
    struct shim_other_stream *others; /* per-thread streams in contexts other than state.per_thread_context */
};
extern __thread struct shim_thread_block *shim_self __attribute__((tls_model("initial-exec")));
struct shim_thread_block *shim_thread_make(void);
static inline struct shim_thread_block *shim_block(void)
{
    struct shim_thread_block *block = shim_self;
    return SHIM_LIKELY(block != NULL) ? block : shim_thread_make();
}
void shim_thread_fork_child(void);

/* ---- where the time goes (times.c) ---- */

/* Ticks of the time-stamp counter, which a guest reads without leaving its VM; nanoseconds where it may not be read. */
extern bool shim_no_counter;
static inline uint64_t shim_ticks(void) { return SHIM_UNLIKELY(shim_no_counter) ? shim_now_ns() : __builtin_ia32_rdtsc(); }
void shim_times_attach(void);
void shim_times_measure(struct shim_thread_block *block); /* the thread's next call is measured */
void shim_times_encoded(struct shim_thread_block *block, uint32_t sequence); /* its record is in the ring */
void shim_times_rang(uint64_t began); /* the doorbell was rung, from `began` (ticks) on: counts as waiting for room */
void shim_times_waited(struct shim_waiter *waiter, enum shim_wait_for what, bool held); /* counts up to now */
static inline void shim_wait_end(struct shim_waiter *waiter, enum shim_wait_for what)
{
    if (SHIM_UNLIKELY(waiter->marked != 0)) shim_times_waited(waiter, what, waiter->held);
}

/* ---- counters ---- */

/* As the end of the session page: that itself, or in a VM private memory of which the page gets copies. */
struct shim_counters {
    uint64_t local_calls, async_calls, fence_calls, reply_calls, refused_calls;
    uint32_t refused[VGPU_REFUSED_NAMES];
    struct vgpu_guest_times times;
};
_Static_assert(offsetof(struct vgpu_session_page, times) - offsetof(struct vgpu_session_page, local_calls) ==
                   offsetof(struct shim_counters, times),
               "counters are laid out as in the session page");
_Static_assert(offsetof(struct vgpu_session_page, refused) - offsetof(struct vgpu_session_page, local_calls) ==
                   offsetof(struct shim_counters, refused),
               "counters are laid out as in the session page");

void shim_count_flush(struct shim_thread_block *block);
void shim_counters_publish(void); /* in a VM: to the session page, for the host's metrics */
static inline void shim_count_local(void)
{
    struct shim_thread_block *block = shim_block();
    if (SHIM_UNLIKELY(++block->local_calls >= 256)) shim_count_flush(block);
}

/* ---- contexts (context.c, primary.c) ---- */

#define SHIM_LIMITS 10
struct shim_context {
    uint64_t handle, number; /* number: cuCtxGetId */
    _Atomic uint32_t active; /* the host has it */
    _Atomic uint32_t flags;
    bool is_primary;
    _Atomic uint8_t limit_known[SHIM_LIMITS]; /* 1: limit_status and limit_value are set */
    CUresult limit_status[SHIM_LIMITS];
    uint64_t limit_value[SHIM_LIMITS];
};
struct shim_context *shim_context_find(uint64_t handle); /* NULL: no such context, or destroyed */
struct shim_context *shim_context_make(bool is_primary);
void shim_context_unmake(struct shim_context *context);
void shim_context_run_end_hooks(uint64_t handle);
void shim_primary_attach(void);      /* makes the primary context's handle */
uint64_t shim_primary_handle(void);
CUresult shim_context_synchronise(void);

/* ---- devices (device.c, visible.c) ---- */

/* Is device `index` (of `count`, with these UUIDs) shown under this value of CUDA_VISIBLE_DEVICES? list may be NULL (unset).
 * Writes the indexes shown, in order, to out (room for count); returns how many, -1 if one is named twice. Pure. */
int shim_visible_devices(const char *list, const uint8_t (*uuid)[16], int count, int *out);
extern int shim_devices; /* 0 or 1, fixed before phase READY */
static inline bool shim_device_ok(int device) { return device >= 0 && device < shim_devices; }

/* The version this library speaks: never more than this, and never more than the host's driver. */
#define SHIM_API_VERSION 13000
int shim_reported_version(void);

static inline CUresult shim_enter_local(void)
{
    return SHIM_LIKELY(atomic_load_explicit(&shim_phase, memory_order_acquire) == SHIM_READY) ? CUDA_SUCCESS : shim_phase_error();
}

/* Prologue of an entry that is answered in the guest. */
#define SHIM_LOCAL_ENTRY                                           \
    do {                                                           \
        CUresult entry_status = shim_enter_local();                \
        if (SHIM_UNLIKELY(entry_status != CUDA_SUCCESS)) return entry_status; \
        shim_count_local();                                        \
    } while (0)

#endif
