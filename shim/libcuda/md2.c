/* SPDX-License-Identifier: Apache-2.0 */
/* MD2 and HMAC-MD2, written from RFC 1319 and RFC 2104.  Pure: no allocation, no state outside the arguments. */
#include "md2.h"

#include <string.h>

enum { BLOCK = VGPU_MD2_SIZE, ROUNDS = 18 };

/* The permutation of 0..255 that RFC 1319 makes out of the digits of pi; the tests derive it again from pi. */
static const uint8_t substitution[256] = {
    41, 46, 67, 201, 162, 216, 124, 1, 61, 54, 84, 161, 236, 240, 6, 19,
    98, 167, 5, 243, 192, 199, 115, 140, 152, 147, 43, 217, 188, 76, 130, 202,
    30, 155, 87, 60, 253, 212, 224, 22, 103, 66, 111, 24, 138, 23, 229, 18,
    190, 78, 196, 214, 218, 158, 222, 73, 160, 251, 245, 142, 187, 47, 238, 122,
    169, 104, 121, 145, 21, 178, 7, 63, 148, 194, 16, 137, 11, 34, 95, 33,
    128, 127, 93, 154, 90, 144, 50, 39, 53, 62, 204, 231, 191, 247, 151, 3,
    255, 25, 48, 179, 72, 165, 181, 209, 215, 94, 146, 42, 172, 86, 170, 198,
    79, 184, 56, 210, 150, 164, 125, 182, 118, 252, 107, 226, 156, 116, 4, 241,
    69, 157, 112, 89, 100, 113, 135, 32, 134, 91, 207, 101, 230, 45, 168, 2,
    27, 96, 37, 173, 174, 176, 185, 246, 28, 70, 97, 105, 52, 64, 126, 15,
    85, 71, 163, 35, 221, 81, 175, 58, 195, 92, 249, 206, 186, 197, 234, 38,
    44, 83, 13, 110, 133, 40, 132, 9, 211, 223, 205, 244, 65, 129, 77, 82,
    106, 220, 55, 200, 108, 193, 171, 250, 36, 225, 123, 8, 12, 189, 177, 74,
    120, 136, 149, 139, 227, 99, 232, 109, 233, 203, 213, 254, 59, 0, 29, 57,
    242, 239, 183, 14, 102, 88, 208, 228, 166, 119, 114, 248, 235, 117, 75, 10,
    49, 68, 80, 180, 143, 237, 31, 26, 219, 153, 141, 51, 159, 17, 131, 20,
};

static void absorb_block(struct vgpu_md2 *state, const uint8_t block[BLOCK])
{
    uint8_t last = state->checksum[BLOCK - 1];
    for (int i = 0; i < BLOCK; i++) {
        state->checksum[i] ^= substitution[block[i] ^ last];
        last = state->checksum[i];
    }
    for (int i = 0; i < BLOCK; i++) {
        state->mixed[BLOCK + i] = block[i];
        state->mixed[2 * BLOCK + i] = state->mixed[i] ^ block[i];
    }
    unsigned carry = 0;
    for (unsigned round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < 3 * BLOCK; i++) {
            state->mixed[i] ^= substitution[carry];
            carry = state->mixed[i];
        }
        carry = (carry + round) & 0xff;
    }
}

void vgpu_md2_start(struct vgpu_md2 *state)
{
    memset(state, 0, sizeof *state);
}

void vgpu_md2_add(struct vgpu_md2 *state, const void *data, size_t size)
{
    const uint8_t *bytes = data;
    while (size > 0) {
        size_t part = BLOCK - state->pending_size;
        if (part > size)
            part = size;
        memcpy(state->pending + state->pending_size, bytes, part);
        state->pending_size += part;
        bytes += part;
        size -= part;
        if (state->pending_size == BLOCK) {
            absorb_block(state, state->pending);
            state->pending_size = 0;
        }
    }
}

void vgpu_md2_finish(struct vgpu_md2 *state, uint8_t digest[VGPU_MD2_SIZE])
{
    size_t padding = BLOCK - state->pending_size; /* 1 to 16, never 0 */
    memset(state->pending + state->pending_size, (int)padding, padding);
    absorb_block(state, state->pending);
    uint8_t checksum[BLOCK]; /* a copy: absorbing it changes the original */
    memcpy(checksum, state->checksum, BLOCK);
    absorb_block(state, checksum);
    memcpy(digest, state->mixed, BLOCK);
}

void vgpu_hmac_md2_start(struct vgpu_hmac_md2 *state, const void *key, size_t key_size)
{
    uint8_t block[BLOCK] = {0};
    if (key_size > BLOCK) {
        vgpu_md2_start(&state->inner);
        vgpu_md2_add(&state->inner, key, key_size);
        vgpu_md2_finish(&state->inner, block);
    } else if (key_size > 0) {
        memcpy(block, key, key_size);
    }
    uint8_t inner_key[BLOCK];
    for (int i = 0; i < BLOCK; i++) {
        inner_key[i] = block[i] ^ 0x36;
        state->outer_key[i] = block[i] ^ 0x5c;
    }
    vgpu_md2_start(&state->inner);
    vgpu_md2_add(&state->inner, inner_key, BLOCK);
}

void vgpu_hmac_md2_add(struct vgpu_hmac_md2 *state, const void *data, size_t size)
{
    vgpu_md2_add(&state->inner, data, size);
}

void vgpu_hmac_md2_finish(struct vgpu_hmac_md2 *state, uint8_t digest[VGPU_MD2_SIZE])
{
    uint8_t inner_digest[BLOCK];
    vgpu_md2_finish(&state->inner, inner_digest);
    struct vgpu_md2 outer;
    vgpu_md2_start(&outer);
    vgpu_md2_add(&outer, state->outer_key, BLOCK);
    vgpu_md2_add(&outer, inner_digest, BLOCK);
    vgpu_md2_finish(&outer, digest);
}
