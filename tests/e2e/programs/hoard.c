/* SPDX-License-Identifier: Apache-2.0 */
/* Allocates 64 MiB for each line it is told, frees them all when its input ends: hoard. */
#include "guest.h"

#define LIMIT 8
#define SIZE ((size_t)64 << 20)

int main(void)
{
    CUdeviceptr memory[LIMIT];
    int count = 0;
    start();
    while (say_and_wait("ready") && count < LIMIT)
        CHECK(cuMemAlloc(&memory[count++], SIZE));
    while (count > 0)
        CHECK(cuMemFree(memory[--count]));
    puts("freed");
    return 0;
}
