/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tensor_map.c - descriptors for the tensor copy engine: 128 opaque bytes that only the driver knows how to write.
 *
 * The arguments go to the worker by value and the bytes come back. The caller's object must be 64-byte aligned, which is
 * checked here because the worker's copy always is.
 */
#include "code.h"

static void copy64(uint64_t to[5], const uint64_t *from, unsigned count, uint32_t flag, uint32_t *absent)
{
    if (from == NULL)
        *absent |= flag;
    else
        memcpy(to, from, count * sizeof *to);
}

static void copy32(void *to, const void *from, unsigned count, uint32_t flag, uint32_t *absent)
{
    if (from == NULL)
        *absent |= flag;
    else
        memcpy(to, from, count * sizeof(uint32_t));
}

static CUresult encode(unsigned call, void *tensor_map, struct wire_tensor_map *wire)
{
    uint8_t bytes[VGPU_TENSOR_MAP_BYTES];
    uint32_t length = 0;
    const uint64_t argument[8] = {0};
    const CUresult status = shim_reply(call, argument, wire, sizeof *wire, NULL, bytes, sizeof bytes, &length);
    if (status != CUDA_SUCCESS) return status;
    if (length != sizeof bytes) return CUDA_ERROR_UNKNOWN;
    memcpy(tensor_map, bytes, sizeof bytes);
    return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(void *tensorMap, unsigned int tensorDataType, unsigned int tensorRank, void *globalAddress,
                                const void *globalDim, const void *globalStrides, const void *boxDim, const void *elementStrides,
                                unsigned int interleave, unsigned int swizzle, unsigned int l2Promotion, unsigned int oobFill)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (tensorMap == NULL || ((uintptr_t)tensorMap & 63) != 0 || tensorRank == 0 || tensorRank > 5) return CUDA_ERROR_INVALID_VALUE;
    struct wire_tensor_map wire = {
        .data_type = tensorDataType,
        .rank = tensorRank,
        .global_address = (uint64_t)(uintptr_t)globalAddress,
        .interleave = interleave,
        .swizzle = swizzle,
        .promotion = l2Promotion,
        .fill = oobFill,
    };
    copy64(wire.global_dimension, globalDim, tensorRank, VGPU_TENSOR_NO_DIMENSION, &wire.absent);
    copy64(wire.global_stride, globalStrides, tensorRank - 1, VGPU_TENSOR_NO_STRIDE, &wire.absent);
    copy32(wire.box, boxDim, tensorRank, VGPU_TENSOR_NO_BOX, &wire.absent);
    copy32(wire.element_stride, elementStrides, tensorRank, VGPU_TENSOR_NO_ELEMENT_STRIDE, &wire.absent);
    return encode(VGPU_CALL_cuTensorMapEncodeTiled, tensorMap, &wire);
}

CUresult cuTensorMapEncodeIm2col(void *tensorMap, unsigned int tensorDataType, unsigned int tensorRank, void *globalAddress,
                                 const void *globalDim, const void *globalStrides, const void *pixelBoxLowerCorner,
                                 const void *pixelBoxUpperCorner, unsigned int channelsPerPixel, unsigned int pixelsPerColumn,
                                 const void *elementStrides, unsigned int interleave, unsigned int swizzle,
                                 unsigned int l2Promotion, unsigned int oobFill)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (tensorMap == NULL || ((uintptr_t)tensorMap & 63) != 0 || tensorRank < 3 || tensorRank > 5) return CUDA_ERROR_INVALID_VALUE;
    struct wire_tensor_map wire = {
        .data_type = tensorDataType,
        .rank = tensorRank,
        .global_address = (uint64_t)(uintptr_t)globalAddress,
        .channels_per_pixel = channelsPerPixel,
        .pixels_per_column = pixelsPerColumn,
        .interleave = interleave,
        .swizzle = swizzle,
        .promotion = l2Promotion,
        .fill = oobFill,
    };
    copy64(wire.global_dimension, globalDim, tensorRank, VGPU_TENSOR_NO_DIMENSION, &wire.absent);
    copy64(wire.global_stride, globalStrides, tensorRank - 1, VGPU_TENSOR_NO_STRIDE, &wire.absent);
    copy32(wire.lower_corner, pixelBoxLowerCorner, tensorRank - 2, VGPU_TENSOR_NO_LOWER, &wire.absent);
    copy32(wire.upper_corner, pixelBoxUpperCorner, tensorRank - 2, VGPU_TENSOR_NO_UPPER, &wire.absent);
    copy32(wire.element_stride, elementStrides, tensorRank, VGPU_TENSOR_NO_ELEMENT_STRIDE, &wire.absent);
    return encode(VGPU_CALL_cuTensorMapEncodeIm2col, tensorMap, &wire);
}

CUresult cuTensorMapReplaceAddress(void *tensorMap, void *globalAddress)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (tensorMap == NULL || ((uintptr_t)tensorMap & 63) != 0) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {(uint64_t)(uintptr_t)globalAddress};
    uint8_t bytes[VGPU_TENSOR_MAP_BYTES];
    uint32_t length = 0;
    status = shim_reply(VGPU_CALL_cuTensorMapReplaceAddress, argument, tensorMap, sizeof bytes, NULL, bytes, sizeof bytes, &length);
    if (status != CUDA_SUCCESS) return status;
    if (length != sizeof bytes) return CUDA_ERROR_UNKNOWN;
    memcpy(tensorMap, bytes, sizeof bytes);
    return CUDA_SUCCESS;
}
