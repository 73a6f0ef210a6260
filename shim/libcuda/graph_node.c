/* SPDX-License-Identifier: Apache-2.0 */
/*
 * graph_node.c - adding nodes to graphs, reading and changing what they do.
 *
 * Parameters of kernel nodes are packed by the function's table, as in a launch. What Get functions return points into
 * memory of this library that lives as long as the node. Copy nodes take device memory and pinned memory: pinned memory
 * is the arena, which the worker's driver reads when the graph runs; pageable memory would have to be read at a time
 * nobody here knows, so it is refused.
 */
#include "array.h"
#include "code.h"

#include <stdlib.h>

struct kernel_parameters_v1 { /* CUDA_KERNEL_NODE_PARAMS of CUDA 10 and 11 */
    CUfunction func;
    unsigned grid[3], block[3], shared;
    void **kernelParams, **extra;
};
_Static_assert(sizeof(struct kernel_parameters_v1) == 56, "CUDA_KERNEL_NODE_PARAMS_v1");

/* ---- what a node does, as bytes ---- */

struct body { uint8_t *bytes; uint32_t length; uint64_t argument[4]; };

static uint64_t context_handle(CUcontext context)
{
    return context == NULL ? shim_current_context_id() : (uint64_t)(uintptr_t)context;
}

static CUresult kernel_body(const CUDA_KERNEL_NODE_PARAMS *p, struct body *body)
{
    struct shim_function *function = shim_function_of(p->func != NULL ? (const void *)p->func : (const void *)p->kern);
    if (function == NULL) return CUDA_ERROR_INVALID_HANDLE;
    CUresult status = shim_function_describe(function);
    if (status != CUDA_SUCCESS) return status;
    if (function->status != CUDA_SUCCESS) return function->status;
    uint8_t space[1024] __attribute__((aligned(16)));
    uint8_t *packed;
    uint32_t length;
    status = shim_pack_parameters(function, p->kernelParams, p->extra, space, sizeof space, &packed, &length);
    if (status != CUDA_SUCCESS) return status;
    const struct wire_kernel_node node = {
        .function = function->handle,
        .context = (uint64_t)(uintptr_t)p->ctx,
        .grid = {p->gridDimX, p->gridDimY, p->gridDimZ},
        .block = {p->blockDimX, p->blockDimY, p->blockDimZ},
        .shared_bytes = p->sharedMemBytes,
        .parameter_bytes = length,
    };
    const uint32_t padded = (uint32_t)vgpu_align16(length);
    body->bytes = malloc(sizeof node + padded);
    if (body->bytes != NULL) {
        memcpy(body->bytes, &node, sizeof node);
        memcpy(body->bytes + sizeof node, packed, padded);
        body->length = (uint32_t)sizeof node + padded;
    }
    if (packed != space) free(packed);
    return body->bytes == NULL ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

static CUresult plain_body(const void *bytes, size_t length, struct body *body)
{
    if (bytes == NULL) return CUDA_ERROR_INVALID_VALUE;
    body->bytes = calloc(1, vgpu_align16(length));
    if (body->bytes == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    memcpy(body->bytes, bytes, length);
    body->length = (uint32_t)length;
    return CUDA_SUCCESS;
}

/* What is not said of a side in memory is as little as the box needs, as in a copy that is no node. */
static void fill_in(unsigned type, uint64_t x, uint64_t y, size_t *pitch, size_t *height, const CUDA_MEMCPY3D *copy)
{
    if (type == CU_MEMORYTYPE_ARRAY) return;
    if (*pitch == 0) *pitch = x + copy->WidthInBytes;
    if ((*height == 0 || copy->Depth == 1) && *height < y + copy->Height) *height = y + copy->Height;
}

/* Bytes from the base pointer to the end of what a 3D copy touches; 0 when it overflows. */
static uint64_t span(uint64_t x, uint64_t y, uint64_t z, uint64_t pitch, uint64_t height, const CUDA_MEMCPY3D *copy)
{
    if (copy->WidthInBytes == 0 || copy->Height == 0 || copy->Depth == 0) return 1;
    uint64_t rows, bytes, row;
    if (__builtin_add_overflow(z, copy->Depth - 1, &rows) || __builtin_mul_overflow(rows, height, &rows)) return 0;
    if (__builtin_add_overflow(y, copy->Height - 1, &row) || __builtin_add_overflow(rows, row, &rows)) return 0;
    if (__builtin_mul_overflow(rows, pitch, &bytes) || __builtin_add_overflow(bytes, x, &bytes)) return 0;
    return __builtin_add_overflow(bytes, copy->WidthInBytes, &bytes) ? 0 : bytes;
}

/* One side of a copy. On return the side is device memory, or pinned with its arena offset where the pointer stood. */
static CUresult copy_side(unsigned *type, const void **host, CUdeviceptr *device, uint64_t extent, bool *in_arena)
{
    *in_arena = false;
    if (extent == 0) return CUDA_ERROR_INVALID_VALUE;
    const void *pointer = *host;
    if (*type == CU_MEMORYTYPE_UNIFIED) {
        pointer = (const void *)(uintptr_t)*device;
    } else if (*type == CU_MEMORYTYPE_DEVICE) {
        return CUDA_SUCCESS;
    } else if (*type != CU_MEMORYTYPE_HOST) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    uint64_t offset;
    if (shim_arena_offset(pointer, extent, &offset)) {
        *in_arena = true;
        *type = CU_MEMORYTYPE_HOST;
        *host = (const void *)(uintptr_t)offset;
        *device = 0;
        return CUDA_SUCCESS;
    }
    struct shim_range range;
    if (shim_range_find((uint64_t)(uintptr_t)pointer, &range) && range.kind != SHIM_RANGE_REGISTERED) {
        *type = CU_MEMORYTYPE_DEVICE;
        *device = range.device_address + ((uint64_t)(uintptr_t)pointer - range.base);
        *host = NULL;
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_NOT_SUPPORTED;
}

static CUresult copy_body(const void *parameters, CUcontext context, struct body *body)
{
    if (parameters == NULL) return CUDA_ERROR_INVALID_VALUE;
    CUDA_MEMCPY3D copy;
    memcpy(&copy, parameters, sizeof copy);
    copy.reserved0 = copy.reserved1 = NULL;
    fill_in(copy.srcMemoryType, copy.srcXInBytes, copy.srcY, &copy.srcPitch, &copy.srcHeight, &copy);
    fill_in(copy.dstMemoryType, copy.dstXInBytes, copy.dstY, &copy.dstPitch, &copy.dstHeight, &copy);
    bool from_arena = false, to_arena = false;
    const struct array_box from = {copy.srcArray, copy.srcXInBytes, copy.srcY, copy.srcZ};
    const struct array_box to = {copy.dstArray, copy.dstXInBytes, copy.dstY, copy.dstZ};
    const bool from_array = copy.srcMemoryType == CU_MEMORYTYPE_ARRAY, to_array = copy.dstMemoryType == CU_MEMORYTYPE_ARRAY;
    CUresult status = from_array ? array_check(&from, copy.WidthInBytes, copy.Height, copy.Depth)
                                 : copy_side(&copy.srcMemoryType, &copy.srcHost, &copy.srcDevice,
                                             span(copy.srcXInBytes, copy.srcY, copy.srcZ, copy.srcPitch, copy.srcHeight, &copy), &from_arena);
    if (status != CUDA_SUCCESS) return status;
    const void *destination = copy.dstHost;
    status = to_array ? array_check(&to, copy.WidthInBytes, copy.Height, copy.Depth)
                      : copy_side(&copy.dstMemoryType, &destination, &copy.dstDevice,
                                  span(copy.dstXInBytes, copy.dstY, copy.dstZ, copy.dstPitch, copy.dstHeight, &copy), &to_arena);
    if (status != CUDA_SUCCESS) return status;
    memcpy(&copy.dstHost, &destination, sizeof destination);
    body->argument[0] = context_handle(context);
    body->argument[1] = (from_arena ? VGPU_COPY_SOURCE_IN_ARENA : 0) | (to_arena ? VGPU_COPY_DESTINATION_IN_ARENA : 0) |
                        (from_array ? VGPU_COPY_SOURCE_IS_ARRAY : 0) | (to_array ? VGPU_COPY_DESTINATION_IS_ARRAY : 0);
    return plain_body(&copy, sizeof copy, body);
}

static CUresult memset_body(const void *parameters, CUcontext context, struct body *body)
{
    body->argument[0] = context_handle(context);
    return plain_body(parameters, sizeof(struct wire_memset_node), body);
}

static CUresult host_body(const void *parameters, struct body *body)
{
    const CUresult status = shim_callbacks_for_graph();
    return status != CUDA_SUCCESS ? status : plain_body(parameters, sizeof(struct wire_host_node), body);
}

/* ---- adding ---- */

CUresult shim_node_add(unsigned call, CUgraphNode *out, CUgraph hGraph, const CUgraphNode *dependencies, size_t count, const void *bytes,
                       uint32_t length, const uint64_t own[2], uint64_t value[4])
{
    const struct shim_graph *graph = shim_graph_of(hGraph);
    if (out == NULL || graph == NULL) return CUDA_ERROR_INVALID_VALUE;
    uint8_t *head;
    uint32_t head_length;
    CUresult status = shim_node_list(dependencies, NULL, count, &head, &head_length);
    if (status != CUDA_SUCCESS) return status;
    uint8_t *payload = malloc(head_length + length + 1);
    if (payload == NULL || head_length + length > VGPU_INLINE_LIMIT) {
        free(payload);
        free(head);
        return payload == NULL ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_ERROR_NOT_SUPPORTED;
    }
    if (head_length != 0) memcpy(payload, head, head_length);
    if (length != 0) memcpy(payload + head_length, bytes, length);
    const uint64_t argument[8] = {graph->handle, count, own[0], own[1]};
    status = shim_reply(call, argument, payload, head_length + length, value, NULL, 0, NULL);
    free(payload);
    free(head);
    if (status == CUDA_SUCCESS) status = shim_node_adopt(value[0], graph->handle);
    if (status == CUDA_SUCCESS) *out = CODE_HANDLE(CUgraphNode, value[0]);
    return status;
}

static CUresult add(unsigned call, CUgraphNode *out, CUgraph hGraph, const CUgraphNode *dependencies, size_t count, struct body *body)
{
    uint64_t value[4] = {0};
    return shim_node_add(call, out, hGraph, dependencies, count, body->bytes, body->length, body->argument, value);
}

#define ADD_NODE(enter, call, make_body)                                                                      \
    do {                                                                                                 \
        CUresult add_status = (enter);                                                                   \
        struct body body = {0};                                                                          \
        if (add_status == CUDA_SUCCESS) add_status = (make_body);                                        \
        if (add_status == CUDA_SUCCESS) add_status = add(call, phGraphNode, hGraph, dependencies, numDependencies, &body); \
        free(body.bytes);                                                                                \
        return add_status;                                                                               \
    } while (0)

CUresult cuGraphAddKernelNode_v2(void *phGraphNode, CUgraph hGraph, const void *dependencies, size_t numDependencies,
                                 const void *nodeParams)
{
    if (nodeParams == NULL) return CUDA_ERROR_INVALID_VALUE;
    ADD_NODE(shim_enter_context(), VGPU_CALL_cuGraphAddKernelNode_v2, kernel_body(nodeParams, &body));
}

static CUDA_KERNEL_NODE_PARAMS from_v1(const void *nodeParams)
{
    CUDA_KERNEL_NODE_PARAMS p = {0};
    memcpy(&p, nodeParams, sizeof(struct kernel_parameters_v1)); /* v2 is v1 and two more fields */
    return p;
}

CUresult cuGraphAddKernelNode(void *phGraphNode, CUgraph hGraph, const void *dependencies, size_t numDependencies,
                              const void *nodeParams)
{
    if (nodeParams == NULL) return CUDA_ERROR_INVALID_VALUE;
    const CUDA_KERNEL_NODE_PARAMS p = from_v1(nodeParams);
    return cuGraphAddKernelNode_v2(phGraphNode, hGraph, dependencies, numDependencies, &p);
}

CUresult cuGraphAddMemcpyNode(void *phGraphNode, CUgraph hGraph, const void *dependencies, size_t numDependencies,
                              const void *copyParams, CUcontext ctx)
{
    ADD_NODE(shim_enter_context(), VGPU_CALL_cuGraphAddMemcpyNode, copy_body(copyParams, ctx, &body));
}

CUresult cuGraphAddMemsetNode(void *phGraphNode, CUgraph hGraph, const void *dependencies, size_t numDependencies,
                              const void *memsetParams, CUcontext ctx)
{
    ADD_NODE(shim_enter_context(), VGPU_CALL_cuGraphAddMemsetNode, memset_body(memsetParams, ctx, &body));
}

CUresult cuGraphAddEmptyNode(void *phGraphNode, CUgraph hGraph, const void *dependencies, size_t numDependencies)
{
    ADD_NODE(shim_enter(), VGPU_CALL_cuGraphAddEmptyNode, CUDA_SUCCESS);
}

CUresult cuGraphAddHostNode(void *phGraphNode, CUgraph hGraph, const void *dependencies, size_t numDependencies, const void *nodeParams)
{
    ADD_NODE(shim_enter(), VGPU_CALL_cuGraphAddHostNode, host_body(nodeParams, &body));
}

CUresult cuGraphAddChildGraphNode(void *phGraphNode, CUgraph hGraph, const void *dependencies, size_t numDependencies,
                                  CUgraph childGraph)
{
    const struct shim_graph *child = shim_graph_of(childGraph);
    if (child == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct shim_graph *graph = shim_graph_of(hGraph);
    CUresult status = shim_enter();
    struct body body = {.argument = {child->handle}};
    if (status == CUDA_SUCCESS) status = add(VGPU_CALL_cuGraphAddChildGraphNode, phGraphNode, hGraph, dependencies, numDependencies, &body);
    if (status == CUDA_SUCCESS && child->reference != NULL) shim_references_join(&graph->reference, child->reference);
    return status;
}

static CUresult event_argument(CUevent event, struct body *body)
{
    if (!shim_handle_valid(VGPU_KIND_EVENT, (uint64_t)(uintptr_t)event)) return CUDA_ERROR_INVALID_HANDLE;
    body->argument[0] = (uint64_t)(uintptr_t)event;
    return CUDA_SUCCESS;
}

CUresult cuGraphAddEventRecordNode(void *phGraphNode, CUgraph hGraph, const void *dependencies, size_t numDependencies, CUevent event)
{
    ADD_NODE(shim_enter(), VGPU_CALL_cuGraphAddEventRecordNode, event_argument(event, &body));
}

CUresult cuGraphAddEventWaitNode(void *phGraphNode, CUgraph hGraph, const void *dependencies, size_t numDependencies, CUevent event)
{
    ADD_NODE(shim_enter(), VGPU_CALL_cuGraphAddEventWaitNode, event_argument(event, &body));
}

/* ---- changing: in the graph, or in one instance of it ---- */

static CUresult change(unsigned call, const CUgraphExec *exec, CUgraphNode hNode, struct body *body)
{
    const struct shim_node *node = shim_node_of(hNode);
    if (node == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (exec != NULL && shim_exec_of(*exec) == NULL) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {node->handle, exec == NULL ? 0 : (uint64_t)(uintptr_t)*exec, body->argument[0], body->argument[1]};
    return shim_reply(call, argument, body->bytes, body->length, NULL, NULL, 0, NULL);
}

#define CHANGE_NODE(call, exec, make_body)                                      \
    do {                                                                        \
        CUresult change_status = shim_enter_context();                          \
        struct body body = {0};                                                 \
        if (change_status == CUDA_SUCCESS) change_status = (make_body);         \
        if (change_status == CUDA_SUCCESS) change_status = change(call, exec, hNode, &body); \
        free(body.bytes);                                                       \
        return change_status;                                                   \
    } while (0)

CUresult cuGraphKernelNodeSetParams_v2(CUgraphNode hNode, const void *nodeParams)
{
    if (nodeParams == NULL) return CUDA_ERROR_INVALID_VALUE;
    CHANGE_NODE(VGPU_CALL_cuGraphKernelNodeSetParams_v2, NULL, kernel_body(nodeParams, &body));
}

CUresult cuGraphKernelNodeSetParams(CUgraphNode hNode, const void *nodeParams)
{
    if (nodeParams == NULL) return CUDA_ERROR_INVALID_VALUE;
    const CUDA_KERNEL_NODE_PARAMS p = from_v1(nodeParams);
    return cuGraphKernelNodeSetParams_v2(hNode, &p);
}

CUresult cuGraphExecKernelNodeSetParams_v2(CUgraphExec hGraphExec, CUgraphNode hNode, const void *nodeParams)
{
    if (nodeParams == NULL) return CUDA_ERROR_INVALID_VALUE;
    CHANGE_NODE(VGPU_CALL_cuGraphExecKernelNodeSetParams_v2, &hGraphExec, kernel_body(nodeParams, &body));
}

CUresult cuGraphExecKernelNodeSetParams(CUgraphExec hGraphExec, CUgraphNode hNode, const void *nodeParams)
{
    if (nodeParams == NULL) return CUDA_ERROR_INVALID_VALUE;
    const CUDA_KERNEL_NODE_PARAMS p = from_v1(nodeParams);
    return cuGraphExecKernelNodeSetParams_v2(hGraphExec, hNode, &p);
}

CUresult cuGraphMemcpyNodeSetParams(CUgraphNode hNode, const void *nodeParams)
{
    CHANGE_NODE(VGPU_CALL_cuGraphMemcpyNodeSetParams, NULL, copy_body(nodeParams, NULL, &body));
}

CUresult cuGraphExecMemcpyNodeSetParams(CUgraphExec hGraphExec, CUgraphNode hNode, const void *copyParams, CUcontext ctx)
{
    CHANGE_NODE(VGPU_CALL_cuGraphExecMemcpyNodeSetParams, &hGraphExec, copy_body(copyParams, ctx, &body));
}

CUresult cuGraphMemsetNodeSetParams(CUgraphNode hNode, const void *nodeParams)
{
    CHANGE_NODE(VGPU_CALL_cuGraphMemsetNodeSetParams, NULL, memset_body(nodeParams, NULL, &body));
}

CUresult cuGraphExecMemsetNodeSetParams(CUgraphExec hGraphExec, CUgraphNode hNode, const void *memsetParams, CUcontext ctx)
{
    CHANGE_NODE(VGPU_CALL_cuGraphExecMemsetNodeSetParams, &hGraphExec, memset_body(memsetParams, ctx, &body));
}

CUresult cuGraphHostNodeSetParams(CUgraphNode hNode, const void *nodeParams)
{
    CHANGE_NODE(VGPU_CALL_cuGraphHostNodeSetParams, NULL, host_body(nodeParams, &body));
}

CUresult cuGraphExecHostNodeSetParams(CUgraphExec hGraphExec, CUgraphNode hNode, const void *nodeParams)
{
    CHANGE_NODE(VGPU_CALL_cuGraphExecHostNodeSetParams, &hGraphExec, host_body(nodeParams, &body));
}

CUresult cuGraphEventRecordNodeSetEvent(CUgraphNode hNode, CUevent event)
{
    CHANGE_NODE(VGPU_CALL_cuGraphEventRecordNodeSetEvent, NULL, event_argument(event, &body));
}

CUresult cuGraphEventWaitNodeSetEvent(CUgraphNode hNode, CUevent event)
{
    CHANGE_NODE(VGPU_CALL_cuGraphEventWaitNodeSetEvent, NULL, event_argument(event, &body));
}

CUresult cuGraphExecEventRecordNodeSetEvent(CUgraphExec hGraphExec, CUgraphNode hNode, CUevent event)
{
    CHANGE_NODE(VGPU_CALL_cuGraphExecEventRecordNodeSetEvent, &hGraphExec, event_argument(event, &body));
}

CUresult cuGraphExecEventWaitNodeSetEvent(CUgraphExec hGraphExec, CUgraphNode hNode, CUevent event)
{
    CHANGE_NODE(VGPU_CALL_cuGraphExecEventWaitNodeSetEvent, &hGraphExec, event_argument(event, &body));
}

/* ---- reading ---- */

static CUresult read_node(unsigned call, CUgraphNode hNode, struct shim_node **node, uint64_t value[4], void *reply, uint32_t capacity,
                          uint32_t *length)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    *node = shim_node_of(hNode);
    if (*node == NULL) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {(*node)->handle};
    return shim_reply(call, argument, NULL, 0, value, reply, capacity, length);
}

CUresult cuGraphKernelNodeGetParams_v2(CUgraphNode hNode, void *nodeParams)
{
    if (nodeParams == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct shim_node *node;
    uint64_t value[4] = {0};
    uint8_t reply[VGPU_SLOT_PAYLOAD_LIMIT];
    uint32_t length = 0;
    CUresult status = read_node(VGPU_CALL_cuGraphKernelNodeGetParams_v2, hNode, &node, value, reply, sizeof reply, &length);
    if (status != CUDA_SUCCESS) return status;
    struct wire_kernel_node wire;
    if (length < sizeof wire) return CUDA_ERROR_UNKNOWN;
    memcpy(&wire, reply, sizeof wire);
    if (wire.parameter_bytes > VGPU_PARAMETER_BYTES_LIMIT + 64) return CUDA_ERROR_UNKNOWN;
    /* A function the guest has not met: captured work of a library kernel. value[1] names its owner. */
    struct shim_function *function = shim_function_of((void *)(uintptr_t)wire.function);
    if (function == NULL && wire.function != 0) {
        struct shim_code *owner = shim_code_of(value[1]);
        if (owner != NULL) function = shim_function_adopt(wire.function, owner, NULL, NULL, 0);
    }
    if (function == NULL) return CUDA_ERROR_INVALID_HANDLE;
    if ((status = shim_function_describe(function)) != CUDA_SUCCESS) return status;
    if (wire.parameter_bytes < function->parameter_bytes) return CUDA_ERROR_UNKNOWN;
    /* One block: the pointers, then the parameters they point to. */
    const size_t pointers = (function->parameter_count + 2) / 2 * 16;
    uint8_t *block = calloc(1, pointers + vgpu_align16(wire.parameter_bytes));
    if (block == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    uint8_t *bytes = block + pointers;
    if (value[0] != 0) { /* more than a slot holds */
        status = shim_blob_read(value[0], bytes, wire.parameter_bytes);
        (void)shim_blob_free(value[0]);
    } else if (length - sizeof wire >= wire.parameter_bytes) {
        memcpy(bytes, reply + sizeof wire, wire.parameter_bytes);
    } else {
        status = CUDA_ERROR_UNKNOWN;
    }
    if (status != CUDA_SUCCESS) {
        free(block);
        return status;
    }
    void **array = (void **)(void *)block;
    for (uint32_t i = 0; i < function->parameter_count; i++) array[i] = bytes + function->parameter[i].offset;
    free(node->parameters);
    node->parameters = block;
    const bool is_kernel = vgpu_handle_kind(wire.function) == VGPU_KIND_KERNEL;
    const CUDA_KERNEL_NODE_PARAMS p = {
        .func = is_kernel ? NULL : CODE_HANDLE(CUfunction, wire.function),
        .gridDimX = wire.grid[0], .gridDimY = wire.grid[1], .gridDimZ = wire.grid[2],
        .blockDimX = wire.block[0], .blockDimY = wire.block[1], .blockDimZ = wire.block[2],
        .sharedMemBytes = wire.shared_bytes,
        .kernelParams = array,
        .kern = is_kernel ? CODE_HANDLE(CUkernel, wire.function) : NULL,
        .ctx = CODE_HANDLE(CUcontext, wire.context),
    };
    memcpy(nodeParams, &p, sizeof p);
    return CUDA_SUCCESS;
}

CUresult cuGraphKernelNodeGetParams(CUgraphNode hNode, void *nodeParams)
{
    if (nodeParams == NULL) return CUDA_ERROR_INVALID_VALUE;
    CUDA_KERNEL_NODE_PARAMS p;
    CUresult status = cuGraphKernelNodeGetParams_v2(hNode, &p);
    if (status == CUDA_SUCCESS && p.func == NULL) status = cuKernelGetFunction(&p.func, p.kern);
    if (status == CUDA_SUCCESS) memcpy(nodeParams, &p, sizeof(struct kernel_parameters_v1));
    return status;
}

CUresult cuGraphMemcpyNodeGetParams(CUgraphNode hNode, void *nodeParams)
{
    if (nodeParams == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct shim_node *node;
    uint64_t value[4] = {0};
    CUDA_MEMCPY3D copy;
    uint32_t length = 0;
    const CUresult status = read_node(VGPU_CALL_cuGraphMemcpyNodeGetParams, hNode, &node, value, &copy, sizeof copy, &length);
    if (status != CUDA_SUCCESS) return status;
    if (length != sizeof copy) return CUDA_ERROR_UNKNOWN;
    if ((value[0] & VGPU_COPY_SOURCE_IN_ARENA) != 0) copy.srcHost = shim.base + (uintptr_t)copy.srcHost;
    if ((value[0] & VGPU_COPY_DESTINATION_IN_ARENA) != 0) copy.dstHost = shim.base + (uintptr_t)copy.dstHost;
    memcpy(nodeParams, &copy, sizeof copy);
    return CUDA_SUCCESS;
}

CUresult cuGraphMemsetNodeGetParams(CUgraphNode hNode, void *nodeParams)
{
    if (nodeParams == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct shim_node *node;
    uint64_t value[4] = {0};
    struct wire_memset_node wire;
    uint32_t length = 0;
    const CUresult status = read_node(VGPU_CALL_cuGraphMemsetNodeGetParams, hNode, &node, value, &wire, sizeof wire, &length);
    if (status != CUDA_SUCCESS) return status;
    if (length != sizeof wire) return CUDA_ERROR_UNKNOWN;
    memcpy(nodeParams, &wire, sizeof wire);
    return CUDA_SUCCESS;
}

CUresult cuGraphHostNodeGetParams(CUgraphNode hNode, void *nodeParams)
{
    if (nodeParams == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct shim_node *node;
    uint64_t value[4] = {0};
    const CUresult status = read_node(VGPU_CALL_cuGraphHostNodeGetParams, hNode, &node, value, NULL, 0, NULL);
    if (status != CUDA_SUCCESS) return status;
    const struct wire_host_node wire = {.function = value[0], .user = value[1]};
    memcpy(nodeParams, &wire, sizeof wire);
    return CUDA_SUCCESS;
}

static CUresult read_event(unsigned call, CUgraphNode hNode, CUevent *event)
{
    if (event == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct shim_node *node;
    uint64_t value[4] = {0};
    const CUresult status = read_node(call, hNode, &node, value, NULL, 0, NULL);
    if (status == CUDA_SUCCESS) *event = CODE_HANDLE(CUevent, value[0]);
    return status;
}

CUresult cuGraphEventRecordNodeGetEvent(CUgraphNode hNode, void *event_out)
{
    return read_event(VGPU_CALL_cuGraphEventRecordNodeGetEvent, hNode, event_out);
}

CUresult cuGraphEventWaitNodeGetEvent(CUgraphNode hNode, void *event_out)
{
    return read_event(VGPU_CALL_cuGraphEventWaitNodeGetEvent, hNode, event_out);
}

CUresult cuGraphKernelNodeGetAttribute(CUgraphNode hNode, unsigned int attr, void *value_out)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    const struct shim_node *node = shim_node_of(hNode);
    if (node == NULL || value_out == NULL) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {node->handle, attr};
    uint8_t reply[64];
    uint32_t length = 0;
    status = shim_reply(VGPU_CALL_cuGraphKernelNodeGetAttribute, argument, NULL, 0, NULL, reply, sizeof reply, &length);
    if (status == CUDA_SUCCESS && length == sizeof reply) memcpy(value_out, reply, sizeof reply);
    return status;
}

CUresult cuGraphKernelNodeSetAttribute(CUgraphNode hNode, unsigned int attr, const void *value)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    const struct shim_node *node = shim_node_of(hNode);
    if (node == NULL || value == NULL) return CUDA_ERROR_INVALID_VALUE;
    CUlaunchAttribute attribute = {.id = attr}, carried;
    memcpy(&attribute.value, value, sizeof attribute.value);
    if ((status = shim_launch_attributes(&attribute, 1, &carried)) != CUDA_SUCCESS) return status;
    const uint64_t argument[8] = {node->handle, attr};
    return shim_reply(VGPU_CALL_cuGraphKernelNodeSetAttribute, argument, &carried, sizeof carried, NULL, NULL, 0, NULL);
}

/* ---- one entry for all types (CUDA 12.2) ---- */

enum node_type { KERNEL, MEMCPY, MEMSET, HOST, CHILD, EMPTY, WAIT_EVENT, EVENT_RECORD, MEM_ALLOC = 10, MEM_FREE };

/* CUgraphNodeParams: the type, then the parameters of that type at offset 16. */
static CUresult typed_body(const uint8_t *parameters, struct body *body, unsigned *add_call, unsigned *set_call, unsigned *exec_call)
{
    int type;
    memcpy(&type, parameters, sizeof type);
    const uint8_t *at = parameters + 16;
    void *handle;
    memcpy(&handle, at, sizeof handle);
    switch (type) {
    case KERNEL: {
        CUDA_KERNEL_NODE_PARAMS p;
        memcpy(&p, at, sizeof p);
        *add_call = VGPU_CALL_cuGraphAddKernelNode_v2;
        *set_call = VGPU_CALL_cuGraphKernelNodeSetParams_v2;
        *exec_call = VGPU_CALL_cuGraphExecKernelNodeSetParams_v2;
        return kernel_body(&p, body);
    }
    case MEMCPY: { /* flags, reserved, context, CUDA_MEMCPY3D */
        CUcontext context;
        memcpy(&context, at + 8, sizeof context);
        *add_call = VGPU_CALL_cuGraphAddMemcpyNode;
        *set_call = VGPU_CALL_cuGraphMemcpyNodeSetParams;
        *exec_call = VGPU_CALL_cuGraphExecMemcpyNodeSetParams;
        return copy_body(at + 16, context, body);
    }
    case MEMSET: {
        CUcontext context;
        memcpy(&context, at + sizeof(struct wire_memset_node), sizeof context);
        *add_call = VGPU_CALL_cuGraphAddMemsetNode;
        *set_call = VGPU_CALL_cuGraphMemsetNodeSetParams;
        *exec_call = VGPU_CALL_cuGraphExecMemsetNodeSetParams;
        return memset_body(at, context, body);
    }
    case HOST:
        *add_call = VGPU_CALL_cuGraphAddHostNode;
        *set_call = VGPU_CALL_cuGraphHostNodeSetParams;
        *exec_call = VGPU_CALL_cuGraphExecHostNodeSetParams;
        return host_body(at, body);
    case CHILD: {
        const struct shim_graph *child = shim_graph_of(handle);
        int ownership;
        memcpy(&ownership, at + 8, sizeof ownership);
        if (child == NULL) return CUDA_ERROR_INVALID_VALUE;
        if (ownership != 0) return CUDA_ERROR_NOT_SUPPORTED; /* moving a graph into another */
        body->argument[0] = child->handle;
        *add_call = VGPU_CALL_cuGraphAddChildGraphNode;
        *exec_call = VGPU_CALL_cuGraphExecChildGraphNodeSetParams;
        return CUDA_SUCCESS;
    }
    case EMPTY: *add_call = VGPU_CALL_cuGraphAddEmptyNode; return CUDA_SUCCESS;
    case WAIT_EVENT:
        *add_call = VGPU_CALL_cuGraphAddEventWaitNode;
        *set_call = VGPU_CALL_cuGraphEventWaitNodeSetEvent;
        *exec_call = VGPU_CALL_cuGraphExecEventWaitNodeSetEvent;
        return event_argument(handle, body);
    case EVENT_RECORD:
        *add_call = VGPU_CALL_cuGraphAddEventRecordNode;
        *set_call = VGPU_CALL_cuGraphEventRecordNodeSetEvent;
        *exec_call = VGPU_CALL_cuGraphExecEventRecordNodeSetEvent;
        return event_argument(handle, body);
    default: return CUDA_ERROR_NOT_SUPPORTED;
    }
}

/* A memory node takes no part in what edges can say besides the order. */
static CUresult add_memory_node(int type, void *phGraphNode, CUgraph hGraph, const void *dependencies, const void *edges, size_t count,
                                uint8_t *parameters)
{
    for (size_t i = 0; edges != NULL && i < 8 * count; i++)
        if (((const uint8_t *)edges)[i] != 0) return CUDA_ERROR_INVALID_VALUE;
    if (type == MEM_ALLOC) return cuGraphAddMemAllocNode(phGraphNode, hGraph, dependencies, count, parameters);
    unsigned long long address;
    memcpy(&address, parameters, sizeof address);
    return cuGraphAddMemFreeNode(phGraphNode, hGraph, dependencies, count, address);
}

CUresult cuGraphAddNode_v2(void *phGraphNode, CUgraph hGraph, const void *dependencies, const void *dependencyData,
                           size_t numDependencies, void *nodeParams)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if (nodeParams == NULL) return CUDA_ERROR_INVALID_VALUE;
    int type;
    memcpy(&type, nodeParams, sizeof type);
    if (type == MEM_ALLOC || type == MEM_FREE)
        return add_memory_node(type, phGraphNode, hGraph, dependencies, dependencyData, numDependencies, (uint8_t *)nodeParams + 16);
    struct body body = {0};
    unsigned add_call = 0, set_call = 0, exec_call = 0;
    status = typed_body(nodeParams, &body, &add_call, &set_call, &exec_call);
    /* Edges with data are drawn after the node is there: the older calls that carry nodes know none. */
    if (status == CUDA_SUCCESS)
        status = add(add_call, phGraphNode, hGraph, dependencies, dependencyData == NULL ? numDependencies : 0, &body);
    free(body.bytes);
    if (status != CUDA_SUCCESS || dependencyData == NULL || numDependencies == 0) return status;
    CUgraphNode *to = calloc(numDependencies, sizeof *to);
    if (to == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    for (size_t i = 0; i < numDependencies; i++) memcpy(&to[i], phGraphNode, sizeof *to);
    status = cuGraphAddDependencies_v2(hGraph, dependencies, to, dependencyData, numDependencies);
    if (status != CUDA_SUCCESS) (void)cuGraphDestroyNode(to[0]);
    free(to);
    return status;
}

CUresult cuGraphAddNode(void *phGraphNode, CUgraph hGraph, const void *dependencies, size_t numDependencies, void *nodeParams)
{
    return cuGraphAddNode_v2(phGraphNode, hGraph, dependencies, NULL, numDependencies, nodeParams);
}

static CUresult set_typed(const CUgraphExec *exec, CUgraphNode hNode, const void *nodeParams)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if (nodeParams == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct body body = {0};
    unsigned add_call = 0, set_call = 0, exec_call = 0;
    status = typed_body(nodeParams, &body, &add_call, &set_call, &exec_call);
    const unsigned call = exec == NULL ? set_call : exec_call;
    if (status == CUDA_SUCCESS && call == 0) status = CUDA_ERROR_NOT_SUPPORTED;
    if (status == CUDA_SUCCESS && call == VGPU_CALL_cuGraphExecChildGraphNodeSetParams)
        status = cuGraphExecChildGraphNodeSetParams(*exec, hNode, CODE_HANDLE(CUgraph, body.argument[0]));
    else if (status == CUDA_SUCCESS)
        status = change(call, exec, hNode, &body);
    free(body.bytes);
    return status;
}

CUresult cuGraphNodeSetParams(CUgraphNode hNode, void *nodeParams) { return set_typed(NULL, hNode, nodeParams); }

CUresult cuGraphExecNodeSetParams(CUgraphExec hGraphExec, CUgraphNode hNode, void *nodeParams)
{
    return set_typed(&hGraphExec, hNode, nodeParams);
}
