/* SPDX-License-Identifier: Apache-2.0 */
/* What the driver-API programs here share: checked calls, and a module from a PTX file. */
#pragma once
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(call)                                                                                                    \
    do {                                                                                                               \
        CUresult status_ = (call);                                                                                     \
        if (status_ != CUDA_SUCCESS) {                                                                                 \
            printf("line %d: %s: %d\n", __LINE__, #call, (int)status_);                                                \
            fflush(stdout);                                                                                            \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)
#define EXPECT(condition)                                                                                              \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            printf("line %d: not so: %s\n", __LINE__, #condition);                                                     \
            fflush(stdout);                                                                                            \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* Says a word to the test, and waits for its line. Returns 0 when the test has closed the pipe. */
static inline int say_and_wait(const char *word)
{
    char line[64];
    puts(word);
    fflush(stdout);
    return fgets(line, sizeof line, stdin) != NULL;
}

static inline CUmodule load(const char *path)
{
    static char text[1 << 20];
    FILE *file = fopen(path, "rb");
    EXPECT(file != NULL);
    text[fread(text, 1, sizeof text - 1, file)] = 0;
    fclose(file);
    CUmodule module;
    CHECK(cuModuleLoadData(&module, text));
    return module;
}

static inline void start(void)
{
    CUdevice device;
    CUcontext context;
    CHECK(cuInit(0));
    CHECK(cuDeviceGet(&device, 0));
    CHECK(cuDevicePrimaryCtxRetain(&context, device));
    CHECK(cuCtxSetCurrent(context));
}
