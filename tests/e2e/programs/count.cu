// SPDX-License-Identifier: Apache-2.0
// How many devices a runtime program sees, as JSON.
#include <cstdio>
#include <cuda_runtime.h>

int main()
{
    int devices = 0;
    cudaError_t status = cudaGetDeviceCount(&devices);
    printf("{\"devices\": %d, \"status\": %d}\n", devices, (int)status);
    return 0;
}
