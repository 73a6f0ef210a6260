/* SPDX-License-Identifier: Apache-2.0 */
/* fake_pools.c - fake_memory.c with pools that grow by 32 MiB, as NVIDIA's do. */
#define cuMemAllocFromPoolAsync plain_from_pool
#include "fake_memory.c"
#undef cuMemAllocFromPoolAsync
#define STEP (32ull << 20)

EXPORT int cuMemAllocFromPoolAsync(uint64_t *address, size_t size, void *pool, void *stream)
{
    ((uint64_t *)pool)[RESERVED_CURRENT] += (size + STEP - 1) / STEP * STEP;
    return plain_from_pool(address, size, pool, stream);
}
