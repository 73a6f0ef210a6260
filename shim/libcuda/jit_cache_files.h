/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The JIT cache on disk: one file per entry, shared by all processes of a user, so that the next process is fast too.
 *
 * The driver's own variables rule it: CUDA_CACHE_DISABLE=1 (no cache at all), CUDA_CACHE_PATH (default
 * ~/.nv/ComputeCache), CUDA_CACHE_MAXSIZE (bytes, default 1 GiB, at most 4 GiB).  They are read once, at the first question.
 * Our files live in a folder of their own below that path and are never mixed with those of another driver.
 *
 * What a reader may rely on: a file appears whole or not at all (rename); whatever is truncated, changed or foreign is a
 * miss.  What the disk refuses (full, read-only, another user's folder) is silently no cache, never an error.
 */
#ifndef VGPU_SHIM_JIT_CACHE_FILES_H
#define VGPU_SHIM_JIT_CACHE_FILES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "sha256.h"

/* False under CUDA_CACHE_DISABLE: then nothing may be cached, not even in memory. */
__attribute__((visibility("hidden"))) bool vgpu_jit_cache_enabled(void);

/* CUDA_CACHE_MAXSIZE, in bytes. */
__attribute__((visibility("hidden"))) uint64_t vgpu_jit_cache_limit(void);

/* Opens the entry and says how many bytes of data it claims to have; -1 is a miss.  The caller owns the descriptor. */
__attribute__((visibility("hidden"))) int vgpu_jit_file_open(const uint8_t digest[VGPU_SHA256_SIZE], size_t *size);

/* Reads the data of an opened entry and checks it; closes the descriptor.  False is a miss: the file was damaged and is
 * removed. */
__attribute__((visibility("hidden"))) bool vgpu_jit_file_read(int descriptor, const uint8_t digest[VGPU_SHA256_SIZE],
                                                              void *data, size_t size);

/* Closes the descriptor of an opened entry that will not be read. */
__attribute__((visibility("hidden"))) void vgpu_jit_file_discard(int descriptor);

/* Writes an entry and, when the folder has outgrown its limit, removes the least recently used ones.  Blocks on the disk. */
__attribute__((visibility("hidden"))) void vgpu_jit_file_write(const uint8_t digest[VGPU_SHA256_SIZE], const void *data,
                                                               size_t size);

__attribute__((visibility("hidden"))) void vgpu_jit_files_fork_child(void);

#endif
