/* SPDX-License-Identifier: Apache-2.0 */
/*
 * array.c - CUDA arrays. They lie where no address of the program reaches, so copies name them by handle, and the bounds of
 * each are checked here before the driver checks them again.
 *
 * What counts against the quota is what the driver takes of the device. An array larger than a unit of its memory has whole units of
 * its own; the driver says how many bytes it needs (array_needs), and that is charged before it is made. Smaller ones share units,
 * with which others nobody says. So the most is charged, a unit; and how much more this process holds when the array is there (NVML,
 * process_memory.c) is what it has cost. What the small arrays of a context have taken together is kept, for the unit goes with the
 * last of those in it. Where the system does not tell, each small array has cost a unit.
 */
#include "../../transport/code_wire.h"
#include "allocations.h"
#include "internal.h"

#include <stdlib.h>

#define DEFERRED_MAPPING 0x80u /* CUDA_ARRAY3D_DEFERRED_MAPPING: an array without memory */

struct array {
    void *real;
    uint64_t size[3]; /* bytes in a row, rows, slices or layers */
    uint64_t charged; /* for it alone */
    bool shares;      /* what it has taken is in its context's arrays_taken */
    uint32_t element;
    unsigned slot; /* of its context */
};

/* CUDA_ARRAY_MEMORY_REQUIREMENTS */
struct requirements { size_t size, alignment; unsigned reserved[4]; };

/* The most that the array takes of the device, or why the driver would not make it. */
static CUresult array_needs(const struct vgpu_replay *replay, const struct array *array, CUDA_ARRAY3D_DESCRIPTOR description, uint64_t *bytes)
{
    const uint64_t *size = array->size;
    if (__builtin_mul_overflow(size[0], size[1], bytes) || __builtin_mul_overflow(*bytes, size[2], bytes))
        return CUDA_ERROR_INVALID_VALUE;
    if (replay->memory_unit <= 1)
        return CUDA_SUCCESS;
    void *empty;
    struct requirements needs = {0};
    description.Flags |= DEFERRED_MAPPING;
    CUresult status = (CUresult)replay->driver.cuArray3DCreate_v2(&empty, &description);
    if (status != CUDA_SUCCESS)
        return status;
    status = (CUresult)replay->driver.cuArrayGetMemoryRequirements(&needs, empty, replay->device);
    replay->driver.cuArrayDestroy(empty);
    if (status != CUDA_SUCCESS)
        return status;
    if (needs.size > UINT64_MAX - replay->memory_unit)
        return CUDA_ERROR_OUT_OF_MEMORY;
    *bytes = (needs.size + replay->memory_unit - 1) / replay->memory_unit * replay->memory_unit;
    return CUDA_SUCCESS;
}

/* Makes it and charges what it takes. */
static CUresult make(struct vgpu_replay *replay, const CUDA_ARRAY3D_DESCRIPTOR *description, struct array *array)
{
    uint64_t most, before, after;
    CUresult status = array_needs(replay, array, *description, &most);
    if (status != CUDA_SUCCESS)
        return status;
    const bool is_charged = replay_memory_charge_settling(replay, most);
    const bool may_share = replay->memory_unit > 1 && most <= replay->memory_unit && replay_process_memory(replay, &before);
    if (!is_charged && !may_share)
        return CUDA_ERROR_OUT_OF_MEMORY;
    status = (CUresult)replay->driver.cuArray3DCreate_v2(&array->real, description);
    if (status != CUDA_SUCCESS) {
        if (is_charged)
            replay_memory_release(replay, most);
        return status;
    }
    array->shares = may_share && replay_process_memory(replay, &after);
    if (!array->shares && is_charged) {
        array->charged = most;
        return CUDA_SUCCESS;
    }
    const uint64_t taken = array->shares && after > before ? after - before : 0;
    if (!is_charged && (taken != 0 || !array->shares)) {
        replay->driver.cuArrayDestroy(array->real);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    if (is_charged && taken < most)
        replay_memory_release(replay, most - taken);
    if (taken > most)
        replay_memory_charge_always(replay, taken - most);
    replay->private->context[array->slot].arrays_taken += taken;
    return CUDA_SUCCESS;
}

/* Destroys it at the driver and gives back what that gives back. */
static CUresult unmake(struct vgpu_replay *replay, const struct array *array)
{
    uint64_t before, after, *taken = &replay->private->context[array->slot].arrays_taken;
    const bool told = array->shares && replay_process_memory(replay, &before);
    CUresult status = (CUresult)replay->driver.cuArrayDestroy(array->real);
    if (status != CUDA_SUCCESS)
        return status;
    uint64_t given = array->charged;
    if (told && replay_process_memory(replay, &after) && before > after) {
        given = before - after < *taken ? before - after : *taken;
        *taken -= given;
    }
    replay_memory_release(replay, given);
    return CUDA_SUCCESS;
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
    if (!__builtin_mul_overflow(description.Width, array->element, &array->size[0]) && array->size[0] != 0)
        status = make(replay, &description, array);
    if (status == CUDA_SUCCESS && (result->value[0] = replay_intern(replay, VGPU_KIND_ARRAY, array)) == 0) {
        (void)unmake(replay, array);
        status = CUDA_ERROR_OUT_OF_MEMORY;
    }
    if (status != CUDA_SUCCESS)
        free(array);
    return status;
}

/* argument: handle */
CUresult replay_cuArrayDestroy(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *found;
    if (!replay_lookup(replay, VGPU_KIND_ARRAY, call->argument[0], &found))
        return CUDA_ERROR_INVALID_HANDLE;
    struct array *array = found;
    CUresult status = unmake(replay, array);
    if (status == CUDA_SUCCESS) {
        replay_unbind(replay, VGPU_KIND_ARRAY, call->argument[0]);
        free(array);
    }
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
    struct array *array = real;
    if (array->slot != *(const unsigned *)user)
        return;
    replay_memory_release(replay, array->charged);
    replay_unbind(replay, VGPU_KIND_ARRAY, handle);
    free(array);
}

void replay_arrays_context_ended(struct vgpu_replay *replay, unsigned slot)
{
    replay_each(replay, VGPU_KIND_ARRAY, end_with_context, &slot);
    replay_memory_release(replay, replay->private->context[slot].arrays_taken);
    replay->private->context[slot].arrays_taken = 0;
}
