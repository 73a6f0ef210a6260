/* SPDX-License-Identifier: Apache-2.0 */
/* memory_quota.c - a VM with 64 MiB: refused beyond it by every way to allocate, and it all comes back. */
#include "guest.h"

#define MIB ((size_t)1 << 20)

int main(void)
{
    guest_begin();
    CUdeviceptr p, q, va;
    size_t available, total, pitch;
    CUmemGenericAllocationHandle handle, other;
    CUmemAllocationProp properties = {.type = 1, .location = {1, 0}};
    OK(cuMemGetInfo_v2(&available, &total));
    CHECK(total == 64 * MIB && available == 64 * MIB);
    EXPECT(2, cuMemAlloc_v2(&p, 65 * MIB));
    OK(cuMemAlloc_v2(&p, 40 * MIB));
    OK(cuMemGetInfo_v2(&available, &total));
    CHECK(total == 64 * MIB && available == 24 * MIB);
    EXPECT(2, cuMemAlloc_v2(&q, 30 * MIB));
    EXPECT(2, cuMemAllocAsync(&q, 30 * MIB, NULL));
    EXPECT(2, cuMemAllocPitch_v2(&q, &pitch, MIB, 30, 4));
    EXPECT(2, cuMemCreate(&handle, 30 * MIB, &properties, 0));
    OK(cuMemAllocAsync(&q, 20 * MIB, NULL));
    OK(cuMemFreeAsync(q, NULL));
    /* Physical memory counts until handle and mapping are both gone. */
    OK(cuMemAddressReserve(&va, 32 * MIB, 0, 0, 0));
    OK(cuMemCreate(&handle, 20 * MIB, &properties, 0));
    OK(cuMemMap(va, 20 * MIB, 0, handle, 0));
    OK(cuMemRelease(handle));
    EXPECT(2, cuMemCreate(&other, 20 * MIB, &properties, 0));
    OK(cuMemUnmap(va, 20 * MIB));
    OK(cuMemCreate(&other, 20 * MIB, &properties, 0));
    OK(cuMemRelease(other));
    OK(cuMemAddressFree(va, 32 * MIB));
    OK(cuMemFree_v2(p));
    OK(cuMemAlloc_v2(&p, 64 * MIB));
    OK(cuMemFree_v2(p));
    OK(cuMemGetInfo_v2(&available, &total));
    CHECK(available == 64 * MIB);
    return guest_end();
}
