/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memset.c - cuMemset in all widths: one record each. CUDA's cuMemset on device memory does not wait for
 * the device either; on pinned host memory the synchronous form does.
 */
#include "memory.h"

#include "_generated_prototypes.h"

/* Registered memory is not the device's to write: this process fills it, when the stream has got there. */
static CUresult fill_here(uint8_t *at, uint64_t pitch, uint32_t value, unsigned element, uint64_t width, uint64_t height, uint64_t stream)
{
    CUresult status = memory_wait_stream(stream);
    for (uint64_t y = 0; y < height && status == CUDA_SUCCESS; y++)
        for (uint64_t x = 0; x < width; x++)
            memcpy(at + y * pitch + x * element, &value, element);
    return shim_take_deferred(status);
}

static CUresult set(uint64_t address, uint64_t pitch, uint32_t value, unsigned element, uint64_t width, uint64_t height, uint64_t stream,
                    bool blocking)
{
    if (width == 0 || height == 0) return CUDA_SUCCESS;
    uint64_t row, hull;
    if (address % element != 0 || __builtin_mul_overflow(width, element, &row)) return CUDA_ERROR_INVALID_VALUE;
    if (height > 1 && (pitch < row || pitch % element != 0)) return CUDA_ERROR_INVALID_VALUE;
    if (height == 1) pitch = row;
    if (__builtin_mul_overflow(pitch, height - 1, &hull) || __builtin_add_overflow(hull, row, &hull)) return CUDA_ERROR_INVALID_VALUE;
    struct memory_side side;
    memory_side_of(address, hull, MEMORY_EXPECT_CUDA, &side);
    if (side.place == MEMORY_NOWHERE) return CUDA_ERROR_INVALID_VALUE;
    if (side.place == MEMORY_PAGEABLE) {
        if (atomic_load_explicit(&shim_captures_active, memory_order_relaxed) != 0 && shim_stream_is_capturing(stream))
            return shim_refuse(VGPU_CALL_cuMemsetD8Async);
        return fill_here(side.host, pitch, value, element, width, height, stream);
    }
    const uint64_t argument[8] = {side.device, pitch, value, element, width, height, stream};
    CUresult status = memory_submit(VGPU_CALL_wireMemset, argument, NULL, 0);
    if (status != CUDA_SUCCESS || !blocking || side.place != MEMORY_PINNED) return status;
    return shim_take_deferred(memory_wait_stream(stream));
}

static CUresult now(uint64_t address, uint64_t pitch, uint32_t value, unsigned element, uint64_t width, uint64_t height)
{
    uint64_t stream;
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if ((status = shim_default_stream(&stream)) != CUDA_SUCCESS) return status;
    return set(address, pitch, value, element, width, height, stream, true);
}

static CUresult later(uint64_t address, uint64_t pitch, uint32_t value, unsigned element, uint64_t width, uint64_t height, CUstream hStream)
{
    uint64_t stream;
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if ((status = shim_stream(hStream, &stream)) != CUDA_SUCCESS) return status;
    return set(address, pitch, value, element, width, height, stream, false);
}

CUresult cuMemsetD8_v2(unsigned long long dstDevice, unsigned char uc, size_t N) { return now(dstDevice, 0, uc, 1, N, 1); }
CUresult cuMemsetD16_v2(unsigned long long dstDevice, unsigned short us, size_t N) { return now(dstDevice, 0, us, 2, N, 1); }
CUresult cuMemsetD32_v2(unsigned long long dstDevice, unsigned int ui, size_t N) { return now(dstDevice, 0, ui, 4, N, 1); }
CUresult cuMemsetD2D8_v2(unsigned long long dstDevice, size_t dstPitch, unsigned char uc, size_t Width, size_t Height)
{
    return now(dstDevice, dstPitch, uc, 1, Width, Height);
}
CUresult cuMemsetD2D16_v2(unsigned long long dstDevice, size_t dstPitch, unsigned short us, size_t Width, size_t Height)
{
    return now(dstDevice, dstPitch, us, 2, Width, Height);
}
CUresult cuMemsetD2D32_v2(unsigned long long dstDevice, size_t dstPitch, unsigned int ui, size_t Width, size_t Height)
{
    return now(dstDevice, dstPitch, ui, 4, Width, Height);
}
CUresult cuMemsetD8Async(unsigned long long dstDevice, unsigned char uc, size_t N, CUstream hStream)
{
    return later(dstDevice, 0, uc, 1, N, 1, hStream);
}
CUresult cuMemsetD16Async(unsigned long long dstDevice, unsigned short us, size_t N, CUstream hStream)
{
    return later(dstDevice, 0, us, 2, N, 1, hStream);
}
CUresult cuMemsetD32Async(unsigned long long dstDevice, unsigned int ui, size_t N, CUstream hStream)
{
    return later(dstDevice, 0, ui, 4, N, 1, hStream);
}
CUresult cuMemsetD2D8Async(unsigned long long dstDevice, size_t dstPitch, unsigned char uc, size_t Width, size_t Height, CUstream hStream)
{
    return later(dstDevice, dstPitch, uc, 1, Width, Height, hStream);
}
CUresult cuMemsetD2D16Async(unsigned long long dstDevice, size_t dstPitch, unsigned short us, size_t Width, size_t Height, CUstream hStream)
{
    return later(dstDevice, dstPitch, us, 2, Width, Height, hStream);
}
CUresult cuMemsetD2D32Async(unsigned long long dstDevice, size_t dstPitch, unsigned int ui, size_t Width, size_t Height, CUstream hStream)
{
    return later(dstDevice, dstPitch, ui, 4, Width, Height, hStream);
}
