/* SPDX-License-Identifier: Apache-2.0 */
/*
 * stream.c - streams, under handles the guest chose. Nothing here waits; what the driver says about a stream that
 * captures is passed on as it is.
 */
#include "allocations.h"
#include "code.h"
#include "internal.h"

#define ATTRIBUTE_BYTES 64u
#define OPERATION_BYTES 48u
#define OPERATIONS_MOST 256u
#define OPERATION_LAST 6u /* CU_STREAM_MEM_OP_BARRIER */

/* A look at a stream puts no work on it, unlike replay_stream. */
static bool find(struct vgpu_replay *replay, uint64_t id, void **real)
{
    *real = NULL;
    return id == 0 || replay_lookup(replay, VGPU_KIND_STREAM, id, real);
}

/* arguments: handle, flags, priority */
CUresult replay_cuStreamCreateWithPriority(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *stream = NULL;
    CUresult status =
        (CUresult)replay->driver.cuStreamCreateWithPriority(&stream, (unsigned)call->argument[1], (int)(int64_t)call->argument[2]);
    if (status != CUDA_SUCCESS)
        return status;
    if (replay_bind(replay, VGPU_KIND_STREAM, call->argument[0], stream))
        return CUDA_SUCCESS;
    replay->driver.cuStreamDestroy_v2(stream);
    return CUDA_ERROR_INVALID_HANDLE;
}

/* argument: handle; value[0]: the handle of a graph that ended with it, for it was being captured */
CUresult replay_cuStreamDestroy_v2(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *stream;
    if (!replay_lookup(replay, VGPU_KIND_STREAM, call->argument[0], &stream))
        return CUDA_ERROR_INVALID_HANDLE;
    replay_stream_retire(replay, call->argument[0]);
    replay_unbind(replay, VGPU_KIND_STREAM, call->argument[0]);
    CUresult status = (CUresult)replay->driver.cuStreamDestroy_v2(stream);
    if (replay->private->captures != 0)
        result->value[0] = code_capture_lost(replay, call->argument[0]);
    replay_pools_stream_ended(replay, call->argument[0]);
    return status;
}

/* argument: handle */
CUresult replay_cuStreamQuery(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *stream;
    if (!find(replay, call->argument[0], &stream))
        return CUDA_ERROR_INVALID_HANDLE;
    return (CUresult)replay->driver.cuStreamQuery(stream);
}

/* arguments: stream, event, flags */
CUresult replay_cuStreamWaitEvent(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *stream, *event;
    if (!replay_stream(replay, call->argument[0], &stream) || !replay_lookup(replay, VGPU_KIND_EVENT, call->argument[1], &event))
        return CUDA_ERROR_INVALID_HANDLE;
    if (replay->private->captures != 0 && !replay_is_capturing(replay, stream)) /* the wait may take it into a capture */
        replay_stream_retire(replay, call->argument[0]);
    return (CUresult)replay->driver.cuStreamWaitEvent(stream, event, (unsigned)call->argument[2]);
}

/* arguments: stream, attribute; reply: its 64 bytes */
CUresult replay_cuStreamGetAttribute(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *stream;
    if (!find(replay, call->argument[0], &stream))
        return CUDA_ERROR_INVALID_HANDLE;
    memset(reply, 0, ATTRIBUTE_BYTES);
    CUresult status = (CUresult)replay->driver.cuStreamGetAttribute(stream, (unsigned)call->argument[1], reply);
    if (status == CUDA_SUCCESS)
        result->payload_length = ATTRIBUTE_BYTES;
    return status;
}

/* arguments: stream, attribute; payload: 64 bytes */
CUresult replay_cuStreamSetAttribute(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    uint64_t value[ATTRIBUTE_BYTES / 8];
    void *stream;
    if (!find(replay, call->argument[0], &stream))
        return CUDA_ERROR_INVALID_HANDLE;
    if (call->payload_length < sizeof value)
        return CUDA_ERROR_INVALID_VALUE;
    memcpy(value, payload, sizeof value);
    return (CUresult)replay->driver.cuStreamSetAttribute(stream, (unsigned)call->argument[1], value);
}

/* arguments: stream, count, flags; payload: count operations of 48 bytes */
CUresult replay_cuStreamBatchMemOp_v2(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    uint64_t operation[OPERATIONS_MOST][OPERATION_BYTES / 8];
    uint64_t count = call->argument[1];
    void *stream;
    if (!replay_stream(replay, call->argument[0], &stream))
        return CUDA_ERROR_INVALID_HANDLE;
    if (count == 0 || count > OPERATIONS_MOST || call->payload_length < count * OPERATION_BYTES)
        return CUDA_ERROR_INVALID_VALUE;
    memcpy(operation, payload, count * OPERATION_BYTES);
    /* SAFETY: from here on only the private copy is looked at. */
    __asm__ volatile("" : "+m"(operation) : : "memory");
    for (uint64_t i = 0; i < count; i++)
        if ((uint32_t)operation[i][0] == 0 || (uint32_t)operation[i][0] > OPERATION_LAST)
            return CUDA_ERROR_INVALID_VALUE;
    return (CUresult)replay->driver.cuStreamBatchMemOp_v2(stream, (unsigned)count, operation, (unsigned)call->argument[2]);
}
