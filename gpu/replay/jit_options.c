/* SPDX-License-Identifier: Apache-2.0 */
/*
 * jit_options.c - a guest's compiler options, checked, and the compiler's words back to it.
 *
 * Only options whose value is a number are let through: a value that the driver takes for an address would be a guest
 * writing into this process. Log buffers are ours.
 */
#include "code.h"

enum { THREADS = 1, WALL_TIME = 2, INFORMATION_BUFFER = 3, INFORMATION_SIZE = 4, ERROR_BUFFER = 5, ERROR_SIZE = 6 };

/* Options with an integer value (CU_JIT_*): everything but buffers, names, addresses and their counts. */
static bool is_scalar(uint32_t option)
{
    switch (option) {
    case 0: case 1: case 2: case 7: case 8: case 9: case 10: case 11: case 12: case 13: case 14: case 15: case 16:
    case 20: case 21: case 22: case 23: case 24: case 29: case 30: case 31: case 32: case 33: case 34: return true;
    default: return false;
    }
}

static unsigned add(struct code_jit *jit, int option, void *value)
{
    jit->option[jit->count] = option;
    jit->value[jit->count] = value;
    return ++jit->count;
}

static CUresult add_log(struct code_jit *jit, uint64_t size, int buffer_option, char **buffer, unsigned *size_index, uint32_t *capacity)
{
    if (*buffer != NULL || size == 0) return CUDA_SUCCESS;
    if (size > VGPU_LOG_LIMIT) size = VGPU_LOG_LIMIT;
    *buffer = calloc(1, size + 1);
    if (*buffer == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    *capacity = (uint32_t)size;
    add(jit, buffer_option, *buffer);
    *size_index = add(jit, buffer_option + 1, (void *)(uintptr_t)size);
    return CUDA_SUCCESS;
}

CUresult code_jit_read(struct code_jit *jit, const void *payload, uint32_t length, uint64_t count)
{
    memset(jit, 0, sizeof *jit);
    if (count > VGPU_OPTION_LIMIT || count * sizeof(struct wire_option) > length) return CUDA_ERROR_INVALID_VALUE;
    for (uint64_t i = 0; i < count; i++) {
        struct wire_option wire;
        memcpy(&wire, (const uint8_t *)payload + i * sizeof wire, sizeof wire);
        CUresult status = CUDA_SUCCESS;
        if (wire.option == INFORMATION_SIZE)
            status = add_log(jit, wire.value, INFORMATION_BUFFER, &jit->information, &jit->information_size, &jit->information_capacity);
        else if (wire.option == ERROR_SIZE)
            status = add_log(jit, wire.value, ERROR_BUFFER, &jit->error, &jit->error_size, &jit->error_capacity);
        else if (!is_scalar(wire.option))
            status = CUDA_ERROR_NOT_SUPPORTED;
        else {
            const unsigned index = add(jit, (int)wire.option, (void *)(uintptr_t)(uint32_t)wire.value);
            if (wire.option == WALL_TIME) jit->wall_time = index;
            if (wire.option == THREADS) jit->threads = index;
        }
        if (status != CUDA_SUCCESS) {
            code_jit_release(jit);
            return status;
        }
    }
    return CUDA_SUCCESS;
}

void code_jit_answer(struct vgpu_replay *replay, const struct code_jit *jit, struct vgpu_result *result, uint8_t *reply)
{
    struct wire_jit_result wire = {0};
    if (jit->information != NULL) wire.information_length = (uint32_t)strnlen(jit->information, jit->information_capacity);
    if (jit->error != NULL) wire.error_length = (uint32_t)strnlen(jit->error, jit->error_capacity);
    if (jit->wall_time != 0) memcpy(&wire.wall_time_milliseconds, &jit->value[jit->wall_time - 1], sizeof(float));
    if (jit->threads != 0) wire.threads_per_block = (uint32_t)(uintptr_t)jit->value[jit->threads - 1];
    const uint64_t total = (uint64_t)wire.information_length + wire.error_length;
    if (total > VGPU_SLOT_PAYLOAD_LIMIT - sizeof wire) {
        char *both = malloc(total);
        if (both != NULL) {
            memcpy(both, jit->information, wire.information_length);
            memcpy(both + wire.information_length, jit->error, wire.error_length);
            wire.blob = code_blob_make(replay, both, total);
            free(both);
        }
        if (wire.blob == 0) wire.information_length = wire.error_length = 0;
    } else {
        if (wire.information_length != 0) memcpy(reply + sizeof wire, jit->information, wire.information_length);
        if (wire.error_length != 0) memcpy(reply + sizeof wire + wire.information_length, jit->error, wire.error_length);
        result->payload_length = (uint16_t)total;
    }
    memcpy(reply, &wire, sizeof wire);
    result->payload_length = (uint16_t)(result->payload_length + sizeof wire);
}

void code_jit_release(struct code_jit *jit)
{
    free(jit->information);
    free(jit->error);
    jit->information = jit->error = NULL;
}
