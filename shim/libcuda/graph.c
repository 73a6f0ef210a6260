/* SPDX-License-Identifier: Apache-2.0 */
/*
 * graph.c - graphs as the guest knows them: which handles belong to which graph, and what can be asked about structure.
 *
 * The graph itself lies in the worker's driver. Every node the worker names is recorded here under its graph, so that
 * destroying a graph makes all of its nodes stale at once, and a node of a destroyed graph never reaches the worker.
 * Building, changing and running graphs: graph_node.c and graph_exec.c.
 */
#include "code.h"

#include <stdlib.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static struct shim_graph *graph_by_handle(uint64_t handle)
{
    struct shim_object *object = shim_object(VGPU_KIND_GRAPH, handle);
    return object == NULL ? NULL : object->data;
}

struct shim_graph *shim_graph_of(CUgraph graph) { return graph_by_handle((uint64_t)(uintptr_t)graph); }

struct shim_node *shim_node_of(CUgraphNode node)
{
    struct shim_object *object = shim_object(VGPU_KIND_NODE, (uint64_t)(uintptr_t)node);
    return object == NULL ? NULL : object->data;
}

static bool append(uint64_t **list, size_t *count, size_t *capacity, uint64_t value)
{
    if (*count == *capacity) {
        const size_t larger = *capacity == 0 ? 16 : *capacity * 2;
        uint64_t *grown = realloc(*list, larger * sizeof *grown);
        if (grown == NULL) return false;
        *list = grown;
        *capacity = larger;
    }
    (*list)[(*count)++] = value;
    return true;
}

struct shim_graph *shim_graph_adopt(uint64_t handle, uint64_t parent)
{
    if (vgpu_handle_kind(handle) != VGPU_KIND_GRAPH) return NULL;
    pthread_mutex_lock(&mutex);
    struct shim_graph *graph = graph_by_handle(handle);
    if (graph == NULL && (graph = calloc(1, sizeof *graph)) != NULL) {
        graph->handle = handle;
        graph->parent = parent;
        struct shim_graph *above = graph_by_handle(parent);
        if (above != NULL && !append(&above->child, &above->child_count, &above->child_capacity, handle)) above = NULL;
        if (!shim_handle_adopt(handle, graph)) {
            free(graph);
            graph = NULL;
        }
    }
    pthread_mutex_unlock(&mutex);
    return graph;
}

CUresult shim_node_adopt(uint64_t handle, uint64_t graph_handle)
{
    if (vgpu_handle_kind(handle) != VGPU_KIND_NODE) return CUDA_ERROR_UNKNOWN;
    CUresult status = CUDA_SUCCESS;
    pthread_mutex_lock(&mutex);
    if (!shim_handle_valid(VGPU_KIND_NODE, handle)) {
        struct shim_node *node = calloc(1, sizeof *node);
        struct shim_graph *graph = graph_by_handle(graph_handle);
        if (node == NULL || !shim_handle_adopt(handle, node) ||
            (graph != NULL && !append(&graph->node, &graph->node_count, &graph->node_capacity, handle))) {
            shim_handle_free(handle);
            free(node);
            status = CUDA_ERROR_OUT_OF_MEMORY;
        } else {
            node->handle = handle;
            node->graph = graph_handle;
        }
    }
    pthread_mutex_unlock(&mutex);
    return status;
}

/* Mutex held. */
static void forget_node(uint64_t handle)
{
    struct shim_object *object = shim_object(VGPU_KIND_NODE, handle);
    struct shim_node *node = object == NULL ? NULL : object->data;
    shim_handle_free(handle);
    if (node != NULL) free(node->parameters);
    free(node);
}

/* Mutex held. References of all graphs below are gathered for the caller to drop. */
static void forget_graph(struct shim_graph *graph, struct shim_reference **references, size_t *count, size_t room)
{
    for (size_t i = 0; i < graph->node_count; i++) forget_node(graph->node[i]);
    for (size_t i = 0; i < graph->child_count; i++) {
        struct shim_graph *child = graph_by_handle(graph->child[i]);
        if (child != NULL) forget_graph(child, references, count, room);
    }
    shim_handle_free(graph->handle);
    if (graph->reference != NULL && *count < room) references[(*count)++] = graph->reference;
    shim_memory_drop(graph->memory);
    free(graph->node);
    free(graph->child);
    free(graph);
}

void shim_graph_lost(uint64_t handle)
{
    struct shim_reference *references[64];
    size_t count = 0;
    pthread_mutex_lock(&mutex);
    struct shim_graph *graph = graph_by_handle(handle);
    if (graph != NULL) forget_graph(graph, references, &count, 64);
    pthread_mutex_unlock(&mutex);
    for (size_t i = 0; i < count; i++) shim_references_drop(references[i], false);
}

CUresult shim_node_list(const CUgraphNode *nodes, const void *edges, size_t count, uint8_t **payload, uint32_t *length)
{
    *payload = NULL;
    *length = 0;
    if (count == 0) return CUDA_SUCCESS;
    if (nodes == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (count > (VGPU_INLINE_LIMIT - 4096) / 16) return CUDA_ERROR_NOT_SUPPORTED;
    for (size_t i = 0; i < count; i++)
        if (!shim_handle_valid(VGPU_KIND_NODE, (uint64_t)(uintptr_t)nodes[i])) return CUDA_ERROR_INVALID_VALUE;
    const size_t bytes = vgpu_align16(count * (edges == NULL ? 8 : 16));
    uint8_t *list = calloc(1, bytes);
    if (list == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    memcpy(list, nodes, count * 8);
    if (edges != NULL) memcpy(list + count * 8, edges, count * 8);
    *payload = list;
    *length = (uint32_t)bytes;
    return CUDA_SUCCESS;
}

/* ---- life ---- */

CUresult cuGraphCreate(void *phGraph, unsigned int flags)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (phGraph == NULL) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {flags};
    uint64_t value[4] = {0};
    status = shim_reply(VGPU_CALL_cuGraphCreate, argument, NULL, 0, value, NULL, 0, NULL);
    if (status != CUDA_SUCCESS) return status;
    if (shim_graph_adopt(value[0], 0) == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    *(CUgraph *)phGraph = CODE_HANDLE(CUgraph, value[0]);
    return CUDA_SUCCESS;
}

CUresult cuGraphClone(CUgraph *phGraphClone, CUgraph originalGraph)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (phGraphClone == NULL) return CUDA_ERROR_INVALID_VALUE;
    const struct shim_graph *original = shim_graph_of(originalGraph);
    if (original == NULL) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {original->handle};
    uint64_t value[4] = {0};
    status = shim_reply(VGPU_CALL_cuGraphClone, argument, NULL, 0, value, NULL, 0, NULL);
    if (status != CUDA_SUCCESS) return status;
    struct shim_graph *clone = shim_graph_adopt(value[0], 0);
    if (clone == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    clone->reference = shim_references_copy(original->reference);
    *phGraphClone = CODE_HANDLE(CUgraph, value[0]);
    return CUDA_SUCCESS;
}

CUresult cuGraphDestroy(CUgraph hGraph)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    struct shim_reference *references[64];
    size_t count = 0;
    const uint64_t argument[8] = {(uint64_t)(uintptr_t)hGraph};
    /* A graph that is captured into stays; the driver knows which. Else nobody waits. */
    const bool asks = atomic_load_explicit(&shim_captures_active, memory_order_relaxed) != 0;
    pthread_mutex_lock(&mutex);
    struct shim_graph *graph = shim_graph_of(hGraph);
    if (graph == NULL || graph->parent != 0)
        status = CUDA_ERROR_INVALID_VALUE; /* unknown, or owned by a node of another graph */
    else if (!asks)
        forget_graph(graph, references, &count, 64);
    pthread_mutex_unlock(&mutex);
    if (status != CUDA_SUCCESS) return status;
    if (asks) {
        status = shim_reply(VGPU_CALL_cuGraphDestroy, argument, NULL, 0, NULL, NULL, 0, NULL);
        if (status != CUDA_SUCCESS) return status;
        pthread_mutex_lock(&mutex);
        graph = shim_graph_of(hGraph);
        if (graph != NULL) forget_graph(graph, references, &count, 64);
        pthread_mutex_unlock(&mutex);
    } else {
        status = shim_async(VGPU_CALL_cuGraphDestroy, argument, NULL, 0);
    }
    for (size_t i = 0; i < count; i++) shim_references_drop(references[i], false);
    return status;
}

CUresult cuGraphDestroyNode(CUgraphNode hNode)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    const struct shim_node *node = shim_node_of(hNode);
    if (node == NULL) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t handle = node->handle, owner = node->graph;
    const uint64_t argument[8] = {handle};
    status = shim_reply(VGPU_CALL_cuGraphDestroyNode, argument, NULL, 0, NULL, NULL, 0, NULL);
    if (status != CUDA_SUCCESS) return status;
    pthread_mutex_lock(&mutex);
    struct shim_graph *graph = graph_by_handle(owner);
    for (size_t i = 0; graph != NULL && i < graph->node_count; i++)
        if (graph->node[i] == handle) {
            graph->node[i] = graph->node[--graph->node_count];
            break;
        }
    forget_node(handle);
    pthread_mutex_unlock(&mutex);
    return CUDA_SUCCESS;
}

/* ---- structure ---- */

/* One or more parallel arrays of words about a graph or node. array[i] may be NULL. edges: which array is edge data, or
 * -1; a caller without room for it must not be cheated of what it says. */
static CUresult list(unsigned call, uint64_t handle, uint64_t graph, unsigned width, uint64_t *array[3], int edges, size_t *count)
{
    if (count == NULL) return CUDA_ERROR_INVALID_VALUE;
    bool wanted = false;
    for (unsigned i = 0; i < width; i++) wanted = wanted || array[i] != NULL;
    const uint64_t room = wanted ? *count : 0;
    uint64_t total = 0, at = 0;
    do {
        uint64_t page[VGPU_SLOT_PAYLOAD_LIMIT / 8];
        uint32_t length = 0;
        uint64_t value[4] = {0};
        const uint64_t argument[8] = {handle, at, wanted};
        const CUresult status = shim_reply(call, argument, NULL, 0, value, page, sizeof page, &length);
        if (status != CUDA_SUCCESS) return status;
        total = value[0];
        const uint64_t here = length / (8ull * width);
        if (!wanted || here == 0) break;
        for (uint64_t i = 0; i < here && at < room; i++, at++) {
            for (unsigned w = 0; w < width; w++) {
                const uint64_t word = page[i * width + w];
                if ((int)w == edges) {
                    if (array[w] == NULL && word != 0) return CUDA_ERROR_LOSSY_QUERY;
                } else {
                    const CUresult adopted = shim_node_adopt(word, graph);
                    if (adopted != CUDA_SUCCESS) return adopted;
                }
                if (array[w] != NULL) array[w][at] = word;
            }
        }
    } while (at < room && at < total);
    if (wanted)
        for (uint64_t i = at; i < room; i++)
            for (unsigned w = 0; w < width; w++)
                if (array[w] != NULL && (int)w != edges) array[w][i] = 0;
    *count = wanted ? at : total;
    return CUDA_SUCCESS;
}

static CUresult list_of_graph(unsigned call, CUgraph handle, unsigned width, void *a, void *b, void *c, int edges, size_t *count)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    const struct shim_graph *graph = shim_graph_of(handle);
    if (graph == NULL) return CUDA_ERROR_INVALID_VALUE;
    uint64_t *array[3] = {a, b, c};
    return list(call, graph->handle, graph->handle, width, array, edges, count);
}

static CUresult list_of_node(unsigned call, CUgraphNode handle, void *a, void *b, size_t *count)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    const struct shim_node *node = shim_node_of(handle);
    if (node == NULL) return CUDA_ERROR_INVALID_VALUE;
    uint64_t *array[3] = {a, b, NULL};
    return list(call, node->handle, node->graph, 2, array, 1, count);
}

CUresult cuGraphGetNodes(CUgraph hGraph, void *nodes, void *numNodes)
{
    return list_of_graph(VGPU_CALL_cuGraphGetNodes, hGraph, 1, nodes, NULL, NULL, -1, numNodes);
}

CUresult cuGraphGetRootNodes(CUgraph hGraph, void *rootNodes, void *numRootNodes)
{
    return list_of_graph(VGPU_CALL_cuGraphGetRootNodes, hGraph, 1, rootNodes, NULL, NULL, -1, numRootNodes);
}

CUresult cuGraphGetEdges_v2(CUgraph hGraph, void *from, void *to, void *edgeData, void *numEdges)
{
    return list_of_graph(VGPU_CALL_cuGraphGetEdges_v2, hGraph, 3, from, to, edgeData, 2, numEdges);
}

CUresult cuGraphGetEdges(CUgraph hGraph, void *from, void *to, void *numEdges)
{
    return cuGraphGetEdges_v2(hGraph, from, to, NULL, numEdges);
}

CUresult cuGraphNodeGetDependencies_v2(CUgraphNode hNode, void *dependencies, void *edgeData, void *numDependencies)
{
    return list_of_node(VGPU_CALL_cuGraphNodeGetDependencies_v2, hNode, dependencies, edgeData, numDependencies);
}

CUresult cuGraphNodeGetDependencies(CUgraphNode hNode, void *dependencies, void *numDependencies)
{
    return cuGraphNodeGetDependencies_v2(hNode, dependencies, NULL, numDependencies);
}

CUresult cuGraphNodeGetDependentNodes_v2(CUgraphNode hNode, void *dependentNodes, void *edgeData, void *numDependentNodes)
{
    return list_of_node(VGPU_CALL_cuGraphNodeGetDependentNodes_v2, hNode, dependentNodes, edgeData, numDependentNodes);
}

CUresult cuGraphNodeGetDependentNodes(CUgraphNode hNode, void *dependentNodes, void *numDependentNodes)
{
    return cuGraphNodeGetDependentNodes_v2(hNode, dependentNodes, NULL, numDependentNodes);
}

CUresult cuGraphNodeFindInClone(CUgraphNode *phNode, CUgraphNode hOriginalNode, CUgraph hClonedGraph)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (phNode == NULL || shim_node_of(hOriginalNode) == NULL || shim_graph_of(hClonedGraph) == NULL) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {(uint64_t)(uintptr_t)hOriginalNode, (uint64_t)(uintptr_t)hClonedGraph};
    uint64_t value[4] = {0};
    status = shim_reply(VGPU_CALL_cuGraphNodeFindInClone, argument, NULL, 0, value, NULL, 0, NULL);
    if (status == CUDA_SUCCESS) status = shim_node_adopt(value[0], (uint64_t)(uintptr_t)hClonedGraph);
    if (status == CUDA_SUCCESS) *phNode = CODE_HANDLE(CUgraphNode, value[0]);
    return status;
}

CUresult cuGraphChildGraphNodeGetGraph(CUgraphNode hNode, CUgraph *phGraph)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    const struct shim_node *node = shim_node_of(hNode);
    if (phGraph == NULL || node == NULL) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {node->handle};
    uint64_t value[4] = {0};
    status = shim_reply(VGPU_CALL_cuGraphChildGraphNodeGetGraph, argument, NULL, 0, value, NULL, 0, NULL);
    if (status != CUDA_SUCCESS) return status;
    if (shim_graph_adopt(value[0], node->graph) == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    *phGraph = CODE_HANDLE(CUgraph, value[0]);
    return CUDA_SUCCESS;
}

static CUresult change_dependencies(unsigned call, CUgraph hGraph, const CUgraphNode *from, const CUgraphNode *to,
                                    const void *edges, size_t count)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    const struct shim_graph *graph = shim_graph_of(hGraph);
    if (graph == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (count == 0) return CUDA_SUCCESS;
    uint8_t *a, *b;
    uint32_t a_length, b_length;
    if ((status = shim_node_list(from, NULL, count, &a, &a_length)) != CUDA_SUCCESS) return status;
    if ((status = shim_node_list(to, edges, count, &b, &b_length)) != CUDA_SUCCESS) {
        free(a);
        return status;
    }
    status = CUDA_ERROR_NOT_SUPPORTED;
    uint8_t *both = a_length + b_length > VGPU_INLINE_LIMIT ? NULL : malloc(a_length + b_length);
    if (both != NULL) {
        memcpy(both, a, a_length);
        memcpy(both + a_length, b, b_length);
        const uint64_t argument[8] = {graph->handle, count, edges != NULL};
        status = shim_reply(call, argument, both, a_length + b_length, NULL, NULL, 0, NULL);
    }
    free(both);
    free(a);
    free(b);
    return status;
}

CUresult cuGraphAddDependencies_v2(CUgraph hGraph, const void *from, const void *to, const void *edgeData, size_t numDependencies)
{
    return change_dependencies(VGPU_CALL_cuGraphAddDependencies_v2, hGraph, from, to, edgeData, numDependencies);
}

CUresult cuGraphAddDependencies(CUgraph hGraph, const void *from, const void *to, size_t numDependencies)
{
    return cuGraphAddDependencies_v2(hGraph, from, to, NULL, numDependencies);
}

CUresult cuGraphRemoveDependencies_v2(CUgraph hGraph, const void *from, const void *to, const void *edgeData, size_t numDependencies)
{
    return change_dependencies(VGPU_CALL_cuGraphRemoveDependencies_v2, hGraph, from, to, edgeData, numDependencies);
}

CUresult cuGraphRemoveDependencies(CUgraph hGraph, const void *from, const void *to, size_t numDependencies)
{
    return cuGraphRemoveDependencies_v2(hGraph, from, to, NULL, numDependencies);
}
