/* SPDX-License-Identifier: Apache-2.0 */
/*
 * control_load.c - the guest of control.py: computes, floods, copies, allocates or misbehaves as it is told.
 *
 * Prints "ready" once it has a context and has run its kernels. Then lines in, lines out; each answer begins with the command's
 * first word. Times are CLOCK_MONOTONIC in nanoseconds, so that they compare with those of the script.
 *     turns SECONDS ITERATIONS     a kernel and a wait, again and again, every 64th turn a checked sum; 0: until a line comes
 *                                  -> TURNS CALLS FAILED WRONG LONGEST-NS NS
 *     launch SECONDS               empty kernels, a wait after each 1024 -> LAUNCHES NS
 *     sync COUNT                   an empty kernel and a wait -> MEDIAN-NS P99-NS
 *     flood COUNT                  dependent kernels without a wait -> COUNT NS IS-RIGHT
 *     copies BYTES COUNT           copies to the device -> BYTES NS IS-RIGHT
 *     copy-for-ever BYTES          copies both ways until it is killed; prints "copying" after the first
 *     stamps SECONDS               as turns, of empty kernels; when each turn ended -> FIRST DIFFERENCE...
 *     greedy SECONDS ITERATIONS BATCH   four batches queued; when each was done -> FIRST DIFFERENCE...
 *     alloc|create|pool|array|graph BYTES   device memory, by cuMemAlloc, cuMemCreate, cuMemAllocAsync, cuArrayCreate, a graph's
 *                                  memory node -> STATUS
 *     graph-steps BYTES            what is reserved for graphs: trimmed, with a node, instantiated, uploaded, launched, launched 20 times,
 *                                  trimmed, synchronized, without the graph, trimmed -> STATUS TEN-NUMBERS
 *     free                         all of it -> STATUS
 *     info                         -> STATUS FREE TOTAL DEVICE-TOTAL
 *     nvml                         -> STATUS TOTAL FREE USED
 *     total BYTES SECONDS          waits until cuMemGetInfo and cuDeviceTotalMem say so -> NS, or 0
 *     answer BYTES STATUS SECONDS  allocates so much and frees it until that is the answer -> NS, or 0
 *     poke                         a kernel that writes where it may not -> STATUS THEN
 *     spin SECONDS                 a kernel that runs so long by the GPU's clock -> STATUS NS THEN
 * Opens the libcuda.so.1 that the library path gives, so it is a guest or a native program.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef void *handle;
typedef uint64_t address;

#define FUNCTIONS(X)                                                                                                   \
    X(cuInit, "cuInit", (unsigned))                                                                                    \
    X(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (handle *, int))                                           \
    X(cuCtxSetCurrent, "cuCtxSetCurrent", (handle))                                                                    \
    X(cuCtxSynchronize, "cuCtxSynchronize", (void))                                                                    \
    X(cuModuleLoadData, "cuModuleLoadData", (handle *, const void *))                                                  \
    X(cuModuleGetFunction, "cuModuleGetFunction", (handle *, handle, const char *))                                    \
    X(cuMemAlloc, "cuMemAlloc_v2", (address *, size_t))                                                                \
    X(cuMemFree, "cuMemFree_v2", (address))                                                                            \
    X(cuMemcpyHtoD, "cuMemcpyHtoD_v2", (address, const void *, size_t))                                                \
    X(cuMemcpyDtoH, "cuMemcpyDtoH_v2", (void *, address, size_t))                                                      \
    X(cuMemGetInfo, "cuMemGetInfo_v2", (size_t *, size_t *))                                                           \
    X(cuDeviceTotalMem, "cuDeviceTotalMem_v2", (size_t *, int))                                                        \
    X(cuStreamCreate, "cuStreamCreate", (handle *, unsigned))                                                          \
    X(cuStreamSynchronize, "cuStreamSynchronize", (handle))                                                            \
    X(cuEventCreate, "cuEventCreate", (handle *, unsigned))                                                            \
    X(cuEventRecord, "cuEventRecord", (handle, handle))                                                                \
    X(cuEventSynchronize, "cuEventSynchronize", (handle))                                                              \
    X(cuMemAllocAsync, "cuMemAllocAsync", (address *, size_t, handle))                                                 \
    X(cuMemFreeAsync, "cuMemFreeAsync", (address, handle))                                                             \
    X(cuMemCreate, "cuMemCreate", (uint64_t *, size_t, const void *, uint64_t))                                        \
    X(cuMemRelease, "cuMemRelease", (uint64_t))                                                                        \
    X(cuMemAddressReserve, "cuMemAddressReserve", (address *, size_t, size_t, address, uint64_t))                      \
    X(cuMemAddressFree, "cuMemAddressFree", (address, size_t))                                                         \
    X(cuMemMap, "cuMemMap", (address, size_t, size_t, uint64_t, uint64_t))                                             \
    X(cuMemUnmap, "cuMemUnmap", (address, size_t))                                                                     \
    X(cuMemSetAccess, "cuMemSetAccess", (address, size_t, const void *, size_t))                                       \
    X(cuArrayCreate, "cuArrayCreate_v2", (handle *, const void *))                                                     \
    X(cuArrayDestroy, "cuArrayDestroy", (handle))                                                                      \
    X(cuGraphCreate, "cuGraphCreate", (handle *, unsigned))                                                            \
    X(cuGraphDestroy, "cuGraphDestroy", (handle))                                                                      \
    X(cuGraphAddMemAllocNode, "cuGraphAddMemAllocNode", (handle *, handle, const handle *, size_t, void *))            \
    X(cuGraphAddMemFreeNode, "cuGraphAddMemFreeNode", (handle *, handle, const handle *, size_t, address))             \
    X(cuGraphInstantiate, "cuGraphInstantiateWithFlags", (handle *, handle, unsigned long long))                       \
    X(cuGraphUpload, "cuGraphUpload", (handle, handle))                                                                \
    X(cuGraphLaunch, "cuGraphLaunch", (handle, handle))                                                                \
    X(cuGraphExecDestroy, "cuGraphExecDestroy", (handle))                                                              \
    X(cuDeviceGraphMemTrim, "cuDeviceGraphMemTrim", (int))                                                             \
    X(cuDeviceGetGraphMemAttribute, "cuDeviceGetGraphMemAttribute", (int, int, void *))                                \
    X(cuLaunchKernel, "cuLaunchKernel",                                                                                \
      (handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, handle, void **, void **))

#define DECLARE(name, symbol, arguments) static int(*name) arguments;
FUNCTIONS(DECLARE)

static const char PTX[] = ".version 7.0\n.target sm_70\n.address_size 64\n"
                          ".visible .entry nothing()\n{\n ret;\n}\n"
                          ".visible .entry chain(.param .u64 out, .param .u32 count)\n{\n"
                          " .reg .pred %p;\n .reg .b32 %n, %i;\n .reg .f32 %x;\n .reg .b64 %a;\n"
                          " ld.param.u64 %a, [out];\n ld.param.u32 %n, [count];\n"
                          " mov.u32 %i, 0;\n mov.f32 %x, 0f3F800000;\n"
                          "LOOP:\n"
                          " fma.rn.f32 %x, %x, 0f3F7FFFFF, 0f33800000;\n fma.rn.f32 %x, %x, 0f3F7FFFFF, 0f33800000;\n"
                          " fma.rn.f32 %x, %x, 0f3F7FFFFF, 0f33800000;\n fma.rn.f32 %x, %x, 0f3F7FFFFF, 0f33800000;\n"
                          " add.u32 %i, %i, 1;\n setp.lt.u32 %p, %i, %n;\n @%p bra LOOP;\n"
                          " st.global.f32 [%a], %x;\n ret;\n}\n"
                          ".visible .entry step(.param .u64 cell, .param .u32 number)\n{\n"
                          " .reg .b32 %x, %k;\n .reg .b64 %a;\n"
                          " ld.param.u64 %a, [cell];\n ld.param.u32 %k, [number];\n"
                          " ld.global.u32 %x, [%a];\n mul.lo.u32 %x, %x, 31;\n add.u32 %x, %x, %k;\n"
                          " st.global.u32 [%a], %x;\n ret;\n}\n"
                          ".visible .entry spin(.param .u64 nanoseconds)\n{\n"
                          " .reg .pred %p;\n .reg .b64 %n, %began, %now;\n"
                          " ld.param.u64 %n, [nanoseconds];\n mov.u64 %began, %globaltimer;\n"
                          "AGAIN:\n mov.u64 %now, %globaltimer;\n sub.u64 %now, %now, %began;\n"
                          " setp.lt.u64 %p, %now, %n;\n @%p bra AGAIN;\n ret;\n}\n";

enum { MOST_STAMPS = 1 << 21, MOST_HELD = 64, BATCHES = 4 };

static handle stream, nothing_kernel, chain_kernel, step_kernel, spin_kernel;
static address memory;
static uint64_t *stamps;

static struct {
    address memory;
    uint64_t handle;
    size_t size;
    enum { BY_ALLOC, BY_CREATE, BY_POOL, BY_ARRAY, BY_GRAPH } how;
} held[MOST_HELD];
static int held_count;

#define CHECK(call)                                                                                                    \
    do {                                                                                                               \
        int status_ = (call);                                                                                          \
        if (status_ != 0) {                                                                                            \
            printf("failed %d: %s\n", status_, #call);                                                                 \
            fflush(stdout);                                                                                            \
            exit(3);                                                                                                   \
        }                                                                                                              \
    } while (0)

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

static int has_input(void)
{
    struct pollfd input = {.fd = 0, .events = POLLIN};
    return poll(&input, 1, 0) != 0;
}

static int launch(handle kernel, void **parameters)
{
    return cuLaunchKernel(kernel, 1, 1, 1, 32, 1, 1, 0, stream, parameters, NULL);
}

static int launch_step(address cell, unsigned number)
{
    void *parameters[] = {&cell, &number};
    return cuLaunchKernel(step_kernel, 1, 1, 1, 1, 1, 1, 0, stream, parameters, NULL);
}

static void turns(double seconds, unsigned iterations)
{
    uint64_t began = now_ns(), end = began + (uint64_t)(seconds * 1e9), last = began, longest = 0;
    unsigned long long count = 0, calls = 0, failed = 0, wrong = 0;
    void *parameters[] = {&memory, &iterations};
    address cell = memory + 256;
    unsigned expected = 0, got, zero = 0;
    failed += cuMemcpyHtoD(cell, &zero, 4) != 0, calls++;
    for (;;) {
        uint64_t now = now_ns();
        if (count != 0 && now - last > longest)
            longest = now - last;
        last = now;
        if (seconds > 0 ? now >= end : (count % 16 == 0 && has_input()))
            break;
        if (failed != 0)
            break;
        count++;
        failed += launch(chain_kernel, parameters) != 0;
        failed += cuStreamSynchronize(stream) != 0;
        calls += 2;
        if (count % 64 == 0) {
            unsigned number = (unsigned)count;
            failed += launch_step(cell, number) != 0;
            expected = expected * 31 + number;
            failed += cuStreamSynchronize(stream) != 0;
            int status = cuMemcpyDtoH(&got, cell, 4);
            failed += status != 0;
            wrong += status == 0 && got != expected; /* a copy that failed has brought no number */
            calls += 3;
        }
    }
    printf("turns %llu %llu %llu %llu %llu %llu\n", count, calls, failed, wrong, (unsigned long long)longest,
           (unsigned long long)(last - began));
}

static void launches(double seconds)
{
    uint64_t began = now_ns(), end = began + (uint64_t)(seconds * 1e9), now = began;
    unsigned long long count = 0;
    for (; now < end; now = now_ns()) {
        for (int i = 0; i < 1024; i++)
            CHECK(launch(nothing_kernel, NULL));
        CHECK(cuStreamSynchronize(stream));
        count += 1024;
    }
    printf("launch %llu %llu\n", count, (unsigned long long)(now - began));
}

static int by_size(const void *a, const void *b)
{
    uint64_t one = *(const uint64_t *)a, two = *(const uint64_t *)b;
    return (one > two) - (one < two);
}

static void syncs(unsigned count)
{
    if (count == 0 || count > MOST_STAMPS)
        count = 1;
    for (unsigned i = 0; i < count; i++) {
        uint64_t began = now_ns();
        CHECK(launch(nothing_kernel, NULL));
        CHECK(cuStreamSynchronize(stream));
        stamps[i] = now_ns() - began;
    }
    qsort(stamps, count, sizeof *stamps, by_size);
    printf("sync %llu %llu\n", (unsigned long long)stamps[count / 2], (unsigned long long)stamps[count - 1 - count / 100]);
}

static void flood(unsigned count)
{
    unsigned expected = 1, got = 0, one = 1;
    CHECK(cuMemcpyHtoD(memory, &one, 4));
    uint64_t began = now_ns();
    for (unsigned i = 1; i <= count; i++) {
        CHECK(launch_step(memory, i));
        expected = expected * 31 + i;
    }
    CHECK(cuStreamSynchronize(stream));
    uint64_t took = now_ns() - began;
    CHECK(cuMemcpyDtoH(&got, memory, 4));
    printf("flood %u %llu %d\n", count, (unsigned long long)took, got == expected);
}

/* Each copy carries its number in every word; of the last four, each in a place of its own, all words are looked at. */
static void copies(size_t size, unsigned count)
{
    enum { PLACES = 4 };
    address places;
    size_t words = size / 4;
    unsigned *data = malloc(size);
    int is_right = data != NULL && words != 0 && count >= PLACES;
    CHECK(!is_right);
    CHECK(cuMemAlloc(&places, size * PLACES));
    uint64_t began = now_ns();
    for (unsigned i = 0; i < count; i++) {
        for (size_t w = 0; w < words; w++)
            data[w] = i;
        CHECK(cuMemcpyHtoD(places + i % PLACES * size, data, size));
    }
    CHECK(cuStreamSynchronize(stream));
    uint64_t took = now_ns() - began;
    for (unsigned i = count - PLACES; i < count; i++) {
        CHECK(cuMemcpyDtoH(data, places + i % PLACES * size, size));
        for (size_t w = 0; w < words; w++)
            is_right &= data[w] == i;
    }
    CHECK(cuMemFree(places));
    free(data);
    printf("copies %llu %llu %d\n", (unsigned long long)size * count, (unsigned long long)took, is_right);
}

static void copy_for_ever(size_t size)
{
    address place;
    void *data = calloc(1, size);
    CHECK(data == NULL);
    CHECK(cuMemAlloc(&place, size));
    for (int first = 1;; first = 0) {
        CHECK(cuMemcpyHtoD(place, data, size));
        CHECK(cuMemcpyDtoH(data, place, size));
        if (first)
            puts("copying"), fflush(stdout);
    }
}

static void print_stamps(const char *word, size_t count)
{
    printf("%s", word);
    for (size_t i = 0; i < count; i++)
        printf(" %llu", (unsigned long long)(stamps[i] - (i != 0 ? stamps[i - 1] : 0)));
    printf("\n");
}

static void stamp_turns(double seconds)
{
    uint64_t end = now_ns() + (uint64_t)(seconds * 1e9);
    size_t count = 0;
    for (uint64_t now = 0; now < end && count < MOST_STAMPS; stamps[count++] = now) {
        CHECK(launch(nothing_kernel, NULL));
        CHECK(cuStreamSynchronize(stream));
        now = now_ns();
    }
    print_stamps("stamps", count);
}

static void greedy(double seconds, unsigned iterations, unsigned batch)
{
    static handle events[BATCHES];
    uint64_t end = now_ns() + (uint64_t)(seconds * 1e9);
    void *parameters[] = {&memory, &iterations};
    size_t count = 0;
    for (unsigned i = 0; i < BATCHES; i++)
        if (events[i] == NULL)
            CHECK(cuEventCreate(&events[i], 2)); /* no timing */
    for (unsigned turn = 0; count < MOST_STAMPS; turn++) {
        if (turn >= BATCHES) {
            CHECK(cuEventSynchronize(events[turn % BATCHES]));
            if ((stamps[count++] = now_ns()) >= end)
                break;
        }
        for (unsigned i = 0; i < batch; i++)
            CHECK(launch(chain_kernel, parameters));
        CHECK(cuEventRecord(events[turn % BATCHES], stream));
    }
    CHECK(cuStreamSynchronize(stream));
    print_stamps("greedy", count);
}

/* ---- memory ---- */

struct location { int type, id; };
struct properties { int type, handle_types; struct location location; void *metadata; unsigned char flags[8]; };
struct access { struct location location; int flags; };

static int create(size_t size)
{
    struct properties properties = {.type = 1, .location = {1, 0}};
    struct access access = {{1, 0}, 3};
    uint64_t made;
    address place;
    int status = cuMemCreate(&made, size, &properties, 0);
    if (status != 0)
        return status;
    CHECK(cuMemAddressReserve(&place, size, 0, 0, 0));
    CHECK(cuMemMap(place, size, 0, made, 0));
    CHECK(cuMemSetAccess(place, size, &access, 1));
    held[held_count].memory = place, held[held_count].handle = made;
    return 0;
}

/* Of bytes; a short one is a row, a long one rows of 128 KiB. */
static int make_array(size_t size)
{
    enum { ROW = 128 << 10 };
    struct { size_t width, height; int format; unsigned channels; } shape = {size, 0, 1 /* unsigned char */, 1};
    if (size > ROW)
        shape.width = ROW, shape.height = (size + ROW - 1) / ROW;
    return cuArrayCreate(&held[held_count].handle, &shape);
}

/* ---- memory nodes of graphs ---- */

static size_t graph_memory(int attribute)
{
    unsigned long long bytes = 0;
    CHECK(cuDeviceGetGraphMemAttribute(0, attribute, &bytes));
    return (size_t)bytes;
}

/* A graph that allocates so much, and with `frees` frees it. */
static int make_graph(size_t size, int frees, handle *graph, address *place)
{
    unsigned char node[120] = {0}; /* CUDA_MEM_ALLOC_NODE_PARAMS: 88 bytes of pool properties, accesses, their number, size, address */
    const struct properties properties = {.type = 1, .location = {1, 0}};
    handle made, freed;
    memcpy(node, &properties, 16);
    memcpy(node + 104, &size, sizeof size);
    CHECK(cuGraphCreate(graph, 0));
    int status = cuGraphAddMemAllocNode(&made, *graph, NULL, 0, node);
    memcpy(place, node + 112, sizeof *place);
    if (status == 0 && frees)
        status = cuGraphAddMemFreeNode(&freed, *graph, &made, 1, *place);
    if (status != 0)
        CHECK(cuGraphDestroy(*graph));
    return status;
}

/* Leaves it allocated until give_back. */
static int hold_by_graph(size_t size)
{
    handle graph, instance = NULL;
    int status = make_graph(size, 0, &graph, &held[held_count].memory);
    if (status != 0)
        return status;
    status = cuGraphInstantiate(&instance, graph, 0);
    if (status == 0)
        status = cuGraphLaunch(instance, stream);
    if (status == 0)
        status = cuStreamSynchronize(stream);
    if (instance != NULL)
        CHECK(cuGraphExecDestroy(instance));
    CHECK(cuGraphDestroy(graph));
    return status;
}

/* What is reserved for graphs, step by step. */
static void graph_steps(size_t size)
{
    size_t seen[12];
    int count = 0, status;
    handle graph = NULL, instance = NULL;
    address place;
    CHECK(cuStreamSynchronize(stream));
    CHECK(cuDeviceGraphMemTrim(0));
    seen[count++] = graph_memory(2);
    status = make_graph(size, 1, &graph, &place);
    seen[count++] = graph_memory(2);
    if (status == 0)
        status = cuGraphInstantiate(&instance, graph, 0);
    seen[count++] = graph_memory(2);
    if (status == 0)
        status = cuGraphUpload(instance, stream);
    seen[count++] = graph_memory(2);
    if (status == 0)
        status = cuGraphLaunch(instance, stream);
    seen[count++] = graph_memory(2);
    for (int again = 0; status == 0 && again < 20; again++)
        status = cuGraphLaunch(instance, stream);
    seen[count++] = graph_memory(2);
    if (status == 0)
        status = cuDeviceGraphMemTrim(0);
    seen[count++] = graph_memory(2);
    CHECK(cuStreamSynchronize(stream));
    seen[count++] = graph_memory(2);
    if (instance != NULL)
        CHECK(cuGraphExecDestroy(instance));
    if (graph != NULL && status == 0)
        CHECK(cuGraphDestroy(graph));
    seen[count++] = graph_memory(2);
    CHECK(cuDeviceGraphMemTrim(0));
    seen[count++] = graph_memory(2);
    printf("graph-steps %d", status);
    for (int i = 0; i < count; i++)
        printf(" %zu", seen[i]);
    puts("");
}

static int hold(const char *how, size_t size)
{
    int status;
    if (held_count == MOST_HELD)
        return -1;
    held[held_count].size = size;
    if (strcmp(how, "create") == 0)
        held[held_count].how = BY_CREATE, status = create(size);
    else if (strcmp(how, "array") == 0)
        held[held_count].how = BY_ARRAY, status = make_array(size);
    else if (strcmp(how, "graph") == 0)
        held[held_count].how = BY_GRAPH, status = hold_by_graph(size);
    else if (strcmp(how, "pool") == 0) {
        held[held_count].how = BY_POOL;
        status = cuMemAllocAsync(&held[held_count].memory, size, stream);
        if (status == 0)
            status = cuStreamSynchronize(stream);
    } else
        held[held_count].how = BY_ALLOC, status = cuMemAlloc(&held[held_count].memory, size);
    held_count += status == 0;
    return status;
}

static int give_back(void)
{
    int has_graphs = 0;
    while (held_count > 0) {
        held_count--;
        address place = held[held_count].memory;
        size_t size = held[held_count].size;
        switch (held[held_count].how) {
        case BY_ALLOC:
            CHECK(cuMemFree(place));
            break;
        case BY_ARRAY:
            CHECK(cuArrayDestroy(held[held_count].handle));
            break;
        case BY_GRAPH:
            has_graphs = 1;
            CHECK(cuMemFreeAsync(place, stream));
            break;
        case BY_POOL:
            CHECK(cuMemFreeAsync(place, stream));
            break;
        case BY_CREATE:
            CHECK(cuMemUnmap(place, size));
            CHECK(cuMemRelease(held[held_count].handle));
            CHECK(cuMemAddressFree(place, size));
            break;
        }
    }
    int status = cuStreamSynchronize(stream);
    return status == 0 && has_graphs ? cuDeviceGraphMemTrim(0) : status;
}

static void ask_nvml(void)
{
    struct { unsigned long long total, free, used; } found = {0, 0, 0};
    static int (*init)(void), (*device)(unsigned, handle *), (*information)(handle, void *);
    handle first;
    if (init == NULL) {
        handle library = dlopen("libnvidia-ml.so.1", RTLD_NOW);
        if (library != NULL) {
            *(void **)&init = dlsym(library, "nvmlInit_v2");
            *(void **)&device = dlsym(library, "nvmlDeviceGetHandleByIndex_v2");
            *(void **)&information = dlsym(library, "nvmlDeviceGetMemoryInfo");
        }
    }
    int status = init == NULL || device == NULL || information == NULL ? -1 : 0;
    status = status != 0 ? status : init();
    status = status != 0 ? status : device(0, &first);
    status = status != 0 ? status : information(first, &found);
    printf("nvml %d %llu %llu %llu\n", status, found.total, found.free, found.used);
}

static void ask_driver(void)
{
    size_t available = 0, total = 0, device_total = 0;
    int status = cuMemGetInfo(&available, &total);
    if (status == 0)
        status = cuDeviceTotalMem(&device_total, 0);
    printf("info %d %zu %zu %zu\n", status, available, total, device_total);
}

static void await_total(size_t wanted, double seconds)
{
    uint64_t end = now_ns() + (uint64_t)(seconds * 1e9), now = 0;
    size_t available, total = 0, device_total = 0;
    do {
        CHECK(cuMemGetInfo(&available, &total));
        CHECK(cuDeviceTotalMem(&device_total, 0));
        now = now_ns();
    } while ((total != wanted || device_total != wanted) && now < end);
    printf("total %llu\n", (unsigned long long)(total == wanted && device_total == wanted ? now : 0));
}

static void await_answer(size_t size, int wanted, double seconds)
{
    uint64_t end = now_ns() + (uint64_t)(seconds * 1e9), now = 0;
    int status;
    do {
        address place;
        status = cuMemAlloc(&place, size);
        now = now_ns();
        if (status == 0)
            CHECK(cuMemFree(place));
    } while (status != wanted && now < end);
    printf("answer %llu\n", (unsigned long long)(status == wanted ? now : 0));
}

/* ---- misbehaviour ---- */

static void poke(void)
{
    int status = launch_step(0xDEAD00000000, 1);
    if (status == 0)
        status = cuStreamSynchronize(stream);
    address place;
    printf("poke %d %d\n", status, cuMemAlloc(&place, 4096));
}

static void spin(double seconds)
{
    uint64_t nanoseconds = (uint64_t)(seconds * 1e9), began = now_ns();
    void *parameters[] = {&nanoseconds};
    int status = launch(spin_kernel, parameters);
    if (status == 0)
        status = cuStreamSynchronize(stream);
    uint64_t took = now_ns() - began;
    printf("spin %d %llu %d\n", status, (unsigned long long)took, cuCtxSynchronize());
}

static void begin(void)
{
    handle library = dlopen("libcuda.so.1", RTLD_NOW), context, module;
    if (library == NULL) {
        printf("failed -1: %s\n", dlerror());
        exit(1);
    }
#define FIND(name, symbol, arguments)                                                                                  \
    if ((*(void **)&name = dlsym(library, symbol)) == NULL) {                                                          \
        printf("failed -1: no %s\n", symbol);                                                                          \
        exit(1);                                                                                                       \
    }
    FUNCTIONS(FIND)
    stamps = calloc(MOST_STAMPS, sizeof *stamps);
    CHECK(stamps == NULL);
    CHECK(cuInit(0));
    CHECK(cuDevicePrimaryCtxRetain(&context, 0));
    CHECK(cuCtxSetCurrent(context));
    CHECK(cuModuleLoadData(&module, PTX));
    CHECK(cuModuleGetFunction(&nothing_kernel, module, "nothing"));
    CHECK(cuModuleGetFunction(&chain_kernel, module, "chain"));
    CHECK(cuModuleGetFunction(&step_kernel, module, "step"));
    CHECK(cuModuleGetFunction(&spin_kernel, module, "spin"));
    CHECK(cuMemAlloc(&memory, 4096));
    CHECK(cuStreamCreate(&stream, 1));
    uint64_t short_time = 1000;
    unsigned one = 1;
    void *of_chain[] = {&memory, &one}, *of_spin[] = {&short_time};
    CHECK(launch(nothing_kernel, NULL));
    CHECK(launch(chain_kernel, of_chain));
    CHECK(launch_step(memory, 1));
    CHECK(launch(spin_kernel, of_spin));
    CHECK(cuStreamSynchronize(stream));
}

int main(void)
{
    begin();
    puts("ready");
    fflush(stdout);
    char line[256];
    while (fgets(line, sizeof line, stdin) != NULL) {
        char word[64] = "";
        double a = 0, b = 0, c = 0;
        int parts = sscanf(line, "%63s %lf %lf %lf", word, &a, &b, &c);
        if (parts < 1)
            continue;
#define IS(text) (strcmp(word, text) == 0)
        if (IS("turns"))
            turns(a, (unsigned)b);
        else if (IS("launch"))
            launches(a);
        else if (IS("sync"))
            syncs((unsigned)a);
        else if (IS("flood"))
            flood((unsigned)a);
        else if (IS("copies"))
            copies((size_t)a, (unsigned)b);
        else if (IS("copy-for-ever"))
            copy_for_ever((size_t)a);
        else if (IS("stamps"))
            stamp_turns(a);
        else if (IS("greedy"))
            greedy(a, (unsigned)b, (unsigned)c);
        else if (IS("alloc") || IS("create") || IS("pool") || IS("array") || IS("graph"))
            printf("%s %d\n", word, hold(word, (size_t)a));
        else if (IS("free"))
            printf("free %d\n", give_back());
        else if (IS("graph-steps"))
            graph_steps((size_t)a);
        else if (IS("info"))
            ask_driver();
        else if (IS("nvml"))
            ask_nvml();
        else if (IS("total"))
            await_total((size_t)a, b);
        else if (IS("answer"))
            await_answer((size_t)a, (int)b, c);
        else if (IS("poke"))
            poke();
        else if (IS("spin"))
            spin(a);
        else
            printf("failed -1: not understood: %s", line);
        fflush(stdout);
    }
    return 0;
}
