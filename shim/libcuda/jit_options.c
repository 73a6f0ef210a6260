/* SPDX-License-Identifier: Apache-2.0 */
/*
 * jit_options.c - options of the compiler inside the driver, both ways.
 *
 * An option's value stands in the pointer itself, or points to a buffer of the caller. No pointer crosses to the worker:
 * log sizes travel, logs come back in the answer and are put into the caller's buffers here. Options that point to
 * tables of names or addresses are refused.
 */
#include "code.h"

#include <stdlib.h>

enum {
    THREADS_PER_BLOCK = 1,
    WALL_TIME = 2,
    INFORMATION_BUFFER = 3,
    INFORMATION_SIZE = 4,
    ERROR_BUFFER = 5,
    ERROR_SIZE = 6,
    SYMBOL_NAMES = 17,
    SYMBOL_ADDRESSES = 18,
    SYMBOL_COUNT = 19,
    KERNEL_NAMES = 25,
    VARIABLE_NAMES = 27,
    OPTION_COUNT = 35,
};

CUresult shim_jit_read(struct shim_jit *jit, unsigned count, const int *options, void **values)
{
    memset(jit, 0, offsetof(struct shim_jit, wire));
    jit->information = jit->error = NULL;
    jit->information_capacity = jit->error_capacity = 0;
    jit->information_size = jit->error_size = jit->wall_time = jit->threads = NULL;
    if (count == 0) return CUDA_SUCCESS;
    if (options == NULL || values == NULL || count > VGPU_OPTION_LIMIT) return CUDA_ERROR_INVALID_VALUE;
    for (unsigned i = 0; i < count; i++) {
        const uint64_t value = (uint64_t)(uintptr_t)values[i];
        struct wire_option wire = {.option = (uint32_t)options[i], .value = value};
        switch (options[i]) {
        case THREADS_PER_BLOCK: jit->threads = &values[i]; break;
        case WALL_TIME:
            jit->wall_time = &values[i];
            wire.value = 0;
            break;
        case INFORMATION_BUFFER: jit->information = values[i]; continue;
        case ERROR_BUFFER: jit->error = values[i]; continue;
        case INFORMATION_SIZE:
            jit->information_size = &values[i];
            jit->information_capacity = (uint32_t)value;
            continue;
        case ERROR_SIZE:
            jit->error_size = &values[i];
            jit->error_capacity = (uint32_t)value;
            continue;
        case SYMBOL_NAMES:
        case SYMBOL_ADDRESSES:
        case SYMBOL_COUNT:
        case KERNEL_NAMES:
        case VARIABLE_NAMES:
            if (value != 0) return CUDA_ERROR_NOT_SUPPORTED;
            continue;
        default:
            if (options[i] < 0 || options[i] >= OPTION_COUNT) return CUDA_ERROR_INVALID_VALUE;
            wire.value = (uint32_t)value; /* every other value is an unsigned int */
        }
        jit->wire[jit->count++] = wire;
    }
    /* A log is wanted when there is a buffer and a size for it. */
    if (jit->information == NULL) jit->information_capacity = 0;
    if (jit->error == NULL) jit->error_capacity = 0;
    if (jit->count + 2 > VGPU_OPTION_LIMIT) return CUDA_ERROR_INVALID_VALUE;
    if (jit->information_capacity != 0)
        jit->wire[jit->count++] = (struct wire_option){.option = INFORMATION_SIZE, .value = jit->information_capacity};
    if (jit->error_capacity != 0)
        jit->wire[jit->count++] = (struct wire_option){.option = ERROR_SIZE, .value = jit->error_capacity};
    return CUDA_SUCCESS;
}

/* Copies a log and its NUL; reports how much of the buffer is used. */
static void put_log(char *buffer, uint32_t capacity, void **size, const char *log, uint32_t length)
{
    if (buffer == NULL || capacity == 0) return;
    if (length > capacity - 1) length = capacity - 1;
    memcpy(buffer, log, length);
    buffer[length] = 0;
    if (size != NULL) *size = (void *)(uintptr_t)(length == 0 ? 0 : length + 1);
}

void shim_jit_finish(const struct shim_jit *jit, const uint8_t *reply, uint32_t length)
{
    struct wire_jit_result result;
    if (length < sizeof result) return;
    memcpy(&result, reply, sizeof result);
    if (result.information_length > VGPU_LOG_LIMIT || result.error_length > VGPU_LOG_LIMIT) return;
    const uint32_t total = result.information_length + result.error_length;
    const char *logs = (const char *)reply + sizeof result;
    char *fetched = NULL;
    if (result.blob != 0) {
        fetched = malloc(total + 1);
        if (fetched == NULL || shim_blob_read(result.blob, fetched, total) != CUDA_SUCCESS) {
            free(fetched);
            return;
        }
        (void)shim_blob_free(result.blob);
        logs = fetched;
    } else if (length - sizeof result < total) {
        return;
    }
    put_log(jit->information, jit->information_capacity, jit->information_size, logs, result.information_length);
    put_log(jit->error, jit->error_capacity, jit->error_size, logs + result.information_length, result.error_length);
    /* The value slot itself holds the answer: a float here, an unsigned int below. */
    if (jit->wall_time != NULL) memcpy(jit->wall_time, &result.wall_time_milliseconds, sizeof(float));
    if (jit->threads != NULL && result.threads_per_block != 0) *jit->threads = (void *)(uintptr_t)result.threads_per_block;
    free(fetched);
}
