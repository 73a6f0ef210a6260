/* SPDX-License-Identifier: Apache-2.0 */
/*
 * array.c - CUDA arrays. They lie where no address of the program reaches, so copies name them by handle, and the bounds of
 * each are checked here before the driver checks them again.
 *
 * What counts against the quota is what the driver takes of the device: see cost_of. It is charged before the driver is asked.
 */
#include "../../transport/code_wire.h"
#include "allocations.h"
#include "internal.h"

#include <stdlib.h>

/* Block-linear memory: a row of blocks is 8 rows high, and a block 64 bytes wide. */
#define BLOCK_BYTES 64u
#define BLOCK_ROWS 8u

struct array {
    void *real;
    uint64_t charged, size[3]; /* bytes in a row, rows, slices or layers */
    uint32_t element;
    unsigned slot; /* of its context */
};

static bool round_up(uint64_t *value, uint64_t unit)
{
    if (*value > UINT64_MAX - (unit - 1))
        return false;
    *value = (*value + unit - 1) / unit * unit;
    return true;
}

static bool product(const uint64_t size[3], uint64_t *bytes)
{
    return !__builtin_mul_overflow(size[0], size[1], bytes) && !__builtin_mul_overflow(*bytes, size[2], bytes);
}

/* Where the driver counts bytes, the array's own; where it gives memory out in units, whole ones for the array alone. */
static bool cost_of(const struct vgpu_replay *replay, const struct array *array, uint64_t *cost)
{
    uint64_t size[3] = {array->size[0], array->size[1], array->size[2]};
    if (replay->memory_unit <= 1)
        return product(size, cost);
    return round_up(&size[0], BLOCK_BYTES) && (size[1] == 1 || round_up(&size[1], BLOCK_ROWS)) && product(size, cost) &&
           round_up(cost, replay->memory_unit);
}

/* arguments: width in elements, height, depth, format, channels, flags; value[0]: handle */
CUresult replay_cuArray3DCreate_v2(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    const uint64_t *a = call->argument;
    const CUDA_ARRAY3D_DESCRIPTOR description = {a[0], a[1], a[2], (unsigned)a[3], (unsigned)a[4], (unsigned)a[5]};
    const uint32_t bytes = vgpu_format_bytes(description.Format);
    if (bytes == 0 || (description.Flags & ~VGPU_ARRAY_FLAGS) != 0)
        return CUDA_ERROR_NOT_SUPPORTED;
    if (description.NumChannels != 1 && description.NumChannels != 2 && description.NumChannels != 4)
        return CUDA_ERROR_INVALID_VALUE;
    struct array *array = calloc(1, sizeof *array);
    if (array == NULL)
        return CUDA_ERROR_OUT_OF_MEMORY;
    *array = (struct array){.element = bytes * description.NumChannels, .slot = replay->private->current,
                            .size = {0, description.Height != 0 ? description.Height : 1, description.Depth != 0 ? description.Depth : 1}};
    CUresult status = CUDA_ERROR_INVALID_VALUE;
    if (!__builtin_mul_overflow(description.Width, array->element, &array->size[0]) && array->size[0] != 0 &&
        cost_of(replay, array, &array->charged))
        status = replay_memory_charge_settling(replay, array->charged) ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
    if (status != CUDA_SUCCESS) {
        free(array);
        return status;
    }
    status = (CUresult)replay->driver.cuArray3DCreate_v2(&array->real, &description);
    if (status == CUDA_SUCCESS && (result->value[0] = replay_intern(replay, VGPU_KIND_ARRAY, array)) == 0) {
        replay->driver.cuArrayDestroy(array->real);
        status = CUDA_ERROR_OUT_OF_MEMORY;
    }
    if (status != CUDA_SUCCESS) {
        replay_memory_release(replay, array->charged);
        free(array);
    }
    return status;
}

static void forget(struct vgpu_replay *replay, uint64_t handle, struct array *array)
{
    replay_unbind(replay, VGPU_KIND_ARRAY, handle);
    replay_memory_release(replay, array->charged);
    free(array);
}

/* argument: handle */
CUresult replay_cuArrayDestroy(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *found;
    if (!replay_lookup(replay, VGPU_KIND_ARRAY, call->argument[0], &found))
        return CUDA_ERROR_INVALID_HANDLE;
    struct array *array = found;
    CUresult status = (CUresult)replay->driver.cuArrayDestroy(array->real);
    if (status == CUDA_SUCCESS)
        forget(replay, call->argument[0], array);
    return status;
}

CUresult replay_array_box(struct vgpu_replay *replay, uint64_t handle, const uint64_t at[3], const uint64_t size[3], void **real)
{
    void *found;
    if (!replay_lookup(replay, VGPU_KIND_ARRAY, handle, &found))
        return CUDA_ERROR_INVALID_HANDLE;
    const struct array *array = found;
    for (int i = 0; i < 3; i++)
        if (size[i] > array->size[i] || at[i] > array->size[i] - size[i])
            return CUDA_ERROR_INVALID_VALUE;
    if (at[0] % array->element != 0 || size[0] % array->element != 0)
        return CUDA_ERROR_INVALID_VALUE;
    *real = array->real;
    return CUDA_SUCCESS;
}

bool replay_array_real(struct vgpu_replay *replay, uint64_t handle, void **real)
{
    void *found;
    if (!replay_lookup(replay, VGPU_KIND_ARRAY, handle, &found))
        return false;
    *real = ((const struct array *)found)->real;
    return true;
}

struct search { void *real; uint64_t handle; };

static void compare(struct vgpu_replay *replay, uint64_t handle, void *real, void *user)
{
    (void)replay;
    struct search *search = user;
    if (((const struct array *)real)->real == search->real)
        search->handle = handle;
}

uint64_t replay_array_handle(struct vgpu_replay *replay, void *real)
{
    struct search search = {.real = real};
    replay_each(replay, VGPU_KIND_ARRAY, compare, &search);
    return search.handle;
}

static void end_with_context(struct vgpu_replay *replay, uint64_t handle, void *real, void *user)
{
    if (((const struct array *)real)->slot == *(const unsigned *)user)
        forget(replay, handle, real);
}

void replay_arrays_context_ended(struct vgpu_replay *replay, unsigned slot)
{
    replay_each(replay, VGPU_KIND_ARRAY, end_with_context, &slot);
}
