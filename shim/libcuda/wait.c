/* SPDX-License-Identifier: Apache-2.0 */
/*
 * wait.c - how a guest thread waits for the host: spin, then yield, then sleep on the session's futex word in growing steps.
 *
 * Why steps: a fence is stored by the GPU, which wakes nobody; a worker can be killed, and then wakes nobody either. So no
 * sleep is unbounded, and a thread that has slept a while asks the lifeline whether there is still somebody at its other end.
 *
 * How long to spin depends on the processors this process may use. With one or two, whoever spins takes time from the very
 * process it waits for; with many, twenty milliseconds of spinning keep the latency of a synchronisation that of native CUDA,
 * which spins for ever there. A sleep after that lasts a hundredth of the wait so far, so what is overslept of a copy of
 * gigabytes or a long kernel is within a percent of its time.
 *
 * In a VM a futex does not reach the host, nor the host's the guest, so there a sleep is just that. It lasts an eighth of the
 * wait so far: short waits are met within microseconds, and a processor that has nothing else to do is used for a percent or
 * two. (The timer slack, 50 us, is the program's own affair and stays as it is.)
 *
 * Must never: sleep without a time limit; trust that a wake comes.
 */
#include "core.h"

#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SPIN_NS_FEW_PROCESSORS 4000ull
#define SPIN_NS_MANY_PROCESSORS 20000000ull
#define SPIN_NS_TWO_PROCESSORS_IN_VM 50000ull /* the worker has processors of its own, the program may want both of these */
#define FIRST_SLEEP_IN_VM_NS 20000ull
#define OVERSLEEP_SHARE_IN_VM 8
#define LONG_WAIT_NS 1000000000ull /* time to ask whether there is still a device */
#define OVERSLEEP_SHARE 128 /* part of the wait so far that a sleep may last, where processors are many */
#define YIELD_ROUNDS 4 /* after the spin, where processors are few: the worker may only need ours */
#define FIRST_SLEEP_NS 50000ull
#define LONGEST_SLEEP_NS 5000000ull
#define LONGEST_SPACE_SLEEP_NS 500000ull /* nobody announces that the ring has room */
#define LONGEST_BUSY_SLEEP_NS 100000000ull
#define HANGUP_GRACE_NS 200000000ull /* how long whoever killed the worker has to write down why */
#define NOBODY UINT32_MAX            /* what a word reads where a device has been unplugged */
#define LOOK_EVERY_ROUNDS 64u        /* looks at the clock and the session's state */

enum { PHASE_SPIN = 0, PHASE_YIELD, PHASE_SLEEP };

static uint64_t spin_ns = SPIN_NS_MANY_PROCESSORS;
static _Atomic bool asleep; /* a context asks for CU_CTX_SCHED_BLOCKING_SYNC */

uint64_t shim_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

void shim_wait_configure(void)
{
    cpu_set_t set;
    int processors = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    spin_ns = processors > 2                    ? SPIN_NS_MANY_PROCESSORS
              : processors == 2 && shim_in_vm() ? SPIN_NS_TWO_PROCESSORS_IN_VM
                                                : SPIN_NS_FEW_PROCESSORS;
    shim_many_processors = processors > 1;
}

void shim_wait_asleep(bool wanted) { atomic_store_explicit(&asleep, wanted, memory_order_relaxed); }

CUresult shim_session_error(void)
{
    const struct vgpu_session_page *page = shim.told;
    uint32_t sticky = __atomic_load_n(&page->sticky_error, __ATOMIC_RELAXED);
    if (sticky != 0) return sticky == NOBODY ? CUDA_ERROR_DEVICE_UNAVAILABLE : (CUresult)sticky;
    if (__atomic_load_n(&page->device_lost, __ATOMIC_RELAXED) != 0) return CUDA_ERROR_DEVICE_UNAVAILABLE;
    /* SAFETY: acquire pairs with the host's release store of `state`, which comes after sticky_error. */
    uint32_t state = __atomic_load_n(&page->state, __ATOMIC_ACQUIRE);
    if (SHIM_LIKELY(state == VGPU_SESSION_READY)) return CUDA_SUCCESS;
    /* No host writes another state: where the device has been unplugged, nothing answers, and reads say 0 or ones. */
    if (shim_device_is_lost() || state == VGPU_SESSION_EMPTY || state > VGPU_SESSION_DEAD) return CUDA_ERROR_DEVICE_UNAVAILABLE;
    sticky = __atomic_load_n(&page->sticky_error, __ATOMIC_RELAXED);
    if (sticky != 0) return (CUresult)sticky;
    return state == VGPU_SESSION_CLOSED ? CUDA_ERROR_DEINITIALIZED : CUDA_ERROR_UNKNOWN;
}

/* Will nobody ever answer again? A sticky error alone does not mean that. */
static bool is_over(void)
{
    return __atomic_load_n(&shim.page->state, __ATOMIC_ACQUIRE) != VGPU_SESSION_READY ||
           __atomic_load_n(&shim.page->device_lost, __ATOMIC_RELAXED) != 0;
}

static bool lifeline_has_ended(void)
{
    struct pollfd end = {.fd = shim.lifeline, .events = POLLRDHUP};
    return shim.lifeline >= 0 && poll(&end, 1, 0) == 1 && (end.revents & (POLLHUP | POLLRDHUP | POLLERR | POLLNVAL)) != 0;
}

/* The worker's end of the lifeline is gone. Whoever ended it may be about to say why (a watchdog writes
 * CUDA_ERROR_LAUNCH_TIMEOUT); else the session dies of an unknown cause. One thread's verdict is everybody's. */
static void conclude_hangup(void)
{
    for (uint64_t began = shim_now_ns(); !is_over() && shim_now_ns() - began < HANGUP_GRACE_NS;) {
        struct timespec nap = {.tv_nsec = 1000000};
        nanosleep(&nap, NULL);
    }
    uint32_t none = 0;
    if (!is_over())
        __atomic_compare_exchange_n(&shim.page->sticky_error, &none, (uint32_t)CUDA_ERROR_UNKNOWN, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    uint32_t ready = VGPU_SESSION_READY;
    __atomic_compare_exchange_n(&shim.page->state, &ready, (uint32_t)VGPU_SESSION_DEAD, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
    syscall(SYS_futex, &shim.page->wake, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
    shim_log(SHIM_ERROR, "the worker of session %llu is gone", (unsigned long long)shim.page->session_id);
}

/* Half to one and a half times `ns`, so that threads (and guests) that wait for the same thing do not move in step. */
static uint64_t jittered(uint64_t ns)
{
    static __thread uint32_t seed __attribute__((tls_model("initial-exec")));
    seed = (seed != 0 ? seed : (uint32_t)shim_now_ns()) * 1664525u + 1013904223u;
    return ns / 2 + (uint64_t)(((unsigned __int128)ns * seed) >> 32);
}

/* Counts the wait up to now, as one that the host imposes (BUSY) if it did at the look before. Long waits show while they
 * last, and what a look sees holds until the next one. */
static void count_wait(struct shim_waiter *waiter, enum shim_wait_for what)
{
    uint32_t busy = __atomic_load_n(&shim.page->busy, __ATOMIC_RELAXED);
    shim_times_waited(waiter, what, waiter->held);
    waiter->held = busy != 0 && busy != NOBODY;
}

static void sleep_in_vm(struct shim_waiter *waiter, enum shim_wait_for what, bool (*unchanged)(const void *), const void *argument)
{
    const struct vgpu_session_page *page = shim.page;
    uint64_t limit = what == SHIM_WAIT_SPACE ? LONGEST_SPACE_SLEEP_NS : LONGEST_SLEEP_NS, waited = shim_now_ns() - waiter->began_ns;
    bool long_spin = what == SHIM_WAIT_FENCE && spin_ns == SPIN_NS_MANY_PROCESSORS && !atomic_load_explicit(&asleep, memory_order_relaxed);
    uint64_t step = waited / (long_spin ? OVERSLEEP_SHARE : OVERSLEEP_SHARE_IN_VM);
    if (step < FIRST_SLEEP_IN_VM_NS) step = FIRST_SLEEP_IN_VM_NS;
    if (__atomic_load_n(&page->busy, __ATOMIC_RELAXED) != 0) {
        uint64_t hint = __atomic_load_n(&page->busy_retry_ns, __ATOMIC_RELAXED);
        if (hint > step) step = hint;
        limit = LONGEST_BUSY_SLEEP_NS;
    }
    shim_ring_doorbell();
    uint64_t nap_ns = jittered(step < limit ? step : limit);
    struct timespec nap = {.tv_nsec = (long)nap_ns};
    count_wait(waiter, what);
    if (unchanged(argument) && !is_over()) nanosleep(&nap, NULL);
    count_wait(waiter, what);
    if (waited > LONG_WAIT_NS) shim_look_for_device();
}

static void sleep_a_step(struct shim_waiter *waiter, enum shim_wait_for what, bool (*unchanged)(const void *), const void *argument)
{
    struct vgpu_session_page *page = shim.page;
    uint64_t limit = what == SHIM_WAIT_SPACE ? LONGEST_SPACE_SLEEP_NS : LONGEST_SLEEP_NS;
    uint64_t step = waiter->sleep_ns != 0 ? waiter->sleep_ns : FIRST_SLEEP_NS;
    if (what == SHIM_WAIT_FENCE && spin_ns == SPIN_NS_MANY_PROCESSORS && !atomic_load_explicit(&asleep, memory_order_relaxed))
        step = (shim_now_ns() - waiter->began_ns) / OVERSLEEP_SHARE;
    if (__atomic_load_n(&page->busy, __ATOMIC_RELAXED) != 0) {
        /* No lease: the record stays where it is and keeps its place. Back off, and knock again each time. */
        uint64_t hint = __atomic_load_n(&page->busy_retry_ns, __ATOMIC_RELAXED);
        if (hint > step) step = hint;
        limit = LONGEST_BUSY_SLEEP_NS;
    }
    if (step > limit) step = limit;
    shim_ring_doorbell();
    uint64_t nap_ns = jittered(step);
    struct timespec nap = {.tv_sec = (time_t)(nap_ns / 1000000000ull), .tv_nsec = (long)(nap_ns % 1000000000ull)};
    /* SAFETY: the increment (a full barrier) and then the last look pair with the worker, which stores its answer and then,
     * after a full barrier, reads guest_waiters. */
    count_wait(waiter, what);
    __atomic_fetch_add(&page->guest_waiters, 1, __ATOMIC_SEQ_CST);
    uint32_t seen = __atomic_load_n(&page->wake, __ATOMIC_SEQ_CST);
    if (unchanged(argument) && !is_over()) syscall(SYS_futex, &page->wake, FUTEX_WAIT, seen, &nap, NULL, 0);
    __atomic_fetch_sub(&page->guest_waiters, 1, __ATOMIC_SEQ_CST);
    count_wait(waiter, what);
    waiter->sleep_ns = step * 2 < limit ? step * 2 : limit;
    if (++waiter->sleeps >= 3 && unchanged(argument) && !is_over() && lifeline_has_ended()) conclude_hangup();
}

CUresult shim_wait_step(struct shim_waiter *waiter, enum shim_wait_for what, bool (*unchanged)(const void *), const void *argument)
{
    if (SHIM_UNLIKELY(waiter->marked == 0)) shim_times_waited(waiter, what, false);
    if (waiter->phase == PHASE_SPIN) {
        __builtin_ia32_pause();
        if (SHIM_LIKELY(++waiter->rounds % LOOK_EVERY_ROUNDS != 0)) return CUDA_SUCCESS;
        uint64_t now = shim_now_ns();
        shim_look_at_page();
        if ((__atomic_load_n(&shim.page->busy, __ATOMIC_RELAXED) != 0) != waiter->held) count_wait(waiter, what);
        if (waiter->began_ns == 0) waiter->began_ns = now;
        uint64_t limit = atomic_load_explicit(&asleep, memory_order_relaxed) ? SPIN_NS_FEW_PROCESSORS : spin_ns;
        if (now - waiter->began_ns >= limit) {
            waiter->phase = PHASE_YIELD;
            waiter->rounds = 0;
        }
    } else if (waiter->phase == PHASE_YIELD) {
        sched_yield();
        if (++waiter->rounds >= YIELD_ROUNDS) waiter->phase = PHASE_SLEEP;
    } else if (shim_in_vm()) {
        sleep_in_vm(waiter, what, unchanged, argument);
    } else {
        sleep_a_step(waiter, what, unchanged, argument);
    }
    if (is_over() || (what == SHIM_WAIT_FENCE && __atomic_load_n(&shim.page->sticky_error, __ATOMIC_RELAXED) != 0)) {
        shim_look_at_page();
        /* The answer may have come just before the end. */
        CUresult error = unchanged(argument) ? shim_session_error() : CUDA_SUCCESS;
        if (error != CUDA_SUCCESS) shim_wait_end(waiter, what);
        if (atomic_load_explicit(&shim_phase, memory_order_relaxed) == SHIM_TORN_DOWN && error != CUDA_SUCCESS) return CUDA_ERROR_DEINITIALIZED;
        return error;
    }
    return CUDA_SUCCESS;
}
