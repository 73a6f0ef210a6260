/* SPDX-License-Identifier: Apache-2.0 */
/*
 * array.h - what copies ask about a CUDA array.
 */
#ifndef VGPU_SHIM_ARRAY_H
#define VGPU_SHIM_ARRAY_H

#include "memory.h"

/* One side of a copy that is an array. */
struct array_box {
    CUarray array;
    uint64_t x, y, z; /* where the box begins: bytes, rows, slices or layers */
};
/* CUDA_SUCCESS where the array exists and holds a box of that many bytes, rows and slices there. */
CUresult array_check(const struct array_box *box, uint64_t width, uint64_t height, uint64_t depth);

#endif
