/* SPDX-License-Identifier: Apache-2.0 */
/* Makes a context, says "idle" and calls nothing until it reads a line; then "called N" is what the next call says. */
#include "guest.h"

int main(void)
{
    start();
    CHECK(cuCtxSynchronize());
    puts("idle");
    fflush(stdout);
    (void)getchar();
    CUdeviceptr memory;
    printf("called %d\n", (int)cuMemAlloc(&memory, 4096));
    return 0;
}
