/* SPDX-License-Identifier: Apache-2.0 */
/*
 * graph_memory_node.c - memory nodes, made by hand and captured, and the addresses that they have.
 *
 * An allocation node has its address from the day it is made, for as long as a graph or an instance names it or something is allocated
 * there. Which addresses may be freed is known here: those that a launch has allocated and nobody has freed. Nothing is charged here:
 * a node costs nothing before it is launched (graph_memory.c). Graphs with memory nodes are never copied or taken apart: CUDA forbids
 * it, and what is known of addresses rests on it.
 */
#include "graph_memory.h"

#include "internal.h"

#define BLOCKS_MOST (1u << 20) /* of 48 bytes and more: a session that never frees must not take the host's memory with it */
enum { NONE, ACTIVE };

struct replay_graph_memory *graph_memory_table(struct vgpu_replay *replay)
{
    struct replay_code *code = code_of(replay);
    if (code != NULL && code->graph_memory == NULL) code->graph_memory = calloc(1, sizeof *code->graph_memory);
    return code == NULL ? NULL : code->graph_memory;
}

/* ---- blocks ---- */

static bool is_orphan(const struct graph_block *block) { return block->is_live && block->instances == 0; }

static void drop_if_unknown(struct replay_graph_memory *memory, struct graph_block *block)
{
    if (block->holders != 0 || block->is_live) return;
    struct graph_block *first = code_map_get(&memory->blocks, block->address);
    if (first == block) {
        (void)code_map_take(&memory->blocks, block->address);
        if (block->next != NULL) (void)code_map_put(&memory->blocks, block->address, block->next); /* there is room: its own */
    } else {
        while (first != NULL && first->next != block) first = first->next;
        if (first != NULL) first->next = block->next;
    }
    memory->block_count--;
    free(block);
}

void graph_block_change(struct replay_graph_memory *memory, struct graph_block *block, int holders, int instances, bool is_live)
{
    const bool was_orphan = is_orphan(block);
    block->holders += (uint32_t)holders;
    block->instances += (uint32_t)instances;
    block->is_live = is_live;
    if (was_orphan && !is_orphan(block)) memory->orphaned -= memory->orphaned < block->cost ? memory->orphaned : block->cost;
    if (!was_orphan && is_orphan(block)) memory->orphaned = graph_memory_sum(memory->orphaned, block->cost);
    drop_if_unknown(memory, block);
}

bool graph_blocks_make_room(struct graph_blocks *blocks, size_t more)
{
    if (blocks->capacity - blocks->count >= more) return true;
    const size_t capacity = (blocks->count + more) * 2;
    struct graph_block **bigger = realloc(blocks->item, capacity * sizeof *bigger);
    if (bigger == NULL) return false;
    blocks->item = bigger;
    blocks->capacity = capacity;
    return true;
}

struct graph_block *graph_block_live_at(const struct replay_graph_memory *memory, uint64_t address)
{
    struct graph_block *block = code_map_get(&memory->blocks, address);
    while (block != NULL && !block->is_live) block = block->next;
    return block;
}

/* The one that a free node in that graph is for: its own that is not freed yet, else one of another graph. */
static struct graph_block *to_free_in(const struct replay_graph_memory *memory, const struct code_graph *graph, uint64_t address, bool *is_own)
{
    *is_own = true;
    bool is_of_graph = false;
    for (size_t i = graph->memory == NULL ? 0 : graph->memory->made.count; i-- > 0;) {
        struct graph_block *block = graph->memory->made.item[i];
        if (block->address != address) continue;
        if (!block->freed_inside) return block;
        is_of_graph = true;
    }
    if (is_of_graph) return NULL; /* twice */
    *is_own = false;
    struct graph_block *live = graph_block_live_at(memory, address), *known = live != NULL ? live : code_map_get(&memory->blocks, address);
    while (known != NULL && known->freed_inside) known = known->next;
    return known;
}

static struct graph_memory *memory_of(struct code_graph *graph)
{
    if (graph->memory == NULL) graph->memory = calloc(1, sizeof *graph->memory);
    return graph->memory;
}

/* Everything that could fail, before the driver is asked: what it has added to a graph cannot be taken out again. */
static struct graph_block *prepare(struct vgpu_replay *replay, struct code_graph *graph, uint64_t size)
{
    struct replay_graph_memory *memory = graph_memory_table(replay);
    if (memory == NULL || memory->block_count >= BLOCKS_MOST || memory_of(graph) == NULL || !graph_blocks_make_room(&graph->memory->made, 1) ||
        !code_map_put(&memory->blocks, UINT64_MAX, memory)) /* a place for it: no memory begins there */
        return NULL;
    (void)code_map_take(&memory->blocks, UINT64_MAX);
    struct graph_block *block = calloc(1, sizeof *block);
    if (block != NULL) block->size = size;
    return block;
}

static void adopt(struct vgpu_replay *replay, struct code_graph *graph, struct graph_block *block, uint64_t address)
{
    struct replay_graph_memory *memory = replay->code->graph_memory;
    const uint64_t unit = replay->memory_unit > 1 ? replay->memory_unit : 1;
    block->address = address;
    block->cost = ((graph_memory_sum(address, block->size) - 1) / unit - address / unit + 1) * unit;
    block->holders = 1;
    block->next = code_map_get(&memory->blocks, address);
    (void)code_map_put(&memory->blocks, address, block);
    memory->block_count++;
    graph->memory->made.item[graph->memory->made.count++] = block;
}

static void adopt_free(struct vgpu_replay *replay, struct code_graph *graph, struct graph_block *block, bool is_own)
{
    if (is_own) {
        block->freed_inside = true;
        return;
    }
    graph_block_change(replay->code->graph_memory, block, 1, 0, block->is_live);
    graph->memory->freed.item[graph->memory->freed.count++] = block;
}

void graph_blocks_release(struct replay_graph_memory *memory, struct graph_blocks *blocks, int instances)
{
    for (size_t i = 0; i < blocks->count; i++) graph_block_change(memory, blocks->item[i], -1, -instances, blocks->item[i]->is_live);
    free(blocks->item);
    *blocks = (struct graph_blocks){0};
}

bool graph_blocks_copy(struct graph_blocks *to, const struct graph_blocks *from)
{
    if (!graph_blocks_make_room(to, from->count)) return false;
    if (from->count != 0) memcpy(to->item, from->item, from->count * sizeof *to->item);
    to->count = from->count;
    return true;
}

/* ---- nodes ---- */

/* arguments: graph, dependencies; payload: the dependencies, then a wire_allocation_node; value[1]: the address */
CUresult replay_cuGraphAddMemAllocNode(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *real, **dependencies, *node = NULL;
    uint64_t *edges;
    uint32_t used;
    struct wire_allocation_node wire;
    CUmemAccessDesc access[VGPU_NODE_ACCESS_MOST];
    struct code_graph *graph = code_graph_of(replay, call->argument[0], &real);
    if (graph == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (graph->parent != 0) return CUDA_ERROR_NOT_SUPPORTED; /* what is part of another has no memory nodes */
    CUresult status = code_node_list(replay, payload, call->payload_length, call->argument[1], false, &dependencies, &edges, &used);
    if (status != CUDA_SUCCESS) return status;
    if (call->payload_length - used < sizeof wire) {
        free(dependencies);
        return CUDA_ERROR_INVALID_VALUE;
    }
    memcpy(&wire, (const uint8_t *)payload + used, sizeof wire);
    /* SAFETY: from here on only the private copy is looked at. */
    __asm__ volatile("" : "+m"(wire) : : "memory");
    if (wire.size == 0 || wire.access_count > VGPU_NODE_ACCESS_MOST) status = CUDA_ERROR_INVALID_VALUE;
    for (uint32_t i = 0; status == CUDA_SUCCESS && i < wire.access_count; i++) {
        const int flags = wire.access[i].flags;
        if (wire.access[i].type != CU_MEM_LOCATION_TYPE_DEVICE || (flags != 0 && flags != 1 && flags != 3)) status = CUDA_ERROR_INVALID_VALUE;
        access[i] = (CUmemAccessDesc){.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = replay->device}, .flags = flags};
    }
    if (status == CUDA_SUCCESS && wire.size > INT64_MAX) status = CUDA_ERROR_OUT_OF_MEMORY;
    struct graph_block *block = status == CUDA_SUCCESS ? prepare(replay, graph, wire.size) : NULL;
    if (status == CUDA_SUCCESS && block == NULL) status = CUDA_ERROR_OUT_OF_MEMORY;
    CUDA_MEM_ALLOC_NODE_PARAMS p = {.poolProps = {.allocType = CU_MEM_ALLOCATION_TYPE_PINNED,
                                                  .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = replay->device}},
                                    .accessDescs = wire.access_count != 0 ? access : NULL,
                                    .accessDescCount = wire.access_count,
                                    .bytesize = wire.size};
    if (status == CUDA_SUCCESS)
        status = (CUresult)replay->driver.cuGraphAddMemAllocNode(&node, real, dependencies, call->argument[1], &p);
    free(dependencies);
    if (status != CUDA_SUCCESS) {
        free(block);
        return status;
    }
    adopt(replay, graph, block, p.dptr);
    result->value[0] = code_node_intern(replay, node, graph);
    result->value[1] = p.dptr;
    return result->value[0] == 0 ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

/* arguments: graph, dependencies, address; payload: the dependencies */
CUresult replay_cuGraphAddMemFreeNode(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *real, **dependencies, *node = NULL;
    uint64_t *edges;
    uint32_t used;
    bool is_own;
    struct code_graph *graph = code_graph_of(replay, call->argument[0], &real);
    if (graph == NULL || !graph_memory_is_used(replay)) return CUDA_ERROR_INVALID_VALUE;
    if (graph->parent != 0) return CUDA_ERROR_NOT_SUPPORTED;
    struct graph_block *block = to_free_in(replay->code->graph_memory, graph, call->argument[2], &is_own);
    if (block == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (memory_of(graph) == NULL || !graph_blocks_make_room(&graph->memory->freed, 1)) return CUDA_ERROR_OUT_OF_MEMORY;
    CUresult status = code_node_list(replay, payload, call->payload_length, call->argument[1], false, &dependencies, &edges, &used);
    if (status != CUDA_SUCCESS) return status;
    status = (CUresult)replay->driver.cuGraphAddMemFreeNode(&node, real, dependencies, call->argument[1], call->argument[2]);
    free(dependencies);
    if (status != CUDA_SUCCESS) return status;
    adopt_free(replay, graph, block, is_own);
    result->value[0] = code_node_intern(replay, node, graph);
    return result->value[0] == 0 ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult replay_cuGraphMemAllocNodeGetParams(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *node;
    if (code_graph_of_node(replay, call->argument[0], &node) == NULL) return CUDA_ERROR_INVALID_VALUE;
    CUDA_MEM_ALLOC_NODE_PARAMS p = {0};
    const CUresult status = (CUresult)replay->driver.cuGraphMemAllocNodeGetParams(node, &p);
    if (status != CUDA_SUCCESS) return status;
    struct wire_allocation_node wire = {.address = p.dptr, .size = p.bytesize};
    wire.access_count = p.accessDescs == NULL ? 0 : p.accessDescCount < VGPU_NODE_ACCESS_MOST ? (uint32_t)p.accessDescCount : VGPU_NODE_ACCESS_MOST;
    for (uint32_t i = 0; i < wire.access_count; i++) {
        wire.access[i].type = p.accessDescs[i].location.type;
        wire.access[i].flags = p.accessDescs[i].flags; /* the guest's device is number 0 */
    }
    memcpy(reply, &wire, sizeof wire);
    result->payload_length = sizeof wire;
    return CUDA_SUCCESS;
}

/* value[0]: the address */
CUresult replay_cuGraphMemFreeNodeGetParams(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *node;
    uint64_t address = 0;
    if (code_graph_of_node(replay, call->argument[0], &node) == NULL) return CUDA_ERROR_INVALID_VALUE;
    const CUresult status = (CUresult)replay->driver.cuGraphMemFreeNodeGetParams(node, &address);
    result->value[0] = address;
    return status;
}

/* ---- captures ---- */

CUresult graph_memory_capturing(struct vgpu_replay *replay, void *stream, struct code_graph **graph)
{
    unsigned status = NONE;
    unsigned long long id = 0;
    void *real = NULL, *same;
    *graph = NULL;
    if (replay->private->captures == 0 || stream == NULL) return CUDA_SUCCESS; /* the legacy stream never captures */
    if (replay->driver.cuStreamGetCaptureInfo_v3(stream, &status, &id, &real, NULL, NULL, NULL) != 0 || status != ACTIVE || real == NULL)
        return CUDA_SUCCESS; /* what is wrong with it the driver says to the call itself */
    *graph = code_graph_of(replay, code_graph_intern(replay, real, 0), &same);
    if (*graph == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    return (*graph)->parent != 0 ? CUDA_ERROR_NOT_SUPPORTED : CUDA_SUCCESS; /* captured into a part of another */
}

CUresult graph_memory_capture_allocation(struct vgpu_replay *replay, struct code_graph *graph, uint64_t size, void *pool, void *stream,
                                         struct vgpu_result *result)
{
    uint64_t address = 0;
    if (size == 0) return CUDA_SUCCESS; /* no memory and no error */
    if (size > INT64_MAX) return CUDA_ERROR_OUT_OF_MEMORY;
    struct graph_block *block = prepare(replay, graph, size);
    if (block == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    const CUresult status = (CUresult)replay->driver.cuMemAllocFromPoolAsync(&address, size, pool, stream);
    if (status != CUDA_SUCCESS || address == 0) {
        free(block);
        return status;
    }
    adopt(replay, graph, block, address);
    result->value[0] = address;
    result->value[1] = graph->handle;
    return CUDA_SUCCESS;
}

CUresult graph_memory_capture_free(struct vgpu_replay *replay, struct code_graph *graph, uint64_t address, void *stream,
                                   struct vgpu_result *result)
{
    bool is_own = false;
    struct graph_block *block = graph_memory_is_used(replay) ? to_free_in(replay->code->graph_memory, graph, address, &is_own) : NULL;
    if (block == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (memory_of(graph) == NULL || !graph_blocks_make_room(&graph->memory->freed, 1)) return CUDA_ERROR_OUT_OF_MEMORY;
    const CUresult status = (CUresult)replay->driver.cuMemFreeAsync(address, stream);
    if (status != CUDA_SUCCESS) return status;
    adopt_free(replay, graph, block, is_own);
    result->value[0] = graph->handle;
    return CUDA_SUCCESS;
}
