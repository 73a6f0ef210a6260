/* SPDX-License-Identifier: Apache-2.0 */
/* Launches a kernel that stores to nowhere, and says what calls answer then: wild_store PTX-FILE. */
#include "guest.h"

int main(int argc, char **argv)
{
    (void)argc;
    start();
    CUfunction wild;
    CHECK(cuModuleGetFunction(&wild, load(argv[1]), "wild"));
    EXPECT(say_and_wait("ready"));
    unsigned long long nowhere = 0x1000000000ull;
    void *parameters[] = {&nowhere};
    printf("launch %d\n", (int)cuLaunchKernel(wild, 1, 1, 1, 1, 1, 1, 0, NULL, parameters, NULL));
    printf("synchronize %d\n", (int)cuCtxSynchronize());
    CUdeviceptr memory;
    printf("allocate %d\n", (int)cuMemAlloc(&memory, 256));
    printf("again %d\n", (int)cuCtxSynchronize());
    return 0;
}
