/* SPDX-License-Identifier: Apache-2.0 */
/*
 * loop.c - the replay loop: one record after another, for as long as the session lives and holds a lease.
 *
 * A record costs a header copy, five comparisons, one load of the lease's epoch, the handler, and one store of `head`;
 * no system call, no lock, no clock. Every POLL_RECORDS records, and while idle, the clock is read and what the GPU has
 * finished (or broken) is looked at. docs/wire.md sections 2 and 3.
 *
 * Must never: read a header field from the ring twice; let a record that breaks a rule reach a handler; wait for the GPU.
 */
#include "allocations.h"
#include "flight.h"
#include "internal.h"
#include "vm_limits.h"
#include "session.h"

#include <linux/futex.h>
#include <poll.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LIKELY(x) __builtin_expect(!!(x), 1)
#define UNLIKELY(x) __builtin_expect(!!(x), 0)

#define POLL_RECORDS 16u             /* records between two looks at the clock */
#define POLL_BUSY_NS 1000000ull      /* driver polls while records keep coming */
#define POLL_IDLE_NS 25000ull        /* while none come and something is unfinished */
#define POLL_LONG_NS 200000ull       /* when that has lasted for LONG_NS: a long kernel needs no fine clock */
#define LONG_NS 20000000ull
#define FAILURES_LOGGED 16u          /* lines of log that one session may cause */
#define SLEEP_NS 500000000ull        /* longest sleep; the lifeline and kicks end it sooner */
#define LEASE_IDLE_NS 100000ull      /* a lease that runs out is given back after so long with nothing to do */
#define TIMER_SLACK_NS 2000ul         /* of the replay thread's short sleeps; the kernel's default is 50000 */
#define TELL_NS 500000000ull
#define SHORT_WAIT_NS 50000ull       /* for the VM's limits: not worth to sleep */
#define VM_NAP_NS 50000ull           /* a doorbell out of a VM costs an exit: short pauses are slept through without */
#define VM_NAPS_NS 8000000ull        /* as long as a virtual processor may be off its processor on a busy host */
#define POLL_DRAIN_NS 2000ull        /* when the turn is to be passed on as soon as the device is empty */

/* One session's loop, on the stack of run(). */
struct loop {
    struct vgpu_replay *replay;
    struct replay_private *private;
    const uint8_t *ring;
    uint64_t head, tail;
    uint64_t polled_ns, idle_since_ns, unfinished_since_ns;
    uint64_t quiet_since_ns; /* the device has been empty since, as far as this session knows */
    uint64_t replaying_since_ns; /* replay_ns is counted up to here; 0: nothing is being replayed */
    uint64_t traced_ns; /* the call before this one ended then, in the trace, and nothing has come between; 0: there is none */
    bool unfinished;
    bool held; /* the record at head must wait: the VM's limits */
    bool rests; /* and that for longer than a lease is kept for nothing */
};

#define LEASE_REPORTS (uint64_t)(REPLAY_EVENT_DEMAND | REPLAY_EVENT_IDLE)

void replay_notify(struct vgpu_replay *replay, uint32_t event)
{
    struct replay_private *private = replay->private;
    uint64_t before = atomic_load(&private->events), after;
    do
        after = (event & LEASE_REPORTS) != 0 ? (before & 0xff) | event | private->epoch << 8 : before | event;
    while (!atomic_compare_exchange_weak(&private->events, &before, after));
    uint64_t one = 1;
    if (private->event_fd >= 0)
        (void)!write(private->event_fd, &one, sizeof one);
}

bool replay_is_sticky(CUresult error)
{
    switch (error) {
    case CUDA_ERROR_ECC_UNCORRECTABLE:
    case CUDA_ERROR_NVLINK_UNCORRECTABLE:
    case CUDA_ERROR_CONTAINED:
    case CUDA_ERROR_ILLEGAL_ADDRESS:
    case CUDA_ERROR_LAUNCH_TIMEOUT:
    case CUDA_ERROR_ASSERT:
    case CUDA_ERROR_HARDWARE_STACK_ERROR:
    case CUDA_ERROR_ILLEGAL_INSTRUCTION:
    case CUDA_ERROR_MISALIGNED_ADDRESS:
    case CUDA_ERROR_INVALID_ADDRESS_SPACE:
    case CUDA_ERROR_INVALID_PC:
    case CUDA_ERROR_LAUNCH_FAILED:
    case CUDA_ERROR_TENSOR_MEMORY_LEAK:
        return true;
    default:
        return false;
    }
}

static void wake_all(struct vgpu_replay *replay)
{
    atomic_fetch_add(replay_word(&replay->page->wake), 1);
    if (replay->private->in_vm) /* it sleeps in another kernel, and looks at the word now and then */
        return;
    syscall(SYS_futex, &replay->page->wake, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

void replay_wake(struct vgpu_replay *replay)
{
    /* SAFETY: the barrier pairs with the guest, which counts itself in guest_waiters and then looks once more. */
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(replay_word(&replay->page->guest_waiters), memory_order_relaxed) != 0)
        wake_all(replay);
}

void replay_fault(struct vgpu_replay *replay, CUresult error)
{
    if (replay->private->error != 0)
        return;
    replay->private->error = error;
    replay->grant->last_error = error;
    /* SAFETY: release: whoever sees the error also sees every answer given before it. */
    atomic_store_explicit(replay_word(&replay->page->sticky_error), error, memory_order_release);
    replay_notify(replay, REPLAY_EVENT_FAULT);
    wake_all(replay);
}

void replay_defer(struct vgpu_replay *replay, CUresult status)
{
    struct replay_private *private = replay->private;
    if (!private->defers || private->error != 0)
        return;
    private->defers = false;
    uint32_t none = 0;
    atomic_compare_exchange_strong(replay_word(&replay->page->deferred_error), &none, status);
}

void replay_end(struct vgpu_replay *replay, uint32_t state, CUresult error)
{
    if (error != CUDA_SUCCESS)
        replay_fault(replay, error);
    atomic_store(&replay->private->ended, 1);
    atomic_store_explicit(replay_word(&replay->page->state), state, memory_order_release);
    wake_all(replay);
    /* Callback threads of the driver that wait for the guest look at `ended` when woken. */
    for (unsigned i = 0; i < VGPU_CALLBACK_ENTRIES; i++)
        syscall(SYS_futex, &replay->page->callback[i].state, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

CUresult replay_wireGoodbye(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    replay_end(replay, VGPU_SESSION_CLOSED, CUDA_SUCCESS);
    return CUDA_SUCCESS;
}

/* ---- the lease ---- */

/* May one more record be consumed? */
static inline bool lease_allows(struct loop *loop)
{
    struct replay_private *private = loop->private;
    /* SAFETY: acquire pairs with the mediator's store of `epoch`, its last. */
    uint64_t epoch = atomic_load_explicit(replay_quad(&loop->replay->grant->epoch), memory_order_acquire);
    if (UNLIKELY(epoch != private->epoch))
        replay_lease_read(loop->replay, epoch);
    if (LIKELY(private->open_ended && !private->watches))
        return private->leased;
    if (!private->leased && !replay_lease_begins(loop->replay))
        return false;
    if (UNLIKELY(private->watches && replay_lease_must_yield(private))) {
        replay_lease_lose(loop->replay, replay_now_ns());
        return false;
    }
    uint64_t now = private->deadline_ns != 0 ? replay_now_ns() : 0;
    if (private->credits == 0 || now > private->deadline_ns) {
        replay_lease_lose(loop->replay, now);
        return false;
    }
    if (private->credits > 0)
        private->credits--;
    return true;
}

/* ---- looking at the device ---- */

static void look(struct loop *loop, uint64_t now, uint64_t interval_ns)
{
    struct vgpu_replay *replay = loop->replay;
    if (!replay_outstanding(replay)) {
        if (UNLIKELY(loop->private->has_waited)) { /* where the driver would let go of what pools need not keep */
            replay_pools_settle(replay, REPLAY_POOLS_COUNT);
            loop->private->has_waited = replay_pools_hold_more(replay);
        }
        if (loop->unfinished)
            loop->quiet_since_ns = now;
        loop->unfinished = false;
        loop->unfinished_since_ns = 0;
        replay_limits_drained(replay);
        replay_pulse_look(replay, now, true);
        return;
    }
    replay_poll_words(replay);
    replay_pulse_look(replay, now, false);
    if (loop->unfinished_since_ns == 0)
        loop->unfinished_since_ns = now;
    loop->unfinished = true;
    if (now - loop->polled_ns < interval_ns)
        return;
    loop->polled_ns = now;
    if (loop->private->error == 0 && replay_poll_driver(replay, now)) {
        replay_limits_drained(replay);
        replay_pulse_look(replay, now, true);
        loop->unfinished = false;
        loop->quiet_since_ns = now;
        loop->unfinished_since_ns = 0;
    }
    if (loop->private->error != 0)
        loop->unfinished = false;
}

/* ---- one record ---- */

static int broken(struct loop *loop)
{
    loop->replay->grant->protocol_errors++;
    replay_end(loop->replay, VGPU_SESSION_DEAD, CUDA_ERROR_INVALID_VALUE);
    return VGPU_RUN_PROTOCOL;
}

/* Counts the record; true for a launch. */
static inline bool account(struct vgpu_replay *replay, const struct vgpu_call *call)
{
    struct vgpu_grant_page *grant = replay->grant;
    struct replay_private *private = replay->private;
    /* What a record does to the device is the same whether somebody waits for its answer or not. */
    uint64_t *records = (call->flags & VGPU_CALL_REPLY) != 0 ? &grant->reply_records : &grant->async_records;
    switch (call->call) {
    case VGPU_CALL_wireFence:
    case VGPU_CALL_wireFenceContext:
    case VGPU_CALL_wireFenceEvent:
        private->has_waited = replay_pools_hold_more(replay);
        if (records == &grant->async_records)
            records = &grant->fence_records;
        break;
    case VGPU_CALL_wireLaunch:
    case VGPU_CALL_cuGraphLaunch: grant->launches++; ++*records; return true;
    case VGPU_CALL_wireCopyInline: grant->bytes_to_device += call->argument[1]; break;
    case VGPU_CALL_wireCopyToDevice: grant->bytes_to_device += call->argument[2]; break;
    case VGPU_CALL_wireCopyFromDevice: grant->bytes_from_device += call->argument[2]; break;
    default: break;
    }
    ++*records;
    return false;
}

static void answer(struct vgpu_replay *replay, const struct vgpu_call *call, const struct vgpu_result *result, const uint8_t *reply)
{
    struct vgpu_slot *slot = (struct vgpu_slot *)(void *)(replay->segment + replay->slots_offset) + call->slot;
    uint32_t length = result->payload_length <= VGPU_SLOT_PAYLOAD_LIMIT ? result->payload_length : VGPU_SLOT_PAYLOAD_LIMIT;
    if (length != 0)
        memcpy(slot->payload, reply, length);
    slot->result.status = result->status;
    slot->result.payload_length = (uint16_t)length;
    memcpy(slot->result.value, result->value, sizeof result->value);
    /* SAFETY: release pairs with the guest's acquire load of `sequence`. */
    atomic_store_explicit(replay_word(&slot->result.sequence), call->sequence, memory_order_release);
    replay_wake(replay);
}

/* replay_ns up to now, and whether it goes on from there. */
static void count_replay(struct loop *loop, uint64_t now, bool goes_on)
{
    loop->traced_ns = 0;
    if (loop->replaying_since_ns != 0)
        loop->replay->grant->replay_ns += now - loop->replaying_since_ns;
    loop->replaying_since_ns = goes_on ? now : 0;
}

static void replay_record(struct loop *loop, const struct vgpu_call *call, const void *payload)
{
    struct vgpu_replay *replay = loop->replay;
    struct vgpu_grant_page *grant = replay->grant;
    uint8_t reply[VGPU_SLOT_PAYLOAD_LIMIT] __attribute__((aligned(16)));
    struct vgpu_result result = {0};
    CUresult status;
    uint64_t began = 0, taken_ns = 0;
    if (UNLIKELY(replay_tracing(replay) != NULL))
        began = loop->traced_ns != 0 ? loop->traced_ns : replay_now_ns();
    loop->private->defers = (call->flags & VGPU_CALL_REPLY) == 0;
    if (UNLIKELY(loop->private->error != 0) && call->call != VGPU_CALL_wireGoodbye) {
        status = loop->private->error; /* the context is poisoned: the driver is not asked any more */
    } else if (LIKELY(call->call < VGPU_CALL_COUNT && replay_entries[call->call].handler != NULL)) {
        struct vgpu_flight *flight = loop->private->flight;
        grant->current_call = call->call;
        if ((call->flags & VGPU_CALL_REPLY) != 0)
            grant->current_since_ns = taken_ns = replay_now_ns();
        replay_flight_begin(flight, call, grant->current_since_ns);
        status = replay_entries[call->call].handler(replay, call, payload, &result, reply);
        replay_flight_end(flight, status);
        grant->current_call = 0;
    } else if (call->call < VGPU_CALL_COUNT) {
        status = CUDA_ERROR_NOT_SUPPORTED;
    } else {
        status = CUDA_ERROR_INVALID_VALUE;
        grant->protocol_errors++;
    }
    if (UNLIKELY(began != 0))
        loop->traced_ns = replay_trace_call(replay, call, began);
    bool launched = account(replay, call);
    if (UNLIKELY(launched && (!loop->private->open_ended || loop->private->in_flight_ns != 0)) && status == CUDA_SUCCESS) {
        replay_throttle(replay, call);
        loop->traced_ns = 0;
    }
    if (UNLIKELY(status != CUDA_SUCCESS)) {
        grant->replay_errors++;
        if (replay_limits_refused(replay)) /* whatever the handler made of it */
            status = CUDA_ERROR_OUT_OF_MEMORY;
        if (replay_is_sticky(status))
            replay_fault(replay, status);
        else if ((call->flags & VGPU_CALL_REPLY) == 0 && loop->private->error == 0) {
            /* Nobody else knows which call it was: the guest learns the code at its next synchronising call. */
            if (loop->private->failures_logged++ < FAILURES_LOGGED)
                fprintf(stderr, "session %llu: %s failed with %d\n", (unsigned long long)replay->grant->session_id,
                        vgpu_call_name(call->call), (int)status);
            replay_defer(replay, status);
        }
    }
    if ((call->flags & VGPU_CALL_REPLY) != 0) {
        result.status = (uint16_t)status;
        answer(replay, call, &result, reply);
        if (LIKELY(taken_ns != 0))
            grant->answered_ns += replay_now_ns() - taken_ns;
    }
}

/* Takes the record at `head`. 0: go on; else the reason to leave run(). */
static inline int take_record(struct loop *loop)
{
    struct vgpu_replay *replay = loop->replay;
    uint64_t available = loop->tail - loop->head;
    uint64_t offset = loop->head & (replay->ring_size - 1);
    uint64_t to_end = replay->ring_size - offset;
    if (UNLIKELY(available < sizeof(struct vgpu_call) || to_end < sizeof(struct vgpu_call)))
        return broken(loop);
    struct vgpu_call call;
    memcpy(&call, loop->ring + offset, sizeof call);
    /* SAFETY: after this barrier the compiler may not go back to the ring for what is in `call`. */
    atomic_signal_fence(memory_order_seq_cst);
    __asm__ volatile("" : "+m"(call) : : "memory");
    uint64_t size = (sizeof call + (uint64_t)call.payload_length + (VGPU_RECORD_ALIGNMENT - 1)) & ~(uint64_t)(VGPU_RECORD_ALIGNMENT - 1);
    if (UNLIKELY(size > available || size > to_end || call.reserved != 0 || (call.flags & ~VGPU_CALL_REPLY) != 0))
        return broken(loop);
    if (UNLIKELY(call.call == VGPU_CALL_PAD)) {
        if (size != to_end || call.flags != 0)
            return broken(loop);
    } else {
        if (UNLIKELY(call.payload_length > VGPU_INLINE_LIMIT))
            return broken(loop);
        if (UNLIKELY((call.flags & VGPU_CALL_REPLY) != 0 && call.slot >= replay->slot_count))
            return broken(loop);
        bool is_limited = UNLIKELY(replay_limits_are_set(replay));
        if (is_limited && !replay_limits_take(replay, &call)) {
            loop->held = true;
            return 0;
        }
        uint64_t bytes = is_limited ? replay->grant->bytes_to_device + replay->grant->bytes_from_device : 0;
        replay_record(loop, &call, loop->ring + offset + sizeof call);
        replay->grant->records++;
        if (is_limited)
            replay_limits_spent(replay, &call, replay->grant->bytes_to_device + replay->grant->bytes_from_device - bytes);
    }
    loop->head += size;
    /* SAFETY: release pairs with the guest's acquire load of `head`: the payload has been read. */
    atomic_store_explicit(replay_quad(&replay->page->head), loop->head, memory_order_release);
    return 0;
}

/* ---- waiting ---- */

/* Has the guest produced? Checks what it claims. */
static bool fetch_tail(struct loop *loop, int *leave)
{
    /* SAFETY: acquire pairs with the guest's release store of `tail`. */
    uint64_t tail = atomic_load_explicit(replay_quad(&loop->replay->page->tail), memory_order_acquire);
    if (tail == loop->head)
        return false;
    if (tail - loop->head > loop->replay->ring_size || (tail & (VGPU_RECORD_ALIGNMENT - 1)) != 0) {
        *leave = broken(loop);
        return false;
    }
    loop->tail = tail;
    return true;
}

static bool epoch_changed(struct loop *loop)
{
    return atomic_load_explicit(replay_quad(&loop->replay->grant->epoch), memory_order_acquire) != loop->private->epoch;
}

/* Sleeps until a doorbell, a kick or the time-out. 0, or the reason to leave run(). */
static int sleep_until(struct loop *loop, uint64_t timeout_ns)
{
    struct vgpu_replay *replay = loop->replay;
    struct pollfd source[2] = {{.fd = replay->lifeline, .events = POLLIN | POLLRDHUP}, {.fd = loop->private->kick_fd, .events = POLLIN}};
    struct timespec timeout = {.tv_sec = (time_t)(timeout_ns / 1000000000ull), .tv_nsec = (long)(timeout_ns % 1000000000ull)};
    int ready = ppoll(source, 2, &timeout, NULL);
    replay_limits_refresh(replay); /* a kick may mean that the quota is another one */
    if (ready <= 0)
        return 0;
    if ((source[1].revents & POLLIN) != 0) {
        uint64_t count;
        (void)!read(loop->private->kick_fd, &count, sizeof count);
    }
    if ((source[0].revents & POLLIN) != 0) {
        uint8_t bytes[64];
        ssize_t got = recv(replay->lifeline, bytes, sizeof bytes, MSG_DONTWAIT);
        if (got > 0)
            replay->grant->doorbells++;
        else if (got == 0)
            return VGPU_RUN_GUEST_GONE;
    }
    return (source[0].revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL)) != 0 ? VGPU_RUN_GUEST_GONE : 0;
}

static uint64_t poll_interval(const struct loop *loop, uint64_t now)
{
    return loop->unfinished_since_ns != 0 && now - loop->unfinished_since_ns > LONG_NS ? POLL_LONG_NS : POLL_IDLE_NS;
}

/* No record waits: what becomes of the lease, and when to look again at the latest. */
static uint64_t tend_lease(struct loop *loop, uint64_t now)
{
    struct replay_private *private = loop->private;
    uint64_t timeout = SLEEP_NS;
    if (epoch_changed(loop))
        replay_lease_read(loop->replay, atomic_load_explicit(replay_quad(&loop->replay->grant->epoch), memory_order_acquire));
    if (!private->leased)
        (void)replay_lease_begins(loop->replay);
    if (private->leased && private->watches && replay_lease_must_yield(private))
        replay_lease_lose(loop->replay, now);
    if (private->leased && !private->open_ended) {
        uint64_t quiet = loop->quiet_since_ns > loop->idle_since_ns ? loop->quiet_since_ns : loop->idle_since_ns;
        bool is_over = private->deadline_ns != 0 && now >= private->deadline_ns;
        /* A lease that others wait for is not kept for nothing. */
        if (is_over || (!loop->unfinished && (loop->rests || now >= quiet + LEASE_IDLE_NS)))
            replay_lease_lose(loop->replay, now);
        else
            timeout = LEASE_IDLE_NS;
    }
    replay_lease_report(loop->replay, now, loop->unfinished, false);
    return timeout;
}

static bool is_draining(const struct loop *loop) { return loop->private->owes && loop->private->token != 0; }

/* gpu_wait_ns: it is time of waiting if the device was at work when last looked at. */
static void count_gpu_wait(struct loop *loop, uint64_t *since, uint64_t now)
{
    if (loop->unfinished)
        loop->replay->grant->gpu_wait_ns += now - *since;
    *since = now;
}

/* No record waits. Spins, then sleeps; returns when something may have changed. A guest in a VM is asked to knock only after
 * some milliseconds of naps. */
static int wait_for_records(struct loop *loop)
{
    struct replay_private *private = loop->private;
    struct vgpu_session_page *page = loop->replay->page;
    int leave = 0;
    uint64_t now = replay_now_ns(), since = now;
    count_replay(loop, now, false);
    loop->idle_since_ns = now;
    loop->replay->grant->demand = 0;
    while (now - loop->idle_since_ns < private->spin_ns) {
        for (unsigned i = 0; i < 32; i++) {
            if (fetch_tail(loop, &leave) || leave != 0)
                return leave;
            __builtin_ia32_pause();
        }
        if (atomic_load_explicit(&private->stop, memory_order_relaxed) != 0)
            return VGPU_RUN_STOPPED;
        now = replay_now_ns();
        count_gpu_wait(loop, &since, now);
        look(loop, now, is_draining(loop) ? POLL_DRAIN_NS : POLL_IDLE_NS);
        tend_lease(loop, now);
    }
    replay_limits_rest(loop->replay);
    for (;;) {
        count_gpu_wait(loop, &since, now);
        look(loop, now, 0);
        uint64_t timeout = tend_lease(loop, now);
        if (loop->unfinished)
            timeout = poll_interval(loop, now);
        if (private->in_vm && now - loop->idle_since_ns < private->spin_ns + VM_NAPS_NS)
            timeout = timeout < VM_NAP_NS ? timeout : VM_NAP_NS;
        else
            atomic_store(replay_word(&page->doorbell_wanted), 1);
        /* SAFETY: the sequentially consistent store above pairs with the guest's full barrier between its store of `tail`
         * and its look at doorbell_wanted. */
        if (fetch_tail(loop, &leave) || leave != 0) {
            atomic_store_explicit(replay_word(&page->doorbell_wanted), 0, memory_order_relaxed);
            return leave;
        }
        leave = sleep_until(loop, timeout);
        now = replay_now_ns();
        if (leave == 0 && atomic_load_explicit(&private->stop, memory_order_relaxed) != 0)
            leave = VGPU_RUN_STOPPED;
        if (fetch_tail(loop, &leave) || leave != 0) {
            count_gpu_wait(loop, &since, now);
            atomic_store_explicit(replay_word(&page->doorbell_wanted), 0, memory_order_relaxed);
            return leave;
        }
    }
}

/* Records wait and no lease is held: BUSY. Returns when the grant page changed. */
static int wait_for_lease(struct loop *loop)
{
    struct replay_private *private = loop->private;
    struct vgpu_session_page *page = loop->replay->page;
    page->busy_retry_ns = loop->replay->grant->retry_hint_ns;
    atomic_store(replay_word(&page->busy), 1);
    uint64_t now = replay_now_ns(), began = now, since = now;
    uint64_t spin_ns = private->spin_ns < 50000 ? private->spin_ns : 50000;
    count_replay(loop, now, false);
    while (!epoch_changed(loop) && !replay_lease_begins(loop->replay)) {
        if (atomic_load_explicit(&private->stop, memory_order_relaxed) != 0)
            return VGPU_RUN_STOPPED;
        bool is_near = replay_lease_is_near(loop->replay), spins = now - began < spin_ns || is_near;
        look(loop, now, is_draining(loop) ? POLL_DRAIN_NS : spins ? POLL_IDLE_NS : 0);
        replay_lease_report(loop->replay, now, loop->unfinished, true);
        if (spins) {
            for (unsigned i = 0; i < (is_near ? 8u : 32u); i++) /* a pause takes up to 50 ns */
                __builtin_ia32_pause();
        } else {
            bool is_awake = loop->unfinished || replay_lease_is_named(loop->replay);
            int leave = sleep_until(loop, is_awake ? poll_interval(loop, now) : SLEEP_NS);
            if (leave != 0)
                return leave;
        }
        now = replay_now_ns();
        loop->replay->grant->lease_wait_ns += now - since;
        since = now;
    }
    count_replay(loop, now, true);
    if (UNLIKELY(replay_tracing(loop->replay) != NULL))
        replay_trace(loop->replay, VGPU_TRACE_STARVED, 0, began, now, 0);
    return 0;
}

/* The record at head is one too many for the VM's limits: BUSY, until it is not. The lease is tended as if nothing waited, so
 * whoever is held back keeps nobody from the device. Nothing has to knock: buckets fill by themselves. */
static int wait_for_limits(struct loop *loop)
{
    struct vgpu_replay *replay = loop->replay;
    struct replay_private *private = loop->private;
    struct vgpu_session_page *page = replay->page;
    uint64_t now = replay_now_ns(), began = now, told = now, wait;
    int leave = 0;
    loop->held = false;
    loop->idle_since_ns = now;
    count_replay(loop, now, false);
    page->busy_retry_ns = replay_limits_hint(replay, now);
    atomic_store(replay_word(&page->busy), 1);
    while (leave == 0) {
        loop->rests = private->waits_for != REPLAY_WAITS_QUEUE && private->wait_until_ns > now + LEASE_IDLE_NS;
        look(loop, now, private->waits_for == REPLAY_WAITS_QUEUE || loop->rests ? POLL_DRAIN_NS : POLL_IDLE_NS);
        uint64_t timeout = tend_lease(loop, now);
        wait = replay_limits_wait(replay, now, loop->unfinished);
        if (wait == 0)
            break;
        if (loop->unfinished && poll_interval(loop, now) < timeout)
            timeout = poll_interval(loop, now);
        if (wait < timeout)
            timeout = wait;
        if (now - began < private->spin_ns && (timeout < SHORT_WAIT_NS || private->waits_for == REPLAY_WAITS_QUEUE))
            for (unsigned i = 0; i < 32; i++)
                __builtin_ia32_pause();
        else
            leave = sleep_until(loop, timeout);
        if (atomic_load_explicit(&private->stop, memory_order_relaxed) != 0)
            leave = VGPU_RUN_STOPPED;
        now = replay_now_ns();
        if (now - told >= TELL_NS) { /* a long wait shows while it lasts */
            replay_limits_held(replay, now - told, false);
            told = now;
        }
    }
    loop->rests = false;
    atomic_store(replay_word(&page->busy), 0);
    replay_limits_held(replay, now - told, true);
    count_replay(loop, now, true);
    return leave;
}

int vgpu_replay_run(struct vgpu_replay *replay)
{
    struct replay_private *private = replay->private;
    /* A session begins at 0. The page is not asked: its guest may have been there before us. */
    struct loop loop = {.replay = replay, .private = private, .ring = replay->segment + replay->ring_offset};
    private->reported = true; /* no lease yet, so none has ended */
    prctl(PR_SET_TIMERSLACK, TIMER_SLACK_NS, 0, 0, 0);
    /* Polling must not invalidate a capture that another stream of this session has open. */
    unsigned relaxed = 2;
    replay->driver.cuThreadExchangeStreamCaptureMode(&relaxed);
    if (replay->driver.cuCtxSetCurrent(private->context[private->current].real) != 0) {
        replay_end(replay, VGPU_SESSION_DEAD, CUDA_ERROR_INVALID_CONTEXT);
        return VGPU_RUN_FAILED;
    }
    int leave = 0;
    while (leave == 0) {
        if (!fetch_tail(&loop, &leave)) {
            if (leave == 0)
                leave = wait_for_records(&loop);
            continue;
        }
        unsigned since_poll = 0;
        uint64_t batch_ns = replay_now_ns();
        replay->grant->current_since_ns = batch_ns;
        count_replay(&loop, batch_ns, true);
        while (loop.head != loop.tail && leave == 0) {
            if (UNLIKELY(!lease_allows(&loop))) {
                leave = wait_for_lease(&loop);
                continue;
            }
            leave = take_record(&loop);
            if (UNLIKELY(loop.held)) {
                leave = wait_for_limits(&loop);
                continue;
            }
            if (UNLIKELY(++since_poll == POLL_RECORDS)) {
                since_poll = 0;
                uint64_t now = replay_now_ns();
                replay->grant->current_since_ns = now; /* not later than this many records ago */
                count_replay(&loop, now, true);
                look(&loop, now, POLL_BUSY_NS);
                replay_limits_refresh(replay);
                if (atomic_load_explicit(&private->stop, memory_order_relaxed) != 0)
                    leave = VGPU_RUN_STOPPED;
            }
            if (UNLIKELY(atomic_load_explicit(&private->ended, memory_order_relaxed) != 0) && leave == 0)
                leave = VGPU_RUN_CLOSED;
        }
    }
    if (leave == VGPU_RUN_STOPPED)
        replay_end(replay, VGPU_SESSION_DEAD, CUDA_SUCCESS);
    atomic_store(&private->ended, 1);
    replay_notify(replay, REPLAY_EVENT_ENDED);
    return leave;
}
