/* SPDX-License-Identifier: Apache-2.0 */
/*
 * context.c - contexts and each thread's stack of them. Which context is current is the guest's own business: the ring is
 * told only when a record comes from a thread in another context than the one before (ring.c).
 */
#include "core.h"
#include "_generated_prototypes.h"

#include <stdlib.h>

#define CONTEXT_FLAGS_MASK 0xffu
#define SCHEDULE_MASK 0x07u
#define SCHEDULE_BLOCKING 0x04u
#define MAP_HOST 0x08u
#define MULTIPROCESSOR_COUNT 16
#define API_VERSION 3020u /* what cuCtxGetApiVersion answers for contexts of this API */
#define END_HOOKS 16

/* ---- objects ---- */

struct shim_context *shim_context_find(uint64_t handle)
{
    struct shim_object *object = shim_object(VGPU_KIND_CONTEXT, handle);
    return object != NULL ? object->data : NULL;
}

struct shim_context *shim_context_make(bool is_primary)
{
    static _Atomic uint64_t numbers;
    struct shim_context *context = calloc(1, sizeof *context);
    if (context == NULL) return NULL;
    context->is_primary = is_primary;
    context->number = atomic_fetch_add(&numbers, 1) + 1;
    context->handle = shim_handle_new(VGPU_KIND_CONTEXT, context, NULL);
    if (context->handle != 0) return context;
    free(context);
    return NULL;
}

/* The block itself stays: another thread may just be reading it. Contexts are few. */
void shim_context_unmake(struct shim_context *context)
{
    atomic_store(&context->active, 0);
    shim_handle_free(context->handle);
}

static struct {
    struct shim_lock lock;
    unsigned count;
    void (*hook[END_HOOKS])(uint64_t);
} end_hooks;

void shim_on_context_end(void (*hook)(uint64_t context))
{
    shim_lock_take(&end_hooks.lock);
    if (end_hooks.count < END_HOOKS) end_hooks.hook[end_hooks.count++] = hook;
    shim_lock_give(&end_hooks.lock);
}

void shim_context_run_end_hooks(uint64_t handle)
{
    void (*hook[END_HOOKS])(uint64_t);
    shim_lock_take(&end_hooks.lock);
    unsigned count = end_hooks.count;
    memcpy(hook, end_hooks.hook, sizeof hook);
    shim_lock_give(&end_hooks.lock);
    for (unsigned i = 0; i < count; i++) hook[i](handle);
}

/* The context a call is about: `ctx`, or the thread's current one. */
static CUresult named_context(CUcontext ctx, struct shim_context **out)
{
    uint64_t handle = ctx != NULL ? (uint64_t)(uintptr_t)ctx : shim_current_context_id();
    if (handle == 0) return CUDA_ERROR_INVALID_CONTEXT;
    *out = shim_context_find(handle);
    if (*out == NULL) return ctx != NULL ? CUDA_ERROR_INVALID_CONTEXT : CUDA_ERROR_CONTEXT_IS_DESTROYED;
    return CUDA_SUCCESS;
}

/* The same, and it exists on the device: a primary context that nobody has retained does not. */
static CUresult active_context(CUcontext ctx, struct shim_context **out)
{
    CUresult status = named_context(ctx, out);
    if (status == CUDA_SUCCESS && atomic_load(&(*out)->active) == 0) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    return status;
}

/* ---- create and destroy ---- */

static CUresult create(void *pctx, unsigned flags, int dev)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (pctx == NULL || (flags & ~CONTEXT_FLAGS_MASK) != 0) return CUDA_ERROR_INVALID_VALUE;
    if ((flags & SCHEDULE_MASK) > SCHEDULE_BLOCKING || (flags & SCHEDULE_MASK) == 3) return CUDA_ERROR_INVALID_VALUE;
    if (!shim_device_ok(dev)) return CUDA_ERROR_INVALID_DEVICE;
    struct shim_thread *thread = shim_thread();
    if (thread->depth >= SHIM_CONTEXT_DEPTH) return CUDA_ERROR_OUT_OF_MEMORY;
    struct shim_context *context = shim_context_make(false);
    if (context == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    atomic_store(&context->flags, flags);
    const uint64_t argument[8] = {context->handle, flags};
    status = shim_reply(VGPU_CALL_wireContextCreate, argument, NULL, 0, NULL, NULL, 0, NULL);
    if (status != CUDA_SUCCESS) {
        shim_context_unmake(context);
        return status;
    }
    atomic_store(&context->active, 1);
    if ((flags & SCHEDULE_MASK) == SCHEDULE_BLOCKING) shim_wait_asleep(true);
    thread->context[thread->depth++] = context->handle;
    *(CUcontext *)pctx = (CUcontext)(uintptr_t)context->handle;
    return CUDA_SUCCESS;
}

CUresult cuCtxCreate_v2(void *pctx, unsigned int flags, int dev) { return create(pctx, flags, dev); }

CUresult cuCtxCreate_v3(void *pctx, const void *paramsArray, int numParams, unsigned int flags, int dev)
{
    /* Execution affinity needs MPS. */
    if (paramsArray != NULL || numParams != 0) {
        CUresult status = shim_enter();
        return status != CUDA_SUCCESS ? status : CUDA_ERROR_UNSUPPORTED_EXEC_AFFINITY;
    }
    return create(pctx, flags, dev);
}

/* CUctxCreateParams: two pointers, each with the affinity or the graphics context it asks for, or null. */
struct create_parameters { const void *affinity; int affinity_count; const void *graphics; };

CUresult cuCtxCreate_v4(void *pctx, const void *ctxCreateParams, unsigned int flags, int dev)
{
    const struct create_parameters *parameters = ctxCreateParams;
    if (parameters != NULL && (parameters->affinity != NULL || parameters->graphics != NULL)) {
        CUresult status = shim_enter();
        if (status != CUDA_SUCCESS) return status;
        return parameters->affinity != NULL ? CUDA_ERROR_UNSUPPORTED_EXEC_AFFINITY : CUDA_ERROR_NOT_SUPPORTED;
    }
    return create(pctx, flags, dev);
}

CUresult cuCtxDestroy_v2(CUcontext ctx)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    uint64_t handle = (uint64_t)(uintptr_t)ctx;
    struct shim_context *context = handle != 0 ? shim_context_find(handle) : NULL;
    if (context == NULL || context->is_primary) return CUDA_ERROR_INVALID_CONTEXT;
    uint32_t active = 1;
    if (!atomic_compare_exchange_strong(&context->active, &active, 2)) return CUDA_ERROR_INVALID_CONTEXT; /* another thread was first */
    vgpu_context_storage_drop(ctx);
    shim_context_run_end_hooks(handle);
    atomic_store(&context->active, 0); /* from here on no record names it */
    const uint64_t argument[8] = {handle};
    status = shim_reply(VGPU_CALL_wireContextDestroy, argument, NULL, 0, NULL, NULL, 0, NULL);
    shim_context_unmake(context);
    struct shim_thread *thread = shim_thread();
    if (thread->depth != 0 && thread->context[thread->depth - 1] == handle) thread->depth--;
    return status;
}

CUresult cuCtxDestroy(CUcontext ctx) { return cuCtxDestroy_v2(ctx); }

/* Deprecated: a use count on a context. */
CUresult cuCtxAttach(void *pctx, unsigned int flags)
{
    SHIM_LOCAL_ENTRY;
    if (pctx == NULL || flags != 0) return CUDA_ERROR_INVALID_VALUE;
    return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuCtxDetach(CUcontext ctx)
{
    SHIM_LOCAL_ENTRY;
    (void)ctx;
    return CUDA_ERROR_NOT_SUPPORTED;
}

/* ---- the stack ---- */

CUresult cuCtxPushCurrent_v2(CUcontext ctx)
{
    SHIM_LOCAL_ENTRY;
    uint64_t handle = (uint64_t)(uintptr_t)ctx;
    struct shim_thread *thread = shim_thread();
    if (handle == 0) return CUDA_ERROR_INVALID_VALUE;
    if (shim_context_find(handle) == NULL) return CUDA_ERROR_INVALID_CONTEXT;
    if (thread->depth >= SHIM_CONTEXT_DEPTH) return CUDA_ERROR_OUT_OF_MEMORY;
    thread->context[thread->depth++] = handle;
    return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent(CUcontext ctx) { return cuCtxPushCurrent_v2(ctx); }

CUresult cuCtxPopCurrent_v2(void *pctx)
{
    SHIM_LOCAL_ENTRY;
    struct shim_thread *thread = shim_thread();
    if (thread->depth == 0) return CUDA_ERROR_INVALID_CONTEXT;
    uint64_t handle = thread->context[--thread->depth];
    if (pctx != NULL) *(CUcontext *)pctx = (CUcontext)(uintptr_t)handle;
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(void *pctx) { return cuCtxPopCurrent_v2(pctx); }

CUresult cuCtxSetCurrent(CUcontext ctx)
{
    SHIM_LOCAL_ENTRY;
    uint64_t handle = (uint64_t)(uintptr_t)ctx;
    struct shim_thread *thread = shim_thread();
    if (handle == 0) {
        if (thread->depth != 0) thread->depth--;
        return CUDA_SUCCESS;
    }
    if (shim_context_find(handle) == NULL) return CUDA_ERROR_INVALID_CONTEXT;
    if (thread->depth == 0) thread->depth = 1;
    thread->context[thread->depth - 1] = handle;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(void *pctx)
{
    SHIM_LOCAL_ENTRY;
    if (pctx == NULL) return CUDA_ERROR_INVALID_VALUE;
    *(CUcontext *)pctx = (CUcontext)(uintptr_t)shim_current_context_id();
    return CUDA_SUCCESS;
}

CUcontext shim_current_context(void)
{
    return shim_enter_local() == CUDA_SUCCESS ? (CUcontext)(uintptr_t)shim_current_context_id() : NULL;
}

/* ---- queries ---- */

CUresult cuCtxGetDevice(int *device)
{
    SHIM_LOCAL_ENTRY;
    if (device == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (shim_current_context_id() == 0) return CUDA_ERROR_INVALID_CONTEXT;
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice_v2(int *device, CUcontext ctx)
{
    SHIM_LOCAL_ENTRY;
    if (device == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (ctx != NULL) {
        if (SHIM_UNLIKELY(shim_context_find((uint64_t)(uintptr_t)ctx) == NULL)) return CUDA_ERROR_INVALID_CONTEXT;
    } else if (shim_current_context_id() == 0) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetFlags(unsigned int *flags)
{
    SHIM_LOCAL_ENTRY;
    if (flags == NULL) return CUDA_ERROR_INVALID_VALUE;
    uint64_t handle = shim_current_context_id();
    if (handle == 0) return CUDA_ERROR_INVALID_CONTEXT;
    /* As natively, a context that is no more or not yet still answers this one. */
    const struct shim_context *context = shim_context_find(handle);
    *flags = context == NULL ? 0 : atomic_load(&context->flags) | (context->is_primary ? MAP_HOST : 0);
    return CUDA_SUCCESS;
}

CUresult cuCtxGetId(CUcontext ctx, unsigned long long *ctxId)
{
    SHIM_LOCAL_ENTRY;
    struct shim_context *context;
    if (ctxId == NULL) return CUDA_ERROR_INVALID_VALUE;
    CUresult status = active_context(ctx, &context);
    if (status == CUDA_SUCCESS) *ctxId = context->number;
    return status;
}

CUresult cuCtxGetApiVersion(CUcontext ctx, unsigned int *version)
{
    SHIM_LOCAL_ENTRY;
    struct shim_context *context;
    if (version == NULL) return CUDA_ERROR_INVALID_VALUE;
    CUresult status = active_context(ctx, &context);
    if (status != CUDA_SUCCESS) return ctx != NULL ? CUDA_ERROR_INVALID_CONTEXT : status;
    *version = API_VERSION;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetStreamPriorityRange(void *leastPriority, void *greatestPriority)
{
    SHIM_LOCAL_ENTRY;
    struct shim_context *context;
    CUresult status = active_context(NULL, &context);
    if (status != CUDA_SUCCESS) return status;
    if (leastPriority != NULL) *(int *)leastPriority = shim.device->stream_priority_least;
    if (greatestPriority != NULL) *(int *)greatestPriority = shim.device->stream_priority_greatest;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetExecAffinity(void *pExecAffinity, unsigned int type)
{
    SHIM_LOCAL_ENTRY;
    struct shim_context *context;
    CUresult status = active_context(NULL, &context);
    if (status != CUDA_SUCCESS) return status;
    if (pExecAffinity == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (type != 0) return CUDA_ERROR_UNSUPPORTED_EXEC_AFFINITY;
    const unsigned answer[2] = {0, (unsigned)shim.device->attribute[MULTIPROCESSOR_COUNT]}; /* type, number of multiprocessors: all */
    memcpy(pExecAffinity, answer, sizeof answer);
    return CUDA_SUCCESS;
}

/* A context is not its own peer, and all contexts here are on one device. */
CUresult cuCtxEnablePeerAccess(CUcontext peerContext, unsigned int Flags)
{
    SHIM_LOCAL_ENTRY;
    struct shim_context *mine, *peer;
    CUresult status = active_context(NULL, &mine);
    if (status != CUDA_SUCCESS) return status;
    if (Flags != 0) return CUDA_ERROR_INVALID_VALUE;
    if (peerContext == NULL || named_context(peerContext, &peer) != CUDA_SUCCESS) return CUDA_ERROR_INVALID_CONTEXT;
    return CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
}

CUresult cuCtxDisablePeerAccess(CUcontext peerContext)
{
    SHIM_LOCAL_ENTRY;
    struct shim_context *mine, *peer;
    CUresult status = active_context(NULL, &mine);
    if (status != CUDA_SUCCESS) return status;
    if (peerContext == NULL || named_context(peerContext, &peer) != CUDA_SUCCESS) return CUDA_ERROR_INVALID_CONTEXT;
    return CUDA_ERROR_PEER_ACCESS_NOT_ENABLED;
}

/* ---- limits: asked of the host once, then remembered ---- */

CUresult cuCtxGetLimit(size_t *pvalue, unsigned int limit)
{
    CUresult status = shim_enter_context();
    struct shim_context *context;
    if (status != CUDA_SUCCESS) return status;
    if (pvalue == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (limit >= SHIM_LIMITS) return CUDA_ERROR_INVALID_VALUE;
    if ((status = active_context(NULL, &context)) != CUDA_SUCCESS) return status;
    if (atomic_load_explicit(&context->limit_known[limit], memory_order_acquire) == 0) {
        const uint64_t argument[8] = {limit};
        uint64_t value[4] = {0};
        status = shim_reply(VGPU_CALL_cuCtxGetLimit, argument, NULL, 0, value, NULL, 0, NULL);
        if (status != CUDA_SUCCESS && status != CUDA_ERROR_UNSUPPORTED_LIMIT) return status;
        __atomic_store_n(&context->limit_value[limit], value[0], __ATOMIC_RELAXED);
        __atomic_store_n(&context->limit_status[limit], status, __ATOMIC_RELAXED);
        atomic_store_explicit(&context->limit_known[limit], 1, memory_order_release);
    } else {
        shim_count_local();
    }
    status = __atomic_load_n(&context->limit_status[limit], __ATOMIC_RELAXED);
    if (status == CUDA_SUCCESS) *pvalue = __atomic_load_n(&context->limit_value[limit], __ATOMIC_RELAXED);
    return status;
}

CUresult cuCtxSetLimit(unsigned int limit, size_t value)
{
    CUresult status = shim_enter_context();
    struct shim_context *context;
    if (status != CUDA_SUCCESS) return status;
    if (limit >= SHIM_LIMITS) return CUDA_ERROR_INVALID_VALUE;
    if ((status = active_context(NULL, &context)) != CUDA_SUCCESS) return status;
    const uint64_t argument[8] = {limit, value};
    status = shim_reply(VGPU_CALL_cuCtxSetLimit, argument, NULL, 0, NULL, NULL, 0, NULL);
    atomic_store(&context->limit_known[limit], 0); /* the driver may round what it was given */
    return status;
}

/* ---- synchronise ---- */

/* Waits for everything submitted in the calling thread's context. */
CUresult shim_context_synchronise(void)
{
    struct shim_fence fence;
    CUresult status = shim_fence_new(&fence);
    if (status != CUDA_SUCCESS) return status;
    const uint64_t argument[8] = {fence.index, fence.value};
    status = shim_async(VGPU_CALL_wireFenceContext, argument, NULL, 0);
    if (status == CUDA_SUCCESS) status = shim_fence_wait(&fence);
    shim_fence_free(&fence);
    return shim_take_deferred(status);
}

CUresult cuCtxSynchronize(void)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    /* Whatever the modes of the captures and of this thread, as natively. */
    if (atomic_load(&shim_captures_active) != 0) return shim_capture_forbid_all();
    return shim_context_synchronise();
}

CUresult cuCtxSynchronize_v2(CUcontext ctx)
{
    if (ctx == NULL || (uint64_t)(uintptr_t)ctx == shim_current_context_id()) return cuCtxSynchronize();
    CUresult status = cuCtxPushCurrent_v2(ctx);
    if (status != CUDA_SUCCESS) return status;
    status = cuCtxSynchronize();
    (void)cuCtxPopCurrent_v2(NULL);
    return status;
}

/* ---- capture mode of a thread ---- */

/* As natively, the value is kept as it is; only the three modes mean anything. */
CUresult cuThreadExchangeStreamCaptureMode(void *mode)
{
    SHIM_LOCAL_ENTRY;
    if (mode == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct shim_thread *thread = shim_thread();
    unsigned wanted;
    memcpy(&wanted, mode, sizeof wanted);
    memcpy(mode, &thread->capture_mode, sizeof wanted);
    thread->capture_mode = wanted;
    return CUDA_SUCCESS;
}
