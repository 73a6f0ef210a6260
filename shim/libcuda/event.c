/* SPDX-License-Identifier: Apache-2.0 */
/*
 * event.c - events: handles chosen here, recording and waiting are records, synchronising is a fence.
 *
 * The object behind a handle carries one word of state in `data`: how often the event was recorded, whether
 * the last record was captured into a graph, and whether it is known to be done. So what CUDA answers at
 * once (never recorded, already done) is answered here.
 */
#include "memory.h"
#include "stream.h"

#include "_generated_prototypes.h"

#define BLOCKING_SYNC 1u
#define DISABLE_TIMING 2u
#define INTERPROCESS 4u
#define EXTERNAL 1u /* cuEventRecordWithFlags, cuStreamWaitEvent: an event node, only while capturing */

#define DONE 1u
#define CAPTURED 2u
#define ONE_RECORD 4u

static uintptr_t state_of(struct shim_object *event) { return (uintptr_t)__atomic_load_n(&event->data, __ATOMIC_ACQUIRE); }

static void set_done(struct shim_object *event, uintptr_t seen)
{
    void *expected = (void *)seen;
    /* A record that came meanwhile wins. */
    __atomic_compare_exchange_n(&event->data, &expected, (void *)(seen | DONE), false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

static struct shim_object *find(CUevent hEvent) { return shim_object(VGPU_KIND_EVENT, (uint64_t)(uintptr_t)hEvent); }

static void collect_event(struct shim_object *object, void *context)
{
    if (object->context == *(uint64_t *)context) shim_handle_free(object->handle);
}

static void forget_context(uint64_t context)
{
    shim_handle_each(VGPU_KIND_EVENT, collect_event, &context);
}

static pthread_once_t hooked = PTHREAD_ONCE_INIT;
static void hook(void) { shim_on_context_end(forget_context); }

CUresult cuEventCreate(void *phEvent, unsigned int Flags)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if (phEvent == NULL || (Flags & ~(BLOCKING_SYNC | DISABLE_TIMING | INTERPROCESS)) != 0) return CUDA_ERROR_INVALID_VALUE;
    if ((Flags & INTERPROCESS) != 0 && (Flags & DISABLE_TIMING) == 0) return CUDA_ERROR_INVALID_VALUE;
    pthread_once(&hooked, hook);
    struct shim_object *object;
    uint64_t handle = shim_handle_new(VGPU_KIND_EVENT, NULL, &object);
    if (handle == 0) return CUDA_ERROR_OUT_OF_MEMORY;
    object->flags = Flags;
    /* An event for other processes is an ordinary one here: the handle that would carry it over is refused. */
    const uint64_t argument[8] = {handle, Flags & ~INTERPROCESS};
    status = shim_async(VGPU_CALL_cuEventCreate, argument, NULL, 0);
    if (status != CUDA_SUCCESS) {
        shim_handle_free(handle);
        return status;
    }
    *(CUevent *)phEvent = (CUevent)(uintptr_t)handle;
    return CUDA_SUCCESS;
}

CUresult cuEventDestroy_v2(CUevent hEvent)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (find(hEvent) == NULL) return CUDA_ERROR_INVALID_HANDLE;
    const uint64_t argument[8] = {(uint64_t)(uintptr_t)hEvent};
    status = memory_submit(VGPU_CALL_cuEventDestroy_v2, argument, NULL, 0);
    shim_handle_free((uint64_t)(uintptr_t)hEvent);
    return status;
}

CUresult cuEventDestroy(CUevent hEvent) { return cuEventDestroy_v2(hEvent); }

static bool capturing(uint64_t stream) { return stream_captures_active() && shim_stream_is_capturing(stream); }

CUresult cuEventRecordWithFlags(CUevent hEvent, CUstream hStream, unsigned int flags)
{
    uint64_t stream;
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    struct shim_object *event = find(hEvent);
    if (event == NULL) return CUDA_ERROR_INVALID_HANDLE;
    if ((status = shim_stream(hStream, &stream)) != CUDA_SUCCESS) return status;
    if ((flags & ~EXTERNAL) != 0) return CUDA_ERROR_INVALID_VALUE;
    if (event->context != stream_context(stream)) return CUDA_ERROR_INVALID_HANDLE;
    bool in_graph = capturing(stream);
    if ((flags & EXTERNAL) != 0 && !in_graph) return CUDA_ERROR_ILLEGAL_STATE;
    const uint64_t argument[8] = {(uint64_t)(uintptr_t)hEvent, stream, flags};
    status = memory_submit(VGPU_CALL_cuEventRecordWithFlags, argument, NULL, 0);
    if (status != CUDA_SUCCESS || (in_graph && (flags & EXTERNAL) != 0)) return status;
    uintptr_t next = (state_of(event) & ~(uintptr_t)(DONE | CAPTURED)) + ONE_RECORD;
    __atomic_store_n(&event->data, (void *)(next | (in_graph ? CAPTURED : 0)), __ATOMIC_RELEASE);
    return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent hEvent, CUstream hStream) { return cuEventRecordWithFlags(hEvent, hStream, 0); }

static CUresult ask(CUevent hEvent)
{
    const uint64_t argument[8] = {(uint64_t)(uintptr_t)hEvent};
    return shim_reply(VGPU_CALL_cuEventQuery, argument, NULL, 0, NULL, NULL, 0, NULL);
}

CUresult cuEventQuery(CUevent hEvent)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    struct shim_object *event = find(hEvent);
    if (event == NULL) return CUDA_ERROR_INVALID_HANDLE;
    uintptr_t state = state_of(event);
    if (state == 0 || (state & DONE) != 0) return shim_take_deferred(CUDA_SUCCESS);
    status = ask(hEvent);
    if (status == CUDA_SUCCESS && (state & CAPTURED) == 0) set_done(event, state);
    return shim_take_deferred(status);
}

CUresult cuEventSynchronize(CUevent hEvent)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    struct shim_object *event = find(hEvent);
    if (event == NULL) return CUDA_ERROR_INVALID_HANDLE;
    uintptr_t state = state_of(event);
    if (state == 0 || (state & DONE) != 0) return shim_take_deferred(CUDA_SUCCESS);
    if ((state & CAPTURED) != 0 || stream_captures_active()) {
        /* A fence would wait on a stream of the host's, which a captured event would drag into the capture. */
        const uint64_t argument[8] = {(uint64_t)(uintptr_t)hEvent};
        status = shim_reply(VGPU_CALL_cuEventSynchronize, argument, NULL, 0, NULL, NULL, 0, NULL);
        if (status != CUDA_ERROR_NOT_READY) return shim_take_deferred(status);
    }
    struct shim_fence fence;
    if ((status = shim_fence_new(&fence)) != CUDA_SUCCESS) return status;
    const uint64_t argument[8] = {(uint64_t)(uintptr_t)hEvent, fence.index, fence.value};
    status = shim_async(VGPU_CALL_wireFenceEvent, argument, NULL, 0);
    if (status == CUDA_SUCCESS) status = shim_fence_wait(&fence);
    if (status != CUDA_SUCCESS) return status;
    shim_fence_free(&fence);
    set_done(event, state);
    return shim_take_deferred(CUDA_SUCCESS);
}

CUresult cuEventElapsedTime_v2(void *pMilliseconds, CUevent hStart, CUevent hEnd)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    struct shim_object *start = find(hStart), *end = find(hEnd);
    if (start == NULL || end == NULL || state_of(start) == 0 || state_of(end) == 0 ||
        ((start->flags | end->flags) & DISABLE_TIMING) != 0)
        return CUDA_ERROR_INVALID_HANDLE;
    if (pMilliseconds == NULL) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {(uint64_t)(uintptr_t)hStart, (uint64_t)(uintptr_t)hEnd};
    uint64_t value[4] = {0};
    status = shim_reply(VGPU_CALL_cuEventElapsedTime_v2, argument, NULL, 0, value, NULL, 0, NULL);
    if (status == CUDA_SUCCESS) {
        uint32_t bits = (uint32_t)value[0]; /* the float as it is */
        memcpy(pMilliseconds, &bits, sizeof bits);
    }
    return shim_take_deferred(status);
}

CUresult cuEventElapsedTime(void *pMilliseconds, CUevent hStart, CUevent hEnd)
{
    return cuEventElapsedTime_v2(pMilliseconds, hStart, hEnd);
}

CUresult cuStreamWaitEvent(CUstream hStream, CUevent hEvent, unsigned int Flags)
{
    uint64_t stream;
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if ((status = shim_stream(hStream, &stream)) != CUDA_SUCCESS) return status;
    struct shim_object *event = find(hEvent);
    if (event == NULL) return CUDA_ERROR_INVALID_HANDLE;
    if ((Flags & ~EXTERNAL) != 0) return CUDA_ERROR_INVALID_VALUE;
    bool in_graph = capturing(stream);
    if ((Flags & EXTERNAL) != 0 && !in_graph) return CUDA_ERROR_ILLEGAL_STATE;
    uintptr_t state = state_of(event);
    if (!in_graph && (state == 0 || (state & DONE) != 0)) return CUDA_SUCCESS; /* nothing to wait for */
    const uint64_t argument[8] = {stream, (uint64_t)(uintptr_t)hEvent, Flags};
    if ((state & CAPTURED) != 0) /* the driver may refuse it, and then at once */
        return shim_reply(VGPU_CALL_cuStreamWaitEvent, argument, NULL, 0, NULL, NULL, 0, NULL);
    return memory_submit(VGPU_CALL_cuStreamWaitEvent, argument, NULL, 0);
}
