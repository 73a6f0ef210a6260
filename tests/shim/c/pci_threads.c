/* SPDX-License-Identifier: Apache-2.0 */
/* pci_threads.c THREADS - many threads copy pageable memory up and down at once, and boxes, through an arena too small for them. */
#include <pthread.h>

#include "guest.h"

#define SIZE ((size_t)1500000)
#define ROUNDS 6

static CUcontext context;

static void *body(void *argument)
{
    unsigned seed = (unsigned)(uintptr_t)argument;
    uint8_t *out = malloc(SIZE), *back = malloc(SIZE);
    CUdeviceptr device;
    OK(cuCtxSetCurrent(context));
    OK(cuMemAlloc_v2(&device, SIZE));
    for (unsigned round = 0; round < ROUNDS; round++) {
        size_t size = SIZE - round * 240000 - seed;
        for (size_t i = 0; i < size; i++) out[i] = (uint8_t)(i * 11 + i / 255 + seed + round);
        memset(back, 0, SIZE);
        OK(cuMemcpyHtoD_v2(device, out, size));
        OK(cuMemcpyDtoH_v2(back, device, size));
        CHECK(memcmp(out, back, size) == 0);
        CUDA_MEMCPY2D box = {.srcMemoryType = 2, .srcDevice = device, .srcPitch = 1000, .dstMemoryType = 1, .dstHost = back, .dstPitch = 700, .WidthInBytes = 600, .Height = 200};
        memset(back, 0, 700 * 200);
        OK(cuMemcpy2D_v2(&box));
        for (size_t row = 0; row < 200; row++) CHECK(memcmp(back + row * 700, out + row * 1000, 600) == 0);
        OK(cuMemcpyDtoH_v2(back, device, 40));
        CHECK(memcmp(out, back, 40) == 0);
    }
    OK(cuMemFree_v2(device));
    free(out);
    free(back);
    return NULL;
}

int main(int argc, char **argv)
{
    unsigned count = argc > 1 ? (unsigned)atoi(argv[1]) : 8;
    pthread_t thread[64];
    context = guest_begin();
    for (uintptr_t i = 0; i < count; i++) pthread_create(&thread[i], NULL, body, (void *)i);
    for (unsigned i = 0; i < count; i++) pthread_join(thread[i], NULL);
    return guest_end();
}
