/* SPDX-License-Identifier: Apache-2.0 */
/*
 * MD2 (RFC 1319) and HMAC-MD2 (RFC 2104): what libcudart's self-test of driver and runtime is made of.
 *
 * Not for security: MD2 is broken.  It is here because the other side speaks it.  Never key a cache with it.
 */
#ifndef VGPU_SHIM_MD2_H
#define VGPU_SHIM_MD2_H

#include <stddef.h>
#include <stdint.h>

enum { VGPU_MD2_SIZE = 16 }; /* bytes of a block and of a digest */

struct vgpu_md2 {
    uint8_t mixed[3 * VGPU_MD2_SIZE]; /* the X of the RFC; its first block becomes the digest */
    uint8_t checksum[VGPU_MD2_SIZE];
    uint8_t pending[VGPU_MD2_SIZE];
    size_t pending_size; /* always below VGPU_MD2_SIZE */
};

struct vgpu_hmac_md2 {
    struct vgpu_md2 inner;
    uint8_t outer_key[VGPU_MD2_SIZE];
};

__attribute__((visibility("hidden"))) void vgpu_md2_start(struct vgpu_md2 *state);
__attribute__((visibility("hidden"))) void vgpu_md2_add(struct vgpu_md2 *state, const void *data, size_t size);
__attribute__((visibility("hidden"))) void vgpu_md2_finish(struct vgpu_md2 *state, uint8_t digest[VGPU_MD2_SIZE]);

/* A key longer than one block is replaced by its digest, as RFC 2104 says. */
__attribute__((visibility("hidden"))) void vgpu_hmac_md2_start(struct vgpu_hmac_md2 *state, const void *key,
                                                               size_t key_size);
__attribute__((visibility("hidden"))) void vgpu_hmac_md2_add(struct vgpu_hmac_md2 *state, const void *data,
                                                             size_t size);
__attribute__((visibility("hidden"))) void vgpu_hmac_md2_finish(struct vgpu_hmac_md2 *state,
                                                                uint8_t digest[VGPU_MD2_SIZE]);

#endif
