/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmm.c - virtual memory management.
 *
 * A program reserves a long range of addresses, makes physical memory in pieces, maps the pieces side by side
 * and usually releases their handles at once. Reservations lie in a table of their own, below the mappings, so
 * every pointer query finds the innermost answer. What is mapped where is known here, and refusals the driver
 * gives for wrong ranges are given without asking it.
 */
#include "memory.h"

#include <stdlib.h>

#include "_generated_prototypes.h"

#define TYPE_PINNED 1
#define POSIX_FILE_DESCRIPTOR 1
#define ACCESS_FLAGS_ALL 3u
#define ACCESS_MOST 16u

/* Behind a handle of cuMemCreate; lives while a handle or a mapping refers to it. Guarded by the mutex. */
struct physical {
    uint64_t size;
    CUmemAllocationProp properties;
    uint32_t handles, mappings;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static uint64_t granularity(void)
{
    uint64_t least = shim.device->vmm_granularity_minimum;
    return least != 0 ? least : 2ull << 20;
}

static struct physical *physical_of(uint64_t handle)
{
    struct shim_object *object = shim_object(VGPU_KIND_MEMORY, handle);
    return object != NULL ? object->data : NULL;
}

/* Mutex held. */
static void drop_if_unused(uint64_t handle, struct physical *physical)
{
    if (physical->handles != 0 || physical->mappings != 0) return;
    shim_handle_free(handle);
    free(physical);
}

static CUresult check_properties(const CUmemAllocationProp *properties)
{
    if (properties->type != TYPE_PINNED) return CUDA_ERROR_INVALID_VALUE;
    if (properties->location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_NOT_SUPPORTED; /* host memory by handle */
    return properties->location.id == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuMemGetAllocationGranularity(size_t *out, const void *prop, unsigned int option)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (out == NULL || prop == NULL || option > 1) return CUDA_ERROR_INVALID_VALUE;
    uint64_t recommended = shim.device->vmm_granularity_recommended;
    *out = (size_t)(option == 1 && recommended != 0 ? recommended : granularity());
    return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(void *ptr, size_t size, size_t alignment, unsigned long long addr, unsigned long long flags)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (ptr == NULL || size == 0 || size % granularity() != 0 || flags != 0 || (alignment & (alignment - 1)) != 0)
        return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {size, alignment, addr, flags};
    uint64_t value[4] = {0};
    status = shim_reply(VGPU_CALL_cuMemAddressReserve, argument, NULL, 0, value, NULL, 0, NULL);
    if (status != CUDA_SUCCESS) return status;
    memory_reserve_addresses(value[0], size);
    const struct shim_range range = {.base = value[0], .size = size, .device_address = value[0], .kind = SHIM_RANGE_RESERVED};
    shim_range_add(&range);
    *(CUdeviceptr *)ptr = value[0];
    return CUDA_SUCCESS;
}

CUresult cuMemAddressFree(unsigned long long ptr, size_t size)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    struct shim_range range, mapping;
    if (!shim_map_find(&shim_reserved_map, ptr, &range) || range.base != ptr || range.size != size) return CUDA_ERROR_INVALID_VALUE;
    if (shim_map_next(&shim_memory_map, ptr, &mapping) && mapping.base < ptr + size) return CUDA_ERROR_INVALID_VALUE;
    if (!shim_map_remove(&shim_reserved_map, ptr, NULL)) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {ptr, size};
    status = shim_reply(VGPU_CALL_cuMemAddressFree, argument, NULL, 0, NULL, NULL, 0, NULL);
    if (status != CUDA_SUCCESS) shim_map_add(&shim_reserved_map, &range);
    return status;
}

CUresult cuMemCreate(void *handle, size_t size, const void *prop, unsigned long long flags)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (handle == NULL || prop == NULL || size == 0 || size % granularity() != 0 || flags != 0) return CUDA_ERROR_INVALID_VALUE;
    CUmemAllocationProp properties;
    memcpy(&properties, prop, sizeof properties);
    status = check_properties(&properties);
    /* A descriptor may be asked for and never exported; exporting is what is refused. */
    if (status == CUDA_SUCCESS && (properties.requestedHandleTypes & ~POSIX_FILE_DESCRIPTOR) != 0) status = CUDA_ERROR_NOT_SUPPORTED;
    if (status != CUDA_SUCCESS) return status == CUDA_ERROR_NOT_SUPPORTED ? shim_refuse(VGPU_CALL_cuMemCreate) : status;
    struct physical *physical = calloc(1, sizeof *physical);
    if (physical == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    *physical = (struct physical){.size = size, .properties = properties, .handles = 1};
    uint64_t chosen = shim_handle_new(VGPU_KIND_MEMORY, physical, NULL);
    if (chosen == 0) {
        free(physical);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    const uint64_t argument[8] = {chosen, size, flags};
    status = shim_reply(VGPU_CALL_cuMemCreate, argument, &properties, sizeof properties, NULL, NULL, 0, NULL);
    if (status != CUDA_SUCCESS) {
        shim_handle_free(chosen);
        free(physical);
        return status;
    }
    *(CUmemGenericAllocationHandle *)handle = chosen;
    return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    pthread_mutex_lock(&mutex);
    struct physical *physical = physical_of(handle);
    bool known = physical != NULL && physical->handles > 0;
    if (known) physical->handles--;
    bool last = known && physical->handles == 0 && physical->mappings == 0;
    pthread_mutex_unlock(&mutex);
    if (!known) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {handle};
    status = shim_async(VGPU_CALL_cuMemRelease, argument, NULL, 0);
    if (last) { /* only now may another thread be given the same index: its record is behind ours */
        shim_handle_free(handle);
        free(physical);
    }
    return status;
}

CUresult cuMemGetAllocationPropertiesFromHandle(void *prop, CUmemGenericAllocationHandle handle)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (prop == NULL) return CUDA_ERROR_INVALID_VALUE;
    pthread_mutex_lock(&mutex);
    struct physical *physical = physical_of(handle);
    bool known = physical != NULL && physical->handles > 0;
    if (known) memcpy(prop, &physical->properties, sizeof physical->properties);
    pthread_mutex_unlock(&mutex);
    return known ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemRetainAllocationHandle(void *handle, void *addr)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    struct shim_range range;
    uint64_t address = (uint64_t)(uintptr_t)addr;
    if (handle == NULL || !shim_map_find(&shim_memory_map, address, &range) || vgpu_handle_kind(range.owner) != VGPU_KIND_MEMORY)
        return CUDA_ERROR_INVALID_VALUE;
    pthread_mutex_lock(&mutex);
    struct physical *physical = physical_of(range.owner);
    if (physical != NULL) physical->handles++;
    pthread_mutex_unlock(&mutex);
    if (physical == NULL) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {range.owner, address};
    status = shim_async(VGPU_CALL_cuMemRetainAllocationHandle, argument, NULL, 0);
    *(CUmemGenericAllocationHandle *)handle = range.owner;
    return status;
}

CUresult cuMemMap(unsigned long long ptr, size_t size, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long flags)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    struct shim_range reserved, other;
    if (flags != 0 || size == 0 || ptr % granularity() != 0 || size % granularity() != 0) return CUDA_ERROR_INVALID_VALUE;
    if (!shim_map_find(&shim_reserved_map, ptr, &reserved) || size > reserved.size - (ptr - reserved.base)) return CUDA_ERROR_INVALID_VALUE;
    pthread_mutex_lock(&mutex);
    struct physical *physical = physical_of(handle);
    bool known = physical != NULL && physical->handles > 0;
    bool whole = known && offset == 0 && size == physical->size;
    if (known) physical->mappings++; /* keeps it while we wait for the answer */
    pthread_mutex_unlock(&mutex);
    if (!known) return CUDA_ERROR_INVALID_VALUE;
    if (!whole)
        status = CUDA_ERROR_NOT_SUPPORTED; /* so says the driver: only all of it */
    else if (shim_map_next(&shim_memory_map, ptr, &other) && other.base < ptr + size)
        status = CUDA_ERROR_INVALID_VALUE; /* something is mapped there */
    else {
        const uint64_t argument[8] = {ptr, size, offset, handle, flags};
        status = shim_reply(VGPU_CALL_cuMemMap, argument, NULL, 0, NULL, NULL, 0, NULL);
    }
    if (status == CUDA_SUCCESS) {
        const struct shim_range range = {.base = ptr, .size = size, .device_address = ptr, .kind = SHIM_RANGE_DEVICE, .owner = handle};
        shim_range_add(&range);
        return CUDA_SUCCESS;
    }
    pthread_mutex_lock(&mutex);
    physical->mappings--;
    drop_if_unused(handle, physical);
    pthread_mutex_unlock(&mutex);
    return status;
}

static bool is_mapping(const struct shim_range *range) { return vgpu_handle_kind(range->owner) == VGPU_KIND_MEMORY; }

/* Is [ptr, +size) made of whole mappings without a gap? Empty allows a range in which nothing is mapped at all. */
static bool whole_mappings(uint64_t ptr, uint64_t size, bool allow_gaps)
{
    struct shim_range range;
    uint64_t at = ptr, end = ptr + size;
    if (end < ptr) return false;
    while (at < end) {
        if (!shim_map_next(&shim_memory_map, at, &range) || range.base >= end) return allow_gaps;
        if (!is_mapping(&range) || range.base < at || range.base + range.size > end) return false;
        if (range.base != at && !allow_gaps) return false;
        at = range.base + range.size;
    }
    return true;
}

CUresult cuMemUnmap(unsigned long long ptr, size_t size)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    struct shim_range reserved, range;
    if (size == 0 || !shim_map_find(&shim_reserved_map, ptr, &reserved) || size > reserved.size - (ptr - reserved.base) ||
        !whole_mappings(ptr, size, true))
        return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {ptr, size};
    status = shim_reply(VGPU_CALL_cuMemUnmap, argument, NULL, 0, NULL, NULL, 0, NULL);
    if (status != CUDA_SUCCESS) return status;
    while (shim_map_next(&shim_memory_map, ptr, &range) && range.base < ptr + size) {
        if (!shim_map_remove(&shim_memory_map, range.base, NULL)) continue;
        pthread_mutex_lock(&mutex);
        struct physical *physical = physical_of(range.owner);
        if (physical != NULL) {
            physical->mappings--;
            drop_if_unused(range.owner, physical);
        }
        pthread_mutex_unlock(&mutex);
    }
    return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(unsigned long long ptr, size_t size, const void *desc, size_t count)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (desc == NULL || count == 0 || count > ACCESS_MOST || size == 0) return CUDA_ERROR_INVALID_VALUE;
    CUmemAccessDesc descriptions[ACCESS_MOST];
    memcpy(descriptions, desc, count * sizeof descriptions[0]);
    for (size_t i = 0; i < count; i++) {
        if ((unsigned)descriptions[i].flags != 0 && descriptions[i].flags != 1 && descriptions[i].flags != 3) return CUDA_ERROR_INVALID_VALUE;
        if (descriptions[i].location.type == CU_MEM_LOCATION_TYPE_DEVICE && descriptions[i].location.id != 0) return CUDA_ERROR_INVALID_DEVICE;
    }
    if (!whole_mappings(ptr, size, false)) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {ptr, size, count};
    status = shim_reply(VGPU_CALL_cuMemSetAccess, argument, descriptions, (uint32_t)(count * sizeof descriptions[0]), NULL, NULL, 0, NULL);
    if (status != CUDA_SUCCESS) return status;
    struct shim_range range;
    for (size_t i = 0; i < count; i++) {
        if (descriptions[i].location.type != CU_MEM_LOCATION_TYPE_DEVICE) continue;
        for (uint64_t at = ptr; shim_map_next(&shim_memory_map, at, &range) && range.base < ptr + size; at = range.base + range.size) {
            range.flags = (range.flags & ~ACCESS_FLAGS_ALL) | (unsigned)descriptions[i].flags;
            shim_map_update(&shim_memory_map, range.base, &range);
        }
    }
    return CUDA_SUCCESS;
}

CUresult cuMemGetAccess(unsigned long long *flags, const void *location, unsigned long long ptr)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    struct shim_range range;
    CUmemLocation where;
    if (flags == NULL || location == NULL || !shim_map_find(&shim_memory_map, ptr, &range)) return CUDA_ERROR_INVALID_VALUE;
    memcpy(&where, location, sizeof where);
    if (where.type == CU_MEM_LOCATION_TYPE_DEVICE && where.id != 0) return CUDA_ERROR_INVALID_DEVICE;
    const uint64_t argument[8] = {range.device_address + (ptr - range.base), (uint64_t)(uint32_t)where.type, (uint64_t)(uint32_t)where.id};
    uint64_t value[4] = {0};
    status = shim_reply(VGPU_CALL_cuMemGetAccess, argument, NULL, 0, value, NULL, 0, NULL);
    if (status == CUDA_SUCCESS) *flags = value[0];
    return status;
}
