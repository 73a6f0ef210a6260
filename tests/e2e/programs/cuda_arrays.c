/* SPDX-License-Identifier: Apache-2.0 */
/* CUDA arrays through and through: cuda_arrays [PINNED-BYTES]. Descriptions, copies of every kind, captures, errors, the end of a
 * context. So many bytes are pinned beforehand, or as many as can be had, so that little is left for staging. */
#include "guest.h"

enum { W = 37, H = 11, D = 5, PIECE = 4096 };

static unsigned char *pinned; /* a piece */

static unsigned char pattern(size_t i) { return (unsigned char)(7 * i + i / 251); }

static void fill(unsigned char *bytes, size_t size)
{
    for (size_t i = 0; i < size; i++)
        bytes[i] = pattern(i);
}

static CUarray make(size_t width, size_t height, size_t depth, CUarray_format format, unsigned channels, unsigned flags)
{
    CUDA_ARRAY3D_DESCRIPTOR asked = {width, height, depth, format, channels, flags}, said = {0};
    CUarray array = NULL;
    CHECK(cuArray3DCreate(&array, &asked));
    CHECK(cuArray3DGetDescriptor(&said, array));
    EXPECT(memcmp(&asked, &said, sizeof said) == 0);
    return array;
}

static void descriptions(void)
{
    CUDA_ARRAY_DESCRIPTOR flat = {W, H, CU_AD_FORMAT_HALF, 2}, said = {0};
    CUDA_ARRAY3D_DESCRIPTOR whole = {0}, wrong = {0, 4, 0, CU_AD_FORMAT_FLOAT, 1, 0};
    CUarray array;
    CHECK(cuArrayCreate(&array, &flat));
    CHECK(cuArrayGetDescriptor(&said, array));
    EXPECT(memcmp(&flat, &said, sizeof said) == 0);
    CHECK(cuArray3DGetDescriptor(&whole, array));
    EXPECT(whole.Width == W && whole.Height == H && whole.Depth == 0 && whole.Flags == 0);
    CHECK(cuArrayDestroy(array));
    EXPECT(cuArrayDestroy(array) == CUDA_ERROR_INVALID_HANDLE);
    EXPECT(cuArrayGetDescriptor(&said, array) == CUDA_ERROR_INVALID_HANDLE);
    EXPECT(cuArray3DCreate(&array, &wrong) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuArray3DCreate(NULL, &wrong) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuArray3DCreate(&array, NULL) == CUDA_ERROR_INVALID_VALUE);
    wrong = (CUDA_ARRAY3D_DESCRIPTOR){4, 4, 0, CU_AD_FORMAT_FLOAT, 3, 0};
    EXPECT(cuArray3DCreate(&array, &wrong) == CUDA_ERROR_INVALID_VALUE);
    wrong = (CUDA_ARRAY3D_DESCRIPTOR){4, 4, 0, CU_AD_FORMAT_FLOAT, 1, CUDA_ARRAY3D_SPARSE};
    EXPECT(cuArray3DCreate(&array, &wrong) == CUDA_ERROR_NOT_SUPPORTED);
    wrong = (CUDA_ARRAY3D_DESCRIPTOR){4, 4, 0, CU_AD_FORMAT_NV12, 1, 0};
    EXPECT(cuArray3DCreate(&array, &wrong) == CUDA_ERROR_NOT_SUPPORTED);
}

/* One row, by the calls of old. */
static void rows(CUstream stream)
{
    static unsigned char host[4096], back[4096];
    CUarray one = make(1024, 0, 0, CU_AD_FORMAT_FLOAT, 1, 0), two = make(2048, 0, 0, CU_AD_FORMAT_UNSIGNED_INT16, 1, 0);
    CUarray flat = make(64, 4, 0, CU_AD_FORMAT_FLOAT, 1, 0);
    CUdeviceptr memory;
    CHECK(cuMemAlloc(&memory, sizeof host));
    fill(host, sizeof host);
    CHECK(cuMemcpyHtoA(one, 0, host, sizeof host));
    CHECK(cuMemcpyAtoA(two, 8, one, 4, 4000));
    CHECK(cuMemcpyAtoD(memory, two, 8, 4000));
    CHECK(cuMemcpyDtoH(back, memory, 4000));
    EXPECT(memcmp(back, host + 4, 4000) == 0);
    CHECK(cuMemsetD8(memory, 0x5a, sizeof host));
    CHECK(cuMemcpyDtoA(one, 400, memory, 800));
    memset(back, 0, sizeof back);
    CHECK(cuMemcpyAtoH(back, one, 396, 808));
    EXPECT(memcmp(back, host + 396, 4) == 0 && back[4] == 0x5a && back[803] == 0x5a && memcmp(back + 804, host + 1200, 4) == 0);
    fill(pinned, sizeof host);
    CHECK(cuMemcpyHtoAAsync(one, 0, pinned, sizeof host, stream));
    CHECK(cuMemcpyAtoHAsync(back, one, 0, sizeof back, stream));
    CHECK(cuStreamSynchronize(stream));
    EXPECT(memcmp(back, host, sizeof host) == 0);
    EXPECT(cuMemcpyHtoA(one, 0, host, sizeof host + 4) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemcpyHtoA(one, 2, host, 8) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemcpyHtoA(flat, 0, host, 8) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemcpyHtoA(NULL, 0, host, 8) == CUDA_ERROR_INVALID_VALUE);
    CHECK(cuMemcpyHtoA(one, 0, host, 0));
    CHECK(cuMemFree(memory));
    CHECK(cuArrayDestroy(one));
    CHECK(cuArrayDestroy(two));
    CHECK(cuArrayDestroy(flat));
}

/* Boxes between ordinary memory, pinned memory, device memory and arrays; every byte is compared. */
static void boxes(CUstream stream)
{
    static unsigned char host[W * 8 * H * D], back[W * 8 * H * D];
    CUarray array = make(W, H, D, CU_AD_FORMAT_FLOAT, 2, CUDA_ARRAY3D_SURFACE_LDST), other = make(W, H, D, CU_AD_FORMAT_FLOAT, 2, 0);
    fill(host, sizeof host);
    CUDA_MEMCPY3D up = {.srcMemoryType = CU_MEMORYTYPE_HOST, .srcHost = host, .srcPitch = W * 8, .srcHeight = H,
                        .dstMemoryType = CU_MEMORYTYPE_ARRAY, .dstArray = array, .WidthInBytes = W * 8, .Height = H, .Depth = D};
    CHECK(cuMemcpy3D(&up));
    CUDA_MEMCPY3D across = {.srcMemoryType = CU_MEMORYTYPE_ARRAY, .srcArray = array, .srcXInBytes = 8, .srcY = 2, .srcZ = 1,
                            .dstMemoryType = CU_MEMORYTYPE_ARRAY, .dstArray = other, .dstXInBytes = 16, .dstY = 1, .dstZ = 2,
                            .WidthInBytes = 80, .Height = 6, .Depth = 3};
    CHECK(cuMemcpy3DAsync(&across, stream));
    CUDA_MEMCPY3D down = {.srcMemoryType = CU_MEMORYTYPE_ARRAY, .srcArray = other, .srcXInBytes = 16, .srcY = 1, .srcZ = 2,
                          .dstMemoryType = CU_MEMORYTYPE_HOST, .dstHost = pinned, .dstPitch = 80, .dstHeight = 6,
                          .WidthInBytes = 80, .Height = 6, .Depth = 3};
    CHECK(cuMemcpy3DAsync(&down, stream));
    CHECK(cuStreamSynchronize(stream));
    for (unsigned z = 0; z < 3; z++)
        for (unsigned y = 0; y < 6; y++)
            EXPECT(memcmp(pinned + (z * 6 + y) * 80, host + ((z + 1) * H + y + 2) * W * 8 + 8, 80) == 0);
    CUDA_MEMCPY2D slice = {.srcMemoryType = CU_MEMORYTYPE_ARRAY, .srcArray = array, .srcXInBytes = 24, .srcY = 3,
                           .dstMemoryType = CU_MEMORYTYPE_HOST, .dstHost = back, .dstPitch = 100, .WidthInBytes = 48, .Height = 5};
    CHECK(cuMemcpy2D(&slice));
    for (unsigned y = 0; y < 5; y++)
        EXPECT(memcmp(back + y * 100, host + (y + 3) * W * 8 + 24, 48) == 0);
    down.dstZ = 0, down.srcZ = 3;
    EXPECT(cuMemcpy3D(&down) == CUDA_ERROR_INVALID_VALUE); /* slices 3 to 5 of 0 to 4 */
    slice.srcXInBytes = 20;
    EXPECT(cuMemcpy2D(&slice) == CUDA_ERROR_INVALID_VALUE); /* a part of an element */
    CHECK(cuArrayDestroy(array));
    CHECK(cuArrayDestroy(other));
}

/* More than a staging buffer holds, both ways, with pageable memory: rows longer than one, and many rows. */
static void large(void)
{
    const size_t shapes[][2] = {{131072, 6}, {1000, 700}};
    for (int i = 0; i < 2; i++) {
        const size_t row = shapes[i][0] * 16, height = shapes[i][1], size = row * height;
        unsigned char *host = malloc(size), *back = calloc(size, 1);
        CUarray array = make(shapes[i][0], height, 0, CU_AD_FORMAT_UNSIGNED_INT32, 4, 0);
        fill(host, size);
        CUDA_MEMCPY2D up = {.srcMemoryType = CU_MEMORYTYPE_HOST, .srcHost = host, .srcPitch = row,
                            .dstMemoryType = CU_MEMORYTYPE_ARRAY, .dstArray = array, .WidthInBytes = row, .Height = height};
        CUDA_MEMCPY2D down = {.srcMemoryType = CU_MEMORYTYPE_ARRAY, .srcArray = array,
                              .dstMemoryType = CU_MEMORYTYPE_HOST, .dstHost = back, .dstPitch = row, .WidthInBytes = row, .Height = height};
        CHECK(cuMemcpy2D(&up));
        CHECK(cuMemcpy2D(&down));
        EXPECT(memcmp(host, back, size) == 0);
        CHECK(cuArrayDestroy(array));
        free(host);
        free(back);
    }
}

static void graphs(CUstream stream)
{
    static unsigned char host[256], back[256];
    CUarray array = make(64, 4, 0, CU_AD_FORMAT_UNSIGNED_INT8, 1, 0);
    CUdeviceptr memory, copied;
    CUgraph graph;
    CUgraphNode captured, added;
    CUgraphExec plan;
    CUcontext context;
    CUDA_ARRAY_DESCRIPTOR forbidden = {4, 4, CU_AD_FORMAT_FLOAT, 1};
    size_t count = 1;
    CHECK(cuCtxGetCurrent(&context));
    CHECK(cuMemAlloc(&memory, sizeof host));
    CHECK(cuMemAlloc(&copied, sizeof host));
    fill(host, sizeof host);
    CHECK(cuMemcpyHtoD(memory, host, sizeof host));
    CUDA_MEMCPY3D in = {.srcMemoryType = CU_MEMORYTYPE_DEVICE, .srcDevice = memory, .srcPitch = 64, .srcHeight = 4,
                        .dstMemoryType = CU_MEMORYTYPE_ARRAY, .dstArray = array, .WidthInBytes = 64, .Height = 4, .Depth = 1}, said;
    CHECK(cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    CHECK(cuMemcpy3DAsync(&in, stream));
    CHECK(cuStreamEndCapture(stream, &graph));
    CHECK(cuGraphGetNodes(graph, &captured, &count));
    EXPECT(count == 1);
    CHECK(cuGraphMemcpyNodeGetParams(captured, &said));
    EXPECT(said.dstMemoryType == CU_MEMORYTYPE_ARRAY && said.dstArray == array && said.WidthInBytes == 64);
    CUDA_MEMCPY3D out = {.srcMemoryType = CU_MEMORYTYPE_ARRAY, .srcArray = array, .srcY = 1,
                         .dstMemoryType = CU_MEMORYTYPE_DEVICE, .dstDevice = copied, .dstPitch = 64, .dstHeight = 3,
                         .WidthInBytes = 64, .Height = 3, .Depth = 1};
    CHECK(cuGraphAddMemcpyNode(&added, graph, &captured, 1, &out, context));
    out.Height = 4;
    EXPECT(cuGraphAddMemcpyNode(&added, graph, &captured, 1, &out, context) == CUDA_ERROR_INVALID_VALUE);
    CHECK(cuGraphInstantiate(&plan, graph, 0));
    CHECK(cuGraphLaunch(plan, stream));
    CHECK(cuStreamSynchronize(stream));
    CHECK(cuMemcpyDtoH(back, copied, 192));
    EXPECT(memcmp(back, host + 64, 192) == 0);
    CHECK(cuGraphExecDestroy(plan));
    CHECK(cuGraphDestroy(graph));
    /* What is not said of memory, pitch and height, is as little as the box needs. */
    memset(pinned, 0, sizeof host);
    CUDA_MEMCPY3D brief = {.srcMemoryType = CU_MEMORYTYPE_ARRAY, .srcArray = array, .dstMemoryType = CU_MEMORYTYPE_HOST, .dstHost = pinned,
                           .WidthInBytes = 64, .Height = 4, .Depth = 1};
    CHECK(cuGraphCreate(&graph, 0));
    CHECK(cuGraphAddMemcpyNode(&added, graph, NULL, 0, &brief, context));
    CHECK(cuGraphInstantiate(&plan, graph, 0));
    CHECK(cuGraphLaunch(plan, stream));
    CHECK(cuStreamSynchronize(stream));
    EXPECT(memcmp(pinned, host, sizeof host) == 0);
    CHECK(cuGraphExecDestroy(plan));
    CHECK(cuGraphDestroy(graph));
    CHECK(cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
    CUarray none;
    EXPECT(cuArrayCreate(&none, &forbidden) == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    EXPECT(cuStreamEndCapture(stream, &graph) == CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    CHECK(cuArrayDestroy(array));
    CHECK(cuMemFree(memory));
    CHECK(cuMemFree(copied));
}

/* What arrays took comes back when they are destroyed, and when their context ends. */
static void ends(void)
{
    CUdevice device;
    CUcontext context;
    size_t before, during, after, total;
    CHECK(cuCtxGetDevice(&device));
    CHECK(cuMemGetInfo(&before, &total));
    CHECK(cuCtxCreate(&context, NULL, 0, device));
    CUarray array = make(4096, 1024, 0, CU_AD_FORMAT_FLOAT, 1, 0);
    CUDA_ARRAY3D_DESCRIPTOR said;
    CHECK(cuMemGetInfo(&during, &total));
    EXPECT(before - during >= 4096 * 1024 * 4);
    CHECK(cuCtxDestroy(context));
    EXPECT(cuArray3DGetDescriptor(&said, array) == CUDA_ERROR_INVALID_HANDLE);
    CHECK(cuMemGetInfo(&after, &total));
    EXPECT(after == before);
}

int main(int argc, char **argv)
{
    CUstream stream;
    start();
    CHECK(cuMemHostAlloc((void **)&pinned, PIECE, 0));
    CUresult status = CUDA_SUCCESS;
    for (long left = argc > 1 ? atol(argv[1]) : 0; left > 0 && status == CUDA_SUCCESS; left -= PIECE) {
        void *more;
        status = cuMemHostAlloc(&more, PIECE, 0);
        EXPECT(status == CUDA_SUCCESS || status == CUDA_ERROR_OUT_OF_MEMORY);
    }
    CHECK(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    descriptions();
    rows(stream);
    boxes(stream);
    large();
    graphs(stream);
    ends();
    puts("done");
    return 0;
}
