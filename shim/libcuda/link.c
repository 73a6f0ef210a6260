/* SPDX-License-Identifier: Apache-2.0 */
/*
 * link.c - the driver's linker (cuLink*). It runs in the worker; data go there as blobs and the cubin comes back as one.
 *
 * Log buffers given at cuLinkCreate are the caller's until the link is destroyed: every step's answer carries what the
 * worker's linker has said so far, and is copied out at once. The cubin lives here until the link is destroyed.
 */
#include "code.h"

#include <stdlib.h>

#define INPUT_TYPES 7 /* CU_JIT_NUM_INPUT_TYPES and one to come */

struct link {
    uint64_t handle;
    struct shim_jit jit;
    void *cubin;
    size_t cubin_size;
};

static struct link *link_of(CUlinkState state)
{
    struct shim_object *object = shim_object(VGPU_KIND_LINK, (uint64_t)(uintptr_t)state);
    return object == NULL ? NULL : object->data;
}

CUresult cuLinkCreate_v2(unsigned int numOptions, void *options, void *optionValues, void *stateOut)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if (stateOut == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct link *link = calloc(1, sizeof *link);
    if (link == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    status = shim_jit_read(&link->jit, numOptions, options, optionValues);
    if (status == CUDA_SUCCESS) {
        const uint64_t argument[8] = {link->jit.count};
        uint64_t value[4] = {0};
        status = shim_reply(VGPU_CALL_cuLinkCreate_v2, argument, link->jit.wire, link->jit.count * (uint32_t)sizeof *link->jit.wire,
                            value, NULL, 0, NULL);
        link->handle = value[0];
    }
    if (status == CUDA_SUCCESS && (vgpu_handle_kind(link->handle) != VGPU_KIND_LINK || !shim_handle_adopt(link->handle, link)))
        status = CUDA_ERROR_OUT_OF_MEMORY;
    if (status != CUDA_SUCCESS) {
        free(link);
        return status;
    }
    *(CUlinkState *)stateOut = CODE_HANDLE(CUlinkState, link->handle);
    return CUDA_SUCCESS;
}

CUresult cuLinkCreate(unsigned int numOptions, void *options, void *optionValues, void *stateOut)
{
    return cuLinkCreate_v2(numOptions, options, optionValues, stateOut);
}

CUresult cuLinkAddData_v2(CUlinkState state, unsigned int type, void *data, size_t size, const char *name, unsigned int numOptions,
                          void *options, void *optionValues)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    struct link *link = link_of(state);
    if (link == NULL) return CUDA_ERROR_INVALID_HANDLE;
    if (data == NULL || size == 0 || type >= INPUT_TYPES || link->cubin != NULL) return CUDA_ERROR_INVALID_VALUE;
    struct shim_jit jit;
    if ((status = shim_jit_read(&jit, numOptions, options, optionValues)) != CUDA_SUCCESS) return status;
    if (name == NULL) name = "";
    const size_t name_length = strnlen(name, 4096);
    struct shim_blob blob;
    shim_blob_begin(&blob, size);
    if ((status = shim_blob_append(&blob, data, size)) != CUDA_SUCCESS) return status;
    /* Payload: the options, then the name. */
    const uint32_t option_bytes = jit.count * (uint32_t)sizeof *jit.wire;
    uint8_t *payload = malloc(option_bytes + name_length + 1);
    if (payload == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    memcpy(payload, jit.wire, option_bytes);
    memcpy(payload + option_bytes, name, name_length);
    const uint64_t argument[8] = {link->handle, type, blob.id, jit.count};
    uint8_t reply[VGPU_SLOT_PAYLOAD_LIMIT];
    uint32_t reply_length = 0;
    status = shim_reply(VGPU_CALL_cuLinkAddData_v2, argument, payload, option_bytes + (uint32_t)name_length, NULL, reply,
                        sizeof reply, &reply_length);
    shim_jit_finish(&link->jit, reply, reply_length);
    free(payload);
    return status;
}

CUresult cuLinkAddData(CUlinkState state, unsigned int type, void *data, size_t size, const char *name, unsigned int numOptions,
                       void *options, void *optionValues)
{
    return cuLinkAddData_v2(state, type, data, size, name, numOptions, options, optionValues);
}

CUresult cuLinkAddFile_v2(CUlinkState state, unsigned int type, const char *path, unsigned int numOptions, void *options,
                          void *optionValues)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if (link_of(state) == NULL) return CUDA_ERROR_INVALID_HANDLE;
    if (path == NULL) return CUDA_ERROR_INVALID_VALUE;
    void *bytes;
    size_t length;
    if ((status = shim_image_read_file(path, &bytes, &length)) != CUDA_SUCCESS) return status;
    /* PTX (type 1) is text and its NUL counts; shim_image_read_file has put one there. */
    status = cuLinkAddData_v2(state, type, bytes, length + (type == 1), path, numOptions, options, optionValues);
    free(bytes);
    return status;
}

CUresult cuLinkAddFile(CUlinkState state, unsigned int type, const char *path, unsigned int numOptions, void *options,
                       void *optionValues)
{
    return cuLinkAddFile_v2(state, type, path, numOptions, options, optionValues);
}

CUresult cuLinkComplete(CUlinkState state, void *cubinOut, void *sizeOut)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    struct link *link = link_of(state);
    if (link == NULL) return CUDA_ERROR_INVALID_HANDLE;
    if (cubinOut == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (link->cubin == NULL) {
        const uint64_t argument[8] = {link->handle};
        uint64_t value[4] = {0};
        uint8_t reply[VGPU_SLOT_PAYLOAD_LIMIT];
        uint32_t reply_length = 0;
        status = shim_reply(VGPU_CALL_cuLinkComplete, argument, NULL, 0, value, reply, sizeof reply, &reply_length);
        shim_jit_finish(&link->jit, reply, reply_length);
        if (status != CUDA_SUCCESS) return status;
        void *cubin = value[1] > VGPU_BLOB_TOTAL_LIMIT ? NULL : malloc(value[1] + 1);
        if (cubin == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
        status = shim_blob_read(value[0], cubin, value[1]);
        (void)shim_blob_free(value[0]);
        if (status != CUDA_SUCCESS) {
            free(cubin);
            return status;
        }
        link->cubin = cubin;
        link->cubin_size = value[1];
    }
    *(void **)cubinOut = link->cubin;
    if (sizeOut != NULL) *(size_t *)sizeOut = link->cubin_size;
    return CUDA_SUCCESS;
}

CUresult cuLinkDestroy(CUlinkState state)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    struct link *link = link_of(state);
    if (link == NULL) return CUDA_ERROR_INVALID_HANDLE;
    const uint64_t argument[8] = {link->handle};
    shim_handle_free(link->handle);
    free(link->cubin);
    free(link);
    return shim_async(VGPU_CALL_cuLinkDestroy, argument, NULL, 0);
}
