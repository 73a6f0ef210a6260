/* SPDX-License-Identifier: Apache-2.0 */
/*
 * code_wire.h - payload layouts of the calls that move code: images, functions, launches, graphs.
 *
 * Both sides include it, so the two halves of these calls cannot drift apart. Only fixed-size little-endian
 * layouts; nothing here may hold an address of one side that the other would follow.
 */
#ifndef VGPU_CODE_WIRE_H
#define VGPU_CODE_WIRE_H

#include <stdint.h>

/* ---- blobs: byte strings longer than one record ------------------------------------------------ */

/* The guest numbers blobs it writes below this, the worker those it makes (logs, cubins) from here. */
#define VGPU_BLOB_HOST_BASE (1ull << 32)
#define VGPU_BLOB_CHUNK 65536u             /* payload of one wireBlobWrite; the last may be shorter */
#define VGPU_BLOB_TOTAL_LIMIT (4ull << 30) /* bytes one session may hold in blobs */

/* ---- images ------------------------------------------------------------------------------------ */

/* A module image: this header, part_count u64 sizes, then the parts, each padded to 16. is_wrapper: the guest
 * had a fatbin wrapper; part 0 is its fatbin, the others its prelinked ones (wrapper version 2). */
struct wire_image {
    uint32_t part_count;
    uint32_t is_wrapper; /* 0, or the wrapper's version */
};
#define VGPU_IMAGE_PARTS 4096u

/* One JIT option. Options whose value is a buffer carry no address: the log sizes say what is wanted. */
struct wire_option {
    uint32_t option;
    uint32_t reserved;
    uint64_t value;
};
#define VGPU_OPTION_LIMIT 64u
#define VGPU_LOG_LIMIT (1u << 20)

/* What comes back from a compilation; the logs follow, information first, or lie in a blob. */
struct wire_jit_result {
    uint32_t information_length, error_length;
    float wall_time_milliseconds;
    uint32_t threads_per_block;
    uint64_t blob; /* 0: the logs follow */
};

/* ---- functions --------------------------------------------------------------------------------- */

#define VGPU_FUNCTION_ATTRIBUTES 16
struct wire_function {
    uint32_t status; /* CUresult: not 0 when the function cannot be loaded on this device */
    uint32_t parameter_count;
    uint32_t parameter_bytes;
    uint32_t parameters_here; /* wire_parameter entries that follow */
    int32_t attribute[VGPU_FUNCTION_ATTRIBUTES];
    uint16_t attribute_status[VGPU_FUNCTION_ATTRIBUTES];
};
_Static_assert(sizeof(struct wire_function) == 112, "wire_function");
struct wire_parameter {
    uint32_t offset, size;
};
#define VGPU_PARAMETER_COUNT_LIMIT 8192u
#define VGPU_PARAMETER_BYTES_LIMIT 32764u
#define VGPU_LAUNCH_ATTRIBUTE_LIMIT 32u
#define VGPU_LAUNCH_ATTRIBUTE_BYTES 72u

/* ---- graphs ------------------------------------------------------------------------------------ */

/* Node lists travel as u64 handles, then, if asked for, 8 bytes of edge data each. */
#define VGPU_NODE_LIST_LIMIT (1u << 20)

/* A kernel node. Followed by parameter_bytes packed parameters, padded to 16. */
struct wire_kernel_node {
    uint64_t function;
    uint64_t context;
    uint32_t grid[3], block[3];
    uint32_t shared_bytes;
    uint32_t parameter_bytes;
};
_Static_assert(sizeof(struct wire_kernel_node) == 48, "wire_kernel_node");

/* Which sides of a CUDA_MEMCPY3D carry an arena offset where the host pointer stands. */
#define VGPU_COPY_SOURCE_IN_ARENA 1u
#define VGPU_COPY_DESTINATION_IN_ARENA 2u
/* Which carry an array's handle in srcArray or dstArray, and where in it the box begins in XInBytes, Y and Z. */
#define VGPU_COPY_SOURCE_IS_ARRAY 4u
#define VGPU_COPY_DESTINATION_IS_ARRAY 8u

/* ---- arrays ------------------------------------------------------------------------------------ */

/* Bytes of one channel of a CUarray_format, 0 for a format that is not built: planes, compressed blocks, normalized integers. */
static inline uint32_t vgpu_format_bytes(uint32_t format)
{
    switch (format) {
    case 0x01: case 0x08: return 1; /* CU_AD_FORMAT_UNSIGNED_INT8, SIGNED_INT8 */
    case 0x02: case 0x09: case 0x10: return 2; /* UNSIGNED_INT16, SIGNED_INT16, HALF */
    case 0x03: case 0x0a: case 0x20: return 4; /* UNSIGNED_INT32, SIGNED_INT32, FLOAT */
    default: return 0;
    }
}

#define VGPU_ARRAY_LAYERED 1u
#define VGPU_ARRAY_CUBEMAP 4u
/* CUDA_ARRAY3D_LAYERED, SURFACE_LDST, CUBEMAP, TEXTURE_GATHER; not sparse ones and those that get their memory later. */
#define VGPU_ARRAY_FLAGS (VGPU_ARRAY_LAYERED | 2u | VGPU_ARRAY_CUBEMAP | 8u)

/* ---- textures ---------------------------------------------------------------------------------- */

/* cuTexObjectCreate carries CUDA_RESOURCE_DESC, CUDA_TEXTURE_DESC and, with argument 0, CUDA_RESOURCE_VIEW_DESC one behind the
 * other; cuSurfObjectCreate the first alone. An array is named by its handle. */
#define VGPU_TEXTURE_HAS_VIEW 1u
/* CU_TRSF_READ_AS_INTEGER, NORMALIZED_COORDINATES, SRGB, DISABLE_TRILINEAR_OPTIMIZATION, SEAMLESS_CUBEMAP */
#define VGPU_TEXTURE_FLAGS 0x73u
#define VGPU_TEXTURE_MODE_LAST 3u  /* CU_TR_ADDRESS_MODE_BORDER */
#define VGPU_TEXTURE_FILTER_LAST 1u /* CU_TR_FILTER_MODE_LINEAR */
#define VGPU_VIEW_FORMAT_LAST 0x22u /* CU_RES_VIEW_FORMAT_UNSIGNED_BC7 */

struct wire_memset_node {
    uint64_t destination, pitch;
    uint32_t value, element_size;
    uint64_t width, height;
};
_Static_assert(sizeof(struct wire_memset_node) == 40, "wire_memset_node");

struct wire_host_node {
    uint64_t function, user;
};

/* An allocation node: memory of the one device there is. access: who may use it besides, as CUmemAccessDesc. */
#define VGPU_NODE_ACCESS_MOST 16u
struct wire_allocation_node {
    uint64_t address, size; /* the address: in answers */
    uint32_t access_count, reserved;
    struct { int32_t type, id, flags; } access[VGPU_NODE_ACCESS_MOST];
};
_Static_assert(sizeof(struct wire_allocation_node) == 216, "wire_allocation_node");

/* ---- tensor maps ------------------------------------------------------------------------------- */

struct wire_tensor_map {
    uint32_t data_type, rank;
    uint64_t global_address;
    uint64_t global_dimension[5];
    uint64_t global_stride[5];
    uint32_t box[5]; /* tiled */
    int32_t lower_corner[5], upper_corner[5]; /* im2col */
    uint32_t element_stride[5];
    uint32_t channels_per_pixel, pixels_per_column;
    uint32_t interleave, swizzle, promotion, fill;
    uint32_t absent; /* VGPU_TENSOR_*: arrays the caller passed as NULL */
    uint32_t reserved;
};
#define VGPU_TENSOR_NO_DIMENSION 1u
#define VGPU_TENSOR_NO_STRIDE 2u
#define VGPU_TENSOR_NO_BOX 4u
#define VGPU_TENSOR_NO_ELEMENT_STRIDE 8u
#define VGPU_TENSOR_NO_LOWER 16u
#define VGPU_TENSOR_NO_UPPER 32u
#define VGPU_TENSOR_MAP_BYTES 128u

static inline uint64_t vgpu_align16(uint64_t size) { return (size + 15) & ~15ull; }

#endif
