/* SPDX-License-Identifier: Apache-2.0 */
/* Keeps many turns queued until it is told to stop: backlog PTX-FILE LAUNCHES TURNS. Each turn launches LAUNCHES kernels;
 * TURNS of them are queued, and as each half of them is done that half is queued anew. So it may be kept off its
 * processor for as long as half of them take, and the device does not notice. Prints the number of turns that are
 * done, a line for each half; ends when standard input does. */
#include "guest.h"

#include <poll.h>

int main(int argc, char **argv)
{
    EXPECT(argc == 4);
    start();
    CUmodule module = load(argv[1]);
    unsigned launches = (unsigned)atoi(argv[2]), half = (unsigned)atoi(argv[3]) / 2;
    CUfunction fill;
    CHECK(cuModuleGetFunction(&fill, module, "fill"));
    CUdeviceptr memory;
    CHECK(cuMemAlloc(&memory, 4096));
    CUevent behind[2];
    for (int i = 0; i < 2; i++)
        CHECK(cuEventCreate(&behind[i], CU_EVENT_DISABLE_TIMING));
    struct pollfd input = {.fd = 0, .events = POLLIN};
    unsigned value = 7, n = 1024;
    for (unsigned halves = 0; poll(&input, 1, 0) == 0; halves++) {
        if (halves >= 2) {
            CHECK(cuEventSynchronize(behind[halves % 2]));
            printf("turn %u\n", (halves - 1) * half);
            fflush(stdout);
        }
        for (unsigned i = 0; i < half * launches; i++) {
            void *parameters[] = {&memory, &value, &n};
            CHECK(cuLaunchKernel(fill, 4, 1, 1, 256, 1, 1, 0, NULL, parameters, NULL));
        }
        CHECK(cuEventRecord(behind[halves % 2], NULL));
    }
    CHECK(cuCtxSynchronize());
    puts("done");
    return 0;
}
