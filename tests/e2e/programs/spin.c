/* SPDX-License-Identifier: Apache-2.0 */
/* Launches a kernel that never ends and waits for it: spin PTX-FILE. Prints what every later call says. */
#include "guest.h"

int main(int argc, char **argv)
{
    (void)argc;
    start();
    CUfunction spin;
    CHECK(cuModuleGetFunction(&spin, load(argv[1]), "spin"));
    /* The first launch of a shape asks the device, and the software GPU answers when the kernel has run. */
    unsigned forever = 0;
    void *parameters[] = {&forever};
    CHECK(cuLaunchKernel(spin, 1, 1, 1, 1, 1, 1, 0, NULL, parameters, NULL));
    CHECK(cuCtxSynchronize());
    puts("launching");
    fflush(stdout);
    forever = 1;
    CHECK(cuLaunchKernel(spin, 1, 1, 1, 1, 1, 1, 0, NULL, parameters, NULL));
    printf("synchronize %d\n", (int)cuCtxSynchronize());
    CUdeviceptr memory;
    printf("allocate %d\n", (int)cuMemAlloc(&memory, 256));
    printf("synchronize %d\n", (int)cuCtxSynchronize());
    return 0;
}
