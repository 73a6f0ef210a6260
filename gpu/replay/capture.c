/* SPDX-License-Identifier: Apache-2.0 */
/*
 * capture.c - stream capture in the driver. Always relaxed: one replay thread stands for all threads of the guest, so the
 * driver's own rules about threads would forbid what the guest may do. The guest enforces them and tells us when a
 * capture is spoilt.
 */
#include "code.h"
#include "internal.h"

#define RELAXED 2u /* CU_STREAM_CAPTURE_MODE_RELAXED */
enum { NONE, ACTIVE, INVALIDATED };

CUresult replay_cuStreamIsCapturing(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *stream;
    if (!code_stream(replay, call->argument[0], &stream)) return CUDA_ERROR_INVALID_HANDLE;
    unsigned capturing = NONE;
    const CUresult status = (CUresult)replay->driver.cuStreamIsCapturing(stream, &capturing);
    result->value[0] = capturing;
    return status;
}

CUresult replay_cuStreamBeginCapture_v2(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *stream;
    if (!code_stream(replay, call->argument[0], &stream)) return CUDA_ERROR_INVALID_HANDLE;
    replay_stream_retire(replay, call->argument[0]);
    const CUresult status = (CUresult)replay->driver.cuStreamBeginCapture_v2(stream, RELAXED);
    if (status != CUDA_SUCCESS) return status;
    replay->private->captures++;
    /* The graph that the guest may be told of until the capture ends: when it is spoilt the driver names it no more. */
    struct replay_code *code = code_of(replay);
    unsigned capturing = NONE;
    unsigned long long id = 0;
    void *graph = NULL;
    if (code != NULL && replay->driver.cuStreamGetCaptureInfo_v3(stream, &capturing, &id, &graph, NULL, NULL, NULL) == 0 &&
        capturing == ACTIVE && graph != NULL)
        (void)code_map_put(&code->captures, call->argument[0], graph);
    return CUDA_SUCCESS;
}

/* arguments: stream, graph, dependencies, whether edge data follow */
CUresult replay_cuStreamBeginCaptureToGraph(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *stream, *graph, **nodes;
    uint64_t *edges;
    uint32_t used;
    if (!code_stream(replay, call->argument[0], &stream)) return CUDA_ERROR_INVALID_HANDLE;
    struct code_graph *known = code_graph_of(replay, call->argument[1], &graph);
    if (known == NULL) return CUDA_ERROR_INVALID_VALUE;
    CUresult status =
        code_node_list(replay, payload, call->payload_length, call->argument[2], call->argument[3] != 0, &nodes, &edges, &used);
    if (status != CUDA_SUCCESS) return status;
    replay_stream_retire(replay, call->argument[0]);
    status = (CUresult)replay->driver.cuStreamBeginCaptureToGraph(stream, graph, nodes, edges, call->argument[2], RELAXED);
    if (status == CUDA_SUCCESS) {
        known->captured_into = true;
        (void)code_map_put(&replay->code->captures, call->argument[0], graph);
        replay->private->captures++;
    }
    free(nodes);
    free(edges);
    return status;
}

/* value[0]: the graph, or if there is none the handle that ended with it; value[1]: what the stream is afterwards */
CUresult replay_cuStreamEndCapture(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *stream, *graph = NULL;
    if (!code_stream(replay, call->argument[0], &stream)) return CUDA_ERROR_INVALID_HANDLE;
    unsigned after = NONE;
    const bool captured_before = replay_is_capturing(replay, stream);
    const CUresult status = (CUresult)replay->driver.cuStreamEndCapture(stream, &graph);
    if (replay->driver.cuStreamIsCapturing(stream, &after) != 0) after = NONE;
    result->value[1] = after;
    if (captured_before && after == NONE && replay->private->captures != 0) replay->private->captures--;
    if (status != CUDA_SUCCESS) {
        /* A spoilt capture takes its graph with it, and what the guest knows of that must go too. */
        if (captured_before && after == NONE) result->value[0] = code_capture_lost(replay, call->argument[0]);
        return status;
    }
    if (replay->code != NULL) (void)code_map_take(&replay->code->captures, call->argument[0]);
    result->value[0] = code_graph_intern(replay, graph, 0);
    if (result->value[0] != 0) return CUDA_SUCCESS;
    (void)replay->driver.cuGraphDestroy(graph);
    return CUDA_ERROR_OUT_OF_MEMORY;
}

/* arguments: stream, first dependency, whether they are wanted; payload back: node and edge data, alternating */
CUresult replay_cuStreamGetCaptureInfo_v3(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *stream, *graph = NULL;
    void *const *nodes = NULL;
    const uint64_t *edges = NULL;
    unsigned capturing = NONE;
    unsigned long long id = 0;
    size_t count = 0;
    if (!code_stream(replay, call->argument[0], &stream)) return CUDA_ERROR_INVALID_HANDLE;
    const CUresult status = (CUresult)replay->driver.cuStreamGetCaptureInfo_v3(stream, &capturing, &id, &graph, &nodes, &edges, &count);
    result->value[0] = capturing;
    if (status != CUDA_SUCCESS || capturing != ACTIVE) return status;
    result->value[1] = id;
    result->value[2] = code_graph_intern(replay, graph, 0);
    result->value[3] = count;
    if (call->argument[2] == 0 || nodes == NULL) return CUDA_SUCCESS;
    struct code_graph *owner = code_graph_of(replay, result->value[2], &graph);
    if (owner == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    uint32_t used = 0;
    for (uint64_t i = call->argument[1]; i < count && used + 16 <= VGPU_SLOT_PAYLOAD_LIMIT; i++, used += 16) {
        const uint64_t pair[2] = {code_node_intern(replay, nodes[i], owner), edges == NULL ? 0 : edges[i]};
        if (pair[0] == 0) return CUDA_ERROR_OUT_OF_MEMORY;
        memcpy(reply + used, pair, sizeof pair);
    }
    result->payload_length = (uint16_t)used;
    return CUDA_SUCCESS;
}

/* arguments: stream, dependencies, whether edge data follow, flags */
CUresult replay_cuStreamUpdateCaptureDependencies_v2(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *stream, **nodes;
    uint64_t *edges;
    uint32_t used;
    if (!code_stream(replay, call->argument[0], &stream)) return CUDA_ERROR_INVALID_HANDLE;
    CUresult status =
        code_node_list(replay, payload, call->payload_length, call->argument[1], call->argument[2] != 0, &nodes, &edges, &used);
    if (status != CUDA_SUCCESS) return status;
    status = (CUresult)replay->driver.cuStreamUpdateCaptureDependencies_v2(stream, nodes, edges, call->argument[1], (unsigned)call->argument[3]);
    free(nodes);
    free(edges);
    return status;
}

/* The guest did something that CUDA forbids while this stream captures. Asking a capturing stream whether it is done is
 * such a thing in every mode, and the driver draws the consequence. */
CUresult replay_wireCaptureInvalidate(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    void *stream;
    if (!code_stream(replay, call->argument[0], &stream)) return CUDA_SUCCESS; /* destroyed meanwhile */
    if (replay_is_capturing(replay, stream)) (void)replay->driver.cuStreamQuery(stream);
    return CUDA_SUCCESS;
}
