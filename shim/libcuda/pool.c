/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pool.c - allocation in stream order, and memory pools.
 *
 * Allocating is a round trip (the address has to be known), freeing is a record. Pools belong to the device and
 * outlive contexts; the default pool's handle is asked once.
 */
#include "code.h"
#include "memory.h"

#include "_generated_prototypes.h"

#define ATTRIBUTE_FIRST 1u
#define ATTRIBUTE_LAST 8u
#define ATTRIBUTE_LAST_INT 3u /* 1 to 3 are ints, the others 64 bits wide */
#define ACCESS_MOST 16u

static _Atomic uint64_t default_pool;

static CUresult find_default(uint64_t *pool)
{
    *pool = atomic_load_explicit(&default_pool, memory_order_acquire);
    if (*pool != 0) return CUDA_SUCCESS;
    const uint64_t argument[8] = {0};
    uint64_t value[4] = {0};
    CUresult status = shim_reply(VGPU_CALL_cuDeviceGetDefaultMemPool, argument, NULL, 0, value, NULL, 0, NULL);
    if (status != CUDA_SUCCESS) return status;
    shim_handle_adopt(value[0], NULL);
    atomic_store_explicit(&default_pool, value[0], memory_order_release);
    *pool = value[0];
    return CUDA_SUCCESS;
}

/* It became a node of the graph that the stream captures into. */
static CUresult record_node(void *dptr, uint64_t graph_handle, uint64_t address, uint64_t size)
{
    struct shim_graph *graph = shim_graph_adopt(graph_handle, 0);
    const CUresult status = graph == NULL ? CUDA_ERROR_OUT_OF_MEMORY : shim_memory_made(graph, address, size);
    if (status == CUDA_SUCCESS) *(CUdeviceptr *)dptr = address;
    return status;
}

/* `pool` is what CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE will say: the default pool, also where cuDeviceSetMemPool put
 * another one in its place. */
static CUresult record(void *dptr, uint64_t address, uint64_t size, uint64_t pool)
{
    memory_reserve_addresses(address, size);
    const struct shim_range range = {.base = address, .size = size, .device_address = address, .kind = SHIM_RANGE_POOL, .owner = pool};
    shim_range_add(&range);
    *(CUdeviceptr *)dptr = address;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetDefaultMemPool(void *pool_out, int dev)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (pool_out == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (dev != 0) return CUDA_ERROR_INVALID_DEVICE;
    uint64_t pool;
    status = find_default(&pool);
    if (status == CUDA_SUCCESS) *(CUmemoryPool *)pool_out = (CUmemoryPool)(uintptr_t)pool;
    return status;
}

CUresult cuMemAllocAsync(void *dptr, size_t bytesize, CUstream hStream)
{
    uint64_t stream, pool, value[4] = {0};
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if (dptr == NULL) return CUDA_ERROR_INVALID_VALUE;
    if ((status = shim_stream(hStream, &stream)) != CUDA_SUCCESS) return status;
    if (bytesize == 0) {
        *(CUdeviceptr *)dptr = 0;
        return CUDA_SUCCESS;
    }
    if ((status = find_default(&pool)) != CUDA_SUCCESS) return status;
    const uint64_t argument[8] = {bytesize, stream};
    status = shim_reply(VGPU_CALL_cuMemAllocAsync, argument, NULL, 0, value, NULL, 0, NULL);
    if (status == CUDA_SUCCESS && value[1] != 0) return record_node(dptr, value[1], value[0], bytesize);
    return status != CUDA_SUCCESS ? status : record(dptr, value[0], bytesize, pool);
}

CUresult cuMemAllocFromPoolAsync(void *dptr, size_t bytesize, CUmemoryPool pool, CUstream hStream)
{
    uint64_t stream, value[4] = {0};
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if (dptr == NULL || !shim_handle_valid(VGPU_KIND_POOL, (uint64_t)(uintptr_t)pool)) return CUDA_ERROR_INVALID_VALUE;
    if ((status = shim_stream(hStream, &stream)) != CUDA_SUCCESS) return status;
    if (bytesize == 0) {
        *(CUdeviceptr *)dptr = 0;
        return CUDA_SUCCESS;
    }
    const uint64_t argument[8] = {bytesize, (uint64_t)(uintptr_t)pool, stream};
    status = shim_reply(VGPU_CALL_cuMemAllocFromPoolAsync, argument, NULL, 0, value, NULL, 0, NULL);
    if (status == CUDA_SUCCESS && value[1] != 0) return record_node(dptr, value[1], value[0], bytesize);
    return status != CUDA_SUCCESS ? status : record(dptr, value[0], bytesize, (uint64_t)(uintptr_t)pool);
}

CUresult cuMemFreeAsync(unsigned long long dptr, CUstream hStream)
{
    uint64_t stream;
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if ((status = shim_stream(hStream, &stream)) != CUDA_SUCCESS || dptr == 0) return status;
    struct shim_range range;
    if (!shim_map_find(&shim_memory_map, dptr, &range)) return CUDA_ERROR_INVALID_VALUE;
    if (range.kind == SHIM_RANGE_GRAPH) return shim_memory_free_async(dptr, stream);
    if (range.base != dptr || !memory_is_allocation(&range)) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {dptr, stream};
    if (atomic_load_explicit(&shim_captures_active, memory_order_relaxed) != 0) {
        status = memory_submit(VGPU_CALL_cuMemFreeAsync, argument, NULL, 0);
        if (status == CUDA_SUCCESS) shim_map_remove(&shim_memory_map, dptr, NULL);
        return status;
    }
    if (!shim_map_remove(&shim_memory_map, dptr, NULL)) return CUDA_ERROR_INVALID_VALUE;
    return shim_async(VGPU_CALL_cuMemFreeAsync, argument, NULL, 0);
}

CUresult cuMemPoolCreate(void *pool, const void *poolProps)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (pool == NULL || poolProps == NULL) return CUDA_ERROR_INVALID_VALUE;
    CUmemPoolProps properties;
    memcpy(&properties, poolProps, sizeof properties);
    if (properties.allocType != CU_MEM_ALLOCATION_TYPE_PINNED) return CUDA_ERROR_INVALID_VALUE;
    /* Pools of host memory, and pools whose memory other processes can open. */
    if (properties.location.type != CU_MEM_LOCATION_TYPE_DEVICE || properties.handleTypes != 0) return shim_refuse(VGPU_CALL_cuMemPoolCreate);
    if (properties.location.id != 0) return CUDA_ERROR_INVALID_DEVICE;
    uint64_t handle = shim_handle_new(VGPU_KIND_POOL, NULL, NULL);
    if (handle == 0) return CUDA_ERROR_OUT_OF_MEMORY;
    const uint64_t argument[8] = {handle};
    status = shim_reply(VGPU_CALL_cuMemPoolCreate, argument, &properties, sizeof properties, NULL, NULL, 0, NULL);
    if (status != CUDA_SUCCESS) {
        shim_handle_free(handle);
        return status;
    }
    *(CUmemoryPool *)pool = (CUmemoryPool)(uintptr_t)handle;
    return CUDA_SUCCESS;
}

CUresult cuMemPoolDestroy(CUmemoryPool pool)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    uint64_t handle = (uint64_t)(uintptr_t)pool;
    if (!shim_handle_valid(VGPU_KIND_POOL, handle) || handle == atomic_load(&default_pool)) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {handle};
    status = shim_async(VGPU_CALL_cuMemPoolDestroy, argument, NULL, 0);
    shim_handle_free(handle);
    return status;
}

CUresult cuMemPoolSetAttribute(CUmemoryPool pool, unsigned int attr, void *value)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (value == NULL || attr < ATTRIBUTE_FIRST || attr > ATTRIBUTE_LAST || !shim_handle_valid(VGPU_KIND_POOL, (uint64_t)(uintptr_t)pool))
        return CUDA_ERROR_INVALID_VALUE;
    uint64_t wide = 0;
    memcpy(&wide, value, attr <= ATTRIBUTE_LAST_INT ? sizeof(int) : sizeof wide);
    const uint64_t argument[8] = {(uint64_t)(uintptr_t)pool, attr, wide};
    return shim_reply(VGPU_CALL_cuMemPoolSetAttribute, argument, NULL, 0, NULL, NULL, 0, NULL);
}

CUresult cuMemPoolGetAttribute(CUmemoryPool pool, unsigned int attr, void *value)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (value == NULL || attr < ATTRIBUTE_FIRST || attr > ATTRIBUTE_LAST || !shim_handle_valid(VGPU_KIND_POOL, (uint64_t)(uintptr_t)pool))
        return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {(uint64_t)(uintptr_t)pool, attr};
    uint64_t values[4] = {0};
    status = shim_reply(VGPU_CALL_cuMemPoolGetAttribute, argument, NULL, 0, values, NULL, 0, NULL);
    if (status == CUDA_SUCCESS) memcpy(value, &values[0], attr <= ATTRIBUTE_LAST_INT ? sizeof(int) : sizeof values[0]);
    return status;
}

CUresult cuMemPoolSetAccess(CUmemoryPool pool, const void *map, size_t count)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (map == NULL || count == 0 || count > ACCESS_MOST || !shim_handle_valid(VGPU_KIND_POOL, (uint64_t)(uintptr_t)pool))
        return CUDA_ERROR_INVALID_VALUE;
    CUmemAccessDesc descriptions[ACCESS_MOST];
    memcpy(descriptions, map, count * sizeof descriptions[0]);
    for (size_t i = 0; i < count; i++)
        if (descriptions[i].location.type == CU_MEM_LOCATION_TYPE_DEVICE && descriptions[i].location.id != 0) return CUDA_ERROR_INVALID_DEVICE;
    const uint64_t argument[8] = {(uint64_t)(uintptr_t)pool, count};
    return shim_reply(VGPU_CALL_cuMemPoolSetAccess, argument, descriptions, (uint32_t)(count * sizeof descriptions[0]), NULL, NULL, 0, NULL);
}

CUresult cuMemPoolGetAccess(unsigned int *flags, CUmemoryPool memPool, void *location)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    CUmemLocation where;
    if (flags == NULL || location == NULL || !shim_handle_valid(VGPU_KIND_POOL, (uint64_t)(uintptr_t)memPool)) return CUDA_ERROR_INVALID_VALUE;
    memcpy(&where, location, sizeof where);
    if (where.type == CU_MEM_LOCATION_TYPE_DEVICE && where.id != 0) return CUDA_ERROR_INVALID_DEVICE;
    const uint64_t argument[8] = {(uint64_t)(uintptr_t)memPool, (uint64_t)(uint32_t)where.type, (uint64_t)(uint32_t)where.id};
    uint64_t value[4] = {0};
    status = shim_reply(VGPU_CALL_cuMemPoolGetAccess, argument, NULL, 0, value, NULL, 0, NULL);
    if (status == CUDA_SUCCESS) *flags = (unsigned)value[0];
    return status;
}
