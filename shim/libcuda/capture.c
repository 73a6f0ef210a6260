/* SPDX-License-Identifier: Apache-2.0 */
/*
 * capture.c - stream capture: who captures is known here, what is captured is known by the worker.
 *
 * The worker's one replay thread serves all threads of this process, so it begins every capture in relaxed mode; the
 * rules about threads (CU_STREAM_CAPTURE_MODE_GLOBAL, THREAD_LOCAL, ending in another thread) are enforced here, with
 * the consequence CUDA gives them: the capture is spoilt, which the worker is told. A stream that joins a capture
 * through an event is not known here, so while anything captures the worker is asked; while nothing does, nobody is.
 */
#include "code.h"

#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

enum mode { GLOBAL, THREAD_LOCAL, RELAXED };
enum status { NONE, ACTIVE, INVALIDATED };

/* One capture begun by this process and not ended yet. */
struct capture {
    struct capture *next;
    uint64_t stream;
    unsigned mode;
    long thread;
    bool spoilt;
};

/* What GetCaptureInfo handed out for a stream; valid until the next such call on it. */
struct info {
    struct info *next;
    uint64_t stream;
    uint64_t *node, *edge;
};

_Atomic uint32_t shim_captures_active;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct capture *captures;
static struct info *infos;

static long this_thread(void)
{
    static __thread long id __attribute__((tls_model("initial-exec")));
    if (id == 0) id = syscall(SYS_gettid);
    return id;
}

static void drop_infos(void)
{
    while (infos != NULL) {
        struct info *next = infos->next;
        free(infos->node);
        free(infos->edge);
        free(infos);
        infos = next;
    }
}

/* Mutex held. */
static void remove_capture(struct capture **at)
{
    struct capture *capture = *at;
    *at = capture->next;
    free(capture);
    if (atomic_fetch_sub(&shim_captures_active, 1) == 1) drop_infos();
}

static void add_capture(uint64_t stream, unsigned mode)
{
    struct capture *capture = calloc(1, sizeof *capture);
    if (capture == NULL) return; /* the rules about threads go unenforced; the capture itself lives in the worker */
    *capture = (struct capture){.stream = stream, .mode = mode, .thread = this_thread()};
    pthread_mutex_lock(&mutex);
    capture->next = captures;
    captures = capture;
    atomic_fetch_add(&shim_captures_active, 1);
    pthread_mutex_unlock(&mutex);
}

static void spoil(uint64_t stream)
{
    const uint64_t argument[8] = {stream};
    (void)shim_async(VGPU_CALL_wireCaptureInvalidate, argument, NULL, 0);
}

void shim_capture_stream_gone(uint64_t stream_id)
{
    if (atomic_load_explicit(&shim_captures_active, memory_order_relaxed) == 0) return;
    pthread_mutex_lock(&mutex);
    for (struct capture **at = &captures; *at != NULL;)
        if ((*at)->stream == stream_id)
            remove_capture(at);
        else
            at = &(*at)->next;
    pthread_mutex_unlock(&mutex);
}

CUresult shim_capture_forbid(uint64_t stream_id)
{
    spoil(stream_id);
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

CUresult shim_capture_forbid_all(void)
{
    uint64_t concerned[64];
    unsigned count = 0;
    pthread_mutex_lock(&mutex);
    for (struct capture *c = captures; c != NULL && count < 64; c = c->next) {
        if (c->spoilt) continue;
        c->spoilt = true;
        concerned[count++] = c->stream;
    }
    pthread_mutex_unlock(&mutex);
    for (unsigned i = 0; i < count; i++) spoil(concerned[i]);
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

CUresult shim_capture_check(void)
{
    if (__builtin_expect(atomic_load_explicit(&shim_captures_active, memory_order_relaxed) == 0, 1)) return CUDA_SUCCESS;
    const unsigned own = shim_thread()->capture_mode;
    if (own == RELAXED) return CUDA_SUCCESS;
    uint64_t concerned[64];
    unsigned count = 0;
    bool forbidden = false;
    pthread_mutex_lock(&mutex);
    for (struct capture *c = captures; c != NULL; c = c->next) {
        const bool mine = c->thread == this_thread();
        if (!(mine ? c->mode != RELAXED : own == GLOBAL && c->mode == GLOBAL)) continue;
        forbidden = true;
        if (!c->spoilt && count < 64) {
            c->spoilt = true;
            concerned[count++] = c->stream;
        }
    }
    pthread_mutex_unlock(&mutex);
    for (unsigned i = 0; i < count; i++) spoil(concerned[i]);
    return forbidden ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}

/* A stream of the program's own knows its context; the special ones are those of the current one. */
static CUresult enter(CUstream stream) { return (uintptr_t)stream <= 2 ? shim_enter_context() : shim_enter(); }

static CUresult ask_status(uint64_t stream, unsigned *status)
{
    const uint64_t argument[8] = {stream};
    uint64_t value[4] = {0};
    const CUresult result = shim_reply(VGPU_CALL_cuStreamIsCapturing, argument, NULL, 0, value, NULL, 0, NULL);
    *status = (unsigned)value[0];
    return result;
}

bool shim_stream_is_capturing(uint64_t stream_id)
{
    if (atomic_load_explicit(&shim_captures_active, memory_order_relaxed) == 0) return false;
    unsigned status = NONE;
    return ask_status(stream_id, &status) == CUDA_SUCCESS && status != NONE;
}

CUresult cuStreamIsCapturing(CUstream hStream, unsigned int *captureStatus)
{
    CUresult status = enter(hStream);
    if (status != CUDA_SUCCESS) return status;
    if (captureStatus == NULL) return CUDA_ERROR_INVALID_VALUE;
    uint64_t stream;
    if ((status = shim_stream(hStream, &stream)) != CUDA_SUCCESS) return status;
    if (atomic_load_explicit(&shim_captures_active, memory_order_relaxed) == 0) {
        *captureStatus = NONE;
        return CUDA_SUCCESS;
    }
    return ask_status(stream, captureStatus);
}

static CUresult begin(CUstream handle, unsigned mode, const struct shim_graph *graph, const CUgraphNode *dependencies,
                      const void *edges, size_t count)
{
    uint64_t stream;
    CUresult status = shim_stream(handle, &stream);
    if (status != CUDA_SUCCESS) return status;
    if (mode > RELAXED) return CUDA_ERROR_INVALID_VALUE;
    uint8_t *payload = NULL;
    uint32_t length = 0;
    if (graph != NULL && (status = shim_node_list(dependencies, edges, count, &payload, &length)) != CUDA_SUCCESS) return status;
    const uint64_t argument[8] = {stream, graph == NULL ? 0 : graph->handle, count, edges != NULL};
    status = shim_reply(graph == NULL ? VGPU_CALL_cuStreamBeginCapture_v2 : VGPU_CALL_cuStreamBeginCaptureToGraph, argument,
                        payload, length, NULL, NULL, 0, NULL);
    free(payload);
    if (status == CUDA_SUCCESS) add_capture(stream, mode);
    return status;
}

CUresult cuStreamBeginCapture_v2(CUstream hStream, unsigned int mode)
{
    const CUresult status = enter(hStream);
    return status != CUDA_SUCCESS ? status : begin(hStream, mode, NULL, NULL, NULL, 0);
}

CUresult cuStreamBeginCapture(CUstream hStream) { return cuStreamBeginCapture_v2(hStream, GLOBAL); }

CUresult cuStreamBeginCaptureToGraph(CUstream hStream, CUgraph hGraph, const void *dependencies, const void *dependencyData,
                                     size_t numDependencies, unsigned int mode)
{
    const CUresult status = enter(hStream);
    if (status != CUDA_SUCCESS) return status;
    const struct shim_graph *graph = shim_graph_of(hGraph);
    if (graph == NULL) return CUDA_ERROR_INVALID_VALUE;
    return begin(hStream, mode, graph, dependencies, dependencyData, numDependencies);
}

CUresult cuStreamEndCapture(CUstream hStream, void *phGraph)
{
    CUresult status = enter(hStream);
    if (status != CUDA_SUCCESS) return status;
    if (phGraph == NULL) return CUDA_ERROR_INVALID_VALUE;
    uint64_t stream;
    if ((status = shim_stream(hStream, &stream)) != CUDA_SUCCESS) return status;
    bool foreign = false;
    pthread_mutex_lock(&mutex);
    for (const struct capture *c = captures; c != NULL; c = c->next)
        if (c->stream == stream && c->mode != RELAXED && c->thread != this_thread()) foreign = true;
    pthread_mutex_unlock(&mutex);
    *(CUgraph *)phGraph = NULL;
    if (foreign) spoil(stream); /* ends it all the same, and what was captured is lost */
    const uint64_t argument[8] = {stream};
    uint64_t value[4] = {0};
    status = shim_reply(VGPU_CALL_cuStreamEndCapture, argument, NULL, 0, value, NULL, 0, NULL);
    /* value[1]: what the stream is afterwards; a refused end leaves the capture open. */
    if (value[1] == NONE && status != CUDA_ERROR_ILLEGAL_STATE) shim_capture_stream_gone(stream);
    if (status != CUDA_SUCCESS && value[0] != 0) shim_graph_lost(value[0]);
    if (foreign) return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    if (status != CUDA_SUCCESS) return status;
    if (shim_graph_adopt(value[0], 0) == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    *(CUgraph *)phGraph = CODE_HANDLE(CUgraph, value[0]);
    return CUDA_SUCCESS;
}

/* The arrays handed out belong to the library; the next call on the stream replaces them. */
static void keep_info(uint64_t stream, uint64_t *node, uint64_t *edge)
{
    pthread_mutex_lock(&mutex);
    struct info *info = infos;
    while (info != NULL && info->stream != stream) info = info->next;
    if (info == NULL && (info = calloc(1, sizeof *info)) != NULL) {
        info->stream = stream;
        info->next = infos;
        infos = info;
    }
    if (info != NULL) {
        free(info->node);
        free(info->edge);
        info->node = node;
        info->edge = edge;
    }
    pthread_mutex_unlock(&mutex);
}

/* Fetches the capture's current dependencies, in as many pages as they take. */
static CUresult fetch_dependencies(uint64_t stream, uint64_t graph, uint64_t count, uint64_t **node, uint64_t **edge, bool *lossy)
{
    if (count > VGPU_NODE_LIST_LIMIT) return CUDA_ERROR_OUT_OF_MEMORY;
    *node = calloc(count + 1, 8);
    *edge = calloc(count + 1, 8);
    if (*node == NULL || *edge == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    *lossy = false;
    for (uint64_t first = 0; first < count;) {
        uint64_t page[VGPU_SLOT_PAYLOAD_LIMIT / 8];
        uint32_t length = 0;
        const uint64_t argument[8] = {stream, first, 1};
        const CUresult status =
            shim_reply(VGPU_CALL_cuStreamGetCaptureInfo_v3, argument, NULL, 0, NULL, page, sizeof page, &length);
        if (status != CUDA_SUCCESS) return status;
        const uint64_t here = length / 16; /* node and edge data, alternating */
        if (here == 0) return CUDA_ERROR_UNKNOWN;
        for (uint64_t i = 0; i < here && first < count; i++, first++) {
            (*node)[first] = page[2 * i];
            (*edge)[first] = page[2 * i + 1];
            if ((*edge)[first] != 0) *lossy = true;
            const CUresult adopted = shim_node_adopt(page[2 * i], graph);
            if (adopted != CUDA_SUCCESS) return adopted;
        }
    }
    return CUDA_SUCCESS;
}

static CUresult capture_info(CUstream handle, unsigned *status_out, uint64_t *id_out, CUgraph *graph_out, const uint64_t **nodes_out,
                             const void **edges_out, size_t *count_out, bool takes_edges)
{
    CUresult status = enter(handle);
    if (status != CUDA_SUCCESS) return status;
    if (status_out == NULL) return CUDA_ERROR_INVALID_VALUE;
    uint64_t stream;
    if ((status = shim_stream(handle, &stream)) != CUDA_SUCCESS) return status;
    *status_out = NONE;
    if (atomic_load_explicit(&shim_captures_active, memory_order_relaxed) == 0) return CUDA_SUCCESS;
    const uint64_t argument[8] = {stream, 0, nodes_out != NULL};
    uint64_t value[4] = {0};
    status = shim_reply(VGPU_CALL_cuStreamGetCaptureInfo_v3, argument, NULL, 0, value, NULL, 0, NULL);
    if (status != CUDA_SUCCESS) return status;
    *status_out = (unsigned)value[0];
    if (value[0] != ACTIVE) return CUDA_SUCCESS;
    if (id_out != NULL) *id_out = value[1];
    if (value[2] != 0 && shim_graph_adopt(value[2], 0) == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    if (graph_out != NULL) *graph_out = CODE_HANDLE(CUgraph, value[2]);
    if (count_out != NULL) *count_out = value[3];
    if (nodes_out == NULL && edges_out == NULL) return CUDA_SUCCESS;
    uint64_t *node = NULL, *edge = NULL;
    bool lossy = false;
    status = fetch_dependencies(stream, value[2], value[3], &node, &edge, &lossy);
    if (status == CUDA_SUCCESS && lossy && (!takes_edges || edges_out == NULL)) status = CUDA_ERROR_LOSSY_QUERY;
    if (status != CUDA_SUCCESS) {
        free(node);
        free(edge);
        return status;
    }
    if (nodes_out != NULL) *nodes_out = node;
    if (edges_out != NULL) *edges_out = edge;
    keep_info(stream, node, edge);
    return CUDA_SUCCESS;
}

CUresult cuStreamGetCaptureInfo(CUstream hStream, void *captureStatus_out, void *id_out)
{
    return capture_info(hStream, captureStatus_out, id_out, NULL, NULL, NULL, NULL, false);
}

CUresult cuStreamGetCaptureInfo_v2(CUstream hStream, void *captureStatus_out, void *id_out, void *graph_out,
                                   void *dependencies_out, void *numDependencies_out)
{
    return capture_info(hStream, captureStatus_out, id_out, graph_out, dependencies_out, NULL, numDependencies_out, false);
}

CUresult cuStreamGetCaptureInfo_v3(CUstream hStream, void *captureStatus_out, void *id_out, void *graph_out,
                                   void *dependencies_out, void *edgeData_out, void *numDependencies_out)
{
    return capture_info(hStream, captureStatus_out, id_out, graph_out, dependencies_out, edgeData_out, numDependencies_out, true);
}

CUresult cuStreamUpdateCaptureDependencies_v2(CUstream hStream, void *dependencies, const void *dependencyData,
                                              size_t numDependencies, unsigned int flags)
{
    CUresult status = enter(hStream);
    if (status != CUDA_SUCCESS) return status;
    uint64_t stream;
    if ((status = shim_stream(hStream, &stream)) != CUDA_SUCCESS) return status;
    if (atomic_load_explicit(&shim_captures_active, memory_order_relaxed) == 0) return CUDA_ERROR_ILLEGAL_STATE;
    uint8_t *payload = NULL;
    uint32_t length = 0;
    if ((status = shim_node_list(dependencies, dependencyData, numDependencies, &payload, &length)) != CUDA_SUCCESS) return status;
    const uint64_t argument[8] = {stream, numDependencies, dependencyData != NULL, flags};
    status = shim_reply(VGPU_CALL_cuStreamUpdateCaptureDependencies_v2, argument, payload, length, NULL, NULL, 0, NULL);
    free(payload);
    return status;
}

CUresult cuStreamUpdateCaptureDependencies(CUstream hStream, void *dependencies, size_t numDependencies, unsigned int flags)
{
    return cuStreamUpdateCaptureDependencies_v2(hStream, dependencies, NULL, numDependencies, flags);
}
