/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memory_fault.c - the device faults while threads wait in every way there is: each is told, none hangs, and from then on
 * every call answers the same error, as a context does after a fault.
 */
#include <pthread.h>

#include "guest.h"

static CUcontext context;
static CUdeviceptr p;
static CUstream stream;
static CUevent event;
static void *pinned;

static int wait_in(int way)
{
    static __thread char small[16], large[1 << 20];
    switch (way) {
    case 0: return (int)cuStreamSynchronize(stream);
    case 1: return (int)cuEventSynchronize(event);
    case 2: return (int)cuMemcpyDtoH_v2(small, p, sizeof small);
    case 3: return (int)cuMemcpyDtoHAsync_v2(large, p, sizeof large, stream);
    case 4: return (int)cuMemcpyDtoH_v2(pinned, p, 100);
    case 5: return (int)cuCtxSynchronize();
    default: {
        int status;
        do status = (int)cuStreamQuery(stream); while (status == 600);
        return status;
    }
    }
}

static void *waiter(void *way)
{
    OK(cuCtxSetCurrent(context));
    EXPECT(700, wait_in((int)(intptr_t)way));
    return NULL;
}

int main(void)
{
    char byte = 1;
    pthread_t thread[7];
    CUdeviceptr q;
    context = guest_begin();
    OK(cuMemAlloc_v2(&p, 1 << 20));
    OK(cuMemHostAlloc(&pinned, 4096, 0));
    OK(cuStreamCreate(&stream, 1));
    OK(cuEventCreate(&event, 0));
    OK(cuMemcpyHtoDAsync_v2(p, &byte, 1, stream)); /* this one does it */
    OK(cuEventRecord(event, stream));
    for (intptr_t way = 0; way < 7; way++) pthread_create(&thread[way], NULL, waiter, (void *)way);
    for (int way = 0; way < 7; way++) pthread_join(thread[way], NULL);
    EXPECT(700, cuStreamSynchronize(stream));
    EXPECT(700, cuStreamSynchronize(NULL));
    EXPECT(700, cuMemAlloc_v2(&q, 16));
    EXPECT(700, cuMemFree_v2(p));
    EXPECT(700, cuMemcpyHtoD_v2(p, &byte, 1));
    EXPECT(700, cuMemcpyDtoD_v2(p, p + 8, 4));
    EXPECT(700, cuMemsetD8_v2(p, 0, 1));
    EXPECT(700, cuEventRecord(event, stream));
    EXPECT(700, cuEventQuery(event));
    EXPECT(700, cuStreamDestroy_v2(stream));
    EXPECT(700, cuMemHostAlloc(&pinned, 16, 0));
    printf("%s\n", guest_failures == 0 ? "all as expected" : "FAILED");
    return guest_failures != 0;
}
