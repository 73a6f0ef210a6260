/* SPDX-License-Identifier: Apache-2.0 */
/* Launches a kernel that never ends and never waits for it: polls PTX-FILE [stream|event]. Asks again and again whether it
 * is done, until an answer is an error; prints it with the seconds since the launch, then what later calls say. */
#include "guest.h"

#include <time.h>

static double now(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + 1e-9 * (double)at.tv_nsec;
}

int main(int argc, char **argv)
{
    int by_event = argc > 2 && strcmp(argv[2], "event") == 0;
    start();
    CUfunction spin;
    CUstream stream;
    CUevent event;
    CHECK(cuModuleGetFunction(&spin, load(argv[1]), "spin"));
    CHECK(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    CHECK(cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    unsigned forever = 0;
    void *parameters[] = {&forever};
    /* The first launch of a shape asks the device, and the software GPU answers when the kernel has run. */
    CHECK(cuLaunchKernel(spin, 2, 1, 1, 32, 1, 1, 0, stream, parameters, NULL));
    CHECK(cuStreamSynchronize(stream));
    puts("launching");
    fflush(stdout);
    forever = 1;
    double began = now();
    CHECK(cuLaunchKernel(spin, 2, 1, 1, 32, 1, 1, 0, stream, parameters, NULL));
    CHECK(cuEventRecord(event, stream));
    CUresult status;
    do
        status = by_event ? cuEventQuery(event) : cuStreamQuery(stream);
    while (status == CUDA_ERROR_NOT_READY || status == CUDA_SUCCESS);
    printf("polled %d %.3f\n", (int)status, now() - began);
    CUdeviceptr memory;
    printf("allocate %d\n", (int)cuMemAlloc(&memory, 256));
    printf("synchronize %d\n", (int)cuCtxSynchronize());
    return 0;
}
