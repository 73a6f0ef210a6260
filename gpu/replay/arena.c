/* SPDX-License-Identifier: Apache-2.0 */
/*
 * arena.c - which parts of the segment the driver knows. A chunk is registered once (31 ms for each GiB on an H200) and
 * from then on copies to and from it are DMA, kernels may read it, and its device address is its host address here.
 * The first chunk covers pages, ring, slots and fences too, so that the GPU can write fence words.
 */
#include "internal.h"
#include "vm_limits.h"

#define REGISTER_PORTABLE 1u
#define REGISTER_DEVICE_MAP 2u
#define CHUNK_ALIGNMENT 4096u

void *replay_arena(struct vgpu_replay *replay, uint64_t offset, uint64_t size)
{
    if (offset < replay->arena_offset || offset - replay->arena_offset > replay->arena_size ||
        size > replay->arena_size - (offset - replay->arena_offset))
        return NULL;
    return replay->segment + offset;
}

bool replay_arena_is_registered(struct vgpu_replay *replay, uint64_t offset, uint64_t size)
{
    if (replay_arena(replay, offset, size) == NULL)
        return false;
    const struct replay_private *private = replay->private;
    for (unsigned i = 0; i < private->chunk_count; i++) {
        const struct replay_chunk *chunk = &private->chunk[i];
        if (offset >= chunk->offset && offset - chunk->offset <= chunk->size && size <= chunk->size - (offset - chunk->offset))
            return true;
    }
    return false;
}

static CUresult tell_driver(struct vgpu_replay *replay, uint64_t offset, uint64_t size)
{
    void *address = replay->segment + offset;
    int status = replay->driver.cuMemHostRegister_v2(address, size, REGISTER_PORTABLE | REGISTER_DEVICE_MAP);
    if (status != 0)
        return (CUresult)status;
    uint64_t device = 0;
    status = replay->driver.cuMemHostGetDevicePointer_v2(&device, address, 0);
    if (status == 0 && device == (uint64_t)(uintptr_t)address)
        return CUDA_SUCCESS;
    /* The guest was promised one address for both. */
    replay->driver.cuMemHostUnregister(address);
    return status != 0 ? (CUresult)status : CUDA_ERROR_NOT_SUPPORTED;
}

static void publish(struct vgpu_replay *replay)
{
    uint64_t end = replay->arena_offset;
    for (bool grown = true; grown;) {
        grown = false;
        for (unsigned i = 0; i < replay->private->chunk_count; i++) {
            const struct replay_chunk *chunk = &replay->private->chunk[i];
            if (chunk->offset <= end && chunk->offset + chunk->size > end) {
                end = chunk->offset + chunk->size;
                grown = true;
            }
        }
    }
    replay->arena_registered = end - replay->arena_offset;
}

CUresult replay_register(struct vgpu_replay *replay, uint64_t offset, uint64_t size)
{
    struct replay_private *private = replay->private;
    if (size == 0 || offset % CHUNK_ALIGNMENT != 0 || size % CHUNK_ALIGNMENT != 0 || offset > replay->segment_size ||
        size > replay->segment_size - offset)
        return CUDA_ERROR_INVALID_VALUE;
    for (unsigned i = 0; i < private->chunk_count; i++)
        if (offset < private->chunk[i].offset + private->chunk[i].size && private->chunk[i].offset < offset + size)
            return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    if (private->chunk_count == REPLAY_CHUNKS)
        return CUDA_ERROR_OUT_OF_MEMORY;
    CUresult status = tell_driver(replay, offset, size);
    if (status != CUDA_SUCCESS)
        return status;
    private->chunk[private->chunk_count++] = (struct replay_chunk){offset, size, private->current};
    publish(replay);
    return CUDA_SUCCESS;
}

CUresult replay_register_again(struct vgpu_replay *replay)
{
    struct replay_private *private = replay->private;
    for (unsigned i = 0; i < private->chunk_count; i++) {
        struct replay_chunk *chunk = &private->chunk[i];
        if (chunk->slot != REPLAY_NO_CONTEXT)
            continue;
        CUresult status = tell_driver(replay, chunk->offset, chunk->size);
        if (status != CUDA_SUCCESS && status != CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED)
            return status;
        chunk->slot = private->current;
    }
    return CUDA_SUCCESS;
}

bool replay_registered_in(const struct vgpu_replay *replay, unsigned slot)
{
    for (unsigned i = 0; i < replay->private->chunk_count; i++)
        if (replay->private->chunk[i].slot == slot)
            return true;
    return false;
}

void replay_registrations_end(struct vgpu_replay *replay, unsigned slot)
{
    for (unsigned i = 0; i < replay->private->chunk_count; i++)
        if (replay->private->chunk[i].slot == slot)
            replay->private->chunk[i].slot = REPLAY_NO_CONTEXT;
}

CUresult replay_unregister_all(struct vgpu_replay *replay)
{
    struct replay_private *private = replay->private;
    while (private->chunk_count > 0) {
        int status = replay->driver.cuMemHostUnregister(replay->segment + private->chunk[private->chunk_count - 1].offset);
        if (status != 0)
            return (CUresult)status;
        private->chunk_count--;
    }
    return CUDA_SUCCESS;
}

/* arguments: offset from the arena's start, size; both multiples of 4096 */
CUresult replay_wireArenaRegister(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    uint64_t from = call->argument[0], size = call->argument[1];
    if (from > replay->arena_size || size > replay->arena_size - from)
        return CUDA_ERROR_INVALID_VALUE;
    if (!replay_charge(replay, VGPU_RESOURCE_ARENA, size))
        return CUDA_ERROR_OUT_OF_MEMORY;
    CUresult status = replay_register(replay, replay->arena_offset + from, size);
    if (status != CUDA_SUCCESS)
        replay_refund(replay, VGPU_RESOURCE_ARENA, size);
    return status;
}

CUresult replay_wireArenaUnregister(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    struct replay_private *private = replay->private;
    for (unsigned i = 1; i < private->chunk_count; i++) { /* chunk 0 carries the fences and stays */
        if (private->chunk[i].offset - replay->arena_offset != call->argument[0] || private->chunk[i].size != call->argument[1])
            continue;
        int status = private->chunk[i].slot == REPLAY_NO_CONTEXT
                         ? 0 : replay->driver.cuMemHostUnregister(replay->segment + private->chunk[i].offset);
        if (status != 0)
            return (CUresult)status;
        replay_refund(replay, VGPU_RESOURCE_ARENA, private->chunk[i].size);
        private->chunk[i] = private->chunk[--private->chunk_count];
        publish(replay);
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
}
