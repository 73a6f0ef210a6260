/* SPDX-License-Identifier: Apache-2.0 */
/*
 * occupancy.c - occupancy queries, asked of the worker once and remembered for each function.
 *
 * cuBLAS asks the same thirty questions before its first product and runtimes ask one before every launch. The answers
 * depend on the function, its attributes and the arguments only, so they are kept until an attribute is set. The block
 * size callback of cuOccupancyMaxPotentialBlockSize is guest code: the search around it runs here.
 */
#include "code.h"

#include <stdlib.h>

#define REMEMBERED 64 /* answers for one function; the oldest make room */

enum query { ACTIVE_BLOCKS, AVAILABLE_SHARED, ACTIVE_CLUSTERS, CLUSTER_SIZE, BLOCK_SIZE };

struct shim_occupancy {
    struct shim_occupancy *next;
    enum query query;
    uint64_t argument[4];
    uint64_t answer[2];
    CUresult status;
    uint32_t extra_length; /* of a launch configuration */
    uint8_t extra[];
};

void shim_function_forget_occupancy(struct shim_function *function)
{
    pthread_mutex_lock(&shim_code_mutex);
    struct shim_occupancy *entry = function->occupancy;
    function->occupancy = NULL;
    pthread_mutex_unlock(&shim_code_mutex);
    while (entry != NULL) {
        struct shim_occupancy *next = entry->next;
        free(entry);
        entry = next;
    }
}

static bool recall(struct shim_function *function, enum query query, const uint64_t argument[4], const void *extra,
                   uint32_t extra_length, uint64_t answer[2], CUresult *status)
{
    bool found = false;
    pthread_mutex_lock(&shim_code_mutex);
    for (const struct shim_occupancy *e = function->occupancy; e != NULL && !found; e = e->next) {
        if (e->query != query || e->extra_length != extra_length || memcmp(e->argument, argument, sizeof e->argument) != 0) continue;
        if (extra_length != 0 && memcmp(e->extra, extra, extra_length) != 0) continue;
        memcpy(answer, e->answer, sizeof e->answer);
        *status = e->status;
        found = true;
    }
    pthread_mutex_unlock(&shim_code_mutex);
    return found;
}

static void remember(struct shim_function *function, struct shim_occupancy *entry)
{
    struct shim_occupancy *surplus = NULL;
    pthread_mutex_lock(&shim_code_mutex);
    entry->next = function->occupancy;
    function->occupancy = entry;
    struct shim_occupancy **at = &function->occupancy;
    for (unsigned i = 0; i < REMEMBERED && *at != NULL; i++) at = &(*at)->next;
    surplus = *at;
    *at = NULL;
    pthread_mutex_unlock(&shim_code_mutex);
    while (surplus != NULL) {
        struct shim_occupancy *next = surplus->next;
        free(surplus);
        surplus = next;
    }
}

static const unsigned calls[] = {
    [ACTIVE_BLOCKS] = VGPU_CALL_cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags,
    [AVAILABLE_SHARED] = VGPU_CALL_cuOccupancyAvailableDynamicSMemPerBlock,
    [ACTIVE_CLUSTERS] = VGPU_CALL_cuOccupancyMaxActiveClusters,
    [CLUSTER_SIZE] = VGPU_CALL_cuOccupancyMaxPotentialClusterSize,
    [BLOCK_SIZE] = VGPU_CALL_cuOccupancyMaxPotentialBlockSizeWithFlags,
};

static CUresult ask(struct shim_function *function, enum query query, const uint64_t argument[4], const void *extra,
                    uint32_t extra_length, uint64_t answer[2])
{
    CUresult status;
    if (recall(function, query, argument, extra, extra_length, answer, &status)) return status;
    const uint64_t wire[8] = {function->handle, argument[0], argument[1], argument[2], argument[3]};
    uint64_t value[4] = {0};
    status = shim_reply(calls[query], wire, extra, extra_length, value, NULL, 0, NULL);
    answer[0] = value[0];
    answer[1] = value[1];
    /* Refusals of the arguments are as lasting as answers; anything else may be a passing state of the session. */
    if (status != CUDA_SUCCESS && status != CUDA_ERROR_INVALID_VALUE) return status;
    struct shim_occupancy *entry = malloc(sizeof *entry + extra_length);
    if (entry == NULL) return status;
    *entry = (struct shim_occupancy){.query = query, .status = status, .extra_length = extra_length};
    memcpy(entry->argument, argument, sizeof entry->argument);
    memcpy(entry->answer, answer, sizeof entry->answer);
    if (extra_length != 0) memcpy(entry->extra, extra, extra_length);
    remember(function, entry);
    return status;
}

static CUresult begin(const void *out, CUfunction handle, struct shim_function **function)
{
    const CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if (out == NULL) return CUDA_ERROR_INVALID_VALUE;
    *function = shim_function_of(handle);
    return *function == NULL ? CUDA_ERROR_INVALID_HANDLE : CUDA_SUCCESS;
}

static CUresult active_blocks(struct shim_function *function, int block_size, size_t shared, unsigned flags, int *blocks)
{
    const uint64_t argument[4] = {(uint64_t)(int64_t)block_size, shared, flags};
    uint64_t answer[2];
    const CUresult status = ask(function, ACTIVE_BLOCKS, argument, NULL, 0, answer);
    if (status == CUDA_SUCCESS) *blocks = (int)answer[0];
    return status;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *numBlocks, CUfunction func, int blockSize, size_t dynamicSMemSize,
                                                              unsigned int flags)
{
    struct shim_function *function;
    const CUresult status = begin(numBlocks, func, &function);
    return status != CUDA_SUCCESS ? status : active_blocks(function, blockSize, dynamicSMemSize, flags, numBlocks);
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *numBlocks, CUfunction func, int blockSize, size_t dynamicSMemSize)
{
    return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(numBlocks, func, blockSize, dynamicSMemSize, 0);
}

CUresult cuOccupancyAvailableDynamicSMemPerBlock(size_t *dynamicSmemSize, CUfunction func, int numBlocks, int blockSize)
{
    struct shim_function *function;
    CUresult status = begin(dynamicSmemSize, func, &function);
    if (status != CUDA_SUCCESS) return status;
    const uint64_t argument[4] = {(uint64_t)(int64_t)numBlocks, (uint64_t)(int64_t)blockSize};
    uint64_t answer[2];
    status = ask(function, AVAILABLE_SHARED, argument, NULL, 0, answer);
    if (status == CUDA_SUCCESS) *dynamicSmemSize = answer[0];
    return status;
}

/* A launch configuration on the wire: seven dimensions and sizes, the attribute count, the attributes. */
static CUresult cluster_query(int *out, CUfunction func, const void *config, enum query query)
{
    struct shim_function *function;
    CUresult status = begin(out, func, &function);
    if (status != CUDA_SUCCESS) return status;
    if (config == NULL) return CUDA_ERROR_INVALID_VALUE;
    CUlaunchConfig c;
    memcpy(&c, config, sizeof c);
    uint64_t stream_id;
    if ((status = shim_stream(c.hStream, &stream_id)) != CUDA_SUCCESS) return status;
    if (c.numAttrs != 0 && c.attrs == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (c.numAttrs > VGPU_LAUNCH_ATTRIBUTE_LIMIT) return CUDA_ERROR_NOT_SUPPORTED;
    struct {
        uint32_t word[8];
        CUlaunchAttribute attribute[VGPU_LAUNCH_ATTRIBUTE_LIMIT];
    } extra;
    memcpy(extra.word, &c, 7 * sizeof(uint32_t));
    extra.word[7] = c.numAttrs;
    if ((status = shim_launch_attributes(c.attrs, c.numAttrs, extra.attribute)) != CUDA_SUCCESS) return status;
    const uint64_t argument[4] = {stream_id};
    uint64_t answer[2];
    status = ask(function, query, argument, &extra, (uint32_t)(sizeof extra.word + c.numAttrs * sizeof(CUlaunchAttribute)), answer);
    if (status == CUDA_SUCCESS) *out = (int)answer[0];
    return status;
}

CUresult cuOccupancyMaxActiveClusters(int *numClusters, CUfunction func, const void *config)
{
    return cluster_query(numClusters, func, config, ACTIVE_CLUSTERS);
}

CUresult cuOccupancyMaxPotentialClusterSize(int *clusterSize, CUfunction func, const void *config)
{
    return cluster_query(clusterSize, func, config, CLUSTER_SIZE);
}

enum { DEVICE_WARP = 10, DEVICE_PROCESSORS = 16, DEVICE_THREADS = 1, DEVICE_RESIDENT = 39 }; /* CU_DEVICE_ATTRIBUTE_* */

static int device_fact(unsigned attribute, int otherwise)
{
    return shim.device->attribute_valid[attribute] != 0 ? shim.device->attribute[attribute] : otherwise;
}

/* Largest occupancy, and of equals the largest block: from the limit down in steps of a warp. */
static CUresult search(struct shim_function *function, size_t (*shared_of)(int), int limit, unsigned flags, int *grid, int *block)
{
    int most = 0;
    CUresult status = shim_function_attribute(function, 0, &most);
    if (status != CUDA_SUCCESS) return status;
    const int warp = device_fact(DEVICE_WARP, 32);
    if (most > device_fact(DEVICE_THREADS, 1024)) most = device_fact(DEVICE_THREADS, 1024);
    if (limit > 0 && limit < most) most = limit;
    const int resident = device_fact(DEVICE_RESIDENT, 2048);
    int best = 0, best_block = 0, best_blocks = 0;
    for (int aligned = (most + warp - 1) / warp * warp; aligned > 0 && best < resident; aligned -= warp) {
        const int size = aligned < most ? aligned : most;
        int blocks = 0;
        status = active_blocks(function, size, shared_of(size), flags, &blocks);
        if (status != CUDA_SUCCESS) return status;
        if (blocks * size > best) {
            best = blocks * size;
            best_block = size;
            best_blocks = blocks;
        }
    }
    *grid = best_blocks * device_fact(DEVICE_PROCESSORS, 1);
    *block = best_block;
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxPotentialBlockSizeWithFlags(int *minGridSize, int *blockSize, CUfunction func,
                                                   void *blockSizeToDynamicSMemSize, size_t dynamicSMemSize, int blockSizeLimit,
                                                   unsigned int flags)
{
    struct shim_function *function;
    CUresult status = begin(minGridSize, func, &function);
    if (status != CUDA_SUCCESS) return status;
    if (blockSize == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (blockSizeToDynamicSMemSize != NULL) {
        size_t (*shared_of)(int);
        memcpy(&shared_of, &blockSizeToDynamicSMemSize, sizeof shared_of);
        return search(function, shared_of, blockSizeLimit, flags, minGridSize, blockSize);
    }
    const uint64_t argument[4] = {dynamicSMemSize, (uint64_t)(int64_t)blockSizeLimit, flags};
    uint64_t answer[2];
    status = ask(function, BLOCK_SIZE, argument, NULL, 0, answer);
    if (status == CUDA_SUCCESS) {
        *minGridSize = (int)answer[0];
        *blockSize = (int)answer[1];
    }
    return status;
}

CUresult cuOccupancyMaxPotentialBlockSize(int *minGridSize, int *blockSize, CUfunction func, void *blockSizeToDynamicSMemSize,
                                          size_t dynamicSMemSize, int blockSizeLimit)
{
    return cuOccupancyMaxPotentialBlockSizeWithFlags(minGridSize, blockSize, func, blockSizeToDynamicSMemSize, dynamicSMemSize,
                                                     blockSizeLimit, 0);
}
