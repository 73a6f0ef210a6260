/* SPDX-License-Identifier: Apache-2.0 */
/* Launches without ever waiting, then waits once and checks: many_launches PTX-FILE COUNT. */
#include "guest.h"

int main(int argc, char **argv)
{
    (void)argc;
    unsigned count = (unsigned)strtoul(argv[2], NULL, 10), n = 32;
    start();
    CUfunction fill;
    CUdeviceptr memory;
    CHECK(cuModuleGetFunction(&fill, load(argv[1]), "fill"));
    CHECK(cuMemAlloc(&memory, n * sizeof(unsigned)));
    for (unsigned i = 1; i <= count; i++) {
        void *parameters[] = {&memory, &i, &n};
        CHECK(cuLaunchKernel(fill, 1, 1, 1, n, 1, 1, 0, NULL, parameters, NULL));
    }
    unsigned host[32];
    CHECK(cuMemcpyDtoH(host, memory, sizeof host));
    for (unsigned i = 0; i < n; i++)
        EXPECT(host[i] == count);
    printf("done %u\n", count);
    return 0;
}
