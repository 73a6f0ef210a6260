/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memory_codes.c - what memory, stream and event calls answer. Every code here was measured on an H200 (driver
 * 580.159.04): this program passes natively too. Where a guest is refused what the real driver does, or the real
 * driver crashes, stands EXPECT_GUEST.
 */
#include "guest.h"

#define UNIT ((size_t)2 << 20)

static CUdeviceptr at(const void *pointer) { return (CUdeviceptr)(uintptr_t)pointer; }

static void before_a_context(void)
{
    CUdeviceptr p;
    EXPECT(CUDA_ERROR_NOT_INITIALIZED, cuMemAlloc_v2(&p, 16));
    OK(cuInit(0));
    EXPECT(CUDA_ERROR_INVALID_CONTEXT, cuMemAlloc_v2(&p, 16));
    EXPECT(CUDA_ERROR_INVALID_CONTEXT, cuStreamSynchronize(NULL));
    EXPECT(CUDA_ERROR_INVALID_CONTEXT, cuMemcpyHtoD_v2(16, &p, 8));
    EXPECT(CUDA_ERROR_INVALID_CONTEXT, cuMemcpyHtoD_v2(16, &p, 0));
}

static void allocation(void)
{
    CUdeviceptr p, q, base;
    size_t pitch, size, available, total;
    EXPECT(1, cuMemAlloc_v2(&p, 0));
    EXPECT(1, cuMemAlloc_v2(NULL, 16));
    EXPECT(2, cuMemAlloc_v2(&p, (size_t)1 << 46));
    OK(cuMemAlloc_v2(&p, 1000));
    OK(cuMemFree_v2(0));
    EXPECT(1, cuMemFree_v2(p + 4));
    EXPECT(1, cuMemFree_v2(0x1234));
    EXPECT(1, cuMemFree_v2(at(&p)));
    OK(cuMemAllocPitch_v2(&q, &pitch, 100, 10, 4));
    CHECK(pitch == 512);
    EXPECT(1, cuMemAllocPitch_v2(&base, &pitch, 100, 10, 3));
    EXPECT(1, cuMemAllocPitch_v2(&base, &pitch, 0, 10, 4));
    EXPECT(1, cuMemAllocPitch_v2(&base, &pitch, 100, 0, 4));
    OK(cuMemGetAddressRange_v2(&base, &size, q + 5));
    CHECK(base == q && size == 5120);
    OK(cuMemGetAddressRange_v2(NULL, &size, p));
    CHECK(size == 1000);
    OK(cuMemGetAddressRange_v2(&base, NULL, p));
    OK(cuMemGetAddressRange_v2(NULL, NULL, p));
    EXPECT(500, cuMemGetAddressRange_v2(&base, &size, 0x1234));
    OK(cuMemGetInfo_v2(&available, &total));
    CHECK(available < total);
    OK(cuMemGetInfo_v2(NULL, &total));
    OK(cuMemGetInfo_v2(&available, NULL));
    OK(cuMemFree_v2(q));
    OK(cuMemFree_v2(p));
    EXPECT(1, cuMemFree_v2(p));
    EXPECT(1, cuMemcpyHtoD_v2(p, &size, 8));
    EXPECT(1, cuMemsetD8_v2(p, 1, 1));
    EXPECT_GUEST(801, cuMemAllocManaged(&p, 1 << 20, 1));
}

static void pinned(void)
{
    void *h, *h2;
    CUdeviceptr p, base;
    unsigned flags;
    static char page[1 << 20] __attribute__((aligned(4096)));
    OK(cuMemAlloc_v2(&p, 1000));
    OK(cuMemHostAlloc(&h, 5000, 0));
    EXPECT(1, cuMemHostAlloc(NULL, 5000, 0));
    OK(cuMemHostAlloc(&h2, 0, 0));
    CHECK(h2 == NULL);
    EXPECT(1, cuMemHostAlloc(&h2, 100, 8));
    OK(cuMemAllocHost_v2(&h2, 0));
    CHECK(h2 == NULL);
    OK(cuMemHostAlloc(&h2, 100, 7));
    OK(cuMemHostGetFlags(&flags, h2));
    CHECK(flags == 7);
    OK(cuMemHostGetFlags(&flags, h));
    CHECK(flags == 2);
    OK(cuMemHostGetFlags(&flags, (char *)h + 8));
    EXPECT(1, cuMemHostGetFlags(&flags, &flags));
    OK(cuMemHostGetDevicePointer_v2(&base, h, 0));
    CHECK(base == at(h));
    OK(cuMemHostGetDevicePointer_v2(&base, (char *)h + 8, 0));
    CHECK(base == at(h) + 8);
    EXPECT(1, cuMemHostGetDevicePointer_v2(&base, h, 1));
    EXPECT(1, cuMemHostGetDevicePointer_v2(&base, &flags, 0));
    EXPECT(1, cuMemHostGetDevicePointer_v2(&base, (void *)(uintptr_t)p, 0));
    EXPECT(1, cuMemFreeHost((char *)h + 8));
    OK(cuMemFreeHost(NULL));
    EXPECT(1, cuMemFreeHost(&flags));
    EXPECT(1, cuMemFree_v2(at(h)));
    EXPECT(1, cuMemFreeHost((void *)(uintptr_t)p));
    OK(cuMemHostRegister_v2(page, sizeof page, 0));
    EXPECT(712, cuMemHostRegister_v2(page, sizeof page, 0));
    EXPECT(712, cuMemHostRegister_v2(page + 4096, 4096, 0));
    EXPECT_GUEST(801, cuMemHostGetDevicePointer_v2(&base, page, 0));
    OK(cuMemHostGetFlags(&flags, page));
    CHECK(flags == 2);
    EXPECT(1, cuMemHostRegister_v2(NULL, 10, 0));
    EXPECT(1, cuMemHostRegister_v2(page, 0, 0));
    EXPECT(1, cuMemHostRegister_v2(h, 100, 0));
    EXPECT(1, cuMemHostRegister_v2(malloc(100), 100, 0x40));
    EXPECT(1, cuMemFreeHost(page));
    EXPECT(1, cuMemHostUnregister(page + 8));
    OK(cuMemHostUnregister(page));
    EXPECT(713, cuMemHostUnregister(page));
    EXPECT(1, cuMemHostUnregister(h));
    EXPECT(1, cuMemHostUnregister(NULL));
    OK(cuMemFreeHost(h));
    EXPECT(1, cuMemFreeHost(h));
    EXPECT(1, cuMemcpyDtoD_v2(p, at(h), 16));
    OK(cuMemFreeHost(h2));
    OK(cuMemFree_v2(p));
}

static void copies(void)
{
    CUdeviceptr p, q;
    void *h;
    char buf[8192];
    memset(buf, 3, sizeof buf);
    OK(cuMemAlloc_v2(&p, 1000));
    OK(cuMemAlloc_v2(&q, 1000));
    OK(cuMemHostAlloc(&h, 5000, 0));
    OK(cuMemcpyHtoD_v2(p, buf, 0));
    OK(cuMemcpyHtoD_v2(0, buf, 0));
    OK(cuMemcpyHtoD_v2(0x1234, buf, 0));
    EXPECT(1, cuMemcpyHtoD_v2(p, NULL, 16));
    OK(cuMemcpyHtoD_v2(p, NULL, 0));
    EXPECT(1, cuMemcpyHtoD_v2(0x1234, buf, 16));
    EXPECT(1, cuMemcpyHtoD_v2(0, buf, 16));
    OK(cuMemcpyHtoD_v2(p, buf, 1000));
    EXPECT(1, cuMemcpyHtoD_v2(p, buf, 1001));
    EXPECT(1, cuMemcpyHtoD_v2(p + 990, buf, 20));
    EXPECT(1, cuMemcpyHtoD_v2(p, buf, 4096));
    OK(cuMemcpyHtoD_v2(p, (void *)(uintptr_t)q, 16)); /* what a side is decides, not the name */
    OK(cuMemcpyDtoH_v2((void *)(uintptr_t)p, q, 16));
    OK(cuMemcpyDtoH_v2(buf, at(h), 16));
    EXPECT(1, cuMemcpyDtoH_v2(buf, at(buf + 100), 16));
    EXPECT(1, cuMemcpyHtoD_v2(at(buf), buf + 100, 16));
    OK(cuMemcpyDtoD_v2(p, at(h), 16));
    EXPECT(1, cuMemcpyDtoD_v2(p, at(buf), 16));
    EXPECT(1, cuMemcpyDtoD_v2(p, q, 1001));
    OK(cuMemcpyHtoDAsync_v2(p, (void *)(uintptr_t)q, 16, NULL));
    EXPECT(1, cuMemcpyHtoDAsync_v2(p, buf, 1001, NULL));
    EXPECT(1, cuMemcpyHtoDAsync_v2(0x1234, buf, 16, NULL));
    EXPECT(1, cuMemcpyDtoH_v2(buf, p, 1001));
    EXPECT(1, cuMemcpyDtoH_v2(NULL, p, 16));
    OK(cuMemcpy(p, at(buf), 16));
    OK(cuMemcpy(at(buf), at(buf + 100), 16));
    OK(cuMemcpy(at(buf), p, 16));
    EXPECT(1, cuMemcpy(p, q, 1001));
    EXPECT(1, cuMemcpy(p, 0, 16));
    OK(cuMemcpy(p, q, 0));
    OK(cuMemcpy(0, 0, 0));
    OK(cuMemcpyAsync(at(buf), at(buf + 100), 16, NULL));
    EXPECT(1, cuMemcpyDtoH_v2((char *)h + 4900, p, 500));
    EXPECT(1, cuMemcpyHtoD_v2(p, (char *)h + 4900, 500));
    EXPECT_GUEST(400, cuMemcpyHtoDAsync_v2(p, buf, 16, (CUstream)0x7000)); /* the real driver crashes */
    OK(cuMemsetD8_v2(p, 1, 0));
    OK(cuMemsetD8_v2(0, 1, 0));
    OK(cuMemsetD8_v2(0x1234, 1, 0));
    EXPECT(1, cuMemsetD8_v2(0x1234, 1, 10));
    EXPECT(1, cuMemsetD8_v2(p, 1, 1001));
    EXPECT(1, cuMemsetD16_v2(p + 1, 1, 4));
    EXPECT(1, cuMemsetD32_v2(p + 2, 1, 4));
    OK(cuMemsetD8_v2(at(h), 1, 10));
    EXPECT(1, cuMemsetD8_v2(at(buf), 1, 10));
    EXPECT(1, cuMemsetD32_v2(p, 1, 251));
    EXPECT(1, cuMemsetD2D8_v2(p, 10, 1, 20, 2));
    OK(cuMemsetD2D8_v2(p, 10, 1, 20, 1));
    EXPECT(1, cuMemsetD2D8_v2(p, 10, 1, 10, 101));
    OK(cuMemsetD2D8_v2(p, 10, 1, 10, 100));
    OK(cuMemsetD2D8_v2(p, 10, 1, 0, 10));
    OK(cuMemsetD2D8_v2(p, 10, 1, 10, 0));
    EXPECT(1, cuMemsetD2D32_v2(p, 10, 1, 2, 2));
    OK(cuMemsetD2D32_v2(p, 12, 1, 2, 2));
    EXPECT(1, cuMemsetD2D16_v2(p, 11, 1, 2, 2));
    OK(cuMemsetD2D8_v2(p, 0, 1, 10, 1));
    EXPECT(1, cuMemsetD2D8_v2(p, 0, 1, 10, 2));
    OK(cuMemsetD2D8_v2(p, 110, 1, 10, 10));
    OK(cuMemFreeHost(h));
    OK(cuMemFree_v2(q));
    OK(cuMemFree_v2(p));
}

static int box(unsigned from_type, const void *from, size_t from_pitch, unsigned to_type, CUdeviceptr to, size_t to_pitch, size_t width, size_t height)
{
    CUDA_MEMCPY2D copy = {.srcMemoryType = from_type, .srcHost = from, .srcDevice = at(from), .srcPitch = from_pitch, .dstMemoryType = to_type,
                          .dstHost = (void *)(uintptr_t)to, .dstDevice = to, .dstPitch = to_pitch, .WidthInBytes = width, .Height = height};
    return (int)cuMemcpy2D_v2(&copy);
}

static void boxes(void)
{
    CUdeviceptr p, q;
    void *h;
    static char buf[8192];
    OK(cuMemAlloc_v2(&p, 1000));
    OK(cuMemAlloc_v2(&q, 1000));
    OK(cuMemHostAlloc(&h, 5000, 0));
    OK(box(1, buf, 10, 2, p, 20, 10, 10));
    EXPECT(1, box(1, buf, 5, 2, p, 20, 10, 10));
    OK(box(1, buf, 0, 2, p, 0, 10, 10));
    OK(box(1, buf, 10, 2, p, 110, 10, 10));
    OK(box(1, buf, 10, 2, p, 20, 0, 10));
    OK(box(1, buf, 10, 2, p, 20, 10, 0));
    OK(box(4, buf, 10, 4, p, 20, 10, 10));
    EXPECT(1, box(5, buf, 10, 4, p, 20, 10, 10));
    EXPECT(1, box(1, NULL, 10, 2, p, 20, 10, 10));
    EXPECT(1, box(2, (void *)0x1234, 10, 2, p, 20, 10, 10));
    EXPECT(1, box(1, buf, 5, 2, p, 20, 10, 1));
    OK(box(1, buf, 10, 2, p, 99, 10, 11));
    EXPECT(1, box(1, buf, 10, 2, p, 100, 10, 11));
    OK(box(1, buf, 10, 1, at(buf + 1000), 20, 10, 10));
    OK(box(2, (void *)(uintptr_t)q, 0, 1, at(buf), 0, 10, 1));
    OK(box(1, (void *)(uintptr_t)q, 10, 2, p, 20, 10, 10));
    OK(box(2, h, 10, 2, p, 20, 10, 10));
    EXPECT(1, box(3, NULL, 10, 2, p, 20, 10, 10));
    EXPECT(1, cuMemcpy2D_v2(NULL));
    OK(cuMemFreeHost(h));
    OK(cuMemFree_v2(q));
    OK(cuMemFree_v2(p));
}

static void streams(CUcontext context)
{
    CUstream s, t;
    int priority, device;
    unsigned flags;
    unsigned long long id, other;
    CUcontext of;
    void *green;
    char value[64];
    OK(cuStreamCreate(&s, 0));
    EXPECT(1, cuStreamCreate(&t, 2));
    EXPECT(1, cuStreamCreate(NULL, 0));
    OK(cuStreamCreateWithPriority(&t, 1, 99));
    OK(cuStreamGetPriority(t, &priority));
    CHECK(priority == 0);
    OK(cuStreamDestroy_v2(t));
    OK(cuStreamCreateWithPriority(&t, 1, -99));
    OK(cuStreamGetPriority(t, &priority));
    CHECK(priority == -5);
    OK(cuStreamGetPriority(NULL, &priority));
    CHECK(priority == 0);
    for (uintptr_t special = 0; special <= 2; special++) {
        OK(cuStreamGetFlags((CUstream)special, &flags));
        CHECK(flags == 0);
        EXPECT(400, cuStreamDestroy_v2((CUstream)special));
    }
    OK(cuStreamGetFlags(t, &flags));
    CHECK(flags == 1);
    OK(cuStreamGetId(s, &id));
    OK(cuStreamGetId(t, &other));
    CHECK(id != other);
    OK(cuStreamGetId(NULL, &id));
    CHECK(id != other);
    OK(cuStreamGetId((CUstream)1, &other));
    CHECK(id == other);
    EXPECT(1, cuStreamGetFlags(t, NULL));
    EXPECT(1, cuStreamGetId(t, NULL));
    OK(cuStreamGetCtx(NULL, &of));
    CHECK(of == context);
    EXPECT(1, cuStreamGetCtx(t, NULL));
    OK(cuStreamGetDevice(s, &device));
    CHECK(device == 0);
    OK(cuStreamGetCtx_v2(s, &of, &green));
    CHECK(of == context && green == NULL);
    OK(cuStreamGetCtx_v2(s, NULL, &green));
    OK(cuStreamGetCtx_v2(s, &of, NULL));
    OK(cuStreamGetGreenCtx(s, &green));
    CHECK(green == NULL);
    OK(cuStreamGetAttribute(s, 3, value));
    OK(cuStreamGetAttribute(s, 1, value));
    EXPECT(1, cuStreamGetAttribute(s, 99, value));
    EXPECT(1, cuStreamGetAttribute(s, 2, value));
    EXPECT(1, cuStreamSetAttribute(s, 2, value));
    *(int *)value = 9;
    EXPECT(1, cuStreamSetAttribute(s, 3, value));
    OK(cuStreamSynchronize(s));
    OK(cuStreamQuery(s));
    OK(cuStreamQuery(NULL));
    EXPECT(1, cuStreamAttachMemAsync(s, 16, 0, 4));
    OK(cuStreamDestroy_v2(t));
    EXPECT_GUEST(400, cuStreamQuery(t)); /* the real driver crashes */
    EXPECT_GUEST(400, cuStreamDestroy_v2(t));
    OK(cuStreamDestroy_v2(s));
}

static void words(void)
{
    CUdeviceptr p;
    CUstream s;
    void *h;
    uint32_t back[2] = {0, 0};
    struct { uint32_t what, pad; uint64_t address, value; uint32_t flags, pad2; uint64_t alias, pad3; } batch[2];
    memset(batch, 0, sizeof batch);
    OK(cuStreamCreate(&s, 1));
    OK(cuMemAlloc_v2(&p, 64));
    OK(cuMemHostAlloc(&h, 64, 0));
    memset(h, 0, 64);
    OK(cuStreamWriteValue64_v2(s, p, 1, 0));
    EXPECT(1, cuStreamWriteValue64_v2(s, p + 4, 1, 0));
    EXPECT(1, cuStreamWriteValue32_v2(s, p + 2, 1, 0));
    EXPECT(1, cuStreamWriteValue32_v2(s, 0x1234, 1, 0));
    EXPECT(1, cuStreamWriteValue32_v2(s, p, 1, 9));
    OK(cuStreamWaitValue32_v2(s, p, 1, 0));
    EXPECT(1, cuStreamWaitValue32_v2(s, p, 1, 9));
    OK(cuStreamWriteValue32_v2(s, at(h) + 8, 77, 0));
    batch[0].what = batch[1].what = 2;
    batch[0].address = p + 8;
    batch[0].value = 5;
    batch[1].address = at(h) + 12;
    batch[1].value = 6;
    OK(cuStreamBatchMemOp_v2(s, 2, batch, 0));
    batch[1].address = 0x1234;
    EXPECT(1, cuStreamBatchMemOp_v2(s, 2, batch, 0));
    OK(cuStreamSynchronize(s));
    CHECK(((uint32_t *)h)[2] == 77 && ((uint32_t *)h)[3] == 6);
    OK(cuMemcpyDtoH_v2(back, p + 4, 8));
    CHECK(back[1] == 5);
    OK(cuMemFreeHost(h));
    OK(cuMemFree_v2(p));
    OK(cuStreamDestroy_v2(s));
}

static void events(void)
{
    CUevent e, f;
    CUstream s;
    float ms;
    OK(cuStreamCreate(&s, 0));
    OK(cuEventCreate(&e, 0));
    EXPECT(1, cuEventCreate(&f, 99));
    EXPECT(1, cuEventCreate(&f, 4));
    OK(cuEventCreate(&f, 6));
    OK(cuEventDestroy_v2(f));
    EXPECT(1, cuEventCreate(NULL, 0));
    EXPECT(1, cuEventCreate(&f, 8));
    OK(cuEventCreate(&f, 2));
    OK(cuEventQuery(e));
    OK(cuEventSynchronize(e));
    EXPECT(400, cuEventElapsedTime(&ms, e, e));
    EXPECT(400, cuEventElapsedTime(NULL, e, e));
    OK(cuStreamWaitEvent(s, e, 0));
    EXPECT(1, cuStreamWaitEvent(s, e, 5));
    EXPECT(400, cuStreamWaitEvent(s, NULL, 0));
    EXPECT(400, cuEventRecord(NULL, NULL));
    EXPECT(400, cuEventQuery(NULL));
    EXPECT(400, cuEventDestroy_v2(NULL));
    EXPECT(400, cuEventSynchronize(NULL));
    EXPECT(400, cuEventElapsedTime(&ms, NULL, e));
    OK(cuEventRecord(e, s));
    OK(cuEventRecord(f, s));
    OK(cuEventSynchronize(f));
    EXPECT(400, cuEventElapsedTime(&ms, e, f));
    OK(cuEventElapsedTime(&ms, e, e));
    EXPECT(401, cuEventRecordWithFlags(e, s, 1));
    EXPECT(1, cuEventRecordWithFlags(e, s, 2));
    OK(cuEventRecordWithFlags(e, s, 0));
    EXPECT(401, cuStreamWaitEvent(s, e, 1));
    OK(cuStreamWaitEvent(s, e, 0));
    OK(cuEventDestroy_v2(f));
    EXPECT_GUEST(400, cuEventQuery(f));
    OK(cuEventDestroy_v2(e));
    OK(cuStreamDestroy_v2(s));
}

static void pools(void)
{
    CUmemoryPool pool, made;
    CUdeviceptr p, z, base;
    CUstream s;
    size_t size;
    uint64_t value = 0;
    struct { int words[4]; void *security; size_t most; unsigned short usage; char rest[54]; } properties = {{0}, NULL, 0, 0, {0}};
    OK(cuStreamCreate(&s, 0));
    OK(cuMemAlloc_v2(&p, 1000));
    OK(cuDeviceGetDefaultMemPool(&pool, 0));
    OK(cuMemAllocAsync(&z, 1 << 20, s));
    EXPECT(1, cuMemFree_v2(z + 4));
    EXPECT(1, cuMemFreeAsync(z + 4, s));
    OK(cuMemFreeAsync(p, s));
    OK(cuMemAllocAsync(&p, 0, s));
    OK(cuMemFreeAsync(z, s));
    EXPECT(1, cuMemFreeAsync(z, s));
    OK(cuMemFreeAsync(0, s));
    OK(cuMemAllocAsync(&z, 100, s));
    OK(cuMemFree_v2(z));
    EXPECT(1, cuMemFree_v2(z));
    EXPECT(1, cuMemAllocFromPoolAsync(&z, 100, NULL, s));
    EXPECT(500, cuMemGetAddressRange_v2(&base, &size, z));
    EXPECT(1, cuMemPoolGetAttribute(pool, 0, &value));
    EXPECT(1, cuMemPoolGetAttribute(pool, 9, &value));
    for (unsigned attribute = 1; attribute <= 8; attribute++)
        OK(cuMemPoolGetAttribute(pool, attribute, &value));
    value = 1 << 20;
    OK(cuMemPoolSetAttribute(pool, 4, &value));
    value = 0;
    OK(cuMemPoolGetAttribute(pool, 4, &value));
    CHECK(value == 1 << 20);
    EXPECT(1, cuMemPoolDestroy(pool));
    EXPECT(1, cuMemPoolCreate(&made, &properties));
    properties.words[0] = properties.words[2] = 1;
    OK(cuMemPoolCreate(&made, &properties));
    OK(cuMemAllocFromPoolAsync(&z, 100, made, s));
    OK(cuMemFreeAsync(z, s));
    OK(cuMemPoolDestroy(made));
    OK(cuStreamDestroy_v2(s));
}

static void virtual_memory(void)
{
    size_t size;
    CUdeviceptr va, p, base;
    CUmemGenericAllocationHandle small, large, again;
    CUmemAllocationProp properties = {0};
    CUmemAccessDesc access = {{1, 0}, 3};
    unsigned long long flags;
    char buf[64] = {0};
    OK(cuMemAlloc_v2(&p, 1000));
    properties.type = properties.location.type = 1;
    OK(cuMemGetAllocationGranularity(&size, &properties, 0));
    CHECK(size == UNIT);
    OK(cuMemGetAllocationGranularity(&size, &properties, 1));
    EXPECT(1, cuMemGetAllocationGranularity(&size, &properties, 2));
    EXPECT(1, cuMemGetAllocationGranularity(NULL, &properties, 0));
    EXPECT(1, cuMemGetAllocationGranularity(&size, NULL, 0));
    OK(cuMemAddressReserve(&va, (size_t)1 << 35, 0, 0, 0));
    EXPECT(1, cuMemAddressReserve(&base, 4096, 0, 0, 0));
    EXPECT(1, cuMemAddressReserve(&base, 0, 0, 0, 0));
    EXPECT(1, cuMemAddressReserve(NULL, UNIT, 0, 0, 0));
    EXPECT(1, cuMemAddressReserve(&base, UNIT, 3, 0, 0));
    EXPECT(1, cuMemAddressReserve(&base, UNIT, 0, 0, 1));
    OK(cuMemCreate(&small, UNIT, &properties, 0));
    EXPECT(1, cuMemCreate(&large, 4096, &properties, 0));
    EXPECT(1, cuMemCreate(&large, 0, &properties, 0));
    EXPECT(1, cuMemCreate(NULL, UNIT, &properties, 0));
    EXPECT(1, cuMemCreate(&large, UNIT, NULL, 0));
    EXPECT(1, cuMemCreate(&large, UNIT, &properties, 1));
    EXPECT(2, cuMemCreate(&large, (size_t)1 << 46, &properties, 0));
    OK(cuMemCreate(&large, 2 * UNIT, &properties, 0));
    EXPECT(1, cuMemMap(va, UNIT, 0, small, 1));
    EXPECT(801, cuMemMap(va, 2 * UNIT, 0, small, 0));
    EXPECT(1, cuMemMap(va + 4096, UNIT, 0, small, 0));
    EXPECT(1, cuMemMap(0x1234, UNIT, 0, small, 0));
    EXPECT(801, cuMemMap(va, UNIT, 4096, large, 0));
    EXPECT(801, cuMemMap(va, UNIT, UNIT, large, 0));
    OK(cuMemUnmap(va, UNIT));
    OK(cuMemMap(va, UNIT, 0, small, 0));
    EXPECT(1, cuMemMap(va, UNIT, 0, small, 0));
    OK(cuMemMap(va + UNIT, 2 * UNIT, 0, large, 0));
    EXPECT(1, cuMemcpyHtoD_v2(va, buf, 16)); /* mapped, no access yet */
    OK(cuMemRelease(small));
    EXPECT(1, cuMemRelease(small));
    EXPECT(1, cuMemRelease(0));
    EXPECT(1, cuMemSetAccess(va, 4 * UNIT, &access, 1));
    OK(cuMemSetAccess(va, 3 * UNIT, &access, 1));
    EXPECT(1, cuMemSetAccess(va, 3 * UNIT, &access, 0));
    EXPECT(1, cuMemSetAccess(va, 3 * UNIT, NULL, 1));
    EXPECT(1, cuMemSetAccess(va + UNIT, UNIT, &access, 1));
    access.flags = 2;
    EXPECT(1, cuMemSetAccess(va, UNIT, &access, 1));
    access.flags = 1;
    OK(cuMemSetAccess(va, UNIT, &access, 1));
    access.flags = 3;
    OK(cuMemSetAccess(va, UNIT, &access, 1));
    OK(cuMemGetAccess(&flags, &access.location, va + 5));
    CHECK(flags == 3);
    EXPECT(1, cuMemGetAccess(&flags, &access.location, va + 8 * UNIT));
    OK(cuMemGetAddressRange_v2(&base, &size, va + UNIT + 4));
    CHECK(base == va + UNIT && size == 2 * UNIT);
    OK(cuMemcpyHtoD_v2(va + UNIT - 8, buf, 16)); /* across two mappings */
    EXPECT(1, cuMemcpyHtoD_v2(va + 3 * UNIT - 8, buf, 16));
    OK(cuMemsetD8_v2(va, 1, 3 * UNIT));
    EXPECT(1, cuMemsetD8_v2(va, 1, 3 * UNIT + 1));
    EXPECT(1, cuMemsetD8_v2(va + 5 * UNIT, 1, 10));
    OK(cuMemRetainAllocationHandle(&again, (void *)(uintptr_t)(va + 5)));
    CHECK(again == small);
    OK(cuMemRelease(again));
    OK(cuMemRetainAllocationHandle(&again, (void *)(uintptr_t)(va + UNIT)));
    CHECK(again == large);
    EXPECT(1, cuMemRetainAllocationHandle(&again, (void *)(uintptr_t)p));
    OK(cuMemGetAllocationPropertiesFromHandle(&properties, large));
    EXPECT(1, cuMemAddressFree(va, (size_t)1 << 35));
    EXPECT(1, cuMemUnmap(va, 2 * UNIT));
    EXPECT(1, cuMemUnmap(va + UNIT, UNIT));
    EXPECT(1, cuMemFree_v2(va));
    OK(cuCtxSynchronize()); /* unmapping waits for nothing: the memset may still be on its way, on a busy GPU it is */
    OK(cuMemUnmap(va, 3 * UNIT));
    OK(cuMemUnmap(va, 3 * UNIT));
    EXPECT(1, cuMemcpyHtoD_v2(va, buf, 16));
    EXPECT(1, cuMemAddressFree(va, UNIT));
    OK(cuMemAddressFree(va, (size_t)1 << 35));
    EXPECT(1, cuMemAddressFree(va, (size_t)1 << 35));
    OK(cuMemRelease(large));
    OK(cuMemRelease(large));
    EXPECT(1, cuMemRelease(large));
    OK(cuMemFree_v2(p));
}

int main(void)
{
    before_a_context();
    CUcontext context = guest_begin();
    allocation();
    pinned();
    copies();
    boxes();
    streams(context);
    words();
    events();
    pools();
    virtual_memory();
    return guest_end();
}
