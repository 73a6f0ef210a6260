/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memory_data.c SEED ROUNDS THREADS - random copies, boxes and memsets between every kind of memory, compared byte by byte
 * with a model. Each thread has buffers and a stream of its own, and the arena, the ring and the table in common.
 */
#include <pthread.h>

#include "guest.h"

#define SIZE ((size_t)3 << 20)
#define BIG ((size_t)40 << 20)
#define UNIT ((size_t)2 << 20)
enum { DEVICE, MAPPED, POOLED, PINNED, PAGEABLE, REGISTERED, KINDS };

struct buffer { uint64_t address; uint8_t *model; bool host; };

static uint64_t next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static size_t length(uint64_t *state, size_t most)
{
    static const size_t typical[] = {1, 4, 100, 4096, 65535, 65536, 65537, 200000, 1 << 20, (1 << 20) + 13, (5 << 19) + 1};
    size_t n = next(state) % 3 ? typical[next(state) % 11] : next(state) % most + 1;
    return n > most ? most : n;
}

static void make(struct buffer *b, int kind, CUstream stream, size_t size)
{
    CUdeviceptr address = 0;
    void *host = NULL;
    b->host = kind >= PINNED;
    switch (kind) {
    case DEVICE: OK(cuMemAlloc_v2(&address, size)); break;
    case POOLED: OK(cuMemAllocAsync(&address, size, stream)); break;
    case MAPPED: {
        CUmemAllocationProp properties = {.type = 1, .location = {1, 0}};
        CUmemAccessDesc access = {{1, 0}, 3};
        size_t units = (size + UNIT - 1) / UNIT;
        OK(cuMemAddressReserve(&address, (units + 1) * UNIT, 0, 0, 0));
        for (size_t i = 0; i < units; i++) {
            CUmemGenericAllocationHandle handle;
            OK(cuMemCreate(&handle, UNIT, &properties, 0));
            OK(cuMemMap(address + i * UNIT, UNIT, 0, handle, 0));
            OK(cuMemRelease(handle));
        }
        OK(cuMemSetAccess(address, units * UNIT, &access, 1));
        break;
    }
    case PINNED: OK(cuMemHostAlloc(&host, size, 0)); break;
    default:
        host = malloc(size);
        if (kind == REGISTERED) OK(cuMemHostRegister_v2(host, size, 0));
    }
    b->address = host != NULL ? (uint64_t)(uintptr_t)host : address;
    b->model = calloc(1, size);
    if (host != NULL) {
        memset(host, 0, size);
    } else {
        OK(cuMemsetD8Async(address, 0, size, stream));
    }
    OK(cuStreamSynchronize(stream));
}

static void unmake(struct buffer *b, int kind, CUstream stream, size_t size)
{
    switch (kind) {
    case DEVICE: OK(cuMemFree_v2(b->address)); break;
    case POOLED: OK(cuMemFreeAsync(b->address, stream)); break;
    case MAPPED: {
        size_t units = (size + UNIT - 1) / UNIT;
        OK(cuMemUnmap(b->address, units * UNIT));
        OK(cuMemAddressFree(b->address, (units + 1) * UNIT));
        break;
    }
    case PINNED: OK(cuMemFreeHost((void *)(uintptr_t)b->address)); break;
    default:
        if (kind == REGISTERED) OK(cuMemHostUnregister((void *)(uintptr_t)b->address));
        free((void *)(uintptr_t)b->address);
    }
    free(b->model);
}

/* Does the buffer hold what the model says? */
static void verify(const struct buffer *b, CUstream stream, size_t size, int kind, uint64_t step)
{
    OK(cuStreamSynchronize(stream));
    uint8_t *read = (uint8_t *)(uintptr_t)b->address, *copy = NULL;
    if (!b->host) {
        read = copy = malloc(size);
        OK(cuMemcpyDtoHAsync_v2(copy, b->address, size, stream));
    }
    if (memcmp(read, b->model, size) != 0) {
        size_t at = 0;
        while (read[at] == b->model[at]) at++;
        printf("kind %d differs at %zu after step %llu\n", kind, at, (unsigned long long)step);
        guest_failures++;
    }
    free(copy);
}

static int run_copy(const struct buffer *to, const struct buffer *from, uint64_t a, uint64_t b, size_t n, unsigned way, CUstream stream)
{
    uint64_t dst = to->address + a, src = from->address + b;
    if (way == 0) return (int)cuMemcpyAsync(dst, src, n, stream);
    if (way == 1) return (int)cuMemcpy(dst, src, n);
    if (!to->host && from->host) return (int)(way == 2 ? cuMemcpyHtoDAsync_v2(dst, (void *)(uintptr_t)src, n, stream) : cuMemcpyHtoD_v2(dst, (void *)(uintptr_t)src, n));
    if (to->host && !from->host) return (int)(way == 2 ? cuMemcpyDtoHAsync_v2((void *)(uintptr_t)dst, src, n, stream) : cuMemcpyDtoH_v2((void *)(uintptr_t)dst, src, n));
    if (!to->host && !from->host) return (int)(way == 2 ? cuMemcpyDtoDAsync_v2(dst, src, n, stream) : cuMemcpyDtoD_v2(dst, src, n));
    return (int)cuMemcpyAsync(dst, src, n, stream);
}

static void run_box(struct buffer *to, struct buffer *from, uint64_t *state, CUstream stream)
{
    size_t width = next(state) % 3000 + 1, height = next(state) % 40 + 1, depth = next(state) % 4 + 1;
    size_t pitch[2], rows[2], offset[2];
    for (int i = 0; i < 2; i++) {
        pitch[i] = width + next(state) % 64;
        rows[i] = height + next(state) % 3;
        offset[i] = next(state) % 1000;
        if (next(state) % 4 == 0) pitch[i] = width, rows[i] = height;
    }
    bool flat = next(state) % 2;
    if (flat) depth = 1;
    unsigned unified = next(state) % 3 == 0;
    CUDA_MEMCPY3D box = {.WidthInBytes = width, .Height = height, .Depth = depth, .srcPitch = pitch[0], .srcHeight = rows[0], .dstPitch = pitch[1], .dstHeight = rows[1],
                         .srcXInBytes = 0, .srcMemoryType = unified ? 4 : from->host ? 1 : 2, .dstMemoryType = unified ? 4 : to->host ? 1 : 2,
                         .srcHost = (void *)(uintptr_t)(from->address + offset[0]), .srcDevice = from->address + offset[0],
                         .dstHost = (void *)(uintptr_t)(to->address + offset[1]), .dstDevice = to->address + offset[1]};
    size_t y = next(state) % 3, x = next(state) % 3;
    if (pitch[0] >= width + x && rows[0] >= height + y) {
        box.srcXInBytes = x;
        box.srcY = y;
        offset[0] += y * pitch[0] + x;
    }
    if (flat) {
        CUDA_MEMCPY2D plane = {.WidthInBytes = width, .Height = height, .srcPitch = pitch[0], .dstPitch = pitch[1], .srcXInBytes = box.srcXInBytes, .srcY = box.srcY,
                               .srcMemoryType = box.srcMemoryType, .dstMemoryType = box.dstMemoryType, .srcHost = box.srcHost, .srcDevice = box.srcDevice,
                               .dstHost = box.dstHost, .dstDevice = box.dstDevice};
        OK(next(state) % 2 ? cuMemcpy2DAsync_v2(&plane, stream) : cuMemcpy2D_v2(&plane));
    } else {
        OK(next(state) % 2 ? cuMemcpy3DAsync_v2(&box, stream) : cuMemcpy3D_v2(&box));
    }
    for (size_t z = 0; z < depth; z++)
        for (size_t r = 0; r < height; r++)
            memmove(to->model + offset[1] + (z * rows[1] + r) * pitch[1], from->model + offset[0] + (z * rows[0] + r) * pitch[0], width);
}

static void run_memset(struct buffer *to, uint64_t *state, CUstream stream)
{
    unsigned element = 1u << next(state) % 3, value = (unsigned)next(state);
    size_t offset = next(state) % 1000 / element * element, width = next(state) % 5000 + 1, height = next(state) % 4 ? 1 : next(state) % 20 + 1;
    size_t pitch = (width + next(state) % 20) * element;
    uint64_t at = to->address + offset;
    bool wait = next(state) % 2;
    if (height == 1) {
        OK(element == 1 ? (wait ? cuMemsetD8_v2(at, (unsigned char)value, width) : cuMemsetD8Async(at, (unsigned char)value, width, stream))
           : element == 2 ? (wait ? cuMemsetD16_v2(at, (unsigned short)value, width) : cuMemsetD16Async(at, (unsigned short)value, width, stream))
                          : (wait ? cuMemsetD32_v2(at, value, width) : cuMemsetD32Async(at, value, width, stream)));
    } else {
        OK(element == 1 ? (wait ? cuMemsetD2D8_v2(at, pitch, (unsigned char)value, width, height) : cuMemsetD2D8Async(at, pitch, (unsigned char)value, width, height, stream))
           : element == 2 ? (wait ? cuMemsetD2D16_v2(at, pitch, (unsigned short)value, width, height) : cuMemsetD2D16Async(at, pitch, (unsigned short)value, width, height, stream))
                          : (wait ? cuMemsetD2D32_v2(at, pitch, value, width, height) : cuMemsetD2D32Async(at, pitch, value, width, height, stream)));
    }
    for (size_t y = 0; y < height; y++)
        for (size_t x = 0; x < width; x++) memcpy(to->model + offset + y * pitch + x * element, &value, element);
}

struct job { CUcontext context; uint64_t seed; unsigned rounds; };

static void *work(void *argument)
{
    struct job *job = argument;
    uint64_t state = job->seed * 0x9e3779b97f4a7c15ull | 1;
    struct buffer b[KINDS];
    CUstream stream;
    OK(cuCtxSetCurrent(job->context));
    OK(cuStreamCreate(&stream, 0));
    for (int kind = 0; kind < KINDS; kind++) make(&b[kind], kind, stream, SIZE);
    for (unsigned step = 0; step < job->rounds && guest_failures == 0; step++) {
        struct buffer *to = &b[next(&state) % KINDS], *from = &b[next(&state) % KINDS];
        /* The program's own writes to host memory come when nothing is under way. */
        OK(cuStreamSynchronize(stream));
        OK(cuStreamSynchronize(NULL));
        if (from->host) {
            size_t at = next(&state) % (SIZE - 4096);
            for (size_t i = 0; i < 4096; i++) from->model[at + i] = ((uint8_t *)(uintptr_t)from->address)[at + i] = (uint8_t)next(&state);
        }
        unsigned what = next(&state) % 8;
        if (what == 0 && to != &b[PAGEABLE]) {
            run_memset(to, &state, stream);
        } else if (what > 0 && what <= 2 && to != from) {
            run_box(to, from, &state, stream);
        } else if (to != from) {
            size_t n = length(&state, SIZE), a = next(&state) % (SIZE - n + 1), c = next(&state) % (SIZE - n + 1);
            OK(run_copy(to, from, a, c, n, next(&state) % 4, stream));
            memmove(to->model + a, from->model + c, n);
        }
        if (step % 8 == 7)
            for (int kind = 0; kind < KINDS; kind++) verify(&b[kind], stream, SIZE, kind, step);
    }
    for (int kind = 0; kind < KINDS; kind++) {
        verify(&b[kind], stream, SIZE, kind, job->rounds);
        unmake(&b[kind], kind, stream, SIZE);
    }
    OK(cuStreamDestroy_v2(stream));
    return NULL;
}

/* Long copies of pageable memory: many chunks, staging used again and again, helper threads where there are processors. */
static void big(CUstream stream)
{
    uint8_t *source = malloc(BIG), *sink = calloc(1, BIG);
    CUdeviceptr p;
    uint64_t state = 12345;
    for (size_t i = 0; i < BIG; i += 8) {
        uint64_t value = next(&state);
        memcpy(source + i, &value, 8);
    }
    OK(cuMemAlloc_v2(&p, BIG));
    for (size_t n = BIG - 5; n > 0; n = n > BIG / 8 ? n / 3 : 0) {
        OK(cuMemcpyHtoDAsync_v2(p, source + 3, n, stream));
        OK(cuMemcpyDtoHAsync_v2(sink, p, n, stream));
        CHECK(memcmp(source + 3, sink, n) == 0);
        OK(cuMemcpyHtoD_v2(p + 5, source, n));
        OK(cuMemcpyDtoH_v2(sink + 2, p + 5, n));
        CHECK(memcmp(source, sink + 2, n) == 0);
    }
    /* A box whose rows are longer than a staging buffer. */
    CUDA_MEMCPY2D box = {.WidthInBytes = (5 << 20) + 1, .Height = 5, .srcPitch = 6 << 20, .dstPitch = 7 << 20, .srcMemoryType = 1, .dstMemoryType = 2, .srcHost = source, .dstDevice = p};
    OK(cuMemcpy2DAsync_v2(&box, stream));
    for (size_t y = 0; y < box.Height; y++) {
        OK(cuMemcpyDtoHAsync_v2(sink, p + y * box.dstPitch, box.WidthInBytes, stream));
        CHECK(memcmp(sink, source + y * box.srcPitch, box.WidthInBytes) == 0);
    }
    OK(cuMemFree_v2(p));
    free(source);
    free(sink);
}

int main(int count, char **words)
{
    uint64_t seed = count > 1 ? strtoull(words[1], NULL, 10) : 1;
    unsigned rounds = count > 2 ? (unsigned)atoi(words[2]) : 200, threads = count > 3 ? (unsigned)atoi(words[3]) : 1;
    CUcontext context = guest_begin();
    CUstream stream;
    OK(cuStreamCreate(&stream, 1));
    big(stream);
    struct job job[16];
    pthread_t thread[16];
    for (unsigned i = 0; i < threads; i++) {
        job[i] = (struct job){context, seed * 100 + i, rounds};
        pthread_create(&thread[i], NULL, work, &job[i]);
    }
    for (unsigned i = 0; i < threads; i++) pthread_join(thread[i], NULL);
    OK(cuStreamDestroy_v2(stream));
    return guest_end();
}
