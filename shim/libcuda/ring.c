/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ring.c - putting call records into the submission ring, and waiting for their results. docs/wire.md section 2.
 *
 * One lock makes one total order. Under it a record costs a copy into shared memory and one store of `tail`; nobody waits
 * there. When the ring is full the lock is given back, the thread waits outside and tries again: nothing is lost, and
 * nothing is told to the application.
 *
 * One call in a thousand or so is measured (times.c). That there is a next one to measure is found by the very comparison that
 * asks whether the ring has room: `limit` is the nearer of the two, so the others pay nothing.
 *
 * The ring carries a current context: a record submitted by a thread whose context differs is preceded, under the same
 * lock, by a wireSetContext. So threads in different contexts cannot get into each other's.
 */
#include "core.h"

#include <sys/socket.h>

_Static_assert(sizeof(struct vgpu_call) % VGPU_RECORD_ALIGNMENT == 0, "a header keeps the ring's alignment");
_Static_assert(VGPU_CALL_wireContextDestroy - VGPU_CALL_wirePrimaryRetain == 3, "the records that change contexts stand together");
_Static_assert(VGPU_CALL_wireFenceEvent - VGPU_CALL_wireFence == 2, "the records that fence stand together");
/* Bytes of the ring between two calls that are measured, half to one and a half times; fewer at first, for short programs. */
#define MEASURE_STRIDE 131072u
#define FIRST_MEASURE_STRIDE 1024u
#define SLOT_WORDS (VGPU_DEFAULT_SLOT_COUNT / 64)

static struct {
    struct shim_lock lock;
    /* Below: guarded by the lock. */
    uint64_t tail, seen_head, size;
    uint64_t limit;       /* how far `tail` may go before has_room_beyond() has to look */
    uint64_t measure_at;  /* who goes past this has his next call measured */
    uint64_t measure_stride;
    uint64_t context; /* of the last record, 0 unknown */
    uint32_t sequence;
    /* Completion slots: a set bit is a free slot. */
    _Atomic uint64_t free_slots[SLOT_WORDS] __attribute__((aligned(64)));
} ring;

struct record {
    const uint64_t *argument;
    const void *a, *b;
    uint32_t a_length, b_length;
    uint16_t call, flags, slot;
};

void shim_ring_attach(void)
{
    ring.tail = ring.seen_head = 0;
    ring.size = shim.ring_mask + 1;
    ring.limit = 0;
    ring.measure_at = 0;
    ring.measure_stride = FIRST_MEASURE_STRIDE;
    ring.context = 0;
    ring.sequence = 0;
    for (unsigned word = 0; word < SLOT_WORDS; word++) {
        uint64_t bits = 0;
        for (unsigned bit = 0; bit < 64; bit++)
            if (word * 64 + bit < shim.page->slot_count) bits |= 1ull << bit;
        atomic_store(&ring.free_slots[word], bits);
    }
}

void shim_ring_doorbell(void)
{
    uint32_t *wanted = &shim.page->doorbell_wanted;
    if (SHIM_LIKELY(__atomic_load_n(wanted, __ATOMIC_RELAXED) == 0)) return;
    if (shim_in_vm()) {
        /* No exchange: locked operations on a device's memory stop the whole machine where they are not cached. Whoever has
         * seen the flag rings, so a request of the worker that this store wipes out is answered all the same. */
        __atomic_store_n(wanted, 0, __ATOMIC_RELEASE);
        __atomic_store_n(shim.doorbell, 1, __ATOMIC_RELEASE);
        return;
    }
    if (__atomic_exchange_n(wanted, 0, __ATOMIC_ACQ_REL) == 0) return;
    char knock = 1;
    /* A full socket buffer is as good as a knock, and a broken one is noticed by whoever waits. */
    if (send(shim.lifeline, &knock, 1, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) return;
}

static uint64_t record_size(const struct record *record)
{
    uint64_t size = sizeof(struct vgpu_call) + record->a_length + record->b_length;
    return (size + VGPU_RECORD_ALIGNMENT - 1) & ~(uint64_t)(VGPU_RECORD_ALIGNMENT - 1);
}

/* Bytes to skip before a record of `size` at `position`. A record never wraps, and none leaves a rest too small for the
 * header of a later wirePad. */
static uint64_t gap_before(uint64_t position, uint64_t size)
{
    uint64_t to_end = ring.size - (position & shim.ring_mask);
    return to_end == size || to_end >= size + sizeof(struct vgpu_call) ? 0 : to_end;
}

/* Lock held. */
__attribute__((noinline, cold)) static bool has_room_beyond(uint64_t size)
{
    if (ring.tail + size > ring.measure_at) {
        shim_times_measure(shim_block());
        uint64_t stride = ring.measure_stride;
        ring.measure_at = ring.tail + size + stride / 2 + (ring.tail * 0x9e3779b97f4a7c15ull >> 40) % stride;
        if (stride < MEASURE_STRIDE) ring.measure_stride = stride * 2;
    }
    if (ring.size - (ring.tail - ring.seen_head) < size) {
        /* SAFETY: acquire pairs with the worker's release store of `head`: it is done reading what lies before it. */
        uint64_t head = __atomic_load_n(&shim.page->head, __ATOMIC_ACQUIRE);
        if (head <= ring.tail && head >= ring.seen_head) ring.seen_head = head;
    }
    uint64_t end = ring.seen_head + ring.size;
    ring.limit = end < ring.measure_at ? end : ring.measure_at;
    return ring.tail + size <= end;
}

/* Lock held. */
static bool has_room(uint64_t size)
{
    return SHIM_LIKELY(ring.tail + size <= ring.limit) || has_room_beyond(size);
}

/* Room has been made sure of. Lock held. */
static void put(const struct record *record, uint64_t size)
{
    uint64_t gap = gap_before(ring.tail, size);
    if (gap != 0) {
        const struct vgpu_call pad = {
            .call = VGPU_CALL_PAD, .payload_length = (uint32_t)(gap - sizeof pad), .sequence = ring.sequence++};
        memcpy(shim.ring + (ring.tail & shim.ring_mask), &pad, sizeof pad);
        ring.tail += gap;
    }
    struct vgpu_call *header = (struct vgpu_call *)(void *)(shim.ring + (ring.tail & shim.ring_mask));
    header->call = record->call;
    header->flags = record->flags;
    header->payload_length = record->a_length + record->b_length;
    header->sequence = ring.sequence;
    header->slot = record->slot;
    header->reserved = 0;
    if (record->argument != NULL)
        memcpy(header->argument, record->argument, sizeof header->argument);
    else
        memset(header->argument, 0, sizeof header->argument);
    uint8_t *payload = (uint8_t *)(header + 1);
    if (record->a_length != 0) memcpy(payload, record->a, record->a_length);
    if (record->b_length != 0) memcpy(payload + record->a_length, record->b, record->b_length);
    if ((record->flags & VGPU_CALL_REPLY) != 0)
        __atomic_store_n(&shim.slots[record->slot].result.sequence, ~ring.sequence, __ATOMIC_RELAXED);
    ring.tail += size;
    ring.sequence++;
}

/* Puts the record, and a wireSetContext before it if need be, into the ring. Lock held. False: no room for *needed now. */
static bool try_submit(const struct record *record, uint64_t context, uint32_t *sequence, uint64_t *needed)
{
    uint64_t size = record_size(record);
    bool must_set = context != 0 && context != ring.context;
    /* With the pair, count the largest gap each may need: the two must not be torn apart by another thread's record. */
    *needed = must_set ? 2 * (size + 2 * sizeof(struct vgpu_call)) : size + gap_before(ring.tail, size);
    if (SHIM_UNLIKELY(!has_room(*needed))) return false;
    if (SHIM_UNLIKELY(must_set)) {
        const uint64_t argument[VGPU_CALL_ARGUMENTS] = {context};
        put(&(struct record){.call = VGPU_CALL_wireSetContext, .argument = argument}, sizeof(struct vgpu_call));
        __atomic_store_n(&ring.context, context, __ATOMIC_RELAXED);
    }
    put(record, size);
    *sequence = ring.sequence - 1;
    /* These move the worker to another context; whoever comes next names its own. */
    if (SHIM_UNLIKELY(record->call >= VGPU_CALL_wirePrimaryRetain && record->call <= VGPU_CALL_wireContextDestroy))
        __atomic_store_n(&ring.context, 0, __ATOMIC_RELAXED);
    /* SAFETY: release pairs with the worker's acquire load of `tail`: the record is whole when it can be seen. Stores to
     * write-combining memory keep no order among themselves: the first fence keeps the record, and what the program has put
     * into pinned memory, before `tail`; the second sends `tail` on its way. */
    if (SHIM_UNLIKELY(shim.combining)) __builtin_ia32_sfence();
    __atomic_store_n(&shim.page->tail, ring.tail, __ATOMIC_RELEASE);
    if (SHIM_UNLIKELY(shim.combining)) __builtin_ia32_sfence();
    return true;
}

static bool no_room(const void *argument)
{
    uint64_t size = *(const uint64_t *)argument;
    uint64_t used = __atomic_load_n(&shim.page->tail, __ATOMIC_RELAXED) - __atomic_load_n(&shim.page->head, __ATOMIC_RELAXED);
    return ring.size - used < size;
}

/* The context records of this thread run in; 0 when it has none, or one the host does not know (a primary context that
 * nobody has retained): such a record runs in whatever context the ring is in. */
static uint64_t context_for_record(void)
{
    uint64_t handle = shim_current_context_id();
    if (handle == 0 || handle == __atomic_load_n(&ring.context, __ATOMIC_RELAXED)) return handle;
    const struct shim_context *context = shim_context_find(handle);
    return context != NULL && atomic_load_explicit(&context->active, memory_order_acquire) != 0 ? handle : 0;
}

static CUresult submit(const struct record *record, uint32_t *sequence)
{
    if (SHIM_UNLIKELY((uint64_t)record->a_length + record->b_length > VGPU_INLINE_LIMIT)) return CUDA_ERROR_INVALID_VALUE;
    uint64_t context = context_for_record();
    struct shim_thread_block *block = shim_block();
    struct shim_waiter waiter; /* zeroed by who has to wait: it would be a tenth of what a launch stores */
    bool waited = false;
    uint64_t needed;
    for (;;) {
        shim_lock_take(&ring.lock);
        bool done = try_submit(record, context, sequence, &needed);
        if (done) {
            struct shim_counters *counters = shim.counters; /* only ever changed under the lock */
            if ((record->flags & VGPU_CALL_REPLY) != 0)
                counters->reply_calls++;
            else if (record->call >= VGPU_CALL_wireFence && record->call <= VGPU_CALL_wireFenceEvent)
                counters->fence_calls++;
            else
                counters->async_calls++;
            counters->local_calls += block->local_calls;
            block->local_calls = 0;
        }
        /* The give is a full barrier between our store of `tail` and the look at doorbell_wanted; the worker sets that,
         * and after a full barrier of its own looks at `tail` once more. One of us sees the other. */
        shim_lock_give(&ring.lock);
        if (SHIM_LIKELY(done)) {
            if (SHIM_UNLIKELY(__atomic_load_n(&shim.page->doorbell_wanted, __ATOMIC_RELAXED) != 0)) {
                uint64_t began = shim_ticks();
                shim_ring_doorbell();
                shim_times_rang(began);
            }
            if (SHIM_UNLIKELY(block->encode_began != 0)) {
                if (waited)
                    shim_wait_end(&waiter, SHIM_WAIT_SPACE);
                else
                    shim_times_encoded(block, *sequence);
                block->encode_began = 0;
            }
            return CUDA_SUCCESS;
        }
        if (!waited) waiter = (struct shim_waiter){0};
        waited = true;
        CUresult status = shim_wait_step(&waiter, SHIM_WAIT_SPACE, no_room, &needed);
        block->encode_began = 1; /* nothing to measure any more, but there is something to do at the end */
        if (status != CUDA_SUCCESS) {
            block->encode_began = 0;
            return status;
        }
    }
}

void shim_count_flush(struct shim_thread_block *block)
{
    if (atomic_load_explicit(&shim_phase, memory_order_acquire) != SHIM_READY) return;
    shim_lock_take(&ring.lock);
    shim.counters->local_calls += block->local_calls;
    shim_lock_give(&ring.lock);
    block->local_calls = 0;
}

/* Lock held. */
static void copy_counters(void)
{
    struct vgpu_session_page *page = shim.page;
    struct shim_counters *counters = shim.counters;
    page->local_calls = counters->local_calls;
    page->async_calls = counters->async_calls;
    page->fence_calls = counters->fence_calls;
    page->reply_calls = counters->reply_calls;
    const uint64_t *measured = (const uint64_t *)&counters->times;
    for (unsigned word = 0; word < sizeof page->times / sizeof *measured; word++)
        __atomic_store_n((uint64_t *)&page->times + word, __atomic_load_n(&measured[word], __ATOMIC_RELAXED), __ATOMIC_RELAXED);
    uint64_t refused = __atomic_load_n(&counters->refused_calls, __ATOMIC_RELAXED);
    if (page->refused_calls == refused) return;
    for (unsigned call = 0; call < VGPU_REFUSED_NAMES; call++) {
        uint32_t count = __atomic_load_n(&counters->refused[call], __ATOMIC_RELAXED);
        if (count != 0) page->refused[call] = count;
    }
    page->refused_calls = refused;
}

void shim_counters_publish(void)
{
    shim_lock_take(&ring.lock);
    copy_counters();
    shim_lock_give(&ring.lock);
}

void shim_ring_goodbye(void)
{
    const struct record record = {.call = VGPU_CALL_wireGoodbye};
    uint32_t sequence;
    uint32_t expected = 0;
    /* At exit another thread may have been stopped while it held the lock: try, do not wait. */
    if (!atomic_compare_exchange_strong(&ring.lock.word, &expected, 1)) return;
    uint64_t needed;
    if (shim_in_vm()) copy_counters();
    bool done = try_submit(&record, 0, &sequence, &needed);
    shim_lock_give(&ring.lock);
    if (done) shim_ring_doorbell();
}

CUresult shim_async2(unsigned call, const uint64_t argument[8], const void *a, uint32_t a_length, const void *b, uint32_t b_length)
{
    const struct record record = {
        .call = (uint16_t)call, .argument = argument, .a = a, .a_length = a_length, .b = b, .b_length = b_length};
    uint32_t sequence;
    return submit(&record, &sequence);
}

CUresult shim_async(unsigned call, const uint64_t argument[8], const void *payload, uint32_t length)
{
    return shim_async2(call, argument, payload, length, NULL, 0);
}

/* ---- completion slots ---- */

static bool no_slot(const void *argument)
{
    (void)argument;
    for (unsigned word = 0; word < SLOT_WORDS; word++)
        if (atomic_load_explicit(&ring.free_slots[word], memory_order_relaxed) != 0) return false;
    return true;
}

static CUresult take_slot(struct shim_thread_block *block, uint16_t *slot)
{
    struct shim_waiter waiter = {0};
    for (;;) {
        for (unsigned turn = 0; turn < SLOT_WORDS; turn++) {
            unsigned word = (block->slot_hint / 64 + turn) % SLOT_WORDS;
            uint64_t bits = atomic_load_explicit(&ring.free_slots[word], memory_order_relaxed);
            while (bits != 0) {
                /* The slot used last is the one in this processor's cache. */
                uint64_t mine = bits & 1ull << block->slot_hint % 64;
                if (mine == 0) mine = bits & -bits;
                if (atomic_compare_exchange_weak_explicit(&ring.free_slots[word], &bits, bits & ~mine, memory_order_acquire, memory_order_relaxed)) {
                    *slot = (uint16_t)(word * 64 + (unsigned)__builtin_ctzll(mine));
                    block->slot_hint = *slot;
                    shim_wait_end(&waiter, SHIM_WAIT_SPACE);
                    return CUDA_SUCCESS;
                }
            }
        }
        CUresult status = shim_wait_step(&waiter, SHIM_WAIT_SPACE, no_slot, NULL);
        if (status != CUDA_SUCCESS) return status;
    }
}

static void give_slot(uint16_t slot)
{
    atomic_fetch_or_explicit(&ring.free_slots[slot / 64], 1ull << slot % 64, memory_order_release);
}

struct expected { const struct vgpu_slot *slot; uint32_t sequence; };

static bool not_answered(const void *argument)
{
    const struct expected *expected = argument;
    /* SAFETY: acquire pairs with the worker's release store of `sequence`, the last thing it writes. */
    return __atomic_load_n(&expected->slot->result.sequence, __ATOMIC_ACQUIRE) != expected->sequence;
}

CUresult shim_reply(unsigned call, const uint64_t argument[8], const void *payload, uint32_t length, uint64_t value[4],
                    void *reply, uint32_t capacity, uint32_t *reply_length)
{
    uint16_t slot;
    CUresult status = take_slot(shim_block(), &slot);
    if (status != CUDA_SUCCESS) return status;
    const struct record record = {
        .call = (uint16_t)call, .flags = VGPU_CALL_REPLY, .slot = slot, .argument = argument, .a = payload, .a_length = length};
    struct expected expected = {.slot = &shim.slots[slot]};
    status = submit(&record, &expected.sequence);
    if (status != CUDA_SUCCESS) {
        give_slot(slot);
        return status;
    }
    struct shim_waiter waiter = {0};
    while (not_answered(&expected)) {
        status = shim_wait_step(&waiter, SHIM_WAIT_RESULT, not_answered, &expected);
        if (SHIM_UNLIKELY(status != CUDA_SUCCESS)) return status; /* the slot stays taken: a late answer may still land in it */
    }
    shim_wait_end(&waiter, SHIM_WAIT_RESULT);
    const struct vgpu_slot *answer = expected.slot;
    status = (CUresult)answer->result.status;
    uint32_t sent = answer->result.payload_length;
    if (sent > VGPU_SLOT_PAYLOAD_LIMIT) sent = VGPU_SLOT_PAYLOAD_LIMIT;
    if (value != NULL) memcpy(value, answer->result.value, sizeof answer->result.value);
    if (reply != NULL && capacity != 0) memcpy(reply, answer->payload, sent < capacity ? sent : capacity);
    if (reply_length != NULL) *reply_length = sent;
    give_slot(slot);
    return status;
}

CUresult shim_take_deferred(CUresult status)
{
    if (status != CUDA_SUCCESS || __atomic_load_n(&shim.page->deferred_error, __ATOMIC_RELAXED) == 0) return status;
    uint32_t error = __atomic_exchange_n(&shim.page->deferred_error, 0, __ATOMIC_ACQ_REL);
    return error == UINT32_MAX ? CUDA_ERROR_DEVICE_UNAVAILABLE : (CUresult)error; /* ones: a device that was unplugged */
}

CUresult shim_refuse(unsigned call_id)
{
    CUresult status = shim_enter_local();
    if (status != CUDA_SUCCESS) return status;
    if (call_id < VGPU_REFUSED_NAMES) {
        uint32_t before = __atomic_fetch_add(&shim.counters->refused[call_id], 1, __ATOMIC_RELAXED);
        if (before == 0 && call_id < VGPU_CALL_COUNT) shim_log(SHIM_WARNING, "refused: %s", shim_call_names[call_id]);
    }
    __atomic_fetch_add(&shim.counters->refused_calls, 1, __ATOMIC_RELAXED);
    return CUDA_ERROR_NOT_SUPPORTED;
}
