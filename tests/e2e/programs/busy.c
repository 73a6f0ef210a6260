/* SPDX-License-Identifier: Apache-2.0 */
/* Keeps work queued until it is told to stop: busy PTX-FILE LAUNCHES. Each turn launches LAUNCHES kernels; two turns are
 * queued at most. Prints the number of turns that are done; ends when standard input does. */
#include "guest.h"

#include <poll.h>

int main(int argc, char **argv)
{
    start();
    CUmodule module = load(argv[1]);
    unsigned launches = argc > 2 ? (unsigned)atoi(argv[2]) : 4;
    CUfunction fill;
    CHECK(cuModuleGetFunction(&fill, module, "fill"));
    CUdeviceptr memory;
    CHECK(cuMemAlloc(&memory, 4096));
    CUevent behind[2];
    for (int i = 0; i < 2; i++)
        CHECK(cuEventCreate(&behind[i], CU_EVENT_DISABLE_TIMING));
    struct pollfd input = {.fd = 0, .events = POLLIN};
    unsigned value = 7, n = 1024;
    for (unsigned turn = 0; poll(&input, 1, 0) == 0; turn++) {
        if (turn >= 2) {
            CHECK(cuEventSynchronize(behind[turn % 2]));
            printf("turn %u\n", turn - 1);
            fflush(stdout);
        }
        for (unsigned i = 0; i < launches; i++) {
            void *parameters[] = {&memory, &value, &n};
            CHECK(cuLaunchKernel(fill, 4, 1, 1, 256, 1, 1, 0, NULL, parameters, NULL));
        }
        CHECK(cuEventRecord(behind[turn % 2], NULL));
    }
    CHECK(cuCtxSynchronize());
    puts("done");
    return 0;
}
