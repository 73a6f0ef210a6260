/* SPDX-License-Identifier: Apache-2.0 */
/*
 * blob.c - byte strings longer than a record, both ways. The guest writes one chunk after the other under a number of its
 * own; the worker's own blobs (logs, cubins, long names) are read in slot-sized pieces and freed by the guest. What one
 * session may hold is bounded.
 */
#include "code.h"

static void drop(struct replay_code *code, uint64_t number)
{
    struct code_blob *blob = code_map_take(&code->blobs, number);
    if (blob == NULL) return;
    code->blob_bytes -= blob->total;
    free(blob->bytes);
    free(blob);
}

static struct code_blob *make(struct replay_code *code, uint64_t number, uint64_t total)
{
    if (total > VGPU_BLOB_TOTAL_LIMIT - code->blob_bytes) return NULL;
    struct code_blob *blob = calloc(1, sizeof *blob);
    if (blob == NULL) return NULL;
    blob->bytes = malloc(total + 1);
    blob->total = total;
    if (blob->bytes == NULL || !code_map_put(&code->blobs, number, blob)) {
        free(blob->bytes);
        free(blob);
        return NULL;
    }
    blob->bytes[total] = 0; /* text always ends */
    code->blob_bytes += total;
    return blob;
}

CUresult replay_wireBlobWrite(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    struct replay_code *code = code_of(replay);
    const uint64_t number = call->argument[0], total = call->argument[1], offset = call->argument[2];
    if (code == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    if (number == 0 || number >= VGPU_BLOB_HOST_BASE) return CUDA_ERROR_INVALID_VALUE;
    struct code_blob *blob = code_map_get(&code->blobs, number);
    if (offset == 0) {
        drop(code, number);
        if ((blob = make(code, number, total)) == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    }
    if (blob == NULL || blob->total != total || blob->written != offset || call->payload_length > total - offset)
        return CUDA_ERROR_INVALID_VALUE;
    memcpy(blob->bytes + offset, payload, call->payload_length);
    blob->written += call->payload_length;
    return CUDA_SUCCESS;
}

CUresult replay_wireBlobRead(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    const struct code_blob *blob = replay->code == NULL ? NULL : code_map_get(&replay->code->blobs, call->argument[0]);
    const uint64_t offset = call->argument[1];
    if (blob == NULL || call->argument[0] < VGPU_BLOB_HOST_BASE || offset > blob->total) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t left = blob->total - offset;
    const uint32_t here = left < VGPU_SLOT_PAYLOAD_LIMIT ? (uint32_t)left : VGPU_SLOT_PAYLOAD_LIMIT;
    memcpy(reply, blob->bytes + offset, here);
    result->payload_length = (uint16_t)here;
    return CUDA_SUCCESS;
}

CUresult replay_wireBlobFree(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    if (replay->code != NULL) drop(replay->code, call->argument[0]);
    return CUDA_SUCCESS;
}

uint8_t *code_blob_take(struct vgpu_replay *replay, uint64_t number, uint64_t *size)
{
    struct replay_code *code = replay->code;
    struct code_blob *blob = code == NULL || number >= VGPU_BLOB_HOST_BASE ? NULL : code_map_get(&code->blobs, number);
    if (blob == NULL) return NULL;
    uint8_t *bytes = NULL;
    if (blob->written == blob->total) {
        bytes = blob->bytes;
        *size = blob->total;
        blob->bytes = NULL;
    }
    drop(code, number);
    return bytes;
}

uint64_t code_blob_make(struct vgpu_replay *replay, const void *bytes, uint64_t size)
{
    struct replay_code *code = code_of(replay);
    if (code == NULL) return 0;
    const uint64_t number = VGPU_BLOB_HOST_BASE + ++code->next_blob;
    struct code_blob *blob = make(code, number, size);
    if (blob == NULL) return 0;
    memcpy(blob->bytes, bytes, size);
    blob->written = size;
    return number;
}
