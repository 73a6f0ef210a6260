/* SPDX-License-Identifier: Apache-2.0 */
/*
 * link.c - the driver's linker on behalf of a guest. Log buffers belong to the link and live as long as it; what they
 * hold goes back with every answer. The cubin is copied to a blob, because the driver's own goes with the link.
 */
#include "code.h"

#include "../../transport/image_length.h"

enum { CUBIN, PTX, FATBINARY, OBJECT, LIBRARY, NVVM };

struct code_link {
    void *real;
    struct code_jit jit; /* the driver keeps pointers into it until the link is destroyed */
};

static struct code_link *link_of(struct vgpu_replay *replay, uint64_t handle)
{
    void *real;
    if (!replay_lookup(replay, VGPU_KIND_LINK, handle, &real) || replay->code == NULL) return NULL;
    return code_map_get(&replay->code->links, handle);
}

CUresult replay_cuLinkCreate_v2(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    struct replay_code *code = code_of(replay);
    struct code_link *link = code == NULL ? NULL : calloc(1, sizeof *link);
    if (link == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    CUresult status = code_jit_read(&link->jit, payload, call->payload_length, call->argument[0]);
    if (status == CUDA_SUCCESS)
        status = (CUresult)replay->driver.cuLinkCreate_v2(link->jit.count, link->jit.option, link->jit.value, &link->real);
    if (status == CUDA_SUCCESS) {
        const uint64_t handle = replay_intern(replay, VGPU_KIND_LINK, link->real);
        if (handle != 0 && code_map_put(&code->links, handle, link)) {
            result->value[0] = handle;
            return CUDA_SUCCESS;
        }
        (void)replay->driver.cuLinkDestroy(link->real);
        if (handle != 0) replay_unbind(replay, VGPU_KIND_LINK, handle);
        status = CUDA_ERROR_OUT_OF_MEMORY;
    }
    code_jit_release(&link->jit);
    free(link);
    return status;
}

/* Is the input whole? The driver is not to be led past its end. */
static bool is_whole(unsigned type, const uint8_t *bytes, uint64_t size)
{
    uint64_t proven;
    const enum vgpu_image_kind kind = type == PTX || type == NVVM ? VGPU_IMAGE_PTX : vgpu_image_length(bytes, size, &proven);
    return kind != VGPU_IMAGE_NONE;
}

/* arguments: link, type, blob, options; payload: options, then the name */
CUresult replay_cuLinkAddData_v2(REPLAY_PARAMETERS)
{
    struct code_link *link = link_of(replay, call->argument[0]);
    uint64_t size = 0;
    uint8_t *bytes = code_blob_take(replay, call->argument[2], &size);
    const unsigned type = (unsigned)call->argument[1];
    if (link == NULL || bytes == NULL || call->argument[1] > NVVM) {
        free(bytes);
        return link == NULL ? CUDA_ERROR_INVALID_HANDLE : CUDA_ERROR_INVALID_VALUE;
    }
    struct code_jit jit;
    CUresult status = code_jit_read(&jit, payload, call->payload_length, call->argument[3]);
    if (status == CUDA_SUCCESS) {
        const uint32_t option_bytes = (uint32_t)(call->argument[3] * sizeof(struct wire_option));
        char *name = code_name((const uint8_t *)payload + option_bytes, call->payload_length - option_bytes);
        if (name == NULL)
            status = CUDA_ERROR_OUT_OF_MEMORY;
        else if (!is_whole(type, bytes, size))
            status = CUDA_ERROR_INVALID_IMAGE;
        else
            status = (CUresult)replay->driver.cuLinkAddData_v2(link->real, type, bytes, size, name, jit.count, jit.option, jit.value);
        free(name);
        code_jit_release(&jit);
        code_jit_answer(replay, &link->jit, result, reply);
    }
    free(bytes); /* the linker keeps no reference to its inputs */
    return status;
}

CUresult replay_cuLinkComplete(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    struct code_link *link = link_of(replay, call->argument[0]);
    if (link == NULL) return CUDA_ERROR_INVALID_HANDLE;
    void *cubin = NULL;
    size_t size = 0;
    const CUresult status = (CUresult)replay->driver.cuLinkComplete(link->real, &cubin, &size);
    code_jit_answer(replay, &link->jit, result, reply);
    if (status != CUDA_SUCCESS) return status;
    result->value[0] = code_blob_make(replay, cubin, size);
    result->value[1] = size;
    return result->value[0] == 0 ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

static void release(struct code_link *link)
{
    code_jit_release(&link->jit);
    free(link);
}

CUresult replay_cuLinkDestroy(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    struct code_link *link = link_of(replay, call->argument[0]);
    if (link == NULL) return CUDA_ERROR_INVALID_HANDLE;
    (void)code_map_take(&replay->code->links, call->argument[0]);
    replay_unbind(replay, VGPU_KIND_LINK, call->argument[0]);
    const CUresult status = (CUresult)replay->driver.cuLinkDestroy(link->real);
    release(link);
    return status;
}

void code_links_close(struct vgpu_replay *replay)
{
    struct code_map *links = &replay->code->links;
    for (size_t i = 0; i < links->capacity; i++)
        if (links->slot[i].key != 0) release(links->slot[i].value);
    free(links->slot);
    *links = (struct code_map){0};
}
