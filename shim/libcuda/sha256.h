/* SPDX-License-Identifier: Apache-2.0 */
/* SHA-256 (FIPS 180-4): names and checks the entries of the JIT cache.  A collision would run the wrong kernel. */
#ifndef VGPU_SHIM_SHA256_H
#define VGPU_SHIM_SHA256_H

#include <stddef.h>
#include <stdint.h>

enum { VGPU_SHA256_SIZE = 32, VGPU_SHA256_BLOCK = 64 };

struct vgpu_sha256 {
    uint32_t state[8];
    uint64_t size; /* bytes absorbed so far */
    uint8_t pending[VGPU_SHA256_BLOCK];
};

__attribute__((visibility("hidden"))) void vgpu_sha256_start(struct vgpu_sha256 *hash);
__attribute__((visibility("hidden"))) void vgpu_sha256_add(struct vgpu_sha256 *hash, const void *data, size_t size);
__attribute__((visibility("hidden"))) void vgpu_sha256_finish(struct vgpu_sha256 *hash,
                                                              uint8_t digest[VGPU_SHA256_SIZE]);

#endif
