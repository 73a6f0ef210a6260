/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memory_pinned.c - the arena from an application's side: grows, is handed out without overlap, comes back when freed,
 * and says so when it is used up. Runs with an arena of 512 MiB.
 */
#include "guest.h"

#define MIB ((size_t)1 << 20)
#define BLOCKS 40

static void fill(uint8_t *at, size_t size, unsigned seed)
{
    for (size_t i = 0; i < size; i += 509) at[i] = (uint8_t)(seed + i);
}

static int holds(const uint8_t *at, size_t size, unsigned seed)
{
    for (size_t i = 0; i < size; i += 509)
        if (at[i] != (uint8_t)(seed + i)) return 0;
    return 1;
}

int main(void)
{
    guest_begin();
    void *block[BLOCKS], *large, *larger;
    size_t size[BLOCKS];
    CUdeviceptr p;
    char small[16] = "still here";
    OK(cuMemAlloc_v2(&p, 16));
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < BLOCKS; i++) {
            size[i] = (size_t)(i * 7919 % 97 + 1) * 10007 + (i % 7 == 0 ? 3 * MIB : 0);
            OK(cuMemHostAlloc(&block[i], size[i], 0));
            CHECK((uintptr_t)block[i] % 512 == 0);
            fill(block[i], size[i], (unsigned)(i + round));
        }
        for (int i = round % 2; i < BLOCKS; i += 2) {
            CHECK(holds(block[i], size[i], (unsigned)(i + round)));
            OK(cuMemFreeHost(block[i]));
        }
        for (int i = 1 - round % 2; i < BLOCKS; i += 2) {
            CHECK(holds(block[i], size[i], (unsigned)(i + round)));
            OK(cuMemFreeHost(block[i]));
        }
    }
    /* Ten times 200 MiB fit one after the other, never together with 400 more. */
    for (int i = 0; i < 10; i++) {
        OK(cuMemHostAlloc(&large, 200 * MIB, 0));
        fill(large, 200 * MIB, 5);
        CHECK(holds(large, 200 * MIB, 5));
        EXPECT(2, cuMemHostAlloc(&larger, 400 * MIB, 0));
        OK(cuMemFreeHost(large));
    }
    OK(cuMemHostAlloc(&large, 200 * MIB, 0));
    EXPECT(2, cuMemHostAlloc(&larger, (size_t)1 << 44, 0));
    /* What is refused leaves the rest as it was, staging too. */
    OK(cuMemcpyHtoD_v2(p, small, sizeof small));
    memset(small, 0, sizeof small);
    OK(cuMemcpyDtoH_v2(small, p, sizeof small));
    CHECK(strcmp(small, "still here") == 0);
    /* Used up to the last page: pageable copies are slower then, not refused. */
    static void *all[200000];
    static char out[300000], back[300000];
    size_t count = 0;
    CUdeviceptr device;
    for (size_t step = 64 * MIB; step >= 4096; step /= 4)
        while (count < 200000 && cuMemHostAlloc(&all[count], step, 0) == 0) count++;
    OK(cuMemAlloc_v2(&device, sizeof out));
    for (size_t i = 0; i < sizeof out; i++) out[i] = (char)(i * 7 + i / 251);
    OK(cuMemcpyHtoD_v2(device, out, sizeof out));
    OK(cuMemcpyDtoH_v2(back, device, sizeof back));
    CHECK(memcmp(out, back, sizeof out) == 0);
    CUDA_MEMCPY2D box = {.srcMemoryType = 1, .srcHost = out, .srcPitch = 3000, .dstMemoryType = 2, .dstDevice = device, .dstPitch = 1500, .WidthInBytes = 1000, .Height = 50};
    OK(cuMemcpy2D_v2(&box));
    OK(cuMemcpyDtoH_v2(back, device, 1500 * 50));
    CHECK(memcmp(back + 1500 * 49, out + 3000 * 49, 1000) == 0);
    while (count > 0) OK(cuMemFreeHost(all[--count]));
    OK(cuMemFree_v2(device));
    OK(cuMemFreeHost(large));
    OK(cuMemFree_v2(p));
    return guest_end();
}
