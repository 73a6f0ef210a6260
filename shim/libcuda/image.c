/* SPDX-License-Identifier: Apache-2.0 */
/*
 * image.c - what a bare image pointer points at, and how many bytes of it there are.
 *
 * cuModuleLoadData and cuLibraryLoadData get no length. The formats prove one (transport/image_length.h); the fatbin
 * wrapper, which nvcc's start-up code registers, holds pointers to fatbins and is taken apart here. Never reads a byte
 * the format has not proved to be there.
 */
#include "code.h"

#include <stdio.h>
#include <stdlib.h>

#include "../../transport/image_length.h"

struct wrapper {
    uint32_t magic, version;
    const void *data;
    const void *const *prelinked; /* version 2: null-terminated; version 1: a file name */
};
_Static_assert(sizeof(struct wrapper) == 24, "fatbin wrapper");

static CUresult describe_wrapper(const struct wrapper *wrapper, struct shim_image *out)
{
    if (wrapper->version != 1 && wrapper->version != 2) return CUDA_ERROR_INVALID_IMAGE;
    if (wrapper->data == NULL) return CUDA_ERROR_INVALID_IMAGE;
    uint32_t parts = 1;
    if (wrapper->version == 2 && wrapper->prelinked != NULL)
        while (wrapper->prelinked[parts - 1] != NULL)
            if (++parts > VGPU_IMAGE_PARTS) return CUDA_ERROR_INVALID_IMAGE;
    out->is_wrapper = wrapper->version;
    out->part_count = parts;
    if (parts > 1) {
        out->part = calloc(parts, sizeof *out->part);
        out->length = calloc(parts, sizeof *out->length);
        if (out->part == NULL || out->length == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    }
    for (uint32_t i = 0; i < parts; i++) {
        const void *part = i == 0 ? wrapper->data : wrapper->prelinked[i - 1];
        uint64_t length;
        const enum vgpu_image_kind kind = vgpu_image_length(part, UINT64_MAX, &length);
        /* A wrapper around a bare cubin or PTX is nothing that a tool writes, but the driver takes it. */
        if (kind == VGPU_IMAGE_NONE || kind == VGPU_IMAGE_ARCHIVE) return CUDA_ERROR_INVALID_IMAGE;
        out->part[i] = part;
        out->length[i] = length;
    }
    return CUDA_SUCCESS;
}

CUresult shim_image_describe(const void *image, struct shim_image *out)
{
    memset(out, 0, sizeof *out);
    out->part = &out->first_part;
    out->length = &out->first_length;
    if (image == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (vgpu_image_is_u32(image, UINT64_MAX, VGPU_WRAPPER_MAGIC)) {
        struct wrapper wrapper;
        memcpy(&wrapper, image, sizeof wrapper);
        const CUresult status = describe_wrapper(&wrapper, out);
        if (status != CUDA_SUCCESS) shim_image_release(out);
        return status;
    }
    out->part_count = 1;
    out->first_part = image;
    const enum vgpu_image_kind kind = vgpu_image_length(image, UINT64_MAX, &out->first_length);
    return kind == VGPU_IMAGE_NONE ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS;
}

void shim_image_release(struct shim_image *image)
{
    if (image->part != &image->first_part) free(image->part);
    if (image->length != &image->first_length) free(image->length);
    image->part = NULL;
    image->length = NULL;
}

CUresult shim_image_read_file(const char *name, void **bytes, size_t *length)
{
    FILE *file = fopen(name, "rbe");
    if (file == NULL) return CUDA_ERROR_FILE_NOT_FOUND;
    size_t used = 0, capacity = 1 << 16;
    uint8_t *buffer = malloc(capacity + 1);
    while (buffer != NULL) {
        const size_t got = fread(buffer + used, 1, capacity - used, file);
        used += got;
        if (used < capacity) break;
        capacity *= 2;
        uint8_t *larger = capacity > VGPU_IMAGE_LIMIT ? NULL : realloc(buffer, capacity + 1);
        if (larger == NULL) free(buffer);
        buffer = larger;
    }
    const bool failed = ferror(file) != 0;
    fclose(file);
    if (buffer == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    if (failed) { /* a folder, or a disc error */
        free(buffer);
        return CUDA_ERROR_FILE_NOT_FOUND;
    }
    buffer[used] = 0;
    *bytes = buffer;
    *length = used;
    return CUDA_SUCCESS;
}

bool shim_image_check(const void *bytes, size_t length)
{
    uint64_t used;
    /* The NUL that shim_image_read_file put behind the bytes ends PTX text. */
    return vgpu_image_length(bytes, length + 1, &used) != VGPU_IMAGE_NONE;
}
