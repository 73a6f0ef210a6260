/* SPDX-License-Identifier: Apache-2.0 */
/*
 * graph_memory.c - memory nodes of graphs as a guest program sees them: what an address is and for how long, launches that come
 * again, frees from outside, captures, and (argument "quota", in a VM with 64 MiB) what they cost.
 */
#include "guest.h"

#include <stddef.h>

#define MIB ((size_t)1 << 20)
#define DEVICE_MEMORY 2u
#define POINTER_MEMORY_TYPE 2u
#define POINTER_RANGE_START 11u
#define POINTER_RANGE_SIZE 12u

struct node {
    int allocation, handle_types;
    CUmemLocation location;
    void *security;
    size_t most;
    unsigned char reserved[56];
    const CUmemAccessDesc *access;
    size_t access_count, size;
    CUdeviceptr address;
};
_Static_assert(sizeof(struct node) == 120, "CUDA_MEM_ALLOC_NODE_PARAMS");
struct memset_node { CUdeviceptr destination; size_t pitch; unsigned value, element; size_t width, height; };

static CUstream stream;
static CUcontext context;

static bool is_device(CUdeviceptr address)
{
    unsigned type = 0;
    return cuPointerGetAttribute(&type, POINTER_MEMORY_TYPE, address) == 0 && type == DEVICE_MEMORY;
}

static CUdeviceptr add_allocation(CUgraph graph, CUgraphNode *node, const CUgraphNode *after, size_t size)
{
    struct node p = {.allocation = 1, .location = {1, 0}, .size = size};
    OK(cuGraphAddMemAllocNode(node, graph, after, after != NULL, &p));
    return p.address;
}

static CUgraphNode add_memset(CUgraph graph, const CUgraphNode *after, CUdeviceptr address, unsigned value)
{
    CUgraphNode node = NULL;
    const struct memset_node p = {.destination = address, .value = value, .element = 4, .width = 16, .height = 1};
    OK(cuGraphAddMemsetNode(&node, graph, after, after != NULL, &p, context));
    return node;
}

static bool holds(CUdeviceptr address, unsigned value)
{
    unsigned words[16] = {0};
    OK(cuMemcpyDtoH_v2(words, address, sizeof words));
    for (int i = 0; i < 16; i++)
        if (words[i] != value) return false;
    return true;
}

static unsigned long long reserved(void)
{
    unsigned long long bytes = 0;
    OK(cuDeviceGetGraphMemAttribute(0, 2, &bytes));
    return bytes;
}

static size_t available(void)
{
    size_t free = 0, total = 0;
    OK(cuMemGetInfo_v2(&free, &total));
    return free;
}

static void inside(void)
{
    CUgraph graph, other, made;
    CUgraphNode node, filled, freed, more;
    CUgraphExec exec, second;
    unsigned type = 0;
    OK(cuGraphCreate(&graph, 0));
    OK(cuGraphCreate(&other, 0));
    CUdeviceptr address = add_allocation(graph, &node, NULL, 3 * MIB);
    CHECK(is_device(address) && is_device(address + 3 * MIB - 1));
    CUdeviceptr start = 0;
    size_t size = 0;
    OK(cuPointerGetAttribute(&start, POINTER_RANGE_START, address + 100));
    OK(cuPointerGetAttribute(&size, POINTER_RANGE_SIZE, address + 100));
    CHECK(start == address && size == 3 * MIB);
    filled = add_memset(graph, &node, address, 5);
    OK(cuGraphAddMemFreeNode(&freed, graph, &filled, 1, address));
    EXPECT(1, cuGraphAddMemFreeNode(&more, graph, &freed, 1, address)); /* twice */
    EXPECT(1, cuGraphAddMemFreeNode(&more, graph, &freed, 1, address + 256));
    EXPECT(1, cuGraphAddMemFreeNode(&more, graph, &freed, 1, 0x123456789000));
    OK(cuGraphNodeGetType(node, &type));
    CHECK(type == 10);
    OK(cuGraphNodeGetType(freed, &type));
    CHECK(type == 11);
    struct node found;
    OK(cuGraphMemAllocNodeGetParams(node, &found));
    CHECK(found.allocation == 1 && found.location.type == 1 && found.location.id == 0 && found.size == 3 * MIB && found.address == address);
    OK(cuGraphMemFreeNodeGetParams(freed, &start));
    CHECK(start == address);
    EXPECT(1, cuGraphMemFreeNodeGetParams(node, &start));
    /* The addresses are used again behind the free node, and are one range however many nodes have them. */
    CUdeviceptr again = add_allocation(graph, &more, &freed, MIB);
    CHECK(is_device(again));
    OK(cuGraphAddMemFreeNode(&freed, graph, &more, 1, again));
    EXPECT(801, cuGraphClone(&made, graph));
    EXPECT(801, cuGraphAddChildGraphNode(&more, other, NULL, 0, graph));
    CUgraph nothing;
    CUgraphExec plan;
    OK(cuGraphCreate(&nothing, 0));
    OK(cuGraphAddChildGraphNode(&more, other, NULL, 0, nothing));
    OK(cuGraphInstantiateWithFlags(&plan, other, 0));
    EXPECT(801, cuGraphExecChildGraphNodeSetParams(plan, more, graph));
    OK(cuGraphExecDestroy(plan));
    OK(cuGraphDestroy(nothing));
    EXPECT(801, cuGraphDestroyNode(freed));
    EXPECT(801, cuGraphRemoveDependencies(graph, &node, &filled, 1));
    OK(cuGraphInstantiateWithFlags(&exec, graph, 0));
    CHECK(cuGraphInstantiateWithFlags(&second, graph, 0) != 0);
    for (int i = 0; i < 3; i++) OK(cuGraphLaunch(exec, stream));
    OK(cuStreamSynchronize(stream));
    CHECK(reserved() >= 3 * MIB);
    EXPECT(1, cuMemFreeAsync(address, stream)); /* it is the graph's own */
    EXPECT(1, cuMemFree_v2(address));
    OK(cuGraphDestroy(graph));
    CHECK(is_device(address)); /* the instance will put memory there again */
    OK(cuGraphLaunch(exec, stream));
    OK(cuStreamSynchronize(stream));
    OK(cuGraphExecDestroy(exec));
    CHECK(!is_device(address));
    OK(cuGraphDestroy(other));
    OK(cuDeviceGraphMemTrim(0));
    CHECK(reserved() == 0);
}

static void left_allocated(void)
{
    CUgraph graph, other;
    CUgraphNode node;
    CUgraphExec exec, freeing;
    OK(cuGraphCreate(&graph, 0));
    CUdeviceptr address = add_allocation(graph, &node, NULL, 5 * MIB);
    add_memset(graph, &node, address, 7);
    OK(cuGraphInstantiateWithFlags(&exec, graph, 0));
    EXPECT(1, cuMemFreeAsync(address, stream)); /* not allocated yet */
    OK(cuGraphLaunch(exec, stream));
    OK(cuStreamSynchronize(stream));
    CHECK(holds(address, 7));
    OK(cuMemsetD32Async(address, 8, 16, stream));
    OK(cuStreamSynchronize(stream));
    CHECK(holds(address, 8));
    EXPECT(1, cuGraphLaunch(exec, stream)); /* still allocated */
    OK(cuMemFreeAsync(address, stream));
    EXPECT(1, cuMemFreeAsync(address, stream));
    CHECK(is_device(address)); /* it comes back with the next launch */
    OK(cuGraphLaunch(exec, stream));
    CHECK(holds(address, 7));
    OK(cuMemFree_v2(address));
    OK(cuGraphLaunch(exec, stream));
    OK(cuGraphCreate(&other, 0));
    OK(cuGraphAddMemFreeNode(&node, other, NULL, 0, address));
    OK(cuGraphInstantiateWithFlags(&freeing, other, 0));
    OK(cuGraphLaunch(freeing, stream));
    EXPECT(1, cuMemFree_v2(address));
    EXPECT(1, cuGraphLaunch(freeing, stream)); /* there is nothing to free */
    OK(cuGraphLaunch(exec, stream));
    OK(cuGraphExecDestroy(exec));
    OK(cuGraphDestroy(graph));
    OK(cuGraphExecDestroy(freeing));
    OK(cuGraphDestroy(other));
    CHECK(is_device(address) && holds(address, 7)); /* it outlives them all */
    OK(cuDeviceGraphMemTrim(0));
    CHECK(reserved() >= 5 * MIB && holds(address, 7));
    OK(cuMemFreeAsync(address, stream));
    CHECK(!is_device(address));
    EXPECT(1, cuMemFreeAsync(address, stream));
    OK(cuStreamSynchronize(stream));
    OK(cuDeviceGraphMemTrim(0));
    CHECK(reserved() == 0);
}

static void frees_itself(void)
{
    CUgraph graph;
    CUgraphNode node;
    CUgraphExec exec;
    OK(cuGraphCreate(&graph, 0));
    CUdeviceptr address = add_allocation(graph, &node, NULL, MIB);
    add_memset(graph, &node, address, 3);
    OK(cuGraphInstantiateWithFlags(&exec, graph, 1));
    OK(cuGraphLaunch(exec, stream));
    unsigned long long held = reserved();
    for (int i = 0; i < 3; i++) OK(cuGraphLaunch(exec, stream));
    CHECK(reserved() == held && holds(address, 3));
    OK(cuMemFreeAsync(address, stream));
    OK(cuGraphExecDestroy(exec));
    OK(cuGraphDestroy(graph));
    OK(cuDeviceGraphMemTrim(0));
}

static void captured(void)
{
    CUdeviceptr address = 0, second = 0, plain = 0;
    CUgraph graph = NULL;
    CUgraphExec exec;
    CUstream another;
    OK(cuStreamCreate(&another, 1));
    OK(cuStreamBeginCapture_v2(stream, 2));
    OK(cuMemAllocAsync(&address, 2 * MIB, stream));
    CHECK(address != 0 && is_device(address));
    OK(cuMemAllocAsync(&plain, MIB, another)); /* this one does not capture */
    OK(cuMemsetD32Async(address, 6, 16, stream));
    OK(cuMemFreeAsync(plain, another));
    EXPECT(1, cuMemFreeAsync(plain, another));
    OK(cuMemFreeAsync(address, stream));
    OK(cuMemAllocAsync(&second, MIB, stream));
    OK(cuMemsetD32Async(second, 9, 16, stream));
    OK(cuStreamEndCapture(stream, &graph));
    size_t count = 0;
    OK(cuGraphGetNodes(graph, NULL, &count));
    CHECK(count == 5);
    OK(cuGraphInstantiateWithFlags(&exec, graph, 0));
    OK(cuGraphLaunch(exec, stream));
    CHECK(holds(second, 9));
    EXPECT(1, cuGraphLaunch(exec, stream));
    /* Freed by another capture. */
    CUgraph freeing;
    CUgraphExec frees;
    OK(cuStreamBeginCapture_v2(another, 2));
    OK(cuMemFreeAsync(second, another));
    OK(cuStreamEndCapture(another, &freeing));
    OK(cuGraphInstantiateWithFlags(&frees, freeing, 0));
    OK(cuGraphLaunch(frees, stream));
    OK(cuGraphLaunch(exec, stream));
    OK(cuMemFreeAsync(second, stream));
    /* A launch cannot become part of a capture, and spoils it; the graph that was begun is gone with its addresses. */
    CUdeviceptr lost = 0;
    OK(cuStreamBeginCapture_v2(another, 2));
    OK(cuMemAllocAsync(&lost, MIB, another));
    CHECK(is_device(lost));
    EXPECT(801, cuGraphLaunch(exec, another));
    CUgraph none = NULL;
    EXPECT(901, cuStreamEndCapture(another, &none));
    CHECK(none == NULL && !is_device(lost));
    /* So it is when its stream is destroyed. */
    CUstream gone;
    OK(cuStreamCreate(&gone, 1));
    OK(cuStreamBeginCapture_v2(gone, 2));
    OK(cuMemAllocAsync(&lost, MIB, gone));
    CHECK(is_device(lost));
    OK(cuStreamDestroy_v2(gone));
    CHECK(!is_device(lost));
    /* A capture ends with its context, and forbids nothing any more. */
    CUcontext other;
    CUdeviceptr free_again = 0;
    OK(cuCtxCreate_v2(&other, 0, 0));
    OK(cuStreamCreate(&gone, 1));
    OK(cuStreamBeginCapture_v2(gone, 0));
    OK(cuCtxDestroy_v2(other));
    OK(cuMemAlloc_v2(&free_again, MIB));
    OK(cuMemFree_v2(free_again));
    OK(cuGraphExecDestroy(frees));
    OK(cuGraphDestroy(freeing));
    OK(cuGraphExecDestroy(exec));
    OK(cuGraphDestroy(graph));
    CHECK(!is_device(second));
    OK(cuStreamDestroy_v2(another));
    OK(cuDeviceGraphMemTrim(0));
    CHECK(reserved() == 0);
}

static void generic(void)
{
    struct { int type, reserved[3]; union { struct node allocation; CUdeviceptr address; unsigned char room[232]; }; long long end; } p;
    CUgraph graph;
    CUgraphNode node, freed;
    const CUmemAccessDesc access = {.location = {1, 0}, .flags = 3};
    memset(&p, 0, sizeof p);
    p.type = 10;
    p.allocation = (struct node){.allocation = 1, .location = {1, 0}, .size = MIB, .access = &access, .access_count = 1};
    OK(cuGraphCreate(&graph, 0));
    OK(cuGraphAddNode(&node, graph, NULL, 0, &p));
    const CUdeviceptr address = p.allocation.address;
    CHECK(is_device(address));
    struct node found;
    OK(cuGraphMemAllocNodeGetParams(node, &found));
    CHECK(found.access_count == 1 && found.access->location.type == 1 && found.access->location.id == 0 && found.access->flags == 3);
    EXPECT(801, cuGraphNodeSetParams(node, &p));
    memset(&p, 0, sizeof p);
    p.type = 11;
    p.address = address;
    OK(cuGraphAddNode_v2(&freed, graph, &node, NULL, 1, &p));
    struct node wrong = {.allocation = 1, .location = {1, 0}};
    EXPECT(1, cuGraphAddMemAllocNode(&node, graph, NULL, 0, &wrong));
    wrong.size = (size_t)1 << 63;
    EXPECT(2, cuGraphAddMemAllocNode(&node, graph, NULL, 0, &wrong));
    wrong.size = MIB;
    wrong.location.id = 1;
    EXPECT(101, cuGraphAddMemAllocNode(&node, graph, NULL, 0, &wrong));
    wrong.location.type = 2;
    EXPECT_GUEST(801, cuGraphAddMemAllocNode(&node, graph, NULL, 0, &wrong));
    OK(cuGraphDestroy(graph));
    CHECK(!is_device(address));
}

/* 64 MiB for all. */
static void quota(void)
{
    CUgraph graph[3];
    CUgraphNode node, freed;
    CUgraphExec exec[3];
    CUdeviceptr address[3], plain;
    const size_t size[3] = {40 * MIB, 40 * MIB, 70 * MIB};
    CHECK(available() == 64 * MIB);
    for (int i = 0; i < 3; i++) {
        OK(cuGraphCreate(&graph[i], 0));
        address[i] = add_allocation(graph[i], &node, NULL, size[i]);
        if (i == 0) OK(cuGraphAddMemFreeNode(&freed, graph[i], &node, 1, address[i]));
        OK(cuGraphInstantiateWithFlags(&exec[i], graph[i], 0));
    }
    CHECK(available() == 64 * MIB); /* there are addresses, and no memory yet */
    OK(cuGraphLaunch(exec[0], stream));
    CHECK(available() == 24 * MIB && reserved() == 40 * MIB);
    for (int i = 0; i < 10; i++) OK(cuGraphLaunch(exec[0], stream));
    CHECK(available() == 24 * MIB); /* the same again costs nothing */
    EXPECT(2, cuGraphLaunch(exec[2], stream));
    EXPECT(2, cuGraphUpload(exec[2], stream));
    EXPECT(1, cuMemFree_v2(address[2])); /* nothing ran */
    CHECK(available() == 64 * MIB); /* what was not in use has been let go to make room */
    OK(cuGraphLaunch(exec[0], stream));
    OK(cuMemAlloc_v2(&plain, 60 * MIB)); /* which other memory gets as well */
    CHECK(available() == 4 * MIB && reserved() == 0);
    EXPECT(2, cuGraphLaunch(exec[0], stream));
    EXPECT(2, cuGraphUpload(exec[0], stream));
    OK(cuMemFree_v2(plain));
    OK(cuGraphUpload(exec[0], stream));
    CHECK(available() == 24 * MIB);
    OK(cuGraphLaunch(exec[0], stream));
    OK(cuGraphLaunch(exec[1], stream)); /* leaves 40 MiB allocated */
    CHECK(available() == 24 * MIB);
    EXPECT(2, cuGraphLaunch(exec[0], stream));
    EXPECT(2, cuMemAlloc_v2(&plain, 30 * MIB));
    OK(cuDeviceGraphMemTrim(0));
    CHECK(available() == 24 * MIB);
    OK(cuMemFreeAsync(address[1], stream));
    OK(cuGraphLaunch(exec[0], stream));
    for (int i = 0; i < 3; i++) {
        OK(cuGraphExecDestroy(exec[i]));
        OK(cuGraphDestroy(graph[i]));
    }
    OK(cuStreamSynchronize(stream));
    OK(cuDeviceGraphMemTrim(0));
    CHECK(available() == 64 * MIB);
    OK(cuMemAlloc_v2(&plain, 64 * MIB));
    OK(cuMemFree_v2(plain));
}

int main(int count, char **words)
{
    context = guest_begin();
    OK(cuStreamCreate(&stream, 1));
    if (count > 1 && strcmp(words[1], "quota") == 0) {
        quota();
        return guest_end();
    }
    inside();
    left_allocated();
    frees_itself();
    captured();
    generic();
    return guest_end();
}
