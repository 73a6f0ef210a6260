/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fences.c - telling the guest that work is done, without ever waiting for it here.
 *
 * A fence word is stored by the GPU itself (a 64-bit stream write into the registered segment) where the device can do
 * that, else by this thread once a polled event is done. A fence behind a faulting kernel never arrives either way: the
 * driver says so only to who asks (cuStreamQuery answers 700 after some 150 ms), so while anything is unfinished the loop
 * keeps asking, and a fault becomes the session's sticky error, which wakes every waiter.
 *
 * "Dirty" streams are those that may hold unfinished work. A context fence joins them with events in a helper stream;
 * a poll that finds one empty takes it off the list.
 */
#include "flight.h"
#include "internal.h"

#include <stdlib.h>
#include <unistd.h>

#define EVENT_WITHOUT_TIMING 2u
#define QUERIES_PER_POLL 16u
#define PROBE_NS 2000000000ull

static _Atomic uint64_t *fence_word(struct vgpu_replay *replay, uint32_t index)
{
    return replay_quad((uint64_t *)(void *)(replay->segment + replay->fences_offset) + index);
}

void replay_fence_now(struct vgpu_replay *replay, uint32_t index, uint64_t value)
{
    if (index == 0 || index >= replay->fence_count)
        return;
    /* SAFETY: release pairs with the guest's acquire load: what the work wrote is visible with the word. */
    atomic_store_explicit(fence_word(replay, index), value, memory_order_release);
    replay_wake(replay);
}

/* The error is there before anybody is released: who waits finds it, and never takes the work for done. */
void replay_fence_failed(struct vgpu_replay *replay, uint32_t index, uint64_t value, CUresult status)
{
    if (replay_is_sticky(status)) {
        replay_fault(replay, status);
        return;
    }
    if (status != CUDA_SUCCESS)
        replay_defer(replay, status);
    replay_fence_now(replay, index, value);
}

bool replay_fence_is_done(struct vgpu_replay *replay, uint32_t index, uint64_t value)
{
    return index != 0 && index < replay->fence_count && atomic_load_explicit(fence_word(replay, index), memory_order_acquire) >= value;
}

bool replay_is_capturing(struct vgpu_replay *replay, void *stream)
{
    unsigned status = 0;
    int error = replay->driver.cuStreamIsCapturing(stream, &status);
    /* 906: asked about the legacy stream while a capture makes its use illegal. */
    return error == 0 ? status != 0 : error == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
}

/* ---- events of our own ---- */

void *replay_take_event(struct vgpu_replay *replay)
{
    struct replay_private *private = replay->private;
    for (unsigned i = private->event_count; i-- > 0;)
        if (private->event_context[i] == private->current) {
            void *event = private->event[i];
            private->event[i] = private->event[--private->event_count];
            private->event_context[i] = private->event_context[private->event_count];
            return event;
        }
    void *event = NULL;
    return replay->driver.cuEventCreate(&event, EVENT_WITHOUT_TIMING) == 0 ? event : NULL;
}

void replay_give_event(struct vgpu_replay *replay, void *event, unsigned slot)
{
    struct replay_private *private = replay->private;
    if (private->event_count == private->event_capacity) {
        unsigned capacity = private->event_capacity ? private->event_capacity * 2 : 64;
        void **events = realloc(private->event, capacity * sizeof *events);
        if (events != NULL)
            private->event = events;
        uint64_t *contexts = events ? realloc(private->event_context, capacity * sizeof *contexts) : NULL;
        if (contexts == NULL) {
            replay->driver.cuEventDestroy_v2(event);
            return;
        }
        private->event_context = contexts;
        private->event_capacity = capacity;
    }
    private->event[private->event_count] = event;
    private->event_context[private->event_count++] = slot;
}

/* ---- fences not known to be done ---- */

static bool pending_add(struct vgpu_replay *replay, struct replay_fence_entry entry)
{
    struct replay_pending *pending = replay->pending;
    entry.issued_ns = replay_now_ns();
    entry.slot = replay->private->current;
    replay->grant->fences_issued++;
    if (pending->count == pending->capacity) {
        replay_poll_words(replay);
        if (pending->count >= replay->fence_count && entry.event == NULL)
            return true; /* the GPU will write it all the same; only its age is not watched */
    }
    if (pending->count == pending->capacity) {
        unsigned capacity = pending->capacity ? pending->capacity * 2 : 256;
        struct replay_fence_entry *bigger = realloc(pending->entry, capacity * sizeof *bigger);
        if (bigger == NULL || capacity > 4 * replay->fence_count) {
            if (bigger != NULL)
                pending->entry = bigger;
            return entry.event == NULL;
        }
        pending->entry = bigger;
        pending->capacity = capacity;
    }
    pending->entry[pending->count++] = entry;
    if (replay->private->busy_since_ns == 0)
        replay->private->busy_since_ns = entry.issued_ns;
    return true;
}

/* Keeps the entries for which done() says no, in order. */
static void pending_sweep(struct vgpu_replay *replay, bool (*done)(struct vgpu_replay *, const struct replay_fence_entry *))
{
    struct replay_pending *pending = replay->pending;
    unsigned kept = 0, count = pending->count;
    for (unsigned i = 0; i < count; i++) {
        struct replay_fence_entry entry = pending->entry[i];
        if (!done(replay, &entry)) {
            pending->entry[kept++] = entry;
            continue;
        }
        replay->grant->fences_done++;
        if (__builtin_expect(replay_tracing(replay) != NULL, 0))
            replay_trace(replay, VGPU_TRACE_FENCE, entry.index, entry.issued_ns, replay_now_ns(), entry.value);
        if (entry.owned)
            replay_give_event(replay, entry.event, entry.slot);
    }
    pending->count = kept;
    if (kept != count)
        replay_wake(replay);
}

static bool word_done(struct vgpu_replay *replay, const struct replay_fence_entry *entry)
{
    return entry->event == NULL && atomic_load_explicit(fence_word(replay, entry->index), memory_order_acquire) >= entry->value;
}

static bool event_done(struct vgpu_replay *replay, const struct replay_fence_entry *entry)
{
    if (entry->event == NULL)
        return word_done(replay, entry);
    if (replay->private->error != 0)
        return false;
    int status = replay->driver.cuEventQuery(entry->event);
    if (status == CUDA_ERROR_NOT_READY)
        return false;
    if (replay_is_sticky((CUresult)status)) {
        replay_fault(replay, (CUresult)status);
        return false;
    }
    /* Also when the event was destroyed meanwhile: nobody can wait for it any longer. */
    replay_fence_now(replay, entry->index, entry->value);
    return true;
}

static void publish_oldest(struct vgpu_replay *replay)
{
    replay->grant->oldest_fence_ns = replay->pending->count ? replay->pending->entry[0].issued_ns : 0;
}

void replay_poll_words(struct vgpu_replay *replay)
{
    if (replay->pending->count != 0)
        pending_sweep(replay, word_done);
    publish_oldest(replay);
}

bool replay_outstanding(struct vgpu_replay *replay) { return replay->private->busy_since_ns != 0; }

/* Asks the driver about one stream: true when it is empty (or its work is only being captured). The legacy stream cannot be
 * asked about while another one captures: what it had to do stays unfinished until it can. */
static bool is_empty(struct vgpu_replay *replay, void *stream)
{
    if (replay_is_capturing(replay, stream))
        return stream != NULL;
    int status = replay->driver.cuStreamQuery(stream);
    if (replay_is_sticky((CUresult)status))
        replay_fault(replay, (CUresult)status);
    return status != CUDA_ERROR_NOT_READY && replay->private->error == 0;
}

bool replay_poll_driver(struct vgpu_replay *replay, uint64_t now)
{
    struct replay_private *private = replay->private;
    pending_sweep(replay, event_done);
    unsigned queries = 0;
    for (unsigned i = private->dirty_count; i-- > 0 && queries < QUERIES_PER_POLL && private->error == 0;) {
        uint64_t handle = private->dirty[i].handle;
        void *real;
        unsigned slot;
        queries++;
        if (!replay_stream_owner(replay, handle, &real, &slot) || is_empty(replay, real))
            replay_stream_clean(replay, handle);
    }
    bool legacy = false;
    for (unsigned slot = 0; slot < REPLAY_CONTEXTS && private->error == 0; slot++) {
        struct replay_context *context = &private->context[slot];
        if (context->real == NULL || !context->legacy_dirty)
            continue;
        unsigned before = private->current;
        if (replay_select_context(replay, slot) && is_empty(replay, NULL))
            context->legacy_dirty = false;
        replay_select_context(replay, before);
        legacy = legacy || context->legacy_dirty;
    }
    for (unsigned slot = 0; slot < REPLAY_CONTEXTS && private->error == 0; slot++) {
        struct replay_context *context = &private->context[slot];
        if (context->retired_dirty && is_empty(replay, context->helper[0].stream))
            context->retired_dirty = false;
        legacy = legacy || context->retired_dirty;
    }
    if (private->busy_since_ns != 0) {
        bool is_over = private->dirty_count == 0 && !legacy && replay->pending->count == 0;
        if (__builtin_expect(replay_tracing(replay) != NULL, 0))
            replay_trace_busy(replay, private->busy_since_ns, now, is_over);
        if (now > private->busy_since_ns) {
            replay->grant->gpu_ns += now - private->busy_since_ns;
            private->busy_since_ns = now;
        }
        if (is_over)
            private->busy_since_ns = 0;
    }
    publish_oldest(replay);
    return private->busy_since_ns == 0;
}

/* ---- helper streams ---- */

static struct replay_helper *idle_helper(struct vgpu_replay *replay)
{
    struct replay_context *context = &replay->private->context[replay->private->current];
    for (unsigned i = 0; i < REPLAY_HELPERS; i++) {
        struct replay_helper *helper = &context->helper[i];
        if (helper->stream != NULL && atomic_load_explicit(fence_word(replay, helper->index), memory_order_relaxed) < helper->value)
            continue;
        if (helper->stream == NULL && replay->driver.cuStreamCreateWithPriority(&helper->stream, STREAM_NON_BLOCKING, 0) != 0)
            helper->stream = NULL;
        return helper->stream != NULL ? helper : NULL;
    }
    return NULL;
}

void *replay_helper_stream(struct vgpu_replay *replay, unsigned slot)
{
    unsigned before = replay->private->current;
    struct replay_helper *helper = replay_select_context(replay, slot) ? idle_helper(replay) : NULL;
    replay_select_context(replay, before);
    return helper ? helper->stream : NULL;
}

static CUresult write_word(struct vgpu_replay *replay, void *stream, uint32_t index, uint64_t value)
{
    uint64_t address = (uint64_t)(uintptr_t)fence_word(replay, index);
    int status = replay->driver.cuStreamWriteValue64_v2(stream, address, value, 0);
    if (status != 0)
        return (CUresult)status;
    pending_add(replay, (struct replay_fence_entry){.index = index, .value = value});
    return CUDA_SUCCESS;
}

bool replay_probe_gpu_fence(struct vgpu_replay *replay)
{
    void *stream = replay_helper_stream(replay, 0);
    if (stream == NULL)
        return false;
    _Atomic uint64_t *word = fence_word(replay, 0); /* word 0 is nobody's */
    atomic_store(word, 0);
    if (replay->driver.cuStreamWriteValue64_v2(stream, (uint64_t)(uintptr_t)word, 1, 0) != 0)
        return false;
    uint64_t deadline = replay_now_ns() + PROBE_NS;
    while (atomic_load_explicit(word, memory_order_acquire) != 1)
        if (replay_now_ns() > deadline)
            return false;
    atomic_store(word, 0);
    return true;
}

/* ---- fences ---- */

CUresult replay_fence(struct vgpu_replay *replay, void *stream, uint32_t index, uint64_t value)
{
    if (index == 0)
        return CUDA_SUCCESS;
    if (index >= replay->fence_count)
        return CUDA_ERROR_INVALID_VALUE;
    if (replay->gpu_fences) {
        CUresult status = write_word(replay, stream, index, value);
        if (status != CUDA_SUCCESS)
            replay_fence_failed(replay, index, value, status);
        return status;
    }
    int status = replay->driver.cuStreamQuery(stream);
    void *event = status == CUDA_ERROR_NOT_READY ? replay_take_event(replay) : NULL;
    if (status == CUDA_ERROR_NOT_READY && event == NULL)
        status = CUDA_ERROR_OUT_OF_MEMORY;
    if (event != NULL) {
        status = replay->driver.cuEventRecord(event, stream);
        if (status == 0 && pending_add(replay, (struct replay_fence_entry){.event = event, .owned = true, .index = index, .value = value}))
            return CUDA_SUCCESS;
        replay_give_event(replay, event, replay->private->current);
        if (status == 0)
            status = CUDA_ERROR_OUT_OF_MEMORY;
    }
    replay_fence_failed(replay, index, value, (CUresult)status);
    return (CUresult)status;
}

/* The event's state now, not that of a later record of it: a helper stream waits for it on the device. Without a free
 * helper the event itself is polled. */
CUresult replay_fence_event(struct vgpu_replay *replay, void *event, uint32_t index, uint64_t value)
{
    if (index == 0)
        return CUDA_SUCCESS;
    if (index >= replay->fence_count)
        return CUDA_ERROR_INVALID_VALUE;
    int status = replay->driver.cuEventQuery(event);
    if (status != CUDA_ERROR_NOT_READY) {
        replay_fence_failed(replay, index, value, (CUresult)status);
        return (CUresult)status;
    }
    struct replay_helper *helper = replay->gpu_fences ? idle_helper(replay) : NULL;
    if (helper != NULL && replay->driver.cuStreamWaitEvent(helper->stream, event, 0) == 0 &&
        write_word(replay, helper->stream, index, value) == CUDA_SUCCESS) {
        helper->index = index;
        helper->value = value;
        return CUDA_SUCCESS;
    }
    if (pending_add(replay, (struct replay_fence_entry){.event = event, .index = index, .value = value}))
        return CUDA_SUCCESS;
    replay_fence_failed(replay, index, value, CUDA_ERROR_OUT_OF_MEMORY);
    return CUDA_ERROR_OUT_OF_MEMORY;
}

struct join {
    void *only; /* the one dirty stream, while there is one */
    unsigned count;
    void *helper;
    CUresult status;
};

static void join_stream(struct vgpu_replay *replay, struct join *join, void *stream)
{
    if (join->status != CUDA_SUCCESS)
        return;
    void *event = replay_take_event(replay);
    if (event == NULL) {
        join->status = CUDA_ERROR_OUT_OF_MEMORY;
        return;
    }
    int status = replay->driver.cuEventRecord(event, stream);
    if (status == 0)
        status = replay->driver.cuStreamWaitEvent(join->helper, event, 0);
    /* The wait has taken the event's state; it may be recorded again at once. */
    replay_give_event(replay, event, replay->private->current);
    join->status = (CUresult)status;
}

/* Visits the current context's dirty streams that are not capturing. */
static void each_dirty(struct vgpu_replay *replay, struct join *join)
{
    struct replay_private *private = replay->private;
    struct replay_context *context = &private->context[private->current];
    if (context->legacy_dirty && !replay_is_capturing(replay, NULL)) {
        join->count++;
        join->only = NULL;
        if (join->helper != NULL)
            join_stream(replay, join, NULL);
    }
    if (context->retired_dirty) {
        join->count++;
        join->only = context->helper[0].stream;
        if (join->helper != NULL && join->helper != join->only)
            join_stream(replay, join, join->only);
    }
    for (unsigned i = 0; i < private->dirty_count; i++) {
        void *real;
        unsigned slot;
        if (!replay_stream_owner(replay, private->dirty[i].handle, &real, &slot) || slot != private->current || replay_is_capturing(replay, real))
            continue;
        join->count++;
        join->only = real;
        if (join->helper != NULL)
            join_stream(replay, join, real);
    }
}

bool replay_waits_for_all(struct vgpu_replay *replay, void *stream)
{
    struct replay_private *private = replay->private;
    for (unsigned slot = 0; slot < REPLAY_CONTEXTS; slot++)
        if (slot != private->current && private->context[slot].real != NULL &&
            (private->context[slot].legacy_dirty || private->context[slot].retired_dirty))
            return false;
    for (unsigned i = 0; i < private->dirty_count; i++) {
        void *real;
        unsigned slot;
        if (replay_stream_owner(replay, private->dirty[i].handle, &real, &slot) && slot != private->current)
            return false;
    }
    struct join join = {.helper = stream, .status = CUDA_SUCCESS};
    each_dirty(replay, &join);
    return join.status == CUDA_SUCCESS;
}

static CUresult fence_context(struct vgpu_replay *replay, uint32_t index, uint64_t value)
{
    if (index >= replay->fence_count)
        return CUDA_ERROR_INVALID_VALUE;
    struct join join = {.status = CUDA_SUCCESS};
    each_dirty(replay, &join);
    if (join.count == 0) {
        replay_fence_now(replay, index, value);
        return CUDA_SUCCESS;
    }
    if (join.count == 1)
        return replay_fence(replay, join.only, index, value);
    struct replay_helper *helper = idle_helper(replay);
    struct replay_helper *shared = &replay->private->context[replay->private->current].helper[0];
    if (helper == NULL && shared->stream != NULL)
        helper = shared; /* queues behind an earlier fence: later than needed, never too early */
    if (helper == NULL) {
        replay_fence_failed(replay, index, value, CUDA_ERROR_OUT_OF_MEMORY);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    join = (struct join){.helper = helper->stream, .status = CUDA_SUCCESS};
    each_dirty(replay, &join);
    if (join.status != CUDA_SUCCESS) {
        replay_fence_failed(replay, index, value, join.status);
        return join.status;
    }
    CUresult status = replay_fence(replay, helper->stream, index, value);
    helper->index = index;
    helper->value = value;
    return status;
}

/* Also before a stream captures: nobody may ask it then, so a helper waits for what it has to do by now. */
void replay_stream_retire(struct vgpu_replay *replay, uint64_t handle)
{
    struct replay_private *private = replay->private;
    void *real;
    unsigned slot;
    if (!replay_stream_owner(replay, handle, &real, &slot) || private->error != 0)
        return;
    replay_pulse_stream_ends(replay, real);
    if (is_empty(replay, real))
        return;
    unsigned before = private->current;
    struct replay_context *context = &private->context[slot];
    if (replay_select_context(replay, slot)) {
        if (context->helper[0].stream == NULL)
            (void)replay->driver.cuStreamCreateWithPriority(&context->helper[0].stream, STREAM_NON_BLOCKING, 0);
        struct join join = {.helper = context->helper[0].stream, .status = CUDA_SUCCESS};
        if (join.helper != NULL)
            join_stream(replay, &join, real);
        context->retired_dirty = context->retired_dirty || (join.helper != NULL && join.status == CUDA_SUCCESS);
    }
    replay_select_context(replay, before);
}

CUresult replay_wireFence(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    uint32_t index = (uint32_t)call->argument[1];
    void *stream = NULL;
    struct replay_private *private = replay->private;
    if (call->argument[1] >= replay->fence_count)
        return CUDA_ERROR_INVALID_VALUE;
    if (call->argument[0] != 0 && !replay_lookup(replay, VGPU_KIND_STREAM, call->argument[0], &stream)) {
        replay_fence_failed(replay, index, call->argument[2], CUDA_ERROR_INVALID_HANDLE);
        return CUDA_ERROR_INVALID_HANDLE;
    }
    /* Nothing at all is unfinished, or nothing of this stream: no need to ask the device. */
    bool set_aside = private->context[private->current].retired_dirty; /* it may be this stream's, from before a capture */
    if (private->busy_since_ns == 0 || (!set_aside && replay_stream_is_clean(replay, call->argument[0]))) {
        replay_fence_now(replay, index, call->argument[2]);
        return CUDA_SUCCESS;
    }
    CUresult status = replay_fence(replay, stream, index, call->argument[2]);
    if (status == CUDA_SUCCESS)
        replay_stream_fenced(replay, call->argument[0], index, call->argument[2]);
    return status;
}

CUresult replay_wireFenceContext(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    if (call->argument[0] >= replay->fence_count)
        return CUDA_ERROR_INVALID_VALUE;
    return fence_context(replay, (uint32_t)call->argument[0], call->argument[1]);
}

CUresult replay_wireFenceEvent(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *event = NULL;
    if (call->argument[1] >= replay->fence_count)
        return CUDA_ERROR_INVALID_VALUE;
    if (!replay_lookup(replay, VGPU_KIND_EVENT, call->argument[0], &event)) {
        replay_fence_failed(replay, (uint32_t)call->argument[1], call->argument[2], CUDA_ERROR_INVALID_HANDLE);
        return CUDA_ERROR_INVALID_HANDLE;
    }
    return replay_fence_event(replay, event, (uint32_t)call->argument[1], call->argument[2]);
}

void replay_forget_context(struct vgpu_replay *replay, unsigned slot)
{
    struct replay_private *private = replay->private;
    struct replay_pending *pending = replay->pending;
    unsigned kept = 0;
    replay_pulse_context_ends(replay, slot);
    for (unsigned i = 0; i < private->event_count; i++) {
        if (private->event_context[i] == slot)
            continue;
        private->event[kept] = private->event[i];
        private->event_context[kept++] = private->event_context[i];
    }
    private->event_count = kept;
    if (private->marker_context == slot)
        private->marker = NULL;
    kept = 0;
    for (unsigned i = 0; i < pending->count; i++) {
        struct replay_fence_entry entry = pending->entry[i];
        if (entry.slot == slot) /* its work ended with the context; whoever waits must not wait for ever */
            replay_fence_now(replay, entry.index, entry.value);
        else
            pending->entry[kept++] = entry;
    }
    pending->count = kept;
    memset(private->context[slot].helper, 0, sizeof private->context[slot].helper);
    private->context[slot].legacy_dirty = false;
    private->context[slot].retired_dirty = false;
}
