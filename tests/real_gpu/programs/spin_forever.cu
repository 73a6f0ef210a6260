/* SPDX-License-Identifier: Apache-2.0 */
/* Holds 8 GiB and waits for a kernel that never ends; killed from outside. Says READY once it is in the middle of it. */
#include "check.cuh"
#include <unistd.h>

__global__ void spin(volatile int *flag)
{
    while (*flag == 0) {
    }
}

int main()
{
    char *held;
    int *flag;
    CHECK(cudaMalloc(&held, (size_t)8 << 30));
    CHECK(cudaMemset(held, 1, (size_t)8 << 30));
    CHECK(cudaMalloc(&flag, sizeof *flag));
    CHECK(cudaMemset(flag, 0, sizeof *flag));
    CHECK(cudaDeviceSynchronize());
    spin<<<1, 1>>>(flag);
    CHECK(cudaGetLastError());
    printf("READY\n");
    fflush(stdout);
    CHECK(cudaDeviceSynchronize());
    return 1; /* the kernel cannot have ended */
}
