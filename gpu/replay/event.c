/* SPDX-License-Identifier: Apache-2.0 */
/*
 * event.c - events, under handles the guest chose. Synchronising is the loop's wireFenceEvent; cuEventSynchronize
 * here is only for events that were captured, for which the driver answers without waiting.
 */
#include "internal.h"

/* arguments: handle, flags */
CUresult replay_cuEventCreate(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *event = NULL;
    CUresult status = (CUresult)replay->driver.cuEventCreate(&event, (unsigned)call->argument[1]);
    if (status != CUDA_SUCCESS)
        return status;
    if (replay_bind(replay, VGPU_KIND_EVENT, call->argument[0], event))
        return CUDA_SUCCESS;
    replay->driver.cuEventDestroy_v2(event);
    return CUDA_ERROR_INVALID_HANDLE;
}

/* argument: handle */
CUresult replay_cuEventDestroy_v2(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *event;
    if (!replay_lookup(replay, VGPU_KIND_EVENT, call->argument[0], &event))
        return CUDA_ERROR_INVALID_HANDLE;
    replay_unbind(replay, VGPU_KIND_EVENT, call->argument[0]);
    return (CUresult)replay->driver.cuEventDestroy_v2(event);
}

/* arguments: event, stream, flags */
CUresult replay_cuEventRecordWithFlags(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *event, *stream;
    if (!replay_lookup(replay, VGPU_KIND_EVENT, call->argument[0], &event) || !replay_stream(replay, call->argument[1], &stream))
        return CUDA_ERROR_INVALID_HANDLE;
    if (call->argument[2] == 0)
        return (CUresult)replay->driver.cuEventRecord(event, stream);
    return (CUresult)replay->driver.cuEventRecordWithFlags(event, stream, (unsigned)call->argument[2]);
}

/* argument: handle */
CUresult replay_cuEventQuery(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *event;
    if (!replay_lookup(replay, VGPU_KIND_EVENT, call->argument[0], &event))
        return CUDA_ERROR_INVALID_HANDLE;
    return (CUresult)replay->driver.cuEventQuery(event);
}

/* argument: handle. 600: there is real work to wait for, and the guest does so with a fence. */
CUresult replay_cuEventSynchronize(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *event;
    if (!replay_lookup(replay, VGPU_KIND_EVENT, call->argument[0], &event))
        return CUDA_ERROR_INVALID_HANDLE;
    CUresult status = (CUresult)replay->driver.cuEventQuery(event);
    if (status == CUDA_SUCCESS || status == CUDA_ERROR_NOT_READY)
        return status;
    return (CUresult)replay->driver.cuEventSynchronize(event);
}

CUresult replay_elapsed(struct vgpu_replay *replay, void *start, void *end, float *milliseconds)
{
    int status = replay->driver.cuEventElapsedTime_v2(milliseconds, start, end);
    if (status == CUDA_ERROR_NOT_SUPPORTED) /* a driver before 12.8 */
        status = replay->driver.cuEventElapsedTime(milliseconds, start, end);
    return (CUresult)status;
}

/* arguments: start, end; value[0]: the bits of the float */
CUresult replay_cuEventElapsedTime_v2(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *start, *end;
    float milliseconds = 0;
    uint32_t bits;
    if (!replay_lookup(replay, VGPU_KIND_EVENT, call->argument[0], &start) ||
        !replay_lookup(replay, VGPU_KIND_EVENT, call->argument[1], &end))
        return CUDA_ERROR_INVALID_HANDLE;
    CUresult status = replay_elapsed(replay, start, end, &milliseconds);
    memcpy(&bits, &milliseconds, sizeof bits);
    result->value[0] = bits;
    return status;
}
