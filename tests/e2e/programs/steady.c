/* SPDX-License-Identifier: Apache-2.0 */
/* Computes until it is told to stop: steady PTX-FILE. Every turn launches, waits and checks; prints the turn's number.
 * Ends with the line "error N in turn T" and status 3 when a call fails, with "done T" when standard input ends. */
#include "guest.h"

#include <poll.h>

#define TURN(call)                                                                                                     \
    do {                                                                                                               \
        CUresult status_ = (call);                                                                                     \
        if (status_ != CUDA_SUCCESS) {                                                                                 \
            printf("error %d in turn %u\n", (int)status_, turn);                                                       \
            fflush(stdout);                                                                                            \
            CUresult again_ = cuCtxSynchronize();                                                                      \
            printf("then %d\n", (int)again_);                                                                          \
            fflush(stdout);                                                                                            \
            return 3;                                                                                                  \
        }                                                                                                              \
    } while (0)

int main(int argc, char **argv)
{
    (void)argc;
    start();
    CUmodule module = load(argv[1]);
    CUfunction fill, scale;
    CHECK(cuModuleGetFunction(&fill, module, "fill"));
    CHECK(cuModuleGetFunction(&scale, module, "scale"));
    CUdeviceptr memory;
    CHECK(cuMemAlloc(&memory, 4096));
    struct pollfd input = {.fd = 0, .events = POLLIN};
    unsigned turn = 0, n = 1024, factor = 3;
    static unsigned host[1024];
    while (poll(&input, 1, 0) == 0) {
        turn++;
        void *first[] = {&memory, &turn, &n}, *second[] = {&memory, &factor, &n};
        TURN(cuLaunchKernel(fill, 4, 1, 1, 256, 1, 1, 0, NULL, first, NULL));
        TURN(cuLaunchKernel(scale, 4, 1, 1, 256, 1, 1, 0, NULL, second, NULL));
        TURN(cuCtxSynchronize());
        TURN(cuMemcpyDtoH(host, memory, sizeof host));
        for (int i = 0; i < 1024; i++)
            EXPECT(host[i] == turn * 3);
        printf("turn %u\n", turn);
        fflush(stdout);
    }
    printf("done %u\n", turn);
    return 0;
}
