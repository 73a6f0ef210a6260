/* SPDX-License-Identifier: Apache-2.0 */
/*
 * texture.c - texture and surface objects.
 *
 * Kernels take the driver's own values, so these are what the guest is told, and what it names an object by. Drivers may use
 * a value again in another context; so the session's objects are listed by context and value, and only these are destroyed.
 */
#include "allocations.h"
#include "code.h"
#include "internal.h"
#include "vm_limits.h"

#define VALUE_BITS 56 /* above them the context's slot, counted from 1, so that no key is 0 */

_Static_assert(REPLAY_CONTEXTS < 1 << (64 - VALUE_BITS), "a slot must fit above the value");

static uint64_t key_of(const struct vgpu_replay *replay, uint64_t value) { return (uint64_t)(replay->private->current + 1) << VALUE_BITS | value; }

/* Lists an object that the driver has made. False: it cannot be kept. */
static bool keep(struct vgpu_replay *replay, struct code_map *map, uint64_t value)
{
    if (value >> VALUE_BITS != 0)
        return false;
    /* A value that is listed was the driver's to give away again, and has its place already. */
    if (code_map_get(map, key_of(replay, value)) != NULL)
        return true;
    if (!replay_handle_begins(replay, VGPU_KIND_NONE))
        return false;
    if (code_map_put(map, key_of(replay, value), map))
        return true;
    replay_handle_ends(replay, VGPU_KIND_NONE);
    return false;
}

/* Builds what the driver is told from what a guest said. */
static CUresult read_resource(struct vgpu_replay *replay, const CUDA_RESOURCE_DESC *asked, CUDA_RESOURCE_DESC *resource)
{
    void *array = NULL;
    memset(resource, 0, sizeof *resource);
    resource->resType = asked->resType;
    switch (asked->resType) {
    case CU_RESOURCE_TYPE_ARRAY:
        if (!replay_array_real(replay, (uint64_t)(uintptr_t)asked->res.array.hArray, &array))
            return CUDA_ERROR_INVALID_HANDLE;
        resource->res.array.hArray = array;
        break;
    case CU_RESOURCE_TYPE_LINEAR:
        resource->res.linear.devPtr = asked->res.linear.devPtr;
        resource->res.linear.format = asked->res.linear.format;
        resource->res.linear.numChannels = asked->res.linear.numChannels;
        resource->res.linear.sizeInBytes = asked->res.linear.sizeInBytes;
        break;
    case CU_RESOURCE_TYPE_PITCH2D:
        resource->res.pitch2D.devPtr = asked->res.pitch2D.devPtr;
        resource->res.pitch2D.format = asked->res.pitch2D.format;
        resource->res.pitch2D.numChannels = asked->res.pitch2D.numChannels;
        resource->res.pitch2D.width = asked->res.pitch2D.width;
        resource->res.pitch2D.height = asked->res.pitch2D.height;
        resource->res.pitch2D.pitchInBytes = asked->res.pitch2D.pitchInBytes;
        break;
    case CU_RESOURCE_TYPE_MIPMAPPED_ARRAY:
        return CUDA_ERROR_NOT_SUPPORTED;
    default:
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (asked->flags != 0)
        return CUDA_ERROR_INVALID_VALUE;
    if (array != NULL)
        return CUDA_SUCCESS;
    /* In a linear resource format and channels lie where they do in one with a pitch. */
    const unsigned channels = resource->res.linear.numChannels;
    if (channels != 1 && channels != 2 && channels != 4)
        return CUDA_ERROR_INVALID_VALUE;
    return vgpu_format_bytes(resource->res.linear.format) != 0 ? CUDA_SUCCESS : CUDA_ERROR_NOT_SUPPORTED;
}

static bool read_texture(const CUDA_TEXTURE_DESC *asked, CUDA_TEXTURE_DESC *texture)
{
    *texture = *asked;
    memset(texture->reserved, 0, sizeof texture->reserved);
    for (int i = 0; i < 3; i++)
        if (asked->addressMode[i] > VGPU_TEXTURE_MODE_LAST)
            return false;
    return asked->filterMode <= VGPU_TEXTURE_FILTER_LAST && asked->mipmapFilterMode <= VGPU_TEXTURE_FILTER_LAST &&
           (asked->flags & ~VGPU_TEXTURE_FLAGS) == 0;
}

static bool read_view(const CUDA_RESOURCE_VIEW_DESC *asked, CUDA_RESOURCE_VIEW_DESC *view)
{
    *view = *asked;
    memset(view->reserved, 0, sizeof view->reserved);
    return asked->format <= VGPU_VIEW_FORMAT_LAST && asked->firstMipmapLevel == 0 && asked->lastMipmapLevel == 0 &&
           asked->firstLayer <= asked->lastLayer;
}

/* argument: VGPU_TEXTURE_*; payload: see there; value[0]: the driver's value */
CUresult replay_cuTexObjectCreate(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    struct { CUDA_RESOURCE_DESC resource; CUDA_TEXTURE_DESC texture; CUDA_RESOURCE_VIEW_DESC view; } asked, checked;
    const bool has_view = call->argument[0] == VGPU_TEXTURE_HAS_VIEW;
    const size_t length = has_view ? sizeof asked : offsetof(typeof(asked), view);
    if (call->argument[0] > VGPU_TEXTURE_HAS_VIEW || call->payload_length != length)
        return CUDA_ERROR_INVALID_VALUE;
    memcpy(&asked, payload, length);
    /* SAFETY: from here on only the private copy is looked at. */
    __asm__ volatile("" : "+m"(asked) : : "memory");
    CUresult status = read_resource(replay, &asked.resource, &checked.resource);
    if (status != CUDA_SUCCESS)
        return status;
    if (!read_texture(&asked.texture, &checked.texture))
        return CUDA_ERROR_INVALID_VALUE;
    if (has_view && (asked.resource.resType != CU_RESOURCE_TYPE_ARRAY || !read_view(&asked.view, &checked.view)))
        return CUDA_ERROR_INVALID_VALUE;
    struct replay_code *code = code_of(replay);
    if (code == NULL)
        return CUDA_ERROR_OUT_OF_MEMORY;
    uint64_t value = 0;
    status = (CUresult)replay->driver.cuTexObjectCreate(&value, &checked.resource, &checked.texture, has_view ? &checked.view : NULL);
    if (status != CUDA_SUCCESS)
        return status;
    if (!keep(replay, &code->textures, value)) {
        replay->driver.cuTexObjectDestroy(value);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    result->value[0] = value;
    return CUDA_SUCCESS;
}

/* payload: CUDA_RESOURCE_DESC; value[0]: the driver's value */
CUresult replay_cuSurfObjectCreate(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    CUDA_RESOURCE_DESC asked, resource;
    if (call->payload_length != sizeof asked)
        return CUDA_ERROR_INVALID_VALUE;
    memcpy(&asked, payload, sizeof asked);
    /* SAFETY: from here on only the private copy is looked at. */
    __asm__ volatile("" : "+m"(asked) : : "memory");
    if (asked.resType != CU_RESOURCE_TYPE_ARRAY)
        return CUDA_ERROR_INVALID_VALUE;
    CUresult status = read_resource(replay, &asked, &resource);
    if (status != CUDA_SUCCESS)
        return status;
    struct replay_code *code = code_of(replay);
    if (code == NULL)
        return CUDA_ERROR_OUT_OF_MEMORY;
    uint64_t value = 0;
    status = (CUresult)replay->driver.cuSurfObjectCreate(&value, &resource);
    if (status != CUDA_SUCCESS)
        return status;
    if (!keep(replay, &code->surfaces, value)) {
        replay->driver.cuSurfObjectDestroy(value);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    result->value[0] = value;
    return CUDA_SUCCESS;
}

/* Is it an object of the current context? */
static bool is_listed(const struct vgpu_replay *replay, const struct code_map *map, uint64_t value)
{
    return value >> VALUE_BITS == 0 && code_map_get(map, key_of(replay, value)) != NULL;
}

static void forget(struct vgpu_replay *replay, struct code_map *map, uint64_t key)
{
    (void)code_map_take(map, key);
    replay_handle_ends(replay, VGPU_KIND_NONE);
}

/* argument: the driver's value */
CUresult replay_cuTexObjectDestroy(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    const uint64_t value = call->argument[0];
    if (replay->code == NULL || !is_listed(replay, &replay->code->textures, value))
        return CUDA_ERROR_INVALID_VALUE;
    const CUresult status = (CUresult)replay->driver.cuTexObjectDestroy(value);
    if (status == CUDA_SUCCESS)
        forget(replay, &replay->code->textures, key_of(replay, value));
    return status;
}

/* argument: the driver's value */
CUresult replay_cuSurfObjectDestroy(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    const uint64_t value = call->argument[0];
    if (replay->code == NULL || !is_listed(replay, &replay->code->surfaces, value))
        return CUDA_ERROR_INVALID_VALUE;
    const CUresult status = (CUresult)replay->driver.cuSurfObjectDestroy(value);
    if (status == CUDA_SUCCESS)
        forget(replay, &replay->code->surfaces, key_of(replay, value));
    return status;
}

static void end_with_context(struct vgpu_replay *replay, struct code_map *map, unsigned slot)
{
    for (size_t i = 0; i < map->capacity;) {
        const uint64_t key = map->slot[i].key;
        if (key >> VALUE_BITS == slot + 1)
            forget(replay, map, key); /* another may stand here now */
        else
            i++;
    }
}

void replay_textures_context_ended(struct vgpu_replay *replay, unsigned slot)
{
    if (replay->code == NULL)
        return;
    end_with_context(replay, &replay->code->textures, slot);
    end_with_context(replay, &replay->code->surfaces, slot);
}
