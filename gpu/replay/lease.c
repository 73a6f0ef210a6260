/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lease.c - when this session may put work on the device. The mediator writes leases into the grant page; a lease with a
 * token begins when the GPU's turn word names it, and when it is over and its work is done this file names the next one
 * (wire.h, docs/wire.md section 3). So the device changes hands between two workers, without the mediator in between.
 *
 * A session of high priority that is idle has a standby lease: when a record comes, take_turn() names it as the next one
 * without asking anybody, and the holder ends its lease when it sees that in the word. The mediator hears of it afterwards.
 *
 * The fast path, an open-ended lease, is in loop.c: one load and two comparisons a record, and one load more while others
 * might come.
 *
 * Must never: pass the turn on while work that the lease covered is unfinished, but for a session that waits for itself
 * (DRAIN_LIMIT_NS); report a lease twice; take the turn twice with one token.
 */
#include "internal.h"
#include "session.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/stat.h>

/* Work may wait for something that a later record brings; then the lease has to be given up with it unfinished. By then
 * the mediator has long passed this session over. */
#define DRAIN_LIMIT_NS 1000000000ull
#define LEASE_REPORTS (uint64_t)(REPLAY_EVENT_DEMAND | REPLAY_EVENT_IDLE)

uint64_t vgpu_turn_load(uint64_t *word)
{
    /* SAFETY: acquire pairs with the releasing swap of whoever had the turn before. */
    return atomic_load_explicit(replay_quad(word), memory_order_acquire);
}

int vgpu_turn_swap(uint64_t *word, uint64_t expected, uint64_t desired)
{
    return atomic_compare_exchange_strong(replay_quad(word), &expected, desired) ? 1 : 0;
}

int vgpu_replay_share_turn(struct vgpu_replay *replay, int turn_fd)
{
    struct stat file;
    if (replay->private->turn != NULL)
        return EINVAL;
    if (fstat(turn_fd, &file) != 0)
        return errno;
    if (file.st_size < (off_t)VGPU_TURN_FILE_SIZE)
        return EINVAL;
    void *mapped = mmap(NULL, VGPU_TURN_FILE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, turn_fd, 0);
    if (mapped == MAP_FAILED)
        return errno;
    replay->private->turn = mapped;
    return 0;
}

static bool is_my_turn(struct replay_private *private)
{
    return private->turn == NULL ||
           vgpu_turn_holder(atomic_load_explicit(private->turn, memory_order_acquire)) == private->token;
}

static void pass_on(struct replay_private *private)
{
    if (private->turn == NULL)
        return;
    uint64_t word = atomic_load_explicit(private->turn, memory_order_acquire);
    /* SAFETY: sequentially consistent: what this session did comes before what the next one does. */
    while (vgpu_turn_holder(word) == private->token && !atomic_compare_exchange_weak(private->turn, &word, vgpu_turn_next(word)))
        ;
}

/* Names the standby lease as the next one, or begins it where nobody has the device. False: others of high priority are there,
 * and whose turn it is has to be asked. */
static bool take_turn(struct replay_private *private)
{
    if (private->turn == NULL)
        return true; /* such a lease begins at once */
    uint64_t word = atomic_load_explicit(private->turn, memory_order_acquire), desired;
    do {
        uint32_t holder = vgpu_turn_holder(word), next = vgpu_turn_next(word);
        if (holder == private->token || next == private->token)
            return true;
        if ((holder & VGPU_TOKEN_HIGH) != 0 || (next & VGPU_TOKEN_STANDBY) != 0)
            return false;
        desired = holder != 0 ? (uint64_t)private->token << 32 | holder : (uint64_t)next << 32 | private->token;
    } while (!atomic_compare_exchange_weak(private->turn, &word, desired));
    return true;
}

static void set_end(struct replay_private *private, uint64_t deadline_ns)
{
    private->deadline_ns = deadline_ns != 0 ? deadline_ns : private->slice_ns != 0 ? private->began_ns + private->slice_ns : 0;
    private->open_ended = private->deadline_ns == 0;
    /* Without a bound on what is in flight there is nobody else. */
    private->watches = private->turn != NULL && private->in_flight_ns != 0 && (private->token & VGPU_TOKEN_HIGH) == 0;
}

static void not_busy(struct vgpu_replay *replay)
{
    replay->grant->demand = 0;
    if (replay->page->busy != 0) {
        atomic_store(replay_word(&replay->page->busy), 0);
        replay_wake(replay);
    }
}

bool replay_lease_begins(struct vgpu_replay *replay)
{
    struct replay_private *private = replay->private;
    if (!private->awaits_turn || private->standby || !is_my_turn(private))
        return false;
    private->awaits_turn = private->standby = false;
    private->leased = true;
    private->demanded = false;
    private->began_ns = replay_now_ns();
    if (!private->carries || private->billed_ns == 0)
        private->billed_ns = private->began_ns;
    set_end(private, replay->grant->deadline_ns);
    replay_throttle_anew(replay);
    replay_slice_begins(replay);
    not_busy(replay);
    return true;
}

void replay_lease_lose(struct vgpu_replay *replay, uint64_t now)
{
    struct replay_private *private = replay->private;
    if (private->leased && private->token != 0 && replay_tracing(replay) != NULL)
        replay_trace(replay, VGPU_TRACE_LEASE, 0, private->began_ns, now != 0 ? now : replay_now_ns(), private->token);
    if (private->leased)
        replay_slice_ends(replay);
    private->owes = private->token != 0 && (private->leased || private->awaits_turn || private->owes);
    private->leased = false;
    private->open_ended = false;
    private->awaits_turn = private->standby = private->watches = false;
    private->reported = false;
    private->demanded = false;
    private->lost_ns = now;
}

static void read_with_token(struct vgpu_replay *replay, bool granted, uint32_t token)
{
    struct replay_private *private = replay->private;
    struct vgpu_grant_page *grant = replay->grant;
    if (!granted) {
        if (private->leased || private->awaits_turn)
            replay_lease_lose(replay, replay_now_ns());
        return;
    }
    private->slice_ns = grant->slice_ns;
    private->in_flight_ns = (uint64_t)grant->in_flight_us * 1000;
    if (token != private->token) {
        if (private->leased) /* a lease that nobody knows of any more; what it used is billed with this one */
            private->carries = true;
        private->token = token;
        private->leased = private->open_ended = false;
        private->owes = private->watches = false;
        private->awaits_turn = true;
        private->standby = grant->granted == VGPU_GRANT_STANDBY;
        private->credits = -1;
    } else if (private->leased) {
        set_end(private, grant->deadline_ns);
    } else if (grant->granted != VGPU_GRANT_STANDBY) {
        private->standby = false; /* the mediator has seen that it was taken */
    }
    /* Else it waits for its turn still, or is over, which is reported or about to be. */
}

void replay_lease_read(struct vgpu_replay *replay, uint64_t epoch)
{
    struct replay_private *private = replay->private;
    struct vgpu_grant_page *grant = replay->grant;
    bool granted = grant->granted != 0 && grant->preempt == 0;
    uint32_t token = grant->token;
    /* A page half written is followed by one more epoch; what was read under the wrong one is read again then. */
    private->epoch = epoch;
    if (token != 0) {
        read_with_token(replay, granted, token);
    } else {
        private->token = 0;
        private->standby = private->watches = false;
        private->deadline_ns = grant->deadline_ns;
        private->credits = grant->credits;
        private->in_flight_ns = (uint64_t)grant->in_flight_us * 1000;
        /* Reports not yet passed on speak of an earlier lease. */
        atomic_fetch_and(&private->events, ~LEASE_REPORTS);
        if (granted) {
            private->leased = true;
            private->demanded = false;
            not_busy(replay);
        } else {
            /* Each revocation is reported, also one whose grant came and went while this thread slept. */
            replay_lease_lose(replay, 0);
        }
        private->open_ended = granted && private->deadline_ns == 0 && private->credits < 0;
    }
    atomic_store_explicit(replay_quad(&grant->seen_epoch), epoch, memory_order_release);
}

bool replay_lease_is_named(struct vgpu_replay *replay)
{
    struct replay_private *private = replay->private;
    if (!private->awaits_turn || private->turn == NULL)
        return false;
    uint64_t word = atomic_load_explicit(private->turn, memory_order_relaxed);
    return vgpu_turn_holder(word) == private->token || vgpu_turn_next(word) == private->token;
}

bool replay_lease_is_near(struct vgpu_replay *replay)
{
    struct replay_private *private = replay->private;
    return private->spin_ns >= SPIN_WORTHWHILE_NS && private->token != 0 && (private->owes || replay_lease_is_named(replay));
}

/* The lease is over: the bill, the token, and the turn to the next one. */
static void publish(struct vgpu_replay *replay, uint64_t now, bool unfinished)
{
    struct replay_private *private = replay->private;
    struct vgpu_grant_page *grant = replay->grant;
    const uint64_t held_ns = private->billed_ns != 0 && now > private->billed_ns ? now - private->billed_ns : 0;
    grant->held_ns += held_ns;
    replay_slice_charged(replay, unfinished || private->carries ? 0 : held_ns);
    private->carries = unfinished;
    private->billed_ns = unfinished ? now : 0;
    private->owes = false;
    /* SAFETY: release pairs with the mediator's load: who sees the token sees the bill. */
    atomic_store_explicit(replay_word(&grant->ended_token), private->token, memory_order_release);
    pass_on(private);
}

/* "idle" when no record waits, else "demand", which is both the report and the next wish. A session that never held a lease
 * has nothing to finish and asks at once. */
void replay_lease_report(struct vgpu_replay *replay, uint64_t now, bool unfinished, bool records_wait)
{
    struct replay_private *private = replay->private;
    if (private->standby) {
        if (!records_wait)
            return; /* for later */
        private->standby = false;
        if (take_turn(private)) {
            private->demanded = private->reported = true;
            atomic_store(replay_word(&replay->grant->demand), 1);
            replay_notify(replay, REPLAY_EVENT_DEMAND);
            return;
        }
    }
    if (private->awaits_turn) {
        /* The word named it before it was granted. If it does not any more, this session was passed over, or another one
         * goes first: the lease will not begin. With nothing to do it is declined, and nobody need wait for it. */
        if (records_wait && (private->turn == NULL || replay_lease_is_named(replay)))
            return;
        replay_lease_lose(replay, now);
        private->billed_ns = private->carries ? private->billed_ns : 0;
    }
    if (private->leased)
        return;
    if (unfinished && !private->reported && private->error == 0 && (private->token == 0 || now - private->lost_ns < DRAIN_LIMIT_NS))
        return;
    bool over = private->owes;
    if (over)
        publish(replay, now, unfinished && private->error == 0);
    if (records_wait && !private->demanded) {
        private->demanded = true;
        private->reported = true;
        atomic_store(replay_word(&replay->grant->demand), 1);
        replay_notify(replay, REPLAY_EVENT_DEMAND);
    } else if (!private->reported || over) {
        private->reported = true;
        replay_notify(replay, REPLAY_EVENT_IDLE);
    }
}
