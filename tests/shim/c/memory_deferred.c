/* SPDX-License-Identifier: Apache-2.0 */
/* memory_deferred.c - the device fails the third copy: who waits next is told, once; nobody hangs. */
#include "guest.h"

int main(void)
{
    guest_begin();
    CUdeviceptr p;
    CUstream s;
    CUevent e;
    static char buf[200000];
    OK(cuMemAlloc_v2(&p, sizeof buf));
    OK(cuStreamCreate(&s, 1));
    OK(cuEventCreate(&e, 0));
    OK(cuMemcpyHtoDAsync_v2(p, buf, 16, s));
    OK(cuMemcpyHtoDAsync_v2(p, buf, 16, s));
    OK(cuMemcpyHtoDAsync_v2(p, buf, sizeof buf, s)); /* fails when it is replayed */
    OK(cuEventRecord(e, s));
    EXPECT(999, cuStreamSynchronize(s));
    OK(cuStreamSynchronize(s));
    OK(cuEventSynchronize(e));
    OK(cuMemcpyHtoD_v2(p, "good", 5));
    OK(cuMemcpyDtoH_v2(buf, p, 5));
    CHECK(strcmp(buf, "good") == 0);
    return guest_end();
}
