/* SPDX-License-Identifier: Apache-2.0 */
/* Allocates what it is told and says what became of it: teller. Lines it takes: "BYTES", "free" (all), "info".
 * Lines it prints: "ready", then "CODE FREE TOTAL DEVICE-TOTAL" after each. */
#include "guest.h"

#define MOST 64

int main(void)
{
    CUdeviceptr memory[MOST];
    int count = 0;
    char line[64];
    start();
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin) != NULL) {
        CUresult status = CUDA_SUCCESS;
        size_t available = 0, total = 0, device_total = 0;
        if (strncmp(line, "free", 4) == 0)
            while (count > 0)
                CHECK(cuMemFree(memory[--count]));
        else if (strncmp(line, "info", 4) != 0 && count < MOST && (status = cuMemAlloc(&memory[count], strtoull(line, NULL, 10))) == CUDA_SUCCESS)
            count++;
        CHECK(cuMemGetInfo(&available, &total));
        CHECK(cuDeviceTotalMem(&device_total, 0));
        printf("%d %zu %zu %zu\n", (int)status, available, total, device_total);
        fflush(stdout);
    }
    return 0;
}
