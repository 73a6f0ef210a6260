/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pool.c - memory in stream order and its pools. What counts against the quota is what the driver says that a pool holds,
 * which is what is allocated and what it keeps for later; when the quota is at its end pools are told to keep nothing.
 */
#include "allocations.h"
#include "graph_memory.h"
#include "internal.h"

#define ACCESS_MOST 16u

static CUresult allocate(struct vgpu_replay *replay, uint64_t size, void *pool, uint64_t id, void *stream, struct vgpu_result *result)
{
    uint64_t address = 0;
    struct code_graph *graph;
    CUresult status = graph_memory_capturing(replay, stream, &graph);
    if (status != CUDA_SUCCESS || graph != NULL) /* a node of that graph, which costs nothing until it is launched */
        return status != CUDA_SUCCESS ? status : graph_memory_capture_allocation(replay, graph, size, pool, stream, result);
    /* Charged before the driver is asked, and once more as part of what the pool holds then; the first charge goes back. */
    if (!replay_memory_charge(replay, size)) {
        replay_pools_settle(replay, REPLAY_POOLS_EMPTY);
        if (!replay_memory_charge(replay, size))
            return CUDA_ERROR_OUT_OF_MEMORY;
    }
    status = (CUresult)replay->driver.cuMemAllocFromPoolAsync(&address, size, pool, stream);
    replay_memory_release(replay, size);
    if (status != CUDA_SUCCESS || address == 0)
        return status;
    const struct replay_allocation allocation = {.address = address, .size = size, .kind = REPLAY_ALLOCATION_POOL, .pool = pool};
    bool counted = replay_pool_use(replay, pool, (int64_t)size);
    if (counted && replay_allocation_add(replay, allocation)) {
        result->value[0] = address;
        return CUDA_SUCCESS;
    }
    /* The pool may have taken far more for it than is left: until it has let go, the card lacks what nobody is charged for. */
    replay->driver.cuMemFreeAsync(address, stream);
    if (counted)
        (void)replay_pool_use(replay, pool, -(int64_t)size);
    replay_pools_freed(replay, id);
    replay->private->has_waited = true; /* nobody has to: the program knows of no memory to wait for */
    replay_pools_settle(replay, REPLAY_POOLS_EMPTY);
    return CUDA_ERROR_OUT_OF_MEMORY;
}

/* arguments: size, stream; value[0]: address; value[1]: the graph it became a node of, 0: none */
CUresult replay_cuMemAllocAsync(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *stream, *pool = NULL;
    if (!replay_stream(replay, call->argument[1], &stream))
        return CUDA_ERROR_INVALID_HANDLE;
    CUresult status = (CUresult)replay->driver.cuDeviceGetMemPool(&pool, replay->device);
    return status != CUDA_SUCCESS ? status : allocate(replay, call->argument[0], pool, call->argument[1], stream, result);
}

/* arguments: size, pool, stream; value[0]: address; value[1]: as above */
CUresult replay_cuMemAllocFromPoolAsync(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *stream, *pool;
    if (!replay_lookup(replay, VGPU_KIND_POOL, call->argument[1], &pool) || !replay_stream(replay, call->argument[2], &stream))
        return CUDA_ERROR_INVALID_HANDLE;
    return allocate(replay, call->argument[0], pool, call->argument[2], stream, result);
}

/* arguments: address of an allocation of any kind, stream; value[0]: the graph it became a node of, 0: none */
CUresult replay_cuMemFreeAsync(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    uint64_t address = call->argument[0];
    void *stream;
    if (!replay_stream(replay, call->argument[1], &stream))
        return CUDA_ERROR_INVALID_HANDLE;
    const struct replay_allocation *found = replay_allocation_find(replay, address);
    struct code_graph *graph;
    CUresult status = graph_memory_capturing(replay, stream, &graph);
    if (status != CUDA_SUCCESS || graph != NULL)
        return status != CUDA_SUCCESS ? status : graph_memory_capture_free(replay, graph, address, stream, result);
    if (found == NULL)
        return graph_memory_free(replay, address, call->argument[1], stream, false);
    if (found->kind == REPLAY_ALLOCATION_MAPPING)
        return CUDA_ERROR_INVALID_VALUE;
    status = (CUresult)replay->driver.cuMemFreeAsync(address, stream);
    if (status != CUDA_SUCCESS)
        return status;
    if (found->kind == REPLAY_ALLOCATION_POOL)
        replay_pools_freed(replay, call->argument[1]);
    replay_allocation_freed(replay, found);
    return CUDA_SUCCESS;
}

/* value[0]: handle, the same every time */
CUresult replay_cuDeviceGetDefaultMemPool(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *pool = NULL;
    CUresult status = (CUresult)replay->driver.cuDeviceGetDefaultMemPool(&pool, replay->device);
    if (status == CUDA_SUCCESS)
        result->value[0] = replay_intern(replay, VGPU_KIND_POOL, pool);
    return status;
}

/* argument: handle; payload: CUmemPoolProps */
CUresult replay_cuMemPoolCreate(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    CUmemPoolProps asked, properties = {0};
    void *pool = NULL;
    if (call->payload_length < sizeof asked)
        return CUDA_ERROR_INVALID_VALUE;
    memcpy(&asked, payload, sizeof asked);
    /* SAFETY: from here on only the private copy is looked at. */
    __asm__ volatile("" : "+m"(asked) : : "memory");
    if (asked.allocType != CU_MEM_ALLOCATION_TYPE_PINNED || asked.location.type != CU_MEM_LOCATION_TYPE_DEVICE)
        return CUDA_ERROR_INVALID_VALUE;
    properties.allocType = asked.allocType;
    properties.location = (CUmemLocation){.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = replay->device};
    properties.maxSize = asked.maxSize;
    CUresult status = (CUresult)replay->driver.cuMemPoolCreate(&pool, &properties);
    if (status != CUDA_SUCCESS)
        return status;
    if (replay_bind(replay, VGPU_KIND_POOL, call->argument[0], pool))
        return CUDA_SUCCESS;
    replay->driver.cuMemPoolDestroy(pool);
    return CUDA_ERROR_INVALID_HANDLE;
}

/* argument: handle */
CUresult replay_cuMemPoolDestroy(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *pool;
    if (!replay_lookup(replay, VGPU_KIND_POOL, call->argument[0], &pool))
        return CUDA_ERROR_INVALID_HANDLE;
    CUresult status = (CUresult)replay->driver.cuMemPoolDestroy(pool);
    if (status == CUDA_SUCCESS) {
        replay_pool_end(replay, pool);
        replay_unbind(replay, VGPU_KIND_POOL, call->argument[0]);
    }
    return status;
}

/* arguments: pool, bytes to keep. A program that has waited for the stream expects what was freed in it to go. */
CUresult replay_cuMemPoolTrimTo(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *pool;
    if (!replay_lookup(replay, VGPU_KIND_POOL, call->argument[0], &pool))
        return CUDA_ERROR_INVALID_HANDLE;
    replay_pools_settle(replay, REPLAY_POOLS_COUNT_EXACTLY);
    CUresult status = (CUresult)replay->driver.cuMemPoolTrimTo(pool, (size_t)call->argument[1]);
    replay_pools_settle(replay, REPLAY_POOLS_COUNT);
    return status;
}

/* arguments: pool, attribute, value (int or u64, little endian) */
CUresult replay_cuMemPoolSetAttribute(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    uint64_t value = call->argument[2];
    void *pool;
    if (!replay_lookup(replay, VGPU_KIND_POOL, call->argument[0], &pool))
        return CUDA_ERROR_INVALID_HANDLE;
    return (CUresult)replay->driver.cuMemPoolSetAttribute(pool, (unsigned)call->argument[1], &value);
}

/* arguments: pool, attribute; value[0]. How much it holds is asked for after a program has waited, too. */
CUresult replay_cuMemPoolGetAttribute(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    uint64_t value = 0;
    void *pool;
    if (!replay_lookup(replay, VGPU_KIND_POOL, call->argument[0], &pool))
        return CUDA_ERROR_INVALID_HANDLE;
    if (call->argument[1] == RESERVED_NOW)
        replay_pools_settle(replay, REPLAY_POOLS_COUNT_EXACTLY);
    CUresult status = (CUresult)replay->driver.cuMemPoolGetAttribute(pool, (unsigned)call->argument[1], &value);
    result->value[0] = value;
    return status;
}

/* arguments: pool, count; payload: count CUmemAccessDesc */
CUresult replay_cuMemPoolSetAccess(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    CUmemAccessDesc description[ACCESS_MOST];
    uint64_t count = call->argument[1];
    void *pool;
    if (!replay_lookup(replay, VGPU_KIND_POOL, call->argument[0], &pool))
        return CUDA_ERROR_INVALID_HANDLE;
    if (count == 0 || count > ACCESS_MOST || call->payload_length < count * sizeof description[0])
        return CUDA_ERROR_INVALID_VALUE;
    memcpy(description, payload, count * sizeof description[0]);
    for (uint64_t i = 0; i < count; i++)
        if (description[i].location.type == CU_MEM_LOCATION_TYPE_DEVICE)
            description[i].location.id = replay->device;
    return (CUresult)replay->driver.cuMemPoolSetAccess(pool, description, count);
}

/* arguments: pool, location type, location id; value[0]: flags */
CUresult replay_cuMemPoolGetAccess(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    CUmemLocation location = {.type = (int)call->argument[1], .id = (int)call->argument[2]};
    unsigned flags = 0;
    void *pool;
    if (!replay_lookup(replay, VGPU_KIND_POOL, call->argument[0], &pool))
        return CUDA_ERROR_INVALID_HANDLE;
    if (location.type == CU_MEM_LOCATION_TYPE_DEVICE)
        location.id = replay->device;
    CUresult status = (CUresult)replay->driver.cuMemPoolGetAccess(&flags, pool, &location);
    result->value[0] = flags;
    return status;
}
