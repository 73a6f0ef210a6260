/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memory.c - device allocations, and the classification of addresses that copies and memsets rest on.
 *
 * Allocation is one round trip, freeing is one record. What CUDA refuses at once (a null pointer, size 0, an
 * address that is no allocation's start) is refused here, from the table, with nothing sent.
 */
#include "code.h"
#include "memory.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "_generated_prototypes.h"

/*
 * Device addresses are the worker's, and this process knows nothing of them: left alone, malloc could one day be
 * given the same numbers, and then a pointer would mean two things. So the addresses are reserved here as the
 * driver does natively (no access, no memory). Where the place is taken already nothing can be done; the worker
 * chooses its addresses so that this is rare.
 */
void memory_reserve_addresses(uint64_t base, uint64_t size)
{
#ifdef __SANITIZE_THREAD__
    (void)base, (void)size; /* its shadow memory lies there */
    return;
#endif
    const uint64_t step = 2ull << 20;
    uint64_t start = base & ~(step - 1);
    uint64_t end = (base + size + step - 1) & ~(step - 1);
    if (shim.identical && base - shim.worker_address < shim.arena_offset + shim.arena_size) return;
    if (start == 0 || end <= start || end >= 1ull << 47) return;
    int saved = errno;
    (void)mmap((void *)(uintptr_t)start, end - start, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
    errno = saved;
}

/* Can this process read the byte? A system call, so only asked where CUDA itself leaves open what a pointer is.
 * Addresses reserved above are mapped but cannot be read. */
static bool readable(uint64_t address)
{
    uint8_t byte, resident;
    int saved = errno;
    const struct iovec here = {&byte, 1}, there = {(void *)(uintptr_t)address, 1};
    ssize_t got = process_vm_readv(getpid(), &here, 1, &there, 1, 0);
    bool answer = got == 1;
    if (got < 0 && errno != EFAULT) /* not allowed in this container: settle for "is it mapped" */
        answer = mincore((void *)(uintptr_t)(address & ~4095ull), 1, &resident) == 0;
    errno = saved;
    return answer;
}

/* Does the host's driver know [address, +size) although our table does not? */
static bool host_knows(uint64_t address, uint64_t size)
{
    const uint64_t argument[8] = {address};
    uint64_t value[4] = {0};
    if (shim_reply(VGPU_CALL_cuMemGetAddressRange_v2, argument, NULL, 0, value, NULL, 0, NULL) != CUDA_SUCCESS) return false;
    return address >= value[0] && address - value[0] < value[1] && size <= value[1] - (address - value[0]);
}

/* Mappings of virtual memory side by side are one range to a copy; other allocations are not. */
static bool reaches(const struct shim_range *first, uint64_t address, uint64_t size)
{
    struct shim_range range = *first;
    for (;;) {
        uint64_t left = range.size - (address - range.base);
        if (size <= left) return true;
        if (vgpu_handle_kind(range.owner) != VGPU_KIND_MEMORY) return false;
        size -= left;
        address = range.base + range.size;
        if (!shim_map_find(&shim_memory_map, address, &range) || vgpu_handle_kind(range.owner) != VGPU_KIND_MEMORY ||
            (range.flags & 3) == 0)
            return false;
    }
}

void memory_side_of(uint64_t address, uint64_t size, enum memory_expectation expectation, struct memory_side *side)
{
    struct shim_range range;
    *side = (struct memory_side){.place = MEMORY_NOWHERE, .host = (uint8_t *)(uintptr_t)address, .device = address};
    if (address == 0 || address + size < address) return;
    if (shim_map_find(&shim_memory_map, address, &range)) {
        uint64_t inside = address - range.base;
        switch (range.kind) {
        case SHIM_RANGE_PINNED:
            if (size > range.size - inside) return;
            side->device = range.device_address + inside;
            if (shim_arena_offset(side->host, size, &side->offset)) side->place = MEMORY_PINNED;
            return;
        case SHIM_RANGE_REGISTERED:
            if (size > range.size - inside) return;
            side->place = MEMORY_PAGEABLE;
            side->registered = true;
            return;
        default:
            if (vgpu_handle_kind(range.owner) == VGPU_KIND_MEMORY && (range.flags & 3) == 0) return; /* mapped, no access */
            if (reaches(&range, address, size)) side->place = MEMORY_DEVICE;
            return;
        }
    }
    if (shim_map_find(&shim_reserved_map, address, &range)) return; /* reserved, nothing mapped */
    uint64_t offset;
    if (address - (shim.worker_address + shim.arena_offset) < shim.arena_size || shim_arena_offset(side->host, 1, &offset))
        return; /* pinned memory that was freed: the host knows the address, the application must not */
    if (expectation == MEMORY_EXPECT_HOST || (expectation == MEMORY_EXPECT_ANY && readable(address))) {
        side->place = MEMORY_PAGEABLE;
        return;
    }
    if (host_knows(address, size)) side->place = MEMORY_DEVICE;
}

CUresult memory_submit(unsigned call, const uint64_t argument[8], const void *payload, uint32_t length)
{
    if (__builtin_expect(atomic_load_explicit(&shim_captures_active, memory_order_relaxed) != 0, 0))
        return shim_reply(call, argument, payload, length, NULL, NULL, 0, NULL);
    return shim_async(call, argument, payload, length);
}

CUresult memory_wait_stream(uint64_t stream)
{
    struct shim_fence fence;
    CUresult status = shim_fence_new(&fence);
    if (status != CUDA_SUCCESS) return status;
    const uint64_t argument[8] = {stream, fence.index, fence.value};
    status = shim_async(VGPU_CALL_wireFence, argument, NULL, 0);
    if (status == CUDA_SUCCESS) status = shim_fence_wait(&fence);
    if (status == CUDA_SUCCESS) shim_fence_free(&fence);
    return status;
}

/* ---- entries ---- */

static void forget_context(uint64_t context)
{
    struct shim_range range;
    uint64_t address = 0;
    while (shim_map_next(&shim_memory_map, address, &range)) {
        address = range.base + range.size;
        bool pinned = range.kind == SHIM_RANGE_PINNED || range.owner == SHIM_OWNER_PINNED;
        if (range.context != context || (range.kind != SHIM_RANGE_DEVICE && !pinned)) continue;
        /* Pinned memory of a context goes with it, as natively. Mappings and pools belong to no context. */
        if (shim_map_remove(&shim_memory_map, range.base, &range) && pinned) shim_pinned_give_back(&range);
    }
}

static pthread_once_t hooked = PTHREAD_ONCE_INIT;
static void hook(void) { shim_on_context_end(forget_context); }

static CUresult record_allocation(uint64_t address, uint64_t size)
{
    pthread_once(&hooked, hook);
    memory_reserve_addresses(address, size);
    const struct shim_range range = {.base = address, .size = size, .device_address = address,
                                     .context = shim_current_context_id(), .kind = SHIM_RANGE_DEVICE};
    shim_range_add(&range);
    return CUDA_SUCCESS;
}

CUresult cuMemAlloc_v2(void *dptr, size_t bytesize)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if (dptr == NULL || bytesize == 0) return CUDA_ERROR_INVALID_VALUE;
    if ((status = shim_capture_check()) != CUDA_SUCCESS) return status;
    const uint64_t argument[8] = {bytesize};
    uint64_t value[4] = {0};
    status = shim_reply(VGPU_CALL_cuMemAlloc_v2, argument, NULL, 0, value, NULL, 0, NULL);
    if (status != CUDA_SUCCESS) return status;
    *(CUdeviceptr *)dptr = value[0];
    return record_allocation(value[0], bytesize);
}

CUresult cuMemAllocPitch_v2(void *dptr, void *pPitch, size_t width, size_t height, unsigned int element_size)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if (dptr == NULL || pPitch == NULL || width == 0 || height == 0) return CUDA_ERROR_INVALID_VALUE;
    if (element_size != 4 && element_size != 8 && element_size != 16) return CUDA_ERROR_INVALID_VALUE;
    if ((status = shim_capture_check()) != CUDA_SUCCESS) return status;
    const uint64_t argument[8] = {width, height, element_size};
    uint64_t value[4] = {0};
    status = shim_reply(VGPU_CALL_cuMemAllocPitch_v2, argument, NULL, 0, value, NULL, 0, NULL);
    if (status != CUDA_SUCCESS) return status;
    *(CUdeviceptr *)dptr = value[0];
    *(size_t *)pPitch = (size_t)value[1];
    return record_allocation(value[0], value[1] * height);
}

CUresult cuMemFree_v2(unsigned long long dptr)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS || dptr == 0) return status;
    struct shim_range range;
    if (!shim_map_find(&shim_memory_map, dptr, &range)) return CUDA_ERROR_INVALID_VALUE;
    if (range.kind != SHIM_RANGE_GRAPH && (range.base != dptr || !memory_is_allocation(&range))) return CUDA_ERROR_INVALID_VALUE;
    if ((status = shim_capture_check()) != CUDA_SUCCESS) return status;
    const uint64_t argument[8] = {dptr};
    if (range.kind == SHIM_RANGE_GRAPH) {
        if (!shim_memory_free(dptr)) return CUDA_ERROR_INVALID_VALUE;
        return shim_reply(VGPU_CALL_wireMemoryFree, argument, NULL, 0, NULL, NULL, 0, NULL);
    }
    if (atomic_load_explicit(&shim_captures_active, memory_order_relaxed) != 0) {
        /* The driver may refuse it while capturing, and then the allocation stays. */
        status = shim_reply(VGPU_CALL_wireMemoryFree, argument, NULL, 0, NULL, NULL, 0, NULL);
        if (status == CUDA_SUCCESS) shim_map_remove(&shim_memory_map, dptr, NULL);
        return status;
    }
    /* Out of the table first: once the record is sent, another thread may be handed the same address. */
    if (!shim_map_remove(&shim_memory_map, dptr, NULL)) return CUDA_ERROR_INVALID_VALUE;
    return shim_async(VGPU_CALL_wireMemoryFree, argument, NULL, 0);
}

CUresult cuMemGetInfo_v2(size_t *free, size_t *total)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    const uint64_t argument[8] = {0};
    uint64_t value[4] = {0};
    status = shim_reply(VGPU_CALL_cuMemGetInfo_v2, argument, NULL, 0, value, NULL, 0, NULL);
    if (status != CUDA_SUCCESS) return status;
    if (free != NULL) *free = (size_t)value[0];
    if (total != NULL) *total = (size_t)value[1];
    return CUDA_SUCCESS;
}

CUresult cuMemGetAddressRange_v2(void *pbase, void *psize, unsigned long long dptr)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    struct shim_range range;
    if (!shim_map_find(&shim_memory_map, dptr, &range)) {
        const uint64_t argument[8] = {dptr};
        uint64_t value[4] = {0};
        status = shim_reply(VGPU_CALL_cuMemGetAddressRange_v2, argument, NULL, 0, value, NULL, 0, NULL);
        if (status != CUDA_SUCCESS) return status;
        range.base = value[0];
        range.size = value[1];
    }
    if (pbase != NULL) *(CUdeviceptr *)pbase = range.base;
    if (psize != NULL) *(size_t *)psize = (size_t)range.size;
    return CUDA_SUCCESS;
}

/* Managed memory needs the page faults of a real driver in the guest; the device attribute says 0 as well. */
CUresult cuMemAllocManaged(void *dptr, size_t bytesize, unsigned int flags)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if (dptr == NULL || bytesize == 0 || (flags != 1 && flags != 2)) return CUDA_ERROR_INVALID_VALUE;
    return shim_refuse(VGPU_CALL_cuMemAllocManaged);
}
