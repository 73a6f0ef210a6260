/* SPDX-License-Identifier: Apache-2.0 */
/*
 * private_support.c - what private_hooks.h asks of the rest of the library and no other file owns: the count of what the
 * private tables refuse. (Device facts: device.c; contexts: context.c, primary.c; modules: module.c.)
 */
#include "core.h"

void shim_count_refused(const char *what)
{
    if (shim_enter_local() == CUDA_SUCCESS) __atomic_fetch_add(&shim.counters->refused_calls, 1, __ATOMIC_RELAXED);
    shim_log(SHIM_WARNING, "refused: %s", what);
}
