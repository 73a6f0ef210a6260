/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memory.c - device memory: allocation under the VM's quota, freeing of what this session allocated, memsets.
 *
 * The quota is charged before the driver is asked and given back when the driver has freed. What counts is what the driver
 * takes: it hands out device memory in units (2 MiB on NVIDIA's), and puts small allocations together into one; which ones
 * share a unit their addresses tell. Addresses a guest names are freed only if they are in the table; any other use of an
 * address the driver checks itself.
 */
#include "allocations.h"
#include "graph_memory.h"
#include "internal.h"

#include <stdlib.h>

#define PITCH_UNIT 512u

/* The driver has allocated it: charge what it takes, of which `charged` has been already, and remember it. */
static CUresult record(struct vgpu_replay *replay, uint64_t address, uint64_t size, uint64_t charged)
{
    uint64_t cost = replay_allocation_cost(replay, address, size);
    const struct replay_allocation allocation = {.address = address, .size = size, .slot = replay->private->current,
                                                 .kind = REPLAY_ALLOCATION_DEVICE};
    if (cost < charged)
        replay_memory_release(replay, charged - cost);
    bool is_charged = cost <= charged || replay_memory_charge_settling(replay, cost - charged);
    if (is_charged && replay_allocation_add(replay, allocation))
        return CUDA_SUCCESS;
    replay->driver.cuMemFree_v2(address);
    replay_memory_release(replay, is_charged ? cost : charged);
    return CUDA_ERROR_OUT_OF_MEMORY;
}

/* The least that an allocation of that size takes of the device. Of something smaller than a unit the driver says only
 * afterwards whether a unit has been begun for it. */
static uint64_t whole_units(const struct vgpu_replay *replay, uint64_t size)
{
    return replay->memory_unit <= 1 ? size : size / replay->memory_unit * replay->memory_unit;
}

/* Pools may keep what they do not need. */
bool replay_memory_charge_settling(struct vgpu_replay *replay, uint64_t bytes)
{
    if (replay_memory_charge(replay, bytes))
        return true;
    replay_pools_settle(replay, REPLAY_POOLS_EMPTY);
    return replay_memory_charge(replay, bytes);
}

/* argument: bytes; value[0]: address */
CUresult replay_cuMemAlloc_v2(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    uint64_t size = call->argument[0], address = 0, charged = whole_units(replay, size);
    if (size == 0)
        return CUDA_ERROR_INVALID_VALUE;
    if (!replay_memory_charge_settling(replay, charged))
        return CUDA_ERROR_OUT_OF_MEMORY;
    CUresult status = (CUresult)replay->driver.cuMemAlloc_v2(&address, size);
    if (status != CUDA_SUCCESS) {
        replay_memory_release(replay, charged);
        return status;
    }
    result->value[0] = address;
    return record(replay, address, size, charged);
}

/* arguments: width in bytes, height, element size; value: address, pitch */
CUresult replay_cuMemAllocPitch_v2(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    uint64_t width = call->argument[0], height = call->argument[1], guess, address = 0;
    if (width == 0 || height == 0 || width > UINT64_MAX - PITCH_UNIT ||
        __builtin_mul_overflow((width + PITCH_UNIT - 1) / PITCH_UNIT * PITCH_UNIT, height, &guess))
        return CUDA_ERROR_INVALID_VALUE;
    guess = whole_units(replay, guess);
    if (!replay_memory_charge_settling(replay, guess))
        return CUDA_ERROR_OUT_OF_MEMORY;
    size_t pitch = 0;
    CUresult status = (CUresult)replay->driver.cuMemAllocPitch_v2(&address, &pitch, width, height, (unsigned)call->argument[2]);
    if (status != CUDA_SUCCESS) {
        replay_memory_release(replay, guess);
        return status;
    }
    result->value[0] = address;
    result->value[1] = pitch;
    return record(replay, address, pitch * height, guess); /* rows may be further apart than guessed */
}

/* argument: address of an allocation of either kind */
CUresult replay_wireMemoryFree(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    uint64_t address = call->argument[0];
    const struct replay_allocation *found = replay_allocation_find(replay, address);
    if (found == NULL)
        return graph_memory_free(replay, address, 0, NULL, true);
    if (found->kind == REPLAY_ALLOCATION_MAPPING)
        return CUDA_ERROR_INVALID_VALUE;
    CUresult status = (CUresult)replay->driver.cuMemFree_v2(address);
    if (status != CUDA_SUCCESS)
        return status;
    replay_allocation_freed(replay, found);
    return CUDA_SUCCESS;
}

/* value: free, total; what this VM may still have, not what the card has */
CUresult replay_cuMemGetInfo_v2(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    size_t available = 0, total = 0;
    replay_pools_settle(replay, REPLAY_POOLS_COUNT_EXACTLY);
    CUresult status = (CUresult)replay->driver.cuMemGetInfo_v2(&available, &total);
    if (status != CUDA_SUCCESS)
        return status;
    uint64_t limit = replay_memory_limit(replay);
    if (limit != 0 && limit < total) {
        uint64_t used = replay_memory_sum(replay), left = used < limit ? limit - used : 0;
        total = limit;
        if (left < available)
            available = left;
    }
    result->value[0] = available;
    result->value[1] = total;
    return CUDA_SUCCESS;
}

/* argument: address; value: base, size. For addresses the guest's table does not know: globals of modules. */
CUresult replay_cuMemGetAddressRange_v2(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    uint64_t base = 0;
    size_t size = 0;
    CUresult status = (CUresult)replay->driver.cuMemGetAddressRange_v2(&base, &size, call->argument[0]);
    result->value[0] = base;
    result->value[1] = size;
    return status;
}

/* arguments: destination, pitch, value, element size, width in elements, height, stream */
CUresult replay_wireMemset(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    const uint64_t destination = call->argument[0], width = call->argument[4], height = call->argument[5];
    const size_t pitch = call->argument[1];
    const unsigned value = (unsigned)call->argument[2];
    struct vgpu_driver *driver = &replay->driver;
    void *stream;
    if (!replay_stream(replay, call->argument[6], &stream))
        return CUDA_ERROR_INVALID_HANDLE;
    if (width == 0 || height == 0)
        return CUDA_SUCCESS;
    switch (call->argument[3]) {
    case 1:
        return (CUresult)(height == 1 ? driver->cuMemsetD8Async(destination, (unsigned char)value, width, stream)
                                      : driver->cuMemsetD2D8Async(destination, pitch, (unsigned char)value, width, height, stream));
    case 2:
        return (CUresult)(height == 1 ? driver->cuMemsetD16Async(destination, (unsigned short)value, width, stream)
                                      : driver->cuMemsetD2D16Async(destination, pitch, (unsigned short)value, width, height, stream));
    case 4:
        return (CUresult)(height == 1 ? driver->cuMemsetD32Async(destination, value, width, stream)
                                      : driver->cuMemsetD2D32Async(destination, pitch, value, width, height, stream));
    default: return CUDA_ERROR_INVALID_VALUE;
    }
}

/* Device allocations end with their context; pools and mappings do not. */
void replay_memory_context_ended(struct vgpu_replay *replay, unsigned slot)
{
    uint64_t address = 0;
    struct replay_allocation *found;
    while ((found = replay_allocation_next(replay, address)) != NULL) {
        address = found->address;
        if (found->kind == REPLAY_ALLOCATION_DEVICE && found->slot == slot)
            replay_allocation_freed(replay, found);
        else
            address++;
    }
    graph_memory_context_ended(replay);
}
