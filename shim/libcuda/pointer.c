/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pointer.c - cuPointerGetAttribute and its kin, from the allocation table: no ring traffic.
 *
 * Libraries ask for every pointer of every launch. What the driver answers for each attribute, known and
 * unknown addresses, one at a time and several at once, was measured; tests/shim/test_memory.py holds the
 * table. Attributes have two widths, and the single and the plural form differ on unknown addresses: the
 * single one refuses, the plural one answers nothing-like values.
 */
#include "memory.h"

#include "_generated_prototypes.h"

enum attribute {
    CONTEXT = 1, MEMORY_TYPE, DEVICE_POINTER, HOST_POINTER, P2P_TOKENS, SYNC_MEMOPS, BUFFER_ID, IS_MANAGED, DEVICE_ORDINAL,
    IPC_CAPABLE, RANGE_START, RANGE_SIZE, MAPPED, ALLOWED_HANDLES, RDMA_CAPABLE, ACCESS_FLAGS, MEMPOOL, MAPPING_SIZE, MAPPING_BASE,
    BLOCK_ID, DECOMPRESS_CAPABLE, ATTRIBUTES
};

#define MAPPING_UNIT (2ull << 20) /* what the driver backs allocations with */

static unsigned width_of(unsigned attribute)
{
    switch (attribute) {
    case MEMORY_TYPE: case SYNC_MEMOPS: case IS_MANAGED: case DEVICE_ORDINAL: case IPC_CAPABLE: case MAPPED: case RDMA_CAPABLE:
    case ACCESS_FLAGS: case DECOMPRESS_CAPABLE:
        return 4;
    default:
        return 8;
    }
}

static bool is_mapping(const struct shim_range *range) { return vgpu_handle_kind(range->owner) == VGPU_KIND_MEMORY; }

/* The value for a known address; false where even then the single form refuses. */
static bool value_of(unsigned attribute, uint64_t address, const struct shim_range *range, uint64_t *value)
{
    bool host = range->kind == SHIM_RANGE_PINNED || range->kind == SHIM_RANGE_REGISTERED;
    bool mapping = is_mapping(range), pool = range->kind == SHIM_RANGE_POOL || range->kind == SHIM_RANGE_GRAPH;
    struct shim_range outer = *range;
    switch (attribute) {
    case CONTEXT: *value = mapping || pool ? 0 : range->context; return true;
    case MEMORY_TYPE: *value = host ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE; return true;
    case DEVICE_POINTER:
        *value = 0;
        if (range->kind == SHIM_RANGE_REGISTERED || (mapping && (range->flags & 3) == 0)) return false;
        *value = range->device_address + (address - range->base);
        return true;
    case HOST_POINTER: *value = host ? address : 0; return host;
    case SYNC_MEMOPS: *value = host ? (range->flags & SHIM_RANGE_SYNC_MEMOPS) != 0 : 1; return true;
    case BUFFER_ID: case BLOCK_ID: *value = range->id; return true;
    case IS_MANAGED: case DEVICE_ORDINAL: case ALLOWED_HANDLES: *value = 0; return true;
    case IPC_CAPABLE: case RDMA_CAPABLE: *value = 0; return true; /* neither crosses from one VM to another */
    case RANGE_START: case RANGE_SIZE:
        if (mapping) shim_map_find(&shim_reserved_map, address, &outer);
        *value = attribute == RANGE_START ? outer.base : outer.size;
        return true;
    case MAPPED: *value = 1; return true;
    case ACCESS_FLAGS: *value = mapping ? range->flags & 3 : 3; return true;
    case MEMPOOL: *value = pool ? range->owner : 0; return true;
    case MAPPING_SIZE:
        *value = range->kind == SHIM_RANGE_REGISTERED ? range->size : (range->size + MAPPING_UNIT - 1) & ~(MAPPING_UNIT - 1);
        return true;
    case MAPPING_BASE:
        *value = range->kind == SHIM_RANGE_DEVICE && !mapping ? range->base & ~(MAPPING_UNIT - 1) : range->base;
        return true;
    case DECOMPRESS_CAPABLE: *value = 0; return true;
    default: return false;
    }
}

static void store(void *data, unsigned attribute, uint64_t value)
{
    uint32_t narrow = (uint32_t)value;
    if (width_of(attribute) == 4)
        memcpy(data, &narrow, sizeof narrow);
    else
        memcpy(data, &value, sizeof value);
}

/* A mapping, an allocation, or memory of a module that only the host knows of. */
static bool find(uint64_t address, struct shim_range *range)
{
    return address != 0 && shim_map_find(&shim_memory_map, address, range);
}

CUresult cuPointerGetAttribute(void *data, unsigned int attribute, unsigned long long ptr)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    struct shim_range range;
    uint64_t value;
    if (data == NULL || attribute < CONTEXT || attribute >= ATTRIBUTES) return CUDA_ERROR_INVALID_VALUE;
    if (!find(ptr, &range)) return CUDA_ERROR_INVALID_VALUE;
    if (attribute == P2P_TOKENS) return shim_refuse(VGPU_CALL_cuPointerGetAttribute);
    bool known = value_of(attribute, ptr, &range, &value);
    if (known || attribute == HOST_POINTER || attribute == DEVICE_POINTER) store(data, attribute, value);
    return known ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuPointerGetAttributes(unsigned int numAttributes, void *attributes, void *data, unsigned long long ptr)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (numAttributes == 0 || attributes == NULL || data == NULL) return CUDA_ERROR_INVALID_VALUE;
    const unsigned *asked = attributes;
    void **out = data;
    for (unsigned i = 0; i < numAttributes; i++)
        if (asked[i] < CONTEXT || asked[i] >= ATTRIBUTES || asked[i] == P2P_TOKENS || out[i] == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct shim_range range, reserved;
    bool known = find(ptr, &range), is_reserved = !known && ptr != 0 && shim_map_find(&shim_reserved_map, ptr, &reserved);
    for (unsigned i = 0; i < numAttributes; i++) {
        uint64_t value = 0;
        if (known) {
            value_of(asked[i], ptr, &range, &value);
        } else if (asked[i] == HOST_POINTER) {
            value = ptr;
        } else if (asked[i] == DEVICE_ORDINAL) {
            value = (uint64_t)-2; /* no device */
        } else if (asked[i] == RANGE_START || asked[i] == RANGE_SIZE) {
            if (!is_reserved) continue; /* left as it was */
            value = asked[i] == RANGE_START ? reserved.base : reserved.size;
        }
        store(out[i], asked[i], value);
    }
    return CUDA_SUCCESS;
}

CUresult cuPointerSetAttribute(const void *value, unsigned int attribute, unsigned long long ptr)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    struct shim_range range;
    if (value == NULL || attribute != SYNC_MEMOPS || !find(ptr, &range)) return CUDA_ERROR_INVALID_VALUE;
    /* Copies that the caller may take for synchronous are, so only the answer to the question changes. */
    uint32_t wanted;
    memcpy(&wanted, value, sizeof wanted);
    range.flags = wanted != 0 ? range.flags | SHIM_RANGE_SYNC_MEMOPS : range.flags & ~SHIM_RANGE_SYNC_MEMOPS;
    shim_map_update(&shim_memory_map, range.base, &range);
    return CUDA_SUCCESS;
}
