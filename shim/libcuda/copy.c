/* SPDX-License-Identifier: Apache-2.0 */
/*
 * copy.c - cuMemcpy in all one-dimensional directions, synchronous and not.
 *
 * With unified addressing the direction in a function's name is only what the caller believes: the table
 * decides what each side is, exactly as the driver does (a device address passed as `srcHost` is a device
 * address). Pinned memory is the arena itself and moves by DMA with no staging; pageable memory is staged.
 * The ptds and ptsz twins are generated; they differ in what stream 0 means.
 */
#include "memory.h"

#include "_generated_prototypes.h"

static bool is_capturing(uint64_t stream)
{
    return atomic_load_explicit(&shim_captures_active, memory_order_relaxed) != 0 && shim_stream_is_capturing(stream);
}

/* Both sides are memory the host's driver reaches. */
static CUresult copy_direct(const struct memory_side *destination, const struct memory_side *source, uint64_t size, uint64_t stream,
                            bool wait)
{
    struct shim_fence fence = {0};
    CUresult status;
    if (wait && (status = shim_fence_new(&fence)) != CUDA_SUCCESS) return status;
    if (source->place == MEMORY_PINNED && destination->place == MEMORY_DEVICE) {
        const uint64_t argument[8] = {destination->device, source->offset, size, stream, fence.index, fence.value};
        status = memory_submit(VGPU_CALL_wireCopyToDevice, argument, NULL, 0);
    } else if (destination->place == MEMORY_PINNED && source->place == MEMORY_DEVICE) {
        const uint64_t argument[8] = {destination->offset, source->device, size, stream, fence.index, fence.value};
        status = memory_submit(VGPU_CALL_wireCopyFromDevice, argument, NULL, 0);
    } else {
        const uint64_t argument[8] = {destination->device, source->device, size, stream};
        status = memory_submit(VGPU_CALL_wireCopyDevice, argument, NULL, 0);
        if (wait && status == CUDA_SUCCESS) {
            const uint64_t after[8] = {stream, fence.index, fence.value};
            status = memory_submit(VGPU_CALL_wireFence, after, NULL, 0);
        }
    }
    if (!wait || status != CUDA_SUCCESS) return status;
    status = shim_fence_wait(&fence);
    if (status == CUDA_SUCCESS) shim_fence_free(&fence);
    return status;
}

CUresult memory_copy(const struct memory_side *destination, const struct memory_side *source, uint64_t size, uint64_t stream,
                     bool blocking)
{
    bool up = source->place == MEMORY_PAGEABLE, down = destination->place == MEMORY_PAGEABLE;
    bool capturing = is_capturing(stream);
    CUresult status;
    if (!up && !down) {
        /* CUDA's copies between device addresses do not wait; those that touch host memory do, and all do between
         * host memory and host memory, whatever the function is called. */
        bool host_only = source->place == MEMORY_PINNED && destination->place == MEMORY_PINNED;
        bool host = source->place == MEMORY_PINNED || destination->place == MEMORY_PINNED;
        bool wait = !capturing && (host_only || (blocking && host));
        status = copy_direct(destination, source, size, stream, wait);
        return wait ? shim_take_deferred(status) : status;
    }
    if (capturing) /* the graph would have to read this process's memory at every launch */
        return shim_refuse(down ? VGPU_CALL_cuMemcpyDtoHAsync_v2 : VGPU_CALL_cuMemcpyHtoDAsync_v2);
    if (up && down) {
        if ((status = memory_wait_stream(stream)) == CUDA_SUCCESS) memmove(destination->host, source->host, size);
        return shim_take_deferred(status);
    }
    if (down) return shim_take_deferred(memory_download(destination->host, source->device, size, stream));
    /* Registered memory would be read when the stream gets there: what runs before may be a host function that fills it. */
    if (source->registered && (status = memory_wait_stream(stream)) != CUDA_SUCCESS) return status;
    return memory_upload(destination->device, source->host, size, stream);
}

static CUresult copy(uint64_t destination, enum memory_expectation of_destination, uint64_t source, enum memory_expectation of_source,
                     uint64_t size, uint64_t stream, bool blocking)
{
    struct memory_side to, from;
    if (size == 0) return CUDA_SUCCESS;
    memory_side_of(destination, size, of_destination, &to);
    if (to.place == MEMORY_NOWHERE) return CUDA_ERROR_INVALID_VALUE;
    memory_side_of(source, size, of_source, &from);
    if (from.place == MEMORY_NOWHERE) return CUDA_ERROR_INVALID_VALUE;
    return memory_copy(&to, &from, size, stream, blocking);
}

static CUresult copy_now(uint64_t destination, enum memory_expectation of_destination, uint64_t source,
                         enum memory_expectation of_source, uint64_t size)
{
    uint64_t stream;
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if ((status = shim_default_stream(&stream)) != CUDA_SUCCESS) return status;
    return copy(destination, of_destination, source, of_source, size, stream, true);
}

static CUresult copy_later(uint64_t destination, enum memory_expectation of_destination, uint64_t source,
                           enum memory_expectation of_source, uint64_t size, CUstream hStream)
{
    uint64_t stream;
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if ((status = shim_stream(hStream, &stream)) != CUDA_SUCCESS) return status;
    return copy(destination, of_destination, source, of_source, size, stream, false);
}

/* One device only: a copy between peers is a copy between two contexts of it. */
static CUresult check_peers(CUcontext destination, CUcontext source)
{
    if (!shim_handle_valid(VGPU_KIND_CONTEXT, (uint64_t)(uintptr_t)destination) ||
        !shim_handle_valid(VGPU_KIND_CONTEXT, (uint64_t)(uintptr_t)source))
        return CUDA_ERROR_INVALID_CONTEXT;
    return CUDA_SUCCESS;
}

#define HOST MEMORY_EXPECT_HOST
#define CUDA MEMORY_EXPECT_CUDA
#define ANY MEMORY_EXPECT_ANY

CUresult cuMemcpy(unsigned long long dst, unsigned long long src, size_t ByteCount)
{
    return copy_now(dst, ANY, src, ANY, ByteCount);
}
CUresult cuMemcpyAsync(unsigned long long dst, unsigned long long src, size_t ByteCount, CUstream hStream)
{
    return copy_later(dst, ANY, src, ANY, ByteCount, hStream);
}
CUresult cuMemcpyHtoD_v2(unsigned long long dstDevice, const void *srcHost, size_t ByteCount)
{
    return copy_now(dstDevice, CUDA, (uint64_t)(uintptr_t)srcHost, HOST, ByteCount);
}
CUresult cuMemcpyHtoDAsync_v2(unsigned long long dstDevice, const void *srcHost, size_t ByteCount, CUstream hStream)
{
    return copy_later(dstDevice, CUDA, (uint64_t)(uintptr_t)srcHost, HOST, ByteCount, hStream);
}
CUresult cuMemcpyDtoH_v2(void *dstHost, unsigned long long srcDevice, size_t ByteCount)
{
    return copy_now((uint64_t)(uintptr_t)dstHost, HOST, srcDevice, CUDA, ByteCount);
}
CUresult cuMemcpyDtoHAsync_v2(void *dstHost, unsigned long long srcDevice, size_t ByteCount, CUstream hStream)
{
    return copy_later((uint64_t)(uintptr_t)dstHost, HOST, srcDevice, CUDA, ByteCount, hStream);
}
CUresult cuMemcpyDtoD_v2(unsigned long long dstDevice, unsigned long long srcDevice, size_t ByteCount)
{
    return copy_now(dstDevice, CUDA, srcDevice, CUDA, ByteCount);
}
CUresult cuMemcpyDtoDAsync_v2(unsigned long long dstDevice, unsigned long long srcDevice, size_t ByteCount, CUstream hStream)
{
    return copy_later(dstDevice, CUDA, srcDevice, CUDA, ByteCount, hStream);
}
CUresult cuMemcpyPeer(unsigned long long dstDevice, CUcontext dstContext, unsigned long long srcDevice, CUcontext srcContext, size_t ByteCount)
{
    CUresult status = shim_enter_context();
    if (status == CUDA_SUCCESS) status = check_peers(dstContext, srcContext);
    return status != CUDA_SUCCESS ? status : copy_now(dstDevice, CUDA, srcDevice, CUDA, ByteCount);
}
CUresult cuMemcpyPeerAsync(unsigned long long dstDevice, CUcontext dstContext, unsigned long long srcDevice, CUcontext srcContext,
                           size_t ByteCount, CUstream hStream)
{
    CUresult status = shim_enter_context();
    if (status == CUDA_SUCCESS) status = check_peers(dstContext, srcContext);
    return status != CUDA_SUCCESS ? status : copy_later(dstDevice, CUDA, srcDevice, CUDA, ByteCount, hStream);
}
