/* SPDX-License-Identifier: Apache-2.0 */
/* fake_pools.c - fake_memory.c with pools that grow by 32 MiB, as NVIDIA's do, and let go of nothing while the device is busy. */
#define cuMemPoolTrimTo plain_trim
#define cuMemAllocFromPoolAsync plain_from_pool
#include "fake_memory.c"
#undef cuMemPoolTrimTo
#undef cuMemAllocFromPoolAsync
#define STEP (32ull << 20)
#define RESERVED_NOW 5

EXPORT int cuMemAllocFromPoolAsync(uint64_t *address, size_t size, void *pool, void *stream)
{
    ((uint64_t *)pool)[RESERVED_NOW] += (size + STEP - 1) / STEP * STEP;
    return cuMemAllocAsync(address, size, stream);
}

EXPORT int cuMemPoolTrimTo(uint64_t *pool, size_t keep) { return device() == NOT_READY ? 0 : plain_trim(pool, keep); }
