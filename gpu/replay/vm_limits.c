/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vm_limits.c - the limits of a VM, as each of its workers keeps them, with nobody to ask: token buckets for calls and bytes, the
 * queue depth, and quotas of memory, arena, modules and handles. The account is memory that all workers of the VM share.
 *
 * A bucket is one word: the moment up to which the VM has spent. Taking n tokens moves it by n / rate seconds, and may not
 * move it past now; it never lies more than a burst, one second, behind now. So the bucket fills without anybody filling it,
 * any number of sessions draw from it with a compare-and-swap, and a new rate holds from the next draw on. Calls are drawn in
 * small batches (a 256th of a second's worth at most). Bytes are drawn after the copy, when it is known what it moved: the
 * bucket may be in debt, and copies wait until it is not. Who finds a bucket empty waits until a twentieth of a second's worth
 * is in it: a VM over its rate comes in short bursts, not call by call, for each time it comes the device has to change hands,
 * and its neighbours would pay for that a thousand times a second.
 *
 * A quota is kept without a lock and without a sum that could be left wrong: a session says in its own entry what it asks
 * for, then adds up all entries. Of two that ask at once at least one sees the other, so both together never exceed the
 * quota; where the room may be for one of them only, the one further down steps back and looks again.
 *
 * Must never: wait; let a session exceed because another one died; cost a VM without limits more than one load for each call.
 */
#include "vm_limits.h"

#include "session.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define SECOND_NS 1000000000ull
#define BURST_NS SECOND_NS
#define REST_NS (SECOND_NS / 20)
#define BATCH_MOST 64u
#define BATCHES_A_SECOND 256u
#define LONGEST_DEBT_NS (600ull * SECOND_NS) /* what lies further ahead is no debt but another clock's: a host that restarted */
#define LONGEST_NAP_NS 10000000ull           /* limits may be changed meanwhile */
#define HINT_LEAST_NS 20000ull
#define STUCK_NS SECOND_NS    /* queued work may wait for what a later record brings: then one more is let through */
#define CONTENTIONS_MOST 500u /* of 20 us: whoever asks that long has been stopped */
#define HANDLES_BLOCK 64u

#define RELAXED memory_order_relaxed

static uint64_t peek(uint64_t *word) { return atomic_load_explicit(replay_quad(word), RELAXED); }

/* ---- the account ---- */

bool replay_limits_open(struct vgpu_replay *replay)
{
    struct replay_private *private = replay->private;
    private->account = mmap(NULL, VGPU_ACCOUNT_FILE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (private->account == MAP_FAILED) {
        private->account = NULL;
        return false;
    }
    private->account->entry_top = 1;
    return true;
}

void replay_limits_close(struct vgpu_replay *replay)
{
    if (replay->private->account != NULL)
        munmap(replay->private->account, VGPU_ACCOUNT_FILE_SIZE);
    replay->private->account = NULL;
}

int vgpu_replay_share_account(struct vgpu_replay *replay, int account_fd, uint32_t entry)
{
    struct replay_private *private = replay->private;
    struct stat file;
    if (private->shares_account || entry >= VGPU_ACCOUNT_ENTRIES)
        return EINVAL;
    if (fstat(account_fd, &file) != 0)
        return errno;
    if (file.st_size < (off_t)VGPU_ACCOUNT_FILE_SIZE)
        return EINVAL;
    void *mapped = mmap(NULL, VGPU_ACCOUNT_FILE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, account_fd, 0);
    if (mapped == MAP_FAILED)
        return errno;
    /* Of its own account it has used nothing yet but a few handles. */
    struct vgpu_account_entry *own = &private->account->entry[private->account_entry], *shared = &((struct vgpu_account *)mapped)->entry[entry];
    for (unsigned i = 0; i < VGPU_RESOURCE_COUNT; i++)
        atomic_store(replay_quad(&shared->used[i]), own->used[i]);
    munmap(private->account, VGPU_ACCOUNT_FILE_SIZE);
    private->account = mapped;
    private->account_entry = entry;
    private->shares_account = true;
    return 0;
}

static struct vgpu_account_entry *own_entry(struct vgpu_replay *replay)
{
    return &replay->private->account->entry[replay->private->account_entry];
}

static uint32_t entry_top(const struct vgpu_account *account)
{
    uint32_t top = atomic_load_explicit((_Atomic uint32_t *)(uintptr_t)&account->entry_top, memory_order_acquire);
    return top < VGPU_ACCOUNT_ENTRIES ? top : VGPU_ACCOUNT_ENTRIES;
}

void replay_limits_assign(struct vgpu_replay *replay, uint64_t memory_limit)
{
    struct replay_private *private = replay->private;
    private->card_memory = ((struct vgpu_device_page *)(void *)replay->segment)->total_memory_bytes;
    if (!private->shares_account)
        private->account->limit[VGPU_RESOURCE_MEMORY] = memory_limit;
    replay_limits_refresh(replay);
}

void replay_limits_refresh(struct vgpu_replay *replay)
{
    struct replay_private *private = replay->private;
    uint64_t limit = peek(&private->account->limit[VGPU_RESOURCE_MEMORY]);
    uint64_t total = limit != 0 && limit < private->card_memory ? limit : private->card_memory;
    if (total == private->told_memory)
        return;
    private->told_memory = total;
    replay->grant->memory_limit_bytes = limit;
    atomic_store_explicit(replay_quad(&((struct vgpu_device_page *)(void *)replay->segment)->total_memory_bytes), total, RELAXED);
}

/* ---- quotas ---- */

static bool charge(struct vgpu_replay *replay, enum vgpu_resource resource, uint64_t amount)
{
    struct replay_private *private = replay->private;
    struct vgpu_account *account = private->account;
    struct vgpu_account_entry *own = own_entry(replay);
    uint64_t used = own->used[resource];
    if (amount > INT64_MAX || used > INT64_MAX)
        return false;
    for (unsigned look = 0; look < CONTENTIONS_MOST; look++) {
        uint64_t limit = peek(&account->limit[resource]);
        if (limit == 0) {
            atomic_store(replay_quad(&own->used[resource]), used + amount);
            atomic_store(replay_quad(&own->asking[resource]), 0);
            return true;
        }
        /* SAFETY: sequentially consistent, as are the loads below: of two that ask, one at least sees the other ask. */
        atomic_store(replay_quad(&own->asking[resource]), amount);
        uint64_t held = used, asked = 0;
        bool steps_back = false;
        for (uint32_t i = 0, top = entry_top(account); i < top; i++) {
            if (i == private->account_entry)
                continue;
            /* In this order: what is asked for moves into what is used, and is counted twice rather than not at all. */
            uint64_t asking = atomic_load(replay_quad(&account->entry[i].asking[resource]));
            held += atomic_load(replay_quad(&account->entry[i].used[resource]));
            asked += asking;
            steps_back = steps_back || (asking != 0 && i < private->account_entry);
        }
        if (held > limit || amount > limit - held)
            break;
        if (asked <= limit - held - amount) {
            atomic_store(replay_quad(&own->used[resource]), used + amount);
            atomic_store(replay_quad(&own->asking[resource]), 0);
            return true;
        }
        if (steps_back)
            atomic_store(replay_quad(&own->asking[resource]), 0);
        nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
    }
    atomic_store(replay_quad(&own->asking[resource]), 0);
    return false;
}

bool replay_charge(struct vgpu_replay *replay, enum vgpu_resource resource, uint64_t amount)
{
    if (charge(replay, resource, amount))
        return true;
    struct vgpu_account_entry *own = own_entry(replay);
    if (!replay_limits_refused(replay)) /* a call may try twice, and is refused once */
        atomic_store_explicit(replay_quad(&own->refused[resource]), own->refused[resource] + 1, RELAXED);
    replay->private->refused_at = replay->grant->records + 1;
    return false;
}

void replay_refund(struct vgpu_replay *replay, enum vgpu_resource resource, uint64_t amount)
{
    struct vgpu_account_entry *own = own_entry(replay);
    uint64_t used = own->used[resource];
    atomic_store(replay_quad(&own->used[resource]), used > amount ? used - amount : 0);
}

uint64_t replay_limits_sum(struct vgpu_replay *replay, enum vgpu_resource resource)
{
    struct vgpu_account *account = replay->private->account;
    uint64_t sum = 0;
    for (uint32_t i = 0, top = entry_top(account); i < top; i++)
        sum += peek(&account->entry[i].used[resource]);
    return sum;
}

bool replay_limits_refused(struct vgpu_replay *replay)
{
    return replay->private->refused_at == replay->grant->records + 1;
}

static void publish_memory(struct vgpu_replay *replay)
{
    struct vgpu_grant_page *grant = replay->grant;
    uint64_t used = own_entry(replay)->used[VGPU_RESOURCE_MEMORY];
    replay->memory_used = used;
    grant->memory_used_bytes = used;
    if (used > grant->memory_peak_bytes)
        grant->memory_peak_bytes = used;
    struct vgpu_device_page *device = (struct vgpu_device_page *)(void *)replay->segment;
    device->memory_used_bytes = replay_limits_sum(replay, VGPU_RESOURCE_MEMORY);
}

bool replay_memory_charge(struct vgpu_replay *replay, uint64_t bytes)
{
    bool charged = replay_charge(replay, VGPU_RESOURCE_MEMORY, bytes);
    publish_memory(replay);
    return charged;
}

void replay_memory_release(struct vgpu_replay *replay, uint64_t bytes)
{
    replay_refund(replay, VGPU_RESOURCE_MEMORY, bytes);
    publish_memory(replay);
}

void replay_memory_charge_always(struct vgpu_replay *replay, uint64_t bytes)
{
    struct vgpu_account_entry *own = own_entry(replay);
    atomic_store(replay_quad(&own->used[VGPU_RESOURCE_MEMORY]), own->used[VGPU_RESOURCE_MEMORY] + bytes);
    publish_memory(replay);
}

uint64_t replay_memory_sum(struct vgpu_replay *replay) { return replay_limits_sum(replay, VGPU_RESOURCE_MEMORY); }
uint64_t replay_memory_limit(struct vgpu_replay *replay) { return peek(&replay->private->account->limit[VGPU_RESOURCE_MEMORY]); }

/* Handles come and go by the hundred thousand: a block is charged at a time, or what there is room for. */
bool replay_handle_begins(struct vgpu_replay *replay, unsigned kind)
{
    struct replay_private *private = replay->private;
    bool is_module = kind == VGPU_KIND_MODULE || kind == VGPU_KIND_LIBRARY;
    if (private->handles == private->handles_charged) {
        unsigned block = HANDLES_BLOCK;
        if (!charge(replay, VGPU_RESOURCE_HANDLES, block)) {
            block = 1;
            if (!replay_charge(replay, VGPU_RESOURCE_HANDLES, block))
                return false;
        }
        private->handles_charged += block;
    }
    if (is_module && !replay_charge(replay, VGPU_RESOURCE_MODULES, 1))
        return false;
    private->handles++;
    return true;
}

void replay_handle_ends(struct vgpu_replay *replay, unsigned kind)
{
    struct replay_private *private = replay->private;
    if (kind == VGPU_KIND_MODULE || kind == VGPU_KIND_LIBRARY)
        replay_refund(replay, VGPU_RESOURCE_MODULES, 1);
    if (private->handles != 0)
        private->handles--;
    if (private->handles_charged - private->handles >= 2 * HANDLES_BLOCK) {
        private->handles_charged -= HANDLES_BLOCK;
        replay_refund(replay, VGPU_RESOURCE_HANDLES, HANDLES_BLOCK);
    }
}

/* ---- rates ---- */

static uint64_t cost_of(uint64_t amount, uint64_t rate)
{
    unsigned __int128 cost = ((unsigned __int128)amount * SECOND_NS + rate - 1) / rate;
    return cost < LONGEST_DEBT_NS ? (uint64_t)cost : LONGEST_DEBT_NS;
}

/* Where the bucket is now, given what its word says. */
static uint64_t settled(uint64_t level, uint64_t now, uint64_t farthest)
{
    uint64_t full = now > BURST_NS ? now - BURST_NS : 0;
    return level < full ? full : level > now + farthest ? now : level;
}

static bool draw_calls(struct replay_private *private, uint64_t rate)
{
    _Atomic uint64_t *bucket = replay_quad(&private->account->calls_ns);
    uint64_t batch = rate / BATCHES_A_SECOND;
    batch = batch < 1 ? 1 : batch > BATCH_MOST ? BATCH_MOST : batch;
    uint64_t level = atomic_load_explicit(bucket, RELAXED);
    for (;;) {
        uint64_t now = replay_now_ns(), from = settled(level, now, BURST_NS), cost = cost_of(batch, rate);
        if (from + cost > now) {
            if (batch > 1) {
                batch = 1;
                continue;
            }
            private->wait_until_ns = from + (cost > REST_NS ? cost : REST_NS);
            private->waits_rate = rate;
            return false;
        }
        if (atomic_compare_exchange_weak(bucket, &level, from + cost)) {
            private->tokens = (uint32_t)(batch - 1);
            private->token_ns = cost / batch;
            return true;
        }
    }
}

void replay_limits_rest(struct vgpu_replay *replay)
{
    struct replay_private *private = replay->private;
    if (private->tokens == 0)
        return;
    atomic_fetch_sub(replay_quad(&private->account->calls_ns), private->tokens * private->token_ns);
    private->tokens = 0;
}

/* What the shim adds to the program's calls is free: changing the context, pieces of an image, the end. */
static bool is_counted(uint16_t call)
{
    switch (call) {
    case VGPU_CALL_wireSetContext:
    case VGPU_CALL_wireGoodbye:
    case VGPU_CALL_wireRefused:
    case VGPU_CALL_wireBlobWrite:
    case VGPU_CALL_wireBlobRead:
    case VGPU_CALL_wireBlobFree: return false;
    default: return true;
    }
}

static bool carries_bytes(uint16_t call)
{
    return call == VGPU_CALL_wireCopyInline || call == VGPU_CALL_wireCopyToDevice || call == VGPU_CALL_wireCopyFromDevice ||
           call == VGPU_CALL_wireCopy3D || call == VGPU_CALL_wireCopyDevice;
}

/* Does it leave something for the device to do? */
static bool is_queued(const struct vgpu_call *call)
{
    if (call->call == VGPU_CALL_wireLaunch || call->call == VGPU_CALL_cuGraphLaunch || call->call == VGPU_CALL_wireMemset ||
        call->call == VGPU_CALL_wireHostFunction || carries_bytes(call->call))
        return true; /* also when somebody waits for the answer, which comes before the work is done */
    return is_counted(call->call) && ((call->flags & VGPU_CALL_REPLY) == 0) && call->call != VGPU_CALL_wireFence &&
           call->call != VGPU_CALL_wireFenceContext && call->call != VGPU_CALL_wireFenceEvent;
}

static void set_queued(struct vgpu_replay *replay, uint32_t queued)
{
    struct replay_private *private = replay->private;
    if (private->queued == queued)
        return;
    private->queued = queued;
    atomic_store_explicit(replay_word(&own_entry(replay)->queued), queued, RELAXED);
}

void replay_limits_drained(struct vgpu_replay *replay) { set_queued(replay, 0); }

/* Room for one more? Every session may have one call on the device, however many the others have. */
static bool queue_has_room(struct vgpu_replay *replay, uint64_t depth)
{
    struct replay_private *private = replay->private;
    if (private->queued != 0 && !replay_outstanding(replay))
        set_queued(replay, 0);
    if (private->queued == 0)
        return true;
    uint64_t sum = 0;
    for (uint32_t i = 0, top = entry_top(private->account); i < top; i++)
        sum += atomic_load_explicit(replay_word(&private->account->entry[i].queued), RELAXED);
    return sum < depth;
}

bool replay_limits_take(struct vgpu_replay *replay, const struct vgpu_call *call)
{
    struct replay_private *private = replay->private;
    struct vgpu_account *account = private->account;
    private->waits_for = REPLAY_WAITS_NOT;
    if (!is_counted(call->call))
        return true;
    uint64_t depth = peek(&account->queue_depth), bytes_rate = peek(&account->bytes_per_second), rate = peek(&account->calls_per_second);
    if (depth != 0 && is_queued(call) && !private->passes_queue && !queue_has_room(replay, depth)) {
        private->waits_for = REPLAY_WAITS_QUEUE;
        private->waits_rate = depth;
        return false;
    }
    if (bytes_rate != 0 && carries_bytes(call->call)) {
        uint64_t now = replay_now_ns(), from = settled(peek(&account->bytes_ns), now, LONGEST_DEBT_NS);
        if (from > now) {
            private->waits_for = REPLAY_WAITS_BYTES;
            private->waits_rate = bytes_rate;
            private->wait_until_ns = from + REST_NS;
            return false;
        }
    }
    if (rate != 0) {
        if (private->tokens != 0) {
            private->tokens--;
        } else if (!draw_calls(private, rate)) {
            private->waits_for = REPLAY_WAITS_CALLS;
            return false;
        }
    }
    private->passes_queue = false;
    return true;
}

void replay_limits_spent(struct vgpu_replay *replay, const struct vgpu_call *call, uint64_t bytes)
{
    struct replay_private *private = replay->private;
    uint64_t rate = peek(&private->account->bytes_per_second);
    if (peek(&private->account->queue_depth) != 0 && is_queued(call))
        set_queued(replay, private->queued + 1);
    if (bytes == 0 || rate == 0)
        return;
    _Atomic uint64_t *bucket = replay_quad(&private->account->bytes_ns);
    uint64_t level = atomic_load_explicit(bucket, RELAXED), cost = cost_of(bytes, rate), now, to;
    do {
        now = replay_now_ns(); /* after the level: a debt made meanwhile must not look like another clock's */
        to = settled(level, now, LONGEST_DEBT_NS) + cost;
        if (to > now + LONGEST_DEBT_NS)
            to = now + LONGEST_DEBT_NS;
    } while (!atomic_compare_exchange_weak(bucket, &level, to));
}

/* ---- held back ---- */

static bool is_changed(struct replay_private *private)
{
    struct vgpu_account *account = private->account;
    switch (private->waits_for) {
    case REPLAY_WAITS_CALLS: return peek(&account->calls_per_second) != private->waits_rate;
    case REPLAY_WAITS_BYTES: return peek(&account->bytes_per_second) != private->waits_rate;
    case REPLAY_WAITS_QUEUE: return peek(&account->queue_depth) != private->waits_rate;
    default: return true;
    }
}

uint64_t replay_limits_wait(struct vgpu_replay *replay, uint64_t now, bool unfinished)
{
    struct replay_private *private = replay->private;
    if (is_changed(private))
        return 0;
    if (private->waits_for != REPLAY_WAITS_QUEUE) {
        uint64_t left = private->wait_until_ns > now ? private->wait_until_ns - now : 0;
        return left < LONGEST_NAP_NS ? left : LONGEST_NAP_NS;
    }
    if (!unfinished)
        set_queued(replay, 0);
    if (queue_has_room(replay, private->waits_rate))
        return 0;
    if (private->queue_since_ns == 0)
        private->queue_since_ns = now;
    if (now - private->queue_since_ns >= STUCK_NS) {
        private->passes_queue = true;
        private->queue_since_ns = 0;
        return 0;
    }
    return LONGEST_NAP_NS; /* the loop looks at the device sooner than that */
}

uint64_t replay_limits_hint(struct vgpu_replay *replay, uint64_t now)
{
    struct replay_private *private = replay->private;
    uint64_t left = private->waits_for != REPLAY_WAITS_QUEUE && private->wait_until_ns > now ? private->wait_until_ns - now : 0;
    return left > HINT_LEAST_NS ? left : HINT_LEAST_NS;
}

void replay_limits_held(struct vgpu_replay *replay, uint64_t waited_ns, bool is_over)
{
    struct vgpu_account_entry *own = own_entry(replay);
    if (is_over) {
        replay->private->queue_since_ns = 0;
        atomic_store_explicit(replay_quad(&own->held_back), own->held_back + 1, RELAXED);
    }
    atomic_store_explicit(replay_quad(&own->held_back_ns), own->held_back_ns + waited_ns, RELAXED);
}
