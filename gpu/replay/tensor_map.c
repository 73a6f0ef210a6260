/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tensor_map.c - tensor copy descriptors, written by the driver from arguments that came by value.
 */
#include "code.h"

static bool read_wire(const struct vgpu_call *call, const void *payload, struct wire_tensor_map *wire)
{
    if (call->payload_length != sizeof *wire) return false;
    memcpy(wire, payload, sizeof *wire);
    return wire->rank >= 1 && wire->rank <= 5;
}

static void answer(const uint8_t *map, CUresult status, struct vgpu_result *result, uint8_t *reply)
{
    if (status != CUDA_SUCCESS) return;
    memcpy(reply, map, VGPU_TENSOR_MAP_BYTES);
    result->payload_length = VGPU_TENSOR_MAP_BYTES;
}

#define UNLESS(flag, array) ((wire.absent & (flag)) != 0 ? NULL : (array))

CUresult replay_cuTensorMapEncodeTiled(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    struct wire_tensor_map wire;
    uint8_t map[VGPU_TENSOR_MAP_BYTES] __attribute__((aligned(64))) = {0};
    if (!read_wire(call, payload, &wire)) return CUDA_ERROR_INVALID_VALUE;
    const CUresult status = (CUresult)replay->driver.cuTensorMapEncodeTiled(
        map, wire.data_type, wire.rank, (void *)(uintptr_t)wire.global_address, UNLESS(VGPU_TENSOR_NO_DIMENSION, wire.global_dimension),
        UNLESS(VGPU_TENSOR_NO_STRIDE, wire.global_stride), UNLESS(VGPU_TENSOR_NO_BOX, wire.box),
        UNLESS(VGPU_TENSOR_NO_ELEMENT_STRIDE, wire.element_stride), wire.interleave, wire.swizzle, wire.promotion, wire.fill);
    answer(map, status, result, reply);
    return status;
}

CUresult replay_cuTensorMapEncodeIm2col(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    struct wire_tensor_map wire;
    uint8_t map[VGPU_TENSOR_MAP_BYTES] __attribute__((aligned(64))) = {0};
    if (!read_wire(call, payload, &wire)) return CUDA_ERROR_INVALID_VALUE;
    const CUresult status = (CUresult)replay->driver.cuTensorMapEncodeIm2col(
        map, wire.data_type, wire.rank, (void *)(uintptr_t)wire.global_address, UNLESS(VGPU_TENSOR_NO_DIMENSION, wire.global_dimension),
        UNLESS(VGPU_TENSOR_NO_STRIDE, wire.global_stride), UNLESS(VGPU_TENSOR_NO_LOWER, wire.lower_corner),
        UNLESS(VGPU_TENSOR_NO_UPPER, wire.upper_corner), wire.channels_per_pixel, wire.pixels_per_column,
        UNLESS(VGPU_TENSOR_NO_ELEMENT_STRIDE, wire.element_stride), wire.interleave, wire.swizzle, wire.promotion, wire.fill);
    answer(map, status, result, reply);
    return status;
}

CUresult replay_cuTensorMapReplaceAddress(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    uint8_t map[VGPU_TENSOR_MAP_BYTES] __attribute__((aligned(64)));
    if (call->payload_length != sizeof map) return CUDA_ERROR_INVALID_VALUE;
    memcpy(map, payload, sizeof map);
    const CUresult status = (CUresult)replay->driver.cuTensorMapReplaceAddress(map, (void *)(uintptr_t)call->argument[0]);
    answer(map, status, result, reply);
    return status;
}
