/* SPDX-License-Identifier: Apache-2.0 */
/*
 * graph_memory.c - what memory nodes of graphs cost: instances, launches, and what the driver holds for them. The nodes themselves:
 * graph_memory_node.c.
 *
 * An allocation node has an address from the day it is made, and memory there when the graph is launched or uploaded; the driver
 * keeps the memory for later launches, and may give it from one graph to another. So what counts against the quota is what
 * the driver says that it holds (CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT), and it is asked after everything that may change that.
 *
 * A launch cannot be taken back. So before one that may need more, the most that it can need is charged; then the graph is
 * uploaded, which makes the driver get the memory and runs nothing; and only when what it got is within the quota, whatever the
 * pieces that the driver takes memory in, the graph is launched.
 */
#include "graph_memory.h"

#include "allocations.h"
#include "internal.h"

#define INSTANTIATE_AUTO_FREE 1u
#define INSTANTIATE_UPLOAD 2u
enum { USED_NOW, USED_HIGH, RESERVED_NOW_OF_GRAPHS, RESERVED_HIGH };

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
            units = graph_memory_sum(units, made->item[i]->size / unit + 2); /* more, but never less */
    if (sorted != NULL) qsort(sorted, made->count, sizeof *sorted, by_address);
    for (size_t i = 0; sorted != NULL && i < made->count; i++) {
        uint64_t first = sorted[i]->address / unit, end = (graph_memory_sum(sorted[i]->address, sorted[i]->size) - 1) / unit + 1;
        if (first < counted_to) first = counted_to;
        if (end <= first) continue;
        units = graph_memory_sum(units, end - first);
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
    const uint64_t have = graph_memory_sum(memory->charged, pledge);
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
    memory->held = holds ? graph_memory_sum(memory->held, instance->need) : memory->held - (memory->held < instance->need ? memory->held : instance->need);
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
    if (instance->holds && reserved >= graph_memory_sum(memory->held, memory->orphaned)) return 0; /* nobody's memory has become another's */
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

/* ---- freeing ---- */

CUresult graph_memory_free(struct vgpu_replay *replay, uint64_t address, uint64_t stream, void *real, bool at_once)
{
    struct graph_block *block = graph_memory_is_used(replay) ? graph_block_live_at(replay->code->graph_memory, address) : NULL;
    if (block == NULL) return CUDA_ERROR_INVALID_VALUE;
    const CUresult status = (CUresult)(at_once ? replay->driver.cuMemFree_v2(address) : replay->driver.cuMemFreeAsync(address, real));
    if (status != CUDA_SUCCESS) return status;
    graph_block_change(replay->code->graph_memory, block, 0, 0, false);
    if (!at_once) replay_pools_freed(replay, stream);
    (void)settle(replay, 0, false);
    return CUDA_SUCCESS;
}

/* ---- instances ---- */

static void discard(struct replay_graph_memory *memory, struct graph_instance *instance)
{
    if (instance == NULL) return;
    set_holds(memory, instance, false);
    graph_blocks_release(memory, &instance->memory.made, 1);
    graph_blocks_release(memory, &instance->memory.freed, 1);
    free(instance->left.item);
    free(instance);
}

static struct graph_instance *instance_of(struct vgpu_replay *replay, const struct code_graph *graph, bool frees_itself)
{
    struct replay_graph_memory *memory = graph_memory_table(replay);
    struct graph_instance *instance = memory == NULL ? NULL : calloc(1, sizeof *instance);
    if (instance == NULL) return NULL;
    instance->frees_itself = frees_itself;
    if (graph->memory != NULL &&
        (!graph_blocks_copy(&instance->memory.made, &graph->memory->made) || !graph_blocks_copy(&instance->memory.freed, &graph->memory->freed) ||
         !graph_blocks_make_room(&instance->left, graph->memory->made.count))) {
        free(instance->memory.made.item);
        free(instance->memory.freed.item);
        free(instance);
        return NULL;
    }
    for (size_t i = 0; i < instance->memory.made.count; i++)
        if (!instance->memory.made.item[i]->freed_inside) instance->left.item[instance->left.count++] = instance->memory.made.item[i];
    for (size_t i = 0; i < instance->memory.made.count; i++)
        graph_block_change(memory, instance->memory.made.item[i], 1, 1, instance->memory.made.item[i]->is_live);
    for (size_t i = 0; i < instance->memory.freed.count; i++)
        graph_block_change(memory, instance->memory.freed.item[i], 1, 1, instance->memory.freed.item[i]->is_live);
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
        for (size_t i = 0; i < instance->left.count; i++) graph_block_change(memory, instance->left.item[i], 0, 0, true);
        for (size_t i = 0; i < instance->memory.freed.count; i++) graph_block_change(memory, instance->memory.freed.item[i], 0, 0, false);
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
        graph_blocks_release(replay->code->graph_memory, &graph->memory->made, 0);
        graph_blocks_release(replay->code->graph_memory, &graph->memory->freed, 0);
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
