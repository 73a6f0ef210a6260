/* SPDX-License-Identifier: Apache-2.0 */
/*
 * context.c - the session's contexts. Slot 0 is the primary one; the worker made it while it was warm, so that a guest's
 * first cuDevicePrimaryCtxRetain costs a round trip and not 100 ms. When the guest gives it up (or resets it) it is
 * destroyed for real, with all that lives in it, and made anew when it is wanted again.
 *
 * The replay thread's driver context follows the ring's: guests send wireSetContext when the next record belongs to
 * another context than the one before.
 */
#include "flight.h"
#include "internal.h"

/* Scheduling flags (how a thread waits) mean nothing here: no thread of ours waits in the driver. */
#define FLAG_LMEM_RESIZE_TO_MAX 0x10u

CUresult replay_primary_open(struct vgpu_replay *replay)
{
    struct replay_private *private = replay->private;
    void *context = NULL;
    int status = replay->driver.cuDevicePrimaryCtxRetain(&context, replay->device);
    if (status == 0)
        status = replay->driver.cuCtxSetCurrent(context);
    if (status != 0)
        return (CUresult)status;
    replay->context = context;
    private->context[0].real = context;
    private->context[0].primary = true;
    private->current = 0;
    replay->current_context = private->context[0].handle;
    CUresult again = replay_register_again(replay);
    if (again == CUDA_SUCCESS)
        replay_pulse_again(replay);
    return again;
}

bool replay_select_context(struct vgpu_replay *replay, unsigned slot)
{
    struct replay_private *private = replay->private;
    if (private->current == slot)
        return true;
    if (private->context[slot].real == NULL || replay->driver.cuCtxSetCurrent(private->context[slot].real) != 0)
        return false;
    private->current = slot;
    replay->current_context = private->context[slot].handle;
    return true;
}

static int find(struct vgpu_replay *replay, uint64_t handle)
{
    for (int slot = 0; slot < REPLAY_CONTEXTS; slot++)
        if (handle != 0 && replay->private->context[slot].handle == handle && replay->private->context[slot].real != NULL)
            return slot;
    return -1;
}

/* Everything in the context is gone: handles, fences, counted memory. */
static void forget(struct vgpu_replay *replay, unsigned slot)
{
    struct replay_context *context = &replay->private->context[slot];
    replay_forget_context(replay, slot);
    replay_handles_end_context(replay, slot);
    if (replay_memory_context_ended != NULL)
        replay_memory_context_ended(replay, slot);
    replay_memory_release(replay, context->limit_charged[0] + context->limit_charged[1]);
    if (context->handle != 0)
        replay_unbind(replay, VGPU_KIND_CONTEXT, context->handle);
    *context = (struct replay_context){.primary = slot == 0};
}

/* Ends the primary context; it stays gone until retained again. */
static CUresult end_primary(struct vgpu_replay *replay)
{
    struct replay_private *private = replay->private;
    if (private->context[0].real == NULL)
        return CUDA_SUCCESS;
    forget(replay, 0);
    replay->context = NULL;
    if (private->current == 0)
        replay->current_context = 0;
    return (CUresult)replay->driver.cuDevicePrimaryCtxRelease_v2(replay->device); /* ours is the only reference */
}

CUresult replay_wirePrimaryRetain(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    struct replay_context *primary = &replay->private->context[0];
    uint64_t handle = call->argument[0];
    if (primary->real == NULL) {
        CUresult status = replay_primary_open(replay);
        if (status != CUDA_SUCCESS)
            return status;
    }
    if ((call->argument[1] & FLAG_LMEM_RESIZE_TO_MAX) != 0)
        (void)replay->driver.cuDevicePrimaryCtxSetFlags_v2(replay->device, FLAG_LMEM_RESIZE_TO_MAX);
    if (primary->handle == handle)
        return CUDA_SUCCESS;
    if (find(replay, handle) >= 0 || !replay_select_context(replay, 0) || !replay_bind(replay, VGPU_KIND_CONTEXT, handle, primary->real))
        return CUDA_ERROR_INVALID_VALUE;
    if (primary->handle != 0)
        replay_unbind(replay, VGPU_KIND_CONTEXT, primary->handle);
    primary->handle = handle;
    replay->current_context = handle;
    return CUDA_SUCCESS;
}

CUresult replay_wirePrimaryReset(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    return end_primary(replay);
}

CUresult replay_cuDevicePrimaryCtxRelease_v2(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    return end_primary(replay);
}

CUresult replay_wireContextCreate(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    struct replay_private *private = replay->private;
    unsigned slot = 1;
    while (slot < REPLAY_CONTEXTS && private->context[slot].real != NULL)
        slot++;
    if (slot == REPLAY_CONTEXTS)
        return CUDA_ERROR_OUT_OF_MEMORY;
    void *real = NULL;
    int status = replay->driver.cuCtxCreate_v2(&real, (unsigned)call->argument[1] & FLAG_LMEM_RESIZE_TO_MAX, replay->device);
    if (status != 0)
        return (CUresult)status;
    if (!replay_bind(replay, VGPU_KIND_CONTEXT, call->argument[0], real)) {
        replay->driver.cuCtxDestroy_v2(real);
        if (private->context[private->current].real != NULL)
            replay->driver.cuCtxSetCurrent(private->context[private->current].real);
        return CUDA_ERROR_INVALID_VALUE;
    }
    private->context[slot] = (struct replay_context){.handle = call->argument[0], .real = real};
    private->current = slot; /* cuCtxCreate makes it current */
    replay->current_context = call->argument[0];
    return CUDA_SUCCESS;
}

CUresult replay_wireContextDestroy(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    struct replay_private *private = replay->private;
    int slot = find(replay, call->argument[0]);
    if (slot <= 0)
        return slot == 0 ? CUDA_ERROR_INVALID_CONTEXT : CUDA_ERROR_INVALID_HANDLE;
    void *real = private->context[slot].real;
    bool was_current = private->current == (unsigned)slot;
    forget(replay, (unsigned)slot);
    int status = replay->driver.cuCtxDestroy_v2(real);
    if (was_current) {
        private->current = 0;
        replay->current_context = private->context[0].handle;
        if (private->context[0].real != NULL)
            replay->driver.cuCtxSetCurrent(private->context[0].real);
    }
    return (CUresult)status;
}

CUresult replay_wireSetContext(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    if (call->argument[0] == replay->current_context)
        return CUDA_SUCCESS;
    int slot = find(replay, call->argument[0]);
    return slot >= 0 && replay_select_context(replay, (unsigned)slot) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

#define LIMIT_PRINTF_BUFFER 1u
#define LIMIT_MALLOC_HEAP 2u

/* arguments: limit, value; value[0]: what is in force now. The heap and the printf buffer are device memory that the driver
 * takes as the program says: what it asks for beyond what there was counts until the context ends. */
CUresult replay_cuCtxSetLimit(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    size_t value = 0, before = 0;
    unsigned limit = (unsigned)call->argument[0];
    uint64_t wanted = call->argument[1], more = 0, none = 0;
    bool counts = (limit == LIMIT_PRINTF_BUFFER || limit == LIMIT_MALLOC_HEAP) && replay->driver.cuCtxGetLimit(&before, limit) == 0;
    uint64_t *charged = counts ? &replay->private->context[replay->private->current].limit_charged[limit - 1] : &none;
    if (counts && wanted > before)
        more = wanted - before;
    if (more != 0 && !replay_memory_charge(replay, more))
        return CUDA_ERROR_OUT_OF_MEMORY;
    int status = replay->driver.cuCtxSetLimit(limit, (size_t)wanted);
    if (status != 0)
        replay_memory_release(replay, more);
    else
        *charged += more;
    if (status == 0)
        status = replay->driver.cuCtxGetLimit(&value, limit);
    if (counts && status == 0 && value < before) {
        uint64_t less = before - value < *charged ? before - value : *charged;
        replay_memory_release(replay, less);
        *charged -= less;
    }
    result->value[0] = value;
    return (CUresult)status;
}

/* argument: limit; value[0]: its value */
CUresult replay_cuCtxGetLimit(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    size_t value = 0;
    int status = replay->driver.cuCtxGetLimit(&value, (unsigned)call->argument[0]);
    result->value[0] = value;
    return (CUresult)status;
}
