/* SPDX-License-Identifier: Apache-2.0 */
/*
 * graph_exec.c - instances of graphs: instantiate, update, upload, launch, destroy.
 *
 * A launch is one record, as a kernel's is: this is what a token of an LLM costs. An instance keeps its own references to
 * the user objects of the graph it was made from.
 */
#include "code.h"

#include <stdlib.h>

struct instantiate_parameters { /* CUDA_GRAPH_INSTANTIATE_PARAMS */
    uint64_t flags;
    CUstream upload_stream;
    CUgraphNode error_node;
    int result;
};
struct update_result { /* CUgraphExecUpdateResultInfo */
    int result;
    CUgraphNode error_node, error_from_node;
};
#define FLAG_UPLOAD 2u /* CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD */
#define FLAG_DEVICE_LAUNCH 4u

struct shim_exec *shim_exec_of(CUgraphExec exec)
{
    struct shim_object *object = shim_object(VGPU_KIND_EXEC, (uint64_t)(uintptr_t)exec);
    return object == NULL ? NULL : object->data;
}

static void forget(struct shim_exec *exec)
{
    shim_handle_free(exec->handle);
    /* What the graph holds may still be in use by a launch that is under way. */
    shim_references_drop(exec->reference, atomic_load_explicit(&exec->launched, memory_order_relaxed));
    shim_memory_drop(exec->memory);
    free(exec);
}

struct leaving { uint64_t context; struct shim_exec *found[64]; unsigned count; };

static void collect(struct shim_object *object, void *user)
{
    struct leaving *leaving = user;
    if (object->context == leaving->context && object->data != NULL && leaving->count < 64) leaving->found[leaving->count++] = object->data;
}

/* Instances end with their context, on the worker's side too; graphs do not. */
static void end_context(uint64_t context)
{
    struct leaving leaving = {.context = context};
    do {
        leaving.count = 0;
        shim_handle_each(VGPU_KIND_EXEC, collect, &leaving);
        for (unsigned i = 0; i < leaving.count; i++) {
            atomic_store(&leaving.found[i]->launched, false); /* nothing of the context runs any more */
            forget(leaving.found[i]);
        }
    } while (leaving.count != 0);
}

static void end_context_once(void) { shim_on_context_end(end_context); }

CUresult shim_exec_adopt(uint64_t handle, struct shim_graph *graph)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, end_context_once);
    struct shim_exec *exec = calloc(1, sizeof *exec);
    if (exec == NULL || vgpu_handle_kind(handle) != VGPU_KIND_EXEC || !shim_handle_adopt(handle, exec)) {
        free(exec);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    exec->handle = handle;
    exec->reference = shim_references_copy(graph->reference);
    exec->memory = shim_memory_copy(graph);
    return CUDA_SUCCESS;
}

static CUresult instantiate(CUgraphExec *out, CUgraph hGraph, uint64_t flags, CUstream upload, uint64_t *error_node, int *result)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    struct shim_graph *graph = shim_graph_of(hGraph);
    if (out == NULL || graph == NULL) return CUDA_ERROR_INVALID_VALUE;
    if ((flags & FLAG_DEVICE_LAUNCH) != 0) return CUDA_ERROR_NOT_SUPPORTED; /* device code would hold the driver's handle */
    if ((status = shim_capture_check()) != CUDA_SUCCESS) return status;
    uint64_t stream = 0;
    if ((flags & FLAG_UPLOAD) != 0 && (status = shim_stream(upload, &stream)) != CUDA_SUCCESS) return status;
    const uint64_t argument[8] = {graph->handle, flags, stream};
    uint64_t value[4] = {0};
    status = shim_reply(VGPU_CALL_cuGraphInstantiateWithParams, argument, NULL, 0, value, NULL, 0, NULL);
    if (value[1] != 0) (void)shim_node_adopt(value[1], graph->handle);
    if (error_node != NULL) *error_node = value[1];
    if (result != NULL) *result = (int)value[2];
    if (status != CUDA_SUCCESS) return status;
    if ((status = shim_exec_adopt(value[0], graph)) != CUDA_SUCCESS) return status;
    *out = CODE_HANDLE(CUgraphExec, value[0]);
    return CUDA_SUCCESS;
}

CUresult cuGraphInstantiateWithFlags(void *phGraphExec, CUgraph hGraph, unsigned long long flags)
{
    return instantiate(phGraphExec, hGraph, flags & ~(unsigned long long)FLAG_UPLOAD, NULL, NULL, NULL);
}

/* The form of CUDA 10 and 11: a node that is to blame and words about it. The words stay empty. */
CUresult cuGraphInstantiate_v2(void *phGraphExec, CUgraph hGraph, void *phErrorNode, void *logBuffer, size_t bufferSize)
{
    uint64_t error_node = 0;
    const CUresult status = instantiate(phGraphExec, hGraph, 0, NULL, &error_node, NULL);
    if (phErrorNode != NULL) *(CUgraphNode *)phErrorNode = CODE_HANDLE(CUgraphNode, error_node);
    if (logBuffer != NULL && bufferSize != 0) *(char *)logBuffer = 0;
    return status;
}

CUresult cuGraphInstantiate(void *phGraphExec, CUgraph hGraph, void *phErrorNode, void *logBuffer, size_t bufferSize)
{
    return cuGraphInstantiate_v2(phGraphExec, hGraph, phErrorNode, logBuffer, bufferSize);
}

CUresult cuGraphInstantiateWithParams(void *phGraphExec, CUgraph hGraph, void *instantiateParams)
{
    if (instantiateParams == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct instantiate_parameters parameters;
    memcpy(&parameters, instantiateParams, sizeof parameters);
    uint64_t error_node = 0;
    int result = 1; /* CUDA_GRAPH_INSTANTIATE_ERROR */
    const CUresult status = instantiate(phGraphExec, hGraph, parameters.flags, parameters.upload_stream, &error_node, &result);
    parameters.error_node = CODE_HANDLE(CUgraphNode, error_node);
    parameters.result = result;
    memcpy(instantiateParams, &parameters, sizeof parameters);
    return status;
}

static CUresult update(CUgraphExec hGraphExec, CUgraph hGraph, struct update_result *result)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    struct shim_exec *exec = shim_exec_of(hGraphExec);
    struct shim_graph *graph = shim_graph_of(hGraph);
    if (exec == NULL || graph == NULL) return CUDA_ERROR_INVALID_VALUE;
    if ((status = shim_capture_check()) != CUDA_SUCCESS) return status;
    const uint64_t argument[8] = {exec->handle, graph->handle};
    uint64_t value[4] = {0};
    status = shim_reply(VGPU_CALL_cuGraphExecUpdate_v2, argument, NULL, 0, value, NULL, 0, NULL);
    if (value[1] != 0) (void)shim_node_adopt(value[1], graph->handle);
    if (value[2] != 0) (void)shim_node_adopt(value[2], graph->handle);
    *result = (struct update_result){(int)value[0], CODE_HANDLE(CUgraphNode, value[1]), CODE_HANDLE(CUgraphNode, value[2])};
    if (status == CUDA_SUCCESS && (graph->reference != NULL || exec->reference != NULL)) {
        struct shim_reference *old = exec->reference;
        exec->reference = shim_references_copy(graph->reference);
        shim_references_drop(old, true);
    }
    if (status == CUDA_SUCCESS && (graph->memory != NULL || exec->memory != NULL)) {
        struct shim_memory *old = exec->memory;
        exec->memory = shim_memory_copy(graph);
        shim_memory_drop(old);
    }
    return status;
}

CUresult cuGraphExecUpdate_v2(CUgraphExec hGraphExec, CUgraph hGraph, void *resultInfo)
{
    if (resultInfo == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct update_result result = {.result = 1};
    const CUresult status = update(hGraphExec, hGraph, &result);
    memcpy(resultInfo, &result, sizeof result);
    return status;
}

CUresult cuGraphExecUpdate(CUgraphExec hGraphExec, CUgraph hGraph, void *hErrorNode_out, void *updateResult_out)
{
    struct update_result result = {.result = 1};
    const CUresult status = update(hGraphExec, hGraph, &result);
    if (hErrorNode_out != NULL) memcpy(hErrorNode_out, &result.error_node, sizeof result.error_node);
    if (updateResult_out != NULL) memcpy(updateResult_out, &result.result, sizeof result.result);
    return status;
}

static CUresult submit(unsigned call, CUgraphExec hGraphExec, CUstream hStream)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    struct shim_exec *exec = shim_exec_of(hGraphExec);
    if (exec == NULL) return CUDA_ERROR_INVALID_VALUE;
    uint64_t stream;
    if ((status = shim_stream(hStream, &stream)) != CUDA_SUCCESS) return status;
    atomic_store_explicit(&exec->launched, true, memory_order_relaxed);
    const uint64_t argument[8] = {exec->handle, stream};
    if (__builtin_expect(atomic_load_explicit(&shim_captures_active, memory_order_relaxed) != 0, 0)) {
        status = shim_reply(call, argument, NULL, 0, NULL, NULL, 0, NULL); /* becomes a node of the capture, or spoils it */
        /* With memory nodes it cannot become one: it was launched. */
        if (status == CUDA_SUCCESS && exec->memory != NULL && call == VGPU_CALL_cuGraphLaunch) shim_memory_launched(exec->memory);
        return status;
    }
    if (__builtin_expect(exec->memory != NULL, 0)) { /* whether there is memory for it is told by this call */
        status = shim_reply(call, argument, NULL, 0, NULL, NULL, 0, NULL);
        if (status == CUDA_SUCCESS && call == VGPU_CALL_cuGraphLaunch) shim_memory_launched(exec->memory);
    } else {
        status = shim_async(call, argument, NULL, 0);
    }
    if (status != CUDA_SUCCESS) return status;
    shim_callbacks_graph_launched();
    return shim_launch_blocking();
}

CUresult cuGraphUpload(CUgraphExec hGraphExec, CUstream hStream) { return submit(VGPU_CALL_cuGraphUpload, hGraphExec, hStream); }

CUresult cuGraphLaunch(CUgraphExec hGraphExec, CUstream hStream) { return submit(VGPU_CALL_cuGraphLaunch, hGraphExec, hStream); }

CUresult cuGraphExecDestroy(CUgraphExec hGraphExec)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    struct shim_exec *exec = shim_exec_of(hGraphExec);
    if (exec == NULL) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {exec->handle};
    forget(exec);
    return shim_async(VGPU_CALL_cuGraphExecDestroy, argument, NULL, 0);
}
