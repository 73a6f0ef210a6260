/* SPDX-License-Identifier: Apache-2.0 */
/* What a machine without a GPU answers. */
#include "guest.h"

int main(void)
{
    int count = -1, version = -1;
    CUresult first = cuInit(0), second = cuDeviceGetCount(&count), third = cuDriverGetVersion(&version);
    printf("%d %d %d\n", (int)first, (int)second, (int)third);
    return 0;
}
