/* SPDX-License-Identifier: Apache-2.0 */
/* What the runtime-API programs share: checked calls, and results printed as the one JSON line report.py describes. */
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cuda_runtime.h>
#include <string>

#define CHECK(call)                                                                                          \
    do {                                                                                                     \
        cudaError_t status_ = (call);                                                                        \
        if (status_ != cudaSuccess) {                                                                        \
            fprintf(stderr, "%s:%d: %s answered %d (%s)\n", __FILE__, __LINE__, #call, (int)status_,         \
                    cudaGetErrorString(status_));                                                            \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)
#define REQUIRE(condition)                                                                                   \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                          \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

static std::string results_equal, results_info;

static void add_result(std::string &to, const char *name, const std::string &value)
{
    to += (to.empty() ? "\"" : ", \"") + std::string(name) + "\": " + value;
}
static void equal(const char *name, long long value) { add_result(results_equal, name, std::to_string(value)); }
static void equal(const char *name, const char *value)
{
    add_result(results_equal, name, "\"" + std::string(value) + "\"");
}
static inline void info(const char *name, double value) { add_result(results_info, name, std::to_string(value)); }

/* FNV-1a, enough to see that two runs left the same bytes. */
static inline long long digest(const void *data, size_t bytes)
{
    uint64_t hash = 0xcbf29ce484222325ull;
    for (size_t i = 0; i < bytes; i++)
        hash = (hash ^ ((const unsigned char *)data)[i]) * 0x100000001b3ull;
    return (long long)(hash >> 12);
}

static int finish()
{
    printf("{\"equal\": {%s}, \"info\": {%s}}\n", results_equal.c_str(), results_info.c_str());
    return 0;
}
