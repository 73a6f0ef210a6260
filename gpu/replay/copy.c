/* SPDX-License-Identifier: Apache-2.0 */
/*
 * copy.c - copies. Host memory is always the arena (registered: DMA, no staging) or the record itself.
 *
 * A record's payload lies in the ring, which the guest may overwrite as soon as the record is consumed and at
 * any moment before. It is copied to this thread's stack first: ordinary memory, which the driver takes over
 * before it returns, so nothing here outlives the call.
 */
#include "../../transport/code_wire.h"
#include "allocations.h"

/* A failed copy still releases who waits for its fence; the error itself is the status. */
static CUresult fail(struct vgpu_replay *replay, uint64_t index, uint64_t value, CUresult status)
{
    if (index <= UINT32_MAX)
        replay_fence_failed(replay, (uint32_t)index, value, status);
    return status;
}

static CUresult finish(struct vgpu_replay *replay, void *stream, uint64_t index, uint64_t value, int status)
{
    if (status != 0)
        return fail(replay, index, value, (CUresult)status);
    if (index > UINT32_MAX)
        return CUDA_ERROR_INVALID_VALUE;
    return replay_fence(replay, stream, (uint32_t)index, value);
}

/* arguments: destination, size, stream; payload: the bytes */
CUresult replay_wireCopyInline(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    uint8_t bytes[VGPU_INLINE_LIMIT];
    uint64_t size = call->argument[1];
    void *stream;
    if (!replay_stream(replay, call->argument[2], &stream))
        return CUDA_ERROR_INVALID_HANDLE;
    if (size > call->payload_length || size > sizeof bytes)
        return CUDA_ERROR_INVALID_VALUE;
    if (size == 0)
        return CUDA_SUCCESS;
    memcpy(bytes, payload, size);
    return (CUresult)replay->driver.cuMemcpyHtoDAsync_v2(call->argument[0], bytes, size, stream);
}

/* arguments: destination, arena offset, size, stream, fence index, value */
CUresult replay_wireCopyToDevice(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    const uint64_t *a = call->argument;
    void *stream;
    if (!replay_stream(replay, a[3], &stream))
        return fail(replay, a[4], a[5], CUDA_ERROR_INVALID_HANDLE);
    if (!replay_arena_is_registered(replay, a[1], a[2]))
        return fail(replay, a[4], a[5], CUDA_ERROR_INVALID_VALUE);
    int status = replay->driver.cuMemcpyHtoDAsync_v2(a[0], replay_arena(replay, a[1], a[2]), a[2], stream);
    return finish(replay, stream, a[4], a[5], status);
}

/* arguments: arena offset, source, size, stream, fence index, value */
CUresult replay_wireCopyFromDevice(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    const uint64_t *a = call->argument;
    void *stream;
    if (!replay_stream(replay, a[3], &stream))
        return fail(replay, a[4], a[5], CUDA_ERROR_INVALID_HANDLE);
    if (!replay_arena_is_registered(replay, a[0], a[2]))
        return fail(replay, a[4], a[5], CUDA_ERROR_INVALID_VALUE);
    int status = replay->driver.cuMemcpyDtoHAsync_v2(replay_arena(replay, a[0], a[2]), a[1], a[2], stream);
    return finish(replay, stream, a[4], a[5], status);
}

/* Device addresses of arena memory are this process's addresses of it. NULL: not (wholly, registered) arena. */
static void *arena_address(struct vgpu_replay *replay, uint64_t address, uint64_t size)
{
    uint64_t offset = address - (uint64_t)(uintptr_t)replay->segment;
    return replay_arena_is_registered(replay, offset, size) ? replay_arena(replay, offset, size) : NULL;
}

/* arguments: destination, source, size, stream; either side may be pinned memory by its device address */
CUresult replay_wireCopyDevice(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    const uint64_t *a = call->argument;
    void *stream;
    if (!replay_stream(replay, a[3], &stream))
        return CUDA_ERROR_INVALID_HANDLE;
    void *to = arena_address(replay, a[0], a[2]), *from = arena_address(replay, a[1], a[2]);
    if (from != NULL)
        replay->grant->bytes_to_device += a[2];
    else if (to != NULL)
        replay->grant->bytes_from_device += a[2];
    if (to != NULL && from == NULL)
        return (CUresult)replay->driver.cuMemcpyDtoHAsync_v2(to, a[1], a[2], stream);
    if (from != NULL)
        return (CUresult)replay->driver.cuMemcpyHtoDAsync_v2(a[0], from, a[2], stream);
    return (CUresult)replay->driver.cuMemcpyDtoDAsync_v2(a[0], a[1], a[2], stream);
}

/* Bytes from a pitched box's first to its last; false on overflow. */
static bool box_size(uint64_t width, uint64_t height, uint64_t depth, uint64_t pitch, uint64_t rows, uint64_t *size)
{
    uint64_t lines, last;
    return !__builtin_mul_overflow(depth - 1, rows, &lines) && !__builtin_add_overflow(lines, height - 1, &lines) &&
           !__builtin_mul_overflow(lines, pitch, &last) && !__builtin_add_overflow(last, width, size);
}

/* Where a side of a copy lies: what the record says of it, checked, as the driver wants it. */
struct side {
    unsigned type;
    void *host;
    CUdeviceptr device;
    CUarray array;
    size_t x, y, z, pitch, rows;
};

static CUresult find_side(struct vgpu_replay *replay, struct side *side, const CUDA_MEMCPY3D *box, bool in_arena, bool is_array)
{
    uint64_t size;
    if (is_array) {
        void *real = NULL;
        CUresult status = replay_array_box(replay, (uint64_t)(uintptr_t)side->array, (const uint64_t[3]){side->x, side->y, side->z},
                                           (const uint64_t[3]){box->WidthInBytes, box->Height, box->Depth}, &real);
        side->type = CU_MEMORYTYPE_ARRAY;
        side->array = real;
        side->pitch = side->rows = 0;
        return in_arena ? CUDA_ERROR_INVALID_VALUE : status;
    }
    side->array = NULL;
    side->x = side->y = side->z = 0;
    /* No pitch and no height mean to a driver as much as the box needs, and then it reaches further than what is measured here. */
    if (side->pitch < box->WidthInBytes || (box->Depth > 1 && side->rows < box->Height))
        return CUDA_ERROR_INVALID_VALUE;
    if (!box_size(box->WidthInBytes, box->Height, box->Depth, side->pitch, side->rows, &size))
        return CUDA_ERROR_INVALID_VALUE;
    side->type = in_arena ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
    if (!in_arena)
        return CUDA_SUCCESS;
    const uint64_t offset = (uint64_t)(uintptr_t)side->host;
    if (!replay_arena_is_registered(replay, offset, size))
        return CUDA_ERROR_INVALID_VALUE;
    side->host = replay_arena(replay, offset, size);
    return CUDA_SUCCESS;
}

/* arguments: stream, VGPU_COPY_*, fence index, value; payload: CUDA_MEMCPY3D whose addresses point at the box's first byte; an
 * arena side carries its offset where the host pointer would be, an array its handle */
CUresult replay_wireCopy3D(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    const uint64_t *a = call->argument;
    CUDA_MEMCPY3D asked, copy = {0};
    void *stream;
    if (!replay_stream(replay, a[0], &stream))
        return fail(replay, a[2], a[3], CUDA_ERROR_INVALID_HANDLE);
    if (call->payload_length < sizeof asked)
        return fail(replay, a[2], a[3], CUDA_ERROR_INVALID_VALUE);
    memcpy(&asked, payload, sizeof asked);
    /* SAFETY: from here on only the private copy is looked at. */
    __asm__ volatile("" : "+m"(asked) : : "memory");
    if (asked.WidthInBytes == 0 || asked.Height == 0 || asked.Depth == 0)
        return fail(replay, a[2], a[3], CUDA_ERROR_INVALID_VALUE);
    struct side from = {0, (void *)(uintptr_t)asked.srcHost, asked.srcDevice, asked.srcArray, asked.srcXInBytes, asked.srcY, asked.srcZ,
                        asked.srcPitch, asked.srcHeight};
    struct side to = {0, asked.dstHost, asked.dstDevice, asked.dstArray, asked.dstXInBytes, asked.dstY, asked.dstZ,
                      asked.dstPitch, asked.dstHeight};
    const bool from_arena = (a[1] & VGPU_COPY_SOURCE_IN_ARENA) != 0, to_arena = (a[1] & VGPU_COPY_DESTINATION_IN_ARENA) != 0;
    CUresult status = find_side(replay, &from, &asked, from_arena, (a[1] & VGPU_COPY_SOURCE_IS_ARRAY) != 0);
    if (status == CUDA_SUCCESS)
        status = find_side(replay, &to, &asked, to_arena, (a[1] & VGPU_COPY_DESTINATION_IS_ARRAY) != 0);
    if (status != CUDA_SUCCESS)
        return fail(replay, a[2], a[3], status);
    copy = (CUDA_MEMCPY3D){
        .srcMemoryType = from.type, .srcXInBytes = from.x, .srcY = from.y, .srcZ = from.z, .srcArray = from.array,
        .srcPitch = from.pitch, .srcHeight = from.rows,
        .dstMemoryType = to.type, .dstXInBytes = to.x, .dstY = to.y, .dstZ = to.z, .dstArray = to.array,
        .dstPitch = to.pitch, .dstHeight = to.rows,
        .WidthInBytes = asked.WidthInBytes, .Height = asked.Height, .Depth = asked.Depth,
    };
    if (from_arena)
        copy.srcHost = from.host;
    else if (from.array == NULL)
        copy.srcDevice = from.device;
    if (to_arena)
        copy.dstHost = to.host;
    else if (to.array == NULL)
        copy.dstDevice = to.device;
    uint64_t bytes = (uint64_t)asked.WidthInBytes * asked.Height * asked.Depth; /* of which it has been seen that it does not overflow */
    if (from_arena)
        replay->grant->bytes_to_device += bytes;
    if (to_arena)
        replay->grant->bytes_from_device += bytes;
    return finish(replay, stream, a[2], a[3], replay->driver.cuMemcpy3DAsync_v2(&copy, stream));
}
