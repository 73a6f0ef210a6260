/* SPDX-License-Identifier: Apache-2.0 */
/*
 * occupancy.c - occupancy questions, put to the driver. The guest remembers the answers (shim/libcuda/occupancy.c).
 */
#include "code.h"

CUresult replay_cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    const struct code_function *function = code_function_of(replay, call->argument[0]);
    if (function == NULL) return CUDA_ERROR_INVALID_HANDLE;
    int blocks = 0;
    const CUresult status = (CUresult)replay->driver.cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        &blocks, function->real, (int)call->argument[1], (size_t)call->argument[2], (unsigned)call->argument[3]);
    result->value[0] = (uint32_t)blocks;
    return status;
}

CUresult replay_cuOccupancyAvailableDynamicSMemPerBlock(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    const struct code_function *function = code_function_of(replay, call->argument[0]);
    if (function == NULL) return CUDA_ERROR_INVALID_HANDLE;
    size_t bytes = 0;
    const CUresult status = (CUresult)replay->driver.cuOccupancyAvailableDynamicSMemPerBlock(
        &bytes, function->real, (int)call->argument[1], (int)call->argument[2]);
    result->value[0] = bytes;
    return status;
}

/* The guest's own callback cannot be called from here; the guest searches by itself when there is one. */
CUresult replay_cuOccupancyMaxPotentialBlockSizeWithFlags(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    const struct code_function *function = code_function_of(replay, call->argument[0]);
    if (function == NULL) return CUDA_ERROR_INVALID_HANDLE;
    int grid = 0, block = 0;
    const CUresult status = (CUresult)replay->driver.cuOccupancyMaxPotentialBlockSizeWithFlags(
        &grid, &block, function->real, NULL, (size_t)call->argument[1], (int)call->argument[2], (unsigned)call->argument[3]);
    result->value[0] = (uint32_t)grid;
    result->value[1] = (uint32_t)block;
    return status;
}

/* arguments: function, stream; payload: seven dimensions and sizes, the attribute count, the attributes */
static CUresult clusters(struct vgpu_replay *replay, const struct vgpu_call *call, const void *payload, struct vgpu_result *result,
                         int (*ask)(int *, void *, const void *))
{
    const struct code_function *function = code_function_of(replay, call->argument[0]);
    void *stream;
    if (function == NULL || !code_stream(replay, call->argument[1], &stream)) return CUDA_ERROR_INVALID_HANDLE;
    uint32_t word[8];
    CUlaunchAttribute attribute[VGPU_LAUNCH_ATTRIBUTE_LIMIT];
    if (call->payload_length < sizeof word) return CUDA_ERROR_INVALID_VALUE;
    memcpy(word, payload, sizeof word);
    if (word[7] > VGPU_LAUNCH_ATTRIBUTE_LIMIT || call->payload_length != sizeof word + word[7] * sizeof *attribute)
        return CUDA_ERROR_INVALID_VALUE;
    CUresult status = code_launch_attributes(replay, (const uint8_t *)payload + sizeof word, word[7], attribute);
    if (status != CUDA_SUCCESS) return status;
    const CUlaunchConfig config = {
        .gridDimX = word[0], .gridDimY = word[1], .gridDimZ = word[2], .blockDimX = word[3], .blockDimY = word[4],
        .blockDimZ = word[5], .sharedMemBytes = word[6], .hStream = stream, .attrs = attribute, .numAttrs = word[7],
    };
    int count = 0;
    status = (CUresult)ask(&count, function->real, &config);
    result->value[0] = (uint32_t)count;
    return status;
}

CUresult replay_cuOccupancyMaxActiveClusters(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    return clusters(replay, call, payload, result, replay->driver.cuOccupancyMaxActiveClusters);
}

CUresult replay_cuOccupancyMaxPotentialClusterSize(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    return clusters(replay, call, payload, result, replay->driver.cuOccupancyMaxPotentialClusterSize);
}
