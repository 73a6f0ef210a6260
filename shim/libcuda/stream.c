/* SPDX-License-Identifier: Apache-2.0 */
/*
 * stream.c - streams. Handles are chosen here, so creating and destroying one is a record and no round
 * trip; what a stream is (flags, priority, context) is answered from the object behind the handle.
 * Waiting for a stream is a fence: the GPU stores a word this thread watches.
 */
#include "code.h"
#include "memory.h"
#include "stream.h"

#include "_generated_prototypes.h"

#define NON_BLOCKING 1u
#define ATTRIBUTE_BYTES 64u

bool stream_captures_active(void)
{
    return __builtin_expect(atomic_load_explicit(&shim_captures_active, memory_order_relaxed) != 0, 0);
}

uint64_t stream_context(uint64_t id)
{
    struct shim_object *object = id == 0 ? NULL : shim_object(VGPU_KIND_STREAM, id);
    return object != NULL ? object->context : shim_current_context_id();
}

static void collect_stream(struct shim_object *object, void *context)
{
    if (object->context != *(uint64_t *)context) return;
    shim_capture_stream_gone(object->handle);
    shim_handle_free(object->handle);
}

static void forget_context(uint64_t context)
{
    shim_handle_each(VGPU_KIND_STREAM, collect_stream, &context);
}

static pthread_once_t hooked = PTHREAD_ONCE_INIT;
static void hook(void) { shim_on_context_end(forget_context); }

CUresult cuStreamCreateWithPriority(void *phStream, unsigned int flags, int priority)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if (phStream == NULL || (flags & ~NON_BLOCKING) != 0) return CUDA_ERROR_INVALID_VALUE;
    pthread_once(&hooked, hook);
    if (priority > shim.device->stream_priority_least) priority = shim.device->stream_priority_least;
    if (priority < shim.device->stream_priority_greatest) priority = shim.device->stream_priority_greatest;
    struct shim_object *object;
    uint64_t handle = shim_handle_new(VGPU_KIND_STREAM, NULL, &object);
    if (handle == 0) return CUDA_ERROR_OUT_OF_MEMORY;
    object->flags = flags;
    object->priority = priority;
    const uint64_t argument[8] = {handle, flags, (uint64_t)(int64_t)priority};
    status = shim_async(VGPU_CALL_cuStreamCreateWithPriority, argument, NULL, 0);
    if (status != CUDA_SUCCESS) {
        shim_handle_free(handle);
        return status;
    }
    *(CUstream *)phStream = (CUstream)(uintptr_t)handle;
    return CUDA_SUCCESS;
}

CUresult cuStreamCreate(void *phStream, unsigned int Flags) { return cuStreamCreateWithPriority(phStream, Flags, 0); }

CUresult cuStreamDestroy_v2(CUstream hStream)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    uint64_t handle = (uint64_t)(uintptr_t)hStream;
    if (!shim_handle_valid(VGPU_KIND_STREAM, handle)) return CUDA_ERROR_INVALID_HANDLE;
    /* Sent before the handle is free: another thread that is given the same index must be behind this record. */
    const uint64_t argument[8] = {handle};
    uint64_t value[4] = {0};
    if (stream_captures_active())
        status = shim_reply(VGPU_CALL_cuStreamDestroy_v2, argument, NULL, 0, value, NULL, 0, NULL);
    else
        status = shim_async(VGPU_CALL_cuStreamDestroy_v2, argument, NULL, 0);
    if (value[0] != 0) shim_graph_lost(value[0]); /* what it captured, and the addresses of its allocations */
    shim_capture_stream_gone(handle);
    shim_handle_free(handle);
    return status;
}

CUresult cuStreamDestroy(CUstream hStream) { return cuStreamDestroy_v2(hStream); }

/* One look at the stream by the host's driver, which also says what it has against it while something captures. */
static CUresult ask(uint64_t id)
{
    const uint64_t argument[8] = {id};
    return shim_reply(VGPU_CALL_cuStreamQuery, argument, NULL, 0, NULL, NULL, 0, NULL);
}

CUresult cuStreamSynchronize(CUstream hStream)
{
    uint64_t id;
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if ((status = shim_stream(hStream, &id)) != CUDA_SUCCESS) return status;
    if ((status = shim_capture_check()) != CUDA_SUCCESS) return status;
    if (stream_captures_active() && (status = ask(id)) != CUDA_ERROR_NOT_READY) return shim_take_deferred(status);
    return shim_take_deferred(memory_wait_stream(id));
}

CUresult cuStreamQuery(CUstream hStream)
{
    uint64_t id;
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if ((status = shim_stream(hStream, &id)) != CUDA_SUCCESS) return status;
    if ((status = shim_capture_check()) != CUDA_SUCCESS) return status;
    return shim_take_deferred(ask(id));
}

/* ---- what a stream is ---- */

/* The object behind a handle; NULL and success for the default streams. */
static CUresult look(CUstream hStream, uint64_t *id, struct shim_object **object)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if ((status = shim_stream(hStream, id)) != CUDA_SUCCESS) return status;
    *object = *id == 0 ? NULL : shim_object(VGPU_KIND_STREAM, *id);
    return *id == 0 || *object != NULL ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuStreamGetPriority(CUstream hStream, int *priority)
{
    uint64_t id;
    struct shim_object *object;
    CUresult status = look(hStream, &id, &object);
    if (status != CUDA_SUCCESS) return status;
    if (priority == NULL) return CUDA_ERROR_INVALID_VALUE;
    *priority = object != NULL ? object->priority : 0;
    return CUDA_SUCCESS;
}

CUresult cuStreamGetFlags(CUstream hStream, unsigned int *flags)
{
    uint64_t id;
    struct shim_object *object;
    CUresult status = look(hStream, &id, &object);
    if (status != CUDA_SUCCESS) return status;
    if (flags == NULL) return CUDA_ERROR_INVALID_VALUE;
    *flags = object != NULL ? object->flags : 0;
    return CUDA_SUCCESS;
}

/* Unique over the life of the process: the handle is. The legacy stream is one per context. */
CUresult cuStreamGetId(CUstream hStream, unsigned long long *streamId)
{
    uint64_t id;
    struct shim_object *object;
    CUresult status = look(hStream, &id, &object);
    if (status != CUDA_SUCCESS) return status;
    if (streamId == NULL) return CUDA_ERROR_INVALID_VALUE;
    *streamId = (object != NULL ? id : shim_current_context_id()) >> 4;
    return CUDA_SUCCESS;
}

CUresult cuStreamGetDevice(CUstream hStream, int *device)
{
    uint64_t id;
    struct shim_object *object;
    CUresult status = look(hStream, &id, &object);
    if (status != CUDA_SUCCESS) return status;
    if (device == NULL) return CUDA_ERROR_INVALID_VALUE;
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuStreamGetCtx(CUstream hStream, void *pctx)
{
    uint64_t id;
    struct shim_object *object;
    CUresult status = look(hStream, &id, &object);
    if (status != CUDA_SUCCESS) return status;
    if (pctx == NULL) return CUDA_ERROR_INVALID_VALUE;
    *(CUcontext *)pctx = (CUcontext)(uintptr_t)stream_context(id);
    return CUDA_SUCCESS;
}

CUresult cuStreamGetCtx_v2(CUstream hStream, void *pCtx, void *pGreenCtx)
{
    uint64_t id;
    struct shim_object *object;
    CUresult status = look(hStream, &id, &object);
    if (status != CUDA_SUCCESS) return status;
    if (pCtx != NULL) *(CUcontext *)pCtx = (CUcontext)(uintptr_t)stream_context(id);
    if (pGreenCtx != NULL) *(void **)pGreenCtx = NULL; /* there are no green contexts here */
    return CUDA_SUCCESS;
}

CUresult cuStreamGetGreenCtx(CUstream hStream, void *phCtx)
{
    uint64_t id;
    struct shim_object *object;
    CUresult status = look(hStream, &id, &object);
    if (status != CUDA_SUCCESS) return status;
    if (phCtx == NULL) return CUDA_ERROR_INVALID_VALUE;
    *(void **)phCtx = NULL;
    return CUDA_SUCCESS;
}

/* ---- attributes: the host's driver knows which there are ---- */

CUresult cuStreamGetAttribute(CUstream hStream, unsigned int attr, void *value_out)
{
    uint64_t id;
    struct shim_object *object;
    CUresult status = look(hStream, &id, &object);
    if (status != CUDA_SUCCESS) return status;
    if (value_out == NULL) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {id, attr};
    uint8_t value[ATTRIBUTE_BYTES];
    uint32_t length = 0;
    status = shim_reply(VGPU_CALL_cuStreamGetAttribute, argument, NULL, 0, NULL, value, sizeof value, &length);
    if (status == CUDA_SUCCESS) memcpy(value_out, value, length < sizeof value ? length : sizeof value);
    return status;
}

CUresult cuStreamSetAttribute(CUstream hStream, unsigned int attr, const void *value)
{
    uint64_t id;
    struct shim_object *object;
    CUresult status = look(hStream, &id, &object);
    if (status != CUDA_SUCCESS) return status;
    if (value == NULL) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {id, attr};
    return shim_reply(VGPU_CALL_cuStreamSetAttribute, argument, value, ATTRIBUTE_BYTES, NULL, NULL, 0, NULL);
}

/* Only managed memory can be attached to a stream, and there is none. */
CUresult cuStreamAttachMemAsync(CUstream hStream, unsigned long long dptr, size_t length, unsigned int flags)
{
    uint64_t id;
    struct shim_object *object;
    CUresult status = look(hStream, &id, &object);
    (void)dptr, (void)length, (void)flags;
    return status != CUDA_SUCCESS ? status : CUDA_ERROR_INVALID_VALUE;
}
