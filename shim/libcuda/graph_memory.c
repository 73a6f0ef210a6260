/* SPDX-License-Identifier: Apache-2.0 */
/*
 * graph_memory.c - memory nodes of graphs: their addresses in the table of what a pointer is.
 *
 * A node's address is the program's from the day the node is made until neither the graph nor an instance of it is there and
 * nothing is allocated at it, so that is how long it is device memory here. Nodes of one graph may share addresses, if
 * they are never allocated together; the table wants each address once, so what overlaps stands there as one range.
 * What is allocated is known by launches and frees, and only that may be freed. The worker keeps the same records, and decides.
 */
#include "code.h"
#include "memory.h"

#include <stdlib.h>

struct shim_block {
    uint64_t address, size;
    struct shim_block *next, *before;
    unsigned holders;   /* graphs and instances */
    bool freed_inside;  /* by a node of its graph */
    bool is_live;
    bool is_alone;      /* no other shares its addresses: the range in the table is its own */
};

struct blocks { struct shim_block **item; size_t count, capacity; };
struct shim_memory {
    struct blocks made, freed;
    struct blocks left; /* of an instance: what a launch leaves allocated */
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct shim_block *blocks;

/* ---- the table of ranges. Mutex held in all of this. ---- */

static bool overlaps(const struct shim_block *block, uint64_t from, uint64_t to) { return block->address < to && block->address + block->size > from; }

static bool show(uint64_t from, uint64_t to)
{
    const struct shim_range range = {.base = from, .size = to - from, .device_address = from, .kind = SHIM_RANGE_GRAPH};
    return shim_map_add(&shim_memory_map, &range);
}

static void hide(uint64_t from, uint64_t to)
{
    struct shim_range range;
    while (shim_map_next(&shim_memory_map, from, &range) && range.base < to) {
        if (range.kind == SHIM_RANGE_GRAPH) (void)shim_map_remove(&shim_memory_map, range.base, NULL);
        from = range.base + range.size;
    }
}

/* Shows everything that hangs together with [from, to) anew. */
static void show_again(uint64_t from, uint64_t to)
{
    for (bool grows = true; grows;) {
        grows = false;
        for (struct shim_block *b = blocks; b != NULL; b = b->next)
            if (overlaps(b, from, to) && (b->address < from || b->address + b->size > to)) {
                from = b->address < from ? b->address : from;
                to = b->address + b->size > to ? b->address + b->size : to;
                grows = true;
            }
    }
    hide(from, to);
    while (from < to) { /* one piece after the other: the first that begins there, and all that overlap it */
        uint64_t begin = UINT64_MAX, end = 0;
        for (struct shim_block *b = blocks; b != NULL; b = b->next)
            if (b->address >= from && b->address < to && b->address < begin) begin = b->address;
        if (begin == UINT64_MAX) return;
        for (bool grows = true; grows;) {
            grows = false;
            for (struct shim_block *b = blocks; b != NULL; b = b->next)
                if (b->address >= begin && (b->address == begin || b->address < end) && b->address + b->size > end) {
                    end = b->address + b->size;
                    grows = true;
                }
        }
        (void)show(begin, end);
        from = end;
    }
}

static void drop(struct shim_block *block)
{
    if (block->holders != 0 || block->is_live) return;
    if (block->before != NULL) block->before->next = block->next;
    else blocks = block->next;
    if (block->next != NULL) block->next->before = block->before;
    if (block->is_alone)
        (void)shim_map_remove(&shim_memory_map, block->address, NULL);
    else
        show_again(block->address, block->address + block->size);
    free(block);
}

/* ---- records ---- */

static bool add_block(struct blocks *list, struct shim_block *block)
{
    if (list->count == list->capacity) {
        const size_t larger = list->capacity == 0 ? 8 : list->capacity * 2;
        struct shim_block **grown = realloc(list->item, larger * sizeof *grown);
        if (grown == NULL) return false;
        list->item = grown;
        list->capacity = larger;
    }
    list->item[list->count++] = block;
    return true;
}

static struct shim_memory *memory_of(struct shim_graph *graph)
{
    if (graph->memory == NULL) graph->memory = calloc(1, sizeof *graph->memory);
    return graph->memory;
}

CUresult shim_memory_made(struct shim_graph *graph, uint64_t address, uint64_t size)
{
    memory_reserve_addresses(address, size);
    pthread_mutex_lock(&mutex);
    struct shim_memory *memory = memory_of(graph);
    struct shim_block *block = memory == NULL ? NULL : calloc(1, sizeof *block);
    CUresult status = CUDA_ERROR_OUT_OF_MEMORY;
    if (block != NULL && add_block(&memory->made, block)) {
        *block = (struct shim_block){.address = address, .size = size, .holders = 1, .next = blocks, .is_alone = true};
        if (blocks != NULL) blocks->before = block;
        blocks = block;
        if (!show(address, address + size)) {
            for (struct shim_block *b = blocks; b != NULL; b = b->next)
                if (overlaps(b, address, address + size)) b->is_alone = false;
            show_again(address, address + size);
        }
        status = CUDA_SUCCESS;
    } else {
        free(block);
    }
    pthread_mutex_unlock(&mutex);
    return status;
}

CUresult shim_memory_freed(struct shim_graph *graph, uint64_t address)
{
    pthread_mutex_lock(&mutex);
    struct shim_memory *memory = memory_of(graph);
    struct shim_block *own = NULL, *other = NULL;
    for (size_t i = 0; memory != NULL && i < memory->made.count; i++)
        if (memory->made.item[i]->address == address && !memory->made.item[i]->freed_inside) own = memory->made.item[i];
    for (struct shim_block *b = blocks; own == NULL && b != NULL; b = b->next)
        if (b->address == address && !b->freed_inside && (other == NULL || b->is_live)) other = b;
    if (own != NULL) own->freed_inside = true;
    if (memory != NULL && other != NULL && add_block(&memory->freed, other)) other->holders++;
    pthread_mutex_unlock(&mutex);
    return memory == NULL ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

struct shim_memory *shim_memory_copy(const struct shim_graph *graph)
{
    if (graph->memory == NULL) return NULL;
    struct shim_memory *copy = calloc(1, sizeof *copy);
    pthread_mutex_lock(&mutex);
    for (size_t i = 0; copy != NULL && i < graph->memory->made.count; i++) {
        struct shim_block *block = graph->memory->made.item[i];
        if (add_block(&copy->made, block)) block->holders++;
        if (!block->freed_inside) (void)add_block(&copy->left, block);
    }
    for (size_t i = 0; copy != NULL && i < graph->memory->freed.count; i++)
        if (add_block(&copy->freed, graph->memory->freed.item[i])) graph->memory->freed.item[i]->holders++;
    pthread_mutex_unlock(&mutex);
    return copy;
}

void shim_memory_drop(struct shim_memory *memory)
{
    if (memory == NULL) return;
    struct blocks *const lists[2] = {&memory->made, &memory->freed};
    pthread_mutex_lock(&mutex);
    for (unsigned l = 0; l < 2; l++)
        for (size_t i = 0; i < lists[l]->count; i++) {
            lists[l]->item[i]->holders--;
            drop(lists[l]->item[i]);
        }
    pthread_mutex_unlock(&mutex);
    free(memory->made.item);
    free(memory->freed.item);
    free(memory->left.item);
    free(memory);
}

void shim_memory_launched(struct shim_memory *memory)
{
    pthread_mutex_lock(&mutex);
    for (size_t i = 0; i < memory->left.count; i++) memory->left.item[i]->is_live = true;
    for (size_t i = 0; i < memory->freed.count; i++) memory->freed.item[i]->is_live = false;
    pthread_mutex_unlock(&mutex);
}

bool shim_memory_free(uint64_t address)
{
    pthread_mutex_lock(&mutex);
    struct shim_block *block = blocks;
    while (block != NULL && !(block->address == address && block->is_live)) block = block->next;
    if (block != NULL) {
        block->is_live = false;
        drop(block);
    }
    pthread_mutex_unlock(&mutex);
    return block != NULL;
}

CUresult shim_memory_free_async(uint64_t address, uint64_t stream)
{
    const uint64_t argument[8] = {address, stream};
    if (atomic_load_explicit(&shim_captures_active, memory_order_relaxed) == 0) {
        if (!shim_memory_free(address)) return CUDA_ERROR_INVALID_VALUE;
        return shim_async(VGPU_CALL_cuMemFreeAsync, argument, NULL, 0);
    }
    uint64_t value[4] = {0};
    const CUresult status = shim_reply(VGPU_CALL_cuMemFreeAsync, argument, NULL, 0, value, NULL, 0, NULL);
    if (status != CUDA_SUCCESS) return status;
    if (value[0] == 0) {
        (void)shim_memory_free(address);
        return CUDA_SUCCESS;
    }
    struct shim_graph *graph = shim_graph_adopt(value[0], 0);
    return graph == NULL ? CUDA_ERROR_OUT_OF_MEMORY : shim_memory_freed(graph, address);
}

/* ---- nodes ---- */

CUresult cuGraphAddMemAllocNode(void *phGraphNode, CUgraph hGraph, const void *dependencies, size_t numDependencies, void *nodeParams)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    struct shim_graph *graph = shim_graph_of(hGraph);
    if (nodeParams == NULL || graph == NULL) return CUDA_ERROR_INVALID_VALUE;
    CUDA_MEM_ALLOC_NODE_PARAMS p;
    memcpy(&p, nodeParams, sizeof p);
    if (p.poolProps.allocType != CU_MEM_ALLOCATION_TYPE_PINNED || p.bytesize == 0 || (p.accessDescCount != 0 && p.accessDescs == NULL)) return CUDA_ERROR_INVALID_VALUE;
    /* Memory of the host, and memory that other processes can open. */
    if (p.poolProps.location.type != CU_MEM_LOCATION_TYPE_DEVICE || p.poolProps.handleTypes != 0) return shim_refuse(VGPU_CALL_cuGraphAddMemAllocNode);
    if (p.poolProps.location.id != 0) return CUDA_ERROR_INVALID_DEVICE;
    if (p.accessDescCount > VGPU_NODE_ACCESS_MOST) return CUDA_ERROR_INVALID_VALUE;
    struct wire_allocation_node wire = {.size = p.bytesize, .access_count = (uint32_t)p.accessDescCount};
    for (size_t i = 0; i < p.accessDescCount; i++) {
        const CUmemAccessDesc one = p.accessDescs[i];
        if (one.location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_INVALID_VALUE;
        if (one.location.id != 0) return CUDA_ERROR_INVALID_DEVICE;
        wire.access[i].type = one.location.type;
        wire.access[i].flags = one.flags;
    }
    const uint64_t argument[2] = {0};
    uint64_t value[4] = {0};
    status = shim_node_add(VGPU_CALL_cuGraphAddMemAllocNode, phGraphNode, hGraph, dependencies, numDependencies, &wire, sizeof wire, argument, value);
    if (value[1] != 0) { /* the node is there, also where its handle could not be kept */
        const CUresult made = shim_memory_made(graph, value[1], p.bytesize);
        if (status == CUDA_SUCCESS) status = made;
    }
    if (status == CUDA_SUCCESS) memcpy((uint8_t *)nodeParams + offsetof(CUDA_MEM_ALLOC_NODE_PARAMS, dptr), &value[1], sizeof value[1]);
    return status;
}

CUresult cuGraphAddMemFreeNode(void *phGraphNode, CUgraph hGraph, const void *dependencies, size_t numDependencies, unsigned long long dptr)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    struct shim_graph *graph = shim_graph_of(hGraph);
    if (graph == NULL) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[2] = {dptr};
    uint64_t value[4] = {0};
    status = shim_node_add(VGPU_CALL_cuGraphAddMemFreeNode, phGraphNode, hGraph, dependencies, numDependencies, NULL, 0, argument, value);
    return status != CUDA_SUCCESS ? status : shim_memory_freed(graph, dptr);
}

/* What the answer points to is the node's. */
CUresult cuGraphMemAllocNodeGetParams(CUgraphNode hNode, void *params_out)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    struct shim_node *node = shim_node_of(hNode);
    if (node == NULL || params_out == NULL) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {node->handle};
    struct wire_allocation_node wire;
    uint32_t length = 0;
    status = shim_reply(VGPU_CALL_cuGraphMemAllocNodeGetParams, argument, NULL, 0, NULL, &wire, sizeof wire, &length);
    if (status != CUDA_SUCCESS) return status;
    if (length != sizeof wire || wire.access_count > VGPU_NODE_ACCESS_MOST) return CUDA_ERROR_UNKNOWN;
    CUDA_MEM_ALLOC_NODE_PARAMS p = {.poolProps = {.allocType = CU_MEM_ALLOCATION_TYPE_PINNED,
                                                  .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = 0}},
                                    .accessDescCount = wire.access_count,
                                    .bytesize = wire.size,
                                    .dptr = wire.address};
    if (wire.access_count != 0 && node->parameters == NULL) { /* they never change */
        CUmemAccessDesc *access = calloc(wire.access_count, sizeof *access);
        if (access == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
        for (uint32_t i = 0; i < wire.access_count; i++)
            access[i] = (CUmemAccessDesc){.location = {.type = wire.access[i].type, .id = 0}, .flags = wire.access[i].flags};
        node->parameters = access;
    }
    if (wire.access_count != 0) p.accessDescs = node->parameters;
    memcpy(params_out, &p, sizeof p);
    return CUDA_SUCCESS;
}

CUresult cuGraphMemFreeNodeGetParams(CUgraphNode hNode, void *dptr_out)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    const struct shim_node *node = shim_node_of(hNode);
    if (node == NULL || dptr_out == NULL) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {node->handle};
    uint64_t value[4] = {0};
    status = shim_reply(VGPU_CALL_cuGraphMemFreeNodeGetParams, argument, NULL, 0, value, NULL, 0, NULL);
    if (status == CUDA_SUCCESS) memcpy(dptr_out, &value[0], sizeof value[0]);
    return status;
}
