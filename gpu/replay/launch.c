/* SPDX-License-Identifier: Apache-2.0 */
/*
 * launch.c - kernel launches. The parameter bytes stay in the ring: the driver copies them during the call and they mean
 * nothing to us, so all that is checked is that there are as many as the function reads. Attributes are copied out and
 * let through by a list; those that hold a handle are translated.
 */
#include "code.h"

enum { IGNORE, ACCESS_POLICY_WINDOW, COOPERATIVE, PROGRAMMATIC_EVENT = 7, LAUNCH_COMPLETION_EVENT = 12, DEVICE_UPDATABLE = 13, LAST = 17 };

bool code_stream(struct vgpu_replay *replay, uint64_t id, void **real)
{
    *real = NULL;
    return id == 0 || replay_lookup(replay, VGPU_KIND_STREAM, id, real);
}

CUresult code_launch_attributes(struct vgpu_replay *replay, const uint8_t *wire, uint32_t count, CUlaunchAttribute *out)
{
    memcpy(out, wire, count * sizeof *out);
    for (uint32_t i = 0; i < count; i++) {
        CUlaunchAttribute *attribute = &out[i];
        if (attribute->id > LAST || attribute->id == 15) return CUDA_ERROR_NOT_SUPPORTED;
        if (attribute->id == PROGRAMMATIC_EVENT || attribute->id == LAUNCH_COMPLETION_EVENT) {
            void *event;
            if (!replay_lookup(replay, VGPU_KIND_EVENT, attribute->value.quads[0], &event)) return CUDA_ERROR_INVALID_HANDLE;
            attribute->value.pointer = event;
        } else if (attribute->id == DEVICE_UPDATABLE && attribute->value.words[0] != 0) {
            return CUDA_ERROR_NOT_SUPPORTED;
        }
    }
    return CUDA_SUCCESS;
}

static inline CUresult launched(struct vgpu_replay *replay, const struct vgpu_call *call, struct code_function *function, void *stream,
                                CUresult status)
{
    const uint64_t *a = call->argument;
    if (status == CUDA_SUCCESS)
        replay_pulse_launch(replay, stream, a[0], &function->pace, (a[1] & 0xffffffff) * (a[1] >> 32) * (a[2] & 0xffffffff));
    return status;
}

CUresult replay_wireLaunch(REPLAY_PARAMETERS)
{
    (void)result, (void)reply;
    const uint64_t *a = call->argument;
    struct code_function *function = code_function_of(replay, a[0]);
    void *stream;
    if (function == NULL || !replay_stream(replay, a[5], &stream)) return CUDA_ERROR_INVALID_HANDLE;
    if (!function->described) code_function_describe(replay, function);
    const uint32_t attribute_count = (uint32_t)(a[4] >> 32), bytes = (uint32_t)a[6];
    const bool cooperative = a[6] >> 32 != 0;
    if (attribute_count > VGPU_LAUNCH_ATTRIBUTE_LIMIT || bytes > VGPU_PARAMETER_BYTES_LIMIT + 64) return CUDA_ERROR_INVALID_VALUE;
    const uint32_t padded = (uint32_t)vgpu_align16(bytes);
    if (call->payload_length != padded + attribute_count * VGPU_LAUNCH_ATTRIBUTE_BYTES) return CUDA_ERROR_INVALID_VALUE;
    size_t size = bytes;
    /* SAFETY: the driver only reads through this pointer. */
    void *extra[] = {(void *)1, (void *)(uintptr_t)payload, (void *)2, &size, NULL};
    uint8_t enough[VGPU_PARAMETER_BYTES_LIMIT + 64];
    if (bytes < function->parameter_bytes) { /* the driver says what it thinks of that; it is not to read past what was sent */
        memset(enough, 0, function->parameter_bytes);
        memcpy(enough, payload, bytes);
        extra[1] = enough;
    }
    void **with = bytes != 0 ? extra : NULL;
    if (!replay_flight_knows(replay->private->flight, a[0])) replay_flight_name(replay, a[0], function->real, function->is_kernel);
    if (attribute_count == 0 && !cooperative)
        return launched(replay, call, function, stream, (CUresult)replay->driver.cuLaunchKernel(function->real, (unsigned)a[1], (unsigned)(a[1] >> 32), (unsigned)a[2],
                                                       (unsigned)(a[2] >> 32), (unsigned)a[3], (unsigned)(a[3] >> 32), (unsigned)a[4],
                                                       stream, NULL, with));
    CUlaunchAttribute attribute[VGPU_LAUNCH_ATTRIBUTE_LIMIT + 1];
    const CUresult status = code_launch_attributes(replay, (const uint8_t *)payload + padded, attribute_count, attribute);
    if (status != CUDA_SUCCESS) return status;
    unsigned count = attribute_count;
    if (cooperative) {
        memset(&attribute[count], 0, sizeof attribute[count]);
        attribute[count].id = COOPERATIVE;
        attribute[count++].value.words[0] = 1;
    }
    const CUlaunchConfig config = {
        .gridDimX = (unsigned)a[1], .gridDimY = (unsigned)(a[1] >> 32), .gridDimZ = (unsigned)a[2],
        .blockDimX = (unsigned)(a[2] >> 32), .blockDimY = (unsigned)a[3], .blockDimZ = (unsigned)(a[3] >> 32),
        .sharedMemBytes = (unsigned)a[4], .hStream = stream, .attrs = attribute, .numAttrs = count,
    };
    return launched(replay, call, function, stream, (CUresult)replay->driver.cuLaunchKernelEx(&config, function->real, NULL, with));
}
