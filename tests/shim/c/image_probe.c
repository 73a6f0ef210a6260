/* SPDX-License-Identifier: Apache-2.0 */
/* image_probe.c - image.c as functions that a test can call: kind and length of bytes, and a wrapper's parts. */
#include "../../../shim/libcuda/image.c"

#define PROBE __attribute__((visibility("default")))

PROBE int probe_kind(const void *image, uint64_t limit, uint64_t *length)
{
    *length = 0;
    return (int)vgpu_image_length(image, limit, length);
}

/* Status; how many parts, and the length of each of the first eight. */
PROBE int probe_describe(const void *image, uint32_t *wrapper, uint32_t *parts, uint64_t length[8])
{
    struct shim_image found;
    const CUresult status = shim_image_describe(image, &found);
    if (status != CUDA_SUCCESS) return status;
    *wrapper = found.is_wrapper;
    *parts = found.part_count;
    for (uint32_t i = 0; i < found.part_count && i < 8; i++) length[i] = found.length[i];
    shim_image_release(&found);
    return CUDA_SUCCESS;
}
