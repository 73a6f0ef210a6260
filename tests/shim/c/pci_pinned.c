/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pci_pinned.c - pinned memory where the arena is 1408 KiB: small pieces are shared memory with a device address, what does
 * not fit is ordinary memory that copies well and says honestly that it has none.
 */
#include "guest.h"

#define MIB ((size_t)1 << 20)
#define LARGE (9 * MIB + 12345)

static uint8_t byte_at(size_t i, unsigned seed) { return (uint8_t)(i * 13 + i / 253 + seed); }

static void round_trip(uint8_t *from, uint8_t *to, size_t size, CUstream stream)
{
    CUdeviceptr device;
    OK(cuMemAlloc_v2(&device, size));
    for (size_t i = 0; i < size; i++) from[i] = byte_at(i, 3);
    memset(to, 0, size);
    OK(cuMemcpyHtoDAsync_v2(device, from, size, stream));
    OK(cuMemcpyDtoHAsync_v2(to, device, size, stream));
    OK(cuStreamSynchronize(stream));
    bool same = true;
    for (size_t i = 0; i < size; i++) same = same && to[i] == byte_at(i, 3);
    CHECK(same);
    OK(cuMemFree_v2(device));
}

static void is_shared(void *p, bool expected)
{
    CUdeviceptr device = 0;
    unsigned type = 0, flags = 99;
    void *host = NULL;
    int asked = (int)cuMemHostGetDevicePointer_v2(&device, p, 0);
    CHECK(asked == (expected ? 0 : 801) && (device != 0) == expected);
    OK(cuPointerGetAttribute(&type, 2, (CUdeviceptr)(uintptr_t)p));
    CHECK(type == CU_MEMORYTYPE_HOST);
    EXPECT(expected ? 0 : 1, cuPointerGetAttribute(&device, 3, (CUdeviceptr)(uintptr_t)p));
    OK(cuPointerGetAttribute(&host, 4, (CUdeviceptr)(uintptr_t)p));
    CHECK(host == p);
    OK(cuMemHostGetFlags(&flags, p));
    CHECK(flags == (expected ? 2 : 0));
}

int main(void)
{
    guest_begin();
    CUstream stream;
    void *small, *other, *large, *larger, *mapped;
    OK(cuStreamCreate((void *)&stream, 1));
    OK(cuMemHostAlloc(&small, 200000, 0));
    OK(cuMemHostAlloc(&other, 200000, 0));
    is_shared(small, true);
    round_trip(small, other, 200000, stream);
    /* More than there is, and more than the half that pinned memory may have. */
    OK(cuMemHostAlloc(&large, LARGE, 0));
    OK(cuMemAllocHost_v2(&larger, LARGE));
    is_shared(large, false);
    is_shared((uint8_t *)larger + 5000, false);
    round_trip(large, larger, LARGE, stream);
    round_trip(small, larger, 200000, stream);
    round_trip(large, other, 200000, stream);
    EXPECT(2, cuMemHostAlloc(&mapped, LARGE, 2)); /* asked for by name */
    EXPECT(2, cuMemHostAlloc(&mapped, (size_t)1 << 62, 0));
    EXPECT(2, cuMemHostAlloc(&mapped, SIZE_MAX, 0));
    /* It is pinned memory, not registered memory. */
    EXPECT(1, cuMemHostUnregister(large));
    EXPECT(1, cuMemHostRegister_v2(large, 4096, 0));
    EXPECT(1, cuMemFreeHost((uint8_t *)large + 4096));
    /* The other half is left for staging. */
    void *more[64];
    int count = 0, shared = 0;
    for (; count < 64; count++) {
        CUdeviceptr device;
        OK(cuMemHostAlloc(&more[count], 65536, 0));
        if (cuMemHostGetDevicePointer_v2(&device, more[count], 0) == 0) shared++;
    }
    CHECK(shared >= 2 && shared < 10);
    round_trip(large, larger, LARGE, stream);
    while (count > 0) OK(cuMemFreeHost(more[--count]));
    OK(cuMemFreeHost(small));
    OK(cuMemFreeHost(other));
    OK(cuMemFreeHost(large));
    OK(cuMemFreeHost(larger));
    EXPECT(1, cuMemFreeHost(large));
    OK(cuMemHostAlloc(&small, 300000, 2)); /* what was given back is there again */
    is_shared(small, true);
    OK(cuMemFreeHost(small));
    OK(cuStreamDestroy_v2(stream));
    return guest_end();
}
