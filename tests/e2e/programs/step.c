/* SPDX-License-Identifier: Apache-2.0 */
/* Computes when it is told to: step PTX-FILE. For each line of standard input one launch, one copy back, checked, and the
 * line "turn N" or "error CODE"; in between it does nothing at all. Ends with status 3 after the first error, else 0. */
#include "guest.h"

static CUfunction fill;
static CUdeviceptr memory;

static CUresult compute(unsigned turn)
{
    unsigned host[256], n = 256;
    void *parameters[] = {&memory, &turn, &n};
    CUresult status = cuLaunchKernel(fill, 1, 1, 1, 256, 1, 1, 0, NULL, parameters, NULL);
    if (status == CUDA_SUCCESS) status = cuMemcpyDtoH(host, memory, sizeof host);
    for (unsigned i = 0; status == CUDA_SUCCESS && i < n; i++)
        EXPECT(host[i] == turn);
    return status;
}

int main(int argc, char **argv)
{
    (void)argc;
    start();
    CHECK(cuModuleGetFunction(&fill, load(argv[1]), "fill"));
    CHECK(cuMemAlloc(&memory, 256 * sizeof(unsigned)));
    CUresult status = compute(1);
    char line[64];
    for (unsigned turn = 1; status == CUDA_SUCCESS; status = compute(++turn)) {
        printf("turn %u\n", turn);
        fflush(stdout);
        if (fgets(line, sizeof line, stdin) == NULL) return 0;
    }
    printf("error %d\n", (int)status);
    printf("then %d\n", (int)cuCtxSynchronize());
    return 3;
}
