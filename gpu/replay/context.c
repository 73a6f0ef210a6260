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

#define LOOK_NS 20000

static CUresult register_again(struct vgpu_replay *replay)
{
    CUresult status = replay_register_again(replay);
    if (status == CUDA_SUCCESS)
        replay_pulse_again(replay);
    return status;
}

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
    return register_again(replay);
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
    replay_registrations_end(replay, slot);
    replay_slice_context_ended(replay, slot);
    replay_textures_context_ended(replay, slot);
    replay_arrays_context_ended(replay, slot);
    replay_handles_end_context(replay, slot);
    if (replay_memory_context_ended != NULL)
        replay_memory_context_ended(replay, slot);
    replay_memory_release(replay, context->limit_charged[0] + context->limit_charged[1]);
    if (context->handle != 0)
        replay_unbind(replay, VGPU_KIND_CONTEXT, context->handle);
    *context = (struct replay_context){.primary = slot == 0};
}

/* A context that lives when `slot` has ended, preferably the current one; REPLAY_NO_CONTEXT: none. */
static unsigned survivor_of(struct vgpu_replay *replay, unsigned slot)
{
    struct replay_private *private = replay->private;
    unsigned found = REPLAY_NO_CONTEXT;
    for (unsigned i = 0; i < REPLAY_CONTEXTS; i++)
        if (i != slot && private->context[i].real != NULL && (found == REPLAY_NO_CONTEXT || i == private->current))
            found = i;
    return found;
}

/* The segment is registered in the context that is about to end, and work of the others may be using it: copies from the
 * arena, fences. They are let finish. This waits for the device, as ending a context itself does, and the watchdog sees to both. */
static void let_others_finish(struct vgpu_replay *replay, unsigned slot)
{
    struct replay_private *private = replay->private;
    if (!replay_registered_in(replay, slot) || survivor_of(replay, slot) == REPLAY_NO_CONTEXT)
        return;
    while (replay_outstanding(replay) && !replay_poll_driver(replay, replay_now_ns()) && private->error == 0 &&
           atomic_load_explicit(&private->stop, memory_order_relaxed) == 0)
        nanosleep(&(struct timespec){.tv_nsec = LOOK_NS}, NULL);
}

/* Context `slot` has ended. What was registered in it is registered in one that lives; if none does, in the next one that is made. */
static CUresult register_elsewhere(struct vgpu_replay *replay, unsigned slot)
{
    struct replay_private *private = replay->private;
    unsigned survivor = survivor_of(replay, slot), before = private->current;
    uint64_t handle = replay->current_context;
    if (!replay_registered_in(replay, REPLAY_NO_CONTEXT) || survivor == REPLAY_NO_CONTEXT)
        return CUDA_SUCCESS;
    if (!replay_select_context(replay, survivor))
        return CUDA_ERROR_INVALID_CONTEXT;
    CUresult status = register_again(replay);
    if (private->context[before].real != NULL) {
        replay_select_context(replay, before);
    } else {
        private->current = before; /* the guest's threads have no context: so it is again */
        replay->current_context = handle;
    }
    return status;
}

/* Ends the primary context; it stays gone until retained again. */
static CUresult end_primary(struct vgpu_replay *replay)
{
    struct replay_private *private = replay->private;
    if (private->context[0].real == NULL)
        return CUDA_SUCCESS;
    let_others_finish(replay, 0);
    forget(replay, 0);
    replay->context = NULL;
    if (private->current == 0)
        replay->current_context = 0;
    CUresult status = (CUresult)replay->driver.cuDevicePrimaryCtxRelease_v2(replay->device); /* ours is the only reference */
    CUresult moved = register_elsewhere(replay, 0);
    return status != CUDA_SUCCESS ? status : moved;
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

static CUresult end_context(struct vgpu_replay *replay, unsigned slot)
{
    struct replay_private *private = replay->private;
    void *real = private->context[slot].real;
    bool was_current = private->current == slot;
    let_others_finish(replay, slot);
    forget(replay, slot);
    int status = replay->driver.cuCtxDestroy_v2(real);
    if (was_current) {
        private->current = 0;
        replay->current_context = private->context[0].handle;
        if (private->context[0].real != NULL)
            replay->driver.cuCtxSetCurrent(private->context[0].real);
    }
    CUresult moved = register_elsewhere(replay, slot);
    return status != 0 ? (CUresult)status : moved;
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
    CUresult registered = register_again(replay);
    if (registered != CUDA_SUCCESS)
        (void)end_context(replay, slot);
    return registered;
}

CUresult replay_wireContextDestroy(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    int slot = find(replay, call->argument[0]);
    if (slot <= 0)
        return slot == 0 ? CUDA_ERROR_INVALID_CONTEXT : CUDA_ERROR_INVALID_HANDLE;
    return end_context(replay, (unsigned)slot);
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
