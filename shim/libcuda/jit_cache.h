/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The driver's compile cache, as NVRTC, NVVM and cuDNN use it through a private table: what was compiled once, in this
 * process or an earlier one, is not compiled again.  Without it cuDNN attention is five times slower.
 *
 * In memory (bounded, least recently used out first) over files (jit_cache_files.h).  Data handed out stays valid until
 * it is released, whatever is evicted or closed meanwhile.
 *
 * Locking: one mutex over the map; hashing and files are handled without it.
 */
#ifndef VGPU_SHIM_JIT_CACHE_H
#define VGPU_SHIM_JIT_CACHE_H

#include "private_hooks.h"

/* Opens a key over everything that decides what the compiler writes; strings may be NULL.  CUDA_ERROR_NOT_INITIALIZED when
 * the cache is disabled.
 *
 * NVRTC opens two keys for a compilation, on one thread: kind 2 (NVVM IR to PTX) and then kind 1 (the same IR to a cubin).
 * The options of the second lack what only the first step takes, such as -prec-div, so by itself it would find the cubin of
 * another compilation.  A kind 1 key therefore takes in the thread's last kind 2 key, when that was for the same input. */
VGPU_HIDDEN CUresult vgpu_jit_cache_open(void **key, int kind, const void *input, size_t size, const char *options,
                                         const char *host, const char *build_stamp, int sm);
VGPU_HIDDEN CUresult vgpu_jit_cache_close(void *key);

/* CUDA_ERROR_NOT_FOUND on a miss, and the out arguments are left alone.  May read a file. */
VGPU_HIDDEN CUresult vgpu_jit_cache_find(void *key, int zero, void **data, uint32_t *size);

/* Keeps a copy.  May write a file; what the disk refuses is kept in memory alone. */
VGPU_HIDDEN CUresult vgpu_jit_cache_store(void *key, int zero, const void *data, size_t size);

/* Releases the data of one hit; CUDA_ERROR_INVALID_VALUE for what was not handed out. */
VGPU_HIDDEN CUresult vgpu_jit_cache_release(const void *data);

struct vgpu_jit_cache_statistics {
    uint64_t memory_hits;
    uint64_t file_hits;
    uint64_t misses;
    uint64_t stores;
    uint64_t evictions;       /* from memory */
    uint64_t bytes_in_memory; /* of the entries in the map */
    uint64_t lent;            /* hits not yet released */
};
VGPU_HIDDEN void vgpu_jit_cache_read_statistics(struct vgpu_jit_cache_statistics *out);

VGPU_HIDDEN void vgpu_jit_cache_fork_child(void);

#endif
