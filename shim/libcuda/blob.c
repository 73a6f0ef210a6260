/* SPDX-License-Identifier: Apache-2.0 */
/*
 * blob.c - byte strings longer than one record: images to the worker, logs and cubins back.
 *
 * They travel in ring records, not through the arena: a 31 MB cuDNN image must load also when the arena is full of
 * pinned memory, and chunks overlap with the worker copying them out.
 */
#include "code.h"

static _Atomic uint64_t next_blob = 1;

void shim_blob_begin(struct shim_blob *blob, uint64_t total)
{
    blob->id = atomic_fetch_add_explicit(&next_blob, 1, memory_order_relaxed) % VGPU_BLOB_HOST_BASE;
    blob->total = total;
    blob->written = 0;
}

CUresult shim_blob_append(struct shim_blob *blob, const void *bytes, uint64_t length)
{
    const uint8_t *from = bytes;
    while (length > 0) {
        /* Small appends make small records; the callers append a head once and then whole images. */
        const uint32_t chunk = length < VGPU_BLOB_CHUNK ? (uint32_t)length : VGPU_BLOB_CHUNK;
        const uint64_t argument[8] = {blob->id, blob->total, blob->written};
        const CUresult status = shim_async(VGPU_CALL_wireBlobWrite, argument, from, chunk);
        if (status != CUDA_SUCCESS) return status;
        blob->written += chunk;
        from += chunk;
        length -= chunk;
    }
    return CUDA_SUCCESS;
}

CUresult shim_blob_read(uint64_t id, void *out, uint64_t length)
{
    uint64_t offset = 0;
    while (offset < length) {
        const uint64_t argument[8] = {id, offset};
        const uint64_t left = length - offset;
        uint32_t got = 0;
        const CUresult status = shim_reply(VGPU_CALL_wireBlobRead, argument, NULL, 0, NULL, (uint8_t *)out + offset,
                                           left < VGPU_SLOT_PAYLOAD_LIMIT ? (uint32_t)left : VGPU_SLOT_PAYLOAD_LIMIT, &got);
        if (status != CUDA_SUCCESS) return status;
        if (got == 0) return CUDA_ERROR_UNKNOWN; /* the blob is shorter than its maker said */
        offset += got < left ? got : left;
    }
    return CUDA_SUCCESS;
}

CUresult shim_blob_free(uint64_t id)
{
    const uint64_t argument[8] = {id};
    return shim_async(VGPU_CALL_wireBlobFree, argument, NULL, 0);
}
