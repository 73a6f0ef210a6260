/* SPDX-License-Identifier: Apache-2.0 */
/* guest.h - for guest programs in tests: CUDA's prototypes without NVIDIA's headers, and checks that say where. */
#ifndef VGPU_TEST_GUEST_H
#define VGPU_TEST_GUEST_H

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../../shim/libcuda/cuda_types.h"
#include "../../../shim/libcuda/_generated_prototypes.h"

static int guest_failures;

/* The call answers exactly this code. */
#define EXPECT(code, call)                                                                      \
    do {                                                                                        \
        int expect_got = (int)(call);                                                           \
        if (expect_got != (int)(code)) {                                                        \
            printf("line %d: %s answered %d, expected %d\n", __LINE__, #call, expect_got, (int)(code)); \
            guest_failures++;                                                                   \
        }                                                                                       \
    } while (0)
#define CHECK(condition)                                              \
    do {                                                              \
        if (!(condition)) {                                           \
            printf("line %d: not so: %s\n", __LINE__, #condition);    \
            guest_failures++;                                         \
        }                                                             \
    } while (0)
#define OK(call) EXPECT(0, call)
/* Where a guest is refused what the real driver does, or the real driver crashes: not asked of it. */
#define EXPECT_GUEST(code, call)                                       \
    do {                                                               \
        if (getenv("VGPU_RUN_DIR") != NULL) EXPECT(code, call);        \
    } while (0)

static inline CUcontext guest_begin(void)
{
    CUcontext context = NULL;
    setvbuf(stdout, NULL, _IOLBF, 0);
    OK(cuInit(0));
    OK(cuDevicePrimaryCtxRetain((void *)&context, 0));
    OK(cuCtxSetCurrent(context));
    return context;
}
static inline int guest_end(void)
{
    size_t available, total;
    OK(cuMemGetInfo_v2(&available, &total)); /* one round trip: what was sent before is done when the process ends */
    printf("%s\n", guest_failures == 0 ? "all as expected" : "FAILED");
    return guest_failures != 0;
}

#endif
