/* SPDX-License-Identifier: Apache-2.0 */
/*
 * primary.c - the device's primary context. Its handle is the same value for the life of the process, and exists before
 * anybody retains it: runtimes make it current first. Whether the context behind it is active is another matter.
 *
 * Retains are counted here; the host hears of the first and of the end. GetState, which PyTorch asks before every operator,
 * is two loads.
 */
#include "core.h"
#include "_generated_prototypes.h"

#define SCHEDULE_BLOCKING 4u
#define FLAGS_MASK 0xf7u /* mapping host memory is always on and may not be asked for */

static struct {
    pthread_mutex_t lock; /* held across the round trip that activates: others have to wait for that anyway */
    unsigned retained;
    struct shim_context *context;
} primary = {.lock = PTHREAD_MUTEX_INITIALIZER};

void shim_primary_attach(void)
{
    if (primary.context == NULL) primary.context = shim_context_make(true);
}

uint64_t shim_primary_handle(void) { return primary.context != NULL ? primary.context->handle : 0; }

CUcontext shim_primary_context_handle(int device)
{
    return shim_enter_local() == CUDA_SUCCESS && shim_device_ok(device) ? (CUcontext)(uintptr_t)shim_primary_handle() : NULL;
}

CUresult cuDevicePrimaryCtxRetain(void *pctx, int dev)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (pctx == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (!shim_device_ok(dev)) return CUDA_ERROR_INVALID_DEVICE;
    struct shim_context *context = primary.context;
    if (context == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    pthread_mutex_lock(&primary.lock);
    if (atomic_load(&context->active) == 0) {
        const uint64_t argument[8] = {context->handle, atomic_load(&context->flags)};
        status = shim_reply(VGPU_CALL_wirePrimaryRetain, argument, NULL, 0, NULL, NULL, 0, NULL);
        if (status == CUDA_SUCCESS) atomic_store(&context->active, 1);
    }
    if (status == CUDA_SUCCESS) primary.retained++;
    pthread_mutex_unlock(&primary.lock);
    if (status == CUDA_SUCCESS) *(CUcontext *)pctx = (CUcontext)(uintptr_t)context->handle;
    return status;
}

/* Ends what lives in the context, in the guest and on the host; the handle stays. Nobody waits for the host's part: whoever
 * uses the device next stands behind it in the ring. */
static CUresult end_context(struct shim_context *context)
{
    vgpu_context_storage_drop((CUcontext)(uintptr_t)context->handle); /* may call the driver: the context still lives */
    shim_context_run_end_hooks(context->handle);
    atomic_store(&context->active, 0); /* from here on no record names it */
    for (unsigned i = 0; i < SHIM_LIMITS; i++) atomic_store(&context->limit_known[i], 0);
    const uint64_t argument[8] = {context->handle};
    return shim_async(VGPU_CALL_wirePrimaryReset, argument, NULL, 0);
}

CUresult cuDevicePrimaryCtxRelease_v2(int dev)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (!shim_device_ok(dev)) return CUDA_ERROR_INVALID_DEVICE;
    pthread_mutex_lock(&primary.lock);
    bool was_retained = primary.retained != 0;
    bool last = was_retained && --primary.retained == 0 && atomic_load(&primary.context->active) == 1;
    pthread_mutex_unlock(&primary.lock);
    if (!was_retained) return CUDA_ERROR_INVALID_CONTEXT;
    return last ? end_context(primary.context) : CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxReset_v2(int dev)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (!shim_device_ok(dev)) return CUDA_ERROR_INVALID_DEVICE;
    return atomic_load(&primary.context->active) != 0 ? end_context(primary.context) : CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxSetFlags_v2(int dev, unsigned int flags)
{
    SHIM_LOCAL_ENTRY;
    unsigned schedule = flags & 7;
    if ((flags & ~FLAGS_MASK) != 0 || schedule > SCHEDULE_BLOCKING || schedule == 3) return CUDA_ERROR_INVALID_VALUE;
    if (!shim_device_ok(dev)) return CUDA_ERROR_INVALID_DEVICE;
    atomic_store(&primary.context->flags, flags);
    shim_wait_asleep(schedule == SCHEDULE_BLOCKING);
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(int dev, unsigned int *flags, int *active)
{
    SHIM_LOCAL_ENTRY;
    if (flags == NULL || active == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (!shim_device_ok(dev)) return CUDA_ERROR_INVALID_DEVICE;
    *flags = atomic_load_explicit(&primary.context->flags, memory_order_relaxed);
    *active = atomic_load_explicit(&primary.context->active, memory_order_relaxed) != 0;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(int dev) { return cuDevicePrimaryCtxRelease_v2(dev); }
CUresult cuDevicePrimaryCtxReset(int dev) { return cuDevicePrimaryCtxReset_v2(dev); }
CUresult cuDevicePrimaryCtxSetFlags(int dev, unsigned int flags) { return cuDevicePrimaryCtxSetFlags_v2(dev, flags); }
