/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fake_graph_memory.c - fake_code.c with memory nodes. Nothing is shared between graphs, and memory is taken in pieces of 32 MiB.
 * When it is taken is -DTAKEN_AT=INSTANTIATE, UPLOAD or LAUNCH (an upload does nothing then). What it gives up at a trim it has to
 * have been synchronized for. An address to free that is not allocated, or is no node's, is a crash here.
 *
 *   cuCtxGetLimit(1200)  bytes that are reserved     cuCtxGetLimit(1201)  the most that were when something was launched
 *   cuCtxGetLimit(1202)  trims so far
 */
#define cuGraphDestroy code_graph_destroy
#define cuGraphInstantiateWithParams code_instantiate
#define cuGraphLaunch code_graph_launch
#define cuGraphExecDestroy code_exec_destroy
#define cuGraphClone code_clone
#define cuGraphDestroyNode code_destroy_node
#define cuStreamIsCapturing code_is_capturing
#include <stddef.h>
static int memory_limit(size_t *value, unsigned limit);
#define other_limit memory_limit
#include "fake_code.c"
#undef cuGraphDestroy
#undef cuGraphInstantiateWithParams
#undef cuGraphLaunch
#undef cuGraphExecDestroy
#undef cuGraphClone
#undef cuGraphDestroyNode
#undef cuStreamIsCapturing

#include <stdbool.h>

#define INSTANTIATE 0
#define UPLOAD 1
#define LAUNCH 2
#ifndef TAKEN_AT
#define TAKEN_AT UPLOAD
#endif
#define PIECE (32ull << 20)
#define MOST 20000

struct parameters { unsigned char properties[88]; const int *access; size_t access_count, size; uint64_t address; };
static struct block { uint64_t address, size; void *graph, *node; int instances; bool freed, live; } block[MOST];
static struct instance { void *exec; struct block *of[64], *frees[64]; bool leaves[64]; int count, free_count; uint64_t taken; bool unsynchronized, frees_itself; } instance[MOST];
static struct freeing { void *graph; struct block *of; } freeing[MOST];
static int blocks, instances, freeings;
static uint64_t orphaned, most_at_launch, trims;

static uint64_t reserved(void)
{
    uint64_t bytes = orphaned;
    for (int i = 0; i < instances; i++) bytes += instance[i].taken;
    return bytes;
}
static struct instance *of_exec(void *exec)
{
    for (int i = 0; i < instances; i++)
        if (instance[i].exec == exec) return &instance[i];
    return NULL;
}
static bool has_live(const struct instance *in)
{
    for (int i = 0; i < in->count; i++)
        if (in->of[i]->live) return true;
    return false;
}
static int take_for(struct instance *in)
{
    uint64_t bytes = 0;
    for (int i = 0; i < in->count; i++) bytes += in->of[i]->size;
    in->taken = (bytes + PIECE - 1) / PIECE * PIECE;
    return bytes > 1ull << 50 ? 2 : 0;
}

EXPORT int cuGraphAddMemAllocNode(void **node, void *graph, void **dependency, size_t n, struct parameters *p)
{
    static uint64_t next = 1ull << 46;
    if (p->access_count > 16 || (p->access_count != 0 && p->access[1] != 0)) abort();
    if (blocks == MOST || p->size > 1ull << 60) return 2;
    add(node, graph, dependency, n, 10);
    block[blocks++] = (struct block){.address = p->address = next, .size = p->size, .graph = graph, .node = *node};
    next += ((p->size > 1ull << 40 ? 1ull << 40 : p->size) + 0xfffff) & ~0xfffffull;
    return 0;
}
static struct block *with(uint64_t address)
{
    for (int i = 0; i < blocks; i++)
        if (block[i].address == address && (block[i].graph != NULL || block[i].live || block[i].instances != 0)) return &block[i];
    fprintf(stderr, "fake driver: nothing is allocated at %#lx\n", (unsigned long)address);
    abort();
}
EXPORT int cuGraphAddMemFreeNode(void **node, void *graph, void **dependency, size_t n, uint64_t address)
{
    struct block *b = with(address);
    if (b->graph == graph) {
        if (b->freed) abort();
        b->freed = true;
    } else if (freeings < MOST) {
        freeing[freeings++] = (struct freeing){graph, b};
        b->instances++; /* for as long as there is this process */
    }
    add(node, graph, dependency, n, 11);
    ((struct object *)*node)->hash = address;
    return 0;
}
EXPORT int cuGraphMemAllocNodeGetParams(void *node, struct parameters *p)
{
    if (need(node, NODE)->type != 10) return 1;
    for (int i = 0; i < blocks; i++)
        if (block[i].graph != NULL && block[i].node == node) *p = (struct parameters){.size = block[i].size, .address = block[i].address};
    return 0;
}
EXPORT int cuGraphMemFreeNodeGetParams(void *node, uint64_t *address)
{
    if (need(node, NODE)->type != 11) return 1;
    *address = need(node, NODE)->hash;
    return 0;
}
EXPORT int cuGraphClone(void **out, void *graph)
{
    for (int i = 0; i < blocks; i++)
        if (block[i].graph == graph) abort();
    return code_clone(out, graph);
}

/* ---- one capture at a time ---- */

static void *capturing, *into;

static void check_capture(void)
{
    if (capturing != NULL) need(into, GRAPH);
}
EXPORT int cuStreamBeginCapture_v2(void *stream, unsigned mode)
{
    if (capturing != NULL || mode != 2) return 1;
    capturing = stream;
    into = make(GRAPH, NULL);
    return 0;
}
EXPORT int cuStreamBeginCaptureToGraph(void *stream, void *graph, void **dependency, const void *edges, size_t n, unsigned mode)
{
    (void)edges;
    for (size_t i = 0; i < n; i++) need(dependency[i], NODE);
    if (capturing != NULL || mode != 2) return 1;
    capturing = stream;
    into = need(graph, GRAPH);
    return 0;
}
EXPORT int cuStreamIsCapturing(void *stream, unsigned *status)
{
    *status = stream != NULL && stream == capturing;
    return 0;
}
EXPORT int cuStreamGetCaptureInfo_v3(void *stream, unsigned *status, uint64_t *id, void **graph, void ***nodes, const void **edges, size_t *n)
{
    *status = stream == capturing;
    *id = 1;
    if (*status != 0) *graph = into;
    if (nodes != NULL) *nodes = NULL;
    if (edges != NULL) *edges = NULL;
    if (n != NULL) *n = 0;
    return 0;
}
EXPORT int cuStreamEndCapture(void *stream, void **graph)
{
    if (stream != capturing) return 401;
    *graph = need(into, GRAPH);
    capturing = NULL;
    return 0;
}
EXPORT int cuDeviceGetMemPool(void **pool, int device) { *pool = &capturing; return device; }
EXPORT int cuMemAllocFromPoolAsync(uint64_t *address, size_t size, void *pool, void *stream)
{
    struct parameters p = {.size = size};
    void *node;
    if (pool != &capturing || stream != capturing) abort();
    const int status = cuGraphAddMemAllocNode(&node, into, NULL, 0, &p);
    *address = p.address;
    return status;
}

static bool has_memory(void *graph)
{
    for (int i = 0; i < blocks; i++)
        if (block[i].graph == graph) return true;
    return false;
}
EXPORT int cuGraphExecChildGraphNodeSetParams(void *exec, void *node, void *graph)
{
    need(exec, EXEC);
    need(node, NODE);
    if (has_memory(need(graph, GRAPH))) abort();
    return 0;
}
EXPORT int cuGraphDestroyNode(void *node)
{
    const bool is_last = capturing != NULL && need(node, NODE)->owner == into;
    const int status = code_destroy_node(node);
    check_capture();
    if (is_last) abort();
    return status;
}
EXPORT int cuGraphDestroy(void *graph)
{
    for (int i = 0; i < blocks; i++)
        if (block[i].graph == graph) block[i].graph = NULL;
    for (int i = 0; i < freeings; i++)
        if (freeing[i].graph == graph) freeing[i].graph = NULL;
    const int status = code_graph_destroy(graph);
    check_capture();
    return status;
}
EXPORT int cuGraphInstantiateWithParams(void **exec, void *graph, uint64_t *p)
{
    const int status = code_instantiate(exec, graph, p);
    if (status != 0 || instances == MOST) return status;
    struct instance in = {.exec = *exec, .frees_itself = (p[0] & 1) != 0};
    for (int i = 0; i < blocks && in.count < 64; i++)
        if (block[i].graph == graph) {
            in.leaves[in.count] = !block[i].freed;
            in.of[in.count++] = &block[i];
            block[i].instances++;
        }
    for (int i = 0; i < freeings && in.free_count < 64; i++)
        if (freeing[i].graph == graph) in.frees[in.free_count++] = freeing[i].of;
    instance[instances++] = in;
    return (TAKEN_AT == INSTANTIATE || (TAKEN_AT == UPLOAD && (p[0] & 2) != 0)) ? take_for(&instance[instances - 1]) : 0;
}
EXPORT int cuGraphUpload(void *exec, void *stream)
{
    (void)stream;
    struct instance *in = of_exec(need(exec, EXEC));
    if (in == NULL || TAKEN_AT == LAUNCH) return 0;
    in->unsynchronized = true;
    return take_for(in);
}
EXPORT int cuGraphLaunch(void *exec, void *stream)
{
    struct instance *in = of_exec(need(exec, EXEC));
    for (int i = 0; in != NULL && i < in->free_count; i++)
        if (!in->frees[i]->live) return 1;
    const int status = in == NULL ? 0 : take_for(in);
    if (status != 0) return status;
    for (int i = 0; in != NULL && i < in->count; i++) {
        if (in->of[i]->live && !in->frees_itself) abort();
        in->of[i]->live = in->leaves[i];
    }
    for (int i = 0; in != NULL && i < in->free_count; i++) in->frees[i]->live = false;
    if (in != NULL) in->unsynchronized = true;
    if (reserved() > most_at_launch) most_at_launch = reserved();
    return code_graph_launch(exec, stream);
}
EXPORT int cuGraphExecDestroy(void *exec)
{
    struct instance *in = of_exec(exec);
    if (in != NULL) {
        if (has_live(in)) orphaned += in->taken; /* for ever: there is no telling whose it is */
        for (int i = 0; i < in->count; i++) in->of[i]->instances--;
        *in = (struct instance){0};
    }
    return code_exec_destroy(exec);
}
EXPORT int cuMemFreeAsync(uint64_t address, void *stream)
{
    (void)stream;
    struct block *b = with(address);
    if (!b->live) abort();
    b->live = false;
    return 0;
}
EXPORT int cuMemFree_v2(uint64_t address) { return cuMemFreeAsync(address, NULL); }
EXPORT int cuMemAlloc_v2(uint64_t *address, size_t size)
{
    static uint64_t next = 1ull << 45;
    *address = next += (size + 0xfffff) & ~0xfffffull;
    return 0;
}
EXPORT int cuStreamSynchronize(void *stream)
{
    (void)stream;
    for (int i = 0; i < instances; i++) instance[i].unsynchronized = false;
    return 0;
}
EXPORT int cuDeviceGraphMemTrim(int device)
{
    trims++;
    for (int i = 0; i < instances; i++)
        if (!instance[i].unsynchronized && !has_live(&instance[i])) instance[i].taken = 0;
    return device;
}
EXPORT int cuDeviceGetGraphMemAttribute(int device, unsigned attribute, uint64_t *value)
{
    *value = reserved();
    return device != 0 || attribute > 3;
}
EXPORT int cuDeviceSetGraphMemAttribute(int device, unsigned attribute, const uint64_t *value)
{
    return device != 0 || (attribute & 1) == 0 || *value != 0;
}

static int memory_limit(size_t *value, unsigned limit)
{
    switch (limit) {
    case 1200: *value = reserved(); return 0;
    case 1201: *value = most_at_launch; return 0;
    case 1202: *value = trims; return 0;
    default: return plain_get_limit(value, limit);
    }
}
