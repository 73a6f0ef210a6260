/* SPDX-License-Identifier: Apache-2.0 */
/*
 * graph_node.c - nodes: adding them, reading and changing what they do, in a graph or in an instance of one.
 *
 * Kernel parameters come packed and are given to the driver packed. Copies name arena memory by offset; the address is
 * made here, after the bounds are checked, and turned back into an offset when a node is read.
 */
#include "allocations.h"
#include "graph_memory.h"

struct kernel_parameters { /* CUDA_KERNEL_NODE_PARAMS_v2, handles as the driver's pointers */
    void *function;
    unsigned grid[3], block[3], shared;
    void **parameters, **extra;
    void *kernel, *context;
};
_Static_assert(sizeof(struct kernel_parameters) == 72, "CUDA_KERNEL_NODE_PARAMS_v2");

struct host_parameters { void *function, *user; };
struct code_host_node { struct vgpu_replay *replay; uint64_t function, user; struct code_host_node *next; };
#define HOST_NODES_MOST (1u << 20) /* records of host nodes: a session must not take the host's memory with it */

/* What a node does, in the driver's terms. It points into itself: not to be copied. */
struct body {
    union {
        struct kernel_parameters kernel;
        CUDA_MEMCPY3D copy;
        struct wire_memset_node memset;
        struct host_parameters host;
    };
    void *extra[5];
    size_t size;
    void *context;
};

static CUresult read_context(struct vgpu_replay *replay, uint64_t handle, void **context)
{
    *context = NULL;
    return handle == 0 || replay_lookup(replay, VGPU_KIND_CONTEXT, handle, context) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

static CUresult read_kernel(struct vgpu_replay *replay, const uint8_t *bytes, uint32_t length, struct body *body)
{
    struct wire_kernel_node wire;
    if (length < sizeof wire) return CUDA_ERROR_INVALID_VALUE;
    memcpy(&wire, bytes, sizeof wire);
    struct code_function *function = code_function_of(replay, wire.function);
    if (function == NULL) return CUDA_ERROR_INVALID_HANDLE;
    code_function_describe(replay, function);
    if (wire.parameter_bytes > length - sizeof wire || wire.parameter_bytes < function->parameter_bytes) return CUDA_ERROR_INVALID_VALUE;
    void *context;
    const CUresult status = read_context(replay, wire.context, &context);
    if (status != CUDA_SUCCESS) return status;
    body->kernel = (struct kernel_parameters){
        .function = function->is_kernel ? NULL : function->real,
        .grid = {wire.grid[0], wire.grid[1], wire.grid[2]},
        .block = {wire.block[0], wire.block[1], wire.block[2]},
        .shared = wire.shared_bytes,
        .kernel = function->is_kernel ? function->real : NULL,
        .context = context,
    };
    body->size = wire.parameter_bytes;
    body->extra[0] = (void *)1; /* CU_LAUNCH_PARAM_BUFFER_POINTER; the driver copies the bytes during the call */
    body->extra[1] = (void *)(uintptr_t)(bytes + sizeof wire);
    body->extra[2] = (void *)2; /* CU_LAUNCH_PARAM_BUFFER_SIZE */
    body->extra[3] = &body->size;
    body->extra[4] = NULL;
    if (wire.parameter_bytes != 0) body->kernel.extra = body->extra;
    return CUDA_SUCCESS;
}

/* Bytes from the base to the end of what one side of a copy touches; 0 when that overflows, or its rows or slices lie in each other:
 * no pitch and no height mean to a driver as much as the box needs, and then it reaches further than what is measured here. */
static uint64_t span(uint64_t x, uint64_t y, uint64_t z, uint64_t pitch, uint64_t height, const CUDA_MEMCPY3D *copy)
{
    if (copy->WidthInBytes == 0 || copy->Height == 0 || copy->Depth == 0) return 1;
    uint64_t rows, row, bytes;
    if (__builtin_add_overflow(x, copy->WidthInBytes, &row) || pitch < row) return 0;
    if (__builtin_add_overflow(y, copy->Height, &row) || ((z != 0 || copy->Depth > 1) && height < row)) return 0;
    if (__builtin_add_overflow(z, copy->Depth - 1, &rows) || __builtin_mul_overflow(rows, height, &rows)) return 0;
    if (__builtin_add_overflow(y, copy->Height - 1, &row) || __builtin_add_overflow(rows, row, &rows)) return 0;
    if (__builtin_mul_overflow(rows, pitch, &bytes) || __builtin_add_overflow(bytes, x, &bytes)) return 0;
    return __builtin_add_overflow(bytes, copy->WidthInBytes, &bytes) ? 0 : bytes;
}

static CUresult place(struct vgpu_replay *replay, unsigned type, bool in_arena, const void **host, uint64_t extent)
{
    if (type == CU_MEMORYTYPE_DEVICE && !in_arena) return CUDA_SUCCESS;
    if (type != CU_MEMORYTYPE_HOST || !in_arena) return CUDA_ERROR_NOT_SUPPORTED; /* a guest's own memory is not ours */
    if (extent == 0) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t offset = (uint64_t)(uintptr_t)*host;
    *host = replay_arena(replay, offset, extent);
    return *host == NULL || !replay_arena_is_registered(replay, offset, extent) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

/* An array's handle, and a box in it, becomes the driver's array. */
static CUresult place_array(struct vgpu_replay *replay, unsigned type, CUarray *array, const uint64_t at[3], const CUDA_MEMCPY3D *copy)
{
    const uint64_t size[3] = {copy->WidthInBytes, copy->Height, copy->Depth};
    void *real = NULL;
    CUresult status = type != CU_MEMORYTYPE_ARRAY ? CUDA_ERROR_INVALID_VALUE
                                                  : replay_array_box(replay, (uint64_t)(uintptr_t)*array, at, size, &real);
    *array = real;
    return status;
}

static CUresult read_copy(struct vgpu_replay *replay, const uint8_t *bytes, uint32_t length, uint64_t context, uint64_t flags, struct body *body)
{
    CUDA_MEMCPY3D *copy = &body->copy;
    if (length < sizeof *copy) return CUDA_ERROR_INVALID_VALUE;
    memcpy(copy, bytes, sizeof *copy);
    copy->reserved0 = copy->reserved1 = NULL;
    copy->srcLOD = copy->dstLOD = 0; /* CUDA says that it must be; 580 takes any and does not look at it */
    const uint64_t from[3] = {copy->srcXInBytes, copy->srcY, copy->srcZ}, to[3] = {copy->dstXInBytes, copy->dstY, copy->dstZ};
    CUresult status = (flags & VGPU_COPY_SOURCE_IS_ARRAY) != 0
                          ? place_array(replay, copy->srcMemoryType, &copy->srcArray, from, copy)
                          : place(replay, copy->srcMemoryType, (flags & VGPU_COPY_SOURCE_IN_ARENA) != 0, &copy->srcHost,
                            span(copy->srcXInBytes, copy->srcY, copy->srcZ, copy->srcPitch, copy->srcHeight, copy));
    if (status != CUDA_SUCCESS) return status;
    const void *destination = copy->dstHost;
    status = (flags & VGPU_COPY_DESTINATION_IS_ARRAY) != 0
                 ? place_array(replay, copy->dstMemoryType, &copy->dstArray, to, copy)
                 : place(replay, copy->dstMemoryType, (flags & VGPU_COPY_DESTINATION_IN_ARENA) != 0, &destination,
                   span(copy->dstXInBytes, copy->dstY, copy->dstZ, copy->dstPitch, copy->dstHeight, copy));
    if (status != CUDA_SUCCESS) return status;
    memcpy(&copy->dstHost, &destination, sizeof destination);
    return read_context(replay, context, &body->context);
}

static CUresult read_memset(struct vgpu_replay *replay, const uint8_t *bytes, uint32_t length, uint64_t context, struct body *body)
{
    if (length < sizeof body->memset) return CUDA_ERROR_INVALID_VALUE;
    memcpy(&body->memset, bytes, sizeof body->memset);
    return read_context(replay, context, &body->context);
}

static void call_host(void *user)
{
    const struct code_host_node *node = user;
    replay_host_function(node->replay, 0, node->function, node->user, 0, CUDA_SUCCESS);
}

/* What a host node points to: one record for all nodes with that function and user. It stays as long as the session, since
 * instances keep using it after the graph is gone. */
static struct code_host_node *host_node_of(struct vgpu_replay *replay, uint64_t function, uint64_t user)
{
    struct replay_code *code = code_of(replay);
    if (code == NULL) return NULL;
    const uint64_t mixed = (function * 0x9e3779b97f4a7c15ull ^ user) | 1; /* no key is 0 */
    struct code_host_node *first = code_map_get(&code->host_pairs, mixed);
    for (struct code_host_node *known = first; known != NULL; known = known->next)
        if (known->function == function && known->user == user) return known;
    struct code_host_node *node = code->host_nodes.count >= HOST_NODES_MOST ? NULL : calloc(1, sizeof *node);
    if (node == NULL || !code_map_put(&code->host_nodes, (uintptr_t)node, node)) {
        free(node);
        return NULL;
    }
    *node = (struct code_host_node){.replay = replay, .function = function, .user = user, .next = first};
    (void)code_map_put(&code->host_pairs, mixed, node); /* without a place it is made once more another time */
    return node;
}

static CUresult read_host(struct vgpu_replay *replay, const uint8_t *bytes, uint32_t length, struct body *body)
{
    struct wire_host_node wire;
    if (length < sizeof wire) return CUDA_ERROR_INVALID_VALUE;
    memcpy(&wire, bytes, sizeof wire);
    struct code_host_node *node = host_node_of(replay, wire.function, wire.user);
    if (node == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    void (*function)(void *) = call_host;
    memcpy(&body->host.function, &function, sizeof function);
    body->host.user = node;
    return CUDA_SUCCESS;
}

/* ---- adding ---- */

/* What an add handler has in hand after the common part. */
struct adding {
    struct code_graph *graph;
    void *real, **dependencies;
    size_t count;
    const uint8_t *rest;
    uint32_t rest_length;
};

/* arguments: graph, dependencies, two of the call's own; payload: the dependencies, then the call's own */
static CUresult begin_add(struct vgpu_replay *replay, const struct vgpu_call *call, const void *payload, struct adding *adding)
{
    uint64_t *edges;
    uint32_t used;
    adding->graph = code_graph_of(replay, call->argument[0], &adding->real);
    if (adding->graph == NULL) return CUDA_ERROR_INVALID_VALUE;
    const CUresult status =
        code_node_list(replay, payload, call->payload_length, call->argument[1], false, &adding->dependencies, &edges, &used);
    adding->count = call->argument[1];
    adding->rest = (const uint8_t *)payload + used;
    adding->rest_length = call->payload_length - used;
    return status;
}

static CUresult end_add(struct vgpu_replay *replay, struct adding *adding, CUresult status, void *node, struct vgpu_result *result)
{
    free(adding->dependencies);
    if (status != CUDA_SUCCESS) return status;
    result->value[0] = code_node_intern(replay, node, adding->graph);
    return result->value[0] == 0 ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

#define ADD_HANDLER(name, prepare, apply)                                                 \
    CUresult replay_##name(REPLAY_PARAMETERS)                                             \
    {                                                                                     \
        REPLAY_UNUSED;                                                                    \
        struct adding adding = {0};                                                       \
        struct body body;                                                                 \
        void *node = NULL, *handle = NULL;                                                \
        (void)body, (void)handle;                                                         \
        CUresult status = begin_add(replay, call, payload, &adding);                      \
        if (status == CUDA_SUCCESS) status = (prepare);                                   \
        if (status == CUDA_SUCCESS) status = (CUresult)(apply);                           \
        return end_add(replay, &adding, status, node, result);                            \
    }

static CUresult read_event(struct vgpu_replay *replay, uint64_t wire, void **event)
{
    return replay_lookup(replay, VGPU_KIND_EVENT, wire, event) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

static CUresult read_graph(struct vgpu_replay *replay, uint64_t wire, void **graph)
{
    const struct code_graph *found = code_graph_of(replay, wire, graph);
    if (found == NULL) return CUDA_ERROR_INVALID_VALUE;
    return graph_memory_is_in(found) ? CUDA_ERROR_NOT_SUPPORTED : CUDA_SUCCESS; /* it would be copied, which CUDA refuses */
}

ADD_HANDLER(cuGraphAddKernelNode_v2, read_kernel(replay, adding.rest, adding.rest_length, &body),
            replay->driver.cuGraphAddKernelNode_v2(&node, adding.real, adding.dependencies, adding.count, &body.kernel))
ADD_HANDLER(cuGraphAddMemcpyNode, read_copy(replay, adding.rest, adding.rest_length, call->argument[2], call->argument[3], &body),
            replay->driver.cuGraphAddMemcpyNode(&node, adding.real, adding.dependencies, adding.count, &body.copy, body.context))
ADD_HANDLER(cuGraphAddMemsetNode, read_memset(replay, adding.rest, adding.rest_length, call->argument[2], &body),
            replay->driver.cuGraphAddMemsetNode(&node, adding.real, adding.dependencies, adding.count, &body.memset, body.context))
ADD_HANDLER(cuGraphAddHostNode, read_host(replay, adding.rest, adding.rest_length, &body),
            replay->driver.cuGraphAddHostNode(&node, adding.real, adding.dependencies, adding.count, &body.host))
ADD_HANDLER(cuGraphAddEmptyNode, CUDA_SUCCESS,
            replay->driver.cuGraphAddEmptyNode(&node, adding.real, adding.dependencies, adding.count))
ADD_HANDLER(cuGraphAddChildGraphNode, read_graph(replay, call->argument[2], &handle),
            replay->driver.cuGraphAddChildGraphNode(&node, adding.real, adding.dependencies, adding.count, handle))
ADD_HANDLER(cuGraphAddEventRecordNode, read_event(replay, call->argument[2], &handle),
            replay->driver.cuGraphAddEventRecordNode(&node, adding.real, adding.dependencies, adding.count, handle))
ADD_HANDLER(cuGraphAddEventWaitNode, read_event(replay, call->argument[2], &handle),
            replay->driver.cuGraphAddEventWaitNode(&node, adding.real, adding.dependencies, adding.count, handle))

/* ---- changing ---- */

/* arguments: node, exec or 0, two of the call's own */
#define CHANGE_HANDLER(name, in_exec, prepare, apply)                                                             \
    CUresult replay_##name(REPLAY_PARAMETERS)                                                                     \
    {                                                                                                             \
        REPLAY_UNUSED;                                                                                            \
        const uint8_t *bytes = payload;                                                                           \
        const uint32_t length = call->payload_length;                                                             \
        struct body body;                                                                                         \
        void *node, *exec = NULL, *handle = NULL;                                                                 \
        (void)body, (void)handle, (void)bytes, (void)length;                                                      \
        if (code_graph_of_node(replay, call->argument[0], &node) == NULL) return CUDA_ERROR_INVALID_VALUE;        \
        if (in_exec && !replay_lookup(replay, VGPU_KIND_EXEC, call->argument[1], &exec)) return CUDA_ERROR_INVALID_VALUE; \
        const CUresult status = (prepare);                                                                        \
        return status != CUDA_SUCCESS ? status : (CUresult)(apply);                                               \
    }

CHANGE_HANDLER(cuGraphKernelNodeSetParams_v2, false, read_kernel(replay, bytes, length, &body),
               replay->driver.cuGraphKernelNodeSetParams_v2(node, &body.kernel))
CHANGE_HANDLER(cuGraphExecKernelNodeSetParams_v2, true, read_kernel(replay, bytes, length, &body),
               replay->driver.cuGraphExecKernelNodeSetParams_v2(exec, node, &body.kernel))
CHANGE_HANDLER(cuGraphMemcpyNodeSetParams, false, read_copy(replay, bytes, length, 0, call->argument[3], &body),
               replay->driver.cuGraphMemcpyNodeSetParams(node, &body.copy))
CHANGE_HANDLER(cuGraphExecMemcpyNodeSetParams, true, read_copy(replay, bytes, length, call->argument[2], call->argument[3], &body),
               replay->driver.cuGraphExecMemcpyNodeSetParams(exec, node, &body.copy, body.context))
CHANGE_HANDLER(cuGraphMemsetNodeSetParams, false, read_memset(replay, bytes, length, 0, &body),
               replay->driver.cuGraphMemsetNodeSetParams(node, &body.memset))
CHANGE_HANDLER(cuGraphExecMemsetNodeSetParams, true, read_memset(replay, bytes, length, call->argument[2], &body),
               replay->driver.cuGraphExecMemsetNodeSetParams(exec, node, &body.memset, body.context))
CHANGE_HANDLER(cuGraphHostNodeSetParams, false, read_host(replay, bytes, length, &body),
               replay->driver.cuGraphHostNodeSetParams(node, &body.host))
CHANGE_HANDLER(cuGraphExecHostNodeSetParams, true, read_host(replay, bytes, length, &body),
               replay->driver.cuGraphExecHostNodeSetParams(exec, node, &body.host))
CHANGE_HANDLER(cuGraphEventRecordNodeSetEvent, false, read_event(replay, call->argument[2], &handle),
               replay->driver.cuGraphEventRecordNodeSetEvent(node, handle))
CHANGE_HANDLER(cuGraphEventWaitNodeSetEvent, false, read_event(replay, call->argument[2], &handle),
               replay->driver.cuGraphEventWaitNodeSetEvent(node, handle))
CHANGE_HANDLER(cuGraphExecEventRecordNodeSetEvent, true, read_event(replay, call->argument[2], &handle),
               replay->driver.cuGraphExecEventRecordNodeSetEvent(exec, node, handle))
CHANGE_HANDLER(cuGraphExecEventWaitNodeSetEvent, true, read_event(replay, call->argument[2], &handle),
               replay->driver.cuGraphExecEventWaitNodeSetEvent(exec, node, handle))

/* arguments: exec, node, graph */
CUresult replay_cuGraphExecChildGraphNodeSetParams(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *exec, *node, *graph;
    if (!replay_lookup(replay, VGPU_KIND_EXEC, call->argument[0], &exec)) return CUDA_ERROR_INVALID_HANDLE;
    if (code_graph_of_node(replay, call->argument[1], &node) == NULL) return CUDA_ERROR_INVALID_HANDLE;
    const CUresult status = read_graph(replay, call->argument[2], &graph);
    return status != CUDA_SUCCESS ? status : (CUresult)replay->driver.cuGraphExecChildGraphNodeSetParams(exec, node, graph);
}

/* ---- reading ---- */

static CUresult pack(const struct code_function *function, const struct kernel_parameters *p, uint8_t *packed)
{
    if (p->parameters != NULL) {
        for (uint32_t i = 0; i < function->parameter_count; i++)
            memcpy(packed + function->parameter[i].offset, p->parameters[i], function->parameter[i].size);
        return CUDA_SUCCESS;
    }
    const void *buffer = NULL;
    size_t size = 0;
    for (unsigned i = 0; p->extra != NULL && i < 4 && p->extra[i] != NULL; i += 2) {
        if (p->extra[i] == (void *)1) buffer = p->extra[i + 1];
        if (p->extra[i] == (void *)2) memcpy(&size, p->extra[i + 1], sizeof size);
    }
    if (buffer == NULL || size < function->parameter_bytes) return CUDA_ERROR_NOT_SUPPORTED;
    memcpy(packed, buffer, function->parameter_bytes);
    return CUDA_SUCCESS;
}

CUresult replay_cuGraphKernelNodeGetParams_v2(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *node;
    if (code_graph_of_node(replay, call->argument[0], &node) == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct kernel_parameters p = {0};
    CUresult status = (CUresult)replay->driver.cuGraphKernelNodeGetParams_v2(node, &p);
    if (status != CUDA_SUCCESS) return status;
    /* The driver may name the function, the kernel or both. The one the guest knows is the answer. */
    struct code_function *function = code_function_search(replay, p.function);
    if (function == NULL) function = code_function_search(replay, p.kernel);
    if (function == NULL) return CUDA_ERROR_NOT_SUPPORTED;
    code_function_describe(replay, function);
    const struct wire_kernel_node wire = {
        .function = function->handle,
        .context = p.context == NULL ? 0 : replay_intern(replay, VGPU_KIND_CONTEXT, p.context),
        .grid = {p.grid[0], p.grid[1], p.grid[2]},
        .block = {p.block[0], p.block[1], p.block[2]},
        .shared_bytes = p.shared,
        .parameter_bytes = function->parameter_bytes,
    };
    uint8_t *packed = calloc(1, function->parameter_bytes + 1);
    if (packed == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    if (function->parameter_count != 0) status = pack(function, &p, packed);
    if (status == CUDA_SUCCESS) {
        memcpy(reply, &wire, sizeof wire);
        result->payload_length = sizeof wire;
        result->value[1] = function->owner;
        if (wire.parameter_bytes > VGPU_SLOT_PAYLOAD_LIMIT - sizeof wire) {
            result->value[0] = code_blob_make(replay, packed, wire.parameter_bytes);
            if (result->value[0] == 0) status = CUDA_ERROR_OUT_OF_MEMORY;
        } else {
            memcpy(reply + sizeof wire, packed, wire.parameter_bytes);
            result->payload_length = (uint16_t)(sizeof wire + wire.parameter_bytes);
        }
    }
    free(packed);
    return status;
}

/* An address of ours as the guest may know it: an offset into the segment, if it lies in the arena. */
static bool as_offset(const struct vgpu_replay *replay, unsigned type, const void **host)
{
    const uint64_t offset = (uint64_t)((const uint8_t *)*host - replay->segment);
    if (type != CU_MEMORYTYPE_HOST || offset < replay->arena_offset || offset >= replay->arena_offset + replay->arena_size) return false;
    *host = (const void *)(uintptr_t)offset;
    return true;
}

CUresult replay_cuGraphMemcpyNodeGetParams(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *node;
    if (code_graph_of_node(replay, call->argument[0], &node) == NULL) return CUDA_ERROR_INVALID_VALUE;
    CUDA_MEMCPY3D copy = {0};
    const CUresult status = (CUresult)replay->driver.cuGraphMemcpyNodeGetParams(node, &copy);
    if (status != CUDA_SUCCESS) return status;
    if (as_offset(replay, copy.srcMemoryType, &copy.srcHost))
        result->value[0] |= VGPU_COPY_SOURCE_IN_ARENA;
    else if (copy.srcMemoryType == CU_MEMORYTYPE_HOST)
        copy.srcHost = NULL; /* memory of this process is nobody's business */
    const void *destination = copy.dstHost;
    if (as_offset(replay, copy.dstMemoryType, &destination))
        result->value[0] |= VGPU_COPY_DESTINATION_IN_ARENA;
    else if (copy.dstMemoryType == CU_MEMORYTYPE_HOST)
        destination = NULL;
    memcpy(&copy.dstHost, &destination, sizeof destination);
    copy.srcArray = copy.srcMemoryType == CU_MEMORYTYPE_ARRAY ? (CUarray)(uintptr_t)replay_array_handle(replay, copy.srcArray) : NULL;
    copy.dstArray = copy.dstMemoryType == CU_MEMORYTYPE_ARRAY ? (CUarray)(uintptr_t)replay_array_handle(replay, copy.dstArray) : NULL;
    memcpy(reply, &copy, sizeof copy);
    result->payload_length = sizeof copy;
    return CUDA_SUCCESS;
}

CUresult replay_cuGraphMemsetNodeGetParams(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *node;
    if (code_graph_of_node(replay, call->argument[0], &node) == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct wire_memset_node wire = {0};
    const CUresult status = (CUresult)replay->driver.cuGraphMemsetNodeGetParams(node, &wire);
    if (status != CUDA_SUCCESS) return status;
    memcpy(reply, &wire, sizeof wire);
    result->payload_length = sizeof wire;
    return CUDA_SUCCESS;
}

CUresult replay_cuGraphHostNodeGetParams(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *node;
    if (code_graph_of_node(replay, call->argument[0], &node) == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct host_parameters p = {0};
    const CUresult status = (CUresult)replay->driver.cuGraphHostNodeGetParams(node, &p);
    if (status != CUDA_SUCCESS) return status;
    /* Only nodes made by read_host carry a record of that kind; captured ones belong to callbacks.c. */
    const struct code_host_node *known = code_map_get(&replay->code->host_nodes, (uintptr_t)p.user);
    if (known == NULL) return CUDA_ERROR_NOT_SUPPORTED;
    result->value[0] = known->function;
    result->value[1] = known->user;
    return CUDA_SUCCESS;
}

static CUresult get_event(struct vgpu_replay *replay, const struct vgpu_call *call, struct vgpu_result *result, int (*get)(void *, void *))
{
    void *node, *event = NULL;
    if (code_graph_of_node(replay, call->argument[0], &node) == NULL) return CUDA_ERROR_INVALID_VALUE;
    const CUresult status = (CUresult)get(node, &event);
    if (status == CUDA_SUCCESS) result->value[0] = replay_intern(replay, VGPU_KIND_EVENT, event); /* the handle it has already */
    return status;
}

CUresult replay_cuGraphEventRecordNodeGetEvent(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    return get_event(replay, call, result, replay->driver.cuGraphEventRecordNodeGetEvent);
}

CUresult replay_cuGraphEventWaitNodeGetEvent(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    return get_event(replay, call, result, replay->driver.cuGraphEventWaitNodeGetEvent);
}

CUresult replay_cuGraphKernelNodeGetAttribute(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *node;
    if (code_graph_of_node(replay, call->argument[0], &node) == NULL) return CUDA_ERROR_INVALID_VALUE;
    CUlaunchAttribute attribute = {.id = (unsigned)call->argument[1]};
    if (attribute.id == 7 || attribute.id >= 12) return CUDA_ERROR_NOT_SUPPORTED; /* values that are the driver's own pointers */
    const CUresult status = (CUresult)replay->driver.cuGraphKernelNodeGetAttribute(node, attribute.id, &attribute.value);
    if (status != CUDA_SUCCESS) return status;
    memcpy(reply, &attribute.value, sizeof attribute.value);
    result->payload_length = sizeof attribute.value;
    return CUDA_SUCCESS;
}

CUresult replay_cuGraphKernelNodeSetAttribute(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *node;
    if (code_graph_of_node(replay, call->argument[0], &node) == NULL) return CUDA_ERROR_INVALID_VALUE;
    CUlaunchAttribute attribute;
    if (call->payload_length != sizeof attribute) return CUDA_ERROR_INVALID_VALUE;
    const CUresult status = code_launch_attributes(replay, payload, 1, &attribute);
    if (status != CUDA_SUCCESS) return status;
    return (CUresult)replay->driver.cuGraphKernelNodeSetAttribute(node, attribute.id, &attribute.value);
}
