/* SPDX-License-Identifier: Apache-2.0 */
/*
 * graph.c - graphs: which nodes belong to which graph, structure, instances.
 *
 * Every node and child graph the guest has been told of is recorded under its graph. When a graph goes, their handles go
 * with it, so that a pointer the driver has freed can never be named again. Nodes' parameters: graph_node.c.
 */
#include "graph_memory.h"

struct code_graph *code_graph_of(struct vgpu_replay *replay, uint64_t handle, void **real)
{
    if (!replay_lookup(replay, VGPU_KIND_GRAPH, handle, real) || replay->code == NULL) return NULL;
    return code_map_get(&replay->code->graphs, handle);
}

struct code_graph *code_graph_of_node(struct vgpu_replay *replay, uint64_t handle, void **real)
{
    if (!replay_lookup(replay, VGPU_KIND_NODE, handle, real) || replay->code == NULL) return NULL;
    return code_map_get(&replay->code->nodes, handle);
}

uint64_t code_graph_intern(struct vgpu_replay *replay, void *real, uint64_t parent)
{
    struct replay_code *code = code_of(replay);
    if (code == NULL || real == NULL) return 0;
    const uint64_t handle = replay_intern(replay, VGPU_KIND_GRAPH, real);
    if (handle == 0 || code_map_get(&code->graphs, handle) != NULL) return handle;
    struct code_graph *graph = calloc(1, sizeof *graph), *above = code_map_get(&code->graphs, parent);
    if (graph == NULL || !code_map_put(&code->graphs, handle, graph)) {
        free(graph);
        replay_unbind(replay, VGPU_KIND_GRAPH, handle);
        return 0;
    }
    graph->handle = handle;
    graph->parent = parent;
    if (above != NULL) (void)code_list_add(&above->children, handle);
    return handle;
}

uint64_t code_node_intern(struct vgpu_replay *replay, void *real, struct code_graph *graph)
{
    if (real == NULL) return 0;
    const uint64_t handle = replay_intern(replay, VGPU_KIND_NODE, real);
    if (handle == 0 || code_map_get(&replay->code->nodes, handle) != NULL) return handle;
    if (!code_map_put(&replay->code->nodes, handle, graph) || !code_list_add(&graph->nodes, handle)) {
        (void)code_map_take(&replay->code->nodes, handle);
        replay_unbind(replay, VGPU_KIND_NODE, handle);
        return 0;
    }
    return handle;
}

static void forget_node(struct vgpu_replay *replay, uint64_t handle)
{
    (void)code_map_take(&replay->code->nodes, handle);
    replay_unbind(replay, VGPU_KIND_NODE, handle);
}

void code_graph_forget(struct vgpu_replay *replay, uint64_t handle)
{
    struct code_graph *graph = replay->code == NULL ? NULL : code_map_take(&replay->code->graphs, handle);
    if (graph == NULL) return;
    graph_memory_graph_ended(replay, graph);
    for (size_t i = 0; i < graph->nodes.count; i++) forget_node(replay, graph->nodes.item[i]);
    for (size_t i = 0; i < graph->children.count; i++) code_graph_forget(replay, graph->children.item[i]);
    replay_unbind(replay, VGPU_KIND_GRAPH, handle);
    free(graph->nodes.item);
    free(graph->children.item);
    free(graph);
}

uint64_t code_capture_lost(struct vgpu_replay *replay, uint64_t stream)
{
    void *real = replay->code == NULL ? NULL : code_map_take(&replay->code->captures, stream), *same;
    if (real == NULL) return 0;
    const uint64_t handle = replay_intern(replay, VGPU_KIND_GRAPH, real); /* the one it has, or one of its own for a moment */
    const struct code_graph *known = code_graph_of(replay, handle, &same);
    if (known != NULL && known->captured_into) return 0;
    code_graph_forget(replay, handle);
    replay_unbind(replay, VGPU_KIND_GRAPH, handle);
    return handle;
}

void code_captures_check(struct vgpu_replay *replay)
{
    void *real;
    for (size_t i = 0; replay->code != NULL && i < replay->code->captures.capacity;) {
        const uint64_t stream = replay->code->captures.slot[i].key;
        if (stream == 0 || replay_lookup(replay, VGPU_KIND_STREAM, stream, &real)) {
            i++;
            continue;
        }
        (void)code_capture_lost(replay, stream); /* others move up to its place */
    }
}

CUresult code_node_list(struct vgpu_replay *replay, const uint8_t *payload, uint32_t length, uint64_t count, bool has_edges,
                        void ***nodes, uint64_t **edges, uint32_t *used)
{
    *nodes = NULL;
    *edges = NULL;
    *used = 0;
    if (count == 0) return CUDA_SUCCESS;
    if (count > length / 8) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t bytes = vgpu_align16(count * (has_edges ? 16 : 8));
    if (bytes > length) return CUDA_ERROR_INVALID_VALUE;
    *nodes = calloc(count, sizeof **nodes);
    if (has_edges) *edges = malloc(count * 8);
    if (*nodes == NULL || (has_edges && *edges == NULL)) {
        free(*nodes);
        free(*edges);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    for (uint64_t i = 0; i < count; i++) {
        uint64_t handle;
        memcpy(&handle, payload + 8 * i, sizeof handle);
        if (!replay_lookup(replay, VGPU_KIND_NODE, handle, &(*nodes)[i])) {
            free(*nodes);
            free(*edges);
            *nodes = NULL;
            *edges = NULL;
            return CUDA_ERROR_INVALID_VALUE;
        }
    }
    if (has_edges) memcpy(*edges, payload + 8 * count, count * 8);
    *used = (uint32_t)bytes;
    return CUDA_SUCCESS;
}

/* ---- life ---- */

CUresult replay_cuGraphCreate(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *real = NULL;
    const CUresult status = (CUresult)replay->driver.cuGraphCreate(&real, (unsigned)call->argument[0]);
    if (status != CUDA_SUCCESS) return status;
    result->value[0] = code_graph_intern(replay, real, 0);
    if (result->value[0] != 0) return CUDA_SUCCESS;
    (void)replay->driver.cuGraphDestroy(real);
    return CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult replay_cuGraphClone(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *original, *real = NULL;
    const struct code_graph *graph = code_graph_of(replay, call->argument[0], &original);
    if (graph == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (graph_memory_is_in(graph)) return CUDA_ERROR_NOT_SUPPORTED; /* as CUDA has it */
    const CUresult status = (CUresult)replay->driver.cuGraphClone(&real, original);
    if (status != CUDA_SUCCESS) return status;
    result->value[0] = code_graph_intern(replay, real, 0);
    if (result->value[0] != 0) return CUDA_SUCCESS;
    (void)replay->driver.cuGraphDestroy(real);
    return CUDA_ERROR_OUT_OF_MEMORY;
}

/* Does a stream capture into it? Then CUDA permits everything but destroying it and taking out nodes. The driver refuses that too (580),
 * but not for what a part of the graph is captured into; and nothing here is to be forgotten of one that stays. */
static bool is_captured_into(const struct vgpu_replay *replay, const void *real)
{
    const struct code_map *captures = &replay->code->captures;
    for (size_t i = 0; captures->count != 0 && i < captures->capacity; i++)
        if (captures->slot[i].key != 0 && captures->slot[i].value == real) return true;
    return false;
}

/* The same, or into a part of it. */
static bool is_in_capture(struct vgpu_replay *replay, const struct code_graph *graph, const void *real)
{
    if (replay->code->captures.count == 0) return false;
    if (is_captured_into(replay, real)) return true;
    for (size_t i = 0; i < graph->children.count; i++) {
        void *part;
        const struct code_graph *child = code_graph_of(replay, graph->children.item[i], &part);
        if (child != NULL && is_in_capture(replay, child, part)) return true;
    }
    return false;
}

CUresult replay_cuGraphDestroy(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *real;
    const struct code_graph *graph = code_graph_of(replay, call->argument[0], &real);
    if (graph == NULL || graph->parent != 0) return CUDA_ERROR_INVALID_VALUE;
    if (is_in_capture(replay, graph, real)) return CUDA_ERROR_ILLEGAL_STATE; /* as 580 answers, for the graph itself */
    const bool has_memory = graph_memory_is_in(graph);
    code_graph_forget(replay, call->argument[0]);
    const CUresult status = (CUresult)replay->driver.cuGraphDestroy(real);
    if (has_memory) graph_memory_settle(replay, false);
    return status;
}

CUresult replay_cuGraphDestroyNode(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *real, *whole;
    struct code_graph *graph = code_graph_of_node(replay, call->argument[0], &real);
    if (graph == NULL || !replay_lookup(replay, VGPU_KIND_GRAPH, graph->handle, &whole)) return CUDA_ERROR_INVALID_VALUE;
    if (is_captured_into(replay, whole)) return CUDA_ERROR_ILLEGAL_STATE; /* as 580 answers */
    if (graph_memory_is_in(graph)) return CUDA_ERROR_NOT_SUPPORTED; /* as CUDA has it */
    /* A child graph goes with its node; which one it was is asked before. */
    void *child = NULL;
    unsigned type = 0;
    if (replay->driver.cuGraphNodeGetType(real, &type) == 0 && type == 4) (void)replay->driver.cuGraphChildGraphNodeGetGraph(real, &child);
    const uint64_t handle = child == NULL ? 0 : replay_intern(replay, VGPU_KIND_GRAPH, child);
    const struct code_graph *part = code_map_get(&replay->code->graphs, handle);
    if (part == NULL) replay_unbind(replay, VGPU_KIND_GRAPH, handle); /* the guest has not asked for it */
    if (part != NULL && is_in_capture(replay, part, child)) return CUDA_ERROR_ILLEGAL_STATE;
    const CUresult status = (CUresult)replay->driver.cuGraphDestroyNode(real);
    if (status != CUDA_SUCCESS) return status;
    if (part != NULL) {
        code_list_remove(&graph->children, handle);
        code_graph_forget(replay, handle);
    }
    code_list_remove(&graph->nodes, call->argument[0]);
    forget_node(replay, call->argument[0]);
    return CUDA_SUCCESS;
}

/* ---- structure ---- */

/* Puts entries [first, total) of parallel arrays into the reply, as many as fit. Arrays of nodes become handles. */
static CUresult page(struct vgpu_replay *replay, struct code_graph *graph, const struct vgpu_call *call, void **nodes[2],
                     const uint64_t *edges, size_t total, struct vgpu_result *result, uint8_t *reply)
{
    const unsigned width = (nodes[0] != NULL) + (nodes[1] != NULL) + (edges != NULL);
    result->value[0] = total;
    uint32_t used = 0;
    for (uint64_t i = call->argument[1]; i < total && used + 8 * width <= VGPU_SLOT_PAYLOAD_LIMIT; i++) {
        for (unsigned n = 0; n < 2; n++) {
            if (nodes[n] == NULL) continue;
            const uint64_t handle = code_node_intern(replay, nodes[n][i], graph);
            if (handle == 0) return CUDA_ERROR_OUT_OF_MEMORY;
            memcpy(reply + used, &handle, 8);
            used += 8;
        }
        if (edges != NULL) {
            memcpy(reply + used, &edges[i], 8);
            used += 8;
        }
    }
    result->payload_length = (uint16_t)used;
    return CUDA_SUCCESS;
}

struct question {
    struct code_graph *graph;
    void *real; /* graph or node */
    unsigned kind;
};
enum { NODES, ROOTS, EDGES, DEPENDENCIES, DEPENDENTS };

static CUresult ask(struct vgpu_replay *replay, const struct question *q, void **a, void **b, uint64_t *edges, size_t *count)
{
    const struct vgpu_driver *driver = &replay->driver;
    switch (q->kind) {
    case NODES: return (CUresult)driver->cuGraphGetNodes(q->real, a, count);
    case ROOTS: return (CUresult)driver->cuGraphGetRootNodes(q->real, a, count);
    case EDGES: return (CUresult)driver->cuGraphGetEdges_v2(q->real, a, b, edges, count);
    case DEPENDENCIES: return (CUresult)driver->cuGraphNodeGetDependencies_v2(q->real, a, edges, count);
    default: return (CUresult)driver->cuGraphNodeGetDependentNodes_v2(q->real, a, edges, count);
    }
}

/* arguments: graph or node, first entry, whether entries are wanted besides their number */
static CUresult list(struct vgpu_replay *replay, const struct vgpu_call *call, struct vgpu_result *result, uint8_t *reply, unsigned kind)
{
    struct question q = {.kind = kind};
    q.graph = kind <= EDGES ? code_graph_of(replay, call->argument[0], &q.real) : code_graph_of_node(replay, call->argument[0], &q.real);
    if (q.graph == NULL) return CUDA_ERROR_INVALID_VALUE;
    size_t count = 0;
    CUresult status = ask(replay, &q, NULL, NULL, NULL, &count);
    result->value[0] = count;
    if (status != CUDA_SUCCESS || call->argument[2] == 0 || count == 0) return status;
    if (count > VGPU_NODE_LIST_LIMIT) return CUDA_ERROR_OUT_OF_MEMORY;
    void **a = calloc(count, sizeof *a), **b = kind == EDGES ? calloc(count, sizeof *b) : NULL;
    uint64_t *edges = kind >= EDGES ? calloc(count, sizeof *edges) : NULL;
    if (a == NULL || (kind == EDGES && b == NULL) || (kind >= EDGES && edges == NULL)) {
        status = CUDA_ERROR_OUT_OF_MEMORY;
    } else {
        status = ask(replay, &q, a, b, edges, &count);
        void **nodes[2] = {a, b};
        if (status == CUDA_SUCCESS) status = page(replay, q.graph, call, nodes, edges, count, result, reply);
    }
    free(a);
    free(b);
    free(edges);
    return status;
}

#define LIST_HANDLER(name, kind)                                  \
    CUresult replay_##name(REPLAY_PARAMETERS)                     \
    {                                                             \
        REPLAY_UNUSED;                                            \
        return list(replay, call, result, reply, kind);           \
    }
LIST_HANDLER(cuGraphGetNodes, NODES)
LIST_HANDLER(cuGraphGetRootNodes, ROOTS)
LIST_HANDLER(cuGraphGetEdges_v2, EDGES)
LIST_HANDLER(cuGraphNodeGetDependencies_v2, DEPENDENCIES)
LIST_HANDLER(cuGraphNodeGetDependentNodes_v2, DEPENDENTS)

CUresult replay_cuGraphNodeFindInClone(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *original, *clone, *real = NULL;
    struct code_graph *graph = code_graph_of(replay, call->argument[1], &clone);
    if (graph == NULL || code_graph_of_node(replay, call->argument[0], &original) == NULL) return CUDA_ERROR_INVALID_VALUE;
    const CUresult status = (CUresult)replay->driver.cuGraphNodeFindInClone(&real, original, clone);
    if (status != CUDA_SUCCESS) return status;
    result->value[0] = code_node_intern(replay, real, graph);
    return result->value[0] == 0 ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult replay_cuGraphChildGraphNodeGetGraph(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *node, *real = NULL;
    const struct code_graph *graph = code_graph_of_node(replay, call->argument[0], &node);
    if (graph == NULL) return CUDA_ERROR_INVALID_VALUE;
    const CUresult status = (CUresult)replay->driver.cuGraphChildGraphNodeGetGraph(node, &real);
    if (status != CUDA_SUCCESS) return status;
    result->value[0] = code_graph_intern(replay, real, graph->handle);
    return result->value[0] == 0 ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

/* arguments: graph, number of edges, whether edge data follow; payload: the from nodes, then the to nodes and data */
static CUresult change(struct vgpu_replay *replay, const struct vgpu_call *call, const void *payload,
                       int (*apply)(void *, const void *, const void *, const void *, size_t))
{
    void *graph, **from, **to;
    uint64_t *none, *edges;
    uint32_t used, more;
    const uint64_t count = call->argument[1];
    if (code_graph_of(replay, call->argument[0], &graph) == NULL) return CUDA_ERROR_INVALID_VALUE;
    CUresult status = code_node_list(replay, payload, call->payload_length, count, false, &from, &none, &used);
    if (status != CUDA_SUCCESS) return status;
    status = code_node_list(replay, (const uint8_t *)payload + used, call->payload_length - used, count, call->argument[2] != 0, &to,
                            &edges, &more);
    if (status == CUDA_SUCCESS) {
        status = (CUresult)apply(graph, from, to, edges, count);
        free(to);
        free(edges);
    }
    free(from);
    return status;
}

CUresult replay_cuGraphAddDependencies_v2(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    return change(replay, call, payload, replay->driver.cuGraphAddDependencies_v2);
}

CUresult replay_cuGraphRemoveDependencies_v2(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *real;
    const struct code_graph *graph = code_graph_of(replay, call->argument[0], &real);
    if (graph != NULL && graph_memory_is_in(graph)) return CUDA_ERROR_NOT_SUPPORTED; /* as CUDA has it */
    return change(replay, call, payload, replay->driver.cuGraphRemoveDependencies_v2);
}

/* ---- instances ---- */

struct instantiate_parameters { uint64_t flags; void *upload_stream, *error_node; int result; };
struct update_result { int result; void *error_node, *error_from_node; };

/* arguments: graph, flags, upload stream */
CUresult replay_cuGraphInstantiateWithParams(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *graph_real, *stream = NULL, *real = NULL;
    struct code_graph *graph = code_graph_of(replay, call->argument[0], &graph_real);
    if (graph == NULL) return CUDA_ERROR_INVALID_VALUE;
    uint64_t flags = call->argument[1];
    if ((flags & 4) != 0) return CUDA_ERROR_NOT_SUPPORTED; /* device-side launch */
    if ((flags & 2) != 0 && !replay_stream(replay, call->argument[2], &stream)) return CUDA_ERROR_INVALID_HANDLE;
    struct instantiate_parameters parameters = {.flags = flags, .upload_stream = stream};
    struct graph_instance *instance;
    uint64_t pledge;
    CUresult status = graph_memory_instantiate_begin(replay, graph, flags, &instance, &pledge);
    if (status != CUDA_SUCCESS) return status;
    status = (CUresult)replay->driver.cuGraphInstantiateWithParams(&real, graph_real, &parameters);
    if (status == CUDA_ERROR_NOT_SUPPORTED) { /* a driver that knows the older form only */
        flags &= ~2ull;
        status = (CUresult)replay->driver.cuGraphInstantiateWithFlags(&real, graph_real, flags);
    }
    if (parameters.error_node != NULL && status != CUDA_SUCCESS) result->value[1] = code_node_intern(replay, parameters.error_node, graph);
    result->value[2] = (uint32_t)parameters.result;
    if (status == CUDA_SUCCESS) {
        result->value[0] = replay_intern(replay, VGPU_KIND_EXEC, real);
        if (result->value[0] == 0) {
            (void)replay->driver.cuGraphExecDestroy(real);
            status = CUDA_ERROR_OUT_OF_MEMORY;
        }
    }
    return graph_memory_instantiate_end(replay, status, flags, call->argument[2], result->value[0], real, instance, pledge);
}

CUresult replay_cuGraphExecUpdate_v2(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *exec, *graph_real;
    struct code_graph *graph = code_graph_of(replay, call->argument[1], &graph_real);
    if (graph == NULL || !replay_lookup(replay, VGPU_KIND_EXEC, call->argument[0], &exec)) return CUDA_ERROR_INVALID_VALUE;
    struct update_result update = {.result = 0};
    const CUresult status =
        graph_memory_update(replay, call->argument[0], graph, exec, graph_real, replay->driver.cuGraphExecUpdate_v2, &update);
    result->value[0] = (uint32_t)update.result;
    if (status == CUDA_SUCCESS) return status;
    /* The nodes to blame are nodes of the new graph, or of one inside it that the guest has not asked for. */
    if (update.error_node != NULL) result->value[1] = code_node_intern(replay, update.error_node, graph);
    if (update.error_from_node != NULL) result->value[2] = code_node_intern(replay, update.error_from_node, graph);
    return status;
}

CUresult replay_cuGraphLaunch(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *exec, *stream;
    if (!replay_lookup(replay, VGPU_KIND_EXEC, call->argument[0], &exec)) return CUDA_ERROR_INVALID_VALUE;
    if (!replay_stream(replay, call->argument[1], &stream)) return CUDA_ERROR_INVALID_HANDLE;
    struct graph_instance *instance = graph_memory_instance(replay, call->argument[0]);
    if (__builtin_expect(instance != NULL, 0)) return graph_memory_launch(replay, instance, exec, call->argument[1], stream);
    const CUresult status = (CUresult)replay->driver.cuGraphLaunch(exec, stream);
    if (status == CUDA_SUCCESS) replay_pulse_launch(replay, stream, 0, NULL, 0);
    return status;
}

CUresult replay_cuGraphUpload(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *exec, *stream;
    if (!replay_lookup(replay, VGPU_KIND_EXEC, call->argument[0], &exec)) return CUDA_ERROR_INVALID_VALUE;
    if (!replay_stream(replay, call->argument[1], &stream)) return CUDA_ERROR_INVALID_HANDLE;
    struct graph_instance *instance = graph_memory_instance(replay, call->argument[0]);
    if (instance != NULL) return graph_memory_upload(replay, instance, exec, call->argument[1], stream);
    return (CUresult)replay->driver.cuGraphUpload(exec, stream);
}

CUresult replay_cuGraphExecDestroy(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *exec;
    if (!replay_lookup(replay, VGPU_KIND_EXEC, call->argument[0], &exec)) return CUDA_ERROR_INVALID_VALUE;
    const bool has_memory = graph_memory_instance(replay, call->argument[0]) != NULL;
    replay_unbind(replay, VGPU_KIND_EXEC, call->argument[0]);
    const CUresult status = (CUresult)replay->driver.cuGraphExecDestroy(exec);
    if (has_memory) graph_memory_instance_ended(replay, call->argument[0]);
    return status;
}
