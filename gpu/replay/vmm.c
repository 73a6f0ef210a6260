/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmm.c - virtual memory management: reservations, physical memory, mappings.
 *
 * Physical memory counts against the quota from cuMemCreate until its last handle and its last mapping are gone,
 * because programs release the handle as soon as they have mapped it. The device in a guest's properties is always
 * its device 0 and becomes this session's; shareable handles are not made, whatever is asked for.
 */
#include "allocations.h"

#include <stdlib.h>

#define ACCESS_MOST 16u

static void drop_if_unused(struct vgpu_replay *replay, struct replay_physical *physical)
{
    if (physical->handles != 0 || physical->mappings != 0)
        return;
    replay_memory_release(replay, physical->size);
    replay_unbind(replay, VGPU_KIND_MEMORY, physical->handle);
    free(physical);
}

/* arguments: size, alignment, wished address, flags; value[0]: address */
CUresult replay_cuMemAddressReserve(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    uint64_t address = 0;
    const uint64_t *a = call->argument;
    CUresult status = (CUresult)replay->driver.cuMemAddressReserve(&address, a[0], a[1], a[2], a[3]);
    result->value[0] = address;
    return status;
}

/* arguments: address, size */
CUresult replay_cuMemAddressFree(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    return (CUresult)replay->driver.cuMemAddressFree(call->argument[0], call->argument[1]);
}

/* arguments: handle, size, flags; payload: CUmemAllocationProp */
CUresult replay_cuMemCreate(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    CUmemAllocationProp asked, properties;
    unsigned long long real = 0;
    uint64_t size = call->argument[1];
    if (call->payload_length < sizeof asked)
        return CUDA_ERROR_INVALID_VALUE;
    memcpy(&asked, payload, sizeof asked);
    /* SAFETY: from here on only the private copy is looked at. */
    __asm__ volatile("" : "+m"(asked) : : "memory");
    if (asked.location.type != CU_MEM_LOCATION_TYPE_DEVICE)
        return CUDA_ERROR_NOT_SUPPORTED;
    properties = asked;
    properties.requestedHandleTypes = 0;
    properties.win32HandleMetaData = NULL;
    properties.location.id = replay->device;
    struct replay_physical *physical = calloc(1, sizeof *physical);
    if (physical == NULL || !replay_memory_charge_settling(replay, size)) {
        free(physical);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    CUresult status = (CUresult)replay->driver.cuMemCreate(&real, size, &properties, call->argument[2]);
    if (status == CUDA_SUCCESS) {
        *physical = (struct replay_physical){.handle = call->argument[0], .real = real, .size = size, .handles = 1};
        if (replay_bind(replay, VGPU_KIND_MEMORY, call->argument[0], physical))
            return CUDA_SUCCESS;
        replay->driver.cuMemRelease(real);
        status = CUDA_ERROR_INVALID_HANDLE;
    }
    replay_memory_release(replay, size);
    free(physical);
    return status;
}

static struct replay_physical *find(struct vgpu_replay *replay, uint64_t handle)
{
    void *real;
    return replay_lookup(replay, VGPU_KIND_MEMORY, handle, &real) ? real : NULL;
}

/* argument: handle */
CUresult replay_cuMemRelease(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    struct replay_physical *physical = find(replay, call->argument[0]);
    if (physical == NULL || physical->handles == 0)
        return CUDA_ERROR_INVALID_VALUE;
    CUresult status = (CUresult)replay->driver.cuMemRelease(physical->real);
    if (status != CUDA_SUCCESS)
        return status;
    physical->handles--;
    drop_if_unused(replay, physical);
    return CUDA_SUCCESS;
}

/* arguments: handle, an address mapped to it: one more reference */
CUresult replay_cuMemRetainAllocationHandle(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    struct replay_physical *physical = find(replay, call->argument[0]);
    const struct replay_allocation *mapping = replay_allocation_at(replay, call->argument[1]);
    unsigned long long real = 0;
    if (physical == NULL || mapping == NULL || mapping->physical != physical)
        return CUDA_ERROR_INVALID_VALUE;
    CUresult status = (CUresult)replay->driver.cuMemRetainAllocationHandle(&real, (void *)(uintptr_t)call->argument[1]);
    if (status != CUDA_SUCCESS)
        return status;
    physical->real = real;
    physical->handles++;
    return CUDA_SUCCESS;
}

/* arguments: address, size, offset, handle, flags */
CUresult replay_cuMemMap(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    const uint64_t *a = call->argument;
    struct replay_physical *physical = find(replay, a[3]);
    if (physical == NULL || physical->handles == 0)
        return CUDA_ERROR_INVALID_VALUE;
    const struct replay_allocation mapping = {.address = a[0], .size = a[1], .kind = REPLAY_ALLOCATION_MAPPING, .physical = physical};
    if (!replay_allocation_add(replay, mapping))
        return CUDA_ERROR_INVALID_VALUE; /* something begins there already */
    CUresult status = (CUresult)replay->driver.cuMemMap(a[0], a[1], a[2], physical->real, a[4]);
    if (status != CUDA_SUCCESS) {
        replay_allocation_remove(replay, a[0]);
        return status;
    }
    physical->mappings++;
    return CUDA_SUCCESS;
}

/* arguments: address, size; whole mappings, as many as lie in it */
CUresult replay_cuMemUnmap(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    uint64_t address = call->argument[0], end;
    if (__builtin_add_overflow(address, call->argument[1], &end))
        return CUDA_ERROR_INVALID_VALUE;
    CUresult status = (CUresult)replay->driver.cuMemUnmap(address, call->argument[1]);
    if (status != CUDA_SUCCESS)
        return status;
    struct replay_allocation *found;
    while ((found = replay_allocation_next(replay, address)) != NULL && found->address < end) {
        address = found->address;
        struct replay_physical *physical = found->physical;
        if (found->kind == REPLAY_ALLOCATION_MAPPING) {
            replay_allocation_remove(replay, address);
            physical->mappings--;
            drop_if_unused(replay, physical);
        }
        address++;
    }
    return CUDA_SUCCESS;
}

/* arguments: address, size, count; payload: count CUmemAccessDesc */
CUresult replay_cuMemSetAccess(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    CUmemAccessDesc description[ACCESS_MOST];
    uint64_t count = call->argument[2];
    if (count == 0 || count > ACCESS_MOST || call->payload_length < count * sizeof description[0])
        return CUDA_ERROR_INVALID_VALUE;
    memcpy(description, payload, count * sizeof description[0]);
    for (uint64_t i = 0; i < count; i++)
        if (description[i].location.type == CU_MEM_LOCATION_TYPE_DEVICE)
            description[i].location.id = replay->device;
    return (CUresult)replay->driver.cuMemSetAccess(call->argument[0], call->argument[1], description, count);
}

/* arguments: address, location type, location id; value[0]: flags */
CUresult replay_cuMemGetAccess(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    CUmemLocation location = {.type = (int)call->argument[1], .id = (int)call->argument[2]};
    unsigned long long flags = 0;
    if (location.type == CU_MEM_LOCATION_TYPE_DEVICE)
        location.id = replay->device;
    CUresult status = (CUresult)replay->driver.cuMemGetAccess(&flags, &location, call->argument[0]);
    result->value[0] = flags;
    return status;
}
