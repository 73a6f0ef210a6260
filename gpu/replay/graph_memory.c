/* SPDX-License-Identifier: Apache-2.0 */
/*
 * graph_memory.c - memory nodes of graphs.
 *
 * An allocation node has an address from the day it is made, and memory there when the graph is launched or uploaded; the driver
 * keeps the memory for later launches, and may give it from one graph to another. So what counts against the quota is what
 * the driver says that it holds (CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT), and it is asked after everything that may change that.
 *
 * A launch cannot be taken back. So before one that may need more, the most that it can need is charged; then the graph is
 * uploaded, which makes the driver get the memory and runs nothing; and only when what it got is within the quota, whatever the
 * pieces that the driver takes memory in, the graph is launched.
 *
 * Which addresses may be freed is known here too: those that a launch has allocated and nobody has freed. Graphs with memory nodes
 * are never copied or taken apart: CUDA forbids it, and what is counted here rests on it.
 */
#include "graph_memory.h"

#include "allocations.h"
#include "internal.h"

#define BLOCKS_MOST (1u << 20) /* of 48 bytes and more: a session that never frees must not take the host's memory with it */
#define INSTANTIATE_AUTO_FREE 1u
#define INSTANTIATE_UPLOAD 2u
enum { USED_NOW, USED_HIGH, RESERVED_NOW_OF_GRAPHS, RESERVED_HIGH };
enum { NONE, ACTIVE };


static struct replay_graph_memory *table(struct vgpu_replay *replay)
{
    struct replay_code *code = code_of(replay);
    if (code != NULL && code->graph_memory == NULL) code->graph_memory = calloc(1, sizeof *code->graph_memory);
    return code == NULL ? NULL : code->graph_memory;
}

static uint64_t sum(uint64_t a, uint64_t b) { return a + b < a ? UINT64_MAX : a + b; }

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

static void change(struct replay_graph_memory *memory, struct graph_block *block, int holders, int instances, bool is_live)
{
    const bool was_orphan = is_orphan(block);
    block->holders += (uint32_t)holders;
    block->instances += (uint32_t)instances;
    block->is_live = is_live;
    if (was_orphan && !is_orphan(block)) memory->orphaned -= memory->orphaned < block->cost ? memory->orphaned : block->cost;
    if (!was_orphan && is_orphan(block)) memory->orphaned = sum(memory->orphaned, block->cost);
    drop_if_unknown(memory, block);
}

static bool make_room_in(struct graph_blocks *blocks, size_t more)
{
    if (blocks->capacity - blocks->count >= more) return true;
    const size_t capacity = (blocks->count + more) * 2;
    struct graph_block **bigger = realloc(blocks->item, capacity * sizeof *bigger);
    if (bigger == NULL) return false;
    blocks->item = bigger;
    blocks->capacity = capacity;
    return true;
}

static struct graph_block *live_at(const struct replay_graph_memory *memory, uint64_t address)
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
    struct graph_block *live = live_at(memory, address), *known = live != NULL ? live : code_map_get(&memory->blocks, address);
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
    struct replay_graph_memory *memory = table(replay);
    if (memory == NULL || memory->block_count >= BLOCKS_MOST || memory_of(graph) == NULL || !make_room_in(&graph->memory->made, 1) ||
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
    block->cost = ((sum(address, block->size) - 1) / unit - address / unit + 1) * unit;
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
    change(replay->code->graph_memory, block, 1, 0, block->is_live);
    graph->memory->freed.item[graph->memory->freed.count++] = block;
}

static void release_blocks(struct replay_graph_memory *memory, struct graph_blocks *blocks, int instances)
{
    for (size_t i = 0; i < blocks->count; i++) change(memory, blocks->item[i], -1, -instances, blocks->item[i]->is_live);
    free(blocks->item);
    *blocks = (struct graph_blocks){0};
}

static bool copy_blocks(struct graph_blocks *to, const struct graph_blocks *from)
{
    if (!make_room_in(to, from->count)) return false;
    if (from->count != 0) memcpy(to->item, from->item, from->count * sizeof *to->item);
    to->count = from->count;
    return true;
}

/* ---- what is needed, and what is held ---- */

static int by_address(const void *a, const void *b)
{
    const struct graph_block *const *first = a, *const *second = b;
    return (*first)->address < (*second)->address ? -1 : (*first)->address > (*second)->address;
}

/* Memory is given to addresses: no more than there are, in whole units. */
static uint64_t need_of(const struct vgpu_replay *replay, const struct graph_blocks *made)
{
    const uint64_t unit = replay->memory_unit > 1 ? replay->memory_unit : 1;
    uint64_t units = 0, counted_to = 0;
    struct graph_block **sorted = calloc(made->count + 1, sizeof *sorted);
    for (size_t i = 0; i < made->count; i++)
        if (sorted != NULL)
            sorted[i] = made->item[i];
        else
            units = sum(units, made->item[i]->size / unit + 2); /* more, but never less */
    if (sorted != NULL) qsort(sorted, made->count, sizeof *sorted, by_address);
    for (size_t i = 0; sorted != NULL && i < made->count; i++) {
        uint64_t first = sorted[i]->address / unit, end = (sum(sorted[i]->address, sorted[i]->size) - 1) / unit + 1;
        if (first < counted_to) first = counted_to;
        if (end <= first) continue;
        units = sum(units, end - first);
        counted_to = end;
    }
    free(sorted);
    uint64_t bytes;
    return __builtin_mul_overflow(units, unit, &bytes) ? UINT64_MAX : bytes;
}

static bool ask(struct vgpu_replay *replay, unsigned attribute, uint64_t *bytes)
{
    unsigned long long value = 0;
    if (replay->driver.cuDeviceGetGraphMemAttribute(replay->device, attribute, &value) != 0) return false;
    *bytes = value;
    return true;
}

/* The driver has let go of something; of whose is not known. */
static void none_holds(struct replay_graph_memory *memory)
{
    for (size_t i = 0; i < memory->instances.capacity; i++)
        if (memory->instances.slot[i].key != 0) ((struct graph_instance *)memory->instances.slot[i].value)->holds = false;
    memory->held = 0;
    memory->stamp++;
}

/* Charges what the driver holds now; `pledge` more than `charged` has been charged already. Where it cannot be asked, all of that
 * stays. False: it is more than there was room for. It counts all the same. */
static bool settle(struct vgpu_replay *replay, uint64_t pledge, bool has_limit)
{
    struct replay_graph_memory *memory = replay->code->graph_memory;
    const uint64_t have = sum(memory->charged, pledge);
    uint64_t now;
    bool fits = true;
    if (!ask(replay, RESERVED_NOW_OF_GRAPHS, &now)) now = have;
    if (now < have) replay_memory_release(replay, have - now);
    if (now > have) {
        fits = has_limit && replay_memory_charge(replay, now - have);
        if (!fits) replay_memory_charge_always(replay, now - have);
    }
    if (now < memory->charged) none_holds(memory);
    memory->charged = now;
    return fits;
}

static void set_holds(struct replay_graph_memory *memory, struct graph_instance *instance, bool holds)
{
    if (instance->holds == holds) return;
    instance->holds = holds;
    memory->held = holds ? sum(memory->held, instance->need) : memory->held - (memory->held < instance->need ? memory->held : instance->need);
}

static CUresult trim(struct vgpu_replay *replay)
{
    const CUresult status = (CUresult)replay->driver.cuDeviceGraphMemTrim(replay->device);
    (void)settle(replay, 0, false);
    return status;
}

void graph_memory_settle(struct vgpu_replay *replay, bool keeps_nothing)
{
    if (!graph_memory_is_used(replay) || replay->private->error != 0) return;
    /* A call about the whole device may spoil what is being captured. */
    if (keeps_nothing && replay->private->captures == 0 && replay->code->graph_memory->charged != 0)
        (void)trim(replay);
    else
        (void)settle(replay, 0, false);
}

/* The most by which the driver's memory can grow when the instance is given what it needs. */
static uint64_t growth(struct vgpu_replay *replay, const struct graph_instance *instance)
{
    const struct replay_graph_memory *memory = replay->code->graph_memory;
    uint64_t reserved, used, need = instance->need;
    if (!ask(replay, RESERVED_NOW_OF_GRAPHS, &reserved) || !ask(replay, USED_NOW, &used)) return need;
    if (instance->holds && reserved >= sum(memory->held, memory->orphaned)) return 0; /* nobody's memory has become another's */
    for (size_t i = 0; i < instance->memory.made.count; i++) {
        const struct graph_block *block = instance->memory.made.item[i];
        if (block->is_live) need -= need < block->size ? need : block->size;
    }
    const uint64_t unused = reserved > used ? reserved - used : 0;
    return need > unused ? need - unused : 0;
}

static void given(struct replay_graph_memory *memory, struct graph_instance *instance)
{
    set_holds(memory, instance, true);
    instance->stamp = ++memory->stamp;
}

/* Memory nodes are on that stream: what the driver can let go of it may see only when it is synchronized with. */
static void is_on(struct vgpu_replay *replay, uint64_t stream) { replay_pools_freed(replay, stream); }

/* Has the driver get what the instance needs, within the quota. *pledge: charged, and the driver has not been seen to take it. */
static CUresult provide(struct vgpu_replay *replay, struct graph_instance *instance, void *exec, uint64_t stream, void *real, bool is_upload,
                        uint64_t *pledge)
{
    struct replay_graph_memory *memory = replay->code->graph_memory;
    const bool has_limit = replay_memory_limit(replay) != 0;
    uint64_t more = 0;
    *pledge = 0;
    if (has_limit) {
        if (!is_upload && instance->holds && instance->stamp == memory->stamp) return CUDA_SUCCESS; /* nothing else has run since */
        more = growth(replay, instance);
        if (!replay_memory_charge(replay, more)) {
            replay_pools_settle(replay, REPLAY_POOLS_EMPTY);
            more = growth(replay, instance);
            if (!replay_memory_charge(replay, more)) return CUDA_ERROR_OUT_OF_MEMORY;
        }
    } else if (!is_upload) {
        return CUDA_SUCCESS;
    }
    const CUresult status = (CUresult)replay->driver.cuGraphUpload(exec, real);
    is_on(replay, stream);
    if (!is_upload && status != CUDA_SUCCESS && status != CUDA_ERROR_OUT_OF_MEMORY && !replay_is_sticky(status)) {
        *pledge = more; /* a driver that cannot upload this: what it takes is seen after the launch */
        return CUDA_SUCCESS;
    }
    const bool fits = settle(replay, more, has_limit);
    if (status == CUDA_SUCCESS && (fits || !has_limit)) {
        given(memory, instance);
        return CUDA_SUCCESS;
    }
    set_holds(memory, instance, false);
    replay_pools_settle(replay, REPLAY_POOLS_EMPTY);
    return status != CUDA_SUCCESS ? status : CUDA_ERROR_OUT_OF_MEMORY;
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
    if (memory_of(graph) == NULL || !make_room_in(&graph->memory->freed, 1)) return CUDA_ERROR_OUT_OF_MEMORY;
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
    if (memory_of(graph) == NULL || !make_room_in(&graph->memory->freed, 1)) return CUDA_ERROR_OUT_OF_MEMORY;
    const CUresult status = (CUresult)replay->driver.cuMemFreeAsync(address, stream);
    if (status != CUDA_SUCCESS) return status;
    adopt_free(replay, graph, block, is_own);
    result->value[0] = graph->handle;
    return CUDA_SUCCESS;
}

CUresult graph_memory_free(struct vgpu_replay *replay, uint64_t address, uint64_t stream, void *real, bool at_once)
{
    struct graph_block *block = graph_memory_is_used(replay) ? live_at(replay->code->graph_memory, address) : NULL;
    if (block == NULL) return CUDA_ERROR_INVALID_VALUE;
    const CUresult status = (CUresult)(at_once ? replay->driver.cuMemFree_v2(address) : replay->driver.cuMemFreeAsync(address, real));
    if (status != CUDA_SUCCESS) return status;
    change(replay->code->graph_memory, block, 0, 0, false);
    if (!at_once) replay_pools_freed(replay, stream);
    (void)settle(replay, 0, false);
    return CUDA_SUCCESS;
}

/* ---- instances ---- */

static void discard(struct replay_graph_memory *memory, struct graph_instance *instance)
{
    if (instance == NULL) return;
    set_holds(memory, instance, false);
    release_blocks(memory, &instance->memory.made, 1);
    release_blocks(memory, &instance->memory.freed, 1);
    free(instance->left.item);
    free(instance);
}

static struct graph_instance *instance_of(struct vgpu_replay *replay, const struct code_graph *graph, bool frees_itself)
{
    struct replay_graph_memory *memory = table(replay);
    struct graph_instance *instance = memory == NULL ? NULL : calloc(1, sizeof *instance);
    if (instance == NULL) return NULL;
    instance->frees_itself = frees_itself;
    if (graph->memory != NULL &&
        (!copy_blocks(&instance->memory.made, &graph->memory->made) || !copy_blocks(&instance->memory.freed, &graph->memory->freed) ||
         !make_room_in(&instance->left, graph->memory->made.count))) {
        free(instance->memory.made.item);
        free(instance->memory.freed.item);
        free(instance);
        return NULL;
    }
    for (size_t i = 0; i < instance->memory.made.count; i++)
        if (!instance->memory.made.item[i]->freed_inside) instance->left.item[instance->left.count++] = instance->memory.made.item[i];
    for (size_t i = 0; i < instance->memory.made.count; i++)
        change(memory, instance->memory.made.item[i], 1, 1, instance->memory.made.item[i]->is_live);
    for (size_t i = 0; i < instance->memory.freed.count; i++)
        change(memory, instance->memory.freed.item[i], 1, 1, instance->memory.freed.item[i]->is_live);
    instance->need = need_of(replay, &instance->memory.made);
    return instance;
}

struct graph_instance *graph_memory_instance(struct vgpu_replay *replay, uint64_t handle)
{
    return graph_memory_is_used(replay) ? code_map_get(&replay->code->graph_memory->instances, handle) : NULL;
}

CUresult graph_memory_instantiate_begin(struct vgpu_replay *replay, const struct code_graph *graph, uint64_t flags,
                                        struct graph_instance **instance, uint64_t *pledge)
{
    *instance = NULL;
    *pledge = 0;
    if (!graph_memory_is_in(graph)) return CUDA_SUCCESS;
    *instance = instance_of(replay, graph, (flags & INSTANTIATE_AUTO_FREE) != 0);
    if (*instance == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    if ((flags & INSTANTIATE_UPLOAD) == 0 || replay_memory_limit(replay) == 0) return CUDA_SUCCESS;
    *pledge = growth(replay, *instance);
    if (replay_memory_charge(replay, *pledge)) return CUDA_SUCCESS;
    replay_pools_settle(replay, REPLAY_POOLS_EMPTY);
    *pledge = growth(replay, *instance);
    if (replay_memory_charge(replay, *pledge)) return CUDA_SUCCESS;
    discard(replay->code->graph_memory, *instance);
    *instance = NULL;
    *pledge = 0;
    return CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult graph_memory_instantiate_end(struct vgpu_replay *replay, CUresult status, uint64_t flags, uint64_t stream, uint64_t handle,
                                      void *exec, struct graph_instance *instance, uint64_t pledge)
{
    if (instance == NULL) return status;
    if ((flags & INSTANTIATE_UPLOAD) != 0) is_on(replay, stream);
    struct replay_graph_memory *memory = replay->code->graph_memory;
    const bool has_limit = replay_memory_limit(replay) != 0, fits = settle(replay, pledge, has_limit);
    struct graph_instance *before = handle == 0 ? NULL : code_map_take(&memory->instances, handle);
    discard(memory, before); /* of a handle that ended with its context */
    if (status == CUDA_SUCCESS && (!has_limit || fits) && code_map_put(&memory->instances, handle, instance)) {
        if ((flags & INSTANTIATE_UPLOAD) != 0) given(memory, instance);
        return CUDA_SUCCESS;
    }
    if (status == CUDA_SUCCESS) {
        replay_unbind(replay, VGPU_KIND_EXEC, handle);
        (void)replay->driver.cuGraphExecDestroy(exec);
        status = CUDA_ERROR_OUT_OF_MEMORY;
    }
    discard(memory, instance);
    replay_pools_settle(replay, REPLAY_POOLS_EMPTY);
    return status;
}

CUresult graph_memory_update(struct vgpu_replay *replay, uint64_t handle, const struct code_graph *graph, void *exec, void *real,
                             int (*update)(void *, void *, void *), void *result)
{
    struct graph_instance *before = graph_memory_instance(replay, handle);
    if (before == NULL && !graph_memory_is_in(graph)) return (CUresult)update(exec, real, result);
    struct graph_instance *after = instance_of(replay, graph, before != NULL && before->frees_itself);
    if (after == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    struct replay_graph_memory *memory = replay->code->graph_memory;
    const CUresult status = (CUresult)update(exec, real, result);
    if (status == CUDA_SUCCESS && code_map_put(&memory->instances, handle, after))
        discard(memory, before);
    else
        discard(memory, after); /* without a place for it there was none before, and the graph has no nodes of that type */
    (void)settle(replay, 0, false);
    return status;
}

CUresult graph_memory_upload(struct vgpu_replay *replay, struct graph_instance *instance, void *exec, uint64_t stream, void *real)
{
    uint64_t pledge;
    return provide(replay, instance, exec, stream, real, true, &pledge);
}

CUresult graph_memory_launch(struct vgpu_replay *replay, struct graph_instance *instance, void *exec, uint64_t stream, void *real)
{
    struct replay_graph_memory *memory = replay->code->graph_memory;
    if (replay->private->captures != 0 && replay_is_capturing(replay, real)) {
        /* It would become part of another graph, which no graph with memory nodes can; and that spoils the capture. */
        (void)replay->driver.cuStreamQuery(real);
        return CUDA_ERROR_NOT_SUPPORTED;
    }
    for (size_t i = 0; i < instance->left.count && !instance->frees_itself; i++)
        if (instance->left.item[i]->is_live) return CUDA_ERROR_INVALID_VALUE;
    uint64_t pledge;
    CUresult status = provide(replay, instance, exec, stream, real, false, &pledge);
    if (status != CUDA_SUCCESS) return status;
    status = (CUresult)replay->driver.cuGraphLaunch(exec, real);
    if (status == CUDA_SUCCESS) {
        replay_pulse_launch(replay, real, 0, NULL, 0);
        is_on(replay, stream);
        given(memory, instance);
        for (size_t i = 0; i < instance->left.count; i++) change(memory, instance->left.item[i], 0, 0, true);
        for (size_t i = 0; i < instance->memory.freed.count; i++) change(memory, instance->memory.freed.item[i], 0, 0, false);
    }
    (void)settle(replay, pledge, false);
    return status;
}

void graph_memory_instance_ended(struct vgpu_replay *replay, uint64_t handle)
{
    if (!graph_memory_is_used(replay)) return;
    discard(replay->code->graph_memory, code_map_take(&replay->code->graph_memory->instances, handle));
    (void)settle(replay, 0, false);
}

void graph_memory_graph_ended(struct vgpu_replay *replay, struct code_graph *graph)
{
    if (graph->memory == NULL) return;
    if (graph_memory_is_used(replay)) {
        release_blocks(replay->code->graph_memory, &graph->memory->made, 0);
        release_blocks(replay->code->graph_memory, &graph->memory->freed, 0);
    }
    free(graph->memory);
    graph->memory = NULL;
}

/* Instances end with their context. What they have allocated stays until it is freed. */
void graph_memory_context_ended(struct vgpu_replay *replay)
{
    code_captures_check(replay);
    if (!graph_memory_is_used(replay)) return;
    struct replay_graph_memory *memory = replay->code->graph_memory;
    void *real;
    for (size_t i = 0; i < memory->instances.capacity;) {
        const uint64_t handle = memory->instances.slot[i].key;
        if (handle == 0 || replay_lookup(replay, VGPU_KIND_EXEC, handle, &real)) {
            i++;
            continue;
        }
        discard(memory, code_map_take(&memory->instances, handle)); /* others move up to its place */
    }
    none_holds(memory);
    (void)settle(replay, 0, false);
}

/* ---- the device's ---- */

CUresult replay_cuDeviceGraphMemTrim(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    if (!graph_memory_is_used(replay)) return (CUresult)replay->driver.cuDeviceGraphMemTrim(replay->device);
    replay_pools_settle(replay, REPLAY_POOLS_COUNT_EXACTLY); /* a program that has waited expects what it waited for to go */
    return trim(replay);
}

/* argument: attribute; value[0] */
CUresult replay_cuDeviceGetGraphMemAttribute(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    unsigned long long value = 0;
    const CUresult status =
        (CUresult)replay->driver.cuDeviceGetGraphMemAttribute(replay->device, (unsigned)call->argument[0], &value);
    result->value[0] = value;
    if (graph_memory_is_used(replay)) (void)settle(replay, 0, false);
    return status;
}

/* argument: attribute; payload: u64 */
CUresult replay_cuDeviceSetGraphMemAttribute(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    uint64_t value;
    if (call->payload_length < sizeof value) return CUDA_ERROR_INVALID_VALUE;
    memcpy(&value, payload, sizeof value);
    return (CUresult)replay->driver.cuDeviceSetGraphMemAttribute(replay->device, (unsigned)call->argument[0], &value);
}

void graph_memory_close(struct replay_code *code)
{
    struct replay_graph_memory *memory = code->graph_memory;
    if (memory == NULL) return;
    for (size_t i = 0; i < memory->instances.capacity; i++) {
        struct graph_instance *instance = memory->instances.slot[i].key != 0 ? memory->instances.slot[i].value : NULL;
        if (instance == NULL) continue;
        free(instance->memory.made.item);
        free(instance->memory.freed.item);
        free(instance->left.item);
        free(instance);
    }
    for (size_t i = 0; i < memory->blocks.capacity; i++) {
        struct graph_block *block = memory->blocks.slot[i].key != 0 ? memory->blocks.slot[i].value : NULL;
        while (block != NULL) {
            struct graph_block *next = block->next;
            free(block);
            block = next;
        }
    }
    free(memory->instances.slot);
    free(memory->blocks.slot);
    free(memory);
    code->graph_memory = NULL;
}
