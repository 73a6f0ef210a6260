/* SPDX-License-Identifier: Apache-2.0 */
/*
 * times.c - where the time of the program's threads goes, as far as this library takes it: building records (encode), copying
 * payload, and waiting, for the device, for answers, for room. docs/tracing.md says what each number means and how wrong it is.
 *
 * A launch takes some tens of nanoseconds, so nothing is measured in most of them. ring.c picks a thread now and then; its next
 * call is timed from shim_enter until its record is in the ring, and stands for all records since the one measured before.
 * Waits and copies are slow anyway: each is measured.
 *
 * Why the time-stamp counter: reading it never leaves a VM. CLOCK_MONOTONIC, which does where a guest has an odd clock source,
 * is read now and then only, to say how long a tick is.
 *
 * Must never: cost a call that is not measured more than a comparison; decide anything. The host takes these words for
 * hearsay, and so should everybody.
 */
#include "core.h"

#include <sys/prctl.h>

#define FIRST_LOOK_NS 50000ull       /* the clocks are compared first so long after the session began, */
#define LOOK_TICKS (1ull << 28)      /* and then again after so many ticks, about a tenth of a second */
#define PREEMPTED_NS 50000ull        /* a call that took longer was interrupted: the next one is measured instead */
#define COST_TURNS 16

bool shim_no_counter;

static struct {
    uint64_t ticks, ns;  /* when the session began, on both clocks */
    uint64_t cost;       /* of reading the counter twice */
    uint64_t preempted;  /* PREEMPTED_NS in ticks, about */
    _Atomic uint64_t looked;   /* ticks when the clocks were last compared */
    _Atomic uint32_t measured; /* sequence number of the record that was measured last */
} times;

static void add(uint64_t *counter, uint64_t amount) { __atomic_fetch_add(counter, amount, __ATOMIC_RELAXED); }

/* A counter that went back, with a VM that moved to another host, has counted nothing. */
static uint64_t since(uint64_t began, uint64_t now) { return (int64_t)(now - began) > 0 ? now - began : 0; }

void shim_times_attach(void)
{
    int allowed = PR_TSC_ENABLE;
    shim_no_counter = prctl(PR_GET_TSC, &allowed) == 0 && allowed != PR_TSC_ENABLE;
    times.cost = UINT64_MAX;
    for (unsigned turn = 0; turn < COST_TURNS; turn++) {
        uint64_t first = shim_ticks(), cost = shim_ticks() - first;
        if (cost < times.cost) times.cost = cost;
    }
    times.ns = shim_now_ns();
    times.ticks = shim_ticks();
    times.preempted = PREEMPTED_NS * 2; /* a counter of 2 GHz; better is not known yet */
    atomic_store(&times.looked, 0);
    atomic_store(&times.measured, 0);
}

/* How long a tick is, from both clocks since the session began. */
static void compare_clocks(uint64_t now)
{
    uint64_t looked = atomic_load_explicit(&times.looked, memory_order_relaxed);
    if (SHIM_LIKELY(looked != 0 && now - looked < LOOK_TICKS)) return;
    uint64_t ns = since(times.ns, shim_now_ns()), ticks = since(times.ticks, now);
    if (ns < FIRST_LOOK_NS || ticks == 0) return;
    atomic_store_explicit(&times.looked, now, memory_order_relaxed);
    uint64_t rate = (uint64_t)((unsigned __int128)ticks * 1000000000u / ns);
    __atomic_store_n(&shim.counters->times.ticks_per_second, rate, __ATOMIC_RELAXED);
}

void shim_times_measure(struct shim_thread_block *block) { block->state.attention |= SHIM_MEASURED; }

void shim_times_encoded(struct shim_thread_block *block, uint32_t sequence)
{
    uint64_t now = shim_ticks(), took = since(block->encode_began, now);
    took = took > times.cost ? took - times.cost : 0;
    if (took > times.preempted) return;
    block->state.attention &= (uint8_t)~SHIM_MEASURED;
    uint32_t records = sequence - atomic_exchange_explicit(&times.measured, sequence, memory_order_relaxed);
    if ((int32_t)records < 0) return; /* another thread's later record has been measured */
    struct vgpu_guest_times *told = &shim.counters->times;
    add(&told->encode_ticks, took * records);
    add(&told->encode_samples, 1);
    compare_clocks(now);
}

/* Something other than encoding, and slow, that a call may do before its record is in the ring or just then. */
static void count_apart(uint64_t *counter, uint64_t began)
{
    uint64_t now = shim_ticks(), took = since(began, now);
    struct shim_thread_block *block = shim_block();
    if (block->encode_began > 1) block->encode_began += took;
    add(counter, took);
    compare_clocks(now);
}

uint64_t shim_copy_begins(void) { return shim_ticks(); }

void shim_copy_ends(uint64_t began) { count_apart(&shim.counters->times.copy_ticks, began); }

void shim_times_rang(uint64_t began) { count_apart(&shim.counters->times.room_ticks, began); }

void shim_times_waited(struct shim_waiter *waiter, enum shim_wait_for what, bool held)
{
    struct vgpu_guest_times *told = &shim.counters->times;
    uint64_t now = shim_ticks();
    now += now == 0;
    if (waiter->marked == 0) {
        shim_block()->encode_began = 0; /* a call that has to wait first is none to measure; the next one is */
        add(what == SHIM_WAIT_FENCE ? &told->sync_waits : what == SHIM_WAIT_RESULT ? &told->answer_waits : &told->room_waits, 1);
    } else {
        uint64_t took = since(waiter->marked, now);
        add(what == SHIM_WAIT_FENCE ? &told->sync_ticks : what == SHIM_WAIT_RESULT ? &told->answer_ticks : &told->room_ticks, took);
        if (held) add(what == SHIM_WAIT_FENCE ? &told->held_sync_ticks : &told->held_ring_ticks, took);
        compare_clocks(now);
    }
    waiter->marked = now;
}
