/* SPDX-License-Identifier: Apache-2.0 */
/*
 * launch.c - kernel launches: one record, packed here, replayed by the worker with one packed buffer.
 *
 * The hottest path of the library. It takes no lock besides the ring's, allocates nothing and asks nobody: parameter
 * offsets and limits came with the function's look-up. What the driver refuses at once is refused at once: the plain
 * cases here; a launch that only looks odd (beyond the function's own limits, strange clusters, any launch while a
 * stream captures) is sent as a round trip, so that the driver's own answer comes back.
 */
#include "code.h"

#include <limits.h>
#include <stdlib.h>

#define INLINE_PARAMETERS 1024 /* bytes packed on the stack; nearly all kernels have fewer */

enum { MAX_THREADS = 1, MAX_BLOCK_X, MAX_BLOCK_Y, MAX_BLOCK_Z, MAX_GRID_X, MAX_GRID_Y, MAX_GRID_Z }; /* CU_DEVICE_ATTRIBUTE_* */
enum { FUNCTION_MAX_THREADS = 0, FUNCTION_MAX_DYNAMIC_SHARED = 8, FUNCTION_CLUSTER_WIDTH = 11 };      /* CU_FUNC_ATTRIBUTE_* */
enum { /* CU_LAUNCH_ATTRIBUTE_* */
    ATTRIBUTE_IGNORE = 0,
    ATTRIBUTE_COOPERATIVE = 2,
    ATTRIBUTE_CLUSTER = 4,
    ATTRIBUTE_PROGRAMMATIC_SERIALIZATION = 6,
    ATTRIBUTE_PROGRAMMATIC_EVENT = 7,
    ATTRIBUTE_PRIORITY = 8,
    ATTRIBUTE_COMPLETION_EVENT = 12,
    ATTRIBUTE_DEVICE_UPDATABLE = 13,
    ATTRIBUTE_HOLE = 15,
    ATTRIBUTE_LAST = 17,
};

struct geometry { unsigned grid[3], block[3], shared; };
enum verdict { LAUNCH_PLAIN, LAUNCH_ODD, LAUNCH_REFUSED };

static unsigned device_limit(unsigned attribute)
{
    return shim.device->attribute_valid[attribute] != 0 ? (unsigned)shim.device->attribute[attribute] : (unsigned)INT_MAX;
}

/* A block shape as one word; never 0. */
static uint64_t shape(const struct geometry *g) { return g->block[0] | (uint64_t)g->block[1] << 21 | (uint64_t)g->block[2] << 42; }

/* A kernel compiled for one block shape (.reqntid) is refused with any other, and nothing the driver tells beforehand
 * gives that away. So a function's first launch asks, and the first with a second shape: one that has taken two takes any. */
static bool block_is_known(const struct shim_function *function, const struct geometry *g)
{
    const uint64_t known = atomic_load_explicit(&function->block, memory_order_relaxed);
    return known == SHIM_ANY_BLOCK || known == shape(g);
}

static void learn_block(struct shim_function *function, const struct geometry *g)
{
    uint64_t known = 0;
    if (atomic_compare_exchange_strong(&function->block, &known, shape(g)) || known == shape(g)) return;
    atomic_store_explicit(&function->block, SHIM_ANY_BLOCK, memory_order_relaxed);
}

static enum verdict judge(const struct shim_function *function, const struct geometry *g)
{
    for (unsigned i = 0; i < 3; i++) {
        if (g->grid[i] == 0 || g->grid[i] > device_limit(MAX_GRID_X + i)) return LAUNCH_REFUSED;
        if (g->block[i] == 0 || g->block[i] > device_limit(MAX_BLOCK_X + i)) return LAUNCH_REFUSED;
    }
    const uint64_t threads = (uint64_t)g->block[0] * g->block[1] * g->block[2]; /* each at most 2^31, z at most 64 */
    if (threads > device_limit(MAX_THREADS)) return LAUNCH_REFUSED;
    const int most = atomic_load_explicit(&function->attribute[FUNCTION_MAX_THREADS], memory_order_relaxed);
    const int shared = atomic_load_explicit(&function->attribute[FUNCTION_MAX_DYNAMIC_SHARED], memory_order_relaxed);
    if (threads > (uint64_t)most || g->shared > (unsigned)shared) return LAUNCH_ODD;
    if (!block_is_known(function, g)) return LAUNCH_ODD;
    for (unsigned i = 0; i < 3; i++) {
        /* A kernel compiled for clusters of one shape: the grid must be made of them. */
        const int cluster = atomic_load_explicit(&function->attribute[FUNCTION_CLUSTER_WIDTH + i], memory_order_relaxed);
        if (__builtin_expect(cluster > 1, 0) && g->grid[i] % (unsigned)cluster != 0) return LAUNCH_ODD;
    }
    return LAUNCH_PLAIN;
}

/* extra: CU_LAUNCH_PARAM_BUFFER_POINTER (1), CU_LAUNCH_PARAM_BUFFER_SIZE (2), CU_LAUNCH_PARAM_END (0). */
static CUresult read_extra(void **extra, const void **buffer, size_t *size)
{
    const void *from = NULL;
    const size_t *length = NULL;
    for (unsigned i = 0; extra[i] != NULL; i += 2) {
        if (i >= 4) return CUDA_ERROR_INVALID_VALUE;
        if (extra[i] == (void *)1)
            from = extra[i + 1];
        else if (extra[i] == (void *)2)
            length = extra[i + 1];
        else
            return CUDA_ERROR_INVALID_VALUE;
    }
    *size = length == NULL ? 0 : *length;
    *buffer = from;
    return from == NULL && *size != 0 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult shim_pack_parameters(struct shim_function *function, void **parameters, void **extra, uint8_t *space, size_t capacity,
                              uint8_t **packed, uint32_t *length)
{
    *packed = space;
    *length = 0;
    const void *buffer = NULL;
    size_t size = function->parameter_bytes;
    if (parameters == NULL) {
        if (extra == NULL) return function->parameter_count == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
        const CUresult status = read_extra(extra, &buffer, &size);
        if (status != CUDA_SUCCESS) return status;
        if (size > VGPU_PARAMETER_BYTES_LIMIT + 64) return CUDA_ERROR_INVALID_VALUE;
    } else if (extra != NULL) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    const size_t padded = vgpu_align16(size);
    uint8_t *to = space;
    if (padded > capacity && (to = malloc(padded)) == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    if (parameters == NULL) {
        if (size != 0) memcpy(to, buffer, size);
        memset(to + size, 0, padded - size);
    } else {
        memset(to, 0, padded); /* what lies between parameters is not the stack's business with the host */
        const struct wire_parameter *parameter = function->parameter;
        for (uint32_t i = 0; i < function->parameter_count; i++) {
            uint8_t *at = to + parameter[i].offset;
            if (parameter[i].size == 8)
                memcpy(at, parameters[i], 8);
            else if (parameter[i].size == 4)
                memcpy(at, parameters[i], 4);
            else
                memcpy(at, parameters[i], parameter[i].size);
        }
    }
    *packed = to;
    *length = (uint32_t)size;
    return CUDA_SUCCESS;
}

CUresult shim_launch_attributes(const CUlaunchAttribute *attributes, unsigned count, CUlaunchAttribute *out)
{
    for (unsigned i = 0; i < count; i++) {
        const CUlaunchAttribute *from = &attributes[i];
        if (from->id > ATTRIBUTE_LAST || from->id == ATTRIBUTE_HOLE) return CUDA_ERROR_INVALID_VALUE;
        out[i] = *from;
        memset(out[i].pad, 0, sizeof out[i].pad);
        if (from->id == ATTRIBUTE_PROGRAMMATIC_EVENT || from->id == ATTRIBUTE_COMPLETION_EVENT) {
            if (!shim_handle_valid(VGPU_KIND_EVENT, from->value.quads[0])) return CUDA_ERROR_INVALID_HANDLE;
        } else if (from->id == ATTRIBUTE_DEVICE_UPDATABLE && from->value.words[0] != 0) {
            return CUDA_ERROR_NOT_SUPPORTED; /* would hand out a pointer that device code follows */
        }
    }
    return CUDA_SUCCESS;
}

/* Attributes that are sure to be fine in a launch that is fine without them. */
static bool attributes_are_plain(const struct shim_function *function, const CUlaunchAttribute *attributes, unsigned count,
                                 const struct geometry *g)
{
    for (unsigned i = 0; i < count; i++) {
        const unsigned *word = attributes[i].value.words;
        switch (attributes[i].id) {
        case ATTRIBUTE_IGNORE:
        case ATTRIBUTE_PROGRAMMATIC_SERIALIZATION:
        case ATTRIBUTE_PRIORITY: break;
        case ATTRIBUTE_CLUSTER: {
            uint64_t blocks = 1;
            /* Compiled for clusters of a shape of its own: any other is refused. */
            if (atomic_load_explicit(&function->attribute[FUNCTION_CLUSTER_WIDTH], memory_order_relaxed) != 0) return false;
            for (unsigned d = 0; d < 3; d++) {
                if (word[d] == 0 || word[d] > g->grid[d] || g->grid[d] % word[d] != 0) return false;
                blocks *= word[d];
            }
            if (blocks > 8) return false; /* more than 8 is not portable: the function must allow it */
            break;
        }
        case ATTRIBUTE_COOPERATIVE:
            if (word[0] != 0) return false; /* the whole grid must fit on the device at once */
            break;
        default: return false;
        }
    }
    return true;
}

/* CUDA_LAUNCH_BLOCKING, read once. A captured launch has nothing to wait for. */
CUresult shim_launch_blocking(void)
{
    static _Atomic int wanted = -1;
    int value = atomic_load_explicit(&wanted, memory_order_relaxed);
    if (__builtin_expect(value < 0, 0)) {
        const char *text = secure_getenv("CUDA_LAUNCH_BLOCKING");
        value = text != NULL && atoi(text) != 0;
        atomic_store_explicit(&wanted, value, memory_order_relaxed);
    }
    if (__builtin_expect(value == 0, 1)) return CUDA_SUCCESS;
    return atomic_load(&shim_captures_active) != 0 ? CUDA_SUCCESS : cuCtxSynchronize();
}

static inline CUresult launch(CUfunction f, const struct geometry *g, CUstream stream, void **parameters, void **extra,
                              const CUlaunchAttribute *attributes, unsigned attribute_count, bool cooperative)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    struct shim_function *function = shim_function_of(f);
    if (function == NULL) return CUDA_ERROR_INVALID_HANDLE;
    uint64_t stream_id;
    if ((status = shim_stream(stream, &stream_id)) != CUDA_SUCCESS) return status;
    if ((status = shim_function_describe(function)) != CUDA_SUCCESS) return status;
    if (function->status != CUDA_SUCCESS) return function->status;
    enum verdict verdict = judge(function, g);
    /* A captured launch is answered by the driver: what is wrong with it spoils the capture at once. */
    if (__builtin_expect(atomic_load_explicit(&shim_captures_active, memory_order_relaxed) != 0, 0)) verdict = LAUNCH_ODD;
    if (verdict == LAUNCH_REFUSED) return CUDA_ERROR_INVALID_VALUE;
    CUlaunchAttribute carried[VGPU_LAUNCH_ATTRIBUTE_LIMIT];
    if (attribute_count != 0) {
        if (attributes == NULL) return CUDA_ERROR_INVALID_VALUE;
        if (attribute_count > VGPU_LAUNCH_ATTRIBUTE_LIMIT) return CUDA_ERROR_NOT_SUPPORTED;
        if ((status = shim_launch_attributes(attributes, attribute_count, carried)) != CUDA_SUCCESS) return status;
        if (!attributes_are_plain(function, carried, attribute_count, g)) verdict = LAUNCH_ODD;
    }
    if (cooperative) verdict = LAUNCH_ODD;
    uint8_t space[INLINE_PARAMETERS] __attribute__((aligned(16)));
    uint8_t *packed;
    uint32_t length;
    status = shim_pack_parameters(function, parameters, extra, space, sizeof space, &packed, &length);
    if (status != CUDA_SUCCESS) return status;
    /* A buffer of the caller's own that is not the table's size: the driver may refuse it. */
    if (length != function->parameter_bytes) verdict = LAUNCH_ODD;
    const uint64_t argument[8] = {
        function->handle,
        g->grid[0] | (uint64_t)g->grid[1] << 32,
        g->grid[2] | (uint64_t)g->block[0] << 32,
        g->block[1] | (uint64_t)g->block[2] << 32,
        g->shared | (uint64_t)attribute_count << 32,
        stream_id,
        length | (uint64_t)cooperative << 32,
    };
    const uint32_t padded = (uint32_t)vgpu_align16(length);
    const uint32_t attribute_bytes = attribute_count * VGPU_LAUNCH_ATTRIBUTE_BYTES;
    if (__builtin_expect(verdict == LAUNCH_PLAIN, 1)) {
        status = shim_async2(VGPU_CALL_wireLaunch, argument, packed, padded, carried, attribute_bytes);
    } else {
        uint8_t *joined = malloc(padded + attribute_bytes + 1);
        if (joined == NULL) {
            status = CUDA_ERROR_OUT_OF_MEMORY;
        } else {
            memcpy(joined, packed, padded);
            memcpy(joined + padded, carried, attribute_bytes);
            status = shim_reply(VGPU_CALL_wireLaunch, argument, joined, padded + attribute_bytes, NULL, NULL, 0, NULL);
            if (status == CUDA_SUCCESS) learn_block(function, g);
            free(joined);
        }
    }
    if (packed != space) free(packed);
    return status == CUDA_SUCCESS ? shim_launch_blocking() : status;
}

CUresult cuLaunchKernel(CUfunction f, unsigned int gridDimX, unsigned int gridDimY, unsigned int gridDimZ, unsigned int blockDimX,
                        unsigned int blockDimY, unsigned int blockDimZ, unsigned int sharedMemBytes, CUstream hStream,
                        void *kernelParams, void *extra)
{
    const struct geometry g = {{gridDimX, gridDimY, gridDimZ}, {blockDimX, blockDimY, blockDimZ}, sharedMemBytes};
    return launch(f, &g, hStream, kernelParams, extra, NULL, 0, false);
}

CUresult cuLaunchKernelEx(const void *config, CUfunction f, void *kernelParams, void *extra)
{
    if (config == NULL) return CUDA_ERROR_INVALID_VALUE;
    CUlaunchConfig c;
    memcpy(&c, config, sizeof c);
    const struct geometry g = {{c.gridDimX, c.gridDimY, c.gridDimZ}, {c.blockDimX, c.blockDimY, c.blockDimZ}, c.sharedMemBytes};
    return launch(f, &g, c.hStream, kernelParams, extra, c.attrs, c.numAttrs, false);
}

CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned int gridDimX, unsigned int gridDimY, unsigned int gridDimZ,
                                   unsigned int blockDimX, unsigned int blockDimY, unsigned int blockDimZ,
                                   unsigned int sharedMemBytes, CUstream hStream, void *kernelParams)
{
    const struct geometry g = {{gridDimX, gridDimY, gridDimZ}, {blockDimX, blockDimY, blockDimZ}, sharedMemBytes};
    return launch(f, &g, hStream, kernelParams, NULL, NULL, 0, true);
}
