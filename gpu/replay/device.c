/* SPDX-License-Identifier: Apache-2.0 */
/*
 * device.c - the few questions about the device that have no answer on the device page (device_page.c) because they
 * depend on what is asked.
 */
#include "replay.h"

/* argument: count; payload: that many operations (u32); reply: as many capabilities (u32) */
CUresult replay_cuDeviceGetHostAtomicCapabilities(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    uint32_t operation[VGPU_SLOT_PAYLOAD_LIMIT / sizeof(uint32_t)];
    uint64_t count = call->argument[0];
    if (count == 0 || count > VGPU_SLOT_PAYLOAD_LIMIT / sizeof(uint32_t) || call->payload_length != count * sizeof(uint32_t))
        return CUDA_ERROR_INVALID_VALUE;
    memcpy(operation, payload, count * sizeof(uint32_t));
    int status = replay->driver.cuDeviceGetHostAtomicCapabilities(reply, operation, (unsigned)count, replay->device);
    if (status == 0)
        result->payload_length = (uint16_t)(count * sizeof(uint32_t));
    return (CUresult)status;
}
