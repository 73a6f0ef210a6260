/* SPDX-License-Identifier: Apache-2.0 */
/* Sends calls as fast as they are taken, and checks that none was lost and none came before another: flood COUNT.
 * Each call writes its number to the next of 64 cells, so the last 64 numbers stand there at the end, each in its place. */
#include "guest.h"

#define CELLS 64

int main(int argc, char **argv)
{
    unsigned count = argc > 1 ? (unsigned)atoi(argv[1]) : 1000, host[CELLS];
    CUdeviceptr cells;
    start();
    CHECK(cuMemAlloc(&cells, sizeof host));
    CHECK(cuCtxSynchronize());
    if (!say_and_wait("ready")) return 1;
    for (unsigned i = 0; i < count; i++)
        CHECK(cuMemsetD32Async(cells + i % CELLS * sizeof host[0], i, 1, NULL));
    CHECK(cuCtxSynchronize());
    puts("flooded");
    CHECK(cuMemcpyDtoH(host, cells, sizeof host));
    for (unsigned i = count - CELLS; i < count; i++)
        EXPECT(host[i % CELLS] == i);
    puts("in order");
    return 0;
}
